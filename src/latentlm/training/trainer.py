"""Training on `transformers.Trainer`: loop, mixed precision, processes and trackers are the Trainer's.

What is ours: a loss and noise that do not depend on how a batch is cut, checkpoints that are whole or not there, and an
end at the first number that is not finite.
"""

import itertools
import math
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from latentlm.data import Item, StreamedBlocks
from latentlm.errors import DivergedError, InputError, one_sentence
from latentlm.evaluation.likelihood import evaluate
from latentlm.files import saving
from latentlm.inference import gathered
from latentlm.latent_lm import LatentLM, LatentLMOutput
from latentlm.processes import gather_rows, is_main
from latentlm.training import checkpoints
from latentlm.training.encoder import EncoderRecipe, EncoderTraining
from latentlm.training.recipe import EVALUATION_FIGURES, EvaluationRecipe

# what of an optimiser's groups is a setting and no state
_OF_THE_RECIPE = ("initial_lr", "betas", "eps", "weight_decay", "momentum")


class LatentTrainer(Trainer):
    """Trainer whose loss is Σ (nll + β · kl) / Σ scored tokens of the global batch and whose noise is per sequence.

    The noise of a step is a function of (seed, step, sequence), so accumulation, the order within a batch and the
    number of processes leave the loss as it is. Each log has, over the steps since the last one and all processes:
    `elbo_nll_per_token`, `nll_per_token`, `kl_per_token`, `kl_per_sequence`, `active_units` (of the posterior means
    seen), `beta`, `tokens` (scored, since the start) and `tokens_per_second`. Weights trained on Langevin samples have
    no KL and no ELBO here, and `nll_per_token` is that of the sampled z. All are figures of what trains: with latent or
    word dropout, of a decoder that is denied its latent or words; and of the model's steps, not of the encoder's own.
    There is a log at every checkpoint, so that a resumed run's figures are those of one that was not interrupted.

    Raises:
        DivergedError: at the first loss, gradient or weight that is not finite, before the weights take it in; names
            the step, the sequences, and the last good checkpoint.
        InputError: a checkpoint cannot be written or read.
    """

    model: LatentLM

    def __init__(
        self,
        *args: Any,
        evaluation: EvaluationRecipe | None = None,
        encoder: EncoderRecipe | None = None,
        beside: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.evaluation = evaluation or EvaluationRecipe()
        self.beside = beside or {}  # texts that each checkpoint holds, by their file's name
        self.statistics = _Statistics()
        encoder = encoder or EncoderRecipe()
        self.add_callback(_EachStep(self, encoder.pretraining_steps))
        if encoder.pretraining_steps or encoder.aggressive_steps:
            self.add_callback(EncoderTraining(encoder, self))
        self._staging: Path | None = None
        self.indices: list[torch.Tensor] = []  # of the sequences of this step
        self.kl_of_step = torch.zeros(2, dtype=torch.double)  # their KL, and how many they are

    # ---- batches ---------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        lengths = getattr(self.train_dataset, "lengths", None)
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return super()._get_train_sampler(train_dataset)
        # by the global batch, so that the order does not depend on the number of processes
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(batch_size, lengths=[length + 1 for length in lengths])

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, StreamedBlocks):
            return super().get_train_dataloader()
        # it shards itself over processes; accelerate would shard what is left once more
        return DataLoader(
            _Endless(self.train_dataset),
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )

    # ---- a step ----------------------------------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.indices.append(inputs["index"])
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except DivergedError as error:
            raise self.diverged(error.what) from error
        if not bool(torch.isfinite(loss)):
            raise self.diverged(f"the loss is {float(loss)}")
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        # with float16 a gradient too large is nothing unusual: that step is left out and the scale lowered
        if getattr(self.accelerator, "scaler", None) is None and not math.isfinite(float(norm)):
            raise self.diverged(f"the norm of the gradient is {float(norm)}")
        self.indices.clear()
        return norm

    def diverged(self, what: str) -> DivergedError:
        """The error to end with: where training is, what it met, and what to do."""
        step = self.state.global_step + bool(self.indices)
        indices = [index for batch in self.indices for index in batch.tolist()]
        if indices:
            shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
            what += f" (sequences {shown} of the training data)"
        output = Path(self.args.output_dir)
        last = get_last_checkpoint(output) if output.is_dir() else None
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
        advice = "lower training.learning_rate and " + ("go on with --resume" if last else "start again")
        if hasattr(self.model.config, "inference_lr"):
            advice += ", or start again with a lower model.inference_lr"
        return DivergedError(f"training diverged at step {step}: {what}", f"{kept}; {advice}")

    def check_weights(self) -> None:
        """Raises DivergedError unless every weight is finite."""
        with gathered(self.model):
            for name, parameter in self.model.named_parameters():
                if not bool(torch.isfinite(parameter).all()):
                    raise self.diverged(f"the weights {name} are no longer finite numbers")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        keys = ("input_ids", "attention_mask", "condition")
        given: dict[str, Any] = {key: inputs[key] for key in keys if key in inputs}
        given["seed"] = (self.args.seed << 32) + self.state.global_step
        loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        tokens = self.model.scored_tokens(given["input_ids"], given["attention_mask"]).sum()
        self.statistics.add(outputs, tokens, self.model.beta, self.model.latent_per_token)
        if self.model.config.kl_target is not None:
            self.kl_of_step += torch.stack([outputs["kl"].detach().sum(), tokens.new_tensor(len(outputs["kl"]))]).cpu()
        return (loss, outputs) if return_outputs else loss

    # ---- figures ---------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            with gathered(self.model):  # the prior may have weights
                logs.update(self.statistics.summary(self.state, self.model, start_time))
        if "train_loss" in logs:  # the Trainer's has only the steps since a resume
            logs["train_loss"] = self._mean_loss()
        super().log(logs, start_time)

    def _mean_loss(self) -> float:
        """The loss of a step, on average over those that were logged; NaN where none was."""
        logged = {entry["step"]: entry["loss"] for entry in self.state.log_history if "loss" in entry}
        steps = [0, *logged]
        total = sum(loss * (step - before) for (step, loss), before in zip(logged.items(), steps, strict=False))
        return total / steps[-1] if logged else math.nan

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The honest figures of the first `evaluation.sequences` validation sequences, as `eval_…`."""
        sequences = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.evaluation.sequences is not None and self.evaluation.sequences < len(sequences):
            sequences = Subset(sequences, range(self.evaluation.sequences))
        figures = evaluate(
            self.model,
            sequences,
            batch_size=self.evaluation.batch_size,
            iw_samples=self.evaluation.iw_samples,
            seed=self.args.seed,
        )
        metrics = {f"{metric_key_prefix}_{name}": figures[name] for name in EVALUATION_FIGURES}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # a pickle of the arguments that nothing here reads; the recipe says the same in words
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_weights()
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with saving(output / name):
            self._staging = output / checkpoints.STAGING_FOLDER
            try:
                if is_main():
                    checkpoints.begin(output)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(output / name)
                self.accelerator.wait_for_everyone()
                if is_main():
                    for file, text in self.beside.items():
                        (self._staging / name / file).write_text(text, encoding="utf-8")
                    self.state.save_to_json(str(self._staging / name / "trainer_state.json"))
                    checkpoints.publish(self._staging / name, output)
                    best = self.state.best_model_checkpoint
                    rotate_checkpoints(str(output), self.args.save_total_limit, best, use_mtime=False)
            finally:
                if is_main():
                    shutil.rmtree(self._staging, ignore_errors=True)
                self._staging = None
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # a checkpoint's moments, with the rate, decay and schedule of the recipe that goes on with them
        ours = [{key: group[key] for key in _OF_THE_RECIPE if key in group} for group in self.optimizer.param_groups]
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is None or not isinstance(schedule, LambdaLR):
            return
        schedule.base_lrs = [settings["initial_lr"] for settings in ours]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, settings, rate in zip(self.optimizer.param_groups, ours, schedule._last_lr, strict=True):
            group.update(settings, lr=rate)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing: what its checksums let pass is whole, and tied weights are stored once."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError, EOFError) as error:
        reason = one_sentence(error)[:200]
        raise InputError(
            f"{checkpoint} cannot be resumed from ({reason}): remove it to resume from an earlier one."
        ) from error


class _Endless(IterableDataset):
    """Epoch after epoch of a stream as one, since the Trainer counts a stream's epochs by steps it cannot know.

    A resumed run skips the batches that it had, in whatever epoch they were.
    """

    def __init__(self, blocks: StreamedBlocks):
        self.blocks = blocks

    def __iter__(self) -> Iterator[Item]:
        for epoch in itertools.count():
            yield from self.blocks.blocks_of(epoch)


class _EachStep(TrainerCallback):
    """Keeps the model's `training_progress`, which β and the inference rate follow, and logs wherever a run may resume.

    A checkpoint holds no sums over steps that are not logged yet.
    """

    def __init__(self, trainer: LatentTrainer, pretraining_steps: int):
        self.trainer, self.pretraining_steps = trainer, pretraining_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        if model.config.kl_target is not None:
            kl, sequences = gather_rows(self.trainer.kl_of_step[None].to(model.device)).sum(0).tolist()
            self.trainer.kl_of_step.zero_()
            model.observe_kl(kl / sequences)
        before = self.pretraining_steps
        model.training_progress.fill_((state.global_step - before) / (state.max_steps - before))
        self._log(control)
        if state.global_step >= state.max_steps:  # so that a history counts all tokens
            control.should_log = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log(control)

    def _log(self, control: TrainerControl) -> None:
        # an evaluation may make a checkpoint of the best
        control.should_log = control.should_log or control.should_save or control.should_evaluate


class _Statistics:
    """Sums over the steps between two logs."""

    def __init__(self) -> None:
        self.seen_before: float | None = None
        self.seen_in_session = 0
        self.reset()

    def reset(self) -> None:
        self.nll = self.kl = self.beta = 0.0
        self.tokens = self.sequences = 0
        self.mean_sums: torch.Tensor | None = None
        self.comparable = self.has_posterior = True

    def add(self, outputs: LatentLMOutput, tokens: torch.Tensor, beta: float, per_token: bool = False) -> None:
        self.beta = beta
        self.nll += float(outputs["nll"].detach().sum())
        self.tokens += int(tokens)
        self.sequences += len(outputs["nll"])
        if "kl" not in outputs:  # latents from a sampler have no density, so there is no bound to log
            self.has_posterior = False
            return
        self.kl += float(outputs["kl"].detach().sum())
        mean = outputs["posterior_mean"].detach().double()
        sums = torch.stack([mean.sum(0), mean.square().sum(0)])
        ragged = per_token and int(tokens) < mean.shape[0] * mean.shape[1]
        if ragged or (self.mean_sums is not None and self.mean_sums.shape != sums.shape):
            self.comparable = False  # trajectories of different lengths have no units in common
        elif self.comparable:
            self.mean_sums = sums if self.mean_sums is None else self.mean_sums + sums

    def summary(self, state: TrainerState, model: LatentLM, start_time: float | None) -> dict[str, float]:
        own = torch.tensor([[self.nll, self.kl, self.tokens, self.sequences]], dtype=torch.double, device=model.device)
        nll, kl, tokens, sequences = gather_rows(own).sum(0).tolist()
        mean_sums = self._all_mean_sums(model.device)
        self.seen_in_session += int(tokens)
        if self.seen_before is None:  # a resumed run's log says how far it had come
            self.seen_before = max((entry["tokens"] for entry in state.log_history if "tokens" in entry), default=0)
        figures = {
            "nll_per_token": nll / max(tokens, 1),
            "beta": self.beta,
            "tokens": self.seen_before + self.seen_in_session,
        }
        if self.has_posterior:
            figures |= {
                "elbo_nll_per_token": (nll + kl) / max(tokens, 1),
                "kl_per_token": kl / max(tokens, 1),
                "kl_per_sequence": kl / max(sequences, 1),
            }
        if start_time is not None:
            figures["tokens_per_second"] = self.seen_in_session / (time.time() - start_time)
        if mean_sums is not None and sequences > 1:
            mean, square = mean_sums / sequences
            figures["active_units"] = float((square - mean.square() > 0.01 * model.prior(1, 1).variance[0]).sum())
        self.reset()
        return figures

    def _all_mean_sums(self, device: torch.device) -> torch.Tensor | None:
        numbers = self.mean_sums.numel() if self.comparable and self.mean_sums is not None else -1
        everywhere = gather_rows(torch.tensor([numbers], device=device)).unique().tolist()
        if len(everywhere) > 1 or everywhere[0] < 0:
            return None
        assert self.mean_sums is not None
        return gather_rows(self.mean_sums[None]).sum(0)
