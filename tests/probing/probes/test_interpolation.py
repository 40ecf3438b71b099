"""Paths of texts: figures by hand, ends that are the texts' own, and every family."""

import sys

import numpy as np
import pytest
from scipy.stats import spearmanr
from tests.command import assert_one_sentence, run
from tests.probing.written import WRITING, conditional_space, labelled, saved, some_texts, space_of
from tests.toy import pretrained_part
from tests.training.runs import unchecked

from latentlm import InputError
from latentlm.probing import Texts
from latentlm.probing.distances import TextDistance
from latentlm.probing.probes.interpolation import _way, interpolation, monotonicity, quality, smoothness

TEXTS = some_texts(8)


def distances_of(points):
    points = np.asarray(points, dtype=float).reshape(len(points), -1)
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def test_figures_of_a_straight_way():
    distances = distances_of([0, 1, 3, 4])
    assert smoothness(distances) == pytest.approx(1) and monotonicity(distances) == pytest.approx(1)
    assert quality(distances[:, [0, -1]], 4.0) == pytest.approx(1)


def test_figures_of_ways_worked_out_by_hand():
    assert smoothness(distances_of([0, 2, 1, 3])) == pytest.approx(3 / 5)
    assert smoothness(distances_of([0, 5, 0])) == 0
    assert np.isnan(smoothness(distances_of([1, 1, 1])))
    # over the corner of a triangle of sides 3, 4 and 5: 5 ÷ (3 + 4)
    distances = distances_of([[0, 0], [3, 0], [3, 4]])
    assert quality(distances[:, [0, -1]], 5.0) == pytest.approx(5 / 7) and smoothness(distances) == pytest.approx(5 / 7)
    assert np.isnan(quality(distances[:, [0, -1]], 0.0)) and np.isnan(quality(distances[:2, [0, -1]], 5.0))
    assert np.isnan(monotonicity(distances_of([2, 2, 2])))
    assert monotonicity(distances_of([0, 2, 1, 3])) == pytest.approx(0.8)  # 1 − 6 · 2 ÷ (4 · 15)


def test_monotonicity_is_spearmans_correlation():
    generator = np.random.default_rng(0)
    for _ in range(20):
        points = generator.integers(0, 4, (6, 2))  # with ties
        distances = distances_of(points)
        difference = distances[0] - distances[-1]
        if len(set(difference)) > 1:
            expected = spearmanr(range(6), difference).statistic
            assert monotonicity(distances) == pytest.approx(expected)


@pytest.mark.parametrize("family", WRITING)
def test_paths_of_each_family_begin_and_end_as_their_texts(family):
    space = space_of(family)
    result = interpolation(space, TEXTS, pairs=3, steps=4)
    paths = ["linear", "spherical"] + (["gp"] if family == "gp_vae" else [])
    assert list(result.table["path"]) == paths and set(result.table["pairs"]) == {3}
    rows = result.details["steps of each path"].set_index(["path", "pair", "step"])
    assert len(rows) == len(paths) * 3 * 5
    means = space.means(TEXTS)
    for path in paths:
        for pair in range(3):
            a, b = means[2 * pair], means[2 * pair + 1]
            if family == "gp_vae" and path != "gp":
                a, b = a[: len(b)], b[: len(a)]
            assert rows.loc[(path, pair, 0), "text"] == space.write([a])[0]
            assert rows.loc[(path, pair, 4), "text"] == space.write([b])[0]
    assert ((result.table["smoothness"].dropna() >= 0) & (result.table["smoothness"].dropna() <= 1 + 1e-9)).all()
    assert (result.table["quality"] <= 1 + 1e-9).all()
    assert result.figure() is not None


