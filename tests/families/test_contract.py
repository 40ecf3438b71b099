"""What every family owes the contract, and what follows from it. `model` is each family and variant in turn."""

import math
from dataclasses import fields

import pytest
import torch
from tests import toy
from tests.family_names import FAMILY_NAMES
from tests.toy import (
    VARIANTS,
    VOCABULARY,
    padded,
    prior_latents,
    small_config,
    small_model,
    small_variant,
    texts,
    three_verbs,
)
from torch.distributions import kl_divergence
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from latentlm import InputError, LatentLM
from latentlm.causal_lm import CausalLatentLM
from latentlm.distributions import Stream, noise_shape, sample_from_noise, sequence_keys, sequence_noise
from latentlm.evaluation.likelihood import score
from latentlm.families import FAMILIES, HuggingFaceLM
from latentlm.inference import infer_by_gradient

LENGTHS = [9, 6, 2, 4]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32: sums of 16 numbers about 1, in another order


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    """The name of each family and of each variant in turn."""
    return request.param


@pytest.fixture
def model(variant):
    return small_variant(variant)


@pytest.fixture(params=sorted(name for name, kind in FAMILIES.items() if issubclass(kind, CausalLatentLM)))
def causal_family(request) -> str:
    """The name of each family with an autoregressive decoder in turn."""
    return request.param


def figures(output):
    return torch.stack([output.nll] if output.kl is None else [output.nll, output.kl])  # samples have no KL


def gradients(model):
    """Zero for what a value does not depend on (an encoder, given z)."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_every_family_is_tested():
    assert set(toy._OF_FAMILY) == set(FAMILIES) == set(FAMILY_NAMES)


# ---- decode and log_likelihood ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "samples"), [("none", (3,)), ("left", ()), ("left", (2, 3)), ("right", (3,))])
def test_log_likelihood_is_decode_and_softmax(model, side, samples):
    input_ids, mask = texts(4, 9), None
    if side != "none":
        input_ids, mask = padded(input_ids, LENGTHS, side)
    latents = prior_latents(model, input_ids, *samples)
    logits = model.decode(latents, input_ids, mask)
    assert logits.shape == (*samples, 4, 8, VOCABULARY)
    found = model.log_likelihood(latents, input_ids, mask)
    assert found.shape == (*samples, 4, 8)
    expected = torch.zeros(*samples, 4, 8)
    probabilities = logits.double().softmax(-1)
    for row in range(4):
        for t in range(8):
            if mask is None or (mask[row, t] and mask[row, t + 1]):
                expected[..., row, t] = probabilities[..., row, t, input_ids[row, t + 1]].log().float()
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(LatentLM.log_likelihood(model, latents, input_ids, mask), expected, **CLOSE)
    if mask is not None:
        assert torch.equal(found == 0, (~model.scored_tokens(input_ids, mask)).expand_as(found))


class Doubled(torch.nn.Linear):
    """A projection that is more than its weight, as one with an adapter is."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_an_adapted_projection_is_scored_as_it_decodes(causal_family):
    model = small_model(causal_family, tie_word_embeddings=False)
    adapted = Doubled(model.config.hidden_size, VOCABULARY, bias=False)
    adapted.weight = model.lm_head.weight
    model.lm_head = adapted
    input_ids = texts(2, 6)
    latents = prior_latents(model, input_ids)
    expected = LatentLM.log_likelihood(model, latents, input_ids)
    torch.testing.assert_close(model.log_likelihood(latents, input_ids), expected, **CLOSE)


@pytest.mark.parametrize(("side", "length"), [("none", 1), ("none", 2), ("none", 9), ("left", 9), ("right", 9)])
def test_likelihood_of_a_text_is_the_log_likelihood_for_every_latent(model, side, length):
    """However often it is asked, with gradients of latents, and of samples."""
    input_ids, mask = texts(4, length), None
    if side != "none":
        input_ids, mask = padded(input_ids, [min(one, length) for one in LENGTHS], side)
    model.eval()
    likelihood = model.likelihood_of(input_ids, mask)
    for seed, samples in ((0, ()), (1, ()), (2, (3,))):
        latents = prior_latents(model, input_ids, *samples, seed=seed).requires_grad_()
        found, expected = likelihood(latents), model.log_likelihood(latents, input_ids, mask)
        assert torch.equal(found, expected)
        if latents.numel() and length > 1:
            gradients = [torch.autograd.grad(one.sum(), latents)[0] for one in (found, expected)]
            torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["log_likelihood", "hidden_states"])
