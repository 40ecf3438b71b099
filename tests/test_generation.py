"""`generate` of every family with a causal decoder."""

import pytest
import torch
from tests.toy import BOS, EOS, PAD, VOCABULARY, padded, prior_latents, small_model, small_variant, texts
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from latentlm import InputError
from latentlm.causal_lm import CausalLatentLM
from latentlm.distributions import Stream, sequence_keys
from latentlm.families import FAMILIES

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
}


@pytest.fixture(params=sorted(name for name, family in FAMILIES.items() if issubclass(family, CausalLatentLM)))
def model(request):
    """Untied, since a tied embedding of random weights repeats its last token for ever."""
    return small_model(request.param, tie_word_embeddings=False)


def by_decode(model, latents, prompt, new):
    """Greedy continuation of one prompt [time], all of the text decoded again for each token."""
    text = prompt[None]
    for _ in range(new):
        with_next = torch.cat([text, torch.full((1, 1), PAD)], 1)  # logits of a token do not depend on it
        text = torch.cat([text, model.decode(latents[None], with_next)[:, -1].argmax(-1, keepdim=True)], 1)
    return text[0]


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_cached_and_uncached_texts_are_equal(model, way, side):
    """Texts of 16 tokens, four windows long."""
    input_ids, mask = texts(3, 5), None
    if side != "none":
        input_ids, mask = padded(input_ids, [5, 2, 3], side)
    latents = prior_latents(model, input_ids)
    given = {"latents": latents, "attention_mask": mask, "max_new_tokens": 12, "seed": 1, **WAYS[way]}
    cached = model.generate(input_ids, **given)
    assert cached.shape == (3, 17)
    assert torch.equal(cached, model.generate(input_ids, use_cache=False, **given))


@pytest.mark.parametrize(
    ("options", "window"),
    [
        *(({}, window) for window in (1, 2, 4, None)),
        ({"do_sample": True}, 2),
        ({"num_beams": 3}, 2),
        ({"num_beams": 3}, None),
        ({"reinfer_every": 3}, 2),
    ],
)
@pytest.mark.parametrize("family", ["ltm", "autoregressive", "memory"])
def test_a_static_cache_writes_the_same(family, options, window):
    model = small_variant(family, sliding_window=window)
    prompts = padded(texts(3, 9), [9, 6, 2], "left")
    given = {"attention_mask": prompts[1], "max_new_tokens": 12, "seed": 1, "do_sample": False, **options}
    written = model.generate(prompts[0], **given)
    assert torch.equal(model.generate(prompts[0], cache_implementation="static", **given), written)


def test_a_generation_config_asks_as_words_do(monkeypatch):
    model, prompts = small_model("ltm"), texts(2, 5)
    words = {"max_new_tokens": 6, "num_beams": 2, "cache_implementation": "static"}
    expected, made = model.generate(prompts, seed=1, **words), []
    real = model.static_cache
    monkeypatch.setattr(model, "static_cache", lambda length: made.append(length) or real(length))
    assert torch.equal(model.generate(prompts, seed=1, generation_config=GenerationConfig(**words)), expected)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(model.generate(prompts, seed=1, max_new_tokens=6, num_beams=2), expected)
    assert model.generation_config.cache_implementation == "static" and made == [11, 11]
    assert torch.equal(model.generate(prompts, seed=1, max_new_tokens=6, num_beams=2, use_cache=None), expected)


@pytest.mark.parametrize("options", [{}, {"reinfer_every": 2}])
def test_a_cache_of_another_kind(options):
    cache = DynamicCache() if not options else small_model("ltm").new_cache()
    with pytest.raises(InputError, match="past_key_values must be one of new_cache"):
        small_model("ltm").generate(texts(1, 3), max_new_tokens=2, past_key_values=cache, **options)


