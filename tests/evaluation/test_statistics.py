"""Statistics of latents where they are known: by closed forms, by integrals, by torch's own KL, by sums written out."""

import math
import random

import pytest
import torch
from tests.toy import OnGrid, Rows, grid_model, small_model, small_variant, texts
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from latentlm.distributions import diagonal_gaussian, select_rows, standard_normal
from latentlm.evaluation.likelihood import evaluate
from latentlm.evaluation.statistics import (
    LatentStatistics,
    aggregate_kl,
    log_densities,
    mutual_information,
    mutual_information_per_batch,
)


@select_rows.register
def _(distribution: OnGrid, rows: torch.Tensor) -> OnGrid:
    return OnGrid(distribution.points, distribution.log_probabilities[rows])


def gaussians(means: torch.Tensor, variance: float = 1.0):
    return diagonal_gaussian(means, torch.full_like(means, variance).log())


def samples(posterior, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(posterior.mean.shape, generator=generator)
    return posterior.mean + posterior.variance.sqrt() * noise


def densities(posteriors, latents):
    return log_densities(posteriors, latents, units=latents[0].shape[1])


def information(posterior):
    return mutual_information(densities([posterior], [samples(posterior)]))


def summary(posterior, prior=None, seed=0, parts=None, order=None):
    """The statistics of one posterior, in batches of its rows."""
    mean, deviation, z = posterior.mean, posterior.variance.sqrt(), samples(posterior, seed)
    prior = prior or standard_normal(len(mean), tuple(mean.shape[1:]))
    statistics = LatentStatistics()
    for part in parts or [torch.arange(len(mean))]:
        q = Independent(Normal(mean[part], deviation[part]), mean.dim() - 1)
        p = Independent(Normal(prior.mean[part], prior.variance[part].sqrt()), mean.dim() - 1)
        statistics.add(q, p, z[part], part if order is None else order[part])
    return statistics.summary()


# ---- mutual information ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 10])
def test_posteriors_that_do_not_overlap_tell_the_text(number):
    posterior = gaussians(100.0 * torch.arange(number).float()[:, None].expand(number, 3))
    assert information(posterior) == pytest.approx(math.log(number), abs=1e-6)


def test_posteriors_that_are_all_the_same_tell_nothing():
    assert information(gaussians(torch.ones(10, 3))) == pytest.approx(0, abs=1e-6)


def test_two_posteriors_that_overlap_tell_what_an_integral_says():
    """I = ½ Σ_i ∫ q_i log (q_i / ½ (q_1 + q_2)) for N(±1, 1), by the rectangle rule."""
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    densities = torch.exp(-0.5 * (grid - torch.tensor([[-1.0], [1.0]])) ** 2) / math.sqrt(2 * math.pi)
    exact = float((0.5 * densities * (densities / densities.mean(0)).log()).sum() * (grid[1] - grid[0]))
    # 2,000 texts, half of each kind: the mixture is that of the two
    posterior = gaussians(torch.tensor([-1.0, 1.0]).repeat(1000)[:, None])
    assert information(posterior) == pytest.approx(exact, abs=0.02)


def test_batches_are_one_population():
    posterior = gaussians(torch.randn(7, 2, generator=torch.Generator().manual_seed(1)) * 2)
    z = samples(posterior)
    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    split = densities([gaussians(posterior.mean[part]) for part in parts], [z[part] for part in parts])
    torch.testing.assert_close(split, densities([posterior], [z]))


# ---- per batch, as in the literature -----------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "batch"), [(12, 4), (10, 4), (3, 4), (5, 1), (9, 9)])
def test_within_a_batch_posteriors_that_do_not_overlap_tell_which_of_it(number, batch):
    posterior = gaussians(100.0 * torch.arange(number).float()[:, None].expand(number, 3))
    sizes = [min(batch, number - first) for first in range(0, number, batch)]
    expected = sum(size * math.log(size) for size in sizes) / number
    log_q = densities([posterior], [samples(posterior)])
    assert mutual_information_per_batch(log_q, batch) == pytest.approx(expected, abs=1e-6)


def test_the_estimate_of_the_literature_is_met_on_average():
    """He et al. 2019: E_x KL(q(z|x) ‖ p) − KL(q(z) ‖ p) of each batch, KLs of torch, q(z) by many samples."""
    means = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    posterior, prior, batch = gaussians(means, 0.5), standard_normal(6, (2,)), 3
    expected = 0.0
    for part in (slice(0, 3), slice(3, 6)):
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=torch.zeros(batch)), gaussians(means[part], 0.5)
        )
        z = gaussians(means[part].repeat(4000, 1), 0.5)
        z = samples(z)
        aggregate = (mixture.log_prob(z) - standard_normal(1, (2,)).log_prob(z)).mean()
        expected += 0.5 * float(kl_divergence(posterior, prior)[part].mean() - aggregate)
    found = [
        mutual_information_per_batch(densities([posterior], [samples(posterior, seed)]), batch) for seed in range(400)
    ]
    error = float(torch.tensor(found).std()) / 20
    assert abs(sum(found) / 400 - expected) < 4 * error + 0.01
    assert error < 0.02


