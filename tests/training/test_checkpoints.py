"""Checkpoints: whole or not there, the newest whole one is found, and nothing in them is executed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tests.training.runs import run

from latentlm import InputError, load
from latentlm.files import damage, write_checksums
from latentlm.training import checkpoints

SAVING = ("training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with the checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(folder, *SAVING)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """The same, cut short after its last checkpoint; a test may damage it."""
    shutil.copytree(whole, tmp_path / "run")
    for name in ("history.json", "model.safetensors", "config.json"):
        (tmp_path / "run" / name).unlink()
    return tmp_path / "run"


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


# ---- what a checkpoint is ----------------------------------------------------------------------------------------


def test_a_checkpoint_has_all_that_a_run_needs_and_no_pickle_of_arguments(whole):
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    names = {path.name for path in (whole / "checkpoint-3").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert not list(whole.rglob("training_args.bin"))
    listed = {line.split("  ")[1] for line in (whole / "checkpoint-3" / "SHA256SUMS").read_text().splitlines()}
    assert listed == names - {"SHA256SUMS"}
    assert not (whole / checkpoints.STAGING_FOLDER).exists()


def test_a_checkpoint_is_a_model(whole):
    assert torch.equal(load(whole / "checkpoint-3")[0].embed_tokens.weight, load(whole)[0].embed_tokens.weight)


def test_the_best_checkpoint_is_kept_and_named(tmp_path):
    best = ("training.load_best_model_at_end=true", "training.greater_is_better=true", "training.max_steps=4")
    evaluating = ("training.eval_strategy=steps", "training.eval_steps=1")
    # the worst by ELBO, so that it is an early one
    trained = run(tmp_path / "run", *SAVING, *evaluating, *best, "training.save_total_limit=1")
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    scores = trained.logged("eval_elbo_nll_per_token")
    assert scores.index(max(scores)) == 0
    assert "checkpoint-1" in kept
    state = json.loads((tmp_path / "run" / kept[-1] / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == tmp_path / "run" / "checkpoint-1"
    assert weights(tmp_path / "run") == weights(tmp_path / "run" / "checkpoint-1")


# ---- the newest whole one ----------------------------------------------------------------------------------------


def test_there_may_be_none(tmp_path):
    assert checkpoints.newest(tmp_path / "nothing") == (None, "")
    assert checkpoints.newest(tmp_path) == (None, "")


def test_the_newest_is_by_its_number(folder):
    (folder / "checkpoint-3").rename(folder / "checkpoint-10")
    os.utime(folder / "checkpoint-1")
    assert checkpoints.newest(folder) == (folder / "checkpoint-10", "")


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("damaged", [remove, cut, flip])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "SHA256SUMS"])
def test_one_that_is_not_whole_is_passed_over_and_named(folder, name, damaged):
    damaged(folder / "checkpoint-3" / name)
    found, remark = checkpoints.newest(folder)
    assert found == folder / "checkpoint-2"
    assert str(folder / "checkpoint-3") in remark and "not whole" in remark


def test_none_is_whole(folder):
    for number in (1, 2, 3):
        (folder / f"checkpoint-{number}" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"checkpoint-3.*model.safetensors is missing.*none is left"):
        run(folder, *SAVING, resume=True)


def test_what_was_half_written_is_no_checkpoint_and_goes(folder, whole):
    half = folder / checkpoints.STAGING_FOLDER / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text("half")
    run(folder, *SAVING, "training.max_steps=4", resume=True)
    assert damage(folder / "checkpoint-4") is None
    assert not (folder / checkpoints.STAGING_FOLDER).exists()


def test_a_damaged_one_is_written_anew(folder, whole):
    (folder / "checkpoint-3" / "optimizer.pt").unlink()
    said = []
    run(folder, *SAVING, resume=True, on_stage=said.append)
    assert "checkpoint-3 is not whole (optimizer.pt is missing): resuming from" in said[0]
    assert damage(folder / "checkpoint-3") is None
    assert weights(folder / "checkpoint-3") == weights(whole)


def test_a_run_that_is_replaced_leaves_no_checkpoints_to_resume_from(folder):
    once = ("training.save_strategy=steps", "training.save_steps=2", "training.max_steps=2", "training.seed=1")
    replaced = run(folder, *once, replace=True)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert torch.equal(load(folder / "checkpoint-2")[0].embed_tokens.weight, replaced.model.embed_tokens.weight)


# ---- the end of a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["history.json", "config.json", "model.safetensors"])
def test_a_run_that_lacks_only_its_end_gets_it(whole, tmp_path, lost):
    shutil.copytree(whole, tmp_path / "run")
    for name in {lost, "history.json"}:  # which is the last to be written
        (tmp_path / "run" / name).unlink()
    said = []
    run(tmp_path / "run", *SAVING, resume=True, on_stage=said.append)
    assert "has all 3 steps" in said[0]
    assert weights(tmp_path / "run") == weights(whole)
    loss = [entry["loss"] for entry in json.loads((tmp_path / "run" / "history.json").read_text()) if "loss" in entry]
    assert loss == [entry["loss"] for entry in json.loads((whole / "history.json").read_text()) if "loss" in entry]


def test_a_finished_run_says_so_and_is_left_alone(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    said = []
    again = run(whole, *SAVING, resume=True, on_stage=said.append)
    assert "has all its 3 steps: raise training.max_steps" in said[0]
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert torch.equal(again.model.embed_tokens.weight, load(whole)[0].embed_tokens.weight)
    assert again.history == json.loads((whole / "history.json").read_text())


def test_fewer_steps_than_there_are_is_a_mistake(whole):
    with pytest.raises(InputError, match=r"trained 3 steps already: give it training\.max_steps of at least"):
        run(whole, *SAVING, "training.max_steps=2", resume=True)


# ---- nothing is executed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_not_executed(folder, tmp_path, name):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"state": Trap()}, folder / "checkpoint-3" / name)
    write_checksums(folder / "checkpoint-3")  # whoever plants it can do that, too
    more = (*SAVING, "training.max_steps=4")
    if name == "training_args.bin":  # nobody reads it
        run(folder, *more, resume=True)
    else:
        with pytest.raises(InputError, match=r"checkpoint-3 cannot be resumed from"):
            run(folder, *more, resume=True)
    assert not (tmp_path / "trapped").exists()
