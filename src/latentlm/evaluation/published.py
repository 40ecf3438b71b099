"""Scores as published code gives them (`--protocol paper`): no bounds, here to stand beside the honest figures."""

import math
from collections.abc import Callable

import torch
from torch.utils.data import Dataset

from latentlm.errors import InputError
from latentlm.evaluation.batches import PerSequence, evaluating, in_batches
from latentlm.families import GPVAE, LTM
from latentlm.latent_lm import LatentLM


def has_published_protocol(model: LatentLM) -> bool:
    """Whether `published_figures` knows what published code would report of the model."""
    return isinstance(model, LTM | GPVAE) or model.exact


@torch.no_grad()
def published_figures(
    model: LatentLM,
    sequences: Dataset,
    *,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The figures that a family's published code would give, of which none may be compared with another's.

    LTM: one noise for all fast steps and for the score (`LTM.published_elbo`), and as perplexity the mean over
    sequences of exp(NLL per token). `published_nll_per_token` is Σ nats ÷ Σ tokens of the same scores. Neither is a
    bound. A model without latents has its exact NLL here, and the same mean of exponentials.

    GP-VAE: "PPL(cont)", the perplexity of continuations that the model itself writes after the first half of each text,
    under the z of an encoder that has seen them: a reconstruction of its own text (`GPVAE.published_nll`).

    Raises:
        InputError: the family has no published protocol here.
    """
    if not has_published_protocol(model):
        raise InputError(f"no published protocol is known for {type(model).__name__}: score it by the honest one.")
    figures = PerSequence("nll", "tokens")
    with evaluating(model):
        for indices, input_ids, attention_mask, _ in in_batches(model, sequences, batch_size, on_progress):
            tokens = model.scored_tokens(input_ids, attention_mask).sum(1)
            if isinstance(model, GPVAE):
                nll, tokens = model.published_nll(input_ids, attention_mask, seed=seed)
            elif isinstance(model, LTM):
                nll = -model.published_elbo(input_ids, attention_mask, seed=seed).double()
            else:
                nothing = model.prior(len(input_ids), 1).sample()
                nll = -model.log_likelihood(nothing, input_ids, attention_mask).double().sum(-1)
            figures.add(indices, nll=nll, tokens=tokens)
        nll, tokens = figures.gathered(model.device).values()
    per_token = float(nll.sum() / tokens.sum())
    if isinstance(model, GPVAE):
        return {"published_nll_per_token": per_token, "published_perplexity": math.exp(per_token)}
    return {
        "published_nll_per_token": per_token,
        "published_perplexity": float((nll / tokens.clamp_min(1)).exp().mean()),
    }
