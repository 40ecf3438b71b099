"""Texts in; texts or latents out."""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latentlm.data import condition_of, length_buckets, text_batch
from latentlm.errors import InputError, one_sentence
from latentlm.files import check_writable, whole_file
from latentlm.latent_lm import LatentLM

_PLENTY = 2**31

TextBatch = tuple[list[int], Int64[Tensor, "batch time"], Int64[Tensor, "batch time"], dict[str, Tensor] | None]


@dataclass(frozen=True)
class Encoding:
    """Posteriors of N texts: `ids` [N] (0 … N − 1), `mean` and `variance` [N, *event] of q(z | x).

    `truncated` of the texts were longer than the model's context and are encoded by their beginnings.

    Where a latent has a part for each token, the event is [T, size] with T of the longest text, `lengths` [N] has that
    of each, and what stands after it is 0.
    """

    ids: np.ndarray
    mean: Float[np.ndarray, "texts *event"]
    variance: Float[np.ndarray, "texts *event"]
    lengths: np.ndarray | None = None
    truncated: int = 0

    def save(self, path: str | Path) -> None:
        """Writes `.npz`, or `.parquet` with each latent as a flat list and its shape beside it; whole or not at all."""
        path = check_latents_path(path)
        with whole_file(path) as file:
            if path.suffix == ".npz":
                lengths: dict[str, Any] = {} if self.lengths is None else {"lengths": self.lengths}
                np.savez(file, ids=self.ids, mean=self.mean, variance=self.variance, **lengths)
            else:
                self._write_parquet(file)

    def _write_parquet(self, file: Any) -> None:
        import pyarrow
        import pyarrow.parquet

        ends = [None] * len(self.ids) if self.lengths is None else self.lengths.tolist()
        means, variances = (
            [row[:end] for row, end in zip(rows, ends, strict=True)] for rows in (self.mean, self.variance)
        )
        columns = {
            "id": self.ids,
            "mean": [row.reshape(-1) for row in means],
            "variance": [row.reshape(-1) for row in variances],
            "shape": [list(row.shape) for row in means],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), file)


def check_latents_path(path: str | Path) -> Path:
    """The path, if latents can be written under its name; asked before the work, too."""
    path = check_writable(path)
    if path.suffix not in (".npz", ".parquet"):
        raise InputError(f"{path}: latents are written as .npz or .parquet.")
    return path


def read_latents(path: str | Path) -> tuple[Float[Tensor, "rows *event"], Int64[Tensor, " rows"] | None]:
    """The means in a file that `Encoding.save` wrote, and their lengths, if they have any.

    Ready-made latents may be stored in the same way.

    Raises:
        InputError: no such file, no such content, or numbers that are not finite in float32.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".parquet"):
        raise InputError(f"{path}: latents are read from .npz or .parquet: give a file that latentlm encode wrote.")
    if not path.is_file():
        raise InputError(f"{path} does not exist or is no file: give a file that latentlm encode wrote.")
    try:
        mean, lengths = _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    except Exception as error:  # every kind of damage raises its own kind of exception
        reason = one_sentence(error)
        raise InputError(
            f"{path} holds no latents that can be read ({reason}): write it again by latentlm encode."
        ) from error
    if mean.dtype.kind not in "fiu" or mean.ndim < 2:
        raise InputError(
            f"{path}: 'mean' has the type {mean.dtype} and the shape {list(mean.shape)}: give numbers [rows, …]."
        )
    if not len(mean):
        raise InputError(f"{path} holds no latents: encode at least one text.")
    with np.errstate(over="ignore"):
        latents = torch.from_numpy(np.ascontiguousarray(mean.astype(np.float32)))
    if not bool(torch.isfinite(latents).all()):
        raise InputError(f"{path} holds latents that are not finite: check how they were made.")
    if lengths is None:
        return latents, None
    if (
        lengths.dtype.kind not in "iu"
        or lengths.shape != latents.shape[:1]
        or latents.dim() != 3
        or not 1 <= lengths.min() <= lengths.max() <= latents.shape[1]
    ):
        raise InputError(f"{path}: 'lengths' must be whole numbers, between 1 and the latents' times, one for each.")
    return latents, torch.from_numpy(lengths.astype(np.int64))


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no .npz file")
    with np.load(path, allow_pickle=False) as arrays:
        if "mean" not in arrays:
            raise ValueError("there is no array 'mean'")
        try:
            return np.asarray(arrays["mean"]), np.asarray(arrays["lengths"]) if "lengths" in arrays else None
        except ValueError as error:
            raise ValueError("its array 'mean' is damaged or holds objects, not numbers") from error


def _read_parquet(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        table = file.read(columns=["mean", "shape"])
    if missing := {"mean", "shape"} - set(table.column_names):
        raise ValueError(f"there is no column {sorted(missing)[0]!r}")
    rows, shapes = table["mean"].to_pylist(), table["shape"].to_pylist()
    if all(shape == shapes[0] for shape in shapes):
        return np.array(rows).reshape(len(rows), *(shapes[0] if shapes else (1,))), None
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError("its rows have different shapes")
    lengths = np.array([shape[0] for shape in shapes])
    return stacked([np.array(row).reshape(shape) for row, shape in zip(rows, shapes, strict=True)]), lengths


@torch.no_grad()
def encode(
    model: LatentLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    annotations: Sequence[Sequence[str]] | None = None,
    cut: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Encoding:
    """q(z | x) of each text, in batches of texts of similar length; row i belongs to text i.

    Args:
        annotations: the labels of each text, for a model that is conditional.
        cut: take of a text that is longer than the model's context its beginning, as evaluation does.

    Raises:
        InputError: no text, or one longer than the model's context that is not to be cut.
    """
    if isinstance(texts, str):
        raise InputError("give a list of texts, not one string.")
    lengths = token_counts(tokenizer, texts) if texts else []
    longest = longest_text(model)
    for row, length in enumerate(lengths):
        if length + 1 > longest and not cut:
            raise InputError(f"text {row} has {length + 1} tokens and the model's context is {longest}: shorten it.")
    if not lengths:
        raise InputError("there is no text to encode.")
    if annotations is not None and len(annotations) != len(texts):
        raise InputError(f"the labels of {len(annotations)} texts do not fit {len(texts)}: give those of each.")
    means: list[np.ndarray] = [np.zeros(0)] * len(texts)
    variances = means.copy()
    done = 0
    batches = text_batches(model, tokenizer, texts, lengths, annotations, batch_size)
    for indices, input_ids, attention_mask, condition in batches:
        posterior = model.infer(input_ids, attention_mask, condition, seed=seed)
        mean, variance = posterior.mean.float().cpu().numpy(), posterior.variance.float().cpu().numpy()
        for row, index in enumerate(indices):
            end = min(lengths[index] + 1, longest) if model.latent_per_token else None  # EOS is a token, too
            means[index], variances[index] = mean[row, :end], variance[row, :end]
        done += len(indices)
        if on_progress is not None:
            on_progress(done, len(texts))
    of_tokens = np.array([len(mean) for mean in means]) if model.latent_per_token else None
    truncated = sum(length + 1 > longest for length in lengths)
    return Encoding(np.arange(len(texts)), stacked(means), stacked(variances), of_tokens, truncated)


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Of each text, without BOS and EOS."""
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def text_batches(
    model: LatentLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    lengths: Sequence[int],
    annotations: Sequence[Sequence[str]] | None,
    batch_size: int,
) -> Iterator[TextBatch]:
    """Indices, `input_ids` (BOS x_1 … EOS, cut at the model's context), `attention_mask` and condition of batches of
    texts of similar length, on the model's device; every text is in one.

    Args:
        lengths: `token_counts` of the texts.
        annotations: the labels of each text, for a model that is conditional.
    """
    longest = longest_text(model)
    for indices in length_buckets(lengths, batch_size, seed=0, shuffle=False):
        batch = text_batch(tokenizer, [texts[index] for index in indices])
        given = on_device({name: ids[:, : longest + 1] for name, ids in batch.items()}, model.device)
        condition = None
        if annotations is not None:
            rows = condition_of([annotations[index][:longest] for index in indices], model.annotation_labels)
            condition = on_device(rows, model.device)
        yield list(indices), given["input_ids"], given["attention_mask"], condition


