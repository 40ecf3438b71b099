"""Models on the hub: what arrives there, what the card says, and what is refused; the hub is one of this machine."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load
from tests.command import assert_one_sentence, run
from tests.hub import TOKEN, local_hub
from tests.toy import Rows, pretrained_part, small_model, texts
from tests.training.runs import trained, unchecked
from transformers import AutoTokenizer

import latentlm
from latentlm import InputError, LangVAE, push_to_hub
from latentlm.evaluation.measure import measure
from latentlm.files import damage, write_checksums
from latentlm.model_card import model_card
from latentlm.publishing import published_files

RECIPE = """\
model: {{family: {family}}}
data:
  source: {home}/private/glosses.tsv
  validation: ../set apart/valid.tsv
  column: gloss
  unit: sentences
  length: 31
  limit: 900
  tokenizer: {home}/tokenizers/words-of-mine
  cache: kept/tokens
training: {{max_steps: 3, per_device_train_batch_size: 8, gradient_accumulation_steps: 2, logging_dir: {home}/logs}}
encoder: {{embeddings: {home}/embeddings, initial: runs/older}}
"""
HISTORY = [{"step": 1, "tokens": 400.0, "loss": 3.2}, {"step": 3, "tokens": 1234.0, "train_runtime": 2.0}]
OF_MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
PUBLISHED = OF_MODEL | {"recipe.yaml", "history.json", "SHA256SUMS", "README.md"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with local_hub(monkeypatch, str(tmp_path / "cache")) as hub:
        yield hub


@pytest.fixture
def folder(family, model, tmp_path):
    """A run of each family in turn, with what else lies in such a folder."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained_part("gpt2"))
    folder = tmp_path / "runs" / family
    latentlm.save(model, tokenizer, folder)
    (folder / "recipe.yaml").write_text(RECIPE.format(family=family, home=tmp_path))
    if family == "lang_vae":
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["model"] |= {"decoder_name": model.config.decoder_name, "encoder_name": model.config.encoder_name}
        recipe["data"]["tokenizer"] = model.config.decoder_name
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "history.json").write_text(json.dumps(HISTORY))
    shutil.copytree(trained("ltm"), folder / "checkpoint-3")
    for name in ("optimizer.pt", "training_args.bin", "figures.json", "order.json", ".lock", "notes.txt"):
        (folder / name).write_text("mine")
    return folder


@pytest.fixture
def figures(model):
    return figures_of(model)


def figures_of(model, **options):
    found = measure(model, Rows(list(texts(4, 9))), iw_samples=2, prior_samples=4, prompt_tokens=3, **options)
    return found | {"data": "/home/me/valid.tsv", "seed": 7, "settings": ["inference_steps=9"]}


def arrived(hub, folder, name="me/model"):
    """What the hub has under a name, in a folder."""
    folder.mkdir()
    for path, content in hub.repositories[name].files.items():
        (folder / path).write_bytes(content)
    return folder


def with_parts(model, folder):
    """The frozen parts as somebody has them who was given their folders."""
    if isinstance(model, LangVAE):
        for name in (model.config.decoder_name, model.config.encoder_name):
            (folder / Path(name).name).symlink_to(name)
    return folder


# ---- what arrives ----------------------------------------------------------------------------------------------------


def test_what_arrives_is_the_model_and_nothing_else(hub, folder, model, figures, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert push_to_hub(folder, "me/model", figures) == f"{hub.address}/me/model"
    assert hub.repositories["me/model"].private
    assert hub.repositories["me/model"].commits == 1
    published = {name for name in PUBLISHED if name != "generation_config.json" or (folder / name).exists()}
    assert hub.repositories["me/model"].files.keys() == published
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    found = arrived(hub, tmp_path / "arrived")
    assert damage(found) is None
    for name in published - {"model.safetensors"}:
        text = (found / name).read_text(encoding="utf-8")
        for place in (str(tmp_path), os.path.dirname(pretrained_part("gpt2")) + "/", "/home/", "set apart", "kept/"):
            assert place not in text, (name, place)

    monkeypatch.chdir(with_parts(model, tmp_path))
    loaded, tokenizer = latentlm.load(found)
    assert type(loaded) is type(model)
    input_ids = texts(2, 7)
    z = model.prior(2, 6).sample()
    with torch.no_grad():
        assert torch.equal(loaded.decode(z, input_ids), model.decode(z, input_ids))
    assert tokenizer("w3 w7")["input_ids"] == [3, 7]


def test_the_recipe_names_files_without_their_places(hub, tmp_path):
    folder = shutil.copytree(trained("ltm"), tmp_path / "run")
    (folder / "recipe.yaml").write_text(RECIPE.format(family="ltm", home=tmp_path))
    push_to_hub(folder, "me/model")
    assert yaml.safe_load(hub.repositories["me/model"].files["recipe.yaml"]) == {
        "model": {"family": "ltm"},
        "data": {
            "source": "glosses.tsv",
            "validation": "valid.tsv",
            "column": "gloss",
            "unit": "sentences",
            "length": 31,
            "limit": 900,
            "tokenizer": "words-of-mine",
            "cache": "tokens",
        },
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "logging_dir": "logs",
        },
        "encoder": {"embeddings": "embeddings", "initial": "older"},
    }


