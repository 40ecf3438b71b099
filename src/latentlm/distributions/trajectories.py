"""Posteriors over a trajectory that know the correlations of its Gaussian-process prior."""

import math
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints, kl_divergence, register_kl

from latentlm.distributions.algebra import cut
from latentlm.distributions.gaussian import (
    kl_per_dimension,
    noise_shape,
    sample_from_noise,
    select_rows,
    standard_normal,
)
from latentlm.distributions.gaussian_process import GaussianProcess, kl_of_diagonal_per_dimension
from latentlm.errors import DivergedError

_LOG_2PI = math.log(2 * math.pi)


class DiagonalTrajectory(Distribution):
    """q(z | x) that is diagonal over time, for rows of their own lengths.

    It cannot come near a smooth process: the least KL of a diagonal q grows without bound as the prior's nugget falls.

    Args:
        prior: with a length for each row.
        each: q of each number, batch [batch], event [T, dim].
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, prior: GaussianProcess, each: Independent):
        super().__init__(each.batch_shape, prior.event_shape, validate_args=False)
        self.prior, self.each = prior, each

    @property
    def mean(self) -> Float[Tensor, "batch T dim"]:
        return self._real(self.each.mean)

    @property
    def variance(self) -> Float[Tensor, "batch T dim"]:
        return self._real(self.each.variance)

    def rsample(self, sample_shape: Any = ()) -> Float[Tensor, "*samples batch T dim"]:
        return self._real(self.each.rsample(sample_shape))

    def from_noise(self, noise: Float[Tensor, "*samples batch T dim"]) -> Float[Tensor, "*samples batch T dim"]:
        return self._real(sample_from_noise(self.each, noise))

    def log_prob(self, value: Float[Tensor, "*samples batch T dim"]) -> Float[Tensor, "*samples batch"]:
        return self._real(self.each.base_dist.log_prob(value)).sum((-1, -2))

    def kl(self) -> Float[Tensor, "batch dim"]:
        """KL(q ‖ p) of each dimension, in nats."""
        return kl_of_diagonal_per_dimension(self.each, self.prior)

    def _real(self, values: Float[Tensor, "*rows T dim"]) -> Float[Tensor, "*rows T dim"]:
        times = torch.arange(values.shape[-2], device=values.device)
        real = times < self.prior.row_lengths(self.batch_shape[0])[:, None]
        return values.masked_fill(~real[..., None], 0.0)


class SitesPosterior(Distribution):
    """q(z | x) ∝ p(z) Π_t N(m_t; z_t, v_t): the process, updated by one noisy observation of each number of z.

    It has the prior's own correlations, so its KL can be 0 (as v → ∞), where a Gaussian that is diagonal over time
    cannot come near a smooth process. With Σ = K + nugget + diag(v), u = Σ⁻¹ m and D = diag(Σ⁻¹), its mean is m − v u,
    its variance v − v² D and its KL ½ [mᵀu + log |Σ| − Σ_t (v u² + 1 − v D + log v)]: what the prior's algebra gives
    for another noise (Rasmussen and Williams 2006, section 2.2). Sites made by an encoder: Johnson et al. 2016, arXiv
    1603.06277; for Gaussian processes, Ashman et al. 2020, arXiv 2010.10177.

    Args:
        prior: with a length for each row.
        observed: m.
        log_variance: log v.

    Raises:
        DivergedError: observations that are not finite.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        prior: GaussianProcess,
        observed: Float[Tensor, "batch T dim"],
        log_variance: Float[Tensor, "batch T dim"],
    ):
        if not bool((observed.isfinite() & log_variance.isfinite()).all()):
            raise DivergedError("the latents' observations or their variances are no longer finite numbers")
        super().__init__(torch.Size((len(observed),)), prior.event_shape, validate_args=False)
        self.prior, self.dtype = prior, observed.dtype
        self.observed, self.log_variance = observed, log_variance
        self.lengths = prior.row_lengths(len(observed))
        # noise of its own makes each dimension a group: [batch, dim, T, 1]
        self._m = cut(_each(observed.double()), self.lengths)
        self._v = _each(log_variance.double().exp())
        self._algebra = prior.with_noise(self._v[..., 0] + prior.noise(prior.dim))
        self._u = self._algebra.solve(self._m, self.lengths)

    @property
    def mean(self) -> Float[Tensor, "batch T dim"]:
        return self._back(cut(self._m - self._v * self._u, self.lengths))

    @property
    def variance(self) -> Float[Tensor, "batch T dim"]:
        return self._back(cut(self._v * (1 - self._v * self._diagonal()), self.lengths))

    def rsample(self, sample_shape: Any = ()) -> Float[Tensor, "*samples batch T dim"]:
        shape = (*torch.Size(sample_shape), *self.batch_shape, *noise_shape(self))
        return self.from_noise(torch.randn(shape, dtype=self.dtype, device=self._m.device))

    def from_noise(self, noise: Float[Tensor, "*samples batch T twice_dim"]) -> Float[Tensor, "*samples batch T dim"]:
        """A sample of the prior, moved by what the observations say of it (Matheron's rule).

        Wilson et al. 2020, arXiv 2002.09309, equation 5. The noise has two numbers for each of z: one for the
        trajectory, one for what the observation adds to it.
        """
        of_prior, of_sites = noise.double().chunk(2, -1)
        samples = noise.shape[:-3]
        of_sites = _each(of_sites.flatten(0, -3))
        path = _each(self.prior.color(of_prior).flatten(0, -3))
        repeats = len(path) // max(len(self._m), 1)
        m, v = self._m.repeat(repeats, 1, 1, 1), self._v.repeat(repeats, 1, 1, 1)
        seen = path + v.sqrt() * of_sites
        columns = (m - seen).unflatten(0, (repeats, -1)).movedim(0, -1)[..., 0, :]
        against = self._algebra.solve(columns, self.lengths).movedim(-1, 0)[..., None].flatten(0, 1)
        z = cut(m - v.sqrt() * of_sites - v * against, self.lengths.repeat(repeats))
        return self._back(z).unflatten(0, (*samples, -1))

    def log_prob(self, value: Float[Tensor, "*samples batch T dim"]) -> Float[Tensor, "*samples batch"]:
        z = _each(value.double())
        said = -0.5 * ((self._m - z).square() / self._v + self._v.log() + _LOG_2PI)
        likelihood = cut(said.flatten(0, -4), self.lengths.repeat(math.prod(said.shape[:-4])))
        likelihood = likelihood.view(said.shape).sum((-1, -2, -3))
        return (self.prior.log_prob(value.double()) + likelihood - self._log_evidence()).to(value.dtype)

    def kl(self) -> Float[Tensor, "batch dim"]:
        """KL(q ‖ p) of each dimension, in nats."""
        said = self._v * self._u.square() + 1 - self._v * self._diagonal() + self._v.log()
        quadratic = (self._m * self._u).sum((-1, -2))
        determinant = self._algebra.log_determinant(self.lengths)
        return (0.5 * (quadratic + determinant - cut(said, self.lengths).sum((-1, -2)))).to(self.dtype)

    def _log_evidence(self) -> Float[Tensor, " batch"]:
        """log p(m): of all the observations, before z."""
        quadratic = (self._m * self._u).sum((-1, -2, -3))
        determinant = self._algebra.log_determinant(self.lengths).sum(-1)
        return -0.5 * (quadratic + determinant + self.lengths.double() * (self.prior.dim * _LOG_2PI))

    def _diagonal(self) -> Float[Tensor, "batch dim T 1"]:
        return self._algebra.precision_diagonal(self.lengths)[..., None]

    def _back(self, rows: Float[Tensor, "rows dim T 1"]) -> Float[Tensor, "rows T dim"]:
        return rows[..., 0].transpose(1, 2).to(self.dtype)


