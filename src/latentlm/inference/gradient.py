"""Gradient inference: a posterior for each sequence found by ascending its own ELBO (LTM's fast learning).

For any model that answers `prior` and `log_likelihood`. Source: Kong et al. 2025 (arXiv 2502.01567), section 2.2,
equation 5 and Algorithm 1, lines 5 to 11. Where we differ, because the published code does otherwise and its figures
are no bounds: noise is drawn afresh at each step and never used again to score, the weights collect no gradient,
(μ, log σ²) are not decayed, and the scheduled rate is the one that is used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from latentlm.distributions import (
    Stream,
    check_finite,
    noise_shape,
    sample_from_noise,
    sequence_keys,
    sequence_noise,
)
from latentlm.errors import InputError
from latentlm.inference.sharded import gathered
from latentlm.objective import elbo

if TYPE_CHECKING:
    from latentlm.latent_lm import LatentLM

ADAM_BETAS = (0.9, 0.95)  # Kong et al. 2025, appendix A.2, for both rates
_HAVE_FUSED_ADAM = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Weights that ask for no gradient, dropout off, autograd on; all as it was afterwards.

    Also inside `no_grad` and `inference_mode`, since inference by gradients needs them whatever its caller does.
    """
    # gathered first: weights that `fully_shard` gathers while their shards ask for no gradient would get none later
    with gathered(model, keep=True):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.is_leaf]
        training = [module for module in model.modules() if module.training]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            for module in training:
                module.training = False
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True


