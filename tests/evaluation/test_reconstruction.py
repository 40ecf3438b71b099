"""Reconstructions: by a model whose z is the text itself, by hand, and of every family in batches of any size."""

import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from tests.family_names import FAMILY_NAMES
from tests.toy import BOS, EOS, PAD, VARIANTS, VOCABULARY, Rows, pretrained_part, small_variant, texts, three_verbs

from latentlm import InputError
from latentlm.config import TransformerConfig
from latentlm.data.tokenizers import load_tokenizer
from latentlm.distributions import diagonal_gaussian, standard_normal
from latentlm.evaluation.batches import by_hash
from latentlm.evaluation.measure import PAIRS, measure
from latentlm.evaluation.reconstruction import reconstructions
from latentlm.generation import WritesText

TIMES, FIRST = 12, PAD + 1
OF_LATENTS = sorted({name for name in VARIANTS if not small_variant(name).exact})
EXACT = sorted(set(VARIANTS) - set(OF_LATENTS))


class Rote(WritesText):
    """z is the text: its tokens as numbers, and EOS after them. It is written with `last` for its last token."""

    config_class = TransformerConfig

    def __init__(self, last: int | None = None):
        super().__init__(
            TransformerConfig(
                vocab_size=VOCABULARY, hidden_size=4, num_attention_heads=2, max_position_embeddings=TIMES,
                bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
            )
        )  # fmt: skip
        self.last, self.asked = last, []
        self.bias = torch.nn.Parameter(torch.zeros(()))  # by which transformers knows the device
        self.post_init()

    def prior(self, batch_size, lengths, condition=None):
        return standard_normal(batch_size, (TIMES,))

    def infer(self, input_ids, attention_mask=None, condition=None, *, seed=0):
        mean = torch.full((len(input_ids), TIMES), float(EOS))
        mean[:, : input_ids.shape[1] - 1] = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, EOS)
        return diagonal_gaussian(mean, torch.full_like(mean, 9.0))  # of which nothing is drawn

    def generate(self, input_ids=None, latents=None, **options):
        self.asked.append(options)
        rows = latents.round().long()
        if self.last is not None:
            for row in rows:
                row[int((row != EOS).sum()) - 1] = self.last
        return torch.cat((torch.full((len(rows), 1), BOS), rows), dim=1)[:, : 1 + options["max_new_tokens"]]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(pretrained_part("gpt2"))


def apart(number: int, length: int) -> list[torch.Tensor]:
    """Texts, EOS at their ends, of which no two share a word."""
    words = range(FIRST, VOCABULARY)
    return [torch.tensor([BOS, *words[i * length : (i + 1) * length], EOS]) for i in range(number)]


def in_words(row) -> str:
    return " ".join(f"w{token}" for token in row.tolist() if token >= FIRST)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_a_text_that_is_its_own_latent_is_written_whole(tokenizer):
    rows = apart(4, 5)
    figures, pairs = reconstructions(Rote(), Rows(rows), tokenizer, texts=4)
    assert figures["reconstruction_bleu"] == pytest.approx(100)
    assert figures["reconstruction_exact_match"] == 1
    assert figures["reconstruction_bleu_of_other_z"] == 0  # no word is the same
    assert figures["reconstruction_texts"] == 4
    assert pairs == [(in_words(rows[index]), in_words(rows[index])) for index in by_hash(Rows(rows))]


