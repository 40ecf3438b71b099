"""Layers that know nothing of what latents mean."""

from latentlm.layers.projection import token_log_likelihood
from latentlm.layers.transformer import DecoderBlock, rotation, self_cache

__all__ = ["DecoderBlock", "rotation", "self_cache", "token_log_likelihood"]
