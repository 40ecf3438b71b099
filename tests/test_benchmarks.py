"""Every benchmark runs to its end: what it compares changes with the library, and nothing else would tell.

Which ratio comes out is the machine's business; that the two sides agree the scripts assert themselves.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "projection": ["--small", "--rounds", "1", "--threads", "1", "--vocabularies", "64"],
}
WHOLE = {
    "gp_vae": ["--rounds", "1", "--batch", "2", "--length", "8", "--vocabulary", "64"],
    "gp_prior": ["--rounds", "1", "--threads", "1"],
    "gpt_vae": ["--rounds", "1"],
    "lang_vae": ["--rounds", "1", "--batch", "2", "--length", "4", "--injection", "prefix"],
    "large_data": ["--megabytes", "3"],
    "ltm_generation": ["--repeats", "1", "--threads", "1"],
    "ltm_training": ["--repeats", "1", "--threads", "1", "--small", "--each"],
    "memory": ["--batch", "2"],
    "scaling": ["--skip-paper"],
    "step_profile": ["--batch", "1", "--rounds", "1", "--threads", "1"],
    "time_to_quality": [
        *("--train", "builtin:stories", "--valid", "builtin:stories", "--nll", "5", "--most", "4", "--every", "2"),
        *("--sequences", "4", "--threads", "1"),
    ],
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
    assert "ratio" in run(name, SMALL[name], 200)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_benchmark_runs(name):
    if name == "gpt_vae":
        pytest.importorskip("x_transformers", reason="the opponent is not installed")
    assert run(name, WHOLE[name], 1500).strip()


def test_every_benchmark_is_run_here():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")}
    assert scripts == SMALL.keys() | WHOLE.keys()


# ---- two runs of all of them -----------------------------------------------------------------------------------------


def results(path: Path, ratios: dict[str, float], cores: int = 2) -> Path:
    one = {"ours": 1.0, "other": 2.0, "unit": "s", "against": "plain", "target": None}
    comparisons = [{"what": what, "ratio": ratio, **one} for what, ratio in ratios.items()]
    path.write_text(json.dumps({"machine": {"cores": cores}, "benchmarks": {"b": {"comparisons": comparisons}}}))
    return path


def compared(before: Path, after: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "benchmarks" / "_compare.py"
    return subprocess.run([sys.executable, script, before, after, *options], capture_output=True, text=True)


def test_a_ratio_that_fell_is_told_and_ends_with_1(tmp_path):
    before = results(tmp_path / "before.json", {"a": 2.0, "c": 3.0})
    after = results(tmp_path / "after.json", {"a": 1.6, "c": 2.9})
    ended = compared(before, after)
    assert ended.returncode == 1
    assert "b: a: plain: 2.00 → 1.60  SLOWER" in ended.stdout and "2.90  SLOWER" not in ended.stdout
    assert ended.stderr == "1 of 2 ratios fell by more than 15%\n"
    assert compared(before, after, "--by", "0.3").returncode == 0


def test_what_does_not_compare_is_told(tmp_path):
    ended = compared(
        results(tmp_path / "a.json", {"a": 1.0, "b": 1.0}), results(tmp_path / "b.json", {"a": 1.0}, cores=4)
    )
    assert ended.returncode == 0
    assert "different machines or versions" in ended.stdout and "b: b: plain: only before" in ended.stdout


@pytest.mark.parametrize("content", ["", "[]", '{"machine": {}}'])
def test_a_file_of_something_else_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    ended = compared(tmp_path / "a.json", tmp_path / "a.json")
    assert ended.returncode == 1 and ended.stderr == f"{tmp_path / 'a.json'} is no file of benchmarks/_suite.py.\n"
