"""Zero-shot figures against one sequence at a time and numpy in float64; how the sets are read; the command."""

import json
import math

import numpy as np
import pytest
import torch
from tests.command import assert_one_sentence, prepare, run
from tests.toy import small_model
from tests.training.runs import unchecked

from latentlm import InputError
from latentlm.data import train_tokenizer
from latentlm.evaluation.likelihood import score
from latentlm.evaluation.zero_shot import SETS, parse_sets, read_set, zero_shot

PTB = " no it was n't black monday \n \n the company 's <unk> fell N N points \n N \n"
TEXTS = ["no it was n't black monday", "the company 's <unk> fell N N points", "N"]
NATURAL = ["no it wasn't black monday", "the company's ? fell 1 1 points", "N"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(NATURAL, 270)


@pytest.fixture
def ptb(tmp_path):
    path = tmp_path / "ptb.txt"
    path.write_text(PTB, encoding="utf-8")
    return str(path)


def blocks(tokenizer, texts, length):
    """BOS and `length` tokens at a time of all texts, an EOS after each."""
    flat = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return [torch.tensor([[tokenizer.bos_token_id, *flat[i : i + length]]]) for i in range(0, len(flat), length)]


def model_of(tokenizer, family, **changes):
    ends = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return small_model(family, vocab_size=len(tokenizer), **ends, **changes)


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ltm", "gpt_vae", "gp_vae", "autoregressive"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_set_is_its_blocks_one_by_one(tokenizer, ptb, family, batch_size):
    model = model_of(tokenizer, family)
    found = zero_shot(model, tokenizer, {"ptb": ptb}, length=7, iw_samples=3, batch_size=batch_size, seed=2)["ptb"]
    rows = blocks(tokenizer, NATURAL, 7)
    assert len(rows[-1][0]) < 8  # the last one is short, and scored
    with torch.no_grad():
        slow = [score(model, row, samples=1 if model.exact else 3, seed=2) for row in rows]
    tokens = sum(row.shape[1] - 1 for row in rows)
    assert (found["sequences"], found["tokens"], found["texts"]) == (len(rows), tokens, 3)
    for bound in ("elbo", "iw"):
        nats = sum(float(one[bound].double().sum()) for one in slow)
        assert found[f"{bound}_nll_per_token"] == pytest.approx(nats / tokens, rel=1e-6)
        assert found[f"{bound}_nll_per_word"] == pytest.approx(nats / (6 + 8 + 1 + 3), rel=1e-6)
        assert found[f"{bound}_word_perplexity"] == pytest.approx(math.exp(nats / 18), rel=1e-5)


def test_the_control_s_bits_per_byte_in_numpy(tokenizer, ptb):
    """−Σ log₂ softmax over the logits in float64 ÷ UTF-8 bytes of the detokenised text; and both perplexities."""
    model = model_of(tokenizer, "autoregressive")
    nats = []
    for row in blocks(tokenizer, NATURAL, 11):
        with torch.no_grad():
            logits = model.decode(torch.zeros(1, 0), row)[0].double().numpy()
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats.append(-log_p[np.arange(len(log_p)), row[0, 1:].numpy()])
    found = zero_shot(model, tokenizer, {"ptb": ptb}, length=11)["ptb"]
    total, num_bytes = sum(map(np.sum, nats)), sum(len(text.encode()) for text in NATURAL)
    assert found["bytes"] == num_bytes
    assert found["iw_bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-6)
    assert found["iw_perplexity"] == pytest.approx(math.exp(total / sum(map(len, nats))), rel=1e-6)
    # the papers': a mean of exponentials, the short block no less than the others
    assert found["published_perplexity"] == pytest.approx(np.mean([math.exp(one.mean()) for one in nats]), rel=1e-6)
    assert found["published_perplexity"] > found["iw_perplexity"]


def test_unicode_is_counted_in_bytes_and_words(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("ein Café , 東京\n\n  \nx\n", encoding="utf-8")
    found = zero_shot(model_of(tokenizer, "autoregressive"), tokenizer, {"text": str(tmp_path / "t.txt")}, length=8)
    assert found["text"]["bytes"] == len("ein Café , 東京x".encode())
    assert found["text"]["words"] == 4 + 1 + 2


def test_sentences_that_were_cut_have_no_figure_by_the_word(tokenizer, ptb):
    model = model_of(tokenizer, "gpt_vae")
    whole = zero_shot(model, tokenizer, {"ptb": ptb}, unit="sentences", length=32, iw_samples=1)["ptb"]
    cut = zero_shot(model, tokenizer, {"ptb": ptb}, unit="sentences", length=3, iw_samples=1)["ptb"]
    assert (whole["sequences"], whole["truncated"], whole["words"]) == (3, 0, 18)
    assert (cut["truncated"], cut["words"], cut["iw_nll_per_word"], cut["iw_word_perplexity"]) == (2, None, None, None)


def test_the_protocol_of_the_paper_stands_where_there_is_one(tokenizer, ptb):
    found = {
        family: zero_shot(model_of(tokenizer, family), tokenizer, {"ptb": ptb}, length=8, iw_samples=1)["ptb"]
        for family in ("ltm", "gp_vae", "gpt_vae", "autoregressive")
    }
    assert {name: one["protocol"] for name, one in found.items()} == {
        "ltm": "paper", "gp_vae": "paper", "gpt_vae": "honest", "autoregressive": "paper",
    }  # fmt: skip
    assert "published_perplexity" not in found["gpt_vae"]


def test_each_set_is_scored_by_itself(tokenizer, ptb):
    model = model_of(tokenizer, "ltm", inference_steps=1)
    options = {"length": 8, "iw_samples": 2, "seed": 1}
    both = zero_shot(model, tokenizer, {"text": ptb, "ptb": ptb}, **options)
    alone = zero_shot(model, tokenizer, {"ptb": ptb}, **options)
    assert list(both) == ["text", "ptb"]
    assert both["ptb"]["iw_nll_per_token"] == alone["ptb"]["iw_nll_per_token"]
    assert both["text"]["bytes"] == sum(len(text) for text in TEXTS)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_text_files_are_read_by_lines_and_blank_ones_are_none(ptb):
    assert read_set("ptb", ptb) == TEXTS
    assert read_set("ptb", ptb, limit=2) == TEXTS[:2]
    assert [SETS["ptb"].detokenise(text) for text in TEXTS] == NATURAL


def test_ag_news_is_title_and_description(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text('"3","Fears for T N","Unions, ""workers"" say."\n"4","Café","x"\n', encoding="utf-8")
    assert read_set("ag_news", str(path)) == ['Fears for T N Unions, "workers" say.', "Café x"]
    assert read_set("ag_news", str(path), limit=1) == ['Fears for T N Unions, "workers" say.']
    path.write_text("Class Index,Title,Description\n3,a,b\n", encoding="utf-8")
    with pytest.raises(InputError, match="no header"):
        read_set("ag_news", str(path))
    hub = tmp_path / "hub.jsonl"
    hub.write_text('{"text": "Fears b", "label": 2}\n', encoding="utf-8")
    assert read_set("ag_news", str(hub)) == ["Fears b"]


def test_lambada_and_papers_are_read_from_their_columns(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "“a”", "article": "b . c", "abstract": "d"}\n', encoding="utf-8")
    assert read_set("lambada", str(path)) == ["“a”"]
    assert read_set("arxiv", str(path)) == read_set("pubmed", str(path)) == ["b . c"]


def test_sets_are_named_once_and_known():
    assert parse_sets(["ptb=a.txt", "text=b=c.txt"]) == {"ptb": "a.txt", "text": "b=c.txt"}
    for wrong, said in (
        (["ptb"], "SET=SOURCE"),
        (["ptb="], "SET=SOURCE"),
        (["pbt=a.txt"], "ptb, wikitext, lm1b, lambada, ag_news, pubmed, arxiv, text"),
        (["ptb=a", "ptb=b"], "twice"),
        ([], "no set"),
    ):
        with pytest.raises(InputError, match=said):
            parse_sets(wrong)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    prepare(tmp_path)
    (tmp_path / "ptb.txt").write_text(PTB, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with unchecked():
        yield tmp_path


@pytest.mark.parametrize("model, family", [("model", "LTM"), ("control", "Autoregressive")])
def test_the_command(folder, model, family):
    given = ("ptb=ptb.txt", "text=texts.txt", "--iw-samples", "2", "--seed", "3", "--json", "z.json")
    status, out, err = run("evaluate", "zero-shot", model, *given)
    assert (status, err) == (0, "")
    assert "sentences of at most 48 tokens, seed 3" in out
    assert "paper (no bound)" in out
    figures = json.loads((folder / "z.json").read_text())
    assert list(figures)[:3] == ["task", "model", "family"]
    assert list(figures)[-1] == "seed"
    assert (figures["task"], figures["model"], figures["family"]) == ("zero-shot", model, family)
    assert list(figures["sets"]) == ["ptb", "text"]
    assert figures["sets"]["ptb"]["words"] == 18


@pytest.mark.parametrize(
    "wrong",
    [
        ("ptb=nowhere.txt",),
        ("ptb=empty.txt",),
        ("ptb=binary.txt",),
        ("ptbb=texts.txt",),
        ("texts.txt",),
        ("ptb=ptb.txt", "ptb=ptb.txt"),
        ("ptb=ptb.txt", "--json", "nowhere/z.json"),
        ("ptb=ptb.txt", "--set", "nothing=1"),
    ],
)
def test_mistakes_are_one_sentence(folder, wrong):
    status, _, err = run("evaluate", "zero-shot", "model", *wrong)
    assert_one_sentence(status, err)


def test_help_has_an_example(folder):
    status, out, _ = run("evaluate", "zero-shot", "--help")
    assert status == 0
    assert "Example: latentlm evaluate zero-shot " in " ".join(out.split())