class WhitenedGaussian(Distribution):
    """q(z | x) of z = L w, with w diagonal Gaussian and L the factor of the prior's covariance, K + nugget = L Lᵀ.

    In w the prior is N(0, I), so its KL is that of diagonal Gaussians, and steps of gradient inference or of Langevin
    need not cross the narrow valleys of a smooth process. Murray and Adams 2010 (arXiv 1006.0868, section 2) for
    sampling.

    Args:
        prior: with a length for each row.
        white: q(w | x), batch [batch], event [T, dim].
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, prior: GaussianProcess, white: Independent):
        super().__init__(white.batch_shape, prior.event_shape, validate_args=False)
        self.prior, self.white = prior, white

    @property
    def mean(self) -> Float[Tensor, "batch T dim"]:
        return self.prior.color(self.white.mean)

    @property
    def variance(self) -> Float[Tensor, "batch T dim"]:
        """Of each number: Σ_u L_tu² s_u². Takes T² numbers for each dimension."""
        times, dim = self.event_shape
        unit = torch.eye(times, dtype=torch.float64, device=self.white.mean.device)[..., None].expand(-1, -1, dim)
        process = self.prior.with_lengths(torch.full((times,), times, device=unit.device))
        squares = process.color(unit).square()  # [u, t, dim]
        said = torch.einsum("utd,bud->btd", squares, self.white.variance.double())
        return cut(said[:, None], self.prior.row_lengths(len(said)))[:, 0].to(self.white.mean.dtype)

    def rsample(self, sample_shape: Any = ()) -> Float[Tensor, "*samples batch T dim"]:
        return self.prior.color(self.white.rsample(sample_shape))

    def log_prob(self, value: Float[Tensor, "*samples batch T dim"]) -> Float[Tensor, "*samples batch"]:
        white = self.prior.whiten(value)
        said = self.white.base_dist.log_prob(white).to(value.dtype)
        lengths = self.prior.row_lengths(self.batch_shape[0]).expand(said.shape[:-2])
        of_white = cut(said.flatten(0, -3)[:, None], lengths.flatten()).sum((-1, -2, -3)).view(lengths.shape)
        return of_white - 0.5 * self.prior.log_determinant().to(value.dtype)

    def kl(self) -> Float[Tensor, "batch dim"]:
        """KL(q ‖ p) of each dimension, in nats."""
        prior = standard_normal(self.batch_shape[0], tuple(self.event_shape), self.white.mean.device)
        said = kl_per_dimension(self.white, prior)
        return cut(said[:, None], self.prior.row_lengths(self.batch_shape[0])).sum((1, 2))


class ContinuedTrajectory(Distribution):
    """A trajectory that begins by q(z | prompt) and goes on by its prior, given how it began.

    Rows may have begun for different numbers of times, and all of z is one sample: what the prior makes of the noise
    that made the beginning, and of fresh noise after it.

    Args:
        begun: q of the first times of each row.
        lengths: how many these are.
        prior: of the whole trajectory.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, begun: Distribution, lengths: Int64[Tensor, " batch"], prior: GaussianProcess):
        super().__init__(begun.batch_shape, prior.event_shape, validate_args=False)
        self.begun, self.prior = begun, prior
        self._known = (torch.arange(prior.event_shape[0], device=lengths.device) < lengths[:, None])[..., None]

    @property
    def mean(self) -> Float[Tensor, "batch T dim"]:
        mean = self.begun.mean
        return self._continued(mean, mean.new_zeros(*self.batch_shape, *self.event_shape))

    def rsample(self, sample_shape: Any = ()) -> Float[Tensor, "*samples batch T dim"]:
        z = self.begun.rsample(sample_shape)
        return self._continued(z, torch.randn(*z.shape[:-2], *self.event_shape, dtype=z.dtype, device=z.device))

    def from_noise(self, noise: Float[Tensor, "*samples batch T times_dim"]) -> Float[Tensor, "*samples batch T dim"]:
        """The noise has a beginning's numbers and then a trajectory's for each time."""
        dim, times = self.event_shape[1], self.begun.event_shape[0]
        of_begun, rest = noise.split([noise.shape[-1] - dim, dim], -1)
        return self._continued(sample_from_noise(self.begun, of_begun[..., :times, :]), rest)

    def _continued(self, begun: Tensor, noise: Tensor) -> Tensor:
        padding = begun.new_zeros(*begun.shape[:-2], self.event_shape[0] - begun.shape[-2], begun.shape[-1])
        begun = torch.cat((begun, padding), -2)
        white = torch.where(self._known, self.prior.whiten(begun.double()), noise.double())
        return torch.where(self._known, begun, self.prior.color(white).to(begun.dtype))


