"""Recipes: one YAML file says what is trained, on what, and how. A wrong key or value is named with its line.

model:       family: ltm | gpt_vae | autoregressive, and the fields of that family's config (but vocab_size, which
             comes from the tokenizer)
data:        the fields of `DataRecipe`
training:    the fields of transformers' TrainingArguments
encoder:     the fields of `EncoderRecipe`
evaluation:  the fields of `EvaluationRecipe`
"""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import get_annotations
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import strict
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils.logging import get_log_levels_dict

from latentlm.config import LatentLMConfig
from latentlm.data.recipe import DataRecipe
from latentlm.data.tokenizers import SMALLEST_VOCABULARY
from latentlm.errors import InputError, one_sentence, shown
from latentlm.families import FAMILIES, LangVAE
from latentlm.latent_lm import LatentLM
from latentlm.parallel_lm import ParallelLatentLM
from latentlm.training.encoder import EncoderRecipe
from latentlm.training.feasibility import check_memory, check_optimisation

# what latentlm sets itself, from the command line or because its datasets and loss need it
_OURS = {
    "output_dir", "resume_from_checkpoint", "remove_unused_columns", "label_names", "disable_tqdm",
    "logging_nan_inf_filter",
}  # fmt: skip
# what no family here follows yet
_WITHOUT_EFFECT = {"label_smoothing_factor", "push_to_hub"}
# counts by which transformers would divide, or with which a run fails in its middle
_AT_LEAST_ONE = {"max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"}
# more is a slip of the hand, and overflows in the middle of a run
_LARGEST_COUNT, _LARGEST_NUMBER, _WORKERS_PER_CORE = 2**31 - 1, 1e30, 4
#: what in-training evaluation reports; the whole set of figures is `latentlm evaluate`
EVALUATION_FIGURES = (
    "elbo_nll_per_token",
    "iw_nll_per_token",
    "reconstruction_nll_per_token",
    "prior_nll_per_token",
    "kl_per_sequence",
    "active_units",
)
#: the paper's schedule (Kong et al. 2025, appendix A.2); every one can be set in a recipe
TRAINING_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "learning_rate": 4e-4,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 0.05,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "report_to": "tensorboard",
    "seed": 0,
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": False,  # every parameter of a family here has a gradient at every step
}


