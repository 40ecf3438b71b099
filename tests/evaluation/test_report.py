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


def printed(figures, title="two models") -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(table(figures, title))
    return console.file.getvalue()


def line(text: str, label: str) -> str:
    return next(row for row in text.splitlines() if label in row)


def test_a_bound_and_a_likelihood_are_marked_as_what_they_are(figures):
    text = printed(figures)
    assert "two models" in text
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


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_curves_of_a_run_are_a_png(tmp_path, evaluated):
    strategy = "steps" if evaluated else "no"
    histories = {
        family: run(
            tmp_path / family, f"training.eval_strategy={strategy}", "training.eval_steps=1", family=family
        ).history
        for family in ("ltm", "autoregressive")
    }
    curves(histories, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
