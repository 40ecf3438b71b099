"""What a decoder computes while it scores texts given latents: likelihoods, states of its layers, and where it looks.

Texts are scored as everywhere, in batches; hooks and an attention function that also takes notes are in place meanwhile
and gone afterwards, so that what is fast stays as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from latentlm.errors import InputError
from latentlm.evaluation.batches import evaluating
from latentlm.families import GPTVAE, GPVAE, LTM, LangVAE
from latentlm.hosted_lm import HostedLM
from latentlm.latent_lm import LatentLM
from latentlm.layers.injection import INJECTION, Slots, attend, attention_weights, with_slots
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts
from latentlm.text import stacked

# whose input is all that q takes of a text
_OUTPUT_OF_ENCODER = {LangVAE: "encoder.norm", GPTVAE: "encoder.mean", GPVAE: "encoder.mean", LTM: "encoder.moments"}
_WATCHED = "latentlm_watched"


def others(means: Sequence[Float[np.ndarray, "..."]]) -> Int64[np.ndarray, " texts"]:
    """For each text the row of another whose latent fits it: the one N/2 further on, of a trajectory of those that are
    as long; −1 where there is none.
    """
    found = np.full(len(means), -1)
    shapes = [mean.shape for mean in means]
    for shape in dict.fromkeys(shapes):
        rows = np.array([row for row, own in enumerate(shapes) if own == shape])
        if len(rows) > 1:
            found[rows] = np.roll(rows, -(len(rows) // 2))
    return found


def prior_means(space: LatentSpace, means: Sequence[Float[np.ndarray, "..."]]) -> list[np.ndarray]:
    """The mean of p(z) in the shape of each latent."""
    return [space.from_standardised(np.zeros_like(mean)) for mean in means]


@dataclass
class Scored:
    """Of each text: −log p(x | z) in nats, and its scored tokens; and what was watched.

    `states` [texts, width] are of the layers in `layers`, the mean over the positions that foretell a token;
    `attention` [texts, attention layers] is the share that falls on latents, the mean over heads and those positions,
    and `uniform` what it would be if each position looked at all that it sees alike.
    """

    nats: Float[np.ndarray, " texts"]
    tokens: Int64[np.ndarray, " texts"]
    layers: list[str] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    attention: np.ndarray | None = None
    uniform: np.ndarray | None = None

    @property
    def nats_per_token(self) -> float:
        """Σ nats ÷ Σ tokens of all texts."""
        return float(self.nats.sum() / max(self.tokens.sum(), 1))


@torch.no_grad()
def score(
    space: LatentSpace, texts: Texts, latents: Sequence[Float[np.ndarray, "..."]], *, watch: bool = False
) -> Scored:
    """−log p(x | z) of each text given a latent for each: a reconstruction if the latent is of the text, no bound.

    Args:
        watch: gather states and attention, too.

    Raises:
        InputError: a model whose layers are not known, if it is to be watched.
    """
    model: Any = space.model
    nats, tokens = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        notes = stack.enter_context(_watching(model)) if watch else None
        places, states, looks = [], [], []
        for indices, input_ids, attention_mask, condition in space.batches(texts):
            z = torch.from_numpy(stacked([latents[index] for index in indices])).float().to(model.device)
            real = model.scored_tokens(input_ids, attention_mask)
            each = model.log_likelihood(z, input_ids, attention_mask, condition)
            nats[indices], tokens[indices] = -each.double().sum(1).cpu().numpy(), real.sum(1).cpu().numpy()
            if notes is not None:
                places += indices
                states.append([_mean(one, real) for one in notes.states()])
                looks.append([[_mean(one, real) for one in pair] for pair in notes.looks()])
    if notes is None:
        return Scored(nats, tokens)
    order = np.argsort(places)
    gathered = [np.concatenate(parts)[order].astype(np.float64) for parts in zip(*states, strict=True)]
    names = ["input", *(f"layer {number}" for number in range(1, len(gathered)))]
    found = Scored(nats, tokens, names, gathered)
    if looks[0]:
        of_all = np.concatenate([np.array(rows)[..., 0] for rows in looks], -1)[..., order]  # [layers, 2, texts]
        found.attention, found.uniform = of_all[:, 0].T, of_all[:, 1].T
    return found


@torch.no_grad()
def encoder_output(space: LatentSpace, texts: Texts) -> Float[np.ndarray, "texts width"] | None:
    """What q(z | x) is made of: the pooled embedding of each text (of a trajectory the mean of its states); None where
    there is no encoder, or none that is known.
    """
    model: Any = space.model
    name = next((name for family, name in _OUTPUT_OF_ENCODER.items() if isinstance(model, family)), None)
    if name is None or not model.config.has_encoder:
        return None
    held: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, given: held.append(given[0]))
    places, rows = [], []
    try:
        with evaluating(model):
            for indices, input_ids, attention_mask, condition in space.batches(texts):
                held.clear()
                model.encode(input_ids, attention_mask, condition)
                real = model.scored_tokens(input_ids, attention_mask)
                places += indices
                rows.append(_mean(held[0], real) if model.latent_per_token else _array(held[0].flatten(1)))
    finally:
        hook.remove()
    return np.concatenate(rows)[np.argsort(places)].astype(np.float64)


def _mean(values: Float[Tensor, "batch time *width"], real: Bool[Tensor, "batch time"]) -> np.ndarray:
    """Over the real positions, [batch, width or 1]; 0 where there is none."""
    values = values.float().flatten(2) if values.dim() > 2 else values.float()[..., None]
    weights = real[..., None].to(values)
    return _array((values * weights).sum(1) / weights.sum(1).clamp_min(1))


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


# ---- hooks and notes ------------------------------------------------------------------------------------------------


class _Notes:
    """Of the last pass."""

    def __init__(self, before_text: int):
        self.before_text = before_text
        self._states: dict[int, Tensor] = {}
        self._looks: dict[int, tuple[Tensor, Tensor]] = {}

    def states(self) -> list[Tensor]:
        found = [self._states[place] for place in sorted(self._states)]
        self._states.clear()
        return found

    def looks(self) -> list[tuple[Tensor, Tensor]]:
        found = [self._looks[layer] for layer in sorted(self._looks)]
        self._looks.clear()
        return found

    def state(self, place: int, values: Any) -> None:
        values = values[0] if isinstance(values, tuple) else values
        self._states[place] = values[:, self.before_text :]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        latent_slots: Slots | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`layers.injection.attend`, and a note of how much of it falls on latents."""
        keys, _, mask = with_slots(module, query, key, value, attention_mask, latent_slots)
        number = keys.shape[2] - key.shape[2] + self.before_text
        if number and mask is not None:
            layer: Any = module.layer_idx
            weights = attention_weights(query, keys, mask, scaling, softcap)[..., :number].sum(-1).mean(1)
            alike = mask.float().softmax(-1)[..., :number].sum(-1).expand(len(query), -1, -1).mean(1)
            self._looks[layer] = weights[:, self.before_text :], alike[:, self.before_text :]
        return attend(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            softcap=softcap,
            latent_slots=latent_slots,
            **kwargs,
        )


