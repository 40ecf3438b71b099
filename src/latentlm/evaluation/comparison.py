"""Figures of several seeds as one, and two models compared seed by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: a test of two seeds has one degree of freedom, and says nothing
LEAST_SEEDS_OF_A_TEST = 3
# differences that vary by less, relative to the figures, differ by rounding alone
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Paired:
    """Two models over the seeds that they have in common.

    Args:
        difference: mean over seeds of own − other, in the figure's own unit.
        standard_deviation: of the differences (n − 1 in the denominator); None for one seed.
        p: of Student's paired t-test, two-sided; None where there is no test: fewer than three seeds, differences that
            do not vary, or a figure that is not finite.
        n: seeds.
    """

    difference: float
    standard_deviation: float | None
    p: float | None
    n: int


def paired(own: Sequence[float], other: Sequence[float]) -> Paired:
    """Compares two models of which place i of both sequences is the same seed (Student 1908, section IX).

    It supposes differences that are normal over seeds, which a few seeds cannot show: p is a hint.

    Raises:
        ValueError: nothing to compare, or sequences of different lengths.
    """
    if not own or len(own) != len(other):
        raise ValueError(f"seeds come in pairs, at least one: not {len(own)} and {len(other)}")
    differences = [mine - its for mine, its in zip(own, other, strict=True)]
    n = len(differences)
    if not all(map(math.isfinite, differences)):
        return Paired(math.nan, None, None, n)
    spread = statistics.stdev(differences) if n > 1 else None
    p = None
    if spread is not None and n >= LEAST_SEEDS_OF_A_TEST and spread > _ROUNDING * max(map(abs, (*own, *other))):
        from scipy.stats import ttest_rel

        p = float(ttest_rel(own, other).pvalue)
    return Paired(statistics.fmean(differences), spread, p, n)


def averaged(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard deviation (n − 1 in the denominator, 0 for one row) of each number that all rows have.

    Where one of the numbers is not finite the mean is NaN and the deviation 0.
    """
    means: dict[str, float] = {}
    spread: dict[str, float] = {}
    for key in rows[0]:
        values: list[Any] = [row.get(key) for row in rows]
        if not all(isinstance(value, float | int) and not isinstance(value, bool) for value in values):
            continue
        finite = all(map(math.isfinite, values))
        means[key] = statistics.fmean(values) if finite else math.nan
        spread[key] = statistics.stdev(values) if finite and len(values) > 1 else 0.0
    return means, spread


def with_spread(mean: float | int, spread: float | int, form: str) -> str:
    """`mean ± spread`, both in the format's form; without a spread the mean alone."""
    text = format(mean, form)
    return f"{text} ± {format(spread, form)}" if spread else text
