"""Gaussian processes over a latent trajectory, as distributions of torch."""

import copy
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, register_kl

from latentlm.distributions.algebra import JITTERS, Algebra, Dense, NotPositiveError, Toeplitz, cut, of_groups
from latentlm.distributions.gaussian import sample_from_noise, select_rows
from latentlm.distributions.kernels import Kernel
from latentlm.distributions.row_algebra import DenseRows
from latentlm.distributions.state_space import StateSpace
from latentlm.errors import DivergedError, InputError

AlgebraName = Literal["auto", "dense", "toeplitz", "state_space", "inducing"]

# below this many times a factor is cheaper than the steps of the structured algebras
_FEW_TIMES = 256
_LOG_2PI = math.log(2 * math.pi)


class GaussianProcess(Distribution):
    """z_1 … z_T with mean 0 and covariance k(t − u) + nugget · [t = u], independently for each of `dim` dimensions.

    A row of its own length n is the process on the first n times, exactly: log-probability, entropy and KL are sums
    over t of terms that condition on earlier times alone. What samples hold after a row's end is 0 and has no meaning.

    All algebra is float64; values keep their dtype. Where float64 cannot factor K + nugget, up to a millionth of the
    variance is added to the nugget: give one of at least that where such a process has to be exact. Samples and
    log-probabilities have gradients to the kernel's hyperparameters, the nugget and the values.

    Args:
        kernel: with hyperparameters for all dimensions, or for groups of neighbouring ones.
        times: increasing, in the kernel's unit; for a text, 0, 1, 2, …
        nugget: variance of what is independent from time to time; a number, or one for each group.
        algebra: "dense" for any times; "toeplitz" for a regular grid; "state_space" for a Markov kernel; "inducing"
            for any kernel, approximately (see `StateSpace.of_inducing`); "auto" takes the cheapest exact one.
        lengths: [B], of rows; None for a distribution without a batch, of full length.
        inducing: times of the inducing points, or how many, evenly spaced.

    Raises:
        InputError: an algebra that does not fit the kernel or the times.
        DivergedError: no factorisation in float64, with up to a millionth of the variance as further noise.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        kernel: Kernel,
        times: Float[Tensor, " T"],
        dim: int = 1,
        nugget: float | Float[Tensor, "*groups"] = 0.0,
        algebra: AlgebraName = "auto",
        *,
        lengths: Int64[Tensor, " B"] | None = None,
        inducing: int | Float[Tensor, " points"] = 32,
    ):
        self.kernel, self.dim, self.lengths = kernel, dim, lengths
        self.times = times.double()
        device = self.times.device
        if times.numel() and not bool((self.times.diff() > 0).all() & self.times.isfinite().all()):
            raise InputError("the times of a Gaussian process must be finite and increase.")
        self.nugget = torch.as_tensor(nugget, dtype=torch.float64, device=device).reshape(-1)
        if not bool(((self.nugget >= 0) & (self.nugget < math.inf)).all()):
            raise InputError(f"nugget must be a variance from 0 on, or one for each group, not {nugget}.")
        if isinstance(inducing, int) and inducing < 1:
            raise InputError(f"inducing must be at least 1 point, not {inducing}.")
        self.groups = max(kernel.groups, len(self.nugget))
        if dim < 1 or dim % self.groups:
            raise InputError(f"{dim} dimensions do not fall into the {self.groups} groups of the kernel.")
        if lengths is not None and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= len(times):
            raise InputError(f"lengths must be between 0 and the {len(times)} times.")
        self.algebra_name = _chosen(algebra, kernel, self.times)
        self.inducing = inducing
        self._algebra: Algebra | None = None
        self._algebra_learns = False  # one made without gradients is of no use where they are wanted
        self._sequential = False
        super().__init__(
            torch.Size() if lengths is None else lengths.shape, torch.Size((len(times), dim)), validate_args=False
        )

    # ---- what torch's distributions have ---------------------------------------------------------------------------

    @property
    def mean(self) -> Float[Tensor, "*B T dim"]:
        return self.times.new_zeros(*self.batch_shape, *self.event_shape)

    @property
    def variance(self) -> Float[Tensor, "*B T dim"]:
        of_groups = (self.kernel.variance().to(self.nugget.device) + self.nugget).expand(self.groups)
        return of_groups.repeat_interleave(self.dim // self.groups).expand(*self.batch_shape, *self.event_shape)

    def log_prob(self, value: Float[Tensor, "*samples T dim"]) -> Float[Tensor, "*samples"]:
        rows, lengths, leading = self._rows(value)
        quadratic = self.algebra.quadratic(rows, lengths).sum((-1, -2))
        total = quadratic + self._log_determinants(lengths) + lengths.double() * (self.dim * _LOG_2PI)
        return (-0.5 * total).view(leading).to(value.dtype)

    def entropy(self) -> Float[Tensor, "*B"]:
        lengths = self._lengths()
        return (0.5 * (self._log_determinants(lengths) + lengths.double() * (self.dim * (1 + _LOG_2PI)))).view(
            self.batch_shape
        )

    def rsample(self, sample_shape: Any = ()) -> Float[Tensor, "*samples T dim"]:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.color(torch.randn(shape, dtype=torch.float64, device=self.times.device))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GaussianProcess":
        batch_shape = torch.Size(batch_shape)
        if len(batch_shape) != 1:
            raise InputError(f"a Gaussian process has one batch dimension, not {list(batch_shape)}.")
        return self.with_lengths(self._lengths().expand(batch_shape))

    # ---- what a process has beside ---------------------------------------------------------------------------------

    @property
    def algebra(self) -> Algebra:
        """That of K + nugget, made when it is first asked for."""
        if self._algebra is None or (torch.is_grad_enabled() and not self._algebra_learns):
            self._algebra, self._algebra_learns = self.with_noise(self.noise(self.groups)), torch.is_grad_enabled()
        return self._algebra

    def noise(self, groups: int) -> Float[Tensor, "groups T"]:
        """The nugget at each time, for so many groups of dimensions."""
        each = of_groups(self.nugget, groups).expand(groups)
        return each[:, None].expand(-1, len(self.times))

    def with_noise(self, noise: Float[Tensor, "*B groups T"]) -> Algebra:
        """The algebra of K + diag(noise), with a little more noise where float64 needs it.

        Noise [B, dim, T] is that of each row, of its own length, and each dimension.
        """
        size = of_groups(self.kernel.variance().to(noise.device), noise.shape[-2])[:, None]
        shared = noise.dim() == 2
        for jitter in JITTERS:
            try:
                total = noise + jitter * size
                if self.algebra_name == "state_space":
                    return StateSpace.of_kernel(self.kernel, self.times, total)
                if self.algebra_name == "inducing":
                    return StateSpace.of_inducing(self.kernel, self.times, total, self._inducing_times())
                if not shared:
                    return DenseRows(self.kernel, self.times, total, self.row_lengths(len(noise)))
                if self.algebra_name == "toeplitz":
                    return Toeplitz(self.kernel, self.times, total)
                return Dense.of_kernel(self.kernel, self.times, total)
            except NotPositiveError:
                continue
        nugget = self.nugget.detach()
        raise DivergedError(
            f"the covariance of {self.kernel.described()} with nugget {float(nugget.min()):.3g} at {len(self.times)} "
            f"times is not positive definite in float64, even with {JITTERS[-1]:g} of its variance added: "
            "raise the nugget or shorten the lengthscale"
        )

    def color(self, noise: Float[Tensor, "*samples T dim"]) -> Float[Tensor, "*samples T dim"]:
        """L ε: the trajectory that white noise makes, each time from noise until then (PARA: all times at once)."""
        rows, lengths, leading = self._rows(noise)
        if self._sequential:
            each = noise.expand(*leading, *self.event_shape).reshape(len(rows), *self.event_shape)
            with torch.no_grad():
                path = torch.stack(list(self.steps(each)), 1) if each.shape[1] else each
            return self._shaped(cut(self._grouped(path), lengths), noise)
        return self._shaped(cut(self.algebra.color(rows), lengths), noise)

    def whiten(self, value: Float[Tensor, "*samples T dim"]) -> Float[Tensor, "*samples T dim"]:
        """L⁻¹ z: the white noise that makes a trajectory; the inverse of `color`."""
        rows, lengths, _ = self._rows(value)
        return self._shaped(cut(self.algebra.whiten(cut(rows, lengths)), lengths), value)

    def steps(
        self, noise: Float[Tensor, "batch rest dim"], prefix: Float[Tensor, "batch begun dim"] | None = None
    ) -> Iterator[Float[Tensor, "batch dim"]]:
        """z_t given z_<t, one time after another (SEQ): the trajectory of `color` for the same noise. No gradients.

        Args:
            noise: standard normal, for the times after the prefix; ends early if it does.
            prefix: the first times of each row; None for none.
        """
        begun = noise[:, :0] if prefix is None else prefix
        columns = (self._grouped(x.detach().double()).permute(1, 2, 0, 3).flatten(2) for x in (noise, begun))
        for value in self.algebra.steps(*columns):
            yield value.view(self.groups, len(noise), -1).transpose(0, 1).flatten(1).to(noise.dtype)

    def sequentially(self) -> "GaussianProcess":
        """The same process, whose samples `steps` makes: one time after another, and without gradients."""
        other = copy.copy(self)
        other._sequential = True
        return other

    def conditional(self, prefix: Float[Tensor, "batch begun dim"]) -> "ConditionalGaussianProcess":
        """The process at the times after a prefix, given its values there.

        Raises:
            InputError: a prefix that is not [batch, begun, dim].
        """
        if prefix.dim() != 3 or prefix.shape[1] > len(self.times) or prefix.shape[2] != self.dim:
            raise InputError(
                f"a prefix of shape {list(prefix.shape)} is none of this process: give [batch, begun, {self.dim}] "
                f"with at most {len(self.times)} times."
            )
        return ConditionalGaussianProcess(self, prefix)

    def with_lengths(self, lengths: Int64[Tensor, " B"]) -> "GaussianProcess":
        """The same process for rows of other lengths; a factorisation that is made already is shared."""
        other = GaussianProcess(
            self.kernel, self.times, self.dim, self.nugget, self.algebra_name, lengths=lengths, inducing=self.inducing
        )
        other._algebra, other._algebra_learns = self._algebra, self._algebra_learns
        other._sequential = self._sequential
        return other

    def same_law(self, other: "GaussianProcess") -> bool:
        """Whether rows of one length have one law in both; asks for one kernel object, not for equal numbers."""
        same = self.kernel is other.kernel and (self.dim, len(self.times)) == (other.dim, len(other.times))
        return same and torch.equal(self.nugget, other.nugget) and torch.equal(self.times, other.times)

    def row_lengths(self, rows: int) -> Int64[Tensor, " rows"]:
        return self._lengths().expand(rows)

    def log_determinant(self) -> Float[Tensor, "*B"]:
        """log |Σ| of all dimensions of a row."""
        return self._log_determinants(self._lengths()).view(self.batch_shape)

    def _log_determinants(self, lengths: Int64[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        each = self._of_lengths(self.algebra.log_determinant, lengths)
        return each.sum(-1) * (self.dim // self.groups)

    # ---- layout: [*samples, B, T, dim] outside, [rows, G, T, R] inside ---------------------------------------------

    def _lengths(self) -> Int64[Tensor, " B"]:
        if self.lengths is None:
            return torch.tensor([len(self.times)], device=self.times.device)
        return self.lengths

    def _rows(self, value: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        if tuple(value.shape[-2:]) != tuple(self.event_shape):
            raise InputError(f"a trajectory of shape {list(value.shape)} does not end in {list(self.event_shape)}.")
        leading = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        # counted, since there is nothing to infer it from where a trajectory has no times
        value = value.expand(*leading, *self.event_shape).reshape(math.prod(leading), *self.event_shape)
        lengths = self._lengths().expand(leading or (1,)).reshape(-1)
        return self._grouped(value.double()), lengths, leading

    def _grouped(self, value: Float[Tensor, "rows T dim"]) -> Float[Tensor, "rows G T R"]:
        return value.unflatten(-1, (self.groups, -1)).transpose(1, 2)

    def _shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        leading = torch.broadcast_shapes(like.shape[:-2], self.batch_shape)
        return rows.transpose(1, 2).flatten(2).reshape(*leading, *self.event_shape).to(like.dtype)

    @staticmethod
    def _of_lengths(function: Any, lengths: Tensor) -> Tensor:
        """A function of lengths for each row, computed once for each length."""
        unique, place = lengths.unique(return_inverse=True)
        return function(unique)[place]

    def _inducing_times(self) -> Tensor:
        if isinstance(self.inducing, Tensor):
            return self.inducing.to(self.times)
        return torch.linspace(float(self.times[0]), float(self.times[-1]), self.inducing).to(self.times)


class ConditionalGaussianProcess(Distribution):
    """A Gaussian process at the times after a prefix, given its values there; batch [B], event [T − begun, dim]."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, process: GaussianProcess, prefix: Float[Tensor, "batch begun dim"]):
        process.algebra  # noqa: B018  made once, for all prefixes of a process
        self.process, self.prefix = process.with_lengths(process.row_lengths(len(prefix))), prefix
        self.begun = prefix.shape[1]
        rest = len(process.times) - self.begun
        # the noise that made the prefix is known, and what comes after is made by fresh noise
        padding = prefix.new_zeros(len(prefix), rest, process.dim)
        self._noise = self.process.whiten(torch.cat((prefix, padding), 1))[:, : self.begun]
        super().__init__(torch.Size((len(prefix),)), torch.Size((rest, process.dim)), validate_args=False)

    @property
    def mean(self) -> Float[Tensor, "batch rest dim"]:
        return self.from_noise(self.prefix.new_zeros(*self.batch_shape, *self.event_shape))

    def from_noise(self, noise: Float[Tensor, "*samples batch rest dim"]) -> Float[Tensor, "*samples batch rest dim"]:
        known = self._noise.expand(*noise.shape[:-2], *self._noise.shape[-2:]).to(noise.dtype)
        return self.process.color(torch.cat((known, noise), -2))[..., self.begun :, :]

    def rsample(self, sample_shape: Any = ()) -> Float[Tensor, "*samples batch rest dim"]:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.from_noise(torch.randn(shape, dtype=self.prefix.dtype, device=self.prefix.device))

    def log_prob(self, value: Float[Tensor, "*samples batch rest dim"]) -> Float[Tensor, "*samples batch"]:
        prefix = self.prefix.expand(*value.shape[:-2], *self.prefix.shape[-2:]).to(value.dtype)
        whole = torch.cat((prefix, value), -2)
        before = self.process.with_lengths(self.process._lengths().clamp_max(self.begun))
        return self.process.log_prob(whole.double()).to(value.dtype) - before.log_prob(whole.double()).to(value.dtype)


