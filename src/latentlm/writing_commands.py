"""The tables of `latentlm evaluate` for which a model writes text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentlm.errors import InputError
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
    check_one_process,
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


def gsm8k(
    model: Model,
    data: Annotated[str, typer.Option(metavar="FILE", help="Problems: a .jsonl with the columns question and answer.")],
    train: Annotated[
        str | None, typer.Option(metavar="FILE", help="Solved problems that --shots are drawn from.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved problems before each question.")] = 0,
    trials: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="Texts for each problem.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each text.")] = 50,
    beams: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Width of a beam search; by default 5 for a model without latents, otherwise sampling.",
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling, by default 1.")] = None,
    limit: Limit = None,
    settings: Settings = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
    texts: TextsFile = None,
) -> None:
    """Arithmetic reasoning: grade-school problems in words, each tried several times (pass@k).

    Example: latentlm evaluate gsm8k runs/ltm --data test.jsonl --train train.jsonl --shots 8 --json gsm8k.json
    """
    from latentlm.evaluation.gsm8k import gsm8k as run
    from latentlm.evaluation.gsm8k import pass_table, read_problems
    from latentlm.training.progress import counted

    check_one_process("evaluate gsm8k")
    if shots and train is None:
        raise InputError("--shots are drawn from solved problems: give some by --train.")
    if train is not None and not shots:
        raise InputError("--train is what --shots are drawn from: say how many, or leave it out.")
    console = terminal()
    problems = read_problems(data, limit)
    examples = read_problems(train) if train is not None else []
    loaded, tokenizer = load_model(model)
    change_inference(loaded, settings)
    with counted(console, "solving") as on_progress:
        figures, records = run(
            loaded,
            tokenizer,
            problems,
            examples=examples,
            shots=shots,
            trials=trials,
            max_new_tokens=max_new_tokens,
            beams=beams,
            temperature=temperature,
            seed=seed,
            on_progress=on_progress,
        )
    console.print(pass_table(Path(model).name, figures))
    if figures["too_long"]:
        console.print(f"too long for the model's context, so not answered: {figures['too_long']:,} problems")
    given = {"data": data, "train": train, "settings": settings or []}
    write_json(json_file, {"task": "gsm8k", **about(model, loaded), **given, **figures, "seed": seed})
    write_lines(texts, records)


def harness(
    model: Model,
    tasks: Annotated[str, typer.Option(metavar="TASK,…", help="Tasks of lm-eval, or of --include-path.")],
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with tasks of your own (YAML).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only so many examples of each task.")] = None,
    iw_samples: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="K of the estimates.")] = 16,
    settings: Settings = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Tasks of the lm-evaluation-harness (package lm-eval).

    Example: latentlm evaluate harness runs/ltm --tasks lambada_openai,piqa --limit 100 --json harness.json
    """
    import logging

    check_one_process("evaluate harness")
    try:
        from lm_eval.utils import make_table
    except ImportError as error:
        raise InputError("this needs the package lm-eval: pip install 'latentlm[harness]'.") from error
    from latentlm.evaluation.harness import HarnessLM
    from latentlm.evaluation.harness import harness as run
    from latentlm.training.progress import counted

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells each default that a task leaves
    console = terminal()
    loaded, tokenizer = load_model(model)
    change_inference(loaded, settings)
    with counted(console, "evaluating") as on_progress:
        lm = HarnessLM(
            loaded, tokenizer, iw_samples=iw_samples, batch_size=batch_size, seed=seed, on_progress=on_progress
        )
        results = run(lm, tasks.split(","), include_path=include_path, limit=limit)
    for shown in ("results", "groups"):
        if results.get(shown):
            console.print(make_table(results, shown), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{lm.note()}.", markup=False, highlight=False, soft_wrap=True)
    if lm.cut:
        console.print(f"cut at the front to fit the model's context: {lm.cut:,} contexts")
    given = {"tasks": tasks.split(","), "limit": limit, "settings": settings or [], **lm.get_model_info()}
    write_json(json_file, {"task": "harness", **about(model, loaded), **given, "cut": lm.cut, "harness": results})


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
