"""One file a family. Importing this package makes each known to AutoConfig and AutoModel."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin

from latentlm.families.autoregressive import Autoregressive, AutoregressiveConfig
from latentlm.families.gp_vae import GPVAE, GPVAEConfig
from latentlm.families.gpt_vae import GPTVAE, GPTVAEConfig
from latentlm.families.huggingface import HuggingFaceLM, HuggingFaceLMConfig
from latentlm.families.lang_vae import LangVAE, LangVAEConfig
from latentlm.families.ltm import LTM, LTMConfig

FAMILIES = {
    "ltm": LTM,
    "gp_vae": GPVAE,
    "gpt_vae": GPTVAE,
    "lang_vae": LangVAE,
    "autoregressive": Autoregressive,
    "huggingface": HuggingFaceLM,
}

for _family in FAMILIES.values():
    AutoConfig.register(_family.config_class.model_type, _family.config_class)
    AutoModel.register(_family.config_class, _family)
    if issubclass(_family, GenerationMixin):
        AutoModelForCausalLM.register(_family.config_class, _family)

__all__ = [
    "FAMILIES",
    "GPTVAE",
    "GPVAE",
    "LTM",
    "Autoregressive",
    "AutoregressiveConfig",
    "GPTVAEConfig",
    "GPVAEConfig",
    "HuggingFaceLM",
    "HuggingFaceLMConfig",
    "LTMConfig",
    "LangVAE",
    "LangVAEConfig",
]
