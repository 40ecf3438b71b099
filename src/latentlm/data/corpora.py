"""Reading text: every place that asks for data takes a file, a folder, `hub:NAME[:CONFIG]` or `builtin:NAME`.

Annotations, labels of a text or of each of its words, are read beside it. A reader yields documents one at a time, so
that a corpus may be larger than memory. Whatever is wrong with a file is an `InputError` that names the file and the
line.
"""

import csv
import hashlib
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from latentlm.data import hub
from latentlm.errors import InputError, one_sentence

SAMPLE_BY = ("line", "paragraph", "document")
SUFFIXES = (
    ".txt", ".jsonl", ".parquet", ".tsv", ".csv", ".txt.xz", ".jsonl.xz", ".tsv.xz", ".csv.xz",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text, the factors that generated it where they are known (the built-in sentences), and its annotations."""

    text: str
    factors: Mapping[str, str] | None = None
    annotations: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Annotated:
    """Where the labels of a text stand, and what each of them is of.

    Args:
        place: a column, as that of the text is named; in a `.txt` what stands between a line's text and its labels.
        per: "word": a label for each word, words and labels being what white space separates. "text": one label.
        needed: whether texts must have labels. If not they are left out where they are, and nobody looks at them.
    """

    place: str
    per: str = "word"
    needed: bool = True

    def labels(self, text: str, content: Any, where: str) -> tuple[str, ...] | None:
        """The labels in the content of a cell, or in a list of them, which have to fit the text."""
        if not self.needed:
            return None
        if isinstance(content, str):
            content = content.split() if self.per == "word" else [content.strip()]
        if not isinstance(content, list) or not content or not all(isinstance(one, str) and one for one in content):
            raise InputError(f"{where} has no labels in {self.place!r}: fill them in or take the row out")
        words = len(text.split()) if self.per == "word" else 1
        if len(content) != words:
            of = f"{words} words: give one for each" if self.per == "word" else "one text: give a single one"
            raise InputError(f"{where} has {len(content)} labels for {of}")
        return tuple(content)


def read_documents(
    source: str | Path,
    *,
    column: str | None = None,
    sample_by: str = "line",
    limit: int | None = None,
    annotated: Annotated | None = None,
) -> Iterator[Document]:
    """Reads the documents of a source, lazily and in a fixed order.

    Args:
        source: a `.txt`, `.jsonl`, `.parquet`, `.tsv`, `.csv`, an `.xz` of one of the text kinds, a folder of such
            files (read recursively, sorted by path, other files ignored), `hub:NAME[:CONFIG]` (the train split),
            `builtin:python-docs` or `builtin:sentences`.
        column: where the text is, by name; in `.tsv` and `.csv` digits are a column number, counted from 1, of a file
            without header. Without it: the column "text", or the only column of strings. `.txt` has no columns.
        sample_by: what a document of a `.txt` is: "line" (blank lines are no documents), "paragraph" (separated by
            blank lines) or "document" (the whole file).
        limit: stop after this many documents.
        annotated: labels are read, too; a text without them, or with more or fewer than it has words, is an error.

    Raises:
        InputError: at once for a source that does not exist or an argument without meaning; while reading for
            content that cannot be used, with file and line. Blank rows of Parquet files and of the hub are skipped,
            because corpora kept there use them as separators; in the other kinds a row without text is an error.
    """
    if limit is not None and limit <= 0:
        raise InputError(f"limit={limit} leaves nothing to read: give a positive number of documents, or none for all")
    if sample_by not in SAMPLE_BY:
        raise InputError(f"sample_by={sample_by!r} is unknown: give one of {', '.join(SAMPLE_BY)}")
    if annotated is not None and annotated.per not in ("word", "text"):
        raise InputError(f"labels are of each word or text, not of each {annotated.per!r}")
    if annotated is not None and not annotated.place:
        raise InputError("the place of the annotations is empty: name a column, or what separates them in a .txt")
    name = str(source)
    if not name.strip():
        raise InputError("the name of the data is empty: give a file, a folder, hub:NAME[:CONFIG] or builtin:NAME")
    if name.startswith("builtin:"):
        if annotated is not None:
            raise InputError(f"{name} has no annotations: leave them out")
        documents = _read_builtin(name)
    elif name.startswith("hub:"):
        documents = _read_hub(name, column, annotated)
    else:
        files = _files(Path(source))
        documents = chain.from_iterable(_read_file(file, column, sample_by, annotated) for file in files)
    return islice(_non_empty(documents, name), limit if limit is None else min(limit, sys.maxsize))


def source_fingerprint(source: str | Path) -> str:
    """Differs where the text of two sources does, whatever their files are called; it reads all of the files.

    A built-in corpus stands for itself in this version of latentlm, and a data set on the hub for its name.
    """
    name = str(source)
    if name.startswith("hub:"):
        return name
    if name.startswith("builtin:"):
        from latentlm import __version__

        return f"{name} of latentlm {__version__}"
    digest = hashlib.sha256()
    for path in _files(Path(source)):
        try:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(path, error) from error
        digest.update(f"{_kind(path)} {content}\n".encode())
    return digest.hexdigest()


def _non_empty(documents: Iterator[Document], name: str) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        raise InputError(f"{name} holds no text: give a source with at least one document")
    yield first
    yield from documents


def _kind(path: Path) -> str | None:
    """The known suffix of a file name, in lower case; none if the kind is unknown."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def _files(path: Path) -> list[Path]:
    known = ", ".join(SUFFIXES)
    try:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _kind(file) and file.is_file())
            # Hidden folders are caches of editors and tools, never the corpus that a person means.
            found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
            if not found:
                raise InputError(f"the folder {path} holds no file of a known kind: put one of {known} there")
            return found
        if not path.exists():
            raise InputError(f"{path} does not exist: give a file, a folder, hub:NAME[:CONFIG] or builtin:NAME")
    except OSError as error:
        raise _unreadable(path, error) from error
    if _kind(path) is None:
        raise InputError(f"{path} is of an unknown kind: give one of {known}, or a folder of them")
    return [path]


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read ({error.strerror or error}): check the file and its permissions")


