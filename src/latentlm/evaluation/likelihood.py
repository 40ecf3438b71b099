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

from latentlm.distributions import Stream, select_rows, sequence_keys
from latentlm.errors import InputError
from latentlm.evaluation.batches import PerSequence, evaluating, in_batches, synchronised
from latentlm.latent_lm import LatentLM, number_of_parameters
from latentlm.objective import elbo, importance_weighted_bound
from latentlm.processes import gather_rows

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

    Of several processes each scores its share, and all return the figures of the whole.

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
    statistics = LatentStatistics()
    figures = PerSequence("tokens", "elbo", "iw", "reconstruction", "kl", "prior")
    start = time.perf_counter()
    with evaluating(model):
        for indices, input_ids, attention_mask in in_batches(model, sequences, batch_size, on_progress):
            scores = score(
                model,
                input_ids,
                attention_mask,
                samples=samples,
                seed=seed,
                statistics=statistics,
                compared=torch.tensor([index in compared for index in indices], device=input_ids.device),
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
        **summary,
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
    compared: Bool[Tensor, " batch"] | None = None,
) -> dict[str, Float[Tensor, " batch"]]:
    """NLLs and KL of each sequence in nats: keys elbo, iw, reconstruction, kl, prior, as this module explains them.

    Args:
        statistics: told of the batch, and which rows of it are `compared` with one another (all, by default).
    """
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
        statistics.add(posterior, prior, latents[0], compared)
        statistics.inference_seconds += inference_seconds
    return {
        "elbo": -elbo(likelihoods, kl),
        "iw": -importance_weighted_bound(likelihoods, torch.stack(log_prior), torch.stack(log_posterior)),
        "reconstruction": -likelihoods.mean(0),
        "kl": kl,
        "prior": -importance_weighted_bound(prior_likelihoods, zeros, zeros),
    }


class LatentStatistics:
    """Active units, mutual information and what inference cost, gathered batch by batch and over all processes."""

    def __init__(self) -> None:
        self.count = 0
        self.inference_seconds = 0.0
        self.comparable = True
        self.sum = self.sum_of_squares = self.prior_variance = torch.zeros(0)
        self.compared: list[tuple[Distribution, Tensor]] = []

    def add(
        self,
        posterior: Distribution,
        prior: Distribution,
        latents: Float[Tensor, "batch *event"],
        compared: Bool[Tensor, " batch"] | None = None,
    ) -> None:
        """Takes in a batch: q, p and one z ~ q of each row; the rows `compared` enter the mutual information."""
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
        rows = torch.ones(len(mean), dtype=torch.bool, device=mean.device) if compared is None else compared
        if bool(rows.any()):
            self.compared.append((select_rows(posterior, rows), latents[rows]))

    def summary(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The figures over the batches of all processes; None each where latents differ in shape."""
        # a process without a batch knows no shape, and one with several knows that there is none
        of_process = -1 if not self.comparable else self.sum.numel() if self.count else None
        known = torch.tensor([] if of_process is None else [of_process], dtype=torch.long, device=device)
        units = gather_rows(known).unique().tolist()
        if len(units) != 1 or units[0] < 0:
            names = ("active_units", "latent_units", "mutual_information", "mutual_information_sequences")
            return dict.fromkeys(names)
        rows = torch.zeros(0, 4, units[0], dtype=torch.double, device=device)
        if self.count:
            count = torch.full_like(self.sum, self.count)
            rows = torch.stack([count, self.sum, self.sum_of_squares, self.prior_variance]).flatten(1)[None]
        gathered = gather_rows(rows)
        count, mean, square = gathered[:, 0].sum(0), gathered[:, 1].sum(0), gathered[:, 2].sum(0)
        variance = square / count - (mean / count).square()
        posteriors, latents = zip(*self.compared, strict=True) if self.compared else ((), ())
        information, number = mutual_information(posteriors, latents, units[0], device)
        return {
            "active_units": int((variance > 0.01 * gathered[0, 3]).sum()),
            "latent_units": units[0],
            "mutual_information": information,
            "mutual_information_sequences": number,
        }


def mutual_information(
    posteriors: Sequence[Distribution],
    latents: Sequence[Float[Tensor, "_ *event"]],
    units: int,
    device: torch.device | str = "cpu",
) -> tuple[float, int]:
    """I(x; z) in nats between N texts, each equally likely, and a latent drawn from its posterior; and N.

    I = (1/N) Σ_i [log q(z_i | x_i) − log (1/N) Σ_j q(z_i | x_j)], z_i ~ q(z | x_i) (Hoffman and Johnson 2016; the
    estimate of Dieng et al. 2019, over N texts rather than per batch). It cannot exceed ln N.

    Args:
        posteriors, latents: batches of q(z | x) and of one z from each row; of several processes, each gives its own.
        units: numbers in a latent.
    """
    own = torch.cat([torch.zeros(0, units, device=device), *(z.flatten(1) for z in latents)])
    every = gather_rows(own)
    # log q(z_i | x_j): a row for each of this process' texts x_j, a column for each z_i of all processes
    densities = torch.zeros(0, len(every), dtype=torch.double, device=device)
    for posterior, z in zip(posteriors, latents, strict=True):
        columns = [posterior.log_prob(one.view(z.shape[1:])).double() for one in every]
        densities = torch.cat([densities, torch.stack(columns, dim=1)])
    densities = gather_rows(densities)
    number = len(every)
    information = densities.diagonal() - densities.logsumexp(0) + math.log(number)
    return float(information.mean()), number