@pytest.mark.parametrize("source", ["builtin:sentences", "hub:owner/name:config", "C:\\Users\\me\\a.txt", "some/a.txt"])
def test_a_source(tmp_path, source):
    folder = shutil.copytree(trained("ltm"), tmp_path / "run")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["source"] = source
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    expected = source if ":" in source and "\\" not in source else "a.txt"
    files = published_files(folder, "me/model")
    assert yaml.safe_load(files["recipe.yaml"])["data"]["source"] == expected
    assert f"- source: `{expected}`" in files["README.md"].decode()


def test_a_token_that_looks_like_a_path_stays(tmp_path):
    folder = shutil.copytree(trained("ltm"), tmp_path / "run")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"marks": ["/home/s"], "special_tokens_map_file": "/home/me/map.json"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_checksums(folder)
    public = json.loads(published_files(folder, "me/model")["tokenizer_config.json"])
    assert public == config | {"special_tokens_map_file": "map.json"}


def test_a_model_that_is_there_is_replaced_whole(hub, tmp_path):
    push_to_hub(trained("ltm"), "me/model")
    files = hub.repositories["me/model"].files
    files |= {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"{}", "vocab.txt": b""}
    files |= {"picture.png": b"", "more/config.json": b"{}"}
    push_to_hub(trained("autoregressive"), "me/model")
    assert hub.repositories["me/model"].commits == 2
    assert files.keys() == PUBLISHED | {"picture.png", "more/config.json"}
    assert json.loads(files["config.json"])["model_type"] == "latentlm_autoregressive"


def test_transformers_own_push_uploads_our_weights_alone(hub, tmp_path):
    model = small_model("lang_vae", lora_rank=2)
    model.push_to_hub("me/model", private=True)
    ours = load(hub.repositories["me/model"].files["model.safetensors"])
    assert ours.keys() == model._ours(model.state_dict()).keys()
    assert not any(name.startswith(model.frozen) and ".lora_" not in name for name in ours)
    folder = arrived(hub, tmp_path / "arrived")
    AutoTokenizer.from_pretrained(pretrained_part("gpt2")).save_pretrained(folder)
    assert torch.equal(latentlm.load(folder)[0].injection.map.weight, model.injection.map.weight)


# ---- the card --------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is(folder, family, model):
    card = published_files(folder, "me/model")["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": "latentlm", "tags": ["latentlm", family, "language-model"]}
    every = sum(parameter.numel() for parameter in model.parameters())
    ours = every
    if family == "lang_vae":
        ours = sum(value.numel() for name, value in model.named_parameters() if not name.startswith(model.frozen))
        assert ours < every
    assert f"`{family}`" in text
    assert f"- parameters: {every:,} in all, {ours:,} of them trained" in text
    assert ("none; its likelihood is exact" in text) == model.exact
    assert 'latentlm.load("me/model")' in text
    assert "- source: `glosses.tsv`, column `gloss`, its first 900 documents" in text
    assert "- split: held out: `valid.tsv`" in text
    assert "at most 31 tokens" in text
    assert "- tokenizer: " + ("the decoder's" if family == "lang_vae" else "that of `words-of-mine`") in text
    assert "- steps: 3\n- tokens seen: 1,234 scored tokens\n- batch of each step and process: 16 sequences" in text
    assert "- seed: 0\n" in text
    assert "None were measured" in text
    assert "| figure |" not in text
    assert "None" not in text.replace("None were measured", "")


