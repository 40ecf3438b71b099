"""The contract that every family answers, and what follows from it for all of them.

    prior(...)   p(z)        what latents look like before any text
    infer(x)     q(z | x)    what latents this text suggests
    decode(z, x) p(x | z)    what text these latents suggest

A sequence is `input_ids` = BOS x_1 … x_T. BOS is given and never scored; every family scores exactly x_1 … x_T.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from latentlm.config import LatentLMConfig
from latentlm.distributions import (
    Stream,
    diagonal_gaussian,
    kl_per_dimension,
    noise_shape,
    sample_from_noise,
    sequence_keys,
    sequence_noise,
)
from latentlm.errors import InputError, one_sentence
from latentlm.files import write_checksums
from latentlm.layers import recompute_layers
from latentlm.objective import elbo, free_bits, kl_distance
from latentlm.schedules import controlled, cyclical, warm_up

#: log p(x_t | z, …) of each token of given texts, or of those that the second argument names; of latents
Likelihood = Callable[..., Tensor]
#: the files of a saved model that hold weights
WEIGHTS = "*.safetensors"
# where a controller's β begins and how low it may go, as shares of the highest
_FIRST_BETA, _LEAST_BETA = 0.01, 1e-4


@dataclass
class LatentLMOutput(ModelOutput):
    """What `LatentLM.forward` returns.

    Without latents (training, scoring): `loss` in nats per scored token, Σ (nll + β · charge) / Σ scored tokens;
    `nll` = −log p(x | z) and `kl` = KL(q ‖ p), both [batch] in nats per sequence and raw; `latents` and
    `posterior_mean` [batch, *event]. Training on samples that have no density has neither KL nor posterior mean.
    With latents (a step of generation): `logits` [batch, time, vocabulary] of the token after each one given, and the
    cache.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    nll: Tensor | None = None
    kl: Tensor | None = None
    latents: Tensor | None = None
    posterior_mean: Tensor | None = None


@dataclass
class TrainingInference:
    """What an inference gives to training: a posterior, or latents that a sampler without density drew.

    `loss` [batch], nats per sequence: what the inference's own parameters learn from beside the ELBO. It moves them by
    its gradient, and its value stays out of the model's loss, which remains the ELBO.
    """

    posterior: Distribution | None = None
    latents: Tensor | None = None
    loss: Tensor | None = None


