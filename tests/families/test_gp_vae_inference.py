"""The KL of GP-VAE's trajectories, what is said of them, and inference by steps."""

import math

import pytest
import torch
from tests.toy import Rows, moved, padded, small_model, small_variant, texts
from transformers import AutoModel

from latentlm import InputError
from latentlm.evaluation.likelihood import evaluate, score
from latentlm.evaluation.statistics import LatentStatistics

LENGTHS = [8, 5, 2, 6]
LENGTHS = [8, 5, 2, 6]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WHITENED = {"posterior": "whitened", "inference_steps": 2}


def model_of(**changes):
    return moved(small_model("gp_vae", **changes))


@pytest.mark.parametrize("per", ["dimension", "latent"])
def test_free_bits(per):
    input_ids, mask = padded(texts(4, 8), LENGTHS, "left")
    kl = model_of().infer(input_ids, mask).kl().detach()
    assert kl.shape == (4, 4)  # of each dimension, over all times
    parts = kl if per == "dimension" else kl.sum(1, keepdim=True)
    nats = float(parts.median())
    assert (parts < nats).any() and (parts > nats).any()
    output = model_of(free_bits=nats, free_bits_per=per).train()(input_ids, mask, seed=0)
    expected = (output.nll.sum() + parts.clamp_min(nats).sum()) / sum(length - 1 for length in LENGTHS)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.kl, kl.sum(1))  # raw


def test_a_threshold_pushes_the_kl_from_either_side():
    input_ids, found = texts(3, 7), {}
    for nats in (1e-3, 1e6):
        model = model_of(kl_threshold=nats).train()
        output = model(input_ids, seed=0)
        torch.testing.assert_close(output.loss, (output.nll.sum() + (output.kl - nats).abs().sum()) / 18)
        output.loss.backward()
        found[nats] = model.encoder.log_variance.bias.grad.clone()
    model.zero_grad()
    (model.infer(input_ids).kl().sum() / 18).backward()
    of_kl = model.encoder.log_variance.bias.grad
    torch.testing.assert_close(found[1e-3] - found[1e6], 2 * of_kl, atol=1e-5, rtol=1e-4)
    assert of_kl.abs().max() > 1e-3


def test_a_controller_changes_the_weight_of_the_kl():
    model = model_of(kl_target=5.0, beta=0.5).train()
    betas = []
    for kl in (50.0, 50.0, 0.1):
        output = model(texts(3, 7), seed=0)
        torch.testing.assert_close(output.loss, (output.nll + model.beta * output.kl).sum() / 18)
        betas.append(model.beta)
        model.observe_kl(kl)
    assert betas[0] < betas[1] < betas[2] > model.beta
    torch.testing.assert_close(output.kl, model.infer(texts(3, 7)).kl().sum(1))  # raw