def longest_text(model: LatentLM) -> int:
    """How many tokens the model's context holds: plenty, where it has no bound, for which the contract does not ask."""
    return getattr(model.config, "max_position_embeddings", _PLENTY)


def on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}


def stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of one shape, or of different lengths with 0 after their ends, in one array."""
    if len({row.shape for row in rows}) == 1:
        return np.stack(rows)
    whole = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), dtype=rows[0].dtype)
    for place, row in enumerate(rows):
        whole[place, : len(row)] = row
    return whole


def write(
    model: LatentLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = (),
    annotations: Sequence[Sequence[str]] = (),
    **options: Any,
) -> list[str]:
    """Texts from each prompt (z inferred from it), or from the prior; takes the options of the model's `generate`.

    A conditional model writes under `annotations`: the labels of each text to be written, or one text's for all. Each
    text ends at its first end-of-text token. Rows of one prompt stand together. One prompt serves many `latents`.
    """
    given: dict[str, Any] = {}
    if options.get("latents") is not None:
        options["latents"] = options["latents"].to(model.device)
        if len(prompts) == 1:
            prompts = [*prompts] * len(options["latents"])
    if prompts:
        batch = text_batch(tokenizer, prompts, end=False)
        given = on_device(batch, model.device)
    if annotations:
        labels = model.annotation_labels
        options["condition"] = on_device(condition_of(annotations, labels), model.device)
    rows = model.generate(**given, **options)
    skip = given["input_ids"].shape[1] if given else 1
    per_prompt = len(rows) // max(len(prompts), 1)
    known = [ids[mask.bool()][1:].tolist() for ids, mask in zip(*given.values(), strict=True)] if given else []
    texts = []
    lengths = [] if options.get("lengths") is None else options["lengths"].tolist()
    for index, row in enumerate(rows.tolist()):
        new = row[skip:]
        if lengths:  # what stands after so many tokens is padding
            before = len(known[index // per_prompt]) if prompts else 0
            new = new[: max(lengths[index * len(lengths) // len(rows)] - before, 0)]
        if tokenizer.eos_token_id in new:
            new = new[: new.index(tokenizer.eos_token_id)]
        place = index // per_prompt
        texts.append(_continued(tokenizer, prompts[place], known[place], new) if prompts else tokenizer.decode(new))
    return texts


def _continued(tokenizer: PreTrainedTokenizerBase, prompt: str, known: list[int], new: list[int]) -> str:
    """A prompt as it was given and what follows, which begins with white space where the tokenizer says so."""
    before, whole = str(tokenizer.decode(known)), str(tokenizer.decode(known + new))
    return prompt + (whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(new)))
