"""The command line: what it prints, what it writes, and one sentence for every mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.command import LONG, SWEEP, assert_one_sentence, prepare, run
from tests.training.runs import unchecked

from latentlm import cli, options

VERBS = ("quickstart", "train", "sweep", "evaluate", "leaderboard", "generate", "encode", "push")


@pytest.fixture(autouse=True)
def as_people_run_it():
    with unchecked():
        yield


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """A folder with a recipe, a text and a saved model, which the commands run in."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def latentlm():
    """Runs the command in this process: status, stdout and stderr."""
    return run


# ---- help --------------------------------------------------------------------------------------------------------


def test_help_lists_every_verb(latentlm):
    status, out, err = latentlm("--help")
    assert (status, err) == (0, "")
    for verb in VERBS:
        assert re.search(rf"^  {verb} +\w", out, re.MULTILINE)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_shows_an_example(latentlm, verb):
    status, out, _ = latentlm(verb, "--help")
    assert status == 0
    assert f"Example: latentlm {verb} " in " ".join(out.split())


@pytest.mark.parametrize("verb", ["train", "sweep", "evaluate", "generate", "quickstart"])
def test_each_verb_with_figures_writes_them_to_a_file(latentlm, verb):
    assert "--json" in latentlm(verb, "--help")[1]


# ---- mistakes ----------------------------------------------------------------------------------------------------

MISTAKES = [
    # the command itself
    ("bogus", "bogus"),
    ("--bogus evaluate model", "--bogus"),
    ("--threads 0 evaluate model", "--threads"),
    # arguments and options; what they name is in tests/invariants/mistakes.py
    ("evaluate", "MODEL"),
    ("generate", "MODEL"),
    ("train", "RECIPE"),
    ("sweep", "SWEEP"),
    ("encode model --text a", "--output"),
    ("evaluate model --bogus", "--bogus"),
    ("evaluate model --batch-size many", "--batch-size"),
    ("evaluate model --batch-size 0", "--batch-size"),
    ("evaluate model --iw-samples 0", "--iw-samples"),
    ("evaluate model --seed x", "--seed"),
    ("evaluate model --reinfer-every 0 --prompt-tokens 2", "--reinfer-every"),
    ("evaluate model --prompt-tokens -1", "--prompt-tokens"),
    ("evaluate model --prior-samples -1", "--prior-samples"),
    ("evaluate model --diversity -1", "--diversity"),
    ("evaluate model --style-transfer -1", "--style-transfer"),
    ("evaluate model --reconstructions -1", "--reconstructions"),
    ("evaluate control --reconstructions 1 --limit 4 --iw-samples 1", "Autoregressive has no latents"),
    ("evaluate control --style-transfer 1 --limit 4 --iw-samples 1", "has no latents"),
    ("evaluate model --diversity 5 --limit 4 --iw-samples 1", "ask for fewer"),
    ("generate model --temperature warm", "--temperature"),
    ("generate model --temperature 0", "--temperature"),
    ("generate model --temperature -1", "--temperature"),
    ("generate model --top-p 1.5", "--top-p"),
    ("generate model --top-k -1", "--top-k"),
    ("generate model -n 0", "-n"),
    ("generate model --max-new-tokens 0", "--max-new-tokens"),
    ("sweep sweep.yaml --jobs 0", "--jobs"),
]


@pytest.mark.parametrize(("command", "words"), MISTAKES, ids=lambda value: value)
def test_a_mistake_ends_in_one_sentence(latentlm, working_folder, command, words):
    before = sorted(path.name for path in working_folder.iterdir())
    status, _, err = latentlm(*command.split())
    assert_one_sentence(status, err)
    assert words in err
    assert sorted(path.name for path in working_folder.iterdir()) == before


def test_nothing_at_all_is_answered_with_help(latentlm):
    status, out, err = latentlm()
    assert status == 2
    assert "Commands:" in out + err
    assert "Traceback" not in out + err


