"""MAUVE: how near the texts that a model writes are to those that people wrote, between 0 and 1 (Pillutla et al. 2021).

Both are quantised together by k-means on features of a model that reads them; MAUVE is the area under the curve of the
divergences of the two histograms from their mixtures. The figure is one of its features and of the number of texts
(clusters are a tenth of the fewer): compare rows of one table, and none with a paper's, which has other features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentlm.causal_lm import CausalLatentLM
from latentlm.data.tokenizers import bos_and_eos
from latentlm.errors import InputError
from latentlm.evaluation.batches import evaluating, in_batches
from latentlm.evaluation.generative import Reader, TokenTexts
from latentlm.evaluation.writing import Documents, document_ids
from latentlm.families import HuggingFaceLM
from latentlm.processes import gather_rows

_LARGEST_SEED = 2**31 - 16  # faiss takes a C int, and mauve adds to it


def check_mauve(reader: Reader) -> None:
    """Raises InputError unless MAUVE can be computed from this model's features; asked before the work."""
    _compute_mauve()
    if reader.model.annotation_labels is not None or not isinstance(reader.model, CausalLatentLM | HuggingFaceLM):
        raise InputError(
            f"a {type(reader.model).__name__} gives no features of a text: take an autoregressive model, an LTM, a "
            "GPT-VAE or a causal language model of transformers."
        )


def mauve(
    people: Float[Tensor, "texts numbers"], written: Float[Tensor, "others numbers"], *, seed: int = 0
) -> dict[str, Any]:
    """MAUVE of the package mauve-text, with its defaults: c = 5, clusters a tenth of the fewer texts, at least 2.

    Args:
        people, written: features of each text.
        seed: of k-means.

    Returns:
        `mauve`, `mauve_clusters`, and `mauve_people_texts` and `mauve_written_texts`, the two N.
    """
    if min(len(people), len(written)) < 2:
        raise InputError("MAUVE compares sets of texts: give at least 2 of each that are not empty.")
    given: dict[str, np.ndarray] = {"p_features": people.numpy(), "q_features": written.numpy()}
    found = _compute_mauve()(**given, seed=seed % _LARGEST_SEED, verbose=False)
    # of equal histograms all mixtures are one point of the curve, and the package's order among ties may give 0.75
    same = np.array_equal(found.p_hist, found.q_hist)
    return {
        "mauve": 1.0 if same else float(found.mauve),
        "mauve_clusters": int(found.num_buckets),
        "mauve_people_texts": len(people),
        "mauve_written_texts": len(written),
    }


@torch.no_grad()
def features(
    reader: Reader,
    texts: Sequence[Documents],
    *,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "texts numbers"]:
    """The last hidden state of a reader at the last token of each text, float32 on the CPU.

    A text is cut at the reader's context. Texts without a token are left out. With latents, z is the mean of q(z | x).

    Args:
        seed: of an inference that needs any.

    Raises:
        InputError: of more than half of the texts the reader would not see the end, where they differ.
    """
    check_mauve(reader)
    model, tokenizer = reader
    bos, _ = bos_and_eos(tokenizer)
    longest = model.config.max_position_embeddings  # positions: BOS is read, too
    whole = [[bos, *ids] for ids in document_ids(tokenizer, texts) if ids]
    if 2 * (cut := sum(len(ids) > longest for ids in whole)) > len(whole):
        raise InputError(
            f"the model of the features reads {longest} tokens, and {cut:,} of {len(whole):,} texts are longer, "
            "so that it would not see how they end: give one of a longer context."
        )
    read = TokenTexts([ids[:longest] for ids in whole])
    if not len(read):
        return torch.zeros(0, 1)
    places, parts = [], []
    with evaluating(model):
        for indices, input_ids, attention_mask, _ in in_batches(model, read, batch_size, on_progress):
            states = _states(model, input_ids, attention_mask, seed)
            last = attention_mask.sum(1) - 1
            parts.append(states[torch.arange(len(states), device=states.device), last].float())
            places += indices
        order = gather_rows(torch.tensor(places, dtype=torch.long, device=model.device)).argsort()
        return gather_rows(torch.cat(parts))[order].cpu()


def _states(model: Any, input_ids: Tensor, attention_mask: Tensor, seed: int) -> Float[Tensor, "batch time numbers"]:
    if isinstance(model, HuggingFaceLM):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "output_hidden_states": True}
        return model.language_model(**given).hidden_states[-1]
    latents = model.infer(input_ids, attention_mask, seed=seed).mean
    return model.hidden_states(latents, input_ids, attention_mask)


def _compute_mauve() -> Callable[..., Any]:
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise InputError(
            "MAUVE needs the package mauve-text: pip install 'latentlm[mauve]', or leave --features out."
        ) from error
    return compute_mauve
