"""Families that write all tokens at once: the model of the length, `generate`, continuations, published figures."""

import itertools
import math

import pytest
import torch
from tests.toy import BOS, EOS, PAD, VOCABULARY, Rows, moved, padded, prior_latents, small_model, texts

from latentlm import InputError
from latentlm.distributions import (
    GaussianProcess,
    Stream,
    noise_shape,
    sample_from_noise,
    sequence_keys,
    sequence_noise,
)
from latentlm.evaluation.continuation import continuation
from latentlm.evaluation.measure import measure
from latentlm.evaluation.published import published_figures

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
RAGGED = {"length_model": "categorical", "eos_token_id": EOS}


def model_of(**changes):
    """Of GP-VAE, with a law of the length that is not the uniform one."""
    model = moved(small_model("gp_vae", **changes))
    if changes.get("length_model") == "categorical":
        with torch.no_grad():
            numbers = torch.randn(model.length_logits.shape, generator=torch.Generator().manual_seed(0))
            model.length_logits.copy_(numbers / 16)
    return model


def law_of_length(model):
    """p(T = 1) … p(T = context), and p(T > context)."""
    return (16 * model.length_logits.detach().double()).softmax(0)


# ---- the model of the length -----------------------------------------------------------------------------------------


def every_text(vocabulary, context):
    """Of those that EOS ends, and those that the context cuts, by their lengths."""
    words = [token for token in range(vocabulary) if token != EOS]
    for length in range(1, context + 1):
        for before in itertools.product(words, repeat=length - 1):
            yield length, torch.tensor([[BOS, *before, EOS]])
    for uncut in itertools.product(words, repeat=context):
        yield context + 1, torch.tensor([[BOS, *uncut]])


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["convolution", "attention"])
@pytest.mark.parametrize("vocabulary, context", [(3, 3), (4, 2)])
def test_all_texts_have_a_probability_of_one(vocabulary, context, decoder):
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": context}
    model = model_of(decoder_type=decoder, **sizes, **RAGGED).double()
    z = torch.randn(1, context, 4, generator=torch.Generator().manual_seed(1)).double()
    of_lengths = torch.zeros(context + 1, dtype=torch.float64)
    for length, text in every_text(vocabulary, context):
        of_lengths[length - 1] += model.log_likelihood(z, text).sum().exp()
    torch.testing.assert_close(of_lengths, law_of_length(model), atol=1e-6, rtol=0)
    assert of_lengths.std() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("end", ["EOS", "the context", "a prompt"])
def test_each_token_pays_its_own_part_of_the_length(end):
    model = model_of(max_position_embeddings=8, **RAGGED)
    input_ids = texts(1, 6 if end == "a prompt" else 9)
    if end == "EOS":
        input_ids[0, 6:] = EOS
        input_ids = input_ids[:, :7]
    total = input_ids.shape[1] - 1
    z = prior_latents(model, input_ids)
    words = torch.cat([model.vocabulary()[:EOS], model.vocabulary()[EOS + 1 :]])
    logs = (model.states(z, torch.tensor([total]))[0] @ words.T).log_softmax(-1)
    tokens = input_ids[0, 1:].tolist()
    of_words = [0.0 if v == EOS else float(logs[t, v - (v > EOS)]) for t, v in enumerate(tokens)]
    law = law_of_length(model)
    of_length = float(law[total - 1]) if end == "EOS" else float(law[total:].sum())
    found = model.log_likelihood(z, input_ids)[0]
    for begun in range(total):
        after = math.log(of_length / float(law[begun:].sum()))
        assert float(found[begun:].sum()) == pytest.approx(after + sum(of_words[begun:]), abs=1e-4)


def test_the_length_is_learned():
    model = model_of(max_position_embeddings=6, **RAGGED).train()
    input_ids = texts(4, 7)
    for row, length in enumerate([3, 3, 3, 7]):
        input_ids[row, length - 1] = EOS
    rows, mask = padded(input_ids, [3, 3, 3, 7], "left")
    model(rows, mask, seed=0).loss.backward()
    assert (model.length_logits.grad[:-1] != 0).all()
    z = prior_latents(model, rows)
    optimiser = torch.optim.Adam([model.length_logits], lr=0.02)
    for _ in range(100):
        optimiser.zero_grad()
        (-model.log_likelihood(z, rows, mask).sum()).backward()
        optimiser.step()
    assert law_of_length(model).tolist() == pytest.approx([0, 0.75, 0, 0, 0, 0.25, 0], abs=0.02)


