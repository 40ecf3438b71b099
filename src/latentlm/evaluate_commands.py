"""`latentlm evaluate`: the honest likelihood of text, and one command for each other table of the papers.

`latentlm evaluate MODEL …` is `latentlm evaluate likelihood MODEL …`.
"""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from latentlm.errors import InputError
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
    check_one_process,
    load_model,
    terminal,
    write_json,
    write_json_lines,
)
from latentlm.processes import join

_MOST_SAMPLES = 1_000_000
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


@evaluate_app.command()
def likelihood(
    model: Model,
    data: Annotated[
        str | None, typer.Option(help="By default the validation data of the model's recipe. " + DATA_HELP)
    ] = None,
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
            tokenizer=tokenizer,
            batch_size=batch_size,
            seed=seed,
            on_progress=on_progress,
        )
    # of what they are is part of what they say
    figures |= training_figures(model) | {"data": data, "seed": seed, "settings": settings or []}
    caption = f"{data or 'validation data of its recipe'}, seed {seed}"
    console.print(caption, markup=False, highlight=False, soft_wrap=True)
    console.print(table({Path(model).name: figures}))
    if pairs := figures.get("reconstruction_pairs"):
        console.print(reconstructed(pairs[:_PAIRS_SHOWN]), markup=False, highlight=False, soft_wrap=True)
    write_json(json_file, figures)


@evaluate_app.command()
def gsm8k(
    model: Model,
    data: Annotated[str, typer.Option(metavar="FILE", help="Problems: a .jsonl with the columns question and answer.")],
    train: Annotated[
        str | None, typer.Option(metavar="FILE", help="Solved problems that --shots are drawn from.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved problems before each question.")] = 0,
    trials: Annotated[int, typer.Option(min=1, max=_MOST_SAMPLES, help="Texts for each problem.")] = 5,
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
    console = terminal()
    problems = read_problems(data, limit)
    examples = read_problems(train) if train is not None and shots else []
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
    write_json_lines(texts, records)


@evaluate_app.command()
def harness(
    model: Model,
    tasks: Annotated[str, typer.Option(metavar="TASK,…", help="Tasks of lm-eval, or of --include-path.")],
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with tasks of your own (YAML).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only so many examples of each task.")] = None,
    iw_samples: Annotated[int, typer.Option(min=1, max=_MOST_SAMPLES, help="K of the estimates.")] = 16,
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