def _read_file(
    path: Path, column: str | None, sample_by: str, annotated: Annotated | None = None
) -> Iterator[Document]:
    kind = (_kind(path) or "").removesuffix(".xz")
    readers: dict[str, Callable[[], Iterator[Document]]] = {
        ".txt": lambda: _read_text(path, sample_by, annotated),
        ".jsonl": lambda: _read_jsonl(path, column, annotated),
        ".tsv": lambda: _read_delimited(path, column, _tsv_rows(path), annotated),
        ".csv": lambda: _read_delimited(path, column, _csv_rows(path), annotated),
        ".parquet": lambda: _read_parquet(path, column, annotated),
    }
    with _told(path):
        yield from readers[kind]()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What keeps a file from being read, in one sentence."""
    try:
        yield
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path} is truncated or is no xz file ({error}): compress or copy it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error


# --- lines of text -----------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, plain or xz, without their line ends and without a byte order mark."""
    offset = 0
    with lzma.open(path, "rb") if path.name.lower().endswith(".xz") else open(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path} line {number} is not UTF-8 (byte {offset + error.start} of the file): convert it to UTF-8"
                ) from error
            if "\0" in line:
                raise InputError(f"{path} line {number} holds a NUL byte, so it is no text: give a UTF-8 text file")
            yield number, line.rstrip("\r\n")
            offset += len(raw)


def _read_text(path: Path, sample_by: str, annotated: Annotated | None) -> Iterator[Document]:
    if annotated is not None:
        if sample_by != "line":
            raise InputError(f"{path} is annotated line by line: leave sample_by={sample_by} out")
        yield from (_annotated_line(line, annotated, f"{path} line {n}") for n, line in _lines(path) if line.strip())
        return
    lines = (line for _, line in _lines(path))
    if sample_by == "line":
        yield from (Document(line.strip()) for line in lines if line.strip())
    elif sample_by == "document":
        text = "\n".join(lines)
        if text.strip():
            yield Document(text)
    else:
        paragraph: list[str] = []
        for line in chain(lines, [""]):
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield Document("\n".join(paragraph).strip())
                paragraph = []


