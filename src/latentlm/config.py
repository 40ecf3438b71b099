"""The config that every family's begins with: what training charges for the KL, and how it changes."""

import difflib
import math
from dataclasses import field, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from latentlm.errors import InputError, shown

_MOST_CYCLES = 10_000
# what transformers itself hands to a configuration beside the fields
_TRANSFORMERS_KEYS = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "torch_dtype",
}


@strict
class LatentLMConfig(PreTrainedConfig):
    """Fields of every family.

    Args:
        vocab_size: number of tokens of the vocabulary.
        beta: weight of the KL in the training objective; 1 trains the ELBO. The next three let it change meanwhile.
        beta_warmup: fraction of training over which the weight rises linearly from 0 to `beta`.
        beta_cycles: cycles of the weight over training, each from 0 to `beta`; 0 for none.
        beta_cycle_ratios: shares of a cycle in which the weight is 0, rises linearly, and is `beta`.
        kl_target: nats per sequence to which a controller brings the KL by changing the weight at every step, up to
            `beta`, from a hundredth of it; see `schedules.controlled`. None for no controller.
        free_bits: nats that each part of the latent has for free in the training objective; see `objective.free_bits`.
        free_bits_per: that part: a "dimension", or a "latent" (a whole latent vector).
        kl_threshold: C in nats; the objective charges |KL − C| of each sequence for the KL. None charges the KL.
        latent_dropout: share of sequences that are decoded without their latent while training: all of its numbers are
            0, it keeps its place, and no KL is charged. So a decoder learns to do without, and latents of zeros ask
            it to.

    Raises:
        InputError: a key that is no field (transformers would keep it silently).
    """

    vocab_size: int = 50257
    beta: float | int = 1.0
    beta_warmup: float | int = 0.0
    beta_cycles: int = 0
    beta_cycle_ratios: list[float | int] = field(default_factory=lambda: [0.0, 0.5, 0.5])
    kl_target: float | int | None = None
    free_bits: float | int = 0.0
    free_bits_per: Literal["dimension", "latent"] = "dimension"
    kl_threshold: float | int | None = None
    latent_dropout: float | int = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        known = {field.name for field in fields(self)}
        for key in kwargs.keys() - _TRANSFORMERS_KEYS:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"its fields are {', '.join(sorted(known))}."
            raise InputError(f"{type(self).__name__} has no field {key!r}: {hint}")
        super().__post_init__(**kwargs)

    def validate_objective(self) -> None:
        """Part of the validation of `@strict`."""
        for name in ("beta", "free_bits"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, not {getattr(self, name)}")
        if not 0 <= self.beta_warmup <= 1:
            raise ValueError(f"beta_warmup is a fraction of training between 0 and 1, not {self.beta_warmup}")
        if not 0 <= self.beta_cycles <= _MOST_CYCLES:
            raise ValueError(f"beta_cycles must be a number from 0 to {_MOST_CYCLES}, not {shown(self.beta_cycles)}")
        ratios = self.beta_cycle_ratios
        if len(ratios) != 3 or not all(0 <= ratio <= 1 for ratio in ratios) or abs(sum(ratios) - 1) > 1e-6:
            raise ValueError(f"beta_cycle_ratios must be three shares of a cycle that sum to 1, not {ratios}")
        if ratios[0] == 1:
            raise ValueError("beta_cycle_ratios leave the weight at 0 for ever: give the other two a share")
        for name in ("kl_target", "kl_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, or null for none, not {value}")
        scheduled = {"beta_warmup": self.beta_warmup, "beta_cycles": self.beta_cycles, "kl_target": self.kl_target}
        if len(given := [name for name, value in scheduled.items() if value]) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are two schedules of beta: give one of them")
        if self.kl_target is not None and not self.beta:
            raise ValueError("kl_target changes the weight up to beta, so beta must be above 0")
        if self.free_bits and self.kl_threshold is not None:
            raise ValueError("free_bits and kl_threshold are two charges for the KL: give one of them")
        if not 0 <= self.latent_dropout < 1:
            raise ValueError(f"latent_dropout must be in [0, 1), not {self.latent_dropout}")