@pytest.mark.parametrize("how", ["of a subclass", "of an instance"])
def test_likelihood_of_asks_what_somebody_put_in_its_place(name, how):
    kind = type(small_model("ltm"))
    asked = []

    def other(self, *args):
        asked.append(name)
        return getattr(kind, name)(self, *args)

    model = small_model("ltm")
    if how == "of a subclass":
        model.__class__ = type("Other", (kind,), {name: other})
    else:
        setattr(model, name, lambda *args: other(model, *args))
    likelihood = model.likelihood_of(texts(2, 6))
    latents = prior_latents(model, texts(2, 6))
    assert torch.equal(likelihood(latents), small_model("ltm").log_likelihood(latents, texts(2, 6)))
    assert asked == [name]


def test_samples_are_decoded_one_by_one(model):
    input_ids, mask = padded(texts(4, 9), LENGTHS, "right")
    latents = prior_latents(model, input_ids, 3)
    together = model.decode(latents, input_ids, mask)
    apart = torch.stack([model.decode(z, input_ids, mask) for z in latents])
    torch.testing.assert_close(together, apart, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(model, side):
    input_ids = texts(4, 9)
    rows, mask = padded(input_ids, LENGTHS, side, total=12)
    latents = prior_latents(model, input_ids)
    logits = model.decode(latents, rows, mask)
    for row, length in enumerate(LENGTHS):
        alone = model.decode(latents[row : row + 1], input_ids[row : row + 1, :length])[0]
        place = slice(0, length - 1) if side == "right" else slice(12 - length, 11)
        torch.testing.assert_close(logits[row, place], alone, **CLOSE)


def test_scored_tokens_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    expected = [[True, True, False], [False, False, True], [False] * 3, [False] * 3]
    assert LatentLM.scored_tokens(mask, mask).tolist() == expected
    assert LatentLM.scored_tokens(mask).all()


def test_a_batch_of_one_and_a_text_of_one_token(model):
    input_ids = texts(4, 2)
    output = model(input_ids)
    for row in range(4):
        torch.testing.assert_close(figures(model(input_ids[row : row + 1]))[:, 0], figures(output)[:, row], **CLOSE)
    assert model.log_likelihood(output.latents, input_ids).shape == (4, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_without_scored_tokens_costs_nothing(model, side):
    """BOS alone and nothing but padding, beside a text."""
    input_ids, mask = padded(texts(3, 6), [6, 1, 0], side)
    output = model(input_ids, mask)
    assert output.nll[1:].tolist() == [0, 0]
    alone = model(texts(3, 6)[:1])
    torch.testing.assert_close(figures(output)[:, 0], figures(alone)[:, 0], **CLOSE)
    torch.testing.assert_close(output.loss, alone.loss + output.kl[1:].sum() / 5, **CLOSE)
    model.train().zero_grad()
    model(input_ids, mask).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bos_alone(model):
    """A batch in which nothing is scored: inference that starts at the prior stays there, and nothing is NaN."""
    input_ids = texts(3, 1)
    output = model(input_ids)
    assert output.nll.tolist() == [0, 0, 0]
    if not any(name.startswith(("encoder", "start")) for name, _ in model.named_parameters()):
        torch.testing.assert_close(output.kl, torch.zeros(3), atol=1e-5, rtol=0)
    assert torch.isfinite(output.loss)
    assert model.decode(output.latents, input_ids).shape == (3, 0, VOCABULARY)


def test_latents_for_other_rows_are_refused(model):
    with pytest.raises(InputError, match="do not fit 4 sequences"):
        model.log_likelihood(prior_latents(model, texts(3, 6)), texts(4, 6))


def test_the_past_alone_enters(model):
    """Token t, changed to any other, changes its own log-likelihood and later ones, and none before."""
    input_ids = texts(1, 10)
    latents = prior_latents(model, input_ids)
    before = model.log_likelihood(latents, input_ids)[0]
    for t in range(1, 10):
        changed = input_ids.clone()
        changed[0, t] = (input_ids[0, t] + 5) % VOCABULARY
        after = model.log_likelihood(latents, changed)[0]
        assert torch.equal(after[: t - 1], before[: t - 1])
        assert after[t - 1] != before[t - 1]


@pytest.mark.parametrize(
    "attention, window, layers",
    [("sdpa", 1, 2), ("sdpa", 2, 1), ("sdpa", 4, 2), ("sdpa", 3, 3), ("sdpa", None, 2), ("eager", 4, 2)],
)
def test_the_sliding_window_limits_what_is_seen(causal_family, attention, window, layers):
    """A state depends on its layers · (window − 1) + 1 last tokens, and on each of them."""
    model = small_model(
        causal_family, sliding_window=window, num_hidden_layers=layers, attn_implementation=attention
    ).double()
    input_ids = texts(1, 14)
    latents = prior_latents(model, input_ids)
    reach = 13 if window is None else layers * (window - 1) + 1
    before = model.decode(latents, input_ids)[0, -1]
    for t in range(13):
        changed = input_ids.clone()
        changed[0, t] = (input_ids[0, t] + 5) % VOCABULARY
        seen = not torch.equal(model.decode(latents, changed)[0, -1], before)
        assert seen == (t >= 13 - reach)


def test_gradients_in_latents_by_finite_differences(variant):
    model = small_variant(variant).double()
    input_ids, mask = padded(texts(3, 7), [7, 4, 2], "left")
    latents = prior_latents(model, input_ids).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: model.log_likelihood(z, input_ids, mask), latents, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda z: model.decode(z, input_ids, mask)[mask[:, 1:].bool()], latents, fast_mode=True
    )


def test_gradients_in_weights_by_finite_differences(variant):
    model = small_variant(variant, num_hidden_layers=1).double()
    input_ids, mask = padded(texts(2, 6), [6, 3], "right")
    latents = prior_latents(model, input_ids).double()
    names = [name for name, _ in model.named_parameters()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) for weight in weights]
    for direction, parameter in zip(along, model.parameters(), strict=True):
        direction.mul_(parameter.requires_grad)  # what is frozen stays where it is
    tied = {"lm_head.weight": "embed_tokens.weight"}

    def value(step):
        moved = {name: w + step * a for name, w, a in zip(names, weights, along, strict=True)}
        moved |= {name: moved[source] for name, source in tied.items() if source in moved}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(moved[name])
        return model.log_likelihood(latents, input_ids, mask).sum()

    slope = (value(1e-6) - value(-1e-6)).detach() / 2e-6
    value(0.0).backward()
    ours = sum((g * a).sum() for g, a in zip(gradients(model), along, strict=True))
    torch.testing.assert_close(ours, slope, rtol=1e-7, atol=1e-7)


