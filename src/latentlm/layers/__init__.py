"""Layers that know nothing of what latents mean."""

from latentlm.layers.encoder import AttentionPooling, BidirectionalEncoder, FixedScaleBatchNorm, pool
from latentlm.layers.projection import token_log_likelihood
from latentlm.layers.transformer import TransformerBlock, rotation, self_cache

__all__ = [
    "AttentionPooling",
    "BidirectionalEncoder",
    "FixedScaleBatchNorm",
    "TransformerBlock",
    "pool",
    "rotation",
    "self_cache",
    "token_log_likelihood",
]
