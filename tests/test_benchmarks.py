"""Every benchmark runs to its end: what it compares changes with the library, and nothing else would tell.

Which ratio comes out is the machine's business; that the two sides agree the scripts assert themselves.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "lang_vae": ["--rounds", "1", "--batch", "2", "--length", "4", "--injection", "prefix"],
    "gp_vae": ["--rounds", "1", "--batch", "2", "--length", "8", "--vocabulary", "64"],
}
WHOLE = {
    "gp_prior": ["--rounds", "1", "--threads", "1"],
    "gpt_vae": ["--rounds", "1"],
    "large_data": ["--megabytes", "3"],
    "ltm_generation": ["--repeats", "1", "--threads", "1"],
    "ltm_training": ["--repeats", "1", "--threads", "1"],
    "scaling": ["--skip-paper"],
}


def run(name: str, options: list[str], seconds: int) -> str:
    """What a benchmark prints; a missed target may end it with status 1, a defect ends it with a traceback."""
    ended = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", *options],
        capture_output=True, text=True, timeout=seconds, env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert "Traceback" not in ended.stderr, ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_in_small(name):
    assert "target" in run(name, SMALL[name], 200)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_benchmark_runs(name):
    assert run(name, WHOLE[name], 1500).strip()


def test_every_benchmark_is_run_here():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")}
    assert scripts == SMALL.keys() | WHOLE.keys()