@strict
@dataclass(kw_only=True)
class EvaluationRecipe:
    """What is measured on the validation data while training.

    Args:
        sequences: how many of them; None for all.
        iw_samples: K of the importance-weighted bound.
    """

    sequences: int | None = 64
    iw_samples: int = 4
    batch_size: int = 32

    def validate_values(self) -> None:
        """Part of the validation of `@strict`."""
        for name in ("sequences", "iw_samples", "batch_size"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= _LARGEST_COUNT:
                raise ValueError(f"{name} must be at least 1 and at most {_LARGEST_COUNT}")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `document` is what it was read from, with overrides applied, to be saved beside the model."""

    family: type[LatentLM]
    model: Mapping[str, Any]
    data: DataRecipe
    training: Mapping[str, Any]
    evaluation: EvaluationRecipe
    encoder: EncoderRecipe
    document: Mapping[str, Any] = field(repr=False)

    def model_config(self, **from_tokenizer: Any) -> LatentLMConfig:
        """The family's config for this recipe and the tokenizer's vocabulary."""
        defaults: dict[str, Any] = {}
        if "max_position_embeddings" in {f.name for f in dataclasses.fields(self.family.config_class)}:
            defaults["max_position_embeddings"] = self.data.length
        if issubclass(self.family, ParallelLatentLM) and self.data.unit == "sentences":
            defaults["length_model"] = "categorical"
        return self.family.config_class(**{**defaults, **self.model, **from_tokenizer})

    @property
    def takes_labels(self) -> bool:
        """Whether the model is given the labels of annotated texts; another one reads the texts without them."""
        return issubclass(self.family, LangVAE) and self.model.get("annotation_size") != 0

    def training_arguments(self, output_dir: Path) -> TrainingArguments:
        given = {**TRAINING_DEFAULTS, **self.training}
        for name in ("adam_beta1", "adam_beta2"):
            given[name] = float(given[name])  # torch wants both of one type, and YAML reads 0 as another
        if "lr_scheduler_type" in self.training and "lr_scheduler_kwargs" not in self.training:
            del given["lr_scheduler_kwargs"]  # they belong to the default schedule
        if (
            given.get("load_best_model_at_end")
            or given.get("metric_for_best_model")
            or given["save_strategy"] == "best"
        ):
            # transformers takes a larger figure for a better one unless its name ends in loss
            given = {"metric_for_best_model": "elbo_nll_per_token", "greater_is_better": False, **given}
        try:
            return TrainingArguments(
                **given,
                output_dir=str(output_dir),
                remove_unused_columns=False,
                disable_tqdm=True,
                logging_nan_inf_filter=False,  # it hides what the trainer stops at
                label_names=["labels"],
            )
        except ValueError as error:
            if "use_cpu" in str(error):  # transformers names neither the key nor the way out
                half = "bf16" if given.get("bf16") else "fp16"
                raise ValueError(
                    f"training.{half} needs a GPU, and none is here: leave it out, or add training.use_cpu: true"
                ) from error
            raise


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads 4e-4 as a string and no as false; people who train models mean a number and a word."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            # PyYAML raises what it stumbles over: a month 13, !!int without digits, !!timestamp of a word
            kind = str(node.tag).rpartition(":")[2]
            problem = f"{shown(node.value)} is no {kind}, put it in quotes if it is a word"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not (tag.endswith(":bool") and first not in "tTfF")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; `overrides` are `section.key=value` with the value in YAML.

    Raises:
        InputError: naming the file and, where there is one, the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {unreadable(error)}.") from error
    return parse_recipe(text, str(path), overrides)


def unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Why a YAML file could not be read, and what to do."""
    return (
        f"{error.strerror}: check its path and permissions"
        if isinstance(error, OSError)
        else "it is not UTF-8 text: convert it"
    )


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """As `load_recipe`, from the recipe's text; `name` is what errors call it."""
    node, document = read_yaml(text, name)
    if not isinstance(document, dict):
        raise InputError(f"{name}: a recipe is a mapping with the keys model, data and training.")
    places = _places(node, name)
    for override in overrides:
        _apply(document, override, places)
    return _check(document, places, name)


def read_yaml(text: str, name: str) -> tuple[Any, Any]:
    """The nodes, which know their lines, and the values of a YAML text; `name` is what an error calls it."""
    try:
        return yaml.compose(text, Loader), yaml.load(text, Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{name}, line {line}: not valid YAML: a character that it does not allow.") from error
    except RecursionError as error:
        raise InputError(f"{name}: not valid YAML: it is nested without end.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise InputError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}.") from error


def parse_value(text: str, where: str) -> Any:
    """The value of a `key=value` of the command line, read as a recipe reads it; `where` is what an error calls it."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{where}: the value is not valid YAML.") from error


def _places(node: yaml.Node, name: str) -> dict[tuple[str, ...], str]:
    """Where each key stands: ("model",) and ("model", "hidden_size") → "file, line n"."""
    places: dict[tuple[str, ...], str] = {}

    def note(key: yaml.Node, *section: str) -> tuple[str, ...]:
        where, path = f"{name}, line {key.start_mark.line + 1}", (*section, str(key.value))
        if key.tag != "tag:yaml.org,2002:str":
            raise InputError(f"{where}: unknown key {shown(key.value)}.")
        if path in places:
            raise InputError(f"{where}: {'.'.join(path)} is given twice.")
        places[path] = where
        return path

    for key, value in getattr(node, "value", []):
        section = note(key)
        if isinstance(value, yaml.MappingNode):
            for inner, _ in value.value:
                note(inner, *section)
    return places


def _apply(document: dict[str, Any], override: str, places: dict[tuple[str, ...], str]) -> None:
    where = f"override {shown(override)}"
    path, separator, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not separator or not dot or not key:
        raise InputError(f"{where} is not of the form section.key=value, as in training.max_steps=100.")
    value = parse_value(text, where)
    if not isinstance(document.setdefault(section, {}), dict):
        raise InputError(f"{places[(section,)]}: {section} must be a mapping of keys to values.")
    document[section][key] = value
    places[(section, key)] = where
    places.setdefault((section,), where)


def _check(document: dict[str, Any], places: dict[tuple[str, ...], str], name: str) -> Recipe:
    sections = ("model", "data", "training", "encoder", "evaluation")
    for section, content in document.items():
        if section not in sections:
            raise InputError(f"{places[(section,)]}: unknown key {shown(section)}{_hint(section, sections)}.")
        if not isinstance(content, dict):
            raise InputError(f"{places[(section,)]}: {section} must be a mapping of keys to values.")
    for section in sections[:3]:
        if section not in document:
            raise InputError(f"{name}: the section {section!r} is missing.")
    model = dict(document["model"])
    family = FAMILIES.get(str(model.pop("family", None)))
    if family is None:
        where = places.get(("model", "family"), places[("model",)])
        raise InputError(f"{where}: model.family must be one of {', '.join(FAMILIES)}.")
    data = _section(DataRecipe, "data", document["data"], places)
    evaluation = _section(EvaluationRecipe, "evaluation", document.get("evaluation") or {}, places)
    encoder = _section(EncoderRecipe, "encoder", document.get("encoder") or {}, places)
    if family.tokenizer_of is not None and isinstance(named := model.get(family.tokenizer_of), str):
        if data.tokenizer not in (None, named):
            where = places[("data", "tokenizer")]
            raise InputError(f"{where}: data.tokenizer must be that of model.{family.tokenizer_of}: leave it out.")
        data = dataclasses.replace(data, tokenizer=named)
    # without those of every model of transformers, which say nothing here
    own = [kind for kind in family.config_class.__mro__ if issubclass(kind, LatentLMConfig)]
    of_tokenizer = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "annotation_labels"}
    config_fields = {name for kind in own for name in get_annotations(kind)} - of_tokenizer
    for key in model:
        if key not in config_fields:
            owner = "comes from the data" if key in of_tokenizer else "is no field of the family"
            raise InputError(f"{places[('model', key)]}: model.{key} {owner}{_hint(key, config_fields)}.")
    _check_training(document["training"], places)
    if data.streaming and document["training"].get("max_steps", -1) < 1:
        raise InputError(f"{places[('training',)]}: streamed text has no known length: give training.max_steps.")
    recipe = Recipe(family, model, data, dict(document["training"]), evaluation, encoder, document)
    with _located("training", recipe.training, places):
        arguments = recipe.training_arguments(Path("unused"))
        get_reporting_integration_callbacks(arguments.report_to)
        check_optimisation(arguments)
    with _located("model", model, places):
        config = recipe.model_config(vocab_size=SMALLEST_VOCABULARY)
        if getattr(config, "max_position_embeddings", data.length) < data.length:
            raise ValueError(f"max_position_embeddings must be at least data.length, {data.length}")
        if getattr(config, "length_model", "none") != "none" and data.unit == "blocks":
            raise ValueError("length_model is for texts that end, and blocks go on after EOS: set it to none")
    if getattr(config, "encoder_batch_norm", None) is not None and not config.has_encoder:
        raise InputError(
            f"{places[('model', 'encoder_batch_norm')]}: model.encoder_batch_norm needs an encoder, "
            f"and inference {config.inference} has none."
        )
    if encoder.embeddings is not None and (not issubclass(family, LangVAE) or data.streaming or not config.has_encoder):
        raise InputError(
            f"{places[('encoder', 'embeddings')]}: encoder.embeddings is for a lang_vae with an encoder, and no stream."
        )
    if encoder.asks_for_something:
        with _located("encoder", document["encoder"], places):
            _check_encoder(encoder, config, data, arguments)
    try:
        check_memory(recipe.family, config)
    except InputError as error:
        raise InputError(f"{places[('model',)]}: {str(error).rstrip('.')}.") from error
    return recipe


def _check_encoder(
    encoder: EncoderRecipe, config: LatentLMConfig, data: DataRecipe, arguments: TrainingArguments
) -> None:
    if not getattr(config, "has_encoder", False):
        raise ValueError("this model has no encoder to train: set model.inference to amortised or cooperative")
    if encoder.aggressive_steps and data.streaming:
        raise ValueError("aggressive_steps draws texts at random, which a stream cannot: set it to 0")
    if encoder.aggressive_steps and arguments.fp16:
        raise ValueError("aggressive_steps does not go with training.fp16: take bf16")
    if 0 < arguments.max_steps <= encoder.pretraining_steps:
        raise ValueError(f"pretraining_steps must be less than training.max_steps, {arguments.max_steps}")


def _section(kind: Any, section: str, content: Mapping[str, Any], places: Mapping[tuple[str, ...], str]) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    for key in content:
        if key not in known:
            raise InputError(f"{places[(section, key)]}: unknown key {section}.{key}{_hint(key, known)}.")
    for f in dataclasses.fields(kind):
        if f.default is dataclasses.MISSING and f.name not in content:
            raise InputError(f"{places[(section,)]}: {section}.{f.name} is missing.")
    with _located(section, content, places):
        return kind(**content)


def _check_training(training: Mapping[str, Any], places: Mapping[tuple[str, ...], str]) -> None:
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    kinds = get_type_hints(TrainingArguments)
    for key, value in training.items():
        where = places[("training", key)]
        if key in _OURS:
            raise InputError(f"{where}: training.{key} is set by latentlm itself: leave it out.")
        if key not in known:
            raise InputError(f"{where}: unknown key training.{key}{_hint(key, known)}.")
        if key in _WITHOUT_EFFECT and value:
            raise InputError(f"{where}: training.{key} is not supported yet: leave it out.")
        if not _fits(value, kinds[key]):
            raise InputError(f"{where}: training.{key} must be {_named(kinds[key])}, not {shown(value)}.")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        unlimited = key == "max_steps" and value == -1
        if number and not (0 <= value < math.inf or unlimited):
            raise InputError(f"{where}: training.{key} must not be negative or NaN or infinite, but is {shown(value)}.")
        if key in _AT_LEAST_ONE and not (value >= 1 or unlimited):
            raise InputError(f"{where}: training.{key} must be at least 1, not {value}.")
        if key in ("adam_beta1", "adam_beta2") and value >= 1:
            raise InputError(f"{where}: training.{key} must be below 1, not {shown(value)}.")
        if key == "metric_for_best_model" and value and value.removeprefix("eval_") not in EVALUATION_FIGURES:
            raise InputError(f"{where}: training.{key} must be one of {', '.join(EVALUATION_FIGURES)}.")
        if "seed" in key and number and value >= 2**32:
            raise InputError(f"{where}: training.{key} must be less than 2**32, not {shown(value)}.")
        if key == "dataloader_num_workers" and value > _WORKERS_PER_CORE * (os.cpu_count() or 1):
            raise InputError(f"{where}: training.{key} is {value}, which is too many for {os.cpu_count()} cores.")
        if key in ("log_level", "log_level_replica") and value not in (*get_log_levels_dict(), "passive"):
            levels = ", ".join([*get_log_levels_dict(), "passive"])
            raise InputError(f"{where}: training.{key} must be one of {levels}, not {shown(value)}.")
        if key == "optim_args" and value and not all(part.count("=") == 1 for part in value.split(",")):
            raise InputError(f"{where}: training.{key} must be of the form name=value,name=value, not {shown(value)}.")
        if number and value > (_LARGEST_COUNT if isinstance(value, int) else _LARGEST_NUMBER):
            raise InputError(f"{where}: training.{key} is {shown(value)}, which cannot be meant: give less.")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of YAML is of an annotated type; of an enumeration the constructor knows the words."""
    options = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)
    types = {get_origin(option) or option for option in options}
    if isinstance(value, bool):
        return bool in types
    if isinstance(value, list):
        return list in types and all(isinstance(one, str) for one in value)
    return isinstance(value, tuple(kind for kind in types if isinstance(kind, type))) or (
        isinstance(value, int) and float in types
    )


def _named(kind: Any) -> str:
    options = get_args(kind) or (kind,)
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
        dict: "a mapping",
        type(None): "null",
    }
    return " or ".join(words[option] for option in words if option in {get_origin(one) or one for one in options})


class _located:
    """Turns what a constructor raises into one sentence that names the line of the key it complains of."""

    def __init__(self, section: str, content: Mapping[str, Any], places: Mapping[tuple[str, ...], str]):
        self.section, self.content, self.places = section, content, places

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            sentence = one_sentence(error)
            named = [key for key in self.content if re.search(rf"\b{re.escape(key)}\b", str(error))]
            words = {key: value for key, value in self.content.items() if isinstance(value, str)}
            by_value = [key for key, value in words.items() if re.search(rf"\b{re.escape(value)}\b", str(error))]
            if not named and by_value:
                sentence = f"{self.section}.{by_value[0]}: {sentence}"
            where = self.places.get((self.section, (named + by_value)[0])) if named + by_value else None
            raise InputError(f"{where or self.places[(self.section,)]}: {sentence}") from error


def _hint(key: str, known: Any) -> str:
    close = difflib.get_close_matches(str(key), [str(k) for k in known], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