def test_the_card_says_of_each_figure_what_it_is(folder, family, model, figures):
    (folder / "history.json").write_text("[]")
    card = published_files(folder, "me/model", figures)["README.md"].decode()
    assert "None were measured" not in card
    assert "- data: `valid.tsv`\n- 4 sequences, 32 scored tokens\n- seed of all noise: 7\n" in card
    assert "- inferred otherwise than in training: inference_steps=9" in card
    section = card.partition("## Figures")[2]
    rows = [re.split(r" +\| +", line.strip("| ")) for line in section.splitlines() if line.startswith("| ")][2:]
    found = {}
    for label, value, kind in rows:
        found.setdefault(label, []).append((value, kind))
    nll = found["NLL, nats per token"]
    after = found["NLL of what follows, nats per token, after 3 tokens"]
    if model.exact:
        assert "K:" not in section
        assert nll == [(f"= {figures['iw_nll_per_token']:.4f}", "exact")]
        assert after == [(f"= {figures['continuation_nll_per_token']:.4f}", "exact")]
        assert not [label for label in found if label.startswith(("reconstruction", "KL", "mutual", "active"))]
        assert "bound" not in str(rows)
    else:
        assert "- samples of z for each text, K: 2" in section
        assert nll == [
            (f"≤ {figures['iw_nll_per_token']:.4f}", "a bound, importance-weighted, K = 2"),
            (f"≤ {figures['elbo_nll_per_token']:.4f}", "a bound, the ELBO"),
        ]
        assert after[0][1].startswith("a bound, z inferred from what stands before it alone, K = 2")
        [(value, kind)] = found["reconstruction, nats per token"]
        assert value == f"{figures['reconstruction_nll_per_token']:.4f}"
        assert kind.startswith("no likelihood and no bound")
        assert found["KL(q ‖ p), nats per sequence"][0][1].startswith("no likelihood")
    assert found["texts from the prior: distinct-1"][0][1].startswith("no likelihood")
    for _, _, kind in rows:
        assert re.match(r"exact$|a bound|no bound|no likelihood", kind)


def test_published_figures_are_no_bound():
    model = small_model("ltm")
    card = model_card(model, "me/model", figures=figures_of(model, protocol="paper"))
    assert "- protocol: paper; what the family's published code would report is marked so" in card
    assert re.search(r"as published: perplexity \| [\d.]+ \| no bound: as the family's published code", card)


def test_figures_without_their_seed_or_data_say_so():
    model = small_model("ltm")
    card = model_card(model, "me/model", figures=measure(model, Rows(list(texts(2, 5))), iw_samples=1))
    assert "- data: not recorded" in card
    assert "- seed of all noise: not recorded" in card


def test_a_model_without_recipe_and_history_says_so(tmp_path):
    latentlm.save(small_model("ltm"), AutoTokenizer.from_pretrained(pretrained_part("gpt2")), tmp_path / "model")
    files = published_files(tmp_path / "model", "me/model")
    assert files.keys() == PUBLISHED - {"recipe.yaml", "history.json"}
    card = files["README.md"].decode()
    assert "nothing is known here of its data" in card
    assert "- steps: not known" in card


def test_parts_of_the_hub_are_its_base_models():
    model = small_model("lang_vae")
    model.config.decoder_name, model.config.decoder_revision = "owner/decoder", "abc123"
    model.config.encoder_name = "owner/encoder"
    card = model_card(model, "me/model")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["owner/decoder", "owner/encoder"]
    mark = model.config.decoder_fingerprint
    link = "[owner/decoder](https://huggingface.co/owner/decoder)"
    assert f"| decoder | {link} | `abc123` | `{mark}` |" in card
    assert re.search(r"\| encoder \| .* \| not fixed \| `\w{64}` \|", card)
    assert "Warning" not in card


def test_parts_in_folders_are_warned_of():
    model = small_model("lang_vae")
    card = model_card(model, "me/model")
    assert "base_model" not in card
    for part in ("decoder", "encoder"):
        name = Path(getattr(model.config, f"{part}_name")).name
        assert f"| {part} | `{name}`, a local folder | – | `{getattr(model.config, f'{part}_fingerprint')}` |" in card
        assert f"**Warning:** the {part} is not on the hub. It was a local folder, `{name}`" in card


def test_a_model_without_an_encoder_has_one_part():
    card = model_card(small_model("lang_vae", inference="gradient"), "me/model")
    assert "| encoder |" not in card


def test_two_parts_of_one_name(tmp_path):
    parts = {part: tmp_path / part / "model" for part in ("decoder", "encoder")}
    for part, kind in (("decoder", "gpt2"), ("encoder", "bert")):
        shutil.copytree(pretrained_part(kind), parts[part])
    model = small_model("lang_vae", **{f"{part}_name": str(path) for part, path in parts.items()})
    latentlm.save(model, AutoTokenizer.from_pretrained(parts["decoder"]), tmp_path / "run")
    with pytest.raises(InputError, match="would have one name on the hub: rename one of the folders"):
        published_files(tmp_path / "run", "me/model")


