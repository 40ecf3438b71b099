"""Figures that `latentlm evaluate`, `sweep` and `quickstart` have left in files, and what is known of their models."""

import json
import math
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from latentlm.data.recipe import RECIPE_FILE
from latentlm.errors import InputError, shown
from latentlm.files import reason_of

TASK = "leaderboard"
_ROUNDED = 8  # digits
_APART = 1e-3  # of figures that say the same in two units, where somebody has rounded them
_SCORES_FILE = "scores.json"
_ADVICE = "delete it, or name other files"
#: figures without which there is no row
NEEDED = (
    "sequences", "tokens", "bytes", "elbo_nll_per_token", "iw_nll_per_token", "elbo_bits_per_byte", "iw_bits_per_byte",
)  # fmt: skip
OPTIONAL = (
    "parameters", "trained_parameters", "training_tokens", "training_flops", "training_seconds", "iw_samples",
    "seconds", "kl_per_sequence", "active_units", "latent_units", "distinct_2", "diversity_self_bleu",
)  # fmt: skip
#: of the tasks that write texts, as (task, figure)
WRITTEN = tuple(
    (task, figure)
    for task in ("completions", "samples")
    for figure in ("mauve", "generative_perplexity", "generative_bits_per_byte", "distinct_2", "self_bleu")
)
#: beside them where the generative ones are of a scorer with latents, and so bounds
GENERATIVE_BOUND = "generative_bound"
# on which those figures depend, beside the model
_WAYS = ("data", "scorer", "features", "prompts", "prompt_tokens", "new_tokens", "each", "number", "length")
# of a model's folder, which are no figures and may be large
_OTHERS = ("config.json", "history.json", "order.json", "trainer_state.json", "vocab.json", "added_tokens.json")
_OTHER_KINDS = ("tokenizer", "generation_config", "special_tokens", "adapter_config", ".index.json")


@dataclass(frozen=True)
class Scored:
    """One model, scored once on one text.

    Args:
        source: the file.
        name: of its row.
        model: where the model is, as `evaluate` was told; None of a sweep's JSON.
        family: name of its class, or what is known of it.
        data: what was scored, where it was named.
        exact: whether its NLL is the likelihood itself.
        conditional: whether it is that of p(x | c).
        seed: of the training where that is known, else of the noise.
        trained: tells one trained model from another among scorings that are `alike`.
        seed_is_of_training: whether rows of different seeds are different trained models.
        alike: what scorings that differ in nothing but the seed share.
        settings: by which names are told apart.
        figures: of `NEEDED` and `OPTIONAL`, and "TASK FIGURE" of `WRITTEN` and `GENERATIVE_BOUND`.
    """

    source: str
    name: str
    model: str | None
    family: str
    data: str | None
    exact: bool
    conditional: bool
    seed: int | None
    trained: Hashable
    seed_is_of_training: bool
    alike: str
    settings: Mapping[str, Any]
    figures: Mapping[str, float | int]

    @property
    def measured(self) -> Hashable:
        """Equal where the same model was scored in the same way, be it once or again."""
        same = (*NEEDED, "iw_samples", "parameters", "training_tokens", "kl_per_sequence")
        return self.seed, self.exact, self.conditional, tuple(repr(self.figures.get(key)) for key in same)

    @property
    def written(self) -> Hashable:
        """Equal for copies of the same figures in several files: what took as long to the last digit is one scoring."""
        return self.measured, self.figures.get("seconds", self.alike)


