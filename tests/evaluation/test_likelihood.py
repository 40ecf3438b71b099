"""The figures of an evaluation: complete, consistent with each other, and equal to slow and obvious computations."""

import copy
import json
import math

import pytest
import torch
from tests.toy import Rows, prior_latents, small_model, texts, three_verbs
from tests.training.runs import trained
from torch.utils.data import Subset

from latentlm import InputError, load
from latentlm.data import Document, Sentences
from latentlm.evaluation.likelihood import evaluate, score

KEYS = {
    "sequences",
    "tokens",
    "bytes",
    "parameters",
    "trained_parameters",
    "exact",
    "conditional",
    "elbo_nll_per_token",
    "iw_nll_per_token",
    "elbo_nll_per_sequence",
    "iw_nll_per_sequence",
    "iw_samples",
    "reconstruction_nll_per_token",
    "kl_per_token",
    "kl_per_sequence",
    "prior_nll_per_token",
    "prior_mean_nll_per_token",
    "elbo_perplexity",
    "iw_perplexity",
    "elbo_bits_per_byte",
    "iw_bits_per_byte",
    "active_units",
    "latent_units",
    "latent_sequences",
    "mutual_information",
    "mutual_information_sequences",
    "mutual_information_per_batch",
    "mutual_information_batch",
    "kl_per_dimension",
    "aggregate_kl",
    "aggregate_mean_rms",
    "aggregate_variance_ratio",
    "protocol",
    "seconds",
    "inference_seconds",
    "tokens_per_second",
}
# one, two, three and four bytes a character, and a text that is cut at 40 tokens
TEXTS = ["the cat", "naïve café", "日本語 text", "a 😀 b 😀", "x", "the letter which I found in the garden " * 3]


@pytest.fixture(scope="module")
def tokenizer():
    return load(trained("ltm"))[1]


@pytest.fixture(scope="module")
def sequences(tokenizer):
    return Sentences([Document(text) for text in TEXTS], tokenizer, max_length=40)


@pytest.fixture(scope="module", params=["ltm", "autoregressive"])
def model(request):
    return load(trained(request.param))[0]


@pytest.fixture(scope="module")
def figures(model, sequences):
    return evaluate(model, sequences, iw_samples=4)


# ---- what is reported --------------------------------------------------------------------------------------------


def test_the_keys_are_fixed_and_the_whole_is_json(figures):
    assert figures.keys() == KEYS
    assert json.loads(json.dumps(figures)) == figures
    assert figures["protocol"] == "honest"


def test_figures_agree_with_each_other(model, figures):
    tokens, count = figures["tokens"], figures["bytes"]
    assert figures["elbo_nll_per_token"] == pytest.approx(
        figures["reconstruction_nll_per_token"] + figures["kl_per_token"], rel=1e-6
    )
    assert figures["kl_per_token"] * tokens == pytest.approx(figures["kl_per_sequence"] * figures["sequences"])
    for kind in ("elbo", "iw"):
        nats = figures[f"{kind}_nll_per_token"]
        assert figures[f"{kind}_nll_per_sequence"] == pytest.approx(nats * tokens / figures["sequences"])
        assert figures[f"{kind}_perplexity"] == pytest.approx(math.exp(nats))
        assert figures[f"{kind}_bits_per_byte"] == pytest.approx(nats * tokens / math.log(2) / count)
    assert figures["tokens_per_second"] == pytest.approx(tokens / figures["seconds"])
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert 0 <= figures["active_units"] <= figures["latent_units"]
    assert figures["mutual_information"] <= math.log(figures["sequences"])


def test_tokens_and_bytes_are_those_of_the_text(figures, sequences, tokenizer):
    rows = [sequences[index]["input_ids"].tolist() for index in range(len(sequences))]
    assert figures["sequences"] == len(TEXTS)
    assert figures["tokens"] == sum(len(row) - 1 for row in rows)
    whole = [row for row in rows if row[-1] == tokenizer.eos_token_id]
    assert len(whole) == len(TEXTS) - 1
    kept = [tokenizer.decode(row[1:-1]) for row in whole] + [tokenizer.decode(rows[-1][1:])]
    assert kept[:-1] == TEXTS[:-1]
    assert TEXTS[-1].startswith(kept[-1])
    assert figures["bytes"] == sum(len(text.encode()) for text in kept)


def test_under_the_priors_mean_it_is_a_language_model_without_latents(sequences):
    model = load(trained("ltm"))[0]
    total = 0.0
    for index in range(len(sequences)):
        row = sequences[index]["input_ids"][None]
        total -= float(model.log_likelihood(torch.zeros(1, *model.latent_shape), row).sum())
    figures = evaluate(model, sequences, iw_samples=1)
    assert figures["prior_mean_nll_per_token"] == pytest.approx(total / figures["tokens"], rel=1e-5)


def test_a_latent_model_says_that_its_figures_are_bounds(sequences):
    figures = evaluate(load(trained("ltm"))[0], sequences, iw_samples=4)
    assert figures["exact"] is False
    assert figures["iw_samples"] == 4
    assert figures["latent_units"] == 2 * 2 * 4
    assert figures["kl_per_token"] > 0


def test_the_control_says_that_its_figures_are_the_likelihood(sequences):
    figures = evaluate(load(trained("autoregressive"))[0], sequences, iw_samples=4)
    assert figures["exact"] is True
    assert figures["iw_samples"] == 1
    assert figures["kl_per_token"] == figures["latent_units"] == figures["active_units"] == 0
    assert figures["mutual_information"] == pytest.approx(0, abs=1e-9)
    of_latents = ("reconstruction_nll_per_token", "prior_nll_per_token", "prior_mean_nll_per_token")
    for key in ("iw_nll_per_token", *of_latents):
        assert figures[key] == pytest.approx(figures["elbo_nll_per_token"], rel=1e-7)


