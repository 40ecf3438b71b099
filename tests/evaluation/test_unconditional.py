"""Texts from nothing: by hand, beside `prior_samples`, and of every family."""

import math

import pytest
import torch
from tests.toy import BOS, EOS, PAD, pretrained_part, small_model, small_variant

from latentlm import InputError
from latentlm.data.tokenizers import load_tokenizer
from latentlm.evaluation.generative import Reader, generative_perplexity
from latentlm.evaluation.samples import prior_samples
from latentlm.evaluation.unconditional import unconditional

WRITERS = ("ltm", "gpt_vae", "gp_vae", "gp_vae of ragged text", "lang_vae", "autoregressive", "huggingface")
TIMES = {"seconds", "tokens_per_second", "samples_per_second"}


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(pretrained_part("gpt2"))


def without_times(figures):
    return {name: {key: row[key] for key in row if key not in TIMES} for name, row in figures["rows"].items()}


@pytest.mark.parametrize("name", WRITERS)
def test_every_family_and_a_seed_repeats_it(name, words):
    ends = {} if name == "gp_vae of ragged text" else {"eos_token_id": EOS}
    model, fixed_length = small_variant(name, **ends), "ragged" not in name
    (one, lines), (again, _), (other, _) = (
        unconditional(model, words, number=5, length=6, fixed_length=fixed_length, seed=seed) for seed in (3, 3, 4)
    )
    assert without_times(one) == without_times(again)
    assert without_times(one)["sampled"] != without_times(other)["sampled"]
    assert len(lines) == 10
    greedy, sampled = one["rows"]["greedy"], one["rows"]["sampled"]
    assert sampled["different_texts"] > 1
    assert greedy["different_texts"] == 1 or not model.exact
    if fixed_length:
        assert greedy["tokens"] == sampled["tokens"] == 30
    for row in (greedy, sampled):
        assert row["samples_per_second"] > 0 and row["tokens_per_second"] > 0


@pytest.mark.parametrize("family", ["autoregressive", "ltm"])
def test_sampled_texts_of_free_length_are_those_of_prior_samples(family, words):
    model = small_model(family, eos_token_id=EOS)
    row = unconditional(model, words, number=40, length=12, fixed_length=False, seed=5)[0]["rows"]["sampled"]
    expected = prior_samples(model, number=40, max_new_tokens=12, seed=5)
    assert row["tokens"] == expected["sample_tokens"]
    assert row["token_entropy_nats"] == pytest.approx(expected["sample_entropy_nats"])
    for n in (1, 2, 3):
        assert row[f"distinct_{n}"] == pytest.approx(expected[f"distinct_{n}"])


def bent_to_the_end(family: str, weight: float):
    """A model whose words are all as likely as each other, but the end."""
    model = small_model(family, eos_token_id=EOS, tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()
    write = model.lm_head.forward
    model.lm_head.forward = lambda states: write(states) + weight * (torch.arange(23) == EOS)
    return model


@pytest.mark.parametrize("family", ["autoregressive", "ltm"])
def test_texts_of_fixed_length_go_on_past_their_ends_by_the_same_law(family, words):
    """An end of probability 1/2 takes half of the places; a text of free length has one token before it on average."""
    model = bent_to_the_end(family, math.log(22))
    fixed, lines = unconditional(model, words, number=64, length=32)
    free, _ = unconditional(model, words, number=64, length=32, fixed_length=False)
    row = fixed["rows"]["sampled"]
    assert row["tokens"] == 64 * 32
    # entropy of 32 draws is less than of the law, ln 2 + ln 22 / 2, by what many rare words have not shown
    assert math.log(2) < row["token_entropy_nats"] < math.log(2) + math.log(22) / 2
    written = [line["text"].split() for line in lines if line["row"] == "sampled"]
    share = 1 - sum(map(len, written)) / (64 * 32)
    assert abs(share - 1 / 2) < 0.15  # the tokens of BOS and padding are no words either, two of 22
    assert free["rows"]["sampled"]["tokens"] < 64 * 3
    assert free["rows"]["greedy"]["tokens"] == 0  # the likeliest is the end


def test_the_greedy_text_of_a_control_is_written_once(monkeypatch, words):
    model = small_model("autoregressive", eos_token_id=EOS)
    asked, write = [], model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **k: asked.append((len(ids), k)) or write(ids, **k))
    found, lines = unconditional(model, words, number=40, length=4)
    assert [(number, k["do_sample"]) for number, k in asked] == [(1, False), (32, True), (8, True)]
    greedy = found["rows"]["greedy"]
    assert (greedy["texts"], greedy["different_texts"], greedy["tokens"]) == (40, 1, 160)
    assert len(lines) == 80 and len({line["text"] for line in lines[:40]}) == 1


def test_greedy_texts_of_other_latents_differ(words):
    model = small_variant("ltm", eos_token_id=EOS)
    assert unconditional(model, words, number=8, length=16)[0]["rows"]["greedy"]["different_texts"] > 1


def test_the_length_is_the_contexts_by_default_and_no_more(words):
    model = small_model("gp_vae")
    assert unconditional(model, words, number=2)[0]["rows"]["greedy"]["tokens"] == 64
    with pytest.raises(InputError, match="texts of 33 tokens exceed the model's context of 32"):
        unconditional(model, words, number=2, length=33)


def test_a_scorer_reads_the_texts(words):
    model = small_model("autoregressive", eos_token_id=EOS, tie_word_embeddings=False)
    write = model.lm_head.forward
    barred = torch.zeros(23).index_fill(0, torch.tensor([BOS, PAD]), -1e4)  # which are not in the text
    model.lm_head.forward = lambda states: write(states) + barred
    model_that_scores = Reader(small_model("autoregressive", seed=1, eos_token_id=EOS), words)
    found, lines = unconditional(
        model, words, number=6, length=10, fixed_length=False, scorer=model_that_scores, batch_size=2
    )
    row = found["rows"]["sampled"]
    texts = [line["text"] for line in lines if line["row"] == "sampled"]
    ended = [len(text.split()) < 10 for text in texts]
    assert row["generative_tokens"] == row["tokens"] + sum(ended)  # EOS is scored, too
    read = [(text, "") if end else (text,) for text, end in zip(texts, ended, strict=True)]
    expected = generative_perplexity(model_that_scores, read, words)["generative_perplexity"]
    assert row["generative_perplexity"] == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"number": 0}, {"length": 0}])
def test_counts_below_one(words, options):
    with pytest.raises(InputError, match="at least 1"):
        unconditional(small_model("ltm"), words, **options)


def test_models_and_scorers_of_another_kind(words):
    with pytest.raises(InputError, match="labels"):
        unconditional(small_model("lang_vae", annotation_labels=["A", "B"]), words)
    with pytest.raises(InputError, match="given the length"):
        unconditional(small_model("ltm"), words, scorer=Reader(small_model("gp_vae"), words))
