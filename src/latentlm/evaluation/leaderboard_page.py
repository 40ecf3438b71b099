"""A leaderboard as tables of the terminal, as Markdown, as a page of HTML and as a picture."""

import html
import math
import textwrap
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from latentlm.evaluation.comparison import with_spread
from latentlm.evaluation.leaderboard import BITS_BY_ELBO, BITS_BY_IW, Leaderboard, Row, Section
from latentlm.evaluation.leaderboard_files import GENERATIVE_BOUND, WRITTEN
from latentlm.files import make_folder, whole_file
from latentlm.pages import NO_FORMULAE, html_page, html_picture, html_table, markdown_table, markdown_text, png

Cell = Callable[[Row], str]

NOTHING = "–"
LEGEND = (
    "= is the likelihood itself (an exact model); ≤ is an upper bound on the negative log-likelihood, in expectation: "
    "by the ELBO, or by IW with K importance samples. What the model itself would have is at or below it.",
    "Rank is by bits per byte by IW, which compares models of any tokenizer on one text; lower is better. The control, "
    "the best exact model, stands first whatever its rank, as the line to beat. Δ is the model's figure less the "
    "control's: below 0 is better. A model that beats the control by IW only does so as far as K samples show; of one "
    "that does not beat it nothing is shown, since its likelihood may be better than its bounds.",
    "Several seeds are mean ± standard deviation; p is of a paired t-test of bits per byte over the seeds of training "
    "that both have, in brackets their number. Where the noise of scoring alone differs, the column of seeds says so.",
    "Sections are of different texts, or of p(x) and p(x | c): no figure compares with one of another section.",
)
_MOST_PANELS = 100
_NAMES = ("model", "family", "beats the control")
_COSTS = (("training_flops", "training FLOPs"), ("training_tokens", "training tokens"), ("rank", "rank"))
# where a terminal has no room for all columns; the others it cannot do without
_LEFT_OUT_FIRST = (
    "bits/byte by ELBO", "of which train", "training s", "training FLOPs", "training tokens", "K", "active units",
    "KL, nats/seq.", "parameters", "family", "Δ perplexity", "seeds", "NLL by ELBO, nats/token", "p (seeds)",
    "NLL by IW, nats/token", "Δ bits/byte",
)  # fmt: skip
# factors between the least and the largest cost: below it they are one, above it the axis is logarithmic
_SAME, _WIDE = 1.01, 5
_TICKS = 20
_NAME_WIDTH = 26


def save(board: Leaderboard, folder: str | Path) -> list[Path]:
    """Writes leaderboard.md, leaderboard.html and leaderboard.png into a folder, which is made if it is missing."""
    folder = make_folder(folder)
    picture = png(plot(board))
    contents = {".md": markdown(board).encode(), ".html": page(board, picture).encode(), ".png": picture}
    written = []
    for suffix, content in contents.items():
        written.append(folder / f"leaderboard{suffix}")
        with whole_file(written[-1]) as file:
            file.write(content)
    return written


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(board: Leaderboard, width: int = 250) -> list[Table]:
    """One for each section, in the terminal; the control's row is bold.

    Args:
        width: letters in a line: columns for which there is no room are left out, those that say least first.
    """
    made = []
    for section in board.sections:
        heads, lines, names = grid(section)
        widths = [max(_width(head), *map(len, cells)) for head, *cells in zip(heads, *lines, strict=True)]
        widths = [min(w, _NAME_WIDTH) if head == "model" else w for w, head in zip(widths, heads, strict=True)]
        shown = list(range(len(heads)))
        for head in _LEFT_OUT_FIRST:
            if head in heads and sum(widths[place] + 3 for place in shown) + 1 > width:
                shown.remove(heads.index(head))
        # Text, since a name may have brackets, which a string's markup would eat
        table = Table(title=Text(section.title), title_justify="left")
        for place in shown:
            head = heads[place].replace(", ", ",\n")
            if place in names:
                table.add_column(head, overflow="fold", min_width=widths[place])
            else:
                table.add_column(head, justify="right", overflow="fold")
        for row, line in zip(section.rows, lines, strict=True):
            table.add_row(*(Text(line[place]) for place in shown), style="bold" if row.is_control else None)
        made.append(table)
    return made


def _width(head: str) -> int:
    return max(map(len, head.split(", ")))


def markdown(board: Leaderboard) -> str:
    """A section of Markdown for each section of the leaderboard."""
    parts = ["# Leaderboard", *LEGEND]
    for section in board.sections:
        heads, lines, names = grid(section)
        parts += [f"## {markdown_text(section.title)}", markdown_table(heads, lines, names)]
        parts += map(markdown_text, section.remarks())
    parts += map(markdown_text, board.notes())
    return "\n\n".join(parts) + "\n"


