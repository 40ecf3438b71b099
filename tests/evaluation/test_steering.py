"""Diversity and style transfer: by hand, by models whose text is all z's doing or none of it, one text at a time."""

import math

import pytest
import torch
from tests.toy import BOS, EOS, PAD, VOCABULARY, Rows, small_model, small_variant, texts, three_verbs
from torch import nn

from latentlm import InputError
from latentlm.causal_lm import CausalConfig, CausalLatentLM
from latentlm.distributions import Stream, diagonal_gaussian, sequence_keys, standard_normal
from latentlm.evaluation.batches import by_hash
from latentlm.evaluation.samples import distinct, self_bleu
from latentlm.evaluation.steering import diversity, style_transfer, token_overlap

FIRST, WORDS = PAD + 1, VOCABULARY - PAD - 1
ALIKE = 5


class Subject(CausalLatentLM):
    """z has a number for each word. It is three times the share of the word in the text, nearly exactly.

    Each token written is a word by softmax(hearing · z), and a little more of word ALIKE; hearing nothing, the text has
    nothing to do with z. `silent` ends each text at once.
    """

    config_class = CausalConfig

    def __init__(self, hearing: float, silent: bool = False):
        super().__init__(
            CausalConfig(
                vocab_size=VOCABULARY, hidden_size=24, num_attention_heads=2, max_position_embeddings=16,
                use_cache=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
            )
        )  # fmt: skip
        self.hearing, self.silent = hearing, silent
        self.embed_tokens = nn.Embedding(VOCABULARY, 24)
        self.lm_head = nn.Linear(24, VOCABULARY, bias=False)
        self.post_init()
        self.lm_head.weight.data = torch.eye(VOCABULARY, 24)
        self.eval()

    def prior(self, batch_size, lengths, condition=None):
        return standard_normal(batch_size, (WORDS,))

    def infer(self, input_ids, attention_mask=None, condition=None, *, seed=0):
        scored = self.scored_tokens(input_ids, attention_mask)[..., None]
        counts = (nn.functional.one_hot(input_ids[:, 1:], VOCABULARY) * scored).sum(1)[:, FIRST:].float()
        mean = 3 * counts / counts.sum(1, keepdim=True).clamp_min(1)
        return diagonal_gaussian(mean, torch.full_like(mean, -12.0))

    def hidden_states(self, latents, input_ids, attention_mask=None, position_ids=None, past_key_values=None):
        states = torch.full((*input_ids.shape, 24), -1e4)
        states[..., FIRST:VOCABULARY] = self.hearing * latents[:, None]
        states[..., ALIKE] += 0.01
        if self.silent:
            states[..., EOS] = 1e4
        return states


def subjects(number: int, lengths=(6, 9, 7)) -> list[torch.Tensor]:
    """Texts of one word each, which is another in each."""
    return [torch.tensor([BOS] + lengths[place % len(lengths)] * [FIRST + place]) for place in range(number)]


def in_order(rows):
    return [rows[index] for index in by_hash(Rows(rows))]


def drawn(model, law, row, samples, seed, stream=Stream.GENERATION):
    return model.draw_latents(law, sequence_keys(row[None]), samples, seed=seed, stream=stream)[:, 0]


# ---- the figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]], 100),
        ([[7], [7]], 100),
        ([[], []], 100),
        ([[], [4]], 0),
        ([[1], [2]], 0),
        ([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], 0),
        # precisions 3/4, 2/3, 1/2 and, smoothed, 1/2 of one
        ([[1, 2, 3, 4], [1, 2, 3, 5]], 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25),
        # 12 in 12345: precisions 1 and 1 up to its length, brevity e^(1 − 5/2); the other way round 2/5, 1/4, and for
        # want of a match half of 1/3 and a quarter of 1/2
        (
            [[1, 2], [1, 2, 3, 4, 5]],
            50 * (math.exp(-1.5) + (2 / 5 * 1 / 4 * 1 / 6 * 1 / 8) ** 0.25),
        ),
        ([[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]], 200 / 3),
    ],
)
def test_self_bleu_by_hand(rows, expected):
    assert self_bleu(rows) == pytest.approx(expected, abs=1e-6)


