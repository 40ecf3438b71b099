"""Langevin dynamics. On `LinearGaussian` a run is a linear recursion whose law is known at every step."""

from contextlib import nullcontext

import pytest
import torch
from tests.toy import linear_gaussian, moved, padded, small_model, texts, three_verbs
from torch.distributions import Normal

from latentlm import InputError
from latentlm.distributions import Stream, diagonal_gaussian, sequence_keys, sequence_noise
from latentlm.inference import langevin

TOYS = pytest.mark.parametrize(
    "toy",
    [linear_gaussian, three_verbs, lambda: moved(small_model("ltm", latent_prior="diagonal"))],
    ids=["linear", "own", "ltm"],
)


def run(model, input_ids, attention_mask=None, *, steps=5, step_size=0.1, **options):
    return langevin(model, input_ids, attention_mask, steps=steps, step_size=step_size, **options)


# ---- it samples the posterior ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.25, 4.0])
def test_the_stationary_law_of_unadjusted_steps(temperature):
    """3,000 texts of noise of their own, each measured in its own stationary deviations.

    z' = (1 − s/v) z + √(2 s τ) ε about the posterior's mean has variance τ v / (1 − s/2v).
    """
    model, step_size = linear_gaussian(), 0.2
    input_ids, mask = padded(texts(3000, 9), [9, 7, 5] * 1000, "left")
    mean, variance = model.exact_posterior(input_ids, mask)
    stationary = temperature * variance / (1 - step_size / (2 * variance))
    assert (stationary / (temperature * variance)).max() > 1.4  # far enough from the posterior's own to tell
    found = run(model, input_ids, mask, steps=40, step_size=step_size, temperature=temperature)
    assert ((1 - step_size / variance).abs() ** 40).max() < 1e-3
    standard = ((found - mean) / stationary.sqrt()).view(1000, 3, 3)
    # of each length: 1,000 chains and 3 coordinates
    assert (standard.mean((0, 2)).abs() < 4 / 3000**0.5).all()
    assert ((standard.var((0, 2)) - 1).abs() < 4 * (2 / 3000) ** 0.5).all()
    # and its shape is normal
    for point in (-1.0, 0.0, 1.5):
        assert abs((standard < point).double().mean() - Normal(0, 1).cdf(torch.tensor(point))) < 4 * 0.5 / 9000**0.5


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_every_step_is_the_recursion(temperature):
    """In float64, with the exact posterior's gradient (m − z) / v."""
    model = linear_gaussian()
    input_ids, mask = padded(texts(4, 9), [9, 6, 2, 1], "right")
    mean, variance = model.exact_posterior(input_ids, mask)
    keys = sequence_keys(input_ids, mask)
    z = sequence_noise(keys, (3,), seed=5, stream=Stream.LANGEVIN).double()
    for steps in range(1, 6):
        noise = sequence_noise(keys, (3,), seed=5, stream=Stream.LANGEVIN, step=steps).double()
        z = z + 0.1 * (mean - z) / variance + (0.2 * temperature) ** 0.5 * noise
        found = run(model, input_ids, mask, steps=steps, temperature=temperature, seed=5)
        torch.testing.assert_close(found.double(), z, atol=1e-5, rtol=0)


def test_without_temperature_it_climbs_to_the_mode():
    model, input_ids = linear_gaussian(), texts(5, 9)
    mean, _ = model.exact_posterior(input_ids)
    found = run(model, input_ids, steps=150, temperature=0.0)
    torch.testing.assert_close(found.double(), mean, atol=1e-5, rtol=0)


def test_too_long_a_step_diverges():
    """Above 2v, as its docstring says: with v ≤ 1 a step of 2.2 always."""
    found = run(linear_gaussian(), texts(5, 9), steps=12, step_size=2.2, temperature=0.0)
    assert found.abs().max() > 1e3


# ---- where it starts, and its noise ----------------------------------------------------------------------------------


@TOYS
def test_it_starts_at_a_sample_of_the_prior(toy):
    model, input_ids = toy(), texts(3, 6)
    found = run(model, input_ids, steps=0, seed=4)
    prior = model.prior(3, 5)
    noise = sequence_noise(sequence_keys(input_ids), prior.event_shape, seed=4, stream=Stream.LANGEVIN)
    assert torch.equal(found, prior.mean + prior.stddev * noise)


def test_a_start_is_kept_and_not_changed():
    model, start = linear_gaussian(), torch.full((2, 3), 7.0)
    assert torch.equal(run(model, texts(2, 6), start=start, steps=0), start)
    moved_on = run(model, texts(2, 6), start=start)
    assert not torch.equal(moved_on, start) and torch.equal(start, torch.full((2, 3), 7.0))


