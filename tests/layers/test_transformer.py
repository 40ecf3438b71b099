"""Attention against loops over heads and positions, with rotations as multiplication of complex numbers."""

import cmath
import math

import pytest
import torch
from tests.toy import padded, prior_latents, small_config, small_model, texts
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import flash_attention_mask

from latentlm.layers import TransformerBlock, causal_mask, rotation, transformer
from latentlm.layers.transformer import Attention, SwiGLU, rotate

WIDTH, THETA = 8, 10000.0


def turned(vector, position):
    """Rotary embedding of one vector of one head: number i and number i + width/2 are a complex number."""
    half = len(vector) // 2
    out = [0.0] * len(vector)
    for i in range(half):
        z = complex(vector[i], vector[i + half]) * cmath.exp(1j * position * THETA ** (-2 * i / len(vector)))
        out[i], out[i + half] = z.real, z.imag
    return torch.tensor(out, dtype=torch.float64)


def by_loops(attention, x, memory, positions, memory_positions, visible):
    """softmax(qᵀk / √width) v, one head and one position after the other."""
    heads, size = 2, x.shape[-1] // 2
    query, key, value = attention.query(x), attention.key(memory), attention.value(memory)
    out = torch.zeros_like(query)
    for row in range(len(x)):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            keys = [turned(key[row, n, part].tolist(), p) for n, p in enumerate(memory_positions)]
            for t, position in enumerate(positions):
                q = turned(query[row, t, part].tolist(), position)
                seen = [n for n in range(memory.shape[1]) if visible(t, n)]
                score = torch.stack([q @ keys[n] for n in seen]) / math.sqrt(size)
                out[row, t, part] = sum(w * value[row, n, part] for w, n in zip(score.softmax(0), seen, strict=True))
    return attention.output(out)


@pytest.fixture
def x():
    return torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def block(**changes):
    return small_model("ltm", **changes).double().layers[0]


def test_rotation_of_float64_by_complex_numbers(x):
    positions = [0, 1, 5, 100, 1000]
    heads = x.view(2, 5, 2, WIDTH).transpose(1, 2)
    found = rotate(heads, rotation(torch.tensor([positions]), WIDTH, THETA))
    expected = [[[turned(v.tolist(), p) for v, p in zip(h, positions, strict=True)] for h in row] for row in heads]
    expected = torch.stack([torch.stack([torch.stack(h) for h in row]) for row in expected])
    # angles are float32: 1000 radians are known to 6e-5
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
    torch.testing.assert_close(found[:, :, :3], expected[:, :, :3], atol=3e-6, rtol=0)


