"""Sums of latents: what they should be, where they are found, and attributes that vectors carry."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tests.command import assert_one_sentence, run
from tests.probing.written import WRITING, conditional_space, labelled, saved, some_texts, space_of
from tests.training.runs import unchecked

from latentlm import InputError
from latentlm.probing import Texts
from latentlm.probing.attributes import add_attribute, choose_attributes
from latentlm.probing.distances import cosines
from latentlm.probing.probes.arithmetic import arithmetic, draw_groups, expected_value, first_rank

TEXTS = some_texts(40)
ANALOGY = (1.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([0, 0, 1], ANALOGY, 1),  # a is b: c's
        ([1, 0, 0], ANALOGY, 1),  # c is b: a's
        ([2, 2, 2], ANALOGY, 2),
        ([1, 0, 1], ANALOGY, -1),  # 2 · 1 − 0
        ([2, 0, 1], ANALOGY, -1),
        ([1, -1, -1], ANALOGY, -1),
        ([1, 1], (0.5, 0.5), 1),
        ([1, 0], (0.5, 0.5), -1),
        ([1, 0], (1.0, 0.0), 1),
        ([3, 3, 3], (-1.0, 0.5, 0.2), -1),  # taken away
    ],
)
def test_expected_values(values, weights, expected):
    assert expected_value(values, weights) == expected


def test_one_hot_codes_are_where_their_values_say():
    """Of the code [value 0, value 1, value 2] itself, Σ w z is the expected value's code wherever one is expected."""
    hot = np.eye(3)
    for values in itertools.product(range(3), repeat=3):
        total = hot[values[0]] - hot[values[1]] + hot[values[2]]
        found = expected_value(values, ANALOGY)
        if found == -1:
            assert not any(np.array_equal(total, row) for row in hot)
        else:
            np.testing.assert_array_equal(total, hot[found])


def test_ranks_worked_out_by_hand():
    codes = np.array([[1.0, 0], [2, 0.1], [1, 1], [0, 1], [-1, 0], [0, 0]])
    fits = np.array([False, False, False, True, True, True])
    assert first_rank(np.array([3.0, 0]), codes, fits) == (4.0, 7 / 4)  # after 0, 1 and 2; cosine 0 of two that fit
    assert first_rank(np.array([3.0, 0]), codes, fits, [0, 4]) == (3.0, 5 / 3)
    assert first_rank(np.array([0, 5.0]), codes, fits) == (1.0, 7 / 4)
    assert np.isnan(first_rank(codes[0], codes, ~fits & fits)).all()


def test_the_expected_rank_of_a_random_order():
    generator = np.random.default_rng(0)
    ranks = []
    fits = np.arange(12) < 3
    for _ in range(3000):
        rank, chance = first_rank(generator.standard_normal(4), generator.standard_normal((12, 4)), fits)
        ranks.append(rank)
    assert chance == 13 / 4 and np.mean(ranks) == pytest.approx(chance, rel=0.05)


def test_cosines_of_nothing():
    assert cosines(np.array([[0.0, 0], [3, 4]]), np.array([[1.0, 1], [4, 3]])).tolist() == [0, 24 / 25]


def test_groups_want_something_else_than_their_last_text_has():
    ids = np.random.default_rng(0).integers(-1, 2, (30, 3))
    drawn, wanted = draw_groups(30, ANALOGY, ids, 50, np.random.default_rng(1))
    assert drawn.shape == (50, 3) and wanted.shape == (50, 3)
    for rows, values in zip(drawn, wanted, strict=True):
        assert len(set(rows)) == 3
        assert values.tolist() == [expected_value(column.tolist(), ANALOGY) for column in ids[rows].T]
        assert ((values != -1) & (values != ids[rows[-1]])).any()
    drawn, wanted = draw_groups(5, ANALOGY, np.zeros((5, 1), dtype=np.int64), 4, np.random.default_rng(1))
    assert wanted is None and len(drawn) == 4  # nothing to be changed
    assert draw_groups(5, (1.0, 1.0), None, 4, np.random.default_rng(1))[1] is None