def test_debug_may_stand_after_the_verb(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["latentlm", "evaluate", "./nothing", "--debug"])
    with pytest.raises(ValueError, match="nothing does not exist"):
        cli.main()


def test_ctrl_c_ends_without_a_traceback(latentlm, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("latentlm.loading.load", interrupted)
    status, _, err = latentlm("evaluate", "model")
    assert (status, err) == (130, "latentlm: interrupted; what was saved is whole.\n")


def test_ctrl_c_while_the_library_is_imported_ends_as_it_does_later(tmp_path):
    """The command as it is installed, with a library whose import is interrupted."""
    (tmp_path / "latentlm").mkdir()
    (tmp_path / "latentlm" / "__init__.py").write_text("raise KeyboardInterrupt")
    places = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[1])])}
    ended = subprocess.run(
        [sys.executable, "-c", "import latentlm_command; latentlm_command.main()", "evaluate"],
        capture_output=True, text=True, env={**os.environ, **places},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (130, "latentlm: interrupted; what was saved is whole.\n")


@pytest.mark.parametrize(
    "words",
    [
        "evaluate MODEL --data a.txt --json a.txt",
        "evaluate MODEL --json=./a.txt --data a.txt",
        "evaluate zero-shot MODEL ptb=a.txt --json sub/../a.txt",
        "evaluate completions MODEL --texts a.txt --json a.txt",
        "evaluate calibration MODEL --plot a.png --json a.png",
        "encode MODEL --data a.npz --output a.npz",
    ],
)
def test_a_file_that_is_read_or_written_already_is_not_written_over(latentlm, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("kept")
    status, _, err = latentlm(*words.split())
    assert_one_sentence(status, err)
    assert "is named twice" in err
    assert (tmp_path / "a.txt").read_text() == "kept"


def test_a_folder_may_be_read_and_written_into(tmp_path):
    """As in leaderboard FOLDER --output FOLDER: new files come beside those that are read."""
    options.check_outputs(["leaderboard", str(tmp_path), "--output", str(tmp_path)])


def test_places_of_their_own_are_no_mistake():
    options.check_outputs(["evaluate", "m", "--data", "a.txt", "--json", "b.json", "--texts=c.jsonl", "ptb=d.txt"])
    options.check_outputs(["evaluate", "m", "--json"])
    options.check_outputs([])


@pytest.mark.slow
def test_a_real_ctrl_c_ends_a_real_run(working_folder):
    """A process of its own: training is stopped at its first steps, leaves a checkpoint, and goes on from it."""
    steps = ["training.max_steps=2000", "training.save_strategy=steps", "training.save_steps=100"]
    # tests that a script started in the background ignore SIGINT, and so would the process that they start
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heed}; from latentlm.cli import main; main()", "train", "small.yaml", *steps]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        told = next(line for line in process.stdout if "step 200 of 2000" in line)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
    assert "training LTM" in told
    assert process.returncode == 130
    assert "Traceback" not in err
    assert list((working_folder / "runs" / "small").glob("checkpoint-*"))


# ---- train -------------------------------------------------------------------------------------------------------


def test_train_leaves_a_model_and_prints_its_figures(latentlm, working_folder):
    evaluated = ["training.eval_strategy=steps", "training.eval_steps=3"]
    status, out, err = latentlm("train", "small.yaml", *evaluated, "--json", "figures.json")
    assert status == 0
    assert err == ""
    assert "eval_elbo_nll_per_token: " in out
    assert "latentlm evaluate runs/small" in out
    figures = json.loads((working_folder / "figures.json").read_text())
    assert f"eval_elbo_nll_per_token: {figures['eval_elbo_nll_per_token']:.4f}" in out
    names = {path.name for path in (working_folder / "runs" / "small").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "history.json"} <= names


def test_overrides_are_saved_with_the_recipe_that_was_trained(latentlm, working_folder):
    assert latentlm("train", "small.yaml", "training.max_steps=2", "--output", "mine")[0] == 0
    saved = (working_folder / "mine" / "recipe.yaml").read_text()
    assert "max_steps: 2" in saved
    # it is a recipe, too
    assert latentlm("train", "mine/recipe.yaml", "--output", "again")[0] == 0
    one, again = (json.loads((working_folder / name / "history.json").read_text()) for name in ("mine", "again"))
    assert [entry.get("loss") for entry in one] == [entry.get("loss") for entry in again]


def test_train_keeps_tokens_in_a_folder(latentlm, working_folder):
    options = ["data.validation=texts.txt", "data.cache=tokens", "training.max_steps=2"]
    for name in ("one", "again"):
        status, _, err = latentlm("train", "small.yaml", *options, "--output", name)
        assert (status, err) == (0, "")
    one, again = (json.loads((working_folder / name / "history.json").read_text()) for name in ("one", "again"))
    assert [entry.get("loss") for entry in one] == [entry.get("loss") for entry in again]
    assert (working_folder / "tokens" / "tokens.bin").stat().st_size > 0
    status, _, err = latentlm("train", "small.yaml", *options, "data.limit=100", "--output", "other")
    assert status == 2
    assert err == "latentlm: tokens holds the tokens of something else (limit): give another folder, or delete it.\n"


def test_resume_goes_on_from_the_newest_checkpoint(latentlm, working_folder):
    saving = ["training.save_strategy=steps", "training.save_steps=1", "training.max_steps=4", "--output", "run"]
    assert latentlm("train", "small.yaml", *saving)[0] == 0
    whole = json.loads((working_folder / "run" / "history.json").read_text())
    shutil.rmtree(working_folder / "run" / "checkpoint-4")
    assert latentlm("train", "small.yaml", *saving, "--resume")[0] == 0
    resumed = json.loads((working_folder / "run" / "history.json").read_text())
    assert [entry.get("loss") for entry in resumed] == [entry.get("loss") for entry in whole]


def test_resuming_with_another_model_is_a_mistake(latentlm):
    saving = ["training.save_strategy=steps", "training.save_steps=1", "--output", "run"]
    assert latentlm("train", "small.yaml", *saving)[0] == 0
    status, _, err = latentlm(
        "train", "small.yaml", *saving, "training.max_steps=5", "model.hidden_size=32", "--resume"
    )
    assert_one_sentence(status, err)


# ---- sweep -------------------------------------------------------------------------------------------------------


@pytest.fixture
def jobs_here(monkeypatch):
    """Jobs as threads of this process."""
    from concurrent.futures import ThreadPoolExecutor

    from latentlm.training import sweep_run

    monkeypatch.setattr(sweep_run, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))


