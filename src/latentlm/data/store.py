"""A token store: tokenised text in a folder, written once and memory-mapped, so that memory is independent of its size.

    tokens.bin     int32, ids of all documents, one EOS after each
    bytes.bin      int32, UTF-8 bytes of text that each token stands for
    documents.bin  int64, where each document ends, in tokens
    tokenizer/     only where one was trained for this text
    store.json     the journal: what the store is made of, and how much of the files counts
    lock           held by the process that writes

The journal is replaced only after what it counts has reached the disk. Whatever cuts a writing short, the next call
cuts off what the journal does not count and goes on from there, so the files come out as if nothing had happened.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from latentlm.data.corpora import Document
from latentlm.data.tokenizers import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from latentlm.data.tokens import Tokens, tokenise
from latentlm.errors import InputError
from latentlm.files import saving, sha256_of, write_whole
from latentlm.processes import is_main

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from writing at once
    fcntl = None  # type: ignore[assignment]

_JOURNAL, _TOKENIZER, _LOCK = "store.json", "tokenizer", "lock"
_DTYPES = {"tokens.bin": np.int32, "bytes.bin": np.int32, "documents.bin": np.int64}
_FORMAT = 1
# tokens between two entries of the journal: seconds of work, which is all that can be lost
_JOURNAL_TOKENS = 1 << 20


class StoredTokens(Tokens):
    """The tokens of a complete store, mapped into memory: the disk's cache holds what is read, the process nothing.

    It is pickled as its folder, so workers of a DataLoader map the same files. Factors are not kept.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()
        ids, num_bytes, ends = (_map(self.folder / name, dtype) for name, dtype in _DTYPES.items())
        super().__init__(ids, num_bytes, ends)

    def __reduce__(self) -> tuple[type["StoredTokens"], tuple[Path]]:
        return StoredTokens, (self.folder,)


def _map(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def store_tokens(
    folder: str | Path,
    documents: Callable[[], Iterator[Document]],
    tokenizer: PreTrainedTokenizerBase | int,
    made_of: Mapping[str, Any],
    *,
    train: Callable[[Iterable[str], int], PreTrainedTokenizerBase] = train_tokenizer,
    on_progress: Callable[[int, int], None] = lambda documents, tokens: None,
    on_wait: Callable[[], None] = lambda: None,
) -> tuple[StoredTokens, PreTrainedTokenizerBase]:
    """The tokens of documents from the store in `folder`, which is written, or its writing finished, if need be.

    Of several processes that ask for the same store one writes and the others wait for it.

    Args:
        documents: gives a fresh iterator over the documents each time it is called, in the same order.
        tokenizer: or the vocabulary size of one to train on the documents, once; it is kept in the store.
        made_of: what the documents are (and how a tokenizer is trained, if not by `train_tokenizer`), in JSON's types,
            each under the name that an error calls it.
        train: makes that tokenizer, from texts and a vocabulary size.
        on_progress: called with (documents read, tokens) whenever these are safe on the disk.
        on_wait: called before waiting for another process.

    Raises:
        InputError: the folder holds the tokens of something else or a damaged store, or cannot be one.
    """
    folder = Path(folder)
    by = {"vocab_size": tokenizer} if isinstance(tokenizer, int) else {"tokenizer": tokenizer_fingerprint(tokenizer)}
    given = {**made_of, **by}
    journal = _read_journal(folder, given)
    if journal is None or not journal.complete:
        with _locked(folder, on_wait):
            journal = _read_journal(folder, given) or _begin(folder, given)
            _remove_leftovers(folder)
            if isinstance(tokenizer, int):
                tokenizer = _kept_tokenizer(folder, documents, tokenizer, train)
            if not journal.complete:
                with saving(folder):
                    _write(folder, journal, documents(), tokenizer, on_progress)
    else:
        if is_main():  # it reads all of the files, and one process of many is enough
            found = _digests(folder)
            if changed := [name for name, digest in journal.digests.items() if found.get(name) != digest]:
                raise _damaged(folder, f"{changed[0]} has changed since it was written")
        if isinstance(tokenizer, int):
            tokenizer = load_tokenizer(folder / _TOKENIZER)
    return StoredTokens(folder), tokenizer


# --- writing -----------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Alone in the folder. The lock ends with its process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "wb")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{folder} cannot hold a token store ({error.strerror}): give another folder.") from error
    with file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _begin(folder: Path, made_of: Mapping[str, Any]) -> "_Journal":
    """The journal comes first: whatever else is in the folder later is of what it names."""
    present = [name for name in (*_DTYPES, _TOKENIZER) if (folder / name).exists()]
    if present:
        raise _damaged(folder, f"{_JOURNAL} is missing beside {present[0]}")
    journal = _Journal(made_of)
    _write_journal(folder, journal)
    return journal


def _remove_leftovers(folder: Path) -> None:
    """Of a process that was killed while it replaced the journal or saved the tokenizer."""
    for path in folder.glob(f".{_JOURNAL}-*"):
        path.unlink()
    for path in folder.glob(f".{_TOKENIZER}-*"):
        shutil.rmtree(path)


def _kept_tokenizer(
    folder: Path,
    documents: Callable[[], Iterator[Document]],
    size: int,
    train: Callable[[Iterable[str], int], PreTrainedTokenizerBase],
) -> PreTrainedTokenizerBase:
    kept = folder / _TOKENIZER
    if not kept.exists():
        tokenizer = train((document.text for document in documents()), size)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{_TOKENIZER}-") as unfinished:
            whole = Path(unfinished) / _TOKENIZER
            tokenizer.save_pretrained(whole)
            for path in whole.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            whole.rename(kept)
    return load_tokenizer(kept)


def _write(
    folder: Path,
    journal: "_Journal",
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Callable[[int, int], None],
) -> None:
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / name, "ab")) for name in _DTYPES]
        for file, size in zip(files, journal.sizes().values(), strict=True):
            file.truncate(size)
        for _ in range(journal.documents_read):
            next(documents, None)
        now = journal
        for read, batch in tokenise(documents, tokenizer, torch.get_num_threads()):
            for file, values in zip(files, (batch.ids, batch.num_bytes, batch.ends + now.tokens), strict=True):
                file.write(values.tobytes())
            now = replace(
                now,
                documents_read=now.documents_read + read,
                documents=now.documents + len(batch.ends),
                tokens=now.tokens + len(batch.ids),
            )
            if now.tokens - journal.tokens >= _JOURNAL_TOKENS:
                journal = now
                _commit(folder, files, journal)
                on_progress(journal.documents_read, journal.tokens)
        _commit(folder, files, now)
        _write_journal(folder, replace(now, complete=True, digests=_digests(folder)))
        on_progress(now.documents_read, now.tokens)


