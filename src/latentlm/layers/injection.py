"""Keys and values of a latent beside those of the text, in every self-attention of a pretrained causal LM.

A layer of transformers hands queries, keys (after their rotation) and values to the attention function that its config
names. Ours puts a latent's keys and values, its slots, before the text's and leaves the rest to the model: its cache
holds the text alone, its positions count the text, and its masks (padding, a sliding window) are the text's, so that
no window and no cache can lose the latent.

A query may see a slot several times, which is the logarithm of that number on its score: softmax over scores s of which
one stands n times gives that one's sum the weight of s + ln n.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from latentlm.errors import InputError

#: the attention function's name, for `attn_implementation`
INJECTION = "latentlm_injection"


@dataclass(frozen=True)
class Slots:
    """What a latent puts before the text: keys and values of each layer, and what is added to a query's scores of them.

    `scores` are ln of how often a query sees a slot, −∞ for never, [batch, 1, queries, slots].
    """

    keys: tuple[Float[Tensor, "batch heads slots width"], ...]
    values: tuple[Float[Tensor, "batch heads slots width"], ...]
    scores: Float[Tensor, "batch 1 queries slots"]


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups seen width"],
    value: Float[Tensor, "batch groups seen width"],
    attention_mask: Float[Tensor, "batch_or_1 1 queries seen"] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    latent_slots: Slots | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a layer of transformers, over the slots and then over the text."""
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:  # sinks and biases, which would be left out without a word
            raise InputError(f"{type(module).__name__} has attention with {name}, which takes no slots of a latent.")
    key, value, attention_mask = with_slots(module, query, key, value, attention_mask, latent_slots)
    if softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False
        )
    weights = attention_weights(query, key, attention_mask, scaling, softcap)
    weights = nn.functional.dropout(weights.to(query.dtype), dropout, module.training)
    return (weights @ repeat_kv(value, query.shape[1] // value.shape[1])).transpose(1, 2).contiguous(), None


def with_slots(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups seen width"],
    value: Float[Tensor, "batch groups seen value_width"],
    attention_mask: Float[Tensor, "batch_or_1 1 queries seen"] | None,
    latent_slots: Slots | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of a layer with the slots before the text's."""
    if latent_slots is None:
        return key, value, attention_mask
    layer: Any = module.layer_idx
    keys, values = latent_slots.keys[layer], latent_slots.values[layer]
    scores = latent_slots.scores.to(query)  # layers may be on devices of their own
    if attention_mask is None:  # a single query, of all that the cache holds
        attention_mask = scores.new_zeros(1, 1, query.shape[2], key.shape[2])
    attention_mask = attention_mask[..., : key.shape[2]].expand(len(scores), -1, -1, -1)
    attention_mask = torch.cat((scores, attention_mask), -1)
    return torch.cat((keys.to(key), key), 2), torch.cat((values.to(value), value), 2), attention_mask


def attention_weights(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups seen width"],
    attention_mask: Float[Tensor, "batch_or_1 1 queries seen"] | None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch heads queries seen"]:
    """Where each query looks, in float32: what fast attention never holds."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ repeat_kv(key, query.shape[1] // key.shape[1]).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    return scores.float().softmax(-1)


AttentionInterface.register(INJECTION, attend)
# of zeros and the least number, and always there: slots cannot be put before a mask that is not
AttentionMaskInterface.register(INJECTION, eager_mask)


class _Asked(tuple):
    """Remembers which of its places were asked for."""

    places: set[int]

    def __getitem__(self, place: Any) -> Any:
        self.places.add(place)
        return super().__getitem__(place)


@torch.no_grad()
def slot_shapes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Heads, and the widths of a key and of a value, of each layer's self-attention, as the model's cache has them.

    Raises:
        InputError: a model that has no such cache, or whose attention is none that transformers lets others replace,
            so that a latent would reach nothing.
    """
    name = type(model).__name__
    meta = model.device.type == "meta"
    if meta and not hasattr(
        model, "hf_device_map"
    ):  # which holds no numbers to run: what configs usually say, to count weights by
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return [(heads, width, width)] * config.num_hidden_layers
    # weights that are offloaded are on meta, too, and accelerate takes what they compute with from anywhere
    device = torch.device("cpu") if meta else model.device
    one = torch.zeros((1, 1), dtype=torch.long, device=device)
    try:
        model.set_attn_implementation(INJECTION)
        layers = model(input_ids=one, use_cache=True).past_key_values.layers
        shapes = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
        asked = _Asked(torch.zeros((1, heads, 1, width), device=device) for heads, width, _ in shapes)
        asked.places = set()
        values = tuple(torch.zeros((1, heads, 1, width), device=device) for heads, _, width in shapes)
        slots = Slots(asked, values, torch.zeros((1, 1, 1, 1), device=device))
        asked.places.clear()
        model(input_ids=one, latent_slots=slots)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise InputError(
            f"a {name} keeps no keys and values of each layer that a latent could stand beside: "
            "give a causal language model such as GPT-2, Llama, Qwen, Mistral, Gemma or Phi."
        ) from error
    if asked.places != set(range(len(shapes))):
        raise InputError(f"the attention of a {name} takes nothing from outside, so no latent would reach it.")
    return shapes
