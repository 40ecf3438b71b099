"""GPT-VAE against a slow, obvious decoder, and what its latent, conditions and dropouts do."""

import math
from functools import partial

import pytest
import torch
from tests.toy import BOS, VOCABULARY, padded, prior_latents, small_model, texts
from torch import nn

from latentlm import GPTVAE, GPTVAEConfig, InputError, load, save
from latentlm.causal_lm import CausalLatentLM
from latentlm.data.tokenizers import train_tokenizer
from latentlm.distributions import sequence_keys
from latentlm.layers import FixedScaleBatchNorm, pool

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def model_of(**changes):
    return small_model("gpt_vae", **changes)


# ---- the decoder -----------------------------------------------------------------------------------------------------


def turned(x, position, theta=10000.0):
    """Rotary embedding of one vector, number by number (Su et al. 2021, equation 34)."""
    half, result = len(x) // 2, x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        result[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        result[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return result


def plainly(model, latent, ids):
    """Logits after each of `ids` [time], one position at a time: BOS at 0, z's tokens from 1 on, the text after them.

    z's tokens see those before them, BOS sees z, and a word sees z, BOS and the words up to it.
    """
    config, number = model.config, model.config.latent_tokens
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    tokens = model.latent_tokens(latent).view(number, -1)
    rows = [*tokens, *model.embed_tokens(ids)]
    positions = [*range(1, number + 1), 0, *range(number + 1, number + len(ids))]
    for layer in model.layers:
        attention, normal = layer.self_attention, [layer.self_norm(row) for row in rows]
        queries, keys, values = (
            [part(row).view(heads, width) for row in normal]
            for part in (attention.query, attention.key, attention.value)
        )
        attended = []
        for place in range(len(rows)):
            of_heads = []
            for head in range(heads):
                query = turned(queries[place][head], positions[place])
                scores = [
                    query @ turned(keys[seen][head], positions[seen]) / math.sqrt(width) for seen in range(place + 1)
                ]
                weights = torch.stack(scores).softmax(0)
                of_heads.append(sum(w * values[seen][head] for seen, w in enumerate(weights)))
            attended.append(attention.output(torch.cat(of_heads)))
        rows = [row + more for row, more in zip(rows, attended, strict=True)]
        rows = [row + layer.feed_forward(layer.feed_forward_norm(row)[None, None])[0, 0] for row in rows]
    return torch.stack([model.lm_head(model.norm(row)) for row in rows[number:]])


@pytest.mark.parametrize("number", [1, 3])
def test_logits_are_those_of_the_plain_decoder(number):
    model = model_of(latent_tokens=number).double()
    input_ids = texts(2, 6)
    latents = prior_latents(model, input_ids).double()
    found = model.decode(latents, input_ids)
    for row in range(2):
        expected = plainly(model, latents[row], input_ids[row, :-1])
        torch.testing.assert_close(found[row], expected, atol=1e-6, rtol=1e-6)  # rotary angles are float32


def test_every_word_sees_z_and_the_first_one_most_of_all():
    model = model_of()
    input_ids = texts(1, 8)
    one, other = prior_latents(model, input_ids, 2)
    moved = (model.decode(one, input_ids) - model.decode(other, input_ids)).abs().amax(-1)
    assert (moved > 1e-3).all()


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_window_leaves_z_in_sight(side):
    model = model_of(sliding_window=2, num_hidden_layers=1, latent_tokens=2)
    input_ids, mask = texts(2, 12), None
    if side != "none":
        input_ids, mask = padded(input_ids, [12, 9], side)
    one, other = prior_latents(model, input_ids, 2)
    moved = (model.decode(one, input_ids, mask) - model.decode(other, input_ids, mask)).abs().amax(-1)
    assert (moved[model.scored_tokens(input_ids, mask)] > 1e-3).all()
    found = model.generate(input_ids, one, mask, max_new_tokens=12)  # beyond the window, by its cache
    again = model.generate(input_ids, one, mask, max_new_tokens=12, use_cache=False)
    assert torch.equal(found, again)
    assert not torch.equal(found, model.generate(input_ids, other, mask, max_new_tokens=12))


