"""`measure` is `evaluate` and what is asked for beside it, each under its own name."""

import pytest
from tests.toy import Rows, small_model, texts, three_verbs
from tests.training.runs import unchecked

from latentlm import InputError
from latentlm.evaluation.continuation import continuation
from latentlm.evaluation.likelihood import evaluate
from latentlm.evaluation.measure import measure
from latentlm.evaluation.published import published_figures
from latentlm.evaluation.samples import prior_samples
from latentlm.evaluation.steering import diversity, style_transfer

TIMES = {"seconds", "inference_seconds", "tokens_per_second", "continuation_seconds", "samples_per_second"}
OPTIONS = {"batch_size": 2, "seed": 5}


@pytest.fixture(scope="module")
def data():
    return Rows([row[:length] for row, length in zip(texts(4, 9), (9, 4, 7, 3), strict=True)])


@pytest.fixture(scope="module")
def model():
    return small_model("ltm", inference_steps=2)


def without_times(figures):
    return {key: value for key, value in figures.items() if key not in TIMES}


def test_without_a_wish_it_is_evaluate(model, data):
    found = measure(model, data, iw_samples=2, **OPTIONS)
    expected = evaluate(model, data, iw_samples=2, **OPTIONS)
    assert found.keys() == expected.keys()
    assert without_times(found) == without_times(expected)


def test_all_wishes_together_are_each_alone(model, data):
    found = measure(
        model,
        data,
        protocol="paper",
        iw_samples=3,
        prompt_tokens=2,
        reinfer_every=2,
        prior_samples=4,
        diversity=2,
        style_transfer=3,
        **OPTIONS,
    )
    expected = (
        evaluate(model, data, iw_samples=3, **OPTIONS)
        | published_figures(model, data, **OPTIONS)
        | {"protocol": "paper"}
        | continuation(model, data, prompt_tokens=2, reinfer_every=2, samples=3, **OPTIONS)
        | prior_samples(model, number=4, seed=OPTIONS["seed"])
        | diversity(model, data, prompts=2, prompt_tokens=2, seed=OPTIONS["seed"])
        | style_transfer(model, data, pairs=3, prompt_tokens=2, seed=OPTIONS["seed"])
    )
    assert found.keys() == expected.keys()
    assert without_times(found) == without_times(expected)


def test_the_papers_protocol_stands_beside_the_honest_figures(model, data):
    honest, paper = (measure(model, data, protocol=name, iw_samples=2) for name in ("honest", "paper"))
    assert (honest["protocol"], paper["protocol"]) == ("honest", "paper")
    assert paper.keys() - honest.keys() == {"published_nll_per_token", "published_perplexity"}
    shared = honest.keys() - TIMES - {"protocol"}
    assert {key: paper[key] for key in shared} == {key: honest[key] for key in shared}


def test_a_prompt_of_no_tokens_is_a_prompt(model, data):
    found = measure(model, data, iw_samples=1, prompt_tokens=0)
    assert (found["prompt_tokens"], found["continuation_tokens"]) == (0, found["tokens"])


def test_prompts_of_what_z_does_have_a_length_of_their_own(model, data):
    """And nothing is scored after a prompt that was not asked for."""
    found = measure(model, data, iw_samples=1, diversity=1, style_transfer=1)
    assert (found["diversity_prompt_tokens"], found["style_transfer_prompt_tokens"]) == (4, 4)
    assert "continuation_nll_per_token" not in found
    found = measure(model, data, iw_samples=1, diversity=1, style_transfer=1, prompt_tokens=0)
    assert (found["diversity_prompt_tokens"], found["style_transfer_prompt_tokens"]) == (0, 0)
    assert found["prompt_tokens"] == 0


@pytest.mark.parametrize(
    "options, words",
    [
        ({"reinfer_every": 4}, "give prompt_tokens"),
        ({"prompt_tokens": -1}, "must not be negative"),
        ({"prompt_tokens": 2, "reinfer_every": 0}, "at least 1"),
        ({"prompt_tokens": 8}, "no sequence is longer than the prompt of 8 tokens"),
        ({"prior_samples": -1}, "must not be negative"),
        ({"diversity": -1}, "diversity must not be negative"),
        ({"style_transfer": -1}, "style_transfer must not be negative"),
        ({"diversity": 3}, "3 different texts longer than the prompt of 4 tokens are needed, and the data has 2"),
        ({"style_transfer": 3}, "3 different texts longer than the prompt of 4 tokens are needed, and the data has 2"),
        ({"iw_samples": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(model, data, options, words):
    with pytest.raises(InputError, match=words):
        measure(model, data, **{"iw_samples": 1, **options})


def test_an_unknown_protocol_is_refused(model, data):
    with unchecked(), pytest.raises(InputError, match="protocol must be honest or paper, not fancy"):
        measure(model, data, protocol="fancy")


def test_what_a_family_cannot_do_is_one_sentence(data):
    for options, words in (
        ({"protocol": "paper"}, "no published protocol"),
        ({"prior_samples": 2}, "does not write"),
        ({"diversity": 1}, "does not write"),
        ({"style_transfer": 1}, "does not write"),
    ):
        with pytest.raises(InputError, match=words):
            measure(three_verbs(), data, iw_samples=1, **options)


@pytest.mark.parametrize("family", ["ltm", "autoregressive"])
def test_a_model_that_diverged_has_no_figures(data, family):
    model = small_model(family)
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="diverged"):
        measure(model, data, iw_samples=1)
