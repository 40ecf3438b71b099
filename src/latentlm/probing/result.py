"""What a probe found: tables, a picture, and what a reader has to know to believe them."""

import html
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from latentlm.errors import InputError
from latentlm.files import make_folder, whole_file
from latentlm.pages import NO_FORMULAE, html_picture, png

Draw = Callable[[Any], None]
_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#4d4d4d",
    "#aec7e8", "#98df8a",
)  # fmt: skip
#: more groups than this share a colour that says "other"
MOST_GROUPS = len(_COLOURS)
_OTHER = "#d0d0d0"
_ROWS_SHOWN = 40
_SIDE, _MARGIN = 420, 12  # of a scatter in a page, in pixels


@dataclass(frozen=True)
class Scatter:
    """Points of texts in a plane. In a page each one shows its text under the pointer, without a script.

    Args:
        points: [texts, 2].
        groups: a name for each, which is its colour; None where it is unknown. The most frequent have one of their own.
        title: of the panel.
    """

    points: Float[np.ndarray, "texts 2"]
    texts: Sequence[str]
    groups: Sequence[str | None]
    title: str

    def colours(self) -> tuple[list[str], dict[str, str]]:
        """The colour of each point, and the legend: group → colour."""
        counts = Counter(group for group in self.groups if group is not None)
        legend = dict(zip((name for name, _ in counts.most_common(MOST_GROUPS)), _COLOURS, strict=False))
        colours = [_OTHER if group is None else legend.get(group, _OTHER) for group in self.groups]
        left = (["other"] if len(counts) > MOST_GROUPS else []) + (["unknown"] if None in self.groups else [])
        return colours, legend | ({" or ".join(left): _OTHER} if left else {})

    def draw(self, panel: Any) -> None:
        """Draws on matplotlib axes."""
        colours, legend = self.colours()
        order = sorted(range(len(colours)), key=lambda row: colours[row] != _OTHER)  # the many others stay behind
        panel.scatter(*self.points[order].T, c=[colours[row] for row in order], s=6, linewidths=0, alpha=0.7)
        for name, colour in legend.items():
            panel.scatter([], [], c=colour, s=16, label=name)
        panel.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        panel.set(title=self.title, xticks=[], yticks=[])

    def svg(self) -> str:
        low, high = self.points.min(0), self.points.max(0)
        places = _MARGIN + (self.points - low) / np.maximum(high - low, 1e-12) * (_SIDE - 2 * _MARGIN)
        colours, legend = self.colours()
        circles = "".join(
            f'<circle cx="{x:.1f}" cy="{_SIDE - y:.1f}" r="2.5" fill="{colour}"><title>'
            f"{html.escape(group or 'unknown')}: {html.escape(text)}</title></circle>"
            for (x, y), colour, group, text in sorted(
                zip(places.tolist(), colours, self.groups, self.texts, strict=True), key=lambda one: one[1] != _OTHER
            )
        )
        names = " ".join(
            f'<span class="key"><i style="background:{colour}"></i>{html.escape(name)}</span>'
            for name, colour in legend.items()
        )
        return (
            f'<figure class="scatter"><figcaption>{html.escape(self.title)}</figcaption><svg viewBox="0 0 {_SIDE} '
            f'{_SIDE}" width="{_SIDE}" height="{_SIDE}" role="img">{circles}</svg><p>{names}</p></figure>'
        )


@dataclass(frozen=True)
class ProbeResult:
    """The outcome of a probe.

    Args:
        name: the probe's.
        about: what was done, with units, numbers of texts, seeds and what the figures are to be compared with; a
            reader needs nothing else to understand the table.
        table: the figures, one row for each.
        details: further tables by name: the texts that were written, the rows behind a mean.
        panels: what draws each panel of the picture, on matplotlib axes of its own.
        scatters: panels that are points of texts.
    """

    name: str
    about: str
    table: pd.DataFrame
    details: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    panels: Sequence[Draw] = ()
    scatters: Sequence[Scatter] = ()

    def figure(self) -> Any:
        """A matplotlib `Figure` of all panels, two in a row."""
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        draws = [*self.panels, *(scatter.draw for scatter in self.scatters)]
        if not draws:
            raise InputError(f"the probe {self.name} has no picture: its table says all.")
        columns = min(len(draws), 2)
        rows = -(-len(draws) // columns)
        figure = Figure(figsize=(6.4 * columns, 4.4 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        with rc_context(NO_FORMULAE):
            panels = list(figure.subplots(rows, columns, squeeze=False).flat)
            for panel, draw in zip(panels, draws, strict=False):
                draw(panel)
        for panel in panels[len(draws) :]:
            panel.remove()
        return figure

    def save(self, folder: str | Path) -> list[Path]:
        """Writes NAME.json (everything), NAME.csv (the table), NAME-DETAIL.csv, NAME.html and, if any, NAME.png.

        The folder is made if it is missing.
        """
        from latentlm.probing.page import page

        folder = make_folder(folder)
        written = [self._write(folder, ".json", json.dumps(self.json(), indent=1, ensure_ascii=False, allow_nan=False))]
        written.append(self._write(folder, ".csv", self.table.to_csv(index=False)))
        for name, rows in self.details.items():
            written.append(self._write(folder, f"-{name.replace(' ', '-')}.csv", rows.to_csv(index=False)))
        if self.panels or self.scatters:
            picture = png(self.figure()) if self.scatters else self._picture_of_panels
            written.append(self._write(folder, ".png", picture))
        written.append(self._write(folder, ".html", page(self.name, [self])))
        return written

    def _write(self, folder: Path, suffix: str, content: str | bytes) -> Path:
        path = folder / f"{self.name}{suffix}"
        with whole_file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        return path

    def json(self) -> dict[str, Any]:
        """The tables as lists of rows; what is no number is null."""
        return {
            "probe": self.name,
            "about": self.about,
            "table": _rows(self.table),
            **{name: _rows(rows) for name, rows in self.details.items()},
        }

    @cached_property
    def _picture_of_panels(self) -> bytes:
        """Drawn once for its file, its page and a report."""
        return png(replace(self, scatters=()).figure())

    def html(self) -> str:
        """A section of a page: text, tables and pictures, all in it."""
        parts = [f'<section id="{html.escape(self.name)}"><h2>{html.escape(self.name)}</h2>']
        parts.append(f"<p>{html.escape(self.about)}</p>{_html_table(self.table)}")
        if self.panels:
            parts.append(html_picture(self._picture_of_panels, self.name))
        parts += [scatter.svg() for scatter in self.scatters]
        for name, rows in self.details.items():
            more = f" (the first {_ROWS_SHOWN} of {len(rows):,} rows)" if len(rows) > _ROWS_SHOWN else ""
            parts.append(f"<details><summary>{html.escape(name)}{more}</summary>{_html_table(rows)}</details>")
        return "".join(parts) + "</section>"


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records", force_ascii=False, double_precision=15))


def _html_table(table: pd.DataFrame) -> str:
    return table.head(_ROWS_SHOWN).to_html(index=False, border=0, na_rep="–", float_format=lambda x: f"{x:.4g}")
