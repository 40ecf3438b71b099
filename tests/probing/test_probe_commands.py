"""`latentlm probe`: each probe is a command with its own options, and a mistake ends in one sentence."""

import inspect
import json

import numpy as np
import pandas as pd
import pytest
from tests.command import assert_one_sentence, run
from tests.training.runs import trained, unchecked

from latentlm.probe_commands import _help
from latentlm.probing import probe_named, probe_names


@pytest.fixture(autouse=True)
def as_people_run_it():
    with unchecked():
        yield


@pytest.fixture(scope="module")
def folder():
    return str(trained("gpt_vae"))


def probe(*arguments):
    return run("probe", *map(str, arguments))


# ---- help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("probe",)])
def test_without_arguments_there_is_help_as_it_is(arguments):
    status, out, err = run(*arguments)
    assert status == 2 and out == ""
    lines = err.splitlines()
    assert lines[0].startswith("Usage: ") and "Commands:" in lines and len(lines) > 10
    assert "latentlm: " not in err and "Traceback" not in err


def test_help_lists_every_probe_with_a_line_of_its_own():
    status, out, _ = probe("--help")
    assert status == 0
    commands = [
        line.split()[0] for line in out.split("Commands:")[1].splitlines() if line.startswith("  ") and line[2] != " "
    ]
    assert commands == [*probe_names(), "all"]
    assert "Example: latentlm probe" in out


@pytest.mark.parametrize("name", [*probe_names(), "all"])
def test_help_of_each_probe(name):
    status, out, _ = probe(name, "--help")
    assert status == 0
    assert f"Example: latentlm probe {name}" in out
    options = out.split("Options:")[1]
    for option in ("--data", "--output", "--limit", "--factor-table", "--pool", "--part", "--seed"):
        assert f"  {option} " in options
    assert options.count("  --seed ") == 1


@pytest.mark.parametrize("name", probe_names())
def test_every_argument_of_a_probe_is_explained(name):
    for argument, parameter in inspect.signature(probe_named(name)).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert _help(probe_named(name), argument), argument


def test_arguments_of_a_probe_are_its_options():
    _, out, _ = probe("clusters", "--help")
    assert "--method" in out and "pca, tsne or umap" in out and "[default: tsne]" in out


# ---- runs --------------------------------------------------------------------------------------------------------


