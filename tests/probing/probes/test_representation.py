"""CKA against its definitions, attention on latents against a softmax by hand, states and NLL against the model's."""

import itertools
import json

import numpy as np
import pytest
import torch
from tests.command import assert_one_sentence, run
from tests.probing.small_space import LABELS, some_texts, space_of
from tests.toy import small_model, small_variant, three_verbs
from tests.training.runs import trained, unchecked
from torch import nn

from latentlm.errors import InputError
from latentlm.layers import injection, rotation
from latentlm.layers.transformer import rotate
from latentlm.probing import Texts
from latentlm.probing.inside import encoder_output, others, prior_means, score
from latentlm.probing.probes.representation import cka, representation


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# ---- CKA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("width", [3, 60])
def test_cka_of_the_same_is_one_whatever_the_rotation_scale_and_place(debiased, width):
    x = noise(40, width)
    turned = 7 * x @ np.linalg.qr(noise(width, width, seed=1))[0] + 5
    assert cka(x, x, debiased=debiased) == pytest.approx(1)
    assert cka(x, turned, debiased=debiased) == pytest.approx(1)
    assert cka(x, x @ noise(width, width, seed=1), debiased=debiased) < 0.97  # any linear map is not the same


def test_debiased_cka_of_noise_is_about_zero_where_the_biased_is_not():
    pairs = [(noise(60, 40, seed=2 * seed), noise(60, 30, seed=2 * seed + 1)) for seed in range(20)]
    assert abs(np.mean([cka(*pair) for pair in pairs])) < 0.02
    assert min(cka(*pair, debiased=False) for pair in pairs) > 0.3


def enumerated(x: np.ndarray, y: np.ndarray) -> float:
    """The U-statistic: the mean over distinct i, j, q, r of k_ij (l_ij + l_qr − 2 l_iq)."""
    k, j_of = x @ x.T, y @ y.T
    rows = itertools.permutations(range(len(x)), 4)
    return float(np.mean([k[i, j] * (j_of[i, j] + j_of[q, r] - 2 * j_of[i, q]) for i, j, q, r in rows]))


def of_kernels(x: np.ndarray, y: np.ndarray) -> float:
    centring = np.eye(len(x)) - 1 / len(x)
    return float(np.trace(x @ x.T @ centring @ y @ y.T @ centring))


@pytest.mark.parametrize("debiased, hsic", [(True, enumerated), (False, of_kernels)])
@pytest.mark.parametrize("width", [2, 9])
def test_cka_is_what_its_definition_gives(debiased, hsic, width):
    x = noise(7, width) + 3
    y = x[:, :2] @ noise(2, width, seed=1) + noise(7, width, seed=2)
    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert cka(x, y, debiased=debiased) == pytest.approx(expected, abs=1e-9)


def test_cka_of_what_does_not_change_is_no_number():
    assert np.isnan(cka(np.full((6, 3), 0.1), noise(6, 3)))
    assert np.isnan(cka(noise(6, 3), np.full((6, 3), 1e6 / 3) + 1e-6 * noise(6, 3), debiased=False))


def test_cka_refuses_what_it_cannot_compare():
    with pytest.raises(InputError, match="at least 4 texts"):
        cka(noise(3, 2), noise(3, 2))
    with unchecked(), pytest.raises(InputError, match="5 and 6 texts"):
        cka(noise(5, 2), noise(6, 2))


# ---- attention -------------------------------------------------------------------------------------------------------


def alone(space, texts):
    """Each text by itself, with the mean of its q."""
    for row, mean in enumerate(space.means(texts)):
        one = texts.select([row])
        ((_, input_ids, _, condition),) = space.batches(one)
        yield row, torch.from_numpy(mean)[None], input_ids, condition


def inputs_of(blocks, call):
    held = []
    hooks = [block.register_forward_pre_hook(lambda module, given: held.append(given[0])) for block in blocks]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return held


