"""Our GPTVAE beside x-transformers' in one process: training, its peak memory, cached generation.

Both: width 256, 4 decoder layers, 2 encoder layers, 8 heads of width 32, vocabulary 8192, a latent of 64, texts of 256
tokens after BOS, float32, the same token ids, latents, threads and fused AdamW. A training step is the ELBO's forward
and backward, and the update. A text is sampled from the whole distribution after BOS and a given z; asserts that each
side writes 128 tokens. Rounds alternate between the sides; medians over rounds.

The opponent (x_transformers.gpt_vae, version printed) has its faster settings where settings change no mathematics:
`attn_flash=True`, `cache_kv=True`, its default LayerNorm, no filter of logits. `attn_dim_head=32` for
equal widths (its default is 64), rotary positions over the whole head, as ours and as it advises, latents never dropped
(ours are never dropped; its default drops half of them, at the same cost). Its feed-forward layer is its default: GELU,
4 times the width, about the parameters of our gated one. Its embedding and projection are not tied, which its GPTVAE
does not offer; the parameters and the number of those that are no vocabulary table are printed.

Peak memory is of three training steps, each side in a fresh process: how far resident memory (on CUDA: allocated)
rises above what it is with the model built, so gradients, AdamW's moments and activations; and above what it is before,
so with the weights. Also asserts that our fast ways agree with the plain ones: the fused likelihood with cross_entropy
of `decode`, and cached greedy texts and their logits with one pass over the whole text.

    pip install x-transformers
    python benchmarks/gpt_vae.py [--threads 1] [--rounds 15] [--device cuda] [--json FILE]
"""

import argparse
import functools
import importlib.metadata
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _report import Comparison, add_json_option, write
from torch import Tensor, nn

from latentlm import GPTVAE, GPTVAEConfig
from latentlm.latent_lm import number_of_parameters

SIZES = {"vocabulary": 8192, "width": 256, "layers": 4, "encoder layers": 2, "heads": 8, "latent": 64}
LENGTH, BATCH, NEW_TOKENS = 256, 8, 128
TARGETS = {"training": 1.2, "generation, batch 1": 1.3, "generation, batch 8": 1.3}
MEMORY_TARGET = 1.0
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "fused": True}
TIE = 1e-4
SIDES = ("ours", "theirs")


def our_model() -> nn.Module:
    return GPTVAE(
        GPTVAEConfig(
            vocab_size=SIZES["vocabulary"],
            hidden_size=SIZES["width"],
            num_hidden_layers=SIZES["layers"],
            encoder_layers=SIZES["encoder layers"],
            num_attention_heads=SIZES["heads"],
            latent_size=SIZES["latent"],
            max_position_embeddings=LENGTH,
            sliding_window=None,
            bos_token_id=0,
            pad_token_id=0,
        )
    )


def their_model() -> nn.Module:
    from x_transformers.gpt_vae import GPTVAE as TheirGPTVAE

    head = SIZES["width"] // SIZES["heads"]
    return TheirGPTVAE(
        num_tokens=SIZES["vocabulary"],
        dim=SIZES["width"],
        depth=SIZES["layers"],
        enc_depth=SIZES["encoder layers"],
        heads=SIZES["heads"],
        attn_dim_head=head,
        dim_latent=SIZES["latent"],
        max_seq_len=LENGTH + 1,
        rotary_pos_emb=True,
        rotary_emb_dim=head,
        attn_flash=True,
        latents_dropout_prob=0.0,
    )