def test_a_new_model_has_every_length_alike():
    model = small_model("gp_vae", max_position_embeddings=4, **RAGGED)
    assert law_of_length(model).tolist() == pytest.approx([0.2] * 5)
    assert not hasattr(small_model("gp_vae"), "length_logits")


@pytest.mark.parametrize("eos", [None, [1, 2]])
def test_a_model_of_the_length_needs_a_token_that_ends(eos):
    model, input_ids = small_model("gp_vae", length_model="categorical", eos_token_id=eos), texts(2, 5)
    z = prior_latents(model, input_ids)
    for verb in (lambda: model(input_ids), lambda: model.decode(z, input_ids), lambda: model.generate(seed=0)):
        with pytest.raises(InputError, match="needs one token that ends a text, and eos_token_id is"):
            verb()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_goes_on_after_eos_is_refused(side):
    model, input_ids, lengths = model_of(**RAGGED), texts(2, 6), [6, 4]
    input_ids[0, 5] = input_ids[1, 3] = EOS
    rows, mask = padded(input_ids, lengths, side)
    rows[mask == 0] = EOS  # as padding it has no meaning
    assert torch.isfinite(model(rows, mask).loss)
    input_ids[0, 4] = EOS
    rows, mask = padded(input_ids, lengths, side)
    for training in (False, True):
        with pytest.raises(InputError, match="goes on after EOS: for blocks of text set length_model to none"):
            model.train(training)(rows, mask)


# ---- writing ---------------------------------------------------------------------------------------------------------

PROMPTS = {
    "none": lambda: {},
    "whole": lambda: {"input_ids": texts(3, 5)},
    "left": lambda: dict(zip(("input_ids", "attention_mask"), padded(texts(3, 5), [5, 1, 3], "left"), strict=True)),
    "right": lambda: dict(zip(("input_ids", "attention_mask"), padded(texts(3, 5), [5, 1, 3], "right"), strict=True)),
}


@pytest.mark.parametrize("given", PROMPTS)
@pytest.mark.parametrize("ragged", [{}, RAGGED], ids=["blocks", "ragged"])
@pytest.mark.parametrize("kernel", ["rbf", "matern32"])
def test_one_time_after_another_or_all_at_once_is_the_same_text(kernel, ragged, given, monkeypatch):
    model, prompts = model_of(kernel=kernel, **ragged), PROMPTS[given]()
    asked, steps = [], GaussianProcess.steps
    monkeypatch.setattr(GaussianProcess, "steps", lambda *args: asked.append(args) or steps(*args))
    options = {"max_new_tokens": 9, "num_return_sequences": 2}
    for seed, sampling in ((0, False), (1, False), (0, True)):
        options |= {"seed": seed, "do_sample": sampling}
        found = model.generate(**prompts, **options, sequential=True)
        assert asked
        asked.clear()
        assert torch.equal(found, model.generate(**prompts, **options))
        assert not asked
    assert len(set(map(tuple, found.tolist()))) == len(found)


