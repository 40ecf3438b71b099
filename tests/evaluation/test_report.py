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


OF_LATENTS = ("KL, nats", "aggregate", "per batch", "mutual information", "active units", "reconstruction", "prior z")


def test_what_a_model_does_not_have_is_a_dash_beside_one_that_has_it(figures):
    text = printed(figures)
    for label in OF_LATENTS:
        assert line(text, label).count("–") == 1
    assert line(text, "tokens trained on").count("–") == 2


def test_a_row_that_no_model_fills_is_left_out(figures):
    text = printed({"autoregressive": figures["autoregressive"]})
    for label in (*OF_LATENTS, "continuation", "prior samples", "as published"):
        assert label not in text
    assert "–" in line(text, "tokens trained on")


def test_what_else_was_measured_has_rows(figures):
    more = {
        "published_nll_per_token": 1.23456,
        "published_perplexity": 12.3456,
        "continuation_nll_per_token": 2.34567,
        "prompt_tokens": 8,
        "reinfer_every": None,
        "sample_entropy_nats": 1.5,
        "distinct_1": 0.25,
        "distinct_2": 0.5,
        "distinct_3": 0.75,
        "samples_per_second": 7.25,
        "diversity_self_bleu": 12.34,
        "diversity_of_one_latent_self_bleu": 56.78,
        **{f"diversity_distinct_{n}": n / 10 for n in (1, 2, 3)},
        **{f"diversity_of_one_latent_distinct_{n}": None for n in (1, 2, 3)},
        "style_transfer_recovered": 0.875,
        "style_transfer_recovered_by_prior_z": 0.375,
        "style_transfer_overlap": 0.6543,
        "style_transfer_overlap_by_prior_z": 0.1234,
    }
    text = printed({"one": figures["ltm"] | more, "other": figures["ltm"]})
    for label, cell in {
        "as published: NLL (no bound)": "1.2346",
        "as published: perplexity (no bound)": "12.346",
        "continuation, nats/token": "2.3457",
        "after a prompt of tokens": "8",
        "entropy": "1.500",
        "prior samples: distinct-1, -2, -3": "0.250, 0.500, 0.750",
        "latents of a prompt, greedy: self-BLEU": "12.3",
        "  distinct-1, -2, -3": "0.100, 0.200, 0.300",
        "one latent of it, sampled: self-BLEU": "56.8",
        "style transfer: nearer to z's text": "0.875",
        "  by prior z": "0.375",
        "style transfer: token overlap": "0.654",
        "overlap by prior z": "0.123",
    }.items():
        assert cell in line(text, label) and "–" in line(text, label)
    assert "z inferred every" not in text
    assert "its distinct-1" not in text


def test_information_per_batch_says_of_how_many_texts(figures):
    text = printed(figures)
    information = figures["ltm"]["mutual_information_per_batch"]
    assert f"{information:.3f} of 2 texts" in line(text, "per batch")
    assert f"{figures['ltm']['aggregate_kl']:.3f}" in line(text, "aggregate")


def test_statistics_that_could_not_be_compared_are_a_dash(figures):
    unknown = dict.fromkeys(
        ("active_units", "latent_units", "mutual_information", "mutual_information_per_batch", "aggregate_kl")
    )
    text = printed({"trajectories": figures["ltm"] | unknown, "vectors": figures["ltm"]})
    assert "–" in line(text, "active units")
    for label in ("mutual information", "per batch", "aggregate"):
        assert "–" in line(text, label)


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
