"""Of places to write to: folders that are none, full disks, no permission."""

from pathlib import Path

import numpy as np
from tests.invariants.mistakes import RESUME, Row, begun, npz


def closed_folder(folder: Path) -> None:
    (folder / "closed").mkdir()


PLACES_TABLE = [
    # ---- places
    Row("place: no folder", "evaluate model --json missing/x.json", "the folder missing does not exist: make it first"),
    Row("place: a folder", "evaluate model --json llama", "llama cannot be written: it is a folder: name a file"),
    Row("place: a file for a folder", "evaluate model --json texts.txt/x.json", "texts.txt does not exist: make it"),
    Row("place: train --json", "train small.yaml --json missing/x.json", "missing does not exist: make it first"),
    Row("place: sweep --json", "sweep sweep.yaml --json missing/x.json", "missing does not exist: make it first"),
    Row("place: kind of latents", "encode model --text a --output x.csv", "written as .npz or .parquet"),
    Row("place: encode", "encode model --text a --output missing/x.npz", "missing does not exist: make it first"),
    Row("place: train", "train small.yaml --output texts.txt", "texts.txt is a file: name a folder"),
    Row("place: sweep", "sweep sweep.yaml --output texts.txt", "texts.txt cannot be used: .*: check the path"),
    Row(
        "place: a long name",
        ("encode", "model", "--text", "a", "--output", "x" * 251 + ".npz"),
        "too long: check the path",
    ),
    # ---- disks
    Row(
        "full disk: --json",
        "evaluate model --iw-samples 1 --json x.json",
        "x.json cannot be written: .*: free some space",
        largest=10,
    ),
    Row(
        "full disk: --json of texts",
        "generate model --max-new-tokens 2 --json x.json",
        "x.json .*: free some space",
        largest=10,
    ),
    Row(
        "full disk: .npz",
        "encode model --text a --output x.npz",
        "x.npz cannot be written: .*: free some space",
        largest=100,
    ),
    Row(
        "full disk: .parquet", "encode model --text a --output x.parquet", "x.parquet .*: free some space", largest=100
    ),
    Row(
        "full disk: recipe of a run",
        "train small.yaml --output run",
        "recipe.yaml cannot be written: .*: free",
        largest=100,
        leaves=True,
    ),
    Row(
        "full disk: model",
        "train small.yaml --output run",
        "free some space",
        largest=20_000,
        leaves=True,
    ),
    Row(
        "full disk: weights of a checkpoint",
        RESUME,
        "free some space",
        begun(),
        largest=20_000,
        leaves=True,
    ),
    Row(
        "full disk: optimizer of a checkpoint",
        RESUME,
        "free some space",
        begun(),
        largest=100_000,
        leaves=True,
    ),
    Row(
        "full disk: sweep",
        "--threads 1 sweep sweep.yaml --output s",
        "free some space",
        largest=20_000,
        leaves=True,
    ),
    # ---- permissions
    Row(
        "no permission: data",
        "evaluate model --data texts.txt",
        "texts.txt cannot be read .*check .* permissions",
        closed={"texts.txt": 0o000},
    ),
    Row(
        "no permission: recipe",
        "train small.yaml",
        "small.yaml cannot be read: Permission denied: check its path and permissions",
        closed={"small.yaml": 0o000},
    ),
    Row(
        "no permission: latents",
        "generate model --latents z.npz",
        "z.npz cannot be read .*: check its permissions",
        npz(mean=np.zeros((1, 2, 2, 4))),
        closed={"z.npz": 0o000},
    ),
    Row(
        "no permission: model",
        "generate model",
        "config.json.*[Pp]ermission",
        closed={"model/config.json": 0o000},
    ),
    Row(
        "no permission: --json",
        "evaluate model --json closed/x.json",
        "no permission to write in closed: name another",
        closed_folder,
        closed={"closed": 0o555},
    ),
    Row(
        "no permission: encode",
        "encode model --text a --output closed/x.npz",
        "no permission .* name another place",
        closed_folder,
        closed={"closed": 0o555},
    ),
    Row(
        "no permission: train",
        "train small.yaml --output closed/run",
        "closed/run cannot be written: Permission denied: change its permissions",
        closed_folder,
        closed={"closed": 0o555},
    ),
    Row(
        "no permission: sweep",
        "sweep sweep.yaml --output closed/s",
        "closed/s cannot be used: Permission denied: ",
        closed_folder,
        closed={"closed": 0o555},
    ),
]