@pytest.mark.parametrize("ragged", [{}, RAGGED], ids=["blocks", "ragged"])
def test_prompts_are_kept_and_seeds_repeat(ragged):
    model = model_of(**ragged)
    rows, mask = padded(texts(3, 5), [5, 1, 3], "right")
    options = {"max_new_tokens": 8, "num_return_sequences": 2, "do_sample": True}
    state = torch.get_rng_state()
    one, same, other = (model.generate(rows, attention_mask=mask, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (6, 13)
    for index, row in enumerate(one):
        prompt = texts(3, 5)[index // 2, : [5, 1, 3][index // 2]]
        assert torch.equal(row[:5], torch.cat([torch.full((5 - len(prompt),), PAD), prompt]))
    assert not torch.equal(one[::2], one[1::2])
    free = [model.generate(rows, attention_mask=mask, **options) for _ in range(2)]
    assert not torch.equal(*free)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decoder", ["convolution", "attention"])
def test_a_prompt_is_continued_in_a_batch_as_alone(decoder, side):
    """BOS alone, from the prior, beside prompts."""
    model, lengths, input_ids = model_of(decoder_type=decoder), [5, 1, 3], texts(3, 5)
    together = model.generate(
        **dict(zip(("input_ids", "attention_mask"), padded(input_ids, lengths, side), strict=True)),
        max_new_tokens=8,
        seed=3,
    )
    for row, length in enumerate(lengths):
        alone = model.generate(input_ids[row : row + 1, :length], max_new_tokens=8, seed=3)
        assert torch.equal(alone[0, length:], together[row, 5:])
    nothing = torch.tensor([[BOS, 5], [PAD, PAD]])
    assert model.generate(nothing, attention_mask=(nothing != PAD).long(), max_new_tokens=3, seed=0).shape == (2, 5)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["convolution", "attention"])
def test_given_latents_are_written_as_they_decode(decoder):
    model, lengths, input_ids = model_of(decoder_type=decoder), [5, 1, 3], texts(3, 5)
    z = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0))
    found = model.generate(latents=z)
    assert found.shape == (3, 13) and (found[:, 0] == BOS).all()
    assert torch.equal(found[:, 1:], model.decode(z, texts(3, 13)).argmax(-1))
    rows, mask = padded(input_ids, lengths, "left")
    found = model.generate(rows, z, mask, max_new_tokens=6)
    for row, length in enumerate(lengths):
        upto = z[row : row + 1, : length - 1 + 6]
        expected = model.decode(upto, texts(1, length + 6)).argmax(-1)[0, length - 1 :]
        assert torch.equal(found[row, 5:], expected)
    shared = model.generate(rows, z[:1], mask, max_new_tokens=6)
    assert torch.equal(shared, model.generate(rows, z[:1].expand(3, -1, -1), mask, max_new_tokens=6))