def test_groups_are_made_by_place_whatever_the_batches():
    number = 70
    generator = torch.Generator().manual_seed(4)
    posterior = gaussians(2 * torch.randn(number, 2, generator=generator))
    places = torch.randperm(number, generator=generator)
    whole = summary(posterior, order=places)
    assert (whole["mutual_information_sequences"], whole["mutual_information_batch"]) == (70, 32)
    row_of = places.argsort()
    log_q = densities([posterior], [samples(posterior)])[row_of][:, row_of]
    assert whole["mutual_information_per_batch"] == pytest.approx(
        sum(len(part) * mutual_information(log_q[part][:, part]) for part in torch.arange(number).split(32)) / number
    )
    assert whole["mutual_information_per_batch"] < whole["mutual_information"] - 0.05
    shuffled = torch.tensor(random.Random(0).sample(range(number), number))
    for batch in (1, 9, 32):
        other = summary(posterior, order=places, parts=shuffled.split(batch))
        for name, value in whole.items():
            assert other[name] == pytest.approx(value, rel=1e-9), name
    assert summary(posterior)["mutual_information_per_batch"] != whole["mutual_information_per_batch"]


def test_a_batch_is_no_larger_than_the_texts_there_are():
    assert summary(gaussians(torch.zeros(5, 2)))["mutual_information_batch"] == 5


# ---- KL of each number -------------------------------------------------------------------------------------------


