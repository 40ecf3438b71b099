"""Blocks and sentences against the plain concatenation that they stand for."""

import pickle
import random
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from latentlm.data import (
    Blocks,
    Collator,
    Document,
    Sentences,
    StreamedBlocks,
    collate,
    length_buckets,
    sentences,
    split_documents,
    text_batch,
)
from latentlm.errors import InputError

DOCUMENTS = [Document(document.text) for document in sentences(40)] + [Document(""), Document("naïve 日本 🙂")]


def reference_tokens(tokenizer, documents=DOCUMENTS):
    """Ids of all documents with EOS after each, encoded one by one."""
    encoded = (tokenizer.encode(document.text) for document in documents if document.text)
    return [token for ids in encoded for token in [*ids, tokenizer.eos_token_id]]


def rows(items):
    return [(item["input_ids"].tolist(), item["num_bytes"]) for item in items]


@pytest.mark.parametrize("block_length", [1, 7, 64, 10_000])
def test_blocks_score_every_token_and_byte_once(tokenizer, block_length):
    blocks = Blocks(DOCUMENTS, tokenizer, block_length, drop_last=False)
    items = list(blocks)
    assert all(item["input_ids"][0] == tokenizer.bos_token_id for item in items)
    assert all(len(item["input_ids"]) == block_length + 1 for item in items[:-1])
    scored = [token for item in items for token in item["input_ids"][1:].tolist()]
    assert scored == reference_tokens(tokenizer)
    assert tokenizer.decode(scored).split("<|endoftext|>") == [d.text for d in DOCUMENTS if d.text] + [""]
    num_bytes = sum(len(document.text.encode()) for document in DOCUMENTS)
    assert sum(item["num_bytes"] for item in items) == blocks.num_bytes == num_bytes
    assert blocks.num_tokens == len(scored) and len(blocks) == len(items)
    assert items[0]["input_ids"].dtype == torch.long
    assert torch.equal(blocks[-1]["input_ids"], items[-1]["input_ids"])


def test_drop_last_leaves_out_only_the_tail(tokenizer):
    all_of_it, training = (rows(Blocks(DOCUMENTS, tokenizer, 64, drop_last)) for drop_last in (False, True))
    assert training == all_of_it[:-1]
    assert {len(ids) for ids, _ in training} == {65}


def test_blocks_refuse(tokenizer):
    with pytest.raises(InputError, match="less than one block of 100000"):
        Blocks(DOCUMENTS, tokenizer, 100_000, drop_last=True)
    with pytest.raises(InputError, match="the text has 0 tokens"):
        Blocks([], tokenizer, 8, drop_last=False)
    with pytest.raises(InputError, match="block_length=0 is too small"):
        Blocks(DOCUMENTS, tokenizer, 0, drop_last=False)


def source():
    return iter(DOCUMENTS)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("block_length", [1, 7, 64])
def test_streamed_blocks_are_the_blocks(tokenizer, block_length, drop_last):
    streamed = StreamedBlocks(source, tokenizer, block_length, drop_last)
    assert rows(streamed) == rows(streamed) == rows(Blocks(DOCUMENTS, tokenizer, block_length, drop_last))


def test_streamed_blocks_shuffle_by_epoch(tokenizer):
    ordered = rows(Blocks(DOCUMENTS, tokenizer, 8, drop_last=False))
    streamed = StreamedBlocks(source, tokenizer, 8, drop_last=False, shuffle_buffer=16, seed=5)
    first = rows(streamed)
    assert first != ordered and sorted(first) == sorted(ordered) and first == rows(streamed)
    streamed.set_epoch(1)
    second = rows(streamed)
    assert second != first and sorted(second) == sorted(ordered)
    assert rows(StreamedBlocks(source, tokenizer, 8, False, shuffle_buffer=16, seed=6)) != first


def test_streamed_blocks_do_not_read_ahead(tokenizer):
    read = []

    def endless():
        while True:
            read.append(0)
            yield Document("the same words again and again ." * 100)

    items = iter(StreamedBlocks(endless, tokenizer, 16, drop_last=True, shuffle_buffer=10))
    for _ in range(50):
        next(items)
    assert len(read) <= 1000  # one batch of the tokenizer


