"""Texts for probes, and what is known of each: labels, and factors (what it is about, in which tense, by whom …)."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from latentlm.data import Annotated, read_documents
from latentlm.errors import InputError
from latentlm.files import reason_of

#: values of a factor; of more, the rarer ones are unknown
MOST_VALUES = 12
UNKNOWN = -1
#: cells of a factor table that say nothing, as a spreadsheet, numpy and R write them
_UNKNOWN_CELLS = ("", "nan", "NaN", "NA")


@dataclass(frozen=True)
class Texts:
    """N texts.

    Args:
        labels: annotations of each: a label for each of its words, or one for the text.
        factors: a row for each text, a column for each factor; its values are names, missing ones are unknown.
        source: the data whose first documents they are, for what else stands in its rows.

    Raises:
        InputError: no text; labels or factors of another number of texts.
    """

    texts: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...] | None = None
    factors: pd.DataFrame | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if not self.texts:
            raise InputError("there is no text to probe with.")
        for name, rows in (("labels", self.labels), ("factors", self.factors)):
            if rows is not None and len(rows) != len(self.texts):
                raise InputError(f"{name} of {len(rows):,} texts do not fit {len(self.texts):,}: give those of each.")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> "Texts":
        """Those texts with all that is known of them, in that order."""
        return Texts(
            tuple(self.texts[row] for row in rows),
            None if self.labels is None else tuple(self.labels[row] for row in rows),
            None if self.factors is None else self.factors.iloc[list(rows)].reset_index(drop=True),
        )

    def first(self, number: int, what: str) -> "Texts":
        """So many, the first.

        Raises:
            InputError: there are fewer.
        """
        if number < 1:
            raise InputError(f"{what} needs at least 1 text, not {number:,}.")
        if len(self) < number:
            raise InputError(
                f"{what} needs {number:,} texts, and there are {len(self):,}: ask for fewer, or give more."
            )
        return replace(self.select(range(number)), source=self.source)

    def factor(self, name: str) -> pd.Series:
        """One factor's values.

        Raises:
            InputError: there is no such factor.
        """
        known = [] if self.factors is None else list(self.factors.columns)
        if name not in known:
            have = f"there are {', '.join(known)}" if known else "the texts have none"
            raise InputError(f"there is no factor {name!r}: {have}.")
        assert self.factors is not None
        return self.factors[name]

    def without_say(self) -> list[str]:
        """Factors that tell nothing of likeness: of one value alone, or without a value that two texts share."""
        names = [] if self.factors is None else list(self.factors.columns)
        counts = {name: self.factor(name).value_counts() for name in names}
        return [name for name in names if len(counts[name]) < 2 or int(counts[name].max()) < 2]

    def telling(self) -> list[str]:
        """The other factors."""
        left_out = self.without_say()
        return [] if self.factors is None else [name for name in self.factors.columns if name not in left_out]

    def factor_ids(self, names: Sequence[str] | None = None) -> tuple[Int[np.ndarray, "texts factors"], list[str]]:
        """Values as numbers, the most frequent 0, and −1 where unknown or beyond the 12 most frequent; and their names.

        Args:
            names: which factors; by default all but those `without_say`.

        Raises:
            InputError: no factors, one that is not there, or one of a single value, or of another for each text.
        """
        if names is None:
            names = self.telling() or self.without_say()
        if isinstance(names, str):
            names = [names]
        if not names:
            raise InputError(
                "the texts have no factors: take builtin:sentences or annotated texts, or give --factor-table."
            )
        columns, left_out = [], self.without_say()
        for name in names:
            values = self.factor(name)
            frequent = values.value_counts(sort=True).index[:MOST_VALUES]
            if len(frequent) < 2:
                raise InputError(f"the factor {name!r} has a single value in these texts: leave it out.")
            if name in left_out:
                raise InputError(f"no two texts share a value of the factor {name!r}: bin its values, or leave it out.")
            places = {value: place for place, value in enumerate(frequent)}
            columns.append([places.get(value, UNKNOWN) for value in values])
        return np.array(columns, dtype=np.int64).T, list(names)


def read_texts(
    source: str,
    *,
    column: str | None = None,
    sample_by: str = "line",
    limit: int | None = None,
    annotated: Annotated | None = None,
    factors: str | Path | None = None,
) -> Texts:
    """Reads texts as every command does, with what is known of them.

    Factors are those that `builtin:sentences` is made of; or the columns of a table (`factors`) that has a row for each
    text, in their order (more than a `limit` are left out; "", nan and NA are unknown); or what annotations say
    (`factors_of_labels`).

    Raises:
        InputError: data that cannot be read, or a table of another number of rows.
    """
    documents = list(read_documents(source, column=column, sample_by=sample_by, limit=limit, annotated=annotated))
    labels = (
        tuple(document.annotations or () for document in documents) if any(d.annotations for d in documents) else None
    )
    texts = Texts(tuple(document.text for document in documents), labels, source=source)
    if factors is not None:
        return replace(texts, factors=_read_factors(Path(factors), len(texts), first_only=len(texts) == limit))
    if documents[0].factors is not None:
        return replace(texts, factors=pd.DataFrame([document.factors for document in documents]))
    return texts if labels is None else replace(texts, factors=factors_of_labels(texts.texts, labels))


def _read_factors(path: Path, rows: int, first_only: bool) -> pd.DataFrame:
    # as everywhere: a quotation mark in a .tsv is part of the text
    of_tsv: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE}
    readers = {".csv": pd.read_csv, ".tsv": lambda file, **options: pd.read_csv(file, **of_tsv, **options)}
    if path.suffix not in readers:
        raise InputError(f"{path}: factors are read from a .csv or a .tsv with a header.")
    try:
        table = readers[path.suffix](
            path, dtype=str, keep_default_na=False, na_values=list(_UNKNOWN_CELLS), header=None
        )
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}.") from error
    except ValueError as error:  # of pandas, in words of its parser
        raise InputError(f"{path} is no table: give a header, and rows that have as many cells as it.") from error
    header = ["" if pd.isna(name) else str(name).strip() for name in table.iloc[0]]
    for place, name in enumerate(header):
        if not name:
            raise InputError(f"{path}: column {place + 1} has no name: name it, or take it out (an index, perhaps).")
        if name in header[:place]:
            raise InputError(f"{path} has two columns {name!r}: name them differently.")
    table = table.iloc[1:].reset_index(drop=True).set_axis(header, axis=1)
    if len(table) < rows:
        raise InputError(
            f"{path} has factors of {len(table):,} texts, and there are {rows:,}: row {len(table) + 1} is missing."
        )
    if first_only:
        return table.head(rows)
    if len(table) > rows:
        raise InputError(f"{path} has factors of {len(table):,} texts, and there are {rows:,}: give a row for each.")
    return table


def factors_of_labels(texts: Sequence[str], labels: Sequence[Sequence[str]]) -> pd.DataFrame:
    """What annotations say of texts: of a label for each text itself (`label`); of labels for each word `structure`,
    the labels in order without repetition, and for every label that a third of the texts have its words (`ARG0 words`).

    A factor that has no value twice, or one alone, tells nothing and is left out.
    """
    if all(len(of_text) == 1 for of_text in labels):
        return pd.DataFrame({"label": [of_text[0] for of_text in labels]})
    rows = []
    for text, of_words in zip(texts, labels, strict=True):
        runs: list[tuple[str, list[str]]] = []
        for word, label in zip(text.split(), of_words, strict=True):
            if runs and runs[-1][0] == label:
                runs[-1][1].append(word)
            else:
                runs.append((label, [word]))
        row = {"structure": " ".join(label for label, _ in runs)}
        for label, words in runs:
            row.setdefault(f"{label} words", " ".join(words))
        rows.append(row)
    counts = Counter(name for row in rows for name in row)
    names = [name for name, count in counts.items() if count * 3 >= len(rows)]
    table = pd.DataFrame([{name: row.get(name) for name in names} for row in rows])
    kept = [
        name
        for name in names
        if (shared := table[name].value_counts().iloc[:MOST_VALUES]).gt(1).sum() > 1 and len(shared) > 1
    ]
    return table[kept]
