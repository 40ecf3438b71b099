"""Whether the dimensions of a code and the factors of its texts go one to one: seven published scores.

A code is what a text was encoded to, a row of d numbers; a factor is something else known of each text, one of K
values (its tense, its number of arguments). N texts, d dimensions, f factors. What all scores here share:

- A factor's −1 says "unknown here"; that text is left out of that factor alone. So is a value that fewer than four
  texts share, as it cannot be in both halves of a split twice.
- Dimensions that do not vary are left out of the code, so that they change no score, and the others are standardised
  over all texts. No score depends on the scale or the origin of a dimension.
- What is fitted sees one random half of the texts and is scored on the other half.

Scores lie between 0 and 1, higher is better, but none of them is 0 for a code that says nothing, or 1 wherever factors
depend on each other: read them beside the floors and the ceiling of `disentanglement_scores`. Locatello et al. 2019
(arXiv 1811.12359) compare them; where we differ from their disentanglement_lib, a docstring says so.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Num
from scipy import sparse
from scipy.special import entr
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from latentlm.errors import InputError
from latentlm.probing.factors import enough_factors, group_of_each, halves, pools, prepared

#: a dimension is cut into so many bins for its mutual information
BINS = 20
#: pairs or texts in a point of z_diff and z_min_var, and points of each half, shared out evenly to the factors
POINT_SIZE, POINTS = 64, 1000
#: of the trees behind the importances of `dci`; the least leaf is a share of the texts that they see
TREES, TREE_DEPTH, LEAST_LEAF = 8, 8, 0.01


def z_diff(codes: Float[np.ndarray, "N d"], factors: Int[np.ndarray, "_ f"], seed: int = 0) -> float:
    """The β-VAE metric (Higgins et al. 2017): which factor do two texts share, by how far apart they are?

    A point is the mean of |z_1 − z_2| over `POINT_SIZE` pairs of texts, the two of a pair sharing their value of one
    factor; a linear classifier (multinomial logistic regression) tells which factor it was. A value is drawn as often
    as texts have it. The points of the classifier and those that score it come from different halves of the texts.

    Args:
        codes: any floats that are finite.
        factors: of the same texts, −1 for unknown.

    Returns:
        Accuracy; 1/f is chance.

    Raises:
        InputError: codes or factors that cannot be used, or fewer than two factors.
    """
    codes, factors = prepared(codes, factors, least_factors=2)
    rng = np.random.default_rng(seed)
    sharing = POINTS // factors.shape[1]
    points: list[list[np.ndarray]] = [[], []]
    for values, pool in zip(factors.T, pools(factors, rng), strict=True):
        for half, rows in zip(points, pool, strict=True):
            first, last = group_of_each(values[rows])
            one = rng.integers(len(rows), size=sharing * POINT_SIZE)
            begin, number = first[one], (last - first)[one]
            # from 1 to number − 1 places further on, around: any other text of the value
            other = begin + (one - begin + rng.integers(1, number)) % number
            apart = np.abs(codes[rows[one]] - codes[rows[other]])
            half.append(apart.reshape(sharing, POINT_SIZE, -1).mean(1))
    labels = np.repeat(np.arange(factors.shape[1]), sharing)
    fitted, held_out = (np.concatenate(half) for half in points)
    # means over many pairs differ by little, which the classifier's penalty would take for nothing
    classifier = make_pipeline(StandardScaler(), _classifier()).fit(fitted, labels)
    return float(classifier.score(held_out, labels))


def z_min_var(codes: Float[np.ndarray, "N d"], factors: Int[np.ndarray, "_ f"], seed: int = 0) -> float:
    """The FactorVAE metric (Kim and Mnih 2018): the dimension that varies least tells the factor held fixed.

    A vote is the dimension of least variance, relative to its variance over all texts, among `POINT_SIZE` texts (drawn
    with replacement) that share their value of one factor. Each dimension stands for the factor with most of its votes
    in one half of the texts; one without a vote for the first factor, a guess.

    Args, Raises: as `z_diff`.

    Returns:
        Share of the votes in the other half that go to a dimension of their factor; 1/f is chance.
    """
    codes, factors = prepared(codes, factors, least_factors=2)
    rng = np.random.default_rng(seed)
    votes = np.zeros((2, factors.shape[1], codes.shape[1]), dtype=int)
    for factor, (values, pool) in enumerate(zip(factors.T, pools(factors, rng), strict=True)):
        for half, rows in zip(votes, pool, strict=True):
            first, last = group_of_each(values[rows])
            one = rng.integers(len(rows), size=(POINTS // factors.shape[1], 1))
            some = rows[rng.integers(first[one], last[one], size=(len(one), POINT_SIZE))]
            np.add.at(half[factor], codes[some].var(1).argmin(1), 1)
    fitted, held_out = votes
    return float(held_out[fitted.argmax(0), np.arange(codes.shape[1])].sum() / held_out.sum())


def mutual_information(
    codes: Float[np.ndarray, "N d"], factors: Int[np.ndarray, "_ f"]
) -> tuple[Float[np.ndarray, "live f"], Float[np.ndarray, " f"]]:
    """I(z_i; v_k) in nats of each dimension that varies and each factor, and the factors' entropies in nats.

    Plug-in estimates from counts. A dimension of at most `BINS` values has a bin for each; any other is cut into `BINS`
    bins of equal mass, by its ranks among all texts (equal numbers stay together). disentanglement_lib cuts bins of
    equal width: there one odd text stretches the range until the others share a few bins, which would hold back
    skewed codes, such as the PCA of word counts that a model is compared with. Ranks leave every increasing map of a
    dimension without effect. The estimates exceed the truth by about (bins − 1)(K − 1) / 2N.

    Raises:
        InputError: codes or factors that cannot be used.
    """
    codes, factors = prepared(codes, factors)
    bins = (BINS * (rankdata(codes, axis=0) - 0.5) / len(codes)).astype(int)
    few = (np.diff(np.sort(codes, axis=0), axis=0) > 0).sum(0) < BINS
    bins[:, few] = rankdata(codes[:, few], method="dense", axis=0).astype(int) - 1
    dimensions = np.arange(bins.shape[1])
    information, entropies = [], []
    for values in factors.T:
        known = values >= 0
        shape = (bins.shape[1], BINS, values.max() + 1)
        cells = np.ravel_multi_index((dimensions, bins[known], values[known, None]), shape)
        joint = np.bincount(cells.ravel(), minlength=np.prod(shape)).reshape(shape) / known.sum()
        entropies.append(entr(joint[0].sum(0)).sum())
        information.append(entropies[-1] + entr(joint.sum(2)).sum(1) - entr(joint).sum((1, 2)))
    # rounding alone takes it below 0
    return np.maximum(np.stack(information, axis=1), 0), np.array(entropies)


def mig(codes: Float[np.ndarray, "N d"], factors: Int[np.ndarray, "_ f"]) -> float:
    """The mutual information gap (Chen et al. 2018, arXiv 1802.04942).

    The mean over factors of [I(z_(1); v) − I(z_(2); v)] / H(v), z_(1) and z_(2) the two dimensions that know most of v.
    As in disentanglement_lib, z is the given code and `mutual_information` is counted, where the paper integrates over
    q(z | x). Nothing in it is drawn at random.

    Args, Raises: as `mutual_information`.
    """
    return _information_gap(*mutual_information(codes, factors))


def _information_gap(information: Float[np.ndarray, "live f"], entropies: Float[np.ndarray, " f"]) -> float:
    return float((_gap(information) / entropies).mean())


def modularity(codes: Float[np.ndarray, "N d"], factors: Int[np.ndarray, "_ f"]) -> float:
    """Whether a dimension knows of one factor alone (Ridgeway and Mozer 2018, arXiv 1802.05312, section 3).

    The mean over dimensions of 1 − Σ_{k ≠ *} m_k² / (m_*² (f − 1)), with m_k the `mutual_information` with factor k and
    * the factor with most: the squared distance from the nearest dimension that knows of one alone, relative to the
    farthest. One that knows exactly nothing of any factor is left out (disentanglement_lib counts it as 0).

    Args: as `mutual_information`.

    Raises:
        InputError: codes or factors that cannot be used, or fewer than two factors.
    """
    enough_factors(factors, 2)
    return _modularity(mutual_information(codes, factors)[0])


def _modularity(information: Float[np.ndarray, "live f"]) -> float:
    squared = np.square(information)
    most = squared.max(1)
    knows, others = most > 0, squared.sum(1) - most
    if not knows.any():
        return 0.0
    return float((1 - others[knows] / (most[knows] * (squared.shape[1] - 1))).mean())


def dci(codes: Float[np.ndarray, "N d"], factors: Int[np.ndarray, "_ f"], seed: int = 0) -> dict[str, float]:
    """Disentanglement, completeness and informativeness (Eastwood and Williams 2018, section 2).

    With R_ik the importance of dimension i for factor k: disentanglement is Σ_i ρ_i (1 − H_f(R_i· / Σ_k R_ik)), ρ_i the
    share of i in all importance and H_f the entropy to the base f; completeness is the same with dimensions and factors
    exchanged. Informativeness is held-out accuracy.

    The importances are those of `TREES` extremely randomised trees that look at every dimension at each split.
    Gradient boosting, the reference, takes minutes for what these do in seconds. Trees that look at some dimensions
    alone split by whatever they are given, and deep ones by noise, so that no code would come near 1. Lasso, of the
    paper, is linear, and so blind to the middle of three values on one axis. Informativeness is read by logistic
    regression rather than by the trees: those lose with every rotation of a code, and so would measure its axes again.

    Args, Raises: as `z_diff`.

    Returns:
        `disentanglement_scores`, `completeness` and `informativeness`.
    """
    ready = prepared(codes, factors, least_factors=2)
    return _from_importances(*ready, seed) | {"informativeness": _read_linearly(*ready, seed)[0]}


def _from_importances(
    codes: Float[np.ndarray, "N live"], factors: Int[np.ndarray, "N f"], seed: int
) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    importances = []
    for values in factors.T:
        fitted, _ = halves(values, rng)
        trees = ExtraTreesClassifier(
            TREES, max_features=None, max_depth=TREE_DEPTH, min_samples_leaf=LEAST_LEAF, random_state=seed
        )
        importances.append(trees.fit(codes[fitted], values[fitted]).feature_importances_)
    importance = np.stack(importances, axis=1)
    return {"disentanglement": _concentration(importance), "completeness": _concentration(importance.T)}


def _read_linearly(
    codes: Float[np.ndarray, "N live"], factors: Int[np.ndarray, "N f"], seed: int
) -> tuple[float, float]:
    """Of one logistic regression for each factor, held-out accuracy and 2 (AUC − ½)."""
    # half the time of float64
    codes, rng = codes.astype(np.float32), np.random.default_rng(seed)
    accuracies, areas = [], []
    for values in factors.T:
        fitted, held_out = halves(values, rng)
        found = _classifier().fit(codes[fitted], values[fitted]).predict_proba(codes[held_out])
        truth = values[held_out]
        accuracies.append(np.mean(found.argmax(1) == truth))
        areas.append(np.mean([roc_auc_score(truth == value, found[:, value]) for value in range(found.shape[1])]))
    return float(np.mean(accuracies)), float(2 * (np.mean(areas) - 0.5))


def sap(codes: Float[np.ndarray, "N d"], factors: Int[np.ndarray, "_ f"], seed: int = 0) -> float:
    """Separated attribute predictability (Kumar et al. 2018, arXiv 1711.00848, section 3).

    The mean over factors of the gap between the two dimensions that predict it best, each by a linear classifier of
    that dimension alone, in balanced accuracy (the mean over values of the share found) on held-out texts. The
    classifier is linear discriminant analysis with equal priors, which in one dimension is the nearest class mean, and
    so costs no search for thresholds (the paper) or support vectors (disentanglement_lib). A factor of K values gives
    about 1 − 1/K at most, as the second dimension can always guess.

    Args: as `z_diff`.

    Raises:
        InputError: codes or factors that cannot be used.
    """
    codes, factors = prepared(codes, factors)
    codes, rng = codes.astype(np.float32), np.random.default_rng(seed)
    scores = []
    for values in factors.T:
        fitted, held_out = halves(values, rng)
        each = range(values.max() + 1)
        means = np.stack([codes[fitted][values[fitted] == value].mean(0) for value in each])
        nearest = np.abs(codes[held_out] - means[:, None]).argmin(0)
        found = [(nearest[values[held_out] == value] == value).mean(0) for value in each]
        scores.append(np.mean(found, axis=0))
    return float(_gap(np.stack(scores, axis=1)).mean())


def explicitness(codes: Float[np.ndarray, "N d"], factors: Int[np.ndarray, "_ f"], seed: int = 0) -> float:
    """Whether the whole code tells each value linearly (Ridgeway and Mozer 2018, arXiv 1802.05312, section 3).

    The mean over factors, and in each over its values, of 2 (AUC − ½), AUC the area under the ROC curve of this value
    against the rest on held-out texts, by the probability of one multinomial logistic regression for all values (as in
    disentanglement_lib today; the paper fits one for each value, which cannot tell the middle of three on an axis).

    Args, Raises: as `sap`.
    """
    return _read_linearly(*prepared(codes, factors), seed)[1]


def disentanglement_scores(
    codes: Float[np.ndarray, "N d"],
    factors: Int[np.ndarray, "_ f"],
    names: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    beside: Num[np.ndarray, "_ v"] | sparse.spmatrix | sparse.sparray | None = None,
    sampled: Float[np.ndarray, "N d"] | None = None,
) -> pd.DataFrame:
    """Every score of this file, and the same of two floors and a ceiling, computed the same way.

    The codes compared are `model`, the one given; `z sampled`, draws of what it is the mean of; `factors shuffled`,
    the one given with the rows of the factors permuted, which is what each score gives where there is nothing to find;
    `PCA`, d principal components of `beside`; and
    `factors as code`, each factor's value as one dimension (its place among the values, the mean where unknown), which
    is what a perfect code reaches. Where factors depend on each other, not even that reaches 1.

    Args:
        codes: any floats that are finite.
        factors: of the same texts, −1 for unknown.
        names: of the factors, for messages; by default their numbers.
        seeds: each draws splits, pairs, trees and the permutation; the texts stay the same, so that the spread is not
            that of other texts.
        beside: of the same texts, at least d columns: counts of words, for example, dense or sparse. None leaves `PCA`
            out.
        sampled: a draw for each text. Dimensions are standardised, so that means which lie far within the noise of z
            score as well as others; draws do not.

    Returns:
        A row for each score (`metric`) and `code`: `mean` and `sd` over the `seeds` (a count; NaN for the s.d. of one)
        and `n`, the number of texts.

    Raises:
        InputError: codes, factors or names that cannot be used, fewer than two factors, or `beside` of another size.
    """
    if not len(seeds):
        raise InputError("there are no seeds: give at least one.")
    _, coded = prepared(codes, factors, least_factors=2, names=names)
    compared = {"model": codes} | ({} if sampled is None else {"z sampled": sampled}) | {"factors shuffled": codes}
    if beside is not None:
        compared["PCA"] = _principal_components(beside, *codes.shape)
    compared["factors as code"] = np.stack(
        [np.where(values >= 0, values, values[values >= 0].mean()) for values in coded.T], axis=1
    )
    rows = []
    for name, code in compared.items():
        for seed in seeds:
            # another stream than the one that splits
            order = np.random.default_rng((seed, 1)).permutation(len(factors))
            labels = factors[order] if name == "factors shuffled" else factors
            rows += [(metric, name, value) for metric, value in _scores(code, labels, seed).items()]
    table = pd.DataFrame(rows, columns=["metric", "code", "value"]).groupby(["metric", "code"], sort=False)["value"]
    return table.agg(mean="mean", sd="std", seeds="count").reset_index().assign(n=len(codes))


def _scores(codes: Float[np.ndarray, "N d"], factors: Int[np.ndarray, "N f"], seed: int) -> dict[str, float]:
    ready = prepared(codes, factors, least_factors=2)
    information, entropies = mutual_information(codes, factors)
    importances = _from_importances(*ready, seed)
    accuracy, area = _read_linearly(*ready, seed)
    return {
        "z_diff": z_diff(codes, factors, seed),
        "z_min_var": z_min_var(codes, factors, seed),
        "mig": _information_gap(information, entropies),
        "dci_disentanglement": importances["disentanglement"],
        "dci_completeness": importances["completeness"],
        "dci_informativeness": accuracy,
        "sap": sap(codes, factors, seed),
        "modularity": _modularity(information),
        "explicitness": area,
    }


def _classifier() -> LogisticRegression:
    # the tolerance leaves the third digit of an accuracy alone
    return LogisticRegression(tol=1e-3, max_iter=1000)


def _gap(scores: Float[np.ndarray, "d f"]) -> Float[np.ndarray, " f"]:
    """Between the best two dimensions of each factor."""
    ordered = np.sort(scores, axis=0)
    return ordered[-1] - ordered[-2]


def _concentration(importance: Float[np.ndarray, "row column"]) -> float:
    """1 − entropy of each row over its columns, to the base of their number; rows weighted by their sums."""
    sums = importance.sum(1)
    if not sums.any():
        return 0.0
    shares = importance[sums > 0] / sums[sums > 0, None]
    return float(np.average(1 - entr(shares).sum(1) / np.log(importance.shape[1]), weights=sums[sums > 0]))


def _principal_components(
    beside: Num[np.ndarray, "M v"] | sparse.spmatrix | sparse.sparray, texts: int, dimensions: int
) -> Float[np.ndarray, "M d"]:
    rows, columns = beside.shape
    if rows != texts or min(rows, columns) < dimensions:
        raise InputError(
            f"what the codes stand beside has {rows} rows and {columns} columns: "
            f"{texts} rows and at least {dimensions} columns are needed, and no fewer texts than dimensions."
        )
    numbers = beside.data if sparse.issparse(beside) else beside
    if not np.isfinite(numbers).all():
        raise InputError("what the codes stand beside has a number that is not finite.")
    return PCA(dimensions, random_state=0).fit_transform(beside.astype(np.float64))
