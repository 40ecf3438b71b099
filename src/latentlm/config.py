"""The configs that every family's begins with: what training charges for the KL, and a Transformer's fields."""

import difflib
import math
from dataclasses import field, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from latentlm.errors import InputError, shown

_MOST_CYCLES = 10_000
# a slip of the hand; a billion layers would be built one by one before memory runs out
_LARGEST_COUNT = 2**24
_MOST_REPEATED = 10_000  # layers, steps
_LARGEST_NUMBER = 1e30  # beyond it float32 overflows
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
    "use_cache",  # which the Trainer sets, on families that have no cache, too
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


@strict
class TransformerConfig(LatentLMConfig):
    """Fields of a Transformer. Names follow transformers.

    Args:
        intermediate_size: width of the gated feed-forward layer; by default 8/3 of hidden_size, up to a multiple of 32.
        max_position_embeddings: the longest text, T, in tokens after BOS.
        sliding_window: tokens that self-attention sees, itself included; None for all.
        dropout: on attention weights and on what each sub-layer adds; training only.
        word_dropout: share of the tokens after BOS that are not seen while training; see the family.
    """

    hidden_size: int = 512
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    sliding_window: int | None = None
    dropout: float | int = 0.0
    word_dropout: float | int = 0.0
    rope_theta: float | int = 10000.0
    rms_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 32 * -(-8 * self.hidden_size // (3 * 32))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the validation of `@strict`."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for f in fields(self):
            value = getattr(self, f.name)
            most = _LARGEST_NUMBER if "float" in str(f.type) else _LARGEST_COUNT
            most = _MOST_REPEATED if f.name.endswith(("_layers", "_steps")) else most
            if isinstance(value, int | float) and most < value < math.inf and not f.name.endswith("_token_id"):
                raise ValueError(f"{f.name} must be at most {most}, not {shown(value)}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of twice num_attention_heads "
                f"({self.num_attention_heads}), since rotary positions turn pairs of numbers of each head"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, or null for none, not {self.sliding_window}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if not 0 <= self.word_dropout <= 1:
            raise ValueError(f"word_dropout must be between 0 and 1, not {self.word_dropout}")
