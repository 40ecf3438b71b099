"""`latentlm probe`: a command for each probe, made of the probe's own signature, and `all`."""

import inspect
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from latentlm.files import make_folder
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
)

_ROWS_SHOWN = 30
_WIDEST_CELL = 60
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Factors = Annotated[
    Path | None, typer.Option(help="A .csv or .tsv with a header and a row for each text: what is known of it.")
]
Output = Annotated[Path | None, typer.Option(help="Folder for tables, pictures and a page; made if it is missing.")]
Pool = Annotated[str, typer.Option(help="Of a latent with parts: mean over them, or flat, all of their numbers.")]
Part = Annotated[int | None, typer.Option(help="One layer, or one position of the texts, from 0, in place of all.")]


def _all(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder for report.html and the files of each probe.")],
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
) -> None:
    """Every probe with its defaults, and one page of what they found.

    Example: latentlm probe all runs/gpt-vae --data builtin:sentences --limit 2000 --output probes
    """
    from latentlm.probing import probe_all

    make_folder(output)
    with ExitStack() as stack:
        space, texts = _space(stack, model, data, column, sample_by, annotations, factor_table, limit, settings, pool,
                              part, batch_size, seed)  # fmt: skip
        results, skipped = probe_all(
            space, texts, output=output, title=f"Probes of {Path(model).name}", on_probe=lambda name: _say(f"{name} …")
        )
    for name, why in skipped.items():
        _say(f"{name} was not run: {why}")
    _say(f"{len(results)} probes, in {output / 'report.html'}")


def _command(name: str) -> Any:
    """The command of one probe."""
    from latentlm.probing import probe_named

    probe = probe_named(name)
    seeded = "seed" in inspect.signature(probe).parameters

    def run(
        model: Model,
        data: Data,
        output: Output = None,
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
        json_file: JsonFile = None,
        **of_probe: Any,
    ) -> None:
        if output is not None:
            make_folder(output)
        with ExitStack() as stack:
            space, texts = _space(stack, model, data, column, sample_by, annotations, factor_table, limit, settings,
                                  pool, part, batch_size, seed)  # fmt: skip
            result = probe(space, texts, **of_probe, **({"seed": seed} if seeded else {}))
        _say(result.about)
        _show(result.table)
        if json_file is not None:
            import json

            from latentlm.files import write_whole

            write_whole(json_file, json.dumps(result.json(), indent=1, ensure_ascii=False))
        if output is not None:
            _say("left: " + ", ".join(map(str, result.save(output))))

    own = [
        parameter.replace(
            annotation=Annotated[parameter.annotation, typer.Option(help=_help(probe, parameter.name))],
        )
        for parameter in inspect.signature(probe).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name != "seed"
    ]
    shared = [
        one for one in inspect.signature(run).parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    of_run = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in shared]
    run.__signature__ = inspect.Signature([*of_run, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in [*of_run, *own]}
    summary = (inspect.getdoc(probe) or "").split("\n\n")[0]
    run.__doc__ = f"{summary}\n\nExample: latentlm probe {name} MODEL --data builtin:sentences --limit 2000"
    return run


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
        maker.command(cmd_name)(_all if cmd_name == "all" else _command(cmd_name))
        command = typer.main.get_command(maker)
        command.name = cmd_name
        return command


probe_app = typer.Typer(cls=_Probes, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@probe_app.callback()
def _probes() -> None:
    """Look inside a latent space: one probe, or all of them on one page.

    Example: latentlm probe clusters runs/gpt-vae --data builtin:sentences --limit 2000 --output probes
    """


def _space(
    stack: ExitStack,
    model: str,
    data: str,
    column: str | None,
    sample_by: str | None,
    annotations: str | None,
    factor_table: Path | None,
    limit: int | None,
    settings: list[str] | None,
    pool: str,
    part: int | None,
    batch_size: int,
    seed: int,
) -> Any:
    from latentlm.cli import _change_inference, _console, _load
    from latentlm.data.recipe import annotated_as, saved_data_recipe
    from latentlm.probing import LatentSpace, read_texts
    from latentlm.training.progress import counted

    loaded, tokenizer = _load(model)
    _change_inference(loaded, settings)
    on_progress = stack.enter_context(counted(_console(), "inferring latents"))
    options: dict[str, Any] = {"pool": pool, "part": part, "seed": seed, "batch_size": batch_size}
    space = LatentSpace(loaded, tokenizer, **options, on_progress=on_progress)
    conditional = loaded.annotation_labels is not None
    annotated = annotated_as(saved_data_recipe(model), annotations, conditional)
    if annotated is not None and annotations is not None and not annotated.needed:
        annotated = type(annotated)(annotated.place, annotated.per)  # their labels are factors
    by = sample_by or "line"
    texts = read_texts(data, column=column, sample_by=by, limit=limit, annotated=annotated, factors=factor_table)
    return space, texts


def _say(text: str) -> None:
    from latentlm.cli import _console

    _console().print(text, highlight=False, soft_wrap=True, markup=False)


def _show(table: Any) -> None:
    from latentlm.cli import _console

    rows = Table()
    for column in table.columns:
        rows.add_column(str(column), justify="right" if table[column].dtype.kind in "fiu" else "left")
    for row in table.head(_ROWS_SHOWN).itertuples(index=False):
        rows.add_row(*(_cell(value) for value in row))
    console: Console = _console()
    console.print(rows)
    if len(table) > _ROWS_SHOWN:
        console.print(f"and {len(table) - _ROWS_SHOWN:,} more rows")


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return "–" if value != value else f"{value:.4g}"
    text = str(value)
    return escape(text if len(text) <= _WIDEST_CELL else text[: _WIDEST_CELL - 1] + "…")