def test_a_probe_prints_its_table_and_leaves_its_files(folder, tmp_path):
    status, out, err = probe(
        "clusters", folder, "--data", "builtin:sentences", "--limit", 40, "--factors", "tense", "--factors", "number",
        "--method", "pca", "--k", 3, "--output", tmp_path / "new" / "out", "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert status == 0, err
    assert "40 texts" in out and "tense" in out and "topic" not in out
    left = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert left == ["clusters.csv", "clusters.html", "clusters.json", "clusters.png"]
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found == json.loads((tmp_path / "new" / "out" / "clusters.json").read_text())
    assert [row["factor"] for row in found["table"]] == ["tense", "number"]


@pytest.mark.slow
def test_all_leaves_one_page(folder, tmp_path):
    arguments = ("--data", "builtin:sentences", "--limit", 60, "--output", tmp_path, "--seed", 3)
    status, out, err = probe("all", folder, *arguments)
    assert status == 0, err
    report = (tmp_path / "report.html").read_text()
    for name in probe_names():
        ran = (tmp_path / f"{name}.json").exists()
        assert ran != (f"{name} was not run: " in out)
        assert f'<section id="{name}">' in report if ran else f"<b>{name}</b> was not run" in report
    assert (tmp_path / "clusters.json").exists() and "seed 3" in report


def test_factors_of_a_table_and_of_the_first_rows(folder, tmp_path):
    (tmp_path / "texts.txt").write_text("".join(f"the cat {row} sat\n" for row in range(30)))
    (tmp_path / "factors.csv").write_text("f,one\n" + "".join(f"{'ab'[row % 2]},c\n" for row in range(30)))
    given = ("--data", tmp_path / "texts.txt", "--factor-table", tmp_path / "factors.csv", "--limit", 20, "--k", 3)
    status, _, err = probe("clusters", folder, *given, "--json", tmp_path / "f.json")
    assert status == 0, err
    rows = json.loads((tmp_path / "f.json").read_text())["table"]
    assert [(row["factor"], row["texts"]) for row in rows] == [("f", 20)]  # `one` says nothing


@pytest.mark.parametrize("family", ["ltm", "gp_vae"])
def test_parts_of_latents(family, tmp_path):
    given = ("neighbours", trained(family), "--data", "builtin:sentences", "--limit", 15)
    distances = []
    for options in [(), ("--part", 0), ("--part", 1)]:
        status, _, err = probe(*given, *options, "--output", tmp_path)
        assert status == 0, err
        distances.append(pd.read_csv(tmp_path / "neighbours-neighbours-of-the-first-texts.csv")["distance"].to_numpy())
    assert np.abs(distances[0] - distances[1]).max() > 1e-6 and np.abs(distances[1] - distances[2]).max() > 1e-6


# ---- mistakes ----------------------------------------------------------------------------------------------------

MISTAKES = [
    ("nothing MODEL --data texts.txt", "there is no probe 'nothing': give one of"),
    ("neighbours", "MODEL"),
    ("neighbours MODEL", "--data"),
    ("neighbours ./none --data texts.txt", "none"),
    ("neighbours CONTROL --data texts.txt", "Autoregressive has no latents: there is nothing to probe"),
    ("all CONTROL --data texts.txt --output out", "Autoregressive has no latents"),
    ("all MODEL --data texts.txt", "--output"),
    ("neighbours MODEL --data none.txt", "none.txt does not exist"),
    ("neighbours MODEL --data empty.txt", "empty.txt holds no text"),
    ("neighbours MODEL --data texts.txt --output one.csv", "one.csv cannot be made a folder"),
    ("all MODEL --data texts.txt --output texts.txt", "texts.txt is named twice"),
    ("neighbours MODEL --data texts.txt --json none/f.json", "none/f.json cannot be written"),
    ("neighbours MODEL --data texts.txt --limit 0", "--limit"),
    ("neighbours MODEL --data texts.txt --queries 4", "neighbours needs 4 texts, and there are 3"),
    ("neighbours MODEL --data texts.txt --limit 2 --queries 3", "neighbours needs 3 texts, and there are 2"),
    ("neighbours MODEL --data texts.txt --queries many", "--queries"),
    ("neighbours MODEL --data texts.txt --bogus", "--bogus"),
    ("neighbours MODEL --data texts.txt --pool most", "pool must be one of mean, flat"),
    ("neighbours MODEL --data texts.txt --part 0", "a latent of 4 numbers has no parts: leave part out"),
    ("neighbours MODEL --data texts.txt --seed x", "--seed"),
    ("clusters MODEL --data texts.txt --seed -5", "from 0 to 4,000,000,000, not -5"),
    ("linguistic MODEL --data texts.txt --seed 5000000000", "not 5,000,000,000"),
    ("layers MODEL --data texts.txt --part 1", "leave part out"),
    ("neighbours MODEL --data texts.txt --batch-size 0", "--batch-size"),
    ("clusters MODEL --data texts.txt", "the texts have no factors"),
    ("clusters MODEL --data texts.txt --factor-table short.csv", "row 3 is missing"),
    ("clusters MODEL --data texts.txt --factor-table one.csv --k 1", "the factor 'f' has a single value"),
    ("clusters MODEL --data texts.txt --factor-table texts.txt", "factors are read from a .csv or a .tsv"),
    ("clusters MODEL --data builtin:sentences --limit 20 --factors mood --k 2", "there is no factor 'mood'"),
    ("clusters MODEL --data builtin:sentences --limit 20 --method mds --k 2", "method must be one of"),
    ("linguistic MODEL --data builtin:sentences --limit 5 --factors tense", "the factor 'tense' has no two values"),
    ("similarity MODEL --data texts.txt", "nothing says how alike these texts are"),
    ("definitions MODEL --data texts.txt", "definitions need the term of each text"),
]


@pytest.mark.parametrize(("command", "words"), MISTAKES, ids=lambda value: value)
def test_a_mistake_ends_in_one_sentence(folder, tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("the cat sat\nsome dogs\na garden\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.csv").write_text("f\na\nb\n")
    (tmp_path / "one.csv").write_text("f\na\na\na\n")
    places = {"MODEL": folder, "CONTROL": str(trained("autoregressive"))}
    status, _, err = probe(*(places.get(word, word) for word in command.split()))
    assert_one_sentence(status, err)
    assert words in err
