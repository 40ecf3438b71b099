"""From a recipe to a trained model in a folder."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from latentlm.data import Collator, load_tokenizer
from latentlm.data.corpora import source_fingerprint
from latentlm.data.recipe import RECIPE_FILE, Corpus, load_corpus, seldom
from latentlm.data.tokenizers import tokenizer_fingerprint
from latentlm.errors import InputError
from latentlm.families import LangVAE
from latentlm.files import alone_in, damage, write_whole
from latentlm.latent_lm import WEIGHTS, LatentLM, number_of_parameters, number_of_trained_parameters
from latentlm.loading import HISTORY_FILE, load, save, saved_history
from latentlm.pretrained import no_progress_bars
from latentlm.processes import is_main, main_decides
from latentlm.training import checkpoints
from latentlm.training.encoder import take_encoder
from latentlm.training.progress import ProgressLine
from latentlm.training.recipe import Recipe, load_recipe
from latentlm.training.trainer import LatentTrainer

ORDER_FILE = "order.json"
_SECONDS_OF_SILENCE = 5


def training_figures(folder: str | Path) -> dict[str, Any]:
    """What a run cost, by the history in its folder: seconds and scored tokens. Empty where no history can be read."""
    history = saved_history(folder)
    try:
        return (
            {
                "training_seconds": next(
                    (entry["train_runtime"] for entry in history if "train_runtime" in entry), None
                ),
                "training_tokens": int(max((entry["tokens"] for entry in history if "tokens" in entry), default=0)),
            }
            if history
            else {}
        )
    except (ValueError, TypeError):
        return {}


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None = None) -> LatentLM:
    """The recipe's model with fresh weights from the recipe's seed, for texts with these labels, if any."""
    set_seed(recipe.training.get("seed", 0))
    config = recipe.model_config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({} if labels is None else {"annotation_labels": list(labels)}),
    )
    return recipe.family(config)


def _check_same_run(recipe: Recipe, output: Path) -> None:
    """A checkpoint goes on only with its own model and data."""
    before = load_recipe(output / RECIPE_FILE).document
    for section in ("model", "data", "encoder"):
        old, new = (document.get(section) or {} for document in (before, recipe.document))
        keys = sorted({*old, *new} - {"cache"})  # where tokens lie, not which
        changed = [key for key in keys if old.get(key) != new.get(key)]
        if changed:
            names = ", ".join(f"{section}.{key}" for key in changed)
            raise InputError(f"{output} was begun with another recipe ({names}): resume with the one it began with.")


def _check_sharding(arguments: TrainingArguments, recipe: Recipe) -> None:
    """What accelerate does wrongly without a word."""
    if not (arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"):
        return
    if arguments.device.type == "cpu":
        raise InputError("FSDP shards weights over GPUs and there is none: accelerate would train with DDP instead.")
    if recipe.encoder.asks_for_something or recipe.model.get("encoder_batch_norm") is not None:
        raise InputError("what a recipe says under encoder, and encoder_batch_norm, do not go with FSDP: use DDP.")
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true":
        raise InputError("accelerate cannot load this model sparingly: set fsdp_cpu_ram_efficient_loading to false.")


def _order(recipe: Recipe, arguments: TrainingArguments) -> dict[str, Any]:
    """What decides which sequences a step has: a run that goes on must have the same."""
    sequences = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return {
        "contents of data.source": source_fingerprint(recipe.data.source),
        "sequences per step": sequences,
        "training.seed": arguments.seed,
        "training.data_seed": arguments.data_seed,
        "training.train_sampling_strategy": str(arguments.train_sampling_strategy),
    }


def _check_same_order(checkpoint: Path, order: Mapping[str, Any]) -> None:
    before = json.loads((checkpoint / ORDER_FILE).read_text(encoding="utf-8"))
    if changed := [name for name in order if before.get(name) != order[name]]:
        raise InputError(f"{checkpoint} was reached with another {', '.join(changed)}: resume with the same.")


@dataclass(frozen=True)
class _Start:
    """Where a run begins: its checkpoint (None: the first step), what to say of it, and whether every step is done.

    Of a run that has all its steps the end may be missing: `checkpoint` is then what it is made of, and None otherwise.
    """

    checkpoint: Path | None = None
    remark: str = ""
    finished: bool = False


def _start(recipe: Recipe, output: Path, resume: bool, replace: bool, order: Mapping[str, Any]) -> _Start:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: name a folder for the run.")
    if not resume:
        holds_run = any(output.glob("checkpoint-*")) or (output / "config.json").exists()
        if holds_run and not replace:
            raise InputError(f"{output} holds a run already: name another --output, or go on with it by --resume.")
        return _Start()
    checkpoint, damaged = checkpoints.newest(output)
    if checkpoint is None:
        if (output / "config.json").exists() and not replace:
            raise InputError(f"{output} holds a model without checkpoints: there is nothing to resume from.")
        return _Start(remark=f"{output} has no checkpoint yet: starting at the first step")
    _check_same_run(recipe, output)
    _check_same_order(checkpoint, order)
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    done, wanted = state["global_step"], recipe.training.get("max_steps", -1)
    if 0 < wanted <= done:
        if done > wanted:
            raise InputError(f"{output} has trained {done} steps already: give it training.max_steps of at least that.")
        if _last_step(output / HISTORY_FILE) == done and damage(output, WEIGHTS) is None:
            return _Start(None, f"{output} has all its {done} steps: raise training.max_steps to go on", finished=True)
        return _Start(checkpoint, f"{checkpoint} has all {done} steps: writing what is left", finished=True)
    return _Start(checkpoint, f"{damaged}: resuming from {checkpoint}" if damaged else f"resuming from {checkpoint}")


def _last_step(history: Path) -> int | None:
    """The last step that a run's history knows: it is the last file that a run writes."""
    try:
        return max(entry["step"] for entry in json.loads(history.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    replace: bool = False,
    corpus: Corpus | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[LatentLM, Corpus | None, list[dict[str, Any]]]:
    """Trains a recipe; `output` then holds model, tokenizer, recipe, history, and the last checkpoints.

    Of several processes the first one writes.

    Args:
        resume: go on from the newest whole checkpoint in `output`, at the rates of this recipe; begin where there is
            none yet, and do nothing where the run is finished. So one command, given again and again, brings a run that
            is killed again and again to its end.
        replace: write over a run that `output` holds, which without it is refused: its checkpoints go at the start (or
            they would be taken for this run's), its model when the new one is whole.
        corpus: the recipe's data, where it is loaded already.
        on_stage: told in words what is being done before the first step.

    Returns:
        The model, its corpus (None where the run was finished already, and the data was not read), and the log (one
        mapping for each logged step).

    Raises:
        InputError: `output` holds another run, or no whole checkpoint among those it has, or another process trains
            there; the data or its order is not the checkpoint's; a disk that refuses.
        DivergedError: see `LatentTrainer`.
    """
    arguments = recipe.training_arguments(output)
    if recipe.data.unit == "sentences" and "train_sampling_strategy" not in recipe.training:
        arguments.train_sampling_strategy = "group_by_length"
    arguments.device  # noqa: B018  joins the processes of a launcher
    _check_sharding(arguments, recipe)
    order = main_decides(lambda: _order(recipe, arguments))
    with ExitStack() as stack:

        def begin() -> _Start:
            start = _start(recipe, output, resume, replace, order)
            stack.enter_context(alone_in(output))
            return start

        start = main_decides(begin)
        if start.remark:
            on_stage(start.remark)
        return _train(recipe, output, arguments, start, order, replace and not resume, corpus, callbacks, on_stage)


def _train(
    recipe: Recipe,
    output: Path,
    arguments: TrainingArguments,
    start: _Start,
    order: Mapping[str, Any],
    keep_recipe: bool,
    corpus: Corpus | None,
    callbacks: Sequence[TrainerCallback],
    on_stage: Callable[[str], None],
) -> tuple[LatentLM, Corpus | None, list[dict[str, Any]]]:
    if start.finished and start.checkpoint is None:
        return load(output)[0], corpus, json.loads((output / HISTORY_FILE).read_text(encoding="utf-8"))
    if corpus is None:
        on_stage("reading and tokenising the data")
        corpus = load_corpus(recipe.data, arguments.seed, on_stage, with_labels=recipe.takes_labels)
        if recipe.data.annotations is not None and corpus.labels is None:
            on_stage("the labels of the texts are left out, since this model takes none")
    if start.checkpoint is not None and tokenizer_fingerprint(corpus.tokenizer) != tokenizer_fingerprint(
        load_tokenizer(start.checkpoint)
    ):
        raise InputError(
            f"the tokenizer of the data is not that of {start.checkpoint}: "
            "resume with the data and the tokenizer that it began with."
        )
    document = yaml.safe_dump(dict(recipe.document), sort_keys=False)
    if start.finished:
        assert start.checkpoint is not None
        state = json.loads((start.checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        best = recipe.training.get("load_best_model_at_end") and state["best_model_checkpoint"]
        model, _ = load(best or start.checkpoint)
        if is_main():
            _write_end(model, corpus, output, document, state["log_history"])
        return model, corpus, state["log_history"]
    if truncated := getattr(corpus.train, "truncated", 0):
        on_stage(f"{truncated:,} of {len(corpus.train):,} texts are cut at {recipe.data.length} tokens")  # type: ignore[arg-type]
    model = build_model(recipe, corpus.tokenizer, corpus.labels)
    trained, every = number_of_trained_parameters(model), number_of_parameters(model)
    if trained < every:
        on_stage(f"{trained:,} parameters train, beside {every - trained:,} frozen ones (Optimus trains 233 million)")
    if recipe.encoder.initial is not None and start.checkpoint is None:
        take_encoder(model, corpus.tokenizer, recipe.encoder.initial)
    if recipe.encoder.embeddings is not None:
        _keep_embeddings(model, recipe.encoder.embeddings, corpus, on_stage)
    if is_main() and start.checkpoint is None:
        checkpoints.remove_all(output)
        # a checkpoint is resumed by its recipe; a model that is replaced keeps its own until it is
        if not keep_recipe:
            write_whole(output / RECIPE_FILE, document)
    if arguments.world_size > 1:
        # accelerate would fill the last batches of an epoch up with sequences that other processes have had
        arguments.dataloader_drop_last = True
        batch = order["sequences per step"]
        if not recipe.data.streaming and len(corpus.train) < batch:  # type: ignore[arg-type]
            raise InputError(f"the data has {len(corpus.train)} sequences, less than one batch of {batch}.")  # type: ignore[arg-type]
    trainer = LatentTrainer(
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        data_collator=Collator(corpus.tokenizer.pad_token_id, model.beside_batch),
        processing_class=corpus.tokenizer,
        evaluation=recipe.evaluation,
        encoder=recipe.encoder,
        beside={RECIPE_FILE: document, ORDER_FILE: json.dumps(order, indent=1)},
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with no_progress_bars():
            trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
    finally:
        for callback in callbacks:
            if isinstance(callback, ProgressLine):
                callback.progress.stop()
    trainer.check_weights()
    # of weights that are sharded every process has to give its part
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if is_main():
        _write_end(model, corpus, output, document, trainer.state.log_history, weights)
    return model, corpus, trainer.state.log_history


def _keep_embeddings(model: LatentLM, folder: str, corpus: Corpus, on_stage: Callable[[str], None]) -> None:
    """Of all training texts, by the main process; the others wait, and all read what it kept."""
    assert isinstance(model, LangVAE)
    say, begun = seldom(on_stage), time.monotonic()

    def on_progress(done: int, number: int) -> None:
        if time.monotonic() - begun > _SECONDS_OF_SILENCE:  # to find what is kept already takes no time
            say(f"what the encoder says is kept in {folder}: {done:,} of {number:,} texts")

    def on_wait() -> None:
        on_stage(f"waiting for another process that keeps what the encoder says in {folder}")

    main_decides(lambda: model.keep_embeddings(folder, corpus.train, on_progress=on_progress, on_wait=on_wait))
    if not is_main():
        model.keep_embeddings(folder)


def _write_end(
    model: LatentLM,
    corpus: Corpus,
    output: Path,
    recipe: str,
    history: list[dict[str, Any]],
    weights: dict[str, Any] | None = None,
) -> None:
    save(model, corpus.tokenizer, output, state_dict=weights)
    write_whole(output / RECIPE_FILE, recipe)
    write_whole(output / HISTORY_FILE, json.dumps(history, indent=1))