@pytest.mark.usefixtures("jobs_here")
def test_sweep_shows_a_table_for_each_study_and_goes_on_where_it_was(latentlm, working_folder):
    command = ("--threads", "1", "sweep", "sweep.yaml", "training.max_steps=2", "--json", "rows.json")
    status, out, err = latentlm(*command)
    assert (status, err) == (0, "")
    assert "2 models, in runs/sweep" in out
    assert "steps (1 seed)" in out and "left in runs/sweep: studies.md, studies.json, studies.png" in out
    assert "### steps (1 seed)" in (working_folder / "runs" / "sweep" / "studies.md").read_text()
    rows = json.loads((working_folder / "rows.json").read_text())
    assert [row["run"] for row in rows] == ["two", "one"]
    assert json.loads((working_folder / "runs" / "sweep" / "studies.json").read_text()) == rows
    for row in rows:
        assert any(row["run"] in line and f"{row['iw_nll_per_token']:.4f}" in line for line in out.splitlines())
    for picture in ("studies.png", "curves.png"):
        assert (working_folder / "runs" / "sweep" / picture).read_bytes().startswith(b"\x89PNG")
    before = {path.name for path in (working_folder / "runs" / "sweep").iterdir()}
    status, out, _ = latentlm(*command)
    assert status == 0 and "2 models, 2 of them there already, in runs/sweep" in out
    assert json.loads((working_folder / "rows.json").read_text()) == rows
    assert {path.name for path in (working_folder / "runs" / "sweep").iterdir()} == before


