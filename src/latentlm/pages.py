"""What is written for people to read: HTML that needs no network, no script and no other file, and Markdown."""

import base64
import html
import io
import re
from collections.abc import Collection, Sequence
from typing import Any

_STYLE = """
body { font: 15px/1.45 Georgia, serif; max-width: WIDTHpx; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { overflow-wrap: anywhere } h1, h2, figcaption, th, summary, nav { font-family: system-ui, sans-serif }
h2 { margin-top: 2.2em; border-bottom: 1px solid #ccc; overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
th, td { padding: 2px 10px 2px 0; text-align: left; vertical-align: top } thead th { border-bottom: 1px solid #888 }
td { font-variant-numeric: tabular-nums } img { max-width: 100% }
.number { text-align: right } td.number { white-space: nowrap } tr.marked { background: #fff3cd }
.wide { overflow-x: auto } .wide td:not(.number) { min-width: 7em; overflow-wrap: anywhere }
figure { display: inline-block; margin: 0.5em 1em 0.5em 0 }
.key { font-size: 12px; margin-right: 0.8em; white-space: nowrap } figure p { max-width: 420px; line-height: 1.3 }
.key i { display: inline-block; width: 9px; height: 9px; border-radius: 5px; margin-right: 4px }
nav a { margin-right: 1em } .skipped { color: #777 } summary { cursor: pointer } circle:hover { stroke: #000 }
"""
_DPI = 110
# dollar signs in texts and names are dollar signs
NO_FORMULAE: Any = {"text.parse_math": False}


def html_page(title: str, body: str, width: int = 980) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML, after the title.
        width: of the page, in pixels, at most.
    """
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    style = _STYLE.replace("WIDTH", str(width))
    return f"{head}<style>{style}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"


def html_picture(png: bytes, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def html_table(
    heads: Sequence[str], lines: Sequence[Sequence[str]], names: Collection[int] = (0,), marked: Collection[int] = ()
) -> str:
    """A table of plain text; all but the columns `names` are set as numbers, the lines `marked` are highlighted."""
    kinds = ["" if place in names else ' class="number"' for place in range(len(heads))]
    head = "".join(f"<th{kind}>{html.escape(text)}</th>" for kind, text in zip(kinds, heads, strict=True))
    body = "".join(
        ('<tr class="marked">' if place in marked else "<tr>")
        + "".join(f"<td{kind}>{html.escape(text)}</td>" for kind, text in zip(kinds, line, strict=True))
        + "</tr>"
        for place, line in enumerate(lines)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]], names: Collection[int] = (0,)) -> str:
    """As `html_table`, in Markdown."""
    rule = ["---" if place in names else "---:" for place in range(len(heads))]
    escaped = [[markdown_text(cell) for cell in line] for line in (heads, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (escaped[0], rule, *escaped[1:]))


def markdown_text(text: str) -> str:
    """Plain text that Markdown shows as it is: on one line, no HTML, link, formula, emphasis or column of a table."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    escaped = re.sub(r"([\\`*\[\]|~$])", r"\\\1", escaped)
    # between letters an underscore is none of Markdown's
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)


def png(figure: Any) -> bytes:
    """A matplotlib `Figure` as a file's content."""
    from matplotlib import rc_context

    content = io.BytesIO()
    with rc_context(NO_FORMULAE):
        figure.savefig(content, dpi=_DPI, format="png")
    return content.getvalue()
