from dataclasses import fields
from functools import partial
from itertools import product

import pytest
import torch
from tests.toy import (
    BOS,
    VARIANTS,
    padded,
    prior_latents,
    small_config,
    small_model,
    small_variant,
    texts,
    three_verbs,
)
from torch.distributions import kl_divergence
from transformers import AutoModel

from latentlm import LTM, InputError, LTMConfig
from latentlm.distributions import Stream, diagonal_gaussian, kl_per_dimension, sequence_keys, sequence_noise
from latentlm.inference import infer_by_gradient, langevin
from latentlm.latent_lm import number_of_parameters
from latentlm.objective import free_bits

OBJECTIVES = [{}, {"beta": 0.3}, {"free_bits": 0.4}, {"beta": 2.0, "free_bits": 0.2}]


def score_noise(model, input_ids, mask, seed):
    return sequence_noise(sequence_keys(input_ids, mask), model.latent_shape, seed=seed, stream=Stream.SCORE)


def divergence(mean, log_variance, prior_mean=0.0, prior_log_variance=0.0):
    """KL of two Gaussians for each number, in closed form."""
    prior_log_variance = torch.as_tensor(prior_log_variance)
    ratio = (log_variance - prior_log_variance).exp()
    shift = (mean - prior_mean) ** 2 / prior_log_variance.exp()
    return 0.5 * (ratio + shift - 1 - log_variance + prior_log_variance)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, millions, layers, steps", [("small", 38.37, 3, 16), ("medium", 51.01, 6, 16), ("large", 76.28, 12, 64)]
)
def test_presets_are_the_papers(size, millions, layers, steps):
    config = LTMConfig.preset(size)
    with torch.device("meta"):
        model = LTM(config)
    assert round(number_of_parameters(model) / 1e6, 2) == millions
    assert (config.num_hidden_layers, config.inference_steps) == (layers, steps)
    assert model.latent_shape == (layers, 8, 512)


def test_a_preset_can_be_changed():
    config = LTMConfig.preset("small", inference_steps=2, vocab_size=100)
    assert (config.num_hidden_layers, config.inference_steps, config.vocab_size) == (3, 2, 100)
    with pytest.raises(InputError, match="inference_steps"):
        LTMConfig.preset("small", inference_stepz=2)


def test_new_weights_are_as_large_as_the_config_says():
    model = small_model("ltm", hidden_size=64, initializer_range=0.05)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert abs(parameter.std() / 0.05 - 1) < 0.1, name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


# ---- latents ---------------------------------------------------------------------------------------------------------


def test_prior(ltm):
    prior = ltm.prior(5, 7)
    assert prior.batch_shape == (5,) and prior.event_shape == (2, 3, 8)
    assert torch.equal(prior.mean, torch.zeros(5, 2, 3, 8)) and torch.equal(prior.stddev, torch.ones(5, 2, 3, 8))
    assert torch.equal(ltm.prior(2, torch.tensor([3, 4])).mean, prior.mean[:2])


def test_latents_of_a_layer_enter_that_layer_alone():
    """What goes into each block, for latents that differ in one layer."""
    model = small_model("ltm", num_hidden_layers=3)
    entered = []
    for block in model.layers:
        block.register_forward_hook(
            lambda block, args, x: entered.append((args[0].clone(), args[4].clone(), x.clone()))
        )
    input_ids = texts(2, 6)
    latents = prior_latents(model, input_ids)
    model.log_likelihood(latents, input_ids)
    before, entered[:] = list(entered), []
    for layer in range(3):
        assert torch.equal(before[layer][1], latents[:, layer])
        changed = latents.clone()
        changed[:, layer] += 1
        model.log_likelihood(changed, input_ids)
        for other in range(3):
            assert torch.equal(entered[other][0], before[other][0]) == (other <= layer)
            assert torch.equal(entered[other][2], before[other][2]) == (other < layer)
        entered.clear()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_latent_changes_every_logit(ltm, layer, index):
    input_ids = texts(2, 6)
    latents = prior_latents(ltm, input_ids)
    changed = latents.clone()
    changed[:, layer, index] += 1
    difference = (ltm.decode(changed, input_ids) - ltm.decode(latents, input_ids)).abs().amax(-1)
    assert (difference > 1e-4).all()


