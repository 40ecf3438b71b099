"""What each layer of a latent holds, where every layer of the decoder has latents of its own (LTM)."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from latentlm.distributions import kl_per_dimension
from latentlm.errors import InputError
from latentlm.evaluation.batches import evaluating
from latentlm.probing.inside import others, prior_means, score
from latentlm.probing.result import Draw, ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import UNKNOWN, Texts

#: Var_x E_q[z] above so much of the prior's variance (Burda et al. 2016, section 5.1)
ACTIVE = 0.01


def layers(
    space: LatentSpace,
    texts: Texts,
    *,
    factors: list[str] | None = None,
    most: int = 2000,
    scored: int = 200,
    seed: int = 0,
) -> ProbeResult:
    """What each layer's latents hold: KL, active units, factors by logistic regression, and their part in the NLL.

    Example: latentlm probe layers MODEL --data builtin:stories --limit 2000 (an LTM, or another model of layers)

    Args:
        factors: which; by default all that tell something, if any are known.
        most: texts for active units and factors, the first; fewer where there are fewer.
        scored: texts for KL and NLL, the first; fewer where there are fewer.
        seed: of the split into texts that are fitted and held out, and of the shuffled factors.
    """
    kind = type(space.model).__name__
    if len(space.event) < 2 or space.model.latent_per_token:
        raise InputError(f"{kind} has no latents of layers: this probe is for models such as LTM.")
    if space.part is not None:
        raise InputError("the probe shows all layers, each by itself: leave part out (--part).")
    if len(texts) < 2:
        raise InputError("latents of layers are compared with another text's, and there is one: give at least 2.")
    texts = texts.select(range(min(most, len(texts))))
    few = texts.select(range(max(2, min(scored, len(texts)))))
    names = [*(f"layer {number}" for number in range(1, space.event[0] + 1)), "all"]

    codes = np.stack([space.standardised(mean) for mean in space.means(texts)]).astype(np.float64)
    codes = codes.reshape(*codes.shape[:2], -1, codes.shape[-1])
    active = codes.var(0) > ACTIVE
    units = int(np.prod(active.shape[1:]))
    kl = kl_of_layers(space, few)
    own, by_prior, by_other = _effects(space, few)
    table = pd.DataFrame(
        {
            "layer": name,
            "kl per text": kl[:, place].mean(),
            "active units": int(active[place].sum()),
            "units": units,
            "nll per token": own,
            "by prior's mean": by_prior[place],
            "by another text's": by_other[place],
        }
        for place, name in enumerate(names[:-1])
    )
    total = {"layer": "all", "kl per text": kl.sum(1).mean(), "active units": int(active.sum()), "units": active.size}
    total |= {"nll per token": own, "by prior's mean": by_prior[-1], "by another text's": by_other[-1]}
    table = pd.concat([table, pd.DataFrame([total])], ignore_index=True)
    details: dict[str, pd.DataFrame] = {}
    panels = _panels(table)
    chosen = texts.telling() if factors is None else factors
    if chosen:
        found = _accuracies(texts, chosen, names, codes, seed)
        details["factors"] = found
        columns = ["accuracy", "majority", "accuracy, shuffled"]
        table = table.merge(found.groupby("layer", sort=False)[columns].mean().reset_index(), on="layer")
        panels.append(_factor_panel(found, names))
    about = (
        f"Latents of {' × '.join(map(str, space.event))} (layers × latents × numbers). KL(q ‖ p) in nats per text, and "
        f"NLL, of {len(few):,} texts; active units (Burda et al. 2016: variance over texts of the posterior mean "
        f"above {ACTIVE} of the prior's) of {len(texts):,}. NLL per token: −log p(x | z) in nats at the posterior mean "
        "of all layers, a reconstruction and no bound; “by prior's mean” and “by another text's”: how much it rises "
        "when that layer's latents are replaced by these and the other layers' stay (all: every layer's are replaced)."
    )
    if chosen:
        about += (
            f" Factors, the mean of {len(chosen)}, and each in the details: accuracy of a logistic regression on the "
            "mean over a layer's latents (all: over all latents) in prior standard deviations and not scaled again, so "
            f"that what lies far within the noise of z tells nothing; fitted to two thirds of {len(texts):,} texts and "
            "asked of the rest; beside the share of the most frequent value (floor) and the same regression on values "
            f"shuffled among the texts (control). Only the 12 most frequent values count. Seed {seed}."
        )
    return ProbeResult("layers", about, table, details, panels)


@torch.no_grad()
def kl_of_layers(space: LatentSpace, texts: Texts) -> Float[np.ndarray, "texts layers"]:
    """KL(q(z_l | x) ‖ p(z_l)) in nats of each layer's latents, whose sum is the KL where q and p factorise over layers.

    Raises:
        InputError: a model whose q or p does not.
    """
    model = space.model
    found = np.zeros((len(texts), space.event[0]))
    with evaluating(model):
        for indices, input_ids, attention_mask, condition in space.batches(texts):
            posterior = model.infer(input_ids, attention_mask, condition, seed=space.seed)
            lengths = model.scored_tokens(input_ids, attention_mask).sum(1)
            try:
                each = kl_per_dimension(posterior, model.prior(len(input_ids), lengths, condition))
            except TypeError as error:
                raise InputError(f"a {type(model).__name__} has no KL for each layer: {error}.") from error
            found[indices] = each.double().flatten(2).sum(2).cpu().numpy()
    return found


def held_out_accuracy(
    codes: Float[np.ndarray, "texts numbers"], values: np.ndarray, fitted: np.ndarray, held_out: np.ndarray
) -> float:
    """Of a logistic regression (L2, C = 1) of known values; NaN where it cannot be asked.

    Args:
        fitted, held_out: rows; those of unknown value do not count.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    fitted, held_out = fitted[values[fitted] != UNKNOWN], held_out[values[held_out] != UNKNOWN]
    if len(np.unique(values[fitted])) < 2 or not len(held_out):
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of weights change no accuracy
        model = LogisticRegression(max_iter=200).fit(codes[fitted], values[fitted])
    return float(model.score(codes[held_out], values[held_out]))


