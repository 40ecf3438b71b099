"""MAUVE of the real package against the formula on histograms known by hand, and features one text at a time."""

import builtins
import itertools

import numpy as np
import pytest
import torch
from tests.toy import BOS, EOS, VARIANTS, pretrained_part, small_model, small_variant

from latentlm import InputError
from latentlm.data.tokenizers import load_tokenizer
from latentlm.evaluation.generative import Reader
from latentlm.evaluation.mauve_score import check_mauve, features, mauve
from latentlm.evaluation.writing import documents

READERS = sorted(
    name for name, (family, _) in VARIANTS.items() if family in ("autoregressive", "gpt_vae", "huggingface", "ltm")
)


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(pretrained_part("gpt2"))


def at_two_places(ones: int, others: int) -> torch.Tensor:
    return torch.cat([torch.tensor([[1.0, 0.0]]).expand(ones, 2), torch.tensor([[0.0, 1.0]]).expand(others, 2)])


def by_formula(p: np.ndarray, q: np.ndarray, c: float = 5.0) -> float:
    """Area under (exp −c KL(q ‖ r), exp −c KL(p ‖ r)) over mixtures r, at the same 25 mixtures, as the mean of both
    ways of integrating it."""
    curve = [(0.0, 1.0)]
    for weight in np.linspace(1e-6, 1 - 1e-6, 25):
        r = weight * p + (1 - weight) * q
        curve.append(tuple(np.exp(-c * np.sum(one * np.log(np.where(one > 0, one / r, 1)))) for one in (q, p)))
    curve.append((1.0, 0.0))

    def area(points):
        points = sorted(points)
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))

    return (area(curve) + area([(y, x) for x, y in curve])) / 2


@pytest.mark.parametrize("people, written", [((15, 5), (5, 15)), ((10, 10), (18, 2)), ((4, 16), (5, 15))])
def test_two_clusters_by_the_formula(people, written):
    found = mauve(at_two_places(*people), at_two_places(*written))
    assert found["mauve_clusters"] == 2
    assert (found["mauve_people_texts"], found["mauve_written_texts"]) == (20, 20)
    expected = by_formula(np.array(people) / 20, np.array(written) / 20)
    assert found["mauve"] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("counts", [(20, 0), (10, 10), (3, 17)])
def test_equal_histograms_have_one(counts):
    assert mauve(at_two_places(*counts), at_two_places(*counts))["mauve"] == 1


def test_the_same_texts_and_texts_that_share_nothing():
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(60, 5, generator=generator)
    assert mauve(people, people)["mauve"] == pytest.approx(1.0)
    assert mauve(people + 30, people * 0.1 - 30)["mauve"] < 0.01


@pytest.mark.parametrize("seed", [0, 7, -3, 2**63 - 1])
def test_a_seed_repeats_it(seed):
    generator = torch.Generator().manual_seed(0)
    people, written = torch.randn(60, 5, generator=generator), torch.randn(80, 5, generator=generator)
    one, again = mauve(people, written, seed=seed), mauve(people, written, seed=seed)
    assert one == again
    assert 0 < one["mauve"] < 1 and one["mauve_clusters"] == 6


def test_less_than_two_texts():
    with pytest.raises(InputError, match="at least 2"):
        mauve(torch.randn(5, 3), torch.randn(1, 3))


@pytest.mark.parametrize("name", READERS)
def test_features_are_the_last_state_of_each_text_by_itself(name, words):
    model = small_variant(name, eos_token_id=EOS)
    rows = [[5, 6, 7, 8], [9], [10, EOS, 4], [11, 12], [13] * 70]  # the last beyond the context
    texts = [documents(row, [EOS], words) for row in rows]
    found = features(Reader(model, words), [*texts[:2], ("",), *texts[2:]], batch_size=2)
    expected = []
    for row in rows:
        text = torch.tensor([[BOS, *row]])[:, : model.config.max_position_embeddings]
        with torch.no_grad():
            if name in ("huggingface", "phi of huggingface"):
                states = model.language_model(text, output_hidden_states=True).hidden_states[-1]
            else:
                z = model.infer(text, torch.ones_like(text)).mean
                states = model.hidden_states(z, text, torch.ones_like(text))
        expected.append(states[0, -1])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-4)


def test_a_reader_that_does_not_see_how_texts_end_is_refused(words):
    reader = Reader(small_model("autoregressive"), words)  # of a context of 32
    short, long = documents([5] * 9, [EOS], words), documents([5] * 60, [EOS], words)
    assert len(features(reader, [short, long])) == 2
    with pytest.raises(InputError, match="reads 32 tokens, and 2 of 3 texts are longer"):
        features(reader, [short, long, long])


def test_no_text_has_no_features(words):
    assert not len(features(Reader(small_model("autoregressive"), words), [("",)]))


@pytest.mark.parametrize("family, changes", [("gp_vae", {}), ("lang_vae", {"annotation_labels": ["A", "B"]})])
def test_models_without_such_states(family, changes, words):
    with pytest.raises(InputError, match="gives no features"):
        check_mauve(Reader(small_model(family, **changes), words))


def test_without_the_package_it_says_how_to_get_it(monkeypatch, words):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "mauve":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'latentlm\[mauve\]'"):
        check_mauve(Reader(small_model("autoregressive"), words))
