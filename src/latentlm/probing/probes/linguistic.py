"""What a linear probe reads from a code of a text's form: its length, its words, its tense, its depth …"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from latentlm.errors import InputError
from latentlm.probing.bags import word_bags
from latentlm.probing.result import ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import MOST_VALUES, UNKNOWN, Texts

BINS = 6
#: a value with fewer texts cannot stand on both sides of a split, and counts as unknown
_LEAST_TEXTS = 4
_HELD_OUT = 0.25
_MOST_FREQUENT = 0.05  # share of the texts that have a word, beyond which it is no word of middle frequency
_STEPS = 300


def linguistic(
    space: LatentSpace,
    texts: Texts,
    *,
    factors: list[str] | None = None,
    words: int = 10,
    seeds: int = 3,
    training_texts: int = 6000,
    strength: float = 1.0,
    seed: int = 0,
) -> ProbeResult:
    """Linear probes of length, word content and every factor, with a control task and their selectivity.

    Args:
        factors: which, beside length and word content; by default all.
        words: how many words of middle frequency word content asks for; 0 leaves it out.
        seeds: splits into training and held-out texts, and control labels, over which means and s.d. are taken.
        training_texts: at most so many train a probe, drawn at random, so that many texts do not take long.
        strength: inverse of the L2 penalty of the logistic regression (C of scikit-learn).
        seed: of the first split.
    """
    if seeds < 1 or words < 0 or training_texts < 100 or not strength > 0:
        raise InputError(
            "seeds are at least 1, words 0, training texts 100, and the strength is above 0, not "
            f"{seeds}, {words}, {training_texts} and {strength:g}."
        )
    found, left_out = properties(texts, factors, words)
    if not found:
        raise InputError(f"there is no property to probe in these {len(texts):,} texts: give more texts.")
    codes, draws = space.codes(texts), space.sampled_codes(texts, seed)
    bags = _reduced_bags(texts.texts, codes.shape[1])
    of_text = pd.factorize(np.array(texts.texts, dtype=object))[0]
    each, rows = [], []
    for name, (values, classes) in found.items():
        known = np.flatnonzero(values != UNKNOWN)
        of_seeds = []
        for number in range(seed, seed + seeds):
            training, held_out = _split(values[known], training_texts, number)
            with threadpool_limits(1):  # many small products, for which several threads wait on one another
                figures = _figures(
                    [part[known] for part in (codes, draws, bags)], values[known], of_text[known], training, held_out,
                    strength, number,
                )  # fmt: skip
            of_seeds.append(figures)
            each.append({"property": name, "seed": number, **figures})
        table = pd.DataFrame(of_seeds)
        row: dict[str, Any] = {"property": name}
        for column in (
            "accuracy",
            "z sampled",
            "majority",
            "control",
            "selectivity",
            "control in training",
            "bag of words",
        ):
            row[column] = table[column].mean()
            if column not in ("majority", "control in training"):
                row[f"{column} s.d."] = table[column].std(ddof=1) if seeds > 1 else float("nan")
        rows.append(row | {"values": len(classes), "training": len(training), "held out": len(held_out)})
    about = (
        f"{len(texts):,} texts, {space.view}, standardised. Multinomial logistic regression (L2, C = {strength:g}), "
        f"trained on {1 - _HELD_OUT:.0%} of the texts of known value, {training_texts:,} at most; accuracy on the "
        f"others, mean ± s.d. over {seeds} splits (seeds {seed} to {seed + seeds - 1}). Standardised means tell what "
        "lies far within the noise of z, too; z sampled: the same of one draw of z for each text, as a decoder is "
        "given it. Majority: always the most frequent value of the training texts. Control, as Hewitt and Liang (2019) "
        "ask: each distinct text gets a random label with the frequencies of the property's values; selectivity is "
        "accuracy less that of the control. Theirs are random labels of word types, which come back in held-out text, "
        "so that a strong probe scores well by memory; whole texts seldom come back, so ours is about chance unless "
        "texts are repeated, and what a probe can memorise shows in `control in training`, its accuracy on the random "
        f"labels that it was trained on. Bag of words: the same probe on TF-IDF of words reduced to {bags.shape[1]} "
        f"numbers by truncated SVD, the line to beat. Length: words, up to {BINS} bins of about equal count (Conneau "
        f"et al. 2018, SentLen, whose bins are of equal width). Word content (their WC): which of {words} words of "
        f"middle frequency a text has, of texts with exactly one. A factor of numbers with more than {BINS} values is "
        f"binned, a parse in brackets counts as its depth, of others the {MOST_VALUES} most frequent values count."
    ) + (f" Left out: {'; '.join(left_out)}." if left_out else "")
    classes_of = pd.DataFrame(
        [
            {"property": name, "value": value, "texts": int((values == place).sum())}
            for name, (values, classes) in found.items()
            for place, value in enumerate(classes)
        ]
    )
    drawn = pd.DataFrame(rows)

    def draw(panel: Any) -> None:
        heights = np.arange(len(drawn))[::-1]
        spread = drawn["accuracy s.d."].fillna(0.0)
        panel.barh(heights, drawn["accuracy"], xerr=spread, color="#9ecae1", ecolor="#1f77b4", label="code")
        marks = (("z sampled", "D", "#1f77b4"), ("bag of words", "o", "#ff7f0e"), ("control", "x", "#d62728"))
        for column, mark, colour in marks:
            panel.plot(drawn[column], heights, mark, color=colour, label=column, ms=5, ls="none")
        panel.plot(drawn["majority"], heights, "|", color="#000", ms=12, label="majority", ls="none")
        panel.set(yticks=heights, yticklabels=drawn["property"], xlim=(0, 1), xlabel="held-out accuracy")
        panel.tick_params(axis="y", labelsize=min(9, 160 / len(drawn)))
        panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    return ProbeResult(
        "linguistic", about, drawn, {"each split": pd.DataFrame(each), "values": classes_of}, panels=[draw]
    )


def properties(
    texts: Texts, factors: Sequence[str] | None = None, words: int = 10
) -> tuple[dict[str, tuple[Int[np.ndarray, " texts"], list[str]]], list[str]]:
    """What can be asked of texts: name → (the value of each as a number, −1 where unknown; the values' names).

    Returns:
        The properties, and which were left out, with the reason: those without two values of at least 4 texts each.

    Raises:
        InputError: a factor that is asked for is not there or has a single value; a parse whose brackets do not close.
    """
    asked = factors is not None
    if factors is None:
        factors = [] if texts.factors is None else list(texts.factors.columns)
    lengths = pd.Series([len(text.split()) for text in texts.texts])
    found = {"length in words": bins(lengths)}
    if words:
        found["word content"] = word_content(texts.texts, words)
    for name in factors:
        values = texts.factor(name)
        depths = _depths(values, name)
        numbers = pd.to_numeric(values, errors="coerce")
        if depths is not None:
            found[f"depth of {name}"] = bins(depths)
        elif numbers.notna().sum() == values.notna().sum() and numbers.nunique() > BINS:
            found[name] = bins(numbers)
        else:
            found[name] = _named(values)
    kept, left_out = {}, []
    for name, (values, classes) in found.items():
        values, classes = _frequent(values, classes)
        if len(classes) > 1:
            kept[name] = values, classes
        elif asked and name in factors:
            raise InputError(f"the factor {name!r} has no two values of {_LEAST_TEXTS} texts each: leave it out.")
        else:
            left_out.append(f"{name}, which has no two values of {_LEAST_TEXTS} texts each")
    return kept, left_out


def bins(numbers: pd.Series, number: int = BINS) -> tuple[Int[np.ndarray, " texts"], list[str]]:
    """Numbers in bins of about equal count, in their order, and each bin's range; fewer where numbers are equal."""
    if numbers.nunique() <= number:
        kinds = sorted(numbers.dropna().unique())
        places = {kind: place for place, kind in enumerate(kinds)}
        return np.array([places.get(value, UNKNOWN) for value in numbers]), [f"{kind:g}" for kind in kinds]
    values = pd.qcut(numbers, number, labels=False, duplicates="drop").fillna(UNKNOWN).to_numpy().astype(np.int64)
    names = []
    for place in range(values.max() + 1):
        inside = numbers[values == place]
        names.append(f"{inside.min():g} to {inside.max():g}")
    return values, names


def word_content(texts: Sequence[str], number: int) -> tuple[Int[np.ndarray, " texts"], list[str]]:
    """Which of so many words a text has; −1 where it has none of them or several (Conneau et al. 2018, WC).

    They are the words (in lower case) that stand in the most texts among those in at most 5% of all. (Conneau et al.
    take 1,000 words of ranks 2,000 to 3,000 by frequency, of a corpus of millions of words.)
    """
    of_texts = [set(re.findall(r"\b[^\W\d_]+\b", text.lower())) for text in texts]
    counts = Counter(word for of_text in of_texts for word in of_text)
    middle = [word for word, count in counts.items() if _LEAST_TEXTS <= count <= _MOST_FREQUENT * len(texts)]
    chosen = sorted(middle, key=lambda word: (-counts[word], word))[:number]
    places = {word: place for place, word in enumerate(chosen)}
    values = []
    for of_text in of_texts:
        inside = [places[word] for word in of_text if word in places]
        values.append(inside[0] if len(inside) == 1 else UNKNOWN)
    return np.array(values), chosen


def parse_depth(brackets: str) -> int:
    """The deepest nesting of a bracketed parse: 2 of "(S (NP dogs) (VP bark))".

    Raises:
        InputError: brackets that do not close.
    """
    depth = deepest = 0
    for letter in brackets:
        depth += (letter == "(") - (letter == ")")
        deepest = max(deepest, depth)
        if depth < 0:
            break
    if depth:
        raise InputError(f"the brackets of the parse {brackets[:60]!r} do not close.")
    return deepest


def probe_accuracy(
    training: Float[np.ndarray, "texts numbers"],
    values: Int[np.ndarray, " texts"],
    held_out: Float[np.ndarray, "others numbers"],
    wanted: Int[np.ndarray, " others"],
    strength: float = 1.0,
) -> tuple[float, float]:
    """Of a multinomial logistic regression, share of right values: on held-out texts, and on those it was trained on.

    Args:
        training: codes, standardised here by their own mean and s.d.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(training)
    training, held_out = scaler.transform(training), scaler.transform(held_out)
    if len(np.unique(values)) == 1:  # control labels of few texts
        return float((wanted == values[0]).mean()), 1.0
    model = LogisticRegression(C=strength, max_iter=_STEPS).fit(training, values)
    return float(model.score(held_out, wanted)), float(model.score(training, values))


def control_labels(
    values: Int[np.ndarray, " texts"], of_text: Int[np.ndarray, " texts"], generator: np.random.Generator
) -> Int[np.ndarray, " texts"]:
    """A random label for each distinct text, drawn with the frequencies of the values (after Hewitt and Liang 2019)."""
    _, places = np.unique(of_text, return_inverse=True)
    return generator.choice(values, places.max() + 1)[places]


def _figures(
    parts: Sequence[np.ndarray],
    values: np.ndarray,
    of_text: np.ndarray,
    training: np.ndarray,
    held_out: np.ndarray,
    strength: float,
    seed: int,
) -> dict[str, float]:
    """Figures of one split; `parts` are codes, draws of z and bags of words."""
    codes = parts[0]
    control = control_labels(values, of_text, np.random.default_rng(seed))
    accuracy, of_draws, of_bags = (
        probe_accuracy(part[training], values[training], part[held_out], values[held_out], strength)[0]
        for part in parts
    )
    of_control, in_training = probe_accuracy(
        codes[training], control[training], codes[held_out], control[held_out], strength
    )
    most = np.bincount(values[training]).argmax()
    return {
        "accuracy": accuracy,
        "z sampled": of_draws,
        "majority": float((values[held_out] == most).mean()),
        "control": of_control,
        "selectivity": accuracy - of_control,
        "control in training": in_training,
        "bag of words": of_bags,
    }


def _split(values: np.ndarray, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(values))
    # at least one of each value on either side
    held_out = max(int(np.ceil(_HELD_OUT * len(rows))), values.max() + 1)
    training, others = train_test_split(rows, test_size=int(held_out), stratify=values, random_state=seed)
    if len(training) > most:
        training, _ = train_test_split(training, train_size=most, stratify=values[training], random_state=seed)
    return np.sort(training), np.sort(others)


def _reduced_bags(texts: Sequence[str], size: int) -> np.ndarray:
    """Bags of words in so many numbers, or as many as there are words or texts."""
    from sklearn.decomposition import TruncatedSVD

    bags = word_bags(texts)
    size = min(size, *bags.shape)
    if size < 1 or bags.nnz == 0 or bags.shape[1] == 1:
        return np.asarray(bags.todense(), dtype=np.float64)
    return TruncatedSVD(size, random_state=0).fit_transform(bags)


def _depths(values: pd.Series, name: str) -> pd.Series | None:
    """Of a factor whose values are parses in brackets; None of another."""
    known = values.dropna().astype(str).str.strip()
    if known.empty or not (known.str.startswith("(") & known.str.endswith(")") & (known.str.count(r"\(") > 1)).all():
        return None
    depths = {}
    for row, brackets in known.items():
        try:
            depths[row] = float(parse_depth(brackets))
        except InputError as error:
            raise InputError(f"row {int(str(row)) + 1} of the factor {name!r}: {error}") from error
    return pd.Series(depths).reindex(values.index)


def _named(values: pd.Series) -> tuple[np.ndarray, list[str]]:
    frequent = list(values.value_counts().index[:MOST_VALUES])
    places = {value: place for place, value in enumerate(frequent)}
    return np.array([places.get(value, UNKNOWN) for value in values]), [str(value) for value in frequent]


def _frequent(values: np.ndarray, classes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Without the values that have too few texts."""
    counts = np.bincount(values[values != UNKNOWN], minlength=len(classes))
    kept = np.flatnonzero(counts >= _LEAST_TEXTS)
    places = np.full(len(classes) + 1, UNKNOWN)  # the last is that of −1
    places[kept] = np.arange(len(kept))
    return places[values], [classes[place] for place in kept]
