"""From a recipe to a folder: what is built, what is left, and what data it is built from."""

import json

import pytest
import torch
import yaml
from tests.training.runs import run, small_recipe, trained
from transformers import TrainerCallback

from latentlm import InputError, load
from latentlm.data.recipe import load_corpus
from latentlm.training.recipe import load_recipe
from latentlm.training.run import build_model


def texts(dataset, tokenizer):
    return [tokenizer.decode(dataset[index]["input_ids"][1:]) for index in range(len(dataset))]


class Failing(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise ValueError("mistake")


# ---- the model ---------------------------------------------------------------------------------------------------


def test_the_tokenizer_gives_the_vocabulary_and_the_special_tokens():
    corpus = load_corpus(small_recipe().data)
    config = build_model(small_recipe(), corpus.tokenizer).config
    assert config.vocab_size == len(corpus.tokenizer) == 300
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(corpus.tokenizer, name) is not None


def test_the_seed_of_the_recipe_chooses_the_weights():
    tokenizer = load(trained("ltm"))[1]
    torch.manual_seed(5)
    one = build_model(small_recipe("ltm", "training.seed=3"), tokenizer)
    torch.manual_seed(6)
    same = build_model(small_recipe("ltm", "training.seed=3"), tokenizer)
    other = build_model(small_recipe("ltm"), tokenizer)
    assert torch.equal(one.embed_tokens.weight, same.embed_tokens.weight)
    assert not torch.equal(one.embed_tokens.weight, other.embed_tokens.weight)


# ---- the folder --------------------------------------------------------------------------------------------------


def test_what_is_left_says_how_it_was_made(tmp_path):
    stages = []
    trained_now = run(tmp_path / "deep" / "run", "training.seed=3", on_stage=stages.append)
    assert stages == ["reading and tokenising the data", "178 of 190 texts are cut at 48 tokens"]
    folder = tmp_path / "deep" / "run"
    assert json.loads((folder / "history.json").read_text()) == trained_now.history
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe == small_recipe("ltm", "training.seed=3")
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["training"]["seed"] == 3


def test_data_that_is_loaded_already_is_used(tmp_path):
    corpus = load_corpus(small_recipe("ltm", "data.limit=40").data)
    stages = []
    trained_now = run(tmp_path / "run", corpus=corpus, on_stage=stages.append)
    assert trained_now.corpus is corpus
    assert stages == ["35 of 38 texts are cut at 48 tokens"]


def test_a_run_without_a_checkpoint_yet_is_resumed_at_its_beginning(tmp_path):
    said = []
    resumed = run(tmp_path / "run", resume=True, on_stage=said.append)
    assert "no checkpoint yet: starting at the first step" in said[0]
    assert resumed.logged("loss") == run(tmp_path / "other").logged("loss")


def test_a_model_without_checkpoints_is_not_trained_over(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(InputError, match="without checkpoints"):
        run(tmp_path / "run", resume=True)


def test_an_interrupted_replacement_leaves_the_old_model_with_its_own_recipe(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(ValueError, match="mistake"):
        run(tmp_path / "run", "data.length=16", replace=True, callbacks=[Failing()])
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.length == 48


def test_less_text_than_a_batch_trains(tmp_path):
    few = run(tmp_path / "run", "data.limit=4", "data.validation_fraction=0.5")
    assert len(few.corpus.train) < 8
    assert len(few.logged("loss")) == 3


# ---- the data ----------------------------------------------------------------------------------------------------


def test_training_and_validation_share_no_text():
    corpus = load_corpus(small_recipe().data)
    one, other = (texts(part, corpus.tokenizer) for part in (corpus.train, corpus.validation))
    assert len(one) + len(other) == 200
    assert len(other) == 10
    assert not set(one) & set(other)


def test_the_tokenizer_is_trained_on_training_text_alone(tmp_path):
    (tmp_path / "train.txt").write_text("aaaa aaaa\n" * 50)
    (tmp_path / "valid.txt").write_text("bbbb bbbb\n" * 50)
    files = (f"data.source={tmp_path / 'train.txt'}", f"data.validation={tmp_path / 'valid.txt'}", "data.limit=null")
    tokenizer = load_corpus(small_recipe("ltm", *files).data).tokenizer
    assert any("aa" in token for token in tokenizer.get_vocab())
    assert not any("bb" in token for token in tokenizer.get_vocab())


def test_a_tokenizer_may_be_given(tmp_path):
    given = load(trained("ltm"))[1]
    recipe = small_recipe("ltm", f"data.tokenizer={trained('ltm')}", "data.vocab_size=400")
    assert load_corpus(recipe.data).tokenizer.get_vocab() == given.get_vocab()


def test_a_named_validation_source_leaves_all_of_the_other_for_training(tmp_path):
    (tmp_path / "valid.txt").write_text("one text\nand another\n")
    corpus = load_corpus(small_recipe("ltm", f"data.validation={tmp_path / 'valid.txt'}").data)
    assert len(corpus.train) == 200
    assert texts(corpus.validation, corpus.tokenizer) == [
        "one text" + corpus.tokenizer.eos_token,
        "and another" + corpus.tokenizer.eos_token,
    ]


def test_streamed_blocks_are_the_blocks(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of the text" for n in range(60)))
    source = (f"data.source={tmp_path / 'text.txt'}", f"data.validation={tmp_path / 'text.txt'}", "data.limit=null")
    blocks = (*source, "data.unit=blocks", "data.length=16")
    read = load_corpus(small_recipe("ltm", *blocks).data)
    streamed = load_corpus(small_recipe("ltm", *blocks, "data.streaming=true").data)
    assert streamed.tokenizer.get_vocab() == read.tokenizer.get_vocab()
    at_once = [tuple(read.train[index]["input_ids"].tolist()) for index in range(len(read.train))]
    one_by_one = [tuple(item["input_ids"].tolist()) for item in streamed.train]
    assert sorted(one_by_one) == sorted(at_once)
    assert one_by_one != at_once


def test_weights_that_diverged_are_not_saved(tmp_path):
    options = ("training.learning_rate=1e30", "training.max_grad_norm=0", "training.max_steps=4")
    with pytest.raises(InputError, match="diverged"):
        run(tmp_path / "run", *options, family="autoregressive")
    assert not (tmp_path / "run" / "model.safetensors").exists()
