"""What the families with an autoregressive decoder share: scoring in one pass, cached steps of generation."""

from functools import partial
from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from latentlm.config import TransformerConfig
from latentlm.errors import InputError
from latentlm.generation import GeneratesFromLatents
from latentlm.latent_lm import Likelihood, chosen
from latentlm.layers import SeenMask, causal_mask, logits_of_few, rotation, self_cache, token_log_likelihood
from latentlm.layers.transformer import Rotation


@strict
class CausalConfig(TransformerConfig):
    """Fields of an autoregressive Transformer decoder; `sliding_window` and `word_dropout` are this decoder's.

    Args:
        word_dropout: share of the tokens after BOS that the decoder does not see as input (their embedding is 0) while
            training, so that it has to ask z (Bowman et al. 2016, arXiv 1511.06349, section 3.1, where they become
            UNK). Inference sees all of them.
    """

    sliding_window: int | None = 256
    tie_word_embeddings: bool = True
    use_cache: bool = True


class Read(NamedTuple):
    """A text as the layers take it: vectors of its tokens, the mask of causal attention, the turns of its positions."""

    x: Tensor
    mask: Any
    positions: Rotation


class CausalLatentLM(GeneratesFromLatents):
    """A latent language model whose decoder is p(x | z) = Π_t p(x_t | z, x_<t).

    A family gives `embed_tokens`, `lm_head` and `hidden_states`, beside `prior` and `infer`.
    """

    config: CausalConfig
    embed_tokens: nn.Embedding
    lm_head: nn.Linear
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["TransformerBlock"]

    def hidden_states(
        self,
        latents: Float[Tensor, "batch *event"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: SeenMask | None = None,
        position_ids: Int64[Tensor, "batch time"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "batch time hidden"]:
        """States from which `lm_head` predicts the token after each of `input_ids`; the mask covers the cache, too."""
        raise NotImplementedError

    def before_latents(
        self, input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"] | None = None
    ) -> Any:
        """What of the `hidden_states` of whole texts no latent changes; None: nothing.

        Where it is something, `hidden_states` takes it as `before`, and as `at` [batch, number] which of the states are
        wanted (None for all).
        """
        return None

    # ---- scoring -------------------------------------------------------------------------------------------------

    def _scored_states(
        self,
        latents: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        before: Any = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Hidden states and targets with samples folded into the batch, and the samples' shape to unfold them with."""
        self.check_text(input_ids, attention_mask)
        batch_dim = latents.dim() - 1 - self.latent_dims
        samples = tuple(latents.shape[: max(batch_dim, 0)])
        if batch_dim < 0 or latents.shape[batch_dim] != len(input_ids):
            raise InputError(
                f"latents of shape {list(latents.shape)} do not fit {len(input_ids)} sequences: give one for each."
            )
        latents = latents.flatten(0, batch_dim)
        repeats = len(latents) // max(len(input_ids), 1)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat(repeats, 1)[:, :-1]
        input_ids = input_ids.repeat(repeats, 1)
        at = None if at is None else at.repeat(repeats, 1)
        targets = chosen(input_ids[:, 1:], at)
        if input_ids.shape[1] == 1:  # BOS alone: nothing to score, and attention refuses a text of length 0
            nothing = latents.flatten(1).sum(1)[:, None, None].expand(-1, -1, self.config.hidden_size)[:, :0]
            return nothing.to(self.dtype), targets, samples
        if before is not None and repeats == 1:
            known: dict[str, Any] = {"before": before, "at": at}
            states = self.hidden_states(latents, input_ids[:, :-1], attention_mask, **known)
        else:
            states = self.hidden_states(latents, input_ids[:, :-1], attention_mask)
            states = states if at is None else states.take_along_dim(at[..., None], 1)
        return states, targets, samples

    def decode(
        self,
        latents: Float[Tensor, "*samples_batch_event"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> Float[Tensor, "*samples batch scored vocabulary"]:
        states, _, samples = self._scored_states(latents, input_ids, attention_mask)
        return self.lm_head(states).unflatten(0, (*samples, len(input_ids)))

    def log_likelihood(
        self,
        latents: Float[Tensor, "*samples_batch_event"],
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> Float[Tensor, "*samples batch scored"]:
        return self._log_likelihood(input_ids, attention_mask, condition, None, latents)

    def likelihood_of(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Int64[Tensor, "batch time"] | None = None,
        condition: Any = None,
    ) -> Likelihood:
        before = None
        if input_ids.shape[1] > 1 and self._scores_what_follows:
            with torch.no_grad():
                seen = None if attention_mask is None else attention_mask[:, :-1]
                before = self.before_latents(input_ids[:, :-1], seen)
        if before is None:
            return super().likelihood_of(input_ids, attention_mask, condition)
        return partial(self._log_likelihood, input_ids, attention_mask, condition, before)

    @property
    def _scores_what_follows(self) -> bool:
        """Whether `hidden_states` and `log_likelihood` are those of `before_latents`: somebody may have others."""

        def of_class(name: str) -> type:
            return next(one for one in type(self).__mro__ if name in vars(one))

        replaced = {"log_likelihood", "hidden_states"} & vars(self).keys()
        own = of_class("log_likelihood") is CausalLatentLM and not replaced
        return own and issubclass(of_class("before_latents"), of_class("hidden_states"))

    def _log_likelihood(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        condition: Any,
        before: Any,
        latents: Tensor,
        at: Tensor | None = None,
    ) -> Tensor:
        if type(self.lm_head).forward is not nn.Linear.forward:  # an adapter does more than its weight says
            return chosen(super().log_likelihood(latents, input_ids, attention_mask, condition), at)
        states, targets, samples = self._scored_states(latents, input_ids, attention_mask, before, at)
        scored = chosen(self.scored_tokens(input_ids, attention_mask), at)
        states, targets, weight = states.flatten(0, 1), targets.flatten(), self.lm_head.weight
        if attention_mask is None or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            log_likelihood = token_log_likelihood(states, weight, targets)
        else:  # padding is not projected; elsewhere to look for it would wait for the device, or cut the graph
            (rows,) = scored.expand(*samples, *scored.shape).flatten().nonzero(as_tuple=True)
            of_rows = token_log_likelihood(states[rows], weight, targets[rows])
            log_likelihood = of_rows.new_zeros(len(targets)).index_copy(0, rows, of_rows)
        return log_likelihood.view(*samples, *scored.shape).masked_fill(~scored, 0.0)

    # ---- a step of generation ---------------------------------------------------------------------------------

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
        states = self.hidden_states(latents, input_ids, attention_mask, position_ids, past_key_values)
        states = states[:, -logits_to_keep:]
        head = self.lm_head
        # an adapter, a forward of the instance's own or a hook does more than the weight says
        plain = getattr(head.forward, "__func__", None) is nn.Linear.forward
        if plain and states.device.type == "cpu" and not (head._forward_hooks or head._forward_pre_hooks):
            return logits_of_few(states, head.weight)
        return head(states)

    # ---- for the families ----------------------------------------------------------------------------------------

    def embedded(self, input_ids: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time hidden"]:
        """What the decoder reads: embeddings of tokens, less those that word dropout takes."""
        x = self.embed_tokens(input_ids)
        return x if self._seen is None or not self.training else x * self._seen[:, : x.shape[1], None]

    def read(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: SeenMask | None = None,
        position_ids: Int64[Tensor, "batch time"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Read:
        """What a decoder begins with in which a latent is no token."""
        x = self.embedded(input_ids)
        mask = causal_mask(self.config, x, attention_mask, self_cache(past_key_values))
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = self._positions(input_ids, attention_mask, seen)
        width = self.config.hidden_size // self.config.num_attention_heads
        return Read(x, mask, rotation(position_ids, width, self.config.rope_theta))

    def _spread(self, number: int) -> Float[Tensor, "1 number"]:
        """Positions of vectors that layers attend to, evenly spaced over the context, whatever this text's length.

        So a prefix sees what the whole text saw.
        """
        spacing = self.config.max_position_embeddings / number
        return (torch.arange(number, device=self.device)[None] + 0.5) * spacing


def token_cache(config: CausalConfig) -> DynamicCache:
    """A cache of the tokens that the window still sees."""
    # transformers' sliding layer keeps the last window − 1 tokens by a slice that means all of them for a window of 1;
    # a full cache and the mask give the same attention
    return DynamicCache() if config.sliding_window == 1 else DynamicCache(config=config)
