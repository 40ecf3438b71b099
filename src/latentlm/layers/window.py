"""Causal attention through a sliding window, block by block: what lies outside of the window is not computed.

Scores of all pairs of tokens cost T² products, of which a window of w shows T · w. Queries of a block of b ≥ w tokens
look at their own block and the one before it alone, so T · 2b are computed: products of whole blocks, which any device
does at its full speed.

B batch · N blocks · R = B · (N − 1) · H heads · T tokens of a block · D width of a head.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

#: which tokens of the text and of the cache are real; or, made of that for a static cache, which of it each token sees
SeenMask = Int64[Tensor, "batch seen"] | Shaped[Tensor, "batch 1 _time _cached"]

_LEAST_BLOCK = 16  # below it the calls cost more than the products
_LEAST_BLOCKS = 4  # of a text; with fewer, what is saved is less than what cutting costs


@dataclass(frozen=True)
class Window:
    """The mask of a whole text of which each token sees the last few, itself included, and no padding.

    Of the first block to itself, and of each later one to the one before and itself; a single one for all blocks where
    there is no padding.
    """

    block: int
    first: Bool[Tensor, "_rows 1 block block"]
    later: Bool[Tensor, "_rows 1 block two_blocks"]

    @classmethod
    def of(
        cls, size: int, length: int, device: torch.device, attention_mask: Int64[Tensor, "batch time"] | None = None
    ) -> "Window":
        block = max(size, _LEAST_BLOCK)
        query = torch.arange(block, device=device)[:, None] + block
        key = torch.arange(2 * block, device=device)
        seen = ((key <= query) & (key > query - size))[None, None]
        if attention_mask is None:
            return cls(block, seen[..., block:], seen)
        real = pad(attention_mask.bool(), (0, -length % block)).unflatten(1, (-1, block))
        both = torch.cat((real[:, :-1], real[:, 1:]), -1).flatten(0, 1)[:, None, None]
        # padding sees itself, so that no row is without a key: it would be no number, and spoil the gradients
        itself = key == query
        first = seen[..., block:] & (real[:, 0, None, None] | itself[:, block:])
        return cls(block, first, seen & (both | itself))


def causal_mask(
    config: PreTrainedConfig,
    x: Float[Tensor, "batch time hidden"],
    attention_mask: SeenMask | None = None,
    past_key_values: Any = None,
    always_seen: int = 0,
) -> Any:
    """The mask of causal attention, by the config's window, as `Attention` takes it.

    Args:
        always_seen: how many of the first vectors stay in sight of the window.
    """
    size, given = config.sliding_window, {"attention_mask": attention_mask, "past_key_values": past_key_values}
    if size is None:
        return create_causal_mask(config=config, inputs_embeds=x, **given)
    whole = past_key_values is None and not always_seen and config._attn_implementation == "sdpa"
    if whole and x.shape[1] >= _LEAST_BLOCKS * max(size, _LEAST_BLOCK):
        return Window.of(size, x.shape[1], x.device, attention_mask)
    if always_seen:

        def or_mask_function(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (key < always_seen) & (key <= query)

        given["or_mask_function"] = or_mask_function
    return create_sliding_window_causal_mask(config=config, inputs_embeds=x, **given)


def windowed_attention(
    query: Float[Tensor, "batch heads time width"],
    key: Float[Tensor, "batch heads time width"],
    value: Float[Tensor, "batch heads time width"],
    window: Window,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "batch time heads width"]:
    """softmax(scale · q kᵀ) v over the keys that the window shows."""
    length, block = query.shape[2], window.block
    # padded at the end, where it is in the future of every query that is kept
    query_BNTHD, *rest = (
        pad(x, (0, 0, 0, -length % block)).transpose(1, 2).unflatten(1, (-1, block)) for x in (query, key, value)
    )
    attend = partial(scaled_dot_product_attention, scale=scale, dropout_p=dropout)
    key_BHTD, value_BHTD = (x[:, 0].transpose(1, 2) for x in rest)
    first = attend(query_BNTHD[:, 0].transpose(1, 2), key_BHTD, value_BHTD, window.first)
    # each later block is a row of its own, beside the block before it
    key_RHTD, value_RHTD = (torch.cat((x[:, :-1], x[:, 1:]), 2).flatten(0, 1).transpose(1, 2) for x in rest)
    later = attend(query_BNTHD[:, 1:].flatten(0, 1).transpose(1, 2), key_RHTD, value_RHTD, window.later)
    later_BNTHD = later.transpose(1, 2).unflatten(0, (len(query), -1))
    return torch.cat((first.transpose(1, 2)[:, None], later_BNTHD), 1).flatten(1, 2)[:, :length]
