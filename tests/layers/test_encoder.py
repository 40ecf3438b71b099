"""The encoder sees all of the text, or all until now, and nothing of its padding; pooling against loops."""

import math

import pytest
import torch
from tests.toy import small_config, small_model
from torch import nn

from latentlm.layers import AttentionPooling, TransformerEncoder

LENGTHS = [7, 4, 1]


def encoder(*, layers=2, attention="sdpa", **changes) -> TransformerEncoder:
    """In float64, with weights about 1/4; the config's window of 4 is the decoder's alone."""
    changes = {"inference": "amortised", "encoder_layers": layers, "attn_implementation": attention, **changes}
    return small_model("ltm", **changes).encoder.transformer.double()


def pooling(number=3) -> AttentionPooling:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AttentionPooling(small_config("ltm"), number).double()


@pytest.fixture
def x():
    return torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def placed(x, side, total):
    """The first LENGTHS[i] states of each row with rubbish on a side, and the mask."""
    rows = torch.full((len(x), total, x.shape[-1]), 100.0, dtype=x.dtype)
    mask = torch.zeros(len(x), total, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(total - length, total)
        rows[row, place], mask[row, place] = x[row, :length], 1
    return rows, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_no_state(x, side, attention):
    model = encoder(attention=attention)
    rows, mask = placed(x, side, 10)
    states = model(rows, mask)
    for row, length in enumerate(LENGTHS):
        found = states[row][mask[row].bool()]
        torch.testing.assert_close(found, model(x[row : row + 1, :length])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 4, None])
def test_a_state_depends_on_every_real_position_and_on_no_padding(x, side, attention, window):
    """Of one layer, so that nothing is seen through another position."""
    model = encoder(layers=1, attention=attention, sliding_window=window)
    rows, mask = placed(x, side, 9)
    rows = rows.clamp_max(1).requires_grad_()
    states = model(rows, mask)
    for row in range(3):
        for t in mask[row].nonzero()[:, 0].tolist():
            weight = torch.linspace(1, 2, 16, dtype=torch.float64)
            (gradient,) = torch.autograd.grad((states[row, t] * weight).sum(), rows, retain_graph=True)
            assert torch.equal((gradient[row] != 0).any(-1), mask[row].bool())
            assert not gradient[torch.arange(3) != row].any()


def test_a_mask_of_ones_is_no_mask(x):
    model = encoder()
    torch.testing.assert_close(model(x, torch.ones(3, 7, dtype=torch.int64)), model(x), atol=1e-12, rtol=0)


def test_order_matters(x):
    """Rotary positions: two positions exchanged are not their states exchanged."""
    model = encoder()
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6])
    assert (model(x[:, order]) - model(x)[:, order]).abs().max() > 1e-3


def test_it_is_its_blocks_and_a_norm(x):
    """Attention written out: every position's query with every key, turned by their own positions."""
    model = encoder(layers=1)
    block = model.layers[0]
    angles = (torch.arange(7)[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)).repeat(1, 2)
    cos, sin = angles.cos().double(), angles.sin().double()  # turned in float32, whatever the states are

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x):
        half = torch.cat((-x[:, 4:], x[:, :4]), 1)
        return x * cos + half * sin

    for row in x:
        seen = norm(row)
        attention, heads = block.self_attention, []
        for part in (slice(0, 8), slice(8, 16)):
            query, key = (turned(linear(seen)[:, part]) for linear in (attention.query, attention.key))
            heads.append((query @ key.T / math.sqrt(8)).softmax(1) @ attention.value(seen)[:, part])
        row_states = row + attention.output(torch.cat(heads, 1))
        row_states = row_states + block.feed_forward(norm(row_states)[None])[0]
        torch.testing.assert_close(model(row[None])[0], norm(row_states), atol=1e-10, rtol=0)


@pytest.mark.parametrize("batch, time", [(1, 7), (3, 1), (1, 1)])
def test_a_batch_of_one_and_a_text_of_one_position(x, batch, time):
    model, pool = encoder(), pooling()
    states = model(x[:batch, :time])
    assert states.shape == (batch, time, 16)
    torch.testing.assert_close(states, torch.cat([model(row[None]) for row in x[:batch, :time]]), atol=1e-12, rtol=0)
    pooled = pool(states)
    assert pooled.shape == (batch, 3, 16)
    if time == 1:  # a softmax over one position is 1
        torch.testing.assert_close(pooled, pool.output(pool.value(states)).expand(-1, 3, -1), atol=1e-12, rtol=0)


def causal(*, layers=2, window=None, attention="sdpa") -> TransformerEncoder:
    """With the weights of `encoder`; the config's window is its own."""
    both_ways = encoder(layers=layers, attention=attention, sliding_window=window)
    model = TransformerEncoder(both_ways.config, layers, causal=True).double().eval()
    model.load_state_dict(both_ways.state_dict())
    return model