def page(board: Leaderboard, picture: bytes) -> str:
    """One page of HTML with all tables and the picture, a PNG."""
    parts = [f"<p>{html.escape(line)}</p>" for line in LEGEND]
    for section in board.sections:
        marked = [place for place, row in enumerate(section.rows) if row.is_control]
        parts.append(f"<h2>{html.escape(section.title)}</h2>{html_table(*grid(section), marked)}")
        parts += [f"<p>{html.escape(line)}</p>" for line in section.remarks()]
    parts.append(f"<h2>Bits per byte and what the training cost</h2>{html_picture(picture, 'bits per byte')}")
    if len(board.sections) > _MOST_PANELS:
        parts.append(f"<p>The picture shows the first {_MOST_PANELS} of {len(board.sections)} sections.</p>")
    parts += [f"<p>{html.escape(line)}</p>" for line in board.notes()]
    return html_page("Leaderboard", "".join(parts), width=1500)


def grid(section: Section) -> tuple[list[str], list[list[str]], list[int]]:
    """Heads, a line for each row, and the places of names; columns in which nothing stands are left out."""
    columns = [(head, [cell(row) for row in section.rows]) for head, cell in _COLUMNS]
    columns = [(head, cells) for head, cells in columns if {*cells} - {NOTHING}]
    heads = [head for head, _ in columns]
    lines = [list(line) for line in zip(*(cells for _, cells in columns), strict=True)]
    return heads, lines, [place for place, head in enumerate(heads) if head in _NAMES]


def _figure(key: str, form: str, exact: Callable[[Row], bool] | None = None) -> Cell:
    """Marked = or ≤ where `exact` tells whether it is the likelihood itself or a bound."""

    def cell(row: Row) -> str:
        value = row.figures.get(key)
        if value is None or not math.isfinite(value):
            return NOTHING
        text = with_spread(value, row.spread.get(key, 0.0), form)
        return text if exact is None else f"{'=' if exact(row) else '≤'} {text}"

    return cell


def _trained(row: Row) -> str:
    same = row.figures.get("trained_parameters") == row.figures.get("parameters")
    return NOTHING if same else _figure("trained_parameters", ",.0f")(row)


def _of_latents(key: str, form: str) -> Cell:
    figure = _figure(key, form)
    return lambda row: NOTHING if row.exact else figure(row)


def _active_units(row: Row) -> str:
    active = _of_latents("active_units", ".0f" if row.seeds == row.noises == 1 else ".1f")(row)
    units = _of_latents("latent_units", ".0f")(row)
    return NOTHING if NOTHING in (active, units) else f"{active} of {units}"


def _difference(row: Row) -> str:
    if row.against is None or not math.isfinite(row.against.difference):
        return NOTHING
    return f"{row.against.difference:+.4f}"


def _perplexity(row: Row) -> str:
    change = None if row.against is None else row.against.perplexity_change
    return NOTHING if change is None or not math.isfinite(change) else f"{100 * change:+.2f}%"


def _beats(row: Row) -> str:
    if row.against is None:
        return "is the control" if row.is_control else NOTHING
    return row.against.beats


def _p(row: Row) -> str:
    test = None if row.against is None else row.against.paired
    if test is None:
        return NOTHING
    return f"{NOTHING if test.p is None else format(test.p, '.2g')} ({test.n})"


def _seeds(row: Row) -> str:
    return f"1, of {row.noises} noises" if row.noises > 1 else str(row.seeds)


def _written_columns() -> list[tuple[str, Cell]]:
    heads = {
        "mauve": ("MAUVE", ".3f"),
        "generative_perplexity": ("generative PPL", ".2f"),
        "generative_bits_per_byte": ("generative bits/byte", ".3f"),
        "distinct_2": ("distinct-2", ".3f"),
        "self_bleu": ("self-BLEU", ".1f"),
    }
    return [
        (f"{heads[figure][0]}, {task}", _figure(f"{task} {figure}", heads[figure][1], _scorer_is_exact(task, figure)))
        for task, figure in WRITTEN
    ]


def _scorer_is_exact(task: str, figure: str) -> Callable[[Row], bool] | None:
    if not figure.startswith("generative_"):
        return None
    return lambda row: f"{task} {GENERATIVE_BOUND}" not in row.figures


