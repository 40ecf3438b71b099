"""LangVAE around large models: the precision of what is frozen, where it lies, and layers that are computed anew."""

import pytest
import torch
from tests.families.test_lang_vae import ARCHITECTURES, config, lang_vae, latents_of
from tests.toy import padded, pretrained_part, small_model, texts
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

import latentlm
from latentlm import InputError, LangVAE
from latentlm.latent_lm import number_of_parameters

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# bfloat16 has 8 bits of a number, so that each of some 20 roundings in a row errs by up to 2^-9 = 0.2 per cent
NEAR = {"bfloat16": 0.02, "float16": 0.003}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def lost(model, seed=0):
    """The loss of a training step on padded texts, and the gradients that it leaves."""
    model.zero_grad()
    input_ids, mask = padded(texts(4, 10), [10, 7, 4, 2], "right")
    loss = model.train()(input_ids, mask, seed=seed).loss
    loss.backward()
    model.eval()
    return loss.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def same(found, expected):
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def ours(model):
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def frozen_dtypes(model):
    return {one.dtype for name, one in model.named_parameters() if not one.requires_grad}


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", NEAR)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_is_near_the_whole(architecture, precision):
    whole, half = lang_vae(architecture), lang_vae(architecture, frozen_precision=precision)
    assert frozen_dtypes(half) == {DTYPES[precision]}
    assert {one.dtype for one in ours(half).values()} == {torch.float32}
    input_ids, z = texts(3, 9), latents_of(half, 3)
    scores = half.log_likelihood(z, input_ids)
    assert scores.dtype == torch.float32
    # of the float32 softmax of half logits: in bfloat16 the whole distribution would sum to something else
    assert half.decode(z, input_ids).float().log_softmax(-1).exp().sum(-1).sub(1).abs().max() < 1e-5
    expected, found = lost(whole), lost(half)
    torch.testing.assert_close(found[0], expected[0], atol=0, rtol=NEAR[precision])
    assert found[1].keys() == expected[1].keys() == ours(half).keys()
    for name, gradient in found[1].items():
        assert gradient.dtype == torch.float32 and bool(torch.isfinite(gradient).all()), name
        if name.startswith("injection"):
            cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected[1][name].flatten(), dim=0)
            assert cosine > 0.99, name


@pytest.mark.parametrize("encoder", ["bert", "t5", "llama"])
def test_a_half_encoder(encoder):
    whole, half = lang_vae(encoder=encoder), lang_vae(encoder=encoder, frozen_precision="bfloat16")
    found, expected = (model.embed(texts(3, 8)) for model in (half, whole))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_step_moves_only_what_is_ours(rank):
    model = lang_vae("llama", frozen_precision="bfloat16", lora_rank=rank)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimiser = torch.optim.SGD(ours(model).values(), lr=0.1)
    for seed in range(2):  # an adapter's first half has a gradient when its second has left 0
        _, gradients = lost(model, seed)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
        optimiser.step()
    for name, one in model.named_parameters():
        assert torch.equal(one, before[name]) != one.requires_grad, name
        assert one.dtype == (torch.float32 if one.requires_grad else torch.bfloat16)
    assert any(".lora_" in name for name in ours(model)) == bool(rank)


@pytest.mark.parametrize("rank", [0, 2])
def test_precision_is_kept_and_written_with(rank, tmp_path):
    model = lang_vae(frozen_precision="bfloat16", lora_rank=rank)
    latentlm.save(model, AutoTokenizer.from_pretrained(pretrained_part("gpt2")), tmp_path / "m")
    loaded, _ = latentlm.load(tmp_path / "m")
    assert loaded.config.frozen_precision == "bfloat16" and frozen_dtypes(loaded) == {torch.bfloat16}
    assert {one.dtype for one in ours(loaded).values()} == {torch.float32}
    assert loaded.config.decoder_fingerprint == lang_vae().config.decoder_fingerprint
    input_ids, z = texts(3, 4), latents_of(model, 3)
    written = loaded.generate(input_ids, latents=z, max_new_tokens=8, do_sample=False)
    assert torch.equal(written, model.generate(input_ids, latents=z, max_new_tokens=8, do_sample=False))
    assert written.shape == (3, 12)


