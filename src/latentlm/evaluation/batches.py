"""What every measurement over a data set does: batches of similar lengths, shared out among the processes, with dropout
off meanwhile, and figures of single sequences that come together in the data's order.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.utils.data import Dataset

from latentlm.data import Collator, length_buckets
from latentlm.errors import InputError
from latentlm.inference import gathered
from latentlm.latent_lm import LatentLM
from latentlm.processes import gather_rows, rank_and_size

Batch = tuple[list[int], Int64[Tensor, "batch time"], Int64[Tensor, "batch time"], dict[str, Tensor] | None]


@contextmanager
def evaluating(model: LatentLM) -> Iterator[None]:
    """The model in evaluation mode, all of its weights on each process; each module is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with gathered(model):
            yield
    finally:
        for module in training:
            module.training = True


def in_batches(
    model: LatentLM,
    sequences: Dataset,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Batch]:
    """Indices, `input_ids`, `attention_mask` and condition of each batch, on the model's device; every sequence is in
    one.

    Of several processes each gets every R-th batch: no sequence twice, and the same batches as one process would have.

    Args:
        on_progress: called with (sequences done by all processes, sequences in all) after each batch.
    """
    if batch_size < 1:
        raise InputError("batch_size must be at least 1.")
    number = len(sequences)  # type: ignore[arg-type]
    if number == 0:
        raise InputError("there is no sequence to evaluate: the data is empty.")
    lengths = [len(sequences[index]["input_ids"]) for index in range(number)]
    collate = Collator(model.config.pad_token_id or 0)
    rank, ranks = rank_and_size()
    done = 0
    for place, indices in enumerate(length_buckets(lengths, batch_size, seed=0, shuffle=False)):
        done += len(indices)
        if place % ranks != rank:
            continue
        batch = collate([sequences[index] for index in indices])
        condition = {name: value.to(model.device) for name, value in batch.get("condition", {}).items()} or None
        yield indices, batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device), condition
        if on_progress is not None:
            on_progress(done, number)


def by_hash(sequences: Dataset) -> list[int]:
    """The indices of a data set in the order of a hash of their tokens: what is chosen by it has nothing to do with the
    data's order.
    """
    number = len(sequences)  # type: ignore[arg-type]
    hashes = [zlib.crc32(sequences[index]["input_ids"].numpy().tobytes()) for index in range(number)]
    return sorted(range(number), key=hashes.__getitem__)


class PerSequence:
    """Figures of single sequences, batch by batch.

    They come together from all processes in the order of the data, so a sum over them has one value, to the last bit,
    whatever the number of processes.
    """

    def __init__(self, *names: str):
        self.names = names
        self.indices: list[int] = []
        self.rows: list[Float64[Tensor, "batch figures"]] = []

    def add(self, indices: Sequence[int], **figures: Float[Tensor, " batch"] | Int64[Tensor, " batch"]) -> None:
        self.indices += indices
        self.rows.append(torch.stack([figures[name].double() for name in self.names], dim=1))

    def gathered(self, device: torch.device) -> dict[str, Float64[Tensor, " sequences"]]:
        """Each figure of all sequences; the same in every process."""
        empty = torch.zeros(0, len(self.names), dtype=torch.double, device=device)
        rows = gather_rows(torch.cat([empty, *self.rows]))
        order = gather_rows(torch.tensor(self.indices, dtype=torch.long, device=device)).argsort()
        return dict(zip(self.names, rows[order].unbind(1), strict=True))


def synchronised(device: torch.device) -> None:
    """Waits for a GPU, so that a clock read afterwards tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
