"""Sweeps: one YAML file says which models are trained and how each is scored; the answer is tables and a picture.

    recipe: ltm-stories.yaml            what every run starts from; the path is relative to this file
    seeds: [0, 1, 2]                    of weights, batches and noise
    scoring: {iw_samples: 16}           options of `evaluation.measure`
    studies:
      steps in training × in testing:
        runs:                           name: changes to the recipe (or `recipe:`, another one to start from)
          T=4: {model.inference_steps: 4}
          T=16: {model.inference_steps: 16}
          control: {recipe: autoregressive-stories.yaml}
        grid:                           optional: every combination of these values, for each run
          training.learning_rate: [2e-3, 4e-3]
        evaluations:                    optional: each model is scored once for each; inference… or scoring options
          T=1: {inference_steps: 1}
        plot: {x: inference_steps, y: [elbo_nll_per_token]}

A model that several studies want is trained once. What is there already is not done again, so a sweep that was
interrupted goes on when it is started again with the same output.
"""

import hashlib
import itertools
import json
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict

from latentlm.errors import InputError, one_sentence
from latentlm.files import write_whole
from latentlm.training.recipe import Loader, load_recipe

RESULTS_FILE = "results.json"
_SCORING = {"protocol", "iw_samples", "prompt_tokens", "reinfer_every", "prior_samples", "batch_size", "limit"}


@strict
@dataclass(kw_only=True)
class Study:
    """One question: runs, and how each is scored. `recipe` and `scoring` are the sweep's where they are not given."""

    runs: dict
    recipe: str | None = None
    seeds: list | None = None
    grid: dict = field(default_factory=dict)
    scoring: dict = field(default_factory=dict)
    evaluations: dict = field(default_factory=lambda: {"": {}})
    plot: dict | None = None


@dataclass(frozen=True)
class Run:
    """A model to train: recipe file and overrides. Runs of one folder are one, whatever led to their recipe."""

    recipe: Path = field(compare=False)
    overrides: tuple[str, ...] = field(compare=False)
    folder: str

    @classmethod
    def of(cls, recipe: Path, overrides: Sequence[str]) -> "Run":
        """Checks the recipe; the folder's name ends in a digest of all that it says, changes applied."""
        document = load_recipe(recipe, overrides).document
        digest = hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()[:10]
        words = [re.sub(r"[^\w.=-]+", "-", one.partition(".")[2]) for one in overrides]
        return cls(recipe, tuple(overrides), "_".join([recipe.stem, *words])[:96] + "_" + digest)


@dataclass(frozen=True)
class Trial:
    """A run seen from a study: under which name, changed by what, and scored how."""

    study: str
    name: str
    evaluation: str
    seed: int
    run: Run
    changes: Mapping[str, Any]
    inference: Mapping[str, Any]
    scoring: Mapping[str, Any]

    @property
    def key(self) -> str:
        return json.dumps([self.run.folder, self.inference, self.scoring], sort_keys=True)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file."""

    studies: Mapping[str, Study]
    trials: Sequence[Trial]

    @property
    def runs(self) -> list[Run]:
        return list(dict.fromkeys(trial.run for trial in self.trials))


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads and checks a sweep and every recipe in it.

    Args:
        overrides: changes to every run, as `section.key=value`.

    Raises:
        InputError: naming the file and the study.
    """
    path = Path(path)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise InputError(f"sweep {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {one_sentence(error)}.") from error
    if not isinstance(document, dict) or not isinstance(document.get("studies"), dict) or not document["studies"]:
        raise InputError(f"{path}: a sweep is a mapping with the key studies, which names at least one.")
    if unknown := sorted(map(str, document.keys() - {"recipe", "seeds", "scoring", "studies"})):
        raise InputError(f"{path}: unknown key {unknown[0]!r}; a sweep has recipe, seeds, scoring and studies.")
    studies, trials = {}, []
    for name, content in document["studies"].items():
        where = f"{path}, study {name!r}"
        if not isinstance(content, dict):
            raise InputError(f"{where}: must be a mapping with the key runs.")
        try:
            study = Study(**content)
        except Exception as error:  # a strict dataclass raises its own kinds
            raise InputError(f"{where}: {one_sentence(error)}") from error
        study.recipe = study.recipe or document.get("recipe")
        study.seeds = study.seeds or document.get("seeds") or [0]
        study.scoring = {**(document.get("scoring") or {}), **study.scoring}
        studies[str(name)] = study
        trials += _trials(str(name), study, path.parent, overrides, where)
    return Sweep(studies, trials)


