"""The algebra of Gaussian processes against torch's multivariate normal, gpytorch and the definition, in float64."""

import math

import gpytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from latentlm.distributions import (
    RBF,
    GaussianProcess,
    Matern,
    Periodic,
    RationalQuadratic,
    sample_from_noise,
    select_rows,
)
from latentlm.distributions.algebra import Toeplitz
from latentlm.distributions.state_space import scan
from latentlm.errors import DivergedError, InputError

T, DIM = 37, 4
KERNELS = {
    "rbf": lambda: RBF(3.0, 1.3),
    "rbf, per dimension": lambda: RBF([1.0, 2.0, 4.0, 8.0], [1.0, 0.5, 2.0, 1.0]),
    "matern 1/2": lambda: Matern(0.5, [3.0, 9.0], 2.0),
    "matern 3/2": lambda: Matern(1.5, 5.0, [1.0, 2.0]),
    "matern 5/2": lambda: Matern(2.5, [3.0, 9.0], [1.0, 2.0]),
    "rational quadratic": lambda: RationalQuadratic(4.0, 1.0, [0.5, 2.0]),
    "periodic": lambda: Periodic(7.0, 1.2, 0.8),
    "a sum": lambda: Matern(1.5, 4.0) + Matern(0.5, [2.0, 3.0, 4.0, 5.0]),
    "a product": lambda: Matern(1.5, 4.0) * Matern(2.5, [6.0, 3.0]),
    "a sum of products": lambda: Periodic(9.0) * RBF(10.0) + RBF(2.0, 0.3),
}
MARKOV = ["matern 1/2", "matern 3/2", "matern 5/2", "a sum", "a product"]
ALGEBRAS = [
    *((name, "dense") for name in KERNELS),
    *((name, "toeplitz") for name in KERNELS),
    *((name, "state_space") for name in MARKOV),
]
LENGTHS = torch.tensor([T, 20, 1, 0])


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative(ours, theirs):
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp_min(1e-300))


