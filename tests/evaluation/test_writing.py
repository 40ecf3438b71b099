"""Where texts end, the documents in them, and their variety, by hand and against counts in another way."""

import math
from collections import Counter

import pytest
from tests.toy import BOS, EOS, pretrained_part, small_model, three_verbs

from latentlm import InputError
from latentlm.data.tokenizers import load_tokenizer, train_tokenizer
from latentlm.evaluation.writing import (
    as_one,
    document_ids,
    documents,
    new_texts,
    of_fixed_length,
    repetition,
    stopping,
    variety,
    writes_freely,
)


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(pretrained_part("gpt2"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ([], ("",)),
        ([5], ("w5",)),
        ([EOS], ("", "")),
        ([5, 6, EOS], ("w5 w6", "")),
        ([5, EOS, EOS, 6], ("w5", "", "w6")),
    ],
)
def test_documents_stand_between_ends_and_back(words, text, expected):
    assert documents(text, [EOS], words) == expected
    assert document_ids(words, [expected]) == [text]


def test_documents_of_bytes_and_of_a_tokenizer_of_other_ends(words):
    pieces = train_tokenizer(["a café 日本 🙂", "b"], 300)
    text = "naïve 日本 🙂"
    ids = pieces(text)["input_ids"]
    assert documents([*ids, pieces.eos_token_id, *ids], [pieces.eos_token_id], pieces) == (text, text)
    assert document_ids(words, [("w5", "w6"), ("w7",)]) == [[5, EOS, 6], [7]]
    assert document_ids(pieces, [(text, "")]) == [[*ids, pieces.eos_token_id]]
    assert document_ids(pieces, []) == []
    assert documents([5, 6, 7], [None], words) == ("w5 w6 w7",)  # a model that has no end


def test_as_one_leaves_empty_documents_out():
    assert as_one(("", "a", "", "b\n", "")) == "a\n\nb\n"
    assert as_one(("",)) == ""


@pytest.mark.parametrize("fixed, expected", [(True, [[5, EOS, 6], [7, 8, 9]]), (False, [[5, EOS], [7, 8, 9]])])
def test_a_text_of_free_length_keeps_its_first_end(fixed, expected):
    model = small_model("autoregressive", eos_token_id=EOS)
    assert new_texts(model, [[5, EOS, 6], [7, 8, 9]], fixed) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ([1, 2, 3], None),
        ([1, 2, 3, 4], 0.0),
        ([1] * 8, 1 - 1 / 5),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 - 4 / 5),  # 1234 2341 3412 4123 1234
    ],
)
def test_repetition_by_hand(text, expected):
    assert repetition(text) == (None if expected is None else pytest.approx(expected))


def test_variety_of_sets_written_out():
    sets = [[[5, 5, 6], [7]], [[5, 6, 7, 8, 5, 6, 7, 8], []]]
    found = variety(sets)

    def entropy(text):
        shares = [count / len(text) for count in Counter(text).values()]
        return sum(-share * math.log2(share) for share in shares) * math.log(2)

    assert found["token_entropy_nats"] == pytest.approx((entropy(sets[0][0]) + 0 + entropy(sets[1][0])) / 3)
    assert found["repetition"] == pytest.approx(1 / 5)  # of the one text that has four tokens
    assert found["distinct_1"] == pytest.approx((3 / 4 + 4 / 8) / 2)
    assert found["distinct_2"] == pytest.approx((2 / 2 + 4 / 7) / 2)
    assert found["distinct_3"] == pytest.approx((1 / 1 + 4 / 6) / 2)


def test_of_no_text_there_is_no_figure():
    assert set(variety([[[], []]]).values()) == {None}


@pytest.mark.parametrize("end", [EOS, [EOS, 4]])
@pytest.mark.parametrize("family", ["autoregressive", "gp_vae"])
def test_ends_come_back_whatever_happens(family, end):
    model = small_model(family, eos_token_id=end)
    with pytest.raises(KeyError), stopping(model, True):
        assert model.config.eos_token_id is None
        raise KeyError
    assert model.config.eos_token_id == end
    with stopping(model, False):
        assert model.config.eos_token_id == end


@pytest.mark.parametrize(
    "recipe, length_model, expected",
    [
        (None, "none", True),
        ("blocks", "none", True),
        ("sentences", "none", False),
        (None, "categorical", False),
        ("blocks", "categorical", False),
    ],
)
def test_models_of_blocks_write_texts_of_fixed_length(tmp_path, recipe, length_model, expected):
    if recipe:
        (tmp_path / "recipe.yaml").write_text(f"data: {{source: builtin:sentences, unit: {recipe}}}\n")
    model = small_model("gp_vae", eos_token_id=EOS, length_model=length_model)
    assert of_fixed_length(model, tmp_path) is expected


def test_who_does_not_write(monkeypatch):
    with pytest.raises(InputError, match="ThreeVerbs does not write"):
        writes_freely(three_verbs())
    with pytest.raises(InputError, match="bos_token_id"):
        writes_freely(small_model("autoregressive", bos_token_id=None))
    with pytest.raises(InputError, match="labels"):
        writes_freely(small_model("lang_vae", annotation_labels=["A", "B"]))
    assert writes_freely(small_model("ltm")).config.bos_token_id == BOS
