"""What a person sees while it works: a line that moves in a terminal, a few lines in a file."""

import io
import re

import pytest
from rich.console import Console
from tests.training.runs import run
from transformers import TrainerCallback

from latentlm.training.progress import ProgressLine, counted


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def console(terminal: bool, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width)


def test_a_file_has_a_line_for_each_tenth(tmp_path):
    out = console(terminal=False)
    run(tmp_path / "run", "training.max_steps=20", callbacks=[ProgressLine(out, "training")])
    lines = out.file.getvalue().splitlines()
    assert [line.partition(";")[0] for line in lines] == [f"training: step {n} of 20" for n in range(2, 21, 2)]
    assert re.search(r"ELBO \d+\.\d+ nats/token, KL \d+\.\d+ nats/sequence, [\d,]+ tokens/s", lines[-1])


@pytest.mark.parametrize("family, figure", [("ltm", "ELBO"), ("autoregressive", "NLL")])
def test_figures_stand_at_their_own_step(tmp_path, family, figure):
    out = console(terminal=False)
    overrides = ("training.max_steps=20", "training.logging_steps=4")
    done = run(tmp_path / "run", *overrides, family=family, callbacks=[ProgressLine(out, "training")])
    logged = {entry["step"]: entry["elbo_nll_per_token"] for entry in done.history if "elbo_nll_per_token" in entry}
    lines = out.file.getvalue().splitlines()
    assert f"; {figure} {logged[20]:.3f} nats/token" in lines[-1]
    assert f"step 18 of 20; at step 16 {figure} {logged[16]:.3f} nats/token" in lines[-2]


def test_a_terminal_has_one_line_that_ends(tmp_path):
    out = console(terminal=True)
    run(tmp_path / "run", callbacks=[ProgressLine(out, "training")])
    text = out.file.getvalue()
    assert "3/3" in text
    assert "nats/token" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_a_terminal_has_its_cursor_again_after_an_interrupted_run(tmp_path):
    out = console(terminal=True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", callbacks=[ProgressLine(out, "training"), Interrupt()])
    text = out.file.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_a_narrow_terminal_shows_how_far_it_is(tmp_path):
    out = console(terminal=True, width=80)
    run(tmp_path / "run", "training.max_steps=12", callbacks=[ProgressLine(out, "training")])
    assert "12/12" in out.file.getvalue()


def test_a_counted_bar_is_for_terminals(tmp_path):
    for terminal in (True, False):
        out = console(terminal)
        with counted(out, "evaluating") as on_progress:
            on_progress(3, 8)
        assert ("3/8" in out.file.getvalue()) == terminal
        if terminal:
            assert out.file.getvalue().count("\x1b[?25l") == out.file.getvalue().count("\x1b[?25h")


def test_a_counted_bar_ends_with_an_error(tmp_path):
    out = console(terminal=True)
    with pytest.raises(ValueError, match="mistake"), counted(out, "evaluating"):
        raise ValueError("mistake")
    assert out.file.getvalue().count("\x1b[?25l") == out.file.getvalue().count("\x1b[?25h")