def test_latents_of_a_row_are_its_own(ltm):
    input_ids = texts(2, 6)
    latents = prior_latents(ltm, input_ids)
    changed = latents.clone()
    changed[1] += 1
    assert torch.equal(ltm.decode(changed, input_ids)[0], ltm.decode(latents, input_ids)[0])


@pytest.mark.parametrize("number, context", [(1, 10), (4, 32), (3, 32), (8, 1024)])
def test_latents_stand_evenly_in_the_context(number, context):
    model = small_model("ltm", latents_per_layer=number, max_position_embeddings=context)
    positions = model._spread(number)[0]
    assert positions.shape == (number,)
    assert positions[0] > 0 and positions[-1] < context
    assert torch.allclose(positions.diff(), torch.full((number - 1,), context / number))
    assert positions[0] == pytest.approx(context - float(positions[-1]), abs=1e-3)


def test_latents_of_another_shape_are_not_silently_used(ltm):
    input_ids = texts(2, 6)
    for shape in [(2, 2, 3, 7), (2, 1, 3, 8)]:
        with pytest.raises(Exception):  # noqa: B017
            ltm.log_likelihood(torch.zeros(shape), input_ids)


@pytest.mark.parametrize("shape", [(2, 3, 3, 8), (2, 2, 1, 8)])
def test_latents_that_broadcast_are_refused(ltm, shape):
    with pytest.raises(InputError):
        ltm.log_likelihood(torch.zeros(shape), texts(2, 6))


def test_given_latents_probabilities_of_all_texts_sum_to_one():
    """All 5³ texts of three tokens of five, for each of two latents."""
    model = small_model("ltm", vocab_size=5)
    input_ids = torch.tensor([[BOS, *text] for text in product(range(5), repeat=3)])
    latents = prior_latents(model, input_ids[:2])[:, None].expand(2, 125, -1, -1, -1)
    total = model.log_likelihood(latents, input_ids).sum(-1).double().exp().sum(-1)
    assert ((total - 1).abs() < 1e-6).all()


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_tied_embeddings_stay_tied_after_loading(ltm, tmp_path):
    assert ltm.lm_head.weight.data_ptr() == ltm.embed_tokens.weight.data_ptr()
    ltm.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert number_of_parameters(loaded) == number_of_parameters(ltm)


def test_untied_embeddings_stay_untied(tmp_path):
    model = small_model("ltm", tie_word_embeddings=False)
    assert model.lm_head.weight is not model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.embed_tokens.weight)


def test_a_learned_start_is_kept(tmp_path):
    model = small_model("ltm", inference_start="learned", inference_start_log_variance=-1.0)
    assert (model.start_log_variance == -1).all() and (model.start_mean == 0).all()
    torch.nn.init.normal_(model.start_mean)
    torch.nn.init.normal_(model.start_log_variance)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.start_mean, model.start_mean)
    assert torch.equal(loaded.start_log_variance, model.start_log_variance)
    assert torch.equal(loaded(texts(2, 5)).loss, model(texts(2, 5)).loss)


def test_a_loaded_model_infers_at_the_rate_of_its_moment(tmp_path):
    model = small_model("ltm", inference_lr=0.3, inference_lr_final=0.05)
    early = model(texts(2, 5)).posterior_mean
    model.training_progress.fill_(1.0)
    late = model(texts(2, 5)).posterior_mean
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(texts(2, 5)).posterior_mean, late)
    assert not torch.equal(early, late)


# ---- inference -------------------------------------------------------------------------------------------------------


def test_inference_reads_the_text_it_is_given(ltm):
    input_ids, mask = padded(texts(2, 8), [8, 5], "right")
    other = input_ids.clone()
    other[0, 3] += 1
    other[1, 6:] = 7  # padding
    changed = (ltm.infer(other, mask).mean != ltm.infer(input_ids, mask).mean).flatten(1).any(1)
    assert changed.tolist() == [True, False]


def test_the_seed_chooses_the_noise_of_inference(ltm):
    input_ids = texts(2, 8)
    assert torch.equal(ltm.infer(input_ids, seed=1).mean, ltm.infer(input_ids, seed=1).mean)
    assert not torch.equal(ltm.infer(input_ids, seed=1).mean, ltm.infer(input_ids, seed=2).mean)


# ---- an encoder ------------------------------------------------------------------------------------------------------


