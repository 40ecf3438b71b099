"""Sweeps: one YAML file says which models are trained and how each is scored; the answer is tables and a picture.

    recipe: ltm-stories.yaml            what every run starts from; the path is relative to this file
    seeds: [0, 1, 2]                    of weights, batches and noise
    changes: {data.length: 128}         optional: to the recipe of every run; a run's own come after them
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
      an LTM beside its control:
        runs: {LTM: {}, control: {recipe: autoregressive-stories.yaml}}
        tuning:                         in place of a grid: every run is tried with each combination by the first seed,
          training.learning_rate: [2e-3, 4e-3]      and its best (lowest IW NLL) has the other seeds, too
        control: control                the run with which all others are compared, seed by seed

A model that several studies want is trained once. What is there already is not done again, so a sweep that was
interrupted goes on when it is started again with the same output.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from latentlm.data.corpora import source_fingerprint
from latentlm.errors import InputError, one_sentence
from latentlm.evaluation.measure import Scoring
from latentlm.evaluation.studies import FIGURES
from latentlm.training.recipe import load_recipe, read_yaml, unreadable


@strict
@dataclass(kw_only=True)
class Study:
    """One question: runs, and how each is scored.

    `recipe`, `seeds` and `scoring` are the sweep's unless given; its `changes` hold, too.
    """

    runs: dict
    recipe: str | None = None
    seeds: list[int]
    changes: dict = field(default_factory=dict)
    grid: dict = field(default_factory=dict)
    tuning: dict = field(default_factory=dict)
    control: str | None = None
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
        if self.grid and self.tuning:
            raise ValueError("grid and tuning both say which values are tried: give one of them")
        for key, values in {**self.grid, **self.tuning}.items():
            if not isinstance(key, str) or not isinstance(values, list) or not values:
                where = "tuning" if self.tuning else "grid"
                raise ValueError(f"{where}: {key!r} must be a list of values, not {values!r}")
        if self.control is not None and self.control not in map(str, self.runs):
            raise ValueError(f"control must be one of the runs, not {self.control!r}")
        for name in ("scoring", "changes"):
            if not all(isinstance(key, str) for key in getattr(self, name)):
                raise ValueError(f"{name} must be a mapping of keys to values")
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

    `line` is the name that it shares with the other runs of a grid, or of tuning; `later` trials, of seeds after the
    first, wait until their line's best is known.
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
    later: bool = False

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
        """Every run that it may come to, each once."""
        return list(dict.fromkeys(trial.run for trial in self.trials))

    @property
    def number_of_models(self) -> int:
        """Models to train; of those that wait for their line's best, as many as will be chosen."""
        lines = {(trial.study, trial.line, trial.seed) for trial in self.trials if trial.later}
        return len({trial.run for trial in self.trials if not trial.later}) + len(lines)


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
    if unknown := sorted(map(str, document.keys() - {"recipe", "seeds", "changes", "scoring", "studies"})):
        known = "recipe, seeds, changes, scoring and studies"
        raise InputError(f"{path}: unknown key {unknown[0]!r}; a sweep has {known}.")
    merged = ("scoring", "changes")
    for key in merged:
        if not isinstance(document.setdefault(key, {}), dict):
            raise InputError(f"{path}: {key} must be a mapping of keys to values, not {document[key]!r}.")
    shared = {"recipe": document.get("recipe"), "seeds": document.get("seeds", [0])}
    studies: dict[str, Study] = {}
    trials: list[Trial] = []
    contents: dict[str, str] = {}
    for name, content in document["studies"].items():
        where = f"{path}, study {name!r}"
        if not isinstance(content, dict) or str(name) in studies:
            raise InputError(f"{where}: must be one mapping with the key runs.")
        try:
            for key in merged:
                if not isinstance(content.get(key, {}), dict):
                    raise InputError(f"{key} must be a mapping of keys to values.")
            both = {key: {**document[key], **content.get(key, {})} for key in merged}
            study = Study(**{**shared, **content, **both})
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
    tried = study.grid or study.tuning
    combinations = [dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]
    for (run_name, own), combination, seed in itertools.product(study.runs.items(), combinations, study.seeds):
        changes = {**study.changes, **(own or {}), **combination}
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
            later = bool(study.tuning) and seed != study.seeds[0]
            trials.append(
                Trial(name, str(run_name), label, str(evaluation), seed, run, changes, inference, scoring, later)
            )
    known = {key for trial in trials for key in {**trial.run.settings, **trial.inference, **trial.scoring}}
    if study.plot and study.plot["x"] not in FIGURES | known:
        raise InputError(f"plot: x must be a setting or a figure, not {study.plot['x']!r}.")
    return trials
