"""LangVAE through recipes: trained, resumed, evaluated and loaded like any family, with and without kept embeddings."""

import json
import shutil

import pytest
import torch
from tests.toy import VOCABULARY, pretrained_part

from latentlm import InputError, LangVAE, load
from latentlm.data.recipe import evaluation_sequences
from latentlm.evaluation.likelihood import evaluate
from latentlm.training.recipe import parse_recipe
from latentlm.training.run import build_model, train


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (n % 9 + 2,), generator=generator) for n in range(120)]
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n".join(" ".join(f"w{token}" for token in row) for row in rows), encoding="utf-8")
    return path


def recipe(texts_file, *overrides, decoder="gpt2"):
    text = f"""
model:
  family: lang_vae
  decoder_name: {pretrained_part(decoder)}
  encoder_name: {pretrained_part("bert")}
  latent_size: 4
  latent_slots: 2
data: {{source: {texts_file}, unit: sentences, length: 8}}
training:
  max_steps: 6
  per_device_train_batch_size: 8
  learning_rate: 1e-2
  save_steps: 3
  logging_steps: 1
  eval_strategy: no
  report_to: none
  use_cpu: true
"""
    return parse_recipe(text, "lang.yaml", overrides)


def losses(history):
    return [entry["loss"] for entry in history if "loss" in entry]


def test_trained_and_loaded(texts_file, tmp_path):
    said = []
    model, corpus, history = train(recipe(texts_file), tmp_path / "run", on_stage=said.append)
    assert isinstance(model, LangVAE) and len(losses(history)) == 6
    assert corpus.train.truncated > 0
    assert f"{corpus.train.truncated} of {len(corpus.train)} texts are cut at 8 tokens" in said
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert f"{trained:,} parameters train, beside {frozen:,} frozen ones (Optimus trains 233 million)" in said
    assert len(corpus.tokenizer) == VOCABULARY
    loaded, tokenizer = load(tmp_path / "run")
    sequences = evaluation_sequences(tmp_path / "run", tokenizer, 8)
    before, after = (evaluate(one, sequences, iw_samples=2) for one in (model, loaded))
    assert before["iw_nll_per_token"] == pytest.approx(after["iw_nll_per_token"], rel=1e-6)
    assert not before["exact"] and before["latent_units"] == 4
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["decoder_fingerprint"] and saved["encoder_fingerprint"]


@pytest.mark.parametrize("changes", [(), ("model.lora_rank=2",)])
def test_resumed_is_uninterrupted(texts_file, tmp_path, changes):
    whole, corpus, _ = train(recipe(texts_file, *changes), tmp_path / "whole")
    # as a run that was killed after its third step has left its folder
    (tmp_path / "cut").mkdir()
    for name in ("checkpoint-3", "recipe.yaml"):
        (shutil.copytree if name.startswith("checkpoint") else shutil.copy)(
            tmp_path / "whole" / name, tmp_path / "cut" / name
        )
    resumed, _, history = train(recipe(texts_file, *changes), tmp_path / "cut", resume=True)
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    fresh = build_model(recipe(texts_file, *changes), corpus.tokenizer)
    for (name, one), other, start in zip(
        whole.named_parameters(), resumed.parameters(), fresh.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)
        assert one.requires_grad != torch.equal(one, start), name


def test_kept_embeddings_change_nothing(texts_file, tmp_path):
    plain = train(recipe(texts_file), tmp_path / "plain")[2]
    for run in ("first", "second"):
        kept = train(recipe(texts_file, f"encoder.embeddings={tmp_path / 'kept'}"), tmp_path / run)[2]
        assert losses(kept) == pytest.approx(losses(plain), rel=1e-5)
    assert len(list((tmp_path / "kept").glob("*/part-*"))) == 1


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
def test_layers_computed_anew_change_nothing(texts_file, tmp_path, key):
    plain = train(recipe(texts_file), tmp_path / "plain")[2]
    model, _, history = train(recipe(texts_file, f"training.{key}=true"), tmp_path / "anew")
    assert model.is_activation_checkpointing
    assert losses(history) == pytest.approx(losses(plain), rel=1e-6)


def test_trained_in_half_precision(texts_file, tmp_path):
    plain = train(recipe(texts_file), tmp_path / "plain")[2]
    model, _, history = train(recipe(texts_file, "model.frozen_precision=bfloat16"), tmp_path / "half")
    assert losses(history) == pytest.approx(losses(plain), rel=0.02)
    loaded, tokenizer = load(tmp_path / "half")
    assert loaded.language_model.dtype == loaded.text_encoder.dtype == torch.bfloat16
    sequences = evaluation_sequences(tmp_path / "half", tokenizer, 8)
    before, after = (evaluate(one, sequences, iw_samples=2) for one in (model, loaded))
    assert before["iw_nll_per_token"] == pytest.approx(after["iw_nll_per_token"], rel=1e-6)


def test_four_bits_are_refused_where_they_cannot_be_had(texts_file, monkeypatch):
    monkeypatch.setattr("latentlm.pretrained.is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match=r"^lang.yaml, line 2: .*pip install bitsandbytes\.$"):
        recipe(texts_file, "model.frozen_precision=4bit")


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.frozen_precision=8bit", "frozen_precision"),
        ("data.tokenizer=words", "data.tokenizer must be that of model.decoder_name"),
        ("model.decoder_name=nowhere/at-all/x", "nowhere/at-all/x"),
        ("model.encoder_name=nowhere/at-all/x", "nowhere/at-all/x"),
        ("data.length=65", "is 64 tokens, and texts may have 65"),
        ("model.inference=gradient", None),
        ("model.pooling=max", "pooling"),
    ],
)
def test_what_a_recipe_says_wrong(texts_file, override, message):
    if message is None:
        assert not recipe(texts_file, override).model_config(vocab_size=VOCABULARY).has_encoder
        return
    with pytest.raises(InputError, match=message):
        recipe(texts_file, override)


def test_embeddings_are_for_an_encoder(texts_file):
    with pytest.raises(InputError, match=r"encoder\.embeddings is for a lang_vae with an encoder"):
        recipe(texts_file, "encoder.embeddings=kept", "model.inference=gradient")


def test_runs_side_by_side_wait_for_what_one_keeps(texts_file, tmp_path):
    import threading

    from latentlm.files import alone_in

    model, corpus, _ = train(recipe(texts_file), tmp_path / "run")
    model.keep_embeddings(tmp_path / "kept")
    held, waiting = threading.Event(), threading.Event()

    def hold():
        with alone_in(model._kept.folder):
            held.set()
            assert waiting.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(60)
    with pytest.raises(InputError, match="another process works"):
        model.keep_embeddings(tmp_path / "kept", corpus.train)
    said = []
    model.keep_embeddings(tmp_path / "kept", corpus.train, on_wait=lambda: (said.append(1), waiting.set()))
    other.join()
    assert said == [1] and len(model._kept) > 0


def test_workers_make_the_encoders_tokens(texts_file, tmp_path):
    plain = train(recipe(texts_file), tmp_path / "plain")[2]
    workers = train(recipe(texts_file, "training.dataloader_num_workers=1"), tmp_path / "workers")[2]
    assert losses(workers) == pytest.approx(losses(plain), rel=1e-6)