@pytest.mark.parametrize("variant", ["gpt_vae", "two latent tokens", "gpt_vae with a window"])
def test_attention_on_latent_tokens_is_that_of_a_softmax_by_hand(variant):
    space, texts = space_of(variant), some_texts(9)
    model = space.model
    number, window = model.config.latent_tokens, model.config.sliding_window
    found = score(space, texts, space.means(texts), watch=True)
    for row, z, input_ids, _ in alone(space, texts):
        states = inputs_of(model.layers, lambda z=z, ids=input_ids: model.log_likelihood(z, ids))
        for place, (layer, x) in enumerate(zip(model.layers, states, strict=True)):
            own = layer.self_attention
            # in memory z stands first, BOS next; BOS is at position 0 and z follows it
            positions = [*range(1, number + 1), 0, *range(number + 1, x.shape[1])]
            turn = rotation(torch.tensor([positions]), own.head_size, model.config.rope_theta)
            normed = layer.self_norm(x)
            query, key = (
                rotate(part(normed).unflatten(-1, (own.heads, own.head_size)).transpose(1, 2), turn)[0]
                for part in (own.query, own.key)
            )
            shares, alike = [], []
            for t in range(number, x.shape[1]):
                seen = [s for s in range(t + 1) if s < number or window is None or t - s < window]
                weights = (query[:, t : t + 1] @ key[:, seen].mT / own.head_size**0.5).softmax(-1)
                shares.append(weights[..., :number].sum(-1).mean().item())
                alike.append(number / len(seen))
            assert found.attention[row, place] == pytest.approx(np.mean(shares), abs=1e-5)
            assert found.uniform[row, place] == pytest.approx(np.mean(alike), abs=1e-5)


@pytest.mark.parametrize("variant", ["lang_vae", "interleaved lang_vae"])
def test_attention_on_slots_is_that_of_a_softmax_by_hand(variant):
    space, texts = space_of(variant), some_texts(6)
    model = space.model
    blocks = model.language_model.transformer.h
    slots = model.config.latent_slots
    found = score(space, texts, space.means(texts), watch=True)
    for row, z, input_ids, _ in alone(space, texts):
        states = inputs_of(blocks, lambda z=z, ids=input_ids: model.log_likelihood(z, ids))
        keys, _ = model.injection(z)
        for place, (block, x) in enumerate(zip(blocks, states, strict=True)):
            query, key, _ = (
                part.unflatten(-1, (2, -1)).transpose(1, 2)[0]
                for part in block.attn.c_attn(block.ln_1(x)).split(16, -1)
            )
            shares, alike = [], []
            for t in range(x.shape[1]):
                # token t sees slots 0 … t, slot s being made by the map s mod slots; of a prefix all
                times = t + 1 if variant.startswith("interleaved") else slots
                before = keys[place][0][:, [s % slots for s in range(times)]]
                weights = (query[:, t : t + 1] @ torch.cat((before, key[:, : t + 1]), 1).mT / 8**0.5).softmax(-1)
                shares.append(weights[..., :times].sum(-1).mean().item())
                alike.append(times / (times + t + 1))
            assert found.attention[row, place] == pytest.approx(np.mean(shares), abs=1e-5)
            assert found.uniform[row, place] == pytest.approx(np.mean(alike), abs=1e-5)


def test_attention_with_soft_caps_groups_and_windows_is_watched_too():
    from tests.toy import pretrained_part

    for kind in ("gemma2", "mistral", "qwen2"):
        space = space_of("", model=small_model("lang_vae", decoder_name=pretrained_part(kind)))
        found = score(space, some_texts(5), space.means(some_texts(5)), watch=True)
        assert found.attention.shape == (5, 3)
        assert ((found.attention > 0) & (found.attention < 1)).all()
        assert len(found.layers) == 4


@pytest.mark.parametrize("variant", ["gpt_vae", "lang_vae", "ltm", "gp_vae", "attention gp_vae"])
def test_watching_changes_nothing_and_leaves_nothing(variant):
    space, texts = space_of(variant), some_texts(7)
    implementation = space.model.config._attn_implementation
    plain = score(space, texts, space.means(texts))
    watched = score(space, texts, space.means(texts), watch=True)
    np.testing.assert_allclose(watched.nats, plain.nats, rtol=1e-5)
    assert space.model.config._attn_implementation == implementation
    assert injection.AttentionInterface()[injection.INJECTION] is injection.attend
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in space.model.modules())