AttentionMaskInterface.register(_WATCHED, eager_mask)


@contextmanager
def _watching(model: LatentLM) -> Iterator[_Notes]:
    """Notes are taken of every pass of the decoder."""
    taps = _taps(model)
    notes = _Notes(model.config.latent_tokens if isinstance(model, GPTVAE) else 0)
    hooks = []

    def before(place: int) -> Any:
        return lambda module, given, named: notes.state(place, given[0] if given else named["hidden_states"])

    def after(place: int) -> Any:
        return lambda module, given, result: notes.state(place, result)

    try:
        for place, (module, side) in enumerate(taps):
            if side == "input":
                hooks.append(module.register_forward_pre_hook(before(place), with_kwargs=True))
            else:
                hooks.append(module.register_forward_hook(after(place)))
        with _attending(model, notes):
            yield notes
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _attending(model: Any, notes: _Notes) -> Iterator[None]:
    """Another attention function where latents stand among what self-attention looks at."""
    if isinstance(model, LangVAE):
        AttentionInterface.register(INJECTION, notes.attend)
        try:
            yield
        finally:
            AttentionInterface.register(INJECTION, attend)
    elif isinstance(model, GPTVAE):
        own = model.config._attn_implementation
        AttentionInterface.register(_WATCHED, notes.attend)
        model.config._attn_implementation = _WATCHED
        try:
            yield
        finally:
            model.config._attn_implementation = own
    else:
        yield


def _taps(model: LatentLM) -> list[tuple[nn.Module, str]]:
    """Where states are had: what goes into the first layer, and what comes out of each."""
    if isinstance(model, GPVAE):
        decoder: Any = model.decoder
        if model.config.decoder_type == "convolution":
            # a layer ends in a sum that no module computes, and what is next begins with it
            return [*((norm, "input") for norm in decoder.norms), (decoder, "output")]
        layers = list(decoder.transformer.layers)
    elif isinstance(model, HostedLM):
        layers = [one for one in model.language_model.modules() if isinstance(one, GradientCheckpointingLayer)]
    else:
        known: Any = getattr(model, "layers", ())
        layers = list(known)
    if not layers or not all(isinstance(layer, nn.Module) for layer in layers):
        raise InputError(f"the layers of a {type(model).__name__}'s decoder are not known: it needs model.layers.")
    return [(layers[0], "input"), *((layer, "output") for layer in layers)]
