"""Linguistic properties: values by hand, probes against scikit-learn and closed form, and the control task."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tests.command import run
from tests.probing import worlds
from tests.training.runs import trained, unchecked

from latentlm import InputError
from latentlm.probing import Texts
from latentlm.probing.probes.linguistic import (
    bins,
    control_labels,
    linguistic,
    parse_depth,
    probe_accuracy,
    properties,
    word_content,
)
from latentlm.probing.texts import UNKNOWN

# ---- properties --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("brackets", "depth"),
    [
        ("(S (NP dogs) (VP bark))", 2),
        ("(S (NP (DT the) (NN dog)) (VP barks))", 3),
        ("(S)", 1),
        ("()()", 1),
        ("dogs", 0),
        ("", 0),
    ],
)
def test_depth_by_hand(brackets, depth):
    assert parse_depth(brackets) == depth


@pytest.mark.parametrize("brackets", ["(", ")", "(()", "())", ")("])
def test_brackets_that_do_not_close(brackets):
    with pytest.raises(InputError, match="do not close"):
        parse_depth(brackets)


def test_few_numbers_are_their_own_bins():
    values, names = bins(pd.Series([3.0, 1.0, np.nan, 3.0, 2.0]))
    assert values.tolist() == [2, 0, UNKNOWN, 2, 1] and names == ["1", "2", "3"]


def test_many_numbers_are_in_bins_of_equal_count():
    numbers = pd.Series(np.random.default_rng(0).permutation(60).astype(float))
    values, names = bins(numbers)
    assert np.bincount(values).tolist() == [10] * 6
    assert names == ["0 to 9", "10 to 19", "20 to 29", "30 to 39", "40 to 49", "50 to 59"]
    assert (values == numbers.to_numpy() // 10).all()


def test_many_equal_numbers_give_fewer_bins():
    values, names = bins(pd.Series([1.0] * 50 + list(range(2, 12)) + [np.nan]))
    assert values[-1] == UNKNOWN and len(names) == values.max() + 1 < 6
    assert len(set(values[:50].tolist())) == 1


def test_word_content_by_hand():
    texts = ["the cat, sat"] * 4 + ["The DOG sat"] * 5 + ["the cat and a dog"] + ["the 7 end"] * 190
    # in at most 5% of 200 texts and at least 4: sat 9, dog 6, cat 5; the stands in all, and once, a once
    values, names = word_content(texts, 10)
    assert names == ["sat", "dog", "cat"]
    assert set(values.tolist()) == {UNKNOWN}  # all that have one have two of them
    values, names = word_content(texts, 1)
    assert names == ["sat"] and values.tolist() == [0] * 9 + [UNKNOWN] * 191


def factor_table(**columns):
    rows = len(next(iter(columns.values())))
    return Texts(tuple(f"text {row}" for row in range(rows)), factors=pd.DataFrame(columns))


def test_what_is_asked_of_a_table_of_factors():
    texts = factor_table(
        tense=["past", "present", None, "past"] * 10,
        parse=["(S (V go))", "(S (NP (N he)) (V goes))", "(S (NP (N he)) (V went))", "(S (V went))"] * 10,
        number=[str(number) for number in range(40)],
        year=["1990", "2001"] * 20,
        rare=["a"] * 37 + ["b"] * 3,
    )
    found, left_out = properties(texts)
    # "text 0", "text 1", …: each of two words; no word but "text", which stands in all
    assert list(found) == ["tense", "depth of parse", "number", "year"]
    assert left_out == [f"{name}, which has no two values of 4 texts each" for name in
                        ("length in words", "word content", "rare")]  # fmt: skip
    assert found["depth of parse"][1] == ["2", "3"] and found["depth of parse"][0].tolist() == [0, 1, 1, 0] * 10
    assert found["tense"][1] == ["past", "present"] and found["tense"][0].tolist() == [0, 1, UNKNOWN, 0] * 10
    assert sorted(np.bincount(found["number"][0])) == [6, 6, 7, 7, 7, 7] and found["number"][1][0] == "0 to 6"
    assert found["year"][1] == ["1990", "2001"]
    assert list(properties(texts, ["year"])[0]) == ["year"]


def test_a_parse_that_does_not_close_is_named_by_its_row():
    with pytest.raises(InputError, match=r"row 2 of the factor 'parse': the brackets of the parse '\(S \(V went\)"):
        properties(factor_table(parse=["(S (V go))", "(S (V went) (V)", None]))


# ---- probes ------------------------------------------------------------------------------------------------------


def classes_in_space(generator, texts=400, noise=1.0):
    values = generator.integers(0, 3, texts)
    return 2 * np.eye(3, 5)[values] * [1, 10, 0.1, 1, 1] + noise * generator.standard_normal((texts, 5)), values


def test_a_probe_is_scikit_learns_on_standardised_codes():
    codes, values = classes_in_space(np.random.default_rng(0))
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000)).fit(codes[:300], values[:300])
    held_out, training = probe_accuracy(codes[:300], values[:300], codes[300:], values[300:], 0.3)
    assert held_out == pytest.approx(oracle.score(codes[300:], values[300:]), abs=0.01)
    assert training == pytest.approx(oracle.score(codes[:300], values[:300]), abs=0.01)


def test_two_gaussians_are_told_apart_as_well_as_they_can_be():
    """Means ± 1 on a line, s.d. 1: the best accuracy is Φ(1) = 0.841."""
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2, 12000)
    codes = (2.0 * values - 1 + generator.standard_normal(12000))[:, None]
    accuracy, _ = probe_accuracy(codes[:6000], values[:6000], codes[6000:], values[6000:])
    assert accuracy == pytest.approx(0.8413, abs=0.015)


def test_control_labels_belong_to_texts_and_keep_frequencies():
    generator = np.random.default_rng(0)
    values = generator.choice(3, 6000, p=[0.6, 0.3, 0.1])
    of_text = generator.integers(0, 3000, 6000)
    labels = control_labels(values, of_text, np.random.default_rng(1))
    table = pd.DataFrame({"text": of_text, "label": labels})
    assert (table.groupby("text")["label"].nunique() == 1).all()
    np.testing.assert_allclose(np.bincount(labels) / 6000, [0.6, 0.3, 0.1], atol=0.03)
    assert (labels == values).mean() == pytest.approx(0.36 + 0.09 + 0.01, abs=0.03)  # they say nothing of each other


# ---- the probe of probes -----------------------------------------------------------------------------------------


def test_a_perfect_code_and_noise():
    generator = np.random.default_rng(0)
    values = generator.choice(3, 600, p=[0.5, 0.3, 0.2])
    factors = {"f": [f"v{value}" for value in values]}
    perfect = linguistic(*worlds.given(np.eye(3)[values], factors)).table.iloc[0]
    assert perfect["property"] == "f" and perfect["accuracy"] == 1 and perfect["accuracy s.d."] == 0
    assert perfect["majority"] == pytest.approx(0.5, abs=0.06)
    assert perfect["control"] == pytest.approx(0.5, abs=0.1)
    assert perfect["selectivity"] == pytest.approx(1 - perfect["control"])
    assert (perfect["training"], perfect["held out"], perfect["values"]) == (450, 150, 3)
    noise = linguistic(*worlds.given(generator.standard_normal((600, 3)), factors)).table.iloc[0]
    assert noise["accuracy"] == pytest.approx(noise["majority"], abs=0.05) and abs(noise["selectivity"]) < 0.1


def test_means_far_within_the_noise_of_z_are_read_and_z_itself_is_not():
    values = np.random.default_rng(0).integers(0, 3, 600)

    class Dead(worlds.GivenCodes):
        """q is the prior but for 1e-4."""

        def sampled_codes(self, texts, seed=0):
            return self.codes(texts) + np.random.default_rng(seed).standard_normal((600, 3))

    codes = 1e-4 * np.eye(3)[values]
    _, texts = worlds.given(codes, {"f": [*map(str, values)]})
    row = (
        linguistic(Dead(dict(zip(texts.texts, codes, strict=True))), texts, words=0)
        .table.set_index("property")
        .loc["f"]
    )
    assert row["accuracy"] == 1 and abs(row["z sampled"] - 1 / 3) < 0.08


def test_what_memory_can_do_shows_in_the_control():
    """As many numbers as texts: random labels are learnt by heart, and come back only where texts do."""
    generator = np.random.default_rng(0)
    codes, values = generator.standard_normal((80, 120)), generator.integers(0, 2, 80)
    of_text = np.arange(80)
    repeated = Texts(tuple(f"text {row}" for row in of_text) * 3, factors=pd.DataFrame({"f": [*map(str, values)] * 3}))
    space, once = worlds.given(codes, {"f": [*map(str, values)]})
    alone = linguistic(space, once, strength=100.0).table.iloc[0]
    again = linguistic(space, repeated, strength=100.0).table.iloc[0]
    assert alone["control in training"] == again["control in training"] == 1
    assert alone["control"] < 0.75 and again["control"] > 0.9
    assert again["accuracy"] > 0.9 and again["selectivity"] < 0.1  # by memory, which selectivity takes off


def test_bags_of_words_know_words():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2, 400)
    texts = Texts(
        tuple(f"{'did' if value else 'does'} it {row % 7}" for row, value in enumerate(values)),
        factors=pd.DataFrame({"tense": ["past" if value else "present" for value in values]}),
    )
    codes = {text: generator.standard_normal(4) for text in texts.texts}
    row = linguistic(worlds.GivenCodes(codes), texts).table.set_index("property").loc["tense"]
    assert row["bag of words"] == 1 > 0.8 > row["majority"]


def test_training_texts_are_capped_and_seeds_are_what_they_are():
    generator = np.random.default_rng(0)
    codes, values = classes_in_space(generator, texts=800, noise=2.0)
    space, texts = worlds.given(codes, {"f": values.tolist()})
    result = linguistic(space, texts, training_texts=100, seeds=2, seed=5)
    row = result.table.iloc[0]
    assert (row["training"], row["held out"]) == (100, 200)
    each = result.details["each split"]
    assert each["seed"].tolist() == [5, 6] and row["accuracy"] == pytest.approx(each["accuracy"].mean())
    assert row["accuracy s.d."] == pytest.approx(each["accuracy"].std())
    again = linguistic(space, texts, training_texts=100, seeds=1, seed=6)
    assert again.table["accuracy"][0] == each["accuracy"][1]  # the same split, whatever the others
    assert np.isnan(again.table["accuracy s.d."][0])


@pytest.mark.parametrize("family", worlds.KINDS)
def test_each_kind_of_latent(family):
    texts = worlds.words(60)
    factors = pd.DataFrame({"first": ["low" if int(text.split()[0][1:]) < 12 else "high" for text in texts]})
    result = linguistic(worlds.space(family), Texts(texts, factors=factors), seeds=2)
    assert {"length in words", "first"} <= set(result.table["property"])
    assert result.table[["accuracy", "control", "bag of words"]].stack().between(0, 1).all()
    assert "60 texts" in result.about
    result.figure()


FACTORS = {"f": list("ab") * 6, "one": ["a"] * 12}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seeds": 0}, "seeds are at least 1"),
        ({"words": -1}, "words 0"),
        ({"training_texts": 99}, "training texts 100"),
        ({"strength": 0.0}, "the strength is above 0"),
        ({"factors": ["g"]}, "there is no factor 'g': there are f, one"),
        ({"factors": ["one"]}, "the factor 'one' has no two values of 4 texts each: leave it out"),
    ],
)
def test_what_cannot_be_asked(options, words):
    with pytest.raises(InputError, match=words):
        linguistic(*worlds.given(np.eye(12), FACTORS), **options)


@pytest.mark.parametrize("number", [1, 3])
def test_too_few_texts(number):
    with pytest.raises(InputError, match=f"there is no property to probe in these {number} texts"):
        linguistic(*worlds.given(np.eye(number), {"f": list("abc")[:number]}))


def test_factors_of_one_value_are_named_among_those_left_out():
    result = linguistic(*worlds.given(np.eye(12), FACTORS))
    assert result.table["property"].tolist() == ["f"]
    assert "Left out: length in words, which has no two values of 4 texts each; word content," in result.about
    assert "; one, which" in result.about


def test_by_the_command_line(tmp_path):
    with unchecked():
        folder = trained("gp_vae")
        status, out, err = run(
            "probe", "linguistic", str(folder), "--data", "builtin:sentences", "--limit", "80", "--seeds", "1",
            "--factors", "tense", "--factors", "number", "--output", str(tmp_path / "out"),
        )  # fmt: skip
    assert status == 0, err
    assert "length in words" in out and "tense" in out and "topic" not in out
    assert pd.read_csv(tmp_path / "out" / "linguistic.csv")["property"].tolist()[-2:] == ["tense", "number"]
    assert (tmp_path / "out" / "linguistic.png").stat().st_size > 1000
