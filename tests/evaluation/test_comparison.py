"""Paired tests against scipy and by hand; means and deviations against the statistics module."""

import math
import statistics

import pytest
from scipy.stats import t as student

from latentlm.evaluation.comparison import Paired, averaged, paired, with_spread


def test_a_paired_test_by_hand():
    # differences 1, 2, 3: mean 2, deviation 1, t = 2 √3 with 2 degrees of freedom
    result = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (result.difference, result.standard_deviation, result.n) == (2.0, 1.0, 3)
    assert result.p == pytest.approx(2 * student.sf(2 * math.sqrt(3), 2), abs=1e-12)
    assert result.p == pytest.approx(0.0741799, abs=1e-6)  # of a printed table


def test_the_sign_is_of_the_first_and_the_test_has_two_sides():
    forth, back = paired([1.0, 1.1, 1.3], [2.0, 2.2, 2.1]), paired([2.0, 2.2, 2.1], [1.0, 1.1, 1.3])
    assert forth.difference == pytest.approx(-29 / 30) and back.difference == pytest.approx(29 / 30)
    assert forth.p == pytest.approx(back.p)


def test_pairs_are_of_one_seed():
    """Another order of one side's seeds is another test."""
    own, other = [1.0, 2.0, 3.0], [1.1, 2.0, 3.2]
    assert paired(own, other).p != pytest.approx(paired(own, other[::-1]).p)


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ([2.0], [1.5], Paired(0.5, None, None, 1)),
        ([2.0, 2.0], [1.5, 1.0], Paired(0.75, statistics.stdev([0.5, 1.0]), None, 2)),
        ([2.0] * 3, [2.0] * 3, Paired(0.0, 0.0, None, 3)),
        ([2.5, 3.5, 4.5], [2.0, 3.0, 4.0], Paired(0.5, 0.0, None, 3)),
    ],
    ids=["one seed", "two seeds", "equal figures", "one difference"],
)
def test_where_there_is_no_test(own, other, expected):
    assert paired(own, other) == expected


def test_differences_that_vary_by_rounding_alone_have_no_test():
    own = [0.1 + 0.2, 0.7, 1.1]
    result = paired(own, [value - 0.1 for value in own])
    assert result.p is None and result.difference == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_figures_that_are_not_finite_have_no_test(wrong):
    result = paired([1.0, wrong, 3.0], [1.0, 2.0, 2.5])
    assert math.isnan(result.difference) and result.p is None and result.standard_deviation is None


@pytest.mark.parametrize(("own", "other"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_what_does_not_pair(own, other):
    with pytest.raises(ValueError, match="pairs"):
        paired(own, other)


def test_means_and_deviations():
    rows = [{"a": 1.0, "n": 3, "exact": True, "word": "x", "some": 1.0, "null": None}, {"a": 2.5, "n": 4, "null": 1.0}]
    means, spread = averaged(rows)
    assert means == {"a": statistics.fmean([1.0, 2.5]), "n": 3.5}
    assert spread == {"a": statistics.stdev([1.0, 2.5]), "n": statistics.stdev([3, 4])}


def test_the_mean_of_one_and_of_what_is_not_finite():
    assert averaged([{"a": 2.0}]) == ({"a": 2.0}, {"a": 0.0})
    for wrong in (math.nan, math.inf):
        means, spread = averaged([{"a": 2.0}, {"a": wrong}])
        assert math.isnan(means["a"]) and spread == {"a": 0.0}


def test_a_spread_is_shown_where_there_is_one():
    assert with_spread(1.25, 0.5, ".2f") == "1.25 ± 0.50"
    assert with_spread(1.25, 0.0, ".2f") == "1.25"