@pytest.mark.usefixtures("jobs_here")
def test_a_run_of_a_sweep_that_fails_is_told_after_the_others(latentlm, working_folder):
    sweep = SWEEP.replace("one: {model", "bad: {data.source: empty.txt, model")
    (working_folder / "sweep.yaml").write_text(sweep)
    status, out, err = latentlm("--threads", "1", "sweep", "sweep.yaml", "--json", "rows.json")
    assert status == 2
    assert_one_sentence(status, err)
    assert "1 of 2 runs failed" in err and "empty.txt holds no text" in err
    assert "steps (1 seed)" in out
    assert [row["run"] for row in json.loads((working_folder / "rows.json").read_text())] == ["two"]


# ---- evaluate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["model", "control"])
def test_evaluate_prints_a_table_and_writes_json(latentlm, working_folder, model):
    status, out, err = latentlm("evaluate", model, "--iw-samples", "2", "--json", "figures.json")
    assert (status, err) == (0, "")
    figures = json.loads((working_folder / "figures.json").read_text())
    sign = "=" if figures["exact"] else "≤"
    assert f"{sign} {figures['elbo_nll_per_token']:.4f}" in out
    assert figures["sequences"] == 10


def test_evaluate_takes_any_text(latentlm, working_folder):
    assert latentlm("evaluate", "model", "--data", "texts.txt", "--json", "figures.json", "--iw-samples", "2")[0] == 0
    figures = json.loads((working_folder / "figures.json").read_text())
    assert figures["sequences"] == 3
    assert figures["bytes"] == len((working_folder / "texts.txt").read_bytes().replace(b"\n", b""))
    latentlm("evaluate", "model", "--data", "texts.txt", "--json", "one.json", "--limit", "1", "--iw-samples", "2")
    assert json.loads((working_folder / "one.json").read_text())["sequences"] == 1


def test_evaluate_says_when_it_does_not_score_all_of_a_text(latentlm, working_folder):
    (working_folder / "long.txt").write_text(LONG)
    _, out, err = latentlm("evaluate", "model", "--data", "long.txt", "--iw-samples", "2")
    assert re.search("cut|truncated|longer", out + err)


@pytest.mark.parametrize(
    "content", ["data: [", "data: {}", "data: {source: x, length: 0}", "data: {source: 3}", "[]", ""]
)
def test_a_damaged_recipe_beside_the_model_is_named(latentlm, working_folder, content):
    shutil.copytree("model", "copy")
    (working_folder / "copy" / "recipe.yaml").write_text(content)
    status, _, err = latentlm("evaluate", "copy")
    assert_one_sentence(status, err)
    assert "recipe.yaml" in err


def test_a_model_without_a_recipe_needs_data(latentlm, working_folder):
    shutil.copytree("model", "copy")
    (working_folder / "copy" / "recipe.yaml").unlink()
    status, _, err = latentlm("evaluate", "copy")
    assert_one_sentence(status, err)
    assert "--data" in err
    assert latentlm("evaluate", "copy", "--data", "texts.txt", "--iw-samples", "1")[0] == 0


def test_evaluate_adds_what_is_asked_for(latentlm, working_folder):
    asked = "--protocol paper --prompt-tokens 2 --reinfer-every 8 --prior-samples 2 --iw-samples 1 --limit 2"
    status, out, err = latentlm("evaluate", "model", *asked.split(), "--json", "figures.json")
    assert (status, err) == (0, "")
    figures = json.loads((working_folder / "figures.json").read_text())
    assert (figures["protocol"], figures["prompt_tokens"], figures["reinfer_every"]) == ("paper", 2, 8)
    for key in ("published_nll_per_token", "continuation_nll_per_token"):
        assert f"{figures[key]:.4f}" in out
    assert f"{figures['sample_entropy_nats']:.3f}" in out


