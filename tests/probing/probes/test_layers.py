"""KL, active units, accuracies and effects of each layer's latents, each against what the model itself says."""

import json

import numpy as np
import pytest
import torch
from tests.command import assert_one_sentence, run
from tests.probing.small_space import some_texts, space_of
from tests.toy import small_variant
from tests.training.runs import trained, unchecked
from torch.distributions import kl_divergence

from latentlm.errors import InputError
from latentlm.probing import Texts
from latentlm.probing.probes.layers import held_out_accuracy, kl_of_layers, layers, majority_share

VARIANTS = ["ltm", "amortised", "cooperative", "learned start", "diagonal prior", "transformer prior", "shared latents"]
KL, BY_PRIOR, BY_OTHER = "kl per text", "by prior's mean", "by another text's"


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layers_kl_is_the_models(variant):
    space, texts = space_of(variant), some_texts(7)
    found = kl_of_layers(space, texts)
    assert found.shape == (7, 1 if variant == "shared latents" else 2)
    for row in range(7):
        ((_, input_ids, _, _),) = space.batches(texts.select([row]))
        q, p = space.model.infer(input_ids), space.model.prior(1, input_ids.shape[1] - 1)
        assert found[row].sum() == pytest.approx(float(kl_divergence(q, p)), rel=1e-3)
        # of Gaussians, a number at a time
        ratio = q.variance / p.variance
        each = 0.5 * (ratio + (q.mean - p.mean) ** 2 / p.variance - 1 - ratio.log())
        np.testing.assert_allclose(found[row], each[0].sum((1, 2)), rtol=1e-3, atol=1e-5)


def test_a_dead_layer_is_seen_to_be_dead():
    model = small_variant("amortised")
    with torch.no_grad():  # nothing of the second layer's latents reaches the text
        model.layers[1].cross_attention.output.weight.zero_()
    space, texts = space_of("", model=model), some_texts(12)
    table = layers(space, texts).table.set_index("layer")
    for by in (BY_PRIOR, BY_OTHER):
        assert abs(table.loc["layer 2", by]) < 1e-7 < 1e-3 < abs(table.loc["layer 1", by])
        assert table.loc["all", by] == pytest.approx(table.loc["layer 1", by], abs=1e-6)


@torch.no_grad()
def test_effects_are_differences_of_the_models_likelihood():
    space, texts = space_of("diagonal prior"), some_texts(5)
    model, means = space.model, space.means(texts)
    table = layers(space, texts).table.set_index("layer")
    prior = model.prior_mean.detach().numpy()

    def nll(change) -> float:
        nats = tokens = 0
        for row in range(5):
            ((_, input_ids, _, _),) = space.batches(texts.select([row]))
            z = means[row].copy()
            change(z, means[(row + 2) % 5])  # half of the texts further on
            nats -= float(model.log_likelihood(torch.from_numpy(z)[None], input_ids).sum())
            tokens += input_ids.shape[1] - 1
        return nats / tokens

    def replaced(layer, by_prior):
        def change(z, other):
            z[layer] = (prior if by_prior else other)[layer]

        return change

    own = nll(lambda z, other: None)
    assert table["nll per token"].tolist() == pytest.approx([own] * 3, rel=1e-5)
    for name, layer in (("layer 1", 0), ("layer 2", 1), ("all", slice(None))):
        assert table.loc[name, BY_PRIOR] == pytest.approx(nll(replaced(layer, True)) - own, abs=1e-5)
        assert table.loc[name, BY_OTHER] == pytest.approx(nll(replaced(layer, False)) - own, abs=1e-5)
    assert abs(table.loc["layer 1", BY_OTHER]) > 1e-4


def test_units_are_active_whose_means_differ_between_texts():
    model = small_variant("amortised")
    with torch.no_grad():  # the encoder says one thing of every text for five of a latent's eight numbers
        model.encoder.moments.weight[3:8] = 0
        model.encoder.moments.weight[:3] *= 100
    table = layers(space_of("", model=model), some_texts(9)).table
    assert table["active units"].tolist() == [9, 9, 18]
    assert table["units"].tolist() == [24, 24, 48]


def test_accuracy_and_floor_are_those_of_the_held_out_texts():
    generator = np.random.default_rng(0)
    values = generator.choice(3, 300, p=[0.6, 0.3, 0.1])
    codes = np.eye(3)[values] * 5 + generator.standard_normal((300, 3)) * 0.1
    values[[0, 250]] = -1  # unknown: neither fitted nor asked
    fitted, held_out = np.arange(200), np.arange(200, 300)
    known = np.delete(values[200:], 50)
    assert majority_share(values, fitted, held_out) == pytest.approx((known == 0).mean())
    assert held_out_accuracy(codes, values, fitted, held_out) == 1
    shuffled = generator.permutation(values)
    assert held_out_accuracy(codes, shuffled, fitted, held_out) < 0.75
    tiny = held_out_accuracy(1e-4 * codes, values, fitted, held_out)  # far within the noise of z
    assert tiny == pytest.approx(majority_share(values, fitted, held_out))


