"""Continuation NLL against enumeration, a slow loop, and models that do not care what z was inferred from."""

import math

import pytest
import torch
from tests.toy import BOS, Rows, grid_model, prior_latents, small_model, texts, three_verbs
from torch.utils.data import Subset

from latentlm import InputError
from latentlm.distributions import Stream, sequence_keys
from latentlm.evaluation.continuation import continuation

LENGTHS = (9, 4, 7, 3, 12, 5)


@pytest.fixture(scope="module")
def rows():
    """Texts of 2 to 11 tokens after BOS."""
    ids = texts(len(LENGTHS), max(LENGTHS))
    return [ids[row, :length] for row, length in enumerate(LENGTHS)]


def nats(found):
    return found["continuation_nll_per_token"] * found["continuation_tokens"]


def parts(length, prompt, every):
    """Begin and end of each part of a text of `length` scored tokens."""
    while prompt < length:
        end = length if every is None else min(prompt + every, length)
        yield prompt, end
        prompt = end


def law_of(model, seen, length):
    return model.infer(seen, seed=0) if seen.shape[1] > 1 else model.prior(1, length)


# ---- what it estimates -----------------------------------------------------------------------------------------------


def enumerated(model, row, prompt, every):
    """−log Σ_z q(z | seen) p(part | z, seen) over all 25 z, summed over the parts."""
    total = 0.0
    for begin, end in parts(len(row) - 1, prompt, every):
        q = law_of(model, row[None, : begin + 1], len(row) - 1)
        points = model.points[:, None]
        log_likelihood = model.log_likelihood(points, row[None, : end + 1])[:, 0, begin:].double().sum(-1)
        total -= float((q.log_probabilities[0].double() + log_likelihood).logsumexp(0))
    return total


@pytest.mark.parametrize("prompt, every", [(0, None), (2, None), (2, 2)])
def test_many_samples_reach_the_sum_over_all_latents(rows, prompt, every):
    model = grid_model()
    rows = [row[: 4 + prompt] for row in rows]
    # the prior's draws are those of BOS, the same for all texts, so their errors do not average out
    samples = 500 if prompt else 2000
    found = continuation(model, Rows(rows), prompt_tokens=prompt, reinfer_every=every, samples=samples)
    expected = sum(enumerated(model, row, prompt, every) for row in rows)
    assert nats(found) == pytest.approx(expected, abs=0.3)
    # what a mean per token, or a z for each token, would give is another figure
    if every is None:
        assert abs(sum(enumerated(model, row, prompt, 1) for row in rows) - expected) > 1


def test_few_samples_are_a_bound_in_expectation(rows):
    """Over 12 seeds of K = 2, the NLL is above the enumerated one, and falls with K."""
    model = grid_model()
    few, more = (
        [nats(continuation(model, Rows(rows), prompt_tokens=2, samples=k, seed=seed)) for seed in range(12)]
        for k in (2, 8)
    )
    exact = sum(enumerated(model, row, 2, None) for row in rows)
    assert sum(few) / 12 > sum(more) / 12 + 0.1 > exact