def test_evaluate_adds_what_z_does_to_text(latentlm, working_folder):
    asked = "--diversity 2 --style-transfer 3 --iw-samples 1 --limit 4 --seed 1"
    status, out, err = latentlm("evaluate", "model", *asked.split(), "--json", "figures.json")
    assert (status, err) == (0, "")
    figures = json.loads((working_folder / "figures.json").read_text())
    assert (figures["diversity_prompts"], figures["diversity_prompt_tokens"]) == (2, 4)
    assert (figures["style_transfer_pairs"], figures["style_transfer_prompt_tokens"]) == (3, 4)
    assert "continuation_nll_per_token" not in figures
    for key, form in (("diversity_self_bleu", ".1f"), ("diversity_of_one_latent_self_bleu", ".1f")):
        assert format(figures[key], form) in out
    for key in ("style_transfer_recovered", "style_transfer_recovered_by_prior_z", "style_transfer_overlap"):
        assert format(figures[key], ".3f") in out


def test_evaluate_shows_texts_over_their_reconstructions(latentlm, working_folder):
    asked = ("--reconstructions", "7", "--iw-samples", "1", "--limit", "300")
    status, out, err = latentlm("evaluate", "model", *asked, "--json", "figures.json")
    assert (status, err) == (0, "")
    figures = json.loads((working_folder / "figures.json").read_text())
    assert figures["reconstruction_texts"] == len(figures["reconstruction_pairs"]) == 7
    for key, form in (("bleu", ".1f"), ("bleu_of_other_z", ".1f"), ("exact_match", ".3f")):
        assert format(figures[f"reconstruction_{key}"], form) in out
    assert "no likelihood" in out and "which has seen them" in out
    for source, _ in figures["reconstruction_pairs"][:5]:
        assert f"  x: {source}\n  z: " in out
    assert out.count("\n  x: ") == 5


def test_evaluate_can_infer_otherwise(latentlm, working_folder):
    found = []
    for settings in ((), ("--set", "inference_steps=2"), ("--set", "inference_steps=0")):
        command = ("evaluate", "model", "--iw-samples", "1", *settings, "--json", "figures.json")
        assert latentlm(*command)[0] == 0
        found.append(json.loads((working_folder / "figures.json").read_text()))
    assert found[0]["kl_per_token"] == found[1]["kl_per_token"] > 0
    assert found[2]["kl_per_token"] == pytest.approx(0, abs=1e-7)


def test_a_setting_may_be_written_as_in_a_recipe(latentlm):
    status, _, err = latentlm("generate", "model", "--set", "inference_lr=1e-1", "--max-new-tokens", "1")
    assert (status, err) == (0, "")


# ---- generate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["model", "control"])
def test_generate_is_repeatable_with_a_seed(latentlm, model):
    command = ["generate", model, "--prompt", "the", "--prompt", "some", "-n", "2", "--max-new-tokens", "6", "--seed"]
    status, one, err = latentlm(*command, "1")
    assert (status, err) == (0, "")
    assert one == latentlm(*command, "1")[1]
    assert one != latentlm(*command, "2")[1]


def test_generate_writes_what_it_prints(latentlm, working_folder):
    command = ["generate", "model", "--prompt", "the", "-n", "3", "--max-new-tokens", "6", "--json", "texts.json"]
    _, out, _ = latentlm(*command)
    written = json.loads((working_folder / "texts.json").read_text())
    assert len(written["texts"]) == 3
    assert out == "".join(text + "\n" for text in written["texts"])
    assert all(text.startswith("the") for text in written["texts"])


def test_generate_from_the_prior_fills_the_context(latentlm):
    status, out, _ = latentlm("generate", "model", "-n", "4", "--seed", "1")
    assert status == 0
    assert len(out) > 4


def test_greedy_needs_no_seed_where_there_is_no_latent(latentlm):
    command = ["generate", "control", "--greedy", "--prompt", "the", "--max-new-tokens", "8"]
    assert latentlm(*command)[1] == latentlm(*command)[1]


