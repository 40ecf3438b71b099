"""Posteriors over a trajectory that know the correlations of its Gaussian-process prior."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, register_kl

from latentlm.distributions.algebra import cut
from latentlm.distributions.gaussian import (
    kl_per_dimension,
    noise_shape,
    sample_from_noise,
    select_rows,
    standard_normal,
)
from latentlm.distributions.gaussian_process import GaussianProcess
from latentlm.errors import DivergedError

_LOG_2PI = math.log(2 * math.pi)


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


@sample_from_noise.register
def _(distribution: SitesPosterior, noise: Tensor) -> Tensor:
    return distribution.from_noise(noise)


@noise_shape.register
def _(distribution: SitesPosterior) -> tuple[int, ...]:
    times, dim = distribution.event_shape
    return times, 2 * dim


@select_rows.register
def _(distribution: SitesPosterior, rows: Tensor) -> SitesPosterior:
    prior = distribution.prior.with_lengths(distribution.lengths[rows])
    return SitesPosterior(prior, distribution.observed[rows], distribution.log_variance[rows])


@select_rows.register
def _(distribution: WhitenedGaussian, rows: Tensor) -> WhitenedGaussian:
    prior = distribution.prior.with_lengths(distribution.prior.row_lengths(len(rows))[rows])
    base = distribution.white.base_dist
    return WhitenedGaussian(prior, Independent(Normal(base.loc[rows], base.scale[rows]), 2))


@sample_from_noise.register
def _(distribution: WhitenedGaussian, noise: Tensor) -> Tensor:
    return distribution.prior.color(sample_from_noise(distribution.white, noise))


@register_kl(SitesPosterior, GaussianProcess)
@register_kl(WhitenedGaussian, GaussianProcess)
def _(posterior: "SitesPosterior | WhitenedGaussian", prior: GaussianProcess) -> Float[Tensor, " batch"]:
    if posterior.prior.kernel is not prior.kernel:
        raise NotImplementedError  # as torch has it for pairs without a closed form
    return posterior.kl().sum(-1)


def _each(values: Float[Tensor, "*rows T dim"]) -> Float[Tensor, "*rows dim T 1"]:
    return values.transpose(-1, -2)[..., None]
