"""How a model goes on from prompts: completions beside what people wrote there (Kong et al. 2025, Table 2).

z is inferred from the prompt alone, afresh for each text. So greedy texts of a prompt differ by z, and by nothing else;
a model without latents has one, which stands for all of them here, so that figures of sets are of equal size.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from latentlm.errors import InputError
from latentlm.evaluation.batches import by_hash, evaluating, synchronised
from latentlm.evaluation.generative import Reader, check_scorer, generative_perplexity
from latentlm.evaluation.mauve_score import check_mauve, features, mauve
from latentlm.evaluation.reconstruction import bleu
from latentlm.evaluation.samples import AT_ONCE, end_tokens, sampling, self_bleu, until_end
from latentlm.evaluation.writing import Documents, as_one, documents, mean, new_texts, stopping, variety, writes_freely
from latentlm.generation import WritesText
from latentlm.latent_lm import LatentLM

Texts = list[list[int]]


class Row(NamedTuple):
    """What one way of writing wrote, and what it took."""

    texts: Texts  # those of one prompt together
    seconds: float | None = None
    written_tokens: int = 0  # a text that stands for several was written once


@torch.no_grad()
def completions(
    model: LatentLM,
    sequences: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: int = 1000,
    prompt_tokens: int = 50,
    new_tokens: int = 50,
    each: int = 5,
    fixed_length: bool = True,
    scorer: Reader | None = None,
    reader: Reader | None = None,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Goes on from prompts greedily and by sampling at temperature 1, and compares with the real continuations.

    Prompts are the beginnings of sequences, the first in the order of their hash, no two alike.

    Args:
        sequences: items with `input_ids`; those shorter than a prompt and its continuation are left out.
        prompts: how many.
        prompt_tokens, new_tokens: scored tokens of a prompt, and after it at most.
        each: texts of each prompt; each has a z of its own.
        fixed_length: EOS stands between documents (a model of blocks), and every text has `new_tokens`; otherwise it
            ends a text. See `writing.of_fixed_length`.
        scorer: of generative perplexity, of the new text given the prompt; None leaves that out.
        reader: whose features MAUVE compares, of prompt and text; None leaves that out.
        batch_size: texts at a time that the scorer and the reader read. Texts are written in batches of one size, so
            it changes no figure.
        seed: of z and of the tokens.
        on_progress: called with (done, in all), first of the texts that are written, then of those that are read.

    Returns:
        The settings, and under `rows` the figures of `greedy`, `sampled` and `human`: `texts`, `tokens` (without an
        EOS that ends a text), `different_texts_per_prompt`, those of `writing.variety` (each set has one text of every
        prompt), `self_bleu` of a prompt's texts (mean over prompts, 0 to 100; None of one text), `bleu` (corpus BLEU of
        new text against the real continuation, 0 to 100), those of `generative_perplexity` and of `mauve`, `seconds`
        and `tokens_per_second`. Of the human row what compares with itself is None.
        And the texts: prompt, text, row, and the real continuation.

    Raises:
        InputError: a model of p(x | c) or that writes no text, too few sequences that are long enough, a text beyond
            the context, or a scorer or reader of another kind.
    """
    writer = writes_freely(model)
    if min(prompts, prompt_tokens, new_tokens, each) < 1:
        raise InputError("prompts, prompt_tokens, new_tokens and each must be at least 1.")
    if scorer is not None:
        check_scorer(scorer)
    if reader is not None:
        check_mauve(reader)
        if prompts < 2:
            raise InputError("MAUVE compares sets of texts: ask for at least 2 prompts, or leave the features out.")
    chosen = _chosen(sequences, prompts, prompt_tokens, new_tokens, writer.config.max_position_embeddings)
    ends = end_tokens(writer.config)

    def strings(texts: Sequence[Sequence[int]]) -> list[Documents]:
        return [documents(text, ends, tokenizer) for text in texts]

    begun = torch.stack([text[: prompt_tokens + 1] for text in chosen]).to(writer.device)
    real = new_texts(writer, [text[prompt_tokens + 1 :].tolist() for text in chosen], fixed_length)
    known = begun[:, 1:].tolist()
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "on_progress": on_progress}
    of_people = None
    if reader is not None:  # before the work of writing, since it may refuse
        of_people = features(reader, strings(_joined(known, real)), **options)
    rows = {}
    for done, (name, do_sample) in enumerate((("greedy", False), ("sampled", True))):

        def progress(written: int, done: int = done) -> None:
            if on_progress is not None:
                on_progress(done * prompts + written, 2 * prompts)

        rows[name] = _write(writer, begun, new_tokens, each, do_sample, fixed_length, seed, progress)
    rows["human"] = Row(real)
    before, real_strings = strings(known), strings(real)
    figures, lines = {}, []
    for name, row in rows.items():
        of_each = len(row.texts) // prompts
        prompted = [prompt for prompt in before for _ in range(of_each)]
        continued = [text for text in real_strings for _ in range(of_each)]
        written = strings(row.texts)
        lines += [
            {"row": name, "prompt": as_one(prompt), "text": as_one(text), "continuation": as_one(continuation)}
            for prompt, text, continuation in zip(prompted, written, continued, strict=True)
        ]
        inside = row.texts if fixed_length else [[*until_end(text, ends)] for text in row.texts]
        figures[name] = _of_texts(inside, of_each) | {
            "bleu": None if name == "human" else bleu([*map(as_one, written)], [*map(as_one, continued)]),
        }
        if scorer is not None:
            figures[name] |= generative_perplexity(scorer, written, tokenizer, prompts=prompted, **options)
        if reader is not None and of_people is not None and name != "human":
            whole = strings(_joined(known, row.texts))  # as tokens: of words, strings would need a blank between
            figures[name] |= mauve(of_people, features(reader, whole, **options), seed=seed)
        per_second = row.written_tokens / row.seconds if row.seconds else None
        figures[name] |= {"seconds": row.seconds, "tokens_per_second": per_second}
    return {
        "exact": model.exact,
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "each": each,
        "fixed_length": fixed_length,
        "rows": figures,
    }, lines


