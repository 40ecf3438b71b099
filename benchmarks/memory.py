"""Peak memory of a training step: bytes for each token, of each family, with layers kept and with layers computed anew.

Counted is every tensor's storage from when an operation makes it to when it is freed (what a kernel takes for itself is
not), through a forward and a backward pass, fast steps included. The peak of a step of --batch texts less that of half
as many, over the tokens between them, is what a token costs; what remains does not grow with the text: the weights'
gradients, a part of the logits.

The paper's LTM of 76M parameters (12 layers of 512, texts of 1,024 tokens, GPT-2's vocabulary, 64 steps) is counted on
torch's "meta" device, which computes shapes alone and takes the branches of a GPU: a batch of 64 texts in bf16, with
float32 weights, gradients and AdamW's moments beside. How many fast steps there are changes no peak. Attention on that
device is torch's plain one, which stores scores that a GPU's fused kernels do not: the count is from above.

    python benchmarks/memory.py [--batch 4] [--small] [--json FILE]
"""

import argparse
import weakref
from typing import Any
from unittest import mock

import torch
from _models import FAMILIES, LENGTH, model, papers_ltm, texts
from _report import Comparison, add_json_option, write
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentlm import LTM, LatentLM
from latentlm.latent_lm import number_of_parameters

GIB, GPU = 2**30, 80e9
TEXTS, STEPS = 64, 2


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations have made and nobody has freed: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.known:
                self._follow(tensor.untyped_storage(), 0)  # was there before
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.known:
                self._follow(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return found

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        self.known.add(id(storage))
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, id(storage), size)

    def _freed(self, known: int, size: int) -> None:
        self.known.discard(known)
        self.now -= size


def peak(one: LatentLM, input_ids: torch.Tensor) -> int:
    """Bytes of a forward and a backward pass beyond the weights."""
    for parameter in one.parameters():
        parameter.grad = None
    with Peak() as counted:
        one(input_ids, seed=1).loss.backward()
    return counted.most


def per_token(family: str, batch: int, anew: bool) -> float:
    one = model(family)
    if anew:
        one.activation_checkpointing_enable()
    return (peak(one, texts(batch)) - peak(one, texts(batch // 2))) / (batch - batch // 2) / LENGTH


def paper(anew: bool) -> tuple[float, float]:
    """Bytes of a step of the paper's largest LTM, and of its weights, their gradients and AdamW's moments."""
    with torch.device("meta"):
        one = LTM(papers_ltm("large", inference_steps=STEPS)).train()
        input_ids = torch.zeros(TEXTS, 1025, dtype=torch.int64)
    of_weights = number_of_parameters(one) * 4.0 * 4
    one = one.to(torch.bfloat16)
    one.training_progress = torch.zeros(())  # read once for all steps
    if anew:
        one.activation_checkpointing_enable()
    autocast = torch.is_autocast_enabled  # which knows no such device
    with (
        mock.patch.object(torch, "is_autocast_enabled", lambda kind: kind != "meta" and autocast(kind)),
        mock.patch("latentlm.inference.gradient.check_finite"),
    ):
        return float(peak(one, input_ids)), of_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="of the LTM alone, and not the paper's")
    add_json_option(parser)
    given = parser.parse_args()
    if given.batch < 2:
        parser.error("--batch must be at least 2: a step is compared with one of half as many texts")
    comparisons = []
    for family in ("ltm",) if given.small else FAMILIES:
        kept, anew = (per_token(family, given.batch, anew) for anew in (False, True))
        what = f"peak memory of a training step, {family}"
        comparisons.append(Comparison.of_costs(what, anew / 1024, kept / 1024, "KiB/token", "layers kept"))
        print(comparisons[-1].line, flush=True)
    measured = {}
    if not given.small:
        for anew in (False, True):
            of_step, of_weights = paper(anew)
            how = "computed anew" if anew else "kept"
            what = f"LTM of 76M, {TEXTS} × 1024 in bf16, layers {how}"
            measured[f"GiB, {what}"] = (of_step + of_weights) / GIB
            print(
                f"{what}: {of_step / GIB:.1f} GiB for the step ({of_step / TEXTS / 1024 / 1024:.0f} KiB/token), "
                f"{of_weights / GIB:.1f} for weights, gradients and moments: "
                f"{(of_step + of_weights) / GPU:.0%} of a GPU of 80 GB"
            )
    write(given.json, vars(given), comparisons, measured)


if __name__ == "__main__":
    main()
