"""Latents of texts, and texts from latents."""

import numpy as np
import pandas as pd
import pytest
import torch
from tests.toy import small_model
from tests.training.runs import trained

from latentlm import InputError, load
from latentlm.data import text_batch
from latentlm.data.tokenizers import train_word_tokenizer
from latentlm.text import Encoding, encode, write

TEXTS = ["the cat sat", "a", "some dogs are in the garden", "naïve café 😀", "the cat sat", ""]


@pytest.fixture(scope="module", params=["ltm", "autoregressive"])
def loaded(request):
    return load(trained(request.param))


@pytest.fixture(scope="module")
def ltm():
    return load(trained("ltm"))


@pytest.fixture(scope="module")
def encoding(ltm):
    return encode(*ltm, TEXTS)


# ---- encode ------------------------------------------------------------------------------------------------------


def test_each_row_is_the_posterior_of_its_text_alone(ltm, encoding):
    model, tokenizer = ltm
    assert encoding.ids.tolist() == list(range(len(TEXTS)))
    assert encoding.mean.shape == encoding.variance.shape == (len(TEXTS), 2, 2, 4)
    for index, text in enumerate(TEXTS):
        batch = text_batch(tokenizer, [text])
        assert batch["input_ids"][0, -1] == tokenizer.eos_token_id
        posterior = model.infer(batch["input_ids"], batch["attention_mask"], seed=0)
        np.testing.assert_allclose(encoding.mean[index], posterior.mean[0], atol=1e-5)
        np.testing.assert_allclose(encoding.variance[index], posterior.variance[0], atol=1e-5)


def test_equal_texts_have_equal_latents_and_different_ones_different(encoding):
    np.testing.assert_allclose(encoding.mean[0], encoding.mean[4], atol=1e-6)
    assert np.abs(encoding.mean[0] - encoding.mean[2]).max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_change_nothing(ltm, encoding, batch_size):
    other = encode(*ltm, TEXTS, batch_size=batch_size)
    np.testing.assert_allclose(other.mean, encoding.mean, atol=1e-5)
    np.testing.assert_allclose(other.variance, encoding.variance, atol=1e-5)


def test_the_seed_chooses_the_noise(ltm, encoding):
    assert np.array_equal(encode(*ltm, TEXTS).mean, encoding.mean)
    assert not np.array_equal(encode(*ltm, TEXTS, seed=1).mean, encoding.mean)


def test_progress_is_told(ltm):
    told = []
    encode(*ltm, TEXTS, batch_size=4, on_progress=lambda *step: told.append(step))
    assert told == [(4, 6), (6, 6)]


def test_the_control_has_latents_without_numbers():
    encoding = encode(*load(trained("autoregressive")), TEXTS)
    assert encoding.mean.shape == (len(TEXTS), 0)


