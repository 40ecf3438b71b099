"""Autocorrelation and power against dense algebra, linear probes against scikit-learn, the probe on each posterior."""

import json
import math

import numpy as np
import pytest
import torch
from tests.command import assert_one_sentence, run
from tests.probing.small_space import some_texts, space_of
from tests.toy import small_variant
from tests.training.runs import trained, unchecked

from latentlm.distributions import RBF, GaussianProcess, Matern, White
from latentlm.errors import InputError
from latentlm.probing import Texts
from latentlm.probing.probes.trajectory import (
    autocorrelation,
    blocks_of,
    octaves,
    of_blocks,
    prior_autocorrelation,
    prior_octaves,
    told,
    trajectory,
)

POSTERIORS = [
    "gp_vae",
    "diagonal gp_vae",
    "white gp_vae",
    "attention gp_vae",
    "gradient gp_vae",
    "gp_vae of ragged text",
]


def process(times: int, kernel=None) -> GaussianProcess:
    kernel = Matern(1.5, [1.0, 5.0], [0.5, 2.0]) if kernel is None else kernel
    return GaussianProcess(kernel, torch.arange(times, dtype=torch.float64), 4, torch.tensor([0.2, 0.05]))


def covariance(prior: GaussianProcess, dimension: int) -> np.ndarray:
    """K + nugget of one dimension, an entry at a time."""
    group = dimension // (prior.dim // prior.groups)
    times = prior.times.tolist()
    with torch.no_grad():
        return np.array(
            [
                [
                    float(prior.kernel(torch.tensor(a - b, dtype=torch.float64))[group])
                    + (float(prior.nugget[group]) if a == b else 0)
                    for b in times
                ]
                for a in times
            ]
        )


# ---- figures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_priors_autocorrelation_is_its_covariances():
    prior = process(9)
    found = prior_autocorrelation(prior, [0, 1, 4])
    for dimension in range(4):
        k = covariance(prior, dimension)
        np.testing.assert_allclose(found[dimension], [1, k[0, 1] / k[0, 0], k[0, 4] / k[0, 0]], rtol=1e-10)