def _trials(name: str, study: Study, folder: Path, overrides: Sequence[str], where: str) -> list[Trial]:
    trials = []
    assert study.seeds is not None
    combinations = [dict(zip(study.grid, values, strict=True)) for values in itertools.product(*study.grid.values())]
    for (run_name, changes), combination, seed in itertools.product(study.runs.items(), combinations, study.seeds):
        changes = {**(changes or {}), **combination}
        label = ", ".join([str(run_name), *(f"{key.partition('.')[2]}={value}" for key, value in combination.items())])
        recipe = changes.pop("recipe", study.recipe)
        if recipe is None:
            raise InputError(f"{where}: neither the run {run_name!r} nor the sweep names a recipe.")
        own = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        try:
            run = Run.of(folder / recipe, (*own, *overrides, f"training.seed={seed}"))
        except InputError as error:
            raise InputError(f"{where}, run {label!r}: {error}") from error
        for evaluation, settings in study.evaluations.items():
            settings = {**study.scoring, **(settings or {})}
            inference = {key: value for key, value in settings.items() if key.startswith("inference")}
            scoring = {key: value for key, value in settings.items() if key not in inference}
            if unknown := sorted(scoring.keys() - _SCORING):
                raise InputError(f"{where}: {unknown[0]} is no option of scoring: {', '.join(sorted(_SCORING))}.")
            trials.append(Trial(name, label, str(evaluation), seed, run, changes, inference, scoring))
    return trials


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
        threads: of each; by default the cores are divided among the jobs.
        on_failure: told of a run that failed; the others go on, and the trials of that one are left out.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / RESULTS_FILE
    results: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    threads = threads or max((os.cpu_count() or 1) // jobs, 1)
    wanted: dict[Run, dict[str, Trial]] = {}
    for trial in sweep.trials:
        if trial.key not in results:
            wanted.setdefault(trial.run, {})[trial.key] = trial
    done, total = len(sweep.runs) - len(wanted), len(sweep.runs)
    on_progress(done, total)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        work = {
            pool.submit(_train_and_score, run, output / run.folder, list(trials.values()), threads): run
            for run, trials in wanted.items()
        }
        for future in as_completed(work):
            try:
                results |= future.result()
                write_whole(file, json.dumps(results, indent=1))
            except Exception as error:
                on_failure(f"{work[future].folder}: {one_sentence(error)}")
            done += 1
            on_progress(done, total)
    return [
        {"study": trial.study, "run": trial.name, "evaluation": trial.evaluation, "seed": trial.seed}
        | {"settings": {**trial.changes, **trial.inference, **trial.scoring}}
        | results[trial.key]
        for trial in sweep.trials
        if trial.key in results
    ]


def _train_and_score(run: Run, folder: Path, trials: Sequence[Trial], threads: int) -> dict[str, dict[str, Any]]:
    """The figures of one run's trials; trains it unless its folder holds a finished model."""
    import torch
    from transformers.utils import logging as transformers_logging

    from latentlm.data.recipe import evaluation_sequences
    from latentlm.evaluation.measure import measure
    from latentlm.loading import load
    from latentlm.training.run import HISTORY_FILE, train

    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    if not (folder / HISTORY_FILE).exists():
        train(load_recipe(run.recipe, run.overrides), folder, replace=True)
    history = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
    trained = {
        "training_seconds": next((entry["train_runtime"] for entry in history if "train_runtime" in entry), None),
        "training_tokens": int(max((entry["tokens"] for entry in history if "tokens" in entry), default=0)),
    }
    results = {}
    for trial in trials:
        model, tokenizer = load(folder)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        model.change_inference(**trial.inference)
        options = dict(trial.scoring)
        sequences = evaluation_sequences(
            folder, tokenizer, model.config.max_position_embeddings, limit=options.pop("limit", None)
        )
        results[trial.key] = trained | measure(model, sequences, seed=trial.seed, **options)
    return results


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in nothing but the seed as one: means, and `spread`, the standard deviation of each figure."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["study"], row["run"], row["evaluation"]), []).append(row)
    merged = []
    for group in groups.values():
        row = {**group[0], "seeds": len(group), "spread": {}}
        for key, value in group[0].items():
            values = [one[key] for one in group]
            if isinstance(value, float | int) and not isinstance(value, bool) and None not in values:
                row[key] = statistics.fmean(values)
                row["spread"][key] = statistics.stdev(values) if len(values) > 1 else 0.0
        merged.append(row)
    return merged
