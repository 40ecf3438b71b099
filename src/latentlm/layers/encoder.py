"""Layers that read a whole text at once: a Transformer encoder, and pooling of its states into a few vectors."""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask

from latentlm.layers.transformer import TransformerBlock, rotation
from latentlm.layers.window import causal_mask


class TransformerEncoder(nn.Module):
    """Pre-norm Transformer in which every position sees every real one, or those until itself where it is causal.

    Width, heads and dropout are the config's.
    """

    def __init__(self, config: PreTrainedConfig, num_layers: int, causal: bool = False):
        super().__init__()
        self.config, self.causal = config, causal
        self.layers = nn.ModuleList(TransformerBlock(config, index, causal=causal) for index in range(num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x: Float[Tensor, "batch time hidden"], attention_mask: Int64[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time hidden"]:
        """States of x. Positions count real tokens, so padding on either side changes nothing."""
        if self.causal:
            mask = causal_mask(self.config, x, attention_mask)
        else:
            mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        if attention_mask is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        else:
            position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
        positions = rotation(
            position_ids, self.config.hidden_size // self.config.num_attention_heads, self.config.rope_theta
        )
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.norm(x)


def pool(
    states: Float[Tensor, "batch time hidden"],
    attention_mask: Int64[Tensor, "batch time"] | None,
    how: Literal["mean", "first", "last"],
) -> Float[Tensor, "batch hidden"]:
    """One vector of a text's states: the mean of its real positions, or the first or the last of them."""
    if how == "mean":
        if attention_mask is None:
            return states.mean(1)
        real = attention_mask[..., None].to(states.dtype)
        return (states * real).sum(1) / real.sum(1).clamp_min(1)
    if attention_mask is None:
        return states[:, 0 if how == "first" else -1]
    place = attention_mask.argmax(1) if how == "first" else attention_mask.cumsum(1).argmax(1)
    return states[torch.arange(len(states), device=states.device), place]


class FixedScaleBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over rows with a scale that is not trained and a shift that is.

    By the rows of the batch while training; by their running averages afterwards, and where a batch has one row. In
    float32 whatever the model's dtype, which torch's own refuses.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def __init__(self, numbers: int, scale: float):
        super().__init__(numbers, affine=False)
        self.scale = scale
        self.shift = nn.Parameter(torch.zeros(numbers))

    def forward(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        flat = x.float().flatten(1)
        if self.training and len(flat) > 1:
            variance, mean = torch.var_mean(flat, dim=0, correction=0)
            with torch.no_grad():
                unbiased = variance * len(flat) / (len(flat) - 1)
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        else:
            variance, mean = self.running_var.float(), self.running_mean.float()
        normal = (flat - mean) * (variance + self.eps).rsqrt()
        return (self.scale * normal + self.shift.float()).view(x.shape)


class AttentionPooling(nn.Module):
    """A number of learned queries, each of which attends to the real positions of a text (Lee et al. 2019, PMA)."""

    def __init__(self, config: PreTrainedConfig, number: int):
        super().__init__()
        self.heads = config.num_attention_heads
        self.queries = nn.Embedding(number, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, states: Float[Tensor, "batch time hidden"], attention_mask: Int64[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch number hidden"]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query = heads(self.queries.weight.to(states.dtype).expand(len(states), -1, -1))
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        pooled = nn.functional.scaled_dot_product_attention(
            query, heads(self.key(states)), heads(self.value(states)), attn_mask=mask
        )
        return self.output(pooled.transpose(1, 2).flatten(2))
