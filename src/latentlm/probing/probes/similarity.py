"""Whether texts that are said to be alike have codes that point the same way."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from latentlm.data import read_documents
from latentlm.errors import InputError
from latentlm.probing.bags import cosine as cosine_of_bags
from latentlm.probing.bags import word_bags
from latentlm.probing.distances import cosines
from latentlm.probing.result import ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts

_TABLES = (".tsv", ".csv", ".tsv.xz", ".csv.xz")
_COVERED = 95.0  # per cent, by an interval
_MOST_DRAWN = 3000


def similarity(
    space: LatentSpace,
    texts: Texts,
    *,
    pairs: str | None = None,
    first: str = "text1",
    second: str = "text2",
    score: str = "score",
    number: int = 5000,
    resamples: int = 500,
    seed: int = 0,
) -> ProbeResult:
    """Cosine of the codes of two texts against a score of how alike they are: rank and linear correlation.

    Args:
        pairs: a .tsv or .csv with two texts and their score in each row, which then take the place of the given texts;
            without it pairs are drawn from the texts, and their score is the share of factors that both have in common.
        first: column of the first text of a pair: its name, or its number from 1 in a file without a header.
        second: column of the second text.
        score: column of the score, a number, the higher the more alike.
        number: pairs; of a file the first ones.
        resamples: drawn from the pairs, with replacement, for the intervals.
        seed: of the pairs that are drawn, of the shuffled scores and of the resamples.
    """
    if number < 3 or resamples < 1:
        raise InputError("similarity needs at least 3 pairs and 1 resample: ask for more.")
    generator = np.random.default_rng(seed)
    if pairs is None:
        places, scores = _pairs_by_factors(texts, number, generator)
        used, of = texts, "share of factors that both have in common"
    else:
        if space.model.annotation_labels is not None:
            raise InputError("this model is conditional, and pairs from a file have no labels: leave pairs out.")
        used, places, scores = _read_pairs(pairs, first, second, score, number)
        of = f"column {score!r} of {pairs}"
    if len(scores) < 3:
        raise InputError(f"a correlation needs at least 3 pairs, and there are {len(scores)}: give more.")
    if np.ptp(scores) == 0:
        raise InputError(f"all {len(scores):,} pairs have the score {scores[0]:g}: there is nothing to correlate with.")
    left, right = places.T
    needed = np.unique(places)
    codes, at = space.codes(used.select(needed.tolist())), np.searchsorted(needed, places)
    bags = word_bags(used.texts)
    by_code, by_words = cosines(codes[at[:, 0]], codes[at[:, 1]]), cosine_of_bags(bags[left], bags[right])
    spread = codes.std(0)
    even = (codes - codes.mean(0)) / np.where(spread > 0, spread, 1.0)
    shuffled = generator.permutation(scores)
    lines = {
        "cosine of codes": (by_code, scores),
        "cosine of codes, standardised": (cosines(even[at[:, 0]], even[at[:, 1]]), scores),
        "cosine of codes, scores shuffled": (by_code, shuffled),
        "bag of words (TF-IDF)": (by_words, scores),
    }
    rows = []
    for name, (likeness, wanted) in lines.items():
        row: dict[str, Any] = {"similarity": name}
        for what, correlation in (("spearman", spearman), ("pearson", pearson)):
            low, high = bootstrap_interval(likeness, wanted, correlation, resamples, seed)
            row |= {what: correlation(likeness, wanted), f"{what} low": low, f"{what} high": high}
        rows.append(row | {"pairs": len(scores)})
    about = (
        f"{len(scores):,} pairs of {len(needed):,} texts; score: {of}. Cosine of the codes of both ({space.view}, in "
        "prior standard deviations) against the score: Spearman's and Pearson's correlation, −1 to 1, with the "
        f"{_COVERED:g}% bootstrap interval over pairs ({resamples:,} resamples, percentiles, seed {seed}); where texts "
        "stand in several pairs it is somewhat too narrow. Standardised: each number of a code less its mean over "
        "these texts, in its s.d. over them, so that no single one decides. Floor: scores shuffled among the pairs. "
        "Line to beat: cosine of TF-IDF bags of words of the same texts, for which no model is needed."
    )
    listed = pd.DataFrame(
        {
            "text 1": [used.texts[place] for place in left],
            "text 2": [used.texts[place] for place in right],
            "score": scores,
            "cosine of codes": by_code,
            "cosine of bags of words": by_words,
        }
    )

    def draw(panel: Any) -> None:
        shown = slice(None, _MOST_DRAWN)
        width = np.ptp(scores) / 60  # scores are often few: points of one score beside each other
        jitter = np.random.default_rng(0).uniform(-width, width, len(scores[shown]))
        panel.scatter(scores[shown] + jitter, by_code[shown], s=5, linewidths=0, alpha=0.4)
        panel.set(xlabel="score", ylabel="cosine of codes", title=f"Spearman {rows[0]['spearman']:.3f}")

    def draw_lines(panel: Any) -> None:
        heights = np.arange(len(rows))[::-1]
        for height, row in zip(heights, rows, strict=True):
            for shift, what, colour in ((0.12, "spearman", "#1f77b4"), (-0.12, "pearson", "#ff7f0e")):
                label = what.capitalize() if height == heights[0] else None
                panel.plot([row[f"{what} low"], row[f"{what} high"]], [height + shift] * 2, color=colour, lw=2)
                panel.plot(row[what], height + shift, "o", color=colour, label=label)
        panel.axvline(0, color="#999", lw=0.8)
        panel.set(yticks=heights, yticklabels=[row["similarity"] for row in rows], xlabel="correlation with the score")
        panel.legend(frameon=False)

    return ProbeResult("similarity", about, pd.DataFrame(rows), {"pairs": listed}, [draw, draw_lines])


def pearson(first: Float[np.ndarray, " pairs"], second: Float[np.ndarray, " pairs"]) -> float:
    """Linear correlation; NaN where one of them is constant."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    first, second = first - first.mean(), second - second.mean()
    return float((first / np.linalg.norm(first)) @ (second / np.linalg.norm(second)))