@torch.no_grad()
def test_samples_of_the_prior_have_its_autocorrelation_and_its_power():
    torch.manual_seed(0)
    prior = process(12)
    z = prior.rsample((8000,))
    for lag in (1, 3, 8):
        np.testing.assert_allclose(autocorrelation(z, lag), prior_autocorrelation(prior, [lag])[:, 0], atol=0.03)
    np.testing.assert_allclose(octaves(z)[1], prior_octaves(prior), rtol=0.1, atol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("times", [1, 2, 3, 8, 13])
def test_the_priors_power_is_that_of_its_dense_covariance(times):
    prior = process(times, RBF([1.0, 3.0], [1.0, 0.3]))
    names, _ = octaves(torch.zeros(1, times, 1))
    found = prior_octaves(prior)
    for dimension in range(4):
        waves = np.exp(-2j * np.pi * np.outer(np.arange(times), np.arange(times)) / times)
        power = np.real(np.diag(waves @ covariance(prior, dimension) @ waves.conj().T)) / times**2
        folded = [min(f, times - f) for f in range(times)]  # a frequency and its negative
        octave = [0 if f == 0 else 1 + int(math.log2(f)) for f in folded]
        expected = [sum(power[f] for f in range(times) if octave[f] == place) for place in range(len(names))]
        np.testing.assert_allclose(found[:, dimension], expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(0), prior.variance[0], rtol=1e-10)


def test_a_wave_is_in_its_octave():
    times = torch.arange(16) * 2 * math.pi
    z = torch.stack([1 + 0 * times, (times / 16).cos(), (times / 5.34).cos(), (times / 2).cos()], -1)[None].double()
    names, parts = octaves(z)
    assert names == ["constant", "16", "5–8", "2–4", "2"]
    np.testing.assert_allclose(parts.sum(0), z.square().mean((0, 1)), rtol=1e-10)  # Parseval
    assert parts.argmax(0).tolist() == [0, 1, 2, 4]
    assert parts[1, 1] == pytest.approx(0.5)


def test_told_is_what_scikit_learn_says():
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    tokens = torch.randint(4, (60, 5))
    features = torch.nn.functional.one_hot(tokens, 4).float() + 0.7 * torch.randn(60, 5, 4)
    fitted = 40
    x, y, split = features.flatten(0, 1).numpy(), tokens.flatten().numpy(), fitted * 5
    x = (x - x[:split].mean(0)) / x[:split].std(0)
    model = LogisticRegression(C=1 / (2e-4 * split), tol=1e-8, max_iter=2000).fit(x[:split], y[:split])
    own = -model.predict_log_proba(x[split:])[np.arange(100), y[split:]].mean()
    frequencies = (np.bincount(y[:split], minlength=4) + 1) / (split + 4)
    expected = -np.log(frequencies[y[split:]]).mean() - own
    assert told(features, tokens, 4, fitted) == pytest.approx(expected, abs=2e-3)


def test_told_is_all_of_what_is_there_and_nothing_of_noise():
    torch.manual_seed(0)
    tokens = torch.randint(6, (200, 5))
    exact = torch.nn.functional.one_hot(tokens, 6).float()
    assert told(exact, tokens, 6, 130) == pytest.approx(math.log(6), abs=0.03)
    assert told(torch.randn(200, 5, 3), tokens, 6, 130) < 0.01


@pytest.mark.parametrize("ahead", [-2, 0, 1])
def test_what_z_knows_of_the_token_k_places_on_is_found_there(ahead):
    from latentlm.probing.probes.trajectory import _ahead

    blocks = torch.randint(6, (150, 11), generator=torch.Generator().manual_seed(0))
    means = torch.nn.functional.one_hot(blocks[:, 1:].roll(-ahead, 1), 6).float()
    found = _ahead(blocks, means, frequent=6, seed=0).set_index("k")
    assert found.index.tolist() == [-2, -1, 0, 1, 2]
    assert found.loc[ahead, "of z_t"] == pytest.approx(math.log(6), abs=0.05)
    assert found["of z_t"].drop(ahead).max() < 0.02
    assert found["of another text's z_t"].max() < 0.02
    # of a token of which one in six is told apart, the rest being one
    rest = _ahead(blocks, means, frequent=1, seed=0).set_index("k").loc[ahead, "of z_t"]
    assert rest == pytest.approx(math.log(6) / 6 + 5 / 6 * math.log(6 / 5), abs=0.1)


# ---- texts of one length ---------------------------------------------------------------------------------------------


def test_texts_are_cut_to_the_length_that_keeps_the_most_tokens():
    space = space_of("gp_vae")
    texts = Texts(("w3", "w4 w5 w6 w7", "w8 w9 w10", "w11 w12 w13 w14 w15"))
    # with EOS 2, 5, 4 and 6 tokens: 4 · 2, 3 · 4, 2 · 5 or 1 · 6 of them
    assert blocks_of(space, texts).tolist() == [[0, 4, 5, 6, 7], [0, 8, 9, 10, 1], [0, 11, 12, 13, 14]]
    assert blocks_of(space, texts, 2).tolist() == [[0, 3, 1], [0, 4, 5], [0, 8, 9], [0, 11, 12]]
    assert blocks_of(space, texts, 40).shape == (0, 41)


def test_cut_texts_are_inferred_as_they_are_cut():
    space = space_of("attention gp_vae")  # whose encoder sees the whole text
    long = Texts(tuple(f"{text} w3 w4 w5" for text in some_texts(6, least=4, most=4).texts))
    short = torch.tensor([[0, *(int(word[1:]) for word in text.split()[:4])] for text in long.texts])
    found = trajectory(space, long, length=4)
    expected = of_blocks(space.model, short)
    assert found.table.equals(expected.table)


# ---- the probe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", POSTERIORS)
def test_every_posterior_is_probed(variant):
    space = space_of(variant)
    result = trajectory(space, some_texts(12))
    table = result.table
    assert sorted(table["dimension"]) == [0, 1, 2, 3]
    assert table["kl per text"].is_monotonic_decreasing
    np.testing.assert_allclose(table["power, prior"], 1, rtol=1e-6)
    assert np.isfinite(table.drop(columns="lengthscale").to_numpy()).all()
    assert np.isfinite(result.details["told of tokens"].to_numpy()).all()
    powers = result.details["power by octave"].groupby("dimension")[["mean", "sample", "prior"]].sum()
    for place, kind in enumerate(("mean", "sample", "prior")):
        assert powers.to_numpy()[:, place] == pytest.approx(table.sort_values("dimension")[f"power, {kind}"].to_numpy())
    result.figure()


@torch.no_grad()
def test_kl_and_lengthscales_are_the_models():
    space = space_of("gp_vae")
    blocks = blocks_of(space, some_texts(9), 3)
    table = of_blocks(space.model, blocks, batch_size=2).table.sort_values("dimension")
    kl = space.model.infer(blocks).kl().mean(0)
    np.testing.assert_allclose(table["kl per text"], kl, rtol=1e-4)
    np.testing.assert_allclose(table["lengthscale"], [1, 1, 4, 4], rtol=1e-5)
    np.testing.assert_allclose(table["nugget share"], 0.1 / 1.1, rtol=1e-5)


def test_a_white_prior_has_no_lengthscale_and_no_autocorrelation():
    prior = GaussianProcess(White(), torch.arange(5, dtype=torch.float64), 2, 1.0)
    assert prior_autocorrelation(prior, [0, 1]).tolist() == [[1, 0], [1, 0]]
    assert trajectory(space_of("white gp_vae"), some_texts(6)).table["lengthscale"].isna().all()


def test_so_many_texts_are_looked_at_and_samples_are_of_the_seed():
    space, texts = space_of("gp_vae"), some_texts(20, least=4)
    few = trajectory(space, texts, length=4, most=8)
    assert "8 texts of 4 tokens" in few.about
    assert few.table.equals(trajectory(space, texts.select(range(8)), length=4).table)
    other = trajectory(space, texts, length=4, most=8, seed=1)
    assert other.table["kl per text"].equals(few.table["kl per text"])
    assert not other.table["power, sample"].equals(few.table["power, sample"])


@pytest.mark.parametrize("text", ["", "w3"])
def test_texts_of_one_or_two_tokens_are_no_mistake(text):
    result = trajectory(space_of("gp_vae"), Texts((text, "w4" if text else "", "w5" if text else "", text)))
    assert result.details["told of tokens"]["k"].tolist() == [0]
    assert len(result.details["autocorrelation"]) == 1 + bool(text)
    result.figure()


@pytest.mark.parametrize("variant, texts, options, words", [
    ("gpt_vae", some_texts(5), {}, "GPTVAE has no latent for each token"),
    ("ltm", some_texts(5), {}, "LTM has no latent for each token"),
    ("gp_vae", Texts(("w3 w4",)), {}, "at least 3 texts of 3 tokens or more, and there are 1"),
    ("gp_vae", some_texts(5), {"length": 30}, "at least 3 texts of 30 tokens or more, and there are 0"),
    ("gp_vae", some_texts(5), {"length": 0}, "must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_probed_is_refused(variant, texts, options, words):
    with pytest.raises(InputError, match=words):
        trajectory(space_of(variant), texts, **options)


def test_latents_that_are_not_finite_are_refused():
    model = small_variant("diagonal gp_vae")
    with torch.no_grad():
        model.encoder.mean.bias.fill_(math.inf)
    with pytest.raises(Exception, match="finite"):
        trajectory(space_of("", model=model), some_texts(5))


def test_the_command_leaves_table_and_picture(tmp_path):
    with unchecked():
        status, _, err = run("probe", "trajectory", str(trained("gp_vae")), "--data", "builtin:sentences", "--limit",
                             "20", "--length", "6", "--output", str(tmp_path / "out"))  # fmt: skip
        assert status in (0, None), err
        found = json.loads((tmp_path / "out" / "trajectory.json").read_text())
        assert [row["lag"] for row in found["autocorrelation"]] == [0, 1, 2, 4]
        assert (tmp_path / "out" / "trajectory.png").stat().st_size > 10_000
        status, _, err = run("probe", "trajectory", str(trained("gp_vae")), "--data", "builtin:sentences", "--limit",
                             "2")  # fmt: skip
    assert_one_sentence(status, err)
