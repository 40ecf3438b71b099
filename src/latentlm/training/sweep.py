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
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.dataclasses import strict
from torch.utils.data import Dataset
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from latentlm.data.corpora import source_fingerprint
from latentlm.data.recipe import evaluation_sequences
from latentlm.errors import InputError, one_sentence
from latentlm.evaluation.comparison import averaged
from latentlm.evaluation.measure import Scoring, measure
from latentlm.evaluation.studies import FIGURES
from latentlm.files import write_whole
from latentlm.loading import load
from latentlm.training import run as training_run
from latentlm.training.recipe import load_recipe, read_yaml, unreadable

SCORES_FILE = "scores.json"
_JOBS_PER_CORE = 4


@strict
@dataclass(kw_only=True)
class Study:
    """One question: runs, and how each is scored. `recipe`, `seeds` and `scoring` are the sweep's unless given."""

    runs: dict
    recipe: str | None = None
    seeds: list[int]
    grid: dict = field(default_factory=dict)
    scoring: dict = field(default_factory=dict)
    evaluations: dict = field(default_factory=lambda: {"": {}})
    plot: dict | None = None

    def validate_values(self) -> None:
        """Part of the validation of `@strict`."""
        if (
            not self.seeds
            or len(set(self.seeds)) < len(self.seeds)
            or not all(0 <= seed < 2**32 for seed in self.seeds)
        ):
            raise ValueError(f"seeds must be different whole numbers from 0 to 2**32 - 1, not {self.seeds}")
        for name in ("runs", "evaluations"):
            content = getattr(self, name)
            if not content:
                raise ValueError(f"{name} must name at least one")
            for key, value in content.items():
                if not (value is None or isinstance(value, dict)) or not all(isinstance(k, str) for k in value or {}):
                    raise ValueError(f"{name}: {key!r} must be a mapping of keys to values, not {value!r}")
            if len({str(key) for key in content}) < len(content):
                raise ValueError(f"{name} has two of one name")
        for key, values in self.grid.items():
            if not isinstance(key, str) or not isinstance(values, list) or not values:
                raise ValueError(f"grid: {key!r} must be a list of values, not {values!r}")
        if not all(isinstance(key, str) for key in self.scoring):
            raise ValueError("scoring must be a mapping of options to values")
        if self.plot is not None:
            ys = self.plot.get("y", [])
            if not isinstance(self.plot.get("x"), str) or self.plot.keys() - {"x", "y"}:
                raise ValueError("plot is a mapping with x, a setting or a figure, and y, a list of figures")
            if not isinstance(ys, list) or ("y" in self.plot and not ys) or set(map(str, ys)) - FIGURES or len(ys) > 4:
                raise ValueError(f"plot: y must be a list of 1 to 4 figures of {', '.join(sorted(FIGURES))}, not {ys}")


@dataclass(frozen=True)
class Run:
    """A model to train: recipe file and overrides. Runs of one folder are one, whatever led to their recipe."""

    recipe: Path = field(compare=False)
    overrides: tuple[str, ...] = field(compare=False)
    folder: str
    exact: bool = field(default=False, compare=False)
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, recipe: Path, overrides: Sequence[str], contents: dict[str, str]) -> "Run":
        """Checks the recipe; the folder's name ends in a digest of all that it says, changes applied, and of its data.

        Args:
            contents: fingerprints of the sources met so far, so that each is read once; completed.
        """
        changed = load_recipe(recipe, overrides)
        # as it stands, unchecked: a model that it names may only be found under the name of an override
        document, (_, unchanged) = changed.document, read_yaml(recipe.read_text(encoding="utf-8"), str(recipe))
        # with the defaults that the recipe leaves to its config, since a later version may have others
        config = changed.model_config(vocab_size=1)
        of_every_model = {f.name for f in fields(PreTrainedConfig)} | {"vocab_size"}
        defaults = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in of_every_model}
        said = {**document, "model": {**defaults, **document["model"]}}
        sources = [source for source in (changed.data.source, changed.data.validation) if source is not None]
        for source in sources:
            if source not in contents:
                try:
                    contents[source] = source_fingerprint(source)
                except InputError:  # told by the run that cannot read it; the others go on
                    contents[source] = ""
        whole = {**said, "contents": [contents[source] for source in sources]}
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:10]
        settings = {f"{section}.{key}": value for section, part in said.items() for key, value in part.items()}
        words = [
            re.sub(r"[^\w.=-]+", "", f"{key}={value}")
            for section, content in document.items()
            for key, value in content.items()
            if value != unchanged.get(section, {}).get(key)
        ]
        return cls(
            recipe,
            tuple(overrides),
            "_".join([recipe.stem, *words])[:96] + "_" + digest,
            changed.family.exact,
            settings,
        )

    def change(self, inference: Mapping[str, Any]) -> None:
        """Raises InputError where this run's model cannot infer so; the model is made without memory."""
        recipe = load_recipe(self.recipe, self.overrides)
        with torch.device("meta"):
            recipe.family(recipe.model_config(vocab_size=8)).change_inference(**inference)