def test_latents_of_another_size_are_refused():
    model = model_of()
    for latents in (torch.zeros(2, 5), torch.zeros(2, 7)):
        with pytest.raises(InputError, match=r"must end in|do not fit"):
            model.decode(latents, texts(2, 4))
        with pytest.raises(InputError, match=r"give \[batch, 6\]"):
            model.generate(latents=latents, max_new_tokens=2)
    with pytest.raises(InputError, match="not finite"):
        model.generate(latents=torch.full((1, 6), math.nan), max_new_tokens=2)


# ---- the encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_by_hand(side):
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    lengths = [5, 2, 1]
    _, mask = padded(texts(3, 5), lengths, side)
    for row, length in enumerate(lengths):
        real = states[row, :length] if side == "right" else states[row, 5 - length :]
        torch.testing.assert_close(pool(states, mask, "mean")[row], real.sum(0) / length)
        assert torch.equal(pool(states, mask, "first")[row], real[0])
        assert torch.equal(pool(states, mask, "last")[row], real[-1])
    full = torch.ones(3, 5, dtype=torch.int64)
    for how in ("mean", "first", "last"):
        torch.testing.assert_close(pool(states, None, how), pool(states, full, how))
    assert torch.equal(pool(states, 0 * full, "mean"), torch.zeros(3, 4))


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "attention"])
def test_every_pooling_reads_the_whole_text(pooling):
    model = model_of(pooling=pooling)
    input_ids = texts(1, 7)
    before = model.infer(input_ids).mean
    for place in range(1, 7):
        changed = input_ids.clone()
        changed[0, place] = (changed[0, place] + 5) % VOCABULARY
        assert (model.infer(changed).mean - before).abs().max() > 1e-4


def test_an_encoder_begins_at_its_variance():
    model = model_of(inference_start_log_variance=-2.0, initializer_range=1e-6)
    torch.testing.assert_close(model.infer(texts(3, 5)).variance, torch.full((3, 6), math.exp(-2)))


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)])
def test_batch_norm_of_mu_is_torch_s(shape):
    norm, reference = FixedScaleBatchNorm(math.prod(shape[1:]), 0.7), nn.BatchNorm1d(math.prod(shape[1:]))
    nn.init.constant_(reference.weight, 0.7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        mean = 2 + torch.randn(*shape, generator=generator)
        found = norm(mean)
        torch.testing.assert_close(found.flatten(1), reference(mean.flatten(1)))
        torch.testing.assert_close(found.square().mean(0), torch.full(shape[1:], 0.49), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm.eval()(mean).flatten(1), reference.eval()(mean.flatten(1)))
    alone = norm.train()(mean[:1])  # one text has no variance: as in evaluation
    torch.testing.assert_close(alone, norm.eval()(mean[:1]))


def test_batch_norm_keeps_the_kl_off_zero():
    """The mean KL of a dimension is at least γ²/2, whatever the weights (Zhu et al. 2020, equation 11)."""
    for seed in range(3):
        model = model_of(encoder_batch_norm=0.8, seed=seed).train()
        kl = model(texts(16, 6, seed=seed), seed=0).kl
        assert kl.mean() > 6 * 0.8**2 / 2 * 0.99


def test_a_model_with_batch_norm_infers_otherwise_when_asked():
    model = model_of(encoder_batch_norm=0.8)
    before = model.infer(texts(2, 6)).mean
    model.change_inference(inference="gradient", inference_steps=3)
    plain = model_of(inference="gradient", inference_steps=3)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model.infer(texts(2, 6)).mean, plain.infer(texts(2, 6)).mean)
    model.change_inference(inference="amortised")
    assert torch.equal(model.infer(texts(2, 6)).mean, before)