def _annotated_line(line: str, annotated: Annotated, where: str) -> Document:
    text, *labels = line.split(annotated.place)
    if not annotated.needed:
        text, labels = (text, [""]) if len(labels) == 1 else (line, [""])
    if len(labels) != 1 or not text.strip():
        raise InputError(f"{where} is not of the form TEXT{annotated.place}LABELS: mend it or take it out")
    return Document(text.strip(), annotations=annotated.labels(text, labels[0], where))


# --- records with named columns ----------------------------------------------------------------------------------


def _text_column(record: Mapping[str, Any], column: str | None, where: str) -> str:
    """The name of the column that holds the text, decided once from the first record."""
    names = ", ".join(map(str, record)) or "none"
    if column is not None:
        if column not in record:
            raise InputError(f"{where} has no column {column!r}: give column= one of its columns ({names})")
        return column
    strings = [name for name, value in record.items() if isinstance(value, str)]
    if "text" in record:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise InputError(f"{where} has no column 'text': give column= one of its columns ({names})")


def _checked(text: Any, column: str, where: str, annotated: Annotated | None = None, labels: Any = None) -> Document:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where} has no text in column {column!r}: fill it in or take the row out")
    if "\0" in text:
        raise InputError(f"{where} holds a NUL character in column {column!r}: take it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no UTF-8 text can hold
        raise InputError(f"{where} holds half of a surrogate pair in column {column!r}: write it as UTF-8") from error
    return Document(text, annotations=None if annotated is None else annotated.labels(text, labels, where))


def _label_column(record: Mapping[str, Any], annotated: Annotated | None, where: str) -> None:
    if annotated is not None and annotated.needed and annotated.place not in record:
        names = ", ".join(map(str, record)) or "none"
        raise InputError(f"{where} has no column {annotated.place!r} of labels: give one of its columns ({names})")


def read_columns(
    source: str | Path, columns: Sequence[str], *, limit: int | None = None
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Several columns of text of a `.jsonl` file or an `.xz` of one.

    Yields:
        the place of a record, as a message names it (file and line), and its texts in the order of `columns`.

    Raises:
        InputError: a source of another kind, or a record that lacks one of the texts.
    """
    [path, *more] = _files(Path(source))
    if more or (_kind(path) or "").removesuffix(".xz") != ".jsonl":
        raise InputError(f"{source} has to hold the columns {', '.join(columns)}: give a .jsonl file, or .xz of one")
    with _told(path):
        for where, record in islice(_json_objects(path), limit):
            yield where, tuple(_checked(record.get(column), column, where).text for column in columns)


def _json_objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON ({error}): write one JSON object on each line") from error
        if not isinstance(record, dict):
            raise InputError(f"{where} is {type(record).__name__}, no object: write one JSON object on each line")
        yield where, record


def _read_jsonl(path: Path, column: str | None, annotated: Annotated | None) -> Iterator[Document]:
    name = None
    for where, record in _json_objects(path):
        if name is None:
            name = _text_column(_without(record, annotated), column, where)
            _label_column(record, annotated, where)
        yield _checked(record.get(name), name, where, annotated, record.get(annotated.place) if annotated else None)


def _without(record: Mapping[str, Any], annotated: Annotated | None) -> Mapping[str, Any]:
    """The columns among which the text is looked for."""
    return record if annotated is None else {name: value for name, value in record.items() if name != annotated.place}


def _read_records(
    records: Iterable[tuple[str, Mapping[str, Any]]], column: str | None, annotated: Annotated | None
) -> Iterator[Document]:
    """Documents of (place, record) pairs; blank strings are skipped, missing ones are errors."""
    name = None
    for where, record in records:
        if name is None:
            name = _text_column(_without(record, annotated), column, where)
            _label_column(record, annotated, where)
        text = record.get(name)
        if not (isinstance(text, str) and not text.strip()):
            yield _checked(text, name, where, annotated, record.get(annotated.place) if annotated else None)


def _read_parquet(path: Path, column: str | None, annotated: Annotated | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_string(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    try:
        with pq.ParquetFile(path) as file:
            # The schema, and not the first row, says which columns hold strings: a row may hold nulls.
            kinds = {field.name: "" if is_string(field.type) else None for field in file.schema_arrow}
            name = _text_column(_without(kinds, annotated), column, str(path))
            _label_column(kinds, annotated, str(path))
            if kinds[name] is None:
                raise InputError(f"{path} column {name!r} holds no strings: give column= a column of text")
            columns = [name] if annotated is None or not annotated.needed else [name, annotated.place]
            rows = (row for batch in file.iter_batches(1000, columns=columns) for row in batch.to_pylist())
            records = ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))
            yield from _read_records(records, name, annotated)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is damaged or is no Parquet file ({reason}): write or copy it again") from error


# --- delimited files ---------------------------------------------------------------------------------------------


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    # Tab-separated values know no quoting: a quotation mark is part of the text.
    return ((number, line.split("\t")) for number, line in _lines(path))


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            where = f"{path} line {reader.line_num}"
            raise InputError(f"{where} is not valid CSV ({error}): mend it or give .jsonl instead") from error
        if row is None:
            return
        yield reader.line_num, row


def _read_delimited(
    path: Path, column: str | None, rows: Iterator[tuple[int, list[str]]], annotated: Annotated | None
) -> Iterator[Document]:
    rows = ((number, row) for number, row in rows if any(cell.strip() for cell in row))
    first = next(rows, None)
    if first is None:
        return
    index, has_header = _delimited_column(path, first[1], column)
    name = first[1][index] if has_header else str(index + 1)
    of_labels = None
    if annotated is not None and annotated.needed:
        of_labels, with_header = _delimited_column(path, first[1], annotated.place, "annotations")
        if with_header != has_header:
            raise InputError(f"{path}: name the columns of text and of labels both by name, or both by number")
    for number, row in rows if has_header else chain([first], rows):
        labels = row[of_labels] if of_labels is not None and of_labels < len(row) else None
        yield _checked(row[index] if index < len(row) else None, name, f"{path} line {number}", annotated, labels)


def _delimited_column(path: Path, first: list[str], column: str | None, option: str = "column") -> tuple[int, bool]:
    """Position of the text in a row, and whether the first row is a header; `option` is what errors ask for."""
    listing = ", ".join(repr(cell if len(cell) <= 30 else cell[:27] + "...") for cell in first[:8])
    found = f"{path} has {len(first)} column{'s' * (len(first) != 1)} and the first row {listing}"
    if column is not None and column.isascii() and column.isdigit():
        if not 1 <= int(column) <= len(first):
            raise InputError(f"{found}, so there is no column {column}: give {option}= from 1 to {len(first)}")
        return int(column) - 1, False
    if column is not None:
        if column not in first:
            raise InputError(f"{found}, so there is no column {column!r}: give {option}= a name or number from it")
        return first.index(column), True
    if "text" in first:
        return first.index("text"), True
    if len(first) == 1:
        return 0, False
    raise InputError(f"{found}: give column= its name, or its number in a file without header")


# --- sources that are no files -----------------------------------------------------------------------------------


def _read_builtin(name: str) -> Iterator[Document]:
    from latentlm.data.builtin import BUILTIN  # that module needs Document from here

    corpus = BUILTIN.get(name.removeprefix("builtin:"))
    if corpus is None:
        known = " and ".join(f"builtin:{key}" for key in BUILTIN)
        raise InputError(f"{name} is no built-in corpus: those that exist are {known}")
    return corpus()


def _read_hub(name: str, column: str | None, annotated: Annotated | None) -> Iterator[Document]:
    dataset, _, config = name.removeprefix("hub:").partition(":")
    if not dataset:
        raise InputError(f"{name} names no data set: write hub:NAME or hub:NAME:CONFIG")
    if not hub.is_reachable():
        raise hub.unreachable(name)
    try:
        from datasets import load_dataset

        rows = iter(load_dataset(dataset, config or None, split="train", streaming=True))
        records = ((f"{name} row {number}", row) for number, row in enumerate(rows, start=1))
        yield from _read_records(records, column, annotated)
    except InputError:
        raise
    except Exception as error:  # network, name, licence gate, missing split: many types, one remedy
        reason = one_sentence(error)
        raise InputError(f"{name} cannot be read from the Hugging Face hub ({reason}): give a local file") from error