def test_eager_and_sdpa_attention_agree(variant):
    input_ids, mask = padded(texts(4, 9), LENGTHS, "left")
    sdpa, eager = (small_variant(variant, attn_implementation=name) for name in ("sdpa", "eager"))
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    latents = prior_latents(sdpa, input_ids)
    torch.testing.assert_close(
        sdpa.log_likelihood(latents, input_ids, mask), eager.log_likelihood(latents, input_ids, mask), **CLOSE
    )


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*VARIANTS, "own"])
def test_forward_is_the_elbo_by_hand(name):
    model = three_verbs() if name == "own" else small_variant(name)
    input_ids, mask = padded(texts(4, 9), LENGTHS, "right")
    output = model(input_ids, mask, seed=5)
    posterior, prior = model.infer(input_ids, mask, seed=5), model.prior(4, torch.tensor(LENGTHS) - 1)
    noise = sequence_noise(sequence_keys(input_ids, mask), noise_shape(posterior), seed=5, stream=Stream.SCORE)
    latents = sample_from_noise(posterior, noise)
    nll = [
        -model.log_likelihood(latents, input_ids, mask)[row, : length - 1].sum() for row, length in enumerate(LENGTHS)
    ]
    kl = kl_divergence(posterior, prior)
    assert torch.equal(output.latents, latents) and torch.equal(output.posterior_mean, posterior.mean)
    torch.testing.assert_close(output.nll, torch.stack(nll), **CLOSE)
    torch.testing.assert_close(output.kl, kl, **CLOSE)
    torch.testing.assert_close(output.loss, (sum(nll) + kl.sum()) / sum(length - 1 for length in LENGTHS), **CLOSE)
    assert output.logits is None


