"""Data sets of token sequences, and what turns their items into batches.

Every sequence is `BOS x_1 … x_T`: BOS is given and never scored, x_1 … x_T are scored. `num_bytes` counts the UTF-8
bytes of the text that the scored tokens stand for; an EOS that a data set adds counts none.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import BatchEncoding, PreTrainedTokenizerBase

from latentlm.data.corpora import Document
from latentlm.data.tokenizers import bos_and_eos
from latentlm.data.tokens import Tokens, tokenise
from latentlm.errors import InputError
from latentlm.processes import rank_and_size

IGNORE_INDEX = -100
#: stands where a text has no more labels, in annotations [batch, words]
NO_LABEL = -1
_MEGA_CHUNK_BATCHES = 50  # lengths are sorted within this many batches: similar lengths, yet a random order


class Item(TypedDict):
    """One sequence: BOS and its scored tokens, the bytes of text that they stand for, its place in the data set, and
    its labels where it has some."""

    input_ids: Int64[Tensor, " time"]
    num_bytes: int
    index: int
    annotations: NotRequired[Int64[Tensor, " words"]]


def _item(bos: int, ids: Sequence[int] | Int32[np.ndarray, " tokens"], num_bytes: int, index: int) -> Item:
    input_ids = torch.empty(len(ids) + 1, dtype=torch.long)
    input_ids[0] = bos
    input_ids[1:] = torch.as_tensor(np.array(ids, dtype=np.int64))  # a copy: ids may be memory-mapped
    return {"input_ids": input_ids, "num_bytes": num_bytes, "index": index}


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name}={value} is too small: give at least 1")


class Blocks(Dataset[Item]):
    """Documents joined, one EOS after each, and cut into blocks of equal length that do not overlap.

    Args:
        documents: read once; or their tokens.
        tokenizer: its BOS begins each block, its EOS ends each document.
        block_length: scored tokens of a block.
        drop_last: leave out the shorter block at the end (training), or keep it as the last item, so that every
            token is scored exactly once (evaluation).

    Items: `input_ids` [block_length + 1], `num_bytes`, `index`.
    """

    def __init__(
        self,
        documents: Iterable[Document] | Tokens,
        tokenizer: PreTrainedTokenizerBase,
        block_length: int,
        drop_last: bool,
    ):
        _check_positive(block_length=block_length)
        self._tokens = documents if isinstance(documents, Tokens) else Tokens.of(documents, tokenizer)
        available = len(self._tokens.ids)
        self._kept = available // block_length * block_length if drop_last else available
        if self._kept == 0:
            raise _too_short(available, block_length)
        self.block_length = block_length
        self._bos, _ = bos_and_eos(tokenizer)

    @property
    def num_tokens(self) -> int:
        """Scored tokens of all blocks."""
        return self._kept

    @property
    def num_bytes(self) -> int:
        """Bytes of text that the scored tokens of all blocks stand for."""
        return int(self._tokens.num_bytes[: self._kept].sum(dtype=np.int64))

    def __len__(self) -> int:
        return -(-self._kept // self.block_length)

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]  # negative indices, and IndexError at the end
        start = index * self.block_length
        span = slice(start, min(start + self.block_length, self._kept))
        return _item(self._bos, self._tokens.ids[span], int(self._tokens.num_bytes[span].sum()), index)


def _too_short(num_tokens: int, block_length: int) -> InputError:
    return InputError(
        f"the text has {num_tokens} tokens, less than one block of {block_length}: "
        "give more text or a smaller block_length"
    )


class StreamedBlocks(IterableDataset[Item]):
    """The blocks of `Blocks`, made while they are read: for corpora that are larger than memory.

    Workers of a DataLoader and ranks of `torch.distributed` share the blocks out by index: block i goes to rank
    i mod R, there to worker ⌊i / R⌋ mod W. Each of them reads and tokenises the whole source, so a fast source
    matters. With `drop_last` every rank gets equally many: the R - 1 last blocks may be left out.

    Whoever shards data sets as well (accelerate does, for those that iterate) must not do it to this one, or most
    of the text is never seen.

    Args:
        source: gives a fresh iterator over the documents each time it is called, in the same order; with workers
            that are spawned it must be picklable.
        tokenizer, block_length, drop_last: as in `Blocks`.
        shuffle_buffer: blocks held to draw the next one from at random; 0 keeps the order of the text.
        seed: of that draw, together with the epoch, the rank and the worker.
    """

    def __init__(
        self,
        source: Callable[[], Iterator[Document]],
        tokenizer: PreTrainedTokenizerBase,
        block_length: int,
        drop_last: bool,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ):
        _check_positive(block_length=block_length)
        if shuffle_buffer < 0:
            raise InputError(f"shuffle_buffer={shuffle_buffer} is negative: give a number of blocks, or 0")
        self.source, self.tokenizer, self.block_length, self.drop_last = source, tokenizer, block_length, drop_last
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        # Shared memory, because workers that live on between epochs have a copy of this object.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Item]:
        return self.blocks_of(int(self._epoch))

    def blocks_of(self, epoch: int) -> Iterator[Item]:
        """This process' blocks in one epoch's order."""
        rank, ranks = rank_and_size()
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        own = self._own_blocks(rank, ranks, worker, workers)
        if self.shuffle_buffer:
            own = _shuffled(own, self.shuffle_buffer, f"{self.seed} {epoch} {rank} {worker}")
        return own

    def _own_blocks(self, rank: int, ranks: int, worker: int, workers: int) -> Iterator[Item]:
        bos, _ = bos_and_eos(self.tokenizer)
        held = None
        for index, (ids, num_bytes) in enumerate(self._all_blocks()):
            if index % ranks == rank and index // ranks % workers == worker:
                held = _item(bos, ids, num_bytes, index)
            round_is_complete = index % ranks == ranks - 1
            if held and (round_is_complete or not self.drop_last):
                yield held
                held = None

    def _all_blocks(self) -> Iterator[tuple[Int32[np.ndarray, " tokens"], int]]:
        ids = num_bytes = np.empty(0, np.int32)
        length, index = self.block_length, 0
        for _, batch in tokenise(self.source(), self.tokenizer):
            ids, num_bytes = np.concatenate((ids, batch.ids)), np.concatenate((num_bytes, batch.num_bytes))
            whole = len(ids) // length * length
            for start in range(0, whole, length):
                yield ids[start : start + length], int(num_bytes[start : start + length].sum())
                index += 1
            ids, num_bytes = ids[whole:], num_bytes[whole:]
        if len(ids) and not self.drop_last:
            yield ids, int(num_bytes.sum())
        elif index == 0:
            raise _too_short(len(ids), length)


def _shuffled(items: Iterator[Item], size: int, seed: str) -> Iterator[Item]:
    """Each item once it is drawn from a buffer of `size`; the random sequence is the same on every platform."""
    rng = random.Random(seed)
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
        else:
            position = int(rng.random() * size)
            yield buffer[position]
            buffer[position] = item
    yield from (buffer[index] for index in _permutation(len(buffer), rng))


class Sentences(Dataset[Item]):
    """One document per item: BOS, its tokens, EOS.

    Args:
        documents: read once, or their tokens; those without a token are skipped.
        tokenizer: gives BOS and EOS.
        max_length: scored tokens kept of each document, EOS counted; None keeps all. Of its labels as many are kept.
        labels: the names of all labels, where the documents are annotated and items are to say so.

    Attributes:
        factors: the generative factors of each item (None for one without), or None if no document has any.

    Items: `input_ids` [lengths[i] + 1], `num_bytes`, `index`; with `labels` also `annotations`, their places in it.
    """

    def __init__(
        self,
        documents: Iterable[Document] | Tokens,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        labels: Sequence[str] | None = None,
    ):
        if max_length is not None:
            _check_positive(max_length=max_length)
        self._bos, _ = bos_and_eos(tokenizer)
        self._tokens = documents if isinstance(documents, Tokens) else Tokens.of(documents, tokenizer)
        if len(self._tokens.ends) == 0:
            raise InputError("the documents hold no text: give at least one that is not empty")
        self.max_length = max_length
        self.factors = self._tokens.factors
        self._annotations = None
        if labels is not None:
            of_texts = self._tokens.annotations
            if of_texts is None or None in of_texts:
                raise InputError("the texts are not annotated, and this model is of texts that are: say where they are")
            self._annotations = [row[:max_length] for row in label_ids([row for row in of_texts if row], labels)]

    def _whole_lengths(self) -> Int64[np.ndarray, " documents"]:
        return np.diff(self._tokens.ends, prepend=0)

    @property
    def lengths(self) -> list[int]:
        """Scored tokens of each item."""
        lengths = self._whole_lengths()
        return (lengths if self.max_length is None else lengths.clip(max=self.max_length)).tolist()

    @property
    def truncated(self) -> int:
        """How many items lost tokens to `max_length`."""
        return 0 if self.max_length is None else int((self._whole_lengths() > self.max_length).sum())

    @property
    def num_tokens(self) -> int:
        """Scored tokens of all items."""
        return sum(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes of text that the scored tokens of all items stand for."""
        return sum(int(self._tokens.num_bytes[self._span(index)].sum()) for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._tokens.ends)

    def _span(self, index: int) -> slice:
        index = range(len(self))[index]
        start = int(self._tokens.ends[index - 1]) if index else 0
        end = int(self._tokens.ends[index])
        return slice(start, end if self.max_length is None else min(end, start + self.max_length))

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        span = self._span(index)
        item = _item(self._bos, self._tokens.ids[span], int(self._tokens.num_bytes[span].sum()), index)
        if self._annotations is not None:
            item["annotations"] = self._annotations[index]
        return item


