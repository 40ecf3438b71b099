"""Runs a sweep: jobs in processes of their own, what is there already left alone, and rows of figures at the end."""

import json
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.utils import logging as transformers_logging

from latentlm.data.recipe import evaluation_sequences
from latentlm.errors import InputError, one_sentence
from latentlm.evaluation.comparison import averaged, paired
from latentlm.evaluation.measure import measure
from latentlm.files import write_whole
from latentlm.loading import load
from latentlm.training import run as training_run
from latentlm.training.recipe import load_recipe
from latentlm.training.sweep import Run, Sweep, Trial

SCORES_FILE = "scores.json"
_JOBS_PER_CORE = 4


def run_sweep(
    sweep: Sweep,
    output: Path,
    *,
    jobs: int = 1,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_failure: Callable[[str], None] = lambda sentence: None,
) -> list[dict[str, Any]]:
    """Trains and scores what is not there yet, and returns one mapping of figures for each trial.

    Args:
        jobs: runs at a time, each in a process of its own.
        threads: of each; by default the cores are divided among the jobs, and none gets more than OMP_NUM_THREADS says.
        on_failure: told of a run that failed; the others go on, and the trials of that one are left out.
    """
    cores = os.cpu_count() or 1
    if jobs > _JOBS_PER_CORE * cores:
        raise InputError(f"{jobs} jobs are too many for {cores} cores: give at most {_JOBS_PER_CORE * cores}.")
    output.mkdir(parents=True, exist_ok=True)
    threads = threads or max(min(cores // jobs, torch.get_num_threads()), 1)
    first = [trial for trial in sweep.trials if not trial.later]
    total, done = sweep.number_of_models, 0

    def on_run() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    on_progress(0, total)
    scores = _run(first, output, jobs, threads, on_run, on_failure)
    chosen = _best(sweep, scores)
    scores |= _run(chosen, output, jobs, threads, on_run, on_failure)
    wanted = {id(trial) for trial in (*first, *chosen)}
    return [
        {
            "study": trial.study,
            "line": trial.line,
            "run": trial.name,
            "evaluation": trial.evaluation,
            "seed": trial.seed,
        }
        | {"settings": {**trial.run.settings, **trial.inference, **trial.scoring}}
        | scores[trial.run][trial.key]
        for trial in sweep.trials
        if id(trial) in wanted and trial.key in scores[trial.run]
    ]


Scores = dict[Run, dict[str, dict[str, Any]]]


def _run(
    trials: Sequence[Trial],
    output: Path,
    jobs: int,
    threads: int,
    on_run: Callable[[], None],
    on_failure: Callable[[str], None],
) -> Scores:
    """Does what of these trials is not there yet; the figures of all that are there then, by run and `Trial.key`."""
    scores, wanted = _known_and_wanted(trials, output)
    for _ in range(len(scores) - len(wanted)):
        on_run()
    if not wanted:
        return scores
    others = set(active_children())
    # not in a with statement, whose end would wait for every run that the pool was given
    pool = ProcessPoolExecutor(min(jobs, len(wanted)), mp_context=get_context("spawn"), initializer=_end_with)
    try:
        work = {
            pool.submit(_train_and_score, run, output / run.folder, list(of_run.values()), threads): run
            for run, of_run in wanted.items()
        }
        for future in as_completed(work):
            run = work[future]
            try:
                future.result()
            except Exception as error:
                first = next(iter(wanted[run].values()))
                killed = "its process was killed, perhaps for lack of memory: give fewer --jobs"
                reason = killed if isinstance(error, BrokenProcessPool) else one_sentence(error)
                on_failure(f"study {first.study!r}, run {first.name!r}, seed {first.seed}: {reason}")
            scores[run] = _scores(output / run.folder)
            on_run()
    except BaseException:  # Ctrl-C, for one
        for job in set(active_children()) - others:
            job.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return scores


def _known_and_wanted(trials: Sequence[Trial], output: Path) -> tuple[Scores, dict[Run, dict[str, Trial]]]:
    """What is there of these trials' runs, and of each run the trials that are not, by `Trial.key`."""
    scores = {trial.run: _scores(output / trial.run.folder) for trial in trials}
    wanted: dict[Run, dict[str, Trial]] = {}
    for trial in trials:
        if trial.key not in scores[trial.run]:
            wanted.setdefault(trial.run, {})[trial.key] = trial
    return scores, wanted


def models_there(sweep: Sweep, output: Path) -> int:
    """How many of a sweep's models an earlier start of it has left, trained and scored."""
    scores, wanted = _known_and_wanted(sweep.trials, output)
    return len(scores) - len(wanted)


def _best(sweep: Sweep, scores: Scores) -> list[Trial]:
    """Of the trials that waited those of each line's best: of the lowest IW NLL by the first seed, as first scored."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    seen: set[tuple[str, str, str]] = set()
    for trial in sweep.trials:
        if trial.later or trial.key not in scores[trial.run] or (trial.study, trial.line, trial.name) in seen:
            continue
        seen.add((trial.study, trial.line, trial.name))
        candidate = (scores[trial.run][trial.key]["iw_nll_per_token"], trial.name)
        line = (trial.study, trial.line)
        best[line] = min(best.get(line, candidate), candidate)
    return [
        trial
        for trial in sweep.trials
        if trial.later and best.get((trial.study, trial.line), (0, None))[1] == trial.name
    ]


def _end_with() -> None:
    """A job ends with its sweep: at Ctrl-C without a word, and when the sweep was killed.

    Else it would train on, unseen, beside whatever is started next.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a sweep in the background has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Figures of a run's trials that are known already, by their keys."""
    file = folder / SCORES_FILE
    try:
        scores = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise InputError(f"{file} is damaged: delete it, and its run is scored again.") from error
    if not isinstance(scores, dict):
        raise InputError(f"{file} is damaged: delete it, and its run is scored again.")
    return scores


def _train_and_score(run: Run, folder: Path, trials: Sequence[Trial], threads: int) -> None:
    """Leaves the figures of one run's trials in its folder; trains it unless the folder holds a finished model."""
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    if not (folder / training_run.HISTORY_FILE).exists():
        training_run.train(load_recipe(run.recipe, run.overrides), folder, resume=True, replace=True)
    trained = training_run.training_figures(folder)
    data: dict[int | None, Dataset] = {}  # by its limit, since reading takes as long as some scores
    for trial in trials:
        model, tokenizer = load(folder)  # again, without the last trial's changes
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        model.change_inference(**trial.inference)
        options = dict(trial.scoring)
        limit = options.pop("limit", None)
        if limit not in data:
            labels = model.annotation_labels
            longest = model.config.max_position_embeddings
            data[limit] = evaluation_sequences(folder, tokenizer, longest, limit=limit, labels=labels)
        about: dict[str, Any] = {"tokenizer": tokenizer, "trained": trained, "seed": trial.seed}
        figures = {"family": type(model).__name__} | measure(model, data[limit], **about, **{"flops": True, **options})
        write_whole(folder / SCORES_FILE, json.dumps({**_scores(folder), trial.key: figures}, indent=1))


def histories(sweep: Sweep, output: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Study → run → the log of its first seed, of those that are trained."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for trial in sweep.trials:
        file = output / trial.run.folder / training_run.HISTORY_FILE
        if trial.name not in found.get(trial.study, {}) and file.exists():
            found.setdefault(trial.study, {})[trial.name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def over_seeds(
    rows: Sequence[Mapping[str, Any]], controls: Mapping[str, str | None] | None = None
) -> list[dict[str, Any]]:
    """Rows that differ in nothing but the seed as one: means, and `spread`, the standard deviation of each figure.

    Args:
        controls: study → the line with which its others are compared, if any (`Study.control`): rows of those have
            `against`, a `Paired` of NLL per token by IW over the seeds that both have.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["study"], row["run"], row["evaluation"]), []).append(row)
    merged = []
    for group in groups.values():
        means, spread = averaged(group)
        row = {**group[0], **means, "seeds": len(group), "spread": spread}
        for key, value in group[0].items():
            if isinstance(value, list) and len(group) > 1:
                del row[key]  # dimension d of one seed's latent is not that of another's
        control = (controls or {}).get(row["study"])
        of_control = [one for one in groups.values() if (one[0]["study"], one[0]["line"]) == (row["study"], control)]
        if of_control and row["line"] != control:
            # of a tuned control the best, which has all seeds; of a grid's that of the same values
            values = row["run"].removeprefix(row["line"])
            same = [one for one in of_control if one[0]["run"].removeprefix(control) == values]
            most = max(map(len, of_control))
            among = [one for one in same if len(one) == most] or of_control
            its = {one["seed"]: one for one in min(among, key=lambda one: (-len(one), _mean_nll(one)))}
            both = [(one, its[one["seed"]]) for one in group if one["seed"] in its]
            if both:
                row["against"] = paired(
                    *([one["iw_nll_per_token"] for one in side] for side in zip(*both, strict=True))
                )
        merged.append(row)
    return merged


def _mean_nll(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row["iw_nll_per_token"] for row in rows) / len(rows)