def test_ways_in_coordinates_of_the_prior():
    """Of a process they are those of its noise; the ends are exact and the length of the noise goes evenly."""
    space = space_of("gp_vae")
    a, b = [z for z in space.means(TEXTS) if len(z) > 3][:2]
    length = min(len(a), len(b))
    way = _way(space, "spherical", a, b, 4)
    np.testing.assert_array_equal(way(0.0), a[:length])
    np.testing.assert_array_equal(way(1.0), b[:length])
    lags = np.subtract.outer(np.arange(length), np.arange(length))
    scales, dim = [1.0, 4.0], 4
    factors = [
        np.linalg.cholesky(np.exp(-(lags**2) / 2 / scales[dimension // 2] ** 2) + 0.1 * np.eye(length))
        for dimension in range(dim)
    ]

    def norm(z):
        return np.linalg.norm([np.linalg.solve(factors[dimension], z[:, dimension]) for dimension in range(dim)])

    assert norm(way(0.25)) == pytest.approx(0.75 * norm(a[:length]) + 0.25 * norm(b[:length]), rel=1e-4)


def test_the_gp_path_keeps_beginning_and_end():
    space = space_of("gp_vae")
    means = sorted(space.means(TEXTS), key=len)
    a, b = means[-1], means[-3]
    way = _way(space, "gp", a, b, 2)
    np.testing.assert_array_equal(way(0.0), a)
    np.testing.assert_array_equal(way(1.0), b)
    middle = way(0.5)
    length = round((len(a) + len(b)) / 2)
    cut = round(length / 2)
    assert len(middle) == length
    np.testing.assert_allclose(middle[: cut - 1], a[: cut - 1], rtol=1e-6)
    np.testing.assert_allclose(middle[cut + 1 :], b[len(b) - (length - cut - 1) :], rtol=1e-6)
    # between: the mean of all that is known around it, by numpy
    known = np.ones(length, dtype=bool)
    known[cut - 1 : cut + 1] = False
    lags = np.subtract.outer(np.arange(length), np.arange(length))
    for dimension in range(4):
        covariance = np.exp(-(lags**2) / 2 / [1.0, 4.0][dimension // 2] ** 2) + 0.1 * np.eye(length)
        expected = covariance[np.ix_(~known, known)] @ np.linalg.solve(
            covariance[np.ix_(known, known)], middle[known, dimension]
        )
        np.testing.assert_allclose(middle[~known, dimension], expected, rtol=1e-4, atol=1e-5)
    # a text far longer than the other has no more than itself to give
    one = means[0][:1]
    for share in np.linspace(0, 1, 9):
        assert len(_way(space, "gp", one, a, 2)(float(share))) == round((1 - share) + share * len(a))


def test_controls_fall_where_the_order_matters():
    """A latent that decides the text: its way is smooth, and the same steps in another order are not."""
    space = space_of("gpt_vae", changes={"initializer_range": 0.6})
    table = interpolation(space, some_texts(20), pairs=10, steps=8, paths=["linear"]).table.iloc[0]
    assert table["that move"] > 2
    assert table["smoothness"] > table["smoothness, shuffled"]
    assert table["monotonicity"] > table["monotonicity, shuffled"]


def test_figures_of_a_path_and_of_another_pairs_steps():
    space = space_of("gpt_vae")
    details = interpolation(space, TEXTS, pairs=3, steps=4, paths=["spherical"]).details
    steps, measure = details["steps of each path"], TextDistance(space)
    for pair in range(3):
        ends = list(TEXTS.texts[2 * pair : 2 * pair + 2])
        row = details["figures of each path"].iloc[pair]
        own, other = (steps.loc[steps["pair"] == place, "text"].tolist() for place in (pair, (pair + 1) % 3))
        for name, some in (("quality", own), ("quality, another pair's", other)):
            apart = measure.between(ends[:1], ends[1:])[0, 0]
            expected = np.mean([apart / measure.between([text], ends).sum() for text in some[1:-1]])
            assert row[name] == pytest.approx(expected)
        assert row["different texts"] == len(set(own))
        if len(set(own)) > 1:
            assert row["smoothness"] == pytest.approx(smoothness(measure.between(own, own)))


def test_a_sentence_encoder_measures_instead():
    result = interpolation(space_of("gpt_vae"), TEXTS, pairs=2, distance="sentence", encoder=pretrained_part("bert"))
    assert "mean-pooled" in result.about and len(result.table) == 2


def test_equal_texts_of_one_word():
    for family in WRITING:
        result = interpolation(space_of(family), Texts(("w3", "w3")), pairs=1, steps=2)
        assert result.table["quality"].isna().all()
        # the middle of a Gaussian process' path is neither's
        straight = result.table[result.table["path"] != "gp"]
        assert (straight["different texts"] == 1).all() and (straight["that move"] == 0).all()
        result.json()
        result.figure()


def test_steps_of_a_conditional_model_are_written_under_the_nearer_texts_labels(monkeypatch):
    space, given = conditional_space(monkeypatch)
    texts = labelled(TEXTS)
    result = interpolation(space, texts, paths=["linear"], pairs=1, steps=4)
    a, b = texts.labels[:2]
    assert given == [[a, a, b, b, b]] and "labels of the nearer text" in result.about


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ["round"]}, "paths are linear, spherical, gp, not 'round'"),
        ({"paths": ["gp"]}, "GPTVAE has no Gaussian process over time: take linear or spherical"),
        ({"steps": 1}, "at least 2 steps"),
        ({"gap": -1}, "gap from 0 on"),
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"pairs": 5}, "interpolation needs 10 texts, and there are 8"),
        ({"distance": "sentence", "pairs": 4}, "needs an encoder"),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    with pytest.raises(InputError, match=message):
        interpolation(space_of("gpt_vae"), TEXTS, **options)


def test_interpolation_through_the_command_line(tmp_path, monkeypatch):
    given = [*saved("gp_vae", tmp_path, TEXTS), "--pairs", "2"]
    with unchecked():
        paths = ["--paths", "gp", "--paths", "linear"]
        status, out, err = run("probe", "interpolation", *given, *paths, "--output", str(tmp_path / "out"))
        assert status == 0, err
        assert "gp" in out and (tmp_path / "out" / "interpolation.html").exists()
        assert (tmp_path / "out" / "interpolation-steps-of-each-path.csv").exists()
        monkeypatch.setitem(sys.modules, "ot", None)
        status, _, err = run("probe", "interpolation", *given)
    assert_one_sentence(status, err)
    assert "pip install 'latentlm[transport]'" in err
