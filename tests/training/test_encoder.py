"""What a recipe says of the encoder alone: pre-training, aggressive steps, the encoder of another model."""

import json

import pytest
import torch
from tests.training.runs import run, small_recipe, trained
from transformers import TrainerCallback

from latentlm import InputError, load
from latentlm.errors import DivergedError
from latentlm.training.run import build_model
from latentlm.training.trainer import LatentTrainer


class Watch(TrainerCallback):
    """Copies of the weights just before and just after each step of the optimiser for the whole model."""

    def __init__(self):
        self.seen = []

    def _copy(self, model):
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        self._copy(model)

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self._copy(model)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_pretraining_has_no_kl_and_leaves_the_encoder_alone_with_a_fresh_decoder(tmp_path):
    watch = Watch()
    overrides = ("encoder.pretraining_steps=2", "training.max_steps=5", "model.beta_warmup=0.5")
    result = run(tmp_path / "run", *overrides, family="gpt_vae", callbacks=[watch])
    # three steps remain: β warms up over half of those
    assert result.logged("beta") == [0.0, 0.0, 0.0, pytest.approx(2 / 3), 1.0]
    for entry in [entry for entry in result.history if "loss" in entry][:2]:
        assert entry["loss"] == pytest.approx(entry["nll_per_token"], abs=1e-5)
    pretrained = watch.seen[3]  # after step 2
    fresh = dict(build_model(small_recipe("gpt_vae", *overrides), result.corpus.tokenizer).named_parameters())
    begins = watch.seen[4]
    for name, weight in begins.items():
        expected = pretrained[name] if name.startswith("encoder") else fresh[name]
        assert torch.equal(weight, expected), name
        if not name.startswith("encoder") and not name.endswith("norm.weight"):
            assert not torch.equal(weight, pretrained[name]) or not weight.any(), name
    assert moved(watch.seen[4], watch.seen[5]) == set(begins)
    assert float(result.model.training_progress) == 1.0


def test_the_optimiser_forgets_the_old_decoder(tmp_path):
    """Adam's first step has the size of its rate whatever the gradient: moments of the old one would shrink it."""

    class Look(TrainerCallback):
        steps = None

        def on_step_end(self, args, state, control, *, model, optimizer, **kwargs):
            if state.global_step == 3:
                names = {p: name for name, p in model.named_parameters()}
                Look.steps = {names[p]: int(of["step"]) for p, of in optimizer.state.items()}

    run(tmp_path / "run", "encoder.pretraining_steps=2", family="gpt_vae", callbacks=[Look()])
    assert {count for name, count in Look.steps.items() if name.startswith("encoder")} == {3}
    assert {count for name, count in Look.steps.items() if not name.startswith("encoder")} == {1}


def test_aggressive_steps_move_the_encoder_alone(tmp_path):
    watch = Watch()
    overrides = ("encoder.aggressive_steps=3", "encoder.aggressive_until=0.5", "training.max_steps=4")
    overrides += ("training.warmup_steps=0",)  # whose first rate is 0
    result = run(tmp_path / "run", *overrides, family="gpt_vae", callbacks=[watch])
    fresh = dict(build_model(small_recipe("gpt_vae", *overrides), result.corpus.tokenizer).named_parameters())
    encoder = {name for name in fresh if name.startswith("encoder")}
    # before and after each step of the model: …, (2, 3) is the second, before which the encoder moved, too
    assert moved(fresh, watch.seen[0]) == moved(watch.seen[1], watch.seen[2]) == encoder
    assert moved(watch.seen[0], watch.seen[1]) == set(fresh)
    # half of training is over: steps 3 and 4 stand alone
    assert moved(watch.seen[3], watch.seen[4]) == moved(watch.seen[5], watch.seen[6]) == set()


def test_aggressive_steps_leave_no_gradient_behind(tmp_path):
    """The encoder's steps are over when the model's begins, however its batch is cut; and they are as large."""

    seen = []
    original = LatentTrainer.training_step

    def spy(self, model, *args, **kwargs):
        if not self.indices:
            seen.append([name for name, p in self.model.named_parameters() if p.grad is not None and p.grad.any()])
        return original(self, model, *args, **kwargs)

    overrides = ["encoder.aggressive_steps=3", "encoder.aggressive_until=1", "training.warmup_steps=0"]
    overrides += ["training.train_sampling_strategy=random", "training.adam_epsilon=1e-3"]
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentTrainer, "training_step", spy)
        for parts in (1, 2):
            cut = (
                f"training.per_device_train_batch_size={8 // parts}",
                f"training.gradient_accumulation_steps={parts}",
            )
            losses.append(run(tmp_path / str(parts), *overrides, *cut, family="gpt_vae").logged("loss"))
    assert seen == [[]] * 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_autoencoder_is_not_the_best_model(tmp_path):
    """By reconstruction none after it can be better; only those that were trained with a KL may be."""
    best = ("training.load_best_model_at_end=true", "training.metric_for_best_model=reconstruction_nll_per_token")
    steps = [f"training.{kind}_steps=2" for kind in ("save", "eval")]
    steps += [f"training.{kind}_strategy=steps" for kind in ("save", "eval")]
    overrides = (*best, *steps, "training.max_steps=8", "encoder.pretraining_steps=6")
    result = run(tmp_path / "run", *overrides, family="gpt_vae")
    assert float(result.model.training_progress) == 1.0


