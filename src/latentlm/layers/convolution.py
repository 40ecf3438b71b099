"""Causal dilated convolutions over time: what comes at t changes nothing before t."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class CausalConvolution(nn.Conv1d):
    """A convolution that sees t, t − d, t − 2d, …; zeros stand before the first time."""

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch out time"]:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class ChannelNorm(nn.Module):
    """Normalises each time by its own channels, in groups of them.

    GroupNorm as torch has it takes its mean over all times, so every time would see the end of the text.
    """

    def __init__(self, channels: int, groups: int = 1):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch channels time"]:
        parts = x.float().unflatten(1, (self.groups, -1))
        variance, mean = torch.var_mean(parts, dim=2, correction=0, keepdim=True)
        normal = ((parts - mean) * (variance + 1e-5).rsqrt()).flatten(1, 2).to(x.dtype)
        return normal * self.weight[:, None] + self.bias[:, None]


class CausalSqueezeExcite(nn.Module):
    """Gates channels by what they were on average until now (Hu et al. 2018, arXiv 1709.01507, but causal)."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.squeeze = nn.Conv1d(channels, channels // reduction, 1)
        self.excite = nn.Conv1d(channels // reduction, channels, 1)

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch channels time"]:
        count = torch.arange(1, x.shape[-1] + 1, device=x.device)
        until_now = (x.float().cumsum(-1) / count).to(x.dtype)
        return x * self.excite(F.silu(self.squeeze(until_now))).sigmoid()


class CausalBlock(nn.Module):
    """x + dropout(gate(convolution(x))): one of a stack of dilations (Bai et al. 2018, arXiv 1803.01271).

    Args:
        form: "separable": a convolution for each channel, then one across channels; normalisation in groups; squeeze
            and excite. "full": one convolution of all channels; normalisation of all channels together.
    """

    def __init__(
        self, channels: int, kernel_size: int, dilation: int, dropout: float, form: Literal["separable", "full"]
    ):
        super().__init__()
        if form == "separable":
            self.convolution: nn.Module = nn.Sequential(
                CausalConvolution(channels, channels, kernel_size, dilation=dilation, groups=channels),
                nn.Conv1d(channels, 2 * channels, 1),
            )
            self.norm = ChannelNorm(2 * channels, 8)
            self.gate: nn.Module = CausalSqueezeExcite(channels)
        else:
            self.convolution = CausalConvolution(channels, 2 * channels, kernel_size, dilation=dilation)
            self.norm, self.gate = ChannelNorm(2 * channels), nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch channels time"]:
        return x + self.dropout(self.gate(F.glu(self.norm(self.convolution(x)), dim=1)))
