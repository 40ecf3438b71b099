"""RMSNorm with a backward of its own on a CPU, where torch composes it of ten operations over the whole tensor."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + ε) · weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4).

    Forward and backward take less than half the time of torch's on a CPU in full precision. Elsewhere (on a GPU, where
    torch has one kernel, compiled, where the operations are fused, and in half precision) it is torch's.
    """

    eps: float

    def forward(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        full = x.dtype == self.weight.dtype in (torch.float32, torch.float64)
        if full and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()  # 1 / √(mean(x²) + ε)
        ctx.save_for_backward(x, inverse, weight)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, inverse, weight = ctx.saved_tensors
        of_weight = (gradient * x).mul_(inverse).reshape(-1, x.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        weighted = gradient * weight
        along = (weighted * x).sum(-1, keepdim=True).mul_(inverse**3).mul_(-1 / x.shape[-1])
        return weighted.mul_(inverse).addcmul_(x, along), of_weight, None
