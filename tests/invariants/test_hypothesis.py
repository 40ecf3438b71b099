"""Whatever a recipe, a file or latents hold, it works or it ends in one sentence: never in another exception.

LATENTLM_EXAMPLES=10 runs ten times as many, other ones each time.
"""

import contextlib
import copy
import dataclasses
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.command import SWEEP, prepare, run
from tests.training.runs import RECIPES, unchecked
from transformers import TrainingArguments

from latentlm import InputError, LTMConfig, load
from latentlm.data import Blocks, Sentences, read_documents
from latentlm.data.recipe import DataRecipe
from latentlm.training.recipe import EvaluationRecipe, load_recipe, parse_recipe
from latentlm.training.sweep import load_sweep

TIMES = int(os.environ.get("LATENTLM_EXAMPLES", "1"))
# what needs other software or hardware, other processes, or the network
ELSEWHERE = {
    "torch_empty_cache_steps", "metric_for_best_model", "accelerator_config", "deepspeed",
    "fsdp", "fsdp_config", "full_determinism", "parallelism_config", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "report_to", "dataloader_num_workers", "debug",
}  # fmt: skip


def examples(number: int) -> settings:
    return settings(
        max_examples=number * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name, unchecked(), contextlib.chdir(name):
        prepare(Path(name))
        yield Path(name)


@pytest.fixture(scope="module")
def model(folder):
    return load("model")


def ends_well(*arguments: str) -> bool:
    """Whether it worked; it may also be told in one sentence that it did not."""
    status, out, err = run(*arguments)
    assert "Traceback" not in out + err
    if status:
        assert err.startswith("latentlm: ") and err.count("\n") == 1
    return not status


@contextlib.contextmanager
def one_sentence_or_none():
    try:
        yield
    except InputError as error:
        assert str(error).strip()


# ---- recipes -----------------------------------------------------------------------------------------------------

FIELDS = {
    "model": [f.name for f in dataclasses.fields(LTMConfig)],
    "data": [f.name for f in dataclasses.fields(DataRecipe)],
    "training": [f.name for f in dataclasses.fields(TrainingArguments) if f.name not in ELSEWHERE],
    "evaluation": [f.name for f in dataclasses.fields(EvaluationRecipe)],
}
WORDS = ["", "no", "steps", "epoch", "cosine", "linear", "blocks", "builtin:stories", "texts.txt", "learned", "1e-3"]
ODD = ["!!int a", "*a", "&a [*a]", "2020-13-45", "2020-01-01", "1:99", "0x", "? ", "- a: b", "{a", "[", "'", "%a", "\t"]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.integers(-(2**70), 2**70),
    st.just(10**400),
    st.floats(),
    st.floats(0, 1),
    st.dates(),
    st.text(max_size=6),
    st.binary(max_size=4),
    st.sampled_from(WORDS),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | scalars, inner, max_size=2),
    max_leaves=5,
)
keys = st.sampled_from([(section, key) for section, names in FIELDS.items() for key in names])


@st.composite
def changes(draw, strangest=True):
    """A change to a recipe's document, at any level."""
    (section, key), value = draw(keys), draw(values if strangest else scalars)
    kind = draw(st.sampled_from(["set"] * 6 + ["delete", "section", "gone", "key", "top"])) if strangest else "set"

    def change(document):
        part = document.get(section)
        if kind == "section":
            document[section] = value
        elif kind == "gone":
            document.pop(section, None)
        elif kind == "top":
            document[draw(scalars)] = value
        elif isinstance(part, dict):
            if kind == "delete" and part:
                part.pop(draw(st.sampled_from(sorted(map(str, part)))), None)
            else:
                part[draw(scalars) if kind == "key" else key] = value

    return change


@st.composite
def recipes(draw):
    document = yaml.safe_load(RECIPES[draw(st.sampled_from(sorted(RECIPES)))])
    for change in draw(st.lists(changes(), max_size=3)):
        change(document)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 2))):
        lines = text.splitlines() or [""]
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["twice", "odd", "text", "cut", "indent"]))
        line = {
            "twice": f"{lines[at]}\n{lines[at]}",
            "odd": lines[at].partition(":")[0] + ": " + draw(st.sampled_from(ODD)),
            "text": lines[at] + draw(st.text(max_size=5)),
            "cut": lines[at][: draw(st.integers(0, 9))],
            "indent": " " * draw(st.integers(0, 3)) + lines[at],
        }[kind]
        text = "\n".join([*lines[:at], line, *lines[at + 1 :]])
    return text


