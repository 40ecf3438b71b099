"""Every sequence is in one batch, and the model is afterwards as it was."""

import pytest
import torch
from tests.toy import PAD, Rows, small_model, texts
from torch import nn

from latentlm import InputError
from latentlm.evaluation.batches import evaluating, in_batches

LENGTHS = (5, 2, 9, 2, 7)


@pytest.fixture
def data():
    return Rows([row[:length] for row, length in zip(texts(5, 9), LENGTHS, strict=True)])


@pytest.fixture
def model():
    return small_model("autoregressive")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_each_sequence_is_in_one_batch_with_its_own_tokens(model, data, size):
    seen = []
    for indices, input_ids, mask, _ in in_batches(model, data, size):
        assert len(indices) == len(input_ids) <= size
        for index, row, real in zip(indices, input_ids, mask.bool(), strict=True):
            assert torch.equal(row[real], data[index]["input_ids"])
            assert (row[~real] == PAD).all()
        seen += indices
    assert sorted(seen) == list(range(5))


def test_neighbours_are_of_similar_length(model, data):
    found = [[LENGTHS[index] for index in indices] for indices, _, _, _ in in_batches(model, data, 2)]
    assert found == [[2, 2], [5, 7], [9]]


def test_progress_is_told_after_each_batch(model, data):
    told = []
    for number, _ in enumerate(in_batches(model, data, 2, lambda *step: told.append(step))):
        assert len(told) == number  # the batch that is being worked on is not done
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_a_model_without_a_padding_token_pads_with_anything(data):
    batches = list(in_batches(small_model("autoregressive", pad_token_id=None), data, 5))
    assert [int(mask.sum()) for _, _, mask, _ in batches] == [sum(LENGTHS)]


@pytest.mark.parametrize("size, rows, words", [(0, 5, "batch_size"), (-1, 5, "batch_size"), (2, 0, "empty")])
def test_what_cannot_be_batched_is_one_sentence(model, data, size, rows, words):
    with pytest.raises(InputError, match=words):
        next(in_batches(model, Rows(data.rows[:rows]), size))


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_is_afterwards_in_its_own_mode(model, fails):
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    frozen.eval()
    before = [module.training for module in model.modules()]
    assert {True, False} == set(before)
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == before
