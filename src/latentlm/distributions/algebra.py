"""Exact algebra of the covariance Σ = K + diag(noise) of a Gaussian process on a grid of times: dense and Toeplitz.

Whatever the algebra, Σ = L Lᵀ with L lower triangular, so that ε = L⁻¹ z is what z_t adds to z_<t, divided by its
standard deviation L_tt: log p of a prefix is the sum of its own terms, and padding after it costs nothing.

    B batch, G groups of dimensions that share hyperparameters, T time, R dimensions in a group

Values are [B, G, T, R]; noise is [G, T], or [B, G, T] where each row has its own. Everything is float64.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latentlm.distributions.kernels import Kernel

_PIECE = 32  # steps that are taken between two products with all the past
# G · T³ up to which one factor, and its gradient, cost less than Durbin's steps for whitening and coloring
_FACTOR_UNTIL = 2**30
# a factorisation that fails is tried again with so much more noise, as a share of the variance
JITTERS = (0.0, 1e-10, 1e-8, 1e-6)


class NotPositiveError(Exception):
    """A covariance that is not positive definite in float64."""


class Algebra:
    """What a Gaussian process asks of its covariance."""

    def whiten(self, values: Float[Tensor, "B G T R"]) -> Float[Tensor, "B G T R"]:
        """L⁻¹ z."""
        raise NotImplementedError

    def color(self, noise: Float[Tensor, "B G T R"]) -> Float[Tensor, "B G T R"]:
        """L ε."""
        raise NotImplementedError

    def solve(self, values: Float[Tensor, "B G T R"], lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B G T R"]:
        """Σ⁻¹ z of each row's first `length` times; 0 after them."""
        raise NotImplementedError

    def precision_diagonal(self, lengths: Int64[Tensor, " N"]) -> Float[Tensor, "N G T"]:
        """The diagonal of the inverse of Σ's leading block of each length; 0 after it.

        With noise of each row's own there must be a length for each row.
        """
        raise NotImplementedError

    def forecasts(self) -> Iterator[tuple[Float[Tensor, "G N reached"], Float[Tensor, "G N"]]]:
        """Rows of 1 and minus the best linear forecast of z_t from z_<t, and what it misses by, a few times at once."""
        raise NotImplementedError

    def steps(
        self, noise: Float[Tensor, "G rest columns"], prefix: Float[Tensor, "G begun columns"]
    ) -> Iterator[Float[Tensor, "G columns"]]:
        """z_t given z_<t, one after another, for columns (rows × R) side by side: L ε, without gradients."""
        begun, end = prefix.shape[1], 0
        path = torch.cat((prefix, noise), 1)  # the noise gives way to the values
        for forecasts, scales in self.forecasts():
            begin, end = end, min(end + forecasts.shape[1], path.shape[1])
            first = max(begin, begun)
            if begin == end:
                return
            if first >= end:
                continue
            rows, piece = slice(first - begin, end - begin), path[:, first:end]
            piece *= scales[:, rows, None]
            piece -= forecasts[:, rows, :first] @ path[:, :first]
            for place, forecast in enumerate(forecasts[:, rows, first:end].split(1, 1)):
                value = piece.narrow(1, place, 1)  # narrow: of so small a step, slices would take a third
                if place:
                    value.baddbmm_(forecast.narrow(2, 0, place), piece.narrow(1, 0, place), alpha=-1)
                yield value.squeeze(1)

    def quadratic(self, values: Float[Tensor, "B G T R"], lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B G R"]:
        """zᵀ Σ⁻¹ z of each row's first `length` times."""
        squares = self.whiten(cut(values, lengths)).square()
        return cut(squares, lengths).sum(-2)

    def log_determinant(self, lengths: Int64[Tensor, " N"]) -> Float[Tensor, "N G"]:
        """log |Σ| of the leading block of each length; see `precision_diagonal`."""
        raise NotImplementedError


class Dense(Algebra):
    """One Cholesky factor for many right-hand sides: any times, O(T³) once and O(T²) for each of B · G · R."""

    def __init__(self, covariance: Float[Tensor, "G T T"]):
        self.factor, info = torch.linalg.cholesky_ex(covariance)
        if not bool((info == 0).all() & self.factor.isfinite().all()):
            raise NotPositiveError

    @classmethod
    def of_kernel(cls, kernel: Kernel, times: Float[Tensor, " T"], noise: Float[Tensor, "G T"]) -> "Dense":
        covariance = of_groups(kernel(times[:, None] - times[None, :]), noise.shape[-2])
        return cls(covariance + torch.diag_embed(noise))

    def whiten(self, values: Float[Tensor, "B G T R"]) -> Float[Tensor, "B G T R"]:
        return self._of_columns(torch.linalg.solve_triangular, values)

    def color(self, noise: Float[Tensor, "B G T R"]) -> Float[Tensor, "B G T R"]:
        return self._of_columns(lambda factor, columns, upper: factor @ columns, noise)

    def solve(self, values: Float[Tensor, "B G T R"], lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B G T R"]:
        # L⁻ᵀ of the leading block is the leading block of L⁻ᵀ: what stands after a row's end is put to 0 in between
        white = cut(self.whiten(cut(values, lengths)), lengths)
        return self._of_columns(
            lambda factor, columns, upper: torch.linalg.solve_triangular(factor.mT, columns, upper=True), white
        )

    def log_determinant(self, lengths: Int64[Tensor, " N"]) -> Float[Tensor, "N G"]:
        log_scale = self.factor.diagonal(dim1=-2, dim2=-1).log()
        return 2 * cut(log_scale.expand(len(lengths), -1, -1)[..., None], lengths)[..., 0].sum(-1)

    def precision_diagonal(self, lengths: Int64[Tensor, " N"]) -> Float[Tensor, "N G T"]:
        if not self.factor.shape[-1]:
            return self.factor.new_zeros(len(lengths), len(self.factor), 0)
        until = self._inverse(self.factor).square().cumsum(-2)
        return torch.nn.functional.pad(until, (0, 0, 1, 0))[:, lengths].transpose(0, 1)  # nothing until the first

    def forecasts(self) -> Iterator[tuple[Float[Tensor, "G N reached"], Float[Tensor, "G N"]]]:
        inverse, total = self._detached_inverse, self.factor.shape[-1]
        scale = self.factor.detach().diagonal(dim1=-2, dim2=-1)
        for begin in range(0, total, _PIECE):
            end = min(begin + _PIECE, total)
            yield inverse[..., begin:end, :end] * scale[..., begin:end, None], scale[..., begin:end]

    @cached_property
    def _detached_inverse(self) -> Tensor:
        return self._inverse(self.factor.detach())

    @staticmethod
    def _inverse(factor: Tensor) -> Tensor:
        one = torch.eye(factor.shape[-1], dtype=torch.float64, device=factor.device)
        return torch.linalg.solve_triangular(factor, one, upper=False)

    def _of_columns(self, function: Any, values: Tensor) -> Tensor:
        """A function of the factor and columns, with all rows' columns side by side where they share the factor."""
        columns = values.permute(1, 2, 0, 3).flatten(2)
        return function(self.factor, columns, upper=False).unflatten(2, (len(values), -1)).permute(2, 0, 1, 3)


class Toeplitz(Algebra):
    """A stationary kernel on a regular grid with one noise: O(T²) once, of many times no matrix of T × T.

    Durbin's recursion gives the best linear forecast of z_t from z_<t for each t; the last forecast is, but for its
    scale, the first column of Σ⁻¹, which holds all of Σ⁻¹ (Gohberg and Semencul), so that Σ⁻¹ z is a few products of
    Fourier transforms, O(T log T). Golub and Van Loan 2013, "Matrix Computations", section 4.7. The gradients are
    closed forms of the same kind: nothing is kept of the recursion. Whitening and coloring need L, whose rows the
    recursion gives one after another; of few times a factor is cheaper (`_FACTOR_UNTIL`).
    """

    def __init__(self, kernel: Kernel, times: Float[Tensor, " T"], noise: Float[Tensor, "G T"]):
        covariance = kernel(times - times[0])
        at_zero = torch.nn.functional.pad(noise[:, :1], (0, len(times) - 1))
        self.covariance = covariance + at_zero
        self._inverses: dict[int, tuple[Tensor, Tensor]] = {}
        self._inverses_at(torch.tensor([len(times)]))  # to see at once whether it is positive definite

    def quadratic(self, values: Float[Tensor, "B G T R"], lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B G R"]:
        inverses = self._inverses_at(lengths)
        order = torch.cat([(lengths == length).nonzero()[:, 0] for length in (0, *inverses)])
        quadratics = [values.new_zeros(int((lengths == 0).sum()), values.shape[1], values.shape[-1])]
        for length, (column, _) in inverses.items():
            columns = values[lengths == length][:, :, :length].transpose(-1, -2)
            quadratics.append(_Quadratic.apply(self.covariance, column.detach(), columns))
        return torch.cat(quadratics)[order.argsort()]

    def solve(self, values: Float[Tensor, "B G T R"], lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B G T R"]:
        values = cut(values, lengths)
        solution = torch.zeros_like(values)
        for length, (column, _) in self._inverses_at(lengths).items():
            rows = (lengths == length).nonzero()[:, 0]
            part = _inverse_times(column, values[rows][:, :, :length].transpose(-1, -2)).transpose(-1, -2)
            padding = len(self.covariance[0]) - length
            solution = solution.index_copy(0, rows, torch.nn.functional.pad(part, (0, 0, 0, padding)))
        return solution

    def precision_diagonal(self, lengths: Int64[Tensor, " N"]) -> Float[Tensor, "N G T"]:
        total = self.covariance.shape[-1]
        diagonals = {
            length: torch.nn.functional.pad(_inverse_diagonal(column), (0, total - length))
            for length, (column, _) in self._inverses_at(lengths).items()
        }
        nothing = torch.zeros_like(self.covariance)
        return torch.stack([diagonals.get(int(length), nothing) for length in lengths])

    def whiten(self, values: Float[Tensor, "B G T R"]) -> Float[Tensor, "B G T R"]:
        return self._along(values, whitens=True) if self._factored is None else self._factored.whiten(values)

    def color(self, noise: Float[Tensor, "B G T R"]) -> Float[Tensor, "B G T R"]:
        return self._along(noise, whitens=False) if self._factored is None else self._factored.color(noise)

    def log_determinant(self, lengths: Int64[Tensor, " N"]) -> Float[Tensor, "N G"]:
        inverses, nothing = self._inverses_at(lengths), torch.zeros_like(self.covariance[:, 0])
        return torch.stack([inverses[int(length)][1] if length else nothing for length in lengths])

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """For what is kept, which has to learn whatever the first who asks for it does."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.covariance.requires_grad):
            yield

    def _inverses_at(self, lengths: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """The first column [G, length] of the inverse of each leading block, and its log |Σ| [G]."""
        asked = {int(length) for length in lengths.unique()} - {0}
        if wanted := tuple(sorted(asked - self._inverses.keys())):
            with self._learning():
                columns, log_determinants = _Inverses.apply(self.covariance, wanted)
            for length, column, log_determinant in zip(wanted, columns, log_determinants, strict=True):
                self._inverses[length] = column[:, :length], log_determinant
        return {length: self._inverses[length] for length in asked}

    @cached_property
    def _factored(self) -> Dense | None:
        """The same with a factor, where that is cheaper."""
        groups, total = self.covariance.shape
        if groups * total**3 > _FACTOR_UNTIL:
            return None
        with self._learning():
            both_ways = torch.cat((self.covariance.flip(-1), self.covariance[:, 1:]), -1)
            whole = both_ways.unfold(-1, total, 1).flip(-2)
            try:
                return Dense(whole)
            except NotPositiveError:  # by a rounding error, since Durbin's variances were positive
                lift = JITTERS[1] * self.covariance[:, :1].expand(-1, total)
                return Dense(whole + torch.diag_embed(lift))

    def _along(self, inputs: Tensor, *, whitens: bool) -> Tensor:
        """z from ε or ε from z, in √T pieces. With gradients a piece's forecasts are made again backwards."""
        forecast, variance = self._first_forecast()
        values, outputs = inputs if whitens else inputs[:, :, :0], []
        for begin, number in self._pieces():
            arguments = (self.covariance, forecast, variance, values, inputs[:, :, begin : begin + number], whitens)
            piece, forecast, variance = (
                checkpoint(_along_piece, begin, *arguments, use_reentrant=False)
                if torch.is_grad_enabled()
                else _along_piece(begin, *arguments)
            )
            outputs.append(piece)
            if not whitens:
                values = torch.cat((values, piece), -2)
        return torch.cat(outputs, -2)

    def forecasts(self) -> Iterator[tuple[Float[Tensor, "G N reached"], Float[Tensor, "G N"]]]:
        steps = _durbin(self.covariance, self.covariance.shape[-1])
        for begin, number in self._pieces():
            rows = np.zeros((len(self.covariance), number, begin + number))
            variances = np.empty(rows.shape[:2])
            for place, (reached, variance) in enumerate(itertools.islice(steps, number)):
                rows[:, place, : begin + place + 1] = reached[:, ::-1]
                variances[:, place] = variance
            device = self.covariance.device
            yield torch.from_numpy(rows).to(device), torch.from_numpy(variances).to(device).sqrt()

    def _first_forecast(self) -> tuple[Tensor, Tensor]:
        first = self.covariance[:, 0]
        return torch.nn.functional.pad(torch.ones_like(first)[:, None], (0, self.covariance.shape[-1] - 1)), first

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Where each of about √T pieces begins, and how many times it has."""
        total = self.covariance.shape[-1]
        size = max(int(total**0.5), 16)
        for begin in range(0, total, size):
            yield begin, min(size, total - begin)


def _forecast_rows(
    covariance: Tensor, forecast: Tensor, variance: Tensor, begin: int, number: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps of Durbin's recursion: rows [G, number, begin + number] of 1 and minus the best forecast, and variances.

    A forecast is kept as (1, f_1 … f_t, 0 …) [G, T], with z_t ≈ −Σ_j f_j z_(t−j).
    """
    total, rows, variances = covariance.shape[-1], [], []
    for t in range(begin, begin + number):
        reached = forecast[:, : t + 1]
        rows.append(torch.nn.functional.pad(reached.flip(-1), (0, begin + number - t - 1)))
        variances.append(variance)
        if t + 1 < total:
            reflection = -(reached * covariance[:, 1 : t + 2].flip(-1)).sum(-1) / variance
            backwards = torch.nn.functional.pad(reached.flip(-1), (1, total - t - 2))
            forecast, variance = forecast + reflection[:, None] * backwards, variance * (1 - reflection.square())
    return torch.stack(rows, 1), torch.stack(variances, 1), forecast, variance


def _along_piece(
    begin: int, covariance: Tensor, forecast: Tensor, variance: Tensor, values: Tensor, given: Tensor, whitens: bool
) -> tuple[Tensor, Tensor, Tensor]:
    number = given.shape[-2]
    rows, variances, forecast, variance = _forecast_rows(covariance, forecast, variance, begin, number)
    scale = variances.sqrt()[:, :, None]
    missed = rows[:, :, :begin] @ values[:, :, :begin]
    if whitens:
        return (missed + rows[:, :, begin:] @ given) / scale, forecast, variance
    target = scale * given - missed
    triangle = rows[:, :, begin:].expand(len(target), -1, -1, -1)
    return torch.linalg.solve_triangular(triangle, target, upper=False, unitriangular=True), forecast, variance


def _durbin(covariance: Tensor, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same recursion without gradients: (1, f_1 … f_t) [G, t + 1], a view that the next step changes, and variance.

    So many small steps one after another are numpy's on any device: a step of torch costs five times as much.
    """
    given = covariance.detach().cpu().numpy()
    total, backwards = given.shape[-1], np.ascontiguousarray(given[:, ::-1])
    forecast, variance = np.zeros_like(given), given[:, 0].copy()
    forecast[:, 0] = 1.0
    for t in range(number):
        reached = forecast[:, : t + 1]
        yield reached, variance
        if t + 1 < number:
            reflection = (reached * backwards[:, total - t - 2 : total - 1]).sum(-1) / -variance
            forecast[:, 1 : t + 2] += reflection[:, None] * reached[:, ::-1]
            variance = variance * (1 - reflection**2)


class _Inverses(torch.autograd.Function):
    """Of the leading blocks of a Toeplitz matrix given by its column: the inverse's first column, and log |Σ|.

    x = Σ⁻¹ e_0, so dx = −Σ⁻¹ dΣ x; and d log|Σ| = tr(Σ⁻¹ dΣ). The derivative in the k-th entry of Σ's column is the
    sum along the k-th diagonals of the matrix that stands before dΣ.
    """

    @staticmethod
    def forward(ctx: Any, covariance: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        groups, total = covariance.shape
        columns = np.zeros((len(lengths), groups, total))
        log_determinants = np.empty((len(lengths), groups))
        log_determinant = np.zeros(groups)
        for t, (reached, variance) in enumerate(_durbin(covariance, lengths[-1]), start=1):
            if not (variance > 0).all():  # a NaN is not above 0, either
                raise NotPositiveError
            log_determinant += np.log(variance)
            if t in lengths:
                place = lengths.index(t)
                columns[place, :, :t] = reached / variance[:, None]
                log_determinants[place] = log_determinant
        found = torch.from_numpy(columns).to(covariance.device)
        ctx.save_for_backward(found)
        ctx.lengths = lengths
        return found, torch.from_numpy(log_determinants).to(covariance.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (columns,) = ctx.saved_tensors
        gradient = torch.zeros_like(columns[0])
        for length, column, of_column, of_log_determinant in zip(ctx.lengths, columns, *gradients, strict=True):
            x = column[:, :length]
            against = _inverse_times(x, of_column[:, None, :length])[:, 0]
            gradient[:, :length] += of_log_determinant[:, None] * _inverse_diagonal_sums(x)
            gradient[:, :length] -= _products_at_lags(against, x)
        return gradient, None


class _Quadratic(torch.autograd.Function):
    """vᵀ Σ⁻¹ v of columns [B, G, R, T]; with u = Σ⁻¹ v its gradient is 2 u in v and −u uᵀ in Σ."""

    @staticmethod
    def forward(ctx: Any, covariance: Tensor, x: Tensor, values: Tensor) -> Tensor:
        solved = _inverse_times(x, values)
        ctx.save_for_backward(solved)
        ctx.total = covariance.shape[-1]
        return (values * solved).sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        (solved,) = ctx.saved_tensors
        gradient, length = gradients[0][..., None], solved.shape[-1]
        power = torch.fft.rfft(solved, n=2 * length)
        power = ((power.real.square() + power.imag.square()) * gradient).sum((0, 2))
        at_lags = torch.fft.irfft(power, n=2 * length)[:, :length]
        of_covariance = -torch.cat((at_lags[:, :1], 2 * at_lags[:, 1:]), -1)
        padding = (0, ctx.total - length)
        return torch.nn.functional.pad(of_covariance, padding), None, 2 * gradient * solved


# Gohberg and Semencul: with x the first column of Σ⁻¹ and y = (0, x_(n−1), …, x_1),
# Σ⁻¹ = (L(x) L(x)ᵀ − L(y) L(y)ᵀ) / x_0, where L(v) is lower triangular and Toeplitz with first column v.


def _with_its_other(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x[..., 1:].flip(-1), (1, 0))


def _inverse_times(x: Float[Tensor, "G T"], values: Float[Tensor, "*B G R T"]) -> Float[Tensor, "*B G R T"]:
    """Σ⁻¹ v for columns v, which lie in the last dimension here."""
    length = x.shape[-1]
    size = 2 * length
    v = torch.fft.rfft(values, n=size)
    total: Tensor | float = 0.0
    for vector, sign in ((x, 1.0), (_with_its_other(x), -1.0)):
        spectrum = torch.fft.rfft(vector, n=size)[:, None]
        # Lᵀ v looks ahead, and what reaches beyond the end is cut before L
        ahead = torch.fft.irfft(v * spectrum.conj(), n=size)[..., :length]
        total = total + sign * torch.fft.rfft(ahead, n=size) * spectrum
    assert isinstance(total, Tensor)
    return torch.fft.irfft(total, n=size)[..., :length] / x[:, :1, None]


def _inverse_diagonal(x: Float[Tensor, "G T"]) -> Float[Tensor, "G T"]:
    return (x.square() - _with_its_other(x).square()).cumsum(-1) / x[:, :1]


def _inverse_diagonal_sums(x: Float[Tensor, "G T"]) -> Float[Tensor, "G T"]:
    """tr(Σ⁻¹ dΣ) by each entry of Σ's column: the main diagonal of Σ⁻¹ summed, then twice each one beside it."""
    length = x.shape[-1]
    lags = torch.arange(length, dtype=x.dtype, device=x.device)
    total: Tensor | float = 0.0
    for vector, sign in ((x, 1.0), (_with_its_other(x), -1.0)):
        # entry (i, i+k) of L(v) L(v)ᵀ is Σ_(m ≤ i) v_m v_(m+k), so the product at m counts n − k − m times
        at_lags = _correlation(vector, vector)
        total = total + sign * ((length - lags) * at_lags - _correlation(lags * vector, vector))
    assert isinstance(total, Tensor)
    return torch.cat((total[:, :1], 2 * total[:, 1:]), -1) / x[:, :1]


def _products_at_lags(a: Float[Tensor, "G T"], b: Float[Tensor, "G T"]) -> Float[Tensor, "G T"]:
    """aᵀ dΣ b by each entry of Σ's column."""
    both = _correlation(a, b) + _correlation(b, a)
    return torch.cat((both[:, :1] / 2, both[:, 1:]), -1)


def _correlation(a: Float[Tensor, "G T"], b: Float[Tensor, "G T"]) -> Float[Tensor, "G T"]:
    """Σ_m a_m b_(m+k) for k = 0 … T − 1."""
    length = a.shape[-1]
    product = torch.fft.rfft(a, n=2 * length).conj() * torch.fft.rfft(b, n=2 * length)
    return torch.fft.irfft(product, n=2 * length)[..., :length]


def cut(values: Float[Tensor, "B G T R"], lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B G T R"]:
    """Values with 0 after each row's end."""
    real = torch.arange(values.shape[-2], device=values.device) < lengths[:, None]
    return values.masked_fill(~real[:, None, :, None], 0.0)


def of_groups(values: Float[Tensor, "G *shape"], groups: int) -> Float[Tensor, "groups *shape"]:
    """What groups of dimensions share, for so many finer groups; left to broadcasting where there is one for all."""
    return values if len(values) in (1, groups) else values.repeat_interleave(groups // len(values), 0)
