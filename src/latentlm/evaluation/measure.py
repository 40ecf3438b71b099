"""All that is measured of one model on one data set, as one mapping of figures."""

from collections.abc import Callable
from typing import Any, Literal

from torch.utils.data import Dataset

from latentlm.errors import InputError
from latentlm.evaluation.continuation import continuation
from latentlm.evaluation.likelihood import evaluate
from latentlm.evaluation.published import published_figures
from latentlm.evaluation.samples import prior_samples as write_samples
from latentlm.latent_lm import LatentLM


def measure(
    model: LatentLM,
    sequences: Dataset,
    *,
    protocol: Literal["honest", "paper"] = "honest",
    iw_samples: int = 16,
    prompt_tokens: int | None = None,
    reinfer_every: int | None = None,
    prior_samples: int = 0,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The figures of `evaluate`, and beside them what is asked for.

    Args:
        protocol: "paper" adds what the family's published code would report (`published_figures`).
        prompt_tokens: adds the NLL of what follows so many tokens, z inferred from them alone (`continuation`).
        reinfer_every: of the continuation; see there.
        prior_samples: so many texts are written from the prior and their variety measured (`samples.prior_samples`).
    """
    if protocol not in ("honest", "paper"):
        raise InputError(f"protocol must be honest or paper, not {protocol}.")
    if reinfer_every is not None and prompt_tokens is None:
        raise InputError("reinfer_every belongs to the continuation of a prompt: give prompt_tokens, too.")
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "on_progress": on_progress}
    figures = evaluate(model, sequences, iw_samples=iw_samples, **options)
    if protocol == "paper":
        figures |= {**published_figures(model, sequences, **options), "protocol": "paper"}
    if prompt_tokens is not None:
        figures |= continuation(
            model, sequences, prompt_tokens=prompt_tokens, reinfer_every=reinfer_every, samples=iw_samples, **options
        )
    if prior_samples:
        figures |= write_samples(model, number=prior_samples, batch_size=batch_size, seed=seed)
    return figures