@pytest.mark.parametrize("shuffle_buffer", [0, 4])
def test_workers_share_the_blocks(tokenizer, shuffle_buffer):
    expected = rows(Blocks(DOCUMENTS, tokenizer, 16, drop_last=False))
    streamed = StreamedBlocks(source, tokenizer, 16, drop_last=False, shuffle_buffer=shuffle_buffer)
    loader = DataLoader(
        streamed, batch_size=None, num_workers=2, multiprocessing_context="fork", persistent_workers=True
    )
    first = rows(loader)
    assert sorted(first) == sorted(expected)
    streamed.set_epoch(1)  # reaches workers that live on
    assert (rows(loader) != first) == bool(shuffle_buffer)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_blocks(tokenizer, monkeypatch, ranks, drop_last):
    expected = rows(Blocks(DOCUMENTS, tokenizer, 16, drop_last))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(rows(StreamedBlocks(source, tokenizer, 16, drop_last)))
    if drop_last:  # equally many on every rank, so that none waits for another
        expected = expected[: len(expected) // ranks * ranks]
        assert len({len(share) for share in shares}) == 1
    assert shares == [expected[rank::ranks] for rank in range(ranks)]


def test_ranks_and_workers_together(tokenizer):
    expected = rows(Blocks(DOCUMENTS, tokenizer, 4, drop_last=False))
    streamed = StreamedBlocks(source, tokenizer, 4, drop_last=False)
    shares = [rows(streamed._own_blocks(rank, 3, worker, 2)) for rank in range(3) for worker in range(2)]
    assert Counter(str(row) for share in shares for row in share) == Counter(map(str, expected))


def test_streamed_blocks_travel_to_spawned_workers(tokenizer):
    streamed = StreamedBlocks(source, tokenizer, 16, drop_last=True)
    assert rows(pickle.loads(pickle.dumps(streamed))) == rows(streamed)


def test_streamed_blocks_refuse(tokenizer):
    with pytest.raises(InputError, match="the text has 0 tokens"):
        next(iter(StreamedBlocks(lambda: iter([]), tokenizer, 8, drop_last=False)))
    with pytest.raises(InputError, match="less than one block"):
        next(iter(StreamedBlocks(source, tokenizer, 100_000, drop_last=True)))
    with pytest.raises(InputError, match="shuffle_buffer=-1"):
        StreamedBlocks(source, tokenizer, 8, drop_last=True, shuffle_buffer=-1)


def test_sentences(tokenizer):
    data = Sentences(DOCUMENTS, tokenizer)
    kept = [document.text for document in DOCUMENTS if document.text]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert len(data) == len(kept) == len(DOCUMENTS) - 1
    for text, item, length in zip(kept, data, data.lengths, strict=True):
        assert item["input_ids"].tolist() == [bos, *tokenizer.encode(text), eos]
        assert item["num_bytes"] == len(text.encode())
        assert length == len(item["input_ids"]) - 1
    assert data.truncated == 0 and data.factors is None
    assert data.num_tokens == sum(data.lengths) and data.num_bytes == sum(len(text.encode()) for text in kept)
    assert rows(pickle.loads(pickle.dumps(data))) == rows(data)


def test_sentences_truncated(tokenizer):
    data, whole = Sentences(DOCUMENTS, tokenizer, max_length=10), Sentences(DOCUMENTS, tokenizer)
    assert data.truncated == sum(length > 10 for length in whole.lengths) > 0
    for short, item in zip(data, whole, strict=True):
        assert short["input_ids"].tolist() == item["input_ids"][:11].tolist()
        if len(item["input_ids"]) > 11 and (text := tokenizer.decode(short["input_ids"][1:])).isascii():
            assert short["num_bytes"] == len(text)
    exact = Sentences([Document("abc")], tokenizer, max_length=Sentences([Document("abc")], tokenizer).lengths[0])
    assert exact.truncated == 0


def test_sentences_keep_factors_aligned(tokenizer):
    documents = list(sentences(1500, seed=1))
    documents[1:1] = [Document(""), Document("no factors")]
    data = Sentences(documents, tokenizer)
    kept = [document for document in documents if document.text]
    assert data.factors == [document.factors for document in kept] and data.factors[1] is None
    assert tokenizer.decode(data[1234]["input_ids"][1:-1]) == kept[1234].text
    with pytest.raises(InputError, match="hold no text"):
        Sentences([Document("")], tokenizer)
    with pytest.raises(InputError, match="max_length=0"):
        Sentences(documents, tokenizer, max_length=0)


def test_collate(tokenizer):
    items = [
        {"input_ids": torch.tensor([9, 1, 9]), "num_bytes": 2, "index": 7},
        {"input_ids": torch.tensor([9, 5]), "num_bytes": 1, "index": 0},
    ]
    expected = {
        "input_ids": [[9, 1, 9], [9, 5, 9]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 1, 9], [-100, 5, -100]],  # EOS is scored, although it is the padding token
        "num_bytes": [2, 1],
        "index": [7, 0],
    }
    for batch in (collate(items, 9), pickle.loads(pickle.dumps(Collator(9)))(items)):
        assert {name: value.tolist() for name, value in batch.items()} == expected
        assert all(value.dtype == torch.long for value in batch.values())
    data = Sentences(DOCUMENTS, tokenizer)
    loader = DataLoader(data, batch_size=8, collate_fn=Collator(tokenizer.pad_token_id))
    batches = list(loader)
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == data.num_tokens
    assert sum(int(batch["num_bytes"].sum()) for batch in batches) == data.num_bytes
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(len(data)))


