"""Results of probes: the files they leave, and a page that is safe to open and needs nothing else."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from latentlm import InputError
from latentlm.probing import ProbeResult, Scatter
from latentlm.probing.page import page
from latentlm.probing.result import MOST_GROUPS

EVIL = "<script>alert('&')</script>"
TABLE = pd.DataFrame({"what": [EVIL, "b"], "figure": [0.5, float("nan")], "number": [1, 2]})


def scatter(texts=(EVIL, "two", "three"), groups=(EVIL, "b", "b"), points=None):
    points = np.array([[0.0, 1.0], [2.0, 3.0], [1.0, 1.0]]) if points is None else points
    return Scatter(points, list(texts), list(groups), EVIL)


def drawn(panel):
    panel.plot([0, 1], [1, 0])


def result(**changes):
    given = {"details": {"every row": TABLE}, "panels": [drawn], "scatters": [scatter()]} | changes
    return ProbeResult("tried", f"About {EVIL}", TABLE, **given)


# ---- files -------------------------------------------------------------------------------------------------------


def test_what_is_saved(tmp_path):
    written = result().save(tmp_path / "new" / "folder")
    names = ["tried.json", "tried.csv", "tried-every-row.csv", "tried.png", "tried.html"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(
        names
    )  # nothing half written
    assert all(path.stat().st_size for path in written)


def test_json_has_null_for_what_is_no_number(tmp_path):
    result().save(tmp_path)
    text = (tmp_path / "tried.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)
    rows = [{"what": EVIL, "figure": 0.5, "number": 1}, {"what": "b", "figure": None, "number": 2}]
    assert found == {"probe": "tried", "about": f"About {EVIL}", "table": rows, "every row": rows}


def test_csv_can_be_read_again(tmp_path):
    result().save(tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tried.csv"), TABLE)


def test_figures_keep_their_digits():
    table = pd.DataFrame({"x": [1 / 3]})
    assert ProbeResult("tried", "", table).json()["table"] == [{"x": pytest.approx(1 / 3, rel=1e-14)}]


def test_a_table_alone_has_no_picture(tmp_path):
    alone = result(panels=[], scatters=[])
    assert "tried.png" not in [path.name for path in alone.save(tmp_path)]
    with pytest.raises(InputError, match="the probe tried has no picture"):
        alone.figure()


@pytest.mark.parametrize("panels", [1, 2, 3, 5])
def test_the_picture_has_all_panels(tmp_path, panels):
    made = result(panels=[drawn] * (panels - 1))
    assert len(made.figure().axes) == panels
    made.save(tmp_path)
    picture = np.asarray(Image.open(io.BytesIO((tmp_path / "tried.png").read_bytes())))
    assert picture.std() > 0


def test_dollars_are_no_formulae(tmp_path):
    def labelled(panel):
        panel.set(title=r"$\nothing$", yticks=[0, 1], yticklabels=["$5 and $6", r"$\x{$"])
        panel.plot([0, 1], [0, 1], label=r"$\y$")
        panel.legend()

    costs = scatter(groups=[r"$\costs$", "$_$^$", "b"])
    assert len(result(panels=[labelled], scatters=[costs]).save(tmp_path)) == 5


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be made a folder"):
        result().save(tmp_path / "file")


# ---- the page ----------------------------------------------------------------------------------------------------


def whole():
    return page(f"Probes {EVIL}", [result(), result()], f"of {EVIL}", {f"other {EVIL}": f"because {EVIL}"})


def test_texts_are_never_code():
    text = whole()
    assert "<script" not in text.lower()
    assert text.count("&lt;script&gt;") > 10


def test_the_page_needs_no_network_and_no_other_file():
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", whole())
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "http:" not in whole() and "https:" not in whole() and "@import" not in whole()


def test_the_page_says_what_was_not_run():
    text = page("Probes", [result()], "", {"other": "the texts have no factors."})
    assert "<b>other</b> was not run: the texts have no factors." in text


def test_points_show_their_texts_under_the_pointer():
    text = scatter(texts=("a < b", "two", "three"), groups=("x", "y", "y")).svg()
    assert text.count("<circle") == 3
    assert "<title>x: a &lt; b</title>" in text and "<title>y: three</title>" in text


def test_points_stand_in_the_picture_and_upwards_is_up():
    text = scatter(texts="abc", groups="xyz").svg()
    places = np.array(re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text), dtype=float)
    assert places.min() >= 0 and places.max() <= 420
    assert places[1, 0] > places[2, 0] > places[0, 0]
    assert places[1, 1] < places[0, 1]  # the higher number nearer the top


@pytest.mark.parametrize("points", [np.zeros((3, 2)), np.zeros((1, 2))])
def test_points_in_one_place(points):
    one = scatter(texts=["t"] * len(points), groups=["g"] * len(points), points=points)
    assert "nan" not in one.svg()
    ProbeResult("tried", "", TABLE, scatters=[one]).figure().canvas.draw()


def test_rare_groups_share_a_colour():
    groups = [f"g{place}" for place in range(MOST_GROUPS + 2) for _ in range(20 - place)]
    colours, legend = scatter(texts=groups, groups=groups, points=np.zeros((len(groups), 2))).colours()
    assert list(legend) == [*(f"g{place}" for place in range(MOST_GROUPS)), "other"]
    of_group = dict(zip(groups, colours, strict=True))
    assert of_group[f"g{MOST_GROUPS}"] == of_group[f"g{MOST_GROUPS + 1}"] == legend["other"]
    assert len(set(colours)) == MOST_GROUPS + 1


def test_what_is_unknown_has_no_colour_of_its_own():
    groups = ["a", None, "b", None, None, "a"]
    colours, legend = scatter(texts=list("uvwxyz"), groups=groups, points=np.zeros((6, 2))).colours()
    assert list(legend) == ["a", "b", "unknown"]
    assert [colour == legend["unknown"] for colour in colours] == [group is None for group in groups]


def test_as_many_groups_as_colours_need_no_other():
    groups = [f"g{place}" for place in range(MOST_GROUPS)]
    colours, legend = scatter(texts=groups, groups=groups, points=np.zeros((MOST_GROUPS, 2))).colours()
    assert "other" not in legend and len(set(colours)) == MOST_GROUPS


def test_long_tables_are_shown_in_part():
    rows = pd.DataFrame({"row": [f"row {number}." for number in range(100)]})
    text = ProbeResult("tried", "", TABLE, {"all": rows}).html()
    assert "the first 40 of 100 rows" in text and "row 39." in text and "row 40." not in text
