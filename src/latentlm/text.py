"""Texts in; texts or latents out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from latentlm.data import length_buckets, text_batch
from latentlm.errors import InputError
from latentlm.files import check_writable, whole_file
from latentlm.latent_lm import LatentLM


@dataclass(frozen=True)
class Encoding:
    """Posteriors of N texts: `ids` [N] (0 … N − 1), `mean` and `variance` [N, *event] of q(z | x)."""

    ids: np.ndarray
    mean: Float[np.ndarray, "texts *event"]
    variance: Float[np.ndarray, "texts *event"]

    def save(self, path: str | Path) -> None:
        """Writes `.npz`, or `.parquet` with each latent as a flat list and its shape beside it; whole or not at all."""
        path = check_latents_path(path)
        with whole_file(path) as file:
            if path.suffix == ".npz":
                np.savez(file, ids=self.ids, mean=self.mean, variance=self.variance)
            else:
                self._write_parquet(file)

    def _write_parquet(self, file: Any) -> None:
        import pyarrow
        import pyarrow.parquet

        number = len(self.ids)
        columns = {
            "id": self.ids,
            "mean": list(self.mean.reshape(number, -1)),
            "variance": list(self.variance.reshape(number, -1)),
            "shape": [list(self.mean.shape[1:])] * number,
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), file)


def check_latents_path(path: str | Path) -> Path:
    """The path, if latents can be written under its name; asked before the work, too."""
    path = check_writable(path)
    if path.suffix not in (".npz", ".parquet"):
        raise InputError(f"{path}: latents are written as .npz or .parquet.")
    return path


@torch.no_grad()
def encode(
    model: LatentLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Encoding:
    """q(z | x) of each text, in batches of texts of similar length; row i belongs to text i.

    Raises:
        InputError: no text, or one longer than the model's context.
    """
    if isinstance(texts, str):
        raise InputError("give a list of texts, not one string.")
    lengths = [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
    longest = model.config.max_position_embeddings
    for row, length in enumerate(lengths):
        if length + 1 > longest:
            raise InputError(f"text {row} has {length + 1} tokens and the model's context is {longest}: shorten it.")
    if not lengths:
        raise InputError("there is no text to encode.")
    means: list[np.ndarray | None] = [None] * len(texts)
    variances: list[np.ndarray | None] = [None] * len(texts)
    done = 0
    for indices in length_buckets(lengths, batch_size, seed=0, shuffle=False):
        batch = text_batch(tokenizer, [texts[index] for index in indices])
        posterior = model.infer(
            batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device), seed=seed
        )
        mean, variance = posterior.mean.float().cpu().numpy(), posterior.variance.float().cpu().numpy()
        for row, index in enumerate(indices):
            means[index], variances[index] = mean[row], variance[row]
        done += len(indices)
        if on_progress is not None:
            on_progress(done, len(texts))
    return Encoding(np.arange(len(texts)), np.stack(means), np.stack(variances))  # type: ignore[arg-type]


def write(
    model: LatentLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] = (), **options: Any
) -> list[str]:
    """Texts from each prompt (z inferred from it), or from the prior; takes the options of the model's `generate`.

    Each text ends at its first end-of-text token. Rows of one prompt stand together.
    """
    given: dict[str, Any] = {}
    if prompts:
        batch = text_batch(tokenizer, prompts, end=False)
        given = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    rows = model.generate(**given, **options)
    skip = given["input_ids"].shape[1] if given else 1
    per_prompt = len(rows) // max(len(prompts), 1)
    texts = []
    for index, row in enumerate(rows.tolist()):
        new = row[skip:]
        if tokenizer.eos_token_id in new:
            new = new[: new.index(tokenizer.eos_token_id)]
        texts.append((prompts[index // per_prompt] if prompts else "") + tokenizer.decode(new))
    return texts