def test_one_word_of_five_is_wrong(tokenizer):
    """Precisions 4/5, 3/4, 2/3 and 1/2 in each text."""
    figures, pairs = reconstructions(Rote(last=VOCABULARY - 1), Rows(apart(3, 5)), tokenizer, texts=3)
    assert figures["reconstruction_bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert figures["reconstruction_exact_match"] == 0
    assert {written.split()[-1] for _, written in pairs} == {f"w{VOCABULARY - 1}"}
    # of the other's words the last alone, in one text of three: 1/15, then half of 1/12, 1/4 of 1/9, 1/8 of 1/6
    rows = apart(3, 5)
    rows[0][5] = VOCABULARY - 1
    figures, _ = reconstructions(Rote(last=VOCABULARY - 1), Rows(rows), tokenizer, texts=3)
    assert figures["reconstruction_exact_match"] == pytest.approx(1 / 3)
    assert figures["reconstruction_bleu_of_other_z"] == pytest.approx(100 * (1 / 15 / 24 / 36 / 48) ** 0.25)


def test_the_control_has_the_latent_half_way_round(tokenizer):
    rows = list(texts(7, 6))
    _, pairs = reconstructions(Rote(), Rows(rows), tokenizer, texts=5)
    sources = [source for source, _ in pairs]
    figures, _ = reconstructions(Rote(), Rows(rows), tokenizer, texts=5)
    expected = BLEU().corpus_score(sources[2:] + sources[:2], [sources]).score
    assert figures["reconstruction_bleu_of_other_z"] == pytest.approx(expected)
    # neighbours by their hash are not compared: each text stands here twice
    doubled, _ = reconstructions(Rote(), Rows([row for row in apart(4, 5) for _ in range(2)]), tokenizer, texts=8)
    assert (doubled["reconstruction_texts"], doubled["reconstruction_bleu_of_other_z"]) == (8, 0)


def test_both_are_cut_at_the_first_end(tokenizer):
    """A block of two documents, and a block that begins with an end."""
    rows = [torch.tensor([BOS, 3, 4, 5, 6, EOS, 7, 8]), torch.tensor([BOS, EOS, 9, 10, 11, 12, 13, 14])]
    figures, pairs = reconstructions(Rote(), Rows(rows), tokenizer, texts=2)
    assert sorted(pairs) == [("", ""), ("w3 w4 w5 w6", "w3 w4 w5 w6")]
    assert figures["reconstruction_bleu"] == pytest.approx(100)


def test_greedily_up_to_the_longest_text_of_the_data(tokenizer):
    model, rows = Rote(), [*apart(3, 3), *apart(1, 8)]
    reconstructions(model, Rows(rows), tokenizer, texts=2, batch_size=1)
    assert model.asked == 2 * [{"max_new_tokens": 9, "do_sample": False}]


def test_one_text_has_no_other(tokenizer):
    figures, _ = reconstructions(Rote(), Rows(apart(1, 5)), tokenizer, texts=1)
    assert figures["reconstruction_bleu"] == pytest.approx(100)
    assert figures["reconstruction_bleu_of_other_z"] is None


def test_more_than_there_are_is_all_of_them(tokenizer):
    figures, pairs = reconstructions(Rote(), Rows([*apart(3, 5), torch.tensor([BOS])]), tokenizer, texts=50)
    assert figures["reconstruction_texts"] == len(pairs) == 3  # BOS alone is no text


# ---- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*sorted(set(FAMILY_NAMES) & set(OF_LATENTS)), "cooperative", "gp_vae of ragged text"])
def test_every_family_in_batches_of_any_size_and_order(name, tokenizer):
    model, told = small_variant(name), []
    rows = [row[:length] for row, length in zip(texts(7, 9), (9, 4, 7, 3, 9, 6, 2), strict=True)]
    if name == "gp_vae of ragged text":
        for row in rows:
            row[-1] = EOS
    found = [
        reconstructions(model, Rows(order), tokenizer, texts=5, batch_size=size, on_progress=lambda *n: told.append(n))
        for order, size in ((rows, 32), (rows, 2), (rows[::-1], 1))
    ]
    assert found[0] == found[1] == found[2]
    assert told[0] == told[-1] == (5, 5)
    figures, pairs = found[0]
    assert [source for source, _ in pairs] == [in_words(rows[index]) for index in by_hash(Rows(rows))[:5]]
    assert 0 <= figures["reconstruction_bleu"] <= 100 and 0 <= figures["reconstruction_exact_match"] <= 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["ltm", "gpt_vae", "gp_vae", "diagonal gp_vae"])
def test_one_text_at_a_time(name, tokenizer):
    """Where a latent has a part for each token, it says how long the text is; elsewhere the longest may be written."""
    model = small_variant(name)
    rows = [row[:length] for row, length in zip(texts(4, 9), (9, 4, 7, 3), strict=True)]
    _, pairs = reconstructions(model, Rows(rows), tokenizer, texts=4, seed=3)
    for index, (_, written) in zip(by_hash(Rows(rows)), pairs, strict=True):
        z = model.infer(rows[index][None], seed=3).mean
        new_tokens = z.shape[1] if model.latent_per_token else 8
        ids = model.generate(latents=z, do_sample=False, max_new_tokens=new_tokens)[0, 1:]
        assert len(ids) == new_tokens
        assert written == tokenizer.decode(ids, skip_special_tokens=True)
    assert len({written for _, written in pairs}) > 1


def test_model_and_random_state_are_left_alone(tokenizer):
    model, rows = small_variant("ltm", dropout=0.5).train(), Rows(list(texts(4, 9)))
    state = torch.get_rng_state()
    one, same = (reconstructions(model, rows, tokenizer, texts=4) for _ in range(2))
    assert one == same
    assert model.training and torch.equal(torch.get_rng_state(), state)


# ---- what is asked for -----------------------------------------------------------------------------------------------


def test_measure_has_them_beside_its_figures(tokenizer):
    model, rows = small_variant("ltm"), Rows(list(texts(PAIRS + 2, 9)))
    found = measure(model, rows, tokenizer=tokenizer, iw_samples=1, batch_size=3, seed=2, reconstructions=PAIRS + 1)
    figures, pairs = reconstructions(model, rows, tokenizer, texts=PAIRS + 1, seed=2)
    assert found.items() >= figures.items()
    assert found["reconstruction_pairs"] == pairs[:PAIRS] and len(pairs) == PAIRS + 1
    assert found["protocol"] == "honest"


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_model_has_nothing_to_reconstruct_from(name, tokenizer):
    with pytest.raises(InputError, match=r"has no latents, so no text can be reconstructed from them\."):
        reconstructions(small_variant(name), Rows(list(texts(2, 5))), tokenizer, texts=2)


def test_what_cannot_be_asked_is_one_sentence(tokenizer):
    model, rows = Rote(), Rows(apart(2, 5))
    for number in (0, -1):
        with pytest.raises(InputError, match="at least 1 text"):
            reconstructions(model, rows, tokenizer, texts=number)
    with pytest.raises(InputError, match="reconstructions must not be negative"):
        measure(model, rows, tokenizer=tokenizer, reconstructions=-1)
    with pytest.raises(InputError, match="give measure the tokenizer"):
        measure(model, rows, reconstructions=2)
    with pytest.raises(InputError, match="a ThreeVerbs does not write text"):
        reconstructions(three_verbs(), rows, tokenizer, texts=2)
    with pytest.raises(InputError, match="the data is empty"):
        reconstructions(model, Rows([]), tokenizer, texts=2)
    with pytest.raises(InputError, match="batch_size"):
        reconstructions(model, rows, tokenizer, texts=2, batch_size=0)
