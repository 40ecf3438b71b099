"""What z does to the text that a model writes: how texts of one prompt differ by it, and what of a text it carries.

Texts, prompts and pairs are chosen by a hash of their tokens, z is drawn by noise that belongs to the text, and tokens
are sampled in batches of one size: no figure depends on the data's order. Each figure has a control beside it.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from latentlm.distributions import Stream, sequence_keys
from latentlm.errors import InputError
from latentlm.evaluation.batches import by_hash, evaluating
from latentlm.evaluation.samples import AT_ONCE, distinct, end_tokens, self_bleu, until_end
from latentlm.generation import WritesText
from latentlm.latent_lm import LatentLM

#: scored tokens of a prompt, where nothing else is asked for
PROMPT_TOKENS = 4


@torch.no_grad()
def diversity(
    model: LatentLM,
    sequences: Dataset,
    *,
    prompts: int,
    prompt_tokens: int = PROMPT_TOKENS,
    latents: int = 8,
    max_new_tokens: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """How much the texts of one prompt differ when nothing differs but z: each is the likeliest text of its z.

    The control is `latents` texts from the first of these z's, sampled at temperature 1: what differs there is the
    decoder's chance. A decoder that does not hear its z, or has none, writes one text greedily: self-BLEU 100.

    Args:
        prompts: how many prompts, each the beginning of another text longer than that.
        prompt_tokens: scored tokens of a prompt; 0 begins with BOS alone.
        latents: z's of each prompt, from q(z | prompt), or from the prior where the prompt is BOS alone; at least 2.
        max_new_tokens: of each text; by default what the context leaves.
        seed: of z and of the control's tokens.
        on_progress: called with (prompts done, prompts in all).

    Returns:
        `diversity_distinct_1` to `_3` (`samples.distinct` of a prompt's texts, between 0 and 1) and
        `diversity_self_bleu` (`samples.self_bleu` of a prompt's texts, between 0 and 100), means over prompts; the same
        of the control under `diversity_of_one_latent_…`; and the settings. What a text says is what follows the prompt,
        up to its end.

    Raises:
        InputError: a model that writes no text, too few texts longer than the prompt, or a text beyond the context.
    """
    writer = _writer(model, prompt_tokens)
    if prompts < 1 or latents < 2:
        raise InputError("diversity needs at least 1 prompt and 2 latents of each.")
    texts = _chosen(sequences, prompts, prompt_tokens)
    new_tokens = _room(writer, prompt_tokens) if max_new_tokens is None else max_new_tokens
    by_latents: list[list[int]] = []
    by_one: list[list[int]] = []
    at_once = max(AT_ONCE // latents, 1)
    with evaluating(writer):
        for first in range(0, prompts, at_once):
            some = texts[first : first + at_once]
            beginnings = _beginnings(writer, some, prompt_tokens)
            law = writer.prior(len(some), prompt_tokens + new_tokens)
            if prompt_tokens:
                begun = torch.full((len(some),), prompt_tokens, device=writer.device)
                law = writer.going_on(writer.infer(beginnings, seed=seed), begun, law)
            # by the whole text: prompts that are alike have z's of their own
            keys = torch.cat([sequence_keys(text[None].to(writer.device)) for text in some])
            z = writer.draw_latents(law, keys, latents, seed=seed, stream=Stream.GENERATION).transpose(0, 1)
            rows = beginnings.repeat_interleave(latents, 0)
            one = z[:, :1].expand_as(z)
            by_latents += _write(writer, rows, z.flatten(0, 1), new_tokens, do_sample=False)
            by_one += _write(writer, rows, one.flatten(0, 1), new_tokens, **_sampled(seed + first))
            if on_progress is not None:
                on_progress(first + len(some), prompts)
    return {
        "diversity_prompts": prompts,
        "diversity_latents": latents,
        "diversity_prompt_tokens": prompt_tokens,
        "diversity_max_new_tokens": new_tokens,
        **_variety("diversity", by_latents, latents, end_tokens(writer.config)),
        **_variety("diversity_of_one_latent", by_one, latents, end_tokens(writer.config)),
    }


def _variety(
    name: str, texts: Sequence[Sequence[int]], latents: int, ends: Sequence[int | None]
) -> dict[str, float | None]:
    texts = [until_end(text, ends) for text in texts]
    groups = [texts[first : first + latents] for first in range(0, len(texts), latents)]  # of one prompt each
    figures: dict[str, float | None] = {}
    for n in (1, 2, 3):
        values = [value for group in groups if (value := distinct(group, n)) is not None]
        figures[f"{name}_distinct_{n}"] = math.fsum(values) / len(values) if values else None
    figures[f"{name}_self_bleu"] = math.fsum(map(self_bleu, groups)) / len(groups)
    return figures


@torch.no_grad()
def style_transfer(
    model: LatentLM,
    sequences: Dataset,
    *,
    pairs: int,
    prompt_tokens: int = PROMPT_TOKENS,
    max_new_tokens: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What of a text a its z carries into a continuation c of the beginning of another text b.

    z ~ q(z | a), the prompt is the beginning of b, and c is sampled at temperature 1. The control is z from the prior:
    what the prompt does without a. It is about 1/2, give or take 1/2 ÷ √N, and less where c still tells of b.

    Args:
        pairs: N; with texts in the order of their hash, a and b are neighbours, and each text is an a and a b once.
        prompt_tokens: scored tokens of b that are given; 0 begins with BOS alone.
        max_new_tokens: of each continuation; by default what the context leaves.
        seed: of z and of the tokens; the control samples its tokens with the same random numbers.
        on_progress: called with (pairs done, pairs in all).

    Returns:
        `style_transfer_recovered`: share of the c, each read without its prompt, whose posterior mean is nearer to that
        of a than to that of b, Euclidean in prior standard deviations; an equal distance counts a half, and so does
        an empty c. `style_transfer_overlap`: mean `token_overlap` of c and a after its own first `prompt_tokens`,
        special tokens left out. Both again as `…_by_prior_z`, the control; and the settings.

    Raises:
        InputError: a model that writes no text or has no latents, too few texts longer than the prompt, or a text
            beyond the context.
    """
    writer = _writer(model, prompt_tokens)
    if writer.latent_per_token:
        raise InputError(
            f"a {type(model).__name__} has a latent for each token: that of a text is no style for another."
        )
    if not writer.prior(1, 1).event_shape.numel():
        raise InputError(f"{type(model).__name__} has no latents, so none can be taken from one text to another.")
    if pairs < 1:
        raise InputError("style transfer needs at least 1 pair.")
    texts = _chosen(sequences, max(pairs, 2), prompt_tokens)
    new_tokens = _room(writer, prompt_tokens) if max_new_tokens is None else max_new_tokens
    recovered: dict[str, list[float]] = {"": [], "_by_prior_z": []}
    overlap: dict[str, list[float]] = {"": [], "_by_prior_z": []}
    config = writer.config
    special = {config.bos_token_id, config.pad_token_id, *end_tokens(config)}
    with evaluating(writer):
        batches = [_infer(writer, texts[first : first + AT_ONCE], seed) for first in range(0, len(texts), AT_ONCE)]
        means, inferred = (torch.cat(parts) for parts in zip(*batches, strict=True))
        keys = torch.cat([sequence_keys(text[None].to(writer.device)) for text in texts])
        prior = writer.prior(len(texts), prompt_tokens + new_tokens)
        from_prior = writer.draw_latents(prior, keys, 1, seed=seed, stream=Stream.PRIOR)[0]
        for first in range(0, pairs, AT_ONCE):
            a = range(first, min(first + AT_ONCE, pairs))
            b = [(place + 1) % len(texts) for place in a]
            prompts = _beginnings(writer, [texts[place] for place in b], prompt_tokens)
            for control, z in (("", inferred), ("_by_prior_z", from_prior)):
                written = _write(writer, prompts, z[a.start : a.stop], new_tokens, **_sampled(seed + first))
                recovered[control] += _nearer(writer, written, prompts[:, :1], means[a.start : a.stop], means[b], seed)
                overlap[control] += [
                    token_overlap(
                        [token for token in text if token not in special],
                        [token for token in texts[place][prompt_tokens + 1 :].tolist() if token not in special],
                    )
                    for place, text in zip(a, written, strict=True)
                ]
            if on_progress is not None:
                on_progress(a.stop, pairs)
    return {
        "style_transfer_pairs": pairs,
        "style_transfer_prompt_tokens": prompt_tokens,
        "style_transfer_max_new_tokens": new_tokens,
        **{f"style_transfer_recovered{control}": math.fsum(values) / pairs for control, values in recovered.items()},
        **{f"style_transfer_overlap{control}": math.fsum(values) / pairs for control, values in overlap.items()},
    }


def token_overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """F1 of two bags of tokens, 2 |∩| ÷ (|one| + |other|) (Rajpurkar et al. 2016, SQuAD); 0 if both are empty."""
    both = Counter(one) & Counter(other)
    return 2 * both.total() / max(len(one) + len(other), 1)


def _nearer(
    model: WritesText,
    written: Sequence[Sequence[int]],
    bos: Int64[Tensor, "texts 1"],
    to: Float[Tensor, "texts numbers"],
    than_to: Float[Tensor, "texts numbers"],
    seed: int,
) -> list[float]:
    """For each text 1 if its posterior mean is nearer to the one than to the other, ½ if equally near, or empty."""
    ends = end_tokens(model.config)
    places = [place for place, text in enumerate(written) if until_end(text, ends)]
    nearer = torch.full((len(written),), 0.5, dtype=torch.double, device=model.device)
    if places:
        rows = [torch.cat([bos[place], bos.new_tensor(written[place])]) for place in places]
        means, _ = _infer(model, rows, seed)
        near, far = ((means - other[places]).norm(dim=1) for other in (to, than_to))
        nearer[places] = (near < far).double() + 0.5 * (near == far).double()
    return nearer.tolist()


def _infer(
    model: WritesText, texts: Sequence[Int64[Tensor, " _"]], seed: int
) -> tuple[Float[Tensor, "texts numbers"], Float[Tensor, "texts *event"]]:
    """Of each text the mean of q(z | x), in prior standard deviations from the prior's mean, and one z."""
    input_ids = pad_sequence(list(texts), batch_first=True, padding_value=model.config.pad_token_id or 0)
    attention_mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    posterior = model.infer(input_ids, attention_mask, seed=seed)
    prior = model.prior(len(texts), model.scored_tokens(input_ids, attention_mask).sum(1))
    keys = sequence_keys(input_ids, attention_mask)
    latents = model.draw_latents(posterior, keys, 1, seed=seed, stream=Stream.GENERATION)[0]
    return ((posterior.mean - prior.mean) / prior.variance.sqrt()).flatten(1), latents


def _write(
    model: WritesText,
    prompts: Int64[Tensor, "rows time"],
    latents: Float[Tensor, "rows *event"],
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """What follows each prompt, with the token that ends it, if any."""
    rows = model.generate(prompts, latents=latents, max_new_tokens=max_new_tokens, **options)
    ends = end_tokens(model.config)
    return [row[: len(until_end(row, ends)) + 1] for row in rows[:, prompts.shape[1] :].tolist()]


def _sampled(seed: int) -> dict[str, Any]:
    return {"do_sample": True, "top_k": 0, "seed": seed}


def _writer(model: LatentLM, prompt_tokens: int) -> WritesText:
    if not isinstance(model, WritesText):
        raise InputError(f"a {type(model).__name__} does not write text from latents and a prompt.")
    if prompt_tokens < 0:
        raise InputError(f"prompt_tokens must not be negative, but is {prompt_tokens}.")
    return model


def _room(model: WritesText, prompt_tokens: int) -> int:
    context = model.config.max_position_embeddings
    if prompt_tokens >= context:
        raise InputError(f"a prompt of {prompt_tokens} tokens fills the model's context of {context}: give fewer.")
    return context - prompt_tokens


def _chosen(sequences: Dataset, number: int, prompt_tokens: int) -> list[Int64[Tensor, " _"]]:
    """So many different texts longer than the prompt, the first of them in the order of their hash."""
    texts: dict[bytes, Tensor] = {}
    for index in by_hash(sequences):
        input_ids = sequences[index]["input_ids"]
        if len(input_ids) > prompt_tokens + 1:
            texts.setdefault(input_ids.numpy().tobytes(), input_ids)
        if len(texts) == number:
            return list(texts.values())
    if not texts:
        raise InputError(f"no sequence is longer than the prompt of {prompt_tokens} tokens.")
    raise InputError(
        f"{number} different texts longer than the prompt of {prompt_tokens} tokens are needed, and the data has "
        f"{len(texts)}: ask for fewer."
    )


def _beginnings(
    model: WritesText, texts: Sequence[Int64[Tensor, " _"]], prompt_tokens: int
) -> Int64[Tensor, "texts prompt"]:
    return torch.stack([text[: prompt_tokens + 1] for text in texts]).to(model.device)
