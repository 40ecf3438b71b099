"""What must not change a training run: how its batches are cut, and whether it was interrupted."""

import shutil

import pytest
from tests.training.runs import run, trained
from transformers import TrainerCallback

from latentlm import InputError
from latentlm.files import LOCK_FILE, alone_in
from latentlm.training.trainer import LatentTrainer

TEXT = "\n".join(f"{person} {verb} the {thing}" for person in "abcdefgh" for verb in "pqrs" for thing in "uvwxyz")
TIMES = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
# texts of many lengths, so that parts of a batch differ in their number of tokens
PLAIN = ("training.train_sampling_strategy=random",)


def largest_difference(one, other):
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return max(float((first - second).abs().max()) for first, second in pairs)


# with an ε at which Adam does not make whole steps of rounding, where β is small
REMEDIES = ("model.kl_target=2.0", "model.latent_dropout=0.3", "training.adam_epsilon=1e-3")
REMEDIES += ("model.free_bits=0.2", "model.free_bits_per=latent", "model.word_dropout=0.3")


# all that GP-VAE charges beside the ELBO
CHARGES = ("model.label_smoothing=0.1", "model.horizons=2", "model.embedding_regulariser=0.1", *REMEDIES[2:])


@pytest.mark.parametrize(
    "family, own",
    [("ltm", ()), ("gpt_vae", ()), ("gpt_vae", REMEDIES), ("gp_vae", ()), ("gp_vae", CHARGES), ("autoregressive", ())],
    ids=str,
)
def test_accumulation_is_the_large_batch(tmp_path, family, own):
    large = run(tmp_path / "large", *PLAIN, *own, family=family)
    accumulated = run(
        tmp_path / "accumulated",
        *PLAIN,
        *own,
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=4",
        family=family,
    )
    assert largest_difference(large, accumulated) < 1e-6
    for key in ("loss", "elbo_nll_per_token", "kl_per_token", "grad_norm"):
        assert accumulated.logged(key) == pytest.approx(large.logged(key), rel=1e-5)
    for key in ("tokens", "active_units"):
        assert accumulated.logged(key) == large.logged(key)
    assert accumulated.logged("beta") == pytest.approx(large.logged("beta"), rel=1e-5)


