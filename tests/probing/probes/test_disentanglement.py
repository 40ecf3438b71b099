"""The probe of disentanglement: the scores of the model's codes, in the order and with the words a reader needs."""

import numpy as np
import pandas as pd
import pytest
from tests.probing import worlds

from latentlm import InputError
from latentlm.probing import Texts
from latentlm.probing.disentanglement_metrics import disentanglement_scores
from latentlm.probing.probes.disentanglement import disentanglement


def perfect(texts: int = 400) -> tuple[np.ndarray, dict[str, list]]:
    """A code with one dimension for each of two factors."""
    generator = np.random.default_rng(0)
    mood, tense = generator.integers(0, 2, texts), generator.integers(0, 3, texts)
    codes = np.stack([3.0 * mood - 1, -tense], 1)
    return codes, {"mood": [f"mood {value}" for value in mood], "tense": [f"tense {value}" for value in tense]}


def test_a_perfect_code_is_near_its_ceiling_and_far_from_its_floor():
    space, texts = worlds.given(*perfect())
    table = disentanglement(space, texts, seeds=2).table.set_index("metric")
    shown = ("model", "z sampled", "factors shuffled", "PCA", "factors as code")
    assert list(table.columns) == [name for code in shown for name in (code, f"{code}, s.d.")]
    for metric in ("mig", "dci_disentanglement", "dci_completeness", "explicitness", "z_diff"):
        assert table.loc[metric, "model"] == pytest.approx(table.loc[metric, "factors as code"], abs=0.03)
    for metric in ("mig", "dci_disentanglement", "explicitness"):
        assert table.loc[metric, "factors shuffled"] < 0.2 < 0.9 < table.loc[metric, "model"]


def test_it_is_the_scores_of_the_codes():
    codes, factors = perfect()
    space, texts = worlds.given(codes, factors)
    result = disentanglement(space, texts, seeds=2, seed=5)
    ids, names = texts.factor_ids()
    expected = disentanglement_scores(codes, ids, names, (5, 6), sampled=codes)
    expected = expected.set_index(["metric", "code"])["mean"]
    table = result.table.set_index("metric")
    for metric, code in expected.index:
        assert table.loc[metric, code] == expected[metric, code]
    assert "2 seeds from 5" in result.about and "mood, tense" in result.about


def test_means_far_within_the_noise_of_z_score_and_z_itself_does_not():
    codes, factors = perfect()

    class Dead(worlds.GivenCodes):
        """q is the prior but for 1e-4."""

        def sampled_codes(self, texts, seed=0):
            return 1e-4 * self.codes(texts) + np.random.default_rng(seed).standard_normal(codes.shape)

    _, texts = worlds.given(codes, factors)
    space = Dead(dict(zip(texts.texts, 1e-4 * codes, strict=True)))
    table = disentanglement(space, texts, seeds=1).table.set_index("metric")
    for metric in ("mig", "dci_disentanglement", "explicitness"):
        assert table.loc[metric, "z sampled"] < 0.2 < 0.9 < table.loc[metric, "model"]


def test_words_stand_beside_the_model_where_there_are_enough_of_them():
    codes, factors = perfect(120)
    texts = [f"{mood.replace(' ', '-')} {tense.replace(' ', '-')} number-{row}"
             for row, (mood, tense) in enumerate(zip(factors["mood"], factors["tense"], strict=True))]  # fmt: skip
    space = worlds.GivenCodes(dict(zip(texts, codes, strict=True)))
    known = Texts(tuple(texts), factors=pd.DataFrame(factors))
    assert disentanglement(space, known, seeds=1).table["PCA"].between(0, 1).all()
    wide = worlds.GivenCodes(dict(zip(texts, np.tile(codes, 200), strict=True)))  # 400 dimensions, 120 texts
    assert "PCA" not in disentanglement(wide, known, seeds=1).table


def test_some_factors_alone():
    codes, factors = perfect()
    space, texts = worlds.given(codes, factors | {"one": ["same"] * len(codes)})
    assert "mood, tense" in disentanglement(space, texts, factors=["mood", "tense"], seeds=1).about
    assert (
        "mood, tense, of each" in disentanglement(space, texts, seeds=1).about
    )  # of which all texts have one is left out
    with pytest.raises(InputError, match="'one' has a single value"):
        disentanglement(space, texts, factors=["mood", "one"], seeds=1)
    with pytest.raises(InputError, match="there is no factor 'voice': there are mood, tense, one"):
        disentanglement(space, texts, factors=["voice", "mood"])
    with pytest.raises(InputError, match="seeds must be at least 1"):
        disentanglement(space, texts, factors=["mood", "tense"], seeds=0)


@pytest.mark.parametrize("family", worlds.KINDS)
def test_every_family(family, tmp_path):
    texts = worlds.words(40)
    lengths = [str(min(len(text.split()), 3)) for text in texts]
    factors = pd.DataFrame({"length": lengths, "parity": [str(len(text) % 2) for text in texts]})
    result = disentanglement(worlds.space(family), Texts(texts, factors=factors), seeds=1)
    assert len(result.table) == 9 and result.table["model"].between(-1, 1).all()
    assert {path.name for path in result.save(tmp_path)} >= {"disentanglement.png", "disentanglement-scores.csv"}
