"""The bounds against a conjugate Gaussian model, z ~ N(0, 1), x | z ~ N(z, s²), where everything has a closed form."""

import math

import pytest
import torch
from tests.training.runs import unchecked
from torch.distributions import Normal, kl_divergence

from latentlm.errors import DivergedError
from latentlm.objective import elbo, free_bits, importance_weighted_bound, kl_distance

S = 0.7
X = torch.tensor([-1.5, 0.2, 3.0], dtype=torch.float64)
PRIOR = Normal(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
EVIDENCE = Normal(torch.zeros(3, dtype=torch.float64), math.sqrt(1 + S**2)).log_prob(X)
POSTERIOR = Normal(X / (1 + S**2), torch.full_like(X, S / math.sqrt(1 + S**2)))
INEXACT = Normal(0.5 * X, torch.full_like(X, 0.9))


def weights(q: Normal, samples: int, seed: int = 0):
    """log p(x | z), log p(z), log q(z | x) of samples of q."""
    generator = torch.Generator().manual_seed(seed)
    z = q.mean + q.stddev * torch.randn(samples, 3, dtype=torch.float64, generator=generator)
    return Normal(z, S).log_prob(X), PRIOR.log_prob(z), q.log_prob(z)


def inexact_elbo() -> torch.Tensor:
    """E_q log N(x; z, s²) = log N(x; μ, s²) − σ²/(2 s²)."""
    expected = Normal(INEXACT.mean, S).log_prob(X) - INEXACT.variance / (2 * S**2)
    return expected - kl_divergence(INEXACT, PRIOR)


# ---- ELBO ------------------------------------------------------------------------------------------------------------


def test_elbo_by_hand():
    log_likelihood, kl = torch.tensor([-4.0, -10.0]), torch.tensor([1.0, 0.25])
    assert elbo(log_likelihood, kl).tolist() == [-5.0, -10.25]
    assert elbo(log_likelihood, kl, 0.5).tolist() == [-4.5, -10.125]
    assert elbo(log_likelihood, kl, torch.tensor(0.0)).tolist() == [-4.0, -10.0]


@pytest.mark.parametrize("samples", [(5,), (2, 3), (1,)])
def test_elbo_averages_over_samples(samples):
    log_likelihood = torch.randn(*samples, 4, generator=torch.Generator().manual_seed(0))
    kl = torch.arange(4.0)
    rows = log_likelihood.reshape(-1, 4).double()
    expected = torch.stack([sum(rows[k, b] for k in range(len(rows))) / len(rows) - b for b in range(4)])
    torch.testing.assert_close(elbo(log_likelihood, kl).double(), expected, atol=1e-6, rtol=0)


def test_elbo_is_below_the_evidence_by_the_kl_to_the_posterior():
    torch.testing.assert_close(EVIDENCE - inexact_elbo(), kl_divergence(INEXACT, POSTERIOR), atol=1e-12, rtol=0)


def test_elbo_by_sampling():
    log_likelihood, _, _ = weights(INEXACT, 200_000)
    error = 4.5 * log_likelihood.std(0) / math.sqrt(200_000)
    assert ((elbo(log_likelihood, kl_divergence(INEXACT, PRIOR)) - inexact_elbo()).abs() < error).all()


# ---- importance-weighted bound ---------------------------------------------------------------------------------------


def test_importance_weighted_bound_by_hand():
    """Weights 2, 4 and 3/2, 1/2 in probabilities: log 3 and log 1."""
    log_likelihood = torch.tensor([[1.0, 0.5], [2.0, 0.25]]).log()
    log_prior = torch.tensor([[1.0, 0.75], [0.5, 0.5]]).log()
    log_posterior = torch.tensor([[0.5, 0.25], [0.25, 0.25]]).log()
    bound = importance_weighted_bound(log_likelihood, log_prior, log_posterior)
    torch.testing.assert_close(bound, torch.tensor([3.0, 1.0], dtype=torch.float64).log(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("samples", [1, 2, 7, 64])
def test_with_the_exact_posterior_every_bound_is_the_evidence(samples):
    bound = importance_weighted_bound(*weights(POSTERIOR, samples))
    torch.testing.assert_close(bound, EVIDENCE, atol=1e-12, rtol=0)


def test_one_sample_is_the_elbo_in_expectation():
    log_weights = torch.cat([importance_weighted_bound(*parts)[None] for parts in _single_samples(INEXACT, 5_000)])
    error = 4.5 * log_weights.std(0) / math.sqrt(len(log_weights))
    assert ((log_weights.mean(0) - inexact_elbo()).abs() < error).all()


def _single_samples(q, number):
    return zip(*(part[:, None] for part in weights(q, number)), strict=True)


def test_the_bound_tightens_to_the_evidence():
    parts = weights(INEXACT, 2**16)
    means = []
    for samples in (1, 4, 16, 64):
        groups = [part.view(samples, -1) for part in parts]  # each row's groups side by side
        means.append(importance_weighted_bound(*groups).view(-1, 3).mean(0))
    gaps = EVIDENCE - torch.stack(means)
    # log p(x) − E IW-K falls as 1/K, so each gap is under half of the one before
    assert (gaps[1:] < 0.5 * gaps[:-1]).all()
    assert (gaps > -0.005).all() and (gaps[-1] < 0.01).all()


def test_prior_samples_give_the_mean_of_the_likelihood():
    log_likelihood, _, _ = weights(PRIOR, 50)
    zeros = torch.zeros_like(log_likelihood)
    bound = importance_weighted_bound(log_likelihood, zeros, zeros)
    torch.testing.assert_close(bound, log_likelihood.exp().mean(0).log(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", [-1e5, 1e5])
def test_no_overflow_and_no_lost_digits(level):
    """Differences of a few nats at a level of 10⁵, where float32 has steps of 0.008."""
    spread = torch.tensor([[0.0], [1.0], [3.0]])
    bound = importance_weighted_bound(level + spread, torch.zeros(3, 1), torch.zeros(3, 1))
    expected = level + math.log((1 + math.exp(1) + math.exp(3)) / 3)
    assert bound.item() == pytest.approx(expected, abs=1e-9)
    parts = torch.full((3, 1), level), torch.full((3, 1), 0.3), torch.full((3, 1), 0.1)
    assert importance_weighted_bound(*parts).item() == pytest.approx(level + 0.2, abs=1e-7)


def test_float64_whatever_comes_in():
    ones = torch.ones(2, 3, dtype=torch.bfloat16)
    assert importance_weighted_bound(ones, ones, ones).dtype == torch.float64


def test_a_sample_of_no_weight_costs_only_its_place():
    log_likelihood = torch.tensor([[0.0], [-math.inf]])
    bound = importance_weighted_bound(log_likelihood, torch.zeros(2, 1), torch.zeros(2, 1))
    assert bound.item() == pytest.approx(-math.log(2))


# ---- free bits -------------------------------------------------------------------------------------------------------


def test_free_bits_is_a_floor_for_each_dimension_of_each_row():
    kl = torch.tensor([[0.1, 0.6, 0.2], [0.0, 0.0, 2.0]])
    torch.testing.assert_close(free_bits(kl, 0.25), torch.tensor([0.25 + 0.6 + 0.25, 0.25 + 0.25 + 2.0]))
    assert torch.equal(free_bits(kl, 0.0), kl.sum(1))


def test_free_bits_does_not_depend_on_neighbours():
    kl = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(0))
    whole = free_bits(kl, 0.5)
    assert torch.equal(whole, torch.cat([free_bits(row[None], 0.5) for row in kl]))


def test_nothing_pushes_a_dimension_under_the_floor():
    kl = torch.tensor([[0.1, 0.6], [0.49, 0.51]], requires_grad=True)
    free_bits(kl, 0.5).sum().backward()
    assert kl.grad.tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_free_bits_of_no_dimension():
    assert torch.equal(free_bits(torch.zeros(3, 0), 0.5), torch.zeros(3))


def test_free_bits_per_latent_is_a_floor_for_each_vector():
    kl = torch.tensor([[[0.1, 0.6], [0.2, 0.2]], [[0.0, 0.0], [3.0, 0.0]]])  # [2 texts, 2 latents, 2 numbers]
    torch.testing.assert_close(free_bits(kl, 0.5, "latent"), torch.tensor([0.7 + 0.5, 0.5 + 3.0]))
    torch.testing.assert_close(free_bits(kl[:, 0], 0.5, "latent"), torch.tensor([0.7, 0.5]))  # one vector a text
    kl.requires_grad_()
    free_bits(kl, 0.5, "latent").sum().backward()
    assert kl.grad.tolist() == [[[1, 1], [0, 0]], [[0, 0], [1, 1]]]


def test_the_distance_of_the_kl_from_a_threshold():
    kl = torch.tensor([0.5, 2.0, 7.0], requires_grad=True)
    found = kl_distance(kl, 2.0)
    assert found.tolist() == [1.5, 0.0, 5.0]
    found[[0, 2]].sum().backward()
    assert kl.grad.tolist() == [-1.0, 0.0, 1.0]  # pushed up below it, down above it


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_by_finite_differences():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    assert torch.autograd.gradcheck(lambda a, b: elbo(a, b, 0.3), (random(4, 3), random(3)))
    assert torch.autograd.gradcheck(importance_weighted_bound, (random(4, 3), random(4, 3), random(4, 3)))
    assert torch.autograd.gradcheck(lambda a: free_bits(a, 0.5), (random(3, 4, 2),))


# ---- never a NaN -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "likelihood, kl", [(math.nan, 1.0), (-1.0, math.nan), (-math.inf, -math.inf), (math.inf, math.inf)]
)
def test_an_elbo_that_is_no_number_is_an_error(likelihood, kl):
    with pytest.raises(DivergedError, match=r"the ELBO is not a number in rows 1 of"):
        elbo(torch.tensor([-1.0, likelihood]), torch.tensor([1.0, kl]))


@pytest.mark.parametrize(
    "likelihood, prior, posterior",
    [(math.nan, 0, 0), (0, math.nan, 0), (0, 0, math.nan), (-math.inf, 0, -math.inf), (0, math.inf, math.inf)],
)
def test_an_importance_weighted_bound_that_is_no_number_is_an_error(likelihood, prior, posterior):
    parts = [torch.tensor([[-1.0, 0.0], [-1.0, value]]) for value in (likelihood, prior, posterior)]
    with pytest.raises(DivergedError, match=r"importance-weighted bound is not a number in rows 1 of"):
        importance_weighted_bound(*parts)


def test_an_impossible_text_has_a_bound():
    impossible = torch.tensor([-math.inf])
    assert elbo(impossible, torch.zeros(1)) == -math.inf
    zeros = torch.zeros(2, 1)
    assert importance_weighted_bound(zeros - math.inf, zeros, zeros) == -math.inf
    # one sample under which it is possible is enough
    one = torch.tensor([[-math.inf], [-3.0]])
    assert float(importance_weighted_bound(one, zeros, zeros)) == pytest.approx(-3 - math.log(2))


@pytest.mark.slow
def test_the_check_does_not_cut_a_compiled_graph():
    with unchecked():
        compiled = torch.compile(elbo, fullgraph=True, backend="eager")
        assert torch.isnan(compiled(torch.tensor([math.nan]), torch.ones(1))).all()
