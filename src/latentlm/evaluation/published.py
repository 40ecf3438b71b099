"""Scores as published code gives them (`--protocol paper`): no bounds, here to stand beside the honest figures."""

from collections.abc import Callable

import torch
from torch.utils.data import Dataset

from latentlm.errors import InputError
from latentlm.evaluation.batches import PerSequence, evaluating, in_batches
from latentlm.families import LTM
from latentlm.latent_lm import LatentLM


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

    Raises:
        InputError: the family has no published protocol here.
    """
    if not (isinstance(model, LTM) or model.exact):
        raise InputError(f"no published protocol is known for {type(model).__name__}: score it by the honest one.")
    figures = PerSequence("nll", "tokens")
    with evaluating(model):
        for indices, input_ids, attention_mask in in_batches(model, sequences, batch_size, on_progress):
            if isinstance(model, LTM):
                nll = -model.published_elbo(input_ids, attention_mask, seed=seed).double()
            else:
                nothing = model.prior(len(input_ids), 1).sample()
                nll = -model.log_likelihood(nothing, input_ids, attention_mask).double().sum(-1)
            figures.add(indices, nll=nll, tokens=model.scored_tokens(input_ids, attention_mask).sum(1))
        nll, tokens = figures.gathered(model.device).values()
    return {
        "published_nll_per_token": float(nll.sum() / tokens.sum()),
        "published_perplexity": float((nll / tokens.clamp_min(1)).exp().mean()),
    }
