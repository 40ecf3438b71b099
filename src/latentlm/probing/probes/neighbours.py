"""Which texts are near which: what a latent space takes for alike."""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from latentlm.errors import InputError
from latentlm.probing.result import ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts

DISTANCES = ("euclidean", "cosine")


def neighbours(
    space: LatentSpace, texts: Texts, *, queries: int = 10, k: int = 5, distance: str = "euclidean"
) -> ProbeResult:
    """The nearest texts of the first ones, among all the others, and how often nearest neighbours share a factor.

    Args:
        queries: how many texts, the first, are shown with their neighbours.
        k: neighbours of each.
        distance: euclidean, in prior standard deviations; or cosine, one less the cosine of the codes.
    """
    texts.first(queries, "neighbours")
    if not 1 <= k < len(texts):
        raise InputError(f"k must be from 1 to {len(texts) - 1:,} for {len(texts):,} texts, not {k}.")
    codes = space.codes(texts)
    near, distances = nearest(codes, k, distance)
    rows = [
        {"text": texts.texts[row], "rank": rank + 1, "neighbour": texts.texts[other], "distance": distances[row, rank]}
        for row in range(queries)
        for rank, other in enumerate(near[row])
    ]
    shares = [_shares(texts, name, near) for name in texts.telling()]
    about = (
        f"The {k} nearest of {len(texts):,} texts by the {distance} distance of codes ({space.view}, in prior "
        "standard deviations). Shared: how many of the neighbours of a text, of those whose value is known, have the "
        "text's own value of a factor, mean over texts; by chance: the same if neighbours were drawn at random."
    )
    listed = pd.DataFrame(rows)
    if not shares:
        return ProbeResult("neighbours", about, listed)
    return ProbeResult("neighbours", about, pd.DataFrame(shares), {"neighbours of the first texts": listed})


def nearest(
    codes: Float[np.ndarray, "texts numbers"], k: int, distance: str = "euclidean"
) -> tuple[Int[np.ndarray, "texts k"], Float[np.ndarray, "texts k"]]:
    """Of each row the k nearest other rows, nearest first, and their distances.

    Raises:
        InputError: an unknown distance.
    """
    from sklearn.neighbors import NearestNeighbors

    if distance not in DISTANCES:
        raise InputError(f"distance must be one of {', '.join(DISTANCES)}, not {distance!r}.")
    found = NearestNeighbors(n_neighbors=k, metric=distance, algorithm="brute").fit(codes)
    distances, rows = found.kneighbors()  # without rows of its own it leaves each row itself out
    return rows, distances


def shared(
    same: Bool[np.ndarray, "texts k"], known: Bool[np.ndarray, " texts"], near: Int[np.ndarray, "texts k"]
) -> tuple[float, int]:
    """The share of a text's neighbours, of those whose value is known, that have its own, mean over the texts of known
    value that have any such; NaN where none has. And the number of these texts.

    Args:
        same: whether each neighbour has the text's value.
    """
    of_known = known[near].sum(1)
    counted = known & (of_known > 0)
    if not counted.any():
        return float("nan"), 0
    return float(((same & known[near]).sum(1)[counted] / of_known[counted]).mean()), int(counted.sum())


def _shares(texts: Texts, name: str, near: Int[np.ndarray, "texts k"]) -> dict[str, object]:
    values = texts.factor(name).to_numpy(dtype=object)
    known = pd.notna(values)
    share, number = shared(values[near] == values[:, None], known, near)
    counts = pd.Series(values[known]).value_counts().to_numpy()
    chance = float((counts * (counts - 1)).sum() / (known.sum() * (known.sum() - 1)))
    return {"factor": name, "shared": share, "by chance": chance, "texts": number}