def test_an_unknown_precision():
    with pytest.raises(Exception, match="frozen_precision"):
        config(frozen_precision="8bit")


def test_four_bits_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr("latentlm.pretrained.is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match="frozen_precision 4bit needs another package: pip install bitsandbytes"):
        LangVAE(config(frozen_precision="4bit"))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("rank", [0, 2])
def test_four_bits(architecture, rank, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    # on such a CPU weights would be laid out anew in the first pass without gradient, and let none through
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = lang_vae(architecture, frozen_precision="4bit", lora_rank=rank)
    assert frozen_dtypes(model) == {torch.uint8, torch.bfloat16}
    assert {one.dtype for one in ours(model).values()} == {torch.float32}
    if not rank:
        assert number_of_parameters(model) == number_of_parameters(lang_vae(architecture))
    expected, found = lost(lang_vae(architecture, lora_rank=rank)), lost(model)
    # 16 levels for weights of 16 × 16: the loss is of the same size, and no more can be said of so small a model
    torch.testing.assert_close(found[0], expected[0], atol=0, rtol=0.3)
    assert found[1].keys() == ours(model).keys()
    for name, gradient in found[1].items():
        assert bool(torch.isfinite(gradient).all()) and (bool(gradient.any()) or ".lora_A" in name), name
    latentlm.save(model, AutoTokenizer.from_pretrained(pretrained_part("gpt2")), tmp_path / "m")
    loaded, _ = latentlm.load(tmp_path / "m")
    input_ids, z = texts(3, 4), latents_of(model, 3)
    torch.testing.assert_close(loaded.decode(z, input_ids), model.decode(z, input_ids))
    written = loaded.generate(input_ids, latents=z, max_new_tokens=8, do_sample=False)
    assert torch.equal(written, model.generate(input_ids, latents=z, max_new_tokens=8, do_sample=False))
    model.activation_checkpointing_enable()
    same(lost(model), found)


# ---- where the frozen models lie -------------------------------------------------------------------------------------

DISK = {
    **{f"language_model.{name}": "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head")},
    **{f"language_model.{name}": "disk" for name in ("model.layers.1", "model.layers.2")},
    **{f"text_encoder.{name}": "disk" for name in ("embeddings", "encoder", "pooler")},
}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu", {"language_model": "cpu"}, DISK], ids=str)
def test_device_maps_change_nothing(device_map, tmp_path):
    plain = lang_vae("llama", frozen_precision="bfloat16")
    latentlm.save(plain, AutoTokenizer.from_pretrained(pretrained_part("llama")), tmp_path / "m")
    placed, _ = latentlm.load(tmp_path / "m", device_map=device_map)
    assert any(one.is_meta for one in placed.parameters()) == (device_map is DISK)
    assert placed.device.type == "cpu"
    input_ids, z = texts(3, 9), latents_of(plain, 3)
    rows, mask = padded(input_ids, [9, 5, 2], "left")
    with torch.no_grad():
        torch.testing.assert_close(placed.decode(z, rows, mask), plain.decode(z, rows, mask), **CLOSE)
        torch.testing.assert_close(placed.infer(rows, mask).mean, plain.infer(rows, mask).mean, **CLOSE)
    expected = lost(plain)
    same(lost(placed), expected)
    for model in (placed, AutoModel.from_pretrained(tmp_path / "m", device_map=device_map)):
        written = model.generate(input_ids[:, :3], latents=z, max_new_tokens=6, do_sample=False)
        assert torch.equal(written, plain.generate(input_ids[:, :3], latents=z, max_new_tokens=6, do_sample=False))
    placed.activation_checkpointing_enable()
    same(lost(placed), expected)
    placed.save_pretrained(tmp_path / "again")
    again = LangVAE.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again.decode(z, input_ids), plain.decode(z, input_ids))