@torch.compiler.disable(recursive=False)
def infer_by_gradient(
    model: "LatentLM",
    input_ids: Int64[Tensor, "batch time"],
    attention_mask: Int64[Tensor, "batch time"] | None = None,
    condition: Any = None,
    *,
    start_mean: Float[Tensor, "batch *event"],
    start_log_variance: Float[Tensor, "batch *event"],
    steps: int,
    learning_rate: Callable[[int], float],
    epsilon: float = 1e-8,
    seed: int = 0,
    beta: float = 1.0,
    charge: Callable[[Distribution, Distribution], Tensor] = kl_divergence,
    renew_noise: bool = True,
    subsampling: int = 1,
    on_step: Callable[[int, Tensor, tuple[Tensor, Tensor]], None] | None = None,
) -> Distribution:
    """q(z | x) after `steps` steps of Adam on (μ, log σ²) of each row; a diagonal Gaussian, or `model.posterior` of it.

    The objective is the sum over rows of each row's ELBO in nats (one sample of z a step), so no row's step depends on
    the batch it stands in. Padding costs nothing and changes nothing.

    Args:
        start_mean, start_log_variance: where the steps begin. Where these need a gradient (a learned start, an
            encoder), the gradient at the final (μ, log σ²) passes straight to them, with no backpropagation through the
            steps. Otherwise the result is detached from everything.
        steps: number of Adam steps; with 0 the start is the answer.
        learning_rate: rate of step t = 0 … steps − 1.
        epsilon: Adam's ε, in nats per unit of μ or log σ². The gradient of the KL in μ is μ itself, so with an ε about
            1 a coordinate about which the text says less than a nat moves in proportion to its gradient; with a tiny ε
            it moves by the whole rate along its noise and pays KL for nothing.
        seed: noise is a function of (seed, sequence, step).
        beta: the KL's weight in the objective; 1 gives the ELBO.
        charge: what the objective takes for the KL of q and p, [batch] in nats; see `LatentLM.kl_charge`.
        renew_noise: False draws one noise for all steps, as the published code does. A q that was fitted to one noise
            is over-confident, and no score with that noise is a bound; it is here to show by how much.
        subsampling: k: each step scores every k-th of a text's tokens, from a place drawn afresh for each text and
            step, and counts it k times. The objective of a step stays unbiased, its noise grows, and what only the
            other tokens need is not computed; see `LatentLM.likelihood_of`.
        on_step: called before step t with (t, the objective of each row [batch] in nats by one sample, its gradients in
            μ and log σ² [batch, *event]).

    Raises:
        InputError: `subsampling` is no whole number from 1 on.
        DivergedError: μ or log σ² is no longer finite; on a CPU after the step that made it so, elsewhere after all.
    """
    if type(subsampling) is not int or subsampling < 1:
        raise InputError(f"subsampling must be a whole number from 1 on, not {subsampling!r}.")
    # tensors made under inference_mode cannot enter autograd; a clone made outside it can
    with torch.inference_mode(False):
        input_ids = input_ids.clone()
        attention_mask = None if attention_mask is None else attention_mask.clone()
        # one tensor, so that a step of Adam is one kernel
        parameters = torch.stack((start_mean.detach().float(), start_log_variance.detach().float()))
    # a compiler otherwise cuts a step in two where its gradient is asked for, and keeps what the second half reads; but
    # within one graph it refuses to compute attention anew, which it takes for random (torch 2.13)
    whole = not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    with held(model), torch._dynamo.config.patch(trace_autograd_ops=whole):
        scored = model.scored_tokens(input_ids, attention_mask)
        prior = model.prior(len(input_ids), scored.sum(1), condition)
        keys = sequence_keys(input_ids, attention_mask)
        likelihood = model.likelihood_of(input_ids, attention_mask, condition)
        parameters.requires_grad_(True)
        # without decay, which would bias q towards (0, 1)
        fused = parameters.device.type in _HAVE_FUSED_ADAM
        adam = torch.optim.Adam([parameters], betas=ADAM_BETAS, eps=epsilon, maximize=True, fused=fused)
        # a compiler that sees it takes this batch's tensors for ones that stay
        update = torch.compiler.disable(adam.step)
        with torch.no_grad():
            shape = noise_shape(model.posterior(parameters[0], parameters[1], prior))

        def slope(noise: Tensor, at: Tensor | None, counts: Tensor | None) -> tuple[Tensor, Tensor]:
            """The objective of each row at a step's noise, and its gradient in the parameters."""
            posterior = model.posterior(parameters[0], parameters[1], prior)
            latents = sample_from_noise(posterior, noise)
            if at is None or counts is None:
                log_likelihood = likelihood(latents).sum(-1)
            else:
                log_likelihood = subsampling * likelihood(latents, at).masked_fill(~counts, 0.0).sum(-1)
            bound = elbo(log_likelihood, charge(posterior, prior), beta)
            (gradient,) = torch.autograd.grad(bound.sum(), parameters)
            return bound.detach(), gradient

        for step in range(steps):
            draw = step if renew_noise else 0
            noise = sequence_noise(keys, shape, seed=seed, stream=Stream.INFERENCE, step=draw)
            at, counts = (
                (None, None) if subsampling == 1 else every_kth(scored, subsampling, keys, seed=seed, step=draw)
            )
            bound, parameters.grad = slope(noise, at, counts)
            if on_step is not None:
                on_step(step, bound, (parameters.grad[0], parameters.grad[1]))
            adam.param_groups[0]["lr"] = learning_rate(step)
            update()
    mean, log_variance = parameters.detach()
    if mean.device.type != "cpu":
        check_finite(mean, log_variance)
    if torch.is_grad_enabled() and (start_mean.requires_grad or start_log_variance.requires_grad):
        mean = mean + (start_mean - start_mean.detach())
        log_variance = log_variance + (start_log_variance - start_log_variance.detach())
    # outside of `held`, so that a prior of which q is made learns by it
    prior = model.prior(len(input_ids), scored.sum(1), condition)
    return model.posterior(mean, log_variance, prior)


def every_kth(
    scored: Bool[Tensor, "batch scored"], k: int, keys: Int64[Tensor, " batch"], *, seed: int, step: int
) -> tuple[Int64[Tensor, "batch number"], Bool[Tensor, "batch number"]]:
    """Every k-th of each row's scored tokens, from a place that belongs to (seed, sequence, step).

    Returns where they are, and which of these count: ⌈time / k⌉ are named in each row, whatever was drawn and however
    much of it is padding, so that shapes do not depend on it.

    Each token is among them in one of k equally likely cases, so k times their sum is an unbiased estimate of the sum
    over all (systematic sampling; Cochran 1977, "Sampling techniques", chapter 8). Of a text's tokens, which are alike
    near each other, it tells more than as many drawn at random.
    """
    noise = sequence_noise(keys, (1,), seed=seed, stream=Stream.SUBSAMPLING, step=step)
    first = (torch.special.ndtr(noise) * k).long().clamp_max(k - 1)
    chosen = scored & ((scored.cumsum(1) - 1) % k == first)
    at = chosen.long().argsort(dim=1, descending=True, stable=True)[:, : -(-scored.shape[1] // k)]
    return at, chosen.gather(1, at)