@pytest.mark.parametrize(("side", "training"), [("left", False), ("right", True)])
def test_padding_and_order_change_no_figure(variant, model, side, training):
    if training and variant == "batch norm":
        pytest.skip("a text's q then depends on its batch, as documented")
    model.train(training)
    input_ids = texts(4, 9)
    whole = model(*padded(input_ids, LENGTHS, side, total=11), seed=3)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(*padded(input_ids[order], [LENGTHS[i] for i in order], side), seed=3)
    tolerance = {"atol": 1e-4, "rtol": 1e-5}  # four steps of Adam on float32 gradients
    torch.testing.assert_close(figures(whole)[:, order], figures(shuffled), **tolerance)
    torch.testing.assert_close(whole.latents[order], shuffled.latents, **tolerance)
    for row, length in enumerate(LENGTHS):
        alone = model(input_ids[row : row + 1, :length], seed=3)
        torch.testing.assert_close(figures(whole)[:, row], figures(alone)[:, 0], **tolerance)


def test_accumulation_is_the_whole_batch(variant):
    """Losses and gradients of unequal parts, given the tokens of all, add up to the whole's."""
    if variant == "batch norm":
        pytest.skip("a text's q depends on its part of the batch, as documented")
    input_ids, mask = padded(texts(4, 9), LENGTHS, "right")
    tokens = int(LatentLM.scored_tokens(input_ids, mask).sum())
    model = small_variant(variant, free_bits=0.01, beta=0.7).train()

    def loss_and_gradients(parts, **options):
        model.zero_grad()
        losses = [model(input_ids[part], mask[part], seed=3, **options).loss for part in parts]
        sum(losses).backward()
        return [sum(losses).detach(), *gradients(model)]

    whole = loss_and_gradients([slice(0, 4)])
    for number in (tokens, torch.tensor(tokens)):
        parts = loss_and_gradients([slice(0, 1), slice(1, 4)], num_items_in_batch=number)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_seeds(model):
    """Evaluation repeats itself; training draws from torch's generator; a given seed decides everything."""
    input_ids = texts(3, 7)
    before = torch.get_rng_state()
    assert torch.equal(model(input_ids).loss, model(input_ids).loss)
    assert torch.equal(model(input_ids).loss, model(input_ids, seed=0).loss)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model(input_ids, seed=1).loss, model(input_ids).loss) == model.exact
    model.train()
    torch.manual_seed(0)
    first, second = model(input_ids).loss, model(input_ids).loss
    torch.manual_seed(0)
    assert torch.equal(model(input_ids).loss, first)
    assert torch.equal(first, second) == model.exact
    assert torch.equal(model(input_ids, seed=4).loss, model(input_ids, seed=4).loss)


def test_beta_and_free_bits_are_for_training():
    model = three_verbs(beta=0.5, beta_warmup=0.5, free_bits=0.3)
    model.dropout.p = 0.0
    input_ids = texts(4, 5)
    output = model(input_ids)
    torch.testing.assert_close(output.loss, (output.nll + output.kl).sum() / 16)
    posterior = model.infer(input_ids)
    kl = 0.5 * (posterior.mean**2 + posterior.variance - 1 - posterior.variance.log())
    assert (kl < 0.3).any() and (kl > 0.3).any()
    model.train()
    for progress, beta in [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (1.0, 0.5)]:
        model.training_progress.fill_(progress)
        assert model.beta == beta
        output = model(input_ids, seed=0)
        torch.testing.assert_close(output.loss, (output.nll.sum() + beta * kl.clamp_min(0.3).sum()) / 16)
        torch.testing.assert_close(output.kl, kl.sum(1))  # raw


