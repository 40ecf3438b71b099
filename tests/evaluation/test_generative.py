"""Generative perplexity: against a loop over tokens, a large Monte Carlo sample, and counts of bytes."""

import math

import pytest
import torch
from tests.toy import BOS, EOS, VOCABULARY, Rows, pretrained_part, small_model, three_verbs

from latentlm import InputError
from latentlm.data.tokenizers import load_tokenizer, train_tokenizer
from latentlm.evaluation.continuation import continuation
from latentlm.evaluation.generative import Reader, generative_perplexity
from latentlm.evaluation.writing import document_ids, documents

CONTEXT = 32


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(pretrained_part("gpt2"))


@pytest.fixture(scope="module")
def control():
    return small_model("autoregressive", eos_token_id=EOS)


def some_ids(number: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (number, length), generator=generator).tolist()


def in_words(words, rows):
    return [documents(row, [EOS], words) for row in rows]


@torch.no_grad()
def nll_by_token(model, ids: list[int], begin: int = 0) -> float:
    """One token at a time from all before it, without padding, batches or shortcuts."""
    total = 0.0
    for place in range(begin, len(ids)):
        before = torch.tensor([[BOS, *ids[: place + 1]]])
        logits = model.decode(torch.zeros(1, 0), before)[0, -1].double()
        total -= float(logits[ids[place]] - logits.logsumexp(-1))
    return total


@pytest.mark.parametrize("family", ["autoregressive", "huggingface"])
def test_an_exact_scorer_token_by_token(family, words):
    model = small_model(family, eos_token_id=EOS)
    rows = [*some_ids(3, 7), [5, EOS, 6, EOS], [9], [EOS]]
    found = generative_perplexity(Reader(model, words), in_words(words, rows), words, batch_size=2)
    nats, tokens = sum(nll_by_token(model, row) for row in rows), sum(map(len, rows))
    num_bytes = sum(len(f"w{token}") for row in rows for token in row if token != EOS)
    num_bytes += 3 * 6  # blanks within the texts of seven words
    assert found["generative_nll_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["generative_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["generative_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert (found["generative_tokens"], found["generative_bytes"]) == (tokens, num_bytes)
    assert (found["generative_exact"], found["generative_unit"], found["generative_samples"]) == (True, "token", 1)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_what_follows_a_prompt_alone_is_scored(control, words, batch_size):
    prompts, rows = some_ids(4, 5, seed=1), some_ids(4, 6)
    prompts[1], rows[3] = prompts[1][:2], rows[3][:1]
    options = {"prompts": in_words(words, prompts), "batch_size": batch_size}
    found = generative_perplexity(Reader(control, words), in_words(words, rows), words, **options)
    nats = sum(nll_by_token(control, prompt + row, len(prompt)) for prompt, row in zip(prompts, rows, strict=True))
    assert found["generative_tokens"] == 6 * 3 + 1
    assert found["generative_nll_per_token"] * 19 == pytest.approx(nats, rel=1e-5)


def test_a_text_beyond_the_context_is_scored_in_blocks(control, words):
    (row,) = some_ids(1, 2 * CONTEXT + 5)
    found = generative_perplexity(Reader(control, words), in_words(words, [row]), words)
    blocks = [row[:CONTEXT], row[CONTEXT : 2 * CONTEXT], row[2 * CONTEXT :]]
    nats = sum(nll_by_token(control, block) for block in blocks)
    assert found["generative_tokens"] == len(row)
    assert found["generative_nll_per_token"] * len(row) == pytest.approx(nats, rel=1e-5)


def test_a_prompt_beyond_the_context_loses_its_beginning(control, words):
    (prompt,), (row,) = some_ids(1, CONTEXT + 3, seed=1), some_ids(1, CONTEXT)
    options = {"prompts": in_words(words, [prompt])}
    found = generative_perplexity(Reader(control, words), in_words(words, [row]), words, **options)
    half = CONTEXT // 2
    nats = nll_by_token(control, prompt[-half:] + row[:half], half) + nll_by_token(control, row[half:])
    assert found["generative_tokens"] == CONTEXT
    assert found["generative_nll_per_token"] * CONTEXT == pytest.approx(nats, rel=1e-5)


def test_another_vocabulary_is_scored_by_the_byte_and_says_so(control, words):
    pieces = train_tokenizer(["w3 w4 w5 café"], 300)
    texts = [("w3 w4", "w5"), ("w7",)]
    found = generative_perplexity(Reader(control, words), texts, pieces)
    nats = sum(nll_by_token(control, ids) for ids in document_ids(words, texts))
    assert found["generative_unit"] == "byte"
    assert (found["generative_perplexity"], found["generative_nll_per_token"]) == (None, None)
    assert found["generative_bytes"] == len("w3 w4w5w7")
    assert found["generative_bits_per_byte"] == pytest.approx(nats / math.log(2) / 9, rel=1e-5)


def test_bytes_are_those_of_utf8():
    pieces = train_tokenizer(["a café 日本 🙂"], 300)
    model = small_model("autoregressive", vocab_size=300, max_position_embeddings=64)
    found = generative_perplexity(Reader(model, pieces), [("é日🙂",)], pieces)
    assert found["generative_bytes"] == 2 + 3 + 4


def test_a_scorer_with_latents_gives_a_bound_that_nears_the_likelihood(words):
    model = three_verbs(bos_token_id=BOS, eos_token_id=EOS)
    model.encoder.weight.data.mul_(0.2)  # a q that is near enough for some hundred samples
    rows = some_ids(3, 4)
    few, many = (
        generative_perplexity(Reader(model, words), in_words(words, rows), words, samples=samples)
        for samples in (1, 400)
    )
    with torch.no_grad():
        z = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0))
        nats = 0.0
        for row in rows:
            before = torch.tensor([BOS, *row[:-1]])
            logits = model.output(z)[:, None] + model.previous(before)
            of_row = logits.log_softmax(-1)[:, torch.arange(len(row)), row].double().sum(1)
            nats -= float(of_row.logsumexp(0) - math.log(len(z)))
    assert many["generative_nll_per_token"] * 12 == pytest.approx(nats, rel=0.01)
    assert few["generative_nll_per_token"] > many["generative_nll_per_token"]
    assert (many["generative_exact"], many["generative_samples"]) == (False, 400)