@pytest.mark.parametrize("family", ["ltm", "lang_vae"])
def test_what_the_card_says_to_run_runs(hub, folder, model, tmp_path, monkeypatch, capsys):
    push_to_hub(folder, "me/model")
    monkeypatch.chdir(with_parts(model, tmp_path))
    [code] = re.findall(r"```python\n(.*?)```", hub.repositories["me/model"].files["README.md"].decode(), re.DOTALL)
    exec(code.replace("max_new_tokens=32", "max_new_tokens=4"))
    assert len(capsys.readouterr().out.splitlines()) == 3


# ---- mistakes --------------------------------------------------------------------------------------------------------


def complaint(*arguments, **options):
    with pytest.raises(InputError) as error:
        push_to_hub(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize(
    "name", ["model", "me/", "/model", "me/a/b", "me/mo del", "me/.model", "mé/model", "", "a--b/c"]
)
def test_a_name_that_is_none(hub, name):
    assert "is no name on the hub: write OWNER/NAME" in complaint(trained("ltm"), name)
    assert not hub.repositories


def test_a_folder_without_a_model(hub, tmp_path):
    assert "does not exist" in complaint(tmp_path / "nothing", "me/model")
    assert "does not exist" in complaint("me/model", "me/model")
    assert "no saved model" in complaint(tmp_path, "me/model")
    assert not hub.repositories


def test_a_model_that_is_not_whole(hub, tmp_path):
    folder = shutil.copytree(trained("ltm"), tmp_path / "run")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    assert "is no whole model" in complaint(folder, "me/model")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        ("{", "is no JSON: give what latentlm evaluate"),
        ("[1]", "are no mapping of names to numbers"),
        ('{"ltm": {}}', "lack sequences"),
        ({"iw_nll_per_token": "low"}, "iw_nll_per_token is no number"),
        ({"elbo_nll_per_token": float("nan")}, "elbo_nll_per_token is no number"),
        ({"tokens": 1.5}, "tokens is no number"),
        ({"parameters": 1_000}, "of another model, of 1,000 parameters"),
        ({"exact": True}, "of another model"),
        ({"training_tokens": 99}, "trained on 99 tokens, and this one on"),
    ],
    ids=str,
)
def test_figures_that_are_not_this_models(hub, tmp_path, content, words):
    file = tmp_path / "figures.json"
    if isinstance(content, dict):
        model, _ = latentlm.load(trained("ltm"))
        content = json.dumps(measure(model, Rows(list(texts(2, 5))), iw_samples=1) | content)
    if content is not None:
        file.write_text(content)
    assert words in complaint(trained("ltm"), "me/model", file)
    assert not hub.repositories


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses(hub, monkeypatch, status):
    hub.refusal = status
    assert "does not let you write to me/model" in complaint(trained("ltm"), "me/model", token="hf_of_another")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert "does not let you write to me/model" in complaint(trained("ltm"), "me/model")
    assert push_to_hub(trained("ltm"), "me/model", token=TOKEN)


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "hub cannot be reached: check the network" in complaint(trained("ltm"), "me/model")


def test_what_is_public_is_not_pushed_to_as_private(hub):
    push_to_hub(trained("ltm"), "me/model", private=False)
    assert not hub.repositories["me/model"].private
    assert "me/model is public" in complaint(trained("ltm"), "me/model")
    assert hub.repositories["me/model"].commits == 1
    push_to_hub(trained("autoregressive"), "me/model", private=False)
    assert hub.repositories["me/model"].commits == 2


# ---- the command -----------------------------------------------------------------------------------------------------


def test_evaluated_and_pushed_by_the_command(hub, tmp_path):
    data, file = tmp_path / "held-out.txt", str(tmp_path / "figures.json")
    data.write_text("the cat sat\nsome dogs\n")
    with unchecked():
        scoring = ("--iw-samples", "3", "--seed", "5", "--set", "inference_steps=1")
        status, _, err = run("evaluate", str(trained("ltm")), "--data", str(data), *scoring, "--json", file)
        assert (status, err) == (0, "")
        status, out, err = run("push", str(trained("ltm")), "me/model", "--figures", file, "--public")
        assert (status, out) == (0, f"{hub.address}/me/model\n"), err
        assert_one_sentence(*run("push", str(trained("ltm")), "me/model")[::2])
    assert not hub.repositories["me/model"].private
    card = hub.repositories["me/model"].files["README.md"].decode()
    assert "- data: `held-out.txt`" in card
    assert "- seed of all noise: 5\n- samples of z for each text, K: 3\n" in card
    assert "training: inference_steps=1" in card
