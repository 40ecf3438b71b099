"""Tokenizers: training one, loading one, and how many bytes of a text each token stands for."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int32, Int64
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from latentlm.data.hub import hub_or_cache
from latentlm.errors import InputError, one_sentence

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT, UNKNOWN_WORD = "<|endoftext|>", "<unk>"
SMALLEST_VOCABULARY = 257
SMALLEST_VOCABULARY_OF_WORDS = 3
T = TypeVar("T")
_BATCH_TEXTS, _BATCH_CHARACTERS = 1000, 1_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE, so that any text can be encoded and `decode(encode(text)) == text`.

    Args:
        texts: the training texts, read once.
        vocab_size: number of tokens at most: 256 bytes, `<|endoftext|>` (which is BOS, EOS and padding) and merges;
            fewer if the texts have no more pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        smallest = f"at least {SMALLEST_VOCABULARY}, for 256 bytes and {END_OF_TEXT}"
        raise InputError(f"vocab_size={vocab_size} is too small: give {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_end_of_text(tokenizer)


def train_word_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Makes a vocabulary of the words between white space, for corpora that papers score by the word (Penn Treebank).

    Every other word becomes `<unk>`, as does the string `<unk>` that some corpora hold in place of rare words: it is
    scored and kept in decoded text like any other word. White space is not kept: `decode(encode(text))` has single
    blanks. What `<unk>` stood for costs nothing, so likelihoods, bits per byte included, compare only between models of
    the same vocabulary.

    Args:
        texts: the training texts, read once.
        vocab_size: number of tokens at most: `<|endoftext|>` (which is BOS, EOS and padding), `<unk>`, and the words in
            the order of how often they occur, equals in that of their characters; fewer if the texts have no more.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    if vocab_size < SMALLEST_VOCABULARY_OF_WORDS:
        smallest = f"at least {SMALLEST_VOCABULARY_OF_WORDS}, for {END_OF_TEXT}, {UNKNOWN_WORD} and a word"
        raise InputError(f"vocab_size={vocab_size} is too small: give {smallest}")
    white_space = pre_tokenizers.WhitespaceSplit()  # Unicode's; Python's split knows four control characters more
    counts: Counter[str] = Counter()
    for text in texts:
        # a tokenizer finds its end of text within words, too
        counts.update(word for word, _ in white_space.pre_tokenize_str(text.replace(END_OF_TEXT, " ")))
    del counts[UNKNOWN_WORD]
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = [END_OF_TEXT, UNKNOWN_WORD, *words][:vocab_size]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN_WORD))
    tokenizer.pre_tokenizer = white_space
    return _with_end_of_text(tokenizer)


def _with_end_of_text(tokenizer: "Tokenizer") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_tokenizer(path: str | Path, needs_end: bool = True) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder or of a model on the hub; BOS and padding default to its EOS.

    Args:
        needs_end: refuse one without EOS, of which no text ends.
    """
    try:
        with hub_or_cache(path):
            tokenizer = AutoTokenizer.from_pretrained(str(path))
    except InputError:
        raise
    except Exception as error:  # the loaders raise many types, down to bare Exception for a damaged file
        reason = one_sentence(error)
        raise InputError(f"{path} holds no tokenizer that loads ({reason}): give another folder") from error
    if tokenizer.eos_token is None:
        if not needs_end:
            return tokenizer
        raise InputError(f"the tokenizer of {path} has no end of sequence: set eos_token in its tokenizer_config.json")
    if max(tokenizer.get_vocab().values(), default=0) >= len(tokenizer):
        raise InputError(f"the tokenizer of {path} leaves some numbers out, so no vocabulary fits it: give another")
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def bos_and_eos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not isinstance(bos, int) or not isinstance(eos, int):
        raise InputError("the tokenizer lacks a BOS or EOS token: load it with load_tokenizer, which sets both")
    return bos, eos


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Differs between tokenizers that cut text differently or have another BOS or EOS."""
    _check_fast(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["truncation"], backend["padding"]  # of the last call, and no part of the tokenizer
    content = json.dumps([backend, tokenizer.bos_token_id, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class EncodedTexts(NamedTuple):
    """Texts of a batch, end to end."""

    ids: Int32[np.ndarray, " tokens"]
    num_bytes: Int32[np.ndarray, " tokens"]  # UTF-8 bytes that each token accounts for
    lengths: Int64[np.ndarray, " texts"]  # tokens of each text


def token_bytes(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Encodes texts without special tokens and counts the UTF-8 bytes of the text that each token accounts for.

    Token i accounts for the bytes from the end of token i - 1 to its own end; what a tokenizer drops before a token
    counts to it, and what it drops at the end of the text counts to the last token. So the counts of a text add up
    to its length in bytes, whatever the tokenizer: bits per byte compare tokenizers fairly. A character that is split
    over several tokens counts to the first.

    Yields:
        (ids, bytes) for each text in order, two lists of the same length; two empty ones if it yields no token.
    """
    for batch in batches(texts, len):
        ids, num_bytes, lengths = encode_texts(tokenizer, batch)
        ends = lengths.cumsum()
        for start, end in zip(ends - lengths, ends, strict=True):
            yield ids[start:end].tolist(), num_bytes[start:end].tolist()


def batches(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in order, in batches that a tokenizer takes at once; `characters` is the length of an item's text."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += characters(item)
        if len(batch) == _BATCH_TEXTS or total >= _BATCH_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> EncodedTexts:
    """What `token_bytes` yields, for one batch and as arrays."""
    _check_fast(tokenizer)
    # verbose=False: texts longer than the model are cut into blocks later, no reason for a warning.
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    lengths = np.fromiter(map(len, encoded["input_ids"]), np.int64, len(texts))
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(encoded["input_ids"]), np.int32, total)
    ends = np.fromiter((end for offsets in encoded["offset_mapping"] for _, end in offsets), np.int64, total)
    return EncodedTexts(ids, _count_bytes(texts, lengths, ends), lengths)


def _check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise InputError("this tokenizer gives no offsets, so bytes cannot be counted: use a fast one (tokenizer.json)")


def _count_bytes(
    texts: list[str], lengths: Int64[np.ndarray, " texts"], ends: Int64[np.ndarray, " tokens"]
) -> Int32[np.ndarray, " tokens"]:
    """Bytes of each token from the positions (in characters of its own text) where the tokens end."""
    texts, lengths = [text for text, length in zip(texts, lengths, strict=True) if length], lengths[lengths > 0]
    limits = np.cumsum([0, *map(len, texts)])  # of the texts, in characters of all joined
    ends = ends + np.repeat(limits[:-1], lengths)
    ends[lengths.cumsum() - 1] = limits[1:]
    ends = np.maximum.accumulate(ends)  # a tokenizer that trims offsets may step back
    joined = "".join(texts)
    if not joined.isascii():
        ends = _utf8_positions(joined)[ends]
    counts = np.diff(ends, prepend=0)
    if counts.max(initial=0) > np.iinfo(np.int32).max:
        raise InputError(f"a token stands for {counts.max()} bytes of text: give shorter documents")
    return counts.astype(np.int32)


def _utf8_positions(text: str) -> Int64[np.ndarray, " positions"]:
    """Where each character begins in the UTF-8 form of a text, and its length in bytes at the end."""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))
    widths = np.zeros(len(text) + 1, np.uint8)
    widths[1:] = 1
    for two_three_and_four_bytes_from in (0x80, 0x800, 0x10000):
        widths[1:] += code_points >= two_three_and_four_bytes_from
    return widths.cumsum(dtype=np.int64)
