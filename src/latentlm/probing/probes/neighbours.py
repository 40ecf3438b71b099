"""Which texts are near which: what a latent space takes for alike."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

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
        raise InputError(f"{k} neighbours of each need {k + 1:,} texts, and there are {len(texts):,}.")
    codes = space.codes(texts)
    near, distances = nearest(codes, k, distance)
    rows = [
        {"text": texts.texts[row], "rank": rank + 1, "neighbour": texts.texts[other], "distance": distances[row, rank]}
        for row in range(queries)
        for rank, other in enumerate(near[row])
    ]
    shares = [] if texts.factors is None else [_shared(texts, name, near) for name in texts.factors.columns]
    about = (
        f"The {k} nearest of {len(texts):,} texts by the {distance} distance of codes ({space.view}, in prior "
        "standard deviations). Shared: how many of the neighbours of all texts have the text's own value of a factor; "
        "by chance: the same if neighbours were drawn at random from the other texts."
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


def _shared(texts: Texts, name: str, near: Int[np.ndarray, "texts k"]) -> dict[str, object]:
    values = texts.factor(name).to_numpy(dtype=object)
    known = pd.notna(values)
    same = (values[near] == values[:, None]) & known[:, None]
    counts = pd.Series(values[known]).value_counts().to_numpy()
    chance = float((counts * (counts - 1)).sum() / (known.sum() * (len(texts) - 1)))
    return {"factor": name, "shared": float(same[known].mean()), "by chance": chance, "texts": int(known.sum())}
