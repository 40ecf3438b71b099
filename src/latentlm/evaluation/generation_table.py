"""The figures of `completions` and `unconditional` as a table, and in words what they leave open."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

Figures = Mapping[str, Any]


def generation_table(figures: Figures) -> Table:
    """A column for each way of writing and for people. A perplexity that is a bound is marked ≤, an exact one =."""
    rows: Mapping[str, Figures] = figures["rows"]
    table = Table()
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for label, show in _ROWS:
        cells = [show(one) for one in rows.values()]
        if set(cells) != {"–"}:
            table.add_row(label, *cells)
    return table


def notes(figures: Figures) -> list[str]:
    """What a reader of the table has to know: a sentence each."""
    rows: Mapping[str, Figures] = figures["rows"]
    one = next(iter(rows.values()))
    found = []
    if figures["exact"]:
        found.append("A model without latents has one greedy text (of a prompt): it stands for all of them.")
    if figures["fixed_length"]:
        found.append("EOS is a token between documents: no text ends by it, and all are of one length.")
    if one.get("generative_unit") == "byte":
        found.append("The scorer has another vocabulary, so its figure is bits per byte, not perplexity per token.")
    elif "generative_unit" not in one:
        found.append("Generative perplexity is left out: give a --scorer, a model that scores the texts.")
    if one.get("generative_exact") is False:
        found.append(f"≤ is a bound: importance-weighted, {one['generative_samples']} samples of the scorer's latents.")
    if "human" in rows and "mauve" not in one:
        found.append("MAUVE is left out: give --features, a model whose hidden states it compares.")
    return found


def _given(key: str, form: str) -> Any:
    return lambda one: "–" if one.get(key) is None else format(one[key], form)


def _generative(key: str, form: str) -> Any:
    def cell(one: Figures) -> str:
        if one.get(key) is None:
            return "–"
        return f"{'=' if one['generative_exact'] else '≤'} {one[key]:{form}}"

    return cell


def _distinct(one: Figures) -> str:
    values: Sequence[float | None] = [one[f"distinct_{n}"] for n in (1, 2, 3)]
    return ", ".join("–" if value is None else f"{value:.3f}" for value in values)


def _clusters(one: Figures) -> str:
    if one.get("mauve") is None:
        return "–"
    return f"{one['mauve_people_texts']:,}, {one['mauve_written_texts']:,}, {one['mauve_clusters']}"


_ROWS: Sequence[tuple[str, Any]] = (
    ("texts", _given("texts", ",d")),
    ("  different ones", _given("different_texts", ",d")),
    ("  different ones of a prompt", _given("different_texts_per_prompt", ".2f")),
    ("tokens", _given("tokens", ",d")),
    ("token entropy of a text, nats", _given("token_entropy_nats", ".3f")),
    ("repeated 4-grams of a text", _given("repetition", ".4f")),
    ("distinct-1, -2, -3", _distinct),
    ("self-BLEU of a prompt's texts", _given("self_bleu", ".1f")),
    ("BLEU against what people wrote", _given("bleu", ".2f")),
    ("MAUVE", _given("mauve", ".4f")),
    ("  texts of people, of the model, clusters", _clusters),
    ("generative perplexity per token", _generative("generative_perplexity", ".2f")),
    ("generative bits per byte", _generative("generative_bits_per_byte", ".4f")),
    ("  tokens of the scorer", _given("generative_tokens", ",d")),
    (
        "  texts without a token, left out",
        lambda one: f"{one['generative_empty']:,}" if one.get("generative_empty") else "–",
    ),
    ("seconds", _given("seconds", ",.1f")),
    ("texts/s", _given("samples_per_second", ",.2f")),
    ("tokens/s", _given("tokens_per_second", ",.0f")),
)
