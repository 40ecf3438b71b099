"""Completions: figures by hand from a model that writes what it is told, and what must hold of every family."""

import math

import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from tests.toy import BOS, EOS, Rows, pretrained_part, small_model, small_variant, texts

from latentlm import InputError
from latentlm.data.tokenizers import load_tokenizer
from latentlm.evaluation.batches import by_hash
from latentlm.evaluation.completions import completions
from latentlm.evaluation.generation_table import generation_table, notes
from latentlm.evaluation.generative import Reader, generative_perplexity
from latentlm.evaluation.mauve_score import features, mauve

WRITERS = ("ltm", "gpt_vae", "gp_vae", "gp_vae of ragged text", "lang_vae", "autoregressive", "huggingface")
SMALL = {"prompts": 4, "prompt_tokens": 3, "new_tokens": 5, "each": 2}
TIMES = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(pretrained_part("gpt2"))


def data(number: int = 8, length: int = 10) -> Rows:
    return Rows(list(texts(number, length)))


def without_times(figures):
    rows = {
        name: {key: value for key, value in row.items() if key not in TIMES} for name, row in figures["rows"].items()
    }
    return {**figures, "rows": rows}


def told(monkeypatch, answer, **changes):
    """A model that writes after each prompt what `answer` says of (prompt, the number of the text, sampled)."""
    model = small_model("ltm", eos_token_id=EOS, **changes)
    asked = []

    def generate(input_ids, *, max_new_tokens, num_return_sequences, seed, do_sample, **options):
        asked.append((len(input_ids), num_return_sequences, do_sample, options, model.config.eos_token_id))
        rows = [
            [*prompt, *answer(prompt, number, do_sample)]
            for prompt in input_ids.tolist()
            for number in range(num_return_sequences)
        ]
        return torch.tensor(rows)

    monkeypatch.setattr(model, "generate", generate)
    return model, asked


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_figures_by_hand(monkeypatch, words):
    sequences = data(2)
    chosen = [sequences[index]["input_ids"].tolist() for index in by_hash(sequences)]
    prompts = [text[:4] for text in chosen]

    def answer(prompt, number, sampled):
        if not sampled:
            return chosen[prompts.index(prompt)][4:9]  # what people wrote
        return [[5, 5, 5, 5, 5], [6, 7, 8, 9, 10]][number]

    model, _ = told(monkeypatch, answer)
    found, lines = completions(model, sequences, words, **{**SMALL, "prompts": 2})
    greedy, sampled, human = (found["rows"][name] for name in ("greedy", "sampled", "human"))
    assert greedy["bleu"] == pytest.approx(100)
    assert (greedy["texts"], greedy["tokens"], greedy["different_texts_per_prompt"]) == (4, 20, 1)
    assert greedy["self_bleu"] == 100
    for name in ("token_entropy_nats", "repetition", "distinct_1", "distinct_2", "distinct_3"):
        assert greedy[name] == pytest.approx(human[name])  # of sets of as many texts
    assert (human["texts"], human["self_bleu"], human["bleu"], human["seconds"]) == (2, None, None, None)
    assert sampled["different_texts_per_prompt"] == 2
    assert sampled["token_entropy_nats"] == pytest.approx(math.log(5) / 2)
    assert sampled["repetition"] == pytest.approx((1 / 2 + 0) / 2)
    # a set has one text of each prompt: two that are all 5, and two of the same five tokens
    assert sampled["distinct_1"] == pytest.approx((1 / 10 + 5 / 10) / 2)
    assert sampled["self_bleu"] < 20
    references = [" ".join(f"w{token}" for token in text[4:9]) for text in chosen]
    written = ["w5 w5 w5 w5 w5", "w6 w7 w8 w9 w10"] * 2
    references = [reference for reference in references for _ in range(2)]
    assert sampled["bleu"] == pytest.approx(BLEU(force=True).corpus_score(written, [references]).score)
    assert [line["row"] for line in lines] == ["greedy"] * 4 + ["sampled"] * 4 + ["human"] * 2
    assert lines[4] == {
        "row": "sampled",
        "prompt": " ".join(f"w{token}" for token in prompts[0][1:]),
        "text": written[0],
        "continuation": references[0],
    }


