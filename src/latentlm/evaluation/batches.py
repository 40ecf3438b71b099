"""What every measurement over a data set does: batches of similar lengths, with dropout off meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from latentlm.data import Collator, length_buckets
from latentlm.errors import InputError
from latentlm.inference import gathered
from latentlm.latent_lm import LatentLM

Batch = tuple[list[int], Int64[Tensor, "batch time"], Int64[Tensor, "batch time"]]


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
    """Indices, `input_ids` and `attention_mask` of each batch, on the model's device; every sequence is in one.

    Args:
        on_progress: called with (sequences done, sequences in all) after each batch.
    """
    if batch_size < 1:
        raise InputError("batch_size must be at least 1.")
    number = len(sequences)  # type: ignore[arg-type]
    if number == 0:
        raise InputError("there is no sequence to evaluate: the data is empty.")
    lengths = [len(sequences[index]["input_ids"]) for index in range(number)]
    collate = Collator(model.config.pad_token_id or 0)
    done = 0
    for indices in length_buckets(lengths, batch_size, seed=0, shuffle=False):
        batch = collate([sequences[index] for index in indices])
        yield indices, batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        done += len(indices)
        if on_progress is not None:
            on_progress(done, number)


def synchronised(device: torch.device) -> None:
    """Waits for a GPU, so that a clock read afterwards tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