def test_the_prior_pulls():
    """A text of BOS alone leaves the prior, here N(3, 1/4), and no likelihood."""
    model = linear_gaussian()
    model.prior = lambda batch, *rest: diagonal_gaussian(torch.full((batch, 3), 3.0), torch.full((batch, 3), -1.386))
    found = run(model, texts(2, 1), steps=60, temperature=0.0, start=torch.zeros(2, 3))
    torch.testing.assert_close(found, torch.full((2, 3), 3.0), atol=1e-5, rtol=0)


@TOYS
def test_a_seed_repeats_itself_and_leaves_the_generator_alone(toy):
    model, input_ids = toy(), texts(3, 6)
    before = torch.get_rng_state()
    first = run(model, input_ids, seed=3)
    assert torch.equal(first, run(model, input_ids, seed=3))
    assert (first != run(model, input_ids, seed=4)).all()
    assert torch.equal(torch.get_rng_state(), before)


# ---- rows stand alone ------------------------------------------------------------------------------------------------


@TOYS
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_order_and_padding_change_nothing(toy, side):
    model, input_ids, lengths = toy(), texts(4, 10), [10, 7, 3, 2]
    together = run(model, *padded(input_ids, lengths, side, total=13))
    for row, length in enumerate(lengths):
        alone = run(model, input_ids[row : row + 1, :length])[0]
        torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=0)
    order = [2, 0, 3, 1]
    shuffled = run(model, *padded(input_ids[order], [lengths[row] for row in order], side))
    torch.testing.assert_close(shuffled, together[order], atol=2e-5, rtol=0)


# ---- whatever its caller does ----------------------------------------------------------------------------------------


@TOYS
@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
def test_grad_modes_change_nothing(toy, inside):
    model = toy()
    expected = run(model, texts(2, 6), torch.ones(2, 6, dtype=torch.int64))
    from_start = run(model, texts(2, 6), start=torch.ones_like(expected))
    with inside():
        input_ids = texts(2, 6)  # under inference_mode these are inference tensors, too
        assert torch.equal(run(model, input_ids, torch.ones_like(input_ids)), expected)
        assert torch.equal(run(model, input_ids, start=torch.ones_like(expected)), from_start)
        assert torch.is_inference_mode_enabled() == (inside is torch.inference_mode)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode, nullcontext])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(outside, fails):
    model = small_model("ltm", dropout=0.1, latent_prior="diagonal").train()
    model.layers[0].eval()  # half of it in one mode
    model.norm.weight.requires_grad_(False)

    def states():
        flags = [parameter.requires_grad for parameter in model.parameters()]
        return flags, [module.training for module in model.modules()]

    before, during = states(), []
    original = model.log_likelihood

    def log_likelihood(*args):
        during.append(states())
        if fails and len(during) == 3:
            raise ArithmeticError("midway")
        return original(*args)

    model.log_likelihood = log_likelihood
    with outside(), pytest.raises(ArithmeticError) if fails else nullcontext():
        run(model, texts(2, 6))
    assert len(during) == (3 if fails else 5)
    assert not any(flag for flags in during for kind in flags for flag in kind)
    assert states() == before
    assert all(parameter.grad is None for parameter in model.parameters())


@TOYS
def test_samples_carry_no_gradient(toy):
    model = toy().train()
    start = torch.zeros(2, *model.prior(2, 5).event_shape, requires_grad=True)
    for found in (run(model, texts(2, 6)), run(model, texts(2, 6), start=start)):
        assert found.grad_fn is None and not found.requires_grad and found.dtype == torch.float32
    assert start.grad is None and all(parameter.grad is None for parameter in model.parameters())


def test_weights_of_bfloat16_give_samples_of_float32():
    model = small_model("ltm").bfloat16()
    found = run(model, texts(2, 6))
    assert found.dtype == torch.float32 and torch.isfinite(found).all()


def test_a_batch_of_one_and_a_text_of_one_token():
    model = linear_gaussian()
    for input_ids in (texts(1, 2), texts(1, 1)):
        assert run(model, input_ids).shape == (1, 3)


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"step_size": 0.0}, {"step_size": -1.0}, {"temperature": -1.0}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(InputError, match="step_size above 0"):
        langevin(linear_gaussian(), texts(2, 5), **{"steps": 2, "step_size": 0.1, **wrong})


def test_chains_that_diverge_are_no_samples():
    with pytest.raises(InputError, match="chains diverged"):
        langevin(linear_gaussian(), texts(2, 5), steps=200, step_size=1e6)