def test_caches_that_a_family_has_not():
    for family in ("gpt_vae", "lang_vae", "huggingface"):
        with pytest.raises(InputError, match="has no static cache"):
            small_model(family).generate(texts(1, 3), max_new_tokens=2, cache_implementation="static")
    for other in ({"use_cache": False}, {"past_key_values": small_model("ltm").new_cache()}):
        with pytest.raises(InputError, match="cache_implementation goes neither with"):
            small_model("ltm").generate(texts(1, 3), max_new_tokens=2, cache_implementation="static", **other)
    with pytest.raises(InputError, match="cache_implementation is dynamic or static, not 'offloaded'"):
        small_model("ltm").generate(texts(1, 3), max_new_tokens=2, cache_implementation="offloaded")


@pytest.mark.parametrize("window", [1, 2, 4, None])
def test_logits_of_each_step_are_decodes(window):
    model = small_model("ltm", sliding_window=window, tie_word_embeddings=False)
    input_ids, mask = padded(texts(3, 5), [5, 2, 3], "left")
    latents = prior_latents(model, input_ids)
    found = model.generate(
        input_ids, latents, mask, max_new_tokens=12, output_logits=True, return_dict_in_generate=True
    )
    mask = torch.cat([mask, torch.ones(3, 12, dtype=torch.int64)], 1)
    expected = model.decode(latents, found.sequences, mask)[:, 4:]
    torch.testing.assert_close(torch.stack(found.logits, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1,) * 8, (2, 1, 4, 1)])
def test_a_text_fed_in_pieces_is_the_text(model, side, sizes):
    """`forward` with a cache and no positions, as a caller's own loop has it."""
    input_ids, mask = texts(2, 9), None
    if side != "none":
        input_ids, mask = padded(input_ids, [9, 6], side)
    latents = prior_latents(model, input_ids)
    expected = model.decode(latents, input_ids, mask)
    cache, pieces, end = model.new_cache(), [], 0
    for size in sizes:
        start, end = end, end + size
        seen = None if mask is None else mask[:, :end]
        output = model(input_ids[:, start:end], seen, latents=latents, past_key_values=cache)
        pieces.append(output.logits)
        assert output.past_key_values is cache and output.loss is None
    real = torch.ones(2, 8, dtype=torch.bool) if mask is None else mask[:, :-1].bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], expected[real], atol=1e-5, rtol=1e-5)


def test_logits_to_keep(model):
    input_ids = texts(2, 6)
    latents = prior_latents(model, input_ids)
    whole = model(input_ids, latents=latents)
    assert whole.past_key_values is None
    last = model(input_ids, latents=latents, logits_to_keep=2, use_cache=True)
    torch.testing.assert_close(last.logits, whole.logits[:, -2:], atol=1e-5, rtol=1e-5)  # sums in another order
    assert last.past_key_values is not None


def test_greedy_is_the_most_likely_token_after_token(model):
    input_ids = texts(2, 4)
    latents = prior_latents(model, input_ids)
    found = model.generate(input_ids, latents, max_new_tokens=8)
    for row in range(2):
        assert torch.equal(found[row], by_decode(model, latents[row], input_ids[row], 8))
    assert len(found[:, 4:].unique()) > 3


def test_beams_find_a_likelier_text_than_greed(model):
    input_ids = texts(4, 4)
    latents = prior_latents(model, input_ids)

    def log_likelihood(found):
        return model.log_likelihood(latents, found)[:, 3:].sum(-1)

    greedy, beams = (model.generate(input_ids, latents, max_new_tokens=6, num_beams=n) for n in (1, 8))
    assert log_likelihood(beams).sum() > log_likelihood(greedy).sum() + 0.1


def test_sampling_follows_the_models_probabilities(model):
    """Chi-square of 4000 next tokens; 1 in 1000 would exceed it by chance."""
    input_ids = texts(1, 4)
    latents = prior_latents(model, input_ids)
    probabilities = model.decode(latents, texts(1, 5))[0, -1].softmax(-1)
    found = model.generate(
        input_ids, latents, max_new_tokens=1, do_sample=True, top_k=0, num_return_sequences=4000, seed=0
    )
    counts = torch.bincount(found[:, -1], minlength=VOCABULARY)
    expected = 4000 * probabilities
    common = expected > 5
    assert ((counts - expected).square() / expected)[common].sum() < 48.3  # 22 degrees of freedom


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("total, beams", [(6, 1), (9, 3)])
def test_prompts_in_a_batch_continue_as_alone(model, side, total, beams):
    input_ids, lengths = texts(4, 6), [6, 2, 4, 1]
    latents = prior_latents(model, input_ids)
    given = {"max_new_tokens": 7, "num_beams": beams}
    found = model.generate(*reversed_arguments(padded(input_ids, lengths, side, total=total), latents), **given)
    for row, length in enumerate(lengths):
        alone = model.generate(input_ids[row : row + 1, :length], latents[row : row + 1], **given)
        assert torch.equal(found[row, -(length + 7) :], alone[0])


