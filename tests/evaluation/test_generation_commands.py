"""`latentlm evaluate completions` and `samples`: what they print and write, and one sentence for each mistake."""

import json
import shutil

import pytest
from tests.command import assert_one_sentence, prepare, run
from tests.training.runs import trained, unchecked

COUNTS = {"--prompts": 6, "--prompt-tokens": 3, "--new-tokens": 4, "--each": 2}
COMPLETIONS = ["evaluate", "completions", "model", *(str(part) for pair in COUNTS.items() for part in pair)]
SAMPLES = ["evaluate", "samples", "model", "--number", "4", "--length", "6"]


@pytest.fixture(autouse=True)
def as_people_run_it():
    with unchecked():
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    with unchecked():
        prepare(folder)
        shutil.copytree(trained("gp_vae"), folder / "gp-vae")
    return folder


@pytest.fixture(autouse=True)
def working_folder(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("COLUMNS", "200")


def written(*arguments: str) -> tuple[str, dict]:
    status, out, err = run(*arguments, "--json", "figures.json")
    assert (status, err) == (0, "")
    with open("figures.json", encoding="utf-8") as file:
        return out, json.load(file)


def test_completions_with_everything():
    judges = ("--scorer", "control", "--features", "control", "--texts", "texts.jsonl")
    out, figures = written(*COMPLETIONS, *judges)
    assert list(figures)[:3] == ["task", "model", "family"]
    assert (figures["task"], figures["model"], figures["family"], figures["seed"]) == ("completions", "model", "LTM", 0)
    assert (figures["scorer"], figures["features"], figures["exact"]) == ("control", "control", False)
    assert figures["fixed_length"] is False  # the recipe is of sentences
    assert list(figures["rows"]) == ["greedy", "sampled", "human"]
    for row in ("greedy", "sampled"):
        assert 0 <= figures["rows"][row]["mauve"] <= 1
        assert figures["rows"][row]["generative_unit"] == "token"
    for label in ("MAUVE", "generative perplexity per token", "BLEU against", "human", "scored by control"):
        assert label in out
    assert "left out: give" not in out
    with open("texts.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) == 6 * (2 + 2 + 1)
    assert set(lines[0]) == {"row", "prompt", "text", "continuation"}


def test_what_is_left_out_is_said():
    out, figures = written(*COMPLETIONS)
    assert "MAUVE is left out: give --features" in out
    assert "Generative perplexity is left out: give a --scorer" in out
    assert "mauve" not in figures["rows"]["greedy"]


@pytest.mark.parametrize("model", ["control", "gp-vae"])
def test_other_families(model):
    out, figures = written("evaluate", "completions", model, *COMPLETIONS[3:])
    assert figures["family"] in ("Autoregressive", "GPVAE")
    assert ("one greedy text" in out) is figures["exact"] is (model == "control")
    out, figures = written("evaluate", "samples", model, *SAMPLES[3:])
    assert ("one greedy text" in out) is (model == "control")


def test_samples():
    out, figures = written(*SAMPLES, "--scorer", "control", "--texts", "samples.jsonl", "--seed", "3")
    assert (figures["task"], figures["number"], figures["length"], figures["seed"]) == ("samples", 4, 6, 3)
    assert list(figures["rows"]) == ["greedy", "sampled"]
    assert figures["rows"]["sampled"]["generative_perplexity"] > 1
    assert "texts/s" in out and "MAUVE" not in out
    _, again = written(*SAMPLES, "--scorer", "control", "--seed", "3")
    texts = {key: value for key, value in figures["rows"]["sampled"].items() if "second" not in key}
    assert texts.items() <= again["rows"]["sampled"].items()


@pytest.mark.parametrize("command", ["completions", "samples"])
def test_help_has_an_example(command):
    status, out, _ = run("evaluate", command, "--help")
    assert status == 0
    assert f"Example: latentlm evaluate {command} " in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([*COMPLETIONS, "--prompts", "100000"], "ask for fewer"),
        ([*COMPLETIONS, "--new-tokens", "1000"], "context of 48"),
        ([*COMPLETIONS, "--scorer", "gp-vae"], "given the length"),
        ([*COMPLETIONS, "--features", "gp-vae"], "gives no features"),
        ([*COMPLETIONS, "--scorer", "nothing"], "nothing"),
        ([*COMPLETIONS, "--data", "empty.txt"], "empty"),
        ([*COMPLETIONS, "--texts", "missing/texts.jsonl"], "does not exist"),
        ([*COMPLETIONS, "--set", "nonsense=1"], "nonsense"),
        ([*SAMPLES, "--length", "49"], "context of 48"),
        ([*SAMPLES, "--number", "0"], "--number"),
        ([*SAMPLES, "--json", "missing/figures.json"], "does not exist"),
        (["evaluate", "samples", "nothing"], "nothing"),
        (["evaluate", "completions"], "MODEL"),
    ],
)
def test_mistakes(arguments, says):
    status, _, err = run(*arguments)
    assert_one_sentence(status, err)
    assert status == 2 and says in err
