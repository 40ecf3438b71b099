"""The command `latentlm`. Each verb calls one function of the library and prints what it returns."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging as transformers_logging

# verbs import what they need beyond the families, which `import latentlm` has registered with transformers
from latentlm.endings import told_in_one_sentence
from latentlm.errors import InputError
from latentlm.evaluate_commands import evaluate_app
from latentlm.options import (
    DATA_HELP,
    MOST_SAMPLES,
    Annotations,
    BatchSize,
    Column,
    JsonFile,
    Labels,
    Limit,
    Model,
    SampleBy,
    Seed,
    Settings,
    change_inference,
    check_one_process,
    check_outputs,
    checked_seed,
    load_model,
    terminal,
    write_json,
)
from latentlm.probe_commands import probe_app
from latentlm_command import INTERRUPTED

app = typer.Typer(
    name="latentlm",
    help="Language models with a latent space: train them, measure them honestly, generate from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(evaluate_app, name="evaluate")
app.add_typer(probe_app, name="probe")

# at the quickstart's sizes more threads only wait for one another
_QUICKSTART_THREADS = 2
_OF_SEVERAL_PROCESSES = ("train", "evaluate")
_LEAST_TEMPERATURE = 1e-12  # far below it logits overflow


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="CPU threads; by default torch's choice.")
    ] = None,
) -> None:
    context.obj = threads
    if context.invoked_subcommand is not None and context.invoked_subcommand not in _OF_SEVERAL_PROCESSES:
        check_one_process(context.invoked_subcommand)
    if threads is None and context.invoked_subcommand == "quickstart":
        threads = min(_QUICKSTART_THREADS, os.cpu_count() or 1)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for models, figures, plot and samples.")] = Path(
        "runs/quickstart"
    ),
    data: Annotated[str | None, typer.Option(help="Own text in place of builtin:sentences. " + DATA_HELP)] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Train a small LTM beside its autoregressive control; show an honest table, a plot, and text they wrote.

    Example: latentlm quickstart --output runs/quickstart
    """
    from latentlm.training.quickstart import quickstart as run

    result = run(output, data=data, seed=seed, console=terminal())
    write_json(json_file, result.figures)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe, a YAML file.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to it.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/NAME-OF-THE-RECIPE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint, if any.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Train what a recipe says.

    Example: latentlm train recipes/ltm-wikitext2-450k.yaml data.source=train.txt data.validation=valid.txt
    """
    from latentlm.training.collapse import CollapseMonitor
    from latentlm.training.progress import ProgressLine
    from latentlm.training.recipe import load_recipe
    from latentlm.training.run import train as run

    console = terminal()
    checked = load_recipe(recipe, overrides or [])
    folder = output or Path("runs") / Path(recipe).stem
    result = run(
        checked,
        folder,
        resume=resume,
        callbacks=[
            ProgressLine(console, f"training {checked.family.__name__}"),
            CollapseMonitor(console, pretrained=bool(checked.encoder.pretraining_steps or checked.encoder.initial)),
        ],
        on_stage=lambda stage: console.print(f"{stage} …"),
    )
    last: dict[str, Any] = next((entry for entry in reversed(result[2]) if "eval_elbo_nll_per_token" in entry), {})
    for name, value in last.items():
        console.print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}", highlight=False)
    console.print(
        f"the model is in {folder}; score all its validation data with: latentlm evaluate {folder}",
        highlight=False,
        soft_wrap=True,
    )
    write_json(json_file, last)


@app.command()
def sweep(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A sweep, a YAML file.", metavar="SWEEP")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to every run of it.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; by default runs/NAME-OF-THE-SWEEP.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; the cores are divided among them.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Train and score many models as a sweep says; show a table for each study, and a plot.

    What is done already in the folder is kept, so a sweep that was stopped goes on when it is started again.

    Example: latentlm sweep recipes/sweeps/ltm-inference.yaml --jobs 2
    """
    from latentlm.evaluation.studies import study_curves, study_markdown, study_plots, study_table
    from latentlm.files import write_whole
    from latentlm.training.progress import counted
    from latentlm.training.sweep import load_sweep
    from latentlm.training.sweep_run import histories, models_there, over_seeds, run_sweep

    console = terminal()
    checked = load_sweep(recipe, overrides or [])
    folder = output or Path("runs") / Path(recipe).stem
    failures: list[str] = []
    there = models_there(checked, folder)
    console.print(
        f"{checked.number_of_models} models{f', {there} of them there already' if there else ''}, in {folder}"
    )
    with counted(console, "sweeping") as on_progress:
        rows = run_sweep(
            checked,
            folder,
            jobs=jobs,
            threads=context.obj,
            on_progress=on_progress,
            on_failure=failures.append,
        )
    merged = over_seeds(rows, {name: study.control for name, study in checked.studies.items()})
    every = {name: [row for row in merged if row["study"] == name] for name in checked.studies}
    shown = {name: of_study for name, of_study in every.items() if of_study}
    for name, of_study in shown.items():
        console.print(study_table(name, of_study))
    write_json(json_file, rows)
    if shown:
        write_json(folder / "studies.json", rows)  # in which a leaderboard finds the runs' names
        write_whole(folder / "studies.md", "\n".join(study_markdown(*study) for study in shown.items()))
        plots = {name: (of_study, checked.studies[name].plot) for name, of_study in shown.items()}
        study_plots(plots, folder / "studies.png")
        study_curves(histories(checked, folder), folder / "curves.png")
    if failures:
        raise InputError(f"{len(failures)} of {checked.number_of_models} runs failed; the first: {failures[0]}")
    console.print(
        f"left in {folder}: studies.md, studies.json, studies.png, curves.png, and a folder for each model",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def leaderboard(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUNS...", help="Files of evaluate --json and sweep --json; folders of them, and of sweeps."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for leaderboard.md, .html and .png.")] = Path("runs/leaderboard"),
    json_file: JsonFile = None,
) -> None:
    """Rank models by what was measured of them, beside the best exact control: one table, one page, one plot.

    Example: latentlm leaderboard runs/ltm-inference figures.json --output runs/leaderboard
    """
    from latentlm.evaluation.leaderboard import leaderboard as run
    from latentlm.evaluation.leaderboard_page import save, tables

    console = terminal()
    board = run(runs)
    written = save(board, output)
    for section, table in zip(board.sections, tables(board, console.width), strict=True):
        console.print(table)
        for remark in section.remarks():
            console.print(remark, markup=False, highlight=False, soft_wrap=True)
    for note in board.notes():
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    write_json(json_file, board.json())
    names = ", ".join(path.name for path in written)
    console.print(f"all columns are in {output}: {names}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to go on from; may be given several times.")] = None,
    latents: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write from the means in a file of encode, one for each prompt or text."),
    ] = None,
    labels: Labels = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, max=MOST_SAMPLES, help="Texts for each prompt.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="By default what the model's context leaves.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token instead of sampling.")] = False,
    temperature: Annotated[float, typer.Option(help="Below 1 sharper, above 1 flatter.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    beams: Annotated[int, typer.Option(min=1, max=4096, help="Width of a beam search.")] = 1,
    reinfer_every: Annotated[
        int | None, typer.Option(min=1, help="Infer z afresh from the text so far after so many new tokens.")
    ] = None,
    settings: Settings = None,
    seed: Annotated[int | None, typer.Option(help="Makes the call repeatable.", callback=checked_seed)] = None,
    json_file: JsonFile = None,
) -> None:
    """Write text: from latents inferred from a prompt, from the prior, or from a file.

    Example: latentlm generate runs/quickstart/ltm --prompt "yesterday the" -n 3 --seed 1
    """
    from latentlm.text import read_latents, write

    if not temperature >= _LEAST_TEMPERATURE:
        raise InputError(f"--temperature must be at least {_LEAST_TEMPERATURE}; for the likeliest token use --greedy.")
    if 1 < beams < number:
        raise InputError(f"--beams {beams} gives at most {beams} texts for each prompt, not {number}.")
    prompts = prompt or []
    _check_utf8("--prompt", prompts)
    rows, lengths = (None, None) if latents is None else read_latents(latents)
    loaded, tokenizer = load_model(model)
    change_inference(loaded, settings)
    if rows is not None:
        _check_has_latents(model, loaded)
    longest = max((len(tokenizer(text)["input_ids"]) for text in prompts), default=0)
    room = loaded.config.max_position_embeddings - longest
    if max_new_tokens is None and room < 1:
        raise InputError(f"the prompt has {longest} tokens and fills the context of {longest + room}: shorten it.")
    if rows is not None and loaded.latent_per_token:
        room = max(min(room, rows.shape[1] - longest), 1)
    sampling: dict[str, Any] = (
        {"do_sample": False}
        if greedy
        else {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    )
    texts = write(
        loaded,
        tokenizer,
        prompts,
        _split_labels(model, loaded, labels),
        latents=rows,
        **({} if lengths is None else {"lengths": lengths}),
        num_return_sequences=number,
        max_new_tokens=max_new_tokens or room,
        num_beams=beams,
        reinfer_every=reinfer_every,
        seed=seed,
        **sampling,
    )
    for text in texts:
        typer.echo(text)
    given = {"prompts": prompts, "latents": None if latents is None else str(latents), "labels": labels or []}
    write_json(json_file, {**given, "number": number, "seed": seed, "texts": texts})


@app.command()
def encode(
    model: Model,
    output: Annotated[
        Path, typer.Option(help=".npz (ids, mean, variance; lengths of trajectories) or .parquet (id, flat, shape).")
    ],
    text: Annotated[list[str] | None, typer.Option(help="A text; may be given several times.")] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    column: Column = None,
    sample_by: SampleBy = None,
    annotations: Annotations = None,
    labels: Labels = None,
    limit: Limit = None,
    settings: Settings = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
) -> None:
    """Latents of texts: mean and variance of q(z | x) for each, in the order given.

    Example: latentlm encode runs/quickstart/ltm --data texts.txt --output latents.npz
    """
    from latentlm.data import read_documents
    from latentlm.data.recipe import annotated_as, saved_data_recipe
    from latentlm.text import check_latents_path
    from latentlm.text import encode as run
    from latentlm.training.progress import counted

    if (text is None) == (data is None):
        raise InputError("give the texts either by --text or by --data.")
    _check_utf8("--text", text or [])
    check_latents_path(output)
    loaded, tokenizer = load_model(model)
    change_inference(loaded, settings)
    _check_has_latents(model, loaded)
    conditional = loaded.annotation_labels is not None
    of_texts = None
    if data is not None:
        if labels:
            raise InputError("--labels are of --text: those of --data are read with it.")
        annotated = annotated_as(saved_data_recipe(model), annotations, conditional)
        by = sample_by or "line"
        documents = list(read_documents(data, column=column, sample_by=by, limit=limit, annotated=annotated))
        text = [document.text for document in documents]
        of_texts = [document.annotations or () for document in documents] if conditional else None
    elif labels:
        of_texts = _split_labels(model, loaded, labels * len(text or []) if len(labels) == 1 else labels, text)
    options: dict[str, Any] = {"annotations": of_texts, "cut": data is not None, "batch_size": batch_size, "seed": seed}
    with counted(terminal(), "encoding") as on_progress:
        encoding = run(loaded, tokenizer, text or [], **options, on_progress=on_progress)
    encoding.save(output)
    if encoding.truncated:
        longest = loaded.config.max_position_embeddings
        typer.echo(f"cut at {longest} tokens: {encoding.truncated:,} of {len(encoding.ids):,} texts")
    shape = " × ".join(map(str, encoding.mean.shape[1:]))
    typer.echo(f"texts: {len(encoding.ids):,}; latents of {shape}; in {output}")


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model.", metavar="MODEL")],
    name: Annotated[str, typer.Argument(help="Its name on the Hugging Face hub.", metavar="OWNER/NAME")],
    figures: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of evaluate --json; they stand in the model card.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Everyone sees it; without, its owner alone.")] = False,
) -> None:
    """Put a model on the Hugging Face hub, with a card that says what it is and what was measured of it.

    The token is HF_TOKEN or that of hf auth login. Folders and paths of this machine are not uploaded.

    Example: latentlm push runs/quickstart/ltm OWNER/NAME --figures figures.json
    """
    from latentlm.publishing import push_to_hub

    typer.echo(push_to_hub(model, name, figures, private=not public))


def _split_labels(
    name: str, model: Any, labels: list[str] | None, texts: list[str] | None = None
) -> list[tuple[str, ...]]:
    """The labels of each text, one for each of its words unless the model is of labels of whole texts."""
    from latentlm.data import Annotated
    from latentlm.data.recipe import saved_data_recipe

    if not labels:
        return []
    if model.annotation_labels is None:
        raise InputError(f"{name} was trained without annotations: leave --labels out.")
    if texts is not None and len(texts) != len(labels):
        raise InputError(f"the labels of {len(labels)} texts do not fit {len(texts)}: give those of each, or of one.")
    data = saved_data_recipe(name)
    annotated = Annotated("--labels", "word" if data is None else data.annotations_per)
    # a text that is still to be written has as many words as it is given labels
    wanted = labels if texts is None else texts
    return [annotated.labels(text, one, "--labels") or () for text, one in zip(wanted, labels, strict=True)]


def _check_utf8(option: str, texts: list[str]) -> None:
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise InputError(f"{option} is not UTF-8 text: convert it.")


def _check_has_latents(name: str, model: Any) -> None:
    if not model.prior(1, 1).event_shape.numel():
        raise InputError(
            f"{name} has no latents, being of the family {type(model).__name__}: give a model of another family."
        )


def main() -> None:
    """Runs the command; what the user can mend ends in one sentence and status 2, without a traceback."""
    debug = "--debug" in sys.argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        warnings.filterwarnings("ignore")
        transformers_logging.set_verbosity_error()
    with told_in_one_sentence(debug):
        # click's standalone mode would end the process itself and print a usage block for every mistake
        words = [word for word in sys.argv[1:] if word != "--debug"]
        check_outputs(words)
        status = app(words, standalone_mode=False)
        if status == INTERRUPTED:  # typer makes it of Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
    sys.exit(status if isinstance(status, int) else 0)
