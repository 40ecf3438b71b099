"""LatentSpace: texts are inferred once, and codes are what `latentlm.text.encode` gives, whitened by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.probing import worlds
from tests.toy import moved, small_model, three_verbs

from latentlm import InputError
from latentlm.probing import LatentSpace, Texts
from latentlm.text import encode

TEXTS = worlds.words(7)


@pytest.fixture
def counted(monkeypatch):
    """A space and the list of all texts that its model was asked to infer."""
    space, asked = worlds.space("gpt_vae", batch_size=2), []
    infer = space.model.infer

    def counting(input_ids, *arguments, **options):
        asked.extend(map(tuple, input_ids.tolist()))
        return infer(input_ids, *arguments, **options)

    monkeypatch.setattr(space.model, "infer", counting)
    return space, asked


# ---- what is inferred, and when ----------------------------------------------------------------------------------


def test_each_text_is_inferred_once(counted):
    space, asked = counted
    assert asked == []
    space.codes(Texts(TEXTS[:4]))
    assert len(asked) == 4
    space.variances(Texts(TEXTS[:4]))
    space.means(Texts(TEXTS[2:4]))
    assert len(asked) == 4
    space.codes(Texts(TEXTS[2:]))
    assert len(asked) == len(TEXTS)


def test_equal_texts_are_one_text(counted):
    space, asked = counted
    codes = space.codes(Texts((TEXTS[1], TEXTS[2], TEXTS[1], TEXTS[1])))
    assert len(asked) == 2
    assert (codes[0] == codes[2]).all() and (codes[0] == codes[3]).all() and (codes[0] != codes[1]).any()


def test_many_texts_are_looked_up_in_one_pass(counted, monkeypatch):
    space, _ = counted
    calls, keys = [], LatentSpace._keys
    monkeypatch.setattr(LatentSpace, "_keys", lambda self, texts: calls.append(1) or keys(self, texts))
    space.codes(Texts(TEXTS))
    assert len(calls) < 5  # and not one for each text


@pytest.mark.parametrize("family", worlds.KINDS)
def test_rows_keep_their_order_whatever_the_batches(family):
    together = worlds.space(family, batch_size=3).codes(Texts(TEXTS))
    backwards = worlds.space(family, batch_size=1).codes(Texts(TEXTS[::-1]))
    np.testing.assert_allclose(together, backwards[::-1], atol=1e-5)
    assert np.abs(together[1] - together[2]).max() > 1e-4


def test_progress_is_told():
    told = []
    worlds.space("gpt_vae", batch_size=4, on_progress=lambda *step: told.append(step)).infer(Texts(TEXTS))
    assert told == [(4, 7), (7, 7)]


# ---- codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", worlds.KINDS)
@pytest.mark.parametrize("number", [1, 7])
def test_codes_are_encoded_means_whitened_by_hand(family, number):
    space = worlds.space(family)
    found = space.codes(Texts(TEXTS[:number]))
    encoding = encode(space.model, space.tokenizer, TEXTS[:number])
    for row in range(number):
        length = None if encoding.lengths is None else int(encoding.lengths[row])
        mean = encoding.mean[row, :length]
        prior = space.model.prior(1, 1 if length is None else length)
        by_hand = (mean - prior.mean[0].detach().numpy()) / prior.variance[0].detach().numpy() ** 0.5
        by_hand = by_hand.reshape(-1, by_hand.shape[-1]).mean(0)
        np.testing.assert_allclose(found[row], by_hand, atol=1e-5)


def test_a_model_of_three_verbs_will_do():
    space = worlds.space_of(three_verbs())
    codes = space.codes(Texts(TEXTS))
    given = next(batch for batch in space.batches(Texts(TEXTS)) if 3 in batch[0])
    by_hand = space.model.infer(given[1], given[2]).mean[given[0].index(3)]
    np.testing.assert_allclose(codes[3], by_hand.detach(), atol=1e-6)


def test_a_prior_with_another_mean_and_variance_is_taken_out():
    space = worlds.space("diagonal prior")
    prior = space.model.prior(1, 1)
    centre, variance = prior.mean[0].detach().numpy(), prior.variance[0].detach().numpy()
    assert np.abs(centre).max() > 0.01 and np.abs(variance - 1).max() > 0.01
    mean = space.means(Texts(TEXTS[:1]))[0]
    by_hand = (mean - centre) / variance**0.5
    np.testing.assert_allclose(space.standardised(mean), by_hand, atol=1e-6)
    np.testing.assert_allclose(space.codes(Texts(TEXTS[:1]))[0], by_hand.mean((0, 1)), atol=1e-6)


def test_layers_pooled_flat_and_one_by_one():
    layers, latents, size = worlds.space("ltm").event
    assert (layers, latents, size) == (2, 3, 8)
    texts = Texts(TEXTS)
    z = np.stack(worlds.space("ltm").means(texts))  # the prior is standard normal
    for options, by_hand in [
        ({}, z.mean((1, 2))),
        ({"pool": "flat"}, z.reshape(len(z), -1)),
        ({"part": 1}, z[:, 1].mean(1)),
        ({"part": 1, "pool": "flat"}, z[:, 1].reshape(len(z), -1)),
    ]:
        np.testing.assert_allclose(worlds.space("ltm", **options).codes(texts), by_hand, atol=1e-6)
    assert worlds.space("ltm", part=1).view != worlds.space("ltm").view != worlds.space("ltm", pool="flat").view


def test_trajectories_have_the_lengths_of_their_texts():
    space = worlds.space("gp_vae")
    means = space.means(Texts(TEXTS))
    assert [len(mean) for mean in means] == [len(text.split()) + 1 for text in TEXTS]  # and EOS
    assert [len(variance) for variance in space.variances(Texts(TEXTS))] == [len(mean) for mean in means]
    assert space.codes(Texts(TEXTS)).shape == (len(TEXTS), space.event[-1])


def test_one_position_of_trajectories():
    space = worlds.space("gp_vae", part=1)
    codes = space.codes(Texts(TEXTS))
    by_hand = np.stack([space.standardised(mean)[1] for mean in space.means(Texts(TEXTS))])
    np.testing.assert_allclose(codes, by_hand, atol=1e-6)
    with pytest.raises(InputError, match="has 2 positions and no position 2: take longer texts"):
        worlds.space("gp_vae", part=2).codes(Texts(TEXTS))


# ---- text from latents -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", worlds.KINDS)
def test_writing_does_not_depend_on_batches(family):
    texts = Texts(TEXTS[:5])
    spaces = [worlds.space(family, batch_size=size) for size in (1, 5)]
    one, all_at_once = (space.write(space.means(texts), max_new_tokens=6) for space in spaces)
    assert one == all_at_once and len(one) == 5
    assert any(one)


def test_a_trajectory_writes_as_many_tokens_as_it_has():
    space = worlds.space("gp_vae")
    for text, written in zip(TEXTS, space.write(space.means(Texts(TEXTS))), strict=True):
        ids = space.tokenizer(written, add_special_tokens=False)["input_ids"]
        assert len(ids) <= len(text.split()) + 1


# ---- conditional models ------------------------------------------------------------------------------------------


def test_a_conditional_model_takes_labels():
    space, texts = worlds.conditional_space(), worlds.annotated(TEXTS)
    codes = space.codes(texts)
    other = Texts(TEXTS, tuple(("V",) * len(row) for row in texts.labels))
    assert np.abs(space.codes(other) - codes).max() > 1e-4  # the same texts under other labels are others
    by_hand = encode(space.model, space.tokenizer, TEXTS, annotations=texts.labels).mean
    np.testing.assert_allclose(codes, by_hand, atol=1e-5)


def test_a_conditional_model_without_labels():
    with pytest.raises(InputError, match="this model is conditional: give the labels of the texts, too"):
        worlds.conditional_space().codes(Texts(TEXTS))


# ---- what cannot be probed ---------------------------------------------------------------------------------------


def test_latents_that_are_no_numbers_are_refused(monkeypatch):
    space = worlds.space("gpt_vae")
    nothing = SimpleNamespace(mean=torch.full((1, 6), float("nan")), variance=torch.ones(1, 6))
    monkeypatch.setattr(space.model, "infer", lambda *arguments, **options: nothing)
    with pytest.raises(InputError, match=f"the latent of '{TEXTS[0]}' is not finite: the model has diverged"):
        space.codes(Texts(TEXTS[:1]))


def test_weights_that_are_no_numbers_are_refused():
    space = worlds.space("gpt_vae")
    with torch.no_grad():
        for parameter in space.model.encoder.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(InputError, match="diverged"):
        space.codes(Texts(TEXTS[:1]))


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("autoregressive", {}, "Autoregressive has no latents"),
        ("gpt_vae", {"pool": "most"}, "pool must be one of mean, flat"),
        ("gpt_vae", {"part": 0}, "a latent of 6 numbers has no parts: leave part out"),
        ("ltm", {"part": 2}, "part 2 of a latent of 2 × 3 × 8: give a number from 0 to 1, a layer"),
        ("ltm", {"part": -1}, "part -1"),
        ("gp_vae", {"pool": "flat"}, "trajectories have different lengths"),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(family, options, words):
    with pytest.raises(InputError, match=words):
        worlds.space_of(moved(small_model(family)), **options)


def test_sampled_codes_are_draws_of_the_posterior_in_prior_standard_deviations():
    space = worlds.space("gpt_vae")
    texts = Texts(worlds.words(3))
    draws = np.stack([space.sampled_codes(texts, seed) for seed in range(2000)])
    centre, scale = space.standardised(np.zeros(space.event)), space.standardised(np.ones(space.event))
    deviation = np.sqrt(np.stack(space.variances(texts))) * (scale - centre)
    assert np.abs((draws.mean(0) - space.codes(texts)) / deviation).max() < 4.5 / np.sqrt(2000)
    assert np.abs(draws.std(0) / deviation - 1).max() < 4.5 / np.sqrt(2 * 2000)
    assert np.array_equal(space.sampled_codes(texts, 5), draws[5])