def test_a_step_of_the_encoder_that_diverges_says_where(tmp_path):
    overrides = ("encoder.aggressive_steps=1", "training.learning_rate=1e30", "training.warmup_steps=0")
    with pytest.raises(DivergedError, match=r"diverged at step [1-9].* \(sequences [0-9]"):
        run(tmp_path / "run", *overrides, "training.max_grad_norm=0", family="gpt_vae")


def test_aggressive_steps_end(tmp_path):
    overrides = ("training.max_steps=4", "training.logging_steps=1")
    never = run(tmp_path / "never", *overrides, family="gpt_vae")
    zero = run(
        tmp_path / "zero", *overrides, "encoder.aggressive_steps=3", "encoder.aggressive_until=0", family="gpt_vae"
    )
    assert never.logged("loss") == zero.logged("loss")


def test_the_first_encoder_may_be_another_models(tmp_path):
    source = trained("gpt_vae")
    result = run(tmp_path / "run", f"encoder.initial={source}", "training.max_steps=1", family="gpt_vae")
    watch = Watch()
    result = run(
        tmp_path / "watched",
        f"encoder.initial={source}",
        f"data.tokenizer={source}",
        family="gpt_vae",
        callbacks=[watch],
    )
    theirs = dict(load(source)[0].named_parameters())
    fresh = dict(build_model(small_recipe("gpt_vae"), result.corpus.tokenizer).named_parameters())
    for name, weight in watch.seen[0].items():
        assert torch.equal(weight, theirs[name] if name.startswith("encoder") else fresh[name])


@pytest.mark.parametrize(
    "overrides, family, words",
    [
        (("encoder.initial=nothing",), "gpt_vae", "nothing does not exist"),
        (("data.vocab_size=280",), "gpt_vae", "does not know this vocabulary: give data.tokenizer="),
        (("model.latent_size=5",), "gpt_vae", "is another .for one, encoder"),
        (("model.pooling=last",), "gpt_vae", "is another .for one, pooling"),
        (("model.encoder_layers=2",), "gpt_vae", "is another .for one, encoder.transformer.layers.1"),
        (("model.encoder_batch_norm=0.5",), "gpt_vae", "is another .for one, encoder_norm"),
        (("model.inference=amortised",), "ltm", "holds a GPTVAE, and the encoder must be one of the family LTM"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(tmp_path, overrides, family, words):
    source = trained("gpt_vae")
    given = overrides if "initial" in overrides[0] else (f"encoder.initial={source}", *overrides)
    with pytest.raises(InputError, match=words):
        run(tmp_path / "run", *given, family=family)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "override, family, words",
    [
        ("encoder.pretraining_steps=3", "gpt_vae", "pretraining_steps must be less than training.max_steps, 3"),
        ("encoder.pretraining_steps=-1", "gpt_vae", "pretraining_steps must be at least 0"),
        ("encoder.aggressive_until=1.5", "gpt_vae", "aggressive_until is a fraction"),
        ("encoder.aggresive_steps=1", "gpt_vae", "did you mean aggressive_steps"),
        ("encoder.aggressive_steps=1", "autoregressive", "has no encoder"),
        ("encoder.aggressive_steps=1", "ltm", "has no encoder"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_data_is_read(override, family, words):
    with pytest.raises(InputError, match=words):
        small_recipe(family, override)


def test_pretraining_longer_than_the_epochs_is_refused(tmp_path):
    epochs = ("training.max_steps=-1", "training.num_train_epochs=1", "encoder.pretraining_steps=5000")
    with pytest.raises(InputError, match="pretraining_steps is 5000 of"):
        run(tmp_path / "run", *epochs, family="gpt_vae")


def test_a_resumed_run_has_the_same_encoder_section(tmp_path):
    saved = ("training.save_strategy=steps", "training.save_steps=1", "training.max_steps=2")
    run(tmp_path / "run", *saved, family="gpt_vae")
    with pytest.raises(InputError, match=r"another recipe \(encoder.aggressive_steps\)"):
        run(tmp_path / "run", *saved, "encoder.aggressive_steps=1", family="gpt_vae", resume=True)


def test_a_controller_brings_the_kl_to_its_target(tmp_path):
    """From a KL far above and far below; β is what moves, and its value is saved with the weights."""
    overrides = ("training.max_steps=60", "model.kl_target=2.0", "training.learning_rate=3e-3", "data.limit=100")
    result = run(tmp_path / "run", *overrides, family="gpt_vae")
    kl, beta = result.logged("kl_per_sequence"), result.logged("beta")
    assert beta[0] == pytest.approx(0.01) and max(beta) <= 1
    for before, after, seen in zip(beta, beta[1:], kl, strict=False):
        error = max(-1, min(1, (seen - 2) / 2))
        assert after == pytest.approx(min(max(before * (1 + 0.03 * error), 1e-4), 1), rel=1e-4)
    loaded, _ = load(tmp_path / "run")
    assert loaded.beta == pytest.approx(result.model.beta)
    assert "controlled_beta" in json.dumps(sorted(loaded.state_dict()))