def test_rotation_keeps_lengths_and_knows_distances_alone(x):
    heads = x.view(2, 5, 2, WIDTH).transpose(1, 2)
    here, there = (rotate(heads, rotation(torch.arange(5)[None] + shift, WIDTH, THETA)) for shift in (0, 11))
    torch.testing.assert_close(here.norm(dim=-1), heads.norm(dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(here @ here.mT, there @ there.mT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 2, 4])
def test_self_attention_by_loops(x, window):
    model = small_model("ltm", sliding_window=window).double()
    attention = model.layers[0].self_attention
    mask = causal_mask(model.config, x)
    found = attention.self_attention(x, rotation(torch.arange(5)[None], WIDTH, THETA), mask, None)
    expected = by_loops(attention, x, x, range(5), range(5), lambda t, n: n <= t and (window is None or t - n < window))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # float32 angles


@pytest.mark.parametrize("many", [5, 6], ids=["products", "fused"])
def test_cross_attention_by_loops(x, many, monkeypatch):
    """Every position sees every latent."""
    monkeypatch.setattr(transformer, "_FEW_KEYS", range(3, 4))
    monkeypatch.setattr(transformer, "_MANY_QUERIES", many)
    memory = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    attention, places = block().cross_attention, [2.5, 7.5, 12.5]
    turns = rotation(torch.arange(5)[None], WIDTH, THETA), rotation(torch.tensor([places]), WIDTH, THETA)
    found = attention.cross_attention(x, memory, *turns, None)
    expected = by_loops(attention, x, memory, range(5), places, lambda t, n: True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_products_with_few_latents_leave_dropout_and_half_precision_to_fused_attention(monkeypatch):
    """Dropped out weights are no softmax, and bf16 rounds scores to 8 bits."""
    attention = small_model("ltm", dropout=0.5, latents_per_layer=4).layers[0].cross_attention
    query, key = torch.randn(1, 2, 128, WIDTH), torch.randn(1, 2, 4, WIDTH)
    fused = []
    original = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *given, **how: (fused.append(1), original(*given, **how))[1],
    )
    attention.eval()._attend(query, key, key, None)
    assert not fused
    first, second = (attention.train()._attend(query, key, key, None) for _ in range(2))
    assert len(fused) == 2 and not torch.equal(first, second)
    attention.eval().bfloat16()._attend(query.bfloat16(), key.bfloat16(), key.bfloat16(), None)
    assert len(fused) == 3


def test_memory_stays_in_the_cache(x):
    """The second call reads keys and values of the first, whatever memory it is given."""
    memory = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    attention, cache = block().cross_attention, EncoderDecoderCache(DynamicCache(), DynamicCache())
    turns = rotation(torch.arange(5)[None], WIDTH, THETA), rotation(torch.arange(3)[None], WIDTH, THETA)
    first = attention.cross_attention(x, memory, *turns, cache)
    assert torch.equal(attention.cross_attention(x, torch.zeros_like(memory), *turns, cache), first)
    torch.testing.assert_close(attention.cross_attention(x, memory, *turns, None), first)


def test_swiglu_by_hand():
    layer = SwiGLU(2, 1)
    for linear, value in ((layer.gate, [[1.0, 0.0]]), (layer.up, [[0.0, 1.0]]), (layer.down, [[2.0], [-1.0]])):
        linear.weight = nn.Parameter(torch.tensor(value))
    gate = 0.5 / (1 + math.exp(-0.5)) * 3.0
    torch.testing.assert_close(layer(torch.tensor([[[0.5, 3.0]]])), torch.tensor([[[2 * gate, -gate]]]))


def test_a_block_adds_its_parts(x):
    layer = block()
    memory = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turns = rotation(torch.arange(5)[None], WIDTH, THETA), rotation(torch.arange(3)[None], WIDTH, THETA)

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    expected = x + layer.self_attention.self_attention(norm(x), turns[0], None, None)
    expected = expected + layer.cross_attention.cross_attention(norm(expected), memory, *turns, None)
    expected = expected + layer.feed_forward(norm(expected))
    torch.testing.assert_close(layer(x, turns[0], None, None, memory, turns[1]), expected, atol=1e-12, rtol=0)


def test_a_block_without_latents_has_no_weights_for_them():
    config = small_config("autoregressive")
    names = {name for name, _ in TransformerBlock(config, 0).named_parameters()}
    assert names and not any("cross" in name for name in names)
    assert Attention(config, 0, memory_size=5).key.weight.shape == (16, 5)


def flash_like(module, query, key, value, attention_mask, scaling, is_causal=None, sliding_window=None, **kwargs):
    """As flash attention reads its arguments: causality and window from flags, padding from a mask [batch, time]."""
    is_causal = module.is_causal if is_causal is None else is_causal
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    seen = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        seen = distance >= 0
    if sliding_window is not None:
        seen = seen & (distance.abs() < sliding_window)
    seen = seen.expand(len(query), 1, -1, -1)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].bool()
    score = (query @ key.mT * scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
    return (score.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_attention_that_learns_of_padding_by_a_flat_mask_stays_causal(family, side):
    AttentionInterface.register("flat_mask", flash_like)
    AttentionMaskInterface.register("flat_mask", flash_attention_mask)
    input_ids, mask = texts(3, 9), None
    if side != "none":
        input_ids, mask = padded(input_ids, [9, 5, 3], side)
    model = small_model(family)
    latents = prior_latents(model, input_ids)
    expected = model.log_likelihood(latents, input_ids, mask)
    found = small_model(family, attn_implementation="flat_mask").log_likelihood(latents, input_ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
