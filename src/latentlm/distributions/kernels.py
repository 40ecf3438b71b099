"""Covariance functions of a Gaussian process over time: k(τ) of the lag τ between two moments.

All are stationary. Hyperparameters are positive and learned: each is kept as its logarithm, so that the initial value
is the initial value, and no step of an optimiser leaves the positive numbers. Lags and lengthscales are in steps of the
sequence (or whatever the times are in), so a prefix means the same at every length.

A hyperparameter is one number for all latent dimensions, or a list: one for each group of neighbouring dimensions, and
so one per dimension where there are as many as dimensions (many time scales). Rasmussen and Williams 2006, "Gaussian
Processes for Machine Learning", chapter 4.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentlm.errors import InputError

Positive = float | int | Sequence[float] | Tensor


def log_parameter(name: str, value: Positive) -> nn.Parameter:
    """The logarithm of a positive number, or of one for each group, as a parameter of shape [groups]."""
    # on the CPU also where weights are made on the meta device, to be counted or loaded
    device = value.device if isinstance(value, Tensor) else "cpu"
    value = torch.as_tensor(value, dtype=torch.float64, device=device).detach().reshape(-1)
    if not value.numel() or not bool(((value > 0) & (value < math.inf)).all()):
        raise InputError(f"{name} must be a finite number above 0, or a list of such, not {value.tolist()}.")
    return nn.Parameter(value.log().to(torch.get_default_dtype()))


class Kernel(nn.Module):
    """k(τ); `kernel + kernel` and `kernel * kernel` are kernels, too.

    A Markov kernel (Matérn, and sums and products of such) is also the covariance of one coordinate of a linear
    stochastic differential equation, so that a state of a few numbers carries all that the past says of the future:
    s(t + Δ) = A(Δ) s(t) + noise, z(t) = readout · s(t) (Särkkä and Solin 2019, "Applied Stochastic Differential
    Equations", section 12.3).
    """

    #: whether `transition`, `stationary` and `readout` exist
    markov = False

    @property
    def groups(self) -> int:
        """For how many groups of dimensions there are hyperparameters; 1 where all share them."""
        return max((parameter.numel() for parameter in self.parameters()), default=1)

    def forward(self, lags: Float[Tensor, "*lags"]) -> Float[Tensor, "groups *lags"]:
        """Covariances in float64 at lags of either sign."""
        raise NotImplementedError

    def variance(self) -> Float[Tensor, " groups"]:
        """k(0)."""
        return self(torch.zeros((), dtype=torch.float64, device=next(self.parameters()).device))

    def transition(self, gaps: Float[Tensor, " time"]) -> Float[Tensor, "groups time state state"]:
        """A(Δ) for gaps Δ ≥ 0 between moments."""
        raise NotImplementedError

    def stationary(self) -> Float[Tensor, "groups state state"]:
        """Covariance of the state at any moment."""
        raise NotImplementedError

    def readout(self) -> Float[Tensor, " state"]:
        raise NotImplementedError

    def described(self) -> str:
        """The kernel with its hyperparameters, for an error's sentence."""
        values = ", ".join(f"{name.removeprefix('log_')} {_shown(p)}" for name, p in self.named_parameters())
        return f"{type(self).__name__}({values})"

    def __add__(self, other: "Kernel") -> "Sum":
        return Sum(self, other)

    def __mul__(self, other: "Kernel") -> "Product":
        return Product(self, other)


class White(Kernel):
    """k = 0: what varies is the process' nugget alone, so that its times are independent."""

    def forward(self, lags: Float[Tensor, "*lags"]) -> Float[Tensor, "groups *lags"]:
        return torch.zeros(1, *lags.shape, dtype=torch.float64, device=lags.device)

    def variance(self) -> Float[Tensor, " groups"]:
        return torch.zeros(1, dtype=torch.float64)


class RBF(Kernel):
    """k(τ) = σ² exp(−τ² / 2ℓ²): paths with all derivatives."""

    def __init__(self, lengthscale: Positive = 1.0, variance: Positive = 1.0):
        super().__init__()
        self.log_lengthscale = log_parameter("lengthscale", lengthscale)
        self.log_variance = log_parameter("variance", variance)

    def forward(self, lags: Float[Tensor, "*lags"]) -> Float[Tensor, "groups *lags"]:
        scaled = lags.double() / _of(self.log_lengthscale, lags)
        return _of(self.log_variance, lags) * (-0.5 * scaled.square()).exp()


class Matern(Kernel):
    """Matérn of ν = 1/2, 3/2 or 5/2: paths with 0, 1 or 2 derivatives. Markov, with a state of ν + 1/2 numbers.

    With a = √(2ν) |τ| / ℓ: σ² e^(−a), σ² (1 + a) e^(−a), σ² (1 + a + a²/3) e^(−a).
    """

    markov = True

    def __init__(self, nu: float = 1.5, lengthscale: Positive = 1.0, variance: Positive = 1.0):
        super().__init__()
        if nu not in (0.5, 1.5, 2.5):
            raise InputError(f"nu must be 0.5, 1.5 or 2.5, not {nu}.")
        self.nu = float(nu)
        self.log_lengthscale = log_parameter("lengthscale", lengthscale)
        self.log_variance = log_parameter("variance", variance)

    def forward(self, lags: Float[Tensor, "*lags"]) -> Float[Tensor, "groups *lags"]:
        a = math.sqrt(2 * self.nu) * lags.double().abs() / _of(self.log_lengthscale, lags)
        polynomial = {0.5: torch.ones_like(a), 1.5: 1 + a, 2.5: 1 + a + a.square() / 3}[self.nu]
        return _of(self.log_variance, lags) * polynomial * (-a).exp()

    # The state is (z, z'/λ, z''/λ²) with λ = √(2ν)/ℓ, so that its drift is λ times a constant matrix, all of whose
    # eigenvalues are −1: exp(λ Δ drift) = e^(−λΔ) times a polynomial in drift + I, which is nilpotent.

    def transition(self, gaps: Float[Tensor, " time"]) -> Float[Tensor, "groups time state state"]:
        a = math.sqrt(2 * self.nu) * gaps.double() / _of(self.log_lengthscale, gaps)
        drift = {0.5: [[-1]], 1.5: [[0, 1], [-1, -2]], 2.5: [[0, 1, 0], [0, 0, 1], [-1, -3, -3]]}[self.nu]
        one = torch.eye(len(drift), dtype=torch.float64, device=gaps.device)
        nilpotent = torch.tensor(drift, dtype=torch.float64, device=gaps.device) + one
        power, series = one, one * torch.ones_like(a)[..., None, None]
        for order in range(1, len(drift)):
            power = power @ nilpotent / order
            series = series + a.pow(order)[..., None, None] * power
        return (-a).exp()[..., None, None] * series

    def stationary(self) -> Float[Tensor, "groups state state"]:
        third = 1 / 3
        of_one = {0.5: [[1.0]], 1.5: [[1.0, 0], [0, 1.0]], 2.5: [[1.0, 0, -third], [0, third, 0], [-third, 0, 1.0]]}
        unit = torch.tensor(of_one[self.nu], dtype=torch.float64, device=self.log_variance.device)
        return self.log_variance.double().exp()[:, None, None] * unit

    def readout(self) -> Float[Tensor, " state"]:
        first = torch.zeros(int(self.nu + 0.5), dtype=torch.float64, device=self.log_variance.device)
        first[0] = 1.0
        return first

    def described(self) -> str:
        return super().described().replace("Matern(", f"Matern(nu {self.nu}, ", 1)


class RationalQuadratic(Kernel):
    """k(τ) = σ² (1 + τ² / 2αℓ²)^(−α): a mixture of RBFs of many lengthscales, wider for a smaller α."""

    def __init__(self, lengthscale: Positive = 1.0, variance: Positive = 1.0, alpha: Positive = 1.0):
        super().__init__()
        self.log_lengthscale = log_parameter("lengthscale", lengthscale)
        self.log_variance = log_parameter("variance", variance)
        self.log_alpha = log_parameter("alpha", alpha)

    def forward(self, lags: Float[Tensor, "*lags"]) -> Float[Tensor, "groups *lags"]:
        alpha = _of(self.log_alpha, lags)
        scaled = (lags.double() / _of(self.log_lengthscale, lags)).square() / (2 * alpha)
        return _of(self.log_variance, lags) * (-alpha * torch.log1p(scaled)).exp()


class Periodic(Kernel):
    """k(τ) = σ² exp(−2 sin²(π τ / p) / ℓ²); ℓ is relative to a period p of one turn."""

    def __init__(self, period: Positive = 1.0, lengthscale: Positive = 1.0, variance: Positive = 1.0):
        super().__init__()
        self.log_period = log_parameter("period", period)
        self.log_lengthscale = log_parameter("lengthscale", lengthscale)
        self.log_variance = log_parameter("variance", variance)

    def forward(self, lags: Float[Tensor, "*lags"]) -> Float[Tensor, "groups *lags"]:
        turn = math.pi * lags.double() / _of(self.log_period, lags)
        wave = torch.sin(turn) / _of(self.log_lengthscale, lags)
        return _of(self.log_variance, lags) * (-2 * wave.square()).exp()


class _Pair(Kernel):
    def __init__(self, first: Kernel, second: Kernel):
        super().__init__()
        if 1 not in (first.groups, second.groups) and first.groups != second.groups:
            raise InputError(f"kernels of {first.groups} and {second.groups} groups of dimensions do not go together.")
        self.first, self.second = first, second

    @property
    def markov(self) -> bool:  # type: ignore[override]
        return self.first.markov and self.second.markov


class Sum(_Pair):
    """k₁ + k₂; its state is both states."""

    def forward(self, lags: Float[Tensor, "*lags"]) -> Float[Tensor, "groups *lags"]:
        return self.first(lags) + self.second(lags)

    def transition(self, gaps: Float[Tensor, " time"]) -> Float[Tensor, "groups time state state"]:
        return _block_diagonal(self.first.transition(gaps), self.second.transition(gaps))

    def stationary(self) -> Float[Tensor, "groups state state"]:
        return _block_diagonal(self.first.stationary(), self.second.stationary())

    def readout(self) -> Float[Tensor, " state"]:
        return torch.cat((self.first.readout(), self.second.readout()))

    def described(self) -> str:
        return f"{self.first.described()} + {self.second.described()}"


class Product(_Pair):
    """k₁ k₂; its state is all products of a number of one state and one of the other."""

    def forward(self, lags: Float[Tensor, "*lags"]) -> Float[Tensor, "groups *lags"]:
        return self.first(lags) * self.second(lags)

    def transition(self, gaps: Float[Tensor, " time"]) -> Float[Tensor, "groups time state state"]:
        return _kronecker(self.first.transition(gaps), self.second.transition(gaps))

    def stationary(self) -> Float[Tensor, "groups state state"]:
        return _kronecker(self.first.stationary(), self.second.stationary())

    def readout(self) -> Float[Tensor, " state"]:
        return torch.kron(self.first.readout(), self.second.readout())

    def described(self) -> str:
        return f"{self.first.described()} * {self.second.described()}"


def _of(log_parameter: Tensor, lags: Tensor) -> Tensor:
    """A hyperparameter [groups] in float64, with room for the lags' dimensions."""
    return log_parameter.double().exp().view(-1, *[1] * lags.dim())


def _block_diagonal(first: Tensor, second: Tensor) -> Tensor:
    leading = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    one, two = first.shape[-1], second.shape[-1]
    upper = torch.cat((first.expand(*leading, one, one), first.new_zeros(*leading, one, two)), -1)
    lower = torch.cat((first.new_zeros(*leading, two, one), second.expand(*leading, two, two)), -1)
    return torch.cat((upper, lower), -2)


def _kronecker(first: Tensor, second: Tensor) -> Tensor:
    product = first[..., :, None, :, None] * second[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)


def _shown(parameter: Tensor) -> str:
    values: Any = [float(f"{value:.3g}") for value in parameter.detach().double().exp().tolist()]
    if len(values) == 1:
        return str(values[0])
    return f"{min(values)} to {max(values)}"
