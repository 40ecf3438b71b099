"""Attention by blocks against the square of all scores, in float64; and that what does not matter is not computed."""

import pytest
import torch
from tests.toy import padded, prior_latents, small_model, texts
from torch.utils.flop_counter import FlopCounterMode

from latentlm.layers import causal_mask, window
from latentlm.layers.window import Window, windowed_attention

HEADS, WIDTH = 2, 8


def qkv(batch, length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    made = torch.randn(3, batch, length, HEADS, WIDTH, generator=generator, dtype=dtype)
    return [x.transpose(1, 2).requires_grad_() for x in made]


def by_square(query, key, value, size, attention_mask=None):
    """softmax over all pairs, those outside of the window masked; [batch, time, heads, width]."""
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
    seen = ((distance >= 0) & (distance < size))[None, None]
    if attention_mask is not None:
        seen = seen & (attention_mask.bool()[:, None, None] | (distance == 0))
    score = (query @ key.mT * WIDTH**-0.5).masked_fill(~seen, -torch.inf)
    return (score.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("length", [64, 65, 95, 161])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_the_square_with_its_gradients(size, length, batch):
    query, key, value = qkv(batch, length)
    shown = Window.of(size, length, query.device)
    found = windowed_attention(query, key, value, shown, scale=WIDTH**-0.5)
    expected = by_square(query, key, value, size)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    slope = torch.randn_like(expected)
    gradients = torch.autograd.grad((found * slope).sum(), (query, key, value))
    of_square = torch.autograd.grad((expected * slope).sum(), (query, key, value))
    torch.testing.assert_close(gradients, of_square, atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 5, 20])
def test_padding_is_not_seen_and_makes_no_nan(side, size):
    length, lengths = 83, (83, 50, 3, 1)
    query, key, value = qkv(len(lengths), length)
    mask = torch.zeros(len(lengths), length, dtype=torch.long)
    for row, real in enumerate(lengths):
        mask[row, -real:] = 1
    mask = mask if side == "left" else mask.flip(1)
    found = windowed_attention(query, key, value, Window.of(size, length, query.device, mask), scale=WIDTH**-0.5)
    torch.testing.assert_close(found, by_square(query, key, value, size, mask), atol=1e-12, rtol=0)
    assert all(bool(torch.isfinite(one).all()) for one in torch.autograd.grad(found.sum(), (query, key, value)))


def test_dropout_drops_and_keeps_the_mean():
    query, key, value = qkv(1, 64)
    shown = Window.of(4, 64, query.device)
    ones = torch.ones_like(value)
    torch.manual_seed(0)
    dropped = torch.stack(
        [windowed_attention(query, key, ones, shown, scale=1.0, dropout=0.5)[..., 0] for _ in range(2000)]
    )
    assert 0 in dropped
    torch.testing.assert_close(dropped.mean(0), torch.ones_like(dropped[0]), atol=0.15, rtol=0)


def test_bfloat16_stays_bfloat16():
    query, key, value = qkv(2, 80, torch.bfloat16)
    found = windowed_attention(query, key, value, Window.of(7, 80, query.device), scale=WIDTH**-0.5)
    assert found.dtype == torch.bfloat16
    exact = by_square(query.double(), key.double(), value.double(), 7)
    torch.testing.assert_close(found.double(), exact, atol=2e-2, rtol=0)


def test_it_takes_the_place_of_the_square_where_a_text_is_long_enough():
    config = small_model("ltm", sliding_window=20).config
    assert isinstance(causal_mask(config, torch.zeros(1, 80, 16)), Window)
    for other in (
        causal_mask(config, torch.zeros(1, 79, 16)),
        causal_mask(config, torch.zeros(1, 80, 16), always_seen=1),
        causal_mask(small_model("ltm", sliding_window=None).config, torch.zeros(1, 80, 16)),
        causal_mask(small_model("ltm", sliding_window=20, attn_implementation="eager").config, torch.zeros(1, 80, 16)),
    ):
        assert not isinstance(other, Window)


def test_work_grows_with_the_window_and_not_with_the_length():
    def flops(length):
        query, key, value = (x.detach().float() for x in qkv(1, length))
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            windowed_attention(
                *(x.to("meta") for x in (query, key, value)), Window.of(16, length, torch.device("meta")), scale=1.0
            )
        return counter.get_total_flops()

    assert flops(640) < 2.2 * flops(320)
    assert flops(640) < 640**2 * 4 * HEADS * WIDTH / 10


@pytest.mark.parametrize("family", ["ltm", "autoregressive"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_models_likelihood_is_that_of_transformers_mask(family, side, monkeypatch):
    input_ids, mask = texts(3, 90), None
    if side != "none":
        input_ids, mask = padded(input_ids, [90, 41, 2], side)
    model = small_model(family, max_position_embeddings=90, sliding_window=3).double()
    latents = prior_latents(model, input_ids).double()
    found = model.log_likelihood(latents, input_ids, mask)
    by_blocks = torch.autograd.grad(found.sum(), list(model.parameters()), allow_unused=True)
    monkeypatch.setattr(window, "_LEAST_BLOCKS", 1000)
    expected = model.log_likelihood(latents, input_ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    of_square = torch.autograd.grad(expected.sum(), list(model.parameters()), allow_unused=True)
    assert [one is None for one in by_blocks] == [one is None for one in of_square]
    for one, other in zip(by_blocks, of_square, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
