"""Whether a model's probabilities of the next token are as often right as they say, and what each position costs.

The predictive distribution of a latent model must not have seen what it predicts. With z_k ~ p(z), or after a prompt of
P tokens z_k ~ q(z | x_1 … x_P), k = 1 … K,

    p̂(x_t | x_<t) = Σ_k w_k(t) p(x_t | z_k, x_<t),    w_k(t) ∝ Π_{P < s < t} p(x_s | z_k, x_<s)

that is sequential importance sampling: the text so far says which z_k it may have come from. The product over t
telescopes to (1/K) Σ_k p(x_{P+1} … x_T | z_k), so the NLLs of all positions sum to the one that `continuation` gives
for the same seed. For finite K this is itself a law of text, whose calibration is measured; a model without latents has
its own. A parallel decoder is given the text's length.

Expected calibration error: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3, of the most probable
token.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from latentlm.errors import InputError
from latentlm.evaluation.batches import evaluating, in_batches
from latentlm.evaluation.continuation import latents_of_prompts, longer_than_prompt
from latentlm.files import whole_file
from latentlm.latent_lm import LatentLM
from latentlm.processes import gather_rows

#: bins of confidence, as in Guo et al. 2017, Table 1
BINS = 15


@torch.no_grad()
def log_predictive(
    model: LatentLM,
    input_ids: Int64[Tensor, "batch time"],
    attention_mask: Int64[Tensor, "batch time"],
    condition: Any = None,
    *,
    prompt_tokens: int = 0,
    samples: int = 16,
    seed: int = 0,
) -> Float[Tensor, "batch after vocabulary"]:
    """log p̂(x_t = v | x_<t) in nats, float32, of each place t = P + 1 … T and each token v; padding is on the
    right, and what stands at its places is of no use.

    Memory: three tensors of this size at most, however many samples there are.

    Args:
        prompt_tokens: P; z is inferred from so many tokens, or drawn from the prior (0).
        samples: K; an exact model needs one.
    """
    end = input_ids.shape[1] - 1
    given = torch.full((len(input_ids),), prompt_tokens, device=model.device)
    drawn = latents_of_prompts(
        model, input_ids, attention_mask, condition,
        prompt_tokens=given, end=end, samples=1 if model.exact else samples, seed=seed,
    )  # fmt: skip
    targets = input_ids[:, 1 + prompt_tokens :, None]
    mixture: Tensor | None = None  # log p̂ of the samples so far
    evidence = torch.zeros(())  # log Σ_k Π_{s < t} p(x_s | z_k, x_<s) over them, float64
    for z in drawn:
        logits = model.decode(z, input_ids, attention_mask, condition)[:, prompt_tokens:]
        one = logits.float().log_softmax(-1)
        del logits
        chosen = one.gather(-1, targets)[..., 0].double()
        before = torch.nn.functional.pad(chosen[:, :-1].cumsum(-1), (1, 0))
        if mixture is None:
            mixture, evidence = one, before
            continue
        both = torch.logaddexp(evidence, before)
        mixture += (evidence - both).float()[..., None]
        one += (before - both).float()[..., None]
        torch.logaddexp(mixture, one, out=mixture)
        evidence = both
    assert mixture is not None
    return mixture


@torch.no_grad()
def calibration(
    model: LatentLM,
    sequences: Dataset,
    *,
    prompt_tokens: int = 0,
    samples: int = 16,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Calibration and NLL by position of every sequence longer than the prompt.

    Args:
        prompt_tokens: P, scored tokens of each sequence that are given and not judged. Of annotated texts all labels
            are given, those of what follows, too.
        samples: K.
        batch_size: sequences at a time; each of their tokens needs three rows of the whole vocabulary in float32.

    Returns:
        The figures of `reliability`; `predictive_nll_per_token` (Σ nats ÷ Σ tokens after the prompt), the mean
        `predictive_entropy_nats` of p̂, where a calibrated model has both alike, `nll_by_position` (lists of
        `position` in the text, from 1, `nll_nats`, the mean over the texts that are so long, and `tokens`, how many
        those are), `sequences`, `tokens`, `exact`, `conditional` and the settings.

    Raises:
        InputError: no sequence is longer than the prompt, or a probability is not finite.
    """
    if prompt_tokens < 0 or samples < 1:
        raise InputError("prompt_tokens must not be negative, and samples must be at least 1.")
    long = longer_than_prompt(sequences, prompt_tokens)
    rows = [torch.zeros(0, 6, dtype=torch.double, device=model.device)]
    conditional = False
    with evaluating(model):
        for indices, input_ids, attention_mask, condition in in_batches(model, long, batch_size, on_progress):
            conditional = conditional or condition is not None
            found = log_predictive(
                model, input_ids, attention_mask, condition, prompt_tokens=prompt_tokens, samples=samples, seed=seed
            )
            scored = model.scored_tokens(input_ids, attention_mask)[:, prompt_tokens:]
            row, place = scored.nonzero(as_tuple=True)
            targets = input_ids[:, 1 + prompt_tokens :]
            log_confidence, top = found.max(-1)
            nll = -found.gather(-1, targets[..., None])[..., 0]
            entropy = torch.special.entr(found.exp_()).sum(-1)
            of_tokens = (log_confidence.exp(), top == targets, nll, entropy)
            index = torch.tensor(indices, device=model.device)[row]
            rows.append(torch.stack([part.double() for part in (index, place, *(one[scored] for one in of_tokens))], 1))
        table = gather_rows(torch.cat(rows)).cpu().numpy()
    # in the data's order, so that sums have one value whatever the batches and the processes
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    _, places, confidence, correct, nll, entropy = table.T
    if not np.isfinite(nll).all():
        raise InputError("a token has no finite NLL: the model or its inference diverged, so no figure of it counts.")
    return {
        "sequences": len(long),
        "tokens": len(table),
        "exact": model.exact,
        "conditional": conditional,
        "prompt_tokens": prompt_tokens,
        "predictive_samples": 1 if model.exact else samples,
        "predictive_nll_per_token": float(nll.mean()),
        "predictive_entropy_nats": float(entropy.mean()),
        **reliability(confidence, correct.astype(bool)),
        "nll_by_position": _by_position(places.astype(int), nll, prompt_tokens + 1),
    }


