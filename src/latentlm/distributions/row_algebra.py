"""The algebra of as many dense covariances as rows: what a process' updates by different observations need.

All of Σ_r = K + diag(noise_r) share K. Each has an explicit inverse, of which everything that is asked is a product,
with gradients in closed form, so that no step keeps or makes a second T × T matrix for each row:

    u = Σ⁻¹ c:          ∂noise_t = −a_t u_t,                     ∂K = −Σ_r a uᵀ           with a = Σ⁻¹ ∂u
    log |Σ|:            ∂noise_t = ∂ (Σ⁻¹)_tt,                   ∂K = Σ_r ∂ Σ⁻¹
    D = diag(Σ⁻¹):      ∂noise_t = −Σ_s (Σ⁻¹)²_ts ∂D_s,          ∂K = −Σ_r Σ⁻¹ diag(∂D) Σ⁻¹

G groups of dimensions that share a kernel · B rows · D dimensions of a group · T times · R right-hand sides.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentlm.distributions.algebra import Algebra, NotPositiveError
from latentlm.distributions.kernels import Kernel


class DenseRows(Algebra):
    """Covariances of rows with noise of their own, for each row's first `length` times; float64.

    Lengths belong to the covariances, as a row's inverse is that of its leading block; those of calls must be the same.

    Raises:
        NotPositiveError: a covariance that Cholesky's factorisation finds not positive definite.
    """

    def __init__(
        self,
        kernel: Kernel,
        times: Float[Tensor, " T"],
        noise: Float[Tensor, "B dim T"],
        lengths: Int64[Tensor, " B"],
    ):
        self._covariance = kernel(times[:, None] - times[None, :])
        self._noise_GBDT = self._of_groups(noise)
        with torch.no_grad():
            # groups in front, so that the sums over a group's matrices are products that need no copy of them
            number, (_, rows, each, _) = len(times), self._noise_GBDT.shape
            own = self._covariance[:, None, None].repeat(1, rows, each, 1, 1)
            own.diagonal(dim1=-2, dim2=-1).add_(self._noise_GBDT)
            real = torch.arange(number, device=times.device) < lengths[:, None]
            if not bool(real.all()):  # times after a row's end are made independent of those before it
                both = (real[:, :, None] & real[:, None, :])[:, None]
                own.masked_fill_(~both, 0.0).diagonal(dim1=-2, dim2=-1).masked_fill_(~real[:, None], 1.0)
            factor, info = torch.linalg.cholesky_ex(own)
            scale = factor.diagonal(dim1=-2, dim2=-1)
            if not bool((info == 0).all() & scale.isfinite().all()):
                raise NotPositiveError
            self._log_determinants = 2 * scale.log().sum(-1)
            self._inverse = torch.cholesky_inverse(factor).mT  # the same, with rows in memory where LAPACK has columns
            self._real = real[:, None].double()

    def solve(self, values: Float[Tensor, "B dim T R"], lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B dim T R"]:
        columns = self._of_groups(values) * self._real[..., None]
        return self._of_dimensions(_Solve.apply(self._covariance, self._noise_GBDT, columns, self._inverse, self._real))

    def log_determinant(self, lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B dim"]:
        return self._of_dimensions(
            _LogDeterminant.apply(self._covariance, self._noise_GBDT, self._log_determinants, self._inverse, self._real)
        )

    def precision_diagonal(self, lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B dim T"]:
        return self._of_dimensions(_Diagonal.apply(self._covariance, self._noise_GBDT, self._inverse, self._real))

    def _of_groups(self, values: Float[Tensor, "B dim *rest"]) -> Float[Tensor, "G B D *rest"]:
        return values.unflatten(1, (len(self._covariance), -1)).transpose(0, 1)

    @staticmethod
    def _of_dimensions(values: Float[Tensor, "G B D *rest"]) -> Float[Tensor, "B dim *rest"]:
        return values.transpose(0, 1).flatten(1, 2)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, covariance: Tensor, noise: Tensor, columns: Tensor, inverse: Tensor, real: Tensor) -> Tensor:
        solved = inverse @ columns
        ctx.save_for_backward(inverse, solved, real)
        return solved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inverse, solved, real = ctx.saved_tensors
        back = inverse @ (gradient * real[..., None])
        of_covariance = -torch.einsum("gbdtr,gbdsr->gts", back, solved) if ctx.needs_input_grad[0] else None
        return of_covariance, -(back * solved).sum(-1), back, None, None


class _LogDeterminant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, covariance: Tensor, noise: Tensor, value: Tensor, inverse: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, real)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inverse, real = ctx.saved_tensors
        of_noise = gradient[..., None] * inverse.diagonal(dim1=-2, dim2=-1) * real
        of_covariance = None
        if ctx.needs_input_grad[0]:
            groups, _, _, number, _ = inverse.shape
            weighted = gradient.flatten(1)[:, None] @ inverse.flatten(3).flatten(1, 2)
            of_padding = (gradient[..., None] * (1 - real)).sum((1, 2))  # the ones on the diagonal there
            of_covariance = weighted.view(groups, number, number) - torch.diag_embed(of_padding)
        return of_covariance, of_noise, None, None, None


class _Diagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, covariance: Tensor, noise: Tensor, inverse: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, real)
        return inverse.diagonal(dim1=-2, dim2=-1) * real

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inverse, real = ctx.saved_tensors
        scaled = inverse * (gradient * real)[..., None]
        of_covariance = None
        if ctx.needs_input_grad[0]:
            of_covariance = -(scaled.flatten(1, 3).mT @ inverse.flatten(1, 3))
        of_noise = -scaled.mul_(inverse).sum(-2)
        return of_covariance, of_noise, None, None