@pytest.mark.parametrize("fixed_length, tokens, text", [(True, 5, "w5\n\nw6 w7"), (False, 1, "w5")])
def test_an_end_inside_a_text(monkeypatch, words, fixed_length, tokens, text):
    model, asked = told(monkeypatch, lambda *_: [5, EOS, 6, 7, EOS])
    found, lines = completions(model, data(), words, fixed_length=fixed_length, **SMALL)
    assert found["rows"]["greedy"]["tokens"] == 8 * tokens
    assert lines[0]["text"] == text
    assert {end for *_, end in asked} == {None if fixed_length else EOS}
    assert model.config.eos_token_id == EOS


def test_how_texts_are_asked_for(monkeypatch, words):
    model, asked = told(monkeypatch, lambda *_: [5] * 5)
    completions(model, data(30), words, **{**SMALL, "prompts": 20})
    assert [(rows, draws, sampled) for rows, draws, sampled, *_ in asked] == [
        (16, 2, False), (4, 2, False), (16, 2, True), (4, 2, True),
    ]  # fmt: skip
    for _, _, sampled, options, _ in asked:
        assert options == ({"top_k": 0} if sampled else {})


def test_the_greedy_text_of_a_control_is_written_once_and_stands_for_all(monkeypatch, words):
    model = small_model("autoregressive", eos_token_id=EOS)
    asked, write = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: asked.append(k["num_return_sequences"]) or write(*a, **k))
    found, lines = completions(model, data(), words, **{**SMALL, "each": 3})
    assert asked == [1, 3]
    greedy = found["rows"]["greedy"]
    assert (greedy["texts"], greedy["different_texts_per_prompt"], greedy["self_bleu"]) == (12, 1, 100)
    assert lines[0]["text"] == lines[1]["text"] == lines[2]["text"]
    assert any("one greedy text" in note for note in notes(found))


def test_an_empty_text_is_no_text(monkeypatch, words):
    model, _ = told(monkeypatch, lambda *_: [EOS] * 5)
    scorer = Reader(small_model("autoregressive", eos_token_id=EOS), words)
    found, lines = completions(model, data(), words, fixed_length=False, scorer=scorer, **SMALL)
    greedy = found["rows"]["greedy"]
    assert (greedy["tokens"], greedy["token_entropy_nats"], greedy["distinct_1"]) == (0, None, None)
    assert greedy["generative_tokens"] == 8  # EOS is foretold, too
    assert lines[0]["text"] == ""


# ---- of every family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_family_and_a_seed_repeats_it(name, words):
    ends = {} if name == "gp_vae of ragged text" else {"eos_token_id": EOS}
    model = small_variant(name, **ends)
    options = {**SMALL, "fixed_length": "ragged" not in name}
    state = torch.get_rng_state()
    (one, lines), (again, _), (other, _) = (
        completions(model, data(), words, seed=seed, **options) for seed in (3, 3, 4)
    )
    assert without_times(one) == without_times(again) != without_times(other)
    assert torch.equal(torch.get_rng_state(), state)
    assert one["exact"] is model.exact
    assert [line["row"] for line in lines].count("sampled") == 8
    if options["fixed_length"]:
        assert {one["rows"][row]["tokens"] for row in ("greedy", "sampled")} == {8 * 5}
    assert generation_table(one).row_count > 5


@pytest.mark.parametrize("name", ["ltm", "gpt_vae", "gp_vae", "autoregressive"])
def test_texts_know_nothing_of_what_people_wrote(name, words):
    """Other continuations of the same prompts change what people wrote, and nothing that is written; the order of
    prompts may change, too."""
    model, sequences = small_variant(name, eos_token_id=EOS), data(4)
    others = Rows([torch.cat((row[:4], row[4:].flip(0))) for row in sequences.rows])

    def greedy(rows):
        _, lines = completions(model, rows, words, **{**SMALL, "each": 1})
        return {line["prompt"]: line["text"] for line in lines if line["row"] == "greedy"}

    assert greedy(sequences) == greedy(others)


def test_the_order_of_the_data_chooses_nothing(words):
    model, sequences = small_variant("ltm", eos_token_id=EOS), data(8)
    backwards = Rows(sequences.rows[::-1])
    one, other = (completions(model, rows, words, **SMALL)[0] for rows in (sequences, backwards))
    assert without_times(one) == without_times(other)


