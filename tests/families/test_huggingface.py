"""Plain causal language models of transformers as a family."""

import math

import pytest
import torch
from tests.toy import BOS, EOS, PAD, VOCABULARY, Rows, padded, pretrained_part, small_variant, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import latentlm
from latentlm import InputError
from latentlm.evaluation.likelihood import evaluate
from latentlm.families import HuggingFaceLM, HuggingFaceLMConfig


@pytest.mark.parametrize("variant", ["huggingface", "phi of huggingface"])
@torch.no_grad()
def test_what_is_saved_is_plain(variant, tmp_path):
    model, input_ids = small_variant(variant), texts(3, 9)
    tokenizer = AutoTokenizer.from_pretrained(pretrained_part("gpt2"))
    latentlm.save(model, tokenizer, tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    expected = plain(input_ids[:, :-1]).logits
    loaded, _ = latentlm.load(tmp_path / "m")
    assert isinstance(loaded, HuggingFaceLM)
    for one in (model, loaded):
        torch.testing.assert_close(one.decode(torch.zeros(3, 0), input_ids), expected, atol=1e-6, rtol=0)
    # a checkpoint is read into a model by the plain names
    other = small_variant(variant, architecture_fields=model.config.architecture_fields)
    for parameter in other.parameters():
        parameter.add_(1.0)
    other.load_state_dict(plain.state_dict(), strict=False)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


@torch.no_grad()
def test_any_causal_model_is_scored_exactly():
    """Sums over sums of the plain model's own log-probabilities, text by text."""
    model, _ = latentlm.load(pretrained_part("llama"))
    plain = AutoModelForCausalLM.from_pretrained(pretrained_part("llama")).eval()
    rows = [row[:length] for row, length in zip(texts(5, 12), [12, 9, 4, 2, 7], strict=True)]
    nats = tokens = 0
    for row in rows:
        log_probabilities = plain(row[None]).logits[0, :-1].double().log_softmax(-1)
        nats -= float(log_probabilities.gather(1, row[1:, None]).sum())
        tokens += len(row) - 1
    figures = evaluate(model, Rows(rows), batch_size=2)
    assert figures["exact"]
    assert math.isclose(figures["elbo_nll_per_token"], nats / tokens, rel_tol=1e-6)
    assert figures["kl_per_token"] == 0 and figures["iw_nll_per_token"] == figures["elbo_nll_per_token"]


def test_no_change_of_inference_is_no_error():
    """As a sweep scores it; the model's own sizes are not in our config."""
    model, _ = latentlm.load(pretrained_part("gpt2"))
    model.change_inference()
    with pytest.raises(InputError, match="it has nothing to set"):
        model.change_inference(inference_steps=3)


def test_generation_is_that_of_transformers():
    model, _ = latentlm.load(pretrained_part("gpt2"))
    plain = AutoModelForCausalLM.from_pretrained(pretrained_part("gpt2")).eval()
    rows, mask = padded(texts(3, 6), [6, 3, 2], "left")
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(rows, **given), plain.generate(rows, **given))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "bart_of_mine"}, "architecture must be"),
        ({"architecture_fields": {"n_embed": 8}}, "n_embed, which a config of gpt2 lacks"),
        ({"architecture_fields": {"n_embd": "x"}}, "architecture_fields"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1"),
        ({"kl_target": 3.0}, "kl_target"),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(Exception, match=message):
        HuggingFaceLMConfig(**{"vocab_size": VOCABULARY, **changes})


def test_what_is_filled_in():
    ends = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = HuggingFaceLMConfig(vocab_size=VOCABULARY, max_position_embeddings=17, **ends).of_transformers()
    assert (config.vocab_size, config.n_positions) == (VOCABULARY, 17)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, EOS, PAD)


def test_no_causal_model(tmp_path):
    for kind, message in (("bert", "no causal language model"), ("t5", "'t5'")):
        with pytest.raises(InputError, match=message):
            latentlm.load(pretrained_part(kind))
