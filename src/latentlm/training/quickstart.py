"""The first run: an LTM beside its autoregressive control, with an honest table, a plot, and text they wrote."""

import json
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latentlm.data.recipe import load_corpus
from latentlm.errors import InputError
from latentlm.evaluation.likelihood import evaluate
from latentlm.evaluation.report import curves, table
from latentlm.files import write_whole
from latentlm.loading import load
from latentlm.text import write
from latentlm.training.collapse import CollapseMonitor
from latentlm.training.progress import ProgressLine, counted
from latentlm.training.recipe import Recipe, parse_recipe
from latentlm.training.run import train, training_figures

FAMILIES = ("ltm", "autoregressive")
# own text comes in no known unit, so it is packed; the sizes keep the run's time
_OWN_TEXT = ("data.unit=blocks", "data.length=48", "data.limit=null", "data.validation_fraction=0.02")


@dataclass(frozen=True)
class Quickstart:
    """Evaluation figures of each family, and the files that hold the rest."""

    figures: dict[str, dict[str, Any]]
    samples: str
    plot: Path


def quickstart(output: Path, *, data: str | None = None, seed: int = 0, console: Console | None = None) -> Quickstart:
    """Trains, saves, reloads, evaluates and samples both families; everything is left in `output`.

    Args:
        data: a text source to use in place of `builtin:sentences`; packed into blocks.
        seed: of weights, batches and noise.
    """
    console = console or Console()
    started = time.perf_counter()
    recipes = {name: _recipe(name, data, seed) for name in FAMILIES}
    console.print("reading and tokenising the data …")
    corpus = load_corpus(recipes["ltm"].data, seed)
    prompts = _prompts(corpus.validation, corpus.tokenizer)
    output.mkdir(parents=True, exist_ok=True)
    figures, histories, models = {}, {}, {}
    for name, recipe in recipes.items():
        begun = time.perf_counter()
        trained, _, history = train(
            recipe,
            output / name,
            replace=True,
            corpus=corpus,
            callbacks=[ProgressLine(console, f"training {name}"), CollapseMonitor(console)],
        )
        seconds = time.perf_counter() - begun
        # what is measured is what was saved
        models[name], tokenizer = load(output / name)
        models[name].to(trained.device)
        with counted(console, f"evaluating {name}") as on_progress:
            figures[name] = evaluate(models[name], corpus.validation, on_progress=on_progress)
        tokens = training_figures(output / name)["training_tokens"]
        figures[name] |= {"training_tokens": tokens, "training_tokens_per_second": tokens / seconds}
        histories[name] = history
    samples = _samples(models, tokenizer, prompts)
    write_whole(output / "figures.json", json.dumps(figures, indent=1))
    write_whole(output / "samples.txt", samples)
    curves(histories, output / "curves.png")
    source = data or recipes["ltm"].data.source
    caption = f"{source}, {figures['ltm']['sequences']:,} validation sequences, seed {seed}"
    console.print(caption, markup=False, highlight=False, soft_wrap=True)
    console.print(table(figures))
    console.print(samples, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{time.perf_counter() - started:.0f} s in all; left in {output}: ltm/ and autoregressive/ (latentlm.load, "
        "AutoModel.from_pretrained), figures.json, curves.png, samples.txt",
        highlight=False,
        soft_wrap=True,
    )
    return Quickstart(figures, samples, output / "curves.png")


def _recipe(name: str, data: str | None, seed: int) -> Recipe:
    text = (files("latentlm.training") / "recipes" / f"quickstart-{name}.yaml").read_text(encoding="utf-8")
    overrides = [f"training.seed={seed}"]
    if data is not None:
        overrides += [f"data.source={json.dumps(data)}", *_OWN_TEXT]
    return parse_recipe(text, f"quickstart-{name}.yaml", overrides)


def _prompts(sequences: Any, tokenizer: Any, number: int = 3, tokens: int = 6) -> list[str]:
    """The first tokens of some validation texts, half of a short one."""
    prompts = []
    for index in range(len(sequences)):
        ids = sequences[index]["input_ids"][1:].tolist()
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        if prompt := tokenizer.decode(ids[: min(tokens, (len(ids) + 1) // 2)]).strip():
            prompts.append(prompt)
        if len(prompts) == number:
            return prompts
    raise InputError(f"the validation text has less than {number} lines to prompt with: give more text.")


def _samples(models: dict[str, Any], tokenizer: Any, prompts: list[str]) -> str:
    """Text from the prior and from prompts, and what one latent does."""
    parts = []
    for name, model in models.items():
        new_tokens = model.config.max_position_embeddings - 8
        options = {"max_new_tokens": new_tokens, "do_sample": True, "temperature": 0.7, "seed": 1}
        texts = write(model, tokenizer, num_return_sequences=5, **options)
        parts += [f"{name}, from the {'prior' if not model.exact else 'start token'}:", *_bulleted(texts)]
        texts = write(model, tokenizer, prompts, **options)
        inferred = "" if model.exact else ", z inferred from the prompt"
        parts += [f"{name}, from a prompt{inferred}:", *_bulleted(texts)]
    model = models["ltm"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pair = model.prior(2, 1).sample()
    for name, z in zip("AB", pair, strict=True):
        texts = write(model, tokenizer, latents=z.expand(3, *z.shape), **options)
        parts += [f"ltm, three texts from one latent ({name}):", *_bulleted(texts)]
    return "\n".join(parts)


def _bulleted(texts: list[str]) -> list[str]:
    return ["  - " + " ".join(text.split()) for text in texts]