def reversed_arguments(rows_and_mask, latents):
    return rows_and_mask[0], latents, rows_and_mask[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_in_a_batch_continue_as_alone_from_latents_of_their_own(ltm, side):
    input_ids, lengths = texts(4, 6), [4, 6, 1, 2]
    rows, mask = padded(input_ids, lengths, side)
    together = ltm.generate(rows, attention_mask=mask, max_new_tokens=5, seed=2)
    for row, length in enumerate(lengths):
        alone = ltm.generate(input_ids[row : row + 1, :length], max_new_tokens=5, seed=2)
        assert torch.equal(together[row, -(length + 5) :], alone[0])


def test_a_prompt_draws_the_same_latent_in_any_row(ltm):
    input_ids = texts(3, 6)
    drawn = latents_used(ltm, input_ids, seed=2)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(latents_used(ltm, input_ids[order], seed=2), drawn[order], atol=1e-4, rtol=0)


def latents_used(model, input_ids=None, **options):
    """The latents [rows, *event] that enter the decoder at the first step."""
    used = []
    original = model.hidden_states
    model.hidden_states = lambda latents, *rest: (used.append(latents.detach().clone()), original(latents, *rest))[1]
    infer, model.infer = model.infer, lambda *args, **kwargs: (infer(*args, **kwargs), used.clear())[0]
    model.generate(input_ids, max_new_tokens=1, **options)
    del model.hidden_states, model.infer
    return used[0]


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_the_context_can_be_used_to_its_end(model, side):
    """A context of 32: prompts of 7 tokens (padded to 11 or not) and 25 new ones fit, one more does not."""
    input_ids, mask = texts(2, 8), None
    if side != "none":
        input_ids, mask = padded(texts(2, 8), [8, 8], side, total=12)
    latents = prior_latents(model, input_ids)
    assert model.generate(input_ids, latents, mask, max_new_tokens=25).shape[1] == 33
    with pytest.raises(InputError, match="context"):
        model.generate(input_ids, latents, mask, max_new_tokens=26)


def test_a_text_ends_at_its_end_token(model):
    model.config.eos_token_id = model.generation_config.eos_token_id = EOS
    model.lm_head.weight.data[EOS] = 0
    latents = prior_latents(model, texts(64, 2))
    found = model.generate(texts(64, 2), latents, max_new_tokens=20, do_sample=True, seed=0, pad_token_id=PAD)
    ended = 0
    for row in found[:, 2:].tolist():
        if EOS in row:
            ended += 1
            assert set(row[row.index(EOS) + 1 :]) <= {PAD}
    assert 5 < ended < 64


# ---- latents ---------------------------------------------------------------------------------------------------------


def test_the_latent_decides_the_text(ltm):
    """One prompt, many latents, no sampling."""
    latents = prior_latents(ltm, texts(32, 3))
    found = small_model("ltm", tie_word_embeddings=False).generate(
        texts(1, 3).expand(32, -1), latents, max_new_tokens=8
    )
    assert len(found.unique(dim=0)) > 4


def test_one_latent_for_all_prompts(model):
    input_ids = texts(3, 4)
    latents = prior_latents(model, input_ids)[:1]
    given = model.generate(input_ids, latents, max_new_tokens=5)
    assert torch.equal(given, model.generate(input_ids, latents.expand(3, *latents.shape[1:]), max_new_tokens=5))


def test_latents_without_prompts_start_from_bos(model):
    latents = prior_latents(model, texts(3, 2))
    found = model.generate(latents=latents, max_new_tokens=5)
    assert found.shape == (3, 6) and (found[:, 0] == BOS).all()
    assert torch.equal(found, model.generate(torch.full((3, 1), BOS), latents, max_new_tokens=5))


def test_a_prompt_is_inferred_once(ltm):
    asked = []
    original = ltm.infer
    ltm.infer = lambda *args, **options: (asked.append(len(args[0])), original(*args, **options))[1]
    ltm.generate(texts(2, 4), max_new_tokens=5, num_return_sequences=3, do_sample=True, seed=0)
    assert asked == [2]


def test_latents_of_a_prompt_come_from_its_posterior(ltm):
    """Mean and deviation of 500 draws, within 4.5 standard errors."""
    input_ids = texts(1, 6)
    posterior = ltm.infer(input_ids, seed=3)
    drawn = latents_used(ltm, input_ids, seed=3, num_return_sequences=500, do_sample=True)
    standard = (drawn - posterior.mean) / posterior.stddev
    assert standard.mean(0).abs().max() < 4.5 / 500**0.5
    assert (standard.std(0) - 1).abs().max() < 4.5 / 1000**0.5


@pytest.mark.parametrize("prompt", [None, torch.full((1, 1), BOS)], ids=["nothing", "BOS"])
def test_without_a_prompt_latents_come_from_the_prior(ltm, prompt):
    def infer(*args, **options):
        raise AssertionError("nothing to infer from")

    ltm.infer = infer
    drawn = latents_used_from_prior(ltm, prompt, seed=3, num_return_sequences=500, do_sample=True)
    assert drawn.shape == (500, *ltm.latent_shape)
    assert drawn.mean(0).abs().max() < 4.5 / 500**0.5
    assert (drawn.std(0) - 1).abs().max() < 4.5 / 1000**0.5


def latents_used_from_prior(model, input_ids, **options):
    used = []
    original = model.hidden_states
    model.hidden_states = lambda latents, *rest: (used.append(latents.clone()), original(latents, *rest))[1]
    model.generate(input_ids, max_new_tokens=1, **options)
    return used[0]


def test_prompts_with_and_without_text_in_one_batch():
    """BOS alone draws from the prior, its neighbour from the posterior, which starts from a narrow one."""
    ltm = small_model("ltm", inference_start="fixed", inference_start_log_variance=-8.0)
    input_ids, mask = padded(texts(2, 6), [6, 1], "left")
    used = latents_used(ltm, input_ids, attention_mask=mask, seed=1)
    keys = sequence_keys(input_ids, mask)
    for row, distribution in enumerate((ltm.infer(input_ids, mask, seed=1), ltm.prior(2, 6))):
        drawn = ltm.draw_latents(distribution, keys, 1, seed=1, stream=Stream.GENERATION)[0]
        assert torch.equal(used[row], drawn[row])


def test_each_returned_sequence_has_its_own_latent():
    """Of posteriors that are narrow, so a latent tells whose it is."""
    ltm = small_model("ltm", inference_start="fixed", inference_start_log_variance=-8.0)
    used = latents_used(ltm, texts(2, 4), seed=0, num_return_sequences=5)
    assert used.shape == (10, *ltm.latent_shape)
    assert len(used.flatten(1).unique(dim=0)) == 10
    mean = ltm.infer(texts(2, 4), seed=0).mean
    near = torch.cdist(used.flatten(1), mean.flatten(1)).argmin(1)
    assert near.tolist() == [0] * 5 + [1] * 5  # rows of one prompt together


def test_two_equal_prompts_get_two_latents(ltm):
    used = latents_used(ltm, texts(1, 4).expand(2, -1), seed=0)
    assert not torch.equal(used[0], used[1])


def test_beams_share_a_latent(ltm):
    found = ltm.generate(texts(2, 4), max_new_tokens=4, num_beams=4, num_return_sequences=3, seed=0)
    assert found.shape == (6, 8)
    used = latents_used(ltm, texts(2, 4), num_beams=4, num_return_sequences=3, seed=0)
    assert len(used.flatten(1).unique(dim=0)) == 2


# ---- z inferred again ------------------------------------------------------------------------------------------------


def inferred_from(model, monkeypatch):
    """The texts that `infer` is asked about while the test runs: one list of rows, without padding, for each call."""
    asked, infer = [], model.infer

    def listen(input_ids, attention_mask, *args, **options):
        asked.append([row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)])
        return infer(input_ids, attention_mask, *args, **options)

    monkeypatch.setattr(model, "infer", listen)
    return asked