@sample_from_noise.register(SitesPosterior)
@sample_from_noise.register(DiagonalTrajectory)
@sample_from_noise.register(ContinuedTrajectory)
def _(distribution: Any, noise: Tensor) -> Tensor:
    return distribution.from_noise(noise)


@noise_shape.register
def _(distribution: SitesPosterior) -> tuple[int, ...]:
    times, dim = distribution.event_shape
    return times, 2 * dim


@select_rows.register
def _(distribution: SitesPosterior, rows: Tensor) -> SitesPosterior:
    prior = cast(GaussianProcess, select_rows(distribution.prior, rows))
    return SitesPosterior(prior, distribution.observed[rows], distribution.log_variance[rows])


@noise_shape.register
def _(distribution: ContinuedTrajectory) -> tuple[int, ...]:
    return distribution.event_shape[0], noise_shape(distribution.begun)[1] + distribution.event_shape[1]


@select_rows.register
def _(distribution: WhitenedGaussian, rows: Tensor) -> WhitenedGaussian:
    prior = cast(GaussianProcess, select_rows(distribution.prior, rows))
    return WhitenedGaussian(prior, cast(Independent, select_rows(distribution.white, rows)))


@select_rows.register
def _(distribution: DiagonalTrajectory, rows: Tensor) -> DiagonalTrajectory:
    prior = cast(GaussianProcess, select_rows(distribution.prior, rows))
    return DiagonalTrajectory(prior, cast(Independent, select_rows(distribution.each, rows)))


