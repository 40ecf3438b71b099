"""Texts and what is known of them: ids of factors, tables of factors, factors of annotations."""

import lzma

import numpy as np
import pandas as pd
import pytest

from latentlm import InputError
from latentlm.data import Annotated, sentences
from latentlm.probing import Texts, read_texts
from latentlm.probing.texts import MOST_VALUES, UNKNOWN, factors_of_labels


def texts_of(**factors):
    rows = len(next(iter(factors.values())))
    return Texts(tuple(f"text {row}" for row in range(rows)), factors=pd.DataFrame(factors))


# ---- texts -------------------------------------------------------------------------------------------------------


def test_a_selection_keeps_what_is_known():
    texts = Texts(("a", "b c", "d"), (("X",), ("Y", "Z"), ("X",)), pd.DataFrame({"f": ["1", "2", "3"]}), "file.txt")
    chosen = texts.select([2, 0, 2])
    assert chosen.texts == ("d", "a", "d") and chosen.labels == (("X",), ("X",), ("X",))
    assert chosen.factors["f"].tolist() == ["3", "1", "3"] and chosen.factors.index.tolist() == [0, 1, 2]
    assert chosen.source is None  # its rows are no longer those of the file
    assert texts.first(2, "this").source == "file.txt" and texts.first(2, "this").texts == ("a", "b c")


def test_more_than_there_are():
    with pytest.raises(InputError, match="this needs 3 texts, and there are 2: ask for fewer, or give more"):
        Texts(("a", "b")).first(3, "this")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((),), "there is no text"),
        ((("a", "b"), (("X",),)), "labels of 1 texts do not fit 2"),
        ((("a",), None, pd.DataFrame({"f": [1, 2]})), "factors of 2 texts do not fit 1"),
    ],
)
def test_what_is_known_has_to_fit(arguments, words):
    with pytest.raises(InputError, match=words):
        Texts(*arguments)


# ---- ids of factors ----------------------------------------------------------------------------------------------


def test_ids_count_from_the_most_frequent():
    texts = texts_of(f=["a", "b", "b", None, "c", "c", "c"], g=["x", "y"] * 3 + ["y"])
    ids, names = texts.factor_ids()
    assert names == ["f", "g"]
    assert ids[:, 0].tolist() == [2, 1, 1, UNKNOWN, 0, 0, 0]
    assert ids[:, 1].tolist() == [1, 0, 1, 0, 1, 0, 0]
    assert texts.factor_ids(["g"])[1] == ["g"]


def test_values_beyond_the_most_frequent_are_unknown():
    values = [f"v{place}" for place in range(MOST_VALUES) for _ in range(2)] + ["rare", "rarer"]
    ids, _ = texts_of(f=values).factor_ids()
    assert sorted(set(ids[:, 0].tolist())) == [UNKNOWN, *range(MOST_VALUES)]
    assert ids[-2:, 0].tolist() == [UNKNOWN, UNKNOWN] and (ids[:-2] != UNKNOWN).all()


def test_a_factor_of_one_value_is_left_out_unless_it_is_asked_for():
    texts = texts_of(one=["a", "a", None], two=["x", "y", "x"])
    assert texts.factor_ids()[1] == ["two"]
    for asked, of in [(["two", "one"], texts), (None, texts_of(one=["a", "a"]))]:
        with pytest.raises(InputError, match="the factor 'one' has a single value in these texts: leave it out"):
            of.factor_ids(asked)


def test_factors_that_are_not_there():
    with pytest.raises(InputError, match="there is no factor 'h': there are f"):
        texts_of(f=["a", "b"]).factor_ids(["h"])
    with pytest.raises(InputError, match="there is no factor 'h': the texts have none"):
        Texts(("a",)).factor("h")
    with pytest.raises(InputError, match="take builtin:sentences or annotated texts, or give --factor-table"):
        Texts(("a", "b")).factor_ids()


# ---- reading -----------------------------------------------------------------------------------------------------


def test_builtin_sentences_bring_their_factors():
    texts = read_texts("builtin:sentences", limit=5)
    known = list(sentences(5))
    assert texts.texts == tuple(document.text for document in known)
    assert texts.factors.to_dict("records") == [dict(document.factors) for document in known]
    assert texts.source == "builtin:sentences"


def table(folder, content, name="factors.tsv"):
    (folder / "texts.txt").write_text("one\ntwo\nthree\n")
    (folder / name).write_text(content)
    return folder / "texts.txt", folder / name


@pytest.mark.parametrize(("name", "mark"), [("factors.tsv", "\t"), ("factors.csv", ",")])
def test_a_table_of_factors(tmp_path, name, mark):
    data, factors = table(tmp_path, "tense,note\npast,NA\n,x\npresent,1\n".replace(",", mark), name)
    texts = read_texts(str(data), factors=factors)
    assert texts.texts == ("one", "two", "three")
    assert texts.factors["tense"].isna().tolist() == [False, True, False]
    assert texts.factors["note"].isna().tolist() == [True, False, False]  # as R writes what is unknown
    assert texts.factors["note"].tolist()[1:] == ["x", "1"]  # names, as they are written


