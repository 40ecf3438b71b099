"""A small tokenizer that the tests of this folder share."""

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    from latentlm.data import sentences, train_tokenizer

    texts = [document.text for document in sentences(300)]
    return train_tokenizer([*texts, "Ünïcödé, Ελληνικά: 日本語 🙂"], 400)
