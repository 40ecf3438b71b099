"""Sums and differences of latents: whether a − b + c is what it should be, and vectors that carry an attribute."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from latentlm.errors import InputError
from latentlm.probing.attributes import SHARE, Attribute, add_attribute, choose_attributes
from latentlm.probing.distances import cosines
from latentlm.probing.result import ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import UNKNOWN, Texts

_WEIGHTS = {"analogy": (1.0, -1.0, 1.0), "sum": (1.0, 1.0), "mean": (0.5, 0.5)}
OPERATIONS = (*_WEIGHTS, "weighted")
_TRIES = 50  # of groups, for each that is wanted
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def arithmetic(
    space: LatentSpace,
    texts: Texts,
    *,
    operation: str = "analogy",
    weights: list[float] | None = None,
    groups: int = 32,
    factors: list[str] | None = None,
    factor: str | None = None,
    scale: float = 1.0,
    most: int = 32,
    seed: int = 0,
) -> ProbeResult:
    """Latents reckoned with, as a − b + c, written and read again; and vectors that carry an attribute into texts.

    Args:
        operation: analogy (a − b + c), sum, mean, or weighted.
        weights: of the texts of a group, for weighted.
        groups: how many groups of texts, drawn at random, are reckoned with.
        factors: whose values a result is expected to have; by default those of two values, or the one of the fewest.
        factor: whose vector is added; by default the first three of two values, or else the first with texts enough.
        scale: how many times the vector is added.
        most: texts to which a vector is added, at most.
        seed: of the choice of texts and of the control's vectors.
    """
    of_group = _weights(operation, weights)
    if groups < 1 or most < 1 or not np.isfinite(scale):
        raise InputError(f"groups and most are at least 1 and scale is finite, not {groups}, {most} and {scale:g}.")
    texts.first(len(of_group), "arithmetic")
    names = _names(texts, factors)
    attributes = choose_attributes(texts, factor, seed)
    formula = _formula(of_group)
    ids = texts.factor_ids(names)[0] if names else None
    drawn, wanted = draw_groups(len(texts), of_group, ids, groups, np.random.default_rng(seed))
    rows, details = _reckon(space, texts, of_group, formula, drawn, wanted, ids)
    tables = {"groups": details}
    changed = [add_attribute(space, texts, attribute, scale, most, seed) for attribute in attributes]
    if changed:
        tables["texts with a vector"] = pd.concat([written for _, written in changed], ignore_index=True)
    for of_attribute, _ in changed:
        rows += of_attribute
    table = pd.DataFrame(rows)
    ranked = names if wanted is not None else []
    about = _about(space, len(texts), formula, len(drawn), ranked, attributes, scale, seed)
    return ProbeResult("arithmetic", about, table, tables, _panels(table))


def expected_value(values: Sequence[int], weights: Sequence[float]) -> int:
    """The value that a factor of Σ w z should have: the one whose weights do not cancel, if it is the only one.

    Of a − b + c it is c's where a's is b's, and a's where c's is b's; of a mean it is what all share. −1 (unknown)
    where it is left open, or where a value is.
    """
    if UNKNOWN in values:
        return UNKNOWN
    totals: dict[int, float] = {}
    for value, weight in zip(values, weights, strict=True):
        totals[value] = totals.get(value, 0.0) + weight
    left = [value for value, total in totals.items() if abs(total) > 1e-9]
    return left[0] if len(left) == 1 and totals[left[0]] > 0 else UNKNOWN


def draw_groups(
    number: int,
    weights: Sequence[float],
    ids: Int[np.ndarray, "texts factors"] | None,
    groups: int,
    generator: np.random.Generator,
) -> tuple[Int[np.ndarray, "groups members"], Int[np.ndarray, "groups factors"] | None]:
    """Random groups of different texts, and the factor values that are expected of each; of those, groups are taken
    of which something is expected, and, where something is taken away, something else than the last text has already.

    Without factors, or where no such group is found, any groups, and None.
    """
    drawn, wanted = [], []
    for _ in range(_TRIES * groups):
        rows = generator.choice(number, len(weights), replace=False)
        if ids is None:
            drawn.append(rows)
        else:
            values = np.array([expected_value(column.tolist(), weights) for column in ids[rows].T])
            known = values != UNKNOWN
            if known.any() and (min(weights) >= 0 or (values != ids[rows[-1]])[known].any()):
                drawn.append(rows)
                wanted.append(values)
        if len(drawn) == groups:
            break
    if not drawn:
        return draw_groups(number, weights, None, groups, generator)
    return np.stack(drawn), np.stack(wanted) if wanted else None


def first_rank(
    query: Float[np.ndarray, " numbers"],
    codes: Float[np.ndarray, "texts numbers"],
    fits: np.ndarray,
    left_out: Sequence[int] = (),
) -> tuple[float, float]:
    """The rank, from 1, of the text nearest to a code by the cosine among those that fit, and its expectation if the
    order were random: (N + 1) ÷ (M + 1) for M of N that fit. NaN where none does.

    Args:
        fits: whether each text does, [texts].
        left_out: texts that do not count, neither way.
    """
    counts = np.ones(len(codes), dtype=bool)
    counts[list(left_out)] = False
    fits = fits & counts
    if not fits.any():
        return float("nan"), float("nan")
    likeness = cosines(query[None].repeat(len(codes), 0), codes)
    best = likeness[fits].max()
    return float(1 + (likeness[counts & ~fits] > best).sum()), float((counts.sum() + 1) / (fits.sum() + 1))


def _weights(operation: str, weights: list[float] | None) -> tuple[float, ...]:
    if operation not in OPERATIONS:
        raise InputError(f"operation must be one of {', '.join(OPERATIONS)}, not {operation!r}.")
    if (weights is None) == (operation == "weighted"):
        raise InputError("weights are for the operation weighted, which needs them: give both or neither.")
    found = _WEIGHTS[operation] if weights is None else tuple(map(float, weights))
    if not found or len(found) > len(_LETTERS) or not np.isfinite(found).all() or not any(found):
        raise InputError(f"weights are finite numbers, up to {len(_LETTERS)} and not all 0, not {list(found)}.")
    return found


def _names(texts: Texts, factors: list[str] | None) -> list[str]:
    if factors is not None:
        texts.factor_ids(factors)  # which says what is wrong with them
        return list(dict.fromkeys(factors))
    values = {name: texts.factor(name).nunique() for name in texts.telling()}
    fewest = min(values.values(), default=0)
    found = [name for name, number in values.items() if number == fewest]
    return found if fewest == 2 else found[:1]


def _formula(weights: Sequence[float]) -> str:
    parts = []
    for place, (weight, letter) in enumerate(zip(weights, _LETTERS, strict=False)):
        sign = ("− " if weight < 0 else "+ ") if place else ("−" if weight < 0 else "")
        parts.append(sign + ("" if abs(weight) == 1 else f"{abs(weight):g} ") + letter)
    return " ".join(parts)


def _reckon(
    space: LatentSpace,
    texts: Texts,
    weights: Sequence[float],
    formula: str,
    drawn: np.ndarray,
    wanted: np.ndarray | None,
    ids: np.ndarray | None,
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Figures of the operation, and the groups."""
    codes = space.codes(texts)
    means = space.means(texts)
    results = []
    for rows in drawn:
        # of trajectories what all of them have
        shortest = min(len(means[row]) for row in rows)
        members = [space.standardised(means[row][:shortest]) for row in rows]
        total = sum(weight * z for weight, z in zip(weights, members, strict=True))
        results.append(space.from_standardised(np.asarray(total)))
    labels = None
    if space.model.annotation_labels is not None and texts.labels is not None:
        labels = tuple(texts.labels[rows[-1]] for rows in drawn)
    written = space.write(results, labels)
    asked = np.stack([space.code(z, texts.texts[rows[-1]]) for z, rows in zip(results, drawn, strict=True)])
    read = space.codes(Texts(tuple(written), labels))
    details = pd.DataFrame(
        {letter: [texts.texts[row] for row in column] for letter, column in zip(_LETTERS, drawn.T, strict=False)}
        | {"written": written, "cosine": cosines(asked, read)}
    )
    figure = "cosine of the result and what is read in its text"
    figures = [_row(figure, formula, details["cosine"])]
    if len(drawn) > 1:
        figures.append(_row(figure, "another group's text", cosines(asked, np.roll(read, 1, axis=0))))
    if wanted is None or ids is None:
        return figures, details
    last = f"{_LETTERS[len(weights) - 1]} alone"
    ranks = []
    for values, rows, code in zip(wanted, drawn, asked, strict=True):
        fits = ((ids == values) | (values == UNKNOWN)).all(1)
        rank, chance = first_rank(code, codes, fits, rows.tolist())
        alone, _ = first_rank(codes[rows[-1]], codes, fits, rows.tolist())
        among = np.delete(fits, rows).mean() if len(fits) > len(rows) else np.nan
        ranks.append({formula: rank, last: alone, "by chance": chance, "share": among})
    found = pd.DataFrame(ranks)
    details = details.assign(rank=found[formula], **{"rank by chance": found["by chance"]})
    found = found.dropna()
    figure = "share whose nearest text is as expected"
    figures += [_row(figure, how, found[how] == 1) for how in (formula, last)]
    figures.append(_row(figure, "by chance", found["share"]))
    figure = "median rank of the nearest text that is as expected"
    figures += [_row(figure, how, found[how], np.median) for how in (formula, last, "by chance")]
    return figures, details


