"""Round trips, and bytes that add up whatever the tokenizer."""

import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from latentlm.data import (
    Document,
    Sentences,
    load_tokenizer,
    python_docs,
    sentences,
    text_batch,
    token_bytes,
    train_tokenizer,
    train_word_tokenizer,
)
from latentlm.data.tokenizers import tokenizer_fingerprint
from latentlm.errors import InputError

ALPHABETS = [(32, 127), (0, 0x300), (0x300, 0xD800), (0xE000, 0x110000)]


def random_texts(count=300, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        ranges = rng.sample(ALPHABETS, rng.randint(1, 4))
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, 30)))


TEXTS = ["", " ", "  two  spaces  ", "a\r\n\tb \u00a0c\u200d", "🙂👩‍👩‍👧 日本", "x<|endoftext|>y", *random_texts()]


def test_round_trip(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("don 't , stop .")) == "don 't , stop ."


def test_special_tokens_and_size(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token == "<|endoftext|>"
    assert set(tokenizer("text")) == {"input_ids", "attention_mask"}
    assert len(tokenizer) == 400
    assert len(train_tokenizer([], 257)) == 257
    with pytest.raises(InputError, match="vocab_size=256 is too small: give at least 257"):
        train_tokenizer(["a"], 256)


def test_training_is_deterministic():
    texts = [document.text for document in sentences(500)]
    one, two = (train_tokenizer(iter(texts), 350) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.bos_token_id == loaded.eos_token_id == tokenizer.eos_token_id
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


def test_load_fills_missing_special_tokens(tokenizer, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    bare.save_pretrained(tmp_path / "bare")
    loaded = load_tokenizer(tmp_path / "bare")
    assert loaded.bos_token_id == loaded.pad_token_id == loaded.eos_token_id


def test_load_refuses(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no tokenizer that loads"):
        load_tokenizer(tmp_path / "empty")
    tokenizer.save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"model":')
    with pytest.raises(InputError, match="damaged holds no tokenizer that loads"):
        load_tokenizer(tmp_path / "damaged")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match="endless has no end of sequence"):
        load_tokenizer(tmp_path / "endless")


def gpt2_like(trim_offsets):
    """Byte-level with GPT-2's post-processor, which takes leading blanks out of the offsets."""
    tokenizer = train_tokenizer((document.text for document in sentences(100)), 300)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


def lossy():
    """Lower case, no accents, white space dropped, unknown characters replaced."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(["the quick brown fox", "über allen gipfeln"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def of_words():
    return train_word_tokenizer([*TEXTS[:100], "the quick brown fox"], 60)


@pytest.mark.parametrize("make", [lambda: gpt2_like(True), lambda: gpt2_like(False), lossy, of_words])
def test_bytes_add_up(make):
    tokenizer = make()
    for text, (ids, counts) in zip(TEXTS, token_bytes(tokenizer, iter(TEXTS)), strict=True):
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert len(counts) == len(ids)
        assert sum(counts) == (len(text.encode()) if ids else 0)
        assert all(count >= 0 for count in counts)


def test_bytes_of_each_token(tokenizer):
    # A byte-level tokenizer's own pieces are the reference: where no character is split they are the bytes exactly.
    for text in [document.text for document in sentences(50)] + ["a  b ", "naïve"]:
        ((ids, counts),) = token_bytes(tokenizer, [text])
        pieces = [tokenizer.decode([i]) for i in ids]
        if "\ufffd" not in "".join(pieces):
            assert counts == [len(piece.encode()) for piece in pieces]
    ((ids, counts),) = token_bytes(train_tokenizer([], 257), ["é🙂"])
    assert counts == [2, 0, 4, 0, 0, 0]


def test_long_texts_and_texts_without_tokens(tokenizer):
    long = next(python_docs()).text * 300
    results = list(token_bytes(tokenizer, ["", long, "", "a"]))
    assert [sum(counts) for _, counts in results] == [0, len(long.encode()), 0, 1]
    assert results[0] == results[2] == ([], [])


# ---- words -------------------------------------------------------------------------------------------------------


def test_words_come_by_frequency_and_then_by_their_characters():
    texts = ["b a c a", "a b", " \tz b\u2003d\u0085d \n", "", "<unk> <unk> <unk> <unk>"]
    everything = ["<|endoftext|>", "<unk>", "a", "b", "d", "c", "z"]
    for size in range(3, 10):
        tokenizer = train_word_tokenizer(iter(texts), size)
        assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == everything[:size]
    other_order = train_word_tokenizer(reversed(texts), 100)
    assert other_order.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert tokenizer_fingerprint(other_order) == tokenizer_fingerprint(tokenizer)
    with pytest.raises(InputError, match="vocab_size=2 is too small: give at least 3"):
        train_word_tokenizer(["a"], 2)


def test_an_unknown_word_is_the_corpus_own_unk():
    tokenizer = train_word_tokenizer(["the cat <unk> the dog", "the end"], 100)
    known = tokenizer.convert_tokens_to_ids("<unk>")
    ids = tokenizer.encode("  the\t<unk>  end zebra. dog\r\n")
    assert ids == [*tokenizer.encode("the"), known, *tokenizer.encode("end"), known, *tokenizer.encode("dog")]
    # scored and shown as any other word; only the end of text is special
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the <unk> end <unk> dog"
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_words_that_hold_the_end_of_text_are_cut_there_when_counted_and_when_encoded():
    tokenizer = train_word_tokenizer(["x<|endoftext|>y"], 100)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == ["<|endoftext|>", "<unk>", "x", "y"]
    assert tokenizer.encode("x<|endoftext|>y") == [2, 0, 3]


def test_words_save_and_load(tmp_path):
    tokenizer = of_words()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_sentences_of_words_score_each_word_and_the_end():
    texts = [" no it was n't black monday ", "\t", "", "black\tmonday", "<unk> monday"]
    tokenizer = train_word_tokenizer(texts, 100)
    data = Sentences([Document(text) for text in texts], tokenizer)
    assert data.lengths == [7, 3, 3]  # published perplexities of a word count the end of the sentence, too
    assert data.num_bytes == sum(len(text.encode()) for text in texts if text.strip())
    batch = text_batch(tokenizer, ["black monday", "it"])
    assert batch["input_ids"].tolist() == [
        [0, *tokenizer.encode("black monday"), 0],
        [0, *tokenizer.encode("it"), 0, 0],
    ]