def test_a_quotation_mark_in_a_tsv_is_part_of_the_text(tmp_path):
    data, factors = table(tmp_path, 'f\tg\n"a\tx\nb\ty\nc"\tz\n')
    assert read_texts(str(data), factors=factors).factors["f"].tolist() == ['"a', "b", 'c"']


@pytest.mark.parametrize(
    ("rows", "limit", "words"),
    [
        (2, None, "has factors of 2 texts, and there are 3: row 3 is missing"),
        (1, 2, "has factors of 1 texts, and there are 2: row 2 is missing"),
        (4, None, "has factors of 4 texts, and there are 3: give a row for each"),
        (4, 100, "has factors of 4 texts, and there are 3"),
    ],
)
def test_a_table_of_too_few_or_too_many_rows(tmp_path, rows, limit, words):
    data, factors = table(tmp_path, "f\n" + "".join(f"v{row}\n" for row in range(rows)))
    with pytest.raises(InputError, match=words):
        read_texts(str(data), factors=factors, limit=limit)


def test_a_limit_takes_the_first_rows_of_the_table_too(tmp_path):
    data, factors = table(tmp_path, "f\na\nb\nc\n")
    assert read_texts(str(data), factors=factors, limit=2).factors["f"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("factors.xlsx", "f", "factors are read from a .csv or a .tsv with a header"),
        ("factors.csv", 'f,g\n"a,1\n', "is no table"),
        ("factors.csv", "", "is no table"),
        ("factors.csv", "f,g\n1,2\n1,2,3\n", "is no table"),
        ("factors.csv", ",f\n0,a\n1,b\n2,c\n", "column 1 has no name"),
        ("factors.csv", "f,g,f\n1,2,3\n1,2,3\n1,2,3\n", "two columns 'f'"),
    ],
)
def test_a_table_that_is_none(tmp_path, name, content, words):
    data, factors = table(tmp_path, content, name)
    with pytest.raises(InputError, match=words) as error:
        read_texts(str(data), factors=factors)
    assert "\n" not in str(error.value)


def test_a_missing_table(tmp_path):
    data, _ = table(tmp_path, "f\n")
    with pytest.raises(InputError, match="cannot be read"):
        read_texts(str(data), factors=tmp_path / "none.csv")


def test_columns_and_compressed_files_are_read_as_everywhere(tmp_path):
    with lzma.open(tmp_path / "glosses.tsv.xz", "wt") as file:
        file.write("1\tcat\tan animal\n2\tdog\tanother\n")
    texts = read_texts(str(tmp_path / "glosses.tsv.xz"), column="3")
    assert texts.texts == ("an animal", "another") and texts.factors is None and texts.labels is None


# ---- annotations -------------------------------------------------------------------------------------------------


def test_factors_of_labels_by_hand():
    texts = ("dogs bark", "old dogs bark", "cats sleep now", "cats purr")
    labels = [row.split() for row in ("A V", "A A V", "A V T", "A V")]
    table = factors_of_labels(texts, labels)
    # T stands in one text of four; "structure" has A V three times and A V T once, so no two values that are shared
    assert list(table.columns) == []  # the words of V are bark twice and others once, those of A all differ


def test_factors_of_labels_that_are_shared():
    texts = ("dogs bark", "the dogs sleep", "cats bark loudly", "cats sleep now")
    labels = [row.split() for row in ("A V", "A A V", "A V T", "A V T")]
    table = factors_of_labels(texts, labels)
    assert list(table.columns) == ["structure", "V words"]
    assert table["structure"].tolist() == ["A V", "A V", "A V T", "A V T"]
    assert table["V words"].tolist() == ["bark", "sleep", "bark", "sleep"]


def test_a_label_that_comes_back_keeps_its_first_words():
    table = factors_of_labels(("x y x", "x z x", "w y w", "w z w"), [["A", "V", "A"]] * 4)
    assert table["A words"].tolist() == ["x", "x", "w", "w"] and table["V words"].tolist() == ["y", "z", "y", "z"]
    assert "structure" not in table.columns  # it is always A V A


def test_labels_of_whole_texts_are_one_factor(tmp_path):
    (tmp_path / "t.txt").write_text("a b|||noun\nc|||verb\nd|||noun\n")
    texts = read_texts(str(tmp_path / "t.txt"), annotated=Annotated("|||", "text"))
    assert texts.factors["label"].tolist() == ["noun", "verb", "noun"]
    assert texts.labels == (("noun",), ("verb",), ("noun",))
    assert np.array_equal(texts.factor_ids()[0][:, 0], [0, 1, 0])


def test_a_factor_of_another_value_for_each_text_says_nothing():
    numbers = [f"{row}.5" for row in range(6)]
    texts = Texts(tuple("abcdef"), factors=pd.DataFrame({"x": numbers, "half": list("001122"), "one": ["y"] * 6}))
    assert texts.without_say() == ["x", "one"]
    assert texts.factor_ids()[1] == ["half"] == texts.factor_ids("half")[1]
    with pytest.raises(InputError, match="no two texts share a value of the factor 'x'"):
        texts.factor_ids(["x"])
