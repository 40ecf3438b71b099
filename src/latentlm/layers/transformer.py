"""Transformer layers of the families: attention over tokens, attention to latents, gated feed-forward, the block.

B batch · T tokens · N latents · H heads · D width of a head.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from latentlm.layers.window import Window, windowed_attention

#: of a block: x + self-attention, which no latent of the block changes, or what comes after it
Part = Literal["whole", "tokens", "rest"]
# fused attention on a CPU takes 16 keys at a time, and what is left over one by one: for a text that looks at fewer,
# products and a softmax are faster in float32, and never slower by much; in bf16 they are slower, and round the scores
_FEW_KEYS, _MANY_QUERIES = range(4, 16), 128
Rotation = tuple[Float[Tensor, "_rows 1 _time width"], Float[Tensor, "_rows 1 _time width"]]


def rotation(positions: Tensor, width: int, theta: float) -> Rotation:
    """Cosines and ∓ sines of rotary position embedding (Su et al. 2021, eq. 34) for positions [rows, time].

    Computed in float32 when needed rather than kept as a buffer: it is cheap, bf16 cannot hold it, and a buffer that is
    not saved would have to be rebuilt by every way of loading weights.
    """
    frequencies = theta ** -(torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotation_at(by: Rotation, at: Int64[Tensor, "batch number"]) -> Rotation:
    """Of all positions those that each row names."""
    where = at[:, None, :, None]
    cos, sin = (part.expand(len(at), -1, -1, -1).take_along_dim(where, 2) for part in by)
    return cos, sin


def rotate(x_BHTD: Tensor, by: Rotation) -> Tensor:
    cos, sin = (part.to(x_BHTD.dtype) for part in by)
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.addcmul(x_BHTD * cos, torch.cat((second, first), dim=-1), sin)


class Attention(nn.Module):
    """Multi-head attention with rotary positions, over the tokens themselves or to a separate memory (latents).

    Args:
        memory_size: width of the memory's vectors; None for self-attention.
        causal: whether self-attention looks back only, through the config's window; otherwise it looks everywhere.
    """

    num_key_value_groups = 1  # read by the attention interface of transformers

    def __init__(self, config: PreTrainedConfig, layer_idx: int, memory_size: int | None = None, causal: bool = True):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.is_causal = causal and memory_size is None
        self.sliding_window = config.sliding_window if self.is_causal else None
        size = config.hidden_size
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(memory_size or size, size, bias=False)
        self.value = nn.Linear(memory_size or size, size, bias=False)
        self.output = nn.Linear(size, size, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)

    def self_attention(
        self,
        x: Float[Tensor, "batch time hidden"],
        positions: Rotation,
        mask: Tensor | Window | None,
        cache: Cache | None,
    ) -> Float[Tensor, "batch time hidden"]:
        query_BHTD = rotate(self._heads(self.query(x)), positions)
        key_BHTD = rotate(self._heads(self.key(x)), positions)
        value_BHTD = self._heads(self.value(x))
        if cache is not None:
            key_BHTD, value_BHTD = cache.update(key_BHTD, value_BHTD, self.layer_idx)
        return self._attend(query_BHTD, key_BHTD, value_BHTD, mask)

    def cross_attention(
        self,
        x: Float[Tensor, "batch time hidden"],
        memory: Float[Tensor, "batch latents size"],
        positions: Rotation,
        memory_positions: Rotation,
        cache: EncoderDecoderCache | None,
    ) -> Float[Tensor, "batch time hidden"]:
        """Queries from x, keys and values from memory; these stay in the cache, since memory does not change."""
        query_BHTD = rotate(self._heads(self.query(x)), positions)
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            key_BHND, value_BHND = layer.keys, layer.values
        else:
            memory = memory.to(x.dtype)
            key_BHND = rotate(self._heads(self.key(memory)), memory_positions)
            value_BHND = self._heads(self.value(memory))
            if cache is not None:
                key_BHND, value_BHND = cache.cross_attention_cache.update(key_BHND, value_BHND, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        return self._attend(query_BHTD, key_BHND, value_BHND, None)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Window | None) -> Tensor:
        dropout = self.config.dropout if self.training else 0.0
        few = query.device.type == "cpu" and key.shape[2] in _FEW_KEYS and query.shape[2] >= _MANY_QUERIES
        plain = mask is None and not dropout and self.config._attn_implementation == "sdpa"
        if few and plain and query.dtype in (torch.float32, torch.float64):
            weights = (query @ (key * self.head_size**-0.5).transpose(-1, -2)).softmax(-1)
            return self.output((weights @ value).transpose(1, 2).flatten(2))
        if isinstance(mask, Window):
            attended = windowed_attention(query, key, value, mask, scale=self.head_size**-0.5, dropout=dropout)
            return self.output(attended.flatten(2))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended_BTHD, _ = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=self.head_size**-0.5,
            sliding_window=self.sliding_window,
            is_causal=self.is_causal,
        )
        return self.output(attended_BTHD.flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(SiLU(gate(x)) · up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, size: int, inner_size: int):
        super().__init__()
        self.gate = nn.Linear(size, inner_size, bias=False)
        self.up = nn.Linear(size, inner_size, bias=False)
        self.down = nn.Linear(inner_size, size, bias=False)

    def forward(self, x: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "batch time hidden"]:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class TransformerBlock(GradientCheckpointingLayer):
    """Pre-norm block: x + self-attention, + attention to latents where there are any, + SwiGLU.

    Args:
        latent_size: width of this layer's latents; None for a block without them (the control's).
        causal: False for a block that looks both ways (an encoder's).
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, latent_size: int | None = None, causal: bool = True):
        super().__init__()
        self.self_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attention = Attention(config, layer_idx, causal=causal)
        if latent_size is not None:
            self.cross_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.cross_attention = Attention(config, layer_idx, memory_size=latent_size)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch time hidden"],
        positions: Rotation,
        mask: Tensor | Window | None,
        cache: Cache | None = None,
        latents: Float[Tensor, "batch latents size"] | None = None,
        latent_positions: Rotation | None = None,
        part: Part = "whole",
    ) -> Float[Tensor, "batch time hidden"]:
        if part != "rest":
            among_tokens = self.self_attention.self_attention(self.self_norm(x), positions, mask, self_cache(cache))
            x = x + self.dropout(among_tokens)
        if part == "tokens":
            return x
        if latents is not None and latent_positions is not None:
            of_latents = self.cross_attention.cross_attention(
                self.cross_norm(x), latents, positions, latent_positions, cache
            )
            x = x + self.dropout(of_latents)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


def self_cache(cache: Cache | None) -> Cache | None:
    """The part of a cache that holds tokens; an EncoderDecoderCache also holds latents."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
