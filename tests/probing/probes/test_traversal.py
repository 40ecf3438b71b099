"""One dimension moved: where to, what else moves, and what is written."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from tests.command import assert_one_sentence, run
from tests.probing.written import WRITING, conditional_space, labelled, saved, some_texts, space_of
from tests.training.runs import unchecked

from latentlm import InputError
from latentlm.probing import Texts
from latentlm.probing.probes.traversal import move, prior_quantiles, traversal

TEXTS = some_texts(12)


def test_quantiles_of_the_prior_are_those_of_scipy():
    shares = np.array([0.001, 0.05, 0.3, 0.5, 0.95])
    np.testing.assert_allclose(prior_quantiles(shares), norm.ppf(shares), atol=1e-12)


def written_latents(space, monkeypatch):
    """What is given to `write`: the moved ones, then the control's."""
    given, write = [], space.write

    def noticing(latents, *rest):
        given.append([np.array(z) for z in latents])
        return write(latents, *rest)

    monkeypatch.setattr(space, "write", noticing)
    return given


@pytest.mark.parametrize("family", WRITING)
def test_one_dimension_goes_through_the_priors_quantiles(family, monkeypatch):
    space = space_of(family)
    given = written_latents(space, monkeypatch)
    result = traversal(space, TEXTS, dimensions=[3, 1], steps=3, starts=2, low=0.1, high=0.8)
    moved, control = given
    rows = result.details["texts that were written"]
    assert len(moved) == len(control) == len(rows) == 2 * 2 * 3
    means = space.means(TEXTS)
    for place, z in enumerate(moved):
        start, dimension = means[place // 6], [3, 1][place // 3 % 2]
        prior = space.model.prior(1, len(start))
        centre, scale = (x[0].detach().double().numpy()[..., dimension] for x in (prior.mean, prior.variance.sqrt()))
        share = [0.1, 0.45, 0.8][place % 3]
        np.testing.assert_allclose(z[..., dimension], norm.ppf(share, centre, scale), rtol=1e-5, atol=1e-6)
        others = np.delete(np.arange(space.event[-1]), dimension)
        np.testing.assert_allclose(z[..., others], start[..., others], atol=1e-5)
        assert rows["quantile"][place] == share and rows["dimension"][place] == dimension
        # the control goes as far, in prior standard deviations, and elsewhere
        far, near = (np.linalg.norm(space.standardised(one) - space.standardised(start)) for one in (control[place], z))
        assert far == pytest.approx(near, rel=1e-4)
        assert near < 1e-6 or np.abs(space.standardised(control[place] - z)).max() > 1e-3
    assert rows["written"].tolist() == space.write(moved)
    assert list(result.table["dimension"]) == [3, 1] and list(result.table["moves"]) == [4, 4]


@pytest.mark.parametrize("family", WRITING)
def test_figures_are_those_of_the_rows(family):
    space = space_of(family, changes={"initializer_range": 0.6} if family != "lang_vae" else {})
    result = traversal(space, TEXTS, steps=4, starts=3, low=0.001, high=0.999)
    rows = result.details["texts that were written"]
    assert rows["written"].nunique() > 1
    for _, row in result.table.iterrows():
        for name in ("", ", random"):
            texts = rows.loc[rows["dimension"] == row["dimension"], f"written{name}"].tolist()
            changes = [a != b for place, (a, b) in enumerate(pairwise(texts)) if place % 4 != 3]
            assert row[f"changed{name}"] == pytest.approx(np.mean(changes))
            assert (row[f"edit distance{name}"] > 0) == any(changes)
    assert (rows["from the lowest"] <= 1).all()
    assert result.figure() is not None


def test_the_dimensions_that_vary_most_are_taken():
    space = space_of("gpt_vae")
    spread = space.codes(TEXTS).std(0)
    result = traversal(space, TEXTS)
    assert list(result.table["dimension"]) == list(np.argsort(-spread)[:4])
    np.testing.assert_allclose(result.table["spread"], np.sort(spread)[::-1][:4], rtol=1e-5)


@pytest.mark.parametrize("variance", [None, 9.0])
def test_the_posteriors_quantiles_are_those_of_their_mixture(variance, monkeypatch):
    space = space_of("gpt_vae")
    texts = some_texts(800)
    if variance is not None:
        monkeypatch.setattr(space, "variances", lambda texts: [np.full(6, variance)] * len(texts))
    values = traversal(space, texts, over="posterior", dimensions=[2], steps=3, low=0.1, high=0.9, starts=1)
    found = values.details["texts that were written"]["value"].to_numpy()
    means = np.array([space.standardised(z)[2] for z in space.means(texts)])
    spreads = np.sqrt([z[2] for z in space.variances(texts)])  # the prior's variance is 1
    for value, share in zip(found, [0.1, 0.5, 0.9], strict=True):
        assert norm.cdf(value, means, spreads).mean() == pytest.approx(share, abs=0.04)
    again = traversal(space, texts, over="posterior", dimensions=[2], steps=3, low=0.1, high=0.9, starts=1)
    pd.testing.assert_frame_equal(values.table, again.table)


@pytest.mark.parametrize(("family", "part"), [("ltm", 1), ("gp_vae", 0)])
def test_a_part_moves_alone(family, part, monkeypatch):
    space = space_of(family, part=part)
    given = written_latents(space, monkeypatch)
    result = traversal(space, TEXTS, dimensions=[0], steps=2, starts=1)
    start = space.means(TEXTS)[0]
    others = np.delete(np.arange(len(start)), part)
    for z in (*given[0], *given[1]):
        np.testing.assert_allclose(z[others], start[others], atol=1e-6)
    assert np.abs(given[0][0][part][..., 0] - given[0][1][part][..., 0]).min() > 1
    assert f"in part {part}" in result.about


def test_a_move_leaves_its_latent_as_it_was():
    z = np.zeros((2, 3, 4))
    moved = move(z, 1, 5.0, part=0)
    assert not z.any() and moved[0, :, 1].tolist() == [5, 5, 5] and moved.sum() == 15
    assert move(z, 1, 5.0).sum() == 30


def test_a_single_text_of_one_word():
    for family in WRITING:
        result = traversal(space_of(family), Texts(("w3",)), starts=1)
        assert len(result.table) == 4
        assert family == "gp_vae" or result.table["spread"].max() < 1e-6  # positions differ, one text does not


def test_texts_of_a_conditional_model_are_written_under_their_labels(monkeypatch):
    space, given = conditional_space(monkeypatch)
    texts = labelled(TEXTS)
    traversal(space, texts, steps=2, starts=2, dimensions=[0, 1])
    assert given == [[texts.labels[0]] * 4 + [texts.labels[1]] * 4] * 2
    with pytest.raises(InputError, match="conditional: give the labels"):
        traversal(space, TEXTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "both"}, "over must be one of prior, posterior, not 'both'"),
        ({"low": 0.0}, "between 0 and 1, not from 0 to 0.95"),
        ({"low": 0.9, "high": 0.1}, "not from 0.9 to 0.1"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"starts": 13}, "traversal needs 13 texts, and there are 12"),
        ({"starts": 0}, "traversal needs at least 1 text, not 0"),
        ({"dimensions": [6]}, r"from 0 to 5 for this model, not \[6\]"),
        ({"dimensions": [1, 1]}, "different numbers"),
        ({"dimensions": []}, "different numbers"),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    with pytest.raises(InputError, match=message):
        traversal(space_of("gpt_vae"), TEXTS, **options)


def test_a_position_that_a_text_lacks():
    with pytest.raises(InputError, match="'w3' has no position 5: start from longer texts"):
        traversal(space_of("gp_vae", part=5), TEXTS)


def test_traversal_through_the_command_line(tmp_path):
    given = saved("gpt_vae", tmp_path, TEXTS)
    options = ["--dimensions", "4", "--dimensions", "0", "--steps", "3", "--json", str(tmp_path / "found.json")]
    with unchecked():
        status, _, err = run("probe", "traversal", *given, *options, "--output", str(tmp_path / "out"))
        bad = run("probe", "traversal", *given, "--over", "both")
    assert status == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    expected = traversal(space_of("gpt_vae"), TEXTS, dimensions=[4, 0], steps=3)
    assert [row["dimension"] for row in found["table"]] == [4, 0]
    assert [row["written"] for row in found["texts that were written"]] == expected.details["texts that were written"][
        "written"
    ].tolist()
    assert (tmp_path / "out" / "traversal.png").stat().st_size > 10_000
    assert_one_sentence(bad[0], bad[2])
