"""What lies between two texts: paths from one z to the other, written step by step."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from latentlm.distributions import GaussianProcess
from latentlm.errors import InputError
from latentlm.probing.distances import TextDistance
from latentlm.probing.paths import bridge, linear, spherical
from latentlm.probing.result import ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts

PATHS = ("linear", "spherical", "gp")
_SHUFFLES = 20
_FIGURES = ("quality", "smoothness", "monotonicity")
Latents = list[np.ndarray]


def interpolation(
    space: LatentSpace,
    texts: Texts,
    *,
    paths: list[str] | None = None,
    pairs: int = 8,
    steps: int = 8,
    gap: int = 4,
    distance: str = "words",
    encoder: str | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Texts between pairs of texts: how smooth the way is, whether it goes one way, and whether it stays between them.

    Args:
        paths: linear, spherical, or gp (of trajectories); by default all that the model has.
        pairs: how many; the first text with the second, the third with the fourth, and so on.
        steps: moves of a path, so that it has one text more.
        gap: positions between the two texts that a path gp fills.
        distance: words (word mover's distance, needs POT) or sentence (one less the cosine, needs an encoder).
        encoder: a folder or hub name of a text encoder; words are its tokens then, and not the model's.
        seed: of the order of shuffled steps.
    """
    chosen = _paths(space, paths)
    if steps < 2 or gap < 0:
        raise InputError(f"a path needs at least 2 steps and a gap from 0 on, not {steps} and {gap}.")
    if pairs < 1:
        raise InputError(f"pairs must be at least 1, not {pairs}.")
    texts = texts.first(2 * pairs, "interpolation")
    measure = TextDistance(space, distance, encoder)
    means = space.means(texts)
    latents: Latents = []
    labels: list[Sequence[str]] = []
    rows = []
    for path in chosen:
        for pair in range(pairs):
            first, last = 2 * pair, 2 * pair + 1
            way = _way(space, path, means[first], means[last], gap)
            for step in range(steps + 1):
                share = step / steps
                latents.append(way(share))
                if texts.labels is not None:
                    labels.append(texts.labels[first if share < 0.5 else last])
                rows.append({"path": path, "pair": pair, "step": step})
    written = space.write(latents, labels if space.model.annotation_labels is not None else None)
    ways = pd.DataFrame(rows).assign(written=written).groupby(["path", "pair"], sort=False)["written"].apply(list)
    figures, places = [], []
    generator = np.random.default_rng(seed)
    for (path, pair), of_path in ways.items():
        ends = list(texts.texts[2 * pair : 2 * pair + 2])
        other = ways[path, (pair + 1) % pairs] if pairs > 1 else None
        row, to_ends = _figures(measure, of_path, ends, other, generator)
        figures.append({"path": path, "pair": pair, **row})
        places += [
            {"path": path, "pair": pair, "step": step, "text": text, "to the first": to_a, "to the last": to_b}
            for step, (text, (to_a, to_b)) in enumerate(zip(of_path, to_ends, strict=True))
        ]
    table = pd.DataFrame([_mean(path, group) for path, group in pd.DataFrame(figures).groupby("path", sort=False)])
    details = {
        "steps of each path": pd.DataFrame(places),
        "figures of each path": pd.DataFrame(figures),
        "pairs": pd.DataFrame({"pair": range(pairs), "first": texts.texts[::2], "last": texts.texts[1::2]}),
    }
    about = _about(space, chosen, pairs, steps, gap, measure, seed)
    panels = [
        lambda panel: _draw_way(panel, details["steps of each path"], steps),
        lambda panel: _draw_figures(panel, table),
    ]
    return ProbeResult("interpolation", about, table, details, panels)


def smoothness(distances: Float[np.ndarray, "texts texts"]) -> float:
    """d(x_0, x_n) ÷ Σ d(x_i, x_i+1) of a path of texts, by the distances between all of them (LangSpace's interpolation
    smoothness): 1 is a straight way, 0 one that comes back; NaN where none moves.
    """
    along = float(np.diagonal(distances, 1).sum())
    return float(distances[0, -1]) / along if along > 0 else float("nan")


