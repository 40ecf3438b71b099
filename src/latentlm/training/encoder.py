"""Training the encoder by itself, before the model or ahead of it, so that z says something when the decoder learns.

pre-training   the whole model with β = 0, then a fresh decoder for the encoder to talk to     Li et al. 2019
               ("A surprisingly effective fix for deep latent variable modeling of text", arXiv 1909.00868)
aggressive     some steps of the encoder alone before each of the model       He et al. 2019 (arXiv 1901.05534)
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from latentlm.data.tokenizers import tokenizer_fingerprint
from latentlm.errors import DivergedError, InputError
from latentlm.latent_lm import LatentLM
from latentlm.loading import load
from latentlm.processes import gather_rows, rank_and_size
from latentlm.variational import VariationalLM

if TYPE_CHECKING:
    from latentlm.training.trainer import LatentTrainer

_LARGEST_COUNT = 2**31 - 1
_MOST_AGGRESSIVE = 1000
# fields by which an encoder's weights mean something else, without another shape
_SHAPING = (
    "num_attention_heads",
    "rope_theta",
    "rms_norm_eps",
    "pooling",
    "encoder_batch_norm",
    "encoder_type",
    "encoder_dilations",
    "posterior",
)


@strict
@dataclass(kw_only=True)
class EncoderRecipe:
    """What is done for the encoder alone.

    Args:
        pretraining_steps: first steps of training, in which β is 0; after them the decoder gets fresh weights, and the
            schedule of β begins.
        aggressive_steps: the encoder's own steps before each step of the whole model, each on as many other texts,
            drawn by the seed. He et al. go on until the encoder's loss falls no more; here their number is fixed.
        aggressive_until: for how much of training (after pre-training), as a fraction. He et al. stop when the mutual
            information of a validation set falls; a fraction lets a resumed run know where it is.
        embeddings: folder in which what a frozen pretrained encoder says of each text is kept, computed once and before
            training; for families that have one.
        initial: folder of a saved model of this family whose encoder is the first one here, in place of a fresh one.
    """

    pretraining_steps: int = 0
    aggressive_steps: int = 0
    aggressive_until: float | int = 0.2
    initial: str | None = None
    embeddings: str | None = None

    def validate_values(self) -> None:
        """Part of the validation of `@strict`."""
        if not 0 <= self.pretraining_steps <= _LARGEST_COUNT:
            raise ValueError(f"pretraining_steps must be at least 0 and at most {_LARGEST_COUNT}")
        if not 0 <= self.aggressive_steps <= _MOST_AGGRESSIVE:
            raise ValueError(f"aggressive_steps must be at least 0 and at most {_MOST_AGGRESSIVE}")
        if not 0 <= self.aggressive_until <= 1:
            raise ValueError(f"aggressive_until is a fraction between 0 and 1, not {self.aggressive_until}")

    @property
    def asks_for_something(self) -> bool:
        return bool(self.pretraining_steps or self.aggressive_steps or self.initial is not None)


def take_encoder(model: LatentLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Gives the model the encoder's weights of a saved one.

    Raises:
        InputError: the saved model has another family or vocabulary, or an encoder of another shape, or none.
    """
    other, other_tokenizer = load(folder)
    assert isinstance(model, VariationalLM)
    if type(other) is not type(model):
        kinds = f"a {type(other).__name__}, and the encoder must be one of the family {type(model).__name__}"
        raise InputError(f"{folder} holds {kinds}.")
    if tokenizer_fingerprint(other_tokenizer) != tokenizer_fingerprint(tokenizer):
        raise InputError(
            f"the encoder of {folder} does not know this vocabulary: give data.tokenizer={folder}, "
            "or train an encoder on this data."
        )
    theirs, ours = (
        {name: value for name, value in one.state_dict().items() if name.startswith(model.encoder_weights)}
        for one in (other, model)
    )
    shapes = [{name: value.shape for name, value in weights.items()} for weights in (theirs, ours)]
    changed = sorted(name for name in {**theirs, **ours} if shapes[0].get(name) != shapes[1].get(name))
    changed += [name for name in _SHAPING if getattr(other.config, name, None) != getattr(model.config, name, None)]
    if changed:
        raise InputError(f"the encoder of {folder} is another (for one, {changed[0]}): give it the same fields.")
    model.load_state_dict(theirs, strict=False)


