"""Models in folders: saved whole, loaded whole, and refused with the reason where something is wrong."""

import json
import math
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.toy import small_model, texts
from tests.training.runs import trained
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, T5Config

import latentlm
from latentlm import InputError, load, save
from latentlm.data import train_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A saved LTM that a test may damage."""
    return shutil.copytree(trained("ltm"), tmp_path / "model")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat"], 260)


@pytest.fixture
def unchecked_folder(folder):
    """The same without checksums: from elsewhere, or with those of the damage."""
    (folder / "SHA256SUMS").unlink()
    return folder


def changed(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def complaint(folder) -> str:
    with pytest.raises(InputError) as error:
        load(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


# ---- what is loaded is what was saved ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ltm", "autoregressive"])
def test_a_saved_model_comes_back(tmp_path, tokenizer, family):
    model = small_model(family, vocab_size=260)
    model.training_progress.fill_(0.25)
    save(model, tokenizer, tmp_path / "some" / "folder")
    loaded, loaded_tokenizer = load(tmp_path / "some" / "folder")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    rows = texts(2, 7)
    z = model.prior(2, 6).sample()
    with torch.no_grad():
        assert torch.equal(loaded.decode(z, rows), model.decode(z, rows))
    assert loaded_tokenizer("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]


def test_a_folder_holds_what_others_know_and_no_pickle(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "history.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForCausalLM])
def test_transformers_finds_the_family(folder, kind):
    model = kind.from_pretrained(folder)
    assert isinstance(model, latentlm.LTM)
    assert isinstance(AutoConfig.from_pretrained(folder), latentlm.LTMConfig)
    with torch.no_grad():
        assert torch.isfinite(model(texts(2, 6)).loss)


def test_a_relative_path_is_a_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert isinstance(load("model")[0], latentlm.LTM)
    assert isinstance(load("./model")[0], latentlm.LTM)


# ---- what is wrong with a folder ---------------------------------------------------------------------------------


def test_a_folder_that_does_not_exist(tmp_path):
    assert "does not exist" in complaint(tmp_path / "nothing")


def test_a_file_is_no_folder(folder):
    assert "no folder" in complaint(folder / "config.json")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"model_type": null}', "\x00\xff"])
def test_a_folder_without_a_readable_config(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert "model_type" in complaint(folder) or "type None" in complaint(folder)


def test_a_model_of_another_library(tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    message = complaint(tmp_path / "t5")
    assert "'t5'" in message
    assert "latentlm_ltm" in message


def test_a_key_that_the_config_does_not_know(folder):
    changed(folder, latent_sise=4)
    with pytest.raises(InputError, match=r"'latent_sise': did you mean latent_size\?"):
        load(folder)


def test_a_key_that_the_config_does_not_know_is_named_with_the_folder(folder):
    changed(folder, latent_sise=4)
    assert "latent_sise" in complaint(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "wide"),
        ("inference_start", "nowhere"),
        pytest.param("hidden_size", 15),
        pytest.param("latents_per_layer", 0),
    ],
)
def test_a_value_that_the_config_cannot_have(folder, key, value):
    changed(folder, **{key: value})
    assert key in complaint(folder)


def test_weights_are_missing(unchecked_folder):
    (unchecked_folder / "model.safetensors").unlink()
    complaint(unchecked_folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -10])
def test_weights_are_cut_off(unchecked_folder, kept):
    weights = (unchecked_folder / "model.safetensors").read_bytes()
    (unchecked_folder / "model.safetensors").write_bytes(weights[:kept])
    complaint(unchecked_folder)


def test_weights_with_a_damaged_header(unchecked_folder):
    weights = bytearray((unchecked_folder / "model.safetensors").read_bytes())
    weights[8:24] = b"\xff" * 16
    (unchecked_folder / "model.safetensors").write_bytes(weights)
    complaint(unchecked_folder)


@pytest.mark.parametrize("change", ["one fewer", "one more", "another shape"])
def test_weights_of_another_model(unchecked_folder, change):
    weights = load_file(unchecked_folder / "model.safetensors")
    name = "layers.1.cross_attention.key.weight"
    if change == "one fewer":
        del weights[name]
    elif change == "one more":
        name = "layers.2.cross_attention.key.weight"
        weights[name] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, unchecked_folder / "model.safetensors", metadata={"format": "pt"})
    message = complaint(unchecked_folder)
    assert name in message or change == "another shape"


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(lambda weights: weights[:-10], id="cut off"),
        pytest.param(lambda weights: weights[:-1] + bytes([weights[-1] ^ 1]), id="one bit"),
        pytest.param(lambda weights: b"", id="empty"),
    ],
)
def test_weights_that_are_not_as_they_were_saved(folder, tamper):
    weights = folder / "model.safetensors"
    weights.write_bytes(tamper(weights.read_bytes()))
    assert "model.safetensors has changed since it was written" in complaint(folder)


def test_weights_that_are_gone(folder):
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in complaint(folder)


def test_checksums_that_cannot_be_read(folder):
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe")
    assert "SHA256SUMS cannot be read" in complaint(folder)


@pytest.mark.parametrize("kept", ["", "tokenizer.json"])
def test_checksums_without_the_weights(folder, kept):
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if kept and kept in line))
    assert "SHA256SUMS does not list model.safetensors" in complaint(folder)


def test_a_training_that_was_cut_short_names_its_checkpoints(folder):
    shutil.copytree(folder, folder / "checkpoint-5")
    (folder / "config.json").unlink()
    message = complaint(folder)
    assert "cut short" in message and f"such as {folder / 'checkpoint-5'}" in message


def test_a_full_disk_as_tokenizers_tells_it(folder, tokenizer, monkeypatch):
    def full(path):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(InputError, match=r"free some space.* intact"):
        save(small_model("ltm", vocab_size=260), tokenizer, folder)


def test_checksums_are_those_of_the_usual_tool(folder):
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    assert "model.safetensors" in (folder / "SHA256SUMS").read_text()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(unchecked_folder, value):
    weights = load_file(unchecked_folder / "model.safetensors")
    name = next(iter(name for name in weights if weights[name].dim() > 1))
    weights[name][0, 0] = value
    save_file(weights, unchecked_folder / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in complaint(unchecked_folder)


def test_a_pickle_is_not_executed(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    (folder / "model.safetensors").unlink()
    torch.save({"embed_tokens.weight": Trap()}, folder / "pytorch_model.bin")
    torch.save(Trap(), folder / "training_args.bin")
    complaint(folder)
    assert not (tmp_path / "trapped").exists()


def test_the_tokenizer_is_missing(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in complaint(folder)


def test_the_tokenizer_has_more_tokens_than_the_model(unchecked_folder):
    train_tokenizer([f"number {n} of many" for n in range(1000)], 400).save_pretrained(unchecked_folder)
    message = complaint(unchecked_folder)
    assert "do not belong together" in message
    assert "300" in message


# ---- saving is whole ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken():
    """A tokenizer on a full disk."""
    tokenizer = train_tokenizer(["the cat"], 260)

    def save_pretrained(path):
        (path / "tokenizer.json").write_text("half")
        raise OSError("no space left")

    tokenizer.save_pretrained = save_pretrained
    return tokenizer


def test_a_failure_leaves_nothing_where_there_was_nothing(tmp_path, broken):
    with pytest.raises(InputError, match=r"no space.* intact"):
        save(small_model("ltm"), broken, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_an_older_model_as_it_was(folder, broken):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=r"no space.* intact"):
        save(small_model("ltm"), broken, folder)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert os.listdir(folder.parent) == ["model"]


def test_a_model_and_a_tokenizer_that_save_themselves(tmp_path, tokenizer):
    model = small_model("ltm", vocab_size=260)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)[0].embed_tokens.weight, model.embed_tokens.weight)


def test_others_may_read_a_model(tmp_path, tokenizer):
    for _ in range(2):  # a new folder, and one that is there
        save(small_model("ltm", vocab_size=260), tokenizer, tmp_path / "model")
        modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "model").iterdir()}
        assert set(modes.values()) == {"0o644"}
        assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_a_new_model_replaces_an_older_one(folder, tokenizer):
    model = small_model("autoregressive", vocab_size=260)
    save(model, tokenizer, folder)
    loaded, _ = load(folder)
    assert torch.equal(loaded.embed_tokens.weight, model.embed_tokens.weight)
    assert os.listdir(folder.parent) == ["model"]


def test_saving_through_the_working_folder(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(small_model("ltm", vocab_size=260), tokenizer, "model")
    assert isinstance(load("model")[0], latentlm.LTM)


def test_a_file_in_the_way_is_an_error(tmp_path, tokenizer):
    (tmp_path / "model").write_text("mine")
    with pytest.raises((InputError, OSError)):
        save(small_model("ltm", vocab_size=260), tokenizer, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]