# ---- states and NLL --------------------------------------------------------------------------------------------------

HEADS = {
    "gpt_vae": lambda model, x: model.lm_head(model.norm(x)),
    "ltm": lambda model, x: model.lm_head(model.norm(x)),
    "gp_vae": lambda model, x: x @ model.vocabulary().T,
    "lang_vae": lambda model, x: model.language_model.lm_head(model.language_model.transformer.ln_f(x)),
}


@pytest.mark.parametrize("variant", sorted(HEADS))
def test_the_last_layer_is_what_the_logits_are_made_of(variant):
    space, texts = space_of(variant), Texts(("", *some_texts(4).texts))
    found = score(space, texts, space.means(texts), watch=True)
    z = torch.from_numpy(space.means(texts)[0])[None]
    with torch.no_grad():  # of a text that is EOS alone one position foretells a token, and its state is the mean
        expected = space.model.decode(z, torch.tensor([[0, 1]]))[0, 0]
        logits = HEADS[variant](space.model, torch.from_numpy(found.states[-1][0]).float())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [*sorted(HEADS), "attention gp_vae"])
def test_figures_of_a_text_are_its_own_whatever_the_batch(variant):
    space, texts = space_of(variant), some_texts(7)
    together = score(space, texts, space.means(texts), watch=True)
    embedded = encoder_output(space, texts) if variant != "ltm" else None
    for row, z, input_ids, _ in alone(space, texts):
        one = texts.select([row])
        by_itself = score(space, one, space.means(one), watch=True)
        for state, expected in zip(by_itself.states, together.states, strict=True):
            np.testing.assert_allclose(state[0], expected[row], atol=1e-4)
        with torch.no_grad():
            each = space.model.log_likelihood(z, input_ids)
        assert together.nats[row] == pytest.approx(-float(each.sum()), rel=1e-4)
        assert together.tokens[row] == each.numel()
        if embedded is not None:
            np.testing.assert_allclose(encoder_output(space, one)[0], embedded[row], atol=1e-4)
    assert together.nats_per_token == pytest.approx(together.nats.sum() / together.tokens.sum())


def test_of_the_encoders_output_q_is_made():
    space, texts = space_of("gpt_vae"), some_texts(5)
    with torch.no_grad():
        means = space.model.encoder.mean(torch.from_numpy(encoder_output(space, texts)).float())
    np.testing.assert_allclose(means.numpy(), np.stack(space.means(texts)), atol=1e-4)
    assert encoder_output(space_of("gradient gpt_vae"), texts) is None


def test_others_are_other_texts_of_the_same_length():
    means = [np.zeros((length, 2)) for length in (3, 2, 3, 5, 2, 3)]
    assert others(means).tolist() == [2, 4, 5, -1, 1, 0]
    assert others([np.zeros(4)] * 5).tolist() == [2, 3, 4, 0, 1]
    assert others([np.zeros(4)]).tolist() == [-1]


def test_the_priors_mean_is_the_models():
    space = space_of("diagonal prior")
    (found,) = prior_means(space, space.means(some_texts(1)))
    np.testing.assert_allclose(found, space.model.prior_mean.detach().numpy(), rtol=1e-6)


# ---- the probe -------------------------------------------------------------------------------------------------------


def test_a_latent_that_the_decoder_does_not_read_has_no_effect_and_no_likeness():
    model = small_variant("gpt_vae")
    nn.init.zeros_(model.latent_tokens.weight)
    space, texts = space_of("", model=model), some_texts(60, least=3)
    result = representation(space, texts)
    effect = result.details["effect of z"]
    assert effect["above own"].abs().max() < 1e-6
    layers = result.table.set_index("layer").loc[["layer 1", "layer 2"]]
    np.testing.assert_allclose(layers["latent"], layers["latent, another text's z"], atol=1e-5)
    assert layers["given latent, another text's z"].abs().max() < 0.15


def test_a_latent_that_is_all_that_the_decoder_reads_is_followed():
    result = representation(space_of("gp_vae"), some_texts(80, least=5, most=5))
    layers = result.table.set_index("layer").loc[["input", "layer 1"]]
    np.testing.assert_allclose(layers["latent"], layers["given latent, another text's z"], atol=1e-6)
    assert layers["latent, another text's z"].abs().max() < 0.2 < layers["latent"].min()


