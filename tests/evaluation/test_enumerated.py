"""Every figure of `score` against a model whose log p(x) is a sum over 25 latents, with a q that is not its posterior.

Run with -s to see the table.
"""

from itertools import pairwise, product

import pytest
import torch
from tests.toy import BOS, OnGrid, grid_model, padded, texts
from torch.distributions import kl_divergence

from latentlm.distributions import Stream, sample_from_noise, sequence_noise
from latentlm.evaluation.likelihood import score

SAMPLES = (1, 4, 16, 64, 256, 1024)
SEQUENCES = 256
VOCABULARY = 8


@pytest.fixture(scope="module")
def model():
    return grid_model(VOCABULARY)


@pytest.fixture(scope="module")
def data():
    """Texts of 5 to 12 tokens."""
    lengths = [6 + row % 8 for row in range(SEQUENCES)]
    return padded(texts(SEQUENCES, 13, vocabulary=VOCABULARY), lengths, "right")


@pytest.fixture(scope="module")
def evidence(model, data):
    """log p(x) [sequences]: the sum over all latents."""
    return model.log_joint(*data).double().logsumexp(0)


@pytest.fixture(scope="module")
def expected_elbo(model, data):
    """Σ_z q(z | x) (log p(x, z) − log q(z | x)) [sequences]."""
    log_q = model.infer(*data).log_probabilities.double().T
    return (log_q.exp() * (model.log_joint(*data).double() - log_q)).sum(0)


