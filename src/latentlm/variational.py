"""Families whose q(z | x) is made of a μ and a σ² for each number: by an encoder, by gradient steps, or both.

amortised     (μ, log σ²) = encoder(x)
gradient      T steps of ascent on x's own ELBO in (μ, log σ²)    Kong et al. 2025, arXiv 2502.01567, Algorithm 1
cooperative   T such steps from the encoder's (μ, log σ²)         left open there, section 2.2
langevin      weights trained on samples of p(z | x), figures as with gradient                   eq. 4 there
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from latentlm.config import LatentLMConfig
from latentlm.distributions import check_finite
from latentlm.errors import InputError
from latentlm.inference import infer_by_gradient, langevin
from latentlm.latent_lm import LatentLM, TrainingInference
from latentlm.layers import FixedScaleBatchNorm
from latentlm.schedules import linear


@strict
class VariationalConfig(LatentLMConfig):
    """How q(z | x) is found.

    Args:
        inference: "amortised" reads q off an encoder; "gradient" takes `inference_steps` gradient steps for each text;
            "cooperative" takes them from the encoder's q, and the encoder learns from its own ELBO and from where the
            steps led; "langevin" trains the weights on samples of `langevin_steps` and infers by gradient for
            everything else, since such samples have no density; β and free bits do not enter.
        encoder_layers: of the encoder's Transformer.
        encoder_batch_norm: γ; batch normalisation of the encoder's μ over texts with this scale: E_x[μ²] ≥ γ², so the
            mean KL to N(0, I) is at least γ²/2 for each dimension (BN-VAE; Zhu et al. 2020, arXiv 2004.12585, equations
            9 to 11). None for none. This holds of the encoder's q while training: gradient steps from there
            (cooperative) lower the KL at once. While
            training, a text's q then depends on its batch (under DDP, its process'), and evaluation uses averages that
            the first process kept. Inference without the encoder does without it.
        inference_steps: T.
        inference_lr: Adam's rate on (μ, log σ²) at the beginning of training.
        inference_lr_final: the rate at the end of training; linear between. None keeps it constant.
        inference_lr_decay: rate of an inference's last step as a fraction of its first; linear between, 1 for none.
        inference_epsilon: Adam's ε on (μ, log σ²), in nats per unit; see `infer_by_gradient`.
        inference_start: where gradient steps begin that have no encoder. "prior" is the prior's mean and variance;
            "fixed" is μ = 0 with `inference_start_log_variance`; "learned" is a parameter for each dimension, trained
            by the gradient at the final (μ, log σ²).
        inference_start_log_variance: log σ² of the "fixed" start, and what a "learned" start and an encoder begin from.
        inference_subsampling: k; a gradient step scores every k-th token of a text and counts it k times, which is
            unbiased and noisier. 1 scores all. What is left out saves time where the decoder is an LTM's or another
            whose projection onto the vocabulary is a large part of a step. Scores always count every token.
        langevin_steps, langevin_step_size, langevin_temperature: see `inference.langevin`.
    """

    inference: Literal["gradient", "amortised", "cooperative", "langevin"] = "gradient"
    encoder_layers: int = 2
    encoder_batch_norm: float | int | None = None
    inference_steps: int = 4
    inference_lr: float | int = 0.5
    inference_lr_final: float | int | None = None
    inference_lr_decay: float | int = 0.2
    inference_epsilon: float | int = 0.3
    inference_start: Literal["prior", "fixed", "learned"] = "prior"
    inference_start_log_variance: float | int = 0.0
    inference_subsampling: int = 1
    langevin_steps: int = 16
    langevin_step_size: float | int = 0.05
    langevin_temperature: float | int = 1.0

    def validate_inference(self) -> None:
        """Part of the validation of `@strict`."""
        for name, least in (
            ("encoder_layers", 1),
            ("inference_steps", 0),
            ("inference_subsampling", 1),
            ("langevin_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("inference_epsilon", "langevin_step_size", "encoder_batch_norm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)}")
        for name in ("inference_lr", "inference_lr_final", "inference_lr_decay", "langevin_temperature"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, not {getattr(self, name)}")
        if self.inference == "langevin" and self.inference_start == "learned":
            raise ValueError("inference langevin trains no start: set inference_start to prior or fixed")
        if self.inference == "langevin" and self.kl_target is not None:
            raise ValueError("kl_target steers a KL, and inference langevin trains without one: leave it out")
        if not math.isfinite(self.inference_start_log_variance):
            raise ValueError("inference_start_log_variance must be finite")

    @property
    def has_encoder(self) -> bool:
        return self.inference in ("amortised", "cooperative")


class VariationalLM(LatentLM):
    """A latent language model with a q of μ and σ²: a diagonal Gaussian, or what its `posterior` makes of them.

    A family calls `add_inference` with its encoder when its other layers are there, and says in `encode` what that
    encoder reads.
    """

    config: VariationalConfig
    #: beginnings of the names of weights that only the encoder has
    encoder_alone: tuple[str, ...] = ("encoder.", "encoder_norm.")
    #: those, and of weights that it reads: what stays when the decoder is made anew
    encoder_weights: tuple[str, ...] = encoder_alone

    def add_inference(self, encoder: Callable[..., nn.Module], latent_shape: tuple[int, ...]) -> None:
        """Adds the weights that the config's inference has: `encoder(config, latent_shape)`, or a learned start."""
        self.latent_shape = latent_shape
        if self.config.has_encoder:
            self.encoder = encoder(self.config, latent_shape)
            if self.config.encoder_batch_norm is not None:
                self.encoder_norm = FixedScaleBatchNorm(math.prod(latent_shape), self.config.encoder_batch_norm)
        elif self.config.inference_start == "learned":
            self.start_mean = nn.Parameter(torch.zeros(latent_shape))
            self.start_log_variance = nn.Parameter(torch.zeros(latent_shape))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and hasattr(self, "start_mean"):
            nn.init.zeros_(self.start_mean)
            nn.init.constant_(self.start_log_variance, self.config.inference_start_log_variance)
        elif isinstance(module, FixedScaleBatchNorm):
            nn.init.zeros_(module.shift)

    def encode(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
        """μ and log σ² by the encoder."""
        raise NotImplementedError

    def infer(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int = 0,
    ) -> Distribution:
        self.check_text(input_ids, attention_mask)
        start = self._start(input_ids, attention_mask, condition)
        if self.config.inference == "amortised":
            if not self.training and self.device.type != "cpu":  # training looks at its loss
                check_finite(*start)
            return self.posterior(*start, self._prior_of(input_ids, attention_mask, condition))
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
        start = self._start(input_ids, attention_mask, condition)
        at_start: list[tuple[Tensor, Tensor]] = []

        def keep_first(step: int, objective: Tensor, gradients: tuple[Tensor, Tensor]) -> None:
            if step == 0:
                at_start.append(gradients)

        detached = (start[0].detach(), start[1].detach())
        posterior = self._refine(detached, input_ids, attention_mask, condition, seed=seed, on_step=keep_first)
        # the first step has the gradient of the encoder's own ELBO in its (μ, log σ²): the chain rule does the rest, so
        # the encoder learns from its ELBO without another pass of the decoder
        own_bound = sum((part * gradient).flatten(1).sum(1) for part, gradient in zip(start, at_start[0], strict=True))
        of_encoder = self.posterior(*start, self._prior_of(input_ids, attention_mask, condition))
        return TrainingInference(posterior, loss=kl_divergence(posterior, of_encoder) - own_bound)

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
            if not name.startswith("inference"):
                continue  # `LatentLM.change_inference` says that it is no setting of an inference
            where = inference if inference == "amortised" else f"{inference} and its start {start}"
            raise InputError(f"{name} changes nothing where inference is {where}.")
        super().change_inference(**changes)

    def check_latent_shape(self, latents: Tensor) -> None:
        """Raises InputError unless latents are [batch, *latent_shape]."""
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise InputError(
                f"latents [batch, …] of shape {list(latents.shape)} must end in {list(self.latent_shape)}."
            )

    def _start(self, input_ids: Tensor, attention_mask: Tensor | None, condition: Any) -> tuple[Tensor, Tensor]:
        """μ and log σ² at which gradient steps begin, or which an encoder gives."""
        config = self.config
        if config.has_encoder:
            mean, log_variance = self.encode(input_ids, attention_mask, condition)
            return (self.encoder_norm(mean) if config.encoder_batch_norm is not None else mean), log_variance
        prior = self._prior_of(input_ids, attention_mask, condition)
        shape = (len(input_ids), *prior.event_shape)
        if config.inference_start == "learned":
            return self.start_mean.expand(shape), self.start_log_variance.expand(shape)
        if config.inference_start == "fixed":
            zeros = torch.zeros(shape, device=self.device)
            return zeros, zeros + config.inference_start_log_variance
        return self.prior_moments(prior)

    def prior_moments(self, prior: Distribution) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
        """The μ and log σ² of which `posterior` makes the prior, or what of it they can say; without gradients."""
        return prior.mean.detach(), prior.variance.detach().log()

    def _prior_of(self, input_ids: Tensor, attention_mask: Tensor | None, condition: Any) -> Distribution:
        return self.prior(len(input_ids), self.scored_tokens(input_ids, attention_mask).sum(1), condition)

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
    ) -> Distribution:
        objective: dict[str, Any] = {}
        if self.training:
            objective = {"beta": self.beta, "charge": self.kl_charge}
        return infer_by_gradient(
            self,
            input_ids,
            attention_mask,
            condition,
            start_mean=start[0],
            start_log_variance=start[1],
            steps=self.config.inference_steps,
            learning_rate=partial(self._inference_rate, max(float(self.training_progress), 0.0)),
            epsilon=self.config.inference_epsilon,
            seed=seed,
            renew_noise=renew_noise,
            subsampling=self.config.inference_subsampling,
            on_step=on_step,
            **objective,
        )

    def _inference_rate(self, progress: float, step: int) -> float:
        config = self.config
        final = config.inference_lr if config.inference_lr_final is None else config.inference_lr_final
        rate = linear(progress, config.inference_lr, final)
        last = max(config.inference_steps - 1, 1)
        return rate * linear(step / last, 1.0, config.inference_lr_decay)