@pytest.mark.parametrize(
    "variant",
    ["gpt_vae", "gradient gpt_vae", "cooperative gpt_vae", "lang_vae", "gradient lang_vae", "interleaved lang_vae",
     "ltm", "amortised", "cooperative", "shared latents", "transformer prior", "gp_vae", "gp_vae of ragged text",
     "attention gp_vae", "gradient gp_vae"],
)  # fmt: skip
def test_every_family_is_probed(variant):
    space, texts = space_of(variant), some_texts(12, most=3)
    result = representation(space, texts)
    layers = result.table[result.table["layer"] != "the latent itself"]
    assert np.isfinite(layers[["latent, shuffled", "latent, another text's z"]].to_numpy()).all()
    assert ("encoder" in layers) == space.model.config.has_encoder
    assert ("attention on latent" in layers) == variant.endswith(("gpt_vae", "lang_vae"))
    similar = result.details["similarity"]
    parts = len(layers) + 1 + space.model.config.has_encoder
    assert len(similar) == parts * (parts - 1) / 2
    assert similar["biased"].between(0, 1.000001).all()
    result.figure()


def test_a_conditional_model_is_probed_with_its_texts_labels():
    space = space_of("", model=small_model("lang_vae", annotation_labels=LABELS, annotation_size=4))
    result = representation(space, some_texts(8, labels=True))
    assert np.isfinite(result.details["effect of z"]["nll per token"]).all()
    with pytest.raises(InputError, match="conditional"):
        representation(space, some_texts(8))


def test_so_many_texts_are_looked_at_and_the_seed_is_that_of_the_shuffle():
    space, texts = space_of("gpt_vae"), some_texts(20)
    few = representation(space, texts, most=10)
    assert few.about.startswith("10 texts")
    assert few.table.equals(representation(space, texts.select(range(10))).table)
    other = representation(space, texts, most=10, seed=1).table
    assert (other["latent"].dropna() == few.table["latent"].dropna()).all()
    assert (other["latent, shuffled"].dropna() != few.table["latent, shuffled"].dropna()).all()


@pytest.mark.parametrize("variant, texts", [
    ("gpt_vae", Texts(("w3",))),
    ("gpt_vae", Texts(("w3", "w4", "w5"))),
    ("gp_vae", Texts(("w3", "w4 w5", "w3 w4 w5", "w3 w4 w5 w6", "w5"))),
])  # fmt: skip
def test_too_few_texts_are_refused(variant, texts):
    with pytest.raises(InputError, match=r"CKA needs at least 4 texts.*give more"):
        representation(space_of(variant), texts)


def test_texts_of_one_token_and_equal_texts_are_no_mistake():
    space = space_of("gpt_vae")
    assert len(representation(space, Texts(("w3", "w4", "w5", "w6", ""))).table)
    equal = representation(space, Texts(("w3 w4",) * 6))
    assert equal.table["latent"].isna().all()  # which do not differ, and have no likeness


def test_a_model_whose_layers_are_not_known_is_refused():
    model = three_verbs()
    model.config.max_position_embeddings = 16
    with pytest.raises(InputError, match="layers of a ThreeVerbs's decoder are not known"):
        representation(space_of("", model=model), some_texts(6))


def test_the_command_leaves_table_and_picture(tmp_path):
    with unchecked():
        asked = ["probe", "representation", str(trained("gpt_vae")), "--data", "builtin:sentences"]
        status, _, err = run(*asked, "--limit", "20", "--most", "10", "--output", str(tmp_path / "out"))
        assert status in (0, None), err
        found = json.loads((tmp_path / "out" / "representation.json").read_text())
        assert {row["layer"] for row in found["table"]} == {"the latent itself", "input", "layer 1", "layer 2"}
        assert len(found["effect of z"]) == 3
        assert (tmp_path / "out" / "representation.png").stat().st_size > 10_000
        status, _, err = run(*asked, "--limit", "3")
    assert_one_sentence(status, err)