def covariance(kernel, times, nugget):
    """[DIM, T, T] by the definition."""
    each = kernel(times[:, None] - times[None, :])
    each = each.repeat_interleave(DIM // len(each), 0)
    return each + torch.diag_embed(nugget.repeat_interleave(DIM // len(nugget))[:, None].expand(-1, len(times)))


@pytest.mark.parametrize(("name", "algebra"), ALGEBRAS)
def test_probability_entropy_and_kl_with_their_gradients(name, algebra):
    kernel, times = KERNELS[name]().double(), torch.arange(T).double()
    nugget = torch.full((kernel.groups,), 0.01, dtype=torch.float64, requires_grad=True)
    process = GaussianProcess(kernel, times, DIM, nugget, algebra, lengths=LENGTHS)
    z = randn(2, len(LENGTHS), T, DIM).requires_grad_()
    mean, log_variance = randn(len(LENGTHS), T, DIM, seed=1).requires_grad_(), randn(len(LENGTHS), T, DIM, seed=2)
    log_variance.requires_grad_()
    parameters = [*kernel.parameters(), nugget, z, mean, log_variance]

    def by_definition():
        whole = covariance(kernel, times, nugget)
        log_probs, kls, entropies = [], [], []
        for row, n in enumerate(LENGTHS[:-1]):
            own = MultivariateNormal(torch.zeros(int(n)).double(), whole[:, :n, :n])
            log_probs.append(own.log_prob(z[:, row, :n].mT).sum(-1))
            entropies.append(own.entropy().sum())
            q = MultivariateNormal(mean[row, :n].T, torch.diag_embed(log_variance[row, :n].T.exp()))
            kls.append(kl_divergence(q, own).sum())
        nothing = torch.zeros(()).double()
        return (
            torch.stack([*log_probs, nothing.expand(2)], -1),
            torch.stack([*kls, nothing]),
            torch.stack([*entropies, nothing]),
        )

    def ours():
        q = Independent(Normal(mean, (0.5 * log_variance).exp()), 2)
        return process.log_prob(z), kl_divergence(q, process), process.entropy()

    results = []
    for function in (ours, by_definition):
        figures = function()
        total = sum(((1 + torch.arange(f.numel()).view(f.shape)) * f).sum() for f in figures)
        results.append((figures, torch.autograd.grad(total, parameters)))
    for mine, theirs in zip(*(figures for figures, _ in results), strict=True):
        assert relative(mine, theirs) < 1e-11
    for mine, theirs in zip(*(gradients for _, gradients in results), strict=True):
        assert relative(mine, theirs) < 1e-9


@pytest.mark.parametrize("condition_number", [1e3, 1e6])
@pytest.mark.parametrize("algebra", ["dense", "toeplitz", "state_space"])
def test_against_gpytorch_up_to_a_condition_number_of_a_million(algebra, condition_number):
    """≤ 1e-8 relative, of the log-probability, the KL and their gradients in lengthscale, variance and nugget."""
    times, kernel = torch.arange(64).double(), Matern(2.5, 8.0, 1.5).double()
    lengthscale, variance = kernel.log_lengthscale.detach().exp(), kernel.log_variance.detach().exp()
    largest = float(torch.linalg.eigvalsh(kernel(times[:, None] - times[None, :])).amax().detach())
    nugget = torch.tensor(largest / condition_number, dtype=torch.float64, requires_grad=True)
    theirs = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5)).double()
    theirs.outputscale, theirs.base_kernel.lengthscale = variance, lengthscale
    log_nugget = nugget.detach().log().requires_grad_()
    dense = theirs(times[:, None]).to_dense() + log_nugget.exp() * torch.eye(64).double()
    reference = gpytorch.distributions.MultivariateNormal(torch.zeros(64).double(), dense)
    process = GaussianProcess(kernel, times, 1, nugget, algebra)
    z, mean, scale = randn(64, 1), randn(64, 1, seed=1), 0.1 + randn(64, 1, seed=2).abs()
    q = Independent(Normal(mean, scale), 2)
    their_q = MultivariateNormal(mean[:, 0], torch.diag(scale[:, 0].square()))
    plain = MultivariateNormal(torch.zeros(64).double(), dense)
    with gpytorch.settings.fast_computations(False, False, False):
        figures = reference.log_prob(z[:, 0]), kl_divergence(their_q, plain)
    parameters = [theirs.base_kernel.raw_lengthscale, theirs.raw_outputscale, log_nugget]
    for mine, other in zip((process.log_prob(z), kl_divergence(q, process)), figures, strict=True):
        assert relative(mine, other) < 1e-8
        by_hyperparameter = torch.autograd.grad(other, parameters, retain_graph=True)
        own = torch.autograd.grad(mine, [kernel.log_lengthscale, kernel.log_variance, nugget], retain_graph=True)
        # theirs are by the softplus' argument, ours by the logarithm
        by_log = [
            g.sum() * value.detach().sum() / torch.sigmoid(raw.detach()).sum()
            for g, raw, value in zip(
                by_hyperparameter,
                parameters[:2],
                (theirs.base_kernel.lengthscale, theirs.outputscale),
                strict=False,
            )
        ]
        assert relative(own[0].sum(), by_log[0]) < 1e-8
        assert relative(own[1].sum(), by_log[1]) < 1e-8
        assert relative(own[2] * nugget.detach(), by_hyperparameter[2]) < 1e-8


@pytest.mark.parametrize(("name", "algebra"), ALGEBRAS)
def test_step_by_step_is_the_block_is_the_cholesky_factor(name, algebra):
    kernel, times, noise = KERNELS[name]().double(), torch.arange(T).double(), randn(3, T, DIM)
    nugget = torch.tensor([0.02], dtype=torch.float64)
    process = GaussianProcess(kernel, times, DIM, nugget, algebra)
    expected = torch.einsum("dij,bjd->bid", torch.linalg.cholesky(covariance(kernel, times, nugget)), noise)
    block = process.color(noise)
    steps = torch.stack(list(process.steps(noise)), 1)
    assert relative(block, expected) < 1e-11
    assert relative(steps, expected) < 1e-11
    assert relative(process.whiten(block), noise) < 1e-10
    for begun in (1, 10, T - 1, T):
        rest = list(process.steps(noise[:, begun:], block[:, :begun]))
        assert len(rest) == T - begun
        if rest:
            assert len(list(process.steps(noise[:, begun : begun + 1], block[:, :begun]))) == 1
            assert relative(torch.stack(rest, 1), expected[:, begun:]) < 1e-10
        conditional = process.conditional(block[:, :begun])
        torch.testing.assert_close(conditional.from_noise(noise[:, begun:]), expected[:, begun:], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("algebra", ["dense", "toeplitz", "state_space"])
def test_gradients_through_a_sample(algebra):
    kernel, noise = Matern(1.5, [3.0, 6.0]).double(), randn(2, T, DIM)
    nugget = torch.tensor([0.02], dtype=torch.float64, requires_grad=True)
    times = torch.arange(T).double()
    weights = randn(2, T, DIM, seed=3)
    mine = (GaussianProcess(kernel, times, DIM, nugget, algebra).color(noise) * weights).sum()
    factor = torch.linalg.cholesky(covariance(kernel, times, nugget))
    theirs = (torch.einsum("dij,bjd->bid", factor, noise) * weights).sum()
    parameters = [*kernel.parameters(), nugget]
    for own, other in zip(*(torch.autograd.grad(x, parameters) for x in (mine, theirs)), strict=True):
        assert relative(own, other) < 1e-10


def test_the_conditional_is_that_of_a_multivariate_normal():
    kernel, times, begun = RBF(4.0).double(), torch.arange(12).double(), 5
    process = GaussianProcess(kernel, times, 2, 0.01)
    prefix = process.rsample((3,))[:, :begun]
    conditional = process.conditional(prefix)
    whole = kernel(times[:, None] - times[None, :])[0] + 0.01 * torch.eye(12).double()
    across = torch.linalg.solve(whole[:begun, :begun], whole[:begun, begun:]).T
    mean = torch.einsum("ij,bjd->bid", across, prefix)
    left = whole[begun:, begun:] - across @ whole[:begun, begun:]
    torch.testing.assert_close(conditional.mean, mean)
    z = randn(4, 3, 12 - begun, 2)
    expected = MultivariateNormal(mean.mT, left).log_prob(z.mT).sum(-1)
    torch.testing.assert_close(conditional.log_prob(z), expected)


@pytest.mark.parametrize("algebra", ["dense", "state_space"])
def test_irregular_times(algebra):
    times = torch.tensor([0.0, 0.1, 1.5, 1.6, 9.0, 30.0]).double()
    kernel = (Matern(1.5, 2.0) + Matern(0.5, 5.0)).double()
    process, z = GaussianProcess(kernel, times, 1, 0.05, algebra), randn(6, 1)
    dense = kernel(times[:, None] - times[None, :])[0] + 0.05 * torch.eye(6).double()
    torch.testing.assert_close(
        process.log_prob(z), MultivariateNormal(torch.zeros(6).double(), dense).log_prob(z[:, 0])
    )


@pytest.mark.parametrize("kind", ["block", "steps"])
@pytest.mark.parametrize("algebra", ["dense", "toeplitz", "state_space"])
def test_the_covariance_of_many_samples(algebra, kind):
    kernel, times, rows = Matern(1.5, 4.0).double(), torch.arange(8).double(), 40_000
    process, noise = GaussianProcess(kernel, times, 1, 0.1, algebra), randn(rows, 8, 1)
    z = process.color(noise) if kind == "block" else torch.stack(list(process.steps(noise)), 1)
    empirical = z[..., 0].T @ z[..., 0] / rows
    exact = kernel(times[:, None] - times[None, :])[0] + 0.1 * torch.eye(8).double()
    # the s.d. of an entry is √((Σ_ii Σ_jj + Σ_ij²) / rows) ≤ 0.0078: five of them
    assert float((empirical - exact.detach()).abs().max()) < 0.04


def test_inducing_points_at_all_times_are_exact_and_few_are_near():
    kernel, times = RBF(6.0).double(), torch.arange(24).double()
    z = GaussianProcess(kernel, times, 1, 0.1).rsample((5,))
    exact = GaussianProcess(kernel, times, 1, 0.1).log_prob(z)
    errors = []
    for points in (3, 6, 12, times):
        process = GaussianProcess(kernel, times, 1, 0.1, "inducing", inducing=points)
        errors.append(float((process.log_prob(z) - exact).abs().max()))
        noise = randn(5, 24, 1)
        assert relative(process.whiten(process.color(noise)), noise) < 1e-8
    assert errors[-1] < 1e-6
    assert errors[0] > 10 * errors[2] > 0


def test_the_approximation_of_inducing_points_is_fitc():
    kernel, times, points = RBF(3.0).double(), torch.tensor([0.0, 0.7, 2.0, 5.5, 6.0, 9.0]).double(), 3
    process = GaussianProcess(kernel, times, 1, 0.2, "inducing", inducing=points)
    at = torch.linspace(0, 9, points).double()
    across = kernel(times[:, None] - at[None, :])[0]
    low_rank = across @ torch.linalg.solve(kernel(at[:, None] - at[None, :])[0], across.T)
    dense = low_rank - torch.diag(low_rank.diagonal()) + 1.2 * torch.eye(6).double()
    z = randn(6, 1)
    expected = MultivariateNormal(torch.zeros(6).double(), dense).log_prob(z[:, 0])
    torch.testing.assert_close(process.log_prob(z), expected, atol=1e-7, rtol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    nu=st.sampled_from([0.5, 1.5, 2.5]),
    lengthscale=st.floats(0.05, 200),
    variance=st.floats(1e-3, 1e3),
    nugget=st.floats(1e-6, 10),
    length=st.integers(1, 40),
)
def test_the_algebras_agree_wherever_they_are_defined(nu, lengthscale, variance, nugget, length):
    kernel, times = Matern(nu, lengthscale, variance).double(), torch.arange(length).double()
    z = GaussianProcess(kernel, times, 1, nugget).rsample((2,))
    figures = [
        GaussianProcess(kernel, times, 1, nugget, algebra).log_prob(z)
        for algebra in ("dense", "toeplitz", "state_space")
    ]
    # what float64 leaves of a covariance of this condition number
    tolerance = 1e-13 * (1 + length * variance / nugget) * (10 + float(figures[0].abs().max()))
    for other in figures[1:]:
        assert float((other - figures[0]).abs().max()) < tolerance


@pytest.mark.parametrize("algebra", ["dense", "toeplitz"])
def test_a_covariance_without_an_inverse_is_lifted_or_refused_in_a_sentence(algebra):
    times = torch.arange(64).double()
    smooth = GaussianProcess(RBF(8.0), times, 1, 0.0, algebra)
    assert bool(smooth.log_prob(smooth.rsample()).isfinite())
    message = r"RBF\(lengthscale 8.0, variance 1.0\) with nugget 0 at 64 times is not positive definite in float64"
    with pytest.raises(DivergedError, match=message):
        smooth.with_noise(torch.full((1, 64), -0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianProcess(RBF(), torch.tensor([0.0, 0.0])), "times of a Gaussian process must be finite and"),
        (lambda: GaussianProcess(RBF(), torch.tensor([0.0, math.nan])), "must be finite and increase"),
        (lambda: GaussianProcess(RBF([1.0, 2.0]), torch.arange(3.0), 3), "3 dimensions do not fall into the 2 groups"),
        (lambda: GaussianProcess(RBF(), torch.arange(3.0), algebra="state_space"), "has no state space"),
        (lambda: GaussianProcess(RBF(), torch.tensor([0.0, 1.0, 3.0]), algebra="toeplitz"), "on a regular grid"),
        (lambda: GaussianProcess(RBF(), torch.arange(3.0), lengths=torch.tensor([4])), "between 0 and the 3 times"),
        (lambda: GaussianProcess(RBF(), torch.arange(3.0)).log_prob(torch.zeros(2, 1)), "does not end in"),
        (lambda: GaussianProcess(RBF(), torch.arange(3.0), nugget=-1.0), "nugget must be a variance from 0 on"),
        (lambda: GaussianProcess(RBF(), torch.arange(3.0), nugget=math.nan), "nugget must be a variance from 0 on"),
        (lambda: GaussianProcess(RBF(), torch.arange(3.0), inducing=0), "at least 1 point, not 0"),
        (
            lambda: GaussianProcess(RBF(), torch.arange(3.0)).conditional(torch.zeros(1, 4, 1)),
            r"of shape \[1, 4, 1\] .* give \[batch, begun, 1\] with at most 3 times",
        ),
        (lambda: RBF(-1.0), "lengthscale must be a finite number above 0"),
        (lambda: RBF([1.0, math.inf]), "lengthscale must be a finite number above 0"),
        (lambda: Matern(1.0), "nu must be 0.5, 1.5 or 2.5"),
        (lambda: RBF([1.0, 2.0]) + RBF([1.0, 2.0, 3.0]), "kernels of 2 and 3 groups"),
    ],
)
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_initial_value_is_the_initial_value():
    kernel = RBF([8.0, 0.25], 1e-3)
    torch.testing.assert_close(kernel.log_lengthscale.exp(), torch.tensor([8.0, 0.25]))
    torch.testing.assert_close(kernel.variance(), torch.full((2,), 1e-3).double())


def test_auto_takes_the_cheapest_exact_algebra():
    assert GaussianProcess(RBF(), torch.arange(64.0)).algebra_name == "dense"
    assert GaussianProcess(RBF(), torch.arange(1024.0)).algebra_name == "toeplitz"
    assert GaussianProcess(Matern(1.5), torch.arange(1024.0)).algebra_name == "state_space"
    assert GaussianProcess(RBF(), torch.rand(1024).cumsum(0) + torch.arange(1024.0)).algebra_name == "dense"


def test_samples_of_noise_rows_and_shapes():
    process = GaussianProcess(RBF(2.0), torch.arange(5.0), 3, 0.1, lengths=torch.tensor([5, 2]))
    noise = randn(2, 5, 3).float()
    z = sample_from_noise(process, noise)
    assert z.dtype == torch.float32 and z.shape == (2, 5, 3)
    assert bool((z[1, 2:] == 0).all())  # after a row's end
    alone = select_rows(process, torch.tensor([False, True]))
    torch.testing.assert_close(alone.log_prob(z[1:]), process.log_prob(z)[1:])
    assert process.rsample((7,)).shape == (7, 2, 5, 3)
    assert process.mean.shape == process.variance.shape == (2, 5, 3)
    torch.testing.assert_close(process.variance, torch.full((2, 5, 3), 1.1).double(), atol=1e-6, rtol=0)
    garbage = z.clone()
    garbage[1, 2:] = math.nan
    torch.testing.assert_close(process.log_prob(garbage), process.log_prob(z))


def test_a_scan_is_its_prefixes():
    for length in range(1, 20):
        values = randn(length, 3, 3)
        expected = [values[0]]
        for matrix in values[1:]:
            expected.append(expected[-1] @ matrix)
        (result,) = scan(lambda early, late: (early[0] @ late[0],), (values,))
        torch.testing.assert_close(result, torch.stack(expected))


def test_toeplitz_keeps_no_square_matrix():
    """The largest tensor of a value and its gradient is far from T × T, where times are many (see conftest.py)."""
    times = torch.arange(512).double()
    largest = 0

    def saved(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    kernel = RBF(8.0).double()
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        process = GaussianProcess(kernel, times, 1, 0.01, "toeplitz")
        assert isinstance(process.algebra, Toeplitz)
        total = process.log_prob(randn(512, 1)) + process.entropy() + process.color(randn(512, 1)).sum()
        total.backward()
    assert 0 < largest < 512 * 512 / 8


@pytest.mark.parametrize("name", KERNELS)
def test_durbins_steps_and_a_factor_are_one_algebra(name, monkeypatch):
    """Of few times and of many: L ε, L⁻¹ z and their gradients, whoever asks first."""
    kernel, times, z = KERNELS[name]().double(), torch.arange(T).double(), randn(3, T, DIM).requires_grad_()
    nugget = torch.full((kernel.groups,), 0.01, dtype=torch.float64, requires_grad=True)
    found = []
    for few_times in (0, 2**30):
        monkeypatch.setattr("latentlm.distributions.algebra._FACTOR_UNTIL", few_times)
        process = GaussianProcess(kernel, times, DIM, nugget, "toeplitz", lengths=LENGTHS[:3])
        algebra = process.algebra
        with torch.inference_mode():
            process.color(randn(3, T, DIM))
        figures = process.color(z), process.whiten(z)
        assert process.algebra is algebra and (algebra._factored is None) == (few_times == 0)
        gradients = torch.autograd.grad(sum((f * f).sum() for f in figures), [*kernel.parameters(), nugget, z])
        found.append((*figures, *gradients))
    for by_steps, by_factor in zip(*found, strict=True):
        assert relative(by_factor, by_steps) < 1e-9


def test_a_factor_that_rounding_prevents_is_lifted(monkeypatch):
    """Of a process that Durbin's steps find positive and Cholesky's factorisation does not."""
    monkeypatch.setattr("latentlm.distributions.algebra._FACTOR_UNTIL", 2**30)
    process = GaussianProcess(RBF(60.0).double(), torch.arange(256.0), 1, 3e-15, "toeplitz")
    assert isinstance(process.algebra, Toeplitz)
    whole = process.kernel(process.times[:, None] - process.times)[0] + 3e-15 * torch.eye(256)
    assert int(torch.linalg.cholesky_ex(whole).info) > 0
    noise = randn(256, 1)
    path = process.color(noise)
    # float64 leaves this much of a condition number of 256 / 1e-10
    assert relative(path, GaussianProcess(process.kernel, process.times, 1, 1e-10).color(noise)) < 1e-4
    assert relative(process.whiten(path), noise) < 1e-4


def test_a_length_that_was_first_asked_for_without_gradients_learns():
    kernel, z = RBF(3.0).double(), randn(2, 9, 1)
    gradients = []
    for asked_before in (False, True):
        process = GaussianProcess(kernel, torch.arange(9.0), 1, 0.1, "toeplitz", lengths=torch.tensor([9, 5]))
        assert process.algebra.covariance.requires_grad
        if asked_before:
            with torch.no_grad():
                process.log_prob(z)
        total = process.log_prob(z).sum() + process.entropy().sum()
        gradients.append(torch.autograd.grad(total, kernel.log_lengthscale)[0])
    assert torch.equal(*gradients)


def test_a_factor_made_without_gradients_is_not_taken_where_they_are_wanted():
    process = GaussianProcess(RBF(3.0), torch.arange(6.0), nugget=0.1)
    value = torch.randn(6, 1, dtype=torch.float64)
    with torch.no_grad():
        before = process.log_prob(value)
    after = process.log_prob(value)
    assert torch.equal(before, after)
    after.backward()
    assert float(process.kernel.log_lengthscale.grad.abs()) > 0