@pytest.mark.parametrize("model", ["model", "control"])
def test_a_beam_search_writes(latentlm, model):
    command = ["generate", model, "--greedy", "--beams", "3", "-n", "2", "--prompt", "the", "--max-new-tokens", "5"]
    status, out, err = latentlm(*command, "--seed", "1")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) >= 2


def test_generate_in_parts(latentlm):
    """A control writes the same; a model with latents goes on from other ones."""
    command = ["--prompt", "the", "--max-new-tokens", "12", "--seed", "1"]
    plain, parts = (latentlm("generate", "control", *command, *more) for more in ((), ("--reinfer-every", "3")))
    assert plain[0] == 0 and plain == parts
    status, out, err = latentlm("generate", "model", *command, "--reinfer-every", "3", "--set", "inference_steps=1")
    assert (status, err) == (0, "") and out.startswith("the")


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_generate_from_latents_of_encode(latentlm, suffix):
    """One text for each row, or for each row and prompt; each latent writes the text it would write alone."""
    file = f"z{suffix}"
    assert latentlm("encode", "model", "--data", "texts.txt", "--output", file)[0] == 0
    command = ["generate", "model", "--latents", file, "--greedy", "--max-new-tokens", "8", "--json", "texts.json"]
    written = []
    for prompts in ((), ("--prompt", "the"), ("--prompt", "a", "--prompt", "the", "--prompt", "some")):
        status, _, err = latentlm(*command, *prompts)
        assert (status, err) == (0, "")
        with open("texts.json") as texts:
            written.append(json.load(texts)["texts"])
    plain, one, three = written
    assert len(plain) == len(one) == len(three) == 3
    assert all(text.startswith("the") for text in one) and three[1] == one[1]
    assert len(set(plain)) == 3
    assert latentlm(*command, "--prompt", "the", "-n", "2", "--seed", "1")[0] == 2  # one greedy text for a latent


@pytest.mark.parametrize("option", [("--top-k", "1"), ("--top-p", "0"), ("--temperature", "1e-9")])
def test_narrow_sampling_is_greedy(latentlm, option):
    command = ["generate", "control", "--prompt", "the", "--max-new-tokens", "6"]
    assert latentlm(*command, *option)[1] == latentlm(*command, "--greedy")[1]


# ---- encode ------------------------------------------------------------------------------------------------------


def test_encode_keeps_the_order_of_texts(latentlm):
    texts = ["the cat sat", "some dogs are in the garden", "a café"]
    given = [part for text in texts for part in ("--text", text)]
    status, out, err = latentlm("encode", "model", *given, "--output", "by-text.npz")
    assert (status, err) == (0, "")
    assert "texts: 3; latents of 2 × 2 × 4; in by-text.npz" in out
    assert latentlm("encode", "model", "--data", "texts.txt", "--batch-size", "1", "--output", "by-data.npz")[0] == 0
    with np.load("by-text.npz") as one, np.load("by-data.npz") as other:
        np.testing.assert_allclose(one["mean"], other["mean"], atol=1e-5)
        assert one["ids"].tolist() == [0, 1, 2]
        assert np.abs(one["mean"][0] - one["mean"][1]).max() > 1e-3


def test_encode_can_infer_otherwise(latentlm):
    for name, settings in (("as-trained", ()), ("not-at-all", ("--set", "inference_steps=0"))):
        assert latentlm("encode", "model", "--text", "the cat sat", *settings, "--output", f"{name}.npz")[0] == 0
    with np.load("as-trained.npz") as one, np.load("not-at-all.npz") as other:
        assert np.abs(one["mean"]).max() > 1e-3
        assert np.abs(other["mean"]).max() == 0


# ---- threads -----------------------------------------------------------------------------------------------------


def test_threads_are_torchs(latentlm):
    import torch

    before = torch.get_num_threads()
    try:
        assert latentlm("--threads", "2", "generate", "model", "--max-new-tokens", "1")[0] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
