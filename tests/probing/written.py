"""Small models of each family that write texts of the words w3 … w22, and such texts."""

import functools

import numpy as np
import pandas as pd
from tests.toy import EOS, moved, pretrained_part, small_model

from latentlm import save
from latentlm.data.tokenizers import load_tokenizer
from latentlm.probing import LatentSpace, Texts

WRITING = ("gp_vae", "gpt_vae", "lang_vae", "ltm")
_OPTIONS = {
    "gp_vae": {"length_model": "categorical"},
    "ltm": {"inference_steps": 2, "latent_prior": "diagonal"},
}


@functools.cache
def _model(family):
    return _made(family)


def _made(family, **changes):
    return moved(small_model(family, **{"eos_token_id": EOS, **_OPTIONS.get(family, {}), **changes}))


def space_of(family, changes=None, **options):
    """The latent space of a family's small model, whose latents matter and whose prior is, for LTM, its own."""
    model = _made(family, **changes) if changes else _model(family)
    return LatentSpace(model, load_tokenizer(pretrained_part("gpt2")), **options)


def some_texts(number, *, seed=0, lengths=(1, 9)):
    """Random texts, the first of one word, with two factors: whether w3 is its first word, and its length's residue."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(3, 23, generator.integers(*lengths)) for _ in range(number)]
    rows[0] = rows[0][:1]
    for row in rows[::2]:
        row[0] = 3
    first = ["yes" if row[0] == 3 else "no" for row in rows]
    factors = pd.DataFrame({"length": [f"{len(row) % 3}" for row in rows], "w3": first})
    return Texts(tuple(" ".join(f"w{word}" for word in row) for row in rows), factors=factors)


def saved(family, folder, texts):
    """A folder with the model, a file of the texts, and a table of their factors."""
    space = space_of(family)
    save(space.model, space.tokenizer, folder / "model")
    (folder / "texts.txt").write_text("\n".join(texts.texts) + "\n", encoding="utf-8")
    texts.factors.to_csv(folder / "factors.csv", index=False)
    return [str(folder / "model"), "--data", str(folder / "texts.txt"), "--factor-table", str(folder / "factors.csv")]


def labelled(texts):
    """The same texts with a label, A or B, for each word, and what `conditional_space` knows."""
    labels = tuple(
        tuple("AB"[(row + place) % 2] for place in range(len(text.split()))) for row, text in enumerate(texts.texts)
    )
    return Texts(texts.texts, labels, texts.factors)


def conditional_space(monkeypatch):
    """A space of a conditional model, and a list of the labels that each call of `write` is given."""
    space = space_of("lang_vae", changes={"annotation_labels": ["A", "B"]})
    given, write = [], space.write

    def noticing(latents, labels=None, *rest):
        given.append(labels)
        return write(latents, labels, *rest)

    monkeypatch.setattr(space, "write", noticing)
    return space, given
