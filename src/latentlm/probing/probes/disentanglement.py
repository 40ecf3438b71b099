"""Whether dimensions and factors go one to one: seven published scores, each beside its floors and its ceiling."""

from typing import Any

import pandas as pd
from threadpoolctl import threadpool_limits

from latentlm.errors import InputError
from latentlm.probing.disentanglement_metrics import disentanglement_scores
from latentlm.probing.factors import LEAST_TEXTS
from latentlm.probing.result import ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts

CODES = ("model", "z sampled", "factors shuffled", "PCA", "factors as code")
_WORDS = 2000  # of the bag of words that the PCA code is of


def disentanglement(
    space: LatentSpace, texts: Texts, *, factors: list[str] | None = None, seeds: int = 3, seed: int = 0
) -> ProbeResult:
    """Whether dimensions of z and factors of texts go one to one: z-diff, z-min-var, MIG, DCI, SAP, modularity,
    explicitness.

    Args:
        factors: which, at least two; by default all of which two values have four texts each.
        seeds: how many; each draws splits, pairs, trees and the shuffled factors anew.
        seed: the first of them.
    """
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, not {seeds}.")
    if factors is None and texts.factors is not None:
        kept = [name for name in texts.factors if texts.factor(name).value_counts().ge(LEAST_TEXTS).sum() > 1]
        factors = kept or None
    ids, names = texts.factor_ids(factors)
    codes = space.codes(texts)
    words = _bag_of_words(texts, codes.shape[1])
    with threadpool_limits(1):  # many small products, for which several threads wait on one another
        scores = disentanglement_scores(
            codes, ids, names, range(seed, seed + seeds), beside=words, sampled=space.sampled_codes(texts, seed)
        )
    means, deviations = (
        scores.pivot(index="metric", columns="code", values=value).reindex(scores["metric"].unique())
        for value in ("mean", "sd")
    )
    shown = [code for code in CODES if code in means]
    spreads = {f"{code}, s.d.": deviations[code] for code in shown}
    wide = pd.concat({code: means[code] for code in shown} | spreads, axis=1)
    columns = [name for code in shown for name in (code, f"{code}, s.d.")]
    about = (
        f"{len(texts):,} texts, {space.view}; factors: {', '.join(names)}, of each the 12 most frequent values. Scores "
        f"are 0 to 1, higher is better; mean and s.d. over {seeds} seeds from {seed}, of splits and draws with the "
        "same texts. Model: posterior means, each dimension standardised, so that differences far within the noise of "
        "z count like any; z sampled: one draw of z for each text, as a decoder is given it. Beside them: the means "
        "with factors shuffled among the texts (a floor), principal components of a bag of words with as many "
        "dimensions (a code without a model), and the factors themselves as code (a ceiling; below 1 where factors "
        "depend on each other)."
    )
    table = wide[columns].reset_index()

    def draw(panel: Any) -> None:
        width = 0.8 / len(shown)
        for place, code in enumerate(shown):
            at = [row + place * width for row in range(len(table))]
            panel.bar(at, table[code], width, yerr=table[f"{code}, s.d."].fillna(0.0), label=code)
        panel.set_xticks([row + 0.4 - width / 2 for row in range(len(table))], table["metric"], rotation=35, ha="right")
        panel.set(ylim=(0, 1.2), title=f"disentanglement, {len(texts):,} texts")
        panel.legend(frameon=False, fontsize=7, ncols=len(shown), loc="upper center")

    return ProbeResult("disentanglement", about, table, {"scores": scores}, panels=[draw])


def _bag_of_words(texts: Texts, dimensions: int) -> Any:
    """Counts of the most frequent words, [texts, words], sparse; None where there are fewer words than dimensions."""
    from sklearn.feature_extraction.text import CountVectorizer

    try:
        counts = CountVectorizer(max_features=max(_WORDS, dimensions), token_pattern=r"\S+").fit_transform(texts.texts)
    except ValueError:  # texts of white space alone
        return None
    return counts if min(counts.shape) >= dimensions else None
