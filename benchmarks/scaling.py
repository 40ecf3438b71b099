"""What training takes of memory and of the wire: counted here, projected to more and larger.

Memory: bytes per parameter of weights, gradients and AdamW's moments, from the real tensors after a step; activations
per token in a fast step and in the slow one, from what autograd really saves: each storage once, weights left out, and
of that only what grows with texts and their length, so not the latents, nor what a kernel needs meanwhile.
Wire: every collective of a training step in two processes joined by gloo, under DDP and `fully_shard` (FSDP2), for
several numbers of fast steps; beside it what fast steps would cost that let go of the weights each time.
Projections say so: they multiply these counts and measure nothing. Activations of a shape too large to run are those of
2 and 3 layers, which every further layer repeats; a whole model asserts that, and that no token saves anything as large
as the vocabulary, so these are counted with a small one. Those of a wide shape are counted in narrow ones with heads of
the same size, since they grow linearly with the width.

    python benchmarks/scaling.py [--threads 1] [--skip-paper]
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from _report import add_json_option, write
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from latentlm import LTM, Autoregressive, AutoregressiveConfig, LatentLM, LTMConfig
from latentlm.layers import TransformerBlock

GB, GPU_COUNTS = 1e9, (8, 64)
SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "sliding_window": 8,
}
# the rest is the default: width 512, 50,257 tokens
PAPER: dict[str, Any] = {"num_hidden_layers": 3, "sliding_window": 8}
COUNTED_LENGTHS = (16, 32)  # short, since a CPU is slow in bf16; longer than the window, as in training
LATENTS: dict[str, Any] = {"latents_per_layer": 8, "inference_steps": 1}
# per GPU: 16 texts of 1,024 tokens
TEXTS, LENGTH = 16, 1024
SHAPES: dict[str, dict[str, Any]] = {
    "LTM-Small": {"num_hidden_layers": 3},
    "LTM-Medium": {"num_hidden_layers": 6},
    "LTM-Large": {"num_hidden_layers": 12},
    "1B": {"num_hidden_layers": 14, "hidden_size": 2048, "num_attention_heads": 16},
}


def build(family: str, shape: dict[str, Any], **changes: Any) -> LatentLM:
    torch.manual_seed(0)
    if family == "LTM":
        return LTM(LTMConfig(**{**shape, **LATENTS, **changes})).train()
    return Autoregressive(AutoregressiveConfig(**{**shape, **changes})).train()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def random_texts(model: LatentLM, number: int, length: int) -> Tensor:
    return torch.randint(1, model.config.vocab_size, (number, length + 1))


# ---- memory ----------------------------------------------------------------------------------------------------------


def bytes_per_parameter(model: LatentLM) -> dict[str, float]:
    optimizer = torch.optim.AdamW(model.parameters())
    model(random_texts(model, 1, 32), seed=0).loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held = {
        "weights": parameters,
        "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
        "AdamW": moments,
    }
    optimizer.zero_grad()
    return {name: sum(tensor.nbytes for tensor in tensors) / count(model) for name, tensors in held.items()}


@contextmanager
def saving(weights: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd saves meanwhile, but for weights."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # which keeps the storage where it is

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def saved(model: LatentLM, number: int, length: int, half: bool) -> dict[str, int]:
    """Bytes that are saved for backward in the last fast step and in the slow one."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    scored, last = type(model).log_likelihood, {}

    def log_likelihood(self: LatentLM, *args: Any) -> Tensor:
        kind = "slow step" if any(parameter.requires_grad for parameter in self.parameters()) else "fast step"
        with saving(weights) as storages:
            result = scored(self, *args)
        last[kind] = sum(storages.values())
        return result

    autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    with mock.patch.object(type(model), "log_likelihood", log_likelihood), autocast:
        outputs = model(random_texts(model, number, length), seed=0)
    del outputs
    return last


def bytes_per_token(model: LatentLM, half: bool) -> dict[str, float]:
    """The difference of differences: what another text adds, and what of that another token does."""
    short, long = ([saved(model, number, length, half) for number in (2, 3)] for length in COUNTED_LENGTHS)
    tokens = COUNTED_LENGTHS[1] - COUNTED_LENGTHS[0]
    return {kind: (long[1][kind] - long[0][kind] - short[1][kind] + short[0][kind]) / tokens for kind in short[0]}


def in_layers(family: str, shape: dict[str, Any], half: bool) -> Callable[[int], dict[str, float]]:
    """Bytes per token for a number of layers of this width."""
    shape = {**shape, "vocab_size": 1024, "sliding_window": 8}
    two, three = (bytes_per_token(build(family, {**shape, "num_hidden_layers": n}), half) for n in (2, 3))
    return lambda layers: {kind: two[kind] + (layers - 2) * (three[kind] - two[kind]) for kind in two}


