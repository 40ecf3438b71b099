"""The control: the families' own Transformer blocks without latents. Its likelihood is exact.

In the contract it is a model whose latent has no numbers: prior and posterior are the one distribution over a vector
of length 0, the KL is 0 and the ELBO is log p(x). So all that is written for latent models measures the control, too.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributions import Independent
from transformers.cache_utils import Cache

from latentlm.causal_lm import CausalConfig, CausalLatentLM, token_cache
from latentlm.distributions import standard_normal
from latentlm.layers import DecoderBlock, rotation


@strict
class AutoregressiveConfig(CausalConfig):
    """A decoder-only Transformer language model; see `CausalConfig` for its fields."""

    model_type = "latentlm_autoregressive"


class Autoregressive(CausalLatentLM):
    """p(x) = Π_t p(x_t | x_<t)."""

    config: AutoregressiveConfig
    config_class = AutoregressiveConfig
    exact = True
    latent_dims = 1

    def __init__(self, config: AutoregressiveConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prior(self, batch_size: int, lengths: int | Int64[Tensor, " batch"], condition: Any = None) -> Independent:
        return standard_normal(batch_size, (0,), self.device)

    def infer(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int = 0,
    ) -> Independent:
        return standard_normal(len(input_ids), (0,), self.device)

    def hidden_states(
        self,
        latents: Float[Tensor, "batch 0"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch seen"] | None = None,
        position_ids: Int64[Tensor, "batch time"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "batch time hidden"]:
        x = self.embed_tokens(input_ids)
        mask = self._mask(x, attention_mask, past_key_values)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, past_key_values)
        width = self.config.hidden_size // self.config.num_attention_heads
        positions = rotation(position_ids, width, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, positions, mask, past_key_values)
        return self.norm(x)

    def new_cache(self) -> Cache:
        return token_cache(self.config)