def encoded(model, input_ids, mask=None):
    return model.encoder(model.embed_tokens(input_ids), mask)


def test_a_new_encoder_says_nothing_of_the_text():
    model = small_model("ltm", inference="amortised", inference_start_log_variance=-0.7)
    posterior = model.infer(texts(3, 6))
    assert torch.equal(posterior.mean, torch.zeros(3, 2, 3, 8))
    torch.testing.assert_close(posterior.variance.log(), torch.full((3, 2, 3, 8), -0.7))


def test_an_amortised_q_is_the_encoders():
    model = small_variant("amortised")
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "left")
    mean, log_variance = encoded(model, input_ids, mask)
    posterior = model.infer(input_ids, mask)
    assert posterior.mean.shape == (3, 2, 3, 8)
    assert torch.equal(posterior.mean, mean)
    torch.testing.assert_close(posterior.variance.log(), log_variance, atol=1e-6, rtol=0)
    # which is another for each text and each vector, and reads every token
    assert (torch.pdist(posterior.mean.flatten(0, 2)) > 1e-3).all()
    other = input_ids.clone()
    other[0, 0] += 1
    assert (model.infer(other, mask).mean[0] != posterior.mean[0]).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_amortised_encoder_climbs_the_training_objective(objective):
    """Value and every gradient against the objective written out."""
    model = small_variant("amortised", **objective).train()
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "right")
    output = model(input_ids, mask, seed=7)
    output.loss.backward()
    found = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    mean, log_variance = model.encoder(model.embed_tokens(input_ids).detach(), mask)
    z = mean + (0.5 * log_variance).exp() * score_noise(model, input_ids, mask, 7)
    kl, free = divergence(mean, log_variance), objective.get("free_bits", 0.0)
    charge = torch.where(kl < free, torch.full_like(kl, free), kl) if free else kl
    loss = (-model.log_likelihood(z, input_ids, mask).sum() + objective.get("beta", 1.0) * charge.sum()) / 13
    loss.backward()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(output.kl, kl.flatten(1).sum(1))
    torch.testing.assert_close(found, gradients(model), atol=1e-6, rtol=1e-4)
    assert all((gradient != 0).any() for gradient in found.values())


# ---- an encoder and gradient steps -----------------------------------------------------------------------------------


def steps_of(model):
    """How `infer_by_gradient` is to be called for a model in evaluation mode."""
    return {"steps": model.config.inference_steps, "learning_rate": partial(model._inference_rate, 0.0)}


def test_a_cooperative_q_is_steps_from_the_encoders():
    model = small_variant("cooperative", inference_steps=3, inference_epsilon=0.5)
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "left")
    mean, log_variance = encoded(model, input_ids, mask)
    expected = infer_by_gradient(
        model,
        input_ids,
        mask,
        start_mean=mean.detach(),
        start_log_variance=log_variance.detach(),
        epsilon=0.5,
        seed=2,
        **steps_of(model),
    )
    found = model.infer(input_ids, mask, seed=2)
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.stddev, expected.stddev)
    assert ((found.mean - mean).abs() > 1e-3).float().mean() > 0.9