@dataclass
class Found:
    """What files hold.

    Args:
        scored: likelihoods, each once.
        unplaced: files of other tasks that no row has a column or a model for → why.
        remarks: on figures of written texts that do not compare.
    """

    scored: list[Scored] = field(default_factory=list)
    unplaced: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def read_runs(paths: Sequence[str | Path]) -> Found:
    """Reads files, and everything in folders that is an evaluation.

    Raises:
        InputError: a file that is missing, damaged or no evaluation; a folder without any figure; no likelihood at all.
    """
    scored: list[Scored] = []
    others: dict[str, Mapping[str, Any]] = {}
    taken: dict[str, bool] = {}  # of each file that was read, whether it is an evaluation

    def take(file: Path) -> bool:
        place = os.path.realpath(file)
        if place not in taken:
            taken[place] = _take(file, scored, others)
        return taken[place]

    for path in map(Path, paths):
        if path.is_dir():
            if not any([take(file) for file in _files_of(path)]):
                raise InputError(
                    f"{path} holds no figures: write some into it with latentlm evaluate MODEL --json FILE."
                )
        elif not take(path):
            raise InputError(f"{path} is no evaluation (--json of latentlm evaluate or sweep): {_ADVICE}.")
    found = Found(_once(scored))
    if not found.scored:
        raise InputError(
            "there is no likelihood among these figures, which rows are ranked by: add what latentlm evaluate MODEL "
            "--json FILE writes."
        )
    for source, document in others.items():
        found.unplaced |= _join(source, document, found.scored)
    for task in dict(WRITTEN):
        joined = [one for source, one in others.items() if one["task"] == task and source not in found.unplaced]
        if differing := [key for key in _WAYS if len({repr(one.get(key)) for one in joined}) > 1]:
            found.remarks.append(
                f"{task}: not all were measured alike ({', '.join(differing)}), and those figures do not compare."
            )
    return found


