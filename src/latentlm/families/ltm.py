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
from torch.distributions import Independent, kl_divergence
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from latentlm.causal_lm import CausalConfig, CausalLatentLM, token_cache
from latentlm.distributions import (
    Stream,
    diagonal_gaussian,
    sample_from_noise,
    sequence_keys,
    sequence_noise,
    standard_normal,
)
from latentlm.errors import InputError
from latentlm.inference import infer_by_gradient, langevin
from latentlm.latent_lm import TrainingInference
from latentlm.layers import AttentionPooling, BidirectionalEncoder, TransformerBlock, rotation
from latentlm.objective import elbo
from latentlm.schedules import linear


@strict
class LTMConfig(CausalConfig):
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
        inference: how q(z | x) is found. "gradient" is the paper's; "amortised" reads it off an encoder; "cooperative"
            takes `inference_steps` gradient steps from the encoder's q, and the encoder learns from its own ELBO and
            from where the steps led; "langevin" trains the weights on samples of `langevin_steps` and infers by
            gradient for everything else, since such samples have no density; β and free bits do not enter.
        encoder_layers: of the encoder's Transformer, which reads the decoder's embeddings and does not train them.
        inference_steps: T_fast.
        inference_lr: Adam's rate on (μ, log σ²) at the beginning of training.
        inference_lr_final: the rate at the end of training; linear between (appendix A.2). None keeps it constant.
        inference_lr_decay: rate of an inference's last step as a fraction of its first; linear between, 1 for none.
        inference_epsilon: Adam's ε on (μ, log σ²), in nats per unit; see `infer_by_gradient`.
        inference_start: where gradient steps begin that have no encoder. "prior" is the prior's mean and variance;
            "fixed" is μ = 0 with `inference_start_log_variance`; "learned" is a parameter for each dimension, trained
            by the gradient at the final (μ, log σ²).
        inference_start_log_variance: log σ² of the "fixed" start, and what a "learned" start and an encoder begin from.
        langevin_steps, langevin_step_size, langevin_temperature: see `inference.langevin`.
    """

    model_type = "latentlm_ltm"

    latents_per_layer: int = 8
    latent_size: int | None = None
    shared_latents: bool = False
    latent_prior: Literal["standard", "diagonal", "transformer"] = "standard"
    prior_layers: int = 2
    encoder_layers: int = 2
    inference: Literal["gradient", "amortised", "cooperative", "langevin"] = "gradient"
    inference_steps: int = 4
    inference_lr: float | int = 0.5
    inference_lr_final: float | int | None = None
    inference_lr_decay: float | int = 0.2
    inference_epsilon: float | int = 0.3
    inference_start: Literal["prior", "fixed", "learned"] = "prior"
    inference_start_log_variance: float | int = 0.0
    langevin_steps: int = 16
    langevin_step_size: float | int = 0.05
    langevin_temperature: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.latent_size is None:
            self.latent_size = self.hidden_size
        super().__post_init__(**kwargs)

    def validate_latents(self) -> None:
        """Part of the validation of `@strict`."""
        for name, least in (
            ("latents_per_layer", 1),
            ("latent_size", 1),
            ("prior_layers", 1),
            ("encoder_layers", 1),
            ("inference_steps", 0),
            ("langevin_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("inference_epsilon", "langevin_step_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)}")
        for name in ("inference_lr", "inference_lr_final", "inference_lr_decay", "langevin_temperature"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, not {getattr(self, name)}")
        if self.inference == "langevin" and self.inference_start == "learned":
            raise ValueError("inference langevin trains no start: set inference_start to prior or fixed")
        if not math.isfinite(self.inference_start_log_variance):
            raise ValueError("inference_start_log_variance must be finite")

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
        self.transformer = BidirectionalEncoder(config, config.encoder_layers)
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
        self.transformer = BidirectionalEncoder(config, config.prior_layers)
        self.output = FromZero(config.hidden_size, config.latent_size)

    def forward(self, latents: Float[Tensor, "batch layers latents size"]) -> Tensor:
        flat = latents.to(self.input.weight.dtype).flatten(1, 2)
        x = self.transformer(self.input(flat) + self.places.weight)
        return (flat + self.output(x)).view_as(latents)


class LTM(CausalLatentLM):
    """Transformer decoder whose layer l attends to its own latents z_l [N_z, latent_size]."""

    config: LTMConfig
    config_class = LTMConfig
    latent_dims = 3

    def __init__(self, config: LTMConfig):
        super().__init__(config)
        assert config.latent_size is not None  # set by the config
        sets = 1 if config.shared_latents else config.num_hidden_layers
        self.latent_shape = (sets, config.latents_per_layer, config.latent_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransformerBlock(config, index, latent_size=config.latent_size) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.latent_prior == "diagonal":
            self.prior_mean = nn.Parameter(torch.zeros(self.latent_shape))
            self.prior_log_variance = nn.Parameter(torch.zeros(self.latent_shape))
        if config.latent_prior == "transformer":
            self.latent_transformer = LatentTransformer(config, self.latent_shape)
        if config.inference in ("amortised", "cooperative"):
            self.encoder = LatentEncoder(config, self.latent_shape)
        elif config.inference_start == "learned":
            self.start_mean = nn.Parameter(torch.zeros(self.latent_shape))
            self.start_log_variance = nn.Parameter(torch.zeros(self.latent_shape))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        start = self.config.inference_start_log_variance
        if module is self:
            for name, value in (("prior_mean", 0), ("prior_log_variance", 0), ("start_mean", 0)):
                if hasattr(self, name):
                    nn.init.constant_(getattr(self, name), value)
            if hasattr(self, "start_log_variance"):
                nn.init.constant_(self.start_log_variance, start)
        elif isinstance(module, LatentEncoder):
            nn.init.zeros_(module.mean)
            nn.init.constant_(module.log_variance, start)
        elif isinstance(module, FromZero):
            nn.init.zeros_(module.weight)

    def prior(self, batch_size: int, lengths: int | Int64[Tensor, " batch"], condition: Any = None) -> Independent:
        if self.config.latent_prior != "diagonal":
            return standard_normal(batch_size, self.latent_shape, self.device)
        shape = (batch_size, *self.latent_shape)
        return diagonal_gaussian(self.prior_mean.expand(shape), self.prior_log_variance.expand(shape))

    def infer(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int = 0,
    ) -> Independent:
        start = self._start(input_ids, attention_mask)
        if self.config.inference == "amortised":
            return diagonal_gaussian(*start)
        return self._refine(start, input_ids, attention_mask, condition, seed=seed)

    def infer_for_training(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int,
    ) -> TrainingInference:
        config = self.config
        if config.inference == "langevin":
            latents = langevin(
                self,
                input_ids,
                attention_mask,
                condition,
                steps=config.langevin_steps,
                step_size=config.langevin_step_size,
                temperature=config.langevin_temperature,
                seed=seed,
            )
            return TrainingInference(latents=latents)
        if config.inference != "cooperative" or not config.inference_steps:
            return TrainingInference(self.infer(input_ids, attention_mask, condition, seed=seed))
        start = self._start(input_ids, attention_mask)
        at_start: list[tuple[Tensor, Tensor]] = []

        def keep_first(step: int, objective: Tensor, gradients: tuple[Tensor, Tensor]) -> None:
            if step == 0:
                at_start.append(gradients)

        detached = (start[0].detach(), start[1].detach())
        posterior = self._refine(detached, input_ids, attention_mask, condition, seed=seed, on_step=keep_first)
        # the first step has the gradient of the encoder's own ELBO in its (μ, log σ²): the chain rule does the rest, so
        # the encoder learns from its ELBO without another pass of the decoder
        own_bound = sum((part * gradient).flatten(1).sum(1) for part, gradient in zip(start, at_start[0], strict=True))
        return TrainingInference(posterior, loss=kl_divergence(posterior, diagonal_gaussian(*start)) - own_bound)

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
        start = self._start(input_ids, attention_mask)
        posterior = diagonal_gaussian(*start)
        if self.config.inference != "amortised":
            posterior = self._refine(start, input_ids, attention_mask, None, seed=seed, renew_noise=False)
        keys = sequence_keys(input_ids, attention_mask)
        noise = sequence_noise(keys, self.latent_shape, seed=seed, stream=Stream.INFERENCE)
        log_likelihood = self.log_likelihood(sample_from_noise(posterior, noise), input_ids, attention_mask).sum(-1)
        return elbo(log_likelihood, kl_divergence(posterior, self.prior(len(input_ids), 1)))

    def change_inference(self, **changes: Any) -> None:
        """As `LatentLM.change_inference`; `inference_lr` alone holds from then on, whatever training's schedule was.

        Raises:
            InputError: also for a setting that this inference does not read, so that nobody takes it for tried.
        """
        if "inference_lr" in changes:
            changes.setdefault("inference_lr_final", None)
        inference = changes.get("inference", self.config.inference)
        start = changes.get("inference_start", self.config.inference_start)
        unread = set()
        if inference == "amortised":
            unread = changes.keys() - {"inference"}
        elif inference == "cooperative":
            unread = {"inference_start", "inference_start_log_variance"}
        elif start != "fixed":
            unread = {"inference_start_log_variance"}
        for name in sorted(unread & changes.keys()):
            raise InputError(f"{name} changes nothing where inference is {inference} and its start {start}.")
        super().change_inference(**changes)

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
        latent_positions = rotation(self._spread(self.config.latents_per_layer), width, self.config.rope_theta)
        if self.config.latent_prior == "transformer" and not _holds_latents(past_key_values):
            latents = self.latent_transformer(latents)
        for index, layer in enumerate(self.layers):
            own = latents[:, 0 if self.config.shared_latents else index]
            x = layer(x, positions, mask, past_key_values, own, latent_positions)
        return self.norm(x)

    def new_cache(self) -> Cache:
        return EncoderDecoderCache(token_cache(self.config), DynamicCache())

    def _start(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """μ and log σ² at which gradient steps begin, or which an encoder gives."""
        config = self.config
        if config.inference in ("amortised", "cooperative"):
            return self.encoder(self.embed_tokens(input_ids).detach(), attention_mask)
        shape = (len(input_ids), *self.latent_shape)
        if config.inference_start == "learned":
            return self.start_mean.expand(shape), self.start_log_variance.expand(shape)
        if config.inference_start == "fixed":
            zeros = torch.zeros(shape, device=self.device)
            return zeros, zeros + config.inference_start_log_variance
        prior = self.prior(len(input_ids), input_ids.shape[1] - 1)
        return prior.mean.detach(), prior.variance.detach().log()

    def _refine(
        self,
        start: tuple[Tensor, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        condition: Any,
        *,
        seed: int,
        on_step: Any = None,
        renew_noise: bool = True,
    ) -> Independent:
        return infer_by_gradient(
            self,
            input_ids,
            attention_mask,
            condition,
            start_mean=start[0],
            start_log_variance=start[1],
            steps=self.config.inference_steps,
            learning_rate=self._inference_rate,
            epsilon=self.config.inference_epsilon,
            seed=seed,
            beta=self.beta if self.training else 1.0,
            nats_free_per_dimension=self.config.free_bits if self.training else 0.0,
            renew_noise=renew_noise,
            on_step=on_step,
        )

    def _inference_rate(self, step: int) -> float:
        config = self.config
        final = config.inference_lr if config.inference_lr_final is None else config.inference_lr_final
        rate = linear(float(self.training_progress), config.inference_lr, final)
        last = max(config.inference_steps - 1, 1)
        return rate * linear(step / last, 1.0, config.inference_lr_decay)


def _holds_latents(cache: Cache | None) -> bool:
    """Whether the latents' keys and values are in the cache already, so that a step needs no latents."""
    return isinstance(cache, EncoderDecoderCache) and bool(cache.is_updated.get(0))
