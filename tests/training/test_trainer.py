"""What the Trainer does with our loss, our noise and our figures; every run here is a real one."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.training.runs import run, small_recipe

from latentlm.evaluation.likelihood import evaluate
from latentlm.loading import load
from latentlm.training.run import build_model

LOGGED = (
    "loss",
    "elbo_nll_per_token",
    "nll_per_token",
    "kl_per_token",
    "kl_per_sequence",
    "active_units",
    "beta",
    "tokens",
    "tokens_per_second",
)
# one step of plain gradient descent at a rate of 1
PLAIN = (
    "training.max_steps=1",
    "training.optim=sgd",
    "training.learning_rate=1.0",
    "training.lr_scheduler_type=constant",
    "training.lr_scheduler_kwargs={}",
    "training.warmup_steps=0",
    "training.weight_decay=0.0",
)


def change(run_):
    """How far training has moved the weights."""
    recipe = small_recipe("ltm")
    before = dict(build_model(recipe, run_.corpus.tokenizer).named_parameters())
    moved = [(parameter - before[name]).detach() for name, parameter in run_.model.named_parameters()]
    return math.sqrt(sum(float(part.square().sum()) for part in moved))


@pytest.mark.parametrize("family", ["ltm", "autoregressive"])
def test_every_log_has_our_figures(tmp_path, family):
    trained = run(tmp_path / "run", family=family)
    entries = [entry for entry in trained.history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert all(math.isfinite(entry[key]) for key in LOGGED)
        assert entry["elbo_nll_per_token"] == pytest.approx(entry["nll_per_token"] + entry["kl_per_token"], abs=1e-9)
        assert entry["loss"] == pytest.approx(entry["elbo_nll_per_token"], abs=1e-5)
        assert (entry["kl_per_token"] > 0) == (family == "ltm")
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == trained.history


def test_figures_of_a_log_are_over_all_steps_since_the_last_one(tmp_path):
    each = run(tmp_path / "each", "training.max_steps=4")
    pairs = run(tmp_path / "pairs", "training.max_steps=4", "training.logging_steps=2")
    assert pairs.logged("tokens") == each.logged("tokens")[1::2]
    first, second = (each.logged("tokens")[0], each.logged("tokens")[1] - each.logged("tokens")[0])
    nll = each.logged("nll_per_token")
    assert pairs.logged("nll_per_token")[0] == pytest.approx((first * nll[0] + second * nll[1]) / (first + second))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_tokens_are_counted_exactly(tmp_path, accumulation):
    epochs = ("training.max_steps=-1", "training.num_train_epochs=2", "training.logging_steps=1")
    size = (f"training.per_device_train_batch_size={64 // accumulation}",)
    trained = run(tmp_path / "run", *epochs, *size, f"training.gradient_accumulation_steps={accumulation}")
    assert trained.history[-1]["epoch"] == 2
    assert trained.logged("tokens")[-1] == 2 * sum(trained.corpus.train.lengths)


def test_the_last_step_is_logged(tmp_path):
    each = run(tmp_path / "each", "training.max_steps=3")
    seldom = run(tmp_path / "seldom", "training.max_steps=3", "training.logging_steps=2")
    assert [entry["step"] for entry in seldom.history if "loss" in entry] == [2, 3]
    assert seldom.logged("tokens")[-1] == each.logged("tokens")[-1]


@pytest.mark.parametrize("start", ["prior", "fixed", "learned"])
def test_each_start_of_inference_trains(tmp_path, start):
    trained = run(tmp_path / "run", f"model.inference_start={start}", "model.inference_start_log_variance=-1.0")
    assert all(math.isfinite(loss) for loss in trained.logged("loss"))
    parameters = dict(trained.model.named_parameters())
    assert ("start_mean" in parameters) == (start == "learned")
    if start == "learned":
        assert bool(parameters["start_mean"].any())
        assert not bool((parameters["start_log_variance"] == -1.0).any())


def test_beta_warms_up_and_weighs_the_kl_of_the_loss(tmp_path):
    beta = 0.5
    trained = run(tmp_path / "run", "training.max_steps=8", "model.beta_warmup=0.5", f"model.beta={beta}")
    logged = trained.logged("beta")
    assert logged == sorted(logged)
    assert logged[0] < logged[1] < logged[4] == logged[-1] == trained.model.beta == beta
    for step, entry in enumerate(entry for entry in trained.history if "loss" in entry):
        weight = beta * min(step / 4, 1)
        assert entry["loss"] == pytest.approx(entry["nll_per_token"] + weight * entry["kl_per_token"], abs=1e-5)


def test_the_beta_of_a_log_is_the_one_of_its_step(tmp_path):
    trained = run(tmp_path / "run", "training.max_steps=4", "model.beta_warmup=0.5")
    assert trained.logged("beta") == [0.0, 0.5, 1.0, 1.0]


def test_free_bits_charge_and_are_not_reported(tmp_path):
    charged = run(tmp_path / "run", "training.max_steps=1", "model.free_bits=0.5")
    units = charged.model.prior(1, 1).mean.numel()
    entry = charged.history[0]
    tokens_per_sequence = entry["kl_per_sequence"] / entry["kl_per_token"]
    charge = (entry["loss"] - entry["nll_per_token"]) * tokens_per_sequence
    assert charge >= 0.5 * units - 1e-4
    assert entry["elbo_nll_per_token"] == pytest.approx(entry["nll_per_token"] + entry["kl_per_token"])
    assert entry["kl_per_sequence"] < charge


def test_progress_ends_at_one_and_is_saved_at_every_checkpoint(tmp_path):
    trained = run(tmp_path / "run", "training.max_steps=4", "training.save_strategy=steps", "training.save_steps=1")
    assert float(trained.model.training_progress) == 1.0
    assert float(load(tmp_path / "run")[0].training_progress) == 1.0
    saved = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    assert float(saved["training_progress"]) == 0.75


def test_the_gradient_is_clipped_to_its_largest_norm(tmp_path):
    free = run(tmp_path / "free", *PLAIN, "training.max_grad_norm=1000.0")
    norm = free.logged("grad_norm")[0]
    assert change(free) == pytest.approx(norm, rel=1e-4)
    clipped = run(tmp_path / "clipped", *PLAIN, f"training.max_grad_norm={norm / 4}")
    assert clipped.logged("grad_norm")[0] == pytest.approx(norm, rel=1e-6)
    assert change(clipped) == pytest.approx(norm / 4, rel=1e-4)


def test_bf16_trains_close_to_float32_and_keeps_float32_weights(tmp_path, unchecked):
    full = run(tmp_path / "full")
    half = run(tmp_path / "half", "training.bf16=true")
    assert half.logged("loss") != full.logged("loss")
    assert half.logged("loss") == pytest.approx(full.logged("loss"), rel=1e-2)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert all(math.isfinite(grad) for grad in half.logged("grad_norm"))


@pytest.mark.parametrize("family", ["ltm", "autoregressive", "gpt_vae", "gp_vae"])
def test_layers_computed_anew_train_as_kept_ones(tmp_path, family):
    kept, anew = (
        run(tmp_path / str(switch), f"training.gradient_checkpointing={switch}", family=family).logged("loss")
        for switch in ("false", "true")
    )
    assert anew == pytest.approx(kept, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ltm", "autoregressive"])
def test_compiled_training_has_the_losses_of_eager_training(tmp_path, unchecked, family):
    # 19 fits no vector, and what a compiler gets wrong is the end of a row
    blocks = ["data.unit=blocks", "data.length=19"]
    eager = run(tmp_path / "eager", *blocks, family=family)
    compiled = run(tmp_path / "compiled", *blocks, "training.torch_compile=true", family=family)
    assert compiled.logged("loss") == pytest.approx(eager.logged("loss"), abs=1e-4)
    assert compiled.logged("grad_norm") == pytest.approx(eager.logged("grad_norm"), rel=1e-3)
    assert load(tmp_path / "compiled")[0].state_dict().keys() == eager.model.state_dict().keys()


@pytest.mark.parametrize("family", ["ltm", "autoregressive"])
def test_each_step_has_noise_of_its_own(tmp_path, family):
    """The same batch again and again, and weights that stand still."""
    still = ["training.learning_rate=0.0", "data.limit=16", "data.validation_fraction=0.5"]
    if family == "ltm":
        still += ["model.inference_lr_final=null"]
    losses = run(tmp_path / "run", *still, family=family).logged("loss")
    spread = max(losses) - min(losses)
    assert spread > 1e-3 if family == "ltm" else spread < 1e-5


def test_the_seed_chooses_weights_noise_and_order(tmp_path):
    one, same, other = (
        run(tmp_path / name, f"training.seed={seed}") for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one.logged("loss") == same.logged("loss")
    assert one.logged("loss") != other.logged("loss")


def test_evaluation_while_training_is_the_honest_one_on_the_first_sequences(tmp_path):
    trained = run(tmp_path / "run", "training.eval_strategy=steps", "training.eval_steps=3", "evaluation.batch_size=3")
    figures = evaluate(
        trained.model, torch.utils.data.Subset(trained.corpus.validation, range(8)), iw_samples=2, seed=0
    )
    entry = next(entry for entry in trained.history if "eval_elbo_nll_per_token" in entry)
    assert entry["step"] == 3
    for key in ("elbo_nll_per_token", "iw_nll_per_token", "prior_nll_per_token", "kl_per_sequence"):
        assert entry[f"eval_{key}"] == pytest.approx(figures[key], rel=1e-5)


def test_evaluation_while_training_changes_nothing_in_training(tmp_path):
    with_evaluation = run(tmp_path / "with", "training.eval_strategy=steps", "training.eval_steps=1")
    without = run(tmp_path / "without")
    assert with_evaluation.logged("loss") == without.logged("loss")


def test_tensorboard_has_our_figures_under_the_run(tmp_path):
    run(tmp_path / "run", "training.report_to=tensorboard")
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/{key}" for key in LOGGED} <= tags
    assert [event.step for event in events.Scalars("train/elbo_nll_per_token")] == [1, 2, 3]


def test_nothing_is_reported_when_nothing_is_asked_for(tmp_path):
    run(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("events.out*"))


def test_no_pickle_of_the_arguments_is_left(tmp_path):
    run(tmp_path / "run", "training.save_strategy=steps", "training.save_steps=1")
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    assert not list((tmp_path / "run").rglob("training_args.bin"))


def test_nothing_in_a_checkpoint_needs_code_to_be_unpickled(tmp_path):
    run(tmp_path / "run", "training.save_strategy=steps", "training.save_steps=3")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(tmp_path / "run" / "checkpoint-3" / name, weights_only=True)


def test_the_best_model_is_the_one_of_lowest_nll(tmp_path):
    trained = run(
        tmp_path / "run",
        "training.max_steps=4",
        "training.eval_strategy=steps",
        "training.eval_steps=2",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "training.load_best_model_at_end=true",
        "training.metric_for_best_model=elbo_nll_per_token",
    )
    best = min(trained.logged("eval_elbo_nll_per_token"))
    figures = evaluate(
        trained.model, torch.utils.data.Subset(trained.corpus.validation, range(8)), iw_samples=2, seed=0
    )
    assert figures["elbo_nll_per_token"] == pytest.approx(best, rel=1e-5)
