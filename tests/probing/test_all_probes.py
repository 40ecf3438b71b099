"""The probes that there are, and all of them at once."""

import pytest
from tests.probing import worlds
from tests.toy import three_verbs

from latentlm import InputError
from latentlm.probing import Texts, probe_all, probe_named, probe_names, probes

NEW = '''
import pandas as pd

from latentlm.errors import InputError
from latentlm.probing.result import ProbeResult


def {name}(space, texts, *, times: int = 1, seed: int = 0):
    """A new one.

    Args:
        times: how often.
    """
    if {fails}:
        raise InputError("this <b>cannot</b> be asked of it.")
    return ProbeResult("{name}", "A new one.", pd.DataFrame({{"seed": [seed], "texts": [len(texts)]}}))
'''


@pytest.fixture
def new_probes(tmp_path, monkeypatch):
    """A folder of probes of its own with one that runs and one that cannot."""
    folder = tmp_path / "probes"
    folder.mkdir()
    (folder / "brandnew.py").write_text(NEW.format(name="brandnew", fails=False))
    (folder / "failing.py").write_text(NEW.format(name="failing", fails=True))
    (folder / "_shared.py").write_text("")
    monkeypatch.setattr(probes, "__path__", [str(folder)])
    yield folder
    for name in ("brandnew", "failing"):
        __import__("sys").modules.pop(f"{probes.__name__}.{name}", None)


def test_those_that_come_with_it():
    assert {"clusters", "neighbours", "similarity", "linguistic", "definitions"} <= set(probe_names())
    for name in probe_names():
        assert probe_named(name).__name__ == name and probe_named(name).__doc__


def test_a_new_file_is_a_probe(new_probes):
    assert probe_names() == ["brandnew", "failing"]
    result = probe_named("brandnew")(None, Texts(("a",)))
    assert result.table["texts"].tolist() == [1]


def test_an_unknown_one():
    with pytest.raises(InputError, match=r"there is no probe 'nothing': give one of .*clusters.*, or all"):
        probe_named("nothing")


def test_one_that_cannot_be_asked_is_skipped_with_its_reason(new_probes, tmp_path):
    space, told = worlds.space("gpt_vae", seed=7), []
    results, skipped = probe_all(
        space, Texts(worlds.words(3)), output=tmp_path / "out", title="A <title>", on_probe=told.append
    )
    assert told == ["brandnew", "failing"]
    assert [one.name for one in results] == ["brandnew"]
    assert results[0].table["seed"].tolist() == [7]  # the space's
    assert skipped == {"failing": "this <b>cannot</b> be asked of it."}
    report = (tmp_path / "out" / "report.html").read_text()
    assert "this &lt;b&gt;cannot&lt;/b&gt; be asked of it." in report and "A &lt;title&gt;" in report
    assert "3 texts" in report and "seed 7" in report
    assert (tmp_path / "out" / "brandnew.json").exists() and not (tmp_path / "out" / "failing.json").exists()


def test_a_defect_is_no_reason_to_go_on(new_probes):
    (new_probes / "failing.py").write_text("def failing(space, texts):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        probe_all(worlds.space("gpt_vae"), Texts(worlds.words(3)))


def test_a_place_that_cannot_be_written_is_said_before_the_work(new_probes, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    space = worlds.space("gpt_vae")
    monkeypatch.setattr(space, "infer", lambda texts: pytest.fail("it was inferred"))
    with pytest.raises(InputError, match="file cannot be made a folder"):
        probe_all(space, Texts(worlds.words(3)), output=tmp_path / "file")


def test_nothing_is_written_unless_asked(new_probes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    probe_all(worlds.space("gpt_vae"), Texts(worlds.words(3)))
    assert [path.name for path in tmp_path.iterdir()] == ["probes"]


def test_a_model_of_three_verbs_will_do(tmp_path):
    results, _ = probe_all(worlds.space_of(three_verbs()), Texts(worlds.words(12)), output=tmp_path)
    assert "neighbours" in [one.name for one in results]
    assert "inference: its own" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("family", worlds.KINDS)
@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow), 12])
def test_every_probe_answers_or_says_why_not(family, number, tmp_path):
    """Texts of which nothing is known, of every kind of latent: a result or one sentence, and never a defect."""
    try:
        results, skipped = probe_all(worlds.space(family), Texts(worlds.words(number)), output=tmp_path)
    except InputError as error:
        assert number < 3 and str(error).startswith("no probe can be asked of these texts; arithmetic: ")
        assert not (tmp_path / "report.html").exists()
        return
    assert {*(one.name for one in results), *skipped} == set(probe_names())
    assert all(why.endswith(".") and "\n" not in why for why in skipped.values())
    assert "<html" in (tmp_path / "report.html").read_text()