def test_one_text_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="at least two"):
        self_bleu([[1, 2]])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [3, 2, 1], 1),
        ([1, 1, 2], [1, 3], 2 / 5),
        ([1, 1], [1, 1, 1, 1], 4 / 6),
        ([1], [2], 0),
        ([], [1], 0),
        ([], [], 0),
    ],
)
def test_overlap_by_hand(one, other, expected):
    assert token_overlap(one, other) == pytest.approx(expected)


# ---- diversity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "latents"), [(1, 2), (3, 8), (5, 40)])
def test_what_differs_is_what_the_latents_say(prompts, latents):
    model, rows = Subject(hearing=50.0), texts(9, 9)
    found = diversity(
        model, Rows(list(rows)), prompts=prompts, prompt_tokens=0, latents=latents, max_new_tokens=4, seed=3
    )
    expected = []
    for row in in_order(list(rows))[:prompts]:
        z = drawn(model, model.prior(1, 4), row, latents, seed=3)
        expected.append([4 * [int(word)] for word in z.argmax(1)])
    assert found["diversity_self_bleu"] == pytest.approx(sum(map(self_bleu, expected)) / prompts)
    for n in (1, 2, 3):
        assert found[f"diversity_distinct_{n}"] == pytest.approx(sum(distinct(e, n) for e in expected) / prompts)
    # one z writes one word
    assert found["diversity_of_one_latent_self_bleu"] > 90 > found["diversity_self_bleu"] or latents == 40
    assert found["diversity_of_one_latent_distinct_1"] < 2 / (4 * latents)
    settings = ("prompts", "latents", "prompt_tokens", "max_new_tokens")
    assert [found[f"diversity_{name}"] for name in settings] == [prompts, latents, 0, 4]


def test_latents_that_are_not_heard_give_one_text():
    found = diversity(Subject(hearing=0.0), Rows(list(texts(6, 9))), prompts=4, prompt_tokens=2, max_new_tokens=6)
    assert found["diversity_self_bleu"] == 100
    assert [found[f"diversity_distinct_{n}"] for n in (1, 2, 3)] == pytest.approx([1 / 48, 1 / 40, 1 / 32])
    # twenty words at random
    assert found["diversity_of_one_latent_self_bleu"] < 30
    assert found["diversity_of_one_latent_distinct_2"] > 0.8


def test_latents_of_no_numbers_give_one_text():
    model, data = small_model("autoregressive"), Rows(list(texts(6, 9)))
    found = diversity(model, data, prompts=3, prompt_tokens=2, max_new_tokens=6)
    assert found["diversity_self_bleu"] == 100 > found["diversity_of_one_latent_self_bleu"]


def test_a_model_that_ends_at_once_says_nothing():
    data = Rows(list(texts(6, 9)))
    found = diversity(Subject(hearing=1.0, silent=True), data, prompts=2)
    assert found["diversity_distinct_1"] is found["diversity_of_one_latent_distinct_3"] is None
    assert found["diversity_self_bleu"] == 100


@torch.no_grad()
@pytest.mark.parametrize("prompt_tokens", [0, 3])
def test_diversity_one_prompt_at_a_time(prompt_tokens):
    model, rows = small_variant("ltm"), list(texts(5, 9))
    options = {"prompt_tokens": prompt_tokens, "latents": 3, "max_new_tokens": 7, "seed": 2}
    found = diversity(model, Rows(rows), prompts=4, **options)
    expected = []
    for row in in_order(rows)[:4]:
        prompt = row[None, : prompt_tokens + 1]
        law = model.infer(prompt, seed=2) if prompt_tokens else model.prior(1, 7)
        written = [
            model.generate(prompt, latents=z[None], max_new_tokens=7, do_sample=False)
            for z in drawn(model, law, row, 3, seed=2)
        ]
        expected.append([text[0, prompt_tokens + 1 :].tolist() for text in written])
    assert found["diversity_self_bleu"] == pytest.approx(sum(map(self_bleu, expected)) / 4)
    assert found["diversity_distinct_2"] == pytest.approx(sum(distinct(e, 2) for e in expected) / 4)
    assert found["diversity_self_bleu"] < 100