def test_batch_norm_is_saved(tmp_path):
    model = model_of(encoder_batch_norm=0.8, vocab_size=300).train()
    tokenizer = train_tokenizer(["a b c"], 257)
    for seed in range(3):
        model(texts(8, 6, seed=seed))
    expected = model.eval().infer(texts(1, 6))
    save(model, tokenizer, tmp_path / "m")
    loaded, _ = load(tmp_path / "m")
    torch.testing.assert_close(loaded.infer(texts(1, 6)).mean, expected.mean, rtol=1e-6, atol=1e-6)


# ---- a latent that is not there --------------------------------------------------------------------------------------


def test_a_dropped_latent_is_zeros_and_costs_no_kl():
    model = model_of(latent_dropout=0.5).train()
    input_ids, mask = padded(texts(40, 6), [6, 3] * 20, "right")
    output = model(input_ids, mask, seed=3)
    zeros = torch.zeros(40, 6)
    without = -model.log_likelihood(zeros, input_ids, mask).sum(-1)
    within = -model.log_likelihood(output.latents, input_ids, mask).sum(-1)
    dropped = torch.isclose(output.nll, without, atol=1e-4, rtol=0)
    assert 10 < int(dropped.sum()) < 30
    torch.testing.assert_close(output.nll, torch.where(dropped, without, within), **CLOSE)
    charged = (output.nll + output.kl * ~dropped).sum() / model.scored_tokens(input_ids, mask).sum()
    torch.testing.assert_close(output.loss, charged, **CLOSE)


@pytest.mark.parametrize("inference", ["amortised", "cooperative"])
def test_an_encoder_learns_nothing_from_texts_without_latent(inference):
    model = model_of(latent_dropout=0.5, inference=inference, inference_steps=2).train()
    input_ids = texts(40, 6)
    dropped = ~model._keeps_latent(sequence_keys(input_ids), 3)
    assert 10 < int(dropped.sum()) < 30
    model(input_ids[dropped], seed=3).loss.backward()
    assert all(p.grad is None or not p.grad.any() for name, p in model.named_parameters() if name.startswith("encoder"))


def test_which_latents_are_dropped_belongs_to_the_texts():
    model = model_of(latent_dropout=0.5).train()
    input_ids = texts(12, 6)
    whole = model(input_ids, seed=3).nll
    apart = torch.cat([model(input_ids[row : row + 1], seed=3).nll for row in range(12)])
    torch.testing.assert_close(whole, apart, **CLOSE)
    assert not torch.allclose(model(input_ids, seed=4).nll, whole, atol=1e-3)


def test_evaluation_drops_nothing():
    input_ids = texts(12, 6)
    one, other = model_of(latent_dropout=0.9)(input_ids), model_of()(input_ids)
    assert torch.equal(one.nll, other.nll) and torch.equal(one.loss, other.loss)


# ---- words that are not there ----------------------------------------------------------------------------------------


def seen_by_decoder(model, *batch, seed):
    """Which embeddings reach the decoder in a step of training."""
    embedded, read = [], model.embedded
    model.embedded = lambda input_ids: embedded.append(read(input_ids)) or embedded[-1]
    try:
        model(*batch, seed=seed)
    finally:
        del model.embedded
    return (embedded[-1] != 0).any(-1)  # the last: fast steps come before


@pytest.mark.parametrize("family", ["gpt_vae", "ltm", "autoregressive"])
def test_word_dropout_takes_words_and_never_bos(family):
    model = small_model(family, word_dropout=0.4).train()
    seen = seen_by_decoder(model, texts(50, 21), seed=0)
    assert seen[:, 0].all()
    assert abs(1 - float(seen[:, 1:].float().mean()) - 0.4) < 0.05
    assert seen_by_decoder(model.eval(), texts(50, 21), seed=0).all()
    blind = seen_by_decoder(small_model(family, word_dropout=1).train(), texts(4, 9), seed=0)
    assert blind[:, 0].all() and not blind[:, 1:].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_which_words_are_dropped_belongs_to_the_text(side):
    """Not to its neighbours, its padding, or any generator."""
    model = small_model("gpt_vae", word_dropout=0.4).train()
    input_ids, lengths = texts(5, 16), [16, 9, 4, 16, 12]
    rows, mask = padded(input_ids, lengths, side, total=18)
    together = model(rows, mask, seed=3).nll
    seen = seen_by_decoder(model, rows, mask, seed=3)
    for row, length in enumerate(lengths):
        torch.manual_seed(row)
        alone = input_ids[row : row + 1, :length]
        torch.testing.assert_close(model(alone, seed=3).nll[0], together[row], **CLOSE)
        own = seen[row, : length - 1] if side == "right" else seen[row, 18 - length : 17]
        assert torch.equal(seen_by_decoder(model, alone, seed=3)[0], own)
    assert not torch.equal(seen_by_decoder(model, rows, mask, seed=4), seen)