def test_scorer_and_reader_are_asked_for_each_row_and_batches_change_nothing(words):
    model = small_variant("ltm", eos_token_id=EOS)
    judge = Reader(small_model("autoregressive", eos_token_id=EOS, seed=1), words)
    found, lines = completions(model, data(), words, scorer=judge, reader=judge, **SMALL)
    again, _ = completions(model, data(), words, scorer=judge, reader=judge, batch_size=3, **SMALL)
    for name in ("greedy", "sampled", "human"):
        of_row = [line for line in lines if line["row"] == name]
        written, prompts = ([(line[key],) for line in of_row] for key in ("text", "prompt"))
        if any("\n" in text for (text,) in written):
            continue  # of several documents
        expected = generative_perplexity(judge, written, words, prompts=prompts)
        row = found["rows"][name]
        assert {key: row[key] for key in expected} == pytest.approx(expected)
        assert again["rows"][name]["generative_perplexity"] == pytest.approx(row["generative_perplexity"], rel=1e-4)
    human = [line for line in lines if line["row"] == "human"]
    people = features(judge, [(f"{line['prompt']} {line['text']}",) for line in human])
    row = found["rows"]["greedy"]
    assert "mauve" not in found["rows"]["human"]
    assert (row["mauve_people_texts"], row["mauve_written_texts"]) == (4, 8)
    greedy = [line for line in lines if line["row"] == "greedy"]
    if not any("\n" in line["text"] for line in greedy):
        written = features(judge, [(f"{line['prompt']} {line['text']}",) for line in greedy])
        assert row["mauve"] == pytest.approx(mauve(people, written)["mauve"])
    assert notes(found) == ["EOS is a token between documents: no text ends by it, and all are of one length."]


@pytest.mark.parametrize("name", ["ltm", "gp_vae", "autoregressive"])
def test_greedy_texts_do_not_depend_on_how_many_are_written_at_once(monkeypatch, words, name):
    """What is sampled does: the tokens of a batch come from one generator, so its size is fixed."""
    model = small_variant(name, eos_token_id=EOS)
    one, _ = completions(model, data(), words, **SMALL)
    monkeypatch.setattr("latentlm.evaluation.completions.AT_ONCE", 3)
    other, _ = completions(model, data(), words, **SMALL)
    one, other = without_times(one)["rows"], without_times(other)["rows"]
    assert one["greedy"] == other["greedy"]
    assert one["human"] == other["human"]


# ---- what cannot be asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        ({"prompts": 9}, r"9 different prompts .* the data has 8"),
        ({"new_tokens": 7}, r"the data has 0"),
        ({"new_tokens": 30}, "context of 32"),
        ({"prompts": 0}, "at least 1"),
        ({"each": 0}, "at least 1"),
        ({"prompt_tokens": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(words, options, says):
    with pytest.raises(InputError, match=says):
        completions(small_model("autoregressive"), data(), words, **{**SMALL, **options})


def test_prompts_that_are_alike_are_one(words):
    rows = [torch.cat((torch.tensor([BOS, 5, 6, 7]), torch.full((6,), 3 + place))) for place in range(8)]
    with pytest.raises(InputError, match="the data has 1"):
        completions(small_model("autoregressive"), Rows(rows), words, **SMALL)


def test_a_model_of_labelled_texts_and_judges_of_another_kind(words):
    with pytest.raises(InputError, match="labels"):
        completions(small_model("lang_vae", annotation_labels=["A", "B"]), data(), words, **SMALL)
    judge = Reader(small_model("gp_vae"), words)
    with pytest.raises(InputError, match="given the length"):
        completions(small_model("autoregressive"), data(), words, scorer=judge, **SMALL)
    reader = Reader(small_model("autoregressive"), words)
    with pytest.raises(InputError, match="at least 2 prompts"):
        completions(small_model("autoregressive"), data(), words, reader=reader, **{**SMALL, "prompts": 1})
    with pytest.raises(InputError, match="gives no features"):
        completions(small_model("autoregressive"), data(), words, reader=judge, **SMALL)