def test_every_charge_for_the_kl_enters_the_loss_of_training():
    input_ids = texts(4, 5)
    for changes, charged in [
        ({"free_bits": 0.6, "free_bits_per": "latent"}, lambda kl: kl.sum(1).clamp_min(0.6)),
        ({"kl_threshold": 1.5, "beta": 0.5}, lambda kl: (kl.sum(1) - 1.5).abs()),
    ]:
        model = three_verbs(**changes)
        model.dropout.p = 0.0
        posterior = model.train().infer(input_ids)
        kl = 0.5 * (posterior.mean**2 + posterior.variance - 1 - posterior.variance.log())
        output = model(input_ids, seed=0)
        expected = (output.nll.sum() + changes.get("beta", 1.0) * charged(kl).sum()) / 16
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(output.kl, kl.sum(1))  # raw


def test_schedules_of_beta():
    model = three_verbs(beta=0.5, beta_cycles=2, beta_cycle_ratios=[0.5, 0.25, 0.25])
    for progress, beta in [(-0.5, 0), (0, 0), (0.25, 0), (0.3125, 0.25), (0.4, 0.5), (0.5, 0), (1, 0.5)]:
        model.training_progress.fill_(progress)
        assert model.beta == pytest.approx(beta)
    model = three_verbs(beta=0.5, kl_target=2.0)
    assert model.beta == pytest.approx(0.005)
    model.observe_kl(20.0)
    assert model.beta == pytest.approx(0.005 * 1.03)
    model.training_progress.fill_(-0.5)
    model.observe_kl(20.0)  # an encoder that is pre-trained is not controlled
    assert model.beta == 0
    model.training_progress.fill_(0.5)
    assert model.beta == pytest.approx(0.005 * 1.03)


def test_a_bfloat16_model(variant):
    """Finite, KL and log-likelihoods in float32, and near the float32 model's."""
    model = small_variant(variant)
    input_ids, mask = padded(texts(4, 9), LENGTHS, "left")
    latents = prior_latents(model, input_ids)
    expected = model.log_likelihood(latents, input_ids, mask)
    model = model.to(torch.bfloat16)
    found = model.log_likelihood(latents, input_ids, mask)
    output = model(input_ids, mask)
    for tensor in (found, output.loss, output.nll, output.kl, output.latents, output.posterior_mean):
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all()
    # bfloat16 keeps 8 bits: states about 1 err by 0.01 and logits, sums of 16 products, by a few times that
    assert (found - expected).abs().max() < 0.15
    assert (found - expected).abs().sum() / mask[:, 1:].sum() < 0.05
    model.train()(input_ids, mask).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.requires_grad)


