"""The table says which figures are bounds, and the picture is one."""

import io

import pytest
from rich.console import Console
from tests.training.runs import run, trained

from latentlm import load
from latentlm.data import Document, Sentences
from latentlm.evaluation.likelihood import evaluate
from latentlm.evaluation.report import curves, table


@pytest.fixture(scope="module")
def figures():
    rows = {}
    for family in ("ltm", "autoregressive"):
        model, tokenizer = load(trained(family))
        sequences = Sentences([Document("the cat sat"), Document("a dog ran")], tokenizer)
        rows[family] = evaluate(model, sequences, iw_samples=2)
    return rows


def printed(figures) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(table(figures))
    return console.file.getvalue()


def line(text: str, label: str) -> str:
    return next(row for row in text.splitlines() if label in row)


def test_a_bound_and_a_likelihood_are_marked_as_what_they_are(figures):
    text = printed(figures)
    assert "ltm" in text and "autoregressive" in text
    bound, exact = (figures[family]["elbo_nll_per_token"] for family in ("ltm", "autoregressive"))
    assert f"≤ {bound:.4f}" in line(text, "NLL by ELBO")
    assert f"= {exact:.4f}" in line(text, "NLL by ELBO")
    assert "a bound" in line(text, "NLL is")
    assert "exact" in line(text, "NLL is")


def test_what_a_model_does_not_have_is_a_dash(figures):
    text = printed({"autoregressive": figures["autoregressive"]})
    for label in ("KL", "mutual information", "active units", "reconstruction", "tokens trained on"):
        assert "–" in line(text, label)


def test_statistics_that_could_not_be_compared_are_a_dash(figures):
    unknown = dict.fromkeys(("active_units", "latent_units", "mutual_information"))
    text = printed({"trajectories": figures["ltm"] | unknown})
    assert "–" in line(text, "active units")
    assert "–" in line(text, "mutual information")


def test_the_curves_of_a_run_are_a_png(tmp_path):
    histories = {
        family: run(tmp_path / family, "training.eval_strategy=steps", "training.eval_steps=1", family=family).history
        for family in ("ltm", "autoregressive")
    }
    without_evaluation = {
        family: [entry for entry in history if "loss" in entry] for family, history in histories.items()
    }
    for name, shown in (("all", histories), ("training", without_evaluation), ("one", {"ltm": histories["ltm"]})):
        curves(shown, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