def ending(model):
    """The model with an end token that comes up now and then."""
    model.config.eos_token_id = model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.lm_head.weight.data[EOS] = 0
    return model


@pytest.mark.parametrize("way", ["greedy", "sampling"])
@pytest.mark.parametrize("every", [8, 9, 1000])
def test_a_first_part_as_long_as_the_text_is_the_plain_scheme(model, way, every):
    input_ids, mask = padded(texts(3, 5), [5, 2, 1], "right")
    options = {"attention_mask": mask, "max_new_tokens": 8, "num_return_sequences": 2, "seed": 3, **WAYS[way]}
    assert torch.equal(model.generate(input_ids, reinfer_every=every, **options), model.generate(input_ids, **options))


@pytest.mark.parametrize("way", ["greedy", "sampling"])
@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize("cache", [True, False])
def test_a_control_writes_the_same_in_parts(way, every, cache):
    """Rows that end and rows that do not, of unequal prompts."""
    model = ending(small_model("autoregressive", tie_word_embeddings=False))
    input_ids, mask = padded(texts(12, 5), [5, 2, 1, 3] * 3, "left")
    options = {"attention_mask": mask, "max_new_tokens": 9, "seed": 1, "use_cache": cache, **WAYS[way]}
    plain = model.generate(input_ids, **options)
    if way == "sampling":
        assert 0 < int((plain[:, 5:] == EOS).any(1).sum()) < 12
    assert torch.equal(model.generate(input_ids, reinfer_every=every, **options), plain)


