"""Files that are written whole or not at all."""

import errno
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
        raise InputError(f"{path} cannot be written: the folder {path.parent} does not exist: make it first.")
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder: name a file in it.")
    if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise InputError(f"{path} cannot be written: no permission to write in {path.parent}: name another place.")
    return path


# EFBIG: a limit on the size of files, which some computing centres set in place of a quota
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason_of(error: OSError) -> str:
    """Why a file or folder cannot be used, and what to do."""
    if error.errno in _FULL:
        return f"{error.strerror}: free some space, or name another place"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.strerror}: change its permissions, or name another place"
    return f"{error.strerror or error}: check the path"


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; it takes its name once everything is on the disk, and is gone if that fails.

    Raises:
        InputError: it cannot be written: a full disk, for one.
    """
    path = check_writable(path)
    try:
        with _whole_file(path) as file:
            yield file
    except OSError as error:
        if error.errno is None or not Path(error.filename or path).name.startswith((path.name, f".{path.name}-")):
            raise  # not of this file
        raise InputError(f"{path} cannot be written: {reason_of(error)}.") from error


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
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