def cooperative_objective(model, input_ids, mask, seed, objective):
    """Σ of each row's KL(q_T ‖ q_φ) − ELBO(q_φ), with the noise of step 0, and q_T."""
    beta, free = objective.get("beta", 1.0), objective.get("free_bits", 0.0)
    mean, log_variance = model.encoder(model.embed_tokens(input_ids).detach(), mask)
    final = infer_by_gradient(
        model,
        input_ids,
        mask,
        start_mean=mean.detach(),
        start_log_variance=log_variance.detach(),
        seed=seed,
        beta=beta,
        charge=lambda posterior, prior: free_bits(kl_per_dimension(posterior, prior), free),
        **steps_of(model),
    )
    noise = sequence_noise(sequence_keys(input_ids, mask), model.latent_shape, seed=seed, stream=Stream.INFERENCE)
    z = mean + (0.5 * log_variance).exp() * noise
    moments = (model.prior_mean, model.prior_log_variance) if hasattr(model, "prior_mean") else (0.0, 0.0)
    kl = divergence(mean, log_variance, *moments)
    charge = torch.where(kl < free, torch.full_like(kl, free), kl) if free else kl
    bound = model.log_likelihood(z, input_ids, mask).sum() - beta * charge.sum()
    to_final = divergence(final.mean, final.variance.log(), mean, log_variance).sum()
    return to_final - bound, final


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("prior", ["standard", "diagonal", "transformer"])
def test_cooperative_training_by_hand(objective, prior):
    """The value is the ELBO at q_T. The encoder learns from its own objective and from q_T, all else from z of q_T."""
    options = {"inference_steps": 3, "latent_prior": prior, **objective}
    model = small_variant("cooperative", **options).train()
    beta, free = objective.get("beta", 1.0), objective.get("free_bits", 0.0)
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "right")
    output = model(input_ids, mask, seed=7)
    output.loss.backward()
    found = {name: gradient.clone() for name, gradient in gradients(model).items()}

    model.zero_grad()
    encoder_loss, final = cooperative_objective(model, input_ids, mask, 7, objective)
    z = final.mean + final.stddev * score_noise(model, input_ids, mask, 7)
    # kernels sum in another order what is aligned otherwise in memory
    torch.testing.assert_close(output.latents, z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.posterior_mean, final.mean, atol=1e-5, rtol=1e-4)
    moments = (model.prior_mean, model.prior_log_variance) if prior == "diagonal" else (0.0, 0.0)
    kl = divergence(final.mean, final.variance.log(), *moments)
    charge = torch.where(kl < free, torch.full_like(kl, free), kl) if free else kl
    loss = (-model.log_likelihood(z, input_ids, mask).sum() + beta * charge.sum()) / 13
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(output.nll, -model.log_likelihood(z, input_ids, mask).sum(1))
    torch.testing.assert_close(output.kl, kl.flatten(1).sum(1))

    loss.backward()
    for name, gradient in gradients(model).items():
        if not name.startswith("encoder."):
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
            assert (gradient != 0).any(), name
    model.zero_grad()
    (encoder_loss / 13).backward()
    for name, gradient in gradients(model).items():
        if name.startswith("encoder."):
            torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-3)
            assert (gradient != 0).any(), name


def test_an_encoder_that_learns_leaves_the_rest_alone():
    """To the last digit: the gradient of all weights but the encoder's is that of z given."""
    model = small_variant("cooperative", dropout=0.2).train()
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "right")
    torch.manual_seed(3)
    output = model(input_ids, mask, seed=11)
    output.loss.backward()
    found = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    torch.manual_seed(3)
    encoded(model, input_ids, mask)  # draws its dropout first
    (-model.log_likelihood(output.latents.detach(), input_ids, mask).sum() / 13).backward()
    for name, gradient in gradients(model).items():
        if not name.startswith("encoder."):
            assert torch.equal(found[name], gradient), name


def test_cooperative_without_steps_is_amortised():
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "right")
    results = []
    for model in (small_variant("cooperative", inference_steps=0), small_variant("amortised")):
        evaluated = model(input_ids, mask)
        trained = model.train()(input_ids, mask, seed=7)
        trained.loss.backward()
        results.append([evaluated.loss, evaluated.kl, trained.loss, gradients(model)])
    torch.testing.assert_close(*results, atol=1e-7, rtol=1e-6)


# ---- priors ----------------------------------------------------------------------------------------------------------


def test_a_diagonal_prior_has_learned_moments():
    model = small_variant("diagonal prior")
    prior = model.prior(5, 7)
    assert prior.batch_shape == (5,) and prior.event_shape == (2, 3, 8)
    for row in range(5):
        assert torch.equal(prior.mean[row], model.prior_mean)
        torch.testing.assert_close(prior.variance[row].log(), model.prior_log_variance, atol=1e-6, rtol=0)
    new = small_model("ltm", latent_prior="diagonal").prior(2, 3)
    assert torch.equal(new.mean, torch.zeros(2, 2, 3, 8)) and torch.equal(new.stddev, torch.ones(2, 2, 3, 8))


