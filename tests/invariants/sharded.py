"""Two optimiser steps of a small model, and its scores, in one process or sharded over several by `fully_shard`."""

import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.toy import Rows, padded, small_variant, texts
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from latentlm import LatentLM
from latentlm.evaluation.likelihood import evaluate
from latentlm.layers import TransformerBlock

# how `shard` shards
LAYOUTS: dict[str, dict[str, Any]] = {
    "blocks": {},
    "blocks, gathered weights kept": {"reshard_after_forward": False},
    "blocks, the root's weights freed, too": {"reshard_after_forward": True},
    "root alone": {"blocks": False},
    "as accelerate 1.15 does": {"ends": True},
}


def shard(model: LatentLM, *, blocks: bool = True, ends: bool = False, **options: Any) -> LatentLM:
    for module in model.modules():
        if blocks and isinstance(module, TransformerBlock):
            fully_shard(module, **options)
    if ends and model.get_output_embeddings() is None:
        fully_shard(model.get_input_embeddings(), **options)
    elif ends:
        fully_shard([model.embed_tokens, model.lm_head], **options | {"reshard_after_forward": False})
    return fully_shard(model, **options)


def two_steps(
    variant: str, layout: str | None = None, accumulated: bool = False, rank: int = 0, processes: int = 1
) -> dict[str, Any]:
    """Losses, norms, gradients and weights of two steps on every `processes`th row, from `rank` on."""
    changes = {} if variant in ("autoregressive", "memory") else {"inference_epsilon": 0.3}
    model = small_variant(variant, **changes).train()
    if layout is not None:
        shard(model, **LAYOUTS[layout])
    optimizer = AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    before = {name: whole(parameter) for name, parameter in model.named_parameters()}
    found: dict[str, Any] = {"losses": [], "norms": [], "gradients": []}
    for step in range(2):
        input_ids, mask = padded(texts(8, 12, seed=step), [12, 7, 9, 11, 3, 12, 8, 5], "right")
        tokens = int(model.scored_tokens(input_ids, mask).sum())
        rows = [slice(rank, None, processes)]
        if accumulated:
            rows = [slice(part * processes + rank, None, 2 * processes) for part in range(2)]
        losses = []
        for part in rows:
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(part is rows[-1])
            loss = model(input_ids[part], mask[part], seed=step, num_items_in_batch=tokens).loss
            (processes * loss).backward()  # fully_shard averages gradients over processes
            losses.append(float(loss.detach()))
        found["losses"].append(sum(losses))
        found["gradients"].append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        found["norms"].append(float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))))
        optimizer.step()
        optimizer.zero_grad()
        model.training_progress.fill_((step + 1) / 2)
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    moved = {name for name, value in before.items() if not torch.equal(weights[name], value)}
    return found | {"weights": weights, "moved": moved}


def scores(variant: str, layout: str | None = None, rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """Figures of a model that has not run before, and a gradient of it afterwards."""
    model = small_variant(variant)
    if layout is not None:
        shard(model, **LAYOUTS[layout])
    figures = evaluate(model, Rows(list(texts(5, 9))), iw_samples=2)
    model.train()(texts(4, 9), seed=0).loss.backward()
    return {"figures": figures, "norm": float(whole(torch.nn.utils.get_total_norm(p.grad for p in model.parameters())))}


def half_precision(variant: str, rank: int = 0, processes: int = 1) -> list[Tensor]:
    """Means of q by a model whose weights are gathered in bf16."""
    model = small_variant(variant).train()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    outputs = model(texts(4, 9), seed=0)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return [outputs.posterior_mean.detach(), outputs.loss.detach()]


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor that may be sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def in_two_processes(calls: list[Call], folder: Path) -> list[tuple[Any, Any]]:
    """What each of `calls`, a function and its first arguments, gives with (…, rank, 2) in processes joined by gloo.

    Neither process leaves before the results of both are on disk, since the other may still be in its last collective.

    Raises:
        RuntimeError: one of them ended without results; says how each ended and what it said.
    """
    (folder / "calls").write_bytes(pickle.dumps(calls))
    results = [folder / f"{rank}.pt" for rank in range(2)]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(2):
            command = "from tests.invariants.sharded import work_off; work_off()"
            with (folder / f"{rank}.log").open("wb") as log:
                children.append(
                    subprocess.Popen(
                        [sys.executable, "-X", "faulthandler", "-c", command, str(folder), str(rank)],
                        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        # how long this may take is for the test's timeout to say, which a slow machine does not meet
        while not all(path.exists() for path in results):
            codes = [child.poll() for child in children]
            if any(code is not None for code in codes):
                raise RuntimeError("\n".join(_account(folder, rank, code) for rank, code in enumerate(codes)))
            time.sleep(0.05)
    except BaseException as error:
        if not isinstance(error, RuntimeError):  # the timeout: pytest shows what is printed here
            print(*(_account(folder, rank, child.poll()) for rank, child in enumerate(children)), sep="\n")
        raise
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return list(zip(*(torch.load(path, weights_only=False) for path in results), strict=True))


def _account(folder: Path, rank: int, code: int | None) -> str:
    """How one of the processes ended, and the end of what it said."""
    how = "was still running" if code is None else f"ended without results, exit code {code}"
    said = (folder / f"{rank}.log").read_text(errors="replace")[-20_000:]
    return f"process {rank} {how}; it said:\n{said or '(nothing)'}"


def work_off() -> None:
    """One of the processes: `work_off` in a command with its folder and its rank."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    # minutes: a busy machine may start one of the two late, or let it stand still; the end of one is noticed without
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=30), 2, rank)
    results: list[Any] = []
    for work, arguments in pickle.loads((folder / "calls").read_bytes()):
        try:
            results.append(work(*arguments, rank=rank, processes=2))
        except Exception:
            # where it fails in one process alone the other waits for ever: then this is what tells why
            print(f"{work.__name__}{arguments} failed:\n{traceback.format_exc()}", flush=True)
            results.append(traceback.format_exc())
    torch.save(results, folder / f"{rank}.part")
    (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
    sys.stdin.read()  # until it is killed, or whoever started it is gone
    # no farewell through the group, in which the other may hang
    os._exit(0)
