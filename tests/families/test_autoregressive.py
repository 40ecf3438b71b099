"""The control: its likelihood is exact, and is the sum of all its parts."""

from itertools import product

import torch
from tests.toy import BOS, padded, small_model, texts

from latentlm.evaluation.likelihood import score


def test_the_kl_is_zero_and_every_bound_is_exact():
    model = small_model("autoregressive")
    assert model.exact
    input_ids, mask = padded(texts(3, 9), [9, 5, 2], "right")
    nll = -model.log_likelihood(torch.zeros(3, 0), input_ids, mask).sum(-1)
    output = model(input_ids, mask)
    assert torch.equal(output.kl, torch.zeros(3)) and torch.equal(output.nll, nll)
    torch.testing.assert_close(output.loss, nll.sum() / 13)
    for samples in (1, 4):
        found = score(model, input_ids, mask, samples=samples)
        for name in ("elbo", "iw", "reconstruction", "prior"):
            torch.testing.assert_close(found[name].float(), nll)


def test_probabilities_of_all_texts_sum_to_one():
    """All 5³ texts of three tokens of five."""
    model = small_model("autoregressive", vocab_size=5)
    input_ids = torch.tensor([[BOS, *text] for text in product(range(5), repeat=3)])
    log_likelihood = model.log_likelihood(torch.zeros(125, 0), input_ids).sum(-1)
    assert abs(log_likelihood.double().exp().sum() - 1) < 1e-6