def test_the_kl_to_a_diagonal_prior_and_its_gradient():
    model = small_variant("diagonal prior").train()
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "left")
    output = model(input_ids, mask, seed=1)
    posterior = model.infer(input_ids, mask, seed=1)
    mean, log_variance = posterior.mean, posterior.variance.log()
    kl = divergence(mean, log_variance, model.prior_mean, model.prior_log_variance)
    torch.testing.assert_close(output.kl, kl.flatten(1).sum(1))
    output.loss.backward()
    # ∂KL/∂m = (m − μ) / s², ∂KL/∂ log s² = (1 − (σ² + (μ − m)²) / s²) / 2
    variance, shift = model.prior_log_variance.detach().exp(), model.prior_mean.detach() - mean
    torch.testing.assert_close(model.prior_mean.grad, (shift / variance).sum(0) / 13)
    expected = 0.5 * (1 - (log_variance.exp() + shift**2) / variance).sum(0) / 13
    torch.testing.assert_close(model.prior_log_variance.grad, expected)


def test_inference_starts_at_a_diagonal_prior():
    model = small_variant("diagonal prior", inference_steps=0)
    found = model.infer(texts(2, 6))
    torch.testing.assert_close(found.mean, model.prior_mean.expand(2, -1, -1, -1), atol=0, rtol=0)
    torch.testing.assert_close(found.variance.log(), model.prior_log_variance.expand(2, -1, -1, -1), atol=1e-6, rtol=0)
    assert not found.mean.requires_grad


def test_steps_from_a_diagonal_prior_pay_the_kl_to_it():
    """A text of which nothing is scored stays at the prior, wherever that is, and comes to it from elsewhere."""
    model = small_variant("diagonal prior", inference_steps=40, inference_lr=0.2, inference_lr_decay=0.0)
    bos = texts(2, 1)
    torch.testing.assert_close(model.infer(bos).mean, model.prior_mean.expand(2, -1, -1, -1), atol=1e-5, rtol=0)
    model.change_inference(inference_start="fixed", inference_start_log_variance=-1.0)
    start = (model.prior_mean - 0.0).abs().mean()
    error = (model.infer(bos).mean - model.prior_mean).abs().mean()
    assert error < 0.1 * start


def test_a_new_transformer_prior_changes_nothing():
    plain, model = small_model("ltm"), small_model("ltm", latent_prior="transformer")
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "left")
    latents = prior_latents(plain, input_ids, 2)
    expected = plain.log_likelihood(latents, input_ids, mask)
    assert torch.equal(model.log_likelihood(latents, input_ids, mask), expected)


def test_a_transformer_prior_that_has_learned_changes_something():
    plain, model = small_model("ltm"), small_variant("transformer prior")
    model.load_state_dict(plain.state_dict(), strict=False)
    latents = prior_latents(plain, texts(3, 6))
    difference = model.log_likelihood(latents, texts(3, 6)) - plain.log_likelihood(latents, texts(3, 6))
    assert (difference.abs() > 1e-2).all()


def test_layers_attend_to_the_transformed_latents():
    """p(x | z_0) is the plain decoder's p(x | f(z_0)), and f of each row is its own, in float32 prior N(0, I)."""
    model = small_variant("transformer prior")
    plain = small_model("ltm")
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    input_ids = texts(3, 6)
    latents = prior_latents(model, input_ids)
    transformed = torch.cat([model.latent_transformer(z[None]) for z in latents])
    torch.testing.assert_close(
        model.log_likelihood(latents, input_ids), plain.log_likelihood(transformed, input_ids), atol=1e-5, rtol=0
    )
    assert torch.equal(model.prior(2, 3).mean, torch.zeros(2, 2, 3, 8))
    assert torch.equal(model.prior(2, 3).stddev, torch.ones(2, 2, 3, 8))


def test_every_latent_moves_every_transformed_one():
    model = small_variant("transformer prior")
    latents = prior_latents(model, texts(1, 6)).requires_grad_()
    transformed = model.latent_transformer(latents).flatten(0, 2)
    for vector in transformed:
        (gradient,) = torch.autograd.grad(vector.sum(), latents, retain_graph=True)
        assert (gradient != 0).all()


@pytest.mark.parametrize("variant", ["transformer prior", "shared latents", "diagonal prior", "cooperative"])
@pytest.mark.parametrize("way", [{}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 3}], ids=str)
def test_cached_and_uncached_texts_are_equal(variant, way):
    """Texts of 14 tokens, more than three windows long."""
    model = small_variant(variant, tie_word_embeddings=False)
    input_ids, mask = padded(texts(3, 5), [5, 2, 3], "left")
    given = {"attention_mask": mask, "max_new_tokens": 9, "seed": 1, **way}
    cached = model.generate(input_ids, **given)
    assert torch.equal(cached, model.generate(input_ids, use_cache=False, **given))
    assert len(cached[:, 5:].unique()) > 1


