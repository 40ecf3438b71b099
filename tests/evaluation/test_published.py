"""The published protocol against one text at a time, and what it is: no bound, and a mean of exponentials."""

import math

import pytest
import torch
from tests.toy import Rows, linear_gaussian, prior_latents, small_model, texts, three_verbs

from latentlm import InputError
from latentlm.distributions import Stream, sequence_keys, sequence_noise
from latentlm.evaluation.published import published_figures

LENGTHS = (9, 3, 12, 5)


@pytest.fixture(scope="module")
def rows():
    return [row[:length] for row, length in zip(texts(4, 12), LENGTHS, strict=True)]


def figures_of(nlls):
    """As figures: Σ nats ÷ Σ tokens, and the mean of exp(nats ÷ tokens)."""
    tokens = [length - 1 for length in LENGTHS]
    each = [math.exp(nll / count) for nll, count in zip(nlls, tokens, strict=True)]
    return {"published_nll_per_token": sum(nlls) / sum(tokens), "published_perplexity": sum(each) / len(each)}


def slow_published_nll(model, row, seed):
    """Adam written out (rates of Kong et al. 2025, appendix A.2), on one text, with one noise throughout."""
    config = model.config
    shape = (1, *model.latent_shape)
    noise = sequence_noise(sequence_keys(row[None]), model.latent_shape, seed=seed, stream=Stream.INFERENCE)
    mean, log_variance = torch.zeros(shape), torch.zeros(shape)
    moments = [[torch.zeros(shape), torch.zeros(shape)] for _ in range(2)]

    def loss(mean, log_variance):
        z = mean + (log_variance / 2).exp() * noise
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return kl - model.log_likelihood(z, row[None]).sum()

    for step in range(1, config.inference_steps + 1):
        q = [part.detach().requires_grad_() for part in (mean, log_variance)]
        gradients = torch.autograd.grad(loss(*q), q)
        moved = []
        for part, gradient, moment in zip(q, gradients, moments, strict=True):
            moment[0] = 0.9 * moment[0] + 0.1 * gradient
            moment[1] = 0.95 * moment[1] + 0.05 * gradient.square()
            first, second = moment[0] / (1 - 0.9**step), moment[1] / (1 - 0.95**step)
            moved.append(part.detach() - 0.3 * first / (second.sqrt() + config.inference_epsilon))
        mean, log_variance = moved
    return float(loss(mean, log_variance).detach())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_ltm_is_scored_with_the_noise_that_it_was_fitted_to(rows, batch_size):
    model = small_model("ltm", inference_lr_final=None, inference_epsilon=0.1)
    expected = figures_of([slow_published_nll(model, row, seed=3) for row in rows])
    found = published_figures(model, Rows(rows), batch_size=batch_size, seed=3)
    assert found == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"memory_per_layer": 2, "memory_size": 8}])
def test_a_control_has_its_likelihood_and_a_mean_of_exponentials(rows, changes):
    model = small_model("autoregressive", **changes)
    nlls = [-float(model.log_likelihood(prior_latents(model, row[None]), row[None]).sum()) for row in rows]
    found = published_figures(model, Rows(rows), batch_size=3)
    assert found == pytest.approx(figures_of(nlls), rel=1e-4)
    # by Jensen's inequality, and here by far, since the texts differ
    assert found["published_perplexity"] > math.exp(sum(nlls) / sum(LENGTHS) - 4 / sum(LENGTHS)) * 1.01


def test_an_amortised_q_is_scored_as_it_is(rows):
    """No steps: the score alone has the noise of the inference."""
    model = small_model("ltm", inference="amortised")
    model.encoder.moments.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    nlls = []
    with torch.no_grad():
        for row in rows:
            q = model.infer(row[None])
            noise = sequence_noise(sequence_keys(row[None]), model.latent_shape, seed=0, stream=Stream.INFERENCE)
            kl = 0.5 * (q.mean.square() + q.variance - 1 - q.variance.log()).sum()
            nlls.append(float(kl - model.log_likelihood(q.mean + q.stddev * noise, row[None]).sum()))
    assert published_figures(model, Rows(rows), batch_size=2) == pytest.approx(figures_of(nlls), rel=1e-4)


@pytest.mark.parametrize("make", [three_verbs, linear_gaussian])
def test_another_family_has_no_published_protocol(rows, make):
    with pytest.raises(InputError, match=f"no published protocol is known for {type(make()).__name__}"):
        published_figures(make(), Rows(rows))


def test_the_model_stays_as_it_was(rows):
    model = small_model("ltm").train()
    state, told = torch.get_rng_state(), []
    published_figures(model, Rows(rows), batch_size=3, on_progress=lambda *step: told.append(step))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert told == [(3, 4), (4, 4)]
