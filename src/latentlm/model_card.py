"""The model card: what a model is, what it was trained on, and what was measured of it, each figure with what it is."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from latentlm.data.recipe import WORDS, DataRecipe
from latentlm.errors import InputError
from latentlm.families import FAMILIES, HuggingFaceLM, LangVAE
from latentlm.latent_lm import LatentLM, number_of_parameters, number_of_trained_parameters

_COUNTS = ("sequences", "tokens", "parameters", "iw_samples")
_MEASURED = (
    "elbo_nll_per_token",
    "iw_nll_per_token",
    "prior_nll_per_token",
    "reconstruction_nll_per_token",
    "kl_per_sequence",
    "elbo_perplexity",
    "iw_perplexity",
    "elbo_bits_per_byte",
    "iw_bits_per_byte",
)
# measured on texts that the model wrote
_OF_SAMPLES = {
    "sample_entropy_nats": "entropy of a text from the prior, nats",
    "distinct_1": "texts from the prior: distinct-1",
    "distinct_2": "texts from the prior: distinct-2",
    "distinct_3": "texts from the prior: distinct-3",
    "diversity_self_bleu": "latents of one prompt, greedy: self-BLEU",
    "diversity_of_one_latent_self_bleu": "one latent of a prompt, sampled: self-BLEU",
    "style_transfer_recovered": "style transfer: nearer to the text of z",
    "style_transfer_recovered_by_prior_z": "style transfer, z from the prior: nearer to that text",
    "style_transfer_overlap": "style transfer: token overlap, F1",
    "style_transfer_overlap_by_prior_z": "style transfer, z from the prior: token overlap, F1",
}


def model_card(
    model: LatentLM,
    name: str,
    *,
    data: DataRecipe | None = None,
    training: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    figures: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown, with the hub's front matter. The licence is its owner's to add.

    Args:
        name: OWNER/NAME, by which it is loaded.
        data, training: of the recipe with which it was trained, as they may be published; None where none was saved.
        history: the log of its training.
        figures: of `latentlm evaluate`, checked by `check_figures`.
    """
    family = next(name for name, kind in FAMILIES.items() if type(model) is kind)
    header: dict[str, Any] = {"library_name": "latentlm", "tags": ["latentlm", family, "language-model"]}
    if hub_names := [part for _, part, _, _, local in _parts(model) if not local]:
        header["base_model"] = list(dict.fromkeys(hub_names))
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}",
        *_what(model, family),
        *_frozen_parts(model),
        "## Load and generate",
        *_use(model, name),
        "## Data",
        *_data(model, data),
        "## Training",
        *_training(training, history),
        "## Figures",
        *_figures(figures),
    ]
    return "\n\n".join(sections) + "\n"


