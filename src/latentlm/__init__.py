"""latentlm: language models with a latent space, trained, measured honestly, steered and probed."""

from latentlm.errors import InputError
from latentlm.families import LTM, Autoregressive, AutoregressiveConfig, LTMConfig
from latentlm.latent_lm import LatentLM, LatentLMConfig, LatentLMOutput
from latentlm.loading import load, save

__version__ = "0.1.0"

__all__ = [
    "LTM",
    "Autoregressive",
    "AutoregressiveConfig",
    "InputError",
    "LTMConfig",
    "LatentLM",
    "LatentLMConfig",
    "LatentLMOutput",
    "load",
    "save",
]