# ---- against slow and obvious computations -----------------------------------------------------------------------


@torch.no_grad()
def test_the_controls_nll_is_that_of_its_tokens_one_by_one_in_float64(sequences, tokenizer):
    model = load(trained("autoregressive"))[0]
    figures = evaluate(model, sequences)
    precise = copy.deepcopy(model).double()
    nats = 0.0
    for index in range(len(sequences)):
        row = sequences[index]["input_ids"]
        for end in range(1, len(row)):
            # the token after a prefix: a stand-in follows, which a causal model cannot see
            prefix = torch.cat([row[:end], row[:1]])[None]
            logits = precise.decode(prior_latents(model, prefix).double(), prefix)[0, -1]
            nats -= float(logits.log_softmax(-1)[row[end]])
    tokens = sum(len(sequences[index]["input_ids"]) - 1 for index in range(len(sequences)))
    assert figures["elbo_nll_per_token"] == pytest.approx(nats / tokens, rel=1e-6)
    assert figures["elbo_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    cut = tokenizer.decode(sequences[len(TEXTS) - 1]["input_ids"][1:])
    count = sum(len(text.encode()) for text in [*TEXTS[:-1], cut])
    assert figures["elbo_bits_per_byte"] == pytest.approx(nats / math.log(2) / count, rel=1e-6)


@torch.no_grad()
def test_with_an_inference_that_finds_nothing_every_bound_is_about_the_prior():
    """q = p: no KL, no active unit, no information, and IW is the prior's figure up to its noise."""
    model = small_model("ltm", inference_steps=0)
    figures = evaluate(model, Rows(texts(5, 9)), iw_samples=64)
    assert figures["kl_per_token"] == pytest.approx(0, abs=1e-7)
    assert figures["active_units"] == 0
    assert figures["mutual_information"] == pytest.approx(0, abs=1e-6)
    assert figures["iw_nll_per_token"] == pytest.approx(figures["prior_nll_per_token"], rel=0.05)
    assert figures["iw_nll_per_token"] < figures["elbo_nll_per_token"]


@torch.no_grad()
def test_with_more_samples_the_importance_weighted_bound_tightens():
    model = small_model("ltm", inference_steps=4, inference_lr=0.5)
    rows = Rows(texts(8, 12))
    bounds = [evaluate(model, rows, iw_samples=samples)["iw_nll_per_token"] for samples in (1, 6, 48)]
    assert bounds[0] > bounds[1] > bounds[2]


@torch.no_grad()
def test_corpus_figures_are_sums_over_sums_and_not_means_of_means():
    model = small_model("autoregressive")
    rows = texts(2, 12)
    short, long = rows[0][:3], rows[1]
    parts = [evaluate(model, Rows([row])) for row in (short, long)]
    both = evaluate(model, Rows([short, long]))
    nats = sum(part["elbo_nll_per_token"] * part["tokens"] for part in parts)
    assert both["elbo_nll_per_token"] == pytest.approx(nats / (2 + 11), rel=1e-6)
    assert both["elbo_perplexity"] == pytest.approx(math.exp(nats / 13), rel=1e-6)


@torch.no_grad()
def test_score_is_in_nats_of_each_sequence():
    model = small_model("autoregressive")
    rows = texts(3, 7)
    scores = score(model, rows)
    expected = -model.log_likelihood(prior_latents(model, rows), rows).sum(-1)
    for name in ("elbo", "iw", "reconstruction", "prior"):
        torch.testing.assert_close(scores[name].float(), expected)
    assert not bool(scores["kl"].any())


@torch.no_grad()
def test_a_reconstruction_is_scored_with_noise_that_inference_did_not_see():
    """E_q log p(x | z) by torch's own noise is the same; the draws that q was fitted to would look better."""
    model = small_model("ltm", inference_steps=2, inference_lr=1.0)
    rows = texts(64, 20)
    scored = -score(model, rows, samples=2)["reconstruction"]
    posterior = model.infer(rows, seed=0)
    noise = torch.randn(32, *posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    fresh = model.log_likelihood(posterior.mean + posterior.variance.sqrt() * noise, rows).sum(-1)
    gain = scored - fresh.mean(0)
    assert abs(float(gain.mean())) < 3 * float(gain.std()) / 64**0.5


def test_a_model_of_three_verbs_is_evaluated_like_any_other():
    figures = evaluate(three_verbs(), Rows(texts(5, 6)), iw_samples=2)
    assert figures.keys() == KEYS
    assert all(math.isfinite(figures[key]) for key in KEYS - {"protocol", "exact", "kl_per_dimension"})
    assert all(map(math.isfinite, figures["kl_per_dimension"]))


# ---- how it is asked ---------------------------------------------------------------------------------------------


def test_progress_is_told_after_each_batch(sequences):
    told = []
    evaluate(load(trained("autoregressive"))[0], sequences, batch_size=4, on_progress=lambda *step: told.append(step))
    assert told == [(4, 6), (6, 6)]


def test_nothing_to_evaluate_is_an_error(sequences):
    with pytest.raises(InputError, match="empty"):
        evaluate(small_model("autoregressive"), Subset(sequences, []))


@pytest.mark.parametrize("options", [{"iw_samples": 0}, {"batch_size": 0}, {"iw_samples": -1}])
def test_counts_below_one_are_an_error(sequences, options):
    with pytest.raises(InputError, match="at least 1"):
        evaluate(small_model("autoregressive"), sequences, **options)


def test_a_hopeless_model_still_has_figures():
    model = small_model("autoregressive", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    figures = evaluate(model, Rows(texts(2, 6)))
    assert figures["elbo_perplexity"] == math.inf