def _row(figure: str, of: str, values: Any, mean: Any = np.mean) -> dict[str, Any]:
    return {"figure": figure, "of": of, "value": float(mean(values)) if len(values) else np.nan, "number": len(values)}


def _about(
    space: LatentSpace,
    number: int,
    formula: str,
    groups: int,
    ranked: Sequence[str],
    attributes: Sequence[Attribute],
    scale: float,
    seed: int,
) -> str:
    text = (
        f"{formula} of the posterior means of {groups:,} groups of different texts, drawn at random from {number:,} "
        f"(seed {seed}), in prior standard deviations from the prior's mean, written greedily and read again. Cosine: "
        f"of the result's code ({space.view}) with that of the text, mean; beside it, with another group's text."
    )
    if space.model.latent_per_token:
        text += " Trajectories of different lengths are cut to the shortest of a group."
    if ranked:
        text += (
            f" As expected is a text whose {', '.join(ranked)} are (values whose weights do not cancel, where one is "
            "left; otherwise a factor is left open). Nearest: by the cosine of codes, among all but the group's own "
            "texts. Beside it the same by the last text alone, which a difference has to beat (Linzen 2016), and by "
            "chance, the share of texts that are as expected, and the mean rank of the first in a random order."
        )
    if not attributes:
        return text + " There is no factor with two values of at least 4 texts each, so no vector of an attribute."
    text += (
        " Attributes: of the texts with a factor's two most frequent values, one half gives a vector, mean z of the "
        "second value less that of the first, and a logistic regression of codes; of the other half, texts with the "
        f"first value get {scale:g} times the vector, are written and read again: share that the regression takes for "
        "the second. Controls: written without a vector; with random ones of the same length; and texts that have the "
        "second value themselves, written and read again: what a good vector comes near. Accuracy: the regression's, "
        "of the codes of the other half as they are, beside that of always the more frequent value."
    )
    if space.model.latent_per_token:
        text += " A trajectory's mean over its positions counts, and the vector is added at each of them."
    if space.model.annotation_labels is not None:
        text += " Texts are written and read under the labels of the last text of a group, or their own."
    return text