def spearman(first: Float[np.ndarray, " pairs"], second: Float[np.ndarray, " pairs"]) -> float:
    """Linear correlation of ranks, those of equal numbers being their mean (Spearman 1904); NaN for a constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(first), rankdata(second))


def bootstrap_interval(
    first: Float[np.ndarray, " pairs"],
    second: Float[np.ndarray, " pairs"],
    correlation: Any,
    resamples: int,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of a correlation over pairs drawn with replacement (Efron 1979); NaN if none exists."""
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        rows = generator.integers(len(first), size=len(first))
        drawn.append(correlation(first[rows], second[rows]))
    if np.isnan(drawn).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(drawn, [50 - _COVERED / 2, 50 + _COVERED / 2])
    return float(low), float(high)


def shared_factors(factors: pd.DataFrame, places: Int[np.ndarray, "pairs two"]) -> Float[np.ndarray, " pairs"]:
    """Share of the factors known of both texts of a pair in which they agree; NaN where none is."""
    values = np.stack([pd.factorize(factors[name])[0] for name in factors.columns], axis=1)  # −1: unknown
    left, right = values[places[:, 0]], values[places[:, 1]]
    known = (left >= 0) & (right >= 0)
    number = known.sum(1)
    return np.where(number > 0, ((left == right) & known).sum(1) / np.maximum(number, 1), np.nan)


def random_pairs(texts: int, number: int, generator: np.random.Generator) -> Int[np.ndarray, "pairs two"]:
    """Pairs of different places, no pair twice: all there are, if there are no more.

    Up to half as many pairs as texts, no text is in two of them.
    """
    if texts * (texts - 1) // 2 <= number:
        return np.stack(np.triu_indices(texts, 1), axis=1)
    found: dict[tuple[int, int], None] = {}
    while len(found) < number:
        order = generator.permutation(texts)[: texts // 2 * 2].reshape(-1, 2)
        found.update(dict.fromkeys(map(tuple, np.sort(order, axis=1).tolist())))
    return np.array(list(found)[:number])


def _pairs_by_factors(
    texts: Texts, number: int, generator: np.random.Generator
) -> tuple[Int[np.ndarray, "pairs two"], Float[np.ndarray, " pairs"]]:
    if texts.factors is None or not len(texts.factors.columns):
        raise InputError(
            "nothing says how alike these texts are: give pairs, a table of two texts and a score a row, or texts of "
            "known factors (builtin:sentences, annotated texts, or --factor-table)."
        )
    places = random_pairs(len(texts), number, generator)
    scores = shared_factors(texts.factors, places)
    known = np.isfinite(scores)
    return places[known], scores[known]


def _read_pairs(
    path: str, first: str, second: str, score: str, number: int
) -> tuple[Texts, Int[np.ndarray, "pairs two"], Float[np.ndarray, " pairs"]]:
    if not path.lower().endswith(_TABLES):
        raise InputError(f"{path}: pairs are read from a .tsv or a .csv, or an .xz of one.")
    columns = [
        [document.text for document in read_documents(path, column=column, limit=number)]
        for column in (first, second, score)
    ]
    scores = np.zeros(len(columns[2]))
    for row, content in enumerate(columns[2]):
        try:
            scores[row] = float(content)
        except ValueError:
            scores[row] = np.nan
        if not np.isfinite(scores[row]):
            raise InputError(f"{path}: the score of pair {row + 1} is {content!r}, no number: mend it or take it out.")
    size = len(scores)
    return Texts(tuple(columns[0] + columns[1])), np.stack([np.arange(size), np.arange(size) + size], axis=1), scores
