"""Figures of several models as one table and one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from latentlm.evaluation.flops import PARTS

Figures = Mapping[str, Any]


def table(figures: Mapping[str, Figures]) -> Table:
    """Models side by side. NLL in nats per token; a bound is marked ≤, the likelihood itself =."""
    rows = Table()
    rows.add_column("")
    for name in figures:
        rows.add_column(name, justify="right")
    for label, show in _ROWS:
        cells = [show(one) for one in figures.values()]
        if label in _ALWAYS or set(cells) != {"–"}:
            rows.add_row(label, *cells)
    return rows


def _bound(key: str, digits: int = 4) -> Any:
    return lambda one: f"{'=' if one['exact'] else '≤'} {one[key]:.{digits}f}"


def _latent(key: str, form: str) -> Any:
    return lambda one: "–" if one["exact"] or one.get(key) is None else format(one[key], form)


def _given(key: str, form: str) -> Any:
    return lambda one: "–" if one.get(key) is None else format(one[key], form)


def _per_batch(one: Figures) -> str:
    information = _latent("mutual_information_per_batch", ".3f")(one)
    return information if information == "–" else f"{information} of {one['mutual_information_batch']} texts"


def _parts(one: Figures) -> str:
    total = one.get("training_flops_per_token")
    if total is None:
        return "–"
    return ", ".join(f"{one[f'training_flops_per_token_of_{part}'] / total:.0%}" for part in PARTS)


def _distinct(name: str) -> Any:
    def cell(one: Figures) -> str:
        values = [one.get(f"{name}distinct_{n}") for n in (1, 2, 3)]
        return "–" if None in values else ", ".join(f"{value:.3f}" for value in values)

    return cell


_ROWS: Sequence[tuple[str, Any]] = (
    ("parameters", lambda one: f"{one['parameters']:,}"),
    (
        "  of which train",
        lambda one: (
            "–" if one.get("trained_parameters") in (None, one["parameters"]) else f"{one['trained_parameters']:,}"
        ),
    ),
    ("tokens trained on", lambda one: f"{one['training_tokens']:,.0f}" if "training_tokens" in one else "–"),
    ("NLL is", lambda one: "exact" if one["exact"] else "a bound"),
    ("  of a text given its labels, p(x | c)", lambda one: "yes" if one.get("conditional") else "–"),
    ("NLL by ELBO, nats/token", _bound("elbo_nll_per_token")),
    ("NLL by IW, nats/token", _bound("iw_nll_per_token")),
    ("  importance samples K", lambda one: "–" if one["exact"] else str(one["iw_samples"])),
    ("NLL by IW, nats/sequence", _bound("iw_nll_per_sequence", 2)),
    ("perplexity by IW", _bound("iw_perplexity", 3)),
    ("bits per byte by IW", _bound("iw_bits_per_byte")),
    ("NLL under prior z, nats/token", _latent("prior_nll_per_token", ".4f")),
    ("NLL with z at the prior's mean", _latent("prior_mean_nll_per_token", ".4f")),
    ("reconstruction (no bound)", _latent("reconstruction_nll_per_token", ".4f")),
    ("KL, nats/sequence", _latent("kl_per_sequence", ".3f")),
    ("mutual information, nats", _latent("mutual_information", ".3f")),
    ("  as in the literature, per batch", _per_batch),
    ("KL of aggregate posterior, nats", _latent("aggregate_kl", ".3f")),
    (
        "active units",
        lambda one: (
            "–" if one["exact"] or one["active_units"] is None else f"{one['active_units']} of {one['latent_units']}"
        ),
    ),
    (
        "  texts of one length, which MI to AU are of",
        lambda one: "–" if one.get("latent_sequences") in (None, one["sequences"]) else f"{one['latent_sequences']:,}",
    ),
    ("sequences, tokens scored", lambda one: f"{one['sequences']:,}, {one['tokens']:,}"),
    ("FLOPs of training, a token", _given("training_flops_per_token", ",.3g")),
    ("  of the decoder, of latents, of embeddings", lambda one: _parts(one)),
    ("FLOPs of inference, a token", _latent("inference_flops_per_token", ",.3g")),
    ("FLOPs of training", _given("training_flops", ".3g")),
    (
        "training tokens/s",
        lambda one: f"{one['training_tokens_per_second']:,.0f}" if "training_tokens_per_second" in one else "–",
    ),
    ("evaluation tokens/s", lambda one: f"{one['tokens_per_second']:,.0f}"),
    ("as published: NLL (no bound)", _given("published_nll_per_token", ".4f")),
    ("as published: perplexity (no bound)", _given("published_perplexity", ".3f")),
    ("continuation, nats/token", _given("continuation_nll_per_token", ".4f")),
    ("  after a prompt of tokens", _given("prompt_tokens", "d")),
    ("  z inferred every … tokens", _given("reinfer_every", "d")),
    ("prior samples: entropy, nats", _given("sample_entropy_nats", ".3f")),
    ("prior samples: distinct-1, -2, -3", _distinct("")),
    ("prior samples/s", _given("samples_per_second", ".1f")),
    ("latents of a prompt, greedy: self-BLEU", _given("diversity_self_bleu", ".1f")),
    ("  distinct-1, -2, -3", _distinct("diversity_")),
    ("one latent of it, sampled: self-BLEU", _given("diversity_of_one_latent_self_bleu", ".1f")),
    ("  its distinct-1, -2, -3", _distinct("diversity_of_one_latent_")),
    ("style transfer: nearer to z's text", _given("style_transfer_recovered", ".3f")),
    ("  by prior z", _given("style_transfer_recovered_by_prior_z", ".3f")),
    ("style transfer: token overlap, F1", _given("style_transfer_overlap", ".3f")),
    ("  overlap by prior z", _given("style_transfer_overlap_by_prior_z", ".3f")),
    ("texts reconstructed from their z (no likelihood): BLEU", _given("reconstruction_bleu", ".1f")),
    ("  by another text's z", _given("reconstruction_bleu_of_other_z", ".1f")),
    ("  exact match", _given("reconstruction_exact_match", ".3f")),
    ("  texts", _given("reconstruction_texts", ",d")),
)


_ALWAYS = {"tokens trained on"}


def reconstructed(pairs: Sequence[tuple[str, str]]) -> str:
    """Texts over their reconstructions (of `reconstructions`), each on one line."""
    lines = ["texts, and what is written greedily from the mean of q(z | x), which has seen them:"]
    for source, written in pairs:
        lines += ["", f"  x: {' '.join(source.split())}", f"  z: {' '.join(written.split())}"]
    return "\n".join(lines)


def curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """A PNG of training: NLL per token of every model, and the KL and active units of those with a latent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    nll, kl = figure.subplots(1, 2)
    units = kl.twinx()
    for index, (name, history) in enumerate(histories.items()):
        colour = f"C{index}"
        nll.plot(*_series(history, "elbo_nll_per_token"), color=colour, alpha=0.35, linewidth=1)
        nll.plot(
            *_series(history, "eval_elbo_nll_per_token"),
            color=colour,
            marker="o",
            markersize=3,
            label=f"{name}, {_kind(history)}",
        )
        if _kind(history) == "ELBO":
            prior = _series(history, "eval_prior_nll_per_token")
            nll.plot(*prior, color=colour, linestyle=":", label=f"{name}, z from the prior")
            bound = _series(history, "eval_iw_nll_per_token")
            nll.plot(*bound, color=colour, linestyle="--", label=f"{name}, importance-weighted")
            kl.plot(
                *_series(history, "eval_kl_per_sequence"), color=colour, marker="o", markersize=3, label=f"{name}: KL"
            )
            units.plot(
                *_series(history, "eval_active_units"), color="C3", linestyle="--", label=f"{name}: active units"
            )
    nll.set(xlabel="step", ylabel="nats per token", title="NLL: validation (dots), training (faint)")
    validation = [_series(history, "eval_elbo_nll_per_token")[1] for history in histories.values()]
    if all(validation):  # the first steps would flatten everything that matters
        bounds = [_series(history, "eval_iw_nll_per_token")[1] for history in histories.values()]
        low, high = min(map(min, filter(None, validation + bounds))), max(map(max, validation))
        nll.set_ylim(low - 0.2 * (high - low), high + 0.5 * (high - low))
    nll.legend(frameon=False)
    kl.set(xlabel="step", ylabel="KL, nats per sequence", title="What z carries (validation)")
    kl.set_ylim(bottom=0)
    units.set(ylabel="active units")
    units.set_ylim(bottom=0)
    lines = [line for axis in (kl, units) for line in axis.get_lines()]
    if lines:
        kl.legend(lines, [line.get_label() for line in lines], frameon=False, loc="lower center")
    figure.savefig(path, dpi=120)


def _kind(history: Sequence[Mapping[str, float]]) -> str:
    return "ELBO" if any(entry.get("kl_per_sequence") for entry in history) else "exact"


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[int | float]]:
    pairs = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in pairs], [value for _, value in pairs]