class EncoderTraining(TrainerCallback):
    """Does what an `EncoderRecipe` says, as a function of the step alone, so that a resumed run does the same."""

    def __init__(self, recipe: EncoderRecipe, trainer: "LatentTrainer"):
        self.recipe, self.trainer = recipe, trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.recipe.pretraining_steps >= state.max_steps:
            raise InputError(
                f"encoder.pretraining_steps is {self.recipe.pretraining_steps} of {state.max_steps} steps in all: "
                "leave some for the model."
            )
        if self.recipe.pretraining_steps and state.global_step == 0:
            self.trainer.model.training_progress.fill_(-1.0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < self.recipe.pretraining_steps:
            return
        if state.global_step == self.recipe.pretraining_steps > 0:
            self._reset_decoder(args.seed)
            # an autoencoder is not the best model
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        until = self.recipe.aggressive_until
        if self.recipe.aggressive_steps and float(self.trainer.model.training_progress) < until:
            for part in range(self.recipe.aggressive_steps):
                self._encoder_step(args, state, part)

    @torch.no_grad()
    def _reset_decoder(self, seed: int) -> None:
        """All weights but the encoder's as a new model has them, and as far as the optimiser knows they never moved."""
        model = self.trainer.model
        assert isinstance(model, VariationalLM)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = dict(type(model)(model.config).named_parameters())
        state = self.trainer.optimizer.state
        for name, parameter in model.named_parameters():
            if not name.startswith(model.encoder_weights):
                parameter.copy_(fresh[name])
                state.pop(parameter, None)

    def _encoder_step(self, args: TrainingArguments, state: TrainerState, part: int) -> None:
        trainer, (rank, size) = self.trainer, rank_and_size()
        model = trainer.model
        assert isinstance(model, VariationalLM)
        seed = (args.seed << 32) + (state.global_step * _MOST_AGGRESSIVE + part)
        generator = torch.Generator().manual_seed(seed % 2**63)
        parts, number = args.gradient_accumulation_steps, args.per_device_train_batch_size
        rows = torch.randint(len(trainer.train_dataset), (parts * number * size,), generator=generator).tolist()[
            rank::size
        ]
        items = [trainer.train_dataset[row] for row in rows]
        batches = [trainer.data_collator(items[first : first + number]) for first in range(0, len(items), number)]
        keys = ("input_ids", "attention_mask", "condition")
        given = [trainer._prepare_inputs({key: batch[key] for key in keys if key in batch}) for batch in batches]
        of_parts = [model.scored_tokens(batch["input_ids"], batch["attention_mask"]).sum() for batch in given]
        own = torch.stack(of_parts).sum()
        tokens = gather_rows(own[None]).sum()
        optimizer = trainer.optimizer.optimizer  # accelerate's wrapper waits for the end of the model's accumulation
        trainer.indices.append(torch.tensor(rows))
        try:
            for batch in given:
                # another noise than that of the model's step
                loss = trainer.model_wrapped(**batch, seed=seed + (1 << 62), num_items_in_batch=tokens).loss
                (size * loss).backward()  # processes' gradients are averaged
        except DivergedError as error:
            raise trainer.diverged(error.what) from error
        for name, parameter in model.named_parameters():
            if not name.startswith(model.encoder_alone):
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        if not bool(torch.isfinite(norm)):
            raise trainer.diverged(f"the norm of the gradient of a step of the encoder is {float(norm)}")
        trainer.indices.clear()
        optimizer.step()
        optimizer.zero_grad()
