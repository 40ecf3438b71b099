"""A store gives what memory gives, whatever cuts its writing short, and says so when it cannot."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from contextlib import nullcontext, suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.training.runs import run, small_recipe
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from latentlm.data import Blocks, Document, Sentences, StoredTokens, Tokens, sentences, store, store_tokens
from latentlm.data.corpora import source_fingerprint
from latentlm.data.recipe import load_corpus
from latentlm.data.tokenizers import tokenizer_fingerprint
from latentlm.errors import InputError

DOCUMENTS = [
    Document(""),
    *[Document(document.text) for document in sentences(60)],
    Document(""),
    Document("naïve 日本 🙂" * 50),
    Document(""),
]
MADE_OF = {"source": "sixty sentences", "limit": None}
FILES = ("tokens.bin", "bytes.bin", "documents.bin", "store.json")
fork = multiprocessing.get_context("fork")
LATEST = 200  # seconds in which even a busy machine has got there


class Cut(Exception):
    """In place of whatever cuts a writing short."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Batches of three documents and an entry in the journal for each."""
    monkeypatch.setattr("latentlm.data.tokenizers._BATCH_TEXTS", 3)
    monkeypatch.setattr(store, "_JOURNAL_TOKENS", 1)


def written(folder, tokenizer, documents=DOCUMENTS, made_of=MADE_OF, **options):
    return store_tokens(folder, lambda: iter(documents), tokenizer, made_of, **options)[0]


def content(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def rows(items):
    return [(item["input_ids"].tolist(), item["num_bytes"]) for item in items]


def assert_equal(tokens, expected):
    for name in ("ids", "num_bytes", "ends"):
        one, other = getattr(tokens, name), getattr(expected, name)
        assert one.dtype == other.dtype and np.array_equal(one, other)


# ---- what it holds -----------------------------------------------------------------------------------------------


def test_stored_tokens_are_the_tokens(tokenizer, tmp_path):
    stored, in_memory = written(tmp_path / "deep" / "store", tokenizer), Tokens.of(DOCUMENTS, tokenizer)
    assert_equal(stored, in_memory)
    for length in (1, 7, 100_000):
        blocks = Blocks(stored, tokenizer, length, drop_last=False)
        assert rows(blocks) == rows(Blocks(DOCUMENTS, tokenizer, length, drop_last=False))
        assert blocks.num_bytes == sum(len(document.text.encode()) for document in DOCUMENTS)
    for length in (None, 10):
        ours, theirs = Sentences(stored, tokenizer, length), Sentences(DOCUMENTS, tokenizer, length)
        assert rows(ours) == rows(theirs)
        for name in ("lengths", "truncated", "num_tokens", "num_bytes"):
            assert getattr(ours, name) == getattr(theirs, name)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=12))
def test_any_text_is_stored(tokenizer, tmp_path, texts):
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    documents = [Document(text) for text in texts]
    stored = written(tmp_path / "store", tokenizer, documents)
    assert_equal(stored, Tokens.of(documents, tokenizer))
    assert stored.num_bytes.sum() == sum(len(text.encode()) for text in texts)
    assert tokenizer.decode(stored.ids) == "".join(text + tokenizer.eos_token for text in texts if text)


def test_threads_keep_the_order(tokenizer, tmp_path, monkeypatch):
    expected = written(tmp_path / "one", tokenizer)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert_equal(written(tmp_path / "four", tokenizer), expected)
    assert content(tmp_path / "one") == content(tmp_path / "four")


