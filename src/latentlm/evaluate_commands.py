"""`latentlm evaluate`: the honest likelihood of text, and one command for each other table of the papers.

`latentlm evaluate MODEL …` is `latentlm evaluate likelihood MODEL …`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

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
    TextsFile,
    about,
    change_inference,
    load_model,
    terminal,
    write_json,
    write_lines,
)
from latentlm.processes import join

if TYPE_CHECKING:
    from latentlm.evaluation.generative import Reader

_MOST_SAMPLES = 1_000_000
_PAIRS_SHOWN = 5
_DEFAULT = "likelihood"

_Data = Annotated[str | None, typer.Option(help="By default the validation data of the model's recipe. " + DATA_HELP)]
_Scorer = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Folder of a model that scores the texts: generative perplexity.")
]


class _LikelihoodOrTable(TyperGroup):
    """A group whose first word may be a model: the command is then the likelihood."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


evaluate_app = typer.Typer(
    cls=_LikelihoodOrTable,
    help="""Honest figures of a model: the likelihood of text, and the tables of the papers.

    Without the name of a table it is the likelihood, whose options are those of latentlm evaluate likelihood --help.

    Example: latentlm evaluate runs/quickstart/ltm --iw-samples 64 --json figures.json
    """,
    rich_markup_mode=None,
)


@evaluate_app.command()
def likelihood(
    model: Model,
    data: _Data = None,
    column: Column = None,
    sample_by: SampleBy = None,
    annotations: Annotations = None,
    limit: Limit = None,
    iw_samples: Annotated[int, typer.Option(min=1, max=_MOST_SAMPLES, help="K of the importance-weighted bound.")] = 16,
    protocol: Annotated[
        str, typer.Option(help="honest, or paper: beside it what the family's published code would report.")
    ] = "honest",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Score what follows so many tokens, too, with z inferred from them alone; "
            "of --diversity and --style-transfer the length of a prompt, otherwise 4.",
        ),
    ] = None,
    reinfer_every: Annotated[
        int | None, typer.Option(min=1, help="With --prompt-tokens: infer z afresh after so many tokens.")
    ] = None,
    prior_samples: Annotated[
        int, typer.Option(min=0, max=_MOST_SAMPLES, help="Measure the variety of so many texts from the prior.")
    ] = 0,
    diversity: Annotated[
        int,
        typer.Option(
            min=0,
            max=_MOST_SAMPLES,
            metavar="PROMPTS",
            help="Measure how the texts of a prompt differ by z alone, for so many prompts.",
        ),
    ] = 0,
    style_transfer: Annotated[
        int,
        typer.Option(
            min=0,
            max=_MOST_SAMPLES,
            metavar="PAIRS",
            help="Go on from one text's beginning with another one's z, for so many pairs; measure what z brings.",
        ),
    ] = 0,
    reconstructions: Annotated[
        int,
        typer.Option(
            min=0,
            max=_MOST_SAMPLES,
            metavar="TEXTS",
            help="Write so many texts from their own z and compare: BLEU, exact match (no likelihood).",
        ),
    ] = 0,
    flops: Annotated[
        bool, typer.Option("--flops", help="Count the floating-point operations of a training step, too.")
    ] = False,
    settings: Settings = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Honest likelihood of text: ELBO, importance-weighted bound, KL, active units, bits per byte.

    Example: latentlm evaluate runs/quickstart/ltm --iw-samples 64 --json figures.json
    """
    from latentlm.data.recipe import evaluation_sequences
    from latentlm.evaluation.measure import measure
    from latentlm.evaluation.report import reconstructed, table
    from latentlm.training.progress import counted
    from latentlm.training.run import training_figures

    console = terminal()
    join()
    loaded, tokenizer = load_model(model)
    change_inference(loaded, settings)
    sequences = evaluation_sequences(
        model,
        tokenizer,
        loaded.config.max_position_embeddings,
        data,
        column=column,
        sample_by=sample_by,
        limit=limit,
        annotations=annotations,
        labels=loaded.annotation_labels,
    )
    if truncated := getattr(sequences, "truncated", 0):
        longest = loaded.config.max_position_embeddings
        console.print(f"cut at {longest} tokens: {truncated:,} of {len(sequences):,} texts")  # type: ignore[arg-type]
    with counted(console, "evaluating") as on_progress:
        figures = measure(
            loaded,
            sequences,
            protocol=protocol,
            iw_samples=iw_samples,
            prompt_tokens=prompt_tokens,
            reinfer_every=reinfer_every,
            prior_samples=prior_samples,
            diversity=diversity,
            style_transfer=style_transfer,
            reconstructions=reconstructions,
            flops=flops,
            tokenizer=tokenizer,
            trained=training_figures(model),
            batch_size=batch_size,
            seed=seed,
            on_progress=on_progress,
        )
    # of what they are is part of what they say
    figures = {
        "task": "likelihood",
        **about(model, loaded),
        **figures,
        "data": data,
        "seed": seed,
        "settings": settings or [],
    }
    caption = f"{data or 'validation data of its recipe'}, seed {seed}"
    console.print(caption, markup=False, highlight=False, soft_wrap=True)
    console.print(table({Path(model).name: figures}))
    if pairs := figures.get("reconstruction_pairs"):
        console.print(reconstructed(pairs[:_PAIRS_SHOWN]), markup=False, highlight=False, soft_wrap=True)
    write_json(json_file, figures)


@evaluate_app.command()
def completions(
    model: Model,
    data: _Data = None,
    column: Column = None,
    sample_by: SampleBy = None,
    limit: Limit = None,
    prompts: Annotated[int, typer.Option(min=1, max=_MOST_SAMPLES, help="Prompts, all different.")] = 1000,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 50,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to be written after it, at most.")] = 50,
    each: Annotated[int, typer.Option(min=1, max=_MOST_SAMPLES, help="Texts of each prompt, each with its own z.")] = 5,
    features: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder of a model whose hidden states MAUVE compares.")
    ] = None,
    scorer: _Scorer = None,
    texts: TextsFile = None,
    settings: Settings = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Go on from prompts, greedily and by sampling: MAUVE, BLEU, repetition, variety, beside what people wrote.

    Example: latentlm evaluate completions runs/ltm --features runs/gpt2 --scorer runs/gpt2 --json figures.json
    """
    from latentlm.data.recipe import evaluation_sequences
    from latentlm.evaluation.completions import completions as measured
    from latentlm.evaluation.writing import of_fixed_length, writes_freely
    from latentlm.training.progress import counted

    console = terminal()
    loaded, tokenizer = load_model(model)
    writes_freely(loaded)
    change_inference(loaded, settings)
    context = loaded.config.max_position_embeddings
    sequences = evaluation_sequences(model, tokenizer, context, data, column=column, sample_by=sample_by, limit=limit)
    with counted(console, "completions") as on_progress:
        figures, lines = measured(
            loaded,
            sequences,
            tokenizer,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            each=each,
            fixed_length=of_fixed_length(loaded, model),
            scorer=_reader(scorer),
            reader=_reader(features),
            batch_size=batch_size,
            seed=seed,
            on_progress=on_progress,
        )
    given = {"data": data, "settings": settings or [], "scorer": scorer, "features": features, "seed": seed}
    figures = {"task": "completions", **about(model, loaded), **figures, **given}
    _show(f"{prompts:,} prompts of {prompt_tokens} tokens, {each} texts of up to {new_tokens} of each", figures)
    write_lines(texts, lines)
    write_json(json_file, figures)