@examples(175)
@given(text=recipes())
def test_recipes(folder, text):
    Path("any.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with one_sentence_or_none():
        load_recipe("any.yaml")


def is_small(recipe) -> bool:
    """Whether a step of it takes no time: a thousand layers are no mistake."""
    config = recipe.model_config(vocab_size=300)
    counts = [value for value in vars(config).values() if isinstance(value, int)]
    arguments = recipe.training_arguments(Path("unused"))
    others = (
        recipe.evaluation.iw_samples,
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
    )
    return max(counts) <= 512 and max(others) <= 64 and (recipe.data.limit or 10**9) <= 1000


@examples(22)
@given(several=st.lists(changes(strangest=False), min_size=1, max_size=2), family=st.sampled_from(sorted(RECIPES)))
def test_a_recipe_that_passes_trains_a_step(folder, several, family):
    document = yaml.safe_load(RECIPES[family])
    document["data"]["source"] = "texts.txt"
    for change in several:
        change(document)
    text = yaml.safe_dump(document)
    with tempfile.TemporaryDirectory(dir=".") as name, one_sentence_or_none():
        recipe = parse_recipe(text, "any.yaml", ["training.max_steps=1", "evaluation.sequences=1"])
        if is_small(recipe):
            (Path(name) / "any.yaml").write_text(text)
            ends_well(
                "train", f"{name}/any.yaml", "training.max_steps=1", "evaluation.sequences=1", "--output", f"{name}/run"
            )


@examples(40)
@given(key=keys.map(".".join) | st.text(max_size=8), value=scalars.map(str) | st.sampled_from(ODD) | st.text())
def test_overrides(folder, key, value):
    with one_sentence_or_none():
        parse_recipe(RECIPES["ltm"], "small.yaml", [f"{key}={value}"])


@examples(40)
@given(data=st.data())
def test_sweeps(folder, data):
    document = yaml.safe_load(SWEEP)
    places = [document, document["studies"], document["studies"]["steps"], document["studies"]["steps"]["runs"]]
    known = ["recipe", "seeds", "scoring", "studies", "runs", "grid", "evaluations", "plot", "steps", "two"]
    known += ["model.inference_steps", "training.learning_rate", "x", "y", "iw_samples", "limit"]
    for _ in range(data.draw(st.integers(1, 3))):
        key, value = data.draw(st.sampled_from(known) | scalars), data.draw(values)
        data.draw(st.sampled_from(places))[key] = value
    Path("any.yaml").write_text(yaml.safe_dump(copy.deepcopy(document)), encoding="utf-8")
    with one_sentence_or_none():
        load_sweep("any.yaml")


# ---- data --------------------------------------------------------------------------------------------------------

cells = st.none() | st.text(max_size=12) | st.integers(-5, 5) | st.floats() | st.lists(st.text(max_size=3), max_size=2)


def table(columns: dict) -> bytes:
    file = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), file)
    except (pa.ArrowException, TypeError, UnicodeEncodeError):  # no table that anybody could have written
        return b"PAR1"
    return file.getvalue()


@st.composite
def data_files(draw):
    suffix = draw(st.sampled_from([".txt", ".jsonl", ".tsv", ".csv", ".parquet", ".txt.xz"]))
    kind = draw(st.sampled_from(["bytes", "text", "rows", "rows", "rows"]))
    if kind == "bytes":
        return suffix, draw(st.binary(max_size=60))
    names = draw(st.lists(st.sampled_from(["text", "id", "a,b", ""]) | st.text(max_size=3), max_size=3, unique=True))
    rows = draw(st.lists(st.lists(cells, min_size=len(names), max_size=len(names)), max_size=4))
    if kind == "text":
        content = draw(st.text(max_size=80))
    elif suffix == ".jsonl":
        content = "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows)
    elif suffix == ".parquet":
        content = table({name: [row[index] for row in rows] for index, name in enumerate(names)})
    else:
        content = "\n".join({".csv": ",", ".tsv": "\t"}.get(suffix, " ").join(map(str, row)) for row in [names, *rows])
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    if draw(st.booleans()) and content:  # a byte that flipped on the way
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    return suffix, content


columns = st.none() | st.sampled_from(["text", "id", "1", "0", "99999999999999999999", "٣"])


@examples(150)
@given(
    file=data_files(),
    column=columns,
    sample_by=st.sampled_from(["line", "paragraph", "document"]),
    limit=st.none() | st.integers(-1, 3) | st.just(10**30),
)
def test_data_files(folder, model, file, column, sample_by, limit):
    suffix, content = file
    path = Path(f"any{suffix}")
    path.write_bytes(content)
    with one_sentence_or_none():
        documents = list(read_documents(path, column=column, sample_by=sample_by, limit=limit))
        with one_sentence_or_none():
            sentences = Sentences(documents, model[1], max_length=4)
            assert sum(sentences.lengths) == sentences.num_tokens
        blocks = Blocks(documents, model[1], block_length=4, drop_last=False)
        assert blocks.num_bytes == sum(len(document.text.encode()) for document in documents)


