"""The scores where they are known: by closed forms, by tables written out, by scikit-learn, by loops."""

import itertools
import math

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, mutual_info_score, roc_auc_score

from latentlm.errors import InputError
from latentlm.probing.disentanglement_metrics import (
    BINS,
    _concentration,
    dci,
    disentanglement_scores,
    explicitness,
    mig,
    modularity,
    mutual_information,
    sap,
    z_diff,
    z_min_var,
)
from latentlm.probing.factors import halves, pools, prepared

SCORES = {
    "z_diff": z_diff,
    "z_min_var": z_min_var,
    "mig": mig,
    "sap": sap,
    "modularity": modularity,
    "explicitness": explicitness,
}


def crossed(values=(2, 3, 4), each=50):
    """Every combination of the factors' values, `each` times: independent, to the last text."""
    return np.array(list(itertools.product(*map(range, values))) * each)


def noise(texts, dimensions, seed=0):
    return np.random.default_rng(seed).standard_normal((texts, dimensions))


def every_score(codes, factors):
    return {name: score(codes, factors) for name, score in SCORES.items()} | dci(codes, factors)


# ---- codes of which the scores are known -------------------------------------------------------------------------


def test_a_code_of_the_factors_themselves_is_perfect():
    factors = crossed()
    scores = every_score(factors.astype(float), factors)
    # the second dimension guesses one of K values, a bit better or worse than 1 in K by chance
    assert scores.pop("sap") == pytest.approx(np.mean([1 - 1 / 2, 1 - 1 / 3, 1 - 1 / 4]), abs=0.05)
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0), abs=1e-9)


def test_values_are_names_and_not_numbers():
    factors = crossed()
    named = np.array([7, -5, 1000, 3])[factors]
    codes = factors + 0.3 * noise(len(factors), 3)
    assert mig(codes, named) == pytest.approx(mig(codes, factors), abs=1e-12)
    assert z_min_var(codes, named) == pytest.approx(z_min_var(codes, factors), abs=0.02)


def test_a_rotated_code_knows_as_much_and_is_not_disentangled():
    factors = crossed((4, 4), each=100)
    aligned = factors + 0.3 * noise(len(factors), 2)
    rotated = aligned @ np.array([[1, 1], [1, -1]]) / math.sqrt(2)
    before, after = every_score(aligned, factors), every_score(rotated, factors)
    assert after["informativeness"] == pytest.approx(before["informativeness"], abs=0.02)
    assert after["explicitness"] == pytest.approx(before["explicitness"], abs=0.02)
    assert before["mig"] > 0.5 and after["mig"] < 0.02
    assert before["sap"] > 0.4 and after["sap"] < 0.05
    assert before["disentanglement"] > 0.95 and after["disentanglement"] < 0.3
    assert before["completeness"] > 0.95 and after["completeness"] < 0.3
    assert before["modularity"] > 0.95 and after["modularity"] < 0.1


def test_sums_and_differences_know_exactly_as_much_of_either_factor():
    factors = crossed((4, 4))
    codes = factors @ np.array([[1.0, 1.0], [1.0, -1.0]])
    assert mig(codes, factors) == pytest.approx(0, abs=1e-12)
    assert modularity(codes, factors) == pytest.approx(0, abs=1e-12)


def test_noise_is_at_the_floor():
    factors = crossed(each=100)
    scores = every_score(noise(len(factors), 10), factors)
    # 1,000 votes or points: four times sqrt(1/3 × 2/3 / 1000)
    assert scores["z_diff"] == pytest.approx(1 / 3, abs=0.06)
    assert scores["z_min_var"] == pytest.approx(1 / 3, abs=0.06)
    assert scores["informativeness"] == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 4]), abs=0.03)
    assert scores["explicitness"] == pytest.approx(0, abs=0.05)
    assert max(scores[name] for name in ("mig", "sap")) < 0.05
    assert max(scores[name] for name in ("disentanglement", "completeness")) < 0.2


