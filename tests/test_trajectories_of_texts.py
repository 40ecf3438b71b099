"""Trajectories of texts, in memory, in files and through the command line."""

import json
import math

import numpy as np
import pytest
import torch
from tests.toy import moved, small_model
from tests.training.runs import unchecked
from typer.testing import CliRunner

from latentlm import InputError, save
from latentlm.cli import app
from latentlm.data.tokenizers import train_tokenizer
from latentlm.text import Encoding, encode, read_latents, write

TEXTS = ["the cat sat", "a", "some dogs are in the garden", "", "naïve café"]


@pytest.fixture(scope="module")
def written():
    """A model of texts that end, its tokenizer, and what it says of some."""
    tokenizer = train_tokenizer(TEXTS, 280)
    ids = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    model = moved(small_model("gp_vae", length_model="categorical", vocab_size=len(tokenizer), **ids))
    return model, tokenizer, encode(model, tokenizer, TEXTS, batch_size=2)


def test_trajectories_are_as_long_as_their_texts(written):
    model, tokenizer, encoding = written
    lengths = [len(ids) + 1 for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]
    assert encoding.lengths.tolist() == lengths and len(set(lengths)) > 3
    assert encoding.mean.shape == (5, max(lengths), 4)
    eos = tokenizer.eos_token_id
    for row, (text, length) in enumerate(zip(TEXTS, lengths, strict=True)):
        q = model.infer(torch.tensor([[eos, *tokenizer(text, add_special_tokens=False)["input_ids"], eos]]))
        np.testing.assert_allclose(encoding.mean[row, :length], q.mean[0].detach(), atol=1e-5)
        np.testing.assert_allclose(encoding.variance[row, :length], q.variance[0].detach(), atol=1e-5)
        assert not encoding.mean[row, length:].any() and not encoding.variance[row, length:].any()


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_trajectories_of_a_file_are_written_as_text(written, suffix, tmp_path):
    model, tokenizer, encoding = written
    encoding.save(tmp_path / f"latents{suffix}")
    latents, lengths = read_latents(tmp_path / f"latents{suffix}")
    np.testing.assert_array_equal(latents, encoding.mean)
    assert lengths.tolist() == encoding.lengths.tolist()
    found = write(model, tokenizer, latents=latents, lengths=lengths)
    assert len(set(found)) > 2
    for row, length in enumerate(lengths.tolist()):
        states = model.states(latents[row : row + 1, :length], torch.tensor([length]))[0, : length - 1]
        logits = states @ model.vocabulary().T
        logits[:, tokenizer.eos_token_id] = -math.inf
        assert found[row] == tokenizer.decode(logits.argmax(-1))


def test_trajectories_go_through_the_command_line(written, tmp_path):
    model, tokenizer, encoding = written
    save(model, tokenizer, tmp_path / "m")
    given = [part for text in TEXTS for part in ("--text", text)]
    with unchecked():
        encoded = CliRunner().invoke(app, ["encode", str(tmp_path / "m"), *given, "--output", str(tmp_path / "z.npz")])
        options = ["--greedy", "--latents", str(tmp_path / "z.npz"), "--json", str(tmp_path / "texts.json")]
        found = CliRunner().invoke(app, ["generate", str(tmp_path / "m"), *options])
        too_long = CliRunner().invoke(app, ["generate", str(tmp_path / "m"), *options, "--prompt", 2 * TEXTS[2]])
    assert encoded.exit_code == found.exit_code == 0
    lengths = torch.tensor(encoding.lengths)
    expected = write(model, tokenizer, latents=torch.tensor(encoding.mean), lengths=lengths)
    assert json.loads((tmp_path / "texts.json").read_text())["texts"] == expected
    assert isinstance(too_long.exception, InputError) and "do not reach over a prompt" in str(too_long.exception)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_trajectories_of_one_length_are_read_back(suffix, tmp_path):
    mean = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    Encoding(np.arange(2), mean, mean, np.array([3, 3])).save(tmp_path / f"latents{suffix}")
    latents, lengths = read_latents(tmp_path / f"latents{suffix}")
    np.testing.assert_array_equal(latents, mean)
    assert lengths is None or lengths.tolist() == [3, 3]


@pytest.mark.parametrize(
    "lengths",
    [[1, 2], [0, 1, 2], [1, 2, 9], [1.0, 2.0, 3.0], [[1], [2], [3]], ["1", "2", "3"], []],
    ids=str,
)
def test_damaged_lengths_are_one_sentence(lengths, tmp_path):
    mean = np.zeros((3, 4, 2), dtype=np.float32)
    np.savez(tmp_path / "latents.npz", ids=np.arange(3), mean=mean, variance=mean, lengths=np.array(lengths))
    with pytest.raises(InputError, match=r"latents.npz: 'lengths' must be whole numbers, between 1 and the latents'"):
        read_latents(tmp_path / "latents.npz")


def test_lengths_of_latents_without_times_are_refused(tmp_path):
    np.savez(tmp_path / "latents.npz", mean=np.zeros((3, 4)), lengths=np.array([1, 2, 3]))
    with pytest.raises(InputError, match="'lengths' must be whole numbers"):
        read_latents(tmp_path / "latents.npz")
