"""Similarity: correlations against scipy.stats, scores by hand, and the floor and the line to beat."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tests.command import run
from tests.probing import worlds
from tests.training.runs import trained, unchecked

from latentlm import InputError
from latentlm.probing import Texts
from latentlm.probing.bags import word_bags
from latentlm.probing.distances import cosines
from latentlm.probing.probes.similarity import (
    bootstrap_interval,
    pearson,
    random_pairs,
    shared_factors,
    similarity,
    spearman,
)

# ---- figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])
def test_correlations_are_those_of_scipy(levels):
    generator = np.random.default_rng(0)
    first = generator.integers(0, levels, 200).astype(float)  # with many equal ones
    second = first**3 + levels**3 * generator.standard_normal(200)
    assert pearson(first, second) == pytest.approx(stats.pearsonr(first, second).statistic, abs=1e-12)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


def test_correlations_by_hand():
    up = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(up, np.exp(up)) == pytest.approx(1) and pearson(up, np.exp(up)) < 0.95
    assert spearman(up, -up) == pytest.approx(-1)
    # ranks 1, 2, 3, 4 and 2, 1, 4, 3: 1 − 6 · 4 / (4 · 15)
    assert spearman(up, np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)


def test_what_is_constant_has_no_correlation():
    assert np.isnan(pearson(np.ones(4), np.arange(4.0))) and np.isnan(spearman(np.arange(4.0), np.ones(4)))
    assert np.isnan(bootstrap_interval(np.ones(4), np.arange(4.0), spearman, 10)).all()


def test_cosines_by_hand():
    first, second = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), np.array([[2.0, 0.0], [-1.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(cosines(first, second), [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(cosines(first, -3 * first), [-1, -1, 0], atol=1e-12)


def test_the_interval_is_as_wide_as_the_spread_of_samples():
    """Against many samples of the same size from the same distribution."""
    generator = np.random.default_rng(0)

    def sample(rows):
        first = generator.standard_normal(rows)
        return first, 0.6 * first + 0.8 * generator.standard_normal(rows)

    found = [pearson(*sample(300)) for _ in range(1000)]
    low, high = bootstrap_interval(*sample(300), pearson, 1000)
    assert high - low == pytest.approx(np.ptp(np.percentile(found, [2.5, 97.5])), rel=0.2)
    assert low < 0.6 < high


# ---- pairs -------------------------------------------------------------------------------------------------------


def test_shared_factors_by_hand():
    factors = pd.DataFrame({"f": ["a", "a", "b", None], "g": ["x", "y", "x", None], "h": ["1", "1", None, None]})
    pairs = np.array([[0, 1], [0, 2], [1, 2], [0, 3]])
    np.testing.assert_allclose(shared_factors(factors, pairs), [2 / 3, 1 / 2, 0, np.nan])


@pytest.mark.parametrize(("texts", "number"), [(2, 1), (2, 100), (5, 10), (5, 11), (5, 9), (11, 5), (40, 200)])
def test_pairs_are_different_ones(texts, number):
    pairs = random_pairs(texts, number, np.random.default_rng(0))
    assert len(pairs) == min(number, texts * (texts - 1) // 2)
    assert (pairs[:, 0] != pairs[:, 1]).all() and pairs.min() >= 0 and pairs.max() < texts
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs)


def test_few_pairs_share_no_text():
    assert len(np.unique(random_pairs(41, 20, np.random.default_rng(0)))) == 40


def test_every_pair_is_as_likely():
    counts = np.zeros((5, 5))
    for seed in range(2000):
        for first, second in random_pairs(5, 2, np.random.default_rng(seed)):
            counts[first, second] += 1
    assert counts[np.triu_indices(5, 1)] == pytest.approx(400, abs=80)


# ---- the probe ---------------------------------------------------------------------------------------------------


def test_codes_that_are_the_factors_and_codes_that_are_noise():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 3, (200, 4))
    factors = {f"f{column}": values[:, column].tolist() for column in range(4)}
    one_hot = np.eye(3)[values].reshape(200, -1)
    exact = similarity(*worlds.given(one_hot, factors), number=500, resamples=50).table.set_index("similarity")
    # the cosine of one-hot codes is the share of factors in common
    assert exact.loc["cosine of codes", ["spearman", "pearson"]].tolist() == pytest.approx([1, 1])
    assert exact.loc["cosine of codes", "pearson low"] == pytest.approx(1)
    floor = exact.loc["cosine of codes, scores shuffled"]
    assert floor["spearman low"] < 0 < floor["spearman high"] and abs(floor["spearman"]) < 0.15
    assert exact["pairs"].tolist() == [500] * 4
    noise = similarity(*worlds.given(generator.standard_normal((200, 8)), factors), number=500, resamples=50)
    assert abs(noise.table["spearman"][0]) < 0.15


def test_one_large_number_decides_unless_codes_are_standardised():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2, (300, 5))
    codes = np.concatenate([2.0 * values - 1, 100 + 50 * generator.standard_normal((300, 1))], axis=1)
    factors = {f"f{column}": values[:, column].tolist() for column in range(5)}
    table = similarity(*worlds.given(codes, factors), number=400, resamples=5).table.set_index("similarity")
    assert table.loc["cosine of codes", "spearman"] < 0.5 < 0.7 < table.loc["cosine of codes, standardised", "spearman"]


def write_pairs(folder, name="pairs.tsv", header=("text1", "text2", "score")):
    first, second = worlds.words(12), worlds.words(12, seed=1)
    scores = np.arange(12) % 5 / 2
    rows = [list(header)] if header else []
    rows += [[a, b, f"{c:g}"] for a, b, c in zip(first, second, scores, strict=True)]
    mark = "," if name.endswith("csv") else "\t"
    (folder / name).write_text("".join(mark.join(row) + "\n" for row in rows))
    return str(folder / name), first, second, scores


@pytest.mark.parametrize("family", worlds.KINDS)
def test_pairs_of_a_file_in_each_kind_of_latent(tmp_path, family):
    path, first, second, scores = write_pairs(tmp_path)
    space = worlds.space(family)
    result = similarity(space, Texts(("w3",)), pairs=path, resamples=5)
    codes = space.codes(Texts(first)), space.codes(Texts(second))
    lengths = np.linalg.norm(codes[0], axis=1) * np.linalg.norm(codes[1], axis=1)
    by_hand = (codes[0] * codes[1]).sum(1) / lengths
    row = result.table.iloc[0]
    assert row["spearman"] == pytest.approx(stats.spearmanr(by_hand, scores).statistic, abs=1e-9)
    assert row["pearson"] == pytest.approx(stats.pearsonr(by_hand, scores).statistic, abs=1e-9)
    np.testing.assert_allclose(result.details["pairs"]["cosine of codes"], by_hand, atol=1e-9)
    assert result.details["pairs"]["text 2"].tolist() == list(second) and row["pairs"] == 12


@pytest.mark.parametrize(
    ("name", "header", "columns"),
    [
        ("pairs.csv", ("a", "b", "c"), ("a", "b", "c")),
        ("pairs.tsv", None, ("1", "2", "3")),  # as the STS benchmark comes, without a header
    ],
)
def test_columns_by_name_or_number(tmp_path, name, header, columns):
    path, first, _, scores = write_pairs(tmp_path, name, header)
    result = similarity(
        worlds.space("gpt_vae"), Texts(("w3",)), pairs=path, first=columns[0], second=columns[1], score=columns[2],
        resamples=2, number=10,
    )  # fmt: skip
    assert result.details["pairs"]["text 1"].tolist() == list(first[:10])
    assert result.details["pairs"]["score"].tolist() == scores[:10].tolist()


def test_bags_of_words_by_hand():
    bags = word_bags(["a b", "A b!", "c", "...", "a c"])
    np.testing.assert_allclose((bags @ bags.T).toarray()[0][:4], [1, 1, 0, 0], atol=1e-12)
    # idf of a (3 of 5 texts) and of c (2): ln((1 + 5) / (1 + n)) + 1
    idf = {"a": np.log(6 / 4) + 1, "b": np.log(6 / 3) + 1, "c": np.log(6 / 3) + 1}
    by_hand = idf["a"] ** 2 / np.hypot(idf["a"], idf["b"]) / np.hypot(idf["a"], idf["c"])
    assert (bags @ bags.T)[0, 4] == pytest.approx(by_hand)
    assert word_bags(["...", "!"]).nnz == 0


FACTORS = {"f": list("aabb"), "g": list("abab")}


@pytest.mark.parametrize(
    ("factors", "options", "words"),
    [
        (None, {}, "nothing says how alike these texts are: give pairs"),
        (FACTORS, {"number": 2}, "at least 3 pairs"),
        (FACTORS, {"resamples": 0}, "1 resample"),
        ({"f": ["a", "a", None, None]}, {}, "at least 3 pairs, and there are 1"),
        ({"f": ["a", "a", "a", "a"]}, {}, "all 6 pairs have the score 1: there is nothing to correlate with"),
        (FACTORS, {"pairs": "none.tsv"}, "none.tsv does not exist"),
        (FACTORS, {"pairs": "pairs.txt"}, "pairs are read from a .tsv or a .csv"),
        (FACTORS, {"pairs": "bad.tsv"}, "the score of pair 2 is 'many', no number"),
        (FACTORS, {"pairs": "bad.tsv", "first": "sentence"}, "no column 'sentence'"),
        (FACTORS, {"pairs": "gap.tsv"}, "gap.tsv line 3 has no text in column 'text2'"),
        (FACTORS, {"pairs": "nan.tsv"}, "the score of pair 1 is 'nan', no number"),
    ],
)
def test_what_cannot_be_asked(tmp_path, monkeypatch, factors, options, words):
    monkeypatch.chdir(tmp_path)
    header = "text1\ttext2\tscore\n"
    (tmp_path / "bad.tsv").write_text(header + "a\tb\t1\nc\td\tmany\n")
    (tmp_path / "gap.tsv").write_text(header + "a\tb\t1\nc\t\t2\n")
    (tmp_path / "nan.tsv").write_text(header + "a\tb\tnan\nc\td\t2\n")
    with pytest.raises(InputError, match=words):
        similarity(*worlds.given(np.eye(4), factors), **options)


def test_a_single_text():
    with pytest.raises(InputError, match="at least 3 pairs, and there are 0"):
        similarity(*worlds.given(np.eye(1), {"f": ["a"]}))


def test_a_conditional_model(tmp_path):
    texts = worlds.annotated(worlds.words(8))
    known = Texts(texts.texts, texts.labels, pd.DataFrame({"f": list("aabbaabb"), "g": list("abababab")}))
    assert len(similarity(worlds.conditional_space(), known, resamples=2).details["pairs"]) == 28
    with pytest.raises(InputError, match="conditional, and pairs from a file have no labels"):
        similarity(worlds.conditional_space(), texts, pairs=write_pairs(tmp_path)[0])


def test_by_the_command_line(tmp_path):
    with unchecked():
        folder = trained("gpt_vae")
        status, out, err = run(
            "probe", "similarity", str(folder), "--data", "builtin:sentences", "--limit", "30", "--number", "40",
            "--resamples", "5", "--output", str(tmp_path / "out"), "--json", str(tmp_path / "f.json"),
        )  # fmt: skip
    assert status == 0, err
    assert "bag of words (TF-IDF)" in out and "40 pairs of 30 texts" in out
    assert len(pd.read_csv(tmp_path / "out" / "similarity-pairs.csv")) == 40
    assert (tmp_path / "out" / "similarity.png").stat().st_size > 1000