@sample_from_noise.register
def _(distribution: GaussianProcess, noise: Tensor) -> Tensor:
    return distribution.color(noise)


@sample_from_noise.register
def _(distribution: ConditionalGaussianProcess, noise: Tensor) -> Tensor:
    return distribution.from_noise(noise)


@select_rows.register
def _(distribution: GaussianProcess, rows: Tensor) -> GaussianProcess:
    return distribution.with_lengths(distribution.row_lengths(len(rows))[rows])


@register_kl(Independent, GaussianProcess)
def kl_of_diagonal(posterior: Independent, prior: GaussianProcess) -> Float[Tensor, "*B"]:
    """KL of a Gaussian that is diagonal over time: ½ Σ_d [tr(Σ⁻¹ diag σ²) + μᵀ Σ⁻¹ μ − n + log |Σ| − Σ_t log σ²]."""
    return kl_of_diagonal_per_dimension(posterior, prior).sum(-1)


def kl_of_diagonal_per_dimension(posterior: Independent, prior: GaussianProcess) -> Float[Tensor, "*B dim"]:
    """The same for each dimension: these are independent, times are not."""
    if not isinstance(posterior.base_dist, Normal):
        raise NotImplementedError
    mean, scale = posterior.base_dist.loc, posterior.base_dist.scale
    rows, lengths, leading = prior._rows(mean)
    scale = scale.expand(*leading, *prior.event_shape).reshape(len(rows), *prior.event_shape)
    algebra = prior.algebra
    diagonal = prior._of_lengths(algebra.precision_diagonal, lengths)
    logs = 2 * cut(prior._grouped(scale.log()), lengths).sum(-2, dtype=torch.float64)
    spread = cut(prior._grouped(scale), lengths).double()
    trace = torch.einsum("bgtr,bgtr,bgt->bgr", spread, spread, diagonal.expand(len(spread), spread.shape[1], -1))
    determinant = prior._of_lengths(algebra.log_determinant, lengths)[..., None]
    kl = 0.5 * (trace + algebra.quadratic(rows, lengths) - lengths[:, None, None] + determinant - logs)
    return kl.flatten(1).view(*leading, prior.dim).to(mean.dtype)


def _chosen(algebra: AlgebraName, kernel: Kernel, times: Tensor) -> AlgebraName:
    gaps = times.diff()
    regular = len(gaps) == 0 or bool(((gaps - gaps[0]).abs() <= 1e-9 * gaps[0]).all())
    if algebra == "auto":
        if len(times) < _FEW_TIMES:
            return "dense"
        return "state_space" if kernel.markov else "toeplitz" if regular else "dense"
    if algebra not in ("dense", "toeplitz", "state_space", "inducing"):
        raise InputError(f"no algebra is called {algebra}: take auto, dense, toeplitz, state_space or inducing.")
    if algebra == "state_space" and not kernel.markov:
        raise InputError(f"{kernel.described()} has no state space: Matérn kernels, their sums and products have.")
    if algebra == "toeplitz" and not regular:
        raise InputError("the toeplitz algebra needs times on a regular grid: take dense, or state_space.")
    return algebra
