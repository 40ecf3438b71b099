"""Trains through the command, kills it with SIGKILL at random moments, resumes, and compares with a run left alone.

    python tests/invariants/killed.py FOLDER KILLS SEED

The library is imported once; each run is a fork of this process, so that a kill costs seconds, not the import.
A third of the kills come at any moment, a third while a checkpoint is written, a third around the end of the run.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import latentlm.training.run  # noqa: F401  what the command would import at its start, in every fork
from latentlm import cli
from latentlm.files import damage
from latentlm.training.checkpoints import STAGING_FOLDER

RECIPE = """\
model:
  family: ltm
  latents_per_layer: 2
  latent_size: 4
  inference_steps: 2
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  sliding_window: 4
  dropout: 0.1
data: {source: "builtin:sentences", limit: 400, unit: sentences, length: 48, vocab_size: 300}
training:
  max_steps: 30
  per_device_train_batch_size: 8
  logging_steps: 4
  eval_steps: 10
  save_steps: 3
  report_to: none
  use_cpu: true
evaluation: {sequences: 8, iw_samples: 2}
"""
STEPS = 30


def start(folder: Path, *arguments: str) -> int:
    """A process that trains; its output goes to log.txt."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open("log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            sys.argv = ["latentlm", "train", "small.yaml", "--output", str(folder), *arguments]
            try:
                cli.main()
            except SystemExit as end:
                status = end.code or 0
            log.flush()
    finally:
        os._exit(status)


def ended(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait_until(condition, pid: int) -> int | None:
    """Waits for something to be seen on the disk, or for the end of the process: its status."""
    while not condition():
        status = ended(pid)
        if status is not None:
            return status
        time.sleep(2e-4)
    return None


def wait_until_gone_and_back(folder: Path, pid: int) -> int | None:
    """As `wait_until`, for a folder that is made anew."""
    status = wait_until(lambda: not folder.exists(), pid)
    return wait_until(folder.exists, pid) if status is None else status


def outcome(folder: Path) -> tuple[str, list]:
    """Digest of the final weights, and every figure that was logged but times and the summary of a session."""
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    history = json.loads((folder / "history.json").read_text())
    dropped = ("tokens_per_second", "total_flos")
    entries = [entry for entry in history if "train_runtime" not in entry]
    return weights, [{key: value for key, value in entry.items() if key not in dropped} for entry in entries]


def main(home: Path, kills: int, seed: int) -> None:
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    torch.set_num_threads(1)
    Path("small.yaml").write_text(RECIPE)
    rng = random.Random(seed)
    begun = time.perf_counter()
    _, status = os.waitpid(start(Path("whole")), 0)
    duration = time.perf_counter() - begun
    assert status == 0, Path("log.txt").read_text()
    expected = outcome(Path("whole"))
    print(f"left alone: {duration:.1f} s, weights {expected[0][:12]}, {len(expected[1])} logged entries", flush=True)
    done = rounds = 0
    while done < kills:
        rounds += 1
        folder = Path(f"killed{rounds}")
        staging, last = folder / STAGING_FOLDER, folder / f"checkpoint-{STEPS}"
        while True:
            pid = start(folder, "--resume")
            aim = rng.choice(["any moment", "a save", "the end"]) if done < kills else "none"
            status = None
            if aim == "any moment":
                until = time.perf_counter() + rng.uniform(0, duration)
                status = wait_until(lambda until=until: time.perf_counter() > until, pid)
            elif aim == "a save":
                for _ in range(rng.randint(1, 4)):
                    status = wait_until_gone_and_back(staging, pid)
                    if status is not None:
                        break
                time.sleep(rng.uniform(0, 0.08))
            elif aim == "the end":
                status = wait_until(last.exists, pid)
                time.sleep(rng.uniform(0, 0.25))
            else:
                status = wait_until(lambda: False, pid)
            if status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status != -signal.SIGKILL:
                assert status == 0, Path("log.txt").read_text()
                break
            done += 1
            steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
            whole = [step for step in steps if damage(folder / f"checkpoint-{step}") is None]
            # the one that is being deleted, to keep two, may be half gone; the newest never is
            assert steps[-1:] == whole[-1:], (steps, whole)
            during = "while saving" if staging.exists() else ""
            print(f"kill {done:2d}, run {rounds}, aimed at {aim:10s}: checkpoints {whole} {during}", flush=True)
        found = outcome(folder)
        assert found[0] == expected[0], f"{folder}: other weights"
        assert found[1] == expected[1], f"{folder}: other figures"
        print(f"run {rounds} came to its end: weights {found[0][:12]} and all figures as left alone", flush=True)
    print(f"{done} kills in {rounds} runs; every run ended with the weights and figures of the one left alone")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
