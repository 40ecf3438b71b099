"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from latentlm.errors import InputError


def check_writable(path: str | Path) -> Path:
    """The path, if a file can be made there; asked before long work, too.

    Raises:
        InputError: its folder is missing or closed to us, or a folder has its name.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: no permission to write in {path.parent}.")
    return path


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; it takes its name once everything is on the disk, and is gone if that fails."""
    path = check_writable(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def write_whole(path: str | Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())