def majority_share(values: np.ndarray, fitted: np.ndarray, held_out: np.ndarray) -> float:
    """Accuracy on the held out of the value that is the most frequent among the fitted."""
    fitted, held_out = values[fitted], values[held_out]
    fitted, held_out = fitted[fitted != UNKNOWN], held_out[held_out != UNKNOWN]
    if not len(fitted) or not len(held_out):
        return float("nan")
    return float((held_out == np.bincount(fitted).argmax()).mean())


def _accuracies(
    texts: Texts,
    factors: Sequence[str],
    names: Sequence[str],
    codes: Float[np.ndarray, "texts layers latents numbers"],
    seed: int,
) -> pd.DataFrame:
    ids, _ = texts.factor_ids(factors)
    generator = np.random.default_rng(seed)
    order, shuffled = generator.permutation(len(texts)), generator.permutation(len(texts))
    split = max(1, 2 * len(texts) // 3)
    fitted, held_out = order[:split], order[split:]
    rows = []
    for place, layer in enumerate(names):
        of_layer = codes.mean((1, 2)) if layer == "all" else codes[:, place].mean(1)
        for column, name in zip(ids.T, factors, strict=True):
            rows.append(
                {
                    "layer": layer,
                    "factor": name,
                    "accuracy": held_out_accuracy(of_layer, column, fitted, held_out),
                    "majority": majority_share(column, fitted, held_out),
                    "accuracy, shuffled": held_out_accuracy(of_layer, column[shuffled], fitted, held_out),
                    "held out": int((column[held_out] != UNKNOWN).sum()),
                }
            )
    return pd.DataFrame(rows)


def _effects(space: LatentSpace, texts: Texts) -> tuple[float, list[float], list[float]]:
    """NLL per token at the texts' own means, and how much it rises with each layer's, and all, latents replaced."""
    means = space.means(texts)
    at_prior = prior_means(space, means)
    of_other = [means[row] for row in others(means)]
    own = score(space, texts, means).nats_per_token

    def rises(replacements: Sequence[np.ndarray]) -> list[float]:
        found = []
        for layer in [*range(space.event[0]), slice(None)]:
            mixed = [mean.copy() for mean in means]
            for latent, replacement in zip(mixed, replacements, strict=True):
                latent[layer] = replacement[layer]
            found.append(score(space, texts, mixed).nats_per_token - own)
        return found

    return own, rises(at_prior), rises(of_other)


def _panels(table: pd.DataFrame) -> list[Draw]:
    def kl(panel: Any) -> None:
        rows = table[table["layer"] != "all"]
        panel.bar(rows["layer"], rows["kl per text"])
        panel.set(title="KL of each layer", ylabel="nats per text")
        for place, (active, units) in enumerate(zip(rows["active units"], rows["units"], strict=True)):
            panel.annotate(f"{active} of {units} active", (place, rows["kl per text"].iloc[place]), ha="center",
                           va="bottom", fontsize=8)  # fmt: skip

    def effect(panel: Any) -> None:
        places = np.arange(len(table))
        panel.bar(places - 0.2, table["by prior's mean"], 0.4, label="by the prior's mean")
        panel.bar(places + 0.2, table["by another text's"], 0.4, label="by another text's")
        panel.set_xticks(places, table["layer"])
        panel.axhline(0, color="k", linewidth=0.5)
        panel.set(title="Rise of NLL when latents are replaced", ylabel="nats per token")
        panel.legend(frameon=False, fontsize=8)

    return [kl, effect]


def _factor_panel(found: pd.DataFrame, names: Sequence[str]) -> Draw:
    def draw(panel: Any) -> None:
        above = found.assign(above=found["accuracy"] - found["majority"])
        grid = above.pivot(index="factor", columns="layer", values="above").loc[found["factor"].unique(), list(names)]
        largest = max(float(np.nanmax(np.abs(grid.to_numpy()), initial=0)), 0.01)
        panel.imshow(grid, vmin=-2 * largest, vmax=2 * largest, cmap="PuOr", aspect="auto")  # pale enough to read on
        panel.set_xticks(range(len(names)), names)
        panel.set_yticks(range(len(grid)), grid.index, fontsize=8)
        for row, values in enumerate(grid.to_numpy()):
            for column, value in enumerate(values):
                panel.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=7)
        panel.set(title="Factors: held-out accuracy above the majority's share")

    return draw
