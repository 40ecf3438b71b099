"""The monitor of posterior collapse: when it speaks, what it says, and that a run that collapses is told so."""

import io

import pytest
from rich.console import Console
from tests.toy import small_model
from tests.training.runs import run
from transformers import TrainerControl, TrainerState, TrainingArguments

from latentlm.training.collapse import CollapseMonitor, collapse, remedies


@pytest.mark.parametrize(
    "figures, words",
    [
        ({"kl_per_sequence": 0.003, "active_units": 0.0}, "q = p: the KL is 0.003 nats"),
        ({"kl_per_sequence": 0.05, "active_units": 3.0}, "q = p"),
        ({"kl_per_sequence": 4.0, "active_units": 0.0}, "q is the same for every text"),
        ({"kl_per_sequence": 4.0, "active_units": 2.0}, None),
        ({"kl_per_sequence": 4.0}, None),
        ({"loss": 3.0}, None),
        (
            {
                "eval_prior_nll_per_token": 2.0,
                "eval_reconstruction_nll_per_token": 2.0,
                "eval_kl_per_sequence": 5.0,
            },
            "does not use z",
        ),
        (
            {
                "eval_prior_nll_per_token": 2.3,
                "eval_reconstruction_nll_per_token": 2.0,
                "eval_kl_per_sequence": 5.0,
            },
            None,
        ),
    ],
)
def test_what_is_taken_for_collapse(figures, words):
    found = collapse(figures)
    assert (found is None) if words is None else (words in found)


def test_what_is_turned_already_is_not_advised():
    """In the order of docs/collapse.md, of what kept most of z alive; no word dropout, and never more β."""
    said = remedies(small_model("gpt_vae"), pretrained=False)
    assert said == (
        "turn model.free_bits=4 with model.free_bits_per=latent or model.kl_target=4 or model.beta_warmup=0.7 (now 0.0)"
    )
    freed = remedies(small_model("gpt_vae", free_bits=0.1), pretrained=False)
    assert "free_bits" not in freed and "encoder.pretraining_steps" in freed and "sliding_window" in freed
    assert "pretraining" not in remedies(small_model("gpt_vae", free_bits=0.1), pretrained=True)
    assert "pretraining" not in remedies(small_model("gpt_vae", inference="gradient", free_bits=0.1), pretrained=False)
    assert "beta_warmup" not in remedies(small_model("gpt_vae", beta_cycles=2), pretrained=False)
    every = {"free_bits": 0.1, "beta_warmup": 0.6, "sliding_window": 4}
    assert remedies(small_model("gpt_vae", **every), pretrained=True) == "turn model.beta (now 1.0) down"
    controlled = remedies(small_model("gpt_vae", kl_target=2.0, sliding_window=4), pretrained=True)
    assert controlled == "turn model.kl_target (now 2.0) up"  # β is the controller's


def spoken(monitor, model, *logs):
    """The lines that a monitor prints of these logs, one log a step."""

    state, arguments = TrainerState(), TrainingArguments()
    for entry in logs:
        state.global_step += 1
        monitor.on_log(arguments, state, TrainerControl(), logs=entry, model=model)
    return monitor.console.file.getvalue().splitlines()


def test_a_line_when_it_collapses_and_one_when_it_speaks_again():
    monitor, model = CollapseMonitor(Console(file=io.StringIO(), width=300)), small_model("gpt_vae")
    model.training_progress.fill_(0.05)
    dead, alive = {"kl_per_sequence": 0.01, "active_units": 0}, {"kl_per_sequence": 3.0, "active_units": 2}
    assert spoken(monitor, model, dead, dead) == []  # too early to tell
    model.training_progress.fill_(0.5)
    lines = spoken(monitor, model, alive, dead, dead, {"eval_loss": 1.0}, alive, alive, dead)
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 5", "step 7"]
    assert "q = p" in lines[0] and "turn model.free_bits=4" in lines[0] and "speaks again" in lines[1]


def test_a_kl_about_the_threshold_is_not_spoken_of_at_every_log():
    monitor, model = CollapseMonitor(Console(file=io.StringIO(), width=300)), small_model("gpt_vae")
    model.training_progress.fill_(0.5)
    assert len(spoken(monitor, model, *[{"kl_per_sequence": kl, "active_units": 2} for kl in (0.09, 0.11) * 10])) == 1


def test_a_control_and_a_pretrained_encoder_are_not_spoken_of():
    monitor = CollapseMonitor(Console(file=io.StringIO(), width=300))
    dead = {"kl_per_sequence": 0.0, "active_units": 0}
    control, model = small_model("autoregressive"), small_model("gpt_vae")
    control.training_progress.fill_(0.5)
    model.training_progress.fill_(-0.5)
    assert spoken(monitor, control, dead) == spoken(monitor, model, dead) == []


def test_a_run_that_collapses_is_told_so(tmp_path):
    """A decoder that sees everything, and a KL weighed so heavily that nothing else pays."""
    monitor = CollapseMonitor(Console(file=io.StringIO(), width=300))
    overrides = ("model.beta=20", "training.max_steps=30", "model.sliding_window=null", "training.learning_rate=2e-2")
    trained = run(tmp_path / "run", *overrides, family="gpt_vae", callbacks=[monitor])
    assert trained.logged("kl_per_sequence")[-1] < 0.1
    lines = monitor.console.file.getvalue().splitlines()
    assert len(lines) == 1 and "q = p" in lines[0]