def test_prompts_that_are_alike_have_latents_of_their_own(monkeypatch):
    model, rows, given = Subject(hearing=1.0), texts(3, 9), []
    rows[:, :3] = rows[0, :3]
    write = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *a, latents, **k: given.append(latents) or write(*a, latents=latents, **k)
    )
    diversity(model, Rows(list(rows)), prompts=3, prompt_tokens=2, latents=2)
    assert len(given[0].unique(dim=0)) == 6


# ---- style transfer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 2, 7, 20])
def test_what_z_says_is_carried_over(pairs):
    model, rows = Subject(hearing=50.0), subjects(20)
    found = style_transfer(model, Rows(rows), pairs=pairs, prompt_tokens=2, max_new_tokens=5)
    assert found["style_transfer_recovered"] == 1
    rest = [len(row) - 3 for row in in_order(rows)[:pairs]]
    assert found["style_transfer_overlap"] == pytest.approx(sum(2 * min(5, n) / (5 + n) for n in rest) / pairs)
    # a prior z says a's word once in twenty
    assert found["style_transfer_overlap_by_prior_z"] <= 0.3 or pairs < 7
    settings = ("pairs", "prompt_tokens", "max_new_tokens")
    assert [found[f"style_transfer_{name}"] for name in settings] == [pairs, 2, 5]


def test_a_text_that_has_nothing_of_either_counts_a_half():
    """Two words are a's and b's; z of the prior says one of the other eighteen nearly always."""
    found = style_transfer(Subject(hearing=50.0), Rows(subjects(20)), pairs=20, prompt_tokens=2, max_new_tokens=5)
    assert found["style_transfer_recovered_by_prior_z"] == pytest.approx(0.5, abs=0.15)


def test_latents_that_are_not_heard_carry_nothing():
    found = style_transfer(Subject(hearing=0.0), Rows(subjects(20)), pairs=20, prompt_tokens=2)
    assert found["style_transfer_recovered"] == found["style_transfer_recovered_by_prior_z"]
    assert found["style_transfer_overlap"] == found["style_transfer_overlap_by_prior_z"] < 0.2
    assert 0.2 < found["style_transfer_recovered"] < 0.8


def test_a_posterior_that_collapsed_is_as_near_to_one_as_to_the_other():
    found = style_transfer(small_model("ltm", inference_steps=0), Rows(list(texts(6, 9))), pairs=5)
    assert found["style_transfer_recovered"] == found["style_transfer_recovered_by_prior_z"] == 0.5


def test_an_empty_continuation_carries_nothing():
    found = style_transfer(Subject(hearing=50.0, silent=True), Rows(subjects(6)), pairs=4)
    for control in ("", "_by_prior_z"):
        assert found[f"style_transfer_recovered{control}"] == 0.5  # what says nothing is near to neither
        assert found[f"style_transfer_overlap{control}"] == 0


def test_special_tokens_do_not_overlap():
    rows = [torch.cat([row, torch.tensor([EOS])]) for row in subjects(4, lengths=(6,))]
    found = style_transfer(Subject(hearing=50.0), Rows(rows), pairs=4, prompt_tokens=2, max_new_tokens=4)
    assert found["style_transfer_overlap"] == 1


@torch.no_grad()
@pytest.mark.parametrize("prompt_tokens", [0, 3])
def test_style_transfer_of_one_pair_written_out(prompt_tokens):
    model, rows, seed = small_variant("diagonal prior"), list(texts(4, 9)), 5
    a, b = in_order(rows)[:2]
    prompt, sampled = b[None, : prompt_tokens + 1], {"do_sample": True, "top_k": 0, "seed": seed, "max_new_tokens": 8}
    z = {"": drawn(model, model.infer(a[None], seed=seed), a, 1, seed)}
    z["_by_prior_z"] = drawn(model, model.prior(1, prompt_tokens + 8), a, 1, seed, Stream.PRIOR)
    found = style_transfer(model, Rows(rows), pairs=1, prompt_tokens=prompt_tokens, max_new_tokens=8, seed=seed)
    deviation = model.prior(1, 8).variance.sqrt()
    for control, latents in z.items():
        c = model.generate(prompt, latents=latents, **sampled)[0, prompt_tokens + 1 :]
        means = [model.infer(row[None], seed=seed).mean / deviation for row in (torch.cat([a[:1], c]), a, b)]
        nearer = (means[0] - means[1]).square().sum() < (means[0] - means[2]).square().sum()
        assert found[f"style_transfer_recovered{control}"] == float(nearer)
        overlap = token_overlap(c.tolist(), a[prompt_tokens + 1 :].tolist())
        assert found[f"style_transfer_overlap{control}"] == pytest.approx(overlap)