@pytest.mark.parametrize("inference", ["amortised", "gradient"])
def test_inference_sees_every_word(inference):
    model = model_of(word_dropout=1, inference=inference).train()
    input_ids = texts(3, 8)
    expected = model_of(inference=inference).infer(input_ids).mean
    torch.testing.assert_close(model.infer(input_ids).mean, expected, **CLOSE)


# ---- z of another text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", ["amortised", "gradient", "cooperative"])
def test_z_is_inferred_from_the_condition(inference):
    model = model_of(inference=inference, inference_steps=2)
    input_ids, (others, mask) = texts(3, 6), padded(texts(3, 9, seed=1), [9, 4, 7], "left")
    condition = {"input_ids": others, "attention_mask": mask}
    found, expected = model.infer(input_ids, condition=condition), model.infer(others, mask)
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.stddev, expected.stddev)
    output = model(input_ids, condition=condition)
    assert torch.equal(output.posterior_mean, expected.mean)
    log_likelihood = model.log_likelihood(output.latents, input_ids).sum(-1)
    torch.testing.assert_close(output.nll, -log_likelihood)
    model.train()(input_ids, condition=condition, seed=0).loss.backward()


def test_a_prompt_goes_on_with_another_text_s_latent():
    model = model_of()
    prompts, others = texts(3, 4), texts(3, 9, seed=1)
    condition, prior = {"input_ids": others}, model.prior(3, 6)
    found = model.generate(prompts, condition=condition, max_new_tokens=6, seed=1)
    with torch.random.fork_rng():
        latents = CausalLatentLM._latents_for(model, prompts, torch.ones_like(prompts), condition, prior, 1, 1)
    assert torch.equal(found, model.generate(prompts, latents, max_new_tokens=6))
    assert not torch.equal(found, model.generate(prompts, max_new_tokens=6, seed=1))
    assert len(model.generate(condition={"input_ids": others}, max_new_tokens=3, seed=1)) == 3
    # a prompt of BOS alone takes its latent from the condition, too, and not from the prior
    start = texts(3, 1)
    posterior = model.infer(others)
    drawn = CausalLatentLM._latents_for(model, start, torch.ones_like(start), condition, prior, 200, 1)
    means = drawn.view(3, 200, 6).mean(1)
    assert ((means - posterior.mean) / posterior.stddev).abs().max() < 5 / math.sqrt(200)


@pytest.mark.parametrize(
    "condition, words",
    [
        ("text", "give a mapping with input_ids"),
        ({"ids": 1}, "give a mapping with input_ids"),
        ({"input_ids": [[1]]}, "give a mapping with input_ids"),
        ({"input_ids": texts(3, 4).float()}, "give a mapping with input_ids"),
        ({"input_ids": texts(3, 4)[:, :0]}, "the condition's input_ids of shape .3, 0. hold no text"),
        ({"input_ids": texts(3, 4), "attention_mask": torch.ones(3, 5)}, "attention_mask has the shape .3, 5."),
        ({"input_ids": texts(3, 4), "attention_mas": None}, "a condition has input_ids and attention_mask, and no"),
        ({"input_ids": texts(3, 4) + VOCABULARY}, "no token of the vocabulary of 23"),
        ({"input_ids": texts(2, 4)}, "2 texts to infer z from do not fit 3"),
    ],
)
def test_a_condition_that_is_none_of_a_text_is_refused(condition, words):
    with pytest.raises(InputError, match=words):
        model_of().infer(texts(3, 4), condition=condition)


