"""Causal dilated convolutions over time: what comes at t changes nothing before t."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer


class CausalConvolution(nn.Conv1d):
    """A convolution that sees t, t − d, t − 2d, …; zeros stand before the first time.

    Of all channels or of each by itself, it is products with the shifted text whose channels lie side by side in
    memory: on a CPU that is faster than Conv1d, for a convolution of each channel by itself four times.
    """

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch out time"]:
        dilation, before = self.dilation[0], self.dilation[0] * (self.kernel_size[0] - 1)
        if self.bias is None or self.groups not in (1, self.in_channels) or self.groups not in (1, self.out_channels):
            return super().forward(F.pad(x, (before, 0)))
        padded = F.pad(x.transpose(1, 2), (0, 0, before, 0))
        shifted = [padded[:, start : start + x.shape[-1]] for start in range(0, before + 1, dilation)]
        if self.groups == 1:
            out = F.linear(torch.cat(shifted, -1), self.weight.transpose(1, 2).flatten(1), self.bias)
        else:
            out = self.bias
            for part, weight in zip(shifted, self.weight[:, 0].unbind(-1), strict=True):
                out = torch.addcmul(out, part, weight)
        return out.transpose(1, 2)


class ChannelNorm(nn.Module):
    """Normalises each time by its own channels, in groups of them.

    GroupNorm as torch has it takes its mean over all times, so every time would see the end of the text.
    """

    def __init__(self, channels: int, groups: int = 1):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch channels time"]:
        parts = x.float().transpose(1, 2).unflatten(2, (self.groups, -1))
        normal = F.layer_norm(parts, parts.shape[-1:]).flatten(2).to(x.dtype)
        return torch.addcmul(self.bias, normal, self.weight).transpose(1, 2)


class CausalSqueezeExcite(nn.Module):
    """Gates channels by what they were on average until now (Hu et al. 2018, arXiv 1709.01507, but causal)."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.squeeze = CausalConvolution(channels, channels // reduction, 1)
        self.excite = CausalConvolution(channels // reduction, channels, 1)

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch channels time"]:
        count = torch.arange(1, x.shape[-1] + 1, device=x.device)
        until_now = (x.float().cumsum(-1) / count).to(x.dtype)
        return x * self.excite(F.silu(self.squeeze(until_now))).sigmoid()


class CausalBlock(GradientCheckpointingLayer):
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
                CausalConvolution(channels, 2 * channels, 1),
            )
            self.norm = ChannelNorm(2 * channels, 8)
            self.gate: nn.Module = CausalSqueezeExcite(channels)
        else:
            self.convolution = CausalConvolution(channels, 2 * channels, kernel_size, dilation=dilation)
            self.norm, self.gate = ChannelNorm(2 * channels), nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch channels time"]:
        return x + self.dropout(self.gate(F.glu(self.norm(self.convolution(x)), dim=1)))
