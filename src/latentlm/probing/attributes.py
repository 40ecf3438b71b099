"""Vectors that carry an attribute: the mean latent of texts that have it, less that of texts that do not."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from latentlm.errors import InputError
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts

#: of a value, so that each half has two of them
FEWEST = 4
#: that are tried unless one is asked for
MOST_ATTRIBUTES = 3
#: how the name of a figure begins
SHARE = "share read as "


@dataclass(frozen=True)
class Attribute:
    """A factor's two values, and the texts that have them, each in two halves: one to learn from, one to try.

    Args:
        before, after: the most frequent value, and the second.
        learn, tried: rows of texts, those with `before` and those with `after`.
    """

    name: str
    before: str
    after: str
    learn: tuple[np.ndarray, np.ndarray]
    tried: tuple[np.ndarray, np.ndarray]


def choose_attributes(texts: Texts, factor: str | None, seed: int) -> list[Attribute]:
    """A factor's two most frequent values; by default of each of the first factors with two values, or else of the
    first with more; none where none has enough texts.

    Raises:
        InputError: no such factor, or one without two values of four texts each.
    """
    if factor is not None:
        found = _attribute(texts, factor, seed)
        if found is None:
            raise InputError(
                f"the factor {factor!r} has no two values of at least {FEWEST} texts each: give more texts, or another."
            )
        return [found]
    names = [] if texts.factors is None else list(texts.factors.columns)
    all_found = [found for name in names if (found := _attribute(texts, name, seed)) is not None]
    of_two = [found for found in all_found if texts.factor(found.name).nunique() == 2]
    return of_two[:MOST_ATTRIBUTES] or all_found[:1]


def _attribute(texts: Texts, name: str, seed: int) -> Attribute | None:
    values = texts.factor(name)
    counts = values.value_counts(sort=True)
    counts = counts[counts >= FEWEST].iloc[:2]
    if len(counts) < 2:
        return None
    generator = np.random.default_rng(seed)
    halves = []
    for value in counts.index:
        rows = generator.permutation(np.flatnonzero(values.eq(value).to_numpy()))
        halves.append((np.sort(rows[: len(rows) // 2]), np.sort(rows[len(rows) // 2 :])))
    (learn_before, tried_before), (learn_after, tried_after) = halves
    before, after = map(str, counts.index)
    return Attribute(name, before, after, (learn_before, learn_after), (tried_before, tried_after))


def add_attribute(
    space: LatentSpace, texts: Texts, attribute: Attribute, scale: float, most: int, seed: int
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Adds the vector to texts that lack the attribute, and says how many of them have it when they are read again."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    latents = [space.standardised(mean) for mean in space.means(texts)]
    codes = space.codes(texts)
    vector = _mean(space, [latents[row] for row in attribute.learn[1]]) - _mean(
        space, [latents[row] for row in attribute.learn[0]]
    )
    has = [np.repeat([False, True], list(map(len, half))) for half in (attribute.learn, attribute.tried)]
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    regression.fit(codes[np.concatenate(attribute.learn)], has[0])
    accuracy = float(regression.score(codes[np.concatenate(attribute.tried)], has[1]))
    # as often right as always the more frequent value is
    chance = float(max(has[1].mean(), 1 - has[1].mean()))

    lacking, having = (rows[:most] for rows in attribute.tried)
    generator = np.random.default_rng(seed)
    length = float(np.linalg.norm(vector))
    randoms = generator.standard_normal((len(lacking), *vector.shape))
    randoms *= length / np.linalg.norm(randoms.reshape(len(lacking), -1), axis=1).reshape(-1, *[1] * vector.ndim)
    changed = {
        "with the vector": (lacking, [latents[row] + scale * vector for row in lacking]),
        "without": (lacking, [latents[row] for row in lacking]),
        "with a random vector": (
            lacking,
            [latents[row] + scale * random for row, random in zip(lacking, randoms, strict=True)],
        ),
        "texts that have it": (having, [latents[row] for row in having]),
    }
    figure = f"{SHARE}{attribute.name} = {attribute.after}"
    rows: list[dict[str, Any]] = []
    written: dict[str, Any] = {
        "attribute": f"{attribute.name}: {attribute.before} → {attribute.after}",
        "text": [texts.texts[row] for row in lacking],
    }
    for how, (places, moved) in changed.items():
        labels = None
        if space.model.annotation_labels is not None and texts.labels is not None:
            labels = tuple(texts.labels[row] for row in places)
        found = space.write([space.from_standardised(z) for z in moved], labels)
        taken = regression.predict(space.codes(Texts(tuple(found), labels)))
        rows.append({"figure": figure, "of": how, "value": float(taken.mean()), "number": len(places)})
        if places is lacking:
            written |= {how: found, f"{how}, read as": np.where(taken, attribute.after, attribute.before).tolist()}
    figure = f"accuracy of {attribute.name} from codes"
    rows.append({"figure": figure, "of": "logistic regression", "value": accuracy, "number": len(has[1])})
    rows.append({"figure": figure, "of": "the more frequent value", "value": chance, "number": len(has[1])})
    return rows, pd.DataFrame(written)


def _mean(space: LatentSpace, latents: list[np.ndarray]) -> np.ndarray:
    """Over texts; of trajectories over each one's positions first, since they have different lengths."""
    if space.model.latent_per_token:
        latents = [z.mean(0) for z in latents]
    return np.stack(latents).mean(0)
