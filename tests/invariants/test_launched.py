"""What several processes do together is what one does: training, evaluation, and who writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.training.runs import RECIPES, run

from latentlm import load
from latentlm.evaluation.likelihood import evaluate
from latentlm.evaluation.measure import measure

# texts of many lengths, so that the processes' parts of a batch differ in their number of tokens
PLAIN = ("training.train_sampling_strategy=random",)
TIMES = ("tokens_per_second", "seconds", "inference_seconds")
# over vectors, which come together as one sum of each process
SUMS_OF_PROCESSES = ("kl_per_dimension", "aggregate_mean_rms", "aggregate_variance_ratio")

SCRIPT = """
import json, sys
from pathlib import Path
from tests.training.runs import run
from latentlm.evaluation.likelihood import evaluate
from latentlm.processes import is_main, rank_and_size
from latentlm.training.trainer import LatentTrainer

seen, step = [], LatentTrainer.training_step
def spy(self, model, inputs, *args, **kwargs):
    seen.append(inputs["index"].tolist())
    return step(self, model, inputs, *args, **kwargs)
LatentTrainer.training_step = spy

output = Path(sys.argv[1])
trained = run(output, *sys.argv[2:])
figures = evaluate(trained.model.eval(), trained.corpus.validation, batch_size=2, iw_samples=2)
(output.parent / f"rank{rank_and_size()[0]}.json").write_text(json.dumps({"seen": seen, "figures": figures}))
"""


def launched(folder: Path, *command: str, launcher: tuple[str, ...] = (), processes: int = 2) -> str:
    """Runs a command in several processes of one thread each; what it printed."""
    launcher = launcher or ("torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    # the repository's root for `tests`, and wherever latentlm is imported from here
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-m", *launcher, *command],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate()
        except BaseException:  # the test's timeout: a launcher that is killed would leave its processes behind
            process.terminate()
            print(*process.communicate(timeout=60), sep="\n")  # pytest shows it
            raise
    assert process.returncode == 0, err
    return out


def together(folder: Path, *overrides: str) -> list[dict]:
    """The small recipe in two processes: for each, the sequences it trained on and what it found in the end."""
    (folder / "script.py").write_text(SCRIPT)
    launched(folder, "script.py", str(folder / "two"), *overrides)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def largest_difference(folder: Path, model: torch.nn.Module) -> float:
    weights = load(folder)[0].state_dict()
    return max(float((weights[name] - value).abs().max()) for name, value in model.state_dict().items())


def comparable(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if name not in TIMES}


def test_two_processes_are_one_with_the_large_batch(tmp_path):
    first, second = together(tmp_path, *PLAIN, "training.per_device_train_batch_size=4", "data.limit=48")
    one = run(tmp_path / "one", *PLAIN, "data.limit=48")
    assert largest_difference(tmp_path / "two", one.model) < 1e-6
    # a log has the sums over both
    history = json.loads((tmp_path / "two" / "history.json").read_text())
    for key in ("loss", "elbo_nll_per_token", "kl_per_sequence", "grad_norm"):
        assert [entry[key] for entry in history if key in entry] == pytest.approx(one.logged(key), rel=1e-5)
    for key in ("tokens", "active_units"):
        assert [entry[key] for entry in history if key in entry] == one.logged(key)
    # evaluation: one sum, whoever computed its parts, and both processes know it
    assert comparable(first["figures"]) == comparable(second["figures"])
    alone = evaluate(load(tmp_path / "two")[0], one.corpus.validation, batch_size=2, iw_samples=2)
    for name, value in comparable(alone).items():
        expected = pytest.approx(value, abs=1e-12) if name in SUMS_OF_PROCESSES else value
        assert first["figures"][name] == expected, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="sentences by length"),
        pytest.param(PLAIN, id="random"),
        pytest.param(("data.unit=blocks", "data.length=16"), id="blocks"),
    ],
)
def test_no_sequence_is_seen_twice_in_an_epoch(tmp_path, overrides):
    # 38 sequences to train on: 4 batches of 4 for each process, and 6 that no full batch holds
    first, second = together(
        tmp_path, *overrides, "data.limit=40", "training.per_device_train_batch_size=4", "training.max_steps=8"
    )
    assert len(first["seen"]) == len(second["seen"]) == 8
    sequences = len(run(tmp_path / "one", *overrides, "data.limit=40", "training.max_steps=1").corpus.train)
    per_epoch = sequences // 8
    for epoch in range(8 // per_epoch):
        steps = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [index for rank in (first, second) for batch in rank["seen"][steps] for index in batch]
        assert len(seen) == len(set(seen)) == per_epoch * 8
        assert set(seen) <= set(range(sequences))


@pytest.mark.slow
def test_streamed_blocks_are_shared_out(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"{number} of {number * 7} people" for number in range(200)))
    source = tmp_path / "text.txt"
    first, second = together(
        tmp_path,
        *(f"data.source={source}", f"data.validation={source}", "data.streaming=true", "data.unit=blocks"),
        *("data.length=32", "data.limit=null", "training.per_device_train_batch_size=4", "training.max_steps=4"),
    )
    seen = [index for rank in (first, second) for batch in rank["seen"] for index in batch]
    assert len(seen) == len(set(seen)) == 32
    assert {index % 2 for batch in first["seen"] for index in batch} == {0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param((), id="torchrun"),
        pytest.param(
            # --multi_gpu is its name for torch's launcher; the one for CPUs needs MPI. Port 0: any that is free.
            (
                *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
                "--main_process_port=0",
            ),
            id="accelerate launch",
        ),
    ],
)
def test_the_command_in_two_processes(tmp_path, launcher):
    (tmp_path / "small.yaml").write_text(RECIPES["ltm"])
    halved = ("training.per_device_train_batch_size=4", "training.save_strategy=steps", "training.save_steps=2")
    command = ("-m", "latentlm", "train", "small.yaml", *PLAIN, "--output", "two")
    printed = launched(tmp_path, *command, *halved, launcher=launcher)
    assert printed.count("the model is in two") == 1  # one process prints
    one = run(tmp_path / "one", *PLAIN)
    assert largest_difference(tmp_path / "two", one.model) < 1e-6
    # both processes take up the checkpoint that one of them wrote
    printed = launched(tmp_path, *command, *halved, "training.max_steps=5", "--resume", launcher=launcher)
    assert printed.count("resuming from two/checkpoint-3") == 1
    one = run(tmp_path / "longer", *PLAIN, "training.max_steps=5", "training.save_strategy=steps")
    printed = launched(
        tmp_path,
        *("-m", "latentlm", "evaluate", "two", "--json", "two.json", "--batch-size", "4", "--reconstructions", "5"),
        launcher=launcher,
    )
    assert printed.count("seed 0") == 1
    figures = json.loads((tmp_path / "two.json").read_text())
    model, tokenizer = load(tmp_path / "two")
    alone = measure(model, one.corpus.validation, tokenizer=tokenizer, batch_size=4, reconstructions=5)
    alone["reconstruction_pairs"] = [list(pair) for pair in alone["reconstruction_pairs"]]
    for name, value in comparable(alone).items():
        expected = pytest.approx(value, abs=1e-12) if name in SUMS_OF_PROCESSES else value
        assert figures[name] == expected, name


@pytest.mark.slow
def test_one_process_that_diverges_ends_both(tmp_path):
    poison = """
import math
from transformers import TrainerCallback
class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, *, model, **_):
        if state.global_step == 1 and rank_and_size()[0] == 1:
            model.embed_tokens.weight.data[0, 0] = math.nan
"""
    script = SCRIPT.replace("output = ", poison + "\noutput = ").replace(
        "*sys.argv[2:])", "*sys.argv[2:], callbacks=[Poison()])"
    )
    (tmp_path / "script.py").write_text(script)
    with pytest.raises(AssertionError, match="training diverged at step 2"):
        launched(tmp_path, "script.py", str(tmp_path / "two"), *PLAIN, "training.per_device_train_batch_size=4")


@pytest.mark.slow
def test_a_job_of_one_process_says_so(tmp_path):
    with pytest.raises(AssertionError, match="generate is a job of one process"):
        launched(tmp_path, "-m", "latentlm", "generate", "model")
