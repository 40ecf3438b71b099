"""Codes and factors of texts made ready for scores: what can be used, standardised, and in halves.

A factor is a column of values, one of each text; −1 says that it is unknown there. N texts, d dimensions, f factors.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from latentlm.errors import InputError

#: texts that must share a value of a factor: two in each half
LEAST_TEXTS = 4


def prepared(
    codes: Float[np.ndarray, "N d"],
    factors: Int[np.ndarray, "_ f"],
    least_factors: int = 1,
    names: Sequence[str] | None = None,
) -> tuple[Float[np.ndarray, "N live"], Int[np.ndarray, "N f"]]:
    """The dimensions that vary, standardised, and each factor's values as 0, 1, … in their order.

    Values that fewer than `LEAST_TEXTS` texts share become −1, too.

    Raises:
        InputError: texts that differ in number, too few factors, names of another number, a factor with fewer than two
            values, a code that is not finite, or fewer than two dimensions that vary.
    """
    if len(codes) != len(factors):
        raise InputError(f"codes of {len(codes)} texts do not fit factors of {len(factors)}: give a row of each text.")
    enough_factors(factors, least_factors)
    if names is not None and len(names) != factors.shape[1]:
        raise InputError(f"{len(names)} names do not fit {factors.shape[1]} factors: give one of each.")
    coded = np.full(factors.shape, -1)
    for factor, values in enumerate(factors.T):
        found, counts = np.unique(values[values != -1], return_counts=True)
        kept = found[counts >= LEAST_TEXTS]
        if len(kept) < 2:
            name = f"factor {factor}" if names is None else f"the factor {names[factor]!r}"
            raise InputError(
                f"{name} has {len(kept)} value{'s' * (len(kept) != 1)} that at least {LEAST_TEXTS} texts share and "
                "needs 2: leave it out or give more texts."
            )
        known = np.isin(values, kept)
        coded[known, factor] = np.searchsorted(kept, values[known])
    finite = np.isfinite(codes).all(1)
    if not finite.all():
        raise InputError(f"the code of text {finite.argmin()} has a number that is not finite: leave that text out.")
    codes = codes.astype(np.float64)
    deviation = codes.std(0)
    # whatever rounding makes of equal float32 numbers is no variation
    live = deviation > 1e-6 * np.abs(codes).max(0)
    if live.sum() < 2:
        raise InputError(f"the codes vary from text to text in {live.sum()} of {len(live)} dimensions and need 2.")
    return (codes[:, live] - codes[:, live].mean(0)) / deviation[live], coded


def enough_factors(factors: Int[np.ndarray, "N f"], least: int) -> None:
    if not factors.shape[1]:
        raise InputError("there are no factors: give at least one column of values.")
    if factors.shape[1] < least:
        raise InputError("with one factor there is nothing to tell it from: give at least 2.")


def halves(
    values: Int[np.ndarray, " N"], rng: np.random.Generator
) -> tuple[Int[np.ndarray, " one"], Int[np.ndarray, " other"]]:
    """The texts of known value in two random halves, every value in both, each sorted by value."""
    rows = rng.permutation(np.flatnonzero(values >= 0))
    rows = rows[np.argsort(values[rows], kind="stable")]
    place = np.arange(len(rows)) - group_of_each(values[rows])[0]
    return rows[place % 2 == 0], rows[place % 2 == 1]


def pools(factors: Int[np.ndarray, "N f"], rng: np.random.Generator) -> list[list[Int[np.ndarray, " _"]]]:
    """Of each factor and random half, the texts whose value another one of that half shares, sorted by value.

    The halves are those of all factors. Were they drawn for each, one half of a factor would vary a bit more than all
    texts do and the other a bit less, and a classifier that learns this of the one is worse than chance in the other.
    """
    half = rng.permutation(len(factors)) % 2
    pairs: list[list[np.ndarray]] = []
    for factor, values in enumerate(factors.T):
        pairs.append([])
        for one in (0, 1):
            rows = np.flatnonzero((values >= 0) & (half == one))
            rows = rows[np.argsort(values[rows], kind="stable")]
            first, last = group_of_each(values[rows])
            pairs[-1].append(rows[last - first > 1])
            if not len(pairs[-1][-1]):
                raise InputError(f"no two of half the texts share a value of factor {factor}: give more texts.")
    return pairs


def group_of_each(ordered: Int[np.ndarray, " N"]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Where the run of equal values that each one belongs to begins, and where it has ended."""
    return np.searchsorted(ordered, ordered, "left"), np.searchsorted(ordered, ordered, "right")