@pytest.mark.parametrize(
    ("family", "operation", "weights"),
    [
        *((family, "analogy", [1, -1, 1]) for family in WRITING),
        ("gp_vae", "sum", [1, 1]),
        ("gpt_vae", "mean", [0.5, 0.5]),
    ],
)
def test_the_written_texts_are_those_of_the_sum(family, operation, weights):
    space = space_of(family)
    result = arithmetic(space, TEXTS, operation=operation, groups=4, most=2)
    groups = result.details["groups"]
    found = dict(zip(TEXTS.texts, space.means(TEXTS), strict=True))
    for _, row in groups.iterrows():
        members = [found[row[letter]] for letter, _ in zip("abc", weights, strict=False)]
        shortest = min(map(len, members))
        prior = space.model.prior(1, shortest)
        centre, scale = (x[0].detach().numpy() for x in (prior.mean, prior.variance.sqrt()))
        total = sum(w * (z[:shortest] - centre) / scale for w, z in zip(weights, members, strict=True))
        z = (centre + scale * total).astype(np.float32)
        assert row["written"] == space.write([z])[0]
        read = space.codes(Texts((row["written"],)))[0]
        assert row["cosine"] == pytest.approx(cosine(space.code(z), read), abs=1e-4)
    assert result.table["value"].notna().all()
    result.json()
    assert result.figure() is not None


def cosine(one, other):
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_figures_are_those_of_a_slow_search():
    """Each figure of analogies again, one text at a time, from the groups that were drawn."""
    space, texts = space_of("gpt_vae"), some_texts(60, seed=4)
    texts = texts.select([row for row, text in enumerate(texts.texts) if text not in texts.texts[:row]])
    result = arithmetic(space, texts, groups=12, factors=["w3", "length"], most=1)
    groups, codes = result.details["groups"], dict(zip(texts.texts, space.codes(texts), strict=True))
    facts = dict(zip(texts.texts, zip(texts.factor("w3"), texts.factor("length"), strict=True), strict=True))
    read = space.codes(Texts(tuple(groups["written"])))
    found = {"own": [], "c": [], "chance": [], "rank": [], "rank of c": [], "others": []}
    for place, (a, b, c) in enumerate(groups[["a", "b", "c"]].itertuples(index=False)):
        asked = codes[a] - codes[b] + codes[c]
        wanted = []
        for x, y, z in zip(facts[a], facts[b], facts[c], strict=True):
            wanted.append(z if x == y else x if z == y else None)
        others = [text for text in texts.texts if text not in (a, b, c)]
        fits = {
            text: all(w is None or w == fact for w, fact in zip(wanted, facts[text], strict=True)) for text in others
        }
        if not any(fits.values()):
            continue
        ranked = sorted(others, key=lambda text: -cosine(asked, codes[text]))
        found["own"].append(fits[ranked[0]])
        found["rank"].append(1 + [fits[text] for text in ranked].index(True))
        by_c = sorted(others, key=lambda text: -cosine(codes[c], codes[text]))
        found["c"].append(fits[by_c[0]])
        found["rank of c"].append(1 + [fits[text] for text in by_c].index(True))
        found["chance"].append(np.mean(list(fits.values())))
        assert groups["rank"][place] == found["rank"][-1]
    for place in range(len(groups)):
        a, b, c = groups.loc[place, ["a", "b", "c"]]
        found["others"].append(cosine(codes[a] - codes[b] + codes[c], read[place - 1]))
    table = result.table.set_index(["figure", "of"])["value"]
    figure = "share whose nearest text is as expected"
    assert table[figure, "a − b + c"] == pytest.approx(np.mean(found["own"]))
    assert table[figure, "c alone"] == pytest.approx(np.mean(found["c"]))
    assert table[figure, "by chance"] == pytest.approx(np.mean(found["chance"]))
    assert table["median rank of the nearest text that is as expected", "a − b + c"] == np.median(found["rank"])
    assert table["median rank of the nearest text that is as expected", "c alone"] == np.median(found["rank of c"])
    assert found["rank of c"] != found["rank"]
    figure = "cosine of the result and what is read in its text"
    assert table[figure, "another group's text"] == pytest.approx(np.mean(found["others"]), abs=1e-5)
    assert table[figure, "another group's text"] != pytest.approx(table[figure, "a − b + c"], abs=1e-3)


