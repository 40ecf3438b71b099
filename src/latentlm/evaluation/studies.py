"""Studies of a sweep as tables and as one picture: a row or a line for each run, however its models differ."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from latentlm.evaluation.comparison import with_spread
from latentlm.pages import markdown_table

Row = Mapping[str, Any]

# column, figure, form; a figure of an exact model stands under the same name and is marked
_COLUMNS: Sequence[tuple[str, str, str]] = (
    ("parameters", "parameters", ",.0f"),
    ("ELBO", "elbo_nll_per_token", ".4f"),
    ("IW", "iw_nll_per_token", ".4f"),
    ("IW/seq.", "iw_nll_per_sequence", ".2f"),
    ("IW PPL", "iw_perplexity", ".2f"),
    ("prior z", "prior_nll_per_token", ".4f"),
    ("z = mean", "prior_mean_nll_per_token", ".4f"),
    ("reconstr.", "reconstruction_nll_per_token", ".4f"),
    ("BLEU of reconstr.", "reconstruction_bleu", ".1f"),
    ("BLEU, other z", "reconstruction_bleu_of_other_z", ".1f"),
    ("exact reconstr.", "reconstruction_exact_match", ".3f"),
    ("KL", "kl_per_sequence", ".2f"),
    ("AU", "active_units", ".0f"),
    ("MI", "mutual_information", ".2f"),
    ("published NLL", "published_nll_per_token", ".4f"),
    ("published PPL", "published_perplexity", ".2f"),
    ("continuation", "continuation_nll_per_token", ".4f"),
    ("cont. s", "continuation_seconds", ".1f"),
    ("entropy", "sample_entropy_nats", ".3f"),
    ("distinct-1", "distinct_1", ".3f"),
    ("distinct-2", "distinct_2", ".3f"),
    ("distinct-3", "distinct_3", ".3f"),
    ("tokens", "training_tokens", ".3g"),
    ("FLOPs a token", "training_flops_per_token", ".3g"),
    ("FLOPs", "training_flops", ".3g"),
    ("train s", "training_seconds", ",.0f"),
    ("infer s", "inference_seconds", ".2f"),
)
# of no meaning where the likelihood is exact
_OF_LATENTS = {
    "prior_nll_per_token",
    "prior_mean_nll_per_token",
    "reconstruction_nll_per_token",
    "kl_per_sequence",
    "active_units",
}
_OF_LATENTS |= {"mutual_information", "inference_seconds"}
_LABELS = {key: label for label, key, _ in _COLUMNS}
FIGURES = frozenset(_LABELS)
# values of x that all have a tick of their own, lines whose legend fits into a panel
_FEW = 8
_STYLES = (("-", "o"), ("--", "v"), (":", "x"), ("-.", "s"))


def study_table(name: str, rows: Sequence[Row]) -> Table:
    """Rows of one study (of `sweep.over_seeds`). NLLs in nats per token, an exact one marked =; KL and MI per sequence.

    Where a row stands for several seeds, the figure is their mean ± standard deviation.
    """
    names, heads, lines = _grid(rows)
    # Text, since a name may have brackets, which a string's markup would eat
    table = Table(title=Text(_title(name, rows)), title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < names else "right")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def study_markdown(name: str, rows: Sequence[Row]) -> str:
    """As `study_table`, for a document."""
    names, heads, lines = _grid(rows)
    return "\n".join([f"### {_title(name, rows)}", "", markdown_table(heads, lines, range(names)), ""])


def _title(name: str, rows: Sequence[Row]) -> str:
    seeds = sorted({row["seeds"] for row in rows})
    return f"{name} ({' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''})"


def _grid(rows: Sequence[Row]) -> tuple[int, list[str], list[list[str]]]:
    """Columns of names, heads, and a line for each row; columns in which nothing stands are left out."""
    names = [("run", "run"), ("scored", "evaluation")] if any(row["evaluation"] for row in rows) else [("run", "run")]
    columns = [column for column in _COLUMNS if any(_cell(row, *column[1:]) != "–" for row in rows)]
    heads = [*(head for head, _ in names), *(label for label, _, _ in columns)]
    lines = [
        [*(str(row[key]) for _, key in names), *(_cell(row, key, form) for _, key, form in columns)] for row in rows
    ]
    if any("against" in row for row in rows):
        heads += ["IW − control's", "perplexity", "p (seeds)"]
        lines = [line + _beside_control(row) for line, row in zip(lines, rows, strict=True)]
    return len(names), heads, lines


def _beside_control(row: Row) -> list[str]:
    """The difference in nats per token, what it makes of the perplexity, and the paired test over seeds."""
    if "against" not in row:
        return ["–"] * 3
    found = row["against"]
    difference = with_spread(found.difference, found.standard_deviation or 0.0, "+.4f").replace("± +", "± ")
    test = "–" if found.p is None else f"{found.p:.2g}"
    return [difference, f"{math.expm1(found.difference):+.1%}", f"{test} ({found.n})"]


def _cell(row: Row, key: str, form: str) -> str:
    if row.get(key) is None or (row["exact"] and key in _OF_LATENTS):
        return "–"
    text = with_spread(row[key], row["spread"].get(key, 0.0), form)
    return f"= {text}" if row["exact"] and key.startswith(("elbo_", "iw_")) else text


def study_plots(studies: Mapping[str, tuple[Sequence[Row], Mapping[str, Any] | None]], path: Path) -> None:
    """One PNG with a panel for each study.

    Args:
        studies: name → its rows and its `plot`: `x`, a setting (`inference_steps`, `model.sliding_window`) or a figure
            (`inference_seconds`), and `y`, figures. Without one, the bounds of each run stand side by side.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(len(studies), 3)
    down = -(-len(studies) // across)
    figure = Figure(figsize=(5.6 * across, 4.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(studies) :]:
        panel.remove()
    for panel, (name, (rows, plot)) in zip(panels, studies.items(), strict=False):
        panel.set_title(name, fontsize=10)
        panel.set_ylabel("nats per token")
        if plot:
            ys = list(plot.get("y") or ["elbo_nll_per_token", "iw_nll_per_token"])
            if not all(y.endswith("nll_per_token") for y in ys):
                panel.set_ylabel(", ".join(_LABELS[y] for y in ys))
            _lines(panel, rows, str(plot["x"]), ys)
        else:
            _bounds(panel, rows)
        crowded = len(panel.get_legend_handles_labels()[0]) > _FEW
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if crowded else {}
        panel.legend(frameon=False, fontsize=7, **place)
    figure.savefig(path, dpi=110)


def study_curves(studies: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """One PNG with a row for each study: NLL by ELBO and KL of every run while it trained, from the log of one seed.

    Args:
        studies: name → its runs → the history of each. A run that logged no KL (the control) has none there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6 * len(studies)), layout="constrained")
    FigureCanvasAgg(figure)
    for (bound, kl), (name, runs) in zip(figure.subplots(len(studies), 2, squeeze=False), studies.items(), strict=True):
        styles = itertools.cycle(itertools.product(("-", "--", ":"), range(10)))
        ends = []
        for (run, history), (style, colour) in zip(runs.items(), styles, strict=False):
            logged = [entry for entry in history if "elbo_nll_per_token" in entry]
            look = {"color": f"C{colour}", "linestyle": style, "linewidth": 1.2}
            steps = [entry["step"] for entry in logged]
            bound.plot(steps, [entry["elbo_nll_per_token"] for entry in logged], label=run, **look)
            ends += [entry["elbo_nll_per_token"] for entry in logged[len(logged) // 4 :]]
            if any(entry["kl_per_sequence"] for entry in logged):
                kl.plot(steps, [entry["kl_per_sequence"] for entry in logged], **look)
        if ends:  # the first steps would flatten everything that matters
            bound.set_ylim(min(ends) - 0.02, sorted(ends)[int(0.95 * len(ends))] + 0.1)
        kl.set_yscale("symlog", linthresh=0.1)
        kl.set_ylim(bottom=0)
        bound.set(xlabel="step", ylabel="nats per token", title=f"{name}: NLL by ELBO while training")
        kl.set(xlabel="step", ylabel="nats per sequence", title="KL")
        handles = bound.get_legend_handles_labels()
        kl.legend(*handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=7)
    figure.savefig(path, dpi=100)


def _lines(panel: Any, rows: Sequence[Row], x: str, ys: Sequence[str]) -> None:
    of_evaluation = any(x in row["settings"] and x.startswith("inference") for row in rows)
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row.get(x) is None and row["settings"].get(x) is None:
            continue
        if of_evaluation:
            name = row["run"]
        elif row["line"] != row["run"] or x in row:  # of a grid, or each run a place of its own
            name = row["line"]
        else:
            name = row["evaluation"] or ("control" if row["exact"] else "LTM")
        series.setdefault(name, []).append(row)
    for index, (name, group) in enumerate(series.items()):
        exact = all(row["exact"] for row in group)
        shown = [y for y in ys if not (exact and y in _OF_LATENTS)]
        for key, (style, mark) in zip(shown[:1] if exact else shown, _STYLES, strict=False):
            points = [
                (row["settings"].get(x, row.get(x)), row[key], row["spread"].get(key, 0.0))
                for row in group
                if row.get(key) is not None
            ]
            if not points:
                continue
            if numeric := all(isinstance(place, int | float) for place, *_ in points):
                points.sort()
            label = f"{name}: {'exact' if exact else _LABELS[key]}"
            where, heights, spread = zip(*points, strict=True)
            where = where if numeric else tuple(map(str, where))
            panel.errorbar(
                where, heights, yerr=spread if any(spread) else None, linestyle=style, color=f"C{index}", marker=mark,
                markersize=4, linewidth=1.2, label=label,
            )  # fmt: skip
    drawn = [row for group in series.values() for row in group]
    values = sorted({row["settings"].get(x, row.get(x)) for row in drawn}, key=str)
    if all(isinstance(value, int | float) for value in values) and max(values, default=0) > 8 * max(min(values), 1e-9):
        panel.set_xscale("log" if min(values) > 0 else "symlog", **({} if min(values) > 0 else {"linthresh": 1}))
        if len(values) <= _FEW and all(x in row["settings"] for row in drawn):  # chosen values, not measured ones
            panel.set_xticks(values, [f"{value:g}" for value in values])
            panel.set_xticks([], minor=True)
        else:  # matplotlib's own labels, such as 3 × 10¹¹, run into one another
            panel.tick_params(axis="x", which="both", labelsize=7, labelrotation=30)
    panel.set_xlabel(x.removeprefix("model.").replace("_", " ").replace("flops", "FLOPs"))


def _bounds(panel: Any, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    marks = (("elbo_nll_per_token", "o"), ("iw_nll_per_token", "v"), ("prior_nll_per_token", "x"))
    for key, mark in marks:
        chosen = [(place, row) for place, row in zip(places, rows, strict=True) if not row["exact"]]
        if not chosen:
            continue
        spread = [row["spread"].get(key, 0.0) for _, row in chosen]
        panel.errorbar(
            [place for place, _ in chosen], [row[key] for _, row in chosen], yerr=spread if any(spread) else None,
            linestyle="", marker=mark, label=_LABELS[key],
        )  # fmt: skip
    exact = [(place, row["iw_nll_per_token"]) for place, row in zip(places, rows, strict=True) if row["exact"]]
    if exact:
        panel.plot(*zip(*exact, strict=True), "k*", label="exact")
    labels = [": ".join(filter(None, (row["run"], row["evaluation"]))) for row in rows]
    panel.set_xticks(list(places), labels, rotation=30, ha="right", fontsize=7)
