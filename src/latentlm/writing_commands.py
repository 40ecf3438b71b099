"""The tables of `latentlm evaluate` for which a model writes text."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentlm.options import (
    MOST_SAMPLES,
    BatchSize,
    Column,
    EvaluationData,
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

if TYPE_CHECKING:
    from latentlm.evaluation.generative import Reader

_Scorer = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Folder of a model that scores the texts: generative perplexity.")
]


def completions(
    model: Model,
    data: EvaluationData = None,
    column: Column = None,
    sample_by: SampleBy = None,
    limit: Limit = None,
    prompts: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="Prompts, all different.")] = 1000,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 50,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to be written after it, at most.")] = 50,
    each: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="Texts of each prompt, each with its own z.")] = 5,
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


def samples(
    model: Model,
    number: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="Texts of each way of writing.")] = 64,
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