def made(side: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    return (our_model() if side == "ours" else their_model()).to(device)


def texts(device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, SIZES["vocabulary"], (BATCH, LENGTH + 1), generator=generator)
    input_ids[:, 0] = 0
    return input_ids.to(device)


def training_step(side: str, model: nn.Module, optimizer: torch.optim.Optimizer, input_ids: Tensor) -> None:
    model.train()
    optimizer.zero_grad()
    output = model(input_ids)
    (output.loss if side == "ours" else output).backward()
    optimizer.step()


def sampled(side: str, model: nn.Module, bos: Tensor, latents: Tensor) -> Tensor:
    """New tokens [batch, 128]."""
    model.eval()
    if side == "theirs":
        return model.generate(bos, NEW_TOKENS, latents=latents, cache_kv=True, filter_logits_fn=lambda logits: logits)
    return model.generate(
        bos, latents=latents, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=True, top_k=0
    )[:, 1:]


def assert_agreement(model: Any, input_ids: Tensor, latents: Tensor) -> dict[str, float]:
    """Our fast ways against the plain ones; the largest differences, and how many greedy tokens were compared."""
    model.eval()
    with torch.no_grad():
        logits, targets = model.decode(latents, input_ids), input_ids[:, 1:]
        plain = -nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        fused = model.log_likelihood(latents, input_ids)
        written = model.generate(
            input_ids[:, :1],
            latents=latents,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        cached = torch.stack(written.logits, 1)
        tokens = written.sequences
        anew = model(tokens[:, :-1], latents=latents, use_cache=False, logits_to_keep=NEW_TOKENS).logits
    best, likeliest = anew.topk(2)
    decided = (best[..., 0] - best[..., 1] > TIE).cumprod(1).bool()  # up to where rounding decides
    assert tokens.shape == (len(input_ids), 1 + NEW_TOKENS)
    assert torch.equal(tokens[:, 1:][decided], likeliest[..., 0][decided])
    torch.testing.assert_close(fused, plain.view_as(fused), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached, anew, atol=1e-4, rtol=1e-4)
    return {
        "log-likelihood of a token, fused and of decode, nats": float((fused - plain.view_as(fused)).abs().max()),
        "logits, cached and in one pass": float((cached - anew).abs().max()),
        "greedy tokens that agree": int(decided.sum()),
    }


# ---- memory -----------------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most since `reset_peak`."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def reset_peak(device: str) -> int:
    """Forgets the peak so far; returns what is in use, in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_memory(side: str, device: str, threads: int) -> tuple[int, int]:
    """Bytes by which training rises above the model, and above what there is before the model."""
    torch.set_num_threads(threads)
    input_ids = texts(device)
    if side == "theirs":
        import x_transformers.gpt_vae  # noqa: F401  modules are no part of it
    nn.Linear(8, 8).to(device)(torch.randn(8, 8, device=device)).sum().backward()  # nor what torch sets up once
    before = reset_peak(device)
    model = made(side, device)
    built = reset_peak(device)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for _ in range(3):
        training_step(side, model, optimizer, input_ids)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return peak - built, peak - before


def peaks(device: str, threads: int) -> dict[str, tuple[int, int]]:
    found = {}
    for side in SIDES:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            found[side] = fresh.apply(peak_memory, (side, device, threads))
    return found


# ---- time -------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def tokens_per_second(models: dict[str, nn.Module], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Of each kind of work and side; medians over rounds, in which the sides take turns."""
    input_ids = texts(device)
    latents = torch.randn(BATCH, SIZES["latent"], generator=torch.Generator().manual_seed(2)).to(device)
    for side, model in models.items():
        assert sampled(side, model, input_ids[:, :1], latents).shape == (BATCH, NEW_TOKENS)
    optimizers = {side: torch.optim.AdamW(model.parameters(), **ADAMW) for side, model in models.items()}
    steps: dict[str, Callable[[str], object]] = {
        "training": lambda side: training_step(side, models[side], optimizers[side], input_ids)
    }
    tokens = {"training": BATCH * LENGTH}
    for batch in (1, BATCH):
        name = f"generation, batch {batch}"
        rows = input_ids[:batch, :1], latents[:batch]
        steps[name] = lambda side, rows=rows: sampled(side, models[side], *rows)
        tokens[name] = batch * NEW_TOKENS
    found = {}
    for name, step in steps.items():
        times: dict[str, list[float]] = {side: [] for side in models}
        for turn in range(-1, rounds):  # the first round warms up
            for side in SIDES if turn % 2 else reversed(SIDES):
                spent = seconds(functools.partial(step, side), device)
                if turn >= 0:
                    times[side].append(spent)
        found[name] = {side: tokens[name] / statistics.median(times[side]) for side in models}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="no memory, which takes fresh processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {side: made(side, arguments.device) for side in SIDES}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "x-transformers")}
    print(
        f"{', '.join(f'{name} {value}' for name, value in SIZES.items())}; {BATCH} texts of {LENGTH} tokens; "
        f"{arguments.device}, {arguments.threads} threads, {arguments.rounds} rounds; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    measured: dict[str, Any] = {}
    comparisons: list[Comparison] = []
    for side, model in models.items():
        tables = sum(part.numel() for part in model.parameters() if SIZES["vocabulary"] in part.shape)
        total = number_of_parameters(model)
        measured[f"parameters, {side}"] = {"all": total, "but vocabulary tables": total - tables}
        print(f"{side:>6}: {total:,} parameters, {total - tables:,} without vocabulary tables")
    latents = torch.randn(BATCH, SIZES["latent"], generator=torch.Generator().manual_seed(2)).to(arguments.device)
    agreement = assert_agreement(models["ours"], texts(arguments.device), latents)
    for name, value in agreement.items():
        print(f"ours, {name}: {value:.2g}" if isinstance(value, float) else f"ours, {name}: {value}")
    against, kinds = "x-transformers", ("peak memory over the model", "peak memory with the model")
    of_memory = {} if arguments.small else peaks(arguments.device, arguments.threads)
    for index, kind in enumerate(kinds if of_memory else ()):
        ours, theirs = (of_memory[side][index] / 1e6 for side in SIDES)
        comparisons.append(Comparison.of_costs(kind, ours, theirs, "MB", against, MEMORY_TARGET))
        print(comparisons[-1].line)
    for name, speed in tokens_per_second(models, arguments.device, arguments.rounds).items():
        rates = speed["ours"], speed["theirs"]
        comparisons.append(Comparison.of_rates(name, *rates, "tokens/s", against, TARGETS[name]))
        print(comparisons[-1].line)
    write(arguments.json, vars(arguments), comparisons, measured, agreement)


if __name__ == "__main__":
    main()