def check_figures(figures: Any, model: LatentLM, history: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The figures, if they are those of `latentlm evaluate` of this model.

    Raises:
        InputError: something is missing or no number, or they are another model's.
    """
    wanted = "give what latentlm evaluate MODEL --json FILE wrote"
    if not isinstance(figures, Mapping):
        raise InputError(f"the figures are no mapping of names to numbers: {wanted}.")
    if missing := [key for key in (*_COUNTS, *_MEASURED, "exact", "protocol") if key not in figures]:
        raise InputError(f"the figures lack {missing[0]}: {wanted}.")
    for key in (*_COUNTS, *_MEASURED):
        value, kinds = figures[key], int if key in _COUNTS else (int, float)
        overflown = key.endswith("perplexity") and value == math.inf
        if isinstance(value, bool) or not isinstance(value, kinds) or not (math.isfinite(value) or overflown):
            raise InputError(f"of the figures {key} is no number: {wanted}.")
    parameters = number_of_parameters(model)
    if figures["parameters"] != parameters or figures["exact"] is not model.exact:
        raise InputError(
            f"the figures are of another model, of {figures['parameters']:,} parameters, and this one has "
            f"{parameters:,}: evaluate this one."
        )
    tokens, seen = figures.get("training_tokens"), _last(history, "tokens")
    if tokens is not None and seen is not None and tokens != int(seen):
        raise InputError(
            f"the figures are of a model that was trained on {tokens:,} tokens, and this one on {int(seen):,}: "
            "evaluate this one."
        )
    return dict(figures)


# ---- what it is ------------------------------------------------------------------------------------------------------


def _what(model: LatentLM, family: str) -> Iterator[str]:
    title, *rest = (inspect.getdoc(inspect.getmodule(type(model))) or type(model).__name__).split("\n\n")
    yield " ".join(title.split())
    if rest and rest[0].startswith("p(z)"):
        yield f"```\n{rest[0]}\n```"
    of = f"`{model.config.architecture}` of transformers" if isinstance(model, HuggingFaceLM) else type(model).__name__
    lines = [f"- family: `{family}` ({of})", f"- latent: {_latent(model)}"]
    if hasattr(model.config, "inference"):
        lines += [f"- q(z | x): {model.config.inference}"]
    lines += [
        f"- parameters: {number_of_parameters(model):,} in all, "
        f"{number_of_trained_parameters(model):,} of them trained",
        f"- vocabulary: {model.config.vocab_size:,} tokens; "
        f"longest text: {model.config.max_position_embeddings:,} tokens after BOS",
    ]
    yield "\n".join(lines)


def _latent(model: LatentLM) -> str:
    shape = model.prior(1, 1).event_shape
    if not shape.numel():
        return "none; its likelihood is exact"
    if model.latent_per_token:
        return f"{shape.numel():,} numbers for each token"
    return f"{' × '.join(map(str, shape))} numbers for a text"


def _parts(model: LatentLM) -> list[tuple[str, str, str | None, str | None, bool]]:
    """Part, its name, revision and fingerprint, and whether it is a folder of the one who saved the model."""
    if not isinstance(model, LangVAE):
        return []
    found = []
    for part in ("decoder", "encoder") if model.text_encoder is not None else ("decoder",):
        name, revision, mark = (
            getattr(model.config, f"{part}_{field}") for field in ("name", "revision", "fingerprint")
        )
        local = Path(name).is_dir()
        found.append((part, Path(name).name if local else name, revision, mark, local))
    return found


def _frozen_parts(model: LatentLM) -> Iterator[str]:
    parts = _parts(model)
    if not parts:
        return
    yield "## Frozen parts"
    yield (
        "The weights here are those between two pretrained models, which are loaded by name. Their fingerprints (of "
        "their weights' files) are checked: another model of the name is refused."
    )
    rows = ["| part | name | revision | fingerprint |", "| --- | --- | --- | --- |"]
    for part, name, revision, mark, local in parts:
        where = f"`{name}`, a local folder" if local else f"[{name}](https://huggingface.co/{name})"
        fixed = "–" if local else f"`{revision}`" if revision else "not fixed"
        rows.append(f"| {part} | {where} | {fixed} | `{mark}` |")
    yield "\n".join(rows)
    for part, name, _, _, local in parts:
        if local:
            yield (
                f"**Warning:** the {part} is not on the hub. It was a local folder, `{name}`, and without that folder "
                f"this model cannot be loaded: ask its owner for it, and put it as `{name}` into the folder that you "
                "work in."
            )


def _labels(model: LatentLM) -> list[str]:
    """Of the texts of a model that is conditional."""
    return model.annotation_labels or []


def _use(model: LatentLM, name: str) -> Iterator[str]:
    labels = f"annotations=[{_labels(model)[:1]}], " if _labels(model) else ""
    yield f"""\
```python
import latentlm
from latentlm.text import write

model, tokenizer = latentlm.load("{name}")
print(*write(model, tokenizer, {labels}num_return_sequences=3, max_new_tokens=32, do_sample=True, seed=0), sep="\\n")
```"""
    option = f" --labels '{_labels(model)[0]}'" if labels else ""
    yield f"Or `latentlm generate {name}{option} -n 3`; with `--prompt TEXT` it goes on from a text."
    if isinstance(model, HuggingFaceLM):
        yield "It is a plain model of transformers, too: `AutoModelForCausalLM.from_pretrained` loads it."


# ---- what it was trained on, and how ---------------------------------------------------------------------------------


def _data(model: LatentLM, data: DataRecipe | None) -> Iterator[str]:
    if data is None:
        yield "No recipe was saved with the model, so nothing is known here of its data."
        return
    split = (
        f"{data.validation_fraction:.3g} of the documents held out, by seed {data.split_seed}"
        if data.validation is None
        else f"held out: `{data.validation}`"
    )
    unit = (
        f"blocks of {data.length:,} tokens, documents packed"
        if data.unit == "blocks"
        else f"one document each, of at most {data.length:,} tokens"
    )
    made = f"of {model.config.vocab_size:,}"
    tokenizer = {
        None: f"{made} pieces of words, trained on the training text",
        WORDS: f"{made} words, the most frequent of the training text",
    }.get(data.tokenizer, f"that of `{data.tokenizer}`")
    if model.tokenizer_of is not None:
        tokenizer = "the decoder's"
    limit = "" if data.limit is None else f", its first {data.limit:,} documents"
    column = "" if data.column is None else f", column `{data.column}`"
    yield "\n".join(
        [
            f"- source: `{data.source}`{column}{limit}",
            f"- split: {split}",
            f"- sequences: {unit}",
            f"- tokenizer: {tokenizer}",
            *([f"- labels of each {data.annotations_per}: {', '.join(_labels(model))}"] if _labels(model) else []),
        ]
    )


def _training(training: Mapping[str, Any] | None, history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    steps, tokens = _last(history, "step"), _last(history, "tokens")
    lines = [f"- steps: {'not known, no history was saved' if steps is None else f'{steps:,}'}"]
    if tokens is not None:
        lines.append(f"- tokens seen: {int(tokens):,} scored tokens")
    if training is not None:
        batch, accumulated = training["per_device_train_batch_size"], training.get("gradient_accumulation_steps", 1)
        lines += [
            f"- batch of each step and process: {batch * accumulated:,} sequences",
            f"- learning rate: {training['learning_rate']}",
            f"- seed: {training['seed']}",
            "- all settings: `recipe.yaml`; every logged figure: `history.json`",
        ]
    yield "\n".join(lines)


def _last(history: Sequence[Mapping[str, Any]], key: str) -> Any:
    values = [entry[key] for entry in history if isinstance(entry.get(key), int | float)]
    return max(values, default=None)


# ---- what was measured -----------------------------------------------------------------------------------------------


def _figures(figures: Mapping[str, Any] | None) -> Iterator[str]:
    if figures is None:
        yield (
            "None were measured: nothing here says how well this model models text. "
            "`latentlm evaluate MODEL --data FILE` measures it."
        )
        return
    exact, samples = figures["exact"], figures["iw_samples"]
    if figures.get("conditional"):
        yield "All figures are of p(x | c), of texts given their labels, and none compares with those of p(x)."
    data = f"`{figures['data']}`" if figures.get("data") else "the held-out data named above"
    if "data" not in figures:
        data = "not recorded"
    protocol = [
        f"- protocol: {figures['protocol']}"
        + ("; what the family's published code would report is marked so" if figures["protocol"] == "paper" else ""),
        f"- data: {data}",
        f"- {figures['sequences']:,} sequences, {figures['tokens']:,} scored tokens",
        f"- seed of all noise: {figures.get('seed', 'not recorded')}",
    ]
    if not exact:
        protocol.append(f"- samples of z for each text, K: {samples:,}")
    if settings := figures.get("settings"):
        protocol.append(f"- inferred otherwise than in training: {', '.join(map(str, settings))}")
    yield "\n".join(protocol)
    yield (
        "NLL is Σ nats over all sequences ÷ Σ tokens (or bytes), perplexity the exponential of that."
        + ("" if exact else " z is inferred from the whole text, and scored with noise that inference has not seen.")
    )
    rows = ["| figure | value | what it is |", "| --- | ---: | --- |"]
    yield "\n".join(rows + [f"| {label} | {value} | {kind} |" for label, value, kind in _rows(figures, exact, samples)])


def _rows(figures: Mapping[str, Any], exact: bool, samples: int) -> Iterator[tuple[str, str, str]]:
    likelihoods = {"iw": f"a bound, importance-weighted, K = {samples}", "elbo": "a bound, the ELBO"}
    if exact:
        likelihoods = {"iw": "exact"}
    sign = "=" if exact else "≤"
    for key, kind in likelihoods.items():
        yield "NLL, nats per token", f"{sign} {figures[f'{key}_nll_per_token']:.4f}", kind
        yield "perplexity", f"{sign} {figures[f'{key}_perplexity']:.3f}", kind
        yield "bits per byte", f"{sign} {figures[f'{key}_bits_per_byte']:.4f}", kind
    if not exact:
        under_prior = f"a bound that makes no use of inference, K = {samples}"
        yield "NLL under z of the prior, nats per token", f"≤ {figures['prior_nll_per_token']:.4f}", under_prior
        seen = "no likelihood and no bound: z has seen the text, and what it costs is left out"
        yield "reconstruction, nats per token", f"{figures['reconstruction_nll_per_token']:.4f}", seen
        yield "KL(q ‖ p), nats per sequence", f"{figures['kl_per_sequence']:.3f}", "no likelihood: what z costs"
        if figures.get("mutual_information") is not None:
            compared = figures.get("mutual_information_sequences")
            of = "no likelihood" if compared is None else f"no likelihood: of {compared:,} texts, at most their ln"
            yield "mutual information of text and z, nats", f"{figures['mutual_information']:.3f}", of
        if figures.get("active_units") is not None:
            units = f"{figures['active_units']} of {figures.get('latent_units')}"
            yield "active units", units, "no likelihood: numbers of z whose mean differs between texts"
    if figures.get("continuation_nll_per_token") is not None:
        after = f"after {figures.get('prompt_tokens')} tokens"
        again = figures.get("reinfer_every")
        how = f"z inferred from what stands before it alone{'' if again is None else f', every {again} tokens'}"
        kind = "exact" if exact else f"a bound, {how}, K = {samples}"
        yield (
            f"NLL of what follows, nats per token, {after}",
            f"{sign} {figures['continuation_nll_per_token']:.4f}",
            kind,
        )
    if figures.get("reconstruction_bleu") is not None:
        of = f"no likelihood: of {figures['reconstruction_texts']:,} texts, written from the mean of a q that saw them"
        yield "reconstruction: BLEU", f"{figures['reconstruction_bleu']:.1f}", of
        if (other := figures.get("reconstruction_bleu_of_other_z")) is not None:
            yield "  by another text's z", f"{other:.1f}", "its control"
        yield "reconstruction: exact match", f"{figures['reconstruction_exact_match']:.3f}", of
    published = "no bound: as the family's published code scores; not to be compared with other figures"
    if figures.get("published_nll_per_token") is not None:
        yield "as published: NLL, nats per token", f"{figures['published_nll_per_token']:.4f}", published
        yield "as published: perplexity", f"{figures['published_perplexity']:.3f}", published
    for key, label in _OF_SAMPLES.items():
        if figures.get(key) is not None:
            yield label, f"{figures[key]:.3f}", "no likelihood: of texts that the model wrote"