def test_after_a_prompt_a_latent_is_that_of_the_prompt(words):
    """Which has its own figure, the continuation's, where all prompts are of one length."""
    model = small_model("ltm", eos_token_id=EOS)
    rows, prompts = some_ids(3, 4), some_ids(3, 6, seed=1)
    options = {"prompts": in_words(words, prompts), "samples": 3}
    one, again, other = (
        generative_perplexity(Reader(model, words), in_words(words, rows), words, seed=seed, **options)
        for seed in (0, 0, 1)
    )
    assert one == again
    assert one["generative_nll_per_token"] != other["generative_nll_per_token"]
    whole = Rows([torch.tensor([BOS, *prompt, *row]) for prompt, row in zip(prompts, rows, strict=True)])
    expected = continuation(model, whole, prompt_tokens=6, samples=3)
    assert one["generative_nll_per_token"] == pytest.approx(expected["continuation_nll_per_token"])
    assert one["generative_tokens"] == 12
    of_texts_alone = generative_perplexity(Reader(model, words), in_words(words, rows), words, samples=3)
    assert of_texts_alone["generative_nll_per_token"] != pytest.approx(one["generative_nll_per_token"])


def test_empty_texts_are_left_out_and_counted(control, words):
    found = generative_perplexity(Reader(control, words), [("",), ("w5",), ("",)], words)
    assert (found["generative_empty"], found["generative_tokens"]) == (2, 1)
    assert found["generative_nll_per_token"] == pytest.approx(nll_by_token(control, [5]), rel=1e-5)
    nothing = generative_perplexity(Reader(control, words), [("",)], words)
    assert nothing["generative_empty"] == 1
    assert nothing["generative_perplexity"] is nothing["generative_bits_per_byte"] is None
    end_alone = generative_perplexity(Reader(control, words), [("", "")], words)  # a token, of no byte
    assert (end_alone["generative_tokens"], end_alone["generative_bits_per_byte"]) == (1, None)


def test_progress_counts_to_the_end(control, words):
    seen = []
    prompts = in_words(words, [[5], [5, 6], [5, 6]])
    options = {"prompts": prompts, "on_progress": lambda *where: seen.append(where), "batch_size": 1}
    generative_perplexity(Reader(control, words), in_words(words, some_ids(3, 4)), words, **options)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_scorers_of_another_kind(words):
    for model, says in (
        (small_model("gp_vae"), "GPVAE is given the length"),
        (small_model("lang_vae", annotation_labels=["A", "B"]), "labels"),
    ):
        with pytest.raises(InputError, match=says):
            generative_perplexity(Reader(model, words), [("w5",)], words)
