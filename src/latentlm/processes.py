"""Several processes at one job: which one writes, who decides, and rows gathered from all of them.

A launcher (torchrun, accelerate launch) starts the processes; without one all of this is the identity.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from latentlm.errors import InputError

T = TypeVar("T")


class ToldElsewhere(SystemExit):
    """Ends a process without a word, because another one says why."""


def launched() -> int:
    """Number of processes that a launcher started for this command; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Joins the processes of a launcher, if one started this."""
    if launched() > 1:
        from accelerate import PartialState

        PartialState()


def rank_and_size() -> tuple[int, int]:
    """This process' number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank_and_size()[0] == 0 if dist.is_available() and dist.is_initialized() else _launched_rank() == 0


def is_first_here() -> bool:
    """Whether this is the first process of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _launched_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def main_decides(decide: Callable[[], T]) -> T:
    """What the main process finds, told to all: a question about files that must have one answer.

    Raises:
        InputError: on the main process, where `decide` raises it; the others then end without a word.
    """
    rank, size = rank_and_size()
    if size == 1:
        return decide()
    told: list[Any] = [None, None]
    error: InputError | None = None
    if rank == 0:
        try:
            told = [True, decide()]
        except InputError as caught:
            error, told = caught, [False, None]
    dist.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    if not told[0]:
        raise ToldElsewhere(2)
    return told[1]


def gather_rows(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "all ..."]:
    """The rows of every process, in the order of their numbers; each may have another number of rows, or none."""
    _, size = rank_and_size()
    if size == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(size)]
    dist.all_gather(counts, count)
    most = int(torch.cat(counts).max())
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[: int(number)] for part, number in zip(parts, counts, strict=True)])
