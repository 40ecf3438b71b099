"""From the `data` section of a recipe to sequences and a tokenizer."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from latentlm.data.corpora import Annotated, Document, read_documents, source_fingerprint
from latentlm.data.datasets import Blocks, Sentences, StreamedBlocks, split_documents
from latentlm.data.store import store_tokens
from latentlm.data.tokenizers import (
    SMALLEST_VOCABULARY,
    SMALLEST_VOCABULARY_OF_WORDS,
    load_tokenizer,
    train_tokenizer,
    train_word_tokenizer,
)
from latentlm.data.tokens import Tokens
from latentlm.errors import InputError, shown

RECIPE_FILE = "recipe.yaml"
#: `DataRecipe.tokenizer` that is trained on words; a folder of that name is ./words
WORDS = "words"
# blocks that wait in memory to be drawn at random while streaming
_SHUFFLED_BLOCKS = 4096
# tokens; a slip of the hand is larger
_LARGEST_COUNT = 2**24
# documents from which a streamed corpus' tokenizer is trained
_TOKENIZER_DOCUMENTS = 50_000
_SECONDS_BETWEEN_STAGES = 30


@strict
@dataclass(kw_only=True)
class DataRecipe:
    """What is read and how it becomes sequences.

    Args:
        source: a file, a folder, `hub:NAME[:CONFIG]` or `builtin:NAME`.
        validation: a source for validation; None splits `validation_fraction` of the documents off,
            by `split_seed`.
        column: text column of a table; see `data.read_documents`.
        sample_by: what of a text file is a document: "line", "paragraph" or "document".
        annotations: where the labels of each text stand: a column, or in a `.txt` what stands between a line's text and
            its labels, such as ' & '; None for none. A model that takes a condition is given them.
        annotations_per: what has one label: each "word" (what white space separates) or each "text".
        unit: "blocks" packs documents into blocks of `length` tokens; "sentences" makes each document a sequence of at
            most `length` tokens.
        length: scored tokens of a sequence, T.
        limit: documents read from `source`; None for all.
        streaming: read, tokenise and shuffle while training, for text that does not fit in memory (blocks only).
        cache: folder in which the tokens of `source` are kept, memory-mapped: tokenised once, by one process, and
            taken up where that was cut short. None keeps them in memory.
        tokenizer: folder or hub name of a tokenizer; None trains one of `vocab_size` tokens (pieces of words, which can
            spell any text) on the training text, and `words` makes one of its `vocab_size` most frequent words, the
            others `<unk>` (`train_word_tokenizer`; a folder of that name is `./words`).
    """

    source: str
    validation: str | None = None
    validation_fraction: float | int = 0.05
    split_seed: int = 0
    column: str | None = None
    sample_by: Literal["line", "paragraph", "document"] = "line"
    annotations: str | None = None
    annotations_per: Literal["word", "text"] = "word"
    unit: Literal["blocks", "sentences"] = "blocks"
    length: int = 128
    limit: int | None = None
    streaming: bool = False
    cache: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 8192

    def validate_values(self) -> None:
        """Part of the validation of `@strict`."""
        if not 1 <= self.length <= _LARGEST_COUNT:
            raise ValueError(f"length must be at least 1 and at most {_LARGEST_COUNT}, not {shown(self.length)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, not {self.limit}")
        smallest = {None: SMALLEST_VOCABULARY, WORDS: SMALLEST_VOCABULARY_OF_WORDS}.get(self.tokenizer)
        if smallest is not None and self.vocab_size < smallest:
            raise ValueError(f"vocab_size must be at least {smallest}, not {self.vocab_size}")
        if self.vocab_size > _LARGEST_COUNT:
            raise ValueError(f"vocab_size must be at most {_LARGEST_COUNT}, not {shown(self.vocab_size)}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, not {self.validation_fraction}")
        if self.streaming and self.unit == "sentences":
            raise ValueError("streaming makes blocks: set unit to blocks, or streaming to false")
        if self.streaming and self.validation is None:
            raise ValueError("streaming reads source once and cannot split it: name a source under validation")
        if self.annotations is not None and (self.unit != "sentences" or self.cache is not None):
            raise ValueError("annotations are of sentences in memory: set unit to sentences, and leave cache out")
        if self.cache is not None and self.streaming:
            raise ValueError("cache keeps tokens that streaming does not need: leave one of them out")
        if self.cache is not None and self.validation is None:
            raise ValueError("cache keeps all of source and cannot split it: name a source under validation")
        if self.cache is not None and not self.cache.strip():
            raise ValueError("cache is empty: name a folder, or null for none")

    def documents(self, source: str | None = None, limit: int | None = None) -> Iterator[Document]:
        """Those of `source`, or of another source of the same form."""
        return read_documents(
            self.source if source is None else source,
            column=self.column,
            sample_by=self.sample_by,
            limit=self.limit if source is None else limit,
            annotated=self.annotated,
        )

    @property
    def annotated(self) -> Annotated | None:
        return None if self.annotations is None else Annotated(self.annotations, self.annotations_per)


@dataclass
class Corpus:
    """A recipe's data as sequences, the tokenizer that made them, and the names of the labels that they have."""

    train: Dataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase
    labels: list[str] | None = None


