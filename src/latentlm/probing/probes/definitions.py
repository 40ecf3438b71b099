"""Definition modelling: whether a term's latent leads to its definition, as a place in the space and as a text."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from latentlm.data import read_documents
from latentlm.errors import InputError
from latentlm.evaluation.reconstruction import bleu
from latentlm.generation import WritesText
from latentlm.probing.bags import letter_bags
from latentlm.probing.result import ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts

_PENALTIES = tuple(10.0**power for power in range(-1, 6))
_CUTOFFS = (1, 10)
_ROWS = 1000  # whose similarities to all definitions are held at a time
_EQUAL = 1e-9
_COLOURS = {"mrr": "#1f77b4", "hits at 1": "#2ca02c", "hits at 10": "#ff7f0e"}
#: of codes with more numbers than this a map is fitted on so many texts, the first
_MOST_NUMBERS, _FITTED = 512, 2000


def definitions(
    space: LatentSpace,
    texts: Texts,
    *,
    terms_column: str | None = None,
    terms: str | None = None,
    separator: str = "|",
    written: int = 100,
    seed: int = 0,
) -> ProbeResult:
    """Definition modelling: from the code of a term to that of its definition, and to a text; --data has definitions.

    Example: latentlm probe definitions MODEL --data glosses.tsv.xz --column 4 --terms-column 3 --limit 2000

    Args:
        terms_column: where the data has the term of each definition: the column's name, or its number from 1 in a file
            without a header (3 in the glosses of Open English WordNet, whose --column is 4).
        terms: a file with the terms, if they are not in the data: a term for each text, in their order.
        separator: what stands between words of one definition; the first of them is the term.
        written: definitions that are written from z, at most; 0 writes none.
        seed: of the held-out half and of what is shuffled.
    """
    if written < 0:
        raise InputError("written must be 0 or more: it is a number of definitions.")
    words = _terms(texts, terms_column, terms, separator)
    of_terms = _as_texts(space, words, texts)
    generator = np.random.default_rng(seed)
    training, held_out = split_by_term(words, generator)
    if min(len(training), len(held_out)) < 2:
        raise InputError(
            f"definitions need 2 pairs on either side of a split by terms, and there are {len(set(words))}: give more."
        )
    term_codes, gloss_codes = space.codes(of_terms), space.codes(texts)
    other = _derangement(len(held_out), generator)
    inputs, wanted = term_codes[held_out], gloss_codes[held_out]
    means = term_codes[training].mean(0), gloss_codes[training].mean(0)
    shuffled = generator.permutation(training)
    bags = letter_bags(words, texts.texts)
    mapped = ridge_map(term_codes[training], gloss_codes[training])(inputs) - means[1]
    by_chance = ridge_map(term_codes[training], gloss_codes[shuffled])(inputs) - means[1]
    centred = wanted - means[1]
    rows = [
        {"line": "codes", **_of_codes(inputs, wanted)},
        {"line": "codes, centred", **_of_codes(inputs - means[0], centred)},
        {"line": "codes, ridge map", **_of_codes(mapped, centred)},
        {"line": "floor: ridge map of shuffled pairs", **_of_codes(by_chance, centred)},
        {"line": "floor: codes, another's definition", **_of_codes(inputs, wanted[other])},
        {"line": "floor: chance, exact", **chance(len(held_out))},
        {"line": "letters (TF-IDF), no model", **_retrieval(_cosines_of_bags(bags, held_out), len(held_out))},
    ]
    lines, examples, said = _written(space, texts, of_terms, training, held_out[: max(written, 0)])
    table = pd.DataFrame(rows)
    details = {"written": examples} if len(examples) else {}
    if lines:
        details["bleu"] = pd.DataFrame(lines)
        table = table.merge(details["bleu"][["line", "bleu", "bleu of another term's z"]], on="line", how="left")
    about = (
        f"{len(texts):,} pairs of a term and its definition, of {len(set(words)):,} terms; {space.view}, in prior "
        f"standard deviations. Retrieval: the rank of the definition among the {len(held_out):,} of the held-out half "
        "(all definitions of a term are on one side) by cosine with the term; mean reciprocal rank, and share within "
        "the first 1 and 10, 0 to 1; where definitions are equally near, the expectation over their orders. A term of "
        "several definitions has the same code for each. Centred: less the mean of terms, and of definitions, of the "
        "training half. Ridge map: linear from code to code, fitted on the training half, penalty by leave-one-out. "
        "Floors: chance is exact, Σ 1/r ÷ N and k ÷ N; the map of shuffled pairs; another definition as the right one. "
        f"Line to beat: TF-IDF of sequences of 2 to 4 letters. {said} Seed {seed}."
    )

    def draw(panel: Any) -> None:
        heights = np.arange(len(table))[::-1]
        for place, (column, colour) in enumerate(_COLOURS.items()):
            panel.barh(heights + 0.25 * (1 - place), table[column], height=0.23, color=colour, label=column)
        panel.set(yticks=heights, yticklabels=table["line"], xlabel=f"among {len(held_out):,} definitions")
        panel.legend(frameon=False)

    return ProbeResult("definitions", about, table, details, panels=[draw])


def expected_ranks(
    similarities: Float[np.ndarray, "queries candidates"], right: Int[np.ndarray, " queries"]
) -> tuple[Int[np.ndarray, " queries"], Int[np.ndarray, " queries"]]:
    """Of each query how many candidates are nearer than the right one, and how many are as near, itself included."""
    own = similarities[np.arange(len(right)), right][:, None]
    nearer = (similarities > own + _EQUAL).sum(1)
    equal = (np.abs(similarities - own) <= _EQUAL).sum(1)
    return nearer, equal


def retrieval_scores(nearer: Int[np.ndarray, " queries"], equal: Int[np.ndarray, " queries"]) -> dict[str, float]:
    """Mean reciprocal rank (Voorhees 1999) and shares within the first 1 and 10, 0 to 1.

    With `equal` candidates that tie, the rank is any of nearer + 1 … nearer + equal with the same probability, and each
    figure is the expectation: (H(nearer + equal) − H(nearer)) / equal for 1/rank, with H the harmonic numbers.
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, int((nearer + equal).max()) + 1))])
    scores = {"mrr": float(((harmonic[nearer + equal] - harmonic[nearer]) / equal).mean())}
    for cutoff in _CUTOFFS:
        scores[f"hits at {cutoff}"] = float((np.clip(cutoff - nearer, 0, equal) / equal).mean())
    return scores


