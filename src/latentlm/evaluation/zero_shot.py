"""Zero-shot perplexity: a model on text that it was not trained on, as the first table of Kong et al. (2025).

Each set is detokenised as in the literature (`detokenisers`), each of its texts ends with an EOS, and the texts are
packed into blocks that do not overlap, the last one shorter but scored. (A model of sentences gets them one by one.)
Every figure stands under its protocol: the honest one, and beside it what the family's published code would report.

What differs from how Sahoo et al. (2024, MDLM) and Lou et al. (2024, SEDD) read the sets, and moves figures: blank
lines of WikiText are no texts here, and a line is scored without the blank before it and the line break after it; no
token is dropped between a thousand texts and the next; a block has its BOS beside its tokens, not among them, and no
EOS of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from latentlm.data import Document, Tokens, read_documents
from latentlm.data.recipe import make_sequences
from latentlm.errors import InputError, shown
from latentlm.evaluation import detokenisers
from latentlm.evaluation.likelihood import perplexity
from latentlm.evaluation.measure import measure
from latentlm.evaluation.published import has_published_protocol
from latentlm.latent_lm import LatentLM

_AG_NEWS_CLASSES = ("1", "2", "3", "4")


@dataclass(frozen=True)
class TextSet:
    """How a set is read: what makes natural text of one of its texts, and the column of a table that holds them."""

    detokenise: Callable[[str], str] = str
    column: str | None = None


SETS: Mapping[str, TextSet] = {
    "ptb": TextSet(detokenisers.detokenise_ptb),
    "wikitext": TextSet(detokenisers.detokenise_wikitext_line),
    "lm1b": TextSet(detokenisers.detokenise_lm1b),
    "lambada": TextSet(detokenisers.detokenise_lambada),
    "ag_news": TextSet(),
    "pubmed": TextSet(detokenisers.detokenise_papers, "article"),
    "arxiv": TextSet(detokenisers.detokenise_papers, "article"),
    "text": TextSet(),
}


def parse_sets(arguments: Sequence[str]) -> dict[str, str]:
    """Names of sets and their sources, from SET=SOURCE.

    Raises:
        InputError: of another form, an unknown set, or one that is named twice.
    """
    sources: dict[str, str] = {}
    for argument in arguments:
        name, separator, source = argument.partition("=")
        if not separator or not source:
            raise InputError(f"{shown(argument)} is not of the form SET=SOURCE, as in ptb=ptb.test.txt.")
        if name not in SETS:
            raise InputError(f"{shown(name)} is no set: those that are known are {', '.join(SETS)}.")
        if name in sources:
            raise InputError(f"{name} is given twice: give each set once.")
        sources[name] = source
    if not sources:
        raise InputError("there is no set: give at least one as SET=SOURCE, as in ptb=ptb.test.txt.")
    return sources


def read_set(name: str, source: str, limit: int | None = None) -> list[str]:
    """The texts of a set as they are distributed, at most `limit` of them.

    Text files have one text a line, but blank ones. A table has it in a column: `article` of the papers, `text` of all
    others. Of AG News in the `.csv` of Zhang et al. (2015) it is title, blank, description, as in the hub's copy, which
    the literature reads.
    """
    if name == "ag_news" and source.lower().removesuffix(".xz").endswith(".csv"):
        for kind in read_documents(source, column="1", limit=1):
            if kind.text.strip() not in _AG_NEWS_CLASSES:
                raise InputError(f"{source} is no AG News: give rows of class (1 to 4), title, description, no header.")
        titles, descriptions = (read_documents(source, column=column, limit=limit) for column in ("2", "3"))
        return [f"{title.text} {text.text}" for title, text in zip(titles, descriptions, strict=True)]
    return [document.text for document in read_documents(source, column=SETS[name].column, limit=limit)]


def zero_shot(
    model: LatentLM,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, str],
    *,
    unit: str = "blocks",
    length: int,
    limit: int | None = None,
    iw_samples: int = 16,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The figures of each set, both protocols in one mapping; all sets are read before the first is scored.

    Args:
        sources: name of a set, one of `SETS` → a source, as `read_documents` takes it.
        unit, length: "blocks" of so many scored tokens, or "sentences" of at most so many.
        limit: texts read of each set.
        on_progress: called with (sequences done, sequences in all) of a set after each batch, and from 0 for the next.

    Returns:
        Of each set the figures of `measure` (protocol "paper", where the family has one), and `source`, `texts`,
        `truncated` (sentences that lost tokens), `words`, `elbo_nll_per_word`, `iw_nll_per_word` (nats) and the
        `elbo_word_perplexity` and `iw_word_perplexity`, exp(Σ nats ÷ words). Words are those that white space separates
        in the text as it is distributed, and one for each EOS, whose nats are in the sum, too: 82,430 of the Penn
        Treebank's test. None where a text was cut or is no token. Bytes are those of the detokenised text, UTF-8; an
        EOS has none.

    Raises:
        InputError: the model is of p(x | c), a source that cannot be read, or figures that are not finite.
    """
    if model.annotation_labels is not None:
        raise InputError("this model is of p(x | c), of texts with labels, which these sets lack: give another model.")
    read = {name: _tokens(name, source, tokenizer, limit) for name, source in sources.items()}
    protocol = "paper" if has_published_protocol(model) else "honest"
    figures = {}
    for name, (tokens, texts, words) in read.items():
        sequences = make_sequences(tokens, tokenizer, unit, length, drop_last=False)
        measured = measure(
            model,
            sequences,
            protocol=protocol,
            iw_samples=iw_samples,
            batch_size=batch_size,
            seed=seed,
            on_progress=on_progress,
        )
        truncated = getattr(sequences, "truncated", 0)
        whole = truncated == 0 and len(tokens.ends) == texts
        counted = words + len(tokens.ends) if whole else None
        about = {"source": sources[name], "texts": texts, "truncated": truncated, "words": counted}
        figures[name] = {**about, **measured, **_per_word(measured, counted)}
    return figures


