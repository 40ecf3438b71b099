"""What the families with a parallel decoder share: a latent for each token, scoring and writing all tokens at once.

p(x | z) = Π_t p(x_t | z): no token sees another, so the decoder is given the length T, which an autoregressive one is
not. Figures of blocks of one length may be compared as they are. For ragged text a model of the length pays for it:

    p(x, T | z) = p(T) p(x | z, T),   the last token being EOS if and only if the text ends there

p(T) is a categorical distribution, and each token pays its own part of it: p(T > t | T ≥ t), or p(T = t | T ≥ t) for
EOS. So sums over any part of a text are those of the model, and a continuation pays for its own length alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.distributions import Distribution
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from latentlm.config import TransformerConfig
from latentlm.distributions import ContinuedTrajectory, GaussianProcess
from latentlm.errors import InputError
from latentlm.generation import FiniteScores, WritesText
from latentlm.layers import token_log_likelihood

_NO_IDS = torch.zeros(0, 0, dtype=torch.long)  # which no step of sampling here reads
# logits of a part of the tokens that are written
_LOGITS_AT_ONCE = 2**25
# Adam moves each number by its rate: this many times further, since lengths take large logits and few of them
_LENGTH_SCALE = 16.0


@strict
class ParallelConfig(TransformerConfig):
    """Fields of a parallel decoder.

    Args:
        latent_size: numbers of the latent of each token.
        length_model: "none" where the length is given (blocks of one length); "categorical" for texts that end in EOS,
            of any length.
    """

    latent_size: int = 64
    length_model: Literal["none", "categorical"] = "none"


@dataclass
class Aligned:
    """Texts with their scored tokens at 0 … T − 1, wherever the padding was.

    Attributes:
        tokens: x_1 … x_T; what comes after a text's end has no meaning.
        lengths: T of each.
        scored: which of the original `input_ids[:, 1:]` these are.
        order: where each of the tokens was among those.
        places: where each of those is among the tokens.
    """

    tokens: Int64[Tensor, "batch time"]
    lengths: Int64[Tensor, " batch"]
    scored: Bool[Tensor, "batch scored"]
    order: Int64[Tensor, "batch time"]
    places: Int64[Tensor, "batch scored"]

    @property
    def real(self) -> Bool[Tensor, "batch time"]:
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    def take(self, values: Tensor) -> Tensor:
        """Of values [batch, scored] those of the tokens."""
        return values.gather(1, self.order)

    def back(self, values: Float[Tensor, "*samples batch time"]) -> Float[Tensor, "*samples batch scored"]:
        """Values of the tokens where these were; 0 where there is padding."""
        if not values.shape[-1]:
            return values.new_zeros(*values.shape[:-1], self.places.shape[1])
        places = self.places.expand(*values.shape[:-1], -1)
        return values.gather(-1, places).masked_fill(~self.scored, 0.0)


class ParallelLatentLM(WritesText):
    """A latent language model whose decoder is p(x | z) = Π_t p(x_t | z_1 … z_T).

    A family gives `states` and `vocabulary`, beside `prior` (a `GaussianProcess`) and `infer`.
    """

    config: ParallelConfig
    latent_dims = 2
    latent_per_token = True

    def __init__(self, config: ParallelConfig):
        super().__init__(config)
        if config.length_model == "categorical":
            self.length_logits = nn.Parameter(torch.zeros(config.max_position_embeddings + 1))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.length_model == "categorical":
            nn.init.zeros_(self.length_logits)

    def states(
        self, latents: Float[Tensor, "rows time size"], lengths: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "rows time hidden"]:
        """What the decoder makes of each row's latents; what comes after a row's length changes nothing before it."""
        raise NotImplementedError

    def vocabulary(self) -> Float[Tensor, "vocabulary hidden"]:
        """The vectors whose products with a state are the logits."""
        raise NotImplementedError

    # ---- scoring ---------------------------------------------------------------------------------------------------

    def aligned(
        self, input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"] | None
    ) -> Aligned:
        scored = self.scored_tokens(input_ids, attention_mask)
        lengths = scored.sum(1)
        if attention_mask is None:
            places = torch.arange(input_ids.shape[1] - 1, device=input_ids.device).expand_as(scored)
            return Aligned(input_ids[:, 1:], lengths, scored, places, places)
        longest = int(lengths.max())
        order = scored.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
        places = (scored.cumsum(1) - 1).clamp_min(0)
        return Aligned(input_ids[:, 1:].gather(1, order), lengths, scored, order, places)

    def states_of(
        self, latents: Float[Tensor, "*samples_batch_event"], text: Aligned
    ) -> Float[Tensor, "*samples batch time hidden"]:
        """`states` for each sample of each text; what latents have after the longest text is left out.

        Raises:
            InputError: latents that are not one trajectory for each text, as long as the longest.
        """
        number, times = text.tokens.shape
        expected = [number, times, self.config.latent_size]
        found = list(latents.shape[-3:])
        if latents.dim() < 3 or [found[0], found[2]] != [expected[0], expected[2]] or found[1] < times:
            raise InputError(
                f"latents of shape {list(latents.shape)} do not fit {number} sequences of up to {times} tokens: "
                f"they must end in {expected}."
            )
        samples = latents.shape[:-3]
        rows = latents[..., :times, :].flatten(0, -3)
        if not rows.shape[1]:  # BOS alone: nothing to score
            nothing = rows.sum((1, 2))[:, None, None].expand(-1, 0, self.config.hidden_size)
            return nothing.unflatten(0, (*samples, len(text.tokens)))
        states = self.states(rows, text.lengths.repeat(math.prod(samples)))
        return states.unflatten(0, (*samples, len(text.tokens)))

    def decode(
        self,
        latents: Float[Tensor, "*samples_batch_event"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> Float[Tensor, "*samples batch scored vocabulary"]:
        """With a model of the length, log-probabilities of what comes at each place of a text that goes on until there.

        Those depend on T by what the decoder sees at the end of the latents, which it is given.
        """
        text = self.aligned(input_ids, attention_mask)
        logits = self.states_of(latents, text) @ self._words().T
        if self.config.length_model == "categorical":
            ends, goes_on = self._length_log_probabilities(logits.shape[-2])
            words = logits.log_softmax(-1, dtype=goes_on.dtype) + goes_on[:, None]
            eos = self._eos()
            ends = ends[:, None].expand(*words.shape[:-1], 1)
            logits = torch.cat((words[..., :eos], ends, words[..., eos:]), -1)
        if attention_mask is None:
            return logits
        if not logits.shape[-2]:
            return logits.new_zeros(*logits.shape[:-2], text.places.shape[1], logits.shape[-1])
        places = text.places[..., None].expand(*logits.shape[:-2], -1, logits.shape[-1])
        return logits.gather(-2, places)

    def log_likelihood(
        self,
        latents: Float[Tensor, "*samples_batch_event"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> Float[Tensor, "*samples batch scored"]:
        self.check_text(input_ids, attention_mask)
        text = self.aligned(input_ids, attention_mask)
        return text.back(self.score_states(self.states_of(latents, text), text, self._words()))

    def score_states(
        self,
        states: Float[Tensor, "*samples batch time hidden"],
        text: Aligned,
        words: Float[Tensor, "words hidden"],
    ) -> Float[Tensor, "*samples batch time"]:
        """log p(x_t | z) of each token, and with a model of the length its part of that; without it past a text's end.

        Args:
            words: from `_words`.
        """
        targets, real = self.word_targets(text)
        of_words = score_tokens(states, words, targets, real)
        if self.config.length_model == "none":
            return of_words
        ends, goes_on = self._length_log_probabilities(targets.shape[1])
        return torch.where(text.tokens == self._eos(), ends, of_words + goes_on)

    def word_targets(self, text: Aligned) -> tuple[Int64[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
        """Which of `_words` each token is, and where z has to choose one: not past the end, nor at an EOS that the
        length foretells.

        Raises:
            InputError: a text that goes on after EOS, where EOS ends a text; asked on a CPU alone.
        """
        if self.config.length_model == "none":
            return text.tokens, text.real
        eos = self._eos()
        is_eos = (text.tokens == eos) & text.real
        if text.tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            ends_early = is_eos[:, :-1] & text.real[:, 1:]
            if bool(ends_early.any()):
                raise InputError("a text goes on after EOS: for blocks of text set length_model to none.")
        targets = (text.tokens - (text.tokens > eos).long()).clamp_max(self.config.vocab_size - 2)
        return targets, text.real & ~is_eos

    def _words(self) -> Float[Tensor, "words hidden"]:
        """The vocabulary that z chooses from: without EOS where the length says when that comes."""
        vocabulary = self.vocabulary()
        if self.config.length_model == "none":
            return vocabulary
        eos = self._eos()
        return torch.cat((vocabulary[:eos], vocabulary[eos + 1 :]))

    def _eos(self) -> int:
        eos = self.config.eos_token_id
        if not isinstance(eos, int):
            raise InputError(f"a model of the length needs one token that ends a text, and eos_token_id is {eos}.")
        return eos

    def _length_log_probabilities(self, times: int) -> tuple[Float[Tensor, " time"], Float[Tensor, " time"]]:
        """log p(T = t | T ≥ t) and log p(T > t | T ≥ t) for t = 1 … times."""
        logits = _LENGTH_SCALE * self.length_logits.to(torch.promote_types(self.dtype, torch.float32))
        from_here = logits.flip(0).logcumsumexp(0).flip(0)
        return (logits - from_here)[:times], (from_here[1:] - from_here[:-1])[:times]

    # ---- writing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int64[Tensor, "batch time"] | None = None,
        latents: Float[Tensor, "trajectories ..."] | None = None,
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
        *,
        max_new_tokens: int | None = None,
        num_return_sequences: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        sequential: bool = False,
        lengths: Int64[Tensor, " lengths"] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Int64[Tensor, "rows written"]:
        """Text from latents, from a prompt, or from the prior: all new tokens at once.

        The latents of a prompt are inferred, and the prior continues them. With a model of the length, each text's
        length is drawn first, given that it goes on after the prompt.

        Args:
            input_ids: prompts, BOS x_1 … ; padding may be on either side. None starts from BOS alone.
            latents: trajectories that begin with the prompt's tokens, one for each prompt (or one for all); with a
                model of the length, texts end where they end.
            lengths: how many tokens each of the latents is of, where these are padded; None for all of them.
            max_new_tokens: None is 64, or what the prompt leaves of the context, or the latents have, where that is
                less.
            num_return_sequences: texts for each prompt; each has a z of its own unless `latents` are given.
            do_sample: draw tokens; otherwise each is the likeliest. Tokens are independent, given z.
            temperature, top_k, top_p: of that draw; 0 and 1.0 for all tokens.
            sequential: draw the prior's part of z one time after another (SEQ) instead of all at once (PARA): the same
                trajectory for the same seed, up to rounding.
            seed: makes the call repeatable and leaves torch's global generator alone; None draws from that generator.

        Returns:
            Token ids [batch · num_return_sequences, time] with the prompt (left-padded); padded after EOS.

        Raises:
            InputError: what only a decoder of one token after another can do (beams, reinfer_every), or bad input.
        """
        kwargs.pop("use_cache", None)
        if (kwargs.pop("num_beams", None) or 1) > 1 or kwargs.pop("reinfer_every", None) is not None:
            raise InputError("all tokens are written at once: there is no order for beams or for reinfer_every.")
        if kwargs:
            raise InputError(f"a {type(self).__name__} does not take {sorted(kwargs)[0]} to write text.")
        if lengths is not None and latents is None:
            raise InputError("lengths are those of given latents: give latents, too.")
        sampling = _sampling(temperature, top_k, top_p) if do_sample else None
        if latents is not None:
            times = latents.shape[1] if isinstance(latents, Tensor) and latents.dim() == 3 else 1
            self.check_latents(latents, (times, self.config.latent_size))
            if times > self.config.max_position_embeddings:
                raise InputError(
                    f"latents of {times} times exceed the model's context of "
                    f"{self.config.max_position_embeddings}: cut them."
                )
        prompts = (input_ids, latents, attention_mask, condition, max_new_tokens, num_return_sequences)
        input_ids, attention_mask, max_new_tokens = self._prompts(*prompts)
        begun = (attention_mask.sum(1) - 1).clamp_min(0).repeat_interleave(num_return_sequences)
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed % 2**63)
            if latents is None:
                total, ended = self._drawn_lengths(begun, max_new_tokens)
                longest = total.view(len(input_ids), -1).amax(1)
                prior = self.prior(len(input_ids), longest, condition)
                assert isinstance(prior, GaussianProcess)
                if sequential:
                    prior = prior.sequentially()
                given = (input_ids, attention_mask, condition, prior)
                latents = self._latents_for(*given, num_return_sequences, seed)
            else:
                if num_return_sequences > 1 and sampling is None:
                    raise InputError("the likeliest tokens of one latent are one text: sample, or ask for one of each.")
                latents = self._one_for_each(latents, len(input_ids), 1).repeat_interleave(num_return_sequences, 0)
                if latents.shape[1] < int(begun.max()) + max_new_tokens:
                    raise InputError(
                        f"latents of {latents.shape[1]} times do not reach over a prompt of {int(begun.max())} tokens "
                        f"and {max_new_tokens} new ones: give longer ones or ask for fewer."
                    )
                ended = torch.full_like(begun, self.config.length_model != "none", dtype=torch.bool)
                total = self._lengths_of(latents, lengths, len(input_ids)).repeat_interleave(num_return_sequences)
                if bool((short := total <= begun).any()):
                    row = int(short.nonzero()[0])
                    raise InputError(
                        f"the latents of text {row // num_return_sequences} are of {int(total[row])} tokens, and its "
                        f"prompt of {int(begun[row])}: give longer ones or a shorter prompt."
                    )
                if self.config.length_model == "none":
                    total = torch.minimum(total, begun + max_new_tokens)
            new = self._written(latents, total, ended, begun, max_new_tokens, sampling)
        return torch.cat((input_ids.repeat_interleave(num_return_sequences, 0), new), dim=1)

    def going_on(
        self, posterior: Distribution, lengths: Int64[Tensor, " batch"], longer: Distribution
    ) -> ContinuedTrajectory:
        assert isinstance(longer, GaussianProcess)
        return ContinuedTrajectory(posterior, lengths, longer)

    @staticmethod
    def _lengths_of(latents: Tensor, lengths: Tensor | None, prompts: int) -> Int64[Tensor, " prompts"]:
        if lengths is None:
            return torch.full((prompts,), latents.shape[1], device=latents.device)
        if len(lengths) not in (1, prompts) or not 1 <= int(lengths.min()) <= int(lengths.max()) <= latents.shape[1]:
            raise InputError(f"lengths must be between 1 and the latents' {latents.shape[1]} times, one for each.")
        return lengths.to(latents.device).expand(prompts)

    def _drawn_lengths(
        self, begun: Int64[Tensor, " rows"], max_new_tokens: int
    ) -> tuple[Int64[Tensor, " rows"], Bool[Tensor, " rows"]]:
        """How long each text becomes, and whether it ends there by EOS: at the context's end it need not."""
        if self.config.length_model == "none":
            return begun + max_new_tokens, torch.zeros_like(begun, dtype=torch.bool)
        longest = self.config.max_position_embeddings
        logits = (_LENGTH_SCALE * self.length_logits.float()).expand(len(begun), -1)
        after = torch.arange(1, longest + 2, device=logits.device) > begun[:, None]
        drawn = torch.multinomial(logits.masked_fill(~after, -math.inf).softmax(-1), 1)[:, 0] + 1
        return drawn.clamp_max(longest), drawn <= longest

    def _written(
        self,
        latents: Tensor,
        lengths: Int64[Tensor, " rows"],
        ended: Bool[Tensor, " rows"],
        begun: Int64[Tensor, " rows"],
        max_new_tokens: int,
        sampling: LogitsProcessorList | None,
    ) -> Int64[Tensor, "rows new"]:
        """Tokens after each row's prompt, padded after its end."""
        longest = int(lengths.max())
        states = self.states(latents[:, :longest].to(self.dtype), lengths)
        places = begun[:, None] + torch.arange(max_new_tokens, device=begun.device)
        there = places < lengths[:, None]
        states = states.gather(1, places.clamp_max(longest - 1)[..., None].expand(-1, -1, states.shape[-1]))
        words = self._words()
        rows = [_chosen(part @ words.T, sampling) for part in _parts(states[there], len(words))]
        tokens = torch.cat([torch.zeros(0, dtype=torch.long, device=begun.device), *rows])
        if self.config.length_model == "categorical":
            eos = self._eos()
            tokens = tokens + (tokens >= eos).long()
        pad = self.config.pad_token_id or 0
        new = torch.full_like(places, pad).masked_scatter(there, tokens)
        if self.config.length_model == "categorical":
            return new.masked_fill((places == lengths[:, None] - 1) & ended[:, None], self._eos())
        return new.masked_fill(self.until_eos(new) == 0, pad)

    def until_eos(self, input_ids: Int64[Tensor, "rows time"], begin: int = 0) -> Int64[Tensor, "rows time"]:
        """1 for each token until the first that ends a text, itself included, among those from `begin` on."""
        eos = self.config.eos_token_id
        ends = torch.tensor(eos if isinstance(eos, list) else [-1 if eos is None else eos], device=input_ids.device)
        is_end = torch.isin(input_ids, ends).long()
        is_end[:, :begin] = 0
        return (is_end.cumsum(1) - is_end == 0).long()


