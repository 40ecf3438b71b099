"""Likelihood of a corpus under a latent language model, with everything needed to judge the figure.

A figure is exact, a bound or neither, and says so:

    elbo_nll            −ELBO, an upper bound on −log p(x); q is inferred from x, z is drawn afresh to score it
    iw_nll              importance-weighted bound, K samples of q; between −log p(x) and −ELBO in expectation
    reconstruction_nll  −E_q log p(x | z), no bound: z has seen x and its cost is left out
    prior_nll           −log of the mean over K prior samples of p(x | z), a bound that makes no use of inference

Corpus figures are sums over sums: Σ nats ÷ Σ tokens, with perplexity the exponential of that.
"""

import math
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.utils.data import Dataset

from latentlm.distributions import Stream, sequence_keys
from latentlm.errors import InputError
from latentlm.evaluation.batches import evaluating, in_batches, synchronised
from latentlm.latent_lm import LatentLM, number_of_parameters
from latentlm.objective import elbo, importance_weighted_bound

MUTUAL_INFORMATION_SEQUENCES = 256


@torch.no_grad()
def evaluate(
    model: LatentLM,
    sequences: Dataset,
    *,
    batch_size: int = 32,
    iw_samples: int = 16,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores every sequence of a dataset once; no figure depends on batch size, order or padding.

    Args:
        sequences: items with `input_ids` (BOS x_1 … x_T) and `num_bytes` (UTF-8 bytes of x_1 … x_T).
        iw_samples: K of the importance-weighted bound, of the ELBO's expectation, and of the prior's mean.
        seed: all noise is a function of (seed, sequence, sample).
        on_progress: called with (sequences done, sequences in all) after each batch.

    Returns:
        The fixed keys of an evaluation; nats unless the name says bits. `latent_units` counts latent numbers,
        `active_units` those with Var_x E_q[z] > 0.01 × prior variance (Burda et al. 2016, section 5.1). Where latents
        differ in shape from text to text (trajectories), the statistics that compare them are None.
    """
    if iw_samples < 1:
        raise InputError("iw_samples must be at least 1.")
    samples = 1 if model.exact else iw_samples
    number = len(sequences)  # type: ignore[arg-type]
    hashes = sorted((zlib.crc32(sequences[index]["input_ids"].numpy().tobytes()), index) for index in range(number))
    # by their hash, so that the data's order does not choose them
    compared = {index for _, index in hashes[:MUTUAL_INFORMATION_SEQUENCES]}
    totals = dict.fromkeys(("elbo", "iw", "reconstruction", "kl", "prior"), 0.0)
    tokens = 0
    statistics = LatentStatistics()
    start = time.perf_counter()
    with evaluating(model):
        for indices, input_ids, attention_mask in in_batches(model, sequences, batch_size, on_progress):
            figures = score(model, input_ids, attention_mask, samples=samples, seed=seed, statistics=statistics)
            statistics.choose([index in compared for index in indices])
            for name in totals:
                totals[name] += float(figures[name].double().sum())
            tokens += int(model.scored_tokens(input_ids, attention_mask).sum())
    seconds = time.perf_counter() - start
    num_bytes = sum(int(sequences[index]["num_bytes"]) for index in range(number))
    per_token = {name: total / tokens for name, total in totals.items()}
    return {
        "sequences": number,
        "tokens": tokens,
        "bytes": num_bytes,
        "parameters": number_of_parameters(model),
        "exact": model.exact,
        "elbo_nll_per_token": per_token["elbo"],
        "iw_nll_per_token": per_token["iw"],
        "iw_samples": samples,
        "reconstruction_nll_per_token": per_token["reconstruction"],
        "kl_per_token": per_token["kl"],
        "kl_per_sequence": totals["kl"] / number,
        "prior_nll_per_token": per_token["prior"],
        "elbo_perplexity": _perplexity(per_token["elbo"]),
        "iw_perplexity": _perplexity(per_token["iw"]),
        "elbo_bits_per_byte": totals["elbo"] / math.log(2) / num_bytes,
        "iw_bits_per_byte": totals["iw"] / math.log(2) / num_bytes,
        **statistics.summary(),
        "protocol": "honest",
        "seconds": seconds,
        "inference_seconds": statistics.inference_seconds,
        "tokens_per_second": tokens / seconds,
    }


def _perplexity(nll_per_token: float) -> float:
    try:
        return math.exp(nll_per_token)
    except OverflowError:  # a diverged model
        return math.inf


def score(
    model: LatentLM,
    input_ids: Int64[Tensor, "batch time"],
    attention_mask: Int64[Tensor, "batch time"] | None = None,
    *,
    samples: int = 16,
    seed: int = 0,
    statistics: "LatentStatistics | None" = None,
) -> dict[str, Float[Tensor, " batch"]]:
    """NLLs and KL of each sequence in nats: keys elbo, iw, reconstruction, kl, prior, as this module explains them."""
    lengths = model.scored_tokens(input_ids, attention_mask).sum(1)
    prior = model.prior(len(input_ids), lengths)
    begun = time.perf_counter()
    posterior = model.infer(input_ids, attention_mask, seed=seed)
    synchronised(model.device)
    inference_seconds = time.perf_counter() - begun
    keys = sequence_keys(input_ids, attention_mask)
    # one sample at a time: K of them at once would need K times the memory of a training step
    log_likelihood, log_prior, log_posterior, under_prior = [], [], [], []
    latents = model.draw_latents(posterior, keys, samples, seed=seed, stream=Stream.IMPORTANCE)
    for z in latents:
        log_likelihood.append(model.log_likelihood(z, input_ids, attention_mask).sum(-1))
        log_prior.append(prior.log_prob(z))
        log_posterior.append(posterior.log_prob(z))
    if not model.exact:
        for z in model.draw_latents(prior, keys, samples, seed=seed, stream=Stream.PRIOR):
            under_prior.append(model.log_likelihood(z, input_ids, attention_mask).sum(-1))
    likelihoods = torch.stack(log_likelihood)
    prior_likelihoods = torch.stack(under_prior) if under_prior else likelihoods
    kl = kl_divergence(posterior, prior)
    zeros = torch.zeros_like(prior_likelihoods)
    if statistics is not None:
        statistics.add(posterior, prior, latents[0])
        statistics.inference_seconds += inference_seconds
    return {
        "elbo": -elbo(likelihoods, kl),
        "iw": -importance_weighted_bound(likelihoods, torch.stack(log_prior), torch.stack(log_posterior)),
        "reconstruction": -likelihoods.mean(0),
        "kl": kl,
        "prior": -importance_weighted_bound(prior_likelihoods, zeros, zeros),
    }


class LatentStatistics:
    """Active units, mutual information and what inference cost, gathered batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self.inference_seconds = 0.0
        self.comparable = True
        self.sum = self.sum_of_squares = self.prior_variance = torch.zeros(0)
        self.kept: list[tuple[Distribution, Tensor, Tensor]] = []

    def add(self, posterior: Distribution, prior: Distribution, latents: Float[Tensor, "batch *event"]) -> None:
        mean = posterior.mean.double()
        if not self.count:
            self.sum = self.sum_of_squares = torch.zeros_like(mean[0])
            self.prior_variance = prior.variance[0].double()
        if not self.comparable or mean.shape[1:] != self.sum.shape:
            self.comparable = False
            return
        self.count += len(mean)
        self.sum = self.sum + mean.sum(0)
        self.sum_of_squares = self.sum_of_squares + mean.square().sum(0)
        self.kept.append((posterior, latents, torch.ones(len(mean), dtype=torch.bool)))

    def choose(self, rows: Sequence[bool]) -> None:
        """Of the batch added last, only these rows enter the mutual information, which costs their number squared."""
        if self.comparable and self.kept:
            posterior, latents, _ = self.kept.pop()
            if any(rows):
                self.kept.append((posterior, latents, torch.tensor(rows)))

    def summary(self) -> dict[str, Any]:
        if not self.count or not self.comparable:
            names = ("active_units", "latent_units", "mutual_information", "mutual_information_sequences")
            return dict.fromkeys(names)
        variance = self.sum_of_squares / self.count - (self.sum / self.count).square()
        return {
            "active_units": int((variance > 0.01 * self.prior_variance).sum()),
            "latent_units": variance.numel(),
            "mutual_information": mutual_information(*zip(*self.kept, strict=True)),
            "mutual_information_sequences": int(sum(rows.sum() for _, _, rows in self.kept)),
        }


def mutual_information(
    posteriors: Sequence[Distribution],
    latents: Sequence[Float[Tensor, "_ *event"]],
    rows: Sequence[Bool[Tensor, " _"]] | None = None,
) -> float:
    """I(x; z) in nats between N texts, each equally likely, and a latent drawn from its posterior.

    I = (1/N) Σ_i [log q(z_i | x_i) − log (1/N) Σ_j q(z_i | x_j)], z_i ~ q(z | x_i) (Hoffman and Johnson 2016; the
    estimate of Dieng et al. 2019, over N texts rather than per batch). It cannot exceed ln N.

    Args:
        posteriors, latents: batches of q(z | x) and of one z from each.
        rows: which rows of each batch are among the N texts; by default all.
    """
    if rows is None:
        rows = [torch.ones(len(z), dtype=torch.bool) for z in latents]
    number = int(sum(chosen.sum() for chosen in rows))
    total = 0.0
    for posterior, z, chosen in zip(posteriors, latents, rows, strict=True):
        total += float(posterior.log_prob(z)[chosen].double().sum())
        for one in z[chosen]:
            densities = torch.cat(
                [other.log_prob(one)[among] for other, among in zip(posteriors, rows, strict=True)]
            ).double()
            total -= float(densities.logsumexp(0)) - math.log(number)
    return total / number