def test_a_trajectory_gets_the_vector_at_each_position(monkeypatch):
    space = space_of("gp_vae")
    (attribute,) = choose_attributes(TEXTS, "w3", seed=0)
    given, write = [], space.write
    monkeypatch.setattr(space, "write", lambda latents, *rest: given.append(latents) or write(latents, *rest))
    add_attribute(space, TEXTS, attribute, 1.0, 4, 0)
    means = space.means(TEXTS)
    after, before = (np.mean([means[row].mean(0) for row in attribute.learn[value]], axis=0) for value in (1, 0))
    for z, plain in zip(given[0], given[1], strict=True):
        np.testing.assert_allclose(z - plain, np.tile(after - before, (len(z), 1)), atol=1e-5)


def test_weights_of_one_text_give_it_back():
    space = space_of("gpt_vae")
    result = arithmetic(space, TEXTS, operation="weighted", weights=[1.0], groups=5, factors=["w3"])
    groups = result.details["groups"]
    assert groups["written"].tolist() == space.write([space.means(Texts((text,)))[0] for text in groups["a"]])
    table = result.table.set_index(["figure", "of"])["value"]
    figure = "median rank of the nearest text that is as expected"
    assert table[figure, "a"] == table[figure, "a alone"]


def test_vectors_are_differences_of_means_and_shares_are_of_a_regression(monkeypatch):
    space, most = space_of("gpt_vae"), 5
    (attribute,) = choose_attributes(TEXTS, "w3", seed=3)
    assert (attribute.before, attribute.after) == tuple(TEXTS.factor("w3").value_counts().index)
    rows = np.concatenate([*attribute.learn, *attribute.tried])
    assert sorted(rows) == list(range(40))  # each text once
    given, write = [], space.write
    monkeypatch.setattr(space, "write", lambda latents, *rest: given.append(latents) or write(latents, *rest))
    found, details = add_attribute(space, TEXTS, attribute, 2.0, most, 3)
    means, codes = np.stack(space.means(TEXTS)), space.codes(TEXTS)
    vector = means[attribute.learn[1]].mean(0) - means[attribute.learn[0]].mean(0)
    begun = means[attribute.tried[0][:most]]
    np.testing.assert_allclose(given[0], begun + 2 * vector, atol=1e-5)
    np.testing.assert_allclose(given[1], begun, atol=1e-6)
    lengths = np.linalg.norm(np.stack(given[2]) - begun, axis=1)
    np.testing.assert_allclose(lengths, 2 * np.linalg.norm(vector), rtol=1e-4)
    np.testing.assert_allclose(given[3], means[attribute.tried[1][:most]], atol=1e-6)
    scaler = StandardScaler().fit(codes[np.concatenate(attribute.learn)])
    after = (TEXTS.factor("w3") == attribute.after).to_numpy()
    learn = np.concatenate(attribute.learn)
    regression = LogisticRegression(max_iter=1000).fit(scaler.transform(codes[learn]), after[learn])
    for row, latents in zip(found, given, strict=False):
        read = space.codes(Texts(tuple(write(latents))))
        assert row["value"] == pytest.approx(regression.predict(scaler.transform(read)).mean())
    tried = np.concatenate(attribute.tried)
    assert found[4]["value"] == pytest.approx(regression.score(scaler.transform(codes[tried]), after[tried]))
    assert list(details["text"]) == [TEXTS.texts[row] for row in attribute.tried[0][:most]]