def reliability(
    confidence: Float64[np.ndarray, " tokens"], correct: Bool[np.ndarray, " tokens"], bins: int = BINS
) -> dict[str, Any]:
    """How often the most probable token is the right one, beside the probability that it was given.

    Returns:
        `accuracy` and `mean_confidence`; `expected_calibration_error` = Σ_m |B_m| / n · |accuracy(B_m) −
        confidence(B_m)| over bins B_m = ((m − 1) / M, m / M] of equal width, `adaptive_calibration_error` over bins of
        equal numbers of tokens (Nguyen and O'Connor 2015; ties stay in the data's order); and `reliability`, a row for
        each bin of equal width with a token in it: `from`, `to`, `tokens`, `confidence`, `accuracy`.

    Raises:
        InputError: there is no token.
    """
    if not len(confidence):
        raise InputError("there is no token whose probability could be judged.")
    # (a, b]: 1 is of the last bin, as is what rounding has put above it
    places = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1).astype(int)
    rows = []
    for place in np.unique(places):
        inside = places == place
        rows.append(
            {
                "from": float(place / bins),
                "to": float((place + 1) / bins),
                "tokens": int(inside.sum()),
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(correct[inside].mean()),
            }
        )
    parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
    gaps = [abs(confidence[part].sum() - correct[part].sum()) for part in parts]
    return {
        "accuracy": float(correct.mean()),
        "mean_confidence": float(confidence.mean()),
        "expected_calibration_error": sum(row["tokens"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
        / len(confidence),
        "adaptive_calibration_error": float(sum(gaps)) / len(confidence),
        "calibration_bins": bins,
        "reliability": rows,
    }


def _by_position(
    places: Int64[np.ndarray, " tokens"], nll: Float64[np.ndarray, " tokens"], first: int
) -> dict[str, list[Any]]:
    counts = np.bincount(places)
    sums = np.bincount(places, weights=nll)
    return {
        "position": [first + place for place in range(len(counts))],
        "nll_nats": (sums / counts).tolist(),  # who has a token has those before it
        "tokens": counts.tolist(),
    }


def position_ranges(by_position: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """NLL by ranges of positions that double in length: rows of `first`, `last`, `nll_nats`, `tokens`."""
    rows, start, width = [], 0, 1
    counts, means = np.array(by_position["tokens"]), np.array(by_position["nll_nats"])
    while start < len(counts):
        span = slice(start, start + width)
        positions = by_position["position"][span]
        tokens = int(counts[span].sum())
        nll = float((counts[span] * means[span]).sum() / tokens)
        rows.append({"first": positions[0], "last": positions[-1], "nll_nats": nll, "tokens": tokens})
        start, width = start + width, 2 * width
    return rows


def calibration_tables(figures: Mapping[str, Any]) -> tuple[Table, Table, Table]:
    """The figures, the bins of the reliability diagram, and NLL by ranges of positions."""
    summary = Table()
    summary.add_column("")
    summary.add_column("next token", justify="right")
    sign = "=" if figures["exact"] else "≤"
    samples = "exact" if figures["exact"] else f"K = {figures['predictive_samples']}"
    for label, cell in (
        ("predictive distribution", samples),
        ("  of a text given its labels, p(x | c)", "yes" if figures["conditional"] else "–"),
        ("  z inferred from … tokens", "–" if figures["exact"] else str(figures["prompt_tokens"] or "none (prior)")),
        ("tokens judged, of sequences", f"{figures['tokens']:,}, {figures['sequences']:,}"),
        ("NLL, nats/token", f"{sign} {figures['predictive_nll_per_token']:.4f}"),
        ("entropy, nats/token", f"{figures['predictive_entropy_nats']:.4f}"),
        ("accuracy of the most probable token", f"{figures['accuracy']:.4f}"),
        ("  its mean probability", f"{figures['mean_confidence']:.4f}"),
        ("expected calibration error", f"{figures['expected_calibration_error']:.4f}"),
        ("  bins of equal mass", f"{figures['adaptive_calibration_error']:.4f}"),
    ):
        summary.add_row(label, cell)
    bins = Table()
    for column in ("confidence", "tokens", "mean confidence", "accuracy"):
        bins.add_column(column, justify="right")
    for row in figures["reliability"]:
        span = f"{row['from']:.3f}–{row['to']:.3f}"
        bins.add_row(span, f"{row['tokens']:,}", f"{row['confidence']:.4f}", f"{row['accuracy']:.4f}")
    positions = Table()
    for column in ("position", "tokens", "NLL, nats/token"):
        positions.add_column(column, justify="right")
    for row in position_ranges(figures["nll_by_position"]):
        span = str(row["first"]) if row["first"] == row["last"] else f"{row['first']}–{row['last']}"
        positions.add_row(span, f"{row['tokens']:,}", f"{row['nll_nats']:.4f}")
    return summary, bins, positions


def plot_calibration(figures: Mapping[str, Any], path: Path, name: str) -> None:
    """A PNG of the reliability diagram, the tokens in each of its bins, and NLL by position."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    diagram, cost = figure.subplots(1, 2)
    rows, width = figures["reliability"], 1 / figures["calibration_bins"]
    lefts = [row["from"] for row in rows]
    look: dict[str, Any] = {"width": width, "align": "edge", "edgecolor": "white"}
    diagram.bar(lefts, [row["accuracy"] for row in rows], label="accuracy", color="C0", alpha=0.6, **look)
    points = ([row["confidence"] for row in rows], [row["accuracy"] for row in rows])
    diagram.plot(*points, "o", color="C3", markersize=4, label="  at the bin's mean probability")
    diagram.plot([0, 1], [0, 1], "--", color="0.4", label="calibrated")
    shares = [row["tokens"] / figures["tokens"] for row in rows]
    diagram.bar(lefts, shares, label="share of tokens", **{**look, "edgecolor": "0.2", "facecolor": "none"})
    error = figures["expected_calibration_error"]
    diagram.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the most probable token", ylabel="share of tokens")
    diagram.set_title(f"{name}: expected calibration error {error:.4f}", parse_math=False, fontsize=10)
    diagram.legend(frameon=False, loc="upper left")
    by_position = figures["nll_by_position"]
    cost.plot(by_position["position"], by_position["nll_nats"], color="C0", alpha=0.4, linewidth=1, label="each")
    ranges = position_ranges(by_position)
    cost.hlines(
        [row["nll_nats"] for row in ranges],
        [row["first"] - 0.5 for row in ranges],
        [row["last"] + 0.5 for row in ranges],
        color="C0", linewidth=2.5, label="mean of a range",
    )  # fmt: skip
    cost.set(xlabel="position in the text", ylabel="nats per token", title="NLL by position")
    cost.title.set_fontsize(10)
    cost.legend(frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
