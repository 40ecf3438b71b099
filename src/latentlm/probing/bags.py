"""Texts as bags of what stands in them: what a code has to be compared with, since it needs no model."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_matrix

_WORD = r"(?u)\b\w+\b"
_LETTERS = (2, 4)


def word_bags(texts: Sequence[str]) -> csr_matrix:
    """TF-IDF of words in lower case, [texts, words], each row of length 1 (or 0, of a text without words)."""
    return _bags([texts], analyzer="word", token_pattern=_WORD)[0]


def letter_bags(*groups: Sequence[str]) -> list[csr_matrix]:
    """TF-IDF of the groups' sequences of 2 to 4 letters within words, weighted by how many texts of all groups have
    them; a matrix of rows of length 1 for each group, with the columns of all."""
    return _bags(groups, analyzer="char_wb", ngram_range=_LETTERS)


def _bags(groups: Sequence[Sequence[str]], **options: object) -> list[csr_matrix]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    every = [text for group in groups for text in group]
    try:
        rows = csr_matrix(TfidfVectorizer(**options).fit_transform(every))
    except ValueError:  # its word for texts that hold nothing of the kind
        rows = csr_matrix((len(every), 1))
    ends = accumulate(map(len, groups), initial=0)
    return [rows[first:end] for first, end in pairwise(ends)]


def cosine(first: csr_matrix, second: csr_matrix) -> Float[np.ndarray, " texts"]:
    """Of rows of length 1 or 0: the cosine of each row with the same row of the other."""
    return np.asarray(first.multiply(second).sum(1), dtype=np.float64).reshape(-1)
