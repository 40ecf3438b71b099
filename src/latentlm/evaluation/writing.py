"""Texts that a model writes to be measured: where they end, the documents in them, and how varied they are."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from latentlm.data.recipe import saved_data_recipe
from latentlm.data.tokenizers import bos_and_eos
from latentlm.errors import InputError
from latentlm.evaluation.samples import distinct, end_tokens, token_entropy, until_end
from latentlm.generation import WritesText
from latentlm.latent_lm import LatentLM

#: a text as strings: blocks hold several documents, one EOS after each but the last
Documents = Sequence[str]

_REPEATED = 4  # tokens of an n-gram that counts as repetition (Welleck et al. 2020, seq-rep-4)


def of_fixed_length(model: LatentLM, folder: str | Path) -> bool:
    """Whether a saved model's texts are to be of a fixed length: an EOS stands between documents and ends nothing.

    So it is for models that were trained on blocks, as their recipe says; without a recipe, too, as
    `evaluation_sequences` cuts blocks for them. A parallel decoder with a model of the length ends by that.
    """
    data = saved_data_recipe(folder)
    blocks = data is None or data.unit == "blocks"
    return blocks and getattr(model.config, "length_model", "none") == "none"


@contextmanager
def stopping(model: WritesText, fixed_length: bool) -> Iterator[None]:
    """With `fixed_length`, `generate` writes on past EOS, a token like any other; the law of the tokens is the same."""
    holders = [holder for holder in (model.config, getattr(model, "generation_config", None)) if holder is not None]
    ends = [holder.eos_token_id for holder in holders]
    try:
        if fixed_length:
            for holder in holders:
                holder.eos_token_id = None
        yield
    finally:
        for holder, end in zip(holders, ends, strict=True):
            holder.eos_token_id = end


def writes_freely(model: LatentLM) -> WritesText:
    """The model, if it writes p(x).

    Raises:
        InputError: it writes no text, writes p(x | c) alone, or cannot begin one.
    """
    if not isinstance(model, WritesText):
        raise InputError(f"a {type(model).__name__} does not write text.")
    if model.annotation_labels is not None:
        raise InputError("this model is of p(x | c), of texts with labels: these figures are of p(x).")
    if model.config.bos_token_id is None:
        raise InputError("the model's config names no bos_token_id, so it cannot start a text.")
    return model


def new_texts(model: WritesText, rows: Sequence[Sequence[int]], fixed_length: bool) -> list[list[int]]:
    """What was written in each row: all of it, or up to its first EOS, which remains."""
    ends = end_tokens(model.config)
    return [[*row] if fixed_length else [*row[: len(until_end(row, ends)) + 1]] for row in rows]


def documents(text: Sequence[int], ends: Sequence[int | None], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The strings between the tokens that end one; the last is empty where the text ends with such a token."""
    parts: list[list[int]] = [[]]
    for token in text:
        if token in ends:
            parts.append([])
        else:
            parts[-1].append(token)
    return tuple(tokenizer.batch_decode(parts, skip_special_tokens=True))


def as_one(text: Documents) -> str:
    """As one string, a document below the other."""
    return "\n\n".join(document for document in text if document)


def document_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Documents]) -> list[list[int]]:
    """Each text's tokens under a tokenizer: its documents with that tokenizer's EOS between them."""
    if not texts:
        return []
    _, eos = bos_and_eos(tokenizer)
    flat = [document for text in texts for document in text]
    encoded = iter(tokenizer(flat, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    ids = []
    for text in texts:
        row: list[int] = [*next(encoded)]
        for _ in text[1:]:
            row += [eos, *next(encoded)]
        ids.append(row)
    return ids


def repetition(text: Sequence[int]) -> float | None:
    """Share of the 4-grams of a text that repeat an earlier one, 1 − distinct ÷ all (Welleck et al. 2020,
    seq-rep-4); None for less than four tokens.
    """
    share = distinct([text], _REPEATED)
    return None if share is None else 1 - share


def variety(sets: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
    """How varied texts are, given as sets of equally many.

    Distinct n-grams depend on how much text they are of, so they are those of one set, mean over the sets: rows of
    figures with other numbers of sets may be compared, if their sets are of as many texts.

    Returns:
        `token_entropy_nats` and `repetition`, means over texts (None where none has a token, or four); `distinct_1` to
        `_3`.
    """
    texts = [text for one in sets for text in one]
    repeated = [value for text in texts if (value := repetition(text)) is not None]
    figures: dict[str, Any] = {
        "token_entropy_nats": mean([token_entropy(text) for text in texts if text]),
        "repetition": mean(repeated),
    }
    for n in (1, 2, 3):
        figures[f"distinct_{n}"] = mean([value for one in sets if (value := distinct(one, n)) is not None])
    return figures


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