def test_a_text_as_long_as_the_context_fits_and_a_longer_one_is_named(ltm):
    _, tokenizer = ltm
    word = tokenizer.encode(" the", add_special_tokens=False)
    fits = tokenizer.decode(word * (47 // len(word)))
    assert len(tokenizer(fits)["input_ids"]) == 47
    assert len(encode(*ltm, [fits]).ids) == 1
    with pytest.raises(InputError, match=r"text 1 has 49 tokens .* 48"):
        encode(*ltm, ["a", fits + " the"])


def test_no_text_is_an_error(ltm):
    with pytest.raises(InputError, match="no text"):
        encode(*ltm, [])


def test_one_string_is_no_list_of_texts(ltm):
    with pytest.raises(InputError, match="list"):
        encode(*ltm, "the cat")


# ---- files of latents --------------------------------------------------------------------------------------------


def test_npz_holds_ids_means_and_variances(encoding, tmp_path):
    encoding.save(tmp_path / "latents.npz")
    with np.load(tmp_path / "latents.npz", allow_pickle=False) as saved:
        assert set(saved) == {"ids", "mean", "variance"}
        for name in saved:
            np.testing.assert_array_equal(saved[name], getattr(encoding, name))


def test_parquet_holds_a_row_for_each_text(encoding, tmp_path):
    encoding.save(tmp_path / "latents.parquet")
    saved = pd.read_parquet(tmp_path / "latents.parquet")
    assert list(saved.columns) == ["id", "mean", "variance", "shape"]
    assert saved["id"].tolist() == encoding.ids.tolist()
    for name in ("mean", "variance"):
        rows = [row.reshape(shape) for row, shape in zip(saved[name], saved["shape"], strict=True)]
        np.testing.assert_array_equal(np.stack(rows), getattr(encoding, name))


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_latents_without_numbers_are_saved_too(tmp_path, suffix):
    empty = np.zeros((2, 0), dtype=np.float32)
    Encoding(np.arange(2), empty, empty).save(tmp_path / f"latents{suffix}")
    assert (tmp_path / f"latents{suffix}").stat().st_size > 0


@pytest.mark.parametrize("name", ["latents.csv", "latents", "latents.NPY", "missing/latents.npz"])
def test_a_place_for_latents_that_cannot_be_is_named(encoding, tmp_path, name):
    with pytest.raises(InputError, match=name.rpartition("/")[2]):
        encoding.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


# ---- write -------------------------------------------------------------------------------------------------------


def test_texts_go_on_from_their_prompts(loaded):
    prompts = ["the", "some dogs are in", "a"]
    texts = write(*loaded, prompts, max_new_tokens=8, do_sample=True, seed=1, num_return_sequences=2)
    assert len(texts) == 6
    for index, text in enumerate(texts):
        assert text.startswith(prompts[index // 2])
    assert len(set(texts)) == 6


def test_prompts_of_unequal_length_do_not_disturb_each_other(loaded):
    model, _ = loaded
    prompts = ["the", "some dogs are in the garden", "a cat"]
    latents = model.prior(1, 8).sample().expand(3, *model.prior(1, 8).event_shape)
    together = write(*loaded, prompts, latents=latents, max_new_tokens=8)
    alone = [write(*loaded, [prompt], latents=latents[:1], max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone


def test_words_go_on_after_a_blank():
    texts = ["the brave sailor painted a boat", "a kind teacher read the poem"]
    tokenizer = train_word_tokenizer(texts, 60)
    model = small_model("gpt_vae", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    options = {"max_new_tokens": 3, "seed": 0, "eos_token_id": None, "suppress_tokens": [0]}
    for text in write(model, tokenizer, ["the  Brave", "a"], do_sample=True, **options):
        assert text.startswith(("the  Brave ", "a "))  # the prompt as it was given, unknown words and blanks, too
        assert set(text.split()[-3:]) <= {*texts[0].split(), *texts[1].split(), "<unk>"}


@pytest.mark.parametrize("prompts", [(), ["the", "some dogs"]])
def test_a_text_ends_at_its_first_end_of_text(loaded, prompts):
    model, tokenizer = loaded
    options = {"max_new_tokens": 40, "do_sample": True, "seed": 3, "num_return_sequences": 60}
    texts = write(*loaded, prompts, **options)
    given = {} if not prompts else dict(text_batch(tokenizer, prompts, end=False))
    rows = model.generate(**given, **options)[:, 1 if not prompts else given["input_ids"].shape[1] :]
    ended = 0
    for index, (row, text) in enumerate(zip(rows.tolist(), texts, strict=True)):
        kept = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
        ended += len(kept) < len(row)
        assert text == (prompts[index // 60] if prompts else "") + tokenizer.decode(kept)
        assert tokenizer.eos_token not in text
    assert ended > 0


def test_a_seed_makes_texts_repeatable_and_leaves_torchs_generator_alone(loaded):
    options = {"max_new_tokens": 12, "do_sample": True}
    state = torch.get_rng_state()
    one, same, other = (write(*loaded, ["the"], seed=seed, **options) for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), state)
    assert write(*loaded, ["the"], **options) != write(*loaded, ["the"], **options)


def test_latents_decide_greedy_texts(ltm):
    generator = torch.Generator().manual_seed(0)
    latents = 3 * torch.randn(8, 2, 2, 4, generator=generator)
    texts = write(*ltm, latents=latents, max_new_tokens=12)
    assert texts == write(*ltm, latents=latents, max_new_tokens=12)
    assert len(set(texts)) > 1


def test_a_prompt_that_fills_the_context_is_an_error(ltm):
    with pytest.raises(InputError, match="context of 48"):
        write(*ltm, ["the cat " * 20], max_new_tokens=8)


def test_one_string_is_no_list_of_prompts(ltm):
    with pytest.raises(InputError, match="list"):
        write(*ltm, "the cat", max_new_tokens=8)