def load_corpus(
    data: DataRecipe,
    seed: int = 0,
    on_stage: Callable[[str], None] = lambda stage: None,
    *,
    with_labels: bool = True,
) -> Corpus:
    """Reads, splits by document, tokenises and cuts into sequences.

    Args:
        on_stage: told in words how far a cache is.
        with_labels: the sequences of annotated texts have their labels.
    """
    if data.streaming:
        return _stream_corpus(data, seed)
    if data.cache is not None:
        return _cached_corpus(data, data.cache, on_stage)
    documents = list(data.documents())
    if data.validation is None:
        training, validation = split_documents(documents, data.validation_fraction, data.split_seed)
    else:
        training, validation = documents, _validation_documents(data)
    tokenizer = _tokenizer(data, (document.text for document in training))
    labels = None
    if data.annotated is not None and with_labels:  # a rare one may have come to the validation alone
        labels = sorted({label for document in [*training, *validation] for label in document.annotations or ()})
    return Corpus(
        make_sequences(training, tokenizer, data.unit, data.length, drop_last=True, labels=labels),
        make_sequences(validation, tokenizer, data.unit, data.length, drop_last=False, labels=labels),
        tokenizer,
        labels,
    )


def make_sequences(
    documents: Iterable[Document] | Tokens,
    tokenizer: PreTrainedTokenizerBase,
    unit: str,
    length: int,
    *,
    drop_last: bool,
    labels: Sequence[str] | None = None,
) -> Dataset:
    """Blocks or sentences of at most `length` scored tokens; `labels` names those of annotated sentences."""
    if unit == "sentences":
        return Sentences(documents, tokenizer, max_length=length, labels=labels)
    return Blocks(documents, tokenizer, block_length=length, drop_last=drop_last)


def _stream_corpus(data: DataRecipe, seed: int) -> Corpus:
    first = (document.text for document, _ in zip(data.documents(), range(_TOKENIZER_DOCUMENTS), strict=False))
    tokenizer = _tokenizer(data, first)
    train = StreamedBlocks(data.documents, tokenizer, data.length, True, shuffle_buffer=_SHUFFLED_BLOCKS, seed=seed)
    validation = make_sequences(_validation_documents(data), tokenizer, data.unit, data.length, drop_last=False)
    return Corpus(train, validation, tokenizer)