# ---- both ------------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize(
    ("measure", "number"), [(diversity, "prompts"), (style_transfer, "pairs")], ids=["diversity", "style transfer"]
)


@BOTH
def test_order_and_repeated_texts_change_nothing(measure, number):
    model, rows = small_variant("ltm"), list(texts(6, 9))
    found = [
        measure(model, Rows(order), **{number: 3}, prompt_tokens=2, max_new_tokens=5)
        for order in (rows, rows[::-1], [row for row in rows for _ in range(2)])
    ]
    assert found[0] == found[1] == found[2]


@BOTH
def test_texts_as_short_as_the_prompt_are_left_out(measure, number):
    model, rows = small_variant("ltm"), list(texts(6, 9))
    short = [row[:length] for row, length in zip(texts(8, 5, seed=1), (1, 2, 3, 4, 5, 5, 5, 5), strict=True)]
    options = {number: 6, "prompt_tokens": 4, "max_new_tokens": 5}
    assert measure(model, Rows(short + rows), **options) == measure(model, Rows(rows), **options)


@BOTH
def test_a_seed_repeats_it_and_leaves_model_and_random_state_alone(measure, number):
    model, rows = small_variant("ltm", dropout=0.5).train(), Rows(list(texts(6, 9)))
    state = torch.get_rng_state()
    one, same, other = (
        measure(model, rows, **{number: 6}, prompt_tokens=1, max_new_tokens=5, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same != other
    assert model.training and torch.equal(torch.get_rng_state(), state)


@BOTH
def test_texts_are_written_in_batches_up_to_the_context(measure, number, monkeypatch):
    model, asked, told = Subject(hearing=1.0), [], []
    write = model.generate

    def spy(prompts, **options):
        asked.append((len(prompts), options["max_new_tokens"], options["do_sample"]))
        return write(prompts, **options)

    monkeypatch.setattr(model, "generate", spy)
    measure(
        model, Rows(list(texts(40, 9))), **{number: 35}, prompt_tokens=3, on_progress=lambda *step: told.append(step)
    )
    assert {tokens for _, tokens, _ in asked} == {16 - 3}
    assert max(rows for rows, _, _ in asked) == 32
    assert {sampled for _, _, sampled in asked} == ({True, False} if measure is diversity else {True})
    assert told[-1] == (35, 35) and told == sorted(told)


@BOTH
def test_what_cannot_be_asked_is_one_sentence(measure, number):
    model, rows = Subject(hearing=1.0), Rows(list(texts(5, 9)))
    for options, words in (
        ({number: 0}, "at least 1"),
        ({number: 2, "prompt_tokens": -1}, "must not be negative"),
        ({number: 2, "prompt_tokens": 8}, "no sequence is longer than the prompt of 8 tokens"),
        ({number: 6}, "6 different texts longer than the prompt of 4 tokens are needed, and the data has 5"),
        ({number: 2, "max_new_tokens": 13}, "exceed the model's context of 16"),
        ({number: 2, "max_new_tokens": 0}, "at least 1"),
    ):
        with pytest.raises(InputError, match=words):
            measure(model, rows, **options)
    with pytest.raises(InputError, match="fills the model's context of 16"):
        measure(model, Rows(list(texts(5, 20))), **{number: 2}, prompt_tokens=16)
    with pytest.raises(InputError, match="a ThreeVerbs does not write text"):
        measure(three_verbs(), rows, **{number: 2})


def test_what_only_one_of_them_needs():
    rows = Rows(list(texts(5, 9)))
    with pytest.raises(InputError, match="2 latents"):
        diversity(Subject(hearing=1.0), rows, prompts=2, latents=1)
    with pytest.raises(InputError, match="Autoregressive has no latents"):
        style_transfer(small_model("autoregressive"), rows, pairs=2)
    with pytest.raises(InputError, match=r"2 different texts .* has 1"):
        style_transfer(Subject(hearing=1.0), Rows([texts(1, 9)[0]] * 3), pairs=1)
