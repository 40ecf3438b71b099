"""Detokenisers of the zero-shot literature: the same substitutions in the same order as those that Lou et al. (2024,
SEDD) and Sahoo et al. (2024, MDLM) apply before they tokenise, so that the text scored is the same.

Some of what they do is odd, and kept because a figure is to be compared: `N` stands for 1 in PTB, and in WikiText and
papers, too; at either end of a PTB line it stays. One substitution of theirs can meet no natural text (a year's
apostrophe between slashes) and is left out.
"""

import re
from collections.abc import Iterable

_IN_BRACKETS = tuple(
    (re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"), rf"{left}\1{right}")
    for left, right in ("()", "[]", "{}", '""', "''")
)
_LM1B_IN_BRACKETS = tuple(
    (re.compile(rf"{re.escape(left)} ([^{re.escape(left + right)}]+) {re.escape(right)}"), rf"{left}\1{right}")
    for left, right in ('""', "''", "()", "[]")
)
_LM1B_CONTRACTION = re.compile(r" '(\w+)")
# the last one of a text in a pass of its own: its word may end the match before it
_LM1B_FULL_STOPS = tuple((re.compile(rf" (\w+) \.{after}"), rf" \1.{kept}") for after, kept in ((" ", " "), ("$", "")))
_LM1B_ENDS = {mark: re.compile(rf" \{mark}$") for mark in "?!"}


def detokenise_wikitext(text: str) -> str:
    """WikiText: ` @-@ ` and its like, blanks around marks and inside brackets and quotation marks, headings, `'s`."""
    text = text.replace("s '", "s'")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    text = _close_up(text, ":;.!?,")
    for pattern, closed in _IN_BRACKETS:
        text = pattern.sub(closed, text)
    for level in (4, 3, 2):
        text = text.replace(" ".join("=" * level), "=" * level)
    text = text.replace(" ° ", "°").replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


def detokenise_wikitext_line(line: str) -> str:
    """A line without its ends, which stood between a blank and ` \\n` when the literature detokenised it."""
    return detokenise_wikitext(f" {line} \n").strip()


def detokenise_ptb(text: str) -> str:
    """Penn Treebank: contractions, `\\/`, numbers (`N` → 1, `$ N` → $1), `<unk>` → ?."""
    text = text.replace(" 's", "'s").replace("s ' ", "s' ").replace(" n't", "n't")
    text = text.replace(" \n ", "\n").replace("\\/", "/")
    while " N " in text:  # of two numbers in a row the first match takes the blank between them
        text = text.replace(" N ", " 1 ")
    return text.replace("$ 1", "$1").replace("# 1", "#1").replace("<unk>", "?")


def detokenise_lm1b(text: str) -> str:
    """One Billion Words: addresses, contractions, blanks around marks and inside brackets, and after $ and £."""
    for scheme in ("http", "https"):
        text = text.replace(f"{scheme} : / / ", f"{scheme}://")
    text = _LM1B_CONTRACTION.sub(r"'\1", text)
    for pattern, closed in _LM1B_FULL_STOPS:
        text = pattern.sub(closed, text)
    for mark in "?!":
        text = _LM1B_ENDS[mark].sub(mark, _close_up(text, mark))
    text = _close_up(text, ",:;").replace(" / ", "/")
    for pattern, closed in _LM1B_IN_BRACKETS:
        text = pattern.sub(closed, text)
    return text.replace("$ ", "$").replace("£ ", "£")


def detokenise_lambada(text: str) -> str:
    """LAMBADA: straight double quotation marks, and a line break before the text."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def detokenise_papers(text: str) -> str:
    """PubMed and arXiv: as WikiText, then as One Billion Words."""
    return detokenise_lm1b(detokenise_wikitext(text))


def _close_up(text: str, marks: Iterable[str]) -> str:
    """Each mark that stands between blanks up to the word before it, one kind of mark after another."""
    for mark in marks:
        text = text.replace(f" {mark} ", f"{mark} ")
    return text