class LatentLM(PreTrainedModel):
    """A language model with a latent: p(x, z) = p(z) p(x | z), with an approximate posterior q(z | x).

    A family is a subclass that answers `prior`, `infer` and `decode`. Objective, bounds, gradient inference, training
    and evaluation are written against these and `log_likelihood`, which a family may override to fuse the projection
    with its softmax.

    A latent is one tensor [batch, *event]; more samples stand in front, [samples, batch, *event].
    """

    config: LatentLMConfig
    config_class = LatentLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    #: tells the Trainer that `forward` divides by the `num_items_in_batch` of the whole accumulated batch
    accepts_loss_kwargs = True
    #: whether `log_likelihood` is log p(x) itself, so that no bound is needed
    exact = False
    #: number of event dimensions of a latent
    latent_dims = 1
    #: whether a latent has a part for each scored token, so that its shape depends on the text's length
    latent_per_token = False
    #: the config's field that names the model whose tokenizer the texts take; None where any may be taken
    tokenizer_of: str | None = None
    _seen: Tensor | None = None  # what word dropout leaves of a training step's tokens

    def __init__(self, config: LatentLMConfig):
        super().__init__(config)
        self._inference_in_training: dict[str, Any] = {}
        # saved with the weights, so that a checkpoint infers at the rate of the moment it was taken
        self.register_buffer("training_progress", torch.zeros(()))
        if config.kl_target is not None:
            self.register_buffer("controlled_beta", torch.zeros(()))

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if module is self and not getattr(self.training_progress, "_is_hf_initialized", False):
            with torch.no_grad():
                self.training_progress.zero_()
                if self.config.kl_target is not None:
                    self.controlled_beta.fill_(_FIRST_BETA * self.config.beta)

    @property
    def beside_batch(self) -> Callable[[Tensor, Tensor | None], Mapping[str, Tensor]] | None:
        """What a `Collator` is to make of each batch as part of its condition, before it comes to the model."""
        return None

    @property
    def annotation_labels(self) -> list[str] | None:
        """Names of the labels of texts that the model takes as a condition; None where it takes none."""
        return getattr(self.config, "annotation_labels", None)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        # what activation_checkpointing_enable and _disable of transformers come down to
        recompute_layers(self._recomputed, gradient_checkpointing_func if enable else None, every_n_layers)
        self.gradient_checkpointing = enable

    @property
    def _recomputed(self) -> torch.nn.Module:
        """The part of which layers are computed anew where `gradient_checkpointing` is asked for."""
        return self

    def enable_input_require_grads(self) -> None:
        """Nothing: transformers asks for it so that the reentrant kind of checkpoints passes gradients on."""

    # ---- the three sentences -------------------------------------------------------------------------------------

    def prior(self, batch_size: int, lengths: int | Int64[Tensor, " batch"], condition: Any = None) -> Distribution:
        """p(z) for sequences of the given numbers of scored tokens; batch shape [batch], event shape the latent's."""
        raise NotImplementedError

    def infer(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int = 0,
    ) -> Distribution:
        """q(z | x); batch shape [batch].

        In training mode the posterior serves the training objective (its β and free bits); in evaluation mode the ELBO.
        `seed` chooses the noise of an inference that needs any; the same text and seed give the same posterior.
        """
        raise NotImplementedError

    def decode(
        self,
        latents: Float[Tensor, "*samples_batch_event"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> Float[Tensor, "*samples batch scored vocabulary"]:
        """Logits of `input_ids[:, 1:]` given z (and the tokens before each one, where the family is autoregressive)."""
        raise NotImplementedError

    # ---- what follows --------------------------------------------------------------------------------------------

    def log_likelihood(
        self,
        latents: Float[Tensor, "*samples_batch_event"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> Float[Tensor, "*samples batch scored"]:
        """log p(x_t | z, …) in nats for each token of `input_ids[:, 1:]`; 0 where there is padding."""
        logits = self.decode(latents, input_ids, attention_mask, condition)
        log_probabilities = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        targets = input_ids[:, 1:].expand(log_probabilities.shape[:-1])
        chosen = log_probabilities.gather(-1, targets[..., None])[..., 0]
        return chosen.masked_fill(~self.scored_tokens(input_ids, attention_mask), 0.0)

    def likelihood_of(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> Likelihood:
        """`log_likelihood` of these texts as a function of the latents.

        For many latents of the same texts under the same weights, such as the steps of an inference or the samples of a
        bound: a family may do here, once, what no latent changes. Gradients reach the latents alone.

        Its second argument `at` [batch, number], if given, says which of `input_ids[:, 1:]` are wanted, and the answer
        is [*samples, batch, number]: a family may leave out what only the others need.
        """

        def likelihood(latents: Tensor, at: Tensor | None = None) -> Tensor:
            return chosen(self.log_likelihood(latents, input_ids, attention_mask, condition), at)

        return likelihood

    @staticmethod
    def scored_tokens(
        input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"] | None = None
    ) -> Bool[Tensor, "batch scored"]:
        """Which of `input_ids[:, 1:]` are x_1 … x_T: real, and after a real token. Padding may be on either side."""
        if attention_mask is None:
            return torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
        real = attention_mask.bool()
        return real[:, 1:] & real[:, :-1]

    @property
    def beta(self) -> float:
        """The KL's weight at this moment of training; 0 while the encoder is pre-trained (negative progress)."""
        config, progress = self.config, float(self.training_progress)
        if progress < 0:
            return 0.0
        if config.kl_target is not None:
            return float(self.controlled_beta)
        if config.beta_cycles:
            return config.beta * cyclical(progress, config.beta_cycles, *config.beta_cycle_ratios[:2])
        return config.beta * warm_up(progress, config.beta_warmup)

    def observe_kl(self, kl_per_sequence: float) -> None:
        """Tells the controller of β, if there is one, the KL of a step of training: the mean over its global batch."""
        if self.config.kl_target is not None and float(self.training_progress) >= 0:
            least, most = _LEAST_BETA * self.config.beta, self.config.beta
            beta = controlled(float(self.controlled_beta), kl_per_sequence, self.config.kl_target, least, most)
            self.controlled_beta.fill_(beta)

    def kl_charge(
        self, posterior: Distribution, prior: Distribution, kl: Float[Tensor, " batch"] | None = None
    ) -> Float[Tensor, " batch"]:
        """What the training objective takes for KL(q ‖ p), in nats: the KL, less what is free, or off its threshold.

        Args:
            kl: KL(q ‖ p), where it is known already.
        """
        config = self.config
        if config.free_bits:
            return free_bits(kl_per_dimension(posterior, prior), config.free_bits, config.free_bits_per)
        kl = kl_divergence(posterior, prior) if kl is None else kl
        return kl if config.kl_threshold is None else kl_distance(kl, config.kl_threshold)

    def forward(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> LatentLMOutput:
        """The objective: infer q once, draw one z from it, score the text.

        In training mode the loss has the config's β and free bits; in evaluation mode it is the one-sample estimate of
        −ELBO per token. There are no logits here: those of a z that was inferred from the same tokens would be a
        reconstruction, and somebody would take their perplexity for the model's. Ask `decode` for them.

        Args:
            seed: of all noise; the default is drawn from torch's generator in training mode, 0 in evaluation mode.
            num_items_in_batch: scored tokens of the global batch, when this is a part of it.
        """
        self.check_text(input_ids, attention_mask)
        if seed is None:
            seed = int(torch.randint(2**62, ())) if self.training else 0
        self._seen = self._keeps_words(input_ids, attention_mask, seed)
        try:
            return self._objective(input_ids, attention_mask, condition, seed, num_items_in_batch)
        finally:
            self._seen = None

    def _objective(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        condition: Any,
        seed: int,
        num_items_in_batch: int | Tensor | None,
    ) -> LatentLMOutput:
        scored = self.scored_tokens(input_ids, attention_mask)
        prior = self.prior(len(input_ids), scored.sum(1), condition)
        if self.training:
            inference = self.infer_for_training(input_ids, attention_mask, condition, seed=seed)
        else:
            inference = TrainingInference(self.infer(input_ids, attention_mask, condition, seed=seed))
        posterior, latents, kl = inference.posterior, inference.latents, None
        keys = sequence_keys(input_ids, attention_mask)
        kept = self._keeps_latent(keys, seed)
        if posterior is not None:
            noise = sequence_noise(keys, noise_shape(posterior), seed=seed, stream=Stream.SCORE)
            latents = sample_from_noise(posterior, noise)
            kl = kl_divergence(posterior, prior)
        assert latents is not None
        decoded = latents if kept is None else latents * kept.view(-1, *[1] * self.latent_dims)
        if self.training:
            of_tokens, beside = self.likelihood_for_training(decoded, input_ids, attention_mask, condition)
        else:
            of_tokens, beside = self.log_likelihood(decoded, input_ids, attention_mask, condition), None
        log_likelihood = of_tokens.sum(-1)
        if kl is None:
            log_prior = prior.log_prob(latents)
            bound = log_likelihood + _gradient_alone(log_prior if kept is None else log_prior * kept)
        elif self.training and posterior is not None:
            charge = self.kl_charge(posterior, prior, kl)
            bound = elbo(log_likelihood, charge if kept is None else charge * kept, self.beta)
        else:
            bound = elbo(log_likelihood, kl)
        if inference.loss is not None:
            bound = bound - _gradient_alone(inference.loss if kept is None else inference.loss * kept)
        if beside is not None:
            bound = bound - _gradient_alone(beside)
        denominator = scored.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return LatentLMOutput(
            loss=-bound.sum() / denominator,
            nll=-log_likelihood,
            kl=kl,
            latents=latents,
            posterior_mean=None if posterior is None else posterior.mean,
        )

    def _keeps_latent(self, keys: Int64[Tensor, " batch"], seed: int) -> Bool[Tensor, " batch"] | None:
        """Which sequences are decoded with their latent; None for all of them."""
        if not (self.training and self.config.latent_dropout):
            return None
        noise = sequence_noise(keys, (1,), seed=seed, stream=Stream.LATENT_DROPOUT)[:, 0]
        return torch.special.ndtr(noise) >= self.config.latent_dropout

    def _keeps_words(
        self, input_ids: Tensor, attention_mask: Tensor | None, seed: int
    ) -> Bool[Tensor, "batch time"] | None:
        """Which tokens a training step sees; None for all. BOS is always seen."""
        share = getattr(self.config, "word_dropout", 0.0)
        if not (self.training and share):
            return None
        keys, positions = sequence_keys(input_ids, attention_mask), self._positions(input_ids, attention_mask, 0)
        noise = sequence_noise(keys, (input_ids.shape[1],), seed=seed, stream=Stream.WORD_DROPOUT)
        dropped = torch.special.ndtr(noise.gather(1, positions.expand_as(input_ids))) < share
        return ~dropped | (positions == 0)

    @staticmethod
    def _positions(input_ids: Tensor, attention_mask: Tensor | None, seen: int) -> Tensor:
        """Positions [batch or 1, time] that count real tokens, so that padding on the left moves nothing.

        Args:
            seen: tokens before these.
        """
        if attention_mask is None:
            return torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        return (attention_mask.cumsum(1) - 1).clamp_min(0)[:, seen : seen + input_ids.shape[1]]

    def infer_for_training(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        seed: int,
    ) -> TrainingInference:
        """What the weights are trained on: `infer`, unless a family has a sampler or an inference model with a loss."""
        return TrainingInference(self.infer(input_ids, attention_mask, condition, seed=seed))

    def likelihood_for_training(
        self,
        latents: Float[Tensor, "batch *event"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> tuple[Float[Tensor, "batch scored"], Float[Tensor, " batch"] | None]:
        """`log_likelihood`, and what a family's training charges beside the ELBO, in nats per sequence.

        The second moves the weights by its gradient, and its value stays out of the loss; None for nothing.
        """
        return self.log_likelihood(latents, input_ids, attention_mask, condition), None

    def posterior(
        self, mean: Float[Tensor, "batch *event"], log_variance: Float[Tensor, "batch *event"], prior: Distribution
    ) -> Distribution:
        """q of μ and log σ²: the diagonal Gaussian, unless a family has them for numbers other than z's own."""
        return diagonal_gaussian(mean, log_variance)

    def going_on(self, posterior: Distribution, lengths: Int64[Tensor, " batch"], longer: Distribution) -> Distribution:
        """What q(z | prompt) says of the latents of a text that goes on.

        A latent of the whole text is that of what follows, too; a latent for each token is continued by the prior.

        Args:
            posterior: of the prompts, which have so many scored tokens.
            longer: the prior of the texts as they will be.
        """
        return posterior

    def change_inference(self, **changes: Any) -> None:
        """Sets fields of the config that say how q is found and change no weight: those named inference….

        For a comparison of inferences on the same weights, as `model.change_inference(inference_steps=64)`. A model
        that is saved infers as it was trained.

        Raises:
            InputError: no such field, a value that it does not take, or one that needs weights this model lacks.
        """
        if not changes:
            return
        known = sorted(f.name for f in fields(self.config) if f.name.startswith("inference"))
        for name in changes.keys() - set(known):
            raise InputError(
                f"{name} does not say how a {type(self).__name__} infers"
                + (f": its fields for that are {', '.join(known)}." if known else ": it has nothing to set.")
            )
        values = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        try:
            config = type(self.config)(**{**values, **changes})
        except Exception as error:  # strict configs raise their own kinds
            raise InputError(one_sentence(error)) from error
        with torch.device("meta"):
            needed = {name for name, _ in type(self)(config).named_parameters()}
        if missing := sorted(needed - {name for name, _ in self.named_parameters()}):
            settings = ", ".join(f"{name}={value}" for name, value in changes.items())
            raise InputError(f"{settings} needs weights that this model was trained without (for one, {missing[0]}).")
        for name in changes:
            self._inference_in_training.setdefault(name, getattr(self.config, name))
            setattr(self.config, name, getattr(config, name))

    @contextmanager
    def inferring_as_trained(self) -> Iterator[None]:
        """Without what `change_inference` has set."""
        changed = {name: getattr(self.config, name) for name in self._inference_in_training}
        try:
            for name, value in self._inference_in_training.items():
                setattr(self.config, name, value)
            yield
        finally:
            for name, value in changed.items():
                setattr(self.config, name, value)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        with self.inferring_as_trained():
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_checksums(save_directory, WEIGHTS)

    def draw_latents(
        self, distribution: Distribution, keys: Int64[Tensor, " batch"], samples: int, *, seed: int, stream: Stream
    ) -> Float[Tensor, "samples batch *event"]:
        """`samples` latents of each row of a distribution, by noise that belongs to the rows' keys."""
        shape = noise_shape(distribution)
        return torch.stack(
            [
                sample_from_noise(distribution, sequence_noise(keys, shape, seed=seed, stream=stream, step=step))
                for step in range(samples)
            ]
        )

    def check_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        name: str = "input_ids",
        *,
        within_context: bool = True,
    ) -> None:
        """Raises InputError unless these are texts [batch, time] of the vocabulary and within the model's context.

        Whether a token is one of the vocabulary is asked on a CPU alone: elsewhere it would wait for the device.
        """
        if not input_ids.numel() or input_ids.dim() != 2:
            raise InputError(f"{name} of shape {list(input_ids.shape)} hold no text: give [batch, time], at least BOS.")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            shapes = f"{list(attention_mask.shape)}, and its {name} {list(input_ids.shape)}"
            raise InputError(f"attention_mask has the shape {shapes}: give both the same.")
        longest, tokens = getattr(self.config, "max_position_embeddings", None), input_ids.shape[1] - 1
        if within_context and longest is not None and tokens > longest:
            tokens = tokens if attention_mask is None else int(attention_mask.sum(1).max()) - 1
            if tokens > longest:
                raise InputError(f"a text of {tokens} tokens exceeds the model's context of {longest}: cut it.")
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            least, most = input_ids.aminmax()
            if least < 0 or most >= self.config.vocab_size:
                wrong = int(least if least < 0 else most)
                raise InputError(f"{name} hold {wrong}, no token of the vocabulary of {self.config.vocab_size}.")

    def check_latents(self, latents: Tensor, event_shape: tuple[int, ...]) -> None:
        """Raises InputError unless latents are [batch, *event] and finite."""
        if not isinstance(latents, Tensor):
            raise InputError(f"latents must be a tensor [batch, *event], not a {type(latents).__name__}.")
        if tuple(latents.shape[1:]) != tuple(event_shape):
            raise InputError(
                f"latents of shape {list(latents.shape)} do not fit this model: "
                f"give [batch, {', '.join(map(str, event_shape))}]."
            )
        if not bool(torch.isfinite(latents).all()):
            raise InputError("latents hold values that are not finite: check how they were made.")


def chosen(of_tokens: Shaped[Tensor, "*samples batch scored"], at: Int64[Tensor, "batch number"] | None) -> Tensor:
    """Those of the tokens that `at` names, [*samples, batch, number]; all without it."""
    return of_tokens if at is None else of_tokens.gather(-1, at.expand(*of_tokens.shape[:-1], -1))


def _gradient_alone(value: Tensor) -> Tensor:
    """Zero, with the gradient of `value`."""
    return value - value.detach()


def number_of_parameters(model: torch.nn.Module) -> int:
    """Parameters, each counted once however many names share it."""
    return _numbers(model.parameters())


def number_of_trained_parameters(model: torch.nn.Module) -> int:
    """Those that training moves: not the frozen ones of a pretrained part."""
    return _numbers(parameter for parameter in model.parameters() if parameter.requires_grad)


def _numbers(parameters: Iterable[Tensor]) -> int:
    # of 4 bits, which share their bytes, the shape is kept beside them
    return sum(math.prod(getattr(getattr(one, "quant_state", None), "shape", one.shape)) for one in parameters)
