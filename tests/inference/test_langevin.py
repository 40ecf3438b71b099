"""Langevin dynamics. On `LinearGaussian` a run is a linear recursion whose law is known at every step."""

from contextlib import nullcontext

import pytest
import torch
from tests.toy import VOCABULARY, linear_gaussian, moved, padded, small_model, texts, three_verbs
from torch.distributions import Normal

from latentlm import InputError, LatentLM, LatentLMConfig
from latentlm.distributions import RBF, GaussianProcess, Stream, diagonal_gaussian, sequence_keys, sequence_noise
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


# ---- in the noise of a smooth process --------------------------------------------------------------------------------


class Measured(LatentLM):
    """Token t measures each of 2 dimensions of z_t, a smooth process, with a precision of its own.

    Its likelihood is a density of what was measured. In z the posterior's precision has eigenvalues from about 1 to
    1 / nugget; in the noise w of z = L w, from 1 to about 10.
    """

    config_class = LatentLMConfig
    dim, nugget = 2, 1e-4

    def __init__(self, config):
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        self.kernel = RBF(4.0)
        self.register_buffer("value", torch.randn(config.vocab_size, self.dim, generator=generator))
        self.register_buffer("precision", 0.3 + torch.rand(config.vocab_size, generator=generator))
        self.post_init()

    def prior(self, batch_size, lengths, condition=None):
        lengths = torch.as_tensor(lengths).expand(batch_size)
        times = torch.arange(int(lengths.max())).double()
        return GaussianProcess(self.kernel, times, self.dim, self.nugget, lengths=lengths)

    def log_likelihood(self, latents, input_ids, attention_mask=None, condition=None):
        tokens = input_ids[:, 1:]
        scale = self.precision[tokens].rsqrt()[..., None]
        log_density = Normal(latents, scale).log_prob(self.value[tokens]).sum(-1)
        return log_density.masked_fill(~self.scored_tokens(input_ids, attention_mask), 0.0)

    def exact(self, input_ids, length):
        """Of rows of one length, in float64: Σ, Σ⁻¹ + R⁻¹ and the posterior's mean [batch, length, dim]."""
        tokens, times = input_ids[:, 1 : length + 1], torch.arange(length).double()
        covariance = self.kernel(times[:, None] - times)[0].detach() + self.nugget * torch.eye(length).double()
        measured = torch.diag_embed(self.precision[tokens].double())
        gain = torch.linalg.solve(covariance + measured.inverse(), covariance.expand_as(measured)).mT
        precision = covariance.inverse() + measured
        return covariance, precision, gain @ self.value[tokens].double()


def measured():
    return Measured(LatentLMConfig(vocab_size=VOCABULARY)).eval()


def test_every_step_is_the_recursion_of_the_noise():
    """w ← w + s (Lᵀ R⁻¹ (y − L w) − w) + √(2 s τ) ε, for rows of their own lengths, with torch's L in float64."""
    model, lengths, step_size = measured(), [13, 6, 2], 0.05
    input_ids, mask = padded(texts(3, 13), lengths, "right")
    keys = sequence_keys(input_ids, mask)
    w = sequence_noise(keys, (12, 2), seed=5, stream=Stream.LANGEVIN).double()
    for steps in range(4):
        found = run(model, input_ids, mask, steps=steps, step_size=step_size, seed=5).double()
        noise = sequence_noise(keys, (12, 2), seed=5, stream=Stream.LANGEVIN, step=steps + 1).double()
        for row, length in enumerate(n - 1 for n in lengths):
            factor = torch.linalg.cholesky(model.exact(input_ids[row : row + 1], length)[0])
            tokens, own = input_ids[row, 1 : length + 1], w[row, :length]
            torch.testing.assert_close(found[row, :length], factor @ own, atol=1e-5, rtol=0)
            assert bool((found[row, length:] == 0).all())
            missed = model.precision[tokens].double()[:, None] * (model.value[tokens].double() - factor @ own)
            w[row, :length] = own + step_size * (factor.T @ missed - own) + (2 * step_size) ** 0.5 * noise[row, :length]


def test_many_chains_of_a_smooth_process_have_the_exact_mean_and_nearly_the_variance():
    """1,500 texts, each in its own stationary deviations: of precision P in w, a covariance of (P (1 − s P / 2))⁻¹."""
    model, step_size, number = measured(), 0.04, 1500
    input_ids = texts(number, 13)
    found = run(model, input_ids, steps=150, step_size=step_size).double()
    covariance, precision, mean = model.exact(input_ids, 12)
    factor = torch.linalg.cholesky(covariance)
    of_noise = factor.T @ precision @ factor
    assert (1 - step_size) ** 150 < 5e-3 and float(torch.linalg.eigvalsh(of_noise).max()) * step_size < 0.6
    # exactly normal in the stationary law of the steps
    values, vectors = torch.linalg.eigh(of_noise)
    white = vectors.mT @ torch.linalg.solve_triangular(factor, found - mean, upper=False)
    standard = white * (values * (1 - step_size * values / 2)).sqrt()[..., None]
    assert bool((standard.mean(0).abs() < 5 / number**0.5).all())
    assert bool((standard.var(0) - 1).abs().max() < 5 * (2 / number) ** 0.5)
    # and the posterior's own, but for the steps' length
    deviation = precision.inverse().diagonal(dim1=-2, dim2=-1).sqrt()[..., None]
    own = (found - mean) / deviation
    assert bool((own.mean(0).abs() < 5 * 1.2 / number**0.5).all())
    assert 0.98 < float(own.square().mean()) < 1.25


def test_chains_of_a_smooth_process_arrive_where_chains_in_z_have_hardly_left():
    """A chain in z is steady for steps below 2 / λ, of its precision's largest λ: here 2e-4."""
    model, input_ids, steps = measured(), texts(4, 13), 120
    covariance, precision, mean = model.exact(input_ids, 12)
    start = torch.full((4, 12, 2), 3.0)
    largest, least = (float(values) for values in torch.linalg.eigvalsh(precision).aminmax()[::-1])
    assert 2 / largest < 3e-4 and least < 2.0
    z = torch.linalg.cholesky(covariance) @ start.double()
    far = (z - mean).norm()
    for _ in range(steps):
        z = z + (1 / largest) * precision @ (mean - z)
    assert float((z - mean).norm()) > 0.9 * float(far)
    found = run(model, input_ids, start=start, steps=steps, step_size=0.1, temperature=0.0)
    assert float((found.double() - mean).norm()) < 1e-3 * float(far)


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
