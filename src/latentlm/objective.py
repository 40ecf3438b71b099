"""Bounds on log p(x) as pure tensor functions. Everything is in nats per sequence; larger is better for a bound.

log p(x) ≥ E_q[log p(x | z)] − KL(q(z | x) ‖ p(z))                                 the ELBO
log p(x) ≥ E log (1/K) Σ_k p(x | z_k) p(z_k) / q(z_k | x),  z_1 … z_K ~ q          the importance-weighted bound
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from latentlm.errors import DivergedError


def elbo(
    log_likelihood: Float[Tensor, "*samples batch"],
    kl: Float[Tensor, " batch"],
    beta: float | Float[Tensor, ""] = 1.0,
) -> Float[Tensor, " batch"]:
    """Evidence lower bound of each sequence, averaged over the leading sample dimensions.

    Args:
        log_likelihood: log p(x | z) summed over the sequence's tokens, for one or more z ~ q(z | x).
        kl: KL(q(z | x) ‖ p(z)), or what `free_bits` or `kl_distance` charges for it.
        beta: weight of the KL; only beta = 1 is a bound on log p(x) (Higgins et al. 2017, eq. 4).

    Raises:
        DivergedError: the bound of a sequence is NaN; asked on a CPU alone, since elsewhere it would wait for the
            device in every step of an inference. (−∞ is a bound, of a text that is impossible under q.)
    """
    expected = log_likelihood.flatten(0, -2).mean(0) if log_likelihood.dim() > 1 else log_likelihood
    bound = expected - beta * kl
    return _no_nan(bound, "the ELBO") if bound.device.type == "cpu" else bound


def importance_weighted_bound(
    log_likelihood: Float[Tensor, "samples batch"],
    log_prior: Float[Tensor, "samples batch"],
    log_posterior: Float[Tensor, "samples batch"],
) -> Float[Tensor, " batch"]:
    """IW-K bound of each sequence from K samples of q (Burda, Grosse and Salakhutdinov 2016, eq. 8), in float64.

    With K = 1 its expectation is the ELBO; it never falls in expectation as K grows and tends to log p(x).
    With q = p it is the log of the mean of p(x | z) over prior samples.

    Raises:
        DivergedError: the bound of a sequence is NaN.
    """
    log_weights = log_likelihood.double() + log_prior.double() - log_posterior.double()
    return _no_nan(torch.logsumexp(log_weights, dim=0) - math.log(len(log_weights)), "the importance-weighted bound")


def _no_nan(bound: Tensor, name: str) -> Tensor:
    # a compiled step is looked at by whoever takes its loss: a question to the data would cut the graph
    if not torch.compiler.is_compiling() and bool(torch.isnan(bound).any()):
        rows = torch.isnan(bound).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
        raise DivergedError(f"{name} is not a number in rows {shown} of the batch")
    return bound


def free_bits(
    kl_per_dimension: Float[Tensor, "batch *event"], nats: float, per: Literal["dimension", "latent"] = "dimension"
) -> Float[Tensor, " batch"]:
    """What the objective charges for the KL when every part of the latent has some nats for free.

    charge_b = Σ_j max(KL_bj, λ): a part whose KL is under λ costs λ and has no gradient, so nothing pushes it towards
    the prior. The floor is per sequence and per part. Kingma et al. 2016 (appendix C.8) put the floor under the mean
    over the mini-batch instead; that ties a sequence's loss to its neighbours, so accumulation and processes would
    change it. The charge is for optimising: figures always report the raw KL.

    Args:
        nats: λ.
        per: a part j is a "dimension", each number of the latent; or a "latent", each of its vectors (the last event
            dimension), which may then keep its nats in whichever dimensions serve it best.
    """
    parts = kl_per_dimension.sum(-1, keepdim=True) if per == "latent" else kl_per_dimension
    return parts.clamp_min(nats).flatten(1).sum(1)


def kl_distance(kl: Float[Tensor, " batch"], nats: float) -> Float[Tensor, " batch"]:
    """What the objective charges where each sequence's KL is held near a threshold C: |KL − C|.

    Burgess et al. 2018 (arXiv 1804.03599, equation 8). Unlike free bits it also pushes a KL below C up.
    """
    return (kl - nats).abs()
