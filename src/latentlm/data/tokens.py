"""Documents as tokens: flat arrays with one EOS after each document."""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int32, Int64
from transformers import PreTrainedTokenizerBase

from latentlm.data.corpora import Document
from latentlm.data.tokenizers import batches, bos_and_eos, encode_texts


@dataclass(eq=False)
class Tokens:
    """The tokens of documents, end to end; documents without a token are left out.

    Args:
        ids: token ids; each document ends with an EOS.
        num_bytes: UTF-8 bytes of text that each token stands for; an EOS stands for none.
        ends: where each document ends, in tokens.
        factors: the generative factors of each document (None for one without); None where they are not kept.
        annotations: the labels of each document, likewise.

    Eight bytes of memory per token.
    """

    ids: Int32[np.ndarray, " tokens"]
    num_bytes: Int32[np.ndarray, " tokens"]
    ends: Int64[np.ndarray, " documents"]
    factors: Sequence[Mapping[str, str] | None] | None = None
    annotations: Sequence[tuple[str, ...] | None] | None = None

    @classmethod
    def of(cls, documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> "Tokens":
        """Tokenises documents in memory, with as many threads as torch computes with."""
        ids, num_bytes, ends = array("i"), array("i"), array("q")
        factors: list[Mapping[str, str] | None] = []
        annotations: list[tuple[str, ...] | None] = []
        for _, batch in tokenise(documents, tokenizer, torch.get_num_threads()):
            ends.frombytes((batch.ends + len(ids)).tobytes())
            ids.frombytes(batch.ids.tobytes())
            num_bytes.frombytes(batch.num_bytes.tobytes())
            factors += batch.factors or []
            annotations += batch.annotations or []
        flat = (np.frombuffer(ids, np.int32), np.frombuffer(num_bytes, np.int32), np.frombuffer(ends, np.int64))
        return cls(*flat, factors if any(factors) else None, annotations if any(annotations) else None)


def tokenise(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, threads: int = 1
) -> Iterator[tuple[int, Tokens]]:
    """Tokenises documents in batches, in order.

    Args:
        threads: with more than one, batches are encoded side by side and read ahead. Threads of our own and not those
            of the tokenizers library, which must not have run when a DataLoader forks.

    Yields:
        How many documents were read for a batch, and their tokens.
    """
    _, eos = bos_and_eos(tokenizer)
    read = batches(documents, lambda document: len(document.text))
    first = next(read, None)
    if first is None:
        return
    # alone, because a tokenizer's first call may change its settings
    yield len(first), _tokens(tokenizer, first, eos)
    if threads == 1:
        yield from ((len(batch), _tokens(tokenizer, batch, eos)) for batch in read)
        return
    pool = ThreadPoolExecutor(threads)
    pending: deque[tuple[int, Future[Tokens]]] = deque()
    try:
        for batch in read:
            pending.append((len(batch), pool.submit(_tokens, tokenizer, batch, eos)))
            if len(pending) > threads:
                size, tokens = pending.popleft()
                yield size, tokens.result()
        for size, tokens in pending:
            yield size, tokens.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _tokens(tokenizer: PreTrainedTokenizerBase, documents: list[Document], eos: int) -> Tokens:
    ids, num_bytes, lengths = encode_texts(tokenizer, [document.text for document in documents])
    ends = lengths[lengths > 0].cumsum()
    kept = [document for document, length in zip(documents, lengths, strict=True) if length]
    return Tokens(
        np.insert(ids, ends, eos),
        np.insert(num_bytes, ends, 0),
        ends + np.arange(1, len(ends) + 1),
        [document.factors for document in kept],
        [document.annotations for document in kept],
    )
