from itertools import product

import pytest
import torch
from tests.toy import BOS, padded, prior_latents, small_model, texts
from transformers import AutoModel

from latentlm import LTM, InputError, LTMConfig
from latentlm.latent_lm import number_of_parameters

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
    positions = model._latent_positions(torch.device("cpu"))[0]
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
