"""GPT-VAE: the latent of a whole text as a token before its words (x-transformers' GPTVAE; Li et al. 2020, Optimus).

p(z)      = N(0, I), one vector z [latent_size]
p(x | z)  = Π_t p(x_t | BOS, z, x_<t), z as one or more tokens at the positions between BOS and the text
q(z | x)  = N(μ, σ²) from a bidirectional Transformer's states, pooled; or by gradient steps (see `VariationalConfig`)

Where we differ from the published code: β = 1 is the ELBO (there the reconstruction is a mean per token and the KL a
sum per sequence, so that its weight is T times larger), a dropped latent keeps its place and is not charged for.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from transformers.cache_utils import Cache, DynamicCache

from latentlm.causal_lm import CausalConfig, CausalLatentLM
from latentlm.distributions import standard_normal
from latentlm.errors import InputError
from latentlm.latent_lm import TrainingInference
from latentlm.layers import (
    AttentionPooling,
    SeenMask,
    TransformerBlock,
    TransformerEncoder,
    causal_mask,
    pool,
    rotation,
)
from latentlm.variational import VariationalConfig, VariationalLM


@strict
class GPTVAEConfig(CausalConfig, VariationalConfig):
    """GPT-VAE; see `CausalConfig` for the decoder's fields and `VariationalConfig` for those of inference.

    Args:
        latent_size: numbers of z.
        latent_tokens: how many tokens z becomes, by a linear map.
        pooling: how the encoder's states become one vector: their "mean", the "first" (BOS's), the "last" (EOS's, or
            where a text was cut), or "attention" with a learned query.
        sliding_window: None by default. A window limits what is seen of the text; z stays in sight.
    """

    model_type = "latentlm_gpt_vae"

    num_hidden_layers: int = 6
    sliding_window: int | None = None
    latent_size: int = 64
    latent_tokens: int = 1
    inference: Literal["gradient", "amortised", "cooperative", "langevin"] = "amortised"
    encoder_layers: int = 3
    pooling: Literal["mean", "first", "last", "attention"] = "mean"

    def validate_latents(self) -> None:
        """Part of the validation of `@strict`."""
        for name in ("latent_size", "latent_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class LogVariance(nn.Linear):
    """A linear map to log σ². A class, since transformers initialises modules by class."""


class TextEncoder(nn.Module):
    """q_φ(z | x): embeddings of its own, a bidirectional Transformer, pooling, and linear maps to μ and log σ²."""

    def __init__(self, config: GPTVAEConfig, latent_shape: tuple[int, ...]):
        super().__init__()
        self.how = config.pooling
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = TransformerEncoder(config, config.encoder_layers)
        if config.pooling == "attention":
            self.pooling = AttentionPooling(config, 1)
        self.mean = nn.Linear(config.hidden_size, config.latent_size)
        self.log_variance = LogVariance(config.hidden_size, config.latent_size)

    def forward(
        self, input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"] | None
    ) -> tuple[Float[Tensor, "batch size"], Float[Tensor, "batch size"]]:
        """μ and log σ²."""
        states = self.transformer(self.embed_tokens(input_ids), attention_mask)
        if self.how == "attention":
            pooled = self.pooling(states, attention_mask)[:, 0]
        else:
            pooled = pool(states, attention_mask, self.how)
        return self.mean(pooled).float(), self.log_variance(pooled).float()


class GPTVAE(CausalLatentLM, VariationalLM):
    """Transformer decoder that reads BOS, then z, then the text.

    `condition` is the text to infer z from where that is not the text to decode: a mapping with `input_ids`
    (BOS x_1 …) and, where there is padding, `attention_mask`; a row for each text that is decoded. So
    `model(texts, condition=others)` trains p(x | z) on z ~ q(z | others), and `generate(prompts, condition=others)`
    writes on from one text with the latent of another.
    """

    config: GPTVAEConfig
    config_class = GPTVAEConfig
    _supports_flash_attn = False  # its window would hide z

    def __init__(self, config: GPTVAEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.latent_tokens = nn.Linear(config.latent_size, config.latent_tokens * config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.add_inference(TextEncoder, (config.latent_size,))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LogVariance):
            nn.init.constant_(module.bias, self.config.inference_start_log_variance)

    def prior(self, batch_size: int, lengths: int | Int64[Tensor, " batch"], condition: Any = None) -> Independent:
        return standard_normal(batch_size, self.latent_shape, self.device)

    def infer(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int = 0,
    ) -> Distribution:
        return super().infer(*self._source(input_ids, attention_mask, condition), seed=seed)

    def infer_for_training(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int,
    ) -> TrainingInference:
        return super().infer_for_training(*self._source(input_ids, attention_mask, condition), seed=seed)

    def rows_of(self, condition: Any) -> int | None:
        return None if condition is None else len(self._checked(condition)["input_ids"])

    def tells_latent(self, condition: Any) -> bool:
        return condition is not None

    def encode(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> tuple[Float[Tensor, "batch size"], Float[Tensor, "batch size"]]:
        return self.encoder(input_ids, attention_mask)

    def hidden_states(
        self,
        latents: Float[Tensor, "batch size"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: SeenMask | None = None,
        position_ids: Int64[Tensor, "batch time"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "batch time hidden"]:
        self.check_latent_shape(latents)
        number = self.config.latent_tokens
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()  # z's tokens among them
        x = self.embedded(input_ids)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, max(seen - number, 0))
        position_ids = position_ids + number * (position_ids > 0)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask.new_ones(len(x), number), attention_mask), dim=1)
        if not seen:
            # in memory z stands first: padding may come before BOS, and BOS must see z to foretell the first word
            x = torch.cat((self.latent_tokens(latents.to(x.dtype)).unflatten(1, (number, -1)), x), dim=1)
            between = torch.arange(1, number + 1, device=x.device).expand(len(position_ids), -1)
            position_ids = torch.cat((between, position_ids), dim=1)
        mask = causal_mask(self.config, x, attention_mask, past_key_values, always_seen=number)
        width = self.config.hidden_size // self.config.num_attention_heads
        positions = rotation(position_ids, width, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, positions, mask, past_key_values)
        return self.norm(x if seen else x[:, number:])

    def new_cache(self) -> Cache:
        return DynamicCache()  # whole, since one of a window would forget z

    def _source(self, input_ids: Tensor, attention_mask: Tensor | None, condition: Any) -> tuple[Tensor, Tensor | None]:
        """The text to infer z from."""
        if condition is None:
            return input_ids, attention_mask
        condition = self._checked(condition)
        if len(condition["input_ids"]) != len(input_ids):
            raise InputError(
                f"{len(condition['input_ids'])} texts to infer z from do not fit {len(input_ids)} to decode: "
                "give one for each."
            )
        return condition["input_ids"], condition.get("attention_mask")

    def _checked(self, condition: Any) -> Mapping[str, Tensor]:
        ids = condition.get("input_ids") if isinstance(condition, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise InputError("condition is the text to infer z from: give a mapping with input_ids [batch, time].")
        if unknown := sorted(condition.keys() - {"input_ids", "attention_mask"}):
            raise InputError(f"a condition has input_ids and attention_mask, and no {unknown[0]!r}.")
        mask = condition.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise InputError(f"the condition's attention_mask must be a tensor, not a {type(mask).__name__}.")
        self.check_text(ids, mask, "the condition's input_ids")
        return condition
