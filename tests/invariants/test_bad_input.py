"""Whatever is given, the command ends in one sentence, a status that is not 0, and with every file as it was.

`pytest -s -k the_table` after the others prints what each input is answered with.
"""

import contextlib
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
from tests.command import assert_one_sentence, prepare, run
from tests.invariants.mistakes import KINDS, every_row
from tests.training.runs import unchecked

from latentlm import cli

ROWS = every_row()
PRINTED: dict[str, tuple[str, str]] = {}
NOBODY = 65534
OF_LIBRARIES = re.compile(
    r"\b\w+(Error|Exception|Warning)\b|\b(torch|transformers|huggingface_hub|pyarrow|numpy|pickle|yaml)\.\w|<class|\\n"
)


@pytest.fixture(scope="module")
def template():
    with tempfile.TemporaryDirectory() as name, unchecked():
        prepare(Path(name))
        yield Path(name)


@pytest.fixture
def folder(template, monkeypatch):
    """Open to every user, unlike pytest's own folders."""
    with tempfile.TemporaryDirectory(prefix="latentlm-") as name, unchecked():
        shutil.copytree(template, name, dirs_exist_ok=True)
        for path in (Path(name), *Path(name).rglob("*")):
            path.chmod(0o755)
        monkeypatch.chdir(name)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        yield Path(name)
        for path in Path(name).rglob("*"):
            if path.is_dir():
                path.chmod(0o755)


def contents(folder: Path) -> dict[str, str]:
    def of(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"

    return {str(path.relative_to(folder)): of(path) for path in folder.rglob("*") if os.access(path, os.R_OK)}


@contextlib.contextmanager
def a_full_disk(largest: int | None):
    """No file of this process may grow beyond; the limit is lifted again, so the test needs no process of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if largest is None else largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def somebody_else(closed: dict[str, int] | None):
    """Root is asked for no permission, so it becomes another user for a while."""
    for name, mode in (closed or {}).items():
        os.chmod(name, mode)
    if not closed or os.geteuid():
        yield
        return
    try:
        os.seteuid(NOBODY)
    except PermissionError:
        pytest.skip("root may not become another user here")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def jobs_here(monkeypatch):
    """Jobs of a sweep as threads of this process."""
    from concurrent.futures import ThreadPoolExecutor

    from latentlm.training import sweep_run

    monkeypatch.setattr(sweep_run, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))


@pytest.mark.usefixtures("jobs_here")
@pytest.mark.parametrize("one", [pytest.param(one, id=one.name) for one in ROWS])
def test_it_ends_in_one_sentence(folder, one):
    one.before(folder)
    before = contents(folder)
    with somebody_else(one.closed), a_full_disk(one.largest):
        status, out, err = run(*one.arguments)
    PRINTED[one.name] = (" ".join(one.arguments), err.strip())
    assert_one_sentence(status, err)
    assert re.search(one.says, err), err
    assert not OF_LIBRARIES.search(err), err
    assert len(err) < 340, err
    assert "Traceback" not in out
    after = contents(folder)
    assert before.items() <= after.items()  # what was there is there, and unchanged
    new = after.keys() - before.keys()
    assert one.leaves or not new
    assert not [name for name in new if "tmp" in name or Path(name).name.startswith(".")]


@pytest.mark.usefixtures("jobs_here")
@pytest.mark.parametrize("one", [pytest.param(one, id=one.name) for one in ROWS[::10] if not one.leaves])
def test_debug_gives_the_traceback(folder, monkeypatch, one):
    one.before(folder)
    monkeypatch.setattr(sys, "argv", ["latentlm", "--debug", *one.arguments])
    with (
        pytest.raises(Exception),  # noqa: B017
        somebody_else(one.closed),
        a_full_disk(one.largest),
        contextlib.redirect_stdout(None),
    ):
        cli.main()


def test_the_table():
    """Every kind of the issue has its rows; prints the table when run with -s."""
    assert {one.name.partition(":")[0] for one in ROWS} == set(KINDS)
    assert len({one.name for one in ROWS}) == len(ROWS)
    print("\n| input | command | what it prints |\n| --- | --- | --- |")
    for name, (command, sentence) in PRINTED.items():
        cells = (name, ascii(command)[1:-1] if not command.isprintable() else command, sentence)
        print("| " + " | ".join((cell[:400] + " …" * (len(cell) > 400)).replace("|", "\\|") for cell in cells) + " |")


# ---- in a process of its own -------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-c", "from latentlm.cli import main; main()"]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **changes}


@pytest.mark.slow
def test_an_unreachable_hub_is_told_soon_and_in_one_sentence(folder):
    done = subprocess.run(
        [*COMMAND, "train", "small.yaml", "data.tokenizer=owner/name"],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(HF_ENDPOINT="http://127.0.0.1:9"),
    )
    assert_one_sentence(done.returncode, done.stderr)
    assert "hub cannot be reached" in done.stderr


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_the_command_quietly(folder):
    with subprocess.Popen(
        [*COMMAND, "generate", "model", "-n", "400", "--max-new-tokens", "40"],
        pipesize=4096,  # a part of what it writes, so that it is not done before the reader goes
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(200) == 1
    assert err == ""


def test_a_real_full_disk(folder):
    disk = folder / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (disk / "x.npz").write_text("old")
        status, _, err = run("encode", "model", *["--text", "the cat"] * 9, "--output", "disk/x.npz")
        assert_one_sentence(status, err)
        assert "x.npz cannot be written: No space left on device: free some space" in err
        assert os.listdir(disk) == ["x.npz"] and (disk / "x.npz").read_text() == "old"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")])
def test_an_allocation_that_fails_is_told(folder, monkeypatch, error):
    def failing(path):
        raise error

    monkeypatch.setattr("latentlm.loading.load", failing)
    status, _, err = run("generate", "model")
    assert_one_sentence(status, err)
    assert "does not fit in memory: take a smaller model" in err


def test_a_defect_keeps_its_traceback(folder, monkeypatch):
    def failing(path):
        raise RuntimeError("a defect")

    monkeypatch.setattr("latentlm.loading.load", failing)
    monkeypatch.setattr(sys, "argv", ["latentlm", "generate", "model"])
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main()
