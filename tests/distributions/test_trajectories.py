"""Posteriors over trajectories against dense Gaussian conditioning in float64, and against samples."""

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from latentlm.distributions import (
    RBF,
    GaussianProcess,
    Matern,
    SitesPosterior,
    WhitenedGaussian,
    noise_shape,
    sample_from_noise,
    select_rows,
)
from latentlm.errors import DivergedError

T, DIM = 23, 4
LENGTHS = torch.tensor([T, 12, 1])
KERNELS = {
    "rbf": lambda: RBF(3.0, 1.3),
    "matern": lambda: Matern(1.5, [3.0, 9.0], [1.0, 2.0]),
    "a sum": lambda: Matern(2.5, [3.0, 9.0, 2.0, 4.0]) + Matern(0.5, 2.0),
}
CASES = [(name, algebra) for name in KERNELS for algebra in ("dense", "toeplitz", "state_space")]
CASES.remove(("rbf", "state_space"))


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def setting(name="matern", algebra="dense"):
    kernel = KERNELS[name]().double()
    nugget = torch.full((1,), 0.05, dtype=torch.float64, requires_grad=True)
    prior = GaussianProcess(kernel, torch.arange(T).double(), DIM, nugget, algebra, lengths=LENGTHS)
    return prior, randn(3, T, DIM, seed=1).requires_grad_(), randn(3, T, DIM, seed=2).requires_grad_()