@dataclass(frozen=True)
class Trial:
    """A run seen from a study: under which name, changed by what, and scored how.

    `line` is the name that it shares with the other runs of a grid.
    """

    study: str
    line: str
    name: str
    evaluation: str
    seed: int
    run: Run
    changes: Mapping[str, Any]
    inference: Mapping[str, Any]
    scoring: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Under which a run's folder keeps this trial's figures; the seed of the noise is the run's."""
        return json.dumps([self.inference, self.scoring], sort_keys=True)


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
    if any(override.startswith("training.seed=") for override in overrides):
        raise InputError("seeds stand under seeds in the sweep, not in an override of training.seed.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sweep {path} cannot be read: {unreadable(error)}.") from error
    node, document = read_yaml(text, str(path))
    try:
        _check_keys(node, str(path))
    except RecursionError as error:
        raise InputError(f"{path}: not valid YAML: it holds itself, or is nested without end.") from error
    if not isinstance(document, dict) or not isinstance(document.get("studies"), dict) or not document["studies"]:
        raise InputError(f"{path}: a sweep is a mapping with the key studies, which names at least one.")
    if unknown := sorted(map(str, document.keys() - {"recipe", "seeds", "scoring", "studies"})):
        raise InputError(f"{path}: unknown key {unknown[0]!r}; a sweep has recipe, seeds, scoring and studies.")
    if not isinstance(document.setdefault("scoring", {}), dict):
        raise InputError(f"{path}: scoring must be a mapping of options to values, not {document['scoring']!r}.")
    shared = {"recipe": document.get("recipe"), "seeds": document.get("seeds", [0])}
    studies: dict[str, Study] = {}
    trials: list[Trial] = []
    contents: dict[str, str] = {}
    for name, content in document["studies"].items():
        where = f"{path}, study {name!r}"
        if not isinstance(content, dict) or str(name) in studies:
            raise InputError(f"{where}: must be one mapping with the key runs.")
        try:
            if not isinstance(content.get("scoring", {}), dict):
                raise InputError("scoring must be a mapping of options to values.")
            study = Study(**{**shared, **content, "scoring": {**document["scoring"], **content.get("scoring", {})}})
            trials += _trials(str(name), study, path.parent, overrides, contents)
        except Exception as error:  # a strict dataclass raises its own kinds
            raise InputError(f"{where}: {one_sentence(error)}") from error
        studies[str(name)] = study
    return Sweep(studies, trials)


def _of_inference(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (settings or {}).items() if key.startswith("inference")}


def _check_keys(node: yaml.Node | None, where: str) -> None:
    """YAML keeps the last of two equal keys and says nothing."""
    seen = set()
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = part if isinstance(node, yaml.MappingNode) else (None, part)
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise InputError(f"{where}, line {key.start_mark.line + 1}: {key.value!r} is given twice.")
            seen.add(key.value)
        _check_keys(value, where)


