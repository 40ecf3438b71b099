"""Where the time of a training step goes in each family, and how far it is from what the machine could do at best.

Counted are a step's floating-point operations (as `latentlm evaluate --flops` counts them) and the bytes that its
operations read and write, each for itself, as if nothing stayed in a cache. Measured are the machine's ceilings: the
fastest product of two large matrices, and the fastest copy of a large tensor. Operations over the one and bytes over
the other are the least time that a step could take if only it mattered (Williams, Waterman and Patterson 2009,
"Roofline"); the larger of them is the floor. On a CPU bytes that stay in a cache make a step faster than that floor of
memory says. The profile is torch's own: of the time in which operations compute, what products of matrices, attention,
Cholesky factors (in float64) and everything else take.

On a CUDA device also tokens a second and the model FLOP utilisation at LTM-Medium's shapes (6 layers of 512, texts of
1,024 tokens): a fast step counted as 4N operations a token and the slow one as 6N, N the parameters, over that device's
dense bf16 peak. The CUDA part has never been run: no such device was at hand.

    python benchmarks/step_profile.py [--batch 4] [--rounds 5] [--threads 2] [--families ltm gpt_vae] [--device cuda]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _models import FAMILIES, LENGTH, model, papers_ltm, texts
from _report import add_json_option, write
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentlm import LTM, LatentLM
from latentlm.evaluation.flops import training_flops
from latentlm.latent_lm import number_of_parameters

# dense, bf16, as the makers' data sheets have them
BF16_PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
GROUPS = {
    "products": ("mm", "addmm", "bmm", "linear", "gemm", "cutlass", "xmma", "matmul", "convolution", "mkldnn", "nvjet"),
    "attention": ("attention", "flash", "fmha"),
    "factors": ("cholesky", "triangular", "tril", "potrf", "trsm"),
}


class Bytes(TorchDispatchMode):
    """What operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        if not any(one.alias_info is not None and not one.alias_info.is_write for one in returns):  # no view
            self.moved += sum(
                one.numel() * one.element_size()
                for one in tree_leaves((args, kwargs, found))
                if isinstance(one, torch.Tensor)
            )
        return found


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def ceilings(device: str) -> dict[str, float]:
    """FLOP/s of a product of matrices (float32 on a CPU, bf16 on CUDA), and bytes/s of a copy; the best of some."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    one = torch.randn(size, size, device=device, dtype=dtype)
    out, source = torch.empty_like(one), torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: torch.mm(one, one, out=out), device, 3) for _ in range(3))
    copy = min(seconds(lambda: target.copy_(source), device, 3) for _ in range(3))
    return {"FLOP/s": 2 * size**3 / product, "bytes/s": 2 * source.numel() * source.element_size() / copy}


def step_of(one: LatentLM, input_ids: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        one.zero_grad()
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=input_ids.device.type == "cuda"):
            loss = one(input_ids, seed=1).loss
        loss.backward()

    return step


def shares(step: Callable[[], None], device: str) -> dict[str, float]:
    """Of the profiled time that operations or kernels compute, by group."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as found:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    times = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in found.key_averages():
        of_event = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if device == "cpu" and not event.key.startswith("aten::"):
            continue
        name = event.key.lower()
        # attention first: its kernels' names also tell of the products they are made of
        group = next(
            (one for one in ("attention", "factors", "products") if any(part in name for part in GROUPS[one])), "other"
        )
        times[group] += of_event
    return {group: value / sum(times.values()) for group, value in times.items()}


def medium(rounds: int) -> dict[str, float]:
    """LTM-Medium on CUDA: tokens a second, and the model FLOP utilisation."""
    config = papers_ltm("medium")
    one = LTM(config).to("cuda").train()
    input_ids = torch.randint(50256, (64, 1025), device="cuda")
    tokens, step = input_ids[:, 1:].numel(), step_of(one, input_ids)
    taken = seconds(step, "cuda", rounds)
    operations = (4 * config.inference_steps + 6) * number_of_parameters(one) * tokens
    found = {"tokens/s": tokens / taken, "operations/s": operations / taken, **shares(step, "cuda")}
    name = torch.cuda.get_device_name()
    if peak := next((value for part, value in BF16_PEAK.items() if part in name), None):
        found["model FLOP utilisation"] = operations / taken / peak
    for key, value in found.items():
        print(f"LTM-Medium on {name}: {key} {value:.4g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_json_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    limits = ceilings(given.device)
    print(
        f"ceilings of {given.device}: {limits['FLOP/s'] / 1e9:.0f} GFLOP/s in a product, "
        f"{limits['bytes/s'] / 1e9:.1f} GB/s in a copy; {given.batch} texts of {LENGTH} tokens"
    )
    measured: dict[str, Any] = {"ceilings": limits}
    for family in given.families:
        one, input_ids = model(family).to(given.device), texts(given.batch, device=given.device)
        step, tokens = step_of(one, input_ids), given.batch * LENGTH
        operations = training_flops(one, input_ids)["training_flops_per_token"] * tokens
        with Bytes() as counted:
            step()
        taken = seconds(step, given.device, given.rounds)
        floors = operations / limits["FLOP/s"], counted.moved / limits["bytes/s"]
        found = {
            "tokens/s": tokens / taken, "seconds": taken, "FLOP": operations, "bytes": counted.moved,
            "FLOP/byte": operations / counted.moved, "least seconds by FLOP": floors[0],
            "least seconds by bytes": floors[1], **shares(step, given.device),
        }  # fmt: skip
        measured[family] = found
        print(
            f"{family:>14}: {taken:.3f} s, {found['tokens/s']:.0f} tokens/s; {operations / 1e9:.0f} GFLOP and "
            f"{counted.moved / 1e9:.1f} GB, so at least {floors[0]:.3f} s of arithmetic ({floors[0] / taken:.0%}) and "
            f"{floors[1]:.3f} s of memory ({floors[1] / taken:.0%})"
        )
        print(" " * 16 + ", ".join(f"{group} {found[group]:.0%}" for group in (*GROUPS, "other")), flush=True)
    if given.device == "cuda":
        measured["LTM-Medium"] = medium(given.rounds)
    write(given.json, vars(given), [], measured)


if __name__ == "__main__":
    main()
