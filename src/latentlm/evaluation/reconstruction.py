"""Texts written from z alone beside the texts that z was inferred from: a reconstruction, and no likelihood.

z has seen the text and its cost is left out, so a good figure says that z holds the text, not that the model is good.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from latentlm.errors import InputError
from latentlm.evaluation.batches import by_hash, evaluating, in_batches
from latentlm.evaluation.samples import end_tokens, until_end
from latentlm.generation import WritesText
from latentlm.latent_lm import LatentLM
from latentlm.processes import gather_rows

_NOTHING = -1  # after the last token of a text, where padding may be a token like any other


@torch.no_grad()
def reconstructions(
    model: LatentLM,
    sequences: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: int,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Writes texts greedily from the mean of q(z | x), and compares them with x.

    A text and its reconstruction are both cut at the first token that ends a text (of a block of several documents the
    first remains), and decoded without special tokens. A decoder of one token after another has to find the length, up
    to the longest of the data; where a latent has a part for each token, the length is given with it, so compare such
    families with each other.

    Args:
        texts: how many, the first in the order of their hash; all, where there are fewer.
        batch_size: texts at a time; changes speed and memory, no figure.
        seed: of the noise of an inference that needs any.
        on_progress: called with (texts done, texts in all) after each batch.

    Returns:
        The figures, and each text with its reconstruction. `reconstruction_bleu`: corpus BLEU of sacrebleu's defaults,
        0 to 100 (Papineni et al. 2002; Post 2018); 0 where no text has four words. `reconstruction_exact_match`: share
        of the texts that are equal but for white space around them. `reconstruction_bleu_of_other_z`, the control: the
        same with z of the text N/2 further on (texts that are alike are neighbours by their hash), what texts have in
        common without z, or what their own labels say; None for a single text.
        `reconstruction_texts`: N.

    Raises:
        InputError: a model that has no latents or writes no text from them, or no text asked for.
    """
    if not isinstance(model, WritesText):
        raise InputError(f"a {type(model).__name__} does not write text from latents.")
    if model.exact:
        raise InputError(f"{type(model).__name__} has no latents, so no text can be reconstructed from them.")
    if texts < 1:
        raise InputError(f"reconstructions need at least 1 text, not {texts}.")
    lengths = [len(sequences[index]["input_ids"]) - 1 for index in range(len(sequences))]  # type: ignore[arg-type]
    longest = min(max(lengths, default=0), model.config.max_position_embeddings)
    chosen = [index for index in by_hash(sequences) if lengths[index]][:texts]
    chosen_texts, half = Subset(sequences, chosen), len(chosen) // 2
    places: list[int] = []
    nothing = torch.zeros(0, longest, dtype=torch.long, device=model.device)
    parts, by_other_z, means = [nothing], [nothing], []
    conditional = False
    with evaluating(model):
        for indices, input_ids, attention_mask, condition in in_batches(model, chosen_texts, batch_size, on_progress):
            latents = model.infer(input_ids, attention_mask, condition, seed=seed).mean
            options: dict[str, Any] = {"max_new_tokens": longest}
            if condition is not None:
                conditional, options["condition"] = True, condition
            if model.latent_per_token:
                scored = model.scored_tokens(input_ids, attention_mask).sum(1)
                options = {"max_new_tokens": latents.shape[1], "lengths": scored}
            rows = _padded(model.generate(latents=latents, do_sample=False, **options), longest)
            if model.latent_per_token:
                rows[torch.arange(longest, device=rows.device) >= scored[:, None]] = _NOTHING
            parts.append(rows)
            places += indices
            means.append(latents)
        order = gather_rows(torch.tensor(places, dtype=torch.long, device=model.device)).argsort()
        rows = gather_rows(torch.cat(parts))[order]
        if conditional:  # another text's z under the text's own labels
            every = gather_rows(torch.cat(means))[order].roll(-half, 0)
            for indices, _, _, condition in in_batches(model, chosen_texts, batch_size):
                options = {"condition": condition, "max_new_tokens": longest, "do_sample": False}
                by_other_z.append(_padded(model.generate(latents=every[indices], **options), longest))
            others_rows = gather_rows(torch.cat(by_other_z))[order]
        else:  # a greedy text is a function of z alone, so those of other z's are written already
            others_rows = rows.roll(-half, 0)
    ends = [*end_tokens(model.config), _NOTHING]

    def decoded(ids: Sequence[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode([until_end(row, ends) for row in ids], skip_special_tokens=True)

    sources = decoded([sequences[index]["input_ids"][1:].tolist() for index in chosen])
    written, others = decoded(rows.tolist()), decoded(others_rows.tolist())
    pairs = list(zip(sources, written, strict=True))
    return {
        "reconstruction_texts": len(pairs),
        "reconstruction_bleu": bleu(written, sources),
        "reconstruction_bleu_of_other_z": bleu(others, sources) if half else None,
        "reconstruction_exact_match": sum(source.strip() == text.strip() for source, text in pairs) / len(pairs),
    }, pairs


def _padded(rows: Tensor, longest: int) -> Int64[Tensor, "texts longest"]:
    """What was written after BOS."""
    return nn.functional.pad(rows[:, 1:], (0, longest - rows.shape[1] + 1), value=_NOTHING)


def bleu(written: Sequence[str], sources: Sequence[str]) -> float:
    """Corpus BLEU of sacrebleu's defaults, 0 to 100 (Papineni et al. 2002; Post 2018)."""
    from sacrebleu.metrics.bleu import BLEU

    # forced: without, it warns of texts that end in " ."
    return BLEU(force=True).corpus_score(written, [sources]).score
