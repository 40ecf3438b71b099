"""Latent spaces of small random models with a tokenizer of words w3 … w22, and texts of these words."""

import random
from typing import Any

import pandas as pd
from tests.toy import pretrained_part, small_variant
from transformers import AutoTokenizer

from latentlm.probing import LatentSpace, Texts

LABELS = ["A", "B"]


def space_of(variant: str, *, model: Any = None, **options: Any) -> LatentSpace:
    """Of one of `VARIANTS`, or of a model that is given."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained_part("gpt2"))
    return LatentSpace(small_variant(variant) if model is None else model, tokenizer, **{"batch_size": 4, **options})


def some_texts(number: int, *, least: int = 1, most: int = 7, seed: int = 0, labels: bool = False) -> Texts:
    """Random texts of so many words, and two factors of them: the first word's parity, and how many there are."""
    generator = random.Random(seed)
    words = [[generator.randint(3, 22) for _ in range(generator.randint(least, most))] for _ in range(number)]
    parity = [("even", "odd")[row[0] % 2] if row else None for row in words]
    factors = {"parity": parity, "words": [str(len(row)) for row in words]}
    return Texts(
        tuple(" ".join(f"w{word}" for word in row) for row in words),
        tuple(tuple(generator.choice(LABELS) for _ in row) for row in words) if labels else None,
        pd.DataFrame(factors),
    )