def seldom(say: Callable[[str], None]) -> Callable[[str], None]:
    """What says the first thing that it is given, and later ones where half a minute has passed since the last."""
    said = -math.inf

    def say_seldom(what: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _SECONDS_BETWEEN_STAGES:
            said = time.monotonic()
            say(what)

    return say_seldom


def _cached_corpus(data: DataRecipe, folder: str, on_stage: Callable[[str], None]) -> Corpus:
    say = seldom(on_stage)

    def on_progress(documents: int, tokens: int) -> None:
        say(f"tokenising into {folder}: {documents:,} documents, {tokens:,} tokens")

    validation = _validation_documents(data)  # before hours of tokenising: it may not be there
    words = data.tokenizer == WORDS
    tokens, tokenizer = store_tokens(
        folder,
        data.documents,
        data.vocab_size if data.tokenizer is None or words else load_tokenizer(data.tokenizer),
        {
            "source": source_fingerprint(data.source),
            "column": data.column,
            "sample_by": data.sample_by,
            "limit": data.limit,
            **({"tokenizer": WORDS} if words else {}),
        },
        train=train_word_tokenizer if words else train_tokenizer,
        on_progress=on_progress,
        on_wait=lambda: on_stage(f"waiting for another process that tokenises into {folder}"),
    )
    return Corpus(
        make_sequences(tokens, tokenizer, data.unit, data.length, drop_last=True),
        make_sequences(validation, tokenizer, data.unit, data.length, drop_last=False),
        tokenizer,
    )


def _validation_documents(data: DataRecipe) -> list[Document]:
    assert data.validation is not None
    return list(data.documents(data.validation))


def _tokenizer(data: DataRecipe, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    if data.tokenizer is None:
        return train_tokenizer(texts, data.vocab_size)
    return train_word_tokenizer(texts, data.vocab_size) if data.tokenizer == WORDS else load_tokenizer(data.tokenizer)


def saved_data_recipe(folder: str | Path) -> DataRecipe | None:
    """The data that a model in a folder was trained on, as its recipe says; None where no recipe is saved with it."""
    path = Path(folder) / RECIPE_FILE
    if not path.is_file():
        return None
    unreadable = InputError(f"{path} is no recipe that can be read: delete it, or give --data.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
        known = {f.name for f in fields(DataRecipe)}
        return DataRecipe(**{key: value for key, value in content.items() if key in known})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable from error
    except (yaml.YAMLError, StrictDataclassError) as error:
        raise unreadable from error


def evaluation_sequences(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    source: str | None = None,
    *,
    column: str | None = None,
    sample_by: str | None = None,
    limit: int | None = None,
    annotations: str | None = None,
    labels: Sequence[str] | None = None,
) -> Dataset:
    """Sequences to evaluate a saved model on: `source`, cut as the model's recipe cuts, or the recipe's own validation.

    Args:
        folder: the model's.
        longest: the model's context, used where no recipe is saved with it (blocks of that many tokens).
        limit: documents read.
        annotations: where labels stand in `source`, as `DataRecipe.annotations`; None as in the recipe.
        labels: names of those that the model takes as a condition; None for none.
    """
    data = saved_data_recipe(folder)
    if source is None:
        if data is None:
            raise InputError(f"{folder} has no {RECIPE_FILE} that would say what to evaluate on: give --data.")
        if data.validation is None:
            documents = split_documents(list(data.documents()), data.validation_fraction, data.split_seed)[1][:limit]
        else:
            documents = list(data.documents(data.validation, limit))
    else:
        by = sample_by or (data.sample_by if data else "line")
        annotated = annotated_as(data, annotations, needed=labels is not None)
        documents = list(read_documents(source, column=column, sample_by=by, limit=limit, annotated=annotated))
    return make_sequences(documents, tokenizer, *unit_and_length(data, longest), drop_last=False, labels=labels)


def unit_and_length(data: DataRecipe | None, longest: int) -> tuple[str, int]:
    """How text is cut for a saved model: as its recipe cuts, or blocks of its context where none is saved with it."""
    return ("blocks", longest) if data is None else (data.unit, data.length)


def annotated_as(data: DataRecipe | None, annotations: str | None, needed: bool) -> Annotated | None:
    """Where the labels of other texts stand: as a model's recipe says, at another place if one is given.

    Where they are not needed a text may have none.

    Raises:
        InputError: nothing says where, and they are needed.
    """
    place = annotations or (None if data is None else data.annotations)
    if place is None and not needed:
        return None
    if place is None:
        raise InputError("this model is conditional: say where the labels of the texts stand (--annotations).")
    return Annotated(place, "word" if data is None else data.annotations_per, needed)
