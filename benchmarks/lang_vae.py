"""A training step of our LangVAE beside decoding token by token in training, as the published code does.

GPT-2's shape, 6 layers of 384, vocabulary 8192, as the decoder; BERT's, 6 layers of 384, as the encoder; both frozen,
with random weights; latent 64, texts of 32 tokens, batch 16. A step is encoding, decoding, backward and AdamW's update
of what stands between the two.

The other side is `Stepwise`: the same two models and the same maps; z's keys and values are put into the decoder's
cache before the token that brings them (--injection), the decoder runs once for each token, and the loss is of all its
steps. It reads the text's own tokens where the published code reads its argmax, so that both sides have one loss:
asserted with its gradients, from our noise. That side has the encoder's tokens; ours makes them from the decoder's.

    python benchmarks/lang_vae.py [--injection interleaved] [--threads 1] [--rounds 9] [--json FILE]
"""

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _report import Comparison, add_json_option, write
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from latentlm import LangVAE, LangVAEConfig
from latentlm.distributions import Stream, sequence_keys, sequence_noise

VOCABULARY, LAYERS, WIDTH, HEADS, LATENT = 8192, 6, 384, 6, 64
TARGETS = {"stepwise": 5.0, "with kept embeddings": 6.0}
AGREEMENT = 1e-4


def parts(folder: Path) -> tuple[str, str]:
    """A decoder and an encoder with random weights, and a tokenizer that knows their tokens as words."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    decoder = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, **ends))
    shape = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS}
    encoder = BertModel(BertConfig(vocab_size=VOCABULARY, intermediate_size=4 * WIDTH, **shape))
    words = {"<end>": 0} | {f"w{number}": number for number in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<end>")
    )
    for name, model in (("decoder", decoder), ("encoder", encoder)):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    return str(folder / "decoder"), str(folder / "encoder")


class Texts(Dataset):
    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "num_bytes": 0, "index": index}


class Stepwise(nn.Module):
    """The same model, decoded token by token. Shares the weights of ours."""

    def __init__(self, ours: LangVAE):
        super().__init__()
        self.ours = ours
        name = ours.config.decoder_name
        self.decoder = GPT2LMHeadModel.from_pretrained(name, attn_implementation="sdpa").eval().requires_grad_(False)

    def forward(self, input_ids: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            states = self.ours.text_encoder(input_ids[:, 1:]).last_hidden_state
        mean, log_variance = self.ours.encoder(states.mean(1), None)
        keys, values = self.ours.injection(mean + (0.5 * log_variance).exp() * noise)
        cache, slots, nll = DynamicCache(), self.ours.config.latent_slots, torch.zeros(())
        prefix = self.ours.config.injection == "prefix"
        for t in range(input_ids.shape[1] - 1):
            for slot in (range(slots) if t == 0 else ()) if prefix else (t % slots,):
                for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                    cache.update(key[:, :, slot : slot + 1], value[:, :, slot : slot + 1], layer)
            position = torch.full((len(input_ids), 1), t)
            logits = self.decoder(input_ids[:, t : t + 1], past_key_values=cache, position_ids=position).logits
            nll = nll + F.cross_entropy(logits[:, 0], input_ids[:, t + 1], reduction="sum")
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return (nll + kl) / (input_ids.shape[1] - 1) / len(input_ids)


def assert_agreement(ours: LangVAE, stepwise: Stepwise, input_ids: Tensor, noise: Tensor) -> dict[str, float]:
    found, gradients = [], []
    for loss in (ours(input_ids, seed=3).loss, stepwise(input_ids, noise)):
        ours.zero_grad()
        loss.backward()
        found.append(float(loss.detach()))
        gradients.append({name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None})
    apart = {name: float((g - gradients[1][name]).abs().max() / g.abs().max()) for name, g in gradients[0].items()}
    figures = {"loss": abs(found[0] / found[1] - 1), "gradients": max(apart.values())}
    assert max(figures.values()) < AGREEMENT, figures
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injection", choices=("prefix", "interleaved"), default="interleaved")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    add_json_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    print(
        f"{given.injection}, {given.batch} texts of {given.length} tokens, latent {LATENT}; "
        f"cpu, {given.threads} threads, {given.rounds} rounds; {versions}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        decoder, encoder = parts(Path(folder))
        config = LangVAEConfig(
            decoder_name=decoder,
            encoder_name=encoder,
            vocab_size=VOCABULARY,
            latent_size=LATENT,
            injection=given.injection,
            max_position_embeddings=given.length,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        ours = LangVAE(config).train()
        stepwise = Stepwise(ours)
        rows = torch.randint(1, VOCABULARY, (given.batch, 1 + given.length), generator=torch.Generator().manual_seed(1))
        rows[:, 0] = 0
        noise = sequence_noise(sequence_keys(rows), (LATENT,), seed=3, stream=Stream.SCORE)
        agreement = assert_agreement(ours, stepwise, rows, noise)
        for name, apart in agreement.items():
            print(f"apart in {name}: {apart:.1e}")
        ours.keep_embeddings(Path(folder) / "kept", Texts(rows))
        kept = ours._kept
        trained = [p for p in ours.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)

        def step(loss_of: Callable[[], Tensor]) -> float:
            begun = time.perf_counter()
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()
            return time.perf_counter() - begun

        times: dict[str, list[float]] = {"ours": [], "with kept embeddings": [], "stepwise": []}
        for turn in range(-1, given.rounds):  # the first round warms up
            for side in times if turn % 2 else reversed(times):
                ours._kept = kept if side == "with kept embeddings" else None
                took = step(lambda s=side: stepwise(rows, noise) if s == "stepwise" else ours(rows).loss)  # type: ignore[misc]
                if turn >= 0:
                    times[side].append(took)
        median = {side: statistics.median(taken) for side, taken in times.items()}
        comparisons = [
            Comparison.of_costs(f"{what}, {given.injection}", median[side], median["stepwise"], "s", "stepwise", target)
            for what, side, target in (
                ("training step", "ours", TARGETS["stepwise"]),
                ("training step with kept embeddings", "with kept embeddings", TARGETS["with kept embeddings"]),
            )
        ]
        for one in comparisons:
            print(one.line)
        best = {f"best, {side}, s": min(taken) for side, taken in times.items()}
    write(given.json, vars(given), comparisons, best, agreement)


if __name__ == "__main__":
    main()