def test_a_token_may_stand_for_more_bytes_than_16_bits_count(tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", bos_token="</s>")
    stored = written(tmp_path / "store", words, [Document("é" * 70_000), Document("a b")])
    assert stored.num_bytes.tolist() == [140_000, 0, 1, 2, 0]


def test_nothing_is_stored_of_nothing(tokenizer, tmp_path):
    for _ in range(2):
        stored = written(tmp_path / "store", tokenizer, [Document("")])
        assert len(stored.ids) == len(stored.ends) == 0
    with pytest.raises(InputError, match="the text has 0 tokens"):
        Blocks(stored, tokenizer, 8, drop_last=True)
    with pytest.raises(InputError, match="hold no text"):
        Sentences(stored, tokenizer)


def test_workers_map_the_files_themselves(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in (Blocks(written("store", tokenizer), tokenizer, 16, True), Sentences(StoredTokens("store"), tokenizer)):
        monkeypatch.chdir(tmp_path)
        pickled = pickle.dumps(data)
        assert len(pickled) < 1000
        monkeypatch.chdir("/")
        assert rows(pickle.loads(pickled)) == rows(data)
        loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert rows(loader) == rows(data)


# ---- cut short and gone on with ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 2, 5, 21, 22])
def test_a_writing_that_is_cut_short_goes_on_where_it_was(tokenizer, tmp_path, batches):
    """Cut after so many batches, again and again, with something half written behind each cut."""
    written(tmp_path / "whole", tokenizer)
    entries, cuts = [], 0

    def stop(documents, tokens):
        entries.append(documents)
        if len(entries) % batches == 0:
            raise Cut

    complete = False
    while not complete:
        with suppress(Cut):
            written(tmp_path / "store", tokenizer, on_progress=stop)
        complete = json.loads((tmp_path / "store" / "store.json").read_text())["complete"]
        if not complete:
            cuts += 1
            for name in ("tokens.bin", "documents.bin"):
                with open(tmp_path / "store" / name, "ab") as file:
                    file.write(b"torn")
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    assert sorted(set(entries)) == [*range(3, len(DOCUMENTS), 3), len(DOCUMENTS)]
    assert cuts == len(entries) // batches - (len(entries) % batches == 0)


def test_text_that_fails_leaves_what_came_before(tokenizer, tmp_path):
    def failing():
        yield from DOCUMENTS[:20]
        raise InputError("line 21 is bad.")

    with pytest.raises(InputError, match="line 21"):
        store_tokens(tmp_path / "store", failing, tokenizer, MADE_OF)
    assert json.loads((tmp_path / "store" / "store.json").read_text())["documents_read"] == 18
    written(tmp_path / "store", tokenizer)
    written(tmp_path / "whole", tokenizer)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


@pytest.mark.slow
def test_processes_that_are_killed_leave_what_the_next_one_needs(tokenizer, tmp_path):
    documents = DOCUMENTS * 8
    start = time.monotonic()
    written(tmp_path / "whole", tokenizer, documents)
    longest, rng, killed, trials = time.monotonic() - start, random.Random(0), 0, 0
    while trials < 4 or killed <= 4:
        folder, trials = tmp_path / str(trials), trials + 1
        for _ in range(4):
            child = fork.Process(target=written, args=(folder, tokenizer, documents))
            child.start()
            child.join(rng.random() * longest / 2)
            child.kill()
            child.join()
            killed += child.exitcode == -signal.SIGKILL
            if child.exitcode == 0:  # the machine was busier when the time was taken
                longest *= 0.9
        written(folder, tokenizer, documents)
        assert content(folder) == content(tmp_path / "whole")
        assert not list(folder.glob(".*"))


def test_a_store_that_is_complete_is_only_read(tokenizer, tmp_path):
    written(tmp_path / "store", tokenizer)
    before = content(tmp_path / "store")
    (tmp_path / "store" / "lock").unlink()  # of a store on a disk that cannot be written

    def unread():
        raise AssertionError("read again")

    store_tokens(tmp_path / "store", unread, tokenizer, MADE_OF)
    assert content(tmp_path / "store") == before and not (tmp_path / "store" / "lock").exists()


def test_one_process_writes_and_the_other_waits(tokenizer, tmp_path):
    reading, go_on, waiting = fork.Event(), fork.Event(), fork.Event()

    def slow():
        yield from DOCUMENTS[:10]
        reading.set()
        assert go_on.wait(LATEST)
        yield from DOCUMENTS[10:]

    def unread():
        os._exit(3)

    one = fork.Process(target=store_tokens, args=(tmp_path / "store", slow, tokenizer, MADE_OF))
    two = fork.Process(
        target=store_tokens, args=(tmp_path / "store", unread, tokenizer, MADE_OF), kwargs={"on_wait": waiting.set}
    )
    one.start()
    assert reading.wait(LATEST)
    two.start()
    assert waiting.wait(LATEST)
    two.join(0.2)
    assert two.is_alive()
    go_on.set()
    for process in (one, two):
        process.join(LATEST)
        assert process.exitcode == 0
    assert_equal(StoredTokens(tmp_path / "store"), Tokens.of(DOCUMENTS, tokenizer))


# ---- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [True, False])
def test_tokens_of_something_else_are_refused(tokenizer, tmp_path, complete):
    def stop(documents, tokens):
        if not complete:
            raise Cut

    with nullcontext() if complete else pytest.raises(Cut):
        written(tmp_path / "store", tokenizer, on_progress=stop)
    before = content(tmp_path / "store")
    with pytest.raises(InputError, match=r"something else \(limit\): give another folder, or delete it"):
        written(tmp_path / "store", tokenizer, made_of={**MADE_OF, "limit": 3})
    with pytest.raises(InputError, match=r"\(source, column\)"):
        written(tmp_path / "store", tokenizer, made_of={"source": "other", "limit": None, "column": None})
    with pytest.raises(InputError, match=r"\(vocab_size, tokenizer\)"):
        written(tmp_path / "store", 300)
    assert content(tmp_path / "store") == before


def test_fingerprints_of_tokenizers(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=2)  # settings of a call alone
    assert tokenizer_fingerprint(tokenizer) == before
    other = pickle.loads(pickle.dumps(tokenizer))
    assert tokenizer_fingerprint(other) == before
    other.add_tokens(["sailor"])
    assert tokenizer_fingerprint(other) != before


def test_fingerprints_of_sources(tmp_path):
    for name, text in {"a.txt": "one", "b.txt": "one", "c.jsonl": "one", "d.txt": "two"}.items():
        (tmp_path / name).write_text(text)
    a, b, c, d = (source_fingerprint(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl", "d.txt"))
    assert a == b and len({b, c, d}) == 3
    assert source_fingerprint("builtin:stories") != source_fingerprint("builtin:sentences")
    whole = source_fingerprint(tmp_path)
    (tmp_path / "b.txt").unlink()
    assert source_fingerprint(tmp_path) != whole
    with pytest.raises(InputError, match="does not exist"):
        source_fingerprint(tmp_path / "nothing.txt")


DAMAGE = {
    "a file is gone": (lambda folder: (folder / "bytes.bin").unlink(), "bytes.bin has 0 bytes"),
    "a file is short": (lambda folder: os.truncate(folder / "tokens.bin", 8), "tokens.bin has 8 bytes"),
    "a file is long": (lambda folder: os.truncate(folder / "documents.bin", 1 << 20), "documents.bin has 1,048,576"),
    "no journal": (lambda folder: (folder / "store.json").unlink(), "store.json is missing beside tokens.bin"),
    "no json": (lambda folder: (folder / "store.json").write_text('{"format": 1'), "store.json cannot be read"),
    "a list": (lambda folder: (folder / "store.json").write_text("[]"), "store.json cannot be read"),
    "bytes": (lambda folder: (folder / "store.json").write_bytes(b"\xff"), "store.json cannot be read"),
    "a key": (lambda folder: (folder / "store.json").write_text('{"format": 1, "x": 1}'), "store.json cannot be read"),
    "tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_refused(tmp_path, kind):
    damage, message = DAMAGE[kind]
    written(tmp_path / "store", 300)
    damage(tmp_path / "store")
    with pytest.raises(InputError, match=f"is damaged .{message}.*delete it"):
        written(tmp_path / "store", 300)


@pytest.mark.parametrize("name", ["tokens.bin", "bytes.bin", "documents.bin", "tokenizer/tokenizer.json"])
def test_a_store_whose_content_has_changed_is_refused(tmp_path, name):
    def ask():
        return store_tokens(tmp_path / "store", lambda: iter(DOCUMENTS), 300, MADE_OF)

    ask()
    content = bytearray((tmp_path / "store" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "store" / name).write_bytes(content)
    with pytest.raises(InputError, match=f"is damaged .{name} has changed since it was written.: delete it"):
        ask()


def test_a_store_of_another_version_is_refused(tokenizer, tmp_path):
    written(tmp_path / "store", tokenizer)
    journal = json.loads((tmp_path / "store" / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps({**journal, "format": 0}))
    with pytest.raises(InputError, match="another version"):
        written(tmp_path / "store", tokenizer)


def test_a_file_is_no_folder(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(InputError, match="cannot hold a token store"):
            written(folder, tokenizer)


# ---- from a recipe -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A text, and the overrides that name it."""
    (tmp_path / "text.txt").write_text("\n".join(document.text for document in sentences(80)))
    (tmp_path / "valid.txt").write_text("\n".join(document.text for document in sentences(10, seed=1)))
    return (f"data.source={tmp_path / 'text.txt'}", f"data.validation={tmp_path / 'valid.txt'}")


@pytest.mark.parametrize("unit", ["blocks", "sentences"])
def test_training_from_a_store_is_training(tmp_path, files, unit):
    options = (*files, "data.limit=70", f"data.unit={unit}", "data.length=12", "training.max_steps=2")
    in_memory = run(tmp_path / "memory", *options)
    for _ in range(2):  # made, then found
        stored = run(tmp_path / "stored", *options, f"data.cache={tmp_path / 'store'}", replace=True)
        assert stored.corpus.tokenizer.get_vocab() == in_memory.corpus.tokenizer.get_vocab()
        assert rows(stored.corpus.train) == rows(in_memory.corpus.train)
        assert rows(stored.corpus.validation) == rows(in_memory.corpus.validation)
        assert stored.logged("loss") == in_memory.logged("loss")
    with pytest.raises(InputError, match=r"\(limit, vocab_size\)"):
        load_corpus(small_recipe("ltm", *files, "data.vocab_size=280", f"data.cache={tmp_path / 'store'}").data)
    (tmp_path / "text.txt").write_text("another text")
    with pytest.raises(InputError, match=r"\(source\)"):
        load_corpus(small_recipe("ltm", *options, f"data.cache={tmp_path / 'store'}").data)


def test_the_tokenizer_is_trained_once(tmp_path, files, monkeypatch):
    data = small_recipe("ltm", *files, f"data.cache={tmp_path / 'store'}").data
    with monkeypatch.context() as context:
        context.setattr(store, "_write", lambda *arguments: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            load_corpus(data)
    monkeypatch.setattr(store, "train_tokenizer", None)
    assert len(load_corpus(data).tokenizer) == 300


def test_how_far_it_is_is_said(tmp_path, files, monkeypatch):
    stages = []
    monkeypatch.setattr("latentlm.data.recipe._SECONDS_BETWEEN_STAGES", 0)
    load_corpus(small_recipe("ltm", *files, f"data.cache={tmp_path / 'store'}").data, on_stage=stages.append)
    assert stages[0].startswith(f"tokenising into {tmp_path / 'store'}: 3 documents, ")
    assert stages[-1].startswith(f"tokenising into {tmp_path / 'store'}: 80 documents, ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.cache=store",), "cache keeps all of source.*name a source under validation"),
        (("data.cache=store", "data.validation=x", "data.streaming=true", "data.unit=blocks"), "leave one of them out"),
        (("data.cache=' '", "data.validation=x"), "cache is empty"),
    ],
)
def test_recipes_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        small_recipe("ltm", *overrides, "training.max_steps=2")


def test_words_of_a_recipe_in_memory_in_a_store_and_streamed(tmp_path):
    texts = [f" word {number % 7} \t of <unk> {number % 3}" for number in range(200)]
    (tmp_path / "train.txt").write_text("\n".join(texts))
    (tmp_path / "valid.txt").write_text("word never seen\n")
    files = (f"data.source={tmp_path / 'train.txt'}", f"data.validation={tmp_path / 'valid.txt'}")
    words = ("data.tokenizer=words", "data.vocab_size=9", *files)
    cached = (*words, f"data.cache={tmp_path / 'store'}")
    in_memory, first, second = (load_corpus(small_recipe("ltm", *given).data) for given in (words, cached, cached))
    blocks = ("data.unit=blocks", "data.length=4")
    streamed = load_corpus(small_recipe("ltm", *words, *blocks, "data.streaming=true").data)
    expected = ["<|endoftext|>", "<unk>", "of", "word", "0", "1", "2", "3", "4"]
    for corpus in (in_memory, first, second, streamed):
        assert corpus.tokenizer.convert_ids_to_tokens(range(len(corpus.tokenizer))) == expected
    assert rows(in_memory.train) == rows(first.train) == rows(second.train)
    ids = in_memory.validation[0]["input_ids"].tolist()
    assert in_memory.tokenizer.convert_ids_to_tokens(ids[1:-1]) == ["word", "<unk>", "<unk>"]
    with pytest.raises(InputError, match=r"holds the tokens of something else \(vocab_size, tokenizer\)"):
        load_corpus(small_recipe("ltm", *files, "data.vocab_size=300", f"data.cache={tmp_path / 'store'}").data)