def test_a_text_that_is_none_is_refused_wherever_it_enters():
    model = model_of(max_position_embeddings=6)
    z = prior_latents(model, texts(2, 4))
    wrong = [
        (texts(2, 4)[:0], None, "hold no text"),
        (texts(2, 4) + VOCABULARY, None, "no token of the vocabulary of 23"),
        (texts(2, 4).index_fill(1, torch.tensor([3]), -100), None, "hold -100"),
        (texts(2, 10), None, "a text of 9 tokens exceeds the model's context of 6"),
    ]
    for ids, mask, words in wrong:
        for verb in (model.infer, model, partial(model.decode, z), partial(model.log_likelihood, z)):
            with pytest.raises(InputError, match=words):
                verb(ids, mask)
    padded_far, mask = padded(texts(2, 9), [4, 2], "left", total=9)
    assert model.infer(padded_far, mask).mean.shape == z.shape


def test_a_text_is_as_long_as_the_context_leaves_unless_more_is_asked_for():
    model = model_of(max_position_embeddings=9)
    assert model.generate(texts(2, 4), seed=0, do_sample=True, eos_token_id=None).shape == (2, 4 + 6)
    with pytest.raises(InputError, match="exceed the model's context of 9"):
        model.generate(texts(2, 4), max_new_tokens=7)
    with pytest.raises(InputError, match="latents and a condition both say what z is"):
        model.generate(texts(2, 4), prior_latents(model, texts(2, 4)), condition={"input_ids": texts(2, 3)})


def test_one_latent_serves_a_whole_batch():
    model = model_of()
    prompts, mask = padded(texts(3, 5), [5, 1, 3], "left")
    z = prior_latents(model, prompts)[:1]
    found = model.generate(prompts, z, mask, max_new_tokens=6)
    assert torch.equal(found, model.generate(prompts, z.expand(3, -1), mask, max_new_tokens=6))


def test_a_list_of_numbers_steers():
    model = model_of(initializer_range=0.5)
    first, again, other = (
        model.generate(latents=torch.tensor([numbers]), max_new_tokens=12)
        for numbers in ([2.0, 0, 0, 0, 0, 0], [2.0, 0, 0, 0, 0, 0], [-2.0, 0, 0, 1, 0, 0])
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first[0, 0] == BOS


# ---- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_size": 0},
        {"latent_tokens": 0},
        {"pooling": "max"},
        {"latent_dropout": 1.0},
        {"word_dropout": 1.5},
        {"encoder_batch_norm": 0.0},
        {"kl_target": 2.0, "inference": "langevin"},
        {"beta_cycles": 2, "beta_cycle_ratios": [1.0, 0.0, 0.0]},
        {"beta_cycles": -1},
        {"beta_cycles": 2, "beta_cycle_ratios": [0.5, 0.6, 0.2]},
        {"beta_cycles": 2, "beta_cycle_ratios": [0.5, 0.5]},
        {"beta_cycles": 2, "beta_warmup": 0.1},
        {"kl_target": 2.0, "beta_cycles": 2},
        {"kl_target": -1.0},
        {"kl_target": math.nan},
        {"kl_target": 2.0, "beta": 0.0},
        {"kl_threshold": 0.0},
        {"kl_threshold": 2.0, "free_bits": 0.1},
        {"free_bits_per": "token"},
    ],
    ids=str,
)
def test_impossible_configs_are_refused(changes):
    with pytest.raises(Exception, match=list(changes)[-1] if "beta_cycle_ratios" in changes else next(iter(changes))):
        GPTVAEConfig(**changes)


def test_the_defaults_are_those_of_the_reference():
    """6 layers and 3 of the encoder (papers of the family), no window."""
    config = GPTVAEConfig()
    assert (config.num_hidden_layers, config.encoder_layers, config.sliding_window) == (6, 3, None)
    assert config.inference == "amortised" and config.pooling == "mean" and config.latent_tokens == 1
    assert isinstance(small_model("gpt_vae"), GPTVAE)
