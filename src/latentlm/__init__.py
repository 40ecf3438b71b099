"""latentlm: language models with a latent space, trained, measured honestly, steered and probed."""

from latentlm.config import LatentLMConfig
from latentlm.errors import InputError
from latentlm.families import (
    GPTVAE,
    GPVAE,
    LTM,
    Autoregressive,
    AutoregressiveConfig,
    GPTVAEConfig,
    GPVAEConfig,
    LangVAE,
    LangVAEConfig,
    LTMConfig,
)
from latentlm.latent_lm import LatentLM, LatentLMOutput
from latentlm.loading import load, save
from latentlm.publishing import push_to_hub

__version__ = "0.1.0"

__all__ = [
    "GPTVAE",
    "GPVAE",
    "LTM",
    "Autoregressive",
    "AutoregressiveConfig",
    "GPTVAEConfig",
    "GPVAEConfig",
    "InputError",
    "LTMConfig",
    "LangVAE",
    "LangVAEConfig",
    "LatentLM",
    "LatentLMConfig",
    "LatentLMOutput",
    "load",
    "push_to_hub",
    "save",
]