def _trials(name: str, study: Study, folder: Path, overrides: Sequence[str], contents: dict[str, str]) -> list[Trial]:
    trials: list[Trial] = []
    combinations = [dict(zip(study.grid, values, strict=True)) for values in itertools.product(*study.grid.values())]
    for (run_name, own), combination, seed in itertools.product(study.runs.items(), combinations, study.seeds):
        changes = {**(own or {}), **combination}
        label = ", ".join([str(run_name), *(f"{key.partition('.')[2]}={value}" for key, value in combination.items())])
        recipe = changes.pop("recipe", study.recipe)
        if not isinstance(recipe, str):
            raise InputError(f"neither the run {label!r} nor the sweep names a recipe.")
        if "training.seed" in changes:
            raise InputError(f"run {label!r}: seeds stand under seeds, not under training.seed.")
        settings = [f"{key}={json.dumps(value, default=str)}" for key, value in changes.items()]
        try:
            run = Run.of(folder / recipe, (*settings, *overrides, f"training.seed={seed}"), contents)
        except InputError as error:
            raise InputError(f"run {label!r}: {error}") from error
        evaluations = study.evaluations
        if run.exact:  # it infers nothing, so there is nothing to change
            evaluations = {name: one for name, one in evaluations.items() if not _of_inference(one)} or {"": {}}
        for evaluation, asked in evaluations.items():
            asked = {**study.scoring, **(asked or {})}
            inference = _of_inference(asked)
            scoring = {key: value for key, value in asked.items() if key not in inference}
            if run.exact:  # it has no z to reconstruct a text from, and is a control beside those that have
                scoring.pop("reconstructions", None)
            limit = scoring.get("limit")
            if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
                raise InputError(f"limit must be at least 1, not {limit!r}.")
            Scoring.of(**{key: value for key, value in scoring.items() if key != "limit"})
            if seed == study.seeds[0] and inference:
                run.change(inference)
            trials.append(Trial(name, str(run_name), label, str(evaluation), seed, run, changes, inference, scoring))
    known = {key for trial in trials for key in {**trial.run.settings, **trial.inference, **trial.scoring}}
    if study.plot and study.plot["x"] not in FIGURES | known:
        raise InputError(f"plot: x must be a setting or a figure, not {study.plot['x']!r}.")
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
        threads: of each; by default the cores are divided among the jobs, and none gets more than OMP_NUM_THREADS says.
        on_failure: told of a run that failed; the others go on, and the trials of that one are left out.
    """
    cores = os.cpu_count() or 1
    if jobs > _JOBS_PER_CORE * cores:
        raise InputError(f"{jobs} jobs are too many for {cores} cores: give at most {_JOBS_PER_CORE * cores}.")
    output.mkdir(parents=True, exist_ok=True)
    threads = threads or max(min(cores // jobs, torch.get_num_threads()), 1)
    scores = {run: _scores(output / run.folder) for run in sweep.runs}
    wanted: dict[Run, dict[str, Trial]] = {}
    for trial in sweep.trials:
        if trial.key not in scores[trial.run]:
            wanted.setdefault(trial.run, {})[trial.key] = trial
    done, total = len(sweep.runs) - len(wanted), len(sweep.runs)
    on_progress(done, total)
    others = set(active_children())
    # not in a with statement, whose end would wait for every run that the pool was given
    pool = ProcessPoolExecutor(min(jobs, max(len(wanted), 1)), mp_context=get_context("spawn"), initializer=_end_with)
    try:
        work = {
            pool.submit(_train_and_score, run, output / run.folder, list(trials.values()), threads): run
            for run, trials in wanted.items()
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
            done += 1
            on_progress(done, total)
    except BaseException:  # Ctrl-C, for one
        for job in set(active_children()) - others:
            job.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
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
        if trial.key in scores[trial.run]
    ]


def _end_with() -> None:
    """A job ends with its sweep: at Ctrl-C without a word, and when the sweep was killed.

    Else it would train on, unseen, beside whatever is started next.
    """
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


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in nothing but the seed as one: means, and `spread`, the standard deviation of each figure."""
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
        merged.append(row)
    return merged