def test_device_maps_that_do_not_fit(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(pretrained_part("llama"))
    latentlm.save(lang_vae("llama", lora_rank=2), tokenizer, tmp_path / "lora")
    with pytest.raises(InputError, match="adapters do not go with weights that are offloaded"):
        latentlm.load(tmp_path / "lora", device_map=DISK)
    with pytest.raises(InputError, match="device_map names injection"):
        latentlm.load(tmp_path / "lora", device_map={"injection": "cpu"})
    latentlm.save(small_model("ltm"), tokenizer, tmp_path / "ltm")
    with pytest.raises(InputError, match="only a lang_vae takes a device_map"):
        latentlm.load(tmp_path / "ltm", device_map="auto")


# ---- layers that are computed anew -----------------------------------------------------------------------------------


def passes(model):
    """Counts the passes through each layer of the decoder."""
    layers = [one for one in model.language_model.modules() if isinstance(one, GradientCheckpointingLayer)]
    counts = [0] * len(layers)

    def count(place):
        def hook(*_):
            counts[place] += 1

        return hook

    for place, layer in enumerate(layers):  # its first child with weights of its own
        next(
            child for child in layer.modules() if next(child.parameters(recurse=False), None) is not None
        ).register_forward_hook(count(place))
    return counts


def saved_bytes(model):
    """What autograd keeps of a step, each storage once."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(texts(8, 30), seed=0).loss
    model.eval()
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "opt", "gpt_neox"])
def test_layers_computed_anew(architecture):
    plain, anew = lang_vae(architecture), lang_vae(architecture)
    for model in (plain, anew):
        for module in model.language_model.modules():  # configs give some of them none
            for name in ("dropout", "attention_dropout", "hidden_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.5)
    expected, counts = lost(plain), passes(anew)
    input_ids, z = texts(3, 4), latents_of(plain, 3)
    written = plain.generate(input_ids, latents=z, max_new_tokens=8, do_sample=False)
    anew.activation_checkpointing_enable()
    assert anew.is_activation_checkpointing
    same(lost(anew), expected)
    assert counts == [2] * len(counts) and len(counts) >= 2
    assert torch.equal(anew.generate(input_ids, latents=z, max_new_tokens=8, do_sample=False), written)
    assert [count - 2 for count in counts] == [8] * len(counts)  # one for each token: the cache is used
    kept = saved_bytes(anew)
    anew.activation_checkpointing_disable()
    assert saved_bytes(anew) > 2 * kept
    assert not anew.is_activation_checkpointing
    before = counts[0]
    same(lost(anew), expected)
    assert counts[0] == before + 1


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"preserve_rng_state": False}, None])
def test_whatever_kind_is_asked_for(options):
    plain, anew = lang_vae("qwen3", lora_rank=2), lang_vae("qwen3", lora_rank=2)
    anew.activation_checkpointing_enable(options)
    same(lost(anew), lost(plain))


def test_every_second_layer():
    model = lang_vae("llama")
    counts = passes(model)
    for every, expected in ((2, [2, 1, 2]), (1, [2, 2, 2])):
        model.activation_checkpointing_enable(every_n_layers=every)
        counts[:] = [0, 0, 0]
        lost(model)
        assert counts == expected


@pytest.mark.parametrize("inference", ["gradient", "cooperative", "langevin"])
def test_inference_by_gradient_goes_through(inference):
    steps = {"inference": inference, "inference_steps": 2, "langevin_steps": 2}
    plain, anew = lang_vae("llama", **steps), lang_vae("llama", **steps)
    anew.activation_checkpointing_enable()
    same(lost(anew), lost(plain))


def test_a_plain_model_with_dropout():
    own = {"architecture_fields": {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.5}}
    plain, anew = (small_model("huggingface", **own) for _ in range(2))
    anew.activation_checkpointing_enable()
    torch.manual_seed(3)
    expected = lost(plain)
    torch.manual_seed(3)
    same(lost(anew), expected)


def test_a_model_without_layers_is_refused():
    model = lang_vae()
    model.language_model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(InputError, match="has no layers to compute anew"):
        model.activation_checkpointing_enable()
