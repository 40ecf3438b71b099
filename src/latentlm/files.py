"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from latentlm.errors import InputError


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; it takes its name once everything is on the disk, and is gone if that fails."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: the folder {path.parent} does not exist.")
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