def test_accuracy_that_cannot_be_asked_is_no_number():
    codes, rows = np.zeros((6, 2)), np.arange(6)
    assert np.isnan(held_out_accuracy(codes, np.array([0, 0, 0, 1, 1, 1]), rows[:3], rows[3:]))
    assert np.isnan(held_out_accuracy(codes, np.array([0, 1, 0, -1, -1, -1]), rows[:3], rows[3:]))
    assert np.isnan(majority_share(np.array([-1, -1, -1, 1, 1, 1]), rows[:3], rows[3:]))


def test_a_layer_that_holds_a_factor_tells_it_and_another_does_not():
    model = small_variant("amortised")
    space, texts = space_of("", model=model), some_texts(120)
    parity = (texts.factor("parity") == "odd").to_numpy()
    space.infer(texts)
    for key, (mean, variance) in list(space._known.items()):  # as if the encoder had put it into layer 2
        mean = np.zeros_like(mean)
        mean[1, :, 0] = 2.0 if parity[texts.texts.index(key[0])] else -2.0
        space._known[key] = mean, variance
    found = layers(space, texts, factors=["parity"]).details["factors"].set_index("layer")
    assert found.loc["layer 2", "accuracy"] == found.loc["all", "accuracy"] == 1
    assert found.loc["layer 1", "accuracy"] == found.loc["layer 1", "majority"] < 0.8
    assert found.loc["layer 2", "accuracy, shuffled"] < 0.8
    assert (found["held out"] == 40).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_ltm_is_probed(variant):
    result = layers(space_of(variant), some_texts(10))
    numbers = ["kl per text", "active units", "units", "nll per token", BY_PRIOR, BY_OTHER, "majority"]
    assert np.isfinite(result.table[numbers].to_numpy()).all()
    assert result.table["layer"].tolist() == [*(["layer 1"] if "shared" in variant else ["layer 1", "layer 2"]), "all"]
    assert result.table["kl per text"].iloc[:-1].sum() == pytest.approx(result.table["kl per text"].iloc[-1])
    result.figure()


def test_texts_without_factors_have_all_but_accuracies():
    texts = Texts(some_texts(6).texts)
    result = layers(space_of("amortised"), texts)
    assert "accuracy" not in result.table
    assert not result.details
    result.figure()


def test_limits_and_seed_do_what_they_say():
    space, texts = space_of("amortised"), some_texts(30)
    result = layers(space, texts, most=20, scored=6)
    assert "NLL, of 6 texts" in result.about
    assert result.table[KL].iloc[-1] == pytest.approx(kl_of_layers(space, texts.select(range(6))).sum(1).mean())
    again = layers(space, texts.select(range(20)), scored=6)
    assert result.table.equals(again.table)
    other = layers(space, texts, most=20, scored=6, seed=1)
    assert not other.details["factors"].equals(result.details["factors"])
    assert other.table[KL].equals(result.table[KL])


def test_texts_of_one_token_are_no_mistake():
    table = layers(space_of("amortised"), Texts(("w3", "", "w4"))).table
    assert np.isfinite(table[BY_OTHER]).all()


@pytest.mark.parametrize("variant, texts, options, words", [
    ("gpt_vae", some_texts(5), {}, "GPTVAE has no latents of layers"),
    ("gp_vae", some_texts(5), {}, "GPVAE has no latents of layers"),
    ("lang_vae", some_texts(5), {}, "LangVAE has no latents of layers"),
    ("ltm", Texts(("w3 w4",)), {}, "at least 2"),
    ("ltm", some_texts(5), {"factors": ["mood"]}, "no factor 'mood'"),
    ("ltm", Texts(some_texts(5).texts), {"factors": ["parity"]}, "the texts have none"),
])  # fmt: skip
def test_what_cannot_be_probed_is_refused(variant, texts, options, words):
    with pytest.raises(InputError, match=words):
        layers(space_of(variant), texts, **options)


def test_a_posterior_that_has_no_kl_for_each_layer_is_refused():
    model = small_variant("amortised")
    infer = model.infer

    def joint(*args, **kwargs):
        q = infer(*args, **kwargs)
        return torch.distributions.MultivariateNormal(q.mean.flatten(1), torch.eye(48))

    model.infer = joint
    with pytest.raises(InputError, match="no KL for each layer"):
        kl_of_layers(space_of("", model=model), some_texts(3))


def test_the_command_leaves_table_and_picture(tmp_path):
    with unchecked():
        status, _, err = run("probe", "layers", str(trained("ltm")), "--data", "builtin:sentences", "--limit", "30",
                             "--factors", "tense", "--factors", "number", "--scored", "5", "--output",
                             str(tmp_path / "out"))  # fmt: skip
        assert status in (0, None), err
        found = json.loads((tmp_path / "out" / "layers.json").read_text())
        assert [row["layer"] for row in found["table"]] == ["layer 1", "layer 2", "all"]
        assert {row["factor"] for row in found["factors"]} == {"tense", "number"}
        assert (tmp_path / "out" / "layers.png").stat().st_size > 10_000
        status, _, err = run("probe", "layers", str(trained("gpt_vae")), "--data", "builtin:sentences", "--limit", "9")
    assert_one_sentence(status, err)
