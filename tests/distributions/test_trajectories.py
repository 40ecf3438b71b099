"""Posteriors over trajectories against dense Gaussian conditioning in float64, and against samples."""

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from latentlm.distributions import (
    RBF,
    ContinuedTrajectory,
    DiagonalTrajectory,
    GaussianProcess,
    Matern,
    SitesPosterior,
    White,
    WhitenedGaussian,
    kl_per_dimension,
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


POSTERIORS = {
    "sites": lambda prior, mean, log_variance: SitesPosterior(prior, mean, log_variance),
    "whitened": lambda prior, mean, log_variance: WhitenedGaussian(prior, normal(mean, log_variance)),
    "diagonal": lambda prior, mean, log_variance: DiagonalTrajectory(prior, normal(mean, log_variance)),
}
EACH_POSTERIOR = pytest.mark.parametrize("kind", POSTERIORS)


def normal(mean, log_variance):
    return Independent(Normal(mean, (0.5 * log_variance).exp()), 2)


def by_definition(kind, prior, mean, log_variance, row):
    """q and p of a row's own times, [DIM, n], each of a posterior's kinds by its own formula."""
    q, p = by_conditioning(prior, mean, log_variance, row)
    n = int(LENGTHS[row])
    if kind == "diagonal":
        q = MultivariateNormal(mean[row, :n].T, torch.diag_embed(log_variance[row, :n].T.exp()))
    elif kind == "whitened":
        factor = torch.linalg.cholesky(p.covariance_matrix)
        covariance = factor @ torch.diag_embed(log_variance[row, :n].T.exp()) @ factor.mT
        q = MultivariateNormal((factor @ mean[row, :n].T[..., None])[..., 0], 0.5 * (covariance + covariance.mT))
    return q, p


@pytest.mark.parametrize("algebra", ["dense", "toeplitz", "state_space"])
@EACH_POSTERIOR
def test_the_kl_per_dimension_is_each_dimensions_own(kind, algebra):
    prior, mean, log_variance = setting("matern", algebra)
    posterior = POSTERIORS[kind](prior, mean, log_variance)
    each = kl_per_dimension(posterior, prior)
    assert each.shape == (3, DIM)
    torch.testing.assert_close(each.sum(-1), kl_divergence(posterior, prior), rtol=1e-12, atol=0)
    for row in range(3):
        expected = kl_divergence(*by_definition(kind, prior, mean, log_variance, row))
        torch.testing.assert_close(each[row], expected, rtol=1e-9, atol=1e-9)


@EACH_POSTERIOR
def test_a_kl_to_another_process_is_refused(kind):
    prior, mean, log_variance = setting()
    posterior, (other, *_) = POSTERIORS[kind](prior, mean, log_variance), setting("rbf")
    for function in (kl_divergence, kl_per_dimension):
        with pytest.raises(NotImplementedError, match="the process that it was made of"):
            function(posterior, other)


@EACH_POSTERIOR
def test_rows_and_noise(kind):
    prior, mean, log_variance = setting()
    posterior, kept = POSTERIORS[kind](prior, mean, log_variance), torch.tensor([True, False, True])
    # sites need noise for a sample of the prior, and for what the observations add
    assert noise_shape(posterior) == (T, 2 * DIM if kind == "sites" else DIM)
    noise = randn(2, 3, *noise_shape(posterior), seed=5)
    z = sample_from_noise(posterior, noise)
    part = select_rows(posterior, kept)
    assert part.batch_shape == (2,) and part.event_shape == (T, DIM)
    torch.testing.assert_close(sample_from_noise(part, noise[:, kept]), z[:, kept])
    torch.testing.assert_close(part.log_prob(z[:, kept]), posterior.log_prob(z)[:, kept])
    torch.testing.assert_close(part.mean, posterior.mean[kept])
    torch.testing.assert_close(part.variance, posterior.variance[kept])
    torch.testing.assert_close(kl_divergence(part, part.prior), kl_divergence(posterior, prior)[kept])
    assert posterior.rsample((2, 5)).shape == (2, 5, 3, T, DIM)


@EACH_POSTERIOR
def test_what_stands_after_a_rows_end_changes_nothing(kind):
    """Neither in what q is made of nor in the z that it is asked about; there its own numbers are 0."""
    prior, mean, log_variance = setting()
    z = randn(2, 3, T, DIM, seed=6)
    after = torch.arange(T) >= LENGTHS[:, None]

    def figures(mean, log_variance, z):
        q = POSTERIORS[kind](prior, mean, log_variance)
        noise = randn(3, *noise_shape(q), seed=5)
        return q.mean, q.variance, sample_from_noise(q, noise), q.log_prob(z), kl_divergence(q, prior)

    first = figures(mean, log_variance, z)
    second = figures(*(x.masked_fill(after[..., None], 7.0) for x in (mean, log_variance, z)))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for trajectory in first[:3]:
        assert bool((trajectory[after] == 0).all()) and bool((trajectory[~after] != 0).all())
    for gradient in torch.autograd.grad(sum(figure.sum() for figure in first), (mean, log_variance)):
        assert bool((gradient[after] == 0).all()) and bool((gradient[~after] != 0).all())


# ---- a diagonal q ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algebra", ["dense", "toeplitz", "state_space"])
def test_a_diagonal_trajectory_is_a_diagonal_normal_of_each_rows_times_with_its_gradients(algebra):
    prior, mean, log_variance = setting("matern", algebra)
    posterior, z = POSTERIORS["diagonal"](prior, mean, log_variance), randn(2, 3, T, DIM, seed=3)
    noise = randn(2, 3, T, DIM, seed=4)
    ours = {
        "kl": kl_divergence(posterior, prior),
        "log_prob": posterior.log_prob(z),
        "mean": posterior.mean,
        "variance": posterior.variance,
        "sample": sample_from_noise(posterior, noise),
    }
    padding = {name: torch.zeros(3, T, DIM).double() for name in ("mean", "variance")}
    expected = {"kl": [], "log_prob": [], **padding, "sample": torch.zeros(2, 3, T, DIM).double()}
    for row, n in enumerate(LENGTHS.tolist()):
        q, p = by_definition("diagonal", prior, mean, log_variance, row)
        expected["kl"].append(kl_divergence(q, p).sum())
        expected["log_prob"].append(q.log_prob(z[:, row, :n].mT).sum(-1))
        expected["mean"][row, :n], expected["variance"][row, :n] = q.mean.T, q.variance.T
        expected["sample"][:, row, :n] = (q.mean + (q.scale_tril @ noise[:, row, :n].mT[..., None])[..., 0]).mT
    expected["kl"], expected["log_prob"] = torch.stack(expected["kl"]), torch.stack(expected["log_prob"], -1)
    parameters = [*prior.kernel.parameters(), prior.nugget, mean, log_variance]
    gradients = []
    for figures in (ours, expected):
        total = sum(((1 + torch.arange(f.numel()).view(f.shape)) * f).sum() for f in figures.values())
        gradients.append(torch.autograd.grad(total, parameters))
    for figure, value in ours.items():
        torch.testing.assert_close(value, expected[figure], rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-8)


def test_draws_of_a_diagonal_trajectory_are_its_noise():
    prior, mean, log_variance = setting()
    posterior = POSTERIORS["diagonal"](prior, mean, log_variance)
    torch.manual_seed(3)
    z = posterior.rsample((4,))
    torch.manual_seed(3)
    noise = torch.randn(4, 3, T, DIM, dtype=torch.float64)
    torch.testing.assert_close(z, sample_from_noise(posterior, noise), rtol=1e-12, atol=1e-12)


# ---- a q of the noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "algebra"), CASES)
def test_the_variance_of_a_whitened_q_is_that_of_its_colored_noise(name, algebra):
    """The diagonal of L diag(s²) Lᵀ, with L of torch's Cholesky."""
    prior, mean, log_variance = setting(name, algebra)
    found = POSTERIORS["whitened"](prior, mean, log_variance).variance
    expected = torch.zeros(3, T, DIM).double()
    for row, n in enumerate(LENGTHS.tolist()):
        expected[row, :n] = by_definition("whitened", prior, mean, log_variance, row)[0].variance.T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    parameters = [*prior.kernel.parameters(), prior.nugget, log_variance]
    weight = randn(3, T, DIM, seed=5)
    gradients = (torch.autograd.grad((x * weight).sum(), parameters) for x in (found, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("algebra", ["dense", "toeplitz", "state_space"])
def test_the_kl_of_two_whitened_trajectories_is_that_of_their_normals(algebra):
    prior, *first = setting("matern", algebra)
    second = randn(3, T, DIM, seed=6), randn(3, T, DIM, seed=7)
    found = kl_divergence(*(POSTERIORS["whitened"](prior, *moments) for moments in (first, second)))
    for row in range(3):
        one, other = (by_definition("whitened", prior, *moments, row)[0] for moments in (first, second))
        torch.testing.assert_close(found[row], kl_divergence(one, other).sum(), rtol=1e-8, atol=1e-8)
    with pytest.raises(NotImplementedError, match="the noise one process makes them of"):
        kl_divergence(POSTERIORS["whitened"](prior, *first), POSTERIORS["whitened"](setting("rbf")[0], *second))


# ---- a beginning of q, and the prior after it ------------------------------------------------------------------------

BEGUN, BEGAN = 12, torch.tensor([12, 5, 0])  # of T times


def continued(kind, algebra="dense", name="matern"):
    """A posterior of the first times of each row and its continuation, with the posterior's moments."""
    kernel = KERNELS[name]().double()
    of_prompt, whole = (
        GaussianProcess(kernel, torch.arange(n).double(), DIM, 0.05, algebra, lengths=lengths)
        for n, lengths in ((BEGUN, BEGAN), (T, torch.full((3,), T)))
    )
    begun = POSTERIORS[kind](of_prompt, randn(3, BEGUN, DIM, seed=1), randn(3, BEGUN, DIM, seed=2))
    return ContinuedTrajectory(begun, BEGAN, whole), begun


def linear(function, shape):
    """A, c of function(ε) = A ε + c, for each row and dimension: [3, DIM, T, numbers of noise], [3, DIM, T]."""
    times, per_time = shape
    constant = function(torch.zeros(1, 3, *shape).double())[0]
    units = torch.eye(times * per_time, dtype=torch.float64).view(-1, 1, times, per_time).expand(-1, 3, -1, -1)
    matrix = function(units) - constant
    return matrix.permute(1, 3, 2, 0).detach(), constant.transpose(1, 2).detach()


@pytest.mark.parametrize("algebra", ["dense", "toeplitz", "state_space"])
@EACH_POSTERIOR
def test_the_law_of_a_continuation_is_gaussian_conditioning(kind, algebra):
    """By its exact map of noise: q at a row's beginning, after it G z and what the prior leaves of its covariance."""
    posterior, begun = continued(kind, algebra)
    assert noise_shape(posterior) == (T, (3 if kind == "sites" else 2) * DIM)
    matrix, mean = linear(lambda noise: sample_from_noise(posterior, noise), noise_shape(posterior))
    covariance = matrix @ matrix.mT
    own_matrix, own_mean = linear(lambda noise: sample_from_noise(begun, noise), noise_shape(begun))
    own_covariance = own_matrix @ own_matrix.mT
    prior = posterior.prior
    each = prior.kernel(prior.times[:, None] - prior.times[None, :]).detach().repeat_interleave(DIM // 2, 0)
    each = each + 0.05 * torch.eye(T).double()
    torch.testing.assert_close(posterior.mean.transpose(1, 2), mean, rtol=1e-10, atol=1e-10)
    for row, n in enumerate(BEGAN.tolist()):
        gain = torch.linalg.solve(each[:, :n, :n], each[:, :n, n:]).mT
        left = each[:, n:, n:] - gain @ each[:, :n, n:]
        m, v = own_mean[row, :, :n], own_covariance[row, :, :n, :n]
        across = gain @ v
        expected = torch.cat((torch.cat((v, across.mT), -1), torch.cat((across, across @ gain.mT + left), -1)), -2)
        torch.testing.assert_close(covariance[row], expected, rtol=1e-9, atol=1e-9)
        expected = torch.cat((m, (gain @ m[..., None])[..., 0]), -1)
        torch.testing.assert_close(mean[row], expected, rtol=1e-9, atol=1e-9)


@EACH_POSTERIOR
def test_draws_of_a_continuation_have_its_moments(kind):
    posterior, _ = continued(kind)
    matrix, mean = linear(lambda noise: sample_from_noise(posterior, noise), noise_shape(posterior))
    covariance, number = matrix @ matrix.mT, 10_000
    torch.manual_seed(0)
    with torch.no_grad():
        z = posterior.rsample((number,)).permute(1, 3, 0, 2)
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    centred = (z - mean[:, :, None]) / deviation[:, :, None]
    assert float(centred.mean(2).abs().max()) < 5 / number**0.5
    correlation = covariance / (deviation[..., :, None] * deviation[..., None, :])
    assert float((centred.mT @ centred / number - correlation).abs().max()) < 5 * (2 / number) ** 0.5


@EACH_POSTERIOR
def test_a_beginning_is_kept_exactly(kind):
    posterior, begun = continued(kind)
    noise = randn(4, 3, *noise_shape(posterior), seed=8)
    z = sample_from_noise(posterior, noise)
    beginning = sample_from_noise(begun, noise[..., :BEGUN, : noise_shape(begun)[1]])
    torch.manual_seed(1)
    drawn = posterior.rsample((4,))
    torch.manual_seed(1)
    own = begun.rsample((4,))
    for row, n in enumerate(BEGAN.tolist()):
        assert torch.equal(z[:, row, :n], beginning[:, row, :n])
        assert torch.equal(drawn[:, row, :n], own[:, row, :n])
        assert torch.equal(posterior.mean[row, :n], begun.mean[row, :n])
        # and the noise of later times is of later times
        other = noise.clone()
        other[:, :, n + 3 :, -DIM:] += 1.0
        changed = sample_from_noise(posterior, other)
        torch.testing.assert_close(changed[:, row, : n + 3], z[:, row, : n + 3], rtol=1e-12, atol=1e-12)
        assert bool((changed[:, row, n + 3 :] != z[:, row, n + 3 :]).any())


@pytest.mark.parametrize(("name", "algebra"), CASES)
def test_a_known_beginning_goes_on_as_the_conditional_process(name, algebra):
    kernel, begun = KERNELS[name]().double(), 7
    prior = GaussianProcess(kernel, torch.arange(T).double(), DIM, 0.05, algebra, lengths=torch.full((2,), T))
    prefix, noise = randn(2, begun, DIM, seed=1), randn(5, 2, T, 2 * DIM, seed=2)
    known = Independent(Normal(prefix, torch.zeros_like(prefix), validate_args=False), 2)
    posterior = ContinuedTrajectory(known, torch.full((2,), begun), prior)
    conditional = prior.conditional(prefix)
    z = sample_from_noise(posterior, noise)
    expected = conditional.from_noise(noise[..., begun:, DIM:])
    torch.testing.assert_close(z[..., begun:, :], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.mean[:, begun:], conditional.mean, rtol=1e-9, atol=1e-9)
    assert torch.equal(z[..., :begun, :], prefix.expand(5, -1, -1, -1))


@EACH_POSTERIOR
def test_nothing_begun_is_the_prior(kind):
    """After BOS alone there is a q of no times, whose KL is 0."""
    kernel = KERNELS["matern"]().double()
    none, whole = (
        GaussianProcess(kernel, torch.arange(n).double(), DIM, 0.05, lengths=torch.full((2,), n)) for n in (0, T)
    )
    begun = POSTERIORS[kind](none, *[torch.zeros(2, 0, DIM).double()] * 2)
    for figure in (kl_divergence(begun, none), begun.log_prob(begun.rsample()), none.log_prob(none.rsample())):
        assert torch.equal(figure, torch.zeros(2).double())
    assert kl_per_dimension(begun, none).shape == (2, DIM) and begun.rsample((5,)).shape == (5, 2, 0, DIM)
    posterior = ContinuedTrajectory(begun, torch.zeros(2).long(), whole)
    noise = randn(3, 2, *noise_shape(posterior), seed=1)
    torch.testing.assert_close(sample_from_noise(posterior, noise), whole.color(noise[..., -DIM:]))
    assert none.sequentially().rsample((5,)).shape == (5, 2, 0, DIM)


# ---- the process of which they are made ------------------------------------------------------------------------------


@pytest.mark.parametrize("algebra", ["dense", "toeplitz"])
def test_a_white_process_is_its_nugget(algebra):
    nugget = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    process = GaussianProcess(White(), torch.arange(T).double(), DIM, nugget, algebra, lengths=LENGTHS)
    z, noise = randn(2, 3, T, DIM), randn(2, 3, T, DIM, seed=1)
    real = (torch.arange(T) < LENGTHS[:, None])[..., None]
    own = Normal(torch.zeros(DIM).double(), nugget.repeat_interleave(2).sqrt())
    found = process.log_prob(z)
    expected = own.log_prob(z).masked_fill(~real, 0).sum((-1, -2))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(x.sum(), nugget)[0] for x in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(process.color(noise), noise * own.stddev * real, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(process.variance, own.variance.expand(3, T, DIM))
    torch.testing.assert_close(process.whiten(process.color(noise)), noise * real, rtol=1e-12, atol=1e-12)


def test_sites_of_a_white_process_are_each_times_own():
    prior = GaussianProcess(White(), torch.arange(T).double(), DIM, 1.0, lengths=LENGTHS)
    observed, log_variance = randn(3, T, DIM, seed=1), randn(3, T, DIM, seed=2)
    posterior, real = SitesPosterior(prior, observed, log_variance), torch.arange(T) < LENGTHS[:, None]
    variance = 1 / (1 + (-log_variance).exp())
    torch.testing.assert_close(posterior.variance, variance * real[..., None])
    torch.testing.assert_close(posterior.mean, variance * (-log_variance).exp() * observed * real[..., None])


@pytest.mark.parametrize(("name", "algebra"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_one_time_after_another_is_all_at_once(name, algebra, dtype, tolerance):
    prior, *_ = setting(name, algebra)
    noise = randn(2, 3, T, DIM, seed=1).to(dtype)
    expected = prior.color(noise)
    in_order = prior.sequentially()  # with the factorisation that is made already, which has gradients
    found = in_order.color(noise)
    assert found.dtype == dtype and not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)
    assert bool((found[:, 1, 12:] == 0).all()) and bool((found[:, 1, :12] != 0).all())
    # so it stays for other rows and in a posterior, and the process itself is as it was
    assert not select_rows(in_order, torch.tensor([True, False, True])).color(noise[0, :2]).requires_grad
    white = WhitenedGaussian(in_order, normal(noise[0], torch.zeros_like(noise[0])))
    torch.testing.assert_close(white.mean, expected[0].detach(), rtol=tolerance, atol=tolerance)
    assert prior.color(noise).requires_grad


@pytest.mark.parametrize("algebra", ["dense", "toeplitz", "state_space"])
@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
def test_the_first_noise_makes_the_first_times(algebra, sequential):
    """Of a longer process, of noise that goes on otherwise, and of a whitened q."""
    prior, mean, log_variance = setting("matern", algebra)
    whole = prior.with_lengths(torch.full((3,), T))
    whole = whole.sequentially() if sequential else whole
    noise, other = randn(3, T, DIM, seed=1), randn(3, T, DIM, seed=2)
    for begun in (1, 9, T - 1):
        begins = torch.cat((noise[:, :begun], other[:, begun:]), 1)
        times = torch.arange(begun).double()
        short = GaussianProcess(prior.kernel, times, DIM, prior.nugget, algebra, lengths=torch.full((3,), begun))
        whitened = WhitenedGaussian(whole, normal(mean, log_variance))
        for distribution in (whole, whitened):
            z, changed = (sample_from_noise(distribution, x) for x in (noise, begins))
            torch.testing.assert_close(changed[:, :begun], z[:, :begun], rtol=1e-11, atol=1e-11)
            assert bool((changed[:, begun:] != z[:, begun:]).all())
        shorter = sample_from_noise(short, noise[:, :begun])
        torch.testing.assert_close(shorter, sample_from_noise(whole, noise)[:, :begun], rtol=1e-11, atol=1e-11)


def test_observations_that_are_not_finite_are_said():
    prior, observed, log_variance = setting()
    broken = observed.detach().clone()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(DivergedError, match="observations or their variances are no longer finite"):
        SitesPosterior(prior, broken, log_variance)
