"""Families whose decoder is a causal language model of transformers, taken whole."""

import math
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from latentlm.errors import InputError
from latentlm.generation import GeneratesFromLatents
from latentlm.layers import SeenMask


class HostedLM(GeneratesFromLatents):
    """p(x | z) = Π_t p(x_t | z, x_<t) by `language_model`, which is given what `given_latents` makes of z.

    Texts are scored in one pass over the text itself, and written step by step with the model's own cache.
    """

    language_model: PreTrainedModel
    _supports_sdpa = True
    _supports_flex_attn = True

    @property
    def _recomputed(self) -> PreTrainedModel:
        return self.language_model

    def given_latents(
        self, latents: Float[Tensor, "batch *event"], position_ids: Tensor, condition: Tensor | None
    ) -> dict[str, Any]:
        """What the language model's `forward` is given of z and c; positions [batch, time] count text, BOS at 0."""
        return {}

    def decode(
        self,
        latents: Float[Tensor, "*samples_batch_event"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> Float[Tensor, "*samples batch scored vocabulary"]:
        self.check_text(input_ids, attention_mask)
        rows = latents.shape[: -self.latent_dims]
        if not rows or rows[-1] != len(input_ids):
            raise InputError(
                f"latents of shape {list(latents.shape)} do not fit {len(input_ids)} sequences: give one for each."
            )
        repeats = math.prod(rows[:-1])
        latents = latents.flatten(0, len(rows) - 1)
        # BOS alone has nothing to score, but attention refuses a text of length 0
        scored = slice(0, input_ids.shape[1] - 1)
        read = input_ids if input_ids.shape[1] == 1 else input_ids[:, :-1]
        mask = None if attention_mask is None else attention_mask[:, : read.shape[1]].repeat(repeats, 1)
        given = self.decoder_condition(condition, len(input_ids))
        given = None if given is None else given.repeat(repeats, 1)
        return self.next_logits(latents, read.repeat(repeats, 1), mask, condition=given)[:, scored].unflatten(0, rows)

    def new_cache(self) -> Cache:
        return DynamicCache(config=self.language_model.config)

    def cache_shapes(self) -> list[tuple[int, int, int]] | None:
        """Heads, and widths of keys and of values, of each layer's cache; None where they are not known."""
        return None

    def _check_cache(self, cache: Cache) -> None:
        shapes = self.cache_shapes()
        filled = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]
        if shapes is None or not filled:
            return
        found = [(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in filled]
        if found != shapes:
            raise InputError("past_key_values are the cache of another model: start with one of new_cache().")

    def next_logits(
        self,
        latents: Float[Tensor, "batch *event"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: SeenMask | None = None,
        position_ids: Int64[Tensor, "batch time"] | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "batch kept vocabulary"]:
        if past_key_values is not None:
            self._check_cache(past_key_values)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = self._positions(input_ids, attention_mask, seen)
        position_ids = position_ids.expand(len(input_ids), -1)
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            logits_to_keep=logits_to_keep,
            **self.given_latents(latents, position_ids, condition),
        ).logits