def test_text_batch(tokenizer):
    texts = ["the sailor", "", "a"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for end in (True, False):
        batch = text_batch(tokenizer, texts, end=end)
        assert set(batch) == {"input_ids", "attention_mask"}
        for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
            expected = [bos, *tokenizer.encode(text), *([eos] if end else [])]
            assert ids[: len(expected)].tolist() == expected and mask.sum() == len(expected)
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    for nothing in ([], "a string"):
        with pytest.raises(InputError, match=r"there are no texts|not one string"):
            text_batch(tokenizer, nothing)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [0, 1, 31, 32, 5000])
def test_length_buckets(shuffle, size):
    rng = random.Random(size)
    lengths = [rng.randint(1, 100) for _ in range(size)]
    batches = length_buckets(lengths, 8, seed=0, shuffle=shuffle)
    assert sorted(index for batch in batches for index in batch) == list(range(size))
    assert sum(len(batch) != 8 for batch in batches) == (size % 8 > 0)
    assert batches == length_buckets(lengths, 8, seed=0, shuffle=shuffle)
    if size == 5000:
        padding = sum(max(lengths[i] for i in batch) - lengths[i] for batch in batches for i in batch)
        assert padding / sum(lengths) < 0.05
        assert (batches != length_buckets(lengths, 8, seed=1, shuffle=shuffle)) == shuffle
    with pytest.raises(InputError, match="batch_size=0"):
        length_buckets(lengths, 0, seed=0, shuffle=shuffle)


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.5, 0.999])
def test_split_documents(fraction):
    documents = [Document(f"text {i % 60}", {"i": str(i)}) for i in range(100)]  # forty texts come twice
    train, validation = split_documents(documents, fraction, seed=0)
    numbers = [[int(document.factors["i"]) for document in side] for side in (train, validation)]
    assert sorted(numbers[0] + numbers[1]) == list(range(100))
    assert all(side and side == sorted(side) for side in numbers)
    train_texts, validation_texts = ({document.text for document in side} for side in (train, validation))
    assert not train_texts & validation_texts
    assert len(validation_texts) == min(max(round(60 * fraction), 1), 59)
    assert split_documents(documents, fraction, seed=0) == (train, validation)
    assert split_documents(documents, 0.5, seed=0) != split_documents(documents, 0.5, seed=1)


def test_split_refuses():
    with pytest.raises(InputError, match=r"1 distinct document cannot be split.*sample_by=line"):
        split_documents([Document("a"), Document("a")], 0.5, seed=0)
    for fraction in (0.0, 1.0, -0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="fraction"):
            split_documents([Document("a"), Document("b")], fraction, seed=0)
