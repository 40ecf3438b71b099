"""Checkpoints that are whole: written beside the others under a hidden name, synced, then renamed.

runs/x/.saving/checkpoint-20      being written; after a crash it is rubbish, and the next save removes it
runs/x/checkpoint-20              whole, since it has its name; SHA256SUMS says that it still is
"""

import shutil
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from latentlm.errors import InputError
from latentlm.files import damage, publish_folder, write_checksums

STAGING_FOLDER = ".saving"


def begin(output: Path) -> Path:
    """An empty hidden folder in `output` to write a checkpoint to."""
    staging = output / STAGING_FOLDER
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(staged: Path, output: Path) -> None:
    """Makes what was written to the hidden folder a checkpoint."""
    write_checksums(staged)
    publish_folder(staged, output / staged.name)


def newest(output: Path) -> tuple[Path | None, str]:
    """The newest whole checkpoint of a run, and a sentence about newer ones that are not (empty if there are none).

    Raises:
        InputError: there are checkpoints, and none is whole.
    """
    checkpoints = [Path(path) for path in reversed(sort_checkpoints(str(output)))] if output.is_dir() else []
    damaged: list[str] = []
    for checkpoint in checkpoints:
        fault = damage(checkpoint, "*.safetensors", "*.json", "*.yaml", "*.pt", "*.pth")
        if fault is None:
            return checkpoint, "; ".join(damaged)
        damaged.append(f"{checkpoint} is not whole ({fault})")
    if damaged:
        raise InputError(f"{'; '.join(damaged)}: none is left to resume from, so begin in another --output.")
    return None, ""


def remove_all(output: Path) -> None:
    """Removes every checkpoint in a folder."""
    for path in sort_checkpoints(str(output)):
        shutil.rmtree(path)
