"""Results as one page of HTML."""

import html
from collections.abc import Mapping, Sequence

from latentlm.pages import html_page
from latentlm.probing.result import ProbeResult


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
    body = f"<p>{html.escape(about)}</p>"
    if len(results) > 1:
        body += f"<nav>{links}</nav>"
    return html_page(title, body + "".join(one.html() for one in results) + rest)
