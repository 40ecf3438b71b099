"""Gradient inference. The toy `LinearGaussian` has an exact posterior; `small_model("ltm")` is the real user."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from tests.toy import linear_gaussian, padded, small_model, texts, three_verbs
from torch import nn
from torch.distributions import kl_divergence

from latentlm import variational
from latentlm.distributions import (
    Stream,
    diagonal_gaussian,
    kl_per_dimension,
    sample_from_noise,
    sequence_keys,
    sequence_noise,
    standard_normal,
)
from latentlm.inference import infer_by_gradient
from latentlm.objective import free_bits


def infer(model, input_ids, attention_mask=None, *, steps=4, rate=0.1, start=None, **options):
    shape = model.prior(len(input_ids), input_ids.shape[1] - 1).event_shape
    zeros = torch.zeros(len(input_ids), *shape)
    mean, log_variance = start or (zeros, zeros)
    options.setdefault("learning_rate", lambda step: rate)
    return infer_by_gradient(
        model, input_ids, attention_mask, start_mean=mean, start_log_variance=log_variance, steps=steps, **options
    )


# ---- it finds the posterior ------------------------------------------------------------------------------------------


def test_the_fixed_point_is_the_exact_posterior():
    """Over 64 orders of each text's tokens, which share a posterior and no noise.

    One run ends within its own gradient noise of the posterior; the mean over orders is far closer.
    """
    model, orders, steps = linear_gaussian(), 64, 400
    generator = torch.Generator().manual_seed(0)
    shuffled = [
        torch.cat([text[:1], text[1:length][torch.randperm(length - 1, generator=generator)], text[length:]])
        for text, length in zip(texts(3, 16), (16, 12, 7), strict=True)
        for _ in range(orders)
    ]
    input_ids, mask = padded(torch.stack(shuffled), [16] * orders + [12] * orders + [7] * orders, "right")
    mean, variance = model.exact_posterior(input_ids, mask)
    found = infer(model, input_ids, mask, steps=steps, learning_rate=lambda step: 0.1 * (1 - step / steps))
    error = ((found.mean - mean) / variance.sqrt()).view(3, orders, 3)  # in the posterior's own deviations
    ratio = (found.stddev / variance.sqrt()).view(3, orders, 3)
    assert error.abs().max() < 0.3 and error.mean(1).abs().max() < 0.03
    assert (ratio - 1).abs().max() < 0.3 and (ratio.mean(1) - 1).abs().max() < 0.03


def test_a_text_of_no_length_keeps_the_prior():
    """Its gradient pulls towards the prior alone, from which it starts."""
    model = linear_gaussian()
    input_ids, mask = padded(texts(2, 5), [5, 1], "right")
    posterior = infer(model, input_ids, mask, rate=0.01)
    assert torch.equal(posterior.mean[1], torch.zeros(3)) and torch.equal(posterior.stddev[1], torch.ones(3))
    assert (posterior.mean[0] != 0).any()


@pytest.mark.parametrize(
    "toy", [linear_gaussian, three_verbs, lambda: small_model("ltm")], ids=["linear", "own", "ltm"]
)
def test_it_raises_the_bound(toy):
    """On fresh samples, from the prior; ε of 1 keeps coordinates still about which a text says next to nothing."""
    model, input_ids = toy(), texts(16, 12)

    def bound(posterior):
        noise = torch.randn(256, *posterior.mean.shape, generator=torch.Generator().manual_seed(0))
        latents = posterior.mean + posterior.stddev * noise
        log_likelihood = model.log_likelihood(latents, input_ids).sum(-1).mean(0)
        return (log_likelihood - kl_divergence(posterior, model.prior(16, 11))).mean()

    with torch.no_grad():
        bounds = [float(bound(infer(model, input_ids, steps=steps, epsilon=1.0))) for steps in (0, 3, 30)]
    assert bounds[0] + 0.2 < bounds[1] < bounds[2] - 0.5


def free_of(nats):
    """A charge for the KL with so many nats free for each dimension."""
    return lambda posterior, prior: free_bits(kl_per_dimension(posterior, prior), nats)


# ---- its steps are Adam's --------------------------------------------------------------------------------------------


def reference(
    model,
    input_ids,
    attention_mask,
    *,
    steps,
    rate,
    epsilon=1e-8,
    beta=1.0,
    free=0.0,
    seed=0,
    start=None,
    renew_noise=True,
    shown=None,
):
    """The same ascent with torch.optim.Adam, one step after the other; `shown` collects what each step sees."""
    prior = model.prior(len(input_ids), model.scored_tokens(input_ids, attention_mask).sum(1))
    mean, log_variance = (nn.Parameter(part.clone()) for part in start or (prior.mean, prior.variance.log()))
    optimizer = torch.optim.Adam([mean, log_variance], lr=1.0, betas=(0.9, 0.95), eps=epsilon, maximize=True)
    keys = sequence_keys(input_ids, attention_mask)
    for step in range(steps):
        draw = step if renew_noise else 0
        noise = sequence_noise(keys, tuple(mean.shape[1:]), seed=seed, stream=Stream.INFERENCE, step=draw)
        z = mean + (0.5 * log_variance).exp() * noise
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
        charge = torch.where(kl < free, torch.full_like(kl, free), kl)
        bounds = model.log_likelihood(z, input_ids, attention_mask).sum(1) - beta * charge.flatten(1).sum(1)
        optimizer.zero_grad()
        mean.grad, log_variance.grad = torch.autograd.grad(bounds.sum(), (mean, log_variance))
        if shown is not None:
            shown.append([bounds.detach(), mean.grad.clone(), log_variance.grad.clone()])
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return mean.detach(), log_variance.detach()


@pytest.mark.parametrize(
    "toy", [linear_gaussian, three_verbs, lambda: small_model("ltm")], ids=["linear", "own", "ltm"]
)
@pytest.mark.parametrize("options", [{}, {"epsilon": 1.0}, {"beta": 0.3}, {"free": 0.02}, {"seed": 7}], ids=str)
def test_every_step_is_adams(toy, options):
    model = toy()
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "right")
    shape = model.prior(3, 8).event_shape
    start = tuple(0.5 * torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0)))

    def rate(step):
        return 0.1 / (1 + step)

    given = {key: value for key, value in options.items() if key != "free"}
    if "free" in options:
        given["charge"] = free_of(options["free"])
    for steps in (0, 1, 2, 8):
        found = infer(model, input_ids, mask, steps=steps, start=start, learning_rate=rate, **given)
        mean, log_variance = reference(model, input_ids, mask, steps=steps, rate=rate, start=start, **options)
        # rounding of float32, a little of it amplified where Adam divides a small gradient by itself
        torch.testing.assert_close(found.mean, mean, atol=2e-5, rtol=0)
        torch.testing.assert_close(found.variance.log(), log_variance, atol=2e-5, rtol=0)


def test_noise_is_fresh_at_each_step_and_differs_by_seed():
    model, input_ids = linear_gaussian(), texts(2, 6)
    seen = []
    original = model.log_likelihood
    model.log_likelihood = lambda z, *rest: (seen.append(z.detach().clone()), original(z, *rest))[1]
    infer(model, input_ids, steps=3, rate=0.0)
    infer(model, input_ids, steps=3, rate=0.0, seed=1)
    assert len(torch.stack(seen).unique(dim=0)) == 6


@pytest.mark.parametrize(
    "toy", [linear_gaussian, three_verbs, lambda: small_model("ltm")], ids=["linear", "own", "ltm"]
)
@pytest.mark.parametrize("renew_noise", [True, False])
def test_each_step_is_shown_before_it_is_taken(toy, renew_noise):
    """Objective of each row and gradients, against the loop of torch.optim.Adam; also without new noise."""
    model, shown = toy(), []
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "right")
    shape = model.prior(3, 8).event_shape
    start = tuple(0.5 * torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0)))
    options = {"rate": 0.1, "beta": 0.3, "seed": 7}

    def show(step, objective, gradients):
        assert not any(part.requires_grad for part in (objective, *gradients))
        shown.append((step, objective, *(part.clone() for part in gradients)))

    found = infer(model, input_ids, mask, steps=5, start=start, renew_noise=renew_noise, on_step=show, **options)
    expected, slow = [], {**options, "rate": lambda step: 0.1, "renew_noise": renew_noise, "start": start}
    mean, log_variance = reference(model, input_ids, mask, steps=5, shown=expected, **slow)
    torch.testing.assert_close(found.mean, mean, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.variance.log(), log_variance, atol=2e-5, rtol=0)
    assert [step for step, *_ in shown] == [0, 1, 2, 3, 4]
    assert shown[0][1].shape == (3,) and shown[0][2].shape == shown[0][3].shape == (3, *shape)
    for (_, *ours), theirs in zip(shown, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_without_new_noise_one_draw_serves_all_steps():
    model, input_ids = linear_gaussian(), texts(2, 6)
    seen = []
    original = model.log_likelihood
    model.log_likelihood = lambda z, *rest: (seen.append(z.detach().clone()), original(z, *rest))[1]
    infer(model, input_ids, steps=3, rate=0.0, renew_noise=False)
    infer(model, input_ids, steps=1, rate=0.0)
    assert len(seen) == 4 and len(torch.stack(seen).unique(dim=0)) == 1


def test_the_rate_is_asked_for_once_a_step():
    asked = []
    infer(linear_gaussian(), texts(1, 4), steps=5, learning_rate=lambda step: (asked.append(step), 0.1)[1])
    assert asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("progress, rate", [(0.0, 0.3), (0.5, 0.2), (1.0, 0.1)])
def test_the_rate_follows_training(progress, rate):
    """The first step of Adam moves a coordinate by the rate itself, whatever its gradient."""
    model = small_model("ltm", inference_steps=1, inference_lr=0.3, inference_lr_final=0.1)
    model.training_progress.fill_(progress)
    moved = model.infer(texts(2, 8)).mean.abs()
    assert torch.allclose(moved.max(), torch.tensor(rate), atol=1e-6)
    assert (moved > 0.99 * rate).float().mean() > 0.9


@pytest.mark.parametrize(
    "changes, rates",
    [
        ({"inference_lr_decay": 1.0}, [0.3, 0.3, 0.3, 0.3]),
        ({"inference_lr_decay": 0.1}, [0.3, 0.21, 0.12, 0.03]),
        ({"inference_lr_decay": 0.1, "inference_steps": 1}, [0.3]),
        ({"inference_lr_final": None, "inference_lr_decay": 0.0}, [0.3, 0.2, 0.1, 0.0]),
    ],
)
def test_the_rate_follows_the_steps_of_an_inference(monkeypatch, changes, rates):
    used = []

    def spy(*args, learning_rate, **kwargs):
        return infer_by_gradient(
            *args, learning_rate=lambda step: used.append(learning_rate(step)) or used[-1], **kwargs
        )

    monkeypatch.setattr(variational, "infer_by_gradient", spy)
    small_model("ltm", **{"inference_lr": 0.3, **changes}).infer(texts(1, 4))
    assert used == pytest.approx(rates, abs=1e-12)


def test_training_mode_serves_the_training_objective(ltm):
    """β and free bits steer the inference of training, and no other."""
    input_ids = texts(2, 8)
    honest = ltm.infer(input_ids)
    for changes in ({"beta": 0.0}, {"free_bits": 100.0}):
        model = small_model("ltm", **changes)
        assert torch.equal(model.infer(input_ids).mean, honest.mean)
        beta, free = changes.get("beta", 1.0), changes.get("free_bits", 0.0)
        expected = infer(
            model, input_ids, learning_rate=partial(model._inference_rate, 0.0), beta=beta, charge=free_of(free)
        )
        assert torch.equal(model.train().infer(input_ids).mean, expected.mean)
        assert not torch.equal(expected.mean, honest.mean)


# ---- rows stand alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "toy", [linear_gaussian, three_verbs, lambda: small_model("ltm")], ids=["linear", "own", "ltm"]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_and_padding_change_nothing(toy, side):
    model, input_ids, lengths = toy(), texts(4, 10), [10, 7, 3, 1]
    alone = [infer(model, input_ids[row : row + 1, : max(length, 2)]) for row, length in enumerate(lengths)]
    posterior = infer(model, *padded(input_ids, lengths, side, total=13))
    for row, length in enumerate(lengths):
        if length > 1:
            torch.testing.assert_close(posterior.mean[row], alone[row].mean[0], atol=2e-5, rtol=0)
            torch.testing.assert_close(posterior.stddev[row], alone[row].stddev[0], atol=2e-5, rtol=0)


def test_order_of_the_batch_changes_nothing(ltm):
    input_ids, mask = padded(texts(5, 8), [8, 3, 5, 8, 2], "right")
    order = torch.tensor([3, 0, 4, 2, 1])
    straight, shuffled = infer(ltm, input_ids, mask), infer(ltm, input_ids[order], mask[order])
    torch.testing.assert_close(straight.mean[order], shuffled.mean, atol=2e-5, rtol=0)


# ---- whatever its caller does ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    "toy", [linear_gaussian, three_verbs, lambda: small_model("ltm")], ids=["linear", "own", "ltm"]
)
def test_grad_modes_change_nothing(toy, inside):
    model = toy()
    expected = infer(model, texts(2, 6))
    with inside():
        input_ids = texts(2, 6)  # under inference_mode these are inference tensors, too
        start = tuple(torch.zeros(2, 2, *expected.event_shape))
        found = infer(model, input_ids, torch.ones_like(input_ids), start=start)
        assert torch.equal(found.mean, expected.mean) and torch.equal(found.stddev, expected.stddev)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert modes == (inside is torch.enable_grad, inside is torch.inference_mode)


def test_the_ltm_under_inference_mode(ltm):
    input_ids = texts(2, 6)
    expected = ltm(input_ids)
    with torch.inference_mode():
        found = ltm(texts(2, 6))
    assert torch.equal(found.loss, expected.loss.detach())


@contextmanager
def raising_on_call(model, number):
    original, calls = model.log_likelihood, []

    def log_likelihood(*args):
        calls.append(args)
        if len(calls) == number:
            raise ArithmeticError("midway")
        return original(*args)

    model.log_likelihood = log_likelihood
    yield
    del model.log_likelihood


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode, nullcontext])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(outside, fails):
    model = small_model("ltm", dropout=0.1).train()
    model.layers[0].eval()  # half of it in one mode
    model.layers[1].feed_forward.eval()
    model.norm.weight.requires_grad_(False)  # and some weights frozen
    model.layers[1].self_attention.query.weight.requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5) if number % 2 else None

    def state():
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
            [parameter.detach().clone() for parameter in model.state_dict().values()],
            torch.get_rng_state(),
            torch.is_grad_enabled(),
        )

    before = state()
    with outside():
        if fails:
            with raising_on_call(model, 3), pytest.raises(ArithmeticError):
                infer(model, texts(2, 6))
        else:
            infer(model, texts(2, 6))
    for now, then in zip(state(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


# ---- where gradients go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["prior", "fixed"])
def test_the_result_is_detached(start):
    model = small_model("ltm", inference_start=start).train()
    posterior = model.infer(texts(2, 6))
    assert not posterior.mean.requires_grad and not posterior.stddev.requires_grad
    assert posterior.mean.is_leaf


def test_the_starts():
    none = {"inference_steps": 0, "inference_start_log_variance": -2.0}
    expected = {"prior": 1.0, "fixed": 2.718281828**-1, "learned": 2.718281828**-1}
    for start, deviation in expected.items():
        posterior = small_model("ltm", inference_start=start, **none).infer(texts(2, 6))
        assert torch.equal(posterior.mean, torch.zeros_like(posterior.mean))
        torch.testing.assert_close(posterior.stddev, torch.full_like(posterior.mean, deviation))


def test_a_learned_start_gets_the_gradient_of_the_final_moments():
    model = small_model("ltm", inference_start="learned", inference_start_log_variance=-1.0).train()
    model.zero_grad()
    posterior = model.infer(texts(3, 6))
    mean, log_variance = posterior.mean, 2 * posterior.stddev.log()
    weight = torch.randn(2, *mean.shape, generator=torch.Generator().manual_seed(0))
    # of an arbitrary function of (μ, log σ²)
    value = (weight[0] * mean.sin() + weight[1] * log_variance).sum()
    value.backward()
    expected_mean = (weight[0] * mean.detach().cos()).sum(0)
    torch.testing.assert_close(model.start_mean.grad, expected_mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.start_log_variance.grad, weight[1].sum(0), atol=1e-6, rtol=1e-6)
    others = {"start_mean", "start_log_variance"}
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in others)


def test_straight_through_is_exact_for_each_row():
    model, input_ids = linear_gaussian(), texts(2, 6)
    start = [torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in (0, 1)]
    straight = infer(model, input_ids, start=tuple(start))
    detached = infer(model, input_ids, start=tuple(part.detach() for part in start))
    assert torch.equal(straight.mean, detached.mean) and torch.equal(straight.stddev, detached.stddev)
    gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.autograd.grad(straight.mean, start[0], gradient)[0], gradient)
    expected = gradient * 0.5 * straight.stddev.detach()
    (found,) = torch.autograd.grad(straight.stddev, start[1], gradient)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_weights_learn_from_the_slow_step_alone(dropout):
    """forward(...).backward() against z detached by hand, drawn with the same noise: equal to the last digit.

    With dropout both passes draw it from torch's generator, so they only agree if the fast loop draws nothing.
    """
    model = small_model("ltm", dropout=dropout).train()
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "right")
    torch.manual_seed(3)
    model(input_ids, mask, seed=11).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    posterior = model.infer(input_ids, mask, seed=11)
    noise = sequence_noise(sequence_keys(input_ids, mask), tuple(posterior.event_shape), seed=11, stream=Stream.SCORE)
    z = sample_from_noise(posterior, noise).detach()
    model.zero_grad()
    torch.manual_seed(3)
    (-model.log_likelihood(z, input_ids, mask).sum() / int(mask[:, 1:].sum())).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.grad), name
        assert bool((parameter.grad != 0).any()), name


class CountedLinear(nn.Linear):
    """Notes at each backward pass whether a gradient of the weight was asked for."""

    def forward(self, x):
        return _Counted.apply(x, self.weight, self.asked)


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, asked):
        ctx.save_for_backward(x, weight)
        ctx.asked = asked
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        ctx.asked.append(ctx.needs_input_grad[1])
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return gradient @ weight, of_weight, None


def test_the_fast_loop_computes_no_gradient_of_weights():
    model = small_model("ltm").train()
    asked: list[bool] = []
    for name, module in list(model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            counted = CountedLinear(module.in_features, module.out_features, bias=False)
            counted.weight, counted.asked = module.weight, asked
            setattr(model.layers.get_submodule(parent), child, counted)
    loss = model(texts(2, 6)).loss
    linears = sum(isinstance(module, CountedLinear) for module in model.modules())
    # layer 0's self-attention and its query to the latents stand before any latent: no gradient reaches them
    assert linears == 22 and len(asked) == 4 * (linears - 5)
    assert not any(asked)
    asked.clear()
    loss.backward()
    assert len(asked) == linears and all(asked)


def test_dropout_is_off_in_the_fast_loop_and_on_in_the_slow_step():
    model = small_model("ltm", dropout=0.1).train()
    modes = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, *_: modes.append(module.training))
    posterior = model.infer(texts(2, 6))
    assert len(modes) == 1 + 4 * 5 and not any(modes)  # of the first attention once for all steps
    modes.clear()
    model.log_likelihood(posterior.mean, texts(2, 6))
    assert len(modes) == 6 and all(modes)
    # and attention's own dropout, which is no module
    assert torch.equal(posterior.mean, model.eval().infer(texts(2, 6)).mean)


def test_free_bits_need_a_prior_that_factorises():
    model = linear_gaussian()
    model.prior = lambda *args: torch.distributions.MultivariateNormal(torch.zeros(2, 3), torch.eye(3))
    with pytest.raises(TypeError, match="factorise"):
        infer(model, texts(2, 4), charge=free_of(0.1), start=(torch.zeros(2, 3), torch.zeros(2, 3)))


def test_kl_per_dimension_is_what_free_bits_floors():
    """The reference loop above has its own formula; this ties it to the library's."""
    mean, log_variance = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    ours = kl_per_dimension(diagonal_gaussian(mean, log_variance), standard_normal(4, (3,)))
    torch.testing.assert_close(ours, 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance))