def monotonicity(distances: Float[np.ndarray, "texts texts"]) -> float:
    """Spearman's correlation of the step's number with d(x_i, x_0) − d(x_i, x_n): 1 if every step leads on; NaN where
    the difference does not vary.
    """
    from scipy.stats import rankdata

    ranks = rankdata(distances[0] - distances[-1])
    if ranks.std() == 0:
        return float("nan")
    return float(np.corrcoef(np.arange(len(ranks)), ranks)[0, 1])


def quality(to_ends: Float[np.ndarray, "texts 2"], apart: float) -> float:
    """Mean of d(a, b) ÷ (d(a, x) + d(x, b)) over the inner texts x of a path between the texts a and b.

    1 for a text on a shortest way from a to b, less for one that leads away from both; a distance that is none by the
    triangle inequality (a cosine's) may exceed 1. NaN for equal a and b, and for a path without inner texts.

    Args:
        to_ends: d(x, a) and d(x, b) of all texts of the path.
        apart: d(a, b).
    """
    inner = to_ends[1:-1].sum(1)
    if apart <= 0 or not len(inner):
        return float("nan")
    return float((apart / inner).mean())


def _paths(space: LatentSpace, paths: list[str] | None) -> list[str]:
    has_process = space.model.latent_per_token and isinstance(space.model.prior(1, 1), GaussianProcess)
    chosen = [path for path in PATHS if path != "gp" or has_process] if paths is None else list(dict.fromkeys(paths))
    for path in chosen:
        if path not in PATHS:
            raise InputError(f"paths are {', '.join(PATHS)}, not {path!r}.")
        if path == "gp" and not has_process:
            raise InputError(
                f"a {type(space.model).__name__} has no Gaussian process over time: take linear or spherical."
            )
    return chosen


def _way(space: LatentSpace, path: str, a: np.ndarray, b: np.ndarray, gap: int) -> Callable[[float], np.ndarray]:
    """The latent at each share of the way."""
    if path == "gp":
        return lambda share: _bridged(space, a, b, share, gap)
    if space.model.latent_per_token:
        length = min(len(a), len(b))
        a, b = a[:length], b[:length]
    if path == "linear":
        return lambda share: linear(a, b, share)
    first, last = _whitened(space, a), _whitened(space, b)
    # the ends as they are, without the rounding of there and back
    ends = {0.0: a, 1.0: b}
    return lambda share: ends[share] if share in ends else _whitened(space, spherical(first, last, share), back=True)


@torch.no_grad()
def _whitened(space: LatentSpace, z: np.ndarray, back: bool = False) -> np.ndarray:
    """In coordinates in which the prior is N(0, I), or back from them; of a process, the noise that makes it."""
    prior = space.model.prior(1, len(z))
    if isinstance(prior, GaussianProcess):
        given = torch.from_numpy(z)[None].double().to(space.model.device)
        return (prior.color(given) if back else prior.whiten(given))[0].cpu().numpy()
    return space.from_standardised(z) if back else space.standardised(z).astype(np.float64)


