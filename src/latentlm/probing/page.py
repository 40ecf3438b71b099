"""Results as one page of HTML that needs no network, no script and no other file."""

import html
from collections.abc import Mapping, Sequence

from latentlm.probing.result import ProbeResult

_STYLE = """
body { font: 15px/1.45 Georgia, serif; max-width: 980px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { overflow-wrap: anywhere } h1, h2, figcaption, th, summary, nav { font-family: system-ui, sans-serif }
h2 { margin-top: 2.2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
th, td { padding: 2px 10px 2px 0; text-align: left; vertical-align: top } thead th { border-bottom: 1px solid #888 }
td { font-variant-numeric: tabular-nums } img { max-width: 100% }
figure { display: inline-block; margin: 0.5em 1em 0.5em 0 }
.key { font-size: 12px; margin-right: 0.8em; white-space: nowrap } figure p { max-width: 420px; line-height: 1.3 }
.key i { display: inline-block; width: 9px; height: 9px; border-radius: 5px; margin-right: 4px }
nav a { margin-right: 1em } .skipped { color: #777 } summary { cursor: pointer } circle:hover { stroke: #000 }
"""


def page(title: str, results: Sequence[ProbeResult], about: str = "", skipped: Mapping[str, str] | None = None) -> str:
    """A whole page.

    Args:
        about: a paragraph before the results.
        skipped: probes that were not run → why.
    """
    links = "".join(f'<a href="#{html.escape(one.name)}">{html.escape(one.name)}</a>' for one in results)
    rest = "".join(
        f'<p class="skipped"><b>{html.escape(name)}</b> was not run: {html.escape(why)}</p>'
        for name, why in (skipped or {}).items()
    )
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    body = f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"
    if len(results) > 1:
        body += f"<nav>{links}</nav>"
    sections = "".join(one.html() for one in results)
    return f"{head}<style>{_STYLE}</style></head><body>{body}{sections}{rest}</body></html>\n"