def label_ids(annotations: Sequence[Sequence[str]], labels: Sequence[str]) -> list[Int64[Tensor, " words"]]:
    """The labels of each text as their places among the known ones.

    Raises:
        InputError: a label that is none of them.
    """
    places = {label: place for place, label in enumerate(labels)}
    for number, row in enumerate(annotations, start=1):
        if unknown := [label for label in row if label not in places]:
            known = ", ".join(labels[:30]) + (", …" if len(labels) > 30 else "")
            raise InputError(f"text {number} has the label {unknown[0]!r}, which is none of {known}.")
    return [torch.tensor([places[label] for label in row], dtype=torch.long) for row in annotations]


def condition_of(annotations: Sequence[Sequence[str]], labels: Sequence[str] | None) -> dict[str, Tensor]:
    """The labels of texts as a model takes them: `annotations` [texts, words].

    Args:
        labels: those that the model knows, its config's `annotation_labels`.

    Raises:
        InputError: the model knows none, or not one of these.
    """
    if labels is None:
        raise InputError("this model was trained without annotations: give no labels.")
    if not annotations or any(isinstance(row, str) or not row for row in annotations):
        raise InputError("annotations are a list of the labels of each text, at least one: [['ARG0', 'V'], …].")
    return {"annotations": padded_labels(label_ids(annotations, labels))}