@examples(20)
@given(file=data_files(), verb=st.sampled_from(["evaluate", "encode"]), column=columns)
def test_data_files_through_the_command(folder, file, verb, column):
    suffix, content = file
    path = Path(f"any{suffix}")
    path.write_bytes(content)
    options = {"evaluate": ["--iw-samples", "1"], "encode": ["--output", "any.npz"]}[verb]
    ends_well(verb, "model", "--data", str(path), *options, *([] if column is None else ["--column", column]))


# ---- latents -----------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 1e6, 1e30, 3e38, -3e38, 1e300, np.nan, np.inf]
TYPES = ["float64", "float32", "float16", "int64", "uint8", "bool", "complex64", "U3", "S2", "datetime64[s]"]
shapes = st.sampled_from([(1, 2, 2, 4), (3, 2, 2, 4), (2, 2, 4)]) | st.lists(st.integers(0, 3), max_size=5).map(tuple)


@st.composite
def arrays(draw):
    number, kind = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(["float32", "float64", *TYPES]))
    with np.errstate(all="ignore"):
        try:
            return np.full(draw(shapes), number).astype(kind)
        except (ValueError, OverflowError, TypeError):  # numpy knows no such conversion
            return np.zeros(draw(shapes))


@examples(55)
@given(
    array=arrays(),
    name=st.sampled_from(["mean"] * 5 + ["means", "ids"]),
    damage=st.none() | st.integers(0, 400),
    prompts=st.lists(st.text(max_size=4), max_size=3),
    greedy=st.booleans(),
    parquet=st.booleans(),
)
def test_latents_from_a_file(folder, array, name, damage, prompts, greedy, parquet):
    path = Path("any.parquet" if parquet else "any.npz")
    if parquet and array.ndim and array.dtype.kind in "fiu":
        rows = [row.ravel().tolist() for row in array]
        pq.write_table(pa.table({name: rows, "shape": [list(array.shape[1:])] * len(rows)}), path)
    else:
        np.savez(path.with_suffix(".npz"), **{name: array})
        path = path.with_suffix(".npz")
    content = bytearray(path.read_bytes())
    if damage is not None and damage < len(content):
        content[-damage - 1] ^= 255
        path.write_bytes(content)
    given_prompts = [part for prompt in prompts for part in ("--prompt", prompt)]
    options = [*given_prompts, "--max-new-tokens", "2", *(["--greedy"] if greedy else [])]
    ends_well("generate", "model", "--latents", str(path), *options)


@examples(50)
@given(
    shape=shapes,
    number=st.sampled_from(NUMBERS),
    rows=st.integers(0, 3),
    length=st.integers(0, 5),
    sample=st.booleans(),
)
def test_latents_in_python(folder, model, shape, number, rows, length, sample):
    latents, ids = torch.full(shape, number, dtype=torch.float64).float(), torch.ones(rows, length, dtype=torch.long)
    with one_sentence_or_none(), torch.no_grad():
        scores = model[0].log_likelihood(latents, ids)
        assert scores.shape[-2:] == (rows, length - 1)
    with one_sentence_or_none():
        model[0].generate(ids if sample else None, latents=latents, max_new_tokens=2, do_sample=sample)


# ---- options -----------------------------------------------------------------------------------------------------

NUMBER_OPTIONS = [
    "--max-new-tokens",
    "--temperature",
    "--top-k",
    "--top-p",
    "--beams",
    "-n",
    "--reinfer-every",
    "--seed",
]
numbers = st.integers(-2, 5) | st.floats() | st.sampled_from([10**30, "", "x", "1_0", "٣"])


@examples(30)
@given(given_options=st.dictionaries(st.sampled_from(NUMBER_OPTIONS), numbers, max_size=3), prompt=st.text(max_size=5))
def test_options_of_generate(folder, given_options, prompt):
    options = [part for name, value in given_options.items() for part in (name, str(value))]
    ends_well("generate", "model", "--max-new-tokens", "3", "--prompt", prompt, *options)


@examples(12)
@given(field=st.sampled_from([f for f in FIELDS["model"] if "inf" in f]), value=scalars.map(str))
def test_inference_of_a_trained_model(folder, field, value):
    ends_well("encode", "model", "--text", "a", "--output", "any.npz", "--set", f"{field}={value}")
