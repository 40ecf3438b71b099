"""Distributions over latents and the noise that samples them."""

from latentlm.distributions.gaussian import (
    diagonal_gaussian,
    kl_per_dimension,
    sample_from_noise,
    select_rows,
    standard_normal,
)
from latentlm.distributions.noise import Stream, sequence_keys, sequence_noise

__all__ = [
    "Stream",
    "diagonal_gaussian",
    "kl_per_dimension",
    "sample_from_noise",
    "select_rows",
    "sequence_keys",
    "sequence_noise",
    "standard_normal",
]
