"""From a recipe to a trained model in a folder."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from latentlm.data import Collator
from latentlm.data.recipe import RECIPE_FILE, Corpus, load_corpus
from latentlm.errors import InputError
from latentlm.files import write_whole
from latentlm.latent_lm import LatentLM
from latentlm.loading import no_progress_bars, save
from latentlm.training.progress import ProgressLine
from latentlm.training.recipe import Recipe, load_recipe
from latentlm.training.trainer import LatentTrainer

HISTORY_FILE = "history.json"


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LatentLM:
    """The recipe's model with fresh weights from the recipe's seed."""
    set_seed(recipe.training.get("seed", 0))
    config = recipe.model_config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return recipe.family(config)


def _check_same_run(recipe: Recipe, output: Path) -> None:
    """A checkpoint goes on only with its own model and data."""
    before = load_recipe(output / RECIPE_FILE).document
    for section in ("model", "data"):
        if before[section] != recipe.document[section]:
            keys = sorted({*before[section], *recipe.document[section]})
            changed = [key for key in keys if before[section].get(key) != recipe.document[section].get(key)]
            names = ", ".join(f"{section}.{key}" for key in changed)
            raise InputError(f"{output} was begun with another recipe ({names}): resume with the one it began with.")


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    replace: bool = False,
    corpus: Corpus | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[LatentLM, Corpus, list[dict[str, Any]]]:
    """Trains a recipe; `output` then holds model, tokenizer, recipe, history, and the last checkpoints.

    Args:
        resume: go on from the newest checkpoint in `output`.
        replace: write over a model that `output` holds; without it that is refused.
        corpus: the recipe's data, where it is loaded already.
        on_stage: told in words what is being done before the first step.

    Returns:
        The model, its corpus, and the log (one mapping for each logged step).
    """
    seed = recipe.training.get("seed", 0)
    checkpoint = get_last_checkpoint(str(output)) if resume and output.is_dir() else None
    if checkpoint is not None:
        _check_same_run(recipe, output)
        done = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]
        if 0 < recipe.training.get("max_steps", -1) <= done:
            raise InputError(f"{output} has trained {done} steps already: raise training.max_steps to go on.")
    if resume and checkpoint is None:
        raise InputError(f"{output} has no checkpoint to resume from: leave --resume out to start.")
    holds_run = any(output.glob("checkpoint-*")) or (output / "config.json").exists()
    if holds_run and not (resume or replace):
        raise InputError(f"{output} holds a run already: name another --output, or go on with it by --resume.")
    if corpus is None:
        on_stage("reading and tokenising the data")
        corpus = load_corpus(recipe.data, seed, on_stage)
    model = build_model(recipe, corpus.tokenizer)
    output.mkdir(parents=True, exist_ok=True)
    document = yaml.safe_dump(dict(recipe.document), sort_keys=False)
    if not replace:  # a checkpoint is resumed by its recipe; a model that is replaced keeps its own until it is
        write_whole(output / RECIPE_FILE, document)
    arguments = recipe.training_arguments(output)
    if recipe.data.unit == "sentences" and "train_sampling_strategy" not in recipe.training:
        arguments.train_sampling_strategy = "group_by_length"
    trainer = LatentTrainer(
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        data_collator=Collator(corpus.tokenizer.pad_token_id),
        processing_class=corpus.tokenizer,
        evaluation=recipe.evaluation,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with no_progress_bars():
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        for callback in callbacks:
            if isinstance(callback, ProgressLine):
                callback.progress.stop()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise InputError("training diverged: the weights are no longer finite numbers; lower training.learning_rate.")
    if trainer.is_world_process_zero():
        save(model, corpus.tokenizer, output)
        write_whole(output / RECIPE_FILE, document)
        write_whole(output / HISTORY_FILE, json.dumps(trainer.state.log_history, indent=1))
    return model, corpus, trainer.state.log_history
