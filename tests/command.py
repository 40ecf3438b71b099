"""The command in this process, and a folder to run it in."""

import contextlib
import io
import shutil
import sys
from pathlib import Path

import pytest
from tests.training.runs import RECIPES, trained

from latentlm import cli

SWEEP = """\
recipe: small.yaml
scoring: {iw_samples: 1, limit: 2}
studies:
  steps:
    runs: {two: {}, one: {model.inference_steps: 1}}
"""
LONG = "the cat " * 60


def prepare(folder: Path) -> None:
    """A recipe, a sweep, texts and two saved models."""
    (folder / "small.yaml").write_text(RECIPES["ltm"], encoding="utf-8")
    (folder / "texts.txt").write_text("the cat sat\nsome dogs are in the garden\na café\n", encoding="utf-8")
    (folder / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(trained("ltm"), folder / "model")
    shutil.copytree(trained("autoregressive"), folder / "control")


def run(*arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of `latentlm …`; a defect raises."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["latentlm", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return end.value.code, out.getvalue(), err.getvalue()


def assert_one_sentence(status: int, err: str) -> None:
    assert status not in (0, None)
    assert err.startswith("latentlm: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert "None" not in err