def test_gradients_through_a_transformer_prior():
    """By finite differences in float64, and its steps raise the bound."""
    model = small_variant("transformer prior", inference_steps=30, inference_lr=0.05, inference_lr_final=None)
    input_ids = texts(2, 8)
    with torch.no_grad():
        before = model(input_ids)
        model.change_inference(inference_steps=0)
        start = model(input_ids)
    assert (before.nll + before.kl).sum() < (start.nll + start.kl).sum() - 0.5
    model = model.double()
    latents = prior_latents(model, input_ids).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: model.log_likelihood(z, input_ids), latents, fast_mode=True)


def test_shared_latents_are_one_set_for_all_layers():
    model = small_model("ltm", shared_latents=True, num_hidden_layers=3)
    assert model.latent_shape == (1, 3, 8) and model.prior(2, 5).event_shape == (1, 3, 8)
    input_ids = texts(2, 6)
    latents, read = prior_latents(model, input_ids), []
    for block in model.layers:
        block.register_forward_hook(lambda block, args, x: read.append(args[4]))
    found = model.log_likelihood(latents, input_ids)
    assert len(read) == 3 and all(torch.equal(given, latents[:, 0]) for given in read)
    layered = small_model("ltm", num_hidden_layers=3)
    layered.load_state_dict(model.state_dict())
    assert torch.equal(layered.log_likelihood(latents.expand(-1, 3, -1, -1), input_ids), found)
    with pytest.raises(InputError):
        model.log_likelihood(prior_latents(layered, input_ids), input_ids)


# ---- Langevin --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["standard", "diagonal"])
def test_training_on_langevin_samples(prior):
    """−log p(x | z) per token, with the gradient of −log p(x, z): no KL, since such samples have no density."""
    options = {"langevin_steps": 3, "langevin_step_size": 0.2, "langevin_temperature": 0.5, "latent_prior": prior}
    model = small_variant("langevin", beta=0.1, free_bits=3.0, **options).train()
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "right")
    output = model(input_ids, mask, seed=7)
    output.loss.backward()
    found = {name: gradient.clone() for name, gradient in gradients(model).items()}
    assert output.kl is None and output.posterior_mean is None
    z = langevin(model, input_ids, mask, steps=3, step_size=0.2, temperature=0.5, seed=7)
    assert torch.equal(output.latents, z)
    model.zero_grad()
    nll = -model.log_likelihood(z, input_ids, mask).sum(1)
    torch.testing.assert_close(output.nll, nll)
    torch.testing.assert_close(output.loss, nll.sum() / 13)
    loss = nll.sum()
    if prior == "diagonal":
        standard = (z - model.prior_mean) ** 2 / model.prior_log_variance.exp()
        loss = loss + 0.5 * (standard + model.prior_log_variance).sum()
    (loss / 13).backward()
    torch.testing.assert_close(found, gradients(model), atol=1e-6, rtol=1e-4)
    assert all((gradient != 0).any() for gradient in found.values())


def test_a_model_trained_by_langevin_is_evaluated_by_gradient():
    model, plain = small_variant("langevin"), small_model("ltm", inference_steps=2)
    input_ids = texts(3, 7)
    assert torch.equal(model.infer(input_ids).mean, plain.infer(input_ids).mean)
    assert torch.equal(model(input_ids).loss, plain(input_ids).loss)
    assert torch.equal(model(input_ids).kl, plain(input_ids).kl)


# ---- another inference of the same weights ---------------------------------------------------------------------------


def test_changing_the_inference_is_having_been_configured_so():
    model = small_variant("cooperative")
    for changes in (
        {"inference_steps": 5},
        {"inference": "amortised"},
        {"inference": "cooperative", "inference_lr": 0.1, "inference_lr_final": None},
        {"inference": "gradient", "inference_start": "fixed", "inference_start_log_variance": -1.0},
        {"inference": "cooperative", "inference_epsilon": 1.0, "inference_lr_decay": 0.5},
    ):
        before, weights = model(texts(2, 8)).posterior_mean, gradients(model)
        state, generator = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
        model.change_inference(**changes)
        assert torch.equal(torch.get_rng_state(), generator)
        assert weights.keys() == gradients(model).keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(getattr(model.config, name) == value for name, value in changes.items())
        names = [f.name for f in fields(LTMConfig) if f.name.startswith("inf")]
        values = {name: getattr(model.config, name) for name in names}
        fresh = small_variant("cooperative", **values)
        fresh.load_state_dict(model.state_dict(), strict=values["inference"] != "gradient")
        found = model(texts(2, 8)).posterior_mean
        assert torch.equal(found, fresh(texts(2, 8)).posterior_mean) and not torch.equal(found, before)


