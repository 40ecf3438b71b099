"""What one dimension of a latent says: it is moved, all else is kept, and the text is written."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from latentlm.errors import InputError
from latentlm.probing.distances import edit_distance
from latentlm.probing.result import ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts

OVER = ("prior", "posterior")
#: dimensions that are moved unless some are asked for
MOST_DIMENSIONS = 4


def traversal(
    space: LatentSpace,
    texts: Texts,
    *,
    dimensions: list[int] | None = None,
    steps: int = 5,
    starts: int = 3,
    over: str = "prior",
    low: float = 0.05,
    high: float = 0.95,
    seed: int = 0,
) -> ProbeResult:
    """One dimension of z at quantiles of the prior, or of the posteriors of all texts, all else kept, and written.

    Args:
        dimensions: which, from 0; by default the 4 whose posterior means vary most, in prior standard deviations.
        steps: quantiles, evenly spaced from the lowest to the highest.
        starts: how many texts, the first, whose z is moved.
        over: prior, or posterior, the quantiles of one z of each text.
        low: the lowest quantile, above 0.
        high: the highest quantile, below 1.
        seed: of the control's directions, and of the z of each text.
    """
    if over not in OVER:
        raise InputError(f"over must be one of {', '.join(OVER)}, not {over!r}.")
    if not 0 < low < high < 1:
        raise InputError(f"quantiles go from low to high between 0 and 1, not from {low:g} to {high:g}.")
    if steps < 2:
        raise InputError(f"steps must be at least 2, not {steps}: one quantile moves nothing.")
    first = texts.first(starts, "traversal")
    size = space.event[-1]
    latents = [space.standardised(mean) for mean in space.means(texts)]
    for text, z in zip(first.texts, latents, strict=False):
        if space.part is not None and space.part >= len(z):
            raise InputError(f"{text[:60]!r} has no position {space.part}: start from longer texts.")
    spread = _spread(space, latents)
    chosen = list(np.argsort(-spread, kind="stable")[:MOST_DIMENSIONS]) if dimensions is None else dimensions
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= dimension < size for dimension in chosen):
        raise InputError(f"dimensions are different numbers from 0 to {size - 1} for this model, not {chosen}.")
    shares = np.linspace(low, high, steps).round(12)
    generator = np.random.default_rng(seed)
    values = _values(space, texts, shares, over, generator)
    rows, moved, control = [], [], []
    for row, text in enumerate(first.texts):
        for dimension in map(int, chosen):
            direction = generator.standard_normal(size)
            direction /= np.linalg.norm(direction)
            for share, value in zip(shares, values[:, dimension], strict=True):
                there = move(latents[row], dimension, float(value), space.part)
                distance = (there - latents[row])[..., dimension, None]
                moved.append(space.from_standardised(there))
                control.append(space.from_standardised(latents[row] + distance * direction))
                rows.append({"text": text, "row": row, "dimension": dimension, "quantile": share, "value": value})
    labels = None
    if space.model.annotation_labels is not None and first.labels is not None:
        labels = [first.labels[row["row"]] for row in rows]
    written = {"written": space.write(moved, labels), "written, random": space.write(control, labels)}
    details = _written(space, pd.DataFrame(rows).assign(**written))
    table = pd.DataFrame([_of_dimension(moves, spread) for _, moves in details.groupby("dimension", sort=False)])
    parts = "positions" if space.model.latent_per_token else "layers and latents"
    where = "" if len(space.event) == 1 else f" in all {parts}" if space.part is None else f" in part {space.part}"
    whose = "the prior" if over == "prior" else f"one z of each of {len(texts):,} texts (q(z | x), seed {seed})"
    about = (
        f"From the posterior means of {starts:,} of the texts, the first, one dimension"
        f"{' (of the last axis)' if where else ''} is put{where} to {steps} quantiles of {whose}, from {low:g} to "
        f"{high:g}, all else kept, and each z is written "
        f"greedily. Values and spread (the standard deviation of the posterior means of {len(texts):,} texts) are in "
        "prior standard deviations. Changed: share of the moves from a quantile to the next that change the text; "
        "edit distance: of the two texts, tokens edited ÷ tokens of the longer, mean over moves. Random: the same for "
        f"equally long moves along a random direction, one for each text and dimension (seed {seed}); a dimension "
        "whose moves change no more than those has no say of its own."
    )
    panels = [lambda panel: _draw_profile(panel, details, over), lambda panel: _draw_distances(panel, table)]
    return ProbeResult("traversal", about, table, {"texts that were written": details.drop(columns="row")}, panels)


def move(
    z: Float[np.ndarray, " *event"], dimension: int, value: float, part: int | None = None
) -> Float[np.ndarray, " *event"]:
    """A copy in which a dimension of the last axis has the value: in all parts, or in one of the first axis alone."""
    z = z.copy()
    (z if part is None or z.ndim == 1 else z[part])[..., dimension] = value
    return z


def prior_quantiles(shares: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """Φ⁻¹(u): the quantiles of a Gaussian prior in its standard deviations σ from its mean. σ, not log σ²."""
    return np.array([NormalDist().inv_cdf(float(share)) for share in shares])


def _values(
    space: LatentSpace, texts: Texts, shares: np.ndarray, over: str, generator: np.random.Generator
) -> Float[np.ndarray, "steps size"]:
    """Where each dimension is put, in prior standard deviations."""
    if over == "prior":
        return np.repeat(prior_quantiles(shares)[:, None], space.event[-1], axis=1)
    drawn = [space.standardised(z) for z in space.draws(texts, generator)]
    return np.quantile(_stacked(space, drawn), shares, axis=0)


def _stacked(space: LatentSpace, latents: Sequence[np.ndarray]) -> Float[np.ndarray, "parts size"]:
    """The parts of all latents that are moved, one under another."""
    size = space.event[-1]
    if space.part is not None and len(space.event) > 1:
        latents = [z[space.part] for z in latents if space.part < len(z)]
    return np.concatenate([z.reshape(-1, size) for z in latents]) if latents else np.zeros((1, size))


def _spread(space: LatentSpace, latents: Sequence[np.ndarray]) -> Float[np.ndarray, " size"]:
    """Of each dimension the standard deviation over texts; of parts, over texts and parts together for trajectories,
    and over texts in the mean over all parts for layers, which differ by themselves.
    """
    if space.model.latent_per_token or len(space.event) == 1:
        return _stacked(space, latents).std(0).astype(np.float64)
    whole = np.stack(latents) if space.part is None else np.stack(latents)[:, space.part]
    return np.sqrt(whole.var(0).reshape(-1, space.event[-1]).mean(0)).astype(np.float64)


def _written(space: LatentSpace, details: pd.DataFrame) -> pd.DataFrame:
    """With the edit distances of each text to that of the quantile before it, and to that of the lowest."""
    for name in ("", ", random"):
        tokens = space.tokenizer(details[f"written{name}"].tolist(), add_special_tokens=False)["input_ids"]
        begins = details["quantile"].eq(details["quantile"].min()).to_numpy().nonzero()[0]
        starts = begins.repeat(len(details) // len(begins))
        before = [None if row in begins else edit_distance(tokens[row - 1], tokens[row]) for row in range(len(details))]
        details[f"edit distance{name}"] = pd.array(before, dtype="Float64").to_numpy(float, na_value=np.nan)
        details[f"from the lowest{name}"] = [
            edit_distance(tokens[start], tokens[row]) for row, start in enumerate(starts)
        ]
    return details


def _of_dimension(moves: pd.DataFrame, spread: np.ndarray) -> dict[str, Any]:
    dimension = int(moves["dimension"].iloc[0])
    row: dict[str, Any] = {"dimension": dimension, "spread": float(spread[dimension])}
    for name in ("", ", random"):
        distances = moves[f"edit distance{name}"].dropna()
        row |= {f"changed{name}": float(distances.gt(0).mean()), f"edit distance{name}": float(distances.mean())}
    return row | {"moves": len(distances)}


def _draw_profile(panel: Any, details: pd.DataFrame, over: str) -> None:
    means = details.groupby(["dimension", "quantile"], sort=False)[
        ["from the lowest", "from the lowest, random"]
    ].mean()
    for dimension, line in means.groupby(level=0, sort=False):
        panel.plot(line.index.get_level_values(1), line["from the lowest"], marker="o", label=f"dimension {dimension}")
    random = means.groupby(level=1)["from the lowest, random"].mean()
    panel.plot(random.index, random, "k--", label="random directions")
    panel.set(xlabel=f"quantile of the {over}", ylabel="edit distance", title="to the text of the lowest quantile")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=8)


def _draw_distances(panel: Any, table: pd.DataFrame) -> None:
    places = np.arange(len(table))
    panel.bar(places - 0.2, table["edit distance"], 0.4, label="the dimension")
    panel.bar(places + 0.2, table["edit distance, random"], 0.4, color="0.7", label="a random direction")
    panel.set_xticks(places, table["dimension"])
    panel.set(xlabel="dimension", ylabel="edit distance", title="of texts of neighbouring quantiles")
    panel.legend(frameon=False, fontsize=8)