def _digests(folder: Path) -> dict[str, str]:
    names = [*_DTYPES, f"{_TOKENIZER}/tokenizer.json"]
    return {name: sha256_of(folder / name) for name in names if (folder / name).exists()}


def _commit(folder: Path, files: list[Any], journal: "_Journal") -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    _write_journal(folder, journal)


# --- the journal -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Journal:
    """How far a store is: documents read, of these with tokens, and their tokens; in the end the files' SHA-256."""

    made_of: Mapping[str, Any]
    documents_read: int = 0
    documents: int = 0
    tokens: int = 0
    complete: bool = False
    digests: Mapping[str, str] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that count."""
        items = {"tokens.bin": self.tokens, "bytes.bin": self.tokens, "documents.bin": self.documents}
        return {name: np.dtype(dtype).itemsize * items[name] for name, dtype in _DTYPES.items()}


def _write_journal(folder: Path, journal: _Journal) -> None:
    write_whole(folder / _JOURNAL, json.dumps({"format": _FORMAT, **asdict(journal)}, indent=1))


def _read_journal(folder: Path, made_of: Mapping[str, Any]) -> _Journal | None:
    """The journal of a folder, checked against the files and against what the store should be made of; None without."""
    try:
        content = json.loads((folder / _JOURNAL).read_text(encoding="utf-8"))
        found_format = content.pop("format")
        journal = _Journal(**content)
        sizes = journal.sizes() if found_format == _FORMAT else {}
        found = dict(journal.made_of)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(folder, f"{_JOURNAL} cannot be read") from error
    if found_format != _FORMAT:
        raise InputError(f"{folder} holds a store of another version of latentlm: give another folder, or delete it.")
    given = json.loads(json.dumps(dict(made_of)))  # as it comes back from a file
    different = [
        name for name in {**given, **found} if (name in given, given.get(name)) != (name in found, found.get(name))
    ]
    if different:
        names = ", ".join(different)
        raise InputError(f"{folder} holds the tokens of something else ({names}): give another folder, or delete it.")
    for name, size in sizes.items():
        actual = (folder / name).stat().st_size if (folder / name).exists() else -1
        if actual != size if journal.complete else max(actual, 0) < size:
            raise _damaged(folder, f"{name} has {max(actual, 0):,} bytes and not {size:,}")
    if journal.documents_read and "vocab_size" in given and not (folder / _TOKENIZER).is_dir():
        raise _damaged(folder, f"{_TOKENIZER} is missing")
    return journal


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(f"the token store {folder} is damaged ({reason}): delete it, and it is made anew.")
