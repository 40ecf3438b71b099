"""The control: the families' own Transformer blocks without latents. Its likelihood is exact.

In the contract it is a model whose latent has no numbers: prior and posterior are the one distribution over a vector
of length 0, the KL is 0 and the ELBO is log p(x). So all that is written for latent models measures the control, too.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from latentlm.causal_lm import CausalConfig, CausalLatentLM, token_cache
from latentlm.layers import SeenMask, TransformerBlock, rotation
from latentlm.without_latents import WithoutLatents


@strict
class AutoregressiveConfig(CausalConfig):
    """A decoder-only Transformer language model; see `CausalConfig` for its fields.

    Args:
        memory_per_layer: learned vectors to which each layer attends as an LTM's layer does to its latents, at the same
            positions; 0 for none. An LTM whose latents say nothing is this model, not the one without memory: the
            vectors' fixed positions tell a short window how far into the text it is, and they add parameters.
        memory_size: width of such a vector; by default hidden_size.
    """

    model_type = "latentlm_autoregressive"

    memory_per_layer: int = 0
    memory_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.memory_size is None:
            self.memory_size = self.hidden_size
        super().__post_init__(**kwargs)

    def validate_memory(self) -> None:
        """Part of the validation of `@strict`."""
        if self.memory_per_layer < 0 or (self.memory_size is not None and self.memory_size < 1):
            raise ValueError("memory_per_layer must not be negative, and memory_size must be at least 1")
        if self.kl_target is not None:
            raise ValueError("kl_target steers a KL, and a model without latents has none: leave it out")


class Autoregressive(WithoutLatents, CausalLatentLM):
    """p(x) = Π_t p(x_t | x_<t)."""

    config: AutoregressiveConfig
    config_class = AutoregressiveConfig
    latent_dims = 1

    def __init__(self, config: AutoregressiveConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        size = config.memory_size if config.memory_per_layer else None
        self.layers = nn.ModuleList(
            TransformerBlock(config, index, latent_size=size) for index in range(config.num_hidden_layers)
        )
        if size is not None:
            self.memory = nn.Parameter(torch.empty(config.num_hidden_layers, config.memory_per_layer, size))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.memory_per_layer:
            nn.init.normal_(self.memory)  # as an LTM's latents from their prior

    def hidden_states(
        self,
        latents: Float[Tensor, "batch 0"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: SeenMask | None = None,
        position_ids: Int64[Tensor, "batch time"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "batch time hidden"]:
        x, mask, positions = self.read(input_ids, attention_mask, position_ids, past_key_values)
        memory, memory_positions = None, None
        if self.config.memory_per_layer:
            width = self.config.hidden_size // self.config.num_attention_heads
            memory_positions = rotation(self._spread(self.config.memory_per_layer), width, self.config.rope_theta)
        for index, layer in enumerate(self.layers):
            if self.config.memory_per_layer:
                memory = self.memory[index].expand(len(x), -1, -1)
            x = layer(x, positions, mask, past_key_values, memory, memory_positions)
        return self.norm(x)

    def new_cache(self) -> Cache:
        return self._beside_memory(token_cache(self.config))

    def static_cache(self, length: int) -> Cache:
        return self._beside_memory(StaticCache(self.config, length))

    def _beside_memory(self, tokens: Cache) -> Cache:
        return EncoderDecoderCache(tokens, DynamicCache()) if self.config.memory_per_layer else tokens