@pytest.fixture(scope="module")
def scores(model, data):
    """By K, in nats, −NLL; few samples are averaged over more seeds, so that each row of the table is as sure."""
    found = {}
    with torch.no_grad():
        for samples in SAMPLES:
            runs = [score(model, *data, samples=samples, seed=seed) for seed in range(max(64 // samples, 1))]
            found[samples] = {name: -torch.stack([run[name] for run in runs]).double().mean(0) for name in runs[0]}
    return found


def error(difference):
    """4 standard errors of a mean over sequences."""
    return 4 * float(difference.std() / len(difference) ** 0.5)


# ---- the model is what it says ---------------------------------------------------------------------------------------


def test_probabilities_of_all_texts_sum_to_one():
    model = grid_model(vocabulary=5)
    input_ids = torch.tensor([[BOS, *text] for text in product(range(5), repeat=3)])
    assert abs(float(model.log_joint(input_ids).double().logsumexp(0).exp().sum()) - 1) < 1e-6


def test_the_grids_distribution_is_one(model, data):
    q, prior = model.infer(*data), model.prior(SEQUENCES, 1)
    points = model.points[:, None].expand(-1, SEQUENCES, -1)
    torch.testing.assert_close(q.log_prob(points).exp().sum(0), torch.ones(SEQUENCES))
    kl = (q.log_prob(points).exp() * (q.log_prob(points) - prior.log_prob(points))).sum(0)
    torch.testing.assert_close(kl_divergence(q, prior), kl, atol=1e-5, rtol=1e-5)


def test_noise_draws_points_as_often_as_their_probability():
    """Chi-square of 20000 draws; 1 in 1000 would exceed it by chance."""
    model, number = grid_model(), 20_000
    prior = model.prior(number, 1)
    drawn = sample_from_noise(prior, sequence_noise(torch.arange(number), (2,), seed=0, stream=Stream.PRIOR))
    index = (drawn[:, None] - model.points).abs().sum(-1).argmin(1)
    expected = number * model.prior_logits.softmax(0)
    assert ((torch.bincount(index, minlength=25) - expected).square() / expected).sum() < 51.2  # 24 degrees of freedom


# ---- the figures -----------------------------------------------------------------------------------------------------


def test_table(scores, evidence, expected_elbo):
    rows = [("K", "ELBO", "IW-K", "log mean over prior", "log p(x)")]
    for samples, figures in scores.items():
        values = (figures["elbo"], figures["iw"], figures["prior"], evidence)
        rows.append((str(samples), *(f"{float(value.mean()):.4f}" for value in values)))
    print(f"\nnats per sequence, mean of {SEQUENCES}; exact ELBO {float(expected_elbo.mean()):.4f}")
    for row in rows:
        print("".join(f"{cell:>21}" for cell in row))
    gap = (evidence - expected_elbo).mean()
    assert gap > 0.3, "with an exact q there would be nothing to test"


def test_elbo_is_the_enumerated_one(scores, expected_elbo, evidence):
    for figures in scores.values():
        difference = figures["elbo"] - expected_elbo
        assert abs(difference.mean()) < error(difference)
    assert (expected_elbo < evidence).all()
    # with 1024 samples row by row: E_q has a standard error of about 0.03 nats
    assert (scores[1024]["elbo"] - expected_elbo).abs().max() < 0.25


def test_one_sample_is_the_elbo(scores, expected_elbo):
    difference = scores[1]["iw"] - expected_elbo
    assert abs(difference.mean()) < error(difference)


def test_elbo_below_every_bound_below_the_evidence(scores, expected_elbo, evidence):
    for samples, figures in scores.items():
        over = figures["iw"] - evidence
        assert over.mean() < error(over)
        if samples > 1:
            assert (figures["iw"] - expected_elbo).mean() > 0.1


def test_the_bound_rises_with_samples(scores):
    for fewer, more in pairwise(SAMPLES):
        rise = scores[more]["iw"] - scores[fewer]["iw"]
        assert rise.mean() > (error(rise) if more <= 16 else 0)


def test_the_bound_reaches_the_evidence(scores, evidence):
    """The bias of IW-K falls as 1/K: a bound 0.01 nats off at 1024, and each text's own within its sampling."""
    gap = evidence - scores[1024]["iw"]
    assert abs(gap.mean()) < 0.01
    assert gap.abs().max() < 0.3


def test_prior_samples_reach_the_evidence(scores, evidence):
    gap = evidence - scores[1024]["prior"]
    assert -0.01 < gap.mean() < 0.02
    for fewer, more in pairwise(SAMPLES):
        assert (scores[more]["prior"] - scores[fewer]["prior"]).mean() > (0 if more <= 64 else -0.01)


def test_the_mean_over_prior_samples_is_unbiased(scores, evidence):
    """As a probability, not as its logarithm: E mean p(x | z) / p(x) = 1."""
    ratio = (scores[1024]["prior"] - evidence).exp() - 1
    assert abs(ratio.mean()) < error(ratio)


def test_reconstruction_is_no_bound(scores, evidence, model, data):
    """It leaves out what z costs: the ELBO without its KL, here above log p(x)."""
    kl = kl_divergence(model.infer(*data), model.prior(SEQUENCES, 1))
    for figures in scores.values():
        torch.testing.assert_close(-figures["kl"], kl.double())
        torch.testing.assert_close(figures["reconstruction"], figures["elbo"] + kl, atol=1e-4, rtol=1e-6)
    assert (scores[1024]["reconstruction"] - evidence).mean() > 0.1


def test_with_the_posterior_every_bound_is_the_evidence(model, data, evidence):
    model = grid_model(VOCABULARY)
    model.infer = lambda *args, **kwargs: OnGrid(model.points, model.log_joint(*args[:2]).T)
    found = score(model, *data, samples=3)
    torch.testing.assert_close(-found["iw"], evidence, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_order_and_padding_change_nothing(model, side):
    input_ids, lengths = texts(5, 9, vocabulary=VOCABULARY), [9, 3, 6, 1, 4]
    whole = score(model, *padded(input_ids, lengths, side, total=12), samples=8, seed=3)
    for row, length in enumerate(lengths):
        alone = score(model, input_ids[row : row + 1, :length], samples=8, seed=3)
        for name, figures in whole.items():
            torch.testing.assert_close(figures[row], alone[name][0], atol=1e-5, rtol=1e-6)