@torch.no_grad()
def _bridged(space: LatentSpace, a: np.ndarray, b: np.ndarray, share: float, gap: int) -> np.ndarray:
    """a's beginning, b's end, and what the process makes of the gap; the cut goes from a's end to b's beginning, and
    the length from a's to b's.
    """
    if share in (0.0, 1.0):
        return a if share == 0 else b
    length = round((1 - share) * len(a) + share * len(b))
    cut = round((1 - share) * length)
    begun = min(max(cut - gap // 2, 0), len(a))
    ended = min(max(length - cut - (gap - gap // 2), 0), len(b))
    prior = space.model.prior(1, length)
    assert isinstance(prior, GaussianProcess)
    parts = torch.from_numpy(a[:begun]), torch.from_numpy(b[len(b) - ended :])
    return bridge(prior, *(part.to(space.model.device) for part in parts)).cpu().numpy()


def _figures(
    measure: TextDistance,
    of_path: list[str],
    ends: list[str],
    other: list[str] | None,
    generator: np.random.Generator,
) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of one path and their controls; and the distances of its texts to the two given ones."""
    distances = measure.between(of_path, of_path)
    to_ends = measure.between(of_path, ends)
    apart = float(measure.between(ends[:1], ends[1:])[0, 0])
    orders = [[0, *(1 + generator.permutation(len(of_path) - 2)), len(of_path) - 1] for _ in range(_SHUFFLES)]
    shuffled = [distances[np.ix_(order, order)] for order in orders]
    row = {
        "quality": quality(to_ends, apart),
        "quality, another pair's": float("nan") if other is None else quality(measure.between(other, ends), apart),
        "smoothness": smoothness(distances),
        "smoothness, shuffled": float(np.mean([smoothness(one) for one in shuffled])),
        "monotonicity": monotonicity(distances),
        "monotonicity, shuffled": float(np.mean([monotonicity(one) for one in shuffled])),
        "different texts": len(set(of_path)),
        "ends miss by": float(np.mean([to_ends[0, 0], to_ends[-1, 1]])) / apart if apart > 0 else float("nan"),
    }
    return row, to_ends


def _mean(path: str, group: pd.DataFrame) -> dict[str, Any]:
    means = group.drop(columns=["path", "pair"]).mean()
    return {"path": path, **means.to_dict(), "pairs": len(group), "that move": int(group["smoothness"].notna().sum())}


def _about(
    space: LatentSpace, paths: list[str], pairs: int, steps: int, gap: int, measure: TextDistance, seed: int
) -> str:
    text = (
        f"{pairs:,} pairs of texts (the first with the second, …), {steps} moves from the posterior mean of the one to "
        f"that of the other, written greedily. Distance d: {measure.described}. Quality: mean over inner steps x of "
        "d(a, b) ÷ (d(a, x) + d(x, b)), a and b the given texts: 1 for a text on a shortest way between them; its "
        "control: the steps of the next pair's path. Smoothness: d(x0, xn) ÷ Σ d(xi, xi+1), 1 is ideal. Monotonicity: "
        "Spearman's correlation of the step with d(xi, x0) − d(xi, xn). Shuffled, their control: inner steps in "
        f"{_SHUFFLES} random orders (seed {seed}), means. Ends miss by: distance of the two written ends to the given "
        "texts ÷ d(a, b). All are means over the pairs in which they are defined; pairs whose path has one text alone "
        "do not move."
    )
    if space.model.latent_per_token and set(paths) & {"linear", "spherical"}:
        text += " Trajectories of different lengths are cut to the shorter."
    if "spherical" in paths:
        text += " Spherical: in coordinates in which the prior is N(0, I), the norm going evenly."
    if "gp" in paths:
        text += (
            f" Gp: the text begins as the first and ends as the second, and {gap} positions where they meet are the "
            "mean of the Gaussian process given both; the cut and the length go from the one to the other."
        )
    if space.model.annotation_labels is not None:
        text += " Each step is written under the labels of the nearer text."
    return text


def _draw_way(panel: Any, places: pd.DataFrame, steps: int) -> None:
    share = places["to the first"] / (places["to the first"] + places["to the last"])
    means = places.assign(share=share).groupby(["path", "step"], sort=False)["share"].mean()
    for path, line in means.groupby(level=0, sort=False):
        panel.plot(line.index.get_level_values(1) / steps, line, marker="o", label=path)
    panel.plot([0, 1], [0, 1], "k--", linewidth=1, label="evenly")
    panel.set(
        xlabel="share of the way in z",
        ylabel="d(a, x) ÷ (d(a, x) + d(x, b))",
        title="how far the text is, mean of pairs",
    )
    panel.legend(frameon=False, fontsize=8)


def _draw_figures(panel: Any, table: pd.DataFrame) -> None:
    controls = ("quality, another pair's", "smoothness, shuffled", "monotonicity, shuffled")
    width = 0.8 / len(table)
    for place, (_, row) in enumerate(table.iterrows()):
        middles = np.arange(3) + (place - (len(table) - 1) / 2) * width
        panel.bar(middles, row[list(_FIGURES)].astype(float), width * 0.9, label=row["path"])
        panel.plot(middles, row[list(controls)].astype(float), "k_", markersize=60 * width, markeredgewidth=2)
    panel.plot([], [], "k_", markeredgewidth=2, label="control")
    panel.set_xticks(range(3), _FIGURES)
    panel.set(title="figures of the paths, and their controls")
    panel.axhline(0, color="0.6", linewidth=0.8)
    panel.legend(frameon=False, fontsize=8)