@evaluate_app.command()
def samples(
    model: Model,
    number: Annotated[int, typer.Option(min=1, max=_MOST_SAMPLES, help="Texts of each way of writing.")] = 64,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text, at most; by default the model's context.")
    ] = None,
    scorer: _Scorer = None,
    texts: TextsFile = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Write texts from nothing, greedily and by sampling: generative perplexity, token entropy, variety, speed.

    Example: latentlm evaluate samples runs/ltm --number 64 --length 1024 --scorer runs/gpt2 --json figures.json
    """
    from latentlm.evaluation.unconditional import unconditional
    from latentlm.evaluation.writing import of_fixed_length
    from latentlm.training.progress import counted

    console = terminal()
    loaded, tokenizer = load_model(model)
    with counted(console, "samples") as on_progress:
        figures, lines = unconditional(
            loaded,
            tokenizer,
            number=number,
            length=length,
            fixed_length=of_fixed_length(loaded, model),
            scorer=_reader(scorer),
            batch_size=batch_size,
            seed=seed,
            on_progress=on_progress,
        )
    figures = {"task": "samples", **about(model, loaded), **figures, "scorer": scorer, "seed": seed}
    _show(f"{number:,} texts of up to {figures['length']} tokens from z of the prior", figures)
    write_lines(texts, lines)
    write_json(json_file, figures)


def _reader(name: str | None) -> "Reader | None":
    from latentlm.evaluation.generative import Reader

    return None if name is None else Reader(*load_model(name))


def _show(title: str, figures: dict[str, Any]) -> None:
    from latentlm.evaluation.generation_table import generation_table, notes

    console = terminal()
    scored = "" if figures["scorer"] is None else f", scored by {figures['scorer']}"
    console.print(f"{title}, seed {figures['seed']}{scored}", markup=False, highlight=False, soft_wrap=True)
    console.print(generation_table(figures))
    for note in notes(figures):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
