"""A run that is killed again and again, at any moment, is the run that was left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed.py")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 50])
def test_killed_runs_end_as_the_one_left_alone(tmp_path, kills):
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "runs"), str(kills), "0"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr
    assert f"\n{kills} kills in " in ended.stdout
