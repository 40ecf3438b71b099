"""The fused projection against logits, log-softmax and gather, all in float64."""

import pytest
import torch

from latentlm.layers import projection, token_log_likelihood

TOKENS, HIDDEN, VOCABULARY = 13, 6, 11


@pytest.fixture(params=[(TOKENS, 1), (5, 4096), (1, 1)], ids=["whole, long", "by fives", "by ones, long"])
def parts(request, monkeypatch):
    """All tokens at a time, five, or one; by a vocabulary that counts as long, or does not."""
    tokens, long = request.param
    monkeypatch.setattr(projection, "_LOGITS_ON_CPU", 1)
    monkeypatch.setattr(projection, "_LEAST_TOKENS", tokens)
    monkeypatch.setattr(projection, "_LONG", long)


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return states, weight, targets


def reference(states, weight, targets):
    return (states @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_value_and_gradients(wanted):
    states, weight, targets = inputs()
    states.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    found, expected = token_log_likelihood(states, weight, targets), reference(states, weight, targets)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    gradient = torch.randn(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    asked = [part for part, want in zip((states, weight), wanted, strict=True) if want]
    if asked:
        ours, theirs = (torch.autograd.grad(value, asked, gradient) for value in (found, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    else:
        assert not found.requires_grad


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_that_count_alike_and_tokens_that_do_not(alike, dtype, monkeypatch):
    """The gradient of the weight is made with the value where they do, and by a second projection where they do not."""
    states, weight, targets = inputs(dtype)
    states.requires_grad_(), weight.requires_grad_()
    found = token_log_likelihood(states, weight, targets)
    gradient = torch.full_like(found, -0.3)
    if not alike:
        gradient[2] = 0.0
    expected = torch.autograd.grad(reference(states.double(), weight.double(), targets), (states, weight), gradient)
    again, products = [], projection._subtract_product
    monkeypatch.setattr(projection, "_subtract_product", lambda *given: (again.append(1), products(*given)))
    ours = torch.autograd.grad(found, (states, weight), gradient, retain_graph=True)
    assert bool(again) != alike
    twice = torch.autograd.grad(found, (states, weight), gradient)
    for one, other, plain in zip(ours, twice, expected, strict=True):
        close = {"atol": 1e-12, "rtol": 0} if dtype == torch.float64 else {"atol": 0.05, "rtol": 0.05}
        torch.testing.assert_close(one, plain, **close)
        assert torch.equal(one, other)


@pytest.mark.usefixtures("parts")
def test_gradients_by_finite_differences():
    states, weight, targets = inputs()
    assert torch.autograd.gradcheck(token_log_likelihood, (states.requires_grad_(), weight.requires_grad_(), targets))


@pytest.mark.parametrize(
    "dtype, precise", [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_precision(dtype, precise):
    """At least float32 from the logits on; float32 and float64 keep their own digits."""
    states, weight, targets = inputs(dtype)
    found = token_log_likelihood(states, weight, targets)
    assert found.dtype == precise
    expected = reference((states @ weight.T).double(), torch.eye(VOCABULARY, dtype=torch.float64), targets)
    torch.testing.assert_close(found.double(), expected, atol=1e-14 if dtype == torch.float64 else 2e-6, rtol=0)


def test_large_logits_do_not_overflow():
    states, weight, targets = inputs(torch.float32)
    found = token_log_likelihood((1e4 * states).requires_grad_(), weight, targets)
    assert torch.isfinite(found).all()
    expected = reference(1e4 * states.double(), weight.double(), targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)


def test_no_tokens():
    states, weight, targets = inputs()
    states, weight = states[:0].requires_grad_(), weight.requires_grad_()
    found = token_log_likelihood(states, weight, targets[:0])
    assert found.shape == (0,)
    found.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and states.grad.shape == (0, HIDDEN)


def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_the_weights():
    states, weight, targets = inputs(torch.float32)
    states.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_log_likelihood(states, weight, targets)
    low = token_log_likelihood(states.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(found, low) and found.dtype == torch.float32
    found.sum().backward()
    assert states.grad.dtype == weight.grad.dtype == torch.float32
    for parameter, exact in zip(
        (states, weight), torch.autograd.grad(reference(states, weight, targets).sum(), (states, weight)), strict=True
    ):
        assert torch.nn.functional.cosine_similarity(parameter.grad.flatten(), exact.flatten(), dim=0) > 0.9999


def test_the_gradient_of_states_alone_is_the_gradient_with_weights():
    """Gradient inference takes one way, training the other."""
    states, weight, targets = inputs(torch.float32)
    states.requires_grad_()
    (alone,) = torch.autograd.grad(token_log_likelihood(states, weight, targets).sum(), states)
    together = torch.autograd.grad(
        token_log_likelihood(states, weight.requires_grad_(), targets).sum(), (states, weight)
    )
    assert torch.equal(alone, together[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_made_for_a_gradient_that_nobody_takes(monkeypatch, mode):
    """A Function's needs_input_grad does not know of no_grad."""
    wanted, forward = [], projection._TokenLogLikelihood.forward

    def spy(ctx, *args):
        wanted.append(ctx.needs_input_grad)
        return forward(ctx, *args)

    monkeypatch.setattr(projection._TokenLogLikelihood, "forward", staticmethod(spy))
    states, weight = torch.randn(4, 3, requires_grad=True), torch.nn.Parameter(torch.randn(5, 3))
    with mode():
        token_log_likelihood(states, weight, torch.tensor([0, 1, 2, 3]))
    assert not any(wanted[0])
    token_log_likelihood(states, weight, torch.tensor([0, 1, 2, 3])).sum().backward()
    assert wanted[1] == (True, True, False) and states.grad.any() and weight.grad.any()


def test_parts_of_a_long_vocabulary_are_no_crumbs():
    """2^22 logits would be 20 tokens of 200,000: reading the weights would take longer than the products."""
    states, weight = torch.empty(600, 1), torch.empty(200_000, 1)
    assert [part.start for part in projection._parts(states, weight)] == [0, 256, 512]
    assert [part.start for part in projection._parts(states, weight[:8192])] == [0, 512]