def test_the_kl_of_each_number_by_its_closed_form():
    means = torch.tensor([[[0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [-2.0, 0.0]]])
    found = summary(gaussians(means, 0.25), parts=torch.arange(2).split(1))
    rest = 0.5 * (0.25 - 1 - math.log(0.25))
    expected = [rest, rest + 0.5 * (1 + 9) / 2, rest + 0.5 * 4, rest]
    assert found["kl_per_dimension"] == pytest.approx(expected, rel=1e-6)


def test_the_kls_of_all_numbers_add_up_to_the_kl():
    model = small_variant("ltm")
    figures = evaluate(model, Rows(texts(5, 9)), iw_samples=1, batch_size=2)
    assert len(figures["kl_per_dimension"]) == figures["latent_units"]
    assert sum(figures["kl_per_dimension"]) == pytest.approx(figures["kl_per_sequence"], rel=1e-5)


def test_a_posterior_that_does_not_factorise_has_no_kl_of_each_number():
    model, rows, statistics = grid_model(), texts(5, 9), LatentStatistics()
    posterior, prior = model.infer(rows), model.prior(5, 8)
    statistics.add(posterior, prior, model.points[:5])
    found = statistics.summary()
    assert found["kl_per_dimension"] is None
    assert (found["latent_units"], found["mutual_information_sequences"]) == (2, 5)
    moments = (posterior.mean.mean(0) - prior.mean[0]) / prior.variance[0].sqrt()
    assert found["aggregate_mean_rms"] == pytest.approx(float(moments.square().mean().sqrt()), rel=1e-5)


def test_numbers_that_do_not_factorise_among_themselves_have_no_kl_of_their_own():
    """Independent columns of correlated times: torch has a KL for a column, and none for one of its numbers."""
    statistics = LatentStatistics()
    trajectories = Independent(MultivariateNormal(torch.zeros(4, 2, 3), torch.eye(3)), 1)
    statistics.add(trajectories, trajectories, torch.zeros(4, 2, 3), torch.full((4,), -1))
    assert statistics.kl.isnan().all()
    assert not statistics.sums.isnan().any()


# ---- the aggregate posterior -------------------------------------------------------------------------------------


def test_an_aggregate_posterior_by_an_integral():
    """KL(½ N(−1, ¼) + ½ N(1, ¼) ‖ N(0.3, 2²)), by the rectangle rule."""
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    kinds = Normal(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 0.5).log_prob(grid).exp()
    prior = Normal(torch.tensor(0.3, dtype=torch.float64), 2.0)
    mixture = kinds.mean(0)
    exact = float((mixture * (mixture.log() - prior.log_prob(grid))).sum() * (grid[1] - grid[0]))
    number = 2000
    means = torch.tensor([-1.0, 1.0]).repeat(number // 2)[:, None]
    found = summary(gaussians(means, 0.25), gaussians(torch.full((number, 1), 0.3), 4.0))
    assert found["aggregate_kl"] == pytest.approx(exact, abs=0.03)
    # moments of the mixture: mean 0, variance ¼ + 1
    assert found["aggregate_mean_rms"] == pytest.approx(0.3 / 2, rel=1e-5)
    assert found["aggregate_variance_ratio"] == pytest.approx(1.25 / 4, rel=1e-5)


def test_information_and_aggregate_kl_are_the_kl():
    """Hoffman and Johnson 2016: the same samples in both, so that what is left is the noise of log q − log p."""
    means = 1.5 * torch.randn(300, 2, generator=torch.Generator().manual_seed(5))
    posterior, prior = gaussians(means, 0.3), standard_normal(300, (2,))
    found, z = summary(posterior), samples(posterior)
    sampled = float((posterior.log_prob(z) - prior.log_prob(z)).mean())
    assert found["mutual_information"] + found["aggregate_kl"] == pytest.approx(sampled, rel=1e-5)
    assert sampled == pytest.approx(float(kl_divergence(posterior, prior).mean()), abs=0.3)


def test_posteriors_far_apart_leave_the_kl_less_ln_n():
    posterior = gaussians(100.0 * torch.arange(10).float()[:, None], 0.5)
    z = samples(posterior)
    log_q, log_prior = densities([posterior], [z]), standard_normal(10, (1,)).log_prob(z).double()
    own = float((posterior.log_prob(z) - log_prior).mean())
    assert aggregate_kl(log_q, log_prior) == pytest.approx(own - math.log(10), rel=1e-5)


def test_posteriors_that_together_are_the_prior_have_its_moments():
    """Means N(0, 0.7) and variances 0.3 mix to N(0, 1)."""
    means = math.sqrt(0.7) * torch.randn(20000, 3, generator=torch.Generator().manual_seed(6))
    statistics = LatentStatistics()
    z = samples(gaussians(means, 0.3))
    statistics.add(gaussians(means, 0.3), standard_normal(20000, (3,)), z, torch.arange(20000).where(z[:, 0] > 9, -1))
    statistics.compared = [(gaussians(means[:1], 0.3), z[:1], torch.zeros(1).double(), torch.zeros(1).long())]
    found = statistics.summary()
    assert found["aggregate_mean_rms"] < 0.02
    assert found["aggregate_variance_ratio"] == pytest.approx(1, abs=0.02)


def test_a_posterior_that_collapsed_has_nothing_of_all_this():
    prior = gaussians(torch.full((40, 3), 2.0), 0.5)
    found = summary(prior, prior)
    for name in ("mutual_information", "mutual_information_per_batch", "aggregate_kl", "aggregate_mean_rms"):
        assert found[name] == pytest.approx(0, abs=1e-6), name
    assert found["kl_per_dimension"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found["aggregate_variance_ratio"] == pytest.approx(1)
    assert found["active_units"] == 0


def test_latents_of_no_numbers_are_their_prior():
    figures = evaluate(small_model("autoregressive"), Rows(texts(5, 9)))
    assert figures["kl_per_dimension"] == []
    assert figures["aggregate_kl"] == pytest.approx(0, abs=1e-9)
    assert figures["mutual_information_per_batch"] == pytest.approx(0, abs=1e-9)
    assert (figures["aggregate_mean_rms"], figures["aggregate_variance_ratio"]) == (0, 1)


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
