"""Text from latents, from a prompt, or from the prior: what every family needs, and writing token by token."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.distributions import Distribution
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, EncoderDecoderCache

from latentlm.distributions import Stream, sequence_keys
from latentlm.errors import InputError
from latentlm.latent_lm import LatentLM, LatentLMOutput
from latentlm.layers import SeenMask

_NEW_TOKENS = 64


class WritesText(LatentLM):
    """What every family's `generate` does before a token is written: checks, prompts on one side, latents."""

    def generate(
        self,
        input_ids: Int64[Tensor, "batch time"] | None = None,
        latents: Float[Tensor, "rows *event"] | None = None,
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        max_new_tokens: int | None = None,
        num_return_sequences: int = 1,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Text from latents, from a prompt (z is inferred from it), or from the prior."""
        raise NotImplementedError

    def _prompts(
        self,
        input_ids: Tensor | None,
        latents: Tensor | None,
        attention_mask: Tensor | None,
        condition: Any,
        max_new_tokens: int | None,
        num_return_sequences: int,
    ) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time"], int]:
        """Prompts with padding on the left, their mask, and how many tokens are to be written at most."""
        if (max_new_tokens is not None and max_new_tokens < 1) or num_return_sequences < 1:
            raise InputError("max_new_tokens and num_return_sequences must be at least 1.")
        if latents is not None and self.tells_latent(condition):
            raise InputError("latents and a condition both say what z is: give one of them.")
        if input_ids is None:
            rows = max(self.rows_of(condition) or 1, 1 if latents is None else len(latents))
            input_ids = torch.full((rows, 1), self._bos(), device=self.device)
        self.check_text(input_ids, attention_mask, within_context=False)  # below, with what is to be written
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        input_ids, attention_mask = _padded_left(input_ids, attention_mask)
        longest = self.config.max_position_embeddings
        prompt_length = int(attention_mask.sum(1).max()) - 1
        if max_new_tokens is None:
            room = longest if latents is None or not self.latent_per_token else min(longest, latents.shape[1])
            max_new_tokens = max(min(_NEW_TOKENS, room - prompt_length), 1)
        if prompt_length + max_new_tokens > longest:
            raise InputError(
                f"a prompt of {prompt_length} tokens and {max_new_tokens} new ones exceed the model's context "
                f"of {longest}: shorten the prompt or ask for fewer."
            )
        return input_ids, attention_mask, max_new_tokens

    @staticmethod
    def _one_for_each(latents: Tensor, prompts: int, draws: int) -> Float[Tensor, "rows *event"]:
        if len(latents) == 1 < prompts:
            latents = latents.expand(prompts, *latents.shape[1:])
        if len(latents) != prompts * draws:
            raise InputError(f"{len(latents)} latents do not fit {prompts} prompts: give one for each, or one.")
        return latents

    def _latents_for(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        condition: Any,
        prior: Distribution,
        draws: int,
        seed: int | None,
    ) -> Float[Tensor, "rows *event"]:
        """`draws` latents for each prompt, rows of one prompt together; `prior` is that of the texts they become."""
        noise_seed = int(torch.randint(2**62, ())) if seed is None else seed
        lengths = self.scored_tokens(input_ids, attention_mask).sum(1)
        keys = sequence_keys(input_ids, attention_mask)
        # equal prompts in one call want different texts: the n-th of them has the n-th noise
        keys = keys + (keys[:, None] == keys[None]).tril(-1).sum(1)
        latents = self.draw_latents(prior, keys, draws, seed=noise_seed, stream=Stream.GENERATION)
        prompted = (lengths > 0) | self.tells_latent(condition)
        if bool(prompted.any()):
            posterior = self.infer(input_ids, attention_mask, condition, seed=noise_seed)
            posterior = self.going_on(posterior, lengths, prior)
            inferred = self.draw_latents(posterior, keys, draws, seed=noise_seed, stream=Stream.GENERATION)
            latents = torch.where(prompted.view(1, -1, *[1] * self.latent_dims), inferred, latents)
        return latents.transpose(0, 1).flatten(0, 1)

    def rows_of(self, condition: Any) -> int | None:
        """For how many texts a condition is; None where it does not say."""
        return None

    def tells_latent(self, condition: Any) -> bool:
        """Whether a condition says of itself what z is, so that BOS alone infers it, too."""
        return False

    def decoder_condition(self, condition: Any, rows: int) -> Tensor | None:
        """What p(x | z, c) takes of a condition for so many texts, [rows, …], checked; None where it takes nothing."""
        return None

    def _bos(self) -> int:
        if self.config.bos_token_id is None:
            raise InputError("the model's config names no bos_token_id, so a text needs input_ids to start from.")
        return self.config.bos_token_id


class GeneratesFromLatents(WritesText, GenerationMixin):
    """One token after another: infers z once, or takes it, and leaves the rest to transformers.

    A family's `next_logits` returns logits and fills the cache.
    """

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
        """Logits of the token after each of the last `logits_to_keep` of `input_ids`; the mask covers the cache.

        `condition` is a `decoder_condition`.
        """
        raise NotImplementedError

    def forward(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: SeenMask | None = None,
        condition: Any = None,
        latents: Float[Tensor, "batch *event"] | None = None,
        position_ids: Int64[Tensor, "batch time"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        seed: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
    ) -> LatentLMOutput:
        """Without latents the objective (`LatentLM.forward`); with latents a step of generation, and no inference.

        A step returns logits of the token after each of the last `logits_to_keep` of `input_ids` (0 for all of them).
        """
        if latents is None:
            return super().forward(
                input_ids, attention_mask, condition, seed=seed, num_items_in_batch=num_items_in_batch
            )
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        condition = self.decoder_condition(condition, len(input_ids))
        given = (latents, input_ids, attention_mask, position_ids, past_key_values, logits_to_keep, condition)
        logits = self.next_logits(*given)
        return LatentLMOutput(logits=logits, past_key_values=past_key_values)

    def new_cache(self) -> Cache | None:
        """A fresh cache for `generate`; None lets GenerationMixin make its own."""
        return None

    def static_cache(self, length: int) -> Cache:
        """One that has room for so many tokens from the beginning, so that every step has the same shapes.

        Raises:
            InputError: this family has none.
        """
        raise InputError(f"a {type(self).__name__} has no static cache: leave cache_implementation out.")

    def _take_config(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a call asks for, by its own words or by its generation config, of what is decided here.

        Takes out of `kwargs` what transformers would read otherwise: a `cache_implementation` beside a cache of ours,
        and a `use_cache` that says nothing.
        """
        config = kwargs.get("generation_config") or self.generation_config
        names = ("num_beams", "do_sample", "return_dict_in_generate", "max_new_tokens")
        asked = {name: getattr(config, name, None) for name in (*names, "use_cache", "cache_implementation")}
        asked |= {name: kwargs[name] for name in asked if kwargs.get(name) is not None}
        if config.cache_implementation is not None:
            kwargs["generation_config"] = config = copy.deepcopy(config)
            config.cache_implementation = None
        kwargs.pop("cache_implementation", None)
        if kwargs.get("use_cache", True) is None:
            del kwargs["use_cache"]
        if asked["use_cache"] is False:
            kwargs["use_cache"] = False
        return asked

    @contextmanager
    def _cache_is_ours(self) -> Iterator[None]:
        """Without the model's own `cache_implementation`, which transformers would put into a config that has none."""
        implementation = self.generation_config.cache_implementation
        try:
            self.generation_config.cache_implementation = None
            yield
        finally:
            self.generation_config.cache_implementation = implementation

    def _cache_for(self, implementation: str | None, length: int) -> Cache | None:
        """What transformers' `cache_implementation` asks for, with what this family keeps in it."""
        if implementation in (None, "dynamic"):
            return self.new_cache()
        if implementation != "static":
            raise InputError(f"cache_implementation is dynamic or static, not {implementation!r}.")
        return self.static_cache(length)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int64[Tensor, "batch time"] | None = None,
        latents: Float[Tensor, "rows *event"] | None = None,
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        max_new_tokens: int | None = None,
        num_return_sequences: int = 1,
        reinfer_every: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Text from latents, from a prompt, or from the prior, through transformers' `GenerationMixin.generate`.

        Args:
            input_ids: prompts, BOS x_1 … ; padding may be on either side. None starts from BOS alone.
            latents: z for each prompt. None infers q(z | prompt) once and draws from it; a prompt of BOS alone draws
                from the prior.
            max_new_tokens: None is 64, or what the prompt leaves of the model's context where that is less.
            num_return_sequences: texts for each prompt; each has a z of its own unless `latents` are given or beams are
                searched (beams share their prompt's z).
            reinfer_every: infer z afresh from all the text so far after so many new tokens, and go on with a new draw
                (Kong et al. 2025, section 2.3, the alternative sampling scheme). None keeps the first z.
            seed: makes the call repeatable and leaves torch's global generator alone; None draws from that generator.
            kwargs: anything else of `GenerationMixin.generate`: do_sample, temperature, top_k, top_p, num_beams …
                With `cache_implementation="static"`, keys and values have their place from the beginning, and on a GPU
                transformers compiles the step (`disable_compile=True` for not; `compile_config` says how).

        Returns:
            Token ids [batch · num_return_sequences, time] with the prompt (left-padded), or what
            `return_dict_in_generate=True` gives.
        """
        asked = self._take_config(kwargs)
        if max_new_tokens is None:
            max_new_tokens = asked["max_new_tokens"]
        beams, use_cache = asked["num_beams"] or 1, asked["use_cache"] is not False
        implementation, own_cache = asked["cache_implementation"], kwargs.get("past_key_values")
        if implementation is not None and (own_cache is not None or not use_cache):
            raise InputError("cache_implementation goes neither with past_key_values nor with use_cache=False.")
        if own_cache is not None:
            of_latents = isinstance(self.new_cache(), EncoderDecoderCache)
            if reinfer_every is not None or isinstance(own_cache, EncoderDecoderCache) != of_latents:
                raise InputError("past_key_values must be one of new_cache(), and do not go with reinfer_every.")
        if reinfer_every is not None:
            if reinfer_every < 1:
                raise InputError(f"reinfer_every must be at least 1, not {reinfer_every}.")
            if beams > 1 or asked["return_dict_in_generate"]:
                raise InputError("reinfer_every goes neither with beams nor with return_dict_in_generate.")
        if latents is not None:
            self.check_latents(latents, tuple(self.prior(1, 1).event_shape))
        prompts = (input_ids, latents, attention_mask, condition, max_new_tokens, num_return_sequences)
        input_ids, attention_mask, max_new_tokens = self._prompts(*prompts)
        of_decoder = self.decoder_condition(condition, len(input_ids))
        if of_decoder is not None:
            condition = of_decoder  # one for each prompt
        with torch.random.fork_rng(enabled=seed is not None), self._cache_is_ours():
            if seed is not None:
                torch.manual_seed(seed % 2**63)
            if 1 < beams < num_return_sequences:
                raise InputError(
                    f"{beams} beams give at most {beams} texts for each prompt, not {num_return_sequences}."
                )
            latents_given = latents is not None
            greedy = beams == 1 and not asked["do_sample"]
            if latents_given and greedy and num_return_sequences > 1 and reinfer_every is None:
                raise InputError("the likeliest tokens of one latent are one text: sample, or ask for one of each.")
            if latents is None:
                draws = num_return_sequences if beams == 1 else 1
                prior = self.prior(len(input_ids), max_new_tokens, condition)
                latents = self._latents_for(input_ids, attention_mask, condition, prior, draws, seed)
            else:
                draws = 1
            latents = self._one_for_each(latents, len(input_ids), draws)
            if reinfer_every is not None and latents_given:
                draws = num_return_sequences
                latents = latents.repeat_interleave(draws, 0)
            input_ids = input_ids.repeat_interleave(draws, 0)
            attention_mask = attention_mask.repeat_interleave(draws, 0)
            if of_decoder is not None:
                condition = of_decoder = of_decoder.repeat_interleave(draws, 0)
            kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), FiniteScores()])
            if reinfer_every is not None:
                return self._generate_reinferring(
                    input_ids,
                    attention_mask,
                    latents,
                    condition,
                    every=reinfer_every,
                    max_new_tokens=max_new_tokens,
                    seed=seed,
                    implementation=implementation,
                    **kwargs,
                )
            if use_cache and own_cache is None:
                kwargs["past_key_values"] = self._cache_for(implementation, input_ids.shape[1] + max_new_tokens)
            return GenerationMixin.generate(
                self,
                input_ids,
                attention_mask=attention_mask,
                latents=latents,
                **({} if of_decoder is None else {"condition": of_decoder}),
                max_new_tokens=max_new_tokens,
                num_return_sequences=num_return_sequences // draws,
                **kwargs,
            )

    def _generate_reinferring(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        latents: Tensor,
        condition: Any,
        *,
        every: int,
        max_new_tokens: int,
        seed: int | None,
        implementation: str | None,
        **kwargs: Any,
    ) -> Int64[Tensor, "rows time"]:
        """Parts of `every` tokens; a row that has ended is padded on the right and takes part no more."""
        ends = kwargs.get("eos_token_id", self.generation_config.eos_token_id)
        ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends], device=self.device)
        pad = kwargs.get("pad_token_id", self.generation_config.pad_token_id) or 0
        text, ended = input_ids, torch.zeros(len(input_ids), dtype=torch.bool, device=self.device)
        for begin in range(0, max_new_tokens, every):
            if begin:
                prior = self.prior(len(input_ids), max_new_tokens - begin, condition)
                latents = self._latents_for(input_ids, attention_mask, condition, prior, 1, seed)
            new_tokens = min(every, max_new_tokens - begin)
            given = {**kwargs}
            if kwargs.get("use_cache") is not False:
                # of one length for all parts, so that a compiled step serves them all
                given["past_key_values"] = self._cache_for(implementation, text.shape[1] - begin + max_new_tokens)
            if self.decoder_condition(condition, len(input_ids)) is not None:
                given["condition"] = condition
            rows = GenerationMixin.generate(
                self, input_ids, attention_mask=attention_mask, latents=latents, max_new_tokens=new_tokens, **given
            )
            new = rows[:, input_ids.shape[1] :].masked_fill(ended[:, None], pad)
            is_end = torch.isin(new, ends) & ~ended[:, None]
            after_end = is_end.cumsum(1) - is_end.long() > 0
            real = (~after_end & ~ended[:, None]).long()
            ended = ended | is_end.any(1)
            text = torch.cat((text, new), dim=1)
            input_ids, attention_mask = _padded_left(
                torch.cat((input_ids, new), dim=1), torch.cat((attention_mask, real), dim=1)
            )
            if bool(ended.all()):
                break
        return text


class FiniteScores(LogitsProcessor):
    """Stops where there is no distribution to draw from; the likeliest token of NaNs would be one, too."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((scores < math.inf).all()):  # −∞ is a token that another processor rules out
            raise InputError(
                "the model gives probabilities that are not finite: its latents are far too large, or it diverged."
            )
        return scores


def _padded_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows shifted so that padding is on the left, where generation continues them; order within a row is kept."""
    if bool(attention_mask.all()):
        return input_ids, attention_mask
    order = attention_mask.argsort(dim=1, stable=True)
    input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
    keep = int(attention_mask.sum(1).max())
    return input_ids[:, -keep:], attention_mask[:, -keep:]