class Interrupt(TrainerCallback):
    """Ends a run as somebody at the keyboard would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def uninterrupted_and_resumed(folder, *overrides, stop=3, family="ltm"):
    overrides = (
        "training.max_steps=5",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "training.eval_strategy=steps",
        "training.eval_steps=5",
        *overrides,
    )
    whole = run(folder / "whole", *overrides, family=family)
    with pytest.raises(KeyboardInterrupt):
        run(folder / "resumed", *overrides, family=family, callbacks=[Interrupt(stop)])
    return whole, run(folder / "resumed", *overrides, family=family, resume=True)


def figures(run_):
    dropped = {*TIMES, "total_flos"}
    return [{key: value for key, value in entry.items() if key not in dropped} for entry in run_.history]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="sentences"),
        pytest.param(("data.unit=blocks", "data.length=16", "data.limit=12"), id="blocks, several epochs"),
        pytest.param(
            (
                *PLAIN,
                "model.dropout=0.2",
                "model.beta_warmup=0.7",
                "model.inference_start=learned",
                "model.free_bits=0.1",
                "training.per_device_train_batch_size=4",
                "training.gradient_accumulation_steps=2",
            ),
            id="schedules and accumulation",
        ),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, overrides):
    whole, resumed = uninterrupted_and_resumed(tmp_path, *overrides)
    assert largest_difference(whole, resumed) == 0
    assert figures(whole) == figures(resumed)


@pytest.mark.parametrize(
    "overrides, stop",
    [
        pytest.param(("encoder.pretraining_steps=2",), 2, id="resumed where the decoder is made anew"),
        pytest.param(("encoder.pretraining_steps=3", "model.beta_cycles=2"), 2, id="while the encoder is pre-trained"),
        pytest.param(("encoder.pretraining_steps=1", "model.kl_target=1.0"), 3, id="after it, with a controller"),
        pytest.param(
            ("encoder.aggressive_steps=2", "encoder.aggressive_until=0.7", "model.encoder_batch_norm=0.5"),
            3,
            id="between the encoder's own steps",
        ),
        pytest.param(("model.word_dropout=0.3", "model.latent_dropout=0.3"), 3, id="dropouts"),
    ],
)
def test_remedies_against_collapse_resume_exactly(tmp_path, overrides, stop):
    whole, resumed = uninterrupted_and_resumed(tmp_path, *overrides, stop=stop, family="gpt_vae")
    assert largest_difference(whole, resumed) == 0
    assert figures(whole) == figures(resumed)


@pytest.fixture
def streamed(tmp_path):
    """Overrides for a streamed corpus of some 40 blocks, 5 batches."""
    (tmp_path / "text.txt").write_text(TEXT)
    return (
        f"data.source={tmp_path / 'text.txt'}",
        f"data.validation={tmp_path / 'text.txt'}",
        "data.streaming=true",
        "data.unit=blocks",
        "data.length=32",
        "data.limit=null",
    )


def test_a_resumed_run_is_the_uninterrupted_one_when_streaming(tmp_path, streamed):
    whole, resumed = uninterrupted_and_resumed(tmp_path, *streamed)
    assert largest_difference(whole, resumed) == 0
    assert figures(whole) == figures(resumed)


def test_a_run_resumed_in_a_later_epoch_of_a_stream_is_the_uninterrupted_one(tmp_path, streamed):
    whole, resumed = uninterrupted_and_resumed(tmp_path, *streamed, "training.max_steps=8", stop=7)
    assert largest_difference(whole, resumed) == 0
    assert figures(whole) == figures(resumed)


def test_each_epoch_of_a_stream_has_all_blocks_in_an_order_of_its_own(tmp_path, streamed, monkeypatch):
    seen = []
    compute_loss = LatentTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        seen.extend(map(tuple, inputs["input_ids"].tolist()))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LatentTrainer, "compute_loss", spy)
    alone = ("training.per_device_train_batch_size=1", "training.max_steps=12", "data.length=150")
    trained = run(tmp_path / "run", *streamed, *alone)
    blocks = [tuple(item["input_ids"].tolist()) for item in trained.corpus.train]
    first, second = seen[: len(blocks)], seen[len(blocks) : 2 * len(blocks)]
    assert 1 < len(second) == len(blocks)
    assert sorted(first) == sorted(second) == sorted(blocks)
    assert first != second


@pytest.mark.parametrize("logging", [1, 3])
def test_a_resumed_run_counts_tokens_from_the_start(tmp_path, logging):
    steps = ("training.max_steps=6", f"training.logging_steps={logging}")
    whole, resumed = uninterrupted_and_resumed(tmp_path, *steps)
    assert whole.logged("tokens") == resumed.logged("tokens")
    assert figures(whole) == figures(resumed)


def test_a_new_run_does_not_begin_in_the_folder_of_an_old_one(tmp_path):
    saving = ("training.save_strategy=steps", "training.save_steps=2")
    run(tmp_path / "run", *saving)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds a run already"):
        run(tmp_path / "run", *saving, "training.seed=1")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damaged", ["trainer_state.json", "model.safetensors", "optimizer.pt"])
def test_half_a_checkpoint_is_passed_over(tmp_path, damaged):
    saving = ("training.save_strategy=steps", "training.save_steps=1")
    whole = run(tmp_path / "run", *saving)
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    (tmp_path / "killed" / "checkpoint-3" / damaged).unlink()
    resumed = run(tmp_path / "killed", *saving, resume=True)
    assert largest_difference(whole, resumed) == 0


# ---- what a resumed run takes from its recipe ---------------------------------------------------------------------

BEGUN = ("training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=1")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of six steps that was stopped after its fourth, with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.raises(KeyboardInterrupt):
        run(folder, *BEGUN, callbacks=[Interrupt(4)])
    return folder


@pytest.fixture
def folder(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


@pytest.mark.parametrize(
    "change", ["learning_rate=1e-3", "weight_decay=0.9", "adam_beta1=0.5", "adam_beta2=0.5", "adam_epsilon=1.0"]
)
def test_the_rates_are_those_of_the_recipe(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "same")
    as_before = run(tmp_path / "same", *BEGUN, resume=True)
    changed = run(folder, *BEGUN, f"training.{change}", resume=True)
    assert largest_difference(as_before, changed) > 0
    if change.startswith("learning_rate"):
        before, after = (trained.logged("learning_rate") for trained in (as_before, changed))
        assert after[:2] == before[:2]
        assert after[2:] == pytest.approx([0.1 * rate for rate in before[2:]])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("training.per_device_train_batch_size=4", "sequences per step"),
        ("training.gradient_accumulation_steps=2", "sequences per step"),
        ("training.seed=1", "training.seed"),
        ("training.train_sampling_strategy=random", "train_sampling_strategy"),
    ],
)
def test_the_order_of_the_data_must_be_the_same(folder, change, named):
    with pytest.raises(InputError, match=f"checkpoint-2 was reached with another .*{named}.*: resume with the same"):
        run(folder, *BEGUN, change, resume=True)


def test_a_batch_may_be_cut_otherwise(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "same")
    parts = ("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2")
    assert (
        largest_difference(run(tmp_path / "same", *BEGUN, resume=True), run(folder, *BEGUN, *parts, resume=True)) < 1e-6
    )


def test_the_text_must_be_the_same(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    given = (*BEGUN, f"data.source={tmp_path / 'text.txt'}", f"data.tokenizer={trained('ltm')}")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", *given, callbacks=[Interrupt(4)])
    (tmp_path / "text.txt").write_text(TEXT.replace("the", "a"))
    with pytest.raises(InputError, match=r"another contents of data.source: resume with the same"):
        run(tmp_path / "run", *given, resume=True)


def test_two_runs_do_not_share_a_folder(folder):
    with alone_in(folder), pytest.raises(InputError, match=f"another process works in {folder}"):
        run(folder, *BEGUN, resume=True)
    run(folder, *BEGUN, resume=True)
    assert not (folder / LOCK_FILE).exists()
