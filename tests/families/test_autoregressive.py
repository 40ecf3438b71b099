"""The control: its likelihood is exact, and is the sum of all its parts."""

from itertools import product

import pytest
import torch
from tests.toy import BOS, padded, small_config, small_model, small_variant, texts
from transformers.cache_utils import EncoderDecoderCache

from latentlm.errors import one_sentence
from latentlm.evaluation.likelihood import score
from latentlm.latent_lm import number_of_parameters


def test_the_kl_is_zero_and_every_bound_is_exact():
    model = small_model("autoregressive")
    assert model.exact
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "right")
    nll = -model.log_likelihood(torch.zeros(3, 0), input_ids, mask).sum(-1)
    output = model(input_ids, mask)
    assert torch.equal(output.kl, torch.zeros(3)) and torch.equal(output.nll, nll)
    torch.testing.assert_close(output.loss, nll.sum() / 13)
    for samples in (1, 4):
        found = score(model, input_ids, mask, samples=samples)
        for name in ("elbo", "iw", "reconstruction", "prior"):
            torch.testing.assert_close(found[name].float(), nll)


def test_probabilities_of_all_texts_sum_to_one():
    """All 5³ texts of three tokens of five."""
    model = small_model("autoregressive", vocab_size=5)
    input_ids = torch.tensor([[BOS, *text] for text in product(range(5), repeat=3)])
    log_likelihood = model.log_likelihood(torch.zeros(125, 0), input_ids).sum(-1)
    assert abs(log_likelihood.double().exp().sum() - 1) < 1e-6


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_and_ltm(**changes):
    """A control with memory, and an LTM with its weights."""
    memory = small_model("autoregressive", memory_per_layer=3, memory_size=8, **changes)
    ltm = small_model("ltm", seed=1, **changes)  # with 3 latents of 8 numbers for each layer
    state = memory.state_dict()
    vectors = state.pop("memory")
    assert ltm.load_state_dict(state).missing_keys == []
    return memory, ltm, vectors


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 3, "sliding_window": None}], ids=str)
def test_memory_is_an_ltm_whose_latents_are_always_the_same(side, changes):
    model, ltm, vectors = memory_and_ltm(**changes)
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], side)
    expected = ltm.log_likelihood(vectors.expand(3, -1, -1, -1), input_ids, mask)
    assert torch.equal(model.log_likelihood(torch.zeros(3, 0), input_ids, mask), expected)
    samples = model.log_likelihood(torch.zeros(4, 3, 0), input_ids, mask)
    torch.testing.assert_close(samples, expected.expand(4, -1, -1), atol=1e-5, rtol=0)
    # and not the one without memory
    plain = small_model("autoregressive", **changes)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert ((plain.log_likelihood(torch.zeros(3, 0), input_ids, mask) - expected).abs().sum(1) > 1e-2).all()


def test_the_gradient_of_memory_is_that_of_the_latents_of_all_rows():
    model, ltm, vectors = memory_and_ltm()
    input_ids = texts(3, 7)
    model(input_ids).loss.backward()
    latents = vectors.expand(3, -1, -1, -1).clone().requires_grad_()
    (ltm.log_likelihood(latents, input_ids).sum() / -18).backward()
    torch.testing.assert_close(model.memory.grad, latents.grad.sum(0), atol=1e-6, rtol=1e-5)
    assert (model.memory.grad != 0).all()


def test_memory_is_all_that_it_has_beyond_an_ltm():
    model, ltm, vectors = memory_and_ltm()
    assert number_of_parameters(model) == number_of_parameters(ltm) + vectors.numel()
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in ltm.named_parameters()} | {"memory"}
    plain = small_model("autoregressive")
    assert not any("cross" in name or "memory" in name for name, _ in plain.named_parameters())
    assert small_model("autoregressive", memory_per_layer=2).memory.shape == (2, 2, 16)  # hidden_size


def test_new_memory_is_as_large_as_latents_of_the_prior():
    memory = small_model("autoregressive", memory_per_layer=64, memory_size=32).memory
    assert abs(memory.std() - 1) < 0.05 and abs(memory.mean()) < 0.05


def test_memory_is_exact_and_of_its_own():
    model = small_variant("memory")
    assert model.exact and model(texts(2, 6)).kl.tolist() == [0, 0]
    model = small_variant("memory", vocab_size=5)
    input_ids = torch.tensor([[BOS, *text] for text in product(range(5), repeat=3)])
    log_likelihood = model.log_likelihood(torch.zeros(125, 0), input_ids).sum(-1)
    assert abs(log_likelihood.double().exp().sum() - 1) < 1e-6


@pytest.mark.parametrize("way", [{}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("window", [1, 4, None])
def test_cached_and_uncached_texts_with_memory_are_equal(way, window):
    model = small_variant("memory", tie_word_embeddings=False, sliding_window=window)
    input_ids, mask = padded(texts(3, 5), [5, 2, 3], "left")
    given = {"attention_mask": mask, "max_new_tokens": 9, "seed": 1, **way}
    cached = model.generate(input_ids, **given)
    assert torch.equal(cached, model.generate(input_ids, use_cache=False, **given))


def test_memory_is_read_once_for_a_text():
    """Its keys and values stay in the cache, and each step's logits are those of the whole text."""
    model = small_variant("memory")
    asked = []
    model.layers[0].cross_attention.key.register_forward_hook(lambda *_: asked.append(1))
    input_ids, cache = texts(2, 9), model.new_cache()
    expected = model.decode(torch.zeros(2, 0), input_ids)
    asked.clear()
    steps = [model(input_ids[:, t : t + 1], latents=torch.zeros(2, 0), past_key_values=cache).logits for t in range(8)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(cache, EncoderDecoderCache) and len(asked) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"memory_per_layer": -1}, "memory_per_layer must not be negative"),
        ({"memory_per_layer": 2, "memory_size": 0}, "memory_size must be at least 1"),
    ],
)
def test_impossible_memory_is_refused_in_one_sentence(changes, message):
    with pytest.raises(Exception, match=message) as error:
        small_config("autoregressive", **changes)
    sentence = one_sentence(error.value)
    assert "\n" not in sentence and "rror" not in sentence and "validat" not in sentence and message in sentence


@pytest.mark.parametrize(
    "changes", [{"memory_per_layer": 2.5}, {"memory_per_layer": None}, {"memory_size": "16"}], ids=str
)
def test_memory_of_another_type_is_refused_by_name(changes):
    with pytest.raises(Exception, match=next(iter(changes))):
        small_config("autoregressive", **changes)