# --- batches -----------------------------------------------------------------------------------------------------


def collate(features: Sequence[Mapping], pad_token_id: int) -> dict[str, Any]:
    """Pads items on the right to one batch.

    Returns:
        `input_ids` [B, L], `attention_mask` [B, L] (1 real, 0 padding), `labels` [B, L] (the ids, -100 at BOS and
        padding: whoever counts scored tokens counts the rest), `num_bytes` [B], `index` [B]. Of annotated items also
        `condition`, a mapping with `annotations` [B, words], −1 after a text's last label.
    """
    rows = [feature["input_ids"] for feature in features]
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    # From the lengths and not from the ids: padding may be the same token as EOS.
    real = torch.arange(input_ids.shape[1]) < lengths[:, None]
    labels = input_ids.masked_fill(~real, IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX
    numbers = {
        name: torch.tensor([feature[name] for feature in features], dtype=torch.long) for name in ("num_bytes", "index")
    }
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": real.long(), "labels": labels, **numbers}
    if "annotations" in features[0]:
        batch["condition"] = {"annotations": padded_labels([feature["annotations"] for feature in features])}
    return batch


def padded_labels(rows: Sequence[Int64[Tensor, " _"]]) -> Int64[Tensor, "batch words"]:
    """Labels of texts as one tensor, −1 after the last of each."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=NO_LABEL)


class Collator:
    """`collate` with the padding token of a tokenizer: a `data_collator` for a Trainer or a DataLoader.

    Args:
        beside: makes of `input_ids` and `attention_mask` what else a model takes as condition, so that this is done
            where batches are made (`pretrained.Retokeniser`); None for nothing.
    """

    def __init__(
        self, pad_token_id: int, beside: Callable[[Tensor, Tensor | None], Mapping[str, Tensor]] | None = None
    ):
        self.pad_token_id, self.beside = pad_token_id, beside

    def __call__(self, features: Sequence[Mapping]) -> dict[str, Any]:
        batch = collate(features, self.pad_token_id)
        if self.beside is not None:
            made = self.beside(batch["input_ids"], batch["attention_mask"])
            batch["condition"] = {**batch.get("condition", {}), **made}
        return batch


def text_batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], end: bool = True) -> BatchEncoding:
    """Texts as a model takes them: `input_ids` [B, L] of BOS, tokens and, unless `end` is false, EOS, padded on the
    right, and `attention_mask` [B, L].

    A prompt to continue has no end yet: `end=False`.
    """
    if isinstance(texts, str):
        raise InputError("texts are a list of strings, not one string: put it into a list")
    if not texts:
        raise InputError("there are no texts: give a list with at least one string")
    bos, eos = bos_and_eos(tokenizer)
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    items = [_item(bos, [*ids, eos] if end else ids, 0, index) for index, ids in enumerate(encoded)]
    pad = tokenizer.pad_token_id
    batch = collate(items, pad if isinstance(pad, int) else eos)
    return BatchEncoding({name: batch[name] for name in ("input_ids", "attention_mask")})


# --- orders and splits -------------------------------------------------------------------------------------------


def _permutation(size: int, rng: random.Random) -> list[int]:
    keys = [rng.random() for _ in range(size)]
    return sorted(range(size), key=keys.__getitem__)


def length_buckets(lengths: Sequence[int], batch_size: int, seed: int, shuffle: bool) -> list[list[int]]:
    """Batches of indices of similar lengths; every index is in exactly one.

    Shuffled, the indices are sorted by length within random chunks of 50 batches and the batches come in random
    order; otherwise they are sorted by length over all. Only one batch may be smaller than `batch_size`.
    """
    _check_positive(batch_size=batch_size)
    rng = random.Random(seed)
    order = _permutation(len(lengths), rng) if shuffle else list(range(len(lengths)))
    chunk = batch_size * _MEGA_CHUNK_BATCHES if shuffle else max(len(order), 1)
    batches = []
    for start in range(0, len(order), chunk):
        part = sorted(order[start : start + chunk], key=lengths.__getitem__)
        batches += [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
    return [batches[index] for index in _permutation(len(batches), rng)] if shuffle else batches


def split_documents(documents: Sequence[Document], fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Splits documents at random into training and validation, both in their old order and neither empty.

    Equal texts go to the same side, or the validation would hold text that was trained on.

    Args:
        fraction: of the distinct texts that go to validation, between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise InputError(f"a validation fraction of {fraction} is impossible: give one between 0 and 1, such as 0.1")
    texts = list(dict.fromkeys(document.text for document in documents))
    if len(texts) < 2:
        raise InputError(
            f"{len(texts)} distinct document cannot be split into training and validation: "
            "give a validation file, or sample_by=line or sample_by=paragraph"
        )
    size = min(max(round(fraction * len(texts)), 1), len(texts) - 1)
    chosen = {texts[index] for index in _permutation(len(texts), random.Random(seed))[:size]}
    train = [document for document in documents if document.text not in chosen]
    return train, [document for document in documents if document.text in chosen]
