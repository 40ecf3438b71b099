"""Options that several verbs of the command line share, what becomes of them, and where all verbs print."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from latentlm.errors import InputError
from latentlm.processes import is_main, launched

MOST_SAMPLES = 1_000_000
_WRITTEN = ("--json", "--texts", "--plot", "--output")
DATA_HELP = "A .txt, .jsonl, .tsv, .csv or .parquet file, .xz of one, a folder, hub:NAME[:CONFIG] or builtin:NAME."


def _json_file(path: Path | None) -> Path | None:
    """Refuses a place that cannot be written before the work, not after it."""
    from latentlm.files import check_writable

    if path is not None:
        check_writable(path)
    return path


def _plot_file(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() != ".png":
        raise InputError(f"{path}: a picture is written as PNG: name a file that ends in .png.")
    return _json_file(path)


def checked_seed(seed: int | None) -> int | None:
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise InputError("--seed must fit in 64 bits: give a smaller number.")
    return seed


JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to FILE, too.", callback=_json_file)
]
TextsFile = Annotated[
    Path | None,
    typer.Option("--texts", metavar="FILE.jsonl", help="Write what the model wrote to FILE.", callback=_json_file),
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw a picture to FILE.png.", callback=_plot_file)
]
Model = Annotated[str, typer.Argument(help="Folder (or hub name) of a saved model.", metavar="MODEL")]
Seed = Annotated[int, typer.Option(help="Seed of all noise.", callback=checked_seed)]
EvaluationData = Annotated[
    str | None, typer.Option(help="By default the validation data of the model's recipe. " + DATA_HELP)
]
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

_FILE_WIDTH = 250


def terminal() -> Console:
    """Of one process alone, and wide where it is a file."""
    console = Console(quiet=not is_main())
    # a file or a pipe has no width, and a table cut to 80 columns is no table
    return console if console.is_terminal else Console(width=_FILE_WIDTH, quiet=console.quiet)


def write_json(path: Path | None, content: Any) -> None:
    """What `JsonFile` asks for; of several processes the first one writes."""
    from latentlm.files import write_whole

    if path is not None and is_main():
        write_whole(path, json.dumps(content, indent=1))


def about(name: str, model: Any) -> dict[str, str]:
    """The first figures of every table: which model, as it was named, and of which family."""
    return {"model": name, "family": type(model).__name__}


def write_lines(path: Path | None, lines: Iterable[Mapping[str, Any]]) -> None:
    """What `TextsFile` asks for."""
    from latentlm.files import write_whole

    if path is not None and is_main():
        write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def check_outputs(words: Sequence[str]) -> None:
    """Refuses a command that would write over a file it reads, or write two things to one place.

    Args:
        words: of the command line.
    """
    named = [(place, value) for place, word in enumerate(words) for value in {word, word.partition("=")[2]} if value]
    for place, word in enumerate(words):
        option, separator, value = word.partition("=")
        if option not in _WRITTEN or (place + 1 == len(words) and not separator):
            continue
        own = (place,) if separator else (place, place + 1)
        written = os.path.realpath(value if separator else words[place + 1])
        if os.path.isdir(written):
            continue  # what is written into it stands beside what is read
        for other, name in named:
            if other not in own and os.path.realpath(name) == written:
                raise InputError(f"{name} is named twice, and {option} would write over it: name another file.")


def check_one_process(command: str) -> None:
    """Refuses a launcher's many processes, each of which would do the whole work."""
    if launched() > 1:
        raise InputError(f"{command} is a job of one process: start it without torchrun or accelerate launch.")


def load_model(name: str) -> tuple[Any, Any]:
    """The model of `Model` on its device, and its tokenizer."""
    import torch

    from latentlm.data.hub import hub_or_cache
    from latentlm.loading import load

    # a hub name is OWNER/NAME
    with hub_or_cache(name) if len(Path(name).parts) == 2 and not Path(name).parent.exists() else nullcontext():
        model, tokenizer = load(name)
    # of several processes on a machine each has its own GPU
    return model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"), tokenizer


def change_inference(model: Any, settings: list[str] | None) -> None:
    """What `Settings` say."""
    from latentlm.training.recipe import parse_value

    changes = {}
    for setting in settings or []:
        name, separator, value = setting.partition("=")
        if not separator or not name:
            raise InputError(f"--set {setting!r} is not of the form FIELD=VALUE, as in inference_steps=64.")
        changes[name] = parse_value(value, f"--set {setting!r}")
    if changes:
        model.change_inference(**changes)
