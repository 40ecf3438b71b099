"""Latent-Thought Language Models (Kong et al. 2025, arXiv 2502.01567).

p(z)      = N(0, I) over N_z vectors for each layer, z [layers, N_z, size]                  section 2.1
p(x | z)  = Π_t p(x_t | z, x_{t−w … t−1}), layer l of the decoder attending to its own z_l  eq. 1
q(z | x)  = N(μ, σ²) per sequence, by T steps of gradient ascent on the ELBO                eq. 5, Algorithm 1
"""

import math
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributions import Independent
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from latentlm.causal_lm import CausalConfig, CausalLatentLM, token_cache
from latentlm.distributions import standard_normal
from latentlm.errors import InputError
from latentlm.inference import infer_by_gradient
from latentlm.layers import DecoderBlock, rotation
from latentlm.schedules import linear


@strict
class LTMConfig(CausalConfig):
    """Latent-Thought Language Model.

    Args:
        latents_per_layer: N_z, latent vectors of each layer.
        latent_size: width of a latent vector; by default hidden_size, as in the paper.
        inference: how q(z | x) is found; "gradient" is the paper's.
        inference_steps: T_fast.
        inference_lr: Adam's rate on (μ, log σ²) at the beginning of training.
        inference_lr_final: the rate at the end of training; linear between (appendix A.2). None keeps it constant.
        inference_lr_decay: rate of an inference's last step as a fraction of its first; linear between, 1 for none.
        inference_epsilon: Adam's ε on (μ, log σ²), in nats per unit; see `infer_by_gradient`.
        inference_start: where the steps begin. "prior" is (0, 1); "fixed" is μ = 0 with `inference_start_log_variance`;
            "learned" is a parameter for each dimension, trained by the gradient at the final (μ, log σ²).
        inference_start_log_variance: log σ² of the "fixed" start, and what a "learned" start begins from.
    """

    model_type = "latentlm_ltm"

    latents_per_layer: int = 8
    latent_size: int | None = None
    inference: Literal["gradient"] = "gradient"
    inference_steps: int = 16
    inference_lr: float | int = 0.3
    inference_lr_final: float | int | None = 0.34
    inference_lr_decay: float | int = 1.0
    inference_epsilon: float | int = 1e-8
    inference_start: Literal["prior", "fixed", "learned"] = "prior"
    inference_start_log_variance: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.latent_size is None:
            self.latent_size = self.hidden_size
        super().__post_init__(**kwargs)

    def validate_latents(self) -> None:
        """Part of the validation of `@strict`."""
        for name, least in (("latents_per_layer", 1), ("latent_size", 1), ("inference_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 < self.inference_epsilon < math.inf:
            raise ValueError(f"inference_epsilon must be a number above 0, not {self.inference_epsilon}")
        for name in ("inference_lr", "inference_lr_final", "inference_lr_decay"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, not {getattr(self, name)}")
        if not math.isfinite(self.inference_start_log_variance):
            raise ValueError("inference_start_log_variance must be finite")

    @classmethod
    def preset(cls, size: Literal["small", "medium", "large"], **changes: Any) -> "LTMConfig":
        """The paper's LTM-Small, -Medium and -Large (section 3.1, appendix A): 3, 6, 12 layers; 16, 16, 64 steps."""
        layers, steps = {"small": (3, 16), "medium": (6, 16), "large": (12, 64)}[size]
        return cls(**{"num_hidden_layers": layers, "inference_steps": steps, **changes})


class LTM(CausalLatentLM):
    """Transformer decoder whose layer l attends to its own latents z_l [N_z, latent_size]."""

    config: LTMConfig
    config_class = LTMConfig
    latent_dims = 3

    def __init__(self, config: LTMConfig):
        super().__init__(config)
        assert config.latent_size is not None  # set by the config
        self.latent_shape = (config.num_hidden_layers, config.latents_per_layer, config.latent_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderBlock(config, index, latent_size=config.latent_size) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.inference_start == "learned":
            self.start_mean = nn.Parameter(torch.zeros(self.latent_shape))
            self.start_log_variance = nn.Parameter(torch.zeros(self.latent_shape))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.inference_start == "learned":
            nn.init.zeros_(self.start_mean)
            nn.init.constant_(self.start_log_variance, self.config.inference_start_log_variance)

    def prior(self, batch_size: int, lengths: int | Int64[Tensor, " batch"], condition: Any = None) -> Independent:
        return standard_normal(batch_size, self.latent_shape, self.device)

    def infer(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int = 0,
    ) -> Independent:
        mean, log_variance = self._start(len(input_ids))
        return infer_by_gradient(
            self,
            input_ids,
            attention_mask,
            condition,
            start_mean=mean,
            start_log_variance=log_variance,
            steps=self.config.inference_steps,
            learning_rate=self._inference_rate,
            epsilon=self.config.inference_epsilon,
            seed=seed,
            beta=self.beta if self.training else 1.0,
            nats_free_per_dimension=self.config.free_bits if self.training else 0.0,
        )

    def hidden_states(
        self,
        latents: Float[Tensor, "batch layers latents size"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch seen"] | None = None,
        position_ids: Int64[Tensor, "batch time"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "batch time hidden"]:
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise InputError(
                f"latents [batch, …] of shape {list(latents.shape)} must end in {list(self.latent_shape)}."
            )
        x = self.embed_tokens(input_ids)
        mask = self._mask(x, attention_mask, past_key_values)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, past_key_values)
        width = self.config.hidden_size // self.config.num_attention_heads
        positions = rotation(position_ids, width, self.config.rope_theta)
        latent_positions = rotation(self._latent_positions(x.device), width, self.config.rope_theta)
        for index, layer in enumerate(self.layers):
            x = layer(x, positions, mask, past_key_values, latents[:, index], latent_positions)
        return self.norm(x)

    def new_cache(self) -> Cache:
        return EncoderDecoderCache(token_cache(self.config), DynamicCache())

    def _latent_positions(self, device: torch.device) -> Float[Tensor, "1 latents"]:
        """Evenly spaced over the context, whatever this text's length: a prefix sees what the whole text saw."""
        number = self.config.latents_per_layer
        spacing = self.config.max_position_embeddings / number
        return (torch.arange(number, device=device)[None] + 0.5) * spacing

    def _start(self, batch_size: int) -> tuple[Tensor, Tensor]:
        shape = (batch_size, *self.latent_shape)
        if self.config.inference_start == "learned":
            return self.start_mean.expand(shape), self.start_log_variance.expand(shape)
        log_variance = self.config.inference_start_log_variance if self.config.inference_start == "fixed" else 0.0
        zeros = torch.zeros(shape, device=self.device)
        return zeros, zeros + log_variance

    def _inference_rate(self, step: int) -> float:
        config = self.config
        final = config.inference_lr if config.inference_lr_final is None else config.inference_lr_final
        rate = linear(float(self.training_progress), config.inference_lr, final)
        last = max(config.inference_steps - 1, 1)
        return rate * linear(step / last, 1.0, config.inference_lr_decay)