@torch.no_grad()
@pytest.mark.parametrize("prompt, every", [(0, 4), (2, None), (3, 1), (3, 100)])
@pytest.mark.parametrize(
    "make", [lambda: small_model("ltm", inference_steps=1), three_verbs], ids=["ltm", "three verbs"]
)
def test_it_is_what_a_slow_loop_gives(rows, make, prompt, every):
    """One text, one part and one sample at a time, with no padding."""
    model, samples = make(), 3
    total, tokens = 0.0, 0
    for row in rows:
        for begin, end in parts(len(row) - 1, prompt, every):
            seen, upto = row[None, : begin + 1], row[None, : end + 1]
            law = law_of(model, seen, len(row) - 1)
            keys = sequence_keys(seen if begin else row[None])  # from the prior, texts that begin alike differ
            drawn = model.draw_latents(law, keys, samples, seed=0, stream=Stream.CONTINUATION)
            each = [float(model.log_likelihood(z, upto)[0, begin:].double().sum()) for z in drawn]
            total -= math.log(sum(math.exp(one - max(each)) for one in each) / samples) + max(each)
            tokens += end - begin
    found = continuation(model, Rows(rows), prompt_tokens=prompt, reinfer_every=every, samples=samples, batch_size=4)
    assert found["continuation_tokens"] == tokens
    assert nats(found) == pytest.approx(total, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("every", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("prompt", [0, 3])
def test_an_exact_model_has_its_own_likelihood_however_often_z_is_inferred(rows, prompt, every):
    model = small_model("autoregressive")
    expected = -sum(
        float(model.log_likelihood(prior_latents(model, row[None]), row[None])[0, prompt:].sum()) for row in rows
    )
    found = continuation(model, Rows(rows), prompt_tokens=prompt, reinfer_every=every, samples=7)
    assert nats(found) == pytest.approx(expected, rel=1e-5)
    assert found["continuation_samples"] == 1


def test_a_latent_that_nothing_listens_to_needs_no_samples(rows):
    """p(x | z) = p(x): every K and every scheme gives the one figure."""
    model = grid_model()
    model.output.zero_()
    options = [{"samples": 1}, {"samples": 50}, {"reinfer_every": 2, "samples": 3, "seed": 9}]
    found = [nats(continuation(model, Rows(rows), prompt_tokens=2, **given)) for given in options]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


# ---- what it may see -------------------------------------------------------------------------------------------------


class Listening:
    """Keeps the texts that `infer` is given, without padding, and asks what was drawn for them."""

    def __init__(self, model, monkeypatch):
        self.asked = []
        infer = model.infer

        def listen(input_ids, attention_mask=None, *args, **options):
            for row, mask in zip(input_ids, attention_mask, strict=True):
                self.asked.append(tuple(row[mask.bool()].tolist()))
            return infer(input_ids, attention_mask, *args, **options)

        monkeypatch.setattr(model, "infer", listen)


@pytest.mark.parametrize("every", [None, 1, 3, 4])
def test_each_part_is_inferred_from_exactly_what_stands_before_it(rows, every, monkeypatch):
    model = grid_model()
    listening = Listening(model, monkeypatch)
    continuation(model, Rows(rows), prompt_tokens=2, reinfer_every=every, samples=1, batch_size=1)
    assert sorted(listening.asked) == sorted(
        tuple(row[: begin + 1].tolist()) for row in rows for begin, _ in parts(len(row) - 1, 2, every)
    )


def test_without_a_prompt_the_first_z_is_the_priors(rows, monkeypatch):
    model = grid_model()
    listening = Listening(model, monkeypatch)
    continuation(model, Rows(rows), prompt_tokens=0, samples=1)
    assert listening.asked == []
    continuation(model, Rows(rows), prompt_tokens=0, reinfer_every=6, samples=1)
    assert {len(text) for text in listening.asked} >= {7} and min(map(len, listening.asked)) > 1


def test_what_follows_a_part_leaves_its_score_alone():
    """A text that is cut after a part has that part's nats; its other nats do not depend on what stands there."""
    model = small_model("ltm")
    one, other = texts(2, 12, seed=1)
    other[:8] = one[:8]  # BOS and seven tokens in common: a prompt of 3, one part of 4, and then they differ
    assert not torch.equal(one, other)
    options = {"prompt_tokens": 3, "reinfer_every": 4, "samples": 3}
    cut, *whole = (nats(continuation(model, Rows([row]), **options)) for row in (one[:8], one, other))
    rest = [nats(continuation(model, Rows([row]), **{**options, "prompt_tokens": 7})) for row in (one, other)]
    assert [total - after for total, after in zip(whole, rest, strict=True)] == pytest.approx([cut] * 2, abs=1e-4)
    assert abs(whole[0] - whole[1]) > 0.1


# ---- what must change nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("family", ["ltm", "autoregressive"])
def test_batches_order_and_padding_change_nothing(rows, family, every):
    model = small_model(family, **({"inference_steps": 1} if family == "ltm" else {}))
    data = Rows(rows)

    def figure(sequences, batch_size):
        found = continuation(
            model, sequences, prompt_tokens=2, reinfer_every=every, samples=2, batch_size=batch_size, seed=4
        )
        return found["continuation_nll_per_token"]

    expected = figure(data, 1)
    assert [figure(data, size) for size in (4, 100)] == pytest.approx([expected] * 2, rel=1e-5)
    assert figure(Subset(data, [4, 0, 5, 2, 1, 3]), 4) == pytest.approx(expected, rel=1e-5)


def test_the_seed_changes_the_draws_of_latents_and_nothing_of_a_control(rows):
    for family, same in (("ltm", False), ("autoregressive", True)):
        found = [continuation(small_model(family), Rows(rows), prompt_tokens=1, seed=seed) for seed in (0, 0, 1)]
        figures = [one["continuation_nll_per_token"] for one in found]
        assert figures[0] == figures[1]
        assert (figures[0] == figures[2]) is same


def test_texts_no_longer_than_the_prompt_are_left_out(rows):
    model = grid_model()
    found = continuation(model, Rows(rows), prompt_tokens=4, samples=2)
    assert found["continuation_tokens"] == sum(length - 5 for length in LENGTHS if length > 5) == 4 + 2 + 7
    longer = Rows([row for row in rows if len(row) > 5])
    alone = continuation(model, longer, prompt_tokens=4, samples=2)
    assert found["continuation_nll_per_token"] == alone["continuation_nll_per_token"]


def test_the_model_stays_as_it_was(rows):
    model = small_model("ltm").train()
    state = torch.get_rng_state()
    continuation(model, Rows(rows), prompt_tokens=2, samples=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- how it is asked -------------------------------------------------------------------------------------------------


def test_it_says_how_it_was_asked_and_tells_of_its_progress(rows):
    told = []
    found = continuation(
        grid_model(),
        Rows(rows),
        prompt_tokens=4,
        reinfer_every=2,
        samples=3,
        batch_size=2,
        on_progress=lambda *step: told.append(step),
    )
    assert (found["prompt_tokens"], found["reinfer_every"], found["continuation_samples"]) == (4, 2, 3)
    assert found["continuation_seconds"] > 0
    assert told == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"prompt_tokens": -1}, "must not be negative"),
        ({"prompt_tokens": 1, "samples": 0}, "at least 1"),
        ({"prompt_tokens": 1, "reinfer_every": 0}, "at least 1"),
        ({"prompt_tokens": 1, "batch_size": 0}, "at least 1"),
        ({"prompt_tokens": 11}, "no sequence is longer than the prompt of 11 tokens"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(rows, options, words):
    with pytest.raises(InputError, match=words):
        continuation(grid_model(), Rows(rows), **options)


def test_texts_of_bos_alone_have_nothing_to_foretell():
    with pytest.raises(InputError, match="no sequence is longer"):
        continuation(grid_model(), Rows([torch.tensor([BOS])]), prompt_tokens=0)