def test_more_steps_raise_the_bound():
    model = small_model("ltm", inference_steps=0, inference_epsilon=1.0, inference_lr=0.1, inference_lr_final=None)
    bounds = []
    for steps in (0, 3, 20):
        model.change_inference(inference_steps=steps)
        output = model(texts(16, 12))
        bounds.append(-float((output.nll + output.kl).mean()))
    assert bounds[0] + 0.2 < bounds[1] < bounds[2] - 0.5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"inference_stepz": 3}, "inference_stepz does not say how a LTM infers: its fields .*inference_steps"),
        ({"hidden_size": 32}, "hidden_size does not say how"),
        ({"inference_steps": 3, "beta": 0.5}, "beta does not say how"),
        ({"inference_steps": -1}, "inference_steps must be at least 0, not -1"),
        ({"inference_steps": "many"}, "inference_steps"),
        ({"inference_steps": 3, "inference": "guessing"}, "inference"),
        ({"inference_steps": 3, "inference_lr": float("nan")}, "inference_lr must be a number"),
        ({"inference": "amortised"}, "inference=amortised needs weights .*for one, encoder"),
        ({"inference": "cooperative"}, "inference=cooperative needs weights"),
        ({"inference_steps": 3, "inference_start": "learned"}, "inference_start=learned needs weights .*start_"),
        ({"inference": "langevin", "inference_start": "learned"}, "trains no start"),
    ],
)
def test_an_inference_that_cannot_be_is_refused_whole(changes, message):
    model = small_model("ltm")
    before, posterior = model.config.to_dict(), model.infer(texts(1, 5))
    with pytest.raises(InputError, match=message) as error:
        model.change_inference(**changes)
    assert "\n" not in str(error.value)
    assert model.config.to_dict() == before
    assert torch.equal(model.infer(texts(1, 5)).mean, posterior.mean)


def test_a_model_that_does_not_infer_has_nothing_to_change():
    for model in (small_model("autoregressive"), three_verbs()):
        with pytest.raises(InputError, match=r"inference_steps does not say how .*: it has nothing to set"):
            model.change_inference(inference_steps=3)


# ---- the published score ---------------------------------------------------------------------------------------------


def published_by_hand(model, input_ids, mask, *, seed, steps, rate):
    """One draw for all of Adam's steps and the score."""
    shape = (len(input_ids), *model.latent_shape)
    mean, log_variance = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    optimizer = torch.optim.Adam([mean, log_variance], lr=rate, betas=(0.9, 0.95), maximize=True)
    noise = sequence_noise(sequence_keys(input_ids, mask), model.latent_shape, seed=seed, stream=Stream.INFERENCE)

    def bounds():
        z = mean + (0.5 * log_variance).exp() * noise
        kl = divergence(mean, log_variance).flatten(1).sum(1)
        return model.log_likelihood(z, input_ids, mask).sum(1) - kl

    for _ in range(steps):
        mean.grad, log_variance.grad = torch.autograd.grad(bounds().sum(), (mean, log_variance))
        optimizer.step()
    return bounds().detach(), diagonal_gaussian(mean.detach(), log_variance.detach())


def test_the_published_score_by_hand():
    model = small_model("ltm", inference_steps=5, inference_lr=0.1, inference_lr_final=None, beta=0.1, free_bits=1.0)
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "left")
    for seed in (0, 3):
        expected, _ = published_by_hand(model, input_ids, mask, seed=seed, steps=5, rate=0.1)
        torch.testing.assert_close(model.published_elbo(input_ids, mask, seed=seed), expected, atol=1e-4, rtol=0)
        with torch.inference_mode():
            torch.testing.assert_close(model.published_elbo(input_ids, mask, seed=seed), expected, atol=1e-4, rtol=0)