def _panels(table: pd.DataFrame) -> list[Any]:
    panels: list[Any] = []
    of_attribute = table["figure"].str.startswith(SHARE)
    for figure, rows in table[~of_attribute & ~table["figure"].str.startswith("accuracy")].groupby(
        "figure", sort=False
    ):

        def draw(panel: Any, figure: Any = figure, rows: pd.DataFrame = rows) -> None:
            panel.barh(rows["of"][::-1], rows["value"][::-1], color=["0.7"] * (len(rows) - 1) + ["C0"])
            if "rank" in figure:
                panel.set_xscale("log")
                panel.set_xlim(left=0.8)
                panel.xaxis.set_major_formatter("{x:g}")
                panel.xaxis.set_minor_formatter("")
            panel.set_title(figure, fontsize=10)

        panels.append(draw)
    if of_attribute.any():
        panels.append(lambda panel: _draw_attributes(panel, table[of_attribute]))
    return panels


def _draw_attributes(panel: Any, shares: pd.DataFrame) -> None:
    hows = list(dict.fromkeys(shares["of"]))
    figures = list(dict.fromkeys(shares["figure"]))
    for place, (how, colour) in enumerate(zip(hows, ("C0", "0.75", "0.5", "C2"), strict=True)):
        values = shares[shares["of"] == how].set_index("figure")["value"].reindex(figures)
        panel.bar(np.arange(len(figures)) + 0.2 * (place - 1.5), values, 0.19, color=colour, label=how)
    panel.set_xticks(range(len(figures)), [figure.removeprefix(SHARE) for figure in figures])
    panel.set(title=SHARE, ylim=(0, 1.25))
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