@torch.no_grad()
@pytest.mark.parametrize("ragged", [{}, RAGGED], ids=["blocks", "ragged"])
def test_latents_may_have_lengths_of_their_own(ragged):
    model, lengths = model_of(**ragged), [7, 1, 4]
    z = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    found = model.generate(latents=z, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        logits = model.decode(z[row : row + 1, :length], texts(1, length + 1))[0]
        if ragged:
            logits[:, EOS] = -math.inf
        expected = logits.argmax(-1)
        if ragged:
            expected[-1] = EOS
        assert torch.equal(found[row, 1 : 1 + length], expected)
        assert (found[row, 1 + length :] == PAD).all()
    wrong = [torch.tensor([8, 1, 1]), torch.tensor([0, 1, 1]), torch.tensor([1, 1])]
    for numbers in wrong:
        with pytest.raises(InputError, match="lengths must be between 1 and the latents' 7 times"):
            model.generate(latents=z, lengths=numbers)


@torch.no_grad()
def test_tokens_are_drawn_from_what_is_decoded():
    model = model_of(max_position_embeddings=3)
    z = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    logits = model.decode(z, texts(1, 4))[0]
    options = {"latents": z, "do_sample": True, "num_return_sequences": 4000, "seed": 0}

    def drawn(**sampling):
        rows = model.generate(**options, **sampling)[:, 1:]
        return torch.nn.functional.one_hot(rows, VOCABULARY).double().mean(0)

    for temperature in (1.0, 2.0):
        expected = (logits / temperature).softmax(-1).double()
        errors = (expected * (1 - expected) / 4000).sqrt() + 1e-4
        assert ((drawn(temperature=temperature) - expected).abs() < 5 * errors).all()
    three = drawn(top_k=3, temperature=3.0)
    assert torch.equal(three > 0, logits >= logits.topk(3)[0][:, -1:])
    ordered, order = logits.softmax(-1).sort(descending=True)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, ordered.cumsum(1) - ordered < 0.6)
    assert torch.equal(drawn(top_p=0.6) > 0, kept)
    likeliest = torch.nn.functional.one_hot(logits.argmax(-1), VOCABULARY).double()
    assert torch.equal(drawn(top_k=1), likeliest) and torch.equal(drawn(temperature=1e-4), likeliest)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_beams": 2}, "no order for beams"),
        ({"reinfer_every": 2}, "no order for beams or for reinfer_every"),
        ({"typical_p": 0.5}, "a GPVAE does not take typical_p to write text"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be a number above 0"),
        ({"do_sample": True, "temperature": math.nan}, "temperature must be a number above 0"),
        ({"do_sample": True, "top_p": 0.0}, "top_p above 0 and at most 1"),
        ({"do_sample": True, "top_p": 1.5}, "top_p above 0 and at most 1"),
        ({"do_sample": True, "top_k": -1}, "top_k must be 0 or more"),
        ({"lengths": torch.tensor([3, 3])}, "lengths are those of given latents"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"num_return_sequences": 0}, "must be at least 1"),
        ({"max_new_tokens": 30}, "a prompt of 3 tokens and 30 new ones exceed the model's context of 32"),
        ({"latents": torch.zeros(2, 6, 4), "max_new_tokens": 4}, "latents of 6 times do not reach over a prompt of 3"),
        ({"latents": torch.zeros(2, 3, 4)}, "latents of 3 times do not reach over a prompt of 3 tokens and 1 new"),
        ({"latents": torch.zeros(2, 6, 3)}, r"give \[batch, 6, 4\]"),
        ({"latents": torch.zeros(2, 4)}, r"give \[batch, 1, 4\]"),
        ({"latents": torch.full((2, 6, 4), math.nan)}, "not finite"),
        ({"latents": torch.zeros(3, 6, 4)}, "3 latents do not fit 2 prompts"),
        ({"latents": torch.zeros(2, 6, 4), "num_return_sequences": 2}, "sample, or ask for one of each"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_written_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        model_of().generate(texts(2, 4), **options)


def test_what_no_decoder_of_all_tokens_reads_may_be_left_at_its_default():
    model = model_of()
    expected = model.generate(texts(2, 4), max_new_tokens=4, seed=0)
    given = {"num_beams": 1, "reinfer_every": None, "use_cache": True}
    assert torch.equal(model.generate(texts(2, 4), max_new_tokens=4, seed=0, **given), expected)


def test_what_follows_eos_is_padding():
    model = model_of(eos_token_id=EOS)
    rows = model.generate(max_new_tokens=30, num_return_sequences=60, do_sample=True, seed=0, temperature=3.0)[:, 1:]
    ended = 0
    for row in rows.tolist():
        if EOS in row:
            first = row.index(EOS)
            ended += first < 29
            assert row[first + 1 :] == [PAD] * (29 - first)
    assert 20 < ended < 60


@pytest.mark.parametrize("begun", [0, 2])
@pytest.mark.parametrize("sampling", [False, True])
def test_texts_end_where_the_model_of_the_length_says(begun, sampling):
    model, number = model_of(max_position_embeddings=6, **RAGGED), 3000
    prompts = texts(1, begun + 1).expand(number, -1)
    rows = model.generate(prompts, max_new_tokens=6 - begun, do_sample=sampling, seed=0)[:, 1 + begun :].tolist()
    counts = torch.zeros(7, dtype=torch.float64)
    for row in rows:
        length = row.index(EOS) + 1 if EOS in row else len(row) + 1
        counts[begun + length - 1] += 1
        assert row[length:] == [PAD] * (len(row) - length)
    expected = law_of_length(model)
    expected[:begun] = 0
    expected = expected / expected.sum()
    assert ((counts / number - expected).abs() < 4 * (expected * (1 - expected) / number).sqrt() + 1e-9).all()
    assert (expected > 0.02).sum() > 3


def test_fewer_tokens_than_a_text_has_leave_it_without_an_end():
    model = model_of(max_position_embeddings=6, **RAGGED)
    with torch.no_grad():
        model.length_logits.copy_(torch.tensor([0.0, 0, 0, 0, 9, 0, 0]))  # five tokens
    rows = model.generate(max_new_tokens=6, num_return_sequences=5, seed=0)[:, 1:]
    assert (rows[:, 4] == EOS).all() and (rows[:, 5] == PAD).all()
    cut = model.generate(max_new_tokens=3, num_return_sequences=5, seed=0)[:, 1:]
    assert torch.equal(cut, rows[:, :3]) and not (cut == EOS).any()


# ---- continuations ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_continuation(model, row, prompt, samples, seed=0):
    """One text and one sample at a time: z of the prompt by `infer`, and what follows by the process' conditional."""
    seen, length = row[None, : prompt + 1], len(row) - 1
    prior = model.prior(1, length)
    keys, logs = sequence_keys(seen if prompt else row[None]), []
    for step in range(samples):
        noise_of = {"seed": seed, "stream": Stream.CONTINUATION, "step": step}
        if prompt:
            q = model.infer(seen, seed=seed)
            numbers = noise_shape(q)[1]
            noise = sequence_noise(keys, (length, numbers + 4), **noise_of)
            begun = sample_from_noise(q, noise[:, :prompt, :numbers])
            z = torch.cat([begun, prior.conditional(begun).from_noise(noise[:, prompt:, numbers:])], 1)
        else:
            z = sample_from_noise(prior, sequence_noise(keys, (length, 4), **noise_of))
        logs.append(float(model.log_likelihood(z, row[None])[0, prompt:].double().sum()))
    return -math.log(sum(math.exp(one - max(logs)) for one in logs) / samples) - max(logs)


@pytest.mark.parametrize("changes", [{}, RAGGED, {"posterior": "diagonal", "kernel": "matern32"}], ids=str)
@pytest.mark.parametrize("prompt", [0, 3])
def test_continuations_are_scored_as_a_slow_loop_does(changes, prompt):
    model, lengths = model_of(**changes), (9, 5, 7, 6)
    rows = [row[:length] for row, length in zip(texts(4, 9), lengths, strict=True)]
    if changes is RAGGED:
        rows[1][-1] = EOS
    expected = sum(slow_continuation(model, row, prompt, samples=3) for row in rows)
    for size in (1, 3):
        found = continuation(model, Rows(rows), prompt_tokens=prompt, samples=3, batch_size=size)
        assert found["continuation_nll_per_token"] * found["continuation_tokens"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("encoder", ["separable", "transformer"])
def test_the_latents_of_a_prompt_know_nothing_of_what_follows(encoder, monkeypatch):
    model = model_of(encoder_type=encoder)
    one, other = texts(2, 10)
    other[:5] = one[:5]
    assert not torch.equal(one, other)
    drawn, draw = [], model.draw_latents
    monkeypatch.setattr(
        model, "draw_latents", lambda *given, **options: drawn.append(draw(*given, **options)) or drawn[-1]
    )
    for row in (one, other):
        continuation(model, Rows([row]), prompt_tokens=4, samples=3)
    assert torch.equal(*drawn)
    changed = one.clone()
    changed[4] = (one[4] + 5) % VOCABULARY
    continuation(model, Rows([changed]), prompt_tokens=4, samples=3)
    assert not torch.allclose(drawn[2], drawn[0])


# ---- as published ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_published(model, row, seed):
    """NLL and number of the tokens that the model itself writes after the first half of a text."""
    begun = (len(row) - 1) // 2
    own = model.generate(row[None, : begun + 1], max_new_tokens=len(row) - 1 - begun, seed=seed)
    new = own[0, begun + 1 :].tolist()
    if model.config.eos_token_id in new:
        own = own[:, : begun + 2 + new.index(model.config.eos_token_id)]
    q = model.infer(own)
    z = sample_from_noise(q, sequence_noise(sequence_keys(own), noise_shape(q), seed=seed, stream=Stream.SCORE))
    return -float(model.log_likelihood(z, own)[0, begun:].sum()), own.shape[1] - 1 - begun


@pytest.mark.parametrize("changes", [{}, {"eos_token_id": 9}, {"posterior": "diagonal"}], ids=str)
def test_the_published_figure_is_that_of_the_model_s_own_continuations(changes):
    model, lengths = model_of(**changes), (9, 4, 9, 6, 2)
    rows = [row[:length] for row, length in zip(texts(5, 9), lengths, strict=True)]
    rows[2][:5] = rows[0][:5]  # one prompt
    nll, tokens = (sum(each) for each in zip(*(slow_published(model, row, 3) for row in rows), strict=True))
    if "eos_token_id" not in changes:
        assert tokens == sum(length - 1 - (length - 1) // 2 for length in lengths)
    expected = {"published_nll_per_token": nll / tokens, "published_perplexity": math.exp(nll / tokens)}
    for size in (1, 3):
        assert published_figures(model, Rows(rows), batch_size=size, seed=3) == pytest.approx(expected, rel=1e-5)
    found = measure(model, Rows(rows), seed=3, protocol="paper", iw_samples=1)
    assert found["protocol"] == "paper" and found["published_nll_per_token"] == pytest.approx(nll / tokens, rel=1e-5)


def test_the_published_figure_of_texts_that_end():
    model, rows = model_of(**RAGGED), texts(12, 9)
    with torch.no_grad():
        model.length_logits.copy_(torch.linspace(0.3, 0, 33))
    nll, tokens = model.published_nll(rows, seed=0)
    assert torch.isfinite(nll).all() and 12 <= int(tokens.sum()) < 12 * 4
    alone = slow_published(model, rows[0], 0)
    one, number = model.published_nll(rows[:1], seed=0)
    assert (float(one), int(number)) == (pytest.approx(alone[0], rel=1e-5), alone[1])