def in_width(shape: dict[str, Any], half: bool) -> Callable[[int], dict[str, float]]:
    """As `in_layers` of an LTM, by widths of 2 and 4 heads."""
    head, wide = shape["hidden_size"] // shape["num_attention_heads"], shape["hidden_size"]
    two, four = (
        in_layers(
            "LTM",
            {
                **shape,
                "hidden_size": heads * head,
                "num_attention_heads": heads,
                "intermediate_size": shape["intermediate_size"] * heads * head // wide,
            },
            half,
        )
        for heads in (2, 4)
    )

    def per_token(layers: int) -> dict[str, float]:
        one, other = two(layers), four(layers)
        return {kind: one[kind] + (wide / head - 2) / 2 * (other[kind] - one[kind]) for kind in one}

    return per_token


# ---- wire ------------------------------------------------------------------------------------------------------------


@contextmanager
def letting_go(model: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """In place of `gathered`: the hooks gather each block twice in a fast step; only the root's weights stay."""
    model.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        model.set_reshard_after_backward(True, recurse=False)


@contextmanager
def counting(counted: dict[str, float]) -> Iterator[None]:
    """Bytes of the tensors that `fully_shard` gathers, and of those that it reduces, meanwhile."""
    # torch 2.13 has new names for the two collectives
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"

    def counts(name: str, kind: str) -> Any:
        collective = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            counted[kind] += max(tensor.nbytes for tensor in tensors)  # the whole, not a shard of it
            return collective(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    with counts(gather, "gathered"), counts(scatter, "reduced"):
        yield


def wire(family: str, kind: str, steps: int) -> dict[str, float]:
    """Bytes of the tensors gathered and reduced in the second training step, per parameter."""
    model = build(family, SMALL, **({"inference_steps": steps} if family == "LTM" else {}))
    parameters, counted = count(model), {"gathered": 0.0, "reduced": 0.0}
    input_ids = random_texts(model, 2, 32)
    if kind == "DDP":
        trained: nn.Module = DistributedDataParallel(model)

        def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            counted["reduced"] += bucket.buffer().nbytes
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

        trained.register_comm_hook(None, hook)
    else:
        for module in model.modules():
            if isinstance(module, TransformerBlock):
                fully_shard(module, reshard_after_forward="kept" not in kind)
        trained = fully_shard(model)
    optimizer, formula = torch.optim.AdamW(trained.parameters()), expected(model, kind, steps)
    in_place = mock.patch("latentlm.inference.gradient.gathered", letting_go) if "let go" in kind else nullcontext()
    for step in range(2):
        counted.update(gathered=0.0, reduced=0.0)
        with counting(counted), in_place:
            trained(input_ids, seed=step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, number in counted.items():
        assert abs(number - formula[name]) <= 0.01 * formula[name], (family, kind, steps, counted, formula)
    return {name: number / parameters for name, number in counted.items()}


WIDTH = ("hidden_size", "num_attention_heads", "intermediate_size")
STEPS = ("fast step", "slow step")
KINDS = ("DDP", "FSDP2", "FSDP2, kept after forward", "FSDP2, let go in fast steps")


def expected(model: nn.Module, kind: str, steps: int) -> dict[str, float]:
    """Bytes that a step gathers and reduces, from numbers of parameters; asserted where `wire` counts."""
    blocks = sum(count(module) for module in model.modules() if isinstance(module, TransformerBlock))
    root = count(model) - blocks
    if kind == "DDP":
        gathered = 0
    elif "let go" in kind:  # the root's once more, since the hooks lose track of the forward
        gathered = 2 * root + (2 * steps + 2) * blocks
    else:  # blocks in forward (there in the fast steps) and in backward, the root's once
        gathered = root + (1 if "kept" in kind else 2) * blocks
    return {"gathered": 4 * gathered, "reduced": 4 * count(model)}


def process(rank: int, folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), 2, rank)
    cases = [("control", kind, 0) for kind in KINDS[:3]] + [("LTM", kind, n) for kind in KINDS for n in (1, 4, 16)]
    found = {case: wire(*case) for case in cases}
    if rank == 0:
        torch.save(found, f"{folder}/wire.pt")
    dist.barrier()
    dist.destroy_process_group()


def communication(threads: int) -> dict[tuple[str, str, int], dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(process, (folder, threads), nprocs=2, start_method="spawn")
        return torch.load(os.path.join(folder, "wire.pt"))


# ---- tables ----------------------------------------------------------------------------------------------------------


def print_memory(skip_paper: bool) -> dict[str, float]:
    """Prints the table; returns its activations, in bytes per token."""
    found = {}
    print("\nmeasured: bytes per parameter (fp32), and activations in bytes per token")
    print(f"{'model':<16}{'parameters':>12}{'weights':>9}{'gradients':>10}{'AdamW':>7}", end="")
    print("".join(f"{kind + ', ' + dtype:>17}" for dtype in ("fp32", "bf16") for kind in STEPS))
    for size, shape in {"small": SMALL, **({} if skip_paper else {"paper": PAPER})}.items():
        for family in ("LTM", "control"):
            model = build(family, shape)
            held = bytes_per_parameter(model)
            row = f"{family + ', ' + size:<16}{count(model):>12,}{held['weights']:>9.2f}{held['gradients']:>10.2f}"
            row += f"{held['AdamW']:>7.2f}"
            for half in (False, True):
                per_token = in_layers(family, shape, half)(shape["num_hidden_layers"])
                if not half:  # what the projections rest on
                    assert per_token == bytes_per_token(model, half), (per_token, bytes_per_token(model, half))
                elif family == "LTM" and size == "paper":
                    full = {name: getattr(model.config, name) for name in WIDTH}
                    assert per_token == in_width(full, half)(shape["num_hidden_layers"])
                found |= {f"{family}, {size}, {name}, {'bf16' if half else 'fp32'}": n for name, n in per_token.items()}
                row += "".join(f"{per_token[kind]:>17,.0f}" if kind in per_token else f"{'–':>17}" for kind in STEPS)
            print(row, flush=True)
    return found


def print_wire(found: dict[tuple[str, str, int], dict[str, float]]) -> None:
    print("\nmeasured in two processes: bytes per parameter of what is gathered + reduced in a training step, fp32")
    print(f"{'':<36}{'control':>14}" + "".join(f"{f'LTM, T={steps}':>14}" for steps in (1, 4, 16)))
    for kind in KINDS:
        row = [found.get(("control", kind, 0)), *(found["LTM", kind, steps] for steps in (1, 4, 16))]
        cells = ("–" if c is None else f"{c['gathered']:.1f} + {c['reduced']:.1f}" for c in row)
        print(f"{kind:<36}" + "".join(f"{cell:>14}" for cell in cells))


def print_projection() -> None:
    print(f"\nprojected from counts, not measured: GB per GPU, {TEXTS} texts of {LENGTH:,} tokens on each, T = 16;")
    print(
        "fp32 weights, bf16 autocast. FSDP2 also holds all weights gathered in the fast steps. On the wire in a step,"
    )
    print("sent by each GPU: a ring's (N − 1)/N of what is gathered or scattered, twice that of what is all-reduced.")
    heads = (
        "GPUs",
        "parameters",
        "state, DDP",
        "state, FSDP2",
        "activations",
        "latents",
        "wire, DDP",
        "wire, FSDP2",
        "let go",
    )
    print(f"{'shape':<12}" + "".join(f"{head:>13}" for head in heads))
    widths: dict[int, Callable[[int], dict[str, float]]] = {}
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = LTM(LTMConfig(**shape, **LATENTS))
        parameters, config = count(model), model.config
        if config.hidden_size not in widths:
            full = {name: getattr(config, name) for name in WIDTH}
            widths[config.hidden_size] = in_width(full, True)
        activations = widths[config.hidden_size](config.num_hidden_layers)["slow step"] * TEXTS * LENGTH
        # μ, log σ², their gradients, two moments each, z and its noise, in fp32
        latents = 10 * 4 * TEXTS * config.num_hidden_layers * config.latents_per_layer * config.latent_size
        for gpus in GPU_COUNTS:
            ring = (gpus - 1) / gpus
            row = [
                16 * parameters,
                16 * parameters / gpus + 4 * parameters,
                activations,
                latents,
                2 * ring * sum(expected(model, "DDP", 16).values()),
                *(ring * sum(expected(model, kind, 16).values()) for kind in (KINDS[1], KINDS[3])),
            ]
            cells = [f"{gpus:>13}{parameters / 1e6:>12,.0f}M", *(f"{number / GB:>13.2f}" for number in row)]
            print(f"{name:<12}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    add_json_option(parser)
    parser.add_argument("--skip-paper", action="store_true", help="only the small shape is run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    activations = print_memory(arguments.skip_paper)
    found = communication(arguments.threads)
    print_wire(found)
    print_projection()
    write(arguments.json, vars(arguments), [], {"activations, bytes per token": activations})


if __name__ == "__main__":
    main()