def score_tokens(
    states: Float[Tensor, "*samples batch time hidden"],
    words: Float[Tensor, "words hidden"],
    targets: Int64[Tensor, "batch time"],
    real: Bool[Tensor, "batch time"],
) -> Float[Tensor, "*samples batch time"]:
    """log softmax(states wordsᵀ) at the targets, 0 where they are not real; on a CPU only the others are projected."""
    wanted = targets.expand(states.shape[:-1])
    kept = real.expand(wanted.shape)
    flat, wanted = states.flatten(0, -2), wanted.flatten()
    if states.device.type != "cpu" or torch.compiler.is_compiling() or bool(real.all()):
        return token_log_likelihood(flat, words, wanted).view(kept.shape).masked_fill(~kept, 0.0)
    (rows,) = kept.flatten().nonzero(as_tuple=True)
    of_rows = token_log_likelihood(flat[rows], words, wanted[rows])
    return of_rows.new_zeros(len(wanted)).index_copy(0, rows, of_rows).view(kept.shape)


def _sampling(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    steps = LogitsProcessorList()
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be a number above 0, not {temperature}; for the likeliest do not sample.")
    if top_k < 0 or not 0 < top_p <= 1:
        raise InputError(f"top_k must be 0 or more and top_p above 0 and at most 1, not {top_k} and {top_p}.")
    if temperature != 1:
        steps.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    return steps


def _chosen(logits: Float[Tensor, "tokens words"], sampling: LogitsProcessorList | None) -> Int64[Tensor, " tokens"]:
    scores = FiniteScores()(_NO_IDS, logits.float())
    if sampling is None:
        return scores.argmax(-1)
    return torch.multinomial(sampling(_NO_IDS, scores).softmax(-1), 1)[:, 0]


def _parts(states: Tensor, words: int) -> Iterator[Tensor]:
    size = max(_LOGITS_AT_ONCE // words, 1)
    return iter(states.split(size)) if len(states) else iter(())
