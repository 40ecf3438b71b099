"""Recipes: what is read, and that every mistake is named with its file and line in one sentence."""

import re
from pathlib import Path

import pytest
import torch
from tests.training.runs import RECIPES, unchecked
from transformers.optimization import get_scheduler

from latentlm import LTM, Autoregressive, InputError
from latentlm.training.recipe import load_recipe, parse_recipe

RECIPE = RECIPES["ltm"]


def complaint(text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        parse_recipe(text, "small.yaml", overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- what is read ------------------------------------------------------------------------------------------------


def test_a_recipe_gives_model_data_training_and_evaluation():
    recipe = parse_recipe(RECIPE, "small.yaml")
    assert recipe.family is LTM
    assert parse_recipe(RECIPES["autoregressive"], "small.yaml").family is Autoregressive
    config = recipe.model_config(vocab_size=300)
    assert (config.hidden_size, config.latents_per_layer, config.vocab_size) == (16, 2, 300)
    assert (recipe.data.source, recipe.data.unit, recipe.data.limit) == ("builtin:sentences", "sentences", 200)
    assert (recipe.evaluation.sequences, recipe.evaluation.iw_samples) == (8, 2)
    arguments = recipe.training_arguments(Path("somewhere"))
    assert (arguments.max_steps, arguments.output_dir) == (3, "somewhere")


def test_the_context_is_the_length_of_the_data_unless_said_otherwise():
    assert parse_recipe(RECIPE, "small.yaml").model_config(vocab_size=300).max_position_embeddings == 48
    longer = parse_recipe(RECIPE, "small.yaml", ["model.max_position_embeddings=64"])
    assert longer.model_config(vocab_size=300).max_position_embeddings == 64


def test_evaluation_may_be_left_out():
    text = RECIPE.partition("evaluation:")[0]
    assert parse_recipe(text, "small.yaml").evaluation.iw_samples == 4


@pytest.mark.parametrize("number", ["4e-4", "4E-4", "4.0e-4", "0.0004", "+4e-4"])
def test_numbers_with_an_exponent_are_numbers(number):
    recipe = parse_recipe(RECIPE.replace("1e-2", number), "small.yaml")
    assert recipe.training_arguments(Path("x")).learning_rate == 4e-4


@pytest.mark.parametrize("word", ["no", '"no"'])
def test_no_is_a_word(word):
    recipe = parse_recipe(RECIPE, "small.yaml", [f"training.save_strategy={word}"])
    assert recipe.training_arguments(Path("x")).save_strategy == "no"


def test_overrides_win_and_are_part_of_the_document():
    overrides = ["training.max_steps=7", "model.hidden_size=32", "data.limit=null", "evaluation.sequences=null"]
    recipe = parse_recipe(RECIPE, "small.yaml", overrides)
    assert recipe.training["max_steps"] == 7
    assert recipe.model["hidden_size"] == 32
    assert recipe.data.limit is None
    assert recipe.evaluation.sequences is None
    assert recipe.document["training"]["max_steps"] == 7
    assert (
        parse_recipe(RECIPE, "small.yaml", ["training.max_steps=7", "training.max_steps=9"]).training["max_steps"] == 9
    )


def test_an_override_may_add_a_section():
    text = RECIPE.partition("evaluation:")[0]
    assert parse_recipe(text, "small.yaml", ["evaluation.iw_samples=3"]).evaluation.iw_samples == 3


# ---- mistakes in the file ----------------------------------------------------------------------------------------

# a line of the recipe, what it becomes, and words that the complaint must hold
MISTAKES = [
    # unknown keys, with what was probably meant
    ("training:", "traning:", "traning", "training"),
    ("  hidden_size: 16", "  hiden_size: 16", "hiden_size", "hidden_size"),
    ("  limit: 200", "  limmit: 200", "limmit", "limit"),
    ("  max_steps: 3", "  max_step: 3", "max_step", "max_steps"),
    ("  iw_samples: 2", "  iw_sample: 2", "iw_sample", "iw_samples"),
    # keys that are not the recipe's to set
    ("  hidden_size: 16", "  vocab_size: 300", "vocab_size", "comes from the data"),
    ("  max_steps: 3", "  output_dir: runs", "output_dir", "leave it out"),
    ("  max_steps: 3", "  remove_unused_columns: true", "remove_unused_columns", "leave it out"),
    ("  max_steps: 3", "  resume_from_checkpoint: x", "resume_from_checkpoint", "leave it out"),
    ("  max_steps: 3", "  disable_tqdm: true", "disable_tqdm", "leave it out"),
    # wrong types
    ("  hidden_size: 16", "  hidden_size: wide", "hidden_size", "a whole number"),
    ("  hidden_size: 16", "  hidden_size: 16.5", "hidden_size", "a whole number"),
    ("  length: 48", '  length: "48"', "length", "a whole number"),
    ("  length: 48", "  length: 4.5", "length", "a whole number"),
    ("  source: builtin:sentences", "  source: null", "source", "a word"),
    ("  unit: sentences", "  unit: words", "unit", "blocks"),
    ("  learning_rate: 1e-2", "  learning_rate: fast", "learning_rate", "number"),
    ("  max_steps: 3", "  max_steps: [3]", "max_steps", "number"),
    ("  use_cpu: true", "  use_cpu: 3", "use_cpu", "true or false"),
    ("  sequences: 8", "  sequences: many", "sequences", "whole number"),
    ("  max_steps: 3", "  max_steps: 3\n  metric_for_best_model: bleu", "metric_for_best_model", "iw_nll_per_token"),
    ("  iw_samples: 2", "  iw_samples: 2.5", "iw_samples", "a whole number"),
    ("  max_steps: 3", "  max_steps: 2.5", "max_steps"),
    ("  max_steps: 3", "  bf16: maybe", "bf16", "true or false"),
    ("  per_device_train_batch_size: 8", "  per_device_train_batch_size: 2.5", "per_device_train_batch_size"),
    # impossible values
    ("  hidden_size: 16", "  hidden_size: -16", "hidden_size", "at least 1"),
    ("  latents_per_layer: 2", "  latents_per_layer: 0", "latents_per_layer", "at least 1"),
    ("  sliding_window: 4", "  sliding_window: 0", "sliding_window", "at least 1"),
    ("  hidden_size: 16", "  beta: -1", "beta", "from 0"),
    ("  hidden_size: 16", "  beta_warmup: 2", "beta_warmup", "between 0 and 1"),
    ("  length: 48", "  length: 0", "length", "at least 1"),
    ("  limit: 200", "  limit: -1", "limit", "at least 1"),
    ("  limit: 200", "  validation_fraction: 1.5", "validation_fraction", "between 0 and 1"),
    ("  learning_rate: 1e-2", "  learning_rate: .nan", "learning_rate", "NaN"),
    ("  learning_rate: 1e-2", "  learning_rate: -1e-2", "learning_rate", "negative"),
    ("  logging_steps: 1", "  logging_steps: -1", "logging_steps", "negative"),
    ("  max_steps: 3", "  max_steps: -2", "max_steps", "negative"),
    ("  sequences: 8", "  sequences: 0", "sequences", "at least 1"),
    ("  iw_samples: 2", "  iw_samples: -2", "iw_samples", "at least 1"),
    ("  inference_steps: 2", "  inference_steps: -1", "inference_steps"),
    ("  family: ltm", "  family: gpt", "model.family", "ltm, gp_vae, gpt_vae, lang_vae, autoregressive, huggingface"),
    ("  family: ltm", "  family: 3", "model.family", "ltm, gp_vae, gpt_vae, lang_vae, autoregressive, huggingface"),
    ("  family: ltm", "  family: [ltm]", "model.family"),
    ("  max_steps: 3", "  max_steps: 0", "max_steps"),
    ("  max_steps: 3", "  seed: 5000000000", "seed"),
    ("  learning_rate: 1e-2", "  learning_rate: .inf", "learning_rate"),
    ("  max_steps: 3", "  gradient_accumulation_steps: 0", "gradient_accumulation_steps"),
    ("  max_steps: 3", "  optim: best", "optim"),
    ("  report_to: none", "  report_to: nowhere", "report_to"),
    ("  hidden_size: 16", "  beta: .nan", "beta"),
    ("  hidden_size: 16", "  free_bits: .nan", "free_bits"),
    ("  hidden_size: 16", "  inference_lr: -1", "inference_lr"),
    ("  hidden_size: 16", "  inference_lr: .nan", "inference_lr"),
    ("  hidden_size: 16", "  rope_theta: 0", "rope_theta"),
    ("  hidden_size: 16", "  intermediate_size: 0", "intermediate_size"),
    ("  hidden_size: 16", "  max_position_embeddings: 8", "max_position_embeddings"),
    ("  vocab_size: 300", "  vocab_size: 10", "vocab_size"),
    ("  source: builtin:sentences", "  source: 2026-99-99", "2026-99-99", "timestamp"),
    ("  source: builtin:sentences", "  source: !!int many", "many", "int"),
    # impossible combinations
    ("  hidden_size: 16", "  hidden_size: 14", "hidden_size", "num_attention_heads"),
    ("  limit: 200", "  streaming: true", "streaming", "blocks"),
    # the same key twice
    ("  limit: 200", "  limit: 200\n  limit: 300", "limit", "twice"),
]


@pytest.mark.parametrize("change", MISTAKES, ids=lambda change: change[1].strip().replace("\n", " "))
def test_a_mistake_is_named_with_its_line(change):
    old, new, *words = change
    assert RECIPE.count(old) == 1
    line = RECIPE[: RECIPE.index(old)].count("\n") + 1 + new.count("\n")
    with unchecked():  # or beartype sees a wrong type before the recipe does
        message = complaint(RECIPE.replace(old, new))
    assert message.startswith(f"small.yaml, line {line}:")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "value", ["[16", "{16", "*sixteen", "!!python/name:os.system", '"16', "16\n\tnum: 3", "16: 3", "? [a]\n: 1"]
)
def test_what_is_no_yaml_is_named_with_its_line(value):
    message = complaint(RECIPE.replace("  limit: 200", f"  limit: {value}"))
    assert message.startswith("small.yaml, line ")
    assert "YAML" in message


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_a_missing_section_is_named(section):
    names = ["model", "data", "training", "evaluation"]
    parts = {name: RECIPE[RECIPE.index(f"{name}:") :] for name in names}
    parts = {
        name: part[: part.index(f"{after}:")] for (name, part), after in zip(parts.items(), names[1:], strict=False)
    }
    assert f"'{section}' is missing" in complaint(RECIPE.replace(parts[section], ""))


@pytest.mark.parametrize(("section", "key"), [("data", "source"), ("model", "family")])
def test_a_missing_key_is_named_with_the_line_of_its_section(section, key):
    text = "\n".join(line for line in RECIPE.splitlines() if not line.startswith(f"  {key}:"))
    line = text.splitlines().index(f"{section}:") + 1
    message = complaint(text)
    assert message.startswith(f"small.yaml, line {line}: {section}.{key} ")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- model\n- data\n", "model\n", "3\n"])
def test_a_recipe_is_a_mapping(text):
    assert complaint(text).startswith("small.yaml: a recipe is a mapping")


@pytest.mark.parametrize("content", ["", " ltm", " [ltm]", " 3"])
def test_a_section_is_a_mapping(content):
    text = f"data: {{source: builtin:sentences}}\nmodel:{content}\ntraining: {{}}\n"
    assert complaint(text) == "small.yaml, line 2: model must be a mapping of keys to values."


def test_a_section_given_twice_is_named():
    assert "twice" in complaint("model:\n  beta: 2.0\n" + RECIPE)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(RECIPE + "1: {a: 2}\n", id="section"),
        pytest.param(RECIPE.replace("  limit: 200", "  1: 200"), id="data"),
        pytest.param(RECIPE.replace("  max_steps: 3", "  ~: 3"), id="training"),
        pytest.param(RECIPE.replace("  hidden_size: 16", "  true: 16"), id="model"),
    ],
)
def test_a_key_that_is_no_word_is_unknown(text):
    assert complaint(text).startswith("small.yaml, line ")