def test_a_q_that_hears_nothing_and_is_sure_writes_the_same_in_parts():
    """q = N(0, e^−40) whatever the text: each part has the first one's z."""
    model = small_model(
        "ltm", tie_word_embeddings=False, inference_steps=0, inference_start="fixed", inference_start_log_variance=-40.0
    )
    input_ids, mask = padded(texts(3, 5), [5, 2, 3], "left")
    options = {"attention_mask": mask, "max_new_tokens": 10, "seed": 0}
    plain = model.generate(input_ids, **options)
    assert torch.equal(model.generate(input_ids, reinfer_every=3, **options), plain)
    # and with a q that hears the text, the parts differ
    model.config.inference_steps, model.config.inference_lr = 4, 2.0
    assert not torch.equal(model.generate(input_ids, reinfer_every=3, **options), model.generate(input_ids, **options))


def test_each_part_is_inferred_from_exactly_the_text_so_far(ltm, monkeypatch):
    asked = inferred_from(ltm, monkeypatch)
    input_ids, mask = padded(texts(3, 5), lengths := [5, 2, 3], "right")
    found = ltm.generate(input_ids, attention_mask=mask, max_new_tokens=7, reinfer_every=3, do_sample=True, seed=0)
    prompts = [input_ids[row, :length].tolist() for row, length in enumerate(lengths)]
    new = found[:, 5:].tolist()
    assert found.shape == (3, 12)
    assert asked == [
        [prompt + written[:end] for prompt, written in zip(prompts, new, strict=True)] for end in (0, 3, 6)
    ]


def test_from_bos_alone_the_first_part_is_the_priors_and_the_others_are_inferred(ltm, monkeypatch):
    asked = inferred_from(ltm, monkeypatch)
    found = ltm.generate(max_new_tokens=5, reinfer_every=2, num_return_sequences=3, do_sample=True, seed=0)
    assert asked == [[row[: 1 + end] for row in found.tolist()] for end in (2, 4)]


