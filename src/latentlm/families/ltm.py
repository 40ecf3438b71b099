"""Latent-Thought Language Models (Kong et al. 2025, arXiv 2502.01567).

p(z)      = N(0, I) over N_z vectors for each layer, z [layers, N_z, size]                  section 2.1
p(x | z)  = Π_t p(x_t | z, x_{t−w … t−1}), layer l of the decoder attending to its own z_l  eq. 1
q(z | x)  = N(μ, σ²) per sequence, by T steps of gradient ascent on the ELBO                eq. 5, Algorithm 1

Beyond the paper's own: q from an encoder (amortised), or from an encoder and a few steps (cooperative); a prior with a
learned mean and variance, or z = f(z_0) by a Transformer; weights trained on Langevin samples (eq. 4).
"""

import math
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, kl_divergence
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from latentlm.causal_lm import CausalConfig, CausalLatentLM, Read, token_cache
from latentlm.distributions import (
    Stream,
    diagonal_gaussian,
    sample_from_noise,
    sequence_keys,
    sequence_noise,
    standard_normal,
)
from latentlm.layers import (
    AttentionPooling,
    Part,
    SeenMask,
    TransformerBlock,
    TransformerEncoder,
    rotation,
    rotation_at,
)
from latentlm.objective import elbo
from latentlm.variational import VariationalConfig, VariationalLM