def chance(candidates: int) -> dict[str, float]:
    """What candidates in random order score in expectation: H(N) / N, and k / N."""
    return retrieval_scores(np.array([0]), np.array([candidates])) | {
        "median rank": (candidates + 1) / 2,
        "definitions": candidates,
    }


def ridge_map(
    inputs: Float[np.ndarray, "texts numbers"], outputs: Float[np.ndarray, "texts others"]
) -> Callable[[np.ndarray], np.ndarray]:
    """A linear map with an intercept; one penalty, by the leave-one-out error (Golub, Heath and Wahba 1979)."""
    from sklearn.linear_model import RidgeCV

    fitted = slice(None) if inputs.shape[1] <= _MOST_NUMBERS else slice(_FITTED)
    model = RidgeCV(_PENALTIES).fit(inputs[fitted], outputs[fitted])
    return lambda others: np.asarray(model.predict(others)).reshape(len(others), -1)


def split_by_term(
    words: list[str], generator: np.random.Generator
) -> tuple[Int[np.ndarray, " training"], Int[np.ndarray, " held_out"]]:
    """Places of two halves (in number of terms), in random order; all places of a term are in one of them."""
    of_word, distinct = pd.factorize(np.array(words, dtype=object))
    in_training = np.zeros(len(distinct), dtype=bool)
    in_training[generator.permutation(len(distinct))[: len(distinct) // 2]] = True
    order = generator.permutation(len(words))
    chosen = in_training[of_word[order]]
    return order[chosen], order[~chosen]


def _terms(texts: Texts, column: str | None, path: str | None, separator: str) -> list[str]:
    if column is None and path is None:
        raise InputError(
            "definitions need the term of each text: name its column (--terms-column), or give a file (--terms)."
        )
    source = path or texts.source
    if source is None:
        raise InputError("these texts were not read from a file that has terms, too: give terms, a file of its own.")
    if source.startswith("builtin:"):
        raise InputError(f"{source} has no terms: give data with a column of terms, or terms, a file.")
    found = [document.text for document in read_documents(source, column=column, limit=len(texts))]
    if len(found) < len(texts):
        raise InputError(
            f"{source} has {len(found):,} terms, and there are {len(texts):,} texts: row {len(found) + 1} is missing."
        )
    words = []
    for row, term in enumerate(found):
        parts = [part.strip() for part in (term.split(separator) if separator else [term])]
        word = next((part for part in parts if part), "")
        if not word:
            raise InputError(f"{source}: term {row + 1} is {term!r}, no word: fill it in or take the row out.")
        words.append(word)
    return words


def _as_texts(space: LatentSpace, words: list[str], texts: Texts) -> Texts:
    """Terms as texts; of a conditional model with the label of their definition, if it has one for the whole."""
    labels = None
    if space.model.annotation_labels is not None and texts.labels is not None:
        if any(len(of_text) != 1 for of_text in texts.labels):
            raise InputError("this model takes a label for each word, and those of the terms are not known.")
        labels = texts.labels
    return Texts(tuple(words), labels)


def _derangement(number: int, generator: np.random.Generator) -> np.ndarray:
    """Another one for each: a random cycle through all."""
    order = generator.permutation(number)
    other = np.empty(number, dtype=np.int64)
    other[order] = np.roll(order, 1)
    return other


def _of_codes(queries: np.ndarray, candidates: np.ndarray) -> dict[str, float]:
    return _retrieval(_cosines(queries, candidates), len(candidates))


def _retrieval(similarities: Callable[[slice], np.ndarray], number: int) -> dict[str, float]:
    """Figures of queries of which each one's own place is right."""
    found = [
        expected_ranks(similarities(slice(first, first + _ROWS)), np.arange(first, min(first + _ROWS, number)))
        for first in range(0, number, _ROWS)
    ]
    nearer, equal = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return retrieval_scores(nearer, equal) | {
        "median rank": float(np.median(nearer + (equal + 1) / 2)),
        "definitions": number,
    }


def _cosines(queries: np.ndarray, candidates: np.ndarray) -> Callable[[slice], np.ndarray]:
    queries, candidates = (
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300) for rows in (queries, candidates)
    )
    return lambda rows: queries[rows] @ candidates.T


def _cosines_of_bags(bags: list[Any], rows: np.ndarray) -> Callable[[slice], np.ndarray]:
    terms, glosses = bags[0][rows], bags[1][rows].T.tocsr()
    return lambda part: (terms[part] @ glosses).toarray()


def _written(
    space: LatentSpace, texts: Texts, of_terms: Texts, training: np.ndarray, rows: np.ndarray
) -> tuple[list[dict[str, Any]], pd.DataFrame, str]:
    """BLEU of what is written from z of terms and from mapped z; each text; and what a reader has to know of them."""
    nothing = pd.DataFrame()
    if not len(rows):
        return [], nothing, "Nothing was written."
    if not isinstance(space.model, WritesText):
        return [], nothing, f"A {type(space.model).__name__} does not write text from latents."
    if space.model.latent_per_token:
        return [], nothing, "Nothing was written: a term's trajectory is as long as the term, and so would the text be."
    z_of_terms, z_of_glosses = (np.stack(space.means(each)) for each in (of_terms, texts))
    shape = z_of_terms.shape[1:]
    flat = z_of_terms.reshape(len(z_of_terms), -1)
    found = ridge_map(flat[training], z_of_glosses[training].reshape(len(training), -1))(flat[rows])
    mapped = found.reshape(len(rows), *shape)
    wanted, labels = texts.select(rows.tolist()).texts, texts.select(rows.tolist()).labels
    if space.model.annotation_labels is None:
        labels = None
    columns, lines = {"term": of_terms.select(rows.tolist()).texts, "definition": wanted}, []
    for line, latents in (("codes", z_of_terms[rows]), ("codes, ridge map", mapped), ("z of the definition", None)):
        latents = z_of_glosses[rows] if latents is None else latents
        of_own = space.write(list(latents), labels)
        # half the list further on; a greedy text is a function of z and, of a conditional model, of labels
        far = np.roll(np.arange(len(rows)), -(len(rows) // 2))
        of_other = [of_own[place] for place in far] if labels is None else space.write(list(latents[far]), labels)
        lines.append(
            {
                "line": line,
                "bleu": bleu(of_own, wanted),
                "bleu of another term's z": bleu(of_other, wanted) if len(rows) > 1 else float("nan"),
                "texts": len(rows),
            }
        )
        columns[f"by {line}"] = tuple(of_own)
    said = (
        f"BLEU (sacrebleu's defaults, corpus, 0 to 100): {len(rows):,} held-out definitions written greedily from the "
        "mean of q(z | term), from the same mapped to definitions by a ridge map of all of z's numbers, and (in the "
        "table `bleu`), as a ceiling, from z of the definition itself; beside each by z of another term."
    )
    return lines, pd.DataFrame(columns), said
