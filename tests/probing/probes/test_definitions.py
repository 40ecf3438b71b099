"""Definitions: ranks against a slow version and exact expectations, the map, and what is written."""

import itertools
import lzma

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from tests.command import run
from tests.probing import worlds
from tests.toy import three_verbs
from tests.training.runs import trained, unchecked

from latentlm import InputError
from latentlm.probing import Texts, read_texts
from latentlm.probing.bags import letter_bags
from latentlm.probing.probes import definitions as module
from latentlm.probing.probes.definitions import (
    bleu,
    chance,
    definitions,
    expected_ranks,
    retrieval_scores,
    ridge_map,
    split_by_term,
)

# ---- ranks -------------------------------------------------------------------------------------------------------


def over_all_orders(similarities, right):
    """The mean of the figures over every order of the candidates, of which a stable sort keeps that of equals."""
    found = []
    for order in itertools.permutations(range(len(similarities))):
        ranked = sorted(order, key=lambda place: -similarities[place])
        rank = ranked.index(right) + 1
        found.append((1 / rank, rank <= 1, rank <= 10))
    return np.mean(found, axis=0)


@pytest.mark.parametrize(
    ("similarities", "right"),
    [([0.1, 0.5, 0.3], 1), ([0.5, 0.5, 0.3, 0.5], 0), ([0.2] * 5, 3), ([0.9, 0.9, 0.1, 0.1], 3), ([0.0], 0)],
)
def test_figures_are_means_over_the_orders_of_equals(similarities, right):
    scores = retrieval_scores(*expected_ranks(np.array([similarities]), np.array([right])))
    assert list(scores.values()) == pytest.approx(over_all_orders(similarities, right))


def test_ranks_by_hand():
    similarities = np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.5, 0.5, 0.1]])
    nearer, equal = expected_ranks(similarities, np.array([0, 1, 0]))
    assert nearer.tolist() == [0, 2, 0] and equal.tolist() == [1, 1, 2]
    scores = retrieval_scores(nearer, equal)
    assert scores["mrr"] == pytest.approx((1 + 1 / 3 + (1 + 1 / 2) / 2) / 3)
    assert scores["hits at 1"] == pytest.approx((1 + 0 + 1 / 2) / 3) and scores["hits at 10"] == 1


def test_hits_at_10():
    similarities = -np.arange(30.0)[None].repeat(30, 0)
    scores = retrieval_scores(*expected_ranks(similarities, np.arange(30)))
    assert scores["hits at 10"] == pytest.approx(10 / 30) and scores["hits at 1"] == pytest.approx(1 / 30)
    assert scores["mrr"] == pytest.approx(sum(1 / rank for rank in range(1, 31)) / 30)


def test_chance_is_exact():
    found = chance(30)
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in range(1, 31)) / 30)
    assert (found["hits at 1"], found["hits at 10"]) == pytest.approx((1 / 30, 1 / 3))
    assert found["median rank"] == 15.5
    noise = np.random.default_rng(0).standard_normal((2000, 30))
    drawn = retrieval_scores(*expected_ranks(noise, np.zeros(2000, dtype=np.int64)))
    assert drawn["mrr"] == pytest.approx(found["mrr"], abs=0.015)
    assert chance(5)["hits at 10"] == 1


