"""How likely another model finds texts that a model wrote: generative perplexity (Kong et al. 2025, Table 3).

Texts come as strings, and the scorer cuts them into tokens of its own. Where its vocabulary is that of the model that
wrote them, the figure is a perplexity per token; otherwise bits per byte, the only one that compares. A low figure is
good only beside a high entropy: a text that repeats itself is likely. Compare with what people wrote, under one scorer.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from latentlm.data.tokenizers import bos_and_eos, tokenizer_fingerprint
from latentlm.errors import InputError
from latentlm.evaluation.batches import PerSequence, evaluating, in_batches
from latentlm.evaluation.continuation import continuation
from latentlm.evaluation.likelihood import perplexity, score
from latentlm.evaluation.writing import Documents, document_ids
from latentlm.latent_lm import LatentLM
from latentlm.text import longest_text

IW_SAMPLES = 16


class Reader(NamedTuple):
    """A model that reads what another one wrote, and its tokenizer."""

    model: LatentLM
    tokenizer: PreTrainedTokenizerBase


class TokenTexts(Dataset):
    """Texts of token ids, BOS first, as a data set to score."""

    def __init__(self, texts: Sequence[Sequence[int]]):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor(self.texts[index], dtype=torch.long), "num_bytes": 0, "index": index}


def check_scorer(scorer: Reader) -> None:
    """Raises InputError unless the model gives a likelihood of any text, token after token."""
    model = scorer.model
    if model.annotation_labels is not None:
        raise InputError("the scorer is of p(x | c), of texts with labels: take a model of p(x).")
    if model.latent_per_token:
        raise InputError(
            f"a {type(model).__name__} is given the length of a text, so its likelihood is another: take a scorer that "
            "reads one token after another."
        )


@torch.no_grad()
def generative_perplexity(
    scorer: Reader,
    texts: Sequence[Documents],
    written_with: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[Documents] | None = None,
    samples: int = IW_SAMPLES,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """NLL of texts under a scorer, Σ nats ÷ Σ tokens or bytes of all texts.

    With latents the scorer's NLL is a bound: importance-weighted, K samples of q, or after a prompt that of
    `continuation`, z inferred from the prompt. A text longer than the scorer's context is scored in blocks that do not
    overlap, each from BOS; where a prompt and its text are, the prompt loses its beginning down to half of the context,
    and the first block begins with what is left of it.

    Args:
        texts: each as its documents; the scorer's EOS stands between them and is scored, for no byte.
        written_with: the tokenizer of the model that wrote them.
        prompts: what stands before each text: given, and not scored.
        samples: K.

    Returns:
        `generative_exact` (whether it is the NLL itself), `generative_unit` ("token" where the vocabularies are the
        same, or "byte"), `generative_nll_per_token` and `generative_perplexity` (None if the unit is a byte),
        `generative_bits_per_byte`, `generative_tokens`, `generative_bytes`, `generative_empty` (texts without a token,
        which are left out) and `generative_samples` (K). Figures of no token or byte are None.

    Raises:
        InputError: a scorer of another kind; see `check_scorer`.
    """
    check_scorer(scorer)
    model, tokenizer = scorer
    same = tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(written_with)
    bos, _ = bos_and_eos(tokenizer)
    given = [[] for _ in texts] if prompts is None else document_ids(tokenizer, prompts)
    blocks: dict[int, list[list[int]]] = defaultdict(list)  # by how many tokens after BOS are given
    empty = 0
    for prompt, text in zip(given, document_ids(tokenizer, texts), strict=True):
        empty += not text
        for known, block in _blocks(prompt, text, longest_text(model)):
            blocks[known].append([bos, *block])
    nll, tokens, done, number = 0.0, 0, 0, sum(map(len, blocks.values()))

    def progress(of_some: int, _: int) -> None:
        if on_progress is not None:
            on_progress(done + of_some, number)

    options: dict[str, Any] = {"samples": samples, "batch_size": batch_size, "seed": seed, "on_progress": progress}
    for known in sorted(blocks):
        some = TokenTexts(blocks[known])
        if known:
            figures = continuation(model, some, prompt_tokens=known, **options)
            of_some = figures["continuation_tokens"]
            nll += figures["continuation_nll_per_token"] * of_some
        else:
            of_all, of_some = _nll(model, some, **options)
            nll += of_all
        tokens += of_some
        done += len(some)
    num_bytes = sum(len(document.encode()) for text in texts for document in text)
    per_token = nll / tokens if tokens and same else None
    return {
        "generative_exact": model.exact,
        "generative_unit": "token" if same else "byte",
        "generative_nll_per_token": per_token,
        "generative_perplexity": None if per_token is None else perplexity(per_token),
        "generative_bits_per_byte": nll / math.log(2) / num_bytes if num_bytes else None,
        "generative_tokens": tokens,
        "generative_bytes": num_bytes,
        "generative_empty": empty,
        "generative_samples": 1 if model.exact else samples,
    }


def _blocks(prompt: list[int], text: list[int], context: int) -> list[tuple[int, list[int]]]:
    """What is scored together, each with how many of its tokens are given."""
    if not text:
        return []
    if len(prompt) + len(text) > context:
        kept = context // 2
        prompt = prompt[-kept:] if kept else []
    first = context - len(prompt)
    later = range(first, len(text), context)
    return [(len(prompt), prompt + text[:first]), *((0, text[begin : begin + context]) for begin in later)]


def _nll(
    model: LatentLM,
    texts: TokenTexts,
    *,
    samples: int,
    batch_size: int,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> tuple[float, int]:
    """Σ nats and Σ tokens of whole texts."""
    figures = PerSequence("nll", "tokens")
    with evaluating(model):
        for indices, input_ids, attention_mask, _ in in_batches(model, texts, batch_size, on_progress):
            nll = score(model, input_ids, attention_mask, samples=1 if model.exact else samples, seed=seed)["iw"]
            figures.add(indices, nll=nll, tokens=model.scored_tokens(input_ids, attention_mask).sum(1))
        nll, tokens = (values.sum() for values in figures.gathered(model.device).values())
    return float(nll), int(tokens)
