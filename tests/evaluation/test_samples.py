"""Variety of text from the prior, by hand and with a model that writes what it is told."""

import math

import pytest
import torch
from tests.toy import BOS, EOS, PAD, VOCABULARY, small_model, three_verbs

from latentlm import InputError
from latentlm.evaluation.samples import distinct, prior_samples, token_entropy

# ---- the figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, n, expected",
    [
        ([[1, 2, 3, 4]], 1, 1.0),
        ([[1, 1, 1, 1]], 1, 1 / 4),
        ([[1, 2, 1, 2]], 2, 2 / 3),  # 12, 21, 12
        ([[1, 2], [1, 2], [2, 1]], 1, 2 / 6),
        ([[1, 2], [1, 2], [2, 1]], 2, 2 / 3),  # of all texts together, and none across two of them
        ([[1, 2, 3], [4]], 3, 1.0),
        ([[1, 2, 3, 1, 2, 3], []], 3, 3 / 4),  # 123, 231, 312, 123
    ],
)
def test_distinct_by_hand(texts, n, expected):
    assert distinct(texts, n) == pytest.approx(expected)


@pytest.mark.parametrize("texts, n", [([], 1), ([[]], 1), ([[1, 2], [3]], 3)])
def test_without_an_n_gram_there_is_no_figure(texts, n):
    assert distinct(texts, n) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ([7], 0.0),
        ([7, 7, 7], 0.0),
        ([1, 2], math.log(2)),
        ([1, 2, 3, 4], math.log(4)),
        ([1, 1, 1, 2], -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
    ],
)
def test_entropy_by_hand(text, expected):
    assert token_entropy(text) == pytest.approx(expected)


# ---- of a model ------------------------------------------------------------------------------------------------------


def writing(monkeypatch, *texts):
    """A model that writes these rows, BOS first, in this order; and what it was asked."""
    model = small_model("autoregressive", eos_token_id=EOS)
    rows, asked = torch.tensor([[BOS, *text] for text in texts]), []

    def generate(input_ids, **options):
        done = sum(number for number, _ in asked)
        asked.append((len(input_ids), options))
        return rows[done : done + len(input_ids)]

    monkeypatch.setattr(model, "generate", generate)
    return model, asked


def test_a_text_ends_before_its_end_token(monkeypatch):
    model, _ = writing(monkeypatch, [5, 6, EOS, PAD, PAD], [5, 5, 5, 5, EOS], [5, 6, 7, 8, 9])
    found = prior_samples(model, number=3)
    assert (found["samples"], found["sample_tokens"]) == (3, 2 + 4 + 5)
    assert found["sample_entropy_nats"] == pytest.approx((math.log(2) + 0 + math.log(5)) / 3)
    assert found["distinct_1"] == pytest.approx(5 / 11)
    assert found["distinct_2"] == pytest.approx(5 / 8)  # 56 · 55 55 55 · 56 67 78 89
    assert found["distinct_3"] == pytest.approx(4 / 5)  # 555 555 · 567 678 789


def test_an_empty_text_has_no_entropy_and_lowers_no_mean(monkeypatch):
    model, _ = writing(monkeypatch, [EOS, PAD], [5, 6])
    found = prior_samples(model, number=2)
    assert found["sample_tokens"] == 2
    assert found["sample_entropy_nats"] == pytest.approx(math.log(2))
    model, _ = writing(monkeypatch, [EOS, PAD])
    assert prior_samples(model, number=1)["sample_entropy_nats"] == 0


def test_one_of_several_end_tokens_ends_a_text(monkeypatch):
    model, _ = writing(monkeypatch, [5, 4, 6], [5, EOS, 6], [5, 6, 7])
    model.config.eos_token_id = [EOS, 4]
    assert prior_samples(model, number=3)["sample_tokens"] == 1 + 1 + 3


def test_texts_are_written_in_batches_at_temperature_one_from_all_tokens(monkeypatch):
    model, asked = writing(monkeypatch, *[[number] for number in range(3, 73)])
    found = prior_samples(model, number=70, max_new_tokens=1)
    assert [number for number, _ in asked] == [32, 32, 6]
    assert found["distinct_1"] == 1
    for _, options in asked:
        assert (options["do_sample"], options["top_k"], options["max_new_tokens"]) == (True, 0, 1)
        assert options.get("temperature", 1.0) == 1.0 and options.get("top_p", 1.0) == 1.0
    assert len({options["seed"] for _, options in asked}) == 3


@pytest.mark.parametrize("family", ["ltm", "autoregressive"])
def test_a_uniform_model_has_the_variety_of_dice(family):
    """4000 tokens of 23 kinds: distinct-2 of 3968 draws from 529 pairs, entropy of 32 draws a text by simulation."""
    model = small_model(family, tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()
    found = prior_samples(model, number=64)
    assert found["sample_tokens"] == 64 * 32
    dice = torch.randint(VOCABULARY, (2000, 32), generator=torch.Generator().manual_seed(0)).tolist()
    entropies = torch.tensor([token_entropy(text) for text in dice])
    error = float(entropies.std()) / 8
    assert abs(found["sample_entropy_nats"] - float(entropies.mean())) < 4 * error
    pairs = VOCABULARY**2
    assert found["distinct_2"] == pytest.approx(pairs * (1 - (1 - 1 / pairs) ** (64 * 31)) / (64 * 31), rel=0.05)
    assert found["distinct_1"] == VOCABULARY / (64 * 32)
    assert found["samples_per_second"] > 0


def test_a_seed_repeats_the_texts_and_dropout_is_off():
    model = small_model("ltm", dropout=0.5)
    state = torch.get_rng_state()
    options = {"number": 4, "max_new_tokens": 8}
    dropped = ("samples_per_second",)
    one, again, other = (
        {key: value for key, value in prior_samples(model.train(training), seed=seed, **options).items()
         if key not in dropped}
        for training, seed in ((False, 1), (True, 1), (False, 2))
    )  # fmt: skip
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"number": 0}, {"number": -1}])
def test_counts_below_one(options):
    with pytest.raises(InputError, match="at least 1"):
        prior_samples(small_model("ltm"), **options)


def test_a_model_that_does_not_write(monkeypatch):
    with pytest.raises(InputError, match="ThreeVerbs does not write"):
        prior_samples(three_verbs())
    with pytest.raises(InputError, match="bos_token_id"):
        prior_samples(small_model("autoregressive", bos_token_id=None))
    with pytest.raises(InputError, match="context of 32"):
        prior_samples(small_model("autoregressive"), max_new_tokens=33)