@strict
class LTMConfig(CausalConfig, VariationalConfig):
    """Latent-Thought Language Model.

    The defaults of its inference are those of our study (docs/results.md, recipes/sweeps/ltm-inference.yaml); the
    paper's own are in `preset`.

    Args:
        latents_per_layer: N_z, latent vectors of each layer.
        latent_size: width of a latent vector; by default hidden_size, as in the paper.
        shared_latents: one set of N_z vectors to which every layer attends, instead of one for each layer.
        latent_prior: "standard" is N(0, I); "diagonal" is N(m, s²) with learned m and s for each number; "transformer"
            puts z_0 ~ N(0, I) through a learned Transformer over the latents, z = f(z_0), and the layers attend to z.
            The model's latent is then z_0: p(x) = ∫ N(z_0; 0, I) p(x | f(z_0)) dz_0 needs no density of z, and every
            bound is the ordinary one.
        prior_layers: of that Transformer.
        inference: "gradient" is the paper's; see `VariationalConfig` for it and the fields beside it. An encoder reads
            the decoder's embeddings and does not train them.
    """

    model_type = "latentlm_ltm"

    latents_per_layer: int = 8
    latent_size: int | None = None
    shared_latents: bool = False
    latent_prior: Literal["standard", "diagonal", "transformer"] = "standard"
    prior_layers: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.latent_size is None:
            self.latent_size = self.hidden_size
        super().__post_init__(**kwargs)

    def validate_latents(self) -> None:
        """Part of the validation of `@strict`."""
        for name in ("latents_per_layer", "latent_size", "prior_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @classmethod
    def preset(cls, size: Literal["small", "medium", "large"], **changes: Any) -> "LTMConfig":
        """The paper's LTM-Small, -Medium and -Large (section 3.1, appendix A): 3, 6, 12 layers; 16, 16, 64 steps.

        With the paper's fast rates, which our study found worse than the defaults (docs/results.md).
        """
        layers, steps = {"small": (3, 16), "medium": (6, 16), "large": (12, 64)}[size]
        rates = {"inference_lr": 0.3, "inference_lr_final": 0.34, "inference_lr_decay": 1.0, "inference_epsilon": 1e-8}
        return cls(**{"num_hidden_layers": layers, "inference_steps": steps, **rates, **changes})


class FromZero(nn.Linear):
    """A linear map that begins at 0. A class, since transformers initialises modules that hold parameters, by class."""


class LatentEncoder(nn.Module):
    """q_φ(z | x): a bidirectional Transformer, a learned query for each latent vector, and its μ and log σ².

    The paper's VAE (section 2.2, Table 4) has one, and its "cooperative scheme", left open, needs one.
    """

    def __init__(self, config: LTMConfig, latent_shape: tuple[int, ...]):
        super().__init__()
        assert config.latent_size is not None
        self.latent_shape = latent_shape
        self.transformer = TransformerEncoder(config, config.encoder_layers)
        self.pooling = AttentionPooling(config, math.prod(latent_shape[:-1]))
        self.moments = FromZero(config.hidden_size, 2 * config.latent_size, bias=False)  # at first no text moves q
        self.mean = nn.Parameter(torch.zeros(config.latent_size))
        self.log_variance = nn.Parameter(torch.zeros(config.latent_size))

    def forward(
        self, x: Float[Tensor, "batch time hidden"], attention_mask: Int64[Tensor, "batch time"] | None
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
        """μ and log σ²."""
        pooled = self.pooling(self.transformer(x, attention_mask), attention_mask)
        moments = self.moments(pooled).float().unflatten(1, self.latent_shape[:-1])
        mean, log_variance = moments.chunk(2, dim=-1)
        return mean + self.mean, log_variance + self.log_variance


class LatentTransformer(nn.Module):
    """z = f_α(z_0), the "neural transport" of section 2.1: a Transformer over the latents, at first the identity."""

    def __init__(self, config: LTMConfig, latent_shape: tuple[int, ...]):
        super().__init__()
        assert config.latent_size is not None
        self.input = nn.Linear(config.latent_size, config.hidden_size)
        self.places = nn.Embedding(math.prod(latent_shape[:-1]), config.hidden_size)
        self.transformer = TransformerEncoder(config, config.prior_layers)
        self.output = FromZero(config.hidden_size, config.latent_size)

    def forward(self, latents: Float[Tensor, "batch layers latents size"]) -> Tensor:
        flat = latents.to(self.input.weight.dtype).flatten(1, 2)
        x = self.transformer(self.input(flat) + self.places.weight)
        return (flat + self.output(x)).view_as(latents)


class LTM(CausalLatentLM, VariationalLM):
    """Transformer decoder whose layer l attends to its own latents z_l [N_z, latent_size]."""

    config: LTMConfig
    config_class = LTMConfig
    latent_dims = 3
    encoder_weights = (*VariationalLM.encoder_alone, "embed_tokens.")

    def __init__(self, config: LTMConfig):
        super().__init__(config)
        assert config.latent_size is not None  # set by the config
        sets = 1 if config.shared_latents else config.num_hidden_layers
        latent_shape = (sets, config.latents_per_layer, config.latent_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransformerBlock(config, index, latent_size=config.latent_size) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.latent_prior == "diagonal":
            self.prior_mean = nn.Parameter(torch.zeros(latent_shape))
            self.prior_log_variance = nn.Parameter(torch.zeros(latent_shape))
        if config.latent_prior == "transformer":
            self.latent_transformer = LatentTransformer(config, latent_shape)
        self.add_inference(LatentEncoder, latent_shape)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.latent_prior == "diagonal":
            nn.init.zeros_(self.prior_mean)
            nn.init.zeros_(self.prior_log_variance)
        elif isinstance(module, LatentEncoder):
            nn.init.zeros_(module.mean)
            nn.init.constant_(module.log_variance, self.config.inference_start_log_variance)
        elif isinstance(module, FromZero):
            nn.init.zeros_(module.weight)

    def prior(self, batch_size: int, lengths: int | Int64[Tensor, " batch"], condition: Any = None) -> Independent:
        if self.config.latent_prior != "diagonal":
            return standard_normal(batch_size, self.latent_shape, self.device)
        shape = (batch_size, *self.latent_shape)
        return diagonal_gaussian(self.prior_mean.expand(shape), self.prior_log_variance.expand(shape))

    def encode(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
        return self.encoder(self.embed_tokens(input_ids).detach(), attention_mask)

    def published_elbo(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        *,
        seed: int = 0,
    ) -> Float[Tensor, " batch"]:
        """What the published code calls the ELBO, in nats per sequence: **no bound**, for comparison with its figures.

        One noise serves all fast steps and the score, so q learns how to answer that one draw.
        """
        start = self._start(input_ids, attention_mask, None)
        posterior: Distribution = diagonal_gaussian(*start)
        if self.config.inference != "amortised":
            posterior = self._refine(start, input_ids, attention_mask, None, seed=seed, renew_noise=False)
        keys = sequence_keys(input_ids, attention_mask)
        noise = sequence_noise(keys, self.latent_shape, seed=seed, stream=Stream.INFERENCE)
        log_likelihood = self.log_likelihood(sample_from_noise(posterior, noise), input_ids, attention_mask).sum(-1)
        return elbo(log_likelihood, kl_divergence(posterior, self.prior(len(input_ids), 1)))

    def hidden_states(
        self,
        latents: Float[Tensor, "batch layers latents size"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: SeenMask | None = None,
        position_ids: Int64[Tensor, "batch time"] | None = None,
        past_key_values: Cache | None = None,
        before: Read | None = None,
        at: Int64[Tensor, "batch number"] | None = None,
    ) -> Float[Tensor, "batch wanted hidden"]:
        self.check_latent_shape(latents)
        x, mask, positions = before or self.read(input_ids, attention_mask, position_ids, past_key_values)
        width = self.config.hidden_size // self.config.num_attention_heads
        latent_positions = rotation(self._spread(self.config.latents_per_layer), width, self.config.rope_theta)
        if self.config.latent_prior == "transformer" and not _holds_latents(past_key_values):
            latents = self.latent_transformer(latents)
        for index, layer in enumerate(self.layers):
            own = latents[:, 0 if self.config.shared_latents else index]
            part: Part = "whole" if index or before is None else "rest"
            if at is not None and index == len(self.layers) - 1:
                # no token sees another from here on, so those alone go on of which the states are wanted
                x = layer(x, positions, mask, past_key_values, part="tokens") if part == "whole" else x
                x, positions, part = x.take_along_dim(at[..., None], 1), rotation_at(positions, at), "rest"
            x = layer(x, positions, mask, past_key_values, own, latent_positions, part=part)
        return self.norm(x)

    def before_latents(
        self, input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"] | None = None
    ) -> Read:
        """The first layer's attention among the tokens is done before its latents are read."""
        x, mask, positions = self.read(input_ids, attention_mask)
        return Read(self.layers[0](x, positions, mask, part="tokens"), mask, positions)

    def new_cache(self) -> Cache:
        return EncoderDecoderCache(token_cache(self.config), DynamicCache())

    def static_cache(self, length: int) -> Cache:
        return EncoderDecoderCache(StaticCache(self.config, length), DynamicCache())


def _holds_latents(cache: Cache | None) -> bool:
    """Whether the latents' keys and values are in the cache already, so that a step needs no latents."""
    return isinstance(cache, EncoderDecoderCache) and bool(cache.is_updated.get(0))
