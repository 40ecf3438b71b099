"""RMSNorm beside torch's own, whose gradient is autograd's."""

import pytest
import torch
from torch import nn

from latentlm.layers import RMSNorm


def both(size, dtype):
    ours, theirs = RMSNorm(size, eps=1e-5, dtype=dtype), nn.RMSNorm(size, eps=1e-5, dtype=dtype)
    with torch.no_grad():
        theirs.weight.copy_(nn.init.normal_(ours.weight))
    return ours, theirs


@pytest.mark.parametrize("shape", [(3, 5, 16), (1, 1, 16), (7, 16), (0, 4, 16), (2, 300, 16), (16,)])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_and_gradients_are_torchs(shape, scale, dtype):
    torch.manual_seed(0)
    ours, theirs = both(16, dtype)
    x, towards = (scale * torch.randn(shape, dtype=dtype)).requires_grad_(), torch.randn(shape, dtype=dtype)
    found, expected = (
        (norm(x).detach(), *torch.autograd.grad(norm(x), (x, norm.weight), towards)) for norm in (ours, theirs)
    )
    close = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.0}[dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=10 * close)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    ours, _ = both(6, torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: nn.utils.stateless.functional_call(ours, {"weight": weight}, x),
                                    (x, ours.weight))  # fmt: skip


def test_a_weight_that_asks_for_nothing_gets_nothing():
    ours, theirs = both(16, torch.float32)
    x = torch.randn(4, 16, requires_grad=True)
    for norm in (ours, theirs):
        norm.weight.requires_grad_(False)
    found, expected = (torch.autograd.grad(norm(x).square().sum(), x)[0] for norm in (ours, theirs))
    torch.testing.assert_close(found, expected)
    assert ours(x.detach()).requires_grad is False
    ours.weight.requires_grad_(True)
    ours(x.detach()).sum().backward()
    assert ours.weight.grad is not None
