"""Likelihood of a corpus under a latent language model, with everything needed to judge the figure.

A figure is exact, a bound or neither, and says so:

    elbo_nll            −ELBO, an upper bound on −log p(x); q is inferred from x, z is drawn afresh to score it
    iw_nll              importance-weighted bound, K samples of q; between −log p(x) and −ELBO in expectation
    reconstruction_nll  −E_q log p(x | z), no bound: z has seen x and its cost is left out
    prior_nll           −log of the mean over K prior samples of p(x | z), a bound that makes no use of inference
    prior_mean_nll      −log p(x | z̄), z̄ = E_p[z]: the same weights as a language model without a latent, exactly. Only
                        below it do the bounds say that z pays for itself

Corpus figures are sums over sums: Σ nats ÷ Σ tokens, with perplexity the exponential of that.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.distributions import kl_divergence
from torch.utils.data import Dataset

from latentlm.distributions import Stream, sequence_keys
from latentlm.errors import InputError
from latentlm.evaluation.batches import PerSequence, by_hash, evaluating, in_batches, synchronised
from latentlm.evaluation.statistics import LatentStatistics
from latentlm.latent_lm import LatentLM, number_of_parameters, number_of_trained_parameters
from latentlm.objective import elbo, importance_weighted_bound

MUTUAL_INFORMATION_SEQUENCES = 256
_NEARLY_ALL = 0.9


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
        sequences: items with `input_ids` (BOS x_1 … x_T) and `num_bytes` (UTF-8 bytes of x_1 … x_T). Where they have
            `annotations`, all figures are of p(x | c), `conditional` says so, and none compares with those of p(x).
        iw_samples: K of the importance-weighted bound, of the ELBO's expectation, and of the prior's mean.
        seed: all noise is a function of (seed, sequence, sample).
        on_progress: called with (sequences done, sequences in all) after each batch.

    Of several processes each scores its share, and all return the figures of the whole.

    Returns:
        The fixed keys of an evaluation; nats unless the name says bits. The statistics of latents are those of
        `LatentStatistics.summary`; where latents differ in shape from text to text (trajectories), they are None.
    """
    if iw_samples < 1:
        raise InputError("iw_samples must be at least 1.")
    samples = 1 if model.exact else iw_samples
    number = len(sequences)  # type: ignore[arg-type]
    # by their hash, so that the data's order neither chooses nor groups them
    places = {index: place for place, index in enumerate(by_hash(sequences)[:MUTUAL_INFORMATION_SEQUENCES])}
    statistics = LatentStatistics(_common_length(sequences) if model.latent_per_token else None)
    figures = PerSequence("tokens", "elbo", "iw", "reconstruction", "kl", "prior", "prior_mean")
    conditional = False
    start = time.perf_counter()
    with evaluating(model):
        for indices, input_ids, attention_mask, condition in in_batches(model, sequences, batch_size, on_progress):
            conditional = conditional or condition is not None
            scores = score(
                model,
                input_ids,
                attention_mask,
                condition,
                samples=samples,
                seed=seed,
                statistics=statistics,
                places=torch.tensor([places.get(index, -1) for index in indices], device=input_ids.device),
            )
            figures.add(indices, tokens=model.scored_tokens(input_ids, attention_mask).sum(1), **scores)
        totals = {name: float(values.sum()) for name, values in figures.gathered(model.device).items()}
        summary = statistics.summary(model.device)
    tokens = int(totals.pop("tokens"))
    seconds = time.perf_counter() - start
    num_bytes = sum(int(sequences[index]["num_bytes"]) for index in range(number))
    per_token = {name: total / tokens for name, total in totals.items()}
    return {
        "sequences": number,
        "tokens": tokens,
        "bytes": num_bytes,
        "parameters": number_of_parameters(model),
        "trained_parameters": number_of_trained_parameters(model),
        "exact": model.exact,
        "conditional": conditional,
        "elbo_nll_per_token": per_token["elbo"],
        "iw_nll_per_token": per_token["iw"],
        "elbo_nll_per_sequence": totals["elbo"] / number,
        "iw_nll_per_sequence": totals["iw"] / number,
        "iw_samples": samples,
        "reconstruction_nll_per_token": per_token["reconstruction"],
        "kl_per_token": per_token["kl"],
        "kl_per_sequence": totals["kl"] / number,
        "prior_nll_per_token": per_token["prior"],
        "prior_mean_nll_per_token": per_token["prior_mean"],
        "elbo_perplexity": perplexity(per_token["elbo"]),
        "iw_perplexity": perplexity(per_token["iw"]),
        "elbo_bits_per_byte": totals["elbo"] / math.log(2) / num_bytes,
        "iw_bits_per_byte": totals["iw"] / math.log(2) / num_bytes,
        **summary,
        "protocol": "honest",
        "seconds": seconds,
        "inference_seconds": statistics.inference_seconds,
        "tokens_per_second": tokens / seconds,
    }