def test_the_published_score_is_no_bound():
    """After many steps it lies far above the ELBO of the same q, scored with fresh noise, for every text."""
    model = small_model("ltm", inference_steps=40, inference_lr=0.1, inference_lr_final=None)
    input_ids = texts(4, 10)
    published = model.published_elbo(input_ids).detach()
    _, posterior = published_by_hand(model, input_ids, None, seed=0, steps=40, rate=0.1)
    noise = torch.randn(64, *posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fresh = model.log_likelihood(posterior.mean + posterior.stddev * noise, input_ids).sum(-1).mean(0)
        honest = fresh - kl_divergence(posterior, model.prior(4, 9))
    assert (published > honest + 1).all()


def test_the_published_score_of_an_encoder_is_one_draw():
    model = small_variant("amortised")
    input_ids = texts(3, 8)
    mean, log_variance = encoded(model, input_ids)
    noise = sequence_noise(sequence_keys(input_ids), model.latent_shape, seed=0, stream=Stream.INFERENCE)
    log_likelihood = model.log_likelihood(mean + (0.5 * log_variance).exp() * noise, input_ids).sum(1)
    expected = log_likelihood - divergence(mean, log_variance).flatten(1).sum(1)
    torch.testing.assert_close(model.published_elbo(input_ids), expected, atol=1e-4, rtol=0)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_from_its_folder(variant, tmp_path):
    if VARIANTS[variant][0] == "huggingface":
        pytest.skip("is saved as a plain model of transformers: test_huggingface.py")
    model = small_variant(variant)
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "left")
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    latents = prior_latents(model, input_ids, 2)
    expected = model.log_likelihood(latents, input_ids, mask)
    assert torch.equal(loaded.log_likelihood(latents, input_ids, mask), expected)
    # sums may run in another order where weights lie elsewhere in memory
    torch.testing.assert_close(loaded.infer(input_ids, mask).mean, model.infer(input_ids, mask).mean)
    assert torch.equal(loaded.prior(2, 3).mean, model.prior(2, 3).mean)
    ours, theirs = (each.train()(input_ids, mask, seed=1) for each in (model, loaded))
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_new_weights_are_new_where_a_folder_lacks_them(tmp_path):
    """A model of gradient inference, loaded to be given an encoder: its own weights stay, the encoder begins anew."""
    plain = small_model("ltm")
    plain.save_pretrained(tmp_path)
    model = LTM.from_pretrained(tmp_path, config=small_config("ltm", inference="amortised", latent_prior="diagonal"))
    assert torch.equal(model.embed_tokens.weight, plain.embed_tokens.weight)
    posterior, prior = model.infer(texts(2, 5)), model.prior(2, 5)
    assert torch.equal(posterior.mean, torch.zeros(2, 2, 3, 8)) and torch.equal(posterior.stddev, prior.stddev)
    assert torch.equal(prior.mean, torch.zeros(2, 2, 3, 8)) and torch.equal(prior.stddev, torch.ones(2, 2, 3, 8))
    assert 0.2 < model.encoder.pooling.queries.weight.std() < 0.3


def test_a_rate_that_is_changed_holds_whatever_the_schedule_of_training_was():
    model = small_model("ltm")
    model.training_progress.fill_(1.0)
    before = model.infer(texts(2, 6)).mean
    model.change_inference(inference_lr=0.0)
    assert torch.equal(model.infer(texts(2, 6)).mean, torch.zeros_like(before)) and before.abs().max() > 0


@pytest.mark.parametrize(
    "variant, change",
    [
        ("amortised", {"inference_steps": 64}),
        ("cooperative", {"inference_start": "prior"}),
        ("ltm", {"inference_start_log_variance": -5.0}),
    ],
)
def test_a_setting_that_inference_does_not_read_is_refused(variant, change):
    model = small_variant(variant)
    with pytest.raises(InputError, match="changes nothing"):
        model.change_inference(**change)


@pytest.mark.parametrize(
    "change", [{"inference_lr": 1e30}, {"inference_start": "fixed", "inference_start_log_variance": 1e4}]
)
def test_an_inference_that_diverges_is_one_sentence(change):
    model = small_model("ltm")
    model.change_inference(**change)
    with pytest.raises(InputError, match="diverged"):
        model.infer(texts(2, 6))