def test_rows_at_a_time_change_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    queries, candidates = generator.standard_normal((25, 3)), generator.standard_normal((25, 3))
    whole = module._of_codes(queries, candidates)
    monkeypatch.setattr(module, "_ROWS", 7)
    assert module._of_codes(queries, candidates) == pytest.approx(whole)
    cosines = [[q @ c / np.sqrt((q @ q) * (c @ c)) for c in candidates] for q in queries]
    ranks = [1 + sum(other > row[place] for other in row) for place, row in enumerate(cosines)]
    assert whole["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert whole["median rank"] == np.median(ranks)


# ---- the parts ---------------------------------------------------------------------------------------------------


def test_all_definitions_of_a_term_are_on_one_side():
    words = [f"t{place % 17}" for place in range(100)]
    training, held_out = split_by_term(words, np.random.default_rng(0))
    assert sorted([*training, *held_out]) == list(range(100))
    sides = {words[place] for place in training}, {words[place] for place in held_out}
    assert not sides[0] & sides[1] and (len(sides[0]), len(sides[1])) == (8, 9)


def test_the_map_is_a_ridge_and_finds_a_linear_one():
    generator = np.random.default_rng(0)
    inputs, weights = generator.standard_normal((200, 4)), generator.standard_normal((4, 3))
    exact = ridge_map(inputs, inputs @ weights + [1.0, 2.0, 3.0])
    np.testing.assert_allclose(exact(np.eye(4)), weights + np.array([1.0, 2.0, 3.0]), atol=0.01)
    noise = generator.standard_normal((200, 3))
    candidates = [Ridge(penalty).fit(inputs, noise).predict(inputs) for penalty in module._PENALTIES]
    found = ridge_map(inputs, noise)(inputs)
    assert min(np.abs(found - candidate).max() for candidate in candidates) < 1e-9
    assert np.abs(found - noise.mean(0)).max() < 0.2  # nothing can be told, so the mean is
    assert ridge_map(inputs, noise[:, :1])(inputs).shape == (200, 1)


def test_a_map_of_many_numbers_is_fitted_on_a_part(monkeypatch):
    generator = np.random.default_rng(0)
    inputs, outputs = generator.standard_normal((60, 5)), generator.standard_normal((60, 2))
    first = ridge_map(inputs[:40], outputs[:40])(inputs)
    monkeypatch.setattr(module, "_MOST_NUMBERS", 4)
    monkeypatch.setattr(module, "_FITTED", 40)
    np.testing.assert_allclose(ridge_map(inputs, outputs)(inputs), first)


def test_letters_are_shared_by_words_of_one_stem():
    terms, glosses = letter_bags(["ability", "zoo"], ["being able", "an animal park", "ability"])
    found = (terms @ glosses.T).toarray()
    assert found[0, 2] == pytest.approx(1) and found[0, 0] > found[0, 1] and found[1].max() == 0


def test_bleu_is_sacrebleus():
    import sacrebleu

    written, wanted = ["a small dog barks at me", "the cat"], ("a small dog barks at you", "a cat")
    assert bleu(written, wanted) == pytest.approx(sacrebleu.corpus_bleu(written, [list(wanted)], force=True).score)
    assert bleu(list(wanted), wanted) == pytest.approx(100)


# ---- the probe ---------------------------------------------------------------------------------------------------


def glossary(folder, pairs, name="glosses.tsv"):
    content = "".join(f"{row}\tkind\t{term}\t{gloss}\n" for row, (term, gloss) in enumerate(pairs))
    if name.endswith(".xz"):
        with lzma.open(folder / name, "wt") as file:
            file.write(content)
    else:
        (folder / name).write_text(content)
    return read_texts(str(folder / name), column="4")


def pairs_of_words(number):
    """Terms and definitions of words that the small models know; every third term has two words."""
    glosses = worlds.words(number, longest=6)
    return [
        (f"w{3 + row % 20}" + "|w4" * (row % 3 == 0), gloss) for row, gloss in enumerate(glosses)
    ]  # fmt: skip


def test_codes_that_agree_those_that_are_turned_and_those_that_do_not(tmp_path):
    generator = np.random.default_rng(0)
    pairs = [(f"term{row}", f"gloss {row}") for row in range(400)]
    texts = glossary(tmp_path, pairs)
    codes = generator.standard_normal((400, 6))
    turn = np.linalg.qr(generator.standard_normal((6, 6)))[0]

    def lines(of_glosses):
        of_text = {term: codes[row] for row, (term, _) in enumerate(pairs)}
        of_text |= {gloss: of_glosses[row] for row, (_, gloss) in enumerate(pairs)}
        return definitions(worlds.GivenCodes(of_text), texts, terms_column="3", written=0).table.set_index("line")

    same, turned = lines(codes), lines(5 + codes @ turn)
    assert same.loc["codes", "hits at 1"] == 1 and same.loc["codes, ridge map", "hits at 1"] > 0.95
    assert turned.loc["codes", "mrr"] < 0.1 and turned.loc["codes, ridge map", "hits at 1"] > 0.95
    exact = same.loc["floor: chance, exact"]
    assert exact["definitions"] == 200
    for table in (same, turned, lines(generator.standard_normal((400, 6)))):
        assert table.loc["floor: ridge map of shuffled pairs", "mrr"] == pytest.approx(exact["mrr"], abs=0.05)
        assert table.loc["floor: codes, another's definition", "mrr"] == pytest.approx(exact["mrr"], abs=0.05)
    assert table.loc["codes, ridge map", "mrr"] == pytest.approx(exact["mrr"], abs=0.05)
    assert table.loc["codes, centred", "mrr"] == pytest.approx(exact["mrr"], abs=0.05)


@pytest.mark.parametrize("family", worlds.KINDS)
def test_each_kind_of_latent(tmp_path, family):
    texts = glossary(tmp_path, pairs_of_words(24), "glosses.tsv.xz")
    result = definitions(worlds.space(family), texts, terms_column="3", written=5)
    assert result.table[["mrr", "hits at 1", "hits at 10"]].stack().between(0, 1).all()
    assert "24 pairs of a term and its definition, of 20 terms" in result.about
    if family == "gp_vae":
        assert "Nothing was written: a term's trajectory is as long as the term" in result.about
        assert not result.details
        return
    written, lines = result.details["written"], result.details["bleu"]
    assert lines["line"].tolist() == ["codes", "codes, ridge map", "z of the definition"]
    assert lines["texts"].tolist() == [5, 5, 5]
    assert not written["term"].str.contains("|", regex=False).any()  # the first word of several
    assert set(written["definition"]) < set(texts.texts)
    assert result.table.set_index("line").loc["codes", "bleu"] == lines["bleu"][0]


def test_what_is_written_is_written_from_z_of_the_term(tmp_path):
    texts = glossary(tmp_path, pairs_of_words(24))
    space = worlds.space("gpt_vae")
    result = definitions(space, texts, terms_column="3", written=4)
    written, lines = result.details["written"], result.details["bleu"]
    by_hand = space.write(space.means(Texts(tuple(written["term"]))))
    assert written["by codes"].tolist() == by_hand
    of_definitions = space.write(space.means(Texts(tuple(written["definition"]))))
    assert written["by z of the definition"].tolist() == of_definitions
    wanted = tuple(written["definition"])
    assert lines["bleu"][2] == pytest.approx(bleu(of_definitions, wanted))
    assert lines["bleu of another term's z"][2] == pytest.approx(bleu(of_definitions[2:] + of_definitions[:2], wanted))


def test_terms_in_a_file_of_their_own(tmp_path):
    pairs = pairs_of_words(20)
    texts = glossary(tmp_path, pairs)
    (tmp_path / "terms.txt").write_text("".join(f"{term}\n" for term, _ in pairs))
    by_column = definitions(worlds.space("ltm"), texts, terms_column="3", written=0)
    by_file = definitions(
        worlds.space("ltm"), Texts(texts.texts), terms=str(tmp_path / "terms.txt"), written=0
    )  # fmt: skip
    pd.testing.assert_frame_equal(by_column.table, by_file.table)


def test_a_conditional_model(tmp_path):
    texts = glossary(tmp_path, pairs_of_words(16))
    space = worlds.conditional_space()
    labelled = Texts(texts.texts, worlds.annotated(texts.texts, per_text=True).labels, source=texts.source)
    result = definitions(space, labelled, terms_column="3", written=3)
    assert len(result.details["written"]) == 3
    of_words = Texts(texts.texts, worlds.annotated(texts.texts).labels, source=texts.source)
    with pytest.raises(InputError, match="takes a label for each word, and those of the terms are not known"):
        definitions(space, of_words, terms_column="3")
    with pytest.raises(InputError, match="this model is conditional: give the labels"):
        definitions(space, texts, terms_column="3")


def test_a_model_that_does_not_write(tmp_path):
    result = definitions(worlds.space_of(three_verbs()), glossary(tmp_path, pairs_of_words(12)), terms_column="3")
    assert "A ThreeVerbs does not write text from latents." in result.about and not result.details


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "definitions need the term of each text: name its column"),
        ({"terms_column": "9"}, "there is no column 9"),
        ({"terms_column": "name"}, "there is no column 'name'"),
        ({"terms_column": "3", "written": -1}, "written must be 0 or more"),
        ({"terms": "none.txt"}, "none.txt does not exist"),
        ({"terms": "short.txt"}, "short.txt has 2 terms, and there are 3 texts: row 3 is missing"),
        ({"terms": "bars.txt"}, r"term 2 is '\|', no word: fill it in or take the row out"),
        ({"terms": "same.txt"}, "2 pairs on either side of a split by terms, and there are 1"),
    ],
)
def test_what_cannot_be_asked(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    texts = glossary(tmp_path, [("a", "w3"), ("b", "w4"), ("c", "w5")])
    for name, content in {"short": "a\nb\n", "bars": "a\n|\nb\n", "same": "a\na\na\n"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    with pytest.raises(InputError, match=words):
        definitions(worlds.space("gpt_vae"), texts, **options)


@pytest.mark.parametrize("number", [1, 3])
def test_too_few_texts(tmp_path, number):
    texts = glossary(tmp_path, pairs_of_words(number))
    with pytest.raises(InputError, match="definitions need 2 pairs on either side"):
        definitions(worlds.space("gpt_vae"), texts, terms_column="3")


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (Texts(("a", "b")), "were not read from a file that has terms, too"),
        (Texts(("a", "b"), source="builtin:sentences"), "builtin:sentences has no terms"),
    ],
)
def test_texts_from_elsewhere(texts, words):
    with pytest.raises(InputError, match=words):
        definitions(worlds.space("gpt_vae"), texts, terms_column="3")


def test_by_the_command_line(tmp_path):
    glossary(tmp_path, [(f"cat{row}", f"the cat {row} sat") for row in range(12)], "glosses.tsv.xz")
    with unchecked():
        folder = trained("gpt_vae")
        status, out, err = run(
            "probe", "definitions", str(folder), "--data", str(tmp_path / "glosses.tsv.xz"), "--column", "4",
            "--terms-column", "3", "--limit", "10", "--written", "2", "--output", str(tmp_path / "out"),
        )  # fmt: skip
    assert status == 0, err
    assert "floor: chance, exact" in out and "10 pairs" in out
    assert len(pd.read_csv(tmp_path / "out" / "definitions-written.csv")) == 2
    assert (tmp_path / "out" / "definitions.png").stat().st_size > 1000
