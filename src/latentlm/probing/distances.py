"""How far texts are from each other: in tokens edited, in words moved, and to a sentence encoder."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from latentlm.data.tokenizers import load_tokenizer
from latentlm.errors import InputError
from latentlm.pretrained import encoder_tokens, load_encoder
from latentlm.probing.space import LatentSpace

DISTANCES = ("words", "sentence")
_AT_ONCE = 64  # sentences


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Insertions, deletions and replacements that make one sequence of the other (Levenshtein 1966), divided by the
    length of the longer: 0 for equal ones, 1 where nothing is left in place; 0 for two empty ones.
    """
    if not one or not other:
        return float(len(one) != len(other))
    row = list(range(len(other) + 1))
    for place, token in enumerate(one, start=1):
        before, row[0] = row[0], place
        for column, second in enumerate(other, start=1):
            before, row[column] = row[column], min(before + (token != second), row[column] + 1, row[column - 1] + 1)
    return row[-1] / max(len(one), len(other))


def word_movers_distance(
    one: Sequence[int], other: Sequence[int], vectors: Float[np.ndarray, "vocabulary numbers"]
) -> float:
    """The least Euclidean distance that the words of one text travel, in the mean, to become those of the other (Kusner
    et al. 2015, section 4): an optimal transport between bags of words, each with its share of the text, solved
    exactly. No word is left out as a stop word. An empty text counts as one word whose vector is 0.

    Args:
        one, other: ids of words, rows of `vectors`.

    Raises:
        InputError: POT is not installed.
    """
    transport = _transport()
    if sorted(one) == sorted(other):
        return 0.0  # to the last bit, whatever the order
    places, shares = zip(*(_bag(text, vectors) for text in (one, other)), strict=True)
    differences = places[0][:, None] - places[1][None]
    return float(transport.emd2(*shares, np.sqrt(np.square(differences).sum(-1)), numItermax=1_000_000))


def _bag(text: Sequence[int], vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not text:
        return np.zeros((1, vectors.shape[1])), np.ones(1)
    words, counts = np.unique(np.asarray(text), return_counts=True)
    return vectors[words].astype(np.float64), counts / counts.sum()


def cosines(
    ones: Float[np.ndarray, "rows numbers"], others: Float[np.ndarray, "rows numbers"]
) -> Float[np.ndarray, " rows"]:
    """Of each row with the same row of the others; 0 where one is 0."""
    norms = np.linalg.norm(ones, axis=1) * np.linalg.norm(others, axis=1)
    return (ones * others).sum(1) / np.where(norms > 0, norms, 1.0)


def _transport() -> Any:
    try:
        import ot
    except ImportError as error:
        raise InputError(
            "the word mover's distance needs the package POT: pip install 'latentlm[transport]', or take the distance "
            "sentence with an encoder."
        ) from error
    return ot


class TextDistance:
    """One of `DISTANCES`, of any two texts; each text and each pair is worked out once.

    Args:
        distance: "words", the word mover's distance, between tokens by their input embeddings; or "sentence", one less
            the cosine of the mean of an encoder's last states.
        encoder: a folder or hub name of a text encoder; without one, words are the tokens of the space's own model.

    Raises:
        InputError: an unknown distance, sentences without an encoder, one that cannot be loaded, a model without input
            embeddings, or no POT where words are to be moved.
    """

    def __init__(self, space: LatentSpace, distance: str = "words", encoder: str | None = None):
        if distance not in DISTANCES:
            raise InputError(f"distance must be one of {', '.join(DISTANCES)}, not {distance!r}.")
        if distance == "sentence" and encoder is None:
            raise InputError("the distance sentence needs an encoder: give its folder or hub name, or take words.")
        self.distance, self._tokenizer = distance, space.tokenizer
        model: Any = space.model
        if encoder is not None:
            model, self._tokenizer = load_encoder(encoder), load_tokenizer(encoder, needs_end=False)
        if distance == "words":
            _transport()
            try:
                weight = model.get_input_embeddings().weight
            except (AttributeError, NotImplementedError) as error:
                raise InputError(
                    f"a {type(model).__name__} has no input embeddings to move words by: give an encoder."
                ) from error
            self._vectors = weight.detach().float().cpu().numpy()
        self._encoder = model
        self._known: dict[str, Any] = {}
        self._pairs: dict[tuple[str, str], float] = {}
        whose = "of the model's own tokens" if encoder is None else f"of the tokens of {encoder}"
        #: in words
        self.described = (
            f"the word mover's distance (Kusner et al. 2015) by the input embeddings {whose}"
            if distance == "words"
            else f"one less the cosine of mean-pooled sentence embeddings of {encoder}"
        )

    def between(self, ones: Sequence[str], others: Sequence[str]) -> Float[np.ndarray, "ones others"]:
        """The distance of each of some texts to each of others."""
        self._read([*ones, *others])
        return np.array([[self._of_pair(one, other) for other in others] for one in ones]).reshape(
            len(ones), len(others)
        )

    def _of_pair(self, one: str, other: str) -> float:
        key = (min(one, other), max(one, other))
        if key not in self._pairs:
            first, second = (self._known[text] for text in key)
            if self.distance == "words":
                self._pairs[key] = word_movers_distance(first, second, self._vectors)
            else:
                self._pairs[key] = 0.0 if one == other else 1 - float(first @ second)
        return self._pairs[key]

    def _read(self, texts: Sequence[str]) -> None:
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if self.distance == "words":
            rows = self._tokenizer(new, add_special_tokens=False)["input_ids"] if new else []
            self._known |= dict(zip(new, rows, strict=True))
            return
        for first in range(0, len(new), _AT_ONCE):
            some = new[first : first + _AT_ONCE]
            self._known |= dict(zip(some, self._embedded(some), strict=True))

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str]) -> Float[np.ndarray, "texts numbers"]:
        """Unit vectors."""
        longest = getattr(self._encoder.config, "max_position_embeddings", None)
        tokens = encoder_tokens(self._tokenizer, texts, longest).to(self._encoder.device)
        states = self._encoder(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None]
        vectors = ((states * mask).sum(1) / mask.sum(1)).double().cpu().numpy()
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
