"""Spaces of small random models, and of codes that are given, for probes to be tried on."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from tests.toy import VARIANTS, VOCABULARY, moved, pretrained_part, small_model, small_variant

from latentlm.data.tokenizers import load_tokenizer
from latentlm.probing import LatentSpace, Texts

LABELS = ["ARG0", "ARG1", "V"]
#: a family of latents [d], one of layers, one of trajectories
KINDS = ("gpt_vae", "lang_vae", "ltm", "gp_vae")


def words(number: int, *, seed: int = 0, longest: int = 9) -> tuple[str, ...]:
    """Different texts of the words w3, w4, … that the small models' tokenizer knows; the first is of one word."""
    generator = np.random.default_rng(seed)
    found = {"w3": None}
    while len(found) < number:
        length = generator.integers(1, longest + 1)
        found[" ".join(f"w{word}" for word in generator.integers(3, VOCABULARY, length))] = None
    return tuple(found)


def space_of(model, **options) -> LatentSpace:
    return LatentSpace(model, load_tokenizer(pretrained_part("bert")), **options)


def space(family: str, **options) -> LatentSpace:
    """A space of a small random model, in which what starts at 0 has left it."""
    model = small_variant(family) if family in VARIANTS else moved(small_model(family))
    return space_of(model, **options)


def conditional_space(**options) -> LatentSpace:
    model = small_model("lang_vae", annotation_labels=LABELS, annotation_size=6)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*model.injection.parameters(), *model.encoder.parameters()]:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return space_of(model, **options)


def annotated(texts: tuple[str, ...], *, per_text: bool = False) -> Texts:
    labels = [[LABELS[place % 3] for place, _ in enumerate(text.split())] for text in texts]
    return Texts(texts, tuple(tuple(row[:1] if per_text else row) for row in labels))


class GivenCodes(LatentSpace):
    """A space whose codes are given by text; its model has no labels, and nothing else."""

    view = "given codes"
    model = SimpleNamespace(annotation_labels=None)

    def __init__(self, codes: dict[str, np.ndarray]):
        self.of_text = codes

    def codes(self, texts: Texts) -> np.ndarray:
        return np.stack([self.of_text[text] for text in texts.texts]).astype(np.float64)

    def sampled_codes(self, texts: Texts, seed: int = 0) -> np.ndarray:
        return self.codes(texts)  # as if nothing were uncertain


def given(codes: np.ndarray, factors: dict[str, list] | None = None) -> tuple[GivenCodes, Texts]:
    """A space of given codes [texts, numbers], and the texts "text 0", "text 1", … whose codes they are."""
    texts = tuple(f"text {row}" for row in range(len(codes)))
    table = None if factors is None else pd.DataFrame(factors)
    return GivenCodes(dict(zip(texts, codes, strict=True))), Texts(texts, factors=table)
