"""The predictive distribution against slow sums, enumeration, `continuation`; calibration against tables by hand."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tests.command import assert_one_sentence, prepare, run
from tests.toy import BOS, VARIANTS, Rows, grid_model, padded, prior_latents, small_model, small_variant, texts
from tests.training.runs import unchecked

from latentlm import InputError
from latentlm.distributions import Stream, sequence_keys
from latentlm.evaluation.calibration import (
    calibration,
    log_predictive,
    plot_calibration,
    position_ranges,
    reliability,
)
from latentlm.evaluation.continuation import continuation

LENGTHS = (9, 4, 7, 3, 12, 5)


@pytest.fixture(scope="module")
def rows():
    """Texts of 2 to 11 tokens after BOS."""
    ids = texts(len(LENGTHS), max(LENGTHS))
    return [ids[row, :length] for row, length in enumerate(LENGTHS)]


# ---- the predictive distribution -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prompt", [0, 2])
def test_it_is_the_mixture_with_weights_of_the_text_so_far(rows, prompt):
    """Σ_k w_k(t) p(v | z_k, x_<t), one text, place and sample at a time, in float64 and without logarithms."""
    model, samples = small_model("gpt_vae"), 3
    ids, mask = padded(texts(len(LENGTHS), max(LENGTHS)), [*LENGTHS], "right")
    found = log_predictive(model, ids, mask, prompt_tokens=prompt, samples=samples, seed=5)
    for index, row in enumerate(rows):
        seen = row[None, : prompt + 1]
        law = model.infer(seen, seed=5) if prompt else model.prior(1, len(row) - 1)
        keys = sequence_keys(seen if prompt else row[None])
        drawn = model.draw_latents(law, keys, samples, seed=5, stream=Stream.CONTINUATION)
        tables = [model.decode(z, row[None])[0].double().softmax(-1).numpy() for z in drawn]
        for t in range(prompt, len(row) - 1):
            weights = [math.prod(table[s, row[s + 1]] for s in range(prompt, t)) for table in tables]
            mixture = sum(w * table[t] for w, table in zip(weights, tables, strict=True)) / sum(weights)
            np.testing.assert_allclose(found[index, t - prompt].exp().numpy(), mixture, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [(name, 2 * (place % 2)) for place, name in enumerate(sorted(VARIANTS))] + [("ltm", 0), ("ltm", 2)],
)
def test_nll_of_all_positions_is_that_of_the_continuation(rows, name, prompt):
    model = small_variant(name)
    given = {"prompt_tokens": prompt, "samples": 3, "seed": 4, "batch_size": 4}
    found, expected = calibration(model, Rows(rows), **given), continuation(model, Rows(rows), **given)
    assert found["tokens"] == expected["continuation_tokens"]
    assert found["predictive_nll_per_token"] == pytest.approx(expected["continuation_nll_per_token"], rel=2e-6)
    by_position = found["nll_by_position"]
    total = sum(n * nll for n, nll in zip(by_position["tokens"], by_position["nll_nats"], strict=True))
    assert total == pytest.approx(expected["continuation_nll_per_token"] * found["tokens"], rel=2e-6)


def test_over_all_continuations_of_a_tiny_vocabulary_it_sums_to_one():
    """Π_t p̂(x_t | x_<t) over all 5³ continuations of one prompt: the weights make a law of them."""
    model = grid_model(5)
    ids = torch.tensor([[BOS, 3, *rest] for rest in itertools.product(range(5), repeat=3)])
    mask = torch.ones_like(ids)
    found = log_predictive(model, ids, mask, prompt_tokens=1, samples=4).double()
    assert torch.allclose(found.exp().sum(-1), torch.ones(125, 3).double(), atol=1e-5)
    of_texts = found.gather(-1, ids[:, 2:, None])[..., 0].sum(-1).exp()
    assert float(of_texts.sum()) == pytest.approx(1, abs=1e-5)
    # a mean of probabilities without the weights is another law
    drawn = log_predictive(model, ids, mask, prompt_tokens=1, samples=1).double()
    assert not torch.allclose(drawn, found, atol=0.01)


@torch.no_grad()
def test_many_samples_reach_the_sum_over_all_latents():
    """p(x_t | x_<t) = Σ_z p(z | x_<t) p(x_t | z, x_<t), over the 25 points of a grid, z from the prior."""
    model = grid_model(6)
    ids = torch.tensor([[BOS, 3, 4, 3, 5], [BOS, 5, 5, 2, 3]])
    points = model.points[:, None].expand(-1, 2, -1)
    tables = model.decode(points, ids).double().log_softmax(-1)
    chosen = tables.gather(-1, ids[:, 1:, None].expand(25, 2, 4, 1))[..., 0]
    before = torch.nn.functional.pad(chosen.cumsum(-1)[..., :-1], (1, 0))
    weights = (model.prior_logits.double().log_softmax(-1)[:, None, None] + before).softmax(0)
    expected = (weights[..., None] * tables.exp()).sum(0)
    found = log_predictive(model, ids, torch.ones_like(ids), samples=4000).exp().double()
    assert torch.allclose(found, expected, atol=0.02)
    assert not torch.allclose(found, tables.exp().mean(0), atol=0.02)


@torch.no_grad()
def test_an_exact_model_has_its_own_distribution(rows):
    model = small_model("autoregressive")
    ids = rows[0][None]
    expected = model.decode(prior_latents(model, ids), ids).log_softmax(-1)
    assert torch.allclose(log_predictive(model, ids, torch.ones_like(ids), samples=9), expected, atol=1e-6)


def test_what_comes_later_does_not_matter(rows):
    """z of a prompt and weights of the text so far: another ending changes nothing before it."""
    model = small_model("ltm", inference_steps=2)
    one = rows[4][None]
    other = one.clone()
    other[0, 8:] = torch.tensor([3, 3, 3, 3])
    mask = torch.ones_like(one)
    found, changed = (log_predictive(model, ids, mask, prompt_tokens=3, samples=3) for ids in (one, other))
    assert torch.allclose(found[:, :5], changed[:, :5], atol=1e-5)
    assert not torch.allclose(found[:, 5:], changed[:, 5:], atol=1e-2)


@pytest.mark.parametrize("family", ["ltm", "gp_vae", "autoregressive"])
def test_neither_batch_nor_order_changes_a_figure(rows, family):
    model = small_model(family)
    given = {"prompt_tokens": 1, "samples": 2}
    whole = calibration(model, Rows(rows), batch_size=6, **given)
    single = calibration(model, Rows(rows[::-1]), batch_size=1, **given)
    for key in ("predictive_nll_per_token", "predictive_entropy_nats", "mean_confidence", "expected_calibration_error"):
        assert single[key] == pytest.approx(whole[key], rel=1e-5)
    assert single["nll_by_position"]["nll_nats"] == pytest.approx(whole["nll_by_position"]["nll_nats"], rel=1e-5)


def test_ties_stay_in_the_data_s_order():
    """Of a uniform model every probability is the same: bins of equal mass are then stretches of the data."""
    model = grid_model(4)
    model.output.zero_()
    model.previous.zero_()
    rows = [torch.tensor([BOS, *[0] * 4, *[3] * 20]), torch.tensor([BOS, 3]), torch.tensor([BOS, *[3] * 25])]
    right = torch.cat([row[1:] == 0 for row in rows]).numpy()
    expected = reliability(np.full(len(right), 0.25), right)["adaptive_calibration_error"]
    by_length = reliability(np.full(len(right), 0.25), np.concatenate([right[24:25], right[:24], right[25:]]))
    assert expected != pytest.approx(by_length["adaptive_calibration_error"])
    found = calibration(model, Rows(rows), samples=1, batch_size=1)
    assert found["adaptive_calibration_error"] == pytest.approx(expected, rel=1e-6)
    assert found["predictive_entropy_nats"] == pytest.approx(math.log(4), rel=1e-6)


# ---- its calibration -------------------------------------------------------------------------------------------------


def test_a_table_made_by_hand():
    """Two bins: (0, ½] with 0.25, 0.5 of which one is right, and (½, 1] with 0.75, 1, 1 of which two are."""
    confidence = np.array([0.25, 1.0, 0.5, 0.75, 1.0])
    correct = np.array([False, True, True, False, True])
    found = reliability(confidence, correct, bins=2)
    assert found["reliability"] == [
        {"from": 0.0, "to": 0.5, "tokens": 2, "confidence": 0.375, "accuracy": 0.5},
        {"from": 0.5, "to": 1.0, "tokens": 3, "confidence": pytest.approx(2.75 / 3), "accuracy": pytest.approx(2 / 3)},
    ]
    assert found["expected_calibration_error"] == pytest.approx((2 * 0.125 + 0.75) / 5)
    # by number: (0.25, 0.5, 0.75) of which one is right, and (1, 1), both right
    assert found["adaptive_calibration_error"] == pytest.approx((1.5 - 1) / 5)
    assert (found["accuracy"], found["mean_confidence"]) == (0.6, 0.7)


def test_bins_hold_their_upper_edge_and_the_last_one_holds_certainty():
    confidence = np.array([1 / 15, 1 / 15 + 1e-9, 1.0, 1.0 + 1e-7, 1e-12])
    found = reliability(confidence, np.ones(5, dtype=bool))["reliability"]
    assert [(round(15 * row["from"]), row["tokens"]) for row in found] == [(0, 2), (1, 1), (14, 2)]


def test_a_calibrated_predictor_has_no_error_and_one_that_is_too_sure_has_its_excess():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.2, 0.8, 200_000)
    correct = generator.uniform(size=200_000) < confidence
    good, bad = reliability(confidence, correct), reliability(confidence + 0.2, correct)
    for error in ("expected_calibration_error", "adaptive_calibration_error"):
        assert good[error] < 0.01
        assert bad[error] == pytest.approx(0.2, abs=0.005)


def test_one_token():
    found = reliability(np.array([0.7]), np.array([False]))
    assert found["expected_calibration_error"] == pytest.approx(0.7)
    assert found["adaptive_calibration_error"] == pytest.approx(0.7)


def test_nothing_is_refused():
    with pytest.raises(InputError, match="no token"):
        reliability(np.array([]), np.array([], dtype=bool))
    with pytest.raises(InputError, match="no sequence is longer"):
        calibration(grid_model(), Rows([]))
    with pytest.raises(InputError, match="longer than the prompt of 9"):
        calibration(grid_model(), Rows([torch.tensor([BOS, 3])]), prompt_tokens=9)
    with pytest.raises(InputError, match="at least 1"):
        calibration(grid_model(), Rows([torch.tensor([BOS, 3])]), samples=0)


def test_a_diverged_model_is_refused(rows):
    model = small_model("autoregressive")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(InputError, match="diverged"):
        calibration(model, Rows(rows))


def test_a_text_of_one_token():
    model = grid_model()
    found = calibration(model, Rows([torch.tensor([BOS, 3])]), samples=2)
    assert found["nll_by_position"]["position"] == [1]
    assert found["nll_by_position"]["tokens"] == [1]
    assert found["nll_by_position"]["nll_nats"] == [found["predictive_nll_per_token"]]


def test_entropy_and_accuracy_are_those_of_the_probabilities(rows):
    """An exact model in numpy, float64."""
    model = small_model("autoregressive")
    entropy, correct, sure, number = 0.0, 0, 0.0, 0
    for row in rows:
        with torch.no_grad():
            p = model.decode(prior_latents(model, row[None]), row[None])[0].double().softmax(-1).numpy()
        entropy -= (p * np.log(p)).sum()
        correct += (p.argmax(-1) == row[1:].numpy()).sum()
        sure += p.max(-1).sum()
        number += len(p)
    found = calibration(model, Rows(rows))
    assert found["predictive_entropy_nats"] == pytest.approx(entropy / number, rel=1e-5)
    assert found["accuracy"] == pytest.approx(correct / number)
    assert found["mean_confidence"] == pytest.approx(sure / number, rel=1e-5)


def test_positions_count_from_the_text_s_beginning(rows):
    found = calibration(grid_model(), Rows(rows), prompt_tokens=3, samples=1)["nll_by_position"]
    assert found["position"] == list(range(4, 12))
    assert found["tokens"] == [sum(length > t for length in LENGTHS) for t in range(4, 12)]


def test_ranges_double_and_weigh_by_tokens():
    ranges = position_ranges({"position": [4, 5, 6, 7], "nll_nats": [1.0, 2.0, 5.0, 7.0], "tokens": [9, 2, 1, 1]})
    assert ranges == [
        {"first": 4, "last": 4, "nll_nats": 1.0, "tokens": 9},
        {"first": 5, "last": 6, "nll_nats": pytest.approx(3.0), "tokens": 3},
        {"first": 7, "last": 7, "nll_nats": 7.0, "tokens": 1},
    ]


def test_the_picture(rows, tmp_path):
    figures = calibration(grid_model(), Rows(rows), samples=2)
    plot_calibration(figures, tmp_path / "c.png", "model $_ with a name")
    picture = imread(tmp_path / "c.png")
    assert picture.shape[1] > 800
    assert picture[..., :3].std() > 0.05


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    with unchecked():
        yield tmp_path


@pytest.mark.parametrize("model, family", [("model", "LTM"), ("control", "Autoregressive")])
def test_the_command(folder, model, family):
    given = ("--data", "texts.txt", "--prompt-tokens", "2", "--samples", "2", "--seed", "3")
    status, out, err = run("evaluate", "calibration", model, *given, "--json", "c.json", "--plot", "c.png")
    assert (status, err) == (0, "")
    assert "expected calibration error" in out
    figures = json.loads((folder / "c.json").read_text())
    assert list(figures)[:3] == ["task", "model", "family"]
    assert list(figures)[-1] == "seed"
    assert (figures["task"], figures["model"], figures["family"], figures["seed"]) == ("calibration", model, family, 3)
    assert figures["exact"] == (model == "control")
    assert imread(folder / "c.png").size


@pytest.mark.parametrize(
    "wrong",
    [
        ("--plot", "c.jpg"),
        ("--plot", "nowhere/c.png"),
        ("--prompt-tokens", "2000"),
        ("--data", "empty.txt"),
        ("--data", "binary.txt"),
        ("--set", "inference_steps"),
    ],
)
def test_mistakes_are_one_sentence(folder, wrong):
    data = () if "--data" in wrong else ("--data", "texts.txt")
    status, _, err = run("evaluate", "calibration", "model", *data, *wrong)
    assert_one_sentence(status, err)


def test_help_has_an_example(folder):
    status, out, _ = run("evaluate", "calibration", "--help")
    assert status == 0
    assert "Example: latentlm evaluate calibration " in " ".join(out.split())