def _files_of(folder: Path) -> Iterator[Path]:
    """Every file below a folder that may hold figures, in the order of the names; checkpoints are left out."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if os.path.realpath(place) in seen:  # a link to a folder above would have no end
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "checkpoint-")))
        for name in sorted(names):
            skipped = name in _OTHERS or any(kind in name for kind in _OTHER_KINDS) or name.startswith(".")
            if name.endswith(".json") and not skipped:
                yield Path(place) / name


def _raise(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {reason_of(error)}.") from error


def _take(file: Path, scored: list[Scored], others: dict[str, Mapping[str, Any]]) -> bool:
    """Whether the file holds evaluations, which then stand in `scored` or `others`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {reason_of(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged, and no JSON: {_ADVICE}.") from error
    source = str(file)
    if file.name == _SCORES_FILE:
        if not isinstance(content, dict) or not all(map(_is_likelihood, content.values())):
            raise InputError(f"{file} is no scores of a sweep's run: {_ADVICE}.")
        for key, figures in content.items():
            scored.append(_of_run_folder(file, key, figures))
        return bool(content)
    if isinstance(content, list):
        if not content or not all(_is_likelihood(row) and "run" in row for row in content):
            return False
        scored += [_of_sweep(source, row) for row in content]
    elif _is_likelihood(content):
        scored.append(_of_evaluate(source, content, file.stem))
    elif not isinstance(content, dict) or content.get("task") == TASK:
        return False
    elif isinstance(sets := content.get("sets"), dict) and sets:  # zero-shot: each set is a text of its own
        told = {key: content[key] for key in ("model", "family", "seed", "settings") if key in content}
        likelihoods = {name: _honest(figures) for name, figures in sets.items()}
        if not all(map(_is_likelihood, likelihoods.values())):
            return False
        for name, figures in likelihoods.items():
            scored.append(_of_evaluate(source, {**figures, **told, "data": str(name)}, file.stem))
    elif isinstance(content.get("task"), str) and isinstance(content.get("model"), str):
        others[source] = content
    elif content and all(map(_is_likelihood, content.values())):  # of quickstart, or of several models
        scored += [_of_evaluate(source, {"model": str(file.parent / n), **one}, n) for n, one in content.items()]
    else:
        return False
    return True


def _is_likelihood(content: Any) -> bool:
    return isinstance(content, dict) and {"exact", "elbo_nll_per_token", "iw_nll_per_token"} <= content.keys()


def _honest(figures: Any) -> Any:
    return figures.get("honest", figures) if isinstance(figures, dict) else figures


# ---- one scoring -----------------------------------------------------------------------------------------------------


def _of_sweep(source: str, row: Mapping[str, Any]) -> Scored:
    settings = row.get("settings")
    settings = dict(settings) if isinstance(settings, dict) else {}
    seed = _seed(source, row)
    name = ": ".join(str(row[key]) for key in ("run", "evaluation") if row.get(key))
    without = {key: value for key, value in settings.items() if key != "training.seed"}
    # without settings a run's name within its study says all there is to say
    alike = without or {key: row.get(key) for key in ("study", "run", "evaluation")}
    return _scored(source, row, name, None, settings, seed, alike, training=True)


def _of_run_folder(file: Path, key: str, figures: Mapping[str, Any]) -> Scored:
    """Of scores.json, whose key is [inference, scoring], beside the recipe."""
    try:
        inference, scoring = map(dict, json.loads(key))
    except (ValueError, TypeError, RecursionError):
        inference, scoring = {}, {"scoring": key}
    settings = _recipe_beside(file.parent)
    name = ", ".join([_run_name(file.parent.name), *(f"{key}={value}" for key, value in inference.items())])
    known = bool(settings)
    seed = _as_seed(settings.get("training.seed", 0)) if known else None
    settings |= inference | scoring
    without = {key: value for key, value in settings.items() if key != "training.seed"}
    alike = without if known else {**without, "folder": str(file.parent)}
    return _scored(str(file), figures, name, str(file.parent), settings, seed, alike, training=known)


def _of_evaluate(source: str, figures: Mapping[str, Any], stem: str) -> Scored:
    model = figures.get("model")
    if not (model is None or isinstance(model, str)):
        raise InputError(f"{source}: model must be a name, not {shown(model)}: {_ADVICE}.")
    changed = figures.get("settings") or []
    if not isinstance(changed, list) or not all(isinstance(one, str) for one in changed):
        raise InputError(f"{source}: settings must be a list of FIELD=VALUE, not {shown(changed)}: {_ADVICE}.")
    recipe = _recipe_beside(Path(model)) if model else {}
    name = ", ".join([os.path.basename(os.path.normpath(model)) if model else stem, *changed])
    settings = recipe | dict(one.partition("=")[::2] for one in changed)
    settings |= {key: figures[key] for key in ("iw_samples", "protocol") if key in figures}
    without = {key: value for key, value in settings.items() if key != "training.seed"}
    unknown = {"model": model or stem} | {key: figures.get(key) for key in ("parameters", "training_tokens")}
    alike = without if recipe else {**without, **unknown}
    seed = _as_seed(recipe.get("training.seed", 0)) if recipe else _seed(source, figures)
    return _scored(source, figures, name, model, settings, seed, alike, training=bool(recipe))


def _scored(
    source: str,
    told: Mapping[str, Any],
    name: str,
    model: str | None,
    settings: Mapping[str, Any],
    seed: int | None,
    alike: Mapping[str, Any],
    *,
    training: bool,
) -> Scored:
    figures = {key: _number(source, told, key) for key in NEEDED}
    figures |= {key: _number(source, told, key) for key in OPTIONAL if told.get(key) is not None}
    exact, conditional = (_truth(source, told, key) for key in ("exact", "conditional"))
    for key in ("sequences", "tokens", "bytes"):
        if not isinstance(figures[key], int) or figures[key] < 1:
            raise InputError(f"{source}: {key} must be a whole number above 0, not {shown(figures[key])}: {_ADVICE}.")
    for bound in ("elbo", "iw"):
        bits, nll = figures[f"{bound}_bits_per_byte"], figures[f"{bound}_nll_per_token"]
        if not (math.isfinite(bits) and math.isfinite(nll)):
            continue  # of a diverged model; it has no rank
        same = nll * figures["tokens"] / math.log(2) / figures["bytes"]
        if bits < 0 or not math.isclose(bits, same, rel_tol=_APART):
            raise InputError(
                f"{source}: {bound}_bits_per_byte is {bits:g}, and its nats per token make {same:g}: {_ADVICE}."
            )
    data = told.get("data")
    if not (data is None or isinstance(data, str)):
        raise InputError(f"{source}: data must be a name, not {shown(data)}: {_ADVICE}.")
    # the noise of a scoring changes neither how long a training took nor what an exact model gives, but for rounding
    nll_of_exact = round(figures["iw_nll_per_token"], _ROUNDED) if exact else None
    trained = (seed if training else None, figures.get("training_seconds"), nll_of_exact)
    return Scored(
        source=source,
        name=_printable(name),
        model=None if model is None else os.path.normpath(model),
        family=_family(told, settings, model, exact),
        data=None if data is None else _printable(data),
        exact=exact,
        conditional=conditional,
        seed=seed,
        trained=trained,
        seed_is_of_training=training,
        alike=json.dumps(alike, sort_keys=True, default=str),
        settings=settings,
        figures=figures,
    )


def _number(source: str, told: Mapping[str, Any], key: str) -> float | int:
    if key not in told:
        raise InputError(f"{source} lacks {key}, so it is no whole evaluation: {_ADVICE}.")
    value = told[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{source}: {key} must be a number, not {shown(value)}: {_ADVICE}.")
    try:
        float(value)
    except OverflowError:
        return math.inf
    return value


def _truth(source: str, told: Mapping[str, Any], key: str) -> bool:
    value = told.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"{source}: {key} must be true or false, not {shown(value)}: {_ADVICE}.")
    return value


def _as_seed(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _seed(source: str, told: Mapping[str, Any]) -> int | None:
    value = told.get("seed")
    if value is not None and _as_seed(value) is None:
        raise InputError(f"{source}: seed must be a whole number, not {shown(value)}: {_ADVICE}.")
    return value


def _family(told: Mapping[str, Any], settings: Mapping[str, Any], model: str | None, exact: bool) -> str:
    """Of the figures, else of the recipe, else of the config beside them; else what `exact` says of it."""
    from latentlm.families import FAMILIES

    if isinstance(told.get("family"), str):
        return _printable(told["family"])
    if isinstance(name := settings.get("model.family"), str) and name in FAMILIES:
        return FAMILIES[name].__name__
    try:
        kind = json.loads((Path(model or "") / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        kind = None
    of_kind = {family.config_class.model_type: family.__name__ for family in FAMILIES.values()}
    return of_kind.get(str(kind), "without latents" if exact else "with latents")


def _recipe_beside(folder: Path) -> dict[str, Any]:
    """`section.key` → value of the recipe in a model's folder; empty where none can be read."""
    try:
        content = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        return {f"{section}.{key}": value for section, part in content.items() for key, value in (part or {}).items()}
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        return {}


def _run_name(folder: str) -> str:
    """A sweep calls a run's folder RECIPE_key=value_…_seed=0_DIGEST: the name of all its seeds."""
    return re.sub(r"_seed=\d*(?=_|$)", "", re.sub(r"_[0-9a-f]{10}$", "", folder)) or folder


def _printable(text: str) -> str:
    """On one line, without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip() or "?"


# ---- several files ---------------------------------------------------------------------------------------------------


def _once(scored: Sequence[Scored]) -> list[Scored]:
    """Each scoring once, under its sweep's name where it has one; what other files know of it is not lost."""
    kept: dict[Hashable, Scored] = {one.written: one for one in reversed(scored)}
    kept |= {one.written: one for one in reversed(scored) if one.model is None}
    for one in scored:
        first = kept[one.written]
        kept[one.written] = replace(
            first,
            model=first.model or one.model,
            data=first.data or one.data,
            figures={**one.figures, **first.figures},
        )
    return list({one.written: kept[one.written] for one in scored}.values())


def _join(source: str, document: Mapping[str, Any], scored: list[Scored]) -> dict[str, str]:
    """Puts what a task measured of a model's texts beside its likelihoods; the file and why where nothing is."""
    task, model = document["task"], os.path.normpath(document["model"])
    rows = _sampled(document)
    measured: dict[str, float | int] = {
        f"{task} {figure}": _number(source, rows, figure)
        for of_task, figure in WRITTEN
        if of_task == task and rows.get(figure) is not None
    }
    if rows.get("generative_exact") is False:
        measured[f"{task} {GENERATIVE_BOUND}"] = 1
    if not measured:
        return {source: f"no column is of {_printable(task)} as it is there"}
    places = [place for place, one in enumerate(scored) if one.model == model]
    for place in places:
        scored[place] = replace(scored[place], figures={**measured, **scored[place].figures})
    return {} if places else {source: f"there is no likelihood of its model {_printable(document['model'])}"}


def _sampled(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of texts that were sampled, which is the model's own law, where there are greedy ones beside them."""
    for part in (document.get("rows"), document):
        if isinstance(part, dict) and isinstance(sampled := part.get("sampled"), dict):
            return sampled
    return document