def _common_length(sequences: Dataset) -> int | None:
    """The tokens of nearly all sequences, such as blocks of which the last is shorter; None where there is none."""
    number = len(sequences)  # type: ignore[arg-type]
    if not number:
        return None
    lengths = Counter(len(sequences[index]["input_ids"]) - 1 for index in range(number))
    [(length, count)] = lengths.most_common(1)
    return length if count >= _NEARLY_ALL * number else None


def perplexity(nll_per_token: float) -> float:
    """exp(nats per token), or per word; infinite where that is past all numbers."""
    try:
        return math.exp(nll_per_token)
    except OverflowError:  # a diverged model
        return math.inf


def score(
    model: LatentLM,
    input_ids: Int64[Tensor, "batch time"],
    attention_mask: Int64[Tensor, "batch time"] | None = None,
    condition: Any = None,
    *,
    samples: int = 16,
    seed: int = 0,
    statistics: LatentStatistics | None = None,
    places: Int64[Tensor, " batch"] | None = None,
) -> dict[str, Float[Tensor, " batch"]]:
    """NLLs and KL of each sequence in nats, as this module explains them.

    Keys are elbo, iw, reconstruction, kl, prior and prior_mean.

    Args:
        statistics: told of the batch, and of the rows' `places` among those that are compared; see there.
    """
    lengths = model.scored_tokens(input_ids, attention_mask).sum(1)
    prior = model.prior(len(input_ids), lengths, condition)
    begun = time.perf_counter()
    posterior = model.infer(input_ids, attention_mask, condition, seed=seed)
    synchronised(model.device)
    inference_seconds = time.perf_counter() - begun
    keys = sequence_keys(input_ids, attention_mask)
    # one sample at a time: K of them at once would need K times the memory of a training step
    log_likelihood, log_prior, log_posterior, under_prior = [], [], [], []
    likelihood = model.likelihood_of(input_ids, attention_mask, condition)
    latents = model.draw_latents(posterior, keys, samples, seed=seed, stream=Stream.IMPORTANCE)
    for z in latents:
        log_likelihood.append(likelihood(z).sum(-1))
        log_prior.append(prior.log_prob(z))
        log_posterior.append(posterior.log_prob(z))
    under_mean = log_likelihood[0]
    if not model.exact:
        mean = prior.mean.expand(len(input_ids), *prior.event_shape)
        under_mean = likelihood(mean).sum(-1)
        for z in model.draw_latents(prior, keys, samples, seed=seed, stream=Stream.PRIOR):
            under_prior.append(likelihood(z).sum(-1))
    likelihoods = torch.stack(log_likelihood)
    prior_likelihoods = torch.stack(under_prior) if under_prior else likelihoods
    kl = kl_divergence(posterior, prior)
    zeros = torch.zeros_like(prior_likelihoods)
    if statistics is not None:
        statistics.add(posterior, prior, latents[0], places)
        statistics.inference_seconds += inference_seconds
    return {
        "elbo": -elbo(likelihoods, kl),
        "iw": -importance_weighted_bound(likelihoods, torch.stack(log_prior), torch.stack(log_posterior)),
        "reconstruction": -likelihoods.mean(0),
        "kl": kl,
        "prior": -importance_weighted_bound(prior_likelihoods, zeros, zeros),
        "prior_mean": -under_mean,
    }
