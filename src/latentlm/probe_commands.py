"""`latentlm probe`: a command for each probe, made of the probe's own signature, and `all`."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from latentlm.errors import InputError
from latentlm.files import make_folder, write_whole
from latentlm.options import (
    DATA_HELP,
    Annotations,
    BatchSize,
    Column,
    JsonFile,
    Limit,
    Model,
    SampleBy,
    Seed,
    Settings,
    change_inference,
    load_model,
    terminal,
)

# several of scikit-learn's take the seeds after it, up to 2³² − 1
_HIGHEST_SEED = 4_000_000_000
_ROWS_SHOWN = 30
_WIDEST_CELL = 60
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Factors = Annotated[
    Path | None, typer.Option(help="A .csv or .tsv with a header and a row for each text: what is known of it.")
]
Output = Annotated[Path | None, typer.Option(help="Folder for tables, pictures and a page; made if it is missing.")]
Pool = Annotated[str, typer.Option(help="Of a latent with parts: mean over them, or flat, all of their numbers.")]
Part = Annotated[int | None, typer.Option(help="One layer, or one position of the texts, from 0, in place of all.")]


@contextmanager
def _opened(
    model: Model,
    data: Data,
    column: Column = None,
    sample_by: SampleBy = None,
    annotations: Annotations = None,
    factor_table: Factors = None,
    limit: Limit = None,
    settings: Settings = None,
    pool: Pool = "mean",
    part: Part = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
) -> Iterator[Any]:
    """The space of a model and the texts, with a bar while latents are inferred; its arguments are every probe's."""
    if not 0 <= seed <= _HIGHEST_SEED:
        raise InputError(f"--seed of a probe must be from 0 to {_HIGHEST_SEED:,}, not {seed:,}.")
    from latentlm.data.recipe import annotated_as, saved_data_recipe
    from latentlm.probing import LatentSpace, read_texts
    from latentlm.training.progress import counted

    loaded, tokenizer = load_model(model)
    change_inference(loaded, settings)
    options: dict[str, Any] = {"pool": pool, "part": part, "seed": seed, "batch_size": batch_size}
    conditional = loaded.annotation_labels is not None
    annotated = annotated_as(saved_data_recipe(model), annotations, conditional)
    if annotated is not None and annotations is not None and not annotated.needed:
        annotated = type(annotated)(annotated.place, annotated.per)  # their labels are factors
    by = sample_by or "line"
    texts = read_texts(data, column=column, sample_by=by, limit=limit, annotated=annotated, factors=factor_table)
    with counted(terminal(), "inferring latents") as on_progress:
        yield LatentSpace(loaded, tokenizer, **options, on_progress=on_progress), texts


def _all(
    output: Annotated[Path, typer.Option(help="Folder for report.html and the files of each probe.")], **given: Any
) -> None:
    from latentlm.probing import probe_all

    make_folder(output)
    title = f"Probes of {Path(given['model']).name}"
    with _opened(**given) as (space, texts):
        results, skipped = probe_all(space, texts, output=output, title=title, on_probe=lambda name: _say(f"{name} …"))
    for name, why in skipped.items():
        _say(f"{name} was not run: {why}")
    _say(f"{len(results)} probes, in {output / 'report.html'}")


def _command(name: str) -> Callable[..., None]:
    """The command of one probe, or of all: the arguments of `_opened`, its own, and a probe's keyword arguments."""
    from latentlm.probing import probe_named

    if name == "all":
        about = "Every probe with its defaults, and one page of what they found."
        return _with_arguments(_all, [], about, "all MODEL --data builtin:sentences --limit 2000 --output probes")
    probe = probe_named(name)
    own = [
        one.replace(annotation=Annotated[one.annotation, typer.Option(help=_help(probe, one.name))])
        for one in inspect.signature(probe).parameters.values()
        if one.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    # the noise of inference and that of a probe have one seed
    of_probe = [one for one in own if one.name != "seed"]

    def run(output: Output = None, json_file: JsonFile = None, **given: Any) -> None:
        if output is not None:
            make_folder(output)
        chosen = {one.name: given.pop(one.name) for one in of_probe}
        if len(of_probe) < len(own):
            chosen["seed"] = given["seed"]
        with _opened(**given) as (space, texts):
            result = probe(space, texts, **chosen)
        _say(result.about)
        _show(result.table)
        if json_file is not None:
            write_whole(json_file, json.dumps(result.json(), indent=1, ensure_ascii=False))
        if output is not None:
            _say("left: " + ", ".join(map(str, result.save(output))))

    written = inspect.getdoc(probe) or ""
    example = re.search(r"^Example: latentlm probe (.+)$", written, re.MULTILINE)
    known = f"{name} MODEL --data builtin:sentences --limit 2000" if example is None else example[1]
    return _with_arguments(run, of_probe, written.split("\n\n")[0], known)


def _with_arguments(
    function: Callable[..., None], own: Sequence[inspect.Parameter], about: str, example: str
) -> Callable[..., None]:
    """A function of its own with a signature that typer can read."""

    def command(**given: Any) -> None:
        function(**given)

    shared = inspect.signature(_opened).parameters.values()
    named = [one for one in inspect.signature(function).parameters.values() if one.name != "given"]
    arguments = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*shared, *named, *own)]
    command.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in arguments}
    command.__doc__ = f"{about}\n\nExample: latentlm probe {example}"
    return command


def _help(probe: Any, name: str) -> str:
    """What the `Args` of a docstring say of an argument."""
    found = re.search(rf"^ +{name}: (.+(?:\n {{8,}}.+)*)", inspect.getdoc(probe) or "", re.MULTILINE)
    return re.sub(r"\s+", " ", found[1]).replace("`", "") if found else ""


class _Probes(TyperGroup):
    """Probes are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        from latentlm.probing import probe_names

        return [*probe_names(), "all"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        maker = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        maker.command(cmd_name)(_command(cmd_name))
        command = typer.main.get_command(maker)
        command.name = cmd_name
        return command


probe_app = typer.Typer(cls=_Probes, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@probe_app.callback()
def _probes() -> None:
    """Look inside a latent space: one probe, or all of them on one page.

    Example: latentlm probe clusters runs/gpt-vae --data builtin:sentences --limit 2000 --output probes
    """


def _say(text: str) -> None:
    terminal().print(text, highlight=False, soft_wrap=True, markup=False)


def _show(table: Any) -> None:
    rows = Table()
    for column in table.columns:
        rows.add_column(str(column), justify="right" if table[column].dtype.kind in "fiu" else "left")
    for row in table.head(_ROWS_SHOWN).itertuples(index=False):
        rows.add_row(*(_cell(value) for value in row))
    console: Console = terminal()
    console.print(rows)
    if len(table) > _ROWS_SHOWN:
        console.print(f"and {len(table) - _ROWS_SHOWN:,} more rows")


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return "–" if value != value else f"{value:.4g}"
    text = str(value)
    return escape(text if len(text) <= _WIDEST_CELL else text[: _WIDEST_CELL - 1] + "…")