EACH_WINDOW = pytest.mark.parametrize("window", [1, 3, None])
EACH_ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@EACH_WINDOW
@EACH_ATTENTION
def test_a_causal_state_sees_the_times_until_its_own(x, attention, window):
    """All of them, or so many as a window has; through two layers, two windows."""
    for layers in (1, 2):
        model, x = causal(layers=layers, window=window, attention=attention), x.detach().requires_grad_()
        weight = torch.linspace(1, 2, 16, dtype=torch.float64)
        for mask in (None, torch.ones(3, 7, dtype=torch.int64)):
            states = model(x, mask)
            for t in range(7):
                (gradient,) = torch.autograd.grad((states[:, t] * weight).sum(), x, retain_graph=True)
                first = 0 if window is None else max(0, t - layers * (window - 1))
                seen = torch.arange(7).ge(first) & torch.arange(7).le(t)
                assert torch.equal((gradient != 0).any(-1), seen.expand(3, -1))


@EACH_WINDOW
@EACH_ATTENTION
def test_a_change_at_t_changes_no_causal_state_before(x, attention, window):
    model = causal(window=window, attention=attention)
    states = model(x)
    for t in range(7):
        other = x.clone()
        other[:, t] += 1.0
        changed = model(other)
        torch.testing.assert_close(changed[:, :t], states[:, :t], atol=1e-12, rtol=0)
        assert (changed[:, t] - states[:, t]).abs().max() > 1e-3
        assert window == 1 or t == 6 or (changed[:, t + 1] - states[:, t + 1]).abs().max() > 1e-4


@EACH_WINDOW
@EACH_ATTENTION
def test_a_causal_state_is_the_last_one_of_what_it_sees(x, attention, window):
    """Of one layer that looks both ways over no more; rotary positions know distances alone."""
    model, both_ways = causal(layers=1, window=window, attention=attention), encoder(layers=1, attention=attention)
    states = model(x)
    for t in range(7):
        first = 0 if window is None else max(0, t + 1 - window)
        expected = both_ways(x[:, first : t + 1])[:, -1]
        torch.testing.assert_close(states[:, t], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@EACH_WINDOW
@EACH_ATTENTION
def test_padding_changes_no_causal_state(x, attention, window, side):
    # in float32, since transformers' eager softmax is float32's, which holds no float64 mask of a position without any
    model, x = causal(window=window, attention=attention).float(), x.float()
    rows, mask = placed(x, side, 10)
    states = model(rows, mask)
    assert torch.isfinite(states).all()
    for row, length in enumerate(LENGTHS):
        found = states[row][mask[row].bool()]
        torch.testing.assert_close(found, model(x[row : row + 1, :length])[0], atol=1e-5, rtol=0)
    if side == "right":  # where a mask is not needed for the text's own states
        unmasked = model(rows)
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(unmasked[row, :length], states[row, :length], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_pooling_by_loops(x, side):
    model = pooling()
    rows, mask = (x, None) if side == "none" else placed(x, side, 10)
    found = model(rows, mask)
    assert found.shape == (3, 3, 16)
    key, value, query = model.key(rows), model.value(rows), model.queries.weight
    for row in range(3):
        real = range(7) if mask is None else mask[row].nonzero()[:, 0].tolist()
        for n in range(3):
            heads = []
            for part in (slice(0, 8), slice(8, 16)):
                score = torch.stack([query[n, part] @ key[row, t, part] for t in real]) / math.sqrt(8)
                heads.append(sum(w * value[row, t, part] for w, t in zip(score.softmax(0), real, strict=True)))
            torch.testing.assert_close(found[row, n], model.output(torch.cat(heads)), atol=1e-10, rtol=0)


def test_pooling_of_nothing_is_finite(x):
    """A row of padding alone, which some batch may hold."""
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1] = 0
    assert torch.isfinite(pooling()(encoder()(x, mask), mask)).all()


def test_gradients_by_finite_differences(x):
    model, pool = encoder(layers=1), pooling(2)
    rows, mask = placed(x, "left", 8)
    rows = rows.clamp_max(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool(model(x, mask), mask), rows, fast_mode=True)


def test_bfloat16_is_near_float32(x):
    model, pool = encoder().float(), pooling().float()
    rows, mask = placed(x.float(), "right", 8)
    expected = pool(model(rows, mask), mask)
    found = pool.bfloat16()(model.bfloat16()(rows.bfloat16(), mask), mask)
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    # states about 1 with 8 bits each, through two layers and two products
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max() + 0.02


def test_dropout_is_for_training(x):
    model = encoder(dropout=0.5)
    assert torch.equal(model(x), model(x))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(x), model(x))
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == 2