def test_each_part_is_written_with_a_new_draw_from_its_own_posterior(ltm, monkeypatch):
    used, original, infer = [], ltm.hidden_states, ltm.infer

    def listen(latents, *rest, **options):
        used.append(latents.detach().clone())
        return original(latents, *rest, **options)

    def quiet(*args, **options):
        monkeypatch.setattr(ltm, "hidden_states", original)
        posterior = infer(*args, **options)
        monkeypatch.setattr(ltm, "hidden_states", listen)
        return posterior

    monkeypatch.setattr(ltm, "infer", quiet)
    input_ids = texts(1, 4)
    found = ltm.generate(input_ids, max_new_tokens=4, reinfer_every=2, do_sample=True, seed=5)
    latents = [used[0], used[2]]
    for step, end in enumerate((4, 6)):
        seen = found[:, :end]
        expected = ltm.draw_latents(infer(seen, seed=5), sequence_keys(seen), 1, seed=5, stream=Stream.GENERATION)[0]
        torch.testing.assert_close(latents[step], expected, atol=1e-4, rtol=0)
    assert not torch.allclose(*latents, atol=1e-2)


@pytest.mark.parametrize("every", [1, 3])
def test_a_row_that_has_ended_is_padded_while_the_others_go_on(every):
    model = ending(small_model("ltm", tie_word_embeddings=False, inference_steps=1))
    input_ids, mask = padded(texts(16, 3), [3, 1, 2, 3] * 4, "left")
    found = model.generate(
        input_ids, attention_mask=mask, max_new_tokens=12, reinfer_every=every, do_sample=True, seed=0
    )
    assert torch.equal(found[:, :3], input_ids)
    ended = 0
    for row in found[:, 3:].tolist():
        if EOS in row:
            ended += 1
            assert set(row[row.index(EOS) + 1 :]) <= {PAD}
    assert 2 < ended < 16
    assert found.shape == (16, 15)


def test_what_stands_after_an_end_is_never_inferred_from(monkeypatch):
    model = ending(small_model("ltm", tie_word_embeddings=False, inference_steps=1))
    asked = inferred_from(model, monkeypatch)
    model.generate(texts(12, 3), max_new_tokens=10, reinfer_every=2, do_sample=True, seed=0)
    seen = [text for call in asked for text in call]
    assert any(EOS in text for text in seen)
    assert all(EOS not in text[:-1] for text in seen)


def test_when_all_have_ended_nothing_more_is_written(monkeypatch):
    model = ending(small_model("ltm", inference_steps=1))
    asked = inferred_from(model, monkeypatch)
    found = model.generate(texts(2, 3), max_new_tokens=20, reinfer_every=2, eos_token_id=list(range(VOCABULARY)))
    assert found.shape == (2, 4) and len(asked) == 1


@pytest.mark.parametrize("every", [1, 2])
def test_prompts_in_a_batch_continue_in_parts_as_alone(every):
    model = small_model("ltm", tie_word_embeddings=False, inference_steps=2)
    input_ids, lengths = texts(4, 6), [4, 6, 1, 2]
    rows, mask = padded(input_ids, lengths, "right")
    options = {"max_new_tokens": 5, "reinfer_every": every, "seed": 2}
    together = model.generate(rows, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = model.generate(input_ids[row : row + 1, :length], **options)
        assert torch.equal(together[row, -5:], alone[0, -5:])


def test_each_returned_sequence_goes_its_own_way(ltm):
    options = {"max_new_tokens": 8, "reinfer_every": 3, "do_sample": True, "seed": 0}
    found = ltm.generate(texts(2, 4), num_return_sequences=3, **options)
    assert found.shape == (6, 12) and len(found.unique(dim=0)) == 6
    assert torch.equal(found[:, :4], texts(2, 4).repeat_interleave(3, 0))


@pytest.mark.parametrize("number", [1, 3])
def test_given_latents_write_the_first_part(ltm, monkeypatch, number):
    asked = inferred_from(ltm, monkeypatch)
    latents = prior_latents(ltm, texts(2, 4))
    found = ltm.generate(texts(2, 4), latents, max_new_tokens=6, reinfer_every=4, num_return_sequences=number)
    plain = ltm.generate(texts(2, 4), latents, max_new_tokens=4)
    assert found.shape == (2 * number, 10)
    assert torch.equal(found[:, :8], plain.repeat_interleave(number, 0))
    assert asked == [found[:, :8].tolist()]


def test_one_latent_for_all_prompts_in_parts(ltm):
    latents = prior_latents(ltm, texts(1, 4))
    found = ltm.generate(texts(3, 4), latents, max_new_tokens=6, reinfer_every=4, seed=0)
    assert torch.equal(found[:, :8], ltm.generate(texts(3, 4), latents, max_new_tokens=4))


def test_parts_repeat_with_a_seed_and_leave_the_generator_alone(ltm):
    def write(seed):
        return ltm.generate(texts(3, 4), max_new_tokens=8, reinfer_every=3, do_sample=True, seed=seed)

    before = torch.get_rng_state()
    first = write(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(write(5), first) and not torch.equal(write(6), first)


def test_the_context_can_be_used_to_its_end_in_parts(model):
    assert model.generate(texts(2, 8), max_new_tokens=25, reinfer_every=10).shape == (2, 33)
    with pytest.raises(InputError, match="context"):
        model.generate(texts(2, 8), max_new_tokens=26, reinfer_every=10)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"reinfer_every": 0}, "at least 1"),
        ({"reinfer_every": -2}, "at least 1"),
        ({"reinfer_every": 2, "num_beams": 3}, "neither with beams"),
        ({"reinfer_every": 2, "return_dict_in_generate": True}, "return_dict"),
    ],
)
def test_what_parts_cannot_be_written_with(model, options, words):
    with pytest.raises(InputError, match=words):
        model.generate(texts(2, 4), max_new_tokens=4, **options)


