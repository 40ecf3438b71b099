"""Layers that know nothing of what latents mean."""

from latentlm.layers.convolution import CausalBlock
from latentlm.layers.encoder import AttentionPooling, FixedScaleBatchNorm, TransformerEncoder, pool
from latentlm.layers.projection import logits_of_few, token_log_likelihood
from latentlm.layers.recomputation import recompute_layers
from latentlm.layers.transformer import Part, TransformerBlock, rotation, rotation_at, self_cache
from latentlm.layers.window import SeenMask, causal_mask

__all__ = [
    "AttentionPooling",
    "CausalBlock",
    "FixedScaleBatchNorm",
    "Part",
    "SeenMask",
    "TransformerBlock",
    "TransformerEncoder",
    "causal_mask",
    "logits_of_few",
    "pool",
    "recompute_layers",
    "rotation",
    "rotation_at",
    "self_cache",
    "token_log_likelihood",
]
