"""How varied texts are, and figures of the texts that a model writes from its prior."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from latentlm.config import LatentLMConfig
from latentlm.errors import InputError
from latentlm.evaluation.batches import evaluating, synchronised
from latentlm.generation import WritesText
from latentlm.latent_lm import LatentLM

#: texts written together: of one size, since the tokens of a batch come from one generator
AT_ONCE = 32


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams ÷ all n-grams of all texts together (Li et al. 2016, section 5.2); None where there are none."""
    grams = [tuple(text[place : place + n]) for text in texts for place in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def token_entropy(text: Sequence[int]) -> float:
    """Entropy in nats of the tokens of one text, each occurrence equally likely; at most ln of its length."""
    return -math.fsum(count / len(text) * math.log(count / len(text)) for count in Counter(text).values())


def self_bleu(texts: Sequence[Sequence[int]]) -> float:
    """Mean BLEU of each text against all the others, between 0 and 100, where 100 are texts that are all the same (Zhu
    et al. 2018, Texygen).

    sacrebleu's sentence BLEU on token ids: n-grams up to 4, or up to the text's length, exponential smoothing. A text
    that is among the others has 100, an empty one too; an empty one that is not has 0.

    Raises:
        ValueError: less than two texts.
    """
    from sacrebleu.metrics.bleu import BLEU

    if len(texts) < 2:
        raise ValueError("a text has nothing to be compared with: give at least two")
    bleu = BLEU(tokenize="none", effective_order=True, force=True)
    written = [" ".join(map(str, text)) for text in texts]
    scores = []
    for place, text in enumerate(written):
        others = written[:place] + written[place + 1 :]
        scores.append(100.0 if text in others else bleu.sentence_score(text, others).score if text else 0.0)
    return math.fsum(scores) / len(scores)


def end_tokens(config: LatentLMConfig) -> list[int | None]:
    """The tokens that end a text; None stands for none."""
    return [*config.eos_token_id] if isinstance(config.eos_token_id, list) else [config.eos_token_id]


def until_end(text: Sequence[int], ends: Sequence[int | None]) -> Sequence[int]:
    """The text before the first token that ends it."""
    return text[: next((place for place, token in enumerate(text) if token in ends), len(text))]


def sampling(do_sample: bool) -> dict[str, Any]:
    """What `generate` is told: temperature 1 and all tokens, or the likeliest."""
    return {"do_sample": True, "top_k": 0} if do_sample else {"do_sample": False}


def from_prior(
    model: WritesText, number: int, max_new_tokens: int, *, seed: int, **options: Any
) -> Iterator[Int64[Tensor, "rows new"]]:
    """`number` texts from BOS alone, each with a z of its own from the prior, in batches of one size.

    Args:
        options: of `generate`.
    """
    bos = model.config.bos_token_id
    assert bos is not None  # or it cannot start a text, and was refused
    for first in range(0, number, AT_ONCE):
        prompts = torch.full((min(AT_ONCE, number - first), 1), bos, device=model.device)
        yield model.generate(prompts, max_new_tokens=max_new_tokens, seed=seed + first, **options)[:, 1:]


def prior_samples(
    model: LatentLM, *, number: int = 64, max_new_tokens: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Writes `number` texts from the prior, at temperature 1, and says how varied they are.

    Returns:
        `sample_entropy_nats` (mean over texts of `token_entropy`), `distinct_1` to `distinct_3`, `sample_tokens`,
        `samples` and `samples_per_second`. Tokens after the end of a text do not count.
    """
    if not isinstance(model, WritesText):
        raise InputError(f"a {type(model).__name__} does not write text from its prior.")
    if number < 1:
        raise InputError("number must be at least 1.")
    config = model.config
    if config.bos_token_id is None:
        raise InputError("the model's config names no bos_token_id, so it cannot start a text.")
    texts: list[Sequence[int]] = []
    longest = max_new_tokens or config.max_position_embeddings
    start = time.perf_counter()
    with evaluating(model):
        for rows in from_prior(model, number, longest, **sampling(True), seed=seed):
            texts += [until_end(row, end_tokens(config)) for row in rows.tolist()]
    synchronised(model.device)
    written = [text for text in texts if text]
    return {
        "samples": number,
        "sample_tokens": sum(map(len, texts)),
        "sample_entropy_nats": math.fsum(map(token_entropy, written)) / max(len(written), 1),
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "samples_per_second": number / (time.perf_counter() - start),
    }
