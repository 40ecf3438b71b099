"""How far a decoder takes in what a latent says: likeness of its layers to the latent, attention, and effect on NLL."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from latentlm.errors import InputError
from latentlm.probing.inside import Scored, encoder_output, others, prior_means, score
from latentlm.probing.result import Draw, ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts

LEAST = 4  # for the unbiased estimate


def representation(space: LatentSpace, texts: Texts, *, most: int = 1000, seed: int = 0) -> ProbeResult:
    """Linear CKA between encoder, latent and each decoder layer; attention on the latent; what the latent does to NLL.

    Args:
        most: texts that are looked at, the first; fewer where there are fewer.
        seed: of the shuffled texts.
    """
    texts = texts.select(range(min(most, len(texts))))
    partner = others(space.means(texts))
    kept = np.flatnonzero(partner >= 0)
    if len(kept) < LEAST:
        fits = " of equal length" if space.model.latent_per_token else ""
        number = max(len(kept), min(len(texts), 1))  # one text has no other beside it
        raise InputError(f"CKA needs at least {LEAST} texts{fits}, and there are {number}: give more (--limit).")
    if len(kept) < len(texts):
        texts = texts.select(kept.tolist())
        partner = others(space.means(texts))
    means, codes = space.means(texts), space.codes(texts)
    own = score(space, texts, means, watch=True)
    swapped = score(space, texts, [means[row] for row in partner], watch=True)
    at_prior = score(space, texts, prior_means(space, means))
    encoder = encoder_output(space, texts)
    shuffled = np.random.default_rng(seed).permutation(len(texts))

    rows: list[dict[str, Any]] = []
    if encoder is not None:
        rows.append({"layer": "the latent itself", "encoder": cka(encoder, codes)})
        rows[0]["encoder, shuffled"] = cka(encoder[shuffled], codes)
    for place, name in enumerate(own.layers):
        state, other_state = own.states[place], swapped.states[place]
        row = {
            "layer": name,
            "latent": cka(codes, state),
            "latent, another text's z": cka(codes, other_state),
            "given latent, another text's z": cka(codes[partner], other_state),
            "latent, shuffled": cka(codes[shuffled], state),
        }
        if encoder is not None:
            row["encoder"] = cka(encoder, state)
            row["encoder, another text's z"] = cka(encoder, other_state)
            row["encoder, shuffled"] = cka(encoder[shuffled], state)
        if own.attention is not None and own.uniform is not None and swapped.attention is not None and place:
            row["attention on latent"] = float(own.attention[:, place - 1].mean())
            row["attention on another text's z"] = float(swapped.attention[:, place - 1].mean())
            row["uniform attention"] = float(own.uniform[:, place - 1].mean())
        rows.append(row)
    table = pd.DataFrame(rows)
    parts = {"latent": codes} | ({} if encoder is None else {"encoder": encoder})
    parts |= dict(zip(own.layers, own.states, strict=True))
    pairs = _pairs(parts, shuffled)
    effect = pd.DataFrame(
        {"z of": name, "nll per token": found.nats_per_token, "above own": found.nats_per_token - own.nats_per_token}
        for name, found in (("the text", own), ("another text", swapped), ("the prior's mean", at_prior))
    )
    about = _about(space, own, encoder is not None, len(texts), seed)
    details = {"effect of z": effect, "similarity": pairs}
    return ProbeResult("representation", about, table, details, _panels(table, pairs, effect, list(parts)))


def cka(
    first: Float[np.ndarray, "texts first"], second: Float[np.ndarray, "texts second"], *, debiased: bool = True
) -> float:
    """Linear centred kernel alignment of two representations of the same texts: 0 unrelated, 1 equal up to rotation and
    scale.

    HSIC(X, Y) ÷ √(HSIC(X, X) HSIC(Y, Y)) with K = X Xᵀ (Kornblith et al. 2019, arXiv 1905.00414, section 3). The biased
    HSIC, |Yᵀ X|² of centred columns, grows with the number of columns beside that of texts; the debiased is the
    unbiased estimate of Song et al. 2012 (JMLR 13; for CKA: Nguyen et al. 2021, arXiv 2010.15327, section 3), with
    which independent representations have a CKA of about 0, which may be negative.

    Returns:
        NaN where a representation is the same for all texts, or says so little that its own estimate is not above 0.

    Raises:
        InputError: of the debiased, fewer than 4 texts; representations of different numbers of texts.
    """
    if len(first) != len(second):
        raise InputError(f"representations of {len(first)} and {len(second)} texts cannot be compared: give the same.")
    if debiased and len(first) < LEAST:
        raise InputError(f"the debiased CKA needs at least {LEAST} texts, and there are {len(first)}: give more.")
    x, y = _prepared(first), _prepared(second)
    own = _hsic(x, x, debiased), _hsic(y, y, debiased)
    if min(own) <= 0:
        return float("nan")
    return float(_hsic(x, y, debiased) / np.sqrt(own[0] * own[1]))


def _prepared(features: Float[np.ndarray, "texts width"]) -> Float[np.ndarray, "texts width_or_texts"]:
    """Centred, of size 1, and with no more columns than texts: CKA knows of X no more than X Xᵀ."""
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    size = np.abs(centred).max(initial=0.0)
    # what is left of rounding is no representation
    if size <= 1e-7 * np.abs(features).max(initial=0.0):
        return np.zeros((len(features), 1))
    centred = centred / size
    if centred.shape[1] <= len(centred):
        return centred
    triangle: Any = np.linalg.qr(centred.T, mode="r")
    return triangle.T


def _hsic(x: Float[np.ndarray, "texts first"], y: Float[np.ndarray, "texts second"], debiased: bool) -> float:
    """Up to a factor that depends on the number of texts alone; of centred columns."""
    product = float(np.square(x.T @ y).sum())
    if not debiased:
        return product
    number = len(x)
    of_x, of_y = np.square(x).sum(1), np.square(y).sum(1)  # the diagonals of the kernels, which the estimate leaves out
    rows = number / (number - 2) * float(of_x @ of_y)
    return product - rows + float(of_x.sum() * of_y.sum()) / ((number - 1) * (number - 2))


def _pairs(parts: dict[str, np.ndarray], shuffled: np.ndarray) -> pd.DataFrame:
    names = list(parts)
    rows = []
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            row: dict[str, Any] = {"first": first, "second": second}
            for kind, debiased in (("debiased", True), ("biased", False)):
                row[kind] = cka(parts[first], parts[second], debiased=debiased)
                row[f"{kind}, shuffled"] = cka(parts[first], parts[second][shuffled], debiased=debiased)
            rows.append(row)
    return pd.DataFrame(rows)


def _about(space: LatentSpace, own: Scored, has_encoder: bool, texts: int, seed: int) -> str:
    fitting = " of its length" if space.model.latent_per_token else ""
    parts = [
        f"{texts:,} texts, each scored given the mean of its own q(z | x), and given that of another text{fitting} ("
        "the one that stands half of them further on). Figures of layers are linear CKA, debiased (Kornblith et al. "
        "2019; Song et al. 2012): 1 for the same up to rotation and scale, about 0 for unrelated. A layer is the mean "
        "of its states over the positions that foretell a token; input is what the first layer reads; the latent is "
        f"{space.view}."
    ]
    if has_encoder:
        parts.append("The encoder is what q is made of, before its maps to mean and variance.")
    parts.append(
        "“latent, another text's z” compares the text's own latent with layers that were given another's: what of the "
        "likeness comes from the text that the decoder reads; “given latent, another text's z” compares those layers "
        "with the latent that they were given: what comes through z alone. Shuffled: of texts paired at random, seed "
        f"{seed}; the biased CKA, in the details, is above 0 even then."
    )
    if own.attention is not None:
        parts.append(
            "Attention: the share of self-attention that falls on the latent, the mean over heads, positions and "
            "texts, beside what it would be if each position looked alike at all that it may see."
        )
    else:
        parts.append("This decoder's self-attention has no latent among what it sees, so there is no share of it.")
    parts.append(
        "Effect: −log p(x | z) in nats per token, a reconstruction and no bound, given z of the text, of another "
        "text, and the prior's mean."
    )
    return " ".join(parts)


def _panels(table: pd.DataFrame, pairs: pd.DataFrame, effect: pd.DataFrame, names: Sequence[str]) -> list[Draw]:
    def lines(panel: Any, styles: dict[str, str], title: str, ylabel: str) -> None:
        layers = table[table[next(iter(styles))].notna()]
        places = range(len(layers))
        for column, style in styles.items():
            if column in layers:
                panel.plot(places, layers[column], style, label=column)
        panel.set_xticks(places, layers["layer"], rotation=45, ha="right")
        panel.set(title=title, ylabel=ylabel)
        panel.legend(frameon=False, fontsize=8)

    def likeness(panel: Any) -> None:
        styles = {
            "latent": "C0o-",
            "latent, another text's z": "C0o--",
            "given latent, another text's z": "C2s-",
            "latent, shuffled": "C0:",
            "encoder": "C1o-",
            "encoder, another text's z": "C1o--",
        }
        lines(panel, styles, "Likeness of decoder layers", "debiased CKA")

    def grid(panel: Any) -> None:
        values = np.eye(len(names))
        for row in pairs.itertuples(index=False):
            first, second = names.index(row[0]), names.index(row[1])
            values[first, second] = values[second, first] = row[2]
        image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis")
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.set(title="Debiased CKA, z of the text")
        panel.figure.colorbar(image, ax=panel)

    def attention(panel: Any) -> None:
        styles = {"attention on latent": "C0o-", "attention on another text's z": "C2s--", "uniform attention": "k:"}
        lines(panel, styles, "Attention on the latent", "share")
        panel.set_ylim(bottom=0)

    def bars(panel: Any) -> None:
        panel.bar(effect["z of"], effect["nll per token"], color=["C0", "C2", "C7"])
        panel.set(title="What z does to the text", ylabel="nats per token")

    return [likeness, grid, *([attention] if "attention on latent" in table else []), bars]