def test_autocast(model):
    """Mixed precision: float32 weights get float32 gradients near those without it."""
    input_ids, mask = padded(texts(4, 9), LENGTHS, "right")
    latents = prior_latents(model, input_ids)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            log_likelihood = model.log_likelihood(latents, input_ids, mask)
            output = model(input_ids, mask)
        assert log_likelihood.dtype == output.kl.dtype == torch.float32
        log_likelihood.sum().backward()
        found.append(torch.cat([gradient.flatten() for gradient in gradients(model)]))
    assert found[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.999


# ---- configuration and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [AutoModel, AutoModelForCausalLM], ids=["AutoModel", "AutoModelForCausalLM"])
def test_a_saved_model_gives_the_same_figures(model, load, tmp_path):
    if load is AutoModelForCausalLM and not isinstance(model, CausalLatentLM):
        pytest.skip("no causal model")
    if isinstance(model, HuggingFaceLM):
        pytest.skip("is saved as a plain model of transformers: test_huggingface.py")
    model.training_progress.fill_(0.37)
    input_ids, mask = padded(texts(4, 9), LENGTHS, "right")
    model.save_pretrained(tmp_path)
    loaded = load.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(loaded.training_progress, torch.tensor(0.37))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    before, after = model(input_ids, mask), loaded(input_ids, mask)
    # not to the last digit: kernels sum in another order what is aligned otherwise in memory
    torch.testing.assert_close(figures(before), figures(after), **CLOSE)
    ours, theirs = model.config.to_dict(), AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= {"_name_or_path", "architectures", "dtype"}


def test_a_new_model_is_at_the_beginning_of_training(model):
    assert model.training_progress.item() == 0


@pytest.mark.parametrize(
    "typo, field", [("hiden_size", "hidden_size"), ("beta_warm_up", "beta_warmup"), ("freebits", "free_bits")]
)
def test_a_misspelt_key_names_the_nearest(family, typo, field):
    if field not in {f.name for f in fields(FAMILIES[family].config_class)}:
        pytest.skip("a field of other families")
    with pytest.raises(InputError, match=f"no field '{typo}': did you mean {field}?"):
        small_config(family, **{typo: 1})


def test_a_key_like_no_other_lists_the_fields(family):
    with pytest.raises(InputError, match=r"its fields are .*vocab_size"):
        small_config(family, xyzzy=1)


def test_a_misspelt_key_in_a_file(model, tmp_path):
    if isinstance(model, HuggingFaceLM):
        pytest.skip("its file is transformers' own")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"vocab_size"', '"vocab_sise"'))
    with pytest.raises(InputError, match="did you mean vocab_size"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 18, "num_attention_heads": 4}, "multiple of twice"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"beta": -1.0}, "must be a number from 0"),
        ({"beta_warmup": 2.0}, "fraction of training"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"hidden_size": "16"}, "hidden_size"),
    ],
)
def test_impossible_values_are_refused(family, changes, message):
    if not changes.keys() <= {f.name for f in fields(FAMILIES[family].config_class)}:
        pytest.skip("fields of other families")
    with pytest.raises(Exception, match=message):
        small_config(family, **changes)


# ---- a family of the user's own --------------------------------------------------------------------------------------


def test_three_verbs_are_enough(tmp_path):
    model = three_verbs()
    input_ids, mask = padded(texts(4, 9), LENGTHS, "right")
    output = model(input_ids, mask)
    assert torch.isfinite(output.loss)
    model.train()(input_ids, mask).loss.backward()
    assert all((parameter.grad != 0).any() for parameter in model.parameters())
    model.eval()

    found = score(model, input_ids, mask, samples=64)
    assert found["iw"].sum() < found["elbo"].sum() < found["prior"].sum() + 100
    torch.testing.assert_close(found["kl"], output.kl)
    torch.testing.assert_close(found["elbo"], found["reconstruction"] + found["kl"])

    zeros = torch.zeros(4, model.size)
    by_steps = infer_by_gradient(
        model, input_ids, mask, start_mean=zeros, start_log_variance=zeros, steps=30, learning_rate=lambda step: 0.1
    )
    model.infer = lambda *args, **kwargs: by_steps
    assert score(model, input_ids, mask, samples=64)["elbo"].sum() < found["elbo"].sum() - 1
    del model.infer

    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(input_ids, mask).loss, output.loss, **CLOSE)


def test_verbs_that_a_family_lacks():
    model = LatentLM(three_verbs().config)
    for verb in (
        lambda: model.prior(1, 1),
        lambda: model.infer(texts(1, 2)),
        lambda: model.decode(torch.zeros(1, 1), texts(1, 2)),
    ):
        with pytest.raises(NotImplementedError):
            verb()


def test_the_score_of_an_untrained_uniform_model_is_the_uniform_distribution():
    """All weights 0: log p(x) = −T log V whatever z, so every figure but the KL is known."""
    model = three_verbs()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    input_ids, mask = padded(texts(4, 9), LENGTHS, "left")
    found = score(model, input_ids, mask, samples=5)
    expected = torch.tensor([(length - 1) * math.log(VOCABULARY) for length in LENGTHS], dtype=torch.float64)
    for name in ("elbo", "iw", "reconstruction", "prior"):
        torch.testing.assert_close(found[name].double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(found["kl"], torch.zeros(4))