def _chosen(
    sequences: Dataset, number: int, prompt_tokens: int, new_tokens: int, context: int
) -> list[Int64[Tensor, " _"]]:
    """Prompts and what follows, with BOS."""
    needed = prompt_tokens + new_tokens
    if needed > context:
        raise InputError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones exceed the model's context of {context}: "
            "ask for fewer."
        )
    found: dict[bytes, Tensor] = {}
    for index in by_hash(sequences):
        text = sequences[index]["input_ids"][: needed + 1]
        if len(text) > needed:
            found.setdefault(text[: prompt_tokens + 1].numpy().tobytes(), text)
        if len(found) == number:
            return list(found.values())
    raise InputError(
        f"{number:,} different prompts of {prompt_tokens} tokens with {new_tokens} after them are needed, and the data "
        f"has {len(found):,}: ask for fewer or shorter ones, or give more text."
    )


def _write(
    writer: WritesText,
    begun: Int64[Tensor, "prompts time"],
    new_tokens: int,
    each: int,
    do_sample: bool,
    fixed_length: bool,
    seed: int,
    on_progress: Callable[[int], None],
) -> Row:
    once = writer.exact and not do_sample
    draws = 1 if once else each
    at_once = max(AT_ONCE // draws, 1)
    texts: Texts = []
    start = time.perf_counter()
    with evaluating(writer):
        for first in range(0, len(begun), at_once):
            some = begun[first : first + at_once]
            with stopping(writer, fixed_length):
                # z belongs to its prompt; the tokens of a batch come from one generator, and want one of their own
                written = writer.generate(
                    some,
                    max_new_tokens=new_tokens,
                    num_return_sequences=draws,
                    seed=seed + first if do_sample else seed,
                    **sampling(do_sample),
                )
            texts += new_texts(writer, written[:, begun.shape[1] :].tolist(), fixed_length)
            on_progress(first + len(some))
    synchronised(writer.device)
    seconds = time.perf_counter() - start
    written_tokens = sum(map(len, texts))
    return Row([text for text in texts for _ in range(each if once else 1)], seconds, written_tokens)


def _of_texts(texts: Texts, each: int) -> dict[str, Any]:
    of_prompts = [texts[first : first + each] for first in range(0, len(texts), each)]
    return {
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "different_texts_per_prompt": mean([float(len({*map(tuple, some)})) for some in of_prompts]),
        **variety([texts[place::each] for place in range(each)]),
        "self_bleu": mean([*map(self_bleu, of_prompts)]) if each > 1 else None,
    }


def _joined(prompts: Texts, texts: Texts) -> Texts:
    """Each text after its prompt."""
    each = len(texts) // len(prompts)
    return [prompts[place // each] + text for place, text in enumerate(texts)]
