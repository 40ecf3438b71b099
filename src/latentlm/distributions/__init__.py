"""Distributions over latents and the noise that samples them."""

from latentlm.distributions.gaussian import (
    check_finite,
    diagonal_gaussian,
    kl_per_dimension,
    noise_shape,
    sample_from_noise,
    select_rows,
    standard_normal,
)
from latentlm.distributions.gaussian_process import ConditionalGaussianProcess, GaussianProcess
from latentlm.distributions.kernels import RBF, Kernel, Matern, Periodic, RationalQuadratic, White
from latentlm.distributions.noise import Stream, sequence_keys, sequence_noise
from latentlm.distributions.trajectories import (
    ContinuedTrajectory,
    DiagonalTrajectory,
    SitesPosterior,
    WhitenedGaussian,
)

__all__ = [
    "RBF",
    "ConditionalGaussianProcess",
    "ContinuedTrajectory",
    "DiagonalTrajectory",
    "GaussianProcess",
    "Kernel",
    "Matern",
    "Periodic",
    "RationalQuadratic",
    "SitesPosterior",
    "Stream",
    "White",
    "WhitenedGaussian",
    "check_finite",
    "diagonal_gaussian",
    "kl_per_dimension",
    "noise_shape",
    "sample_from_noise",
    "select_rows",
    "sequence_keys",
    "sequence_noise",
    "standard_normal",
]
