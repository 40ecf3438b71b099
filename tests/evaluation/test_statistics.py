"""Active units and mutual information, where both are known."""

import math

import pytest
import torch

from latentlm.distributions import diagonal_gaussian, standard_normal
from latentlm.evaluation.likelihood import LatentStatistics, mutual_information


def gaussians(means: torch.Tensor, variance: float = 1.0):
    return diagonal_gaussian(means, torch.full_like(means, variance).log())


def samples(posterior, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(posterior.mean.shape, generator=generator)
    return posterior.mean + posterior.variance.sqrt() * noise


def information(posteriors, latents):
    return mutual_information(posteriors, latents, units=latents[0].shape[1])[0]


# ---- mutual information ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 10])
def test_posteriors_that_do_not_overlap_tell_the_text(number):
    posterior = gaussians(100.0 * torch.arange(number).float()[:, None].expand(number, 3))
    assert information([posterior], [samples(posterior)]) == pytest.approx(math.log(number), abs=1e-6)


def test_posteriors_that_are_all_the_same_tell_nothing():
    posterior = gaussians(torch.ones(10, 3))
    assert information([posterior], [samples(posterior)]) == pytest.approx(0, abs=1e-6)


def test_two_posteriors_that_overlap_tell_what_an_integral_says():
    """I = ½ Σ_i ∫ q_i log (q_i / ½ (q_1 + q_2)) for N(±1, 1), by the rectangle rule."""
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    densities = torch.exp(-0.5 * (grid - torch.tensor([[-1.0], [1.0]])) ** 2) / math.sqrt(2 * math.pi)
    exact = float((0.5 * densities * (densities / densities.mean(0)).log()).sum() * (grid[1] - grid[0]))
    # 2,000 texts, half of each kind: the mixture is that of the two
    posterior = gaussians(torch.tensor([-1.0, 1.0]).repeat(1000)[:, None])
    assert information([posterior], [samples(posterior)]) == pytest.approx(exact, abs=0.02)


def test_batches_are_one_population():
    posterior = gaussians(torch.randn(7, 2, generator=torch.Generator().manual_seed(1)) * 2)
    z = samples(posterior)
    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    split = [gaussians(posterior.mean[part]) for part in parts]
    assert information(split, [z[part] for part in parts]) == pytest.approx(information([posterior], [z]), abs=1e-6)


# ---- active units ------------------------------------------------------------------------------------------------


def spread(variance: float) -> torch.Tensor:
    """Four numbers of this variance around 3."""
    return 3 + math.sqrt(variance) * torch.tensor([-1.0, 1.0, -1.0, 1.0])


def test_a_unit_is_active_whose_mean_varies_by_more_than_a_hundredth():
    means = torch.stack([spread(variance) for variance in (0.0, 0.005, 0.0099, 0.0101, 0.02, 4.0)], dim=1)
    statistics = LatentStatistics()
    for part in means.split(1):
        statistics.add(gaussians(part), standard_normal(1, (6,)), part)
    summary = statistics.summary()
    assert (summary["active_units"], summary["latent_units"]) == (3, 6)


def test_the_threshold_is_of_the_priors_variance():
    means = torch.stack([spread(0.02), spread(0.2)], dim=1)
    statistics = LatentStatistics()
    statistics.add(gaussians(means), gaussians(torch.zeros(4, 2), variance=10.0), means)
    assert statistics.summary()["active_units"] == 1


def test_units_of_a_latent_with_several_dimensions_are_its_numbers():
    means = torch.zeros(4, 2, 3)
    means[:, 1, 2] = spread(1.0)
    statistics = LatentStatistics()
    statistics.add(gaussians(means), standard_normal(4, (2, 3)), means)
    summary = statistics.summary()
    assert (summary["active_units"], summary["latent_units"]) == (1, 6)


def test_latents_that_differ_in_shape_are_not_compared():
    statistics = LatentStatistics()
    for length in (3, 5):
        means = torch.zeros(2, length, 4)
        statistics.add(gaussians(means), standard_normal(2, (length, 4)), means)
    assert set(statistics.summary().values()) == {None}