def _tokens(name: str, source: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> tuple[Tokens, int, int]:
    """The tokens of a set, and how many texts and words it has as it is distributed."""
    texts = read_set(name, source, limit)
    detokenise = SETS[name].detokenise
    tokens = Tokens.of((Document(detokenise(text)) for text in texts), tokenizer)
    return tokens, len(texts), sum(len(text.split()) for text in texts)


def _per_word(figures: Mapping[str, Any], words: int | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for bound in ("elbo", "iw"):
        nll = None if words is None else figures[f"{bound}_nll_per_token"] * figures["tokens"] / words
        found[f"{bound}_nll_per_word"] = nll
        found[f"{bound}_word_perplexity"] = None if nll is None else perplexity(nll)
    return found


def zero_shot_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each set and protocol; a bound is marked ≤, the likelihood itself =, a published score with neither."""
    rows = Table()
    for column in (
        "set", "protocol", "NLL by ELBO, nats/token", "by IW", "perplexity/token", "perplexity/word", "bits/byte",
        "KL, nats/token", "tokens", "words", "bytes",
    ):  # fmt: skip
        rows.add_column(column, justify="left" if column in ("set", "protocol") else "right")
    for name, one in figures.items():
        sign = "=" if one["exact"] else "≤"
        word = one["iw_word_perplexity"]
        rows.add_row(
            name,
            "honest, exact" if one["exact"] else f"honest, K = {one['iw_samples']}",
            f"{sign} {one['elbo_nll_per_token']:.4f}",
            f"{sign} {one['iw_nll_per_token']:.4f}",
            f"{sign} {one['iw_perplexity']:,.2f}",
            "–" if word is None else f"{sign} {word:,.2f}",
            f"{sign} {one['iw_bits_per_byte']:.4f}",
            "–" if one["exact"] else f"{one['kl_per_token']:.4f}",
            f"{one['tokens']:,}",
            "–" if one["words"] is None else f"{one['words']:,}",
            f"{one['bytes']:,}",
        )
        if "published_perplexity" in one:
            score = f"{one['published_nll_per_token']:.4f}"
            rows.add_row("", "paper (no bound)", score, "–", f"{one['published_perplexity']:,.2f}", *["–"] * 6)
        else:
            rows.add_row("", "paper: none known of this family", *["–"] * 9)
    return rows