@sample_from_noise.register
def _(distribution: WhitenedGaussian, noise: Tensor) -> Tensor:
    return distribution.prior.color(sample_from_noise(distribution.white, noise))


@register_kl(SitesPosterior, GaussianProcess)
@register_kl(WhitenedGaussian, GaussianProcess)
@register_kl(DiagonalTrajectory, GaussianProcess)
def _(posterior: Any, prior: GaussianProcess) -> Float[Tensor, " batch"]:
    return kl_per_dimension(posterior, prior).sum(-1)


@kl_per_dimension.register(SitesPosterior)
@kl_per_dimension.register(WhitenedGaussian)
@kl_per_dimension.register(DiagonalTrajectory)
def _(posterior: Any, prior: Distribution) -> Float[Tensor, "batch dim"]:
    if not isinstance(prior, GaussianProcess) or not posterior.prior.same_law(prior):
        raise NotImplementedError("the KL of a trajectory is to the process that it was made of")
    return posterior.kl()


@register_kl(WhitenedGaussian, WhitenedGaussian)
def _(one: WhitenedGaussian, other: WhitenedGaussian) -> Float[Tensor, " batch"]:
    if not one.prior.same_law(other.prior):
        raise NotImplementedError("the KL of two whitened trajectories is that of the noise one process makes them of")
    said = kl_divergence(one.white.base_dist, other.white.base_dist)
    return cut(said[:, None], one.prior.row_lengths(one.batch_shape[0])).sum((1, 2, 3))


def _each(values: Float[Tensor, "*rows T dim"]) -> Float[Tensor, "*rows dim T 1"]:
    return values.transpose(-1, -2)[..., None]
