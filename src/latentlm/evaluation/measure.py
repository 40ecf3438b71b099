"""All that is measured of one model on one data set, as one mapping of figures."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from latentlm.errors import InputError, one_sentence
from latentlm.evaluation.continuation import continuation
from latentlm.evaluation.flops import training_cost
from latentlm.evaluation.likelihood import evaluate
from latentlm.evaluation.published import published_figures
from latentlm.evaluation.reconstruction import reconstructions
from latentlm.evaluation.samples import prior_samples
from latentlm.evaluation.steering import PROMPT_TOKENS, diversity, style_transfer
from latentlm.latent_lm import LatentLM

#: texts that stand with their reconstructions among the figures, at most
PAIRS = 20


@strict
@dataclass(kw_only=True)
class Scoring:
    """What is measured.

    Args:
        protocol: "honest", or "paper" for what the family's published code would report beside it; see
            `published_figures`.
        iw_samples: K of the importance-weighted bound, and of a continuation.
        prompt_tokens: adds the NLL of what follows so many tokens, z inferred from them alone (`continuation`); of the
            prompts of `diversity` and `style_transfer`, too, which are of `steering.PROMPT_TOKENS` without it.
        reinfer_every: of the continuation; see there.
        prior_samples: so many texts are written from the prior and their variety measured (`samples.prior_samples`).
        diversity: so many prompts are gone on from with several z's each (`steering.diversity`).
        style_transfer: so many texts go on from one text's beginning with another one's z (`steering.style_transfer`).
        reconstructions: so many texts are written from the mean of their own q (`reconstruction.reconstructions`).
        flops: the floating-point operations of a training step are counted (`flops.training_cost`).
        batch_size: sequences at a time; changes speed and memory, no figure.
    """

    protocol: str = "honest"
    iw_samples: int = 16
    prompt_tokens: int | None = None
    reinfer_every: int | None = None
    prior_samples: int = 0
    diversity: int = 0
    style_transfer: int = 0
    reconstructions: int = 0
    flops: bool = False
    batch_size: int = 32

    def validate_values(self) -> None:
        """Part of the validation of `@strict`."""
        if self.protocol not in ("honest", "paper"):
            raise ValueError(f"protocol must be honest or paper, not {self.protocol}")
        for name in ("iw_samples", "reinfer_every", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("prompt_tokens", "prior_samples", "diversity", "style_transfer", "reconstructions"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.reinfer_every is not None and self.prompt_tokens is None:
            raise ValueError("reinfer_every belongs to the continuation of a prompt: give prompt_tokens, too")

    @classmethod
    def of(cls, **fields: Any) -> "Scoring":
        """As the constructor, with one sentence for what is wrong (InputError)."""
        if unknown := sorted(fields.keys() - set(cls.__dataclass_fields__)):
            raise InputError(f"{unknown[0]} is no option of scoring: {', '.join(sorted(cls.__dataclass_fields__))}.")
        try:
            return cls(**fields)
        except Exception as error:  # strict dataclasses raise their own kinds
            raise InputError(f"{one_sentence(error).removesuffix('.')}.") from error


def measure(
    model: LatentLM,
    sequences: Dataset,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trained: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    **scoring: Any,
) -> dict[str, Any]:
    """The figures of `evaluate`, and beside them what `scoring`, the fields of `Scoring`, asks for.

    Args:
        tokenizer: of the sequences; reconstructions alone need it. The first of them are the `reconstruction_pairs`.
        trained: what is known of the model's training (`training_figures`); stands among the figures.
    """
    wanted = Scoring.of(**scoring)
    if wanted.reconstructions and tokenizer is None:
        raise InputError("reconstructions are compared as text: give measure the tokenizer, too.")
    if model.annotation_labels is not None:
        for name in ("prior_samples", "diversity", "style_transfer"):
            if getattr(wanted, name):
                raise InputError(f"{name} is of models of p(x), and this one is of p(x | c), of texts with labels.")
    options: dict[str, Any] = {"batch_size": wanted.batch_size, "seed": seed, "on_progress": on_progress}
    beside: dict[str, Any] = {**(trained or {})}
    # these first, since they may have to refuse
    if wanted.protocol == "paper":
        beside |= {**published_figures(model, sequences, **options), "protocol": "paper"}
    if wanted.flops:
        beside |= training_cost(model, sequences, beside.get("training_tokens"))
    if wanted.prompt_tokens is not None:
        beside |= continuation(
            model,
            sequences,
            prompt_tokens=wanted.prompt_tokens,
            reinfer_every=wanted.reinfer_every,
            samples=wanted.iw_samples,
            **options,
        )
    if wanted.prior_samples:
        beside |= prior_samples(model, number=wanted.prior_samples, seed=seed)
    steered: dict[str, Any] = {
        "prompt_tokens": PROMPT_TOKENS if wanted.prompt_tokens is None else wanted.prompt_tokens,
        "seed": seed,
        "on_progress": on_progress,
    }
    if wanted.diversity:
        beside |= diversity(model, sequences, prompts=wanted.diversity, **steered)
    if wanted.style_transfer:
        beside |= style_transfer(model, sequences, pairs=wanted.style_transfer, **steered)
    if wanted.reconstructions and tokenizer is not None:
        reconstructed, pairs = reconstructions(model, sequences, tokenizer, texts=wanted.reconstructions, **options)
        beside |= {**reconstructed, "reconstruction_pairs": pairs[:PAIRS]}
    figures = evaluate(model, sequences, iw_samples=wanted.iw_samples, **options) | beside
    for name, value in figures.items():
        if name.endswith("nll_per_token") and not math.isfinite(value):
            raise InputError(f"{name} is {value}: the model or its inference diverged, so no figure of it counts.")
    return figures
