"""Tokenizers: training one, loading one, and how many bytes of a text each token stands for."""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from latentlm.data.hub import hub_or_cache
from latentlm.errors import InputError, one_sentence

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder or of a model on the hub; BOS and padding default to its EOS."""
    try:
        with hub_or_cache(path):
            tokenizer = AutoTokenizer.from_pretrained(str(path))
    except InputError:
        raise
    except Exception as error:  # the loaders raise many types, down to bare Exception for a damaged file
        reason = one_sentence(error)
        raise InputError(f"{path} holds no tokenizer that loads ({reason}): give another folder") from error
    if tokenizer.eos_token is None:
        raise InputError(f"the tokenizer of {path} has no end of sequence: set eos_token in its tokenizer_config.json")
    if max(tokenizer.get_vocab().values(), default=0) >= len(tokenizer):
        raise InputError(f"the tokenizer of {path} leaves some numbers out, so no vocabulary fits it: give another")
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_bytes(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Encodes texts without special tokens and counts the UTF-8 bytes of the text that each token accounts for.

    Token i accounts for the bytes from the end of token i - 1 to its own end; what a tokenizer drops before a token
    counts to it, and what it drops at the end of the text counts to the last token. So the counts of a text add up
    to its length in bytes, whatever the tokenizer: bits per byte compare tokenizers fairly. A character that is split
    over several tokens counts to the first.

    Yields:
        (ids, bytes) for each text in order, two lists of the same length; two empty ones if it yields no token.
    """
    if not tokenizer.is_fast:
        raise InputError("this tokenizer gives no offsets, so bytes cannot be counted: use a fast one (tokenizer.json)")
    for batch in _batches(texts):
        # verbose=False: texts longer than the model are cut into blocks later, no reason for a warning.
        encoded = tokenizer(
            batch, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        for text, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield ids, _count_bytes(text, [end for _, end in offsets])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _count_bytes(text: str, ends: list[int]) -> list[int]:
    """Bytes of each token of a text from the positions (in characters) where the tokens end."""
    if not ends:
        return []
    ends[-1] = len(text)
    if not text.isascii():
        position = [0, *accumulate(len(character.encode()) for character in text)]
        ends = [position[end] for end in ends]
    counts, done = [], 0
    for end in ends:
        counts.append(max(end - done, 0))  # a tokenizer that trims offsets may step back
        done = max(end, done)
    return counts
