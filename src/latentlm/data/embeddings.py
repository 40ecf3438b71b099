"""Vectors of texts that are computed once and kept, memory-mapped: what a frozen encoder says of a corpus.

A folder has a folder for each encoder, in it parts of some texts each: `keys.npy` [texts], sorted, and `rows.npy`
[texts, size] in that order. A part appears whole and is never changed, so that nothing is lost where making them is cut
short, and several processes may read while one makes more.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import Dataset

from latentlm.data.datasets import collate, length_buckets
from latentlm.distributions import sequence_keys
from latentlm.errors import InputError
from latentlm.files import alone_in, damage, publish_folder, saving, write_checksums

_PART = 16384  # texts between two parts


class Embeddings:
    """The vectors that a folder holds for one encoder.

    Args:
        folder: made if need be.
        encoder: by what the encoder, and all that decides what it makes of a text, is known.
        size: numbers of a vector.
    """

    def __init__(self, folder: str | Path, encoder: str, size: int):
        self.folder, self.size = Path(folder) / encoder, size
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._whole: set[Path] = set()
        self._open()

    def _open(self) -> None:
        self._parts = []
        for part in sorted(self.folder.glob("part-*")):
            try:
                keys, rows = (np.load(part / f"{name}.npy", mmap_mode="r") for name in ("keys", "rows"))
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{part} holds no embeddings that can be read: delete it.") from error
            if keys.dtype != np.int64 or rows.dtype != np.float32 or rows.shape != (len(keys), self.size):
                raise InputError(f"{part} holds embeddings of another kind: delete it.")
            if part not in self._whole and (fault := damage(part, "*.npy")):
                raise InputError(f"{part} is not as it was written ({fault}): delete it.")
            self._whole.add(part)
            self._parts.append((keys, rows))

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._parts)

    def find(self, keys: Int64[Tensor, " texts"]) -> tuple[Float[Tensor, "texts size"], Tensor]:
        """The vectors of texts by their keys, and which are there; 0 for the others."""
        wanted = keys.cpu().numpy()
        found, there = np.zeros((len(wanted), self.size), np.float32), np.zeros(len(wanted), bool)
        for known, rows in self._parts:
            places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
            hits = (known[places] == wanted) & ~there
            found[hits] = rows[places[hits]]
            there |= hits
        return torch.from_numpy(found).to(keys.device), torch.from_numpy(there).to(keys.device)

    def complete(
        self,
        sequences: Dataset,
        pad_token_id: int,
        embed: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
        *,
        batch_size: int = 64,
        on_progress: Callable[[int, int], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        """Computes and keeps what is missing of these texts.

        Args:
            embed: `input_ids` and `attention_mask` of texts, on the device, to their vectors.
            on_progress: called with (texts done, texts in all).
            on_wait: called where another process adds to the folder, whose end is then waited for; None does not wait.
        """
        number = len(sequences)  # type: ignore[arg-type]
        lengths = [len(sequences[index]["input_ids"]) for index in range(number)]

        def missing() -> Iterator[tuple[Tensor, Tensor]]:
            done = 0
            for indices in length_buckets(lengths, batch_size, seed=0, shuffle=False):
                batch = collate([sequences[index] for index in indices], pad_token_id)
                input_ids, attention_mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
                keys = sequence_keys(input_ids, attention_mask)
                new = ~self.find(keys)[1]
                if bool(new.any()):
                    yield keys[new], embed(input_ids[new], attention_mask[new])
                done += len(indices)
                if on_progress is not None:
                    on_progress(done, number)

        with torch.no_grad():
            self.add(missing(), on_wait)

    def add(
        self,
        batches: Iterator[tuple[Int64[Tensor, " texts"], Float[Tensor, "texts size"]]],
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        """Keeps the vectors of batches of texts; of a text that comes twice, the first.

        Raises:
            InputError: a disk that refuses, or another process that adds to the same folder.
        """
        keys: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        with saving(self.folder), alone_in(self.folder, on_wait):
            self._open()  # another process may have added meanwhile
            for some_keys, some_rows in batches:
                keys.append(some_keys.cpu().numpy())
                rows.append(some_rows.float().cpu().numpy())
                if sum(map(len, keys)) >= _PART:
                    self._publish(keys, rows)
                    keys, rows = [], []
            if keys:
                self._publish(keys, rows)

    def _publish(self, keys: list[np.ndarray], rows: list[np.ndarray]) -> None:
        sorted_keys, first = np.unique(np.concatenate(keys), return_index=True)
        staging = self.folder / ".part"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        np.save(staging / "keys.npy", sorted_keys)
        np.save(staging / "rows.npy", np.concatenate(rows)[first])
        write_checksums(staging)
        publish_folder(staging, self.folder / f"part-{len(self._parts):06d}")
        self._open()