@torch.no_grad()
@pytest.mark.parametrize("name", ["gp_vae", "diagonal gp_vae", "gradient gp_vae", "white gp_vae"])
def test_the_statistics_have_the_kl_of_each_dimension(name):
    model, input_ids = small_variant(name), texts(6, 7)
    statistics = LatentStatistics()
    for part in input_ids.split(4):
        q, prior = model.infer(part), model.prior(len(part), 6)
        statistics.add(q, prior, q.rsample())
    found = statistics.summary()
    expected = model.infer(input_ids).kl().mean(0)
    assert found["kl_per_dimension"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert found["latent_units"] == 6 * 4


@torch.no_grad()
def test_texts_of_another_length_are_not_compared():
    """Each text keeps its place among those that are."""
    model, statistics = model_of(), LatentStatistics(6)
    rows, mask = padded(texts(4, 7), [4, 7, 7, 7], "right")
    q = model.infer(rows, mask)
    statistics.add(q, model.prior(4, torch.tensor([3, 6, 6, 6])), q.rsample(), torch.tensor([-1, 2, 0, 1]))
    assert statistics.count == 3
    assert statistics.compared[0][3].tolist() == [2, 0, 1]
    torch.testing.assert_close(statistics.compared[0][0].mean, q.mean[1:])


def test_a_shorter_last_block_is_left_out_of_the_statistics_and_ragged_text_has_none():
    model, ids = model_of(), texts(12, 9)
    rows = [*ids]
    names = ("active_units", "latent_units", "mutual_information", "kl_per_dimension", "aggregate_kl")
    names += ("aggregate_mean_rms", "aggregate_variance_ratio", "mutual_information_sequences")
    whole = evaluate(model, Rows(rows), iw_samples=1)
    assert whole["latent_units"] == 8 * 4 and whole["mutual_information_sequences"] == 12
    for size in (1, 5, 32):
        found = evaluate(model, Rows([rows[0], ids[3, :4], *rows[1:]]), iw_samples=1, batch_size=size)
        for name in names:
            assert found[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
        assert found["tokens"] == 12 * 8 + 3
    ragged = evaluate(model, Rows([row[: 4 + place % 3] for place, row in enumerate(rows)]), iw_samples=1)
    assert all(ragged[name] is None for name in names)
    assert math.isfinite(ragged["elbo_nll_per_token"])


# ---- inference by steps ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_gradient_steps_raise_the_bound_of_each_text():
    model = model_of(inference="gradient", **{**WHITENED, "inference_steps": 0})
    rows, mask = padded(texts(4, 8), LENGTHS, "left")
    torch.testing.assert_close(model.infer(rows, mask).kl(), torch.zeros(4, 4), atol=1e-5, rtol=0)  # the prior
    before = score(model, rows, mask, samples=64)["elbo"]
    model.change_inference(inference_steps=12, inference_lr=0.3)
    found = score(model, rows, mask, samples=64)
    assert (found["elbo"] < before - 0.1).all()
    assert (found["kl"] > 0.1).all()
    with pytest.raises(InputError, match="inference_step does not say how a GPVAE infers"):
        model.change_inference(inference_step=3)


def test_a_model_of_another_posterior_takes_no_steps():
    with pytest.raises(InputError, match="set posterior to whitened"):
        model_of().change_inference(inference="gradient")


@pytest.mark.parametrize("inference", ["cooperative", "gradient", "langevin"])
def test_whoever_takes_steps_trains_what_it_has(inference):
    model = model_of(inference=inference, **WHITENED).train()
    rows, mask = padded(texts(4, 8), LENGTHS, "right")
    model(rows, mask, seed=0).loss.backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert {"kernel.log_lengthscale", "kernel.log_variance", "log_nugget", "embed_tokens.weight"} <= names
    encoder = {name for name, _ in model.named_parameters() if name.startswith("encoder.")}
    assert bool(encoder) == (inference == "cooperative") and encoder <= names


def test_langevin_s_latents_belong_to_their_text():
    model, input_ids = model_of(inference="langevin", **WHITENED).train(), texts(4, 8)
    for side in ("left", "right"):
        together = model(*padded(input_ids, LENGTHS, side, total=10), seed=2)
        assert together.kl is None and torch.isfinite(together.latents).all()
        for row, length in enumerate(LENGTHS):
            alone = model(input_ids[row : row + 1, :length], seed=2)
            torch.testing.assert_close(together.latents[row, : length - 1], alone.latents[0], atol=1e-4, rtol=1e-4)
            assert not together.latents[row, length - 1 :].any()


def test_inference_can_be_changed_and_is_saved_as_it_was(tmp_path):
    model, input_ids = model_of(inference="cooperative", **WHITENED), texts(3, 6)
    before = model.infer(input_ids).mean
    model.change_inference(inference_steps=6)
    assert not torch.allclose(model.infer(input_ids).mean, before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path).infer(input_ids).mean, before, **CLOSE)
    model.change_inference(inference="amortised")
    mean, log_variance = model.encode(input_ids)
    expected = model.posterior(mean, log_variance, model.prior(3, 5)).mean
    torch.testing.assert_close(model.infer(input_ids).mean, expected)
