"""`latentlm evaluate`: the honest likelihood of text, and one command for each other table of the papers.

`latentlm evaluate MODEL …` is `latentlm evaluate likelihood MODEL …`.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from latentlm.options import (
    DATA_HELP,
    MOST_SAMPLES,
    Annotations,
    BatchSize,
    Column,
    EvaluationData,
    JsonFile,
    Limit,
    Model,
    PlotFile,
    SampleBy,
    Seed,
    Settings,
    about,
    change_inference,
    load_model,
    terminal,
    write_json,
)
from latentlm.processes import join
from latentlm.writing_commands import completions, gsm8k, harness, samples

_PAIRS_SHOWN = 5
_DEFAULT = "likelihood"


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


def _opened(
    model: Model,
    data: EvaluationData,
    column: Column,
    sample_by: SampleBy,
    annotations: Annotations,
    limit: Limit,
    settings: Settings,
) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and the sequences to evaluate it on; says how many of them were cut."""
    from latentlm.data.recipe import evaluation_sequences

    join()
    loaded, tokenizer = load_model(model)
    change_inference(loaded, settings)
    longest = loaded.config.max_position_embeddings
    sequences = evaluation_sequences(
        model,
        tokenizer,
        longest,
        data,
        column=column,
        sample_by=sample_by,
        limit=limit,
        annotations=annotations,
        labels=loaded.annotation_labels,
    )
    if truncated := getattr(sequences, "truncated", 0):
        terminal().print(f"cut at {longest} tokens: {truncated:,} of {len(sequences):,} texts")  # type: ignore[arg-type]
    return loaded, tokenizer, sequences


@evaluate_app.command()
def likelihood(
    model: Model,
    data: EvaluationData = None,
    column: Column = None,
    sample_by: SampleBy = None,
    annotations: Annotations = None,
    limit: Limit = None,
    iw_samples: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="K of the importance-weighted bound.")] = 16,
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
        int, typer.Option(min=0, max=MOST_SAMPLES, help="Measure the variety of so many texts from the prior.")
    ] = 0,
    diversity: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_SAMPLES,
            metavar="PROMPTS",
            help="Measure how the texts of a prompt differ by z alone, for so many prompts.",
        ),
    ] = 0,
    style_transfer: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_SAMPLES,
            metavar="PAIRS",
            help="Go on from one text's beginning with another one's z, for so many pairs; measure what z brings.",
        ),
    ] = 0,
    reconstructions: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_SAMPLES,
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
    from latentlm.evaluation.measure import measure
    from latentlm.evaluation.report import reconstructed, table
    from latentlm.training.progress import counted
    from latentlm.training.run import training_figures

    console = terminal()
    loaded, tokenizer, sequences = _opened(model, data, column, sample_by, annotations, limit, settings)
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
    given = {"data": data, "limit": limit, "settings": settings or [], "seed": seed}
    figures = {"task": "likelihood", **about(model, loaded), **figures, **given}
    caption = f"{data or 'validation data of its recipe'}, seed {seed}"
    console.print(caption, markup=False, highlight=False, soft_wrap=True)
    console.print(table({Path(model).name: figures}))
    if pairs := figures.get("reconstruction_pairs"):
        console.print(reconstructed(pairs[:_PAIRS_SHOWN]), markup=False, highlight=False, soft_wrap=True)
    write_json(json_file, figures)


@evaluate_app.command("zero-shot")
def zero_shot_command(
    model: Model,
    sets: Annotated[
        list[str],
        typer.Argument(
            help="Sets and where their text is, such as ptb=ptb.test.txt: ptb, wikitext, lm1b, lambada, ag_news, "
            "pubmed, arxiv, each detokenised as in the literature, or text, your own as it is. " + DATA_HELP,
            metavar="SET=SOURCE...",
        ),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Read only so many texts of each set.")] = None,
    iw_samples: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="K of the importance-weighted bound.")] = 16,
    settings: Settings = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Zero-shot perplexity: other sets' text in blocks, honest figures and those of the paper's protocol.

    Example: latentlm evaluate zero-shot runs/ltm ptb=ptb.test.txt lambada=lambada_test.jsonl --json zero-shot.json
    """
    from latentlm.data.recipe import saved_data_recipe, unit_and_length
    from latentlm.evaluation.zero_shot import parse_sets, zero_shot, zero_shot_table
    from latentlm.training.progress import counted

    sources = parse_sets(sets)
    console = terminal()
    join()
    loaded, tokenizer = load_model(model)
    change_inference(loaded, settings)
    unit, length = unit_and_length(saved_data_recipe(model), loaded.config.max_position_embeddings)
    with counted(console, "evaluating") as on_progress:
        figures = zero_shot(
            loaded,
            tokenizer,
            sources,
            unit=unit,
            length=length,
            limit=limit,
            iw_samples=iw_samples,
            batch_size=batch_size,
            seed=seed,
            on_progress=on_progress,
        )
    of = f"blocks of {length}" if unit == "blocks" else f"sentences of at most {length}"
    console.print(f"{of} tokens, seed {seed}", markup=False, highlight=False, soft_wrap=True)
    for name, one in figures.items():
        if one["truncated"]:
            console.print(f"{name}: cut at {length} tokens: {one['truncated']:,} of {one['texts']:,} texts")
    console.print(zero_shot_table(figures))
    head = {"task": "zero-shot", **about(model, loaded), "unit": unit, "length": length}
    write_json(json_file, {**head, "sets": figures, "limit": limit, "settings": settings or [], "seed": seed})


@evaluate_app.command("calibration")
def calibration_command(
    model: Model,
    data: EvaluationData = None,
    column: Column = None,
    sample_by: SampleBy = None,
    annotations: Annotations = None,
    limit: Limit = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=0, help="Infer z from so many tokens, and judge what follows; 0 draws z from the prior.")
    ] = 0,
    samples: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="K, the z's that are mixed.")] = 16,
    settings: Settings = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    plot: PlotFile = None,
    json_file: JsonFile = None,
) -> None:
    """Calibration of the next token's probabilities, and NLL by position, with z that has not seen what it predicts.

    Example: latentlm evaluate calibration runs/ltm --prompt-tokens 16 --plot calibration.png --json calibration.json
    """
    from latentlm.evaluation.calibration import calibration, calibration_tables, plot_calibration
    from latentlm.processes import is_main
    from latentlm.training.progress import counted

    console = terminal()
    loaded, _, sequences = _opened(model, data, column, sample_by, annotations, limit, settings)
    with counted(console, "evaluating") as on_progress:
        figures = calibration(
            loaded,
            sequences,
            prompt_tokens=prompt_tokens,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            on_progress=on_progress,
        )
    caption = f"{data or 'validation data of its recipe'}, seed {seed}"
    console.print(caption, markup=False, highlight=False, soft_wrap=True)
    for shown in calibration_tables(figures):
        console.print(shown)
    if plot is not None and is_main():
        plot_calibration(figures, plot, Path(model).name)
    head = {"task": "calibration", **about(model, loaded), **figures}
    write_json(json_file, {**head, "data": data, "limit": limit, "settings": settings or [], "seed": seed})


for _command in (completions, samples, gsm8k, harness):
    evaluate_app.command()(_command)
