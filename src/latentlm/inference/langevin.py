"""Langevin dynamics: samples of p(z | x) by noisy gradient ascent on log p(x, z).

Source: Kong et al. 2025 (arXiv 2502.01567), section 2.2, equation 4, and Pang et al. 2020 (arXiv 2006.06205), section
3.3, for short runs from the prior. A finite run has no density, so it gives no q and no bound: it trains weights and
shows latents, and whoever wants a likelihood scores those weights by `infer_by_gradient`.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from latentlm.distributions import Stream, sequence_keys, sequence_noise
from latentlm.errors import InputError
from latentlm.inference.gradient import held

if TYPE_CHECKING:
    from latentlm.latent_lm import LatentLM


@torch.compiler.disable(recursive=False)
def langevin(
    model: "LatentLM",
    input_ids: Int64[Tensor, "batch time"],
    attention_mask: Int64[Tensor, "batch time"] | None = None,
    condition: Any = None,
    *,
    start: Float[Tensor, "batch *event"] | None = None,
    steps: int,
    step_size: float,
    temperature: float = 1.0,
    seed: int = 0,
) -> Float[Tensor, "batch *event"]:
    """z after `steps` steps of z ← z + s ∇_z log p(x, z) + √(2 s τ) ε, ε ~ N(0, I).

    As s → 0 and steps · s → ∞ a sample of the density ∝ p(x, z)^(1/τ); the steps are not corrected for s > 0, which
    for a Gaussian posterior of variance v leaves a variance of v / (1 − s / 2v). Rows do not touch one another.

    Args:
        start: where the chains begin; by default a sample of the prior.
        step_size: s, in squared units of z; above 2v the chain diverges.
        temperature: τ; 1 samples the posterior, 0 climbs to a mode.
        seed: noise is a function of (seed, sequence, step).

    Raises:
        InputError: impossible numbers, or chains that left every bound.
    """
    if steps < 0 or not 0 < step_size < math.inf or not 0 <= temperature < math.inf:
        raise InputError("langevin needs steps and a temperature from 0 on and a step_size above 0.")
    with torch.inference_mode(False):
        input_ids = input_ids.clone()
        attention_mask = None if attention_mask is None else attention_mask.clone()
    with held(model):
        prior = model.prior(len(input_ids), model.scored_tokens(input_ids, attention_mask).sum(1), condition)
        keys = sequence_keys(input_ids, attention_mask)
        if start is None:
            start = model.draw_latents(prior, keys, 1, seed=seed, stream=Stream.LANGEVIN)[0]
        latents = start.detach().float().clone()
        shape = tuple(latents.shape[1:])
        for step in range(steps):
            latents.requires_grad_(True)
            log_likelihood = model.log_likelihood(latents, input_ids, attention_mask, condition)
            log_joint = log_likelihood.sum() + prior.log_prob(latents).sum()
            (gradient,) = torch.autograd.grad(log_joint, latents)
            # step 0 of the stream is the start
            noise = sequence_noise(keys, shape, seed=seed, stream=Stream.LANGEVIN, step=step + 1)
            latents = latents.detach() + step_size * gradient + math.sqrt(2 * step_size * temperature) * noise
            if not bool(torch.isfinite(latents).all()):
                raise InputError(f"Langevin's chains diverged: lower the step size of {step_size}.")
    return latents.detach()
