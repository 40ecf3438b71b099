"""Whether texts that are alike lie together: pictures in two dimensions, and figures that need none."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from latentlm.errors import InputError
from latentlm.probing.probes.neighbours import nearest, shared
from latentlm.probing.result import ProbeResult, Scatter
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import UNKNOWN, Texts

METHODS = ("pca", "tsne", "umap")
#: beyond so many texts the picture and the silhouette are of the first ones
MOST_DRAWN = 2000


def clusters(
    space: LatentSpace,
    texts: Texts,
    *,
    factors: list[str] | None = None,
    method: str = "tsne",
    k: int = 10,
    pictures: int = 6,
    seed: int = 0,
) -> ProbeResult:
    """Whether texts of one value of a factor lie together: silhouette, purity of neighbours, and a picture.

    Args:
        factors: which; by default all.
        method: pca, tsne or umap (needs umap-learn), of the picture alone.
        k: neighbours for the purity.
        pictures: at most so many, of the factors whose purity is furthest above that of shuffled values.
        seed: of the picture and of the shuffled values.
    """
    ids, names = texts.factor_ids(factors)
    codes = space.codes(texts)
    if not 1 <= k < len(texts):
        raise InputError(f"k must be from 1 to {len(texts) - 1:,} for {len(texts):,} texts, not {k}.")
    if pictures < 0:
        raise InputError(f"pictures must be 0 or more, not {pictures}.")
    near, _ = nearest(codes, k)
    shuffled = np.random.default_rng(seed).permutation(len(texts))
    rows = []
    for column, name in zip(ids.T, names, strict=True):
        row: dict[str, Any] = {"factor": name, "values": int(column.max()) + 1}
        for what, values in (("", column), (", shuffled", column[shuffled])):
            row |= {
                f"silhouette{what}": silhouette(codes, values),
                f"purity{what}": purity(values, near),
            }
        rows.append(row | {"texts": int((column != UNKNOWN).sum())})
    drawn = range(min(len(texts), MOST_DRAWN))
    plane = project(codes[: len(drawn)], method, seed)
    shown = [texts.texts[row] for row in drawn]
    gains = [row["purity"] - row["purity, shuffled"] for row in rows]
    clearest = sorted(range(len(names)), key=lambda place: -gains[place])[:pictures]
    scatters = [
        Scatter(
            plane,
            shown,
            [None if pd.isna(value) else str(value) for value in texts.factor(name)[: len(drawn)]],
            f"{name}, {method}",
        )
        for name in (names[place] for place in clearest)
    ]
    about = (
        f"{len(texts):,} texts, {space.view}, in prior standard deviations. Silhouette (Rousseeuw 1987; Euclidean; of "
        f"the first {MOST_DRAWN:,}): −1 to 1, by the latent's own numbers, not by the picture's. Purity: share of the "
        f"{k} nearest texts, of those whose value is known, that have the same. Beside each, the same with values "
        "shuffled among the texts. Only the 12 most frequent values count. Pictures: "
        f"{method} of the first {len(drawn):,}, seed {seed}, of the factors with the clearest purity."
    )
    return ProbeResult("clusters", about, pd.DataFrame(rows), scatters=scatters)


def silhouette(codes: Float[np.ndarray, "texts numbers"], values: np.ndarray) -> float:
    """Mean silhouette of the first texts whose value is known; NaN where fewer than two values have two texts."""
    from sklearn.metrics import silhouette_score

    known = np.flatnonzero(values != UNKNOWN)[:MOST_DRAWN]
    labels = values[known]
    if not 2 <= len(np.unique(labels)) < len(labels):
        return float("nan")
    return float(silhouette_score(codes[known], labels))


def purity(values: np.ndarray, near: np.ndarray) -> float:
    """Mean share of the neighbours of known value of a text that have its value; NaN where there are none."""
    known = values != UNKNOWN
    share, _ = shared(values[near] == values[:, None], known, near)
    return share


def project(codes: Float[np.ndarray, "texts numbers"], method: str, seed: int = 0) -> Float[np.ndarray, "texts 2"]:
    """Codes in two dimensions.

    Raises:
        InputError: an unknown method, UMAP where it is not installed, or too few texts.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    if len(codes) < 4:
        raise InputError(f"a picture of clusters needs at least 4 texts, not {len(codes)}.")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if codes.shape[1] == 1:
        return np.concatenate([codes, np.zeros_like(codes)], axis=1)
    if method == "pca":
        return PCA(2, random_state=seed).fit_transform(codes)
    if method == "tsne":
        perplexity = min(30.0, (len(codes) - 1) / 3)
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(codes).astype(np.float64)
    try:
        from umap import UMAP
    except ImportError as error:
        raise InputError("UMAP needs the package umap-learn: pip install 'latentlm[umap]', or take tsne.") from error
    neighbours = min(15, len(codes) - 1)
    start = "spectral" if len(codes) > 10 else "random"  # of a few texts there are not enough eigenvectors
    return UMAP(n_neighbors=neighbours, init=start, random_state=seed).fit_transform(codes).astype(np.float64)
