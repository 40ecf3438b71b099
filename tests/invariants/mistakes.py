"""What people give to the command by mistake or misfortune, and what the answer must say: what is wrong, what to do."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from tests.command import run

from latentlm.data import train_tokenizer

DEEP = "[\n" * 5000  # without ends of lines yaml takes a second, since anything on one may be a key


class Row(NamedTuple):
    """`kind: what`, a command line, a regular expression for the answer; what is done to the folder before.

    `largest`: bytes that a file may have, as on a full disk; `closed`: paths taken away from this user; `leaves`:
    whether a run that had begun may leave its folder.
    """

    name: str
    command: str | tuple[str, ...]
    says: str
    before: Callable[[Path], object] = lambda folder: None
    largest: int | None = None
    closed: dict[str, int] | None = None
    leaves: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(self.command.split()) if isinstance(self.command, str) else self.command


KINDS = (
    "missing file",
    "empty file",
    "wrong encoding",
    "binary",
    "row without text",
    "tokenizer",
    "other family",
    "half-written",
    "tampered",
    "misspelt key",
    "too long",
    "latents",
    "number",
    "not finite",
    "full disk",
    "no permission",
    "recipe",
    "sweep",
    "hub",
    "place",
    "options",
)


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def npz(**arrays: object) -> Callable[[Path], object]:
    return lambda folder: np.savez(folder / "z.npz", **arrays)


def parquet(name: str, **columns: list) -> Callable[[Path], object]:
    return lambda folder: pq.write_table(pa.table(columns), folder / name)


def cut(name: str) -> Callable[[Path], object]:
    def halve(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return halve


def gone(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def config(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    def tamper(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors["norm.weight"] = change(tensors["norm.weight"])
        save_file(tensors, path, metadata={"format": "pt"})

    return tamper


def unlisted(change: Callable[[Path], object], model: str = "model") -> Callable[[Path], object]:
    """A change to a model that has no checksums, as one from elsewhere."""

    def do(folder: Path) -> None:
        (folder / model / "SHA256SUMS").unlink()
        change(folder)

    return do


def tokenizer(texts: str, size: int, folder: str = "model") -> Callable[[Path], object]:
    return lambda path: train_tokenizer([f"{texts} {number}" for number in range(2000)], size).save_pretrained(
        path / folder
    )


def without_end(folder: Path) -> None:
    tokenizer("words", 280, "tokenizer")(folder)
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def with_gaps(folder: Path) -> None:
    tokenizer("words", 280, "tokenizer")(folder)
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 5000
    path.write_text(json.dumps(content))


SAVING = "training.save_strategy=steps training.save_steps=1"
RESUME = f"train small.yaml --output run {SAVING} training.max_steps=3 --resume"


def begun(*others: Callable[[Path], object]) -> Callable[[Path], object]:
    """A run with one checkpoint, and what then happens to it."""

    def begin(folder: Path) -> None:
        assert run("train", "small.yaml", "--output", "run", *SAVING.split(), "training.max_steps=1")[0] == 0
        for other in others:
            other(folder)

    return begin


TABLE = [
    # ---- data
    Row("missing file: data", "evaluate model --data nothing.txt", "nothing.txt does not exist: give a file"),
    Row("missing file: data of train", "train small.yaml data.source=nothing.txt", "nothing.txt does not exist: give"),
    Row("missing file: validation", "train small.yaml data.validation=no.txt", "no.txt does not exist: give a file"),
    Row("missing file: quickstart", "quickstart --data nothing.txt", "nothing.txt does not exist: give a file"),
    Row("missing file: encode", "encode model --data no.txt --output x.npz", "no.txt does not exist: give a file"),
    Row("missing file: model", "evaluate ./nothing", "nothing does not exist .*: give the folder of a saved model"),
    Row("missing file: a file for a model", "encode texts.txt --text a --output x.npz", "texts.txt .* give the folder"),
    Row("missing file: recipe", "train nothing.yaml", "nothing.yaml cannot be read: .*: check its path"),
    Row("missing file: folder for recipe", "train llama", "llama cannot be read: Is a directory: check its path"),
    Row("missing file: sweep", "sweep nothing.yaml", "nothing.yaml cannot be read: .*: check its path"),
    Row("missing file: folder for sweep", "sweep llama", "llama cannot be read: Is a directory: check its path"),
    Row(
        "missing file: no checkpoint",
        "train small.yaml --resume --output model",
        "model holds a model without checkpoints: .*",
    ),
    Row("missing file: folder", "evaluate model --data llama", "holds no file of a known kind: put one of"),
    Row("missing file: no recipe", "evaluate model", "no recipe.yaml .*: give --data", gone("model/recipe.yaml")),
    Row("missing file: built-in", "evaluate model --data builtin:x", "no built-in corpus: .*builtin:sentences"),
    Row("missing file: unknown kind", "evaluate model --data a.pdf", "unknown kind: give one of", write("a.pdf", "x")),
    Row("missing file: name", ("evaluate", "model", "--data", ""), "name of the data is empty: give a file"),
    Row("empty file: data", "evaluate model --data empty.txt", "empty.txt holds no text: give a source"),
    Row("empty file: data of train", "train small.yaml data.source=empty.txt", "empty.txt holds no text: give"),
    Row("empty file: encode", "encode model --data empty.txt --output x.npz", "empty.txt holds no text: give"),
    Row("empty file: quickstart", "quickstart --data empty.txt --output q", "empty.txt holds no text: give"),
    Row("empty file: blank", "evaluate model --data a.txt", "a.txt holds no text: give", write("a.txt", " \n\n\t\n")),
    Row("empty file: recipe", "train empty.txt", "a recipe is a mapping with the keys"),
    Row("empty file: sweep", "sweep empty.txt", "a sweep is a mapping with the key studies"),
    Row("empty file: Parquet", "evaluate model --data a.parquet", "damaged .*: write or copy", write("a.parquet", "")),
    Row(
        "wrong encoding: UTF-16",
        "evaluate model --data a.txt",
        "line 1 is not UTF-8 .*: convert it",
        write("a.txt", "text".encode("utf-16")),
    ),
    Row(
        "wrong encoding: Latin-1",
        "train small.yaml data.source=a.txt",
        "line 2 is not UTF-8 .*: convert it",
        write("a.txt", b"one\ncaf\xe9\n"),
    ),
    Row("wrong encoding: recipe", "train binary.txt", "binary.txt cannot be read: it is not UTF-8 text: convert it"),
    Row("wrong encoding: sweep", "sweep binary.txt", "binary.txt cannot be read: it is not UTF-8 text: convert it"),
    Row(
        "wrong encoding: text", ("encode", "model", "--text", "\udcff", "--output", "x.npz"), "--text is .*: convert it"
    ),
    Row("wrong encoding: prompt", ("generate", "model", "--prompt", "\udcff"), "--prompt is not UTF-8.*: convert it"),
    Row(
        "wrong encoding: surrogate",
        "evaluate model --data a.jsonl",
        "half of a surrogate pair .*: write it as UTF-8",
        write("a.jsonl", '{"text": "a\\ud800b"}'),
    ),
    Row("binary: data", "evaluate model --data binary.txt", "binary.txt line 1 is not UTF-8 .*: convert it"),
    Row("binary: NUL", "evaluate model --data a.txt", "NUL byte.*: give a UTF-8 text file", write("a.txt", "a\0b")),
    Row(
        "binary: gzip",
        "encode model --data a.txt --output x.npz",
        "is not UTF-8 .*: convert it",
        write("a.txt", gzip.compress(b"text")),
    ),
    Row(
        "binary: no xz",
        "evaluate model --data a.txt.xz",
        "no xz file .*: compress or copy it again",
        write("a.txt.xz", b"\xfd7zXZ"),
    ),
    Row(
        "binary: no Parquet",
        "evaluate model --data a.parquet",
        "is damaged .*: write or copy it again",
        write("a.parquet", b"PAR1" * 9),
    ),
    Row(
        "row without text: JSON",
        "evaluate model --data a.jsonl",
        "line 2 has no text .*: fill it in or take",
        write("a.jsonl", '{"text": "a"}\n{"text": null}\n'),
    ),
    Row(
        "row without text: no object",
        "evaluate model --data a.jsonl",
        "line 1 is list, no object: write one JSON",
        write("a.jsonl", "[1]"),
    ),
    Row(
        "row without text: no JSON",
        "train small.yaml data.source=a.jsonl",
        "line 1 is not valid JSON .*: write one",
        write("a.jsonl", "{text"),
    ),
    Row(
        "row without text: nested JSON",
        "evaluate model --data a.jsonl",
        "line 1 is not valid JSON .*: write one",
        write("a.jsonl", "[" * 100_000),
    ),
    Row(
        "row without text: TSV",
        "train small.yaml data.source=a.tsv",
        "line 3 has no text .*: fill it in",
        write("a.tsv", "id\ttext\n1\tone\n2\n"),
    ),
    Row(
        "row without text: CSV",
        "encode model --data a.csv --output x.npz",
        "a.csv line 2 is not valid CSV .*: mend it",
        write("a.csv", 'text\n"one\n'),
    ),
    Row(
        "row without text: Parquet",
        "evaluate model --data a.parquet",
        "row 2 has no text .*: fill it in",
        parquet("a.parquet", text=["one", None]),
    ),
    Row(
        "row without text: numbers",
        "evaluate model --data a.parquet",
        "'text' holds no strings: give column=",
        parquet("a.parquet", text=[1, 2]),
    ),
    Row(
        "row without text: column",
        "evaluate model --data a.tsv --column x",
        "no column 'x': give column=",
        write("a.tsv", "id\ttext\n1\tone\n"),
    ),
    Row(
        "row without text: number of a column",
        "evaluate model --data a.tsv --column 9",
        "no column 9: give column= ",
        write("a.tsv", "id\ttext\n1\tone\n"),
    ),
    Row(
        "row without text: one document",
        "train small.yaml data.source=a.txt",
        "cannot be split .*: give a validation",
        write("a.txt", "one line\n"),
    ),
    Row(
        "row without text: short",
        "train small.yaml data.source=texts.txt data.unit=blocks data.length=4096",
        "less than one block of 4096: give more text or a smaller block_length",
    ),
    # ---- hub
    Row("hub: data", "evaluate model --data hub:owner/name", "hub cannot be reached: check the name and the network"),
    Row("hub: data of train", "train small.yaml data.source=hub:name:config", "cannot be reached: check the name"),
    Row("hub: tokenizer", "train small.yaml data.tokenizer=owner/name", "hub cannot be reached: check the name"),
    Row("hub: model", "generate owner/name", "owner/name is not on this machine .* cannot be reached: check the name"),
    Row("hub: push", "push model owner/name", "owner/name is not uploaded, .* cannot be reached: check the network"),
    Row("hub: push under no name", "push model name", "'name' is no name on the hub: write OWNER/NAME"),
    Row("hub: push of no model", "push nothing owner/name", "nothing does not exist"),
    Row("hub: push with a recipe", "push model owner/name --figures small.yaml", "small.yaml is no JSON: give what"),
    Row("hub: no name", "evaluate model --data hub:", "names no data set: write hub:NAME"),
    # ---- tokenizers
    Row(
        "tokenizer: larger",
        "evaluate model",
        "tokenizer has .* do not belong together",
        unlisted(tokenizer("many words", 400)),
    ),
    Row(
        "tokenizer: none",
        "generate model",
        "holds no tokenizer that loads .*: give another folder",
        unlisted(gone("model/tokenizer.json")),
    ),
    Row(
        "tokenizer: cut",
        "generate model",
        "holds no tokenizer that loads .*: give another",
        unlisted(cut("model/tokenizer.json")),
    ),
    Row(
        "tokenizer: no end",
        "train small.yaml data.tokenizer=./tokenizer",
        "no end of sequence: set eos_token",
        without_end,
    ),
    Row(
        "tokenizer: gaps",
        "train small.yaml data.tokenizer=./tokenizer",
        "leaves some numbers out, .*: give another",
        with_gaps,
    ),
    Row(
        "tokenizer: a folder without",
        "train small.yaml data.tokenizer=llama",
        "llama holds no tokenizer .*: give another",
    ),
    Row(
        "tokenizer: same size, saved with the model",
        "generate model",
        "tokenizer.json.*(changed|tampered|belong).*",
        tokenizer("other", 300),
    ),
    Row(
        "tokenizer: same size, on --resume",
        RESUME + " data.tokenizer=./tokenizer",
        "tokenizer.*resume with",
        begun(
            tokenizer("other", 300, "tokenizer"),
            lambda folder: (folder / "run" / "recipe.yaml").write_text(
                (folder / "run" / "recipe.yaml").read_text().replace("data:", "data:\n  tokenizer: ./tokenizer")
            ),
        ),
    ),
]


def every_row() -> list[Row]:
    from tests.invariants.mistakes_of_models import MODELS_TABLE  # it needs Row from here
    from tests.invariants.mistakes_of_places import PLACES_TABLE
    from tests.invariants.mistakes_of_recipes import RECIPES_TABLE

    return [*TABLE, *MODELS_TABLE, *PLACES_TABLE, *RECIPES_TABLE]
