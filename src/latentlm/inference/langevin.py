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

from latentlm.distributions import Stream, noise_shape, sample_from_noise, sequence_keys, sequence_noise
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
    """z(w) after `steps` steps of w ← w + s ∇_w [log p(x | z(w)) − ½ ‖w‖²] + √(2 s τ) ε, ε ~ N(0, I).

    w is the standard normal noise of which the prior makes z: z itself where the prior is N(0, I), and z = L w for a
    Gaussian process, whose narrow valleys a chain in z would take thousands of steps to cross. As s → 0 and steps · s →
    ∞ a sample of the density ∝ p(x, w)^(1/τ); the steps are not corrected for s > 0, which for a Gaussian posterior of
    variance v leaves a variance of v / (1 − s / 2v). Rows do not touch one another.

    Args:
        start: w where the chains begin; by default a sample of the prior.
        step_size: s, in squared units of w; above 2v the chain diverges.
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
        likelihood = model.likelihood_of(input_ids, attention_mask, condition)
        shape = noise_shape(prior)
        if start is None:
            start = sequence_noise(keys, shape, seed=seed, stream=Stream.LANGEVIN)
        white = start.detach().float().clone()
        for step in range(steps):
            white.requires_grad_(True)
            latents = sample_from_noise(prior, white)
            log_likelihood = likelihood(latents)
            log_joint = log_likelihood.sum() - 0.5 * white.square().sum()
            (gradient,) = torch.autograd.grad(log_joint, white)
            # step 0 of the stream is the start
            noise = sequence_noise(keys, shape, seed=seed, stream=Stream.LANGEVIN, step=step + 1)
            white = white.detach() + step_size * gradient + math.sqrt(2 * step_size * temperature) * noise
            if not bool(torch.isfinite(white).all()):
                raise InputError(f"Langevin's chains diverged: lower the step size of {step_size}.")
        return sample_from_noise(prior, white).detach()
