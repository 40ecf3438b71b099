"""A model's latent space, asked about texts again and again: each text is inferred once, whatever asks for it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from latentlm.errors import InputError
from latentlm.evaluation.batches import evaluating
from latentlm.generation import WritesText
from latentlm.latent_lm import LatentLM
from latentlm.probing.texts import Texts
from latentlm.text import TextBatch, encode, stacked, text_batches, token_counts, write

POOLS = ("mean", "flat")


class LatentSpace:
    """What probes ask of a model. A model of the contract will do; those that write need one that generates.

    What is known of a text is kept, so the model has to stay as it is.

    A latent that has parts (layers × latents, or times) becomes a code, one row of numbers, as `pool` says: "mean" over
    all its parts, or "flat", all of its numbers one after another. `part` takes one layer (the mean over its latents),
    or one position of the text, in place of all.

    Args:
        seed: of the noise of an inference that needs any.
        batch_size: texts at a time; changes speed and memory, no figure.
        on_progress: told (texts done, texts in all) while texts are inferred.
    """

    def __init__(
        self,
        model: LatentLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pool: str = "mean",
        part: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        if model.exact:
            raise InputError(f"{type(model).__name__} has no latents: there is nothing to probe.")
        if pool not in POOLS:
            raise InputError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}.")
        self.model, self.tokenizer = model, tokenizer
        self.pool, self.part, self.seed, self.batch_size = pool, part, seed, batch_size
        self.on_progress = on_progress
        #: event shape of a latent; of a trajectory that of one token
        self.event = tuple(model.prior(1, 1).event_shape)
        parts = None if model.latent_per_token else self.event[0] if len(self.event) > 1 else 1
        if part is not None and len(self.event) == 1:
            raise InputError(f"a latent of {self.event[0]} numbers has no parts: leave part out.")
        if part is not None and (part < 0 or (parts is not None and part >= parts)):
            have = "0 or more, a position" if parts is None else f"from 0 to {parts - 1}, a layer"
            raise InputError(f"part {part} of a latent of {' × '.join(map(str, self.event))}: give a number {have}.")
        if pool == "flat" and model.latent_per_token and part is None:
            raise InputError("trajectories have different lengths: pool them by their mean, or take one position.")
        self._priors: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._known: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = {}

    @property
    def view(self) -> str:
        """In words, how a latent becomes a code."""
        if len(self.event) == 1:
            return f"posterior means of {self.event[0]} numbers"
        parts = "positions" if self.model.latent_per_token else "layers and latents"
        if self.part is not None:
            kind = "position" if self.model.latent_per_token else "layer"
            which = f"of {kind} {self.part}, counted from 0"
            if self.model.latent_per_token:
                return f"posterior means {which}"
            return f"posterior means {which}, " + ("all of its numbers" if self.pool == "flat" else "over its latents")
        return "posterior means, all of their numbers" if self.pool == "flat" else f"posterior means over all {parts}"

    def infer(self, texts: Texts) -> None:
        """Infers those texts that were not asked for before."""
        missing = {key: place for place, key in enumerate(self._keys(texts)) if key not in self._known}
        if not missing:
            return
        unknown = texts.select(list(missing.values()))
        with evaluating(self.model):
            encoding = encode(
                self.model,
                self.tokenizer,
                unknown.texts,
                annotations=self._labels(unknown),
                cut=True,
                batch_size=self.batch_size,
                seed=self.seed,
                on_progress=self.on_progress,
            )
        for row, key in enumerate(missing):
            end = None if encoding.lengths is None else int(encoding.lengths[row])
            mean, variance = encoding.mean[row, :end], encoding.variance[row, :end]
            if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
                raise InputError(f"the latent of {unknown.texts[row][:60]!r} is not finite: the model has diverged.")
            self._known[key] = mean, variance

    def means(self, texts: Texts) -> list[Float[np.ndarray, "..."]]:
        """The mean of q(z | x) of each text, in the model's own units; of trajectories each has its own length."""
        self.infer(texts)
        return [self._known[key][0] for key in self._keys(texts)]

    def variances(self, texts: Texts) -> list[Float[np.ndarray, "..."]]:
        """The variance of q(z | x) of each text."""
        self.infer(texts)
        return [self._known[key][1] for key in self._keys(texts)]

    def standardised(self, mean: Float[np.ndarray, " *event"]) -> Float[np.ndarray, " *event"]:
        """A latent in prior standard deviations from the prior's mean."""
        centre, scale = self._prior(len(mean))
        return (mean - centre) / scale

    def from_standardised(self, z: Float[np.ndarray, " *event"]) -> Float[np.ndarray, " *event"]:
        """The latent of so many prior standard deviations from the prior's mean: what undoes `standardised`."""
        centre, scale = self._prior(len(z))
        return centre + scale * z

    def code(self, mean: Float[np.ndarray, " *event"], text: str = "") -> Float[np.ndarray, " numbers"]:
        """A latent as one row of numbers, as `codes` has those of texts.

        Args:
            text: named where it lacks the position that is asked for.
        """
        return self._code(self.standardised(mean), text).astype(np.float64)

    def _prior(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        if length not in self._priors:
            with torch.no_grad():
                prior = self.model.prior(1, length)
                scale = prior.variance[0].float().sqrt()
                self._priors[length] = prior.mean[0].float().cpu().numpy(), scale.cpu().numpy()
        return self._priors[length]

    def codes(self, texts: Texts) -> Float[np.ndarray, "texts numbers"]:
        """The mean of q(z | x) of each text as one row of numbers, in prior standard deviations (see `view`)."""
        return np.stack([self.code(mean, text) for mean, text in zip(self.means(texts), texts.texts, strict=True)])

    def sampled_codes(self, texts: Texts, seed: int = 0) -> Float[np.ndarray, "texts numbers"]:
        """A draw from q(z | x) of each text as one row of numbers, in prior standard deviations.

        Correlations in q are left out, as in `draws`.
        """
        drawn = self.draws(texts, np.random.default_rng((seed, 2)))
        return np.stack([self.code(z, text) for z, text in zip(drawn, texts.texts, strict=True)])

    def draws(self, texts: Texts, generator: np.random.Generator) -> list[Float[np.ndarray, "..."]]:
        """A draw from q(z | x) of each text, in the model's own units, each number by itself with its own variance."""
        return [
            mean + np.sqrt(variance) * generator.standard_normal(mean.shape)
            for mean, variance in zip(self.means(texts), self.variances(texts), strict=True)
        ]

    def _code(self, z: np.ndarray, text: str) -> np.ndarray:
        if self.part is not None:
            if self.part >= len(z):
                raise InputError(
                    f"{text[:60]!r} has {len(z)} positions and no position {self.part}: take longer texts."
                )
            z = z[self.part]
        return z.reshape(-1) if self.pool == "flat" else z.reshape(-1, z.shape[-1]).mean(0)

    def write(
        self,
        latents: Sequence[Float[np.ndarray, "..."]],
        labels: Sequence[Sequence[str]] | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """The text of each latent, greedily, without a prompt; a trajectory gives as many tokens as it has.

        Args:
            labels: of each text, where the model is conditional.
        """
        if not isinstance(self.model, WritesText):
            raise InputError(f"a {type(self.model).__name__} does not write text from latents.")
        texts: list[str] = [""] * len(latents)
        order = sorted(range(len(latents)), key=lambda row: len(latents[row]))
        with evaluating(self.model):
            for first in range(0, len(order), self.batch_size):
                rows = order[first : first + self.batch_size]
                for row, text in zip(
                    rows, self._write([latents[row] for row in rows], rows, labels, max_new_tokens), strict=True
                ):
                    texts[row] = text
        return texts

    def _write(
        self,
        latents: Sequence[np.ndarray],
        rows: Sequence[int],
        labels: Sequence[Sequence[str]] | None,
        max_new_tokens: int | None,
    ) -> list[str]:
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
        if self.model.latent_per_token:
            lengths = torch.tensor([len(z) for z in latents])
            options |= {"lengths": lengths.to(self.model.device), "max_new_tokens": int(lengths.max())}
        given = torch.from_numpy(stacked(latents)).float()
        annotations = [labels[row] for row in rows] if labels is not None else ()
        return write(self.model, self.tokenizer, latents=given, annotations=annotations, **options)

    def batches(self, texts: Texts) -> Iterator[TextBatch]:
        """What `text_batches` makes of them."""
        lengths = token_counts(self.tokenizer, texts.texts)
        return text_batches(self.model, self.tokenizer, texts.texts, lengths, self._labels(texts), self.batch_size)

    def _labels(self, texts: Texts) -> Sequence[Sequence[str]] | None:
        if self.model.annotation_labels is None:
            return None
        if texts.labels is None:
            raise InputError("this model is conditional: give the labels of the texts, too.")
        return texts.labels

    def _keys(self, texts: Texts) -> list[tuple[Any, ...]]:
        labels = self._labels(texts)
        return [(text, None if labels is None else tuple(labels[row])) for row, text in enumerate(texts.texts)]
