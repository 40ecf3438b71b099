"""Files and folders that are written whole or not at all, and what tells whether they are as they were written."""

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from safetensors import SafetensorError

from latentlm.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from one folder
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_SECONDS_BETWEEN_TRIES = 0.5
#: digests of a folder's files, as `sha256sum -c SHA256SUMS` reads them
CHECKSUMS_FILE = "SHA256SUMS"


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


def make_folder(path: str | Path) -> Path:
    """The folder, made with those above it if it is missing.

    Raises:
        InputError: it cannot be made: a file has its name, for one.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made a folder ({error.strerror}): name another.") from error
    return path


def write_whole(path: str | Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def saving(what: str | Path) -> Iterator[None]:
    """Turns the ways in which a disk refuses (full, closed, gone) into one sentence about `what` was to be written.

    Raises:
        InputError: in place of OSError and of what safetensors and torch.save make of it.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and not any(sign in str(error) for sign in _CANNOT_WRITE):
            raise
        reason = reason_of(error) if isinstance(error, OSError) else _NO_ROOM
        raise InputError(f"{what} cannot be written: {reason}; what was saved before is intact.") from error


# torch raises a RuntimeError, tokenizers a bare Exception with the system's number in its words
_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "Parent directory", "cannot be opened", "(os error")
# they and safetensors say no more
_NO_ROOM = "the disk took only a part of it: free some space, or name another place"


@contextmanager
def alone_in(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Made if need be, and kept from others who ask for the same, until the end of the body or of the process.

    A folder that holds nothing in the end is removed.

    Args:
        on_wait: called once where another process has it, whose end is then waited for; None does not wait.

    Raises:
        InputError: another process has it, or nothing can be written there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    waits = False
    while (file := _locked(folder)) is None:
        if on_wait is None:
            raise InputError(f"another process works in {folder}: wait for its end, or name another folder.")
        if not waits:
            on_wait()
        waits = True
        time.sleep(_SECONDS_BETWEEN_TRIES)
    lock = folder / LOCK_FILE
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: as it should be
                for path in made:
                    path.rmdir()


def _locked(folder: Path) -> BinaryIO | None:
    """The folder's lock, open and ours; None where it is another's."""
    lock = folder / LOCK_FILE
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(lock, "wb")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), lock.stat()):  # or its owner has just removed it
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None


def publish_folder(staged: Path, target: Path) -> None:
    """Gives a finished folder its name: everything in it is on the disk first, and whatever had the name goes last."""
    sync_folder(staged)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staged.chmod(0o755)
    staged.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Waits until every file in a folder, and the folder, is on the disk; others may read them."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for its owner alone
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checksums(folder: str | Path, pattern: str = "*") -> None:
    """Writes the SHA-256 of the files in a folder that match a pattern into its SHA256SUMS."""
    folder = Path(folder)
    names = sorted(path.name for path in folder.glob(pattern) if path.is_file() and path.name != CHECKSUMS_FILE)
    with _whole_file(folder / CHECKSUMS_FILE) as file:
        file.write("".join(f"{sha256_of(folder / name)}  {name}\n" for name in names).encode())


def damage(folder: str | Path, *patterns: str, all_listed: bool = True) -> str | None:
    """What is wrong with a folder by its SHA256SUMS, of the files that match a pattern (or of all); None if nothing is.

    Args:
        all_listed: a file that matches a pattern and is not listed there is wrong, too.
    """
    folder = Path(folder)
    try:
        *lines, end = (folder / CHECKSUMS_FILE).read_text(encoding="utf-8").split("\n")
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        if end:
            return f"its {CHECKSUMS_FILE} is cut off"
    except FileNotFoundError:
        return f"it has no {CHECKSUMS_FILE}"
    except (OSError, ValueError):
        return f"its {CHECKSUMS_FILE} cannot be read"
    unlisted = {path.name for pattern in patterns for path in folder.glob(pattern)} - listed.keys()
    if (unlisted and all_listed) or not listed:
        return f"its {CHECKSUMS_FILE} does not list {min(unlisted, default='any file')}"
    for name, digest in listed.items():
        path = folder / name
        if patterns and not any(path.match(pattern) for pattern in patterns):
            continue
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} has changed since it was written"
    return None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