def test_padding_after_the_end_is_the_callers(model):
    ending(model)
    options = {"max_new_tokens": 10, "do_sample": True, "seed": 0, "pad_token_id": 7}
    found = model.generate(texts(12, 3), reinfer_every=2, **options)
    after = [row[row.index(EOS) + 1 :] for row in found[:, 3:].tolist() if EOS in row]
    assert any(after) and all(set(row) <= {7} for row in after)


# ---- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_repeats_a_call_and_leaves_the_generator_alone(model, way):
    def write(seed):
        return model.generate(texts(3, 4), max_new_tokens=8, seed=seed, **WAYS[way])

    before = torch.get_rng_state()
    first = write(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(write(5), first)
    if way == "sampling":
        assert not torch.equal(write(6), first)


def test_without_a_seed_torchs_generator_decides(model):
    def write():
        return model.generate(texts(3, 4), max_new_tokens=8, do_sample=True)

    torch.manual_seed(0)
    first, second = write(), write()
    torch.manual_seed(0)
    assert torch.equal(write(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [-1, 2**62, 2**64])
def test_any_integer_is_a_seed(model, seed):
    assert model.generate(max_new_tokens=2, seed=seed).shape == (1, 3)


# ---- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 3, 7),
        (2, 2, 4, 8),
        (2, 3, 3, 8),
        (2, 8),
        (3, 2, 3, 8),
        (2, 3, 8),
        (2, 2, 2, 3, 8),
    ],
)
def test_latents_of_another_shape(ltm, shape):
    with pytest.raises(InputError, match="latents"):
        ltm.generate(texts(2, 4), torch.zeros(shape), max_new_tokens=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(ltm, value):
    latents = torch.zeros(2, *ltm.latent_shape)
    latents[1, 0, 0, 0] = value
    with pytest.raises(InputError, match="not finite"):
        ltm.generate(texts(2, 4), latents, max_new_tokens=2)


@pytest.mark.parametrize("changes", [{"max_new_tokens": 0}, {"num_return_sequences": 0}])
def test_counts_below_one(model, changes):
    with pytest.raises(InputError, match="at least 1"):
        model.generate(texts(2, 4), **changes)


def test_a_prompt_longer_than_the_context(model):
    with pytest.raises(InputError, match=r"prompt of 39 tokens .* context of 32"):
        model.generate(texts(1, 40), max_new_tokens=1)


def test_no_prompt_without_bos(model):
    model.config.bos_token_id = None
    with pytest.raises(InputError, match="bos_token_id"):
        model.generate(max_new_tokens=2)
