"""Texts from nothing: their likelihood under a scorer, their variety and their speed (Kong et al. 2025, Table 3)."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from latentlm.errors import InputError
from latentlm.evaluation.batches import evaluating, synchronised
from latentlm.evaluation.generative import Reader, check_scorer, generative_perplexity
from latentlm.evaluation.samples import end_tokens, from_prior, sampling, until_end
from latentlm.evaluation.writing import as_one, documents, new_texts, stopping, variety, writes_freely
from latentlm.latent_lm import LatentLM


@torch.no_grad()
def unconditional(
    model: LatentLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    number: int = 64,
    length: int | None = None,
    fixed_length: bool = True,
    scorer: Reader | None = None,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Writes texts from BOS, each with its own z from the prior, greedily and by sampling at temperature 1.

    Greedy texts differ by z alone; a model without latents has one, which stands for all of them. The first z's of both
    rows are the same, and so are those and the tokens of `samples.prior_samples`.

    Args:
        number: how many texts of each row.
        length: tokens of each at most; by default the model's context.
        fixed_length: EOS stands between documents (a model of blocks), and every text has `length` tokens; otherwise it
            ends a text. See `writing.of_fixed_length`.
        scorer: of generative perplexity; None leaves that out.
        batch_size: texts at a time that the scorer reads; changes no figure, since texts are written in batches of one
            size.
        seed: of z and of the tokens.
        on_progress: called with (done, in all), first of the texts that are written, then of those that are scored.

    Returns:
        The settings, and under `rows` the figures of `greedy` and `sampled`: `texts`, `different_texts`, `tokens`
        (without an EOS that ends a text), those of `writing.variety` and of `generative_perplexity`, `seconds`,
        `samples_per_second` and `tokens_per_second`, of what was really written. And the texts.

    Raises:
        InputError: a model of p(x | c) or that writes no text, a length beyond its context, or a scorer of another
            kind.
    """
    writer = writes_freely(model)
    context = writer.config.max_position_embeddings
    length = context if length is None else length
    if number < 1 or length < 1:
        raise InputError("number and length must be at least 1.")
    if length > context:
        raise InputError(f"texts of {length} tokens exceed the model's context of {context}: ask for at most that.")
    if scorer is not None:
        check_scorer(scorer)
    ends = end_tokens(writer.config)
    figures, lines = {}, []
    for place, (name, do_sample) in enumerate((("greedy", False), ("sampled", True))):
        once = writer.exact and not do_sample
        written: list[list[int]] = []
        start = time.perf_counter()
        with evaluating(writer), stopping(writer, fixed_length):
            for rows in from_prior(writer, 1 if once else number, length, seed=seed, **sampling(do_sample)):
                written += rows.tolist()
                if on_progress is not None:
                    on_progress(place * number + len(written), 2 * number)
        synchronised(writer.device)
        seconds = time.perf_counter() - start
        texts = new_texts(writer, written, fixed_length)
        strings = [documents(text, ends, tokenizer) for text in texts] * (number if once else 1)
        inside = texts if fixed_length else [[*until_end(text, ends)] for text in texts]
        all_inside = inside * (number if once else 1)
        figures[name] = {
            "texts": number,
            "different_texts": len({*map(tuple, all_inside)}),
            "tokens": sum(map(len, all_inside)),
            **variety([all_inside]),
            "seconds": seconds,
            "samples_per_second": len(texts) / seconds,
            "tokens_per_second": sum(map(len, inside)) / seconds,
        }
        if scorer is not None:
            options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "on_progress": on_progress}
            figures[name] |= generative_perplexity(scorer, strings, tokenizer, **options)
        lines += [{"row": name, "text": as_one(text)} for text in strings]
    return {
        "exact": model.exact,
        "number": number,
        "length": length,
        "fixed_length": fixed_length,
        "rows": figures,
    }, lines