def test_noise_is_neither_better_nor_worse_than_chance():
    """Better where votes are counted that were learnt from; worse where a classifier learns how a half differs from the
    whole, in which the other half is its opposite."""
    factors = np.random.default_rng(1).integers(0, 4, (4000, 8))
    codes = noise(len(factors), 64)
    for score in (z_diff, z_min_var):
        assert np.mean([score(codes, factors, seed) for seed in range(4)]) == pytest.approx(1 / 8, abs=0.02)


def test_the_two_of_a_pair_are_different_texts():
    """One text twice is 0 apart, which would tell values that few texts share, as of the first factor here."""
    factors = np.stack([np.arange(2000) // 4, np.arange(2000) % 2], axis=1)
    # the s.d. over seeds is 0.037, as the pairs are few: three times that of a mean of eight
    assert np.mean([z_diff(noise(2000, 8), factors, seed) for seed in range(8)]) == pytest.approx(1 / 2, abs=0.04)


def test_order_sign_scale_and_origin_of_dimensions_say_nothing():
    factors = crossed(each=40)
    codes = np.hstack([factors + 0.3 * noise(len(factors), 3), noise(len(factors), 2, seed=1)])
    changed = codes[:, [3, 0, 4, 2, 1]] * np.array([-0.01, 30.0, -1.0, 4.0, -1e3]) + np.array([0, 5, -2, 1, 100])
    before, after = every_score(codes, factors), every_score(changed, factors)
    for exact in ("z_min_var", "mig", "modularity", "sap"):
        assert after.pop(exact) == pytest.approx(before.pop(exact), abs=1e-9)
    for by_trees in ("disentanglement", "completeness"):  # which draw other thresholds
        assert after.pop(by_trees) == pytest.approx(before.pop(by_trees), abs=0.05)
    # within the tolerance of the solver
    assert after == pytest.approx(before, abs=2e-3)


def test_scale_and_origin_leave_the_trees_as_they_are():
    factors = crossed(each=40)
    codes = factors + 0.3 * noise(len(factors), 3)
    assert dci(codes * [0.01, 30, 1e3] + [5, -2, 100], factors) == pytest.approx(dci(codes, factors), abs=1e-3)


def test_a_dimension_twice_ends_completeness_and_the_gap_but_not_disentanglement():
    factors = crossed()
    codes = np.hstack([factors, factors]).astype(float)
    scores = every_score(codes, factors)
    assert scores["mig"] == pytest.approx(0, abs=1e-12)
    assert scores["sap"] == 0
    # two dimensions of six share the importance of each factor: 1 − ln 2 / ln 6 where evenly
    assert scores["completeness"] == pytest.approx(1 - math.log(2) / math.log(6), abs=0.1)
    assert scores["disentanglement"] == pytest.approx(1, abs=1e-9)
    assert scores["modularity"] == pytest.approx(1, abs=1e-9)


def test_a_dimension_that_does_not_vary_changes_nothing():
    factors = crossed()
    codes = factors + 0.3 * noise(len(factors), 3)
    constant = np.full((len(factors), 1), 0.1, dtype=np.float32)
    constant[::3] = np.nextafter(constant[::3], np.float32(1))  # but for rounding
    assert every_score(np.hstack([constant, codes, -3 * constant]), factors) == every_score(codes, factors)


def test_a_dimension_of_one_odd_text_is_no_obstacle():
    factors = crossed()
    odd = np.zeros((len(factors), 1))
    odd[17] = 1
    codes = np.hstack([factors, odd])
    assert z_diff(codes, factors) == 1
    assert mig(codes, factors) == pytest.approx(mig(codes[:, :3], factors), abs=0.01)


# ---- information -------------------------------------------------------------------------------------------------

#: a and b, and a code that knows of a all but one text and of b a little, and one that is b
TABLE = np.array(
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
)
# of counts 3 + 1 and 0 + 4, and of 2 + 1 and 2 + 3, of 8: 0.3804 and 0.0338 nats
OF_A = 3 / 8 * math.log(2) + 1 / 8 * math.log(2 / 5) + 4 / 8 * math.log(8 / 5)
OF_B = 2 / 8 * math.log(4 / 3) + 1 / 8 * math.log(2 / 3) + 2 / 8 * math.log(4 / 5) + 3 / 8 * math.log(6 / 5)


def test_information_of_a_small_table():
    factors, codes = TABLE[:, :2], TABLE[:, 2:].astype(float)
    information, entropies = mutual_information(codes, factors)
    np.testing.assert_allclose(information, [[OF_A, OF_B], [0, math.log(2)]], atol=1e-12)
    np.testing.assert_allclose(entropies, [math.log(2), math.log(2)])
    gaps = [OF_A / math.log(2), (math.log(2) - OF_B) / math.log(2)]
    assert mig(codes, factors) == pytest.approx(sum(gaps) / 2, abs=1e-12)
    assert mig(codes, factors) == pytest.approx(0.7500, abs=5e-5)
    assert modularity(codes, factors) == pytest.approx((1 - (OF_B / OF_A) ** 2 + 1) / 2, abs=1e-12)


def test_information_is_that_of_scikit_learn_on_bins_made_by_loops():
    rng = np.random.default_rng(2)
    factors = np.stack([rng.integers(0, 3, 203), rng.integers(5, 12, 203)], axis=1)
    factors[rng.random(factors.shape) < 0.2] = -1
    codes = factors + rng.standard_normal(factors.shape)
    # ties among many values, and few values
    codes = np.hstack([codes, codes.round(1), np.maximum(codes, 4), (codes > 4).astype(float)]).astype(np.float32)
    information, entropies = mutual_information(codes, factors)
    assert information.shape == (8, 2)
    for (row, code), (column, values) in itertools.product(enumerate(codes.T), enumerate(factors.T)):
        seen = sorted(set(code))
        middles = [sum(other < one for other in code) + sum(other == one for other in code) / 2 for one in code]
        if len(seen) <= BINS:
            bins = np.array([seen.index(one) for one in code])
        else:
            bins = np.array([int(BINS * middle / len(code)) for middle in middles])
        known = values != -1
        assert information[row, column] == pytest.approx(mutual_info_score(bins[known], values[known]), abs=1e-12)
        assert entropies[column] == pytest.approx(mutual_info_score(values[known], values[known]), abs=1e-12)
    first, second = (sorted(column)[-1] - sorted(column)[-2] for column in information.T)
    assert mig(codes, factors) == pytest.approx((first / entropies[0] + second / entropies[1]) / 2, abs=1e-12)


def test_an_outlier_and_an_increasing_map_leave_the_information_alone():
    factors = crossed()
    codes = factors + 0.3 * noise(len(factors), 3)
    stretched = np.exp(3 * codes)
    stretched[stretched[:, 0].argmax(), 0] = 1e9
    np.testing.assert_allclose(mutual_information(stretched, factors)[0], mutual_information(codes, factors)[0])


# ---- classifiers -------------------------------------------------------------------------------------------------


def with_unknown(seed=3, texts=600):
    rng = np.random.default_rng(seed)
    factors = np.stack([rng.choice(3, texts, p=[0.6, 0.3, 0.1]), rng.integers(0, 2, texts)], axis=1)
    codes = factors @ rng.standard_normal((2, 5)) + rng.standard_normal((texts, 5))
    factors[rng.random(factors.shape) < 0.1] = -1
    return codes, factors


def test_attributes_are_predicted_as_by_discriminant_analysis_of_each_dimension():
    codes, factors = with_unknown()
    rng = np.random.default_rng(0)
    gaps = []
    for values in factors.T:
        fitted, held_out = halves(values, rng)
        number = values.max() + 1
        scores = []
        for dimension in codes.T[..., None]:
            classifier = LinearDiscriminantAnalysis(priors=np.full(number, 1 / number))
            predicted = classifier.fit(dimension[fitted], values[fitted]).predict(dimension[held_out])
            scores.append(balanced_accuracy_score(values[held_out], predicted))
        best, second = sorted(scores, reverse=True)[:2]
        gaps.append(best - second)
    assert sap(codes, factors, seed=0) == pytest.approx(np.mean(gaps), abs=1e-6)


def test_predictability_of_a_code_that_knows_half():
    """0, 1, 2, 3 itself, and whether it is odd: all are found, and the first two of four."""
    values = np.repeat(np.arange(4), 10)
    assert sap(np.stack([values, values % 2], axis=1).astype(float), values[:, None]) == 0.5


def test_explicitness_and_informativeness_are_those_of_scikit_learn():
    codes, factors = with_unknown()
    standard = (codes - codes.mean(0)) / codes.std(0)
    rng = np.random.default_rng(0)
    areas, accuracies = [], []
    for values in factors.T:
        fitted, held_out = halves(values, rng)
        classifier = LogisticRegression(tol=1e-6, max_iter=1000).fit(standard[fitted], values[fitted])
        found = classifier.predict_proba(standard[held_out])
        several = found.shape[1] > 2
        areas.append(roc_auc_score(values[held_out], found if several else found[:, 1], multi_class="ovr"))
        accuracies.append(classifier.score(standard[held_out], values[held_out]))
    assert explicitness(codes, factors, seed=0) == pytest.approx(2 * np.mean(areas) - 1, abs=2e-3)
    assert dci(codes, factors, seed=0)["informativeness"] == pytest.approx(np.mean(accuracies), abs=2e-3)


def test_a_value_in_the_middle_of_an_axis_is_explicit():
    values = np.repeat(np.arange(3), 40)
    codes = np.stack([values.astype(float), noise(120, 1)[:, 0]], axis=1)
    assert explicitness(codes, values[:, None]) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        ([[1, 0], [0, 1]], 1.0),
        ([[1, 1], [1, 1]], 0.0),
        # row shares 3/4 and 1/4 have 0.8113 bits; both rows weigh 4
        ([[3, 1], [0, 4]], (1 - 0.8112781244591328 + 1) / 2),
        # a row of no importance has no weight, and 1 weighs 2 of 10
        ([[0, 0], [1, 1], [0, 8]], 0.8),
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_concentration_of_importance(importance, expected):
    assert _concentration(np.array(importance, dtype=float)) == pytest.approx(expected, abs=1e-12)


# ---- unknown values, and halves ----------------------------------------------------------------------------------


def test_texts_of_which_nothing_is_known_say_nothing():
    """Each code once more, without a factor: ranks and scales stay, so that only those texts could change a score."""
    codes, factors = with_unknown()
    twice, unknown = np.vstack([codes, codes]), np.vstack([factors, np.full_like(factors, -1)])
    for score in (mig, modularity, sap, explicitness, lambda *given: dci(*given)["informativeness"]):
        assert score(twice, unknown) == pytest.approx(score(codes, factors), abs=1e-6)


def test_a_value_of_three_texts_counts_as_unknown():
    codes, factors = with_unknown()
    rare, unknown = factors.copy(), factors.copy()
    rare[:3, 1], unknown[:3, 1] = 9, -1
    assert every_score(codes, rare) == every_score(codes, unknown)
    rare[3, 1], unknown[3, 1] = 9, -1
    assert every_score(codes, rare) != every_score(codes, unknown)


def test_a_factor_unknown_is_unknown_to_itself_alone():
    codes, factors = with_unknown()
    less = factors.copy()
    less[:200, 1] = -1
    before, after = mutual_information(codes, factors)[0], mutual_information(codes, less)[0]
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert (before[:, 1] != after[:, 1]).all()


def test_halves_hold_every_known_text_once_and_every_value_evenly():
    values = np.array([-1, 2, 0, 0, 1, 0, 0, -1, 1, 1, 1, 2, 2, 2, 2])
    one, other = halves(values, np.random.default_rng(0))
    assert sorted([*one, *other]) == [i for i, value in enumerate(values) if value >= 0]
    assert any(set(one) != set(halves(values, np.random.default_rng(seed))[0]) for seed in (1, 2))
    assert values[one].tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert values[other].tolist() == [0, 0, 1, 1, 2, 2]


def test_pools_of_all_factors_are_of_the_same_halves():
    _, factors = prepared(*with_unknown(texts=60))
    (a, b), (c, d) = pools(factors, np.random.default_rng(0))
    assert not {*a, *c} & {*b, *d}
    for values, rows in [(factors[:, 0], a), (factors[:, 0], b), (factors[:, 1], c), (factors[:, 1], d)]:
        assert values[rows].min() == 0 and (np.diff(values[rows]) >= 0).all()
        assert min(np.unique(values[rows], return_counts=True)[1]) >= 2


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_table_has_every_score_of_every_code():
    factors = crossed((2, 3), each=60)
    codes = np.hstack([factors + 0.5 * noise(len(factors), 2), noise(len(factors), 1, seed=5)])
    words = np.random.default_rng(4).poisson(1 + factors @ np.arange(20).reshape(2, 10) / 5)
    table = disentanglement_scores(codes, factors, ["mood", "tense"], seeds=(4, 7), beside=words)
    assert table.columns.tolist() == ["metric", "code", "mean", "sd", "seeds", "n"]
    assert table["code"].unique().tolist() == ["model", "factors shuffled", "PCA", "factors as code"]
    assert len(table) == 4 * 9 and table.notna().all(axis=None)
    assert set(table["n"]) == {len(codes)} and set(table["seeds"]) == {2}
    means, spreads = (table.pivot(index="metric", columns="code", values=column) for column in ("mean", "sd"))
    by_seed = [sap(codes, factors, seed) for seed in (4, 7)]
    assert means.loc["sap", "model"] == pytest.approx(np.mean(by_seed))
    assert spreads.loc["sap", "model"] == pytest.approx(np.std(by_seed, ddof=1))
    for name, score in (("z_diff", z_diff), ("z_min_var", z_min_var), ("explicitness", explicitness)):
        assert means.loc[name, "model"] == pytest.approx(np.mean([score(codes, factors, seed) for seed in (4, 7)]))
    for name, value in dci(codes, factors, 4).items():
        assert means.loc[f"dci_{name}", "model"] == pytest.approx((value + dci(codes, factors, 7)[name]) / 2)
    assert means.loc["mig", "PCA"] == pytest.approx(mig(PCA(3).fit_transform(words), factors))
    assert means.loc["modularity", "model"] == pytest.approx(modularity(codes, factors))
    ceiling = means["factors as code"].drop("sap")
    assert ceiling.to_dict() == pytest.approx(dict.fromkeys(ceiling.index, 1.0), abs=1e-9)
    assert means.loc["mig", "factors shuffled"] < 0.05 < 0.3 < means.loc["mig", "model"]
    assert means.loc["z_diff", "factors shuffled"] < 0.6 < 0.9 < means.loc["z_diff", "model"]


def test_the_table_without_words_has_no_pca_and_of_one_seed_no_spread():
    codes, factors = with_unknown()
    table = disentanglement_scores(codes, factors, seeds=(0,))
    assert "PCA" not in set(table["code"])
    assert table["sd"].isna().all()


def test_shuffled_factors_are_other_rows_for_each_seed():
    codes, factors = with_unknown()
    table = disentanglement_scores(codes, factors)
    spread = table.set_index(["metric", "code"])["sd"]
    assert spread["mig", "model"] == 0 < spread["mig", "factors shuffled"]


def test_an_unknown_value_is_in_the_middle_of_the_factors_as_a_code():
    """Of thirds 0, 1 and unknown, beside whether it is known: three places, so that the first dimension knows both."""
    first = np.arange(300) % 3
    factors = np.stack([np.where(first == 2, -1, first), first == 2], axis=1).astype(int)
    table = disentanglement_scores(noise(300, 2), factors, seeds=(0,)).set_index(["metric", "code"])["mean"]
    of_first, of_second = math.log(2), math.log(3) - 2 / 3 * math.log(2)
    expected = (1 - (of_second / of_first) ** 2 + 1) / 2
    assert table["modularity", "factors as code"] == pytest.approx(expected, abs=1e-9)


def test_words_may_be_sparse():
    codes, factors = with_unknown()
    words = np.random.default_rng(0).poisson(1.0, (len(codes), 12))
    dense, thin = (
        disentanglement_scores(codes, factors, seeds=(0,), beside=given) for given in (words, sparse.csr_array(words))
    )
    assert dense["mean"].to_numpy() == pytest.approx(thin["mean"].to_numpy(), abs=1e-2)


# ---- what cannot be used -----------------------------------------------------------------------------------------

CODES, FACTORS = with_unknown(texts=100)
ONE_VALUE = np.stack([FACTORS[:, 0], np.full(100, 3)], axis=1)
NOT_FINITE = CODES.copy()
NOT_FINITE[6, 2] = np.nan
INFINITE = CODES.copy()
INFINITE[8, 0] = -np.inf
STILL = np.hstack([CODES[:, :1], np.ones((100, 4))])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((CODES[:99], FACTORS), "codes of 99 texts do not fit factors of 100: give a row of each text."),
        ((CODES, FACTORS[:, :0]), "there are no factors: give at least one column of values."),
        ((CODES, FACTORS[:, :1]), "with one factor there is nothing to tell it from: give at least 2."),
        ((NOT_FINITE, FACTORS), "the code of text 6 has a number that is not finite: leave that text out."),
        ((INFINITE, FACTORS), "the code of text 8 has a number that is not finite: leave that text out."),
        ((STILL, FACTORS), "the codes vary from text to text in 1 of 5 dimensions and need 2."),
        (
            (CODES, ONE_VALUE, ["mood", "tense"]),
            "the factor 'tense' has 1 value that at least 4 texts share and needs 2: leave it out or give more texts.",
        ),
        (
            (CODES, ONE_VALUE),
            "factor 1 has 1 value that at least 4 texts share and needs 2: leave it out or give more texts.",
        ),
        (
            (CODES[:5], FACTORS[:5]),
            "factor 0 has 0 values that at least 4 texts share and needs 2: leave it out or give more texts.",
        ),
        ((CODES, FACTORS, ["mood"]), "1 names do not fit 2 factors: give one of each."),
        ((CODES, FACTORS, None, ()), "there are no seeds: give at least one."),
        (
            (CODES, FACTORS, None, (0,), np.ones((100, 4))),
            "what the codes stand beside has 100 rows and 4 columns: 100 rows and at least 5 columns are needed, "
            "and no fewer texts than dimensions.",
        ),
        (
            (CODES, FACTORS, None, (0,), np.full((100, 5), np.nan)),
            "what the codes stand beside has a number that is not finite.",
        ),
    ],
)
def test_what_cannot_be_used_is_said(given, message):
    with pytest.raises(InputError) as error:
        disentanglement_scores(*given)
    assert str(error.value) == message