_COLUMNS: Sequence[tuple[str, Cell]] = (
    ("rank", lambda row: NOTHING if row.rank is None else str(row.rank)),
    ("model", lambda row: row.name),
    ("family", lambda row: row.family),
    ("parameters", _figure("parameters", ",.0f")),
    ("of which train", _trained),
    ("training tokens", _figure("training_tokens", ",.0f")),
    ("training FLOPs", _figure("training_flops", ".2e")),
    ("NLL by ELBO, nats/token", _figure("elbo_nll_per_token", ".4f", exact=attrgetter("exact"))),
    ("NLL by IW, nats/token", _figure("iw_nll_per_token", ".4f", exact=attrgetter("exact"))),
    ("K", _of_latents("iw_samples", ".0f")),
    ("bits/byte by ELBO", _figure(BITS_BY_ELBO, ".4f", exact=attrgetter("exact"))),
    ("bits/byte by IW", _figure(BITS_BY_IW, ".4f", exact=attrgetter("exact"))),
    ("Δ bits/byte", _difference),
    ("Δ perplexity", _perplexity),
    ("beats the control", _beats),
    ("p (seeds)", _p),
    ("KL, nats/seq.", _of_latents("kl_per_sequence", ".2f")),
    ("active units", _active_units),
    ("distinct-2 of prior samples", _figure("distinct_2", ".3f")),
    ("self-BLEU of a prompt's z", _figure("diversity_self_bleu", ".1f")),
    *_written_columns(),
    ("training s", _figure("training_seconds", ",.0f")),
    ("seeds", _seeds),
)


# ---- the picture -----------------------------------------------------------------------------------------------------


def plot(board: Leaderboard) -> Any:
    """A matplotlib `Figure`: bits per byte against what the training cost, one panel for each section.

    The cost is training FLOPs where all rows know theirs, else training tokens, else the order of the ranks. A latent
    model's ELBO and IW are joined by a bar; the control's line goes through the panel.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = board.sections[:_MOST_PANELS]  # a file of more pixels is no PNG that can be looked at
    figure = Figure(figsize=(11, 4.8 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    with rc_context(NO_FORMULAE):
        for panel, section in zip(figure.subplots(len(shown), 1, squeeze=False).flat, shown, strict=True):
            _panel(panel, section)
    return figure


def _cost(row: Row, key: str) -> float:
    """0 where it is not known."""
    cost = float(row.rank or 0) if key == "rank" else row.figures.get(key, 0.0)
    return cost if math.isfinite(cost) and cost > 0 else 0.0


def _panel(panel: Any, section: Section) -> None:
    from matplotlib.transforms import offset_copy

    rows = [row for row in section.rows if row.rank is not None]
    key, label = next((key, label) for key, label in _COSTS if all(_cost(row, key) for row in rows))
    costs = [_cost(row, key) for row in rows]
    if rows and key != "rank" and max(costs) < _SAME * min(costs):  # they would stand upon one another
        key, label = "rank", f"rank (each row: {costs[0]:.3g} {label})"
        costs = [_cost(row, key) for row in rows]
    for place, (row, cost) in enumerate(zip(rows, costs, strict=True)):
        look: dict[str, Any] = {"color": f"C{place % 10}", "linewidth": 1, "markersize": 9 if row.exact else 6}
        name = textwrap.fill(f"{row.rank} {row.name}", 58, max_lines=3, placeholder=" …")
        mark, spread = "*" if row.exact else "o", row.spread.get(BITS_BY_IW) or None
        panel.errorbar([cost], [row.bits], yerr=spread, fmt=mark, label=name, capsize=3, **look)
        bound, spread = row.figures[BITS_BY_ELBO], row.spread.get(BITS_BY_ELBO, 0.0)
        if not row.exact and math.isfinite(bound):
            # a little aside, or its deviation would lie upon that of IW
            look["transform"] = offset_copy(panel.transData, panel.figure, x=-7, units="points")
            panel.plot([cost, cost], [row.bits, bound], **{**look, "linewidth": 5}, alpha=0.25)
            panel.errorbar([cost], [bound], yerr=spread or None, fmt="v", mfc="white", capsize=3, **look)
            # what is drawn aside does not count for the axes' limits
            panel.update_datalim([(cost, bound - spread), (cost, bound + spread)])
        panel.annotate(str(row.rank), (cost, row.bits), xytext=(7, -3), textcoords="offset points", fontsize=9)
    if section.control is not None:
        panel.axhline(section.control.bits, color="0.4", linestyle="--", linewidth=1, label="control, the line to beat")
    for mark, kind in (("*", "exact"), ("o", "IW"), ("v", "ELBO")):
        if any(row.exact == (kind == "exact") for row in rows):
            panel.plot([], [], mark, color="0.4", mfc="white" if mark == "v" else "0.4", label=kind)
    if key == "rank":
        panel.set_xticks([row.rank for row in rows] if len(rows) <= _TICKS else [1, len(rows)])
    elif costs and max(costs) > _WIDE * min(costs):
        panel.set_xscale("log")
        # powers would be formulae, which are off because of the models' names
        panel.xaxis.set_major_formatter(lambda cost, _: f"{cost:.0e}".replace("e+", "e"))
        panel.xaxis.set_minor_formatter(lambda cost, _: "")
    panel.set(xlabel=label, ylabel="bits per byte", title=section.title)
    panel.margins(x=0.1)
    panel.autoscale_view()
    panel.grid(alpha=0.25)
    if rows:
        panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
