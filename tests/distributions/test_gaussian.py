import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from latentlm.distributions import diagonal_gaussian, kl_per_dimension, sample_from_noise, standard_normal


@pytest.fixture
def moments():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, 3, generator=generator), torch.randn(4, 2, 3, generator=generator)


def test_kl_against_the_closed_form_in_float64(moments):
    """½ Σ (μ² + σ² − 1 − log σ²)."""
    mean, log_variance = (part.double() for part in moments)
    expected = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
    posterior, prior = diagonal_gaussian(*moments), standard_normal(4, (2, 3))
    torch.testing.assert_close(kl_per_dimension(posterior, prior).double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(kl_divergence(posterior, prior).double(), expected.sum((1, 2)), atol=1e-5, rtol=1e-6)


def test_kl_against_a_full_covariance(moments):
    mean, log_variance = moments
    posterior = MultivariateNormal(mean.flatten(1), torch.diag_embed(log_variance.exp().flatten(1)))
    prior = MultivariateNormal(torch.zeros(6), torch.eye(6))
    ours = kl_divergence(diagonal_gaussian(mean, log_variance), standard_normal(4, (2, 3)))
    torch.testing.assert_close(ours, kl_divergence(posterior, prior), atol=1e-5, rtol=1e-5)


def test_kl_between_two_gaussians(moments):
    first = diagonal_gaussian(*moments)
    second = diagonal_gaussian(moments[1], moments[0])
    expected = kl_divergence(Normal(first.mean, first.stddev), Normal(second.mean, second.stddev))
    assert torch.equal(kl_per_dimension(first, second), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_whatever_comes_in(moments, dtype):
    mean, log_variance = (part.to(dtype) for part in moments)
    posterior = diagonal_gaussian(mean, log_variance)
    assert posterior.mean.dtype == posterior.variance.dtype == torch.float32
    expected = diagonal_gaussian(mean.float(), log_variance.float())
    assert torch.equal(posterior.mean, expected.mean) and torch.equal(posterior.stddev, expected.stddev)
    assert kl_divergence(posterior, standard_normal(4, (2, 3))).dtype == torch.float32


def test_shapes(moments):
    posterior = diagonal_gaussian(*moments)
    assert posterior.batch_shape == (4,) and posterior.event_shape == (2, 3)
    empty = standard_normal(5, (0,))
    assert empty.batch_shape == (5,) and empty.event_shape == (0,)
    assert torch.equal(kl_divergence(empty, empty), torch.zeros(5))
    assert torch.equal(empty.log_prob(torch.zeros(5, 0)), torch.zeros(5))


def test_log_density_in_float64(moments):
    z = torch.linspace(-2, 2, 24).view(4, 2, 3)
    mean, log_variance = (part.double() for part in moments)
    density = (-((z.double() - mean) ** 2) / (2 * log_variance.exp())).exp() / (
        2 * torch.pi * log_variance.exp()
    ).sqrt()
    expected = density.log().sum((1, 2))
    # terms reach 50, so float32 keeps 1e-5 of each
    torch.testing.assert_close(diagonal_gaussian(*moments).log_prob(z).double(), expected, atol=1e-4, rtol=1e-6)


def test_a_sample_is_mean_plus_deviation_times_noise(moments):
    noise = torch.linspace(-3, 3, 24).view(4, 2, 3)
    posterior = diagonal_gaussian(*moments)
    sample = sample_from_noise(posterior, noise)
    assert torch.allclose((sample - moments[0]) / (moments[1] / 2).exp(), noise, atol=1e-5)
    assert torch.equal(sample_from_noise(posterior, torch.zeros(4, 2, 3)), posterior.mean)


def test_a_sample_carries_gradient_to_mean_and_variance(moments):
    mean, log_variance = (part.double().requires_grad_() for part in moments)
    noise = torch.linspace(-3, 3, 24).view(4, 2, 3)
    sample_from_noise(diagonal_gaussian(mean, log_variance), noise).sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))
    torch.testing.assert_close(log_variance.grad, 0.5 * (0.5 * log_variance).exp().detach() * noise, rtol=1e-6, atol=0)


def test_a_distribution_without_a_transform_is_refused():
    with pytest.raises(TypeError, match="Categorical is registered"):
        sample_from_noise(Categorical(logits=torch.zeros(2, 3)), torch.zeros(2))


def test_only_gaussians_are_sampled_as_gaussians():
    with pytest.raises(TypeError, match="Laplace"):
        sample_from_noise(Independent(Laplace(torch.zeros(2, 3), torch.ones(2, 3)), 1), torch.zeros(2, 3))


def test_a_kl_per_dimension_needs_dimensions():
    full = MultivariateNormal(torch.zeros(2, 3), torch.eye(3))
    with pytest.raises(TypeError, match="factorise"):
        kl_per_dimension(full, standard_normal(2, (3,)))