@pytest.mark.parametrize("score", [*SCORES.values(), dci, mutual_information])
def test_every_score_says_so_by_itself(score):
    with pytest.raises(InputError, match=r"^the code of text 6 has a number that is not finite"):
        score(NOT_FINITE, FACTORS)
    with pytest.raises(InputError, match=r"^there are no factors"):
        score(CODES, FACTORS[:, :0])


@pytest.mark.parametrize("score", [z_diff, z_min_var, modularity, dci])
def test_scores_that_compare_factors_need_two(score):
    with pytest.raises(InputError, match=r"^with one factor there is nothing to tell it from"):
        score(CODES, FACTORS[:, :1])


def test_half_of_the_texts_without_two_of_a_value_is_said():
    values = np.full((4000, 2), -1)
    values[:8, 0] = [0, 1] * 4
    values[:, 1] = np.arange(4000) % 2
    spread = next(seed for seed in range(10_000) if lonely(values, seed))
    with pytest.raises(InputError, match=r"^no two of half the texts share a value of factor 0: give more texts\.$"):
        z_diff(noise(4000, 2), values, seed=spread)


def lonely(values, seed):
    """Whether a half has at most one of each of the first factor's two values."""
    half = np.random.default_rng(seed).permutation(len(values)) % 2
    counts = np.zeros((2, 2), dtype=int)
    np.add.at(counts, (half[:8], values[:8, 0]), 1)
    return bool((counts.max(1) < 2).any())
