"""Convolutions that look back only, against loops over taps and torch's own layers, in float64."""

import pytest
import torch
from torch import nn

from latentlm.layers import CausalBlock
from latentlm.layers.convolution import CausalConvolution, CausalSqueezeExcite, ChannelNorm

CHANNELS, T = 8, 20
DILATIONS = (1, 2, 4)
EACH_FORM = pytest.mark.parametrize("form", ["separable", "full"])


def moved(module):
    """In float64 and evaluation mode, with weights and biases about 1/2, so that norms and gates do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def stack(form, kernel_size=3, dilations=DILATIONS, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return moved(nn.Sequential(*(CausalBlock(CHANNELS, kernel_size, d, dropout, form) for d in dilations)))


def inputs(batch=2, time=T, channels=CHANNELS):
    return torch.randn(batch, channels, time, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@EACH_FORM
@pytest.mark.parametrize("t", [0, 1, 7, T - 1])
def test_a_change_at_t_changes_t_and_nothing_before(form, t):
    model, x = stack(form), inputs()
    other = x.clone()
    other[:, :, t] += 1.0
    first, second = model(x), model(other)
    assert torch.equal(second[:, :, :t], first[:, :, :t])
    assert bool((second[:, :, t] != first[:, :, t]).all())
    if t + 1 < T:
        assert bool((second[:, :, t + 1 :] != first[:, :, t + 1 :]).any())


@pytest.mark.parametrize("kernel_size", [1, 2, 3])
def test_what_a_time_sees(kernel_size):
    """A full stack sees every d-th time as far back as its kernels reach, a squeeze-excite all times until its own."""
    x = inputs(1).requires_grad_()
    seen = {}
    for form in ("full", "separable"):
        states = stack(form, kernel_size)(x)
        gradients = (torch.autograd.grad(states[0, :, t].sum(), x, retain_graph=True)[0] for t in range(T))
        seen[form] = torch.stack([(gradient[0] != 0).any(0) for gradient in gradients])
    back = torch.arange(T)[:, None] - torch.arange(T)
    assert torch.equal(seen["full"], (back >= 0) & (back <= (kernel_size - 1) * sum(DILATIONS)))
    assert torch.equal(seen["separable"], back >= 0)


@EACH_FORM
def test_what_follows_a_text_changes_nothing_of_it(form):
    model, x = stack(form), inputs(3)
    padded = x.clone()
    for row, length in enumerate((T, 9, 1)):
        padded[row, :, length:] = 100.0
    states = model(padded)
    for row, length in enumerate((T, 9, 1)):
        alone = model(x[row : row + 1, :, :length])[0]
        assert alone.shape == (CHANNELS, length)
        torch.testing.assert_close(states[row, :, :length], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dilation", [1, 3])
def test_a_convolution_is_the_sum_of_its_taps(dilation):
    convolution, x = moved(CausalConvolution(CHANNELS, 5, 3, dilation=dilation)), inputs()
    expected = convolution.bias[:, None].expand(2, 5, T).clone()
    for t in range(T):
        for tap in range(3):
            if (then := t - (2 - tap) * dilation) >= 0:
                expected[:, :, t] += x[:, :, then] @ convolution.weight[:, :, tap].T
    torch.testing.assert_close(convolution(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, CHANNELS])
def test_a_norm_is_torchs_of_each_time_alone(groups):
    norm, x = moved(ChannelNorm(CHANNELS, groups)), inputs()
    theirs = nn.GroupNorm(groups, CHANNELS).double()
    theirs.load_state_dict(norm.state_dict())
    found = norm(x)
    # the statistics are float32
    for t in range(T):
        torch.testing.assert_close(found[:, :, t : t + 1], theirs(x[:, :, t : t + 1]), rtol=1e-5, atol=1e-5)
    if groups < CHANNELS:  # theirs would see the end of the text
        assert float((found - theirs(x)).detach().abs().max()) > 0.1


def test_the_last_time_is_squeezed_and_excited_by_the_whole():
    gate, x = moved(CausalSqueezeExcite(CHANNELS)), inputs()
    found = gate(x)
    for t in (0, 5, T - 1):
        mean = x[:, :, : t + 1].mean(-1)
        squeezed = nn.functional.silu(mean @ gate.squeeze.weight[..., 0].T + gate.squeeze.bias)
        excited = (squeezed @ gate.excite.weight[..., 0].T + gate.excite.bias).sigmoid()
        torch.testing.assert_close(found[:, :, t], x[:, :, t] * excited, rtol=1e-5, atol=1e-6)


def test_a_full_block_is_a_residual_of_gated_normal_channels():
    block, x = stack("full", dilations=(2,))[0], inputs()
    states = block.convolution(x)
    centred = states - states.mean(1, keepdim=True)
    normal = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    normal = normal * block.norm.weight[:, None] + block.norm.bias[:, None]
    expected = x + normal[:, :CHANNELS] * normal[:, CHANNELS:].sigmoid()
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@EACH_FORM
def test_batches_and_texts_of_one(form):
    model, x = stack(form), inputs()
    torch.testing.assert_close(model(x), torch.cat([model(row[None]) for row in x]), rtol=1e-12, atol=1e-12)
    assert model(x[:1, :, :1]).shape == (1, CHANNELS, 1)


@EACH_FORM
def test_bfloat16_is_finite_and_near_float32(form):
    model, x = stack(form).float(), inputs().float()
    expected = model(x)
    found = model.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16 and bool(torch.isfinite(found).all())
    # 8 bits of each of three blocks
    assert float((found.float() - expected).detach().abs().mean()) < 0.02 * float(expected.detach().abs().mean())


def test_statistics_are_float32_in_every_dtype():
    """Squares, and sums over many times, that float16 cannot hold."""
    norm, x = moved(ChannelNorm(CHANNELS, 2)).float(), 3000 * inputs().float()
    torch.testing.assert_close(norm.half()(x.half()).float(), norm.float()(x), rtol=5e-3, atol=5e-3)
    gate, x = moved(CausalSqueezeExcite(CHANNELS)).half(), torch.full((1, CHANNELS, 3000), 30.0).half()
    found = gate(x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, found[:, :, :1].expand_as(found), rtol=0.01, atol=1e-3)


@EACH_FORM
def test_gradients_reach_every_weight(form):
    model, x = stack(form), inputs().requires_grad_()
    (model(x) * inputs(2)).sum().backward()
    for name, parameter in model.named_parameters():
        assert bool((parameter.grad != 0).any()), name
    assert bool((x.grad != 0).all())


@EACH_FORM
def test_dropout_is_for_training_and_leaves_the_residual(form):
    model, x = stack(form, dropout=0.5), inputs()
    assert torch.equal(model(x), model(x))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(x), model(x))
    torch.testing.assert_close(stack(form, dropout=1.0).train()(x), x)
