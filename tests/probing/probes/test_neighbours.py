"""Nearest texts: against a slow version, and shares of factors by hand."""

import numpy as np
import pytest
from tests.probing import worlds

from latentlm import InputError
from latentlm.probing import Texts
from latentlm.probing.probes.neighbours import nearest, neighbours


def slow_nearest(codes, k, distance):
    rows, distances = [], []
    for one, code in enumerate(codes):
        found = []
        for other, another in enumerate(codes):
            if other != one:
                if distance == "euclidean":
                    far = sum((a - b) ** 2 for a, b in zip(code, another, strict=True)) ** 0.5
                else:
                    far = 1 - code @ another / ((code @ code) * (another @ another)) ** 0.5
                found.append((far, other))
        found.sort()
        rows.append([other for _, other in found[:k]])
        distances.append([far for far, _ in found[:k]])
    return np.array(rows), np.array(distances)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize(("texts", "numbers", "k"), [(2, 1, 1), (30, 5, 4), (12, 1, 11)])
def test_nearest_against_a_slow_version(distance, texts, numbers, k):
    codes = np.random.default_rng(0).standard_normal((texts, numbers))
    if distance == "cosine" and numbers == 1:
        codes = np.concatenate([codes, np.ones_like(codes)], axis=1)  # of one number all cosines are ±1
    rows, distances = nearest(codes, k, distance)
    slow_rows, slow_distances = slow_nearest(codes, k, distance)
    np.testing.assert_array_equal(rows, slow_rows)
    np.testing.assert_allclose(distances, slow_distances, atol=1e-7)


def test_no_text_is_its_own_neighbour_even_among_equals():
    rows, distances = nearest(np.ones((5, 3)), 4)
    assert all(row not in found for row, found in enumerate(rows.tolist()))
    assert (distances == 0).all()


def test_shares_of_factors_by_hand():
    # on a line: 0 1 | 10 11 | 20 23; the nearest of each is the other of its pair
    space, texts = worlds.given(
        np.array([[0.0], [1.0], [10.0], [11.0], [20.0], [23.0]]),
        {"f": ["a", "a", "a", "b", "b", None], "g": ["x"] * 6},
    )
    result = neighbours(space, texts, queries=2, k=1)
    (f,) = result.table.to_dict("records")  # g, of one value, says nothing
    # of the five known: 0 and 1 share; 10 and 11 do not; 20's neighbour is unknown, so it does not count
    assert f["factor"] == "f" and f["shared"] == pytest.approx(2 / 4) and f["texts"] == 4
    # drawn at random from the four others that are known: a has two others like it (3 texts), b one (2 texts)
    assert f["by chance"] == pytest.approx((3 * 2 / 4 + 2 * 1 / 4) / 5)
    listed = result.details["neighbours of the first texts"]
    assert listed["text"].tolist() == ["text 0", "text 1"] and listed["neighbour"].tolist() == ["text 1", "text 0"]
    assert listed["rank"].tolist() == [1, 1] and listed["distance"].tolist() == [1.0, 1.0]


def test_chance_is_what_random_codes_give():
    generator = np.random.default_rng(0)
    values = generator.choice(["a", "b", "c"], 600, p=[0.6, 0.3, 0.1]).tolist()
    result = neighbours(*worlds.given(generator.standard_normal((600, 4)), {"f": values}), k=5)
    row = result.table.iloc[0]
    assert row["shared"] == pytest.approx(row["by chance"], abs=0.04)


@pytest.mark.parametrize("family", worlds.KINDS)
def test_each_kind_of_latent(family):
    result = neighbours(worlds.space(family), Texts(worlds.words(6)), queries=2, k=3)
    assert len(result.table) == 6
    for _, found in result.table.groupby("text"):
        assert found["rank"].tolist() == [1, 2, 3] and found["distance"].is_monotonic_increasing
    assert "6 texts" in result.about


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queries": 5}, "neighbours needs 5 texts, and there are 4"),
        ({"queries": 0}, "neighbours needs at least 1 text, not 0"),
        ({"queries": 1, "k": 4}, "k must be from 1 to 3 for 4 texts, not 4"),
        ({"queries": 1, "k": 0}, "k must be from 1 to 3 for 4 texts, not 0"),
        ({"queries": 1, "k": 1, "distance": "far"}, "distance must be one of euclidean, cosine, not 'far'"),
    ],
)
def test_what_cannot_be_asked(options, words):
    with pytest.raises(InputError, match=words):
        neighbours(*worlds.given(np.eye(4)), **options)
