"""Layers that know nothing of what latents mean."""

from latentlm.layers.convolution import CausalBlock
from latentlm.layers.encoder import AttentionPooling, FixedScaleBatchNorm, TransformerEncoder, pool
from latentlm.layers.projection import token_log_likelihood
from latentlm.layers.transformer import TransformerBlock, rotation, self_cache
from latentlm.layers.window import causal_mask

__all__ = [
    "AttentionPooling",
    "CausalBlock",
    "FixedScaleBatchNorm",
    "TransformerBlock",
    "TransformerEncoder",
    "causal_mask",
    "pool",
    "rotation",
    "self_cache",
    "token_log_likelihood",
]