def test_a_character_that_yaml_refuses_is_named_with_its_line():
    assert complaint(RECIPE + "\0").startswith("small.yaml, line ")


def test_a_streamed_corpus_needs_a_number_of_steps_and_a_validation_source():
    text = RECIPE.replace("unit: sentences", "unit: blocks\n  streaming: true")
    assert "validation" in complaint(text)
    text = text.replace("max_steps: 3", "num_train_epochs: 1")
    assert "max_steps" in complaint(text, "data.validation=builtin:sentences")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_every_schedule_of_the_rate_can_be_asked_for(schedule):
    recipe = parse_recipe(RECIPE, "small.yaml", [f"training.lr_scheduler_type={schedule}"])
    parameter = torch.nn.Parameter(torch.zeros(1))
    arguments = recipe.training_arguments(Path("x"))
    get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD([parameter], lr=1.0),
        num_warmup_steps=1,
        num_training_steps=3,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )


# ---- mistakes in overrides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["training", "training.max_steps", "max_steps=3", "=3", "training.=3", ".x=3"])
def test_an_override_of_a_wrong_form_is_named(override):
    message = complaint(RECIPE, override)
    assert override in message
    assert "section.key=value" in message or "unknown key" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("traning.max_steps=3", ["unknown key", "training"]),
        ("training.max_step=3", ["unknown key", "max_steps"]),
        ("model.hiden_size=3", ["hidden_size"]),
        ("data.lenght=3", ["unknown key", "length"]),
        ("evaluation.iw=3", ["unknown key"]),
        ("training.max_steps=many", ["number"]),
        ("training.max_steps=[3", ["YAML"]),
        ("training.learning_rate=.nan", ["NaN"]),
        ("data.length=0", ["at least 1"]),
        ("model.hidden_size=15", ["multiple"]),
        ("model.family=gpt", ["ltm, gp_vae, gpt_vae, lang_vae, autoregressive, huggingface"]),
        ("training.output_dir=x", ["leave it out"]),
    ],
)
def test_an_override_that_cannot_be_used_is_named(override, words):
    message = complaint(RECIPE, override)
    assert override in message
    for word in words:
        assert word in message


def test_a_mistake_in_the_file_keeps_its_line_when_there_are_overrides():
    text = RECIPE.replace("  hidden_size: 16", "  hidden_size: 15")
    line = text[: text.index("  hidden_size")].count("\n") + 1
    assert complaint(text, "training.max_steps=5").startswith(f"small.yaml, line {line}:")


# ---- files -------------------------------------------------------------------------------------------------------


def test_a_recipe_is_read_from_a_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    assert load_recipe(path, ["training.max_steps=5"]).training["max_steps"] == 5
    path.write_text(RECIPE.replace("ltm", "lmt"), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}, line 2:"):
        load_recipe(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / "my.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "not UTF-8":
        path.write_bytes(RECIPE.encode("utf-16"))
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_recipe(path)
