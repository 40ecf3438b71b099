"""Files appear whole or not at all."""

import os
import stat

import pytest

from latentlm import InputError
from latentlm.files import check_writable, whole_file, write_whole


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "figures.json"
    with whole_file(path) as file:
        file.write(b"half ")
        assert not path.exists()
        file.write(b"whole")
    assert path.read_bytes() == b"half whole"
    assert os.listdir(tmp_path) == ["figures.json"]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    write_whole(tmp_path / "text", "β ≤ 日本\n")
    assert (tmp_path / "text").read_bytes() == "β ≤ 日本\n".encode()


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_after_a_failure_all_is_as_it_was(tmp_path, failure, old):
    path = tmp_path / "figures.json"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(failure), whole_file(path) as file:
        file.write(b"half")
        raise failure
    assert os.listdir(tmp_path) == (["figures.json"] if old else [])
    assert old is None or path.read_bytes() == old


def test_everybody_may_read_the_file(tmp_path):
    write_whole(tmp_path / "text", "")
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == 0o644


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path, reason in [
        (tmp_path / "missing" / "x.json", "does not exist"),
        (tmp_path / "folder", "is a folder"),
        (tmp_path / "file" / "x.json", "does not exist"),
    ]:
        with pytest.raises(InputError, match=reason):
            check_writable(path)
        with pytest.raises(InputError, match=reason), whole_file(path):
            pytest.fail("the body must not run")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="permission"):
        check_writable(tmp_path / "x.json")
    tmp_path.chmod(0o755)


def test_a_plain_name_is_written_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_whole("x.json", "{}")
    assert (tmp_path / "x.json").read_text() == "{}"
