"""Options that several verbs of the command line share."""

from pathlib import Path
from typing import Annotated

import typer

from latentlm.errors import InputError

DATA_HELP = "A .txt, .jsonl, .tsv, .csv or .parquet file, .xz of one, a folder, hub:NAME[:CONFIG] or builtin:NAME."


def _json_file(path: Path | None) -> Path | None:
    """Refuses a place that cannot be written before the work, not after it."""
    from latentlm.files import check_writable

    if path is not None:
        check_writable(path)
    return path


def checked_seed(seed: int | None) -> int | None:
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise InputError("--seed must fit in 64 bits: give a smaller number.")
    return seed


JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to FILE, too.", callback=_json_file)
]
Model = Annotated[str, typer.Argument(help="Folder (or hub name) of a saved model.", metavar="MODEL")]
Seed = Annotated[int, typer.Option(help="Seed of all noise.", callback=checked_seed)]
Column = Annotated[str | None, typer.Option(help="Text column of a table: its name, or its number from 1.")]
SampleBy = Annotated[str | None, typer.Option(help="What of a text file is one document: line, paragraph or document.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read only so many documents.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Infer otherwise than in training, as inference_steps=64."),
]
Annotations = Annotated[
    str | None,
    typer.Option(
        help="Where --data has its labels: a column, or what separates them in a .txt; by default as trained."
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        metavar="'LABEL …'", help="Of a conditional model: the labels of a text, in order; of each, or once for all."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences at a time; changes speed and memory, no figure.")]