def test_attributes_are_of_two_values_first():
    factors = pd.DataFrame(
        {"three": list("abc") * 10, "two": list("ab") * 15, "few": ["a"] * 27 + ["b"] * 3, "one": ["a"] * 30}
    )
    texts = Texts(tuple(f"w{3 + row % 20}" for row in range(30)), factors=factors)
    assert [found.name for found in choose_attributes(texts, None, 0)] == ["two"]
    without = Texts(texts.texts, factors=factors.drop(columns="two"))
    assert [found.name for found in choose_attributes(without, None, 0)] == ["three"]
    assert choose_attributes(Texts(texts.texts), None, 0) == []
    with pytest.raises(InputError, match="the factor 'few' has no two values of at least 4 texts each"):
        choose_attributes(texts, "few", 0)


@pytest.mark.parametrize("family", WRITING)
def test_texts_without_factors_and_few(family):
    three = Texts(("w3", "w4", "w5 w6"))
    result = arithmetic(space_of(family), three, groups=2)
    assert len(result.table) == 2 and "no vector of an attribute" in result.about
    assert not np.isnan(result.table["value"][0])


@pytest.mark.parametrize(("family", "part"), [("ltm", 0), ("gp_vae", 0)])
def test_one_part_is_read(family, part):
    result = arithmetic(space_of(family, part=part), TEXTS, groups=4, most=3)
    assert f" {part}" in result.about and result.table["value"].notna().all()


def test_texts_of_a_conditional_model_are_written_and_read_under_labels(monkeypatch):
    space, given = conditional_space(monkeypatch)
    texts = labelled(TEXTS)
    result = arithmetic(space, texts, groups=3, most=2)
    of = dict(zip(texts.texts, texts.labels, strict=True))
    assert given[0] == tuple(of[text] for text in result.details["groups"]["c"])
    assert given[1] == tuple(of[text] for text in result.details["texts with a vector"]["text"])
    assert "under the labels" in result.about


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operation": "product"}, "operation must be one of analogy, sum, mean, weighted, not 'product'"),
        ({"operation": "weighted"}, "weights are for the operation weighted"),
        ({"weights": [1.0]}, "weights are for the operation weighted"),
        ({"operation": "weighted", "weights": []}, "not all 0"),
        ({"operation": "weighted", "weights": [0.0, 0.0]}, "not all 0"),
        ({"operation": "weighted", "weights": [float("nan")]}, "finite"),
        ({"groups": 0}, "at least 1 and scale is finite"),
        ({"scale": float("inf")}, "scale is finite"),
        ({"factor": "colour"}, "there is no factor 'colour'"),
        ({"factors": ["colour"]}, "there is no factor 'colour'"),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    with pytest.raises(InputError, match=message):
        arithmetic(space_of("gpt_vae"), TEXTS, **options)


def test_a_single_text_is_too_few():
    with pytest.raises(InputError, match="arithmetic needs 3 texts, and there are 1"):
        arithmetic(space_of("gpt_vae"), Texts(("w3",)))


def test_arithmetic_through_the_command_line(tmp_path):
    given = saved("gpt_vae", tmp_path, TEXTS)
    options = ["--operation", "weighted", "--weights", "0.5", "--weights", "-1", "--groups", "3", "--factor", "w3"]
    with unchecked():
        status, out, err = run("probe", "arithmetic", *given, *options, "--output", str(tmp_path / "out"))
        bad = run("probe", "arithmetic", *given, "--factor", "colour")
    assert status == 0, err
    assert "0.5 a − b" in out and "share read as w3" in out
    rows = json.loads((tmp_path / "out" / "arithmetic.json").read_text())["table"]
    expected = arithmetic(
        space_of("gpt_vae"), TEXTS, operation="weighted", weights=[0.5, -1.0], groups=3, factor="w3"
    ).table
    assert [row["of"] for row in rows] == expected["of"].tolist()
    np.testing.assert_allclose([row["value"] for row in rows], expected["value"], rtol=1e-5)
    assert_one_sentence(bad[0], bad[2])