def by_conditioning(prior, observed, log_variance, row):
    """q and p of a row's own times, [DIM, n]."""
    n = int(LENGTHS[row])
    each = prior.kernel(prior.times[:n, None] - prior.times[None, :n])
    covariance = each.repeat_interleave(DIM // len(each), 0) + prior.nugget * torch.eye(n, dtype=torch.float64)
    noisy = covariance + torch.diag_embed(log_variance[row, :n].T.exp())
    gain = torch.linalg.solve(noisy, covariance).mT
    left = covariance - gain @ covariance
    mean = (gain @ observed[row, :n].T[..., None])[..., 0]
    return MultivariateNormal(mean, 0.5 * (left + left.mT)), MultivariateNormal(torch.zeros_like(mean), covariance)


@pytest.mark.parametrize(("name", "algebra"), CASES)
def test_sites_are_dense_conditioning_with_its_gradients(name, algebra):
    prior, observed, log_variance = setting(name, algebra)
    posterior, z = SitesPosterior(prior, observed, log_variance), randn(2, 3, T, DIM, seed=3)
    ours = {
        "kl": kl_divergence(posterior, prior),
        "log_prob": posterior.log_prob(z),
        "mean": posterior.mean,
        "variance": posterior.variance,
    }
    pairs = [by_conditioning(prior, observed, log_variance, row) for row in range(3)]
    expected = {
        "kl": torch.stack([kl_divergence(q, p).sum() for q, p in pairs]),
        "log_prob": torch.stack(
            [q.log_prob(z[:, row, : LENGTHS[row]].mT).sum(-1) for row, (q, _) in enumerate(pairs)], -1
        ),
        "mean": torch.zeros(3, T, DIM).double(),
        "variance": torch.zeros(3, T, DIM).double(),
    }
    for row, (q, _) in enumerate(pairs):
        expected["mean"][row, : LENGTHS[row]] = q.mean.T
        expected["variance"][row, : LENGTHS[row]] = q.variance.T
    parameters = [*prior.kernel.parameters(), prior.nugget, observed, log_variance]
    gradients = []
    for figures in (ours, expected):
        total = sum(((1 + torch.arange(f.numel()).view(f.shape)) * f).sum() for f in figures.values())
        gradients.append(torch.autograd.grad(total, parameters))
    for figure, value in ours.items():
        torch.testing.assert_close(value, expected[figure], rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("algebra", ["dense", "state_space"])
def test_samples_of_sites_have_their_mean_and_covariance(algebra):
    prior, observed, log_variance = setting("matern", algebra)
    posterior = SitesPosterior(prior, observed.detach(), log_variance.detach())
    number = 20_000
    torch.manual_seed(0)
    with torch.no_grad():
        z = posterior.rsample((number,))
    for row in range(3):
        q, _ = by_conditioning(prior, observed, log_variance, row)
        n = int(LENGTHS[row])
        of_row = z[:, row, :n].permute(2, 0, 1)
        deviation = q.variance.detach().sqrt()
        assert float(((of_row.mean(1) - q.mean.detach()) / deviation).abs().max()) < 5 / number**0.5
        centred = (of_row - of_row.mean(1, keepdim=True)) / deviation[:, None]
        correlation = centred.mT @ centred / number
        exact = q.covariance_matrix.detach() / (deviation[:, :, None] * deviation[:, None, :])
        assert float((correlation - exact).abs().max()) < 5 * (2 / number) ** 0.5
        assert bool((z[:, row, n:] == 0).all())


def test_sites_that_say_nothing_are_the_prior_and_sites_that_say_all_are_their_text():
    prior, observed, _ = setting()
    nothing = SitesPosterior(prior, observed, torch.full((3, T, DIM), 30.0).double())
    torch.testing.assert_close(kl_divergence(nothing, prior), torch.zeros(3).double(), atol=1e-9, rtol=0)
    everything = SitesPosterior(prior, observed, torch.full((3, T, DIM), -30.0).double())
    torch.testing.assert_close(everything.mean[0], observed[0], atol=1e-9, rtol=1e-9)


def test_no_diagonal_gaussian_comes_near_a_smooth_process_and_sites_do():
    """The least KL of a diagonal q with mean 0 has variances 1 / (Σ⁻¹)_tt: 22 nats a token at nugget 1e-2, 64 dims."""
    times, dims = torch.arange(64).double(), 64
    for nugget, least in ((1e-5, 66), (1e-2, 22), (1e-1, 11.6)):
        prior = GaussianProcess(RBF(8.0).double(), times, dims, nugget, lengths=torch.tensor([64]))
        diagonal = prior.algebra.precision_diagonal(torch.tensor([64]))[0, 0]
        scale = diagonal.rsqrt()[None, :, None].expand(1, 64, dims)
        best = Independent(Normal(torch.zeros_like(scale), scale), 2)
        assert float(kl_divergence(best, prior).detach()) / 64 == pytest.approx(least, rel=0.03)
        free = SitesPosterior(prior, torch.zeros(1, 64, dims).double(), torch.full((1, 64, dims), 25.0).double())
        assert abs(float(kl_divergence(free, prior).detach())) < 1e-3


@pytest.mark.parametrize(("name", "algebra"), CASES)
def test_whitened_kl_and_probability(name, algebra):
    prior, mean, log_variance = setting(name, algebra)
    posterior = WhitenedGaussian(prior, Independent(Normal(mean, (0.5 * log_variance).exp()), 2))
    noise = randn(3, T, DIM, seed=4)
    z = sample_from_noise(posterior, noise)
    for row in range(3):
        n = int(LENGTHS[row])
        _, p = by_conditioning(prior, mean, log_variance, row)
        factor = p.scale_tril
        variance = factor @ torch.diag_embed(log_variance[row, :n].T.exp()) @ factor.mT
        q = MultivariateNormal((factor @ mean[row, :n].T[..., None])[..., 0], 0.5 * (variance + variance.mT))
        torch.testing.assert_close(
            kl_divergence(posterior, prior)[row], kl_divergence(q, p).sum(), rtol=1e-8, atol=1e-8
        )
        torch.testing.assert_close(posterior.log_prob(z)[row], q.log_prob(z[row, :n].T).sum(), rtol=1e-8, atol=1e-7)
        torch.testing.assert_close(posterior.mean[row, :n], q.mean.T, rtol=1e-9, atol=1e-9)


def test_rows_and_noise():
    prior, observed, log_variance = setting()
    kept = torch.tensor([True, False, True])
    white = Independent(Normal(observed, log_variance.exp()), 2)
    for posterior in (SitesPosterior(prior, observed, log_variance), WhitenedGaussian(prior, white)):
        noise = randn(3, *noise_shape(posterior), seed=5)
        z = sample_from_noise(posterior, noise)
        part = select_rows(posterior, kept)
        torch.testing.assert_close(sample_from_noise(part, noise[kept]), z[kept])
        torch.testing.assert_close(part.log_prob(z[kept]), posterior.log_prob(z)[kept])
        assert posterior.rsample((2, 5)).shape == (2, 5, 3, T, DIM)


def test_observations_that_are_not_finite_are_said():
    prior, observed, log_variance = setting()
    broken = observed.detach().clone()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(DivergedError, match="observations or their variances are no longer finite"):
        SitesPosterior(prior, broken, log_variance)
