"""How well a model foretells what follows a prompt, when z is inferred from nothing but the text before.

    log p̂(x_{P+1} … x_T | x_1 … x_P) = log (1/K) Σ_k p(x_{P+1} … x_T | z_k, x_1 … x_P),   z_k ~ q(z | x_1 … x_P)

The mean is over samples of the *summed* log-likelihood: a z holds for the whole continuation. With `reinfer_every` m,
the continuation is foretold in parts of m tokens, each with z inferred afresh from all that stands before it (Kong et
al. 2025, section 2.3, the alternative sampling scheme). Both are laws of the continuation that a generator can follow,
so their NLL may be compared with a control's exact one; for finite K the estimate is an upper bound in expectation.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import Dataset, Subset

from latentlm.distributions import Stream, sequence_keys
from latentlm.errors import InputError
from latentlm.evaluation.batches import PerSequence, evaluating, in_batches, synchronised
from latentlm.latent_lm import LatentLM


@torch.no_grad()
def continuation(
    model: LatentLM,
    sequences: Dataset,
    *,
    prompt_tokens: int,
    reinfer_every: int | None = None,
    samples: int = 16,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Continuation NLL of every sequence longer than the prompt.

    Args:
        prompt_tokens: P, scored tokens of each sequence that are given; 0 draws z from the prior for the first part.
            Of annotated texts all labels are given, those of what follows, too.
        reinfer_every: m; None infers z once, from the prompt.
        samples: K.

    Returns:
        `continuation_nll_per_token` (Σ nats ÷ Σ tokens after the prompt), `continuation_tokens`, the settings, and the
        `continuation_seconds` that scoring took.
    """
    if prompt_tokens < 0 or samples < 1 or (reinfer_every is not None and reinfer_every < 1):
        raise InputError("prompt_tokens must not be negative, samples and reinfer_every must be at least 1.")
    long = longer_than_prompt(sequences, prompt_tokens)
    draws = 1 if model.exact else samples
    figures = PerSequence("nll", "tokens")
    start = time.perf_counter()
    with evaluating(model):
        batches = in_batches(model, long, batch_size, on_progress)
        for indices, input_ids, attention_mask, condition in batches:
            longest = input_ids.shape[1] - 1
            every = reinfer_every or longest
            nll = torch.zeros(len(indices), dtype=torch.double, device=model.device)
            for begin in range(prompt_tokens, longest, every):
                end = min(begin + every, longest)
                until = (input_ids[:, : end + 1], attention_mask[:, : end + 1], condition)
                given = torch.full((len(indices),), begin, device=model.device)
                drawn = latents_of_prompts(
                    model, input_ids, attention_mask, condition, prompt_tokens=given, end=end, samples=draws, seed=seed
                )
                log_likelihood = [model.log_likelihood(z, *until)[:, begin:].sum(-1) for z in drawn]
                nll -= torch.stack(log_likelihood).double().logsumexp(0) - math.log(draws)
            scored = model.scored_tokens(input_ids, attention_mask)[:, prompt_tokens:]
            figures.add(indices, nll=nll, tokens=scored.sum(1))
        totals = {name: float(values.sum()) for name, values in figures.gathered(model.device).items()}
    synchronised(model.device)
    tokens = int(totals["tokens"])
    return {
        "continuation_nll_per_token": totals["nll"] / tokens,
        "continuation_tokens": tokens,
        "continuation_samples": draws,
        "continuation_seconds": time.perf_counter() - start,
        "prompt_tokens": prompt_tokens,
        "reinfer_every": None if model.exact else reinfer_every,
    }


def longer_than_prompt(sequences: Dataset, prompt_tokens: int) -> Subset:
    """The sequences that have a token after a prompt of so many.

    Raises:
        InputError: there is none.
    """
    number = len(sequences)  # type: ignore[arg-type]
    long = [index for index in range(number) if len(sequences[index]["input_ids"]) > prompt_tokens + 1]
    if not long:
        raise InputError(f"no sequence is longer than the prompt of {prompt_tokens} tokens.")
    return Subset(sequences, long)


def latents_of_prompts(
    model: LatentLM,
    input_ids: Int64[Tensor, "batch time"],
    attention_mask: Int64[Tensor, "batch time"],
    condition: Any = None,
    *,
    prompt_tokens: Int64[Tensor, " batch"],
    end: int,
    samples: int,
    seed: int,
) -> Float[Tensor, "samples batch *event"]:
    """z's of texts, padded on the right, from q(z | the text's first scored tokens), or from the prior without any.

    Args:
        prompt_tokens: how many tokens of each text z is inferred from; of all texts at least 1, or of all 0.
        end: scored tokens to which z has to reach.
    """
    longest = int(prompt_tokens.max())
    if longest:
        places = torch.arange(longest + 1, device=input_ids.device)
        seen, seen_mask = input_ids[:, : longest + 1], attention_mask[:, : longest + 1]
        seen_mask = seen_mask * (places <= prompt_tokens[:, None])
        keys, told = sequence_keys(seen, seen_mask), attention_mask[:, : end + 1].sum(1) - 1
        law = model.infer(seen, seen_mask, condition, seed=seed)
        law = model.going_on(law, seen_mask.sum(1) - 1, model.prior(len(input_ids), told, condition))
    else:  # texts that begin alike need noise of their own, or their errors would add up
        law = model.prior(len(input_ids), attention_mask.sum(1) - 1, condition)
        keys = sequence_keys(input_ids, attention_mask)
    return model.draw_latents(law, keys, samples, seed=seed, stream=Stream.CONTINUATION)
