"""A causal language model of transformers by itself: p(x) = Π_t p(x_t | x_<t), exact.

What is saved is the plain model of transformers, which `AutoModelForCausalLM` loads; and any such model is loaded as
this family, so that it stands on the same yardstick, as a control or as the decoder of a LangVAE.
"""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from latentlm.config import LatentLMConfig
from latentlm.errors import InputError, one_sentence
from latentlm.files import write_checksums
from latentlm.hosted_lm import HostedLM
from latentlm.latent_lm import WEIGHTS
from latentlm.pretrained import load_decoder
from latentlm.without_latents import WithoutLatents

_PREFIX = "language_model."


@strict
class HuggingFaceLMConfig(LatentLMConfig):
    """A model of transformers; the fields of schedules and of the KL say nothing here.

    Args:
        architecture: transformers' model_type of a causal language model, such as "gpt2", "llama" or "qwen3".
        architecture_fields: fields of that architecture's config. Vocabulary, ends of text and context are filled in.
        max_position_embeddings: the longest text, T, in tokens after BOS.
    """

    model_type = "latentlm_huggingface"

    architecture: str = "gpt2"
    architecture_fields: dict[str, Any] = field(default_factory=dict)
    max_position_embeddings: int = 1024

    def validate_architecture(self) -> None:
        """Part of the validation of `@strict`."""
        if self.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(f"architecture must be transformers' name of a causal model, not {self.architecture}")
        if self.max_position_embeddings < 1:
            raise ValueError(f"max_position_embeddings must be at least 1, not {self.max_position_embeddings}")
        if self.kl_target is not None:
            raise ValueError("kl_target steers a KL, and a model without latents has none: leave it out")
        self.of_transformers()

    def of_transformers(self) -> Any:
        """The architecture's own config.

        Raises:
            ValueError: a field that it lacks, or a value that it does not take.
        """
        ends = {name: getattr(self, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        given = {f"{name}_token_id": value for name, value in ends.items() if value is not None}
        given |= {"vocab_size": self.vocab_size, "max_position_embeddings": self.max_position_embeddings}
        kind = CONFIG_MAPPING[self.architecture]
        known = {*getattr(kind, "__dataclass_fields__", {}), *getattr(kind, "attribute_map", {})}
        for name in self.architecture_fields:
            if known and name not in known:
                raise ValueError(f"architecture_fields has {name}, which a config of {self.architecture} lacks")
        try:
            return kind(**{**given, **self.architecture_fields})
        except Exception as error:  # strict configs raise their own kinds
            raise ValueError(f"architecture_fields: {one_sentence(error)}") from error


class HuggingFaceLM(WithoutLatents, HostedLM):
    """A causal language model of transformers, with a latent of no numbers."""

    config: HuggingFaceLMConfig
    config_class = HuggingFaceLMConfig

    def __init__(self, config: HuggingFaceLMConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.post_init()
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.of_transformers())

    @classmethod
    def of(cls, path: str | Path, revision: str | None = None) -> "HuggingFaceLM":
        """A causal language model of transformers in a folder or under a hub name, in evaluation mode.

        Raises:
            InputError: there is none.
        """
        language_model = load_decoder(str(path), revision).requires_grad_(True)
        own = language_model.config
        longest = getattr(own, "max_position_embeddings", None)
        if longest is None:
            raise InputError(f"{path}: its config names no max_position_embeddings, its longest text.")
        config = HuggingFaceLMConfig(
            architecture=own.model_type,
            vocab_size=own.vocab_size,
            max_position_embeddings=longest,
            bos_token_id=own.bos_token_id if own.bos_token_id is not None else own.eos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )
        return cls(config, language_model).eval()

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Writes the plain model of transformers."""
        weights = kwargs.pop("state_dict", None) or self.state_dict()
        plain = {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}
        self.language_model.save_pretrained(save_directory, is_main_process=is_main_process, state_dict=plain, **kwargs)
        if is_main_process:
            write_checksums(save_directory, WEIGHTS)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes the plain model's names, as they are saved, beside our own."""
        ours = self.state_dict().keys()
        named = {name if name in ours else _PREFIX + name: value for name, value in state_dict.items()}
        return super().load_state_dict(named, strict=strict, assign=assign)
