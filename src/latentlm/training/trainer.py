"""Training on `transformers.Trainer`: loop, checkpoints, mixed precision, processes and trackers are the Trainer's."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from latentlm.data import Item, StreamedBlocks
from latentlm.evaluation.likelihood import evaluate
from latentlm.latent_lm import LatentLM, LatentLMOutput
from latentlm.training.recipe import EvaluationRecipe

# what in-training evaluation reports; the whole set of figures is `latentlm evaluate`
_EVALUATION_FIGURES = (
    "elbo_nll_per_token",
    "iw_nll_per_token",
    "reconstruction_nll_per_token",
    "prior_nll_per_token",
    "kl_per_sequence",
    "active_units",
)


class LatentTrainer(Trainer):
    """Trainer whose loss is Σ (nll + β · kl) / Σ scored tokens of the global batch and whose noise is per sequence.

    The noise of a step is a function of (seed, step, sequence), so accumulation, the order within a batch and the
    number of processes leave the loss as it is. Each log has, over the steps since the last one: `elbo_nll_per_token`,
    `nll_per_token`, `kl_per_token`, `kl_per_sequence`, `active_units` (of the posterior means seen), `beta`, `tokens`
    (scored, since the start) and `tokens_per_second`. Weights trained on Langevin samples have no KL and no ELBO here,
    and `nll_per_token` is that of the sampled z.
    """

    model: LatentLM

    def __init__(self, *args: Any, evaluation: EvaluationRecipe | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.evaluation = evaluation or EvaluationRecipe()
        self.statistics = _Statistics()
        self.add_callback(_Progress(self.model))

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

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        given["seed"] = (self.args.seed << 32) + self.state.global_step
        loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        tokens = self.model.scored_tokens(given["input_ids"], given["attention_mask"]).sum()
        self.statistics.add(outputs, tokens, self.model.beta)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.statistics.summary(self.state, self.model, start_time))
        super().log(logs, start_time)

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
        metrics = {f"{metric_key_prefix}_{name}": figures[name] for name in _EVALUATION_FIGURES}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # a pickle of the arguments that nothing here reads; the recipe says the same in words
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)


class _Endless(IterableDataset):
    """Epoch after epoch of a stream as one, since the Trainer counts a stream's epochs by steps it cannot know.

    A resumed run skips the batches that it had, in whatever epoch they were.
    """

    def __init__(self, blocks: StreamedBlocks):
        self.blocks = blocks

    def __iter__(self) -> Iterator[Item]:
        for epoch in itertools.count():
            yield from self.blocks.blocks_of(epoch)


class _Progress(TrainerCallback):
    """Keeps the model's `training_progress`, which β and the inference rate follow."""

    def __init__(self, model: LatentLM):
        self.model = model

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.model.training_progress.fill_(state.global_step / state.max_steps)


class _Statistics:
    """Sums over the steps between two logs."""

    def __init__(self) -> None:
        self.seen_before: float | None = None
        self.seen_in_session = 0
        self.reset()

    def reset(self) -> None:
        self.nll = self.kl = self.beta = 0.0
        self.tokens = self.sequences = 0
        self.mean_sums: list[torch.Tensor] | None = None
        self.comparable = self.has_posterior = True

    def add(self, outputs: LatentLMOutput, tokens: torch.Tensor, beta: float) -> None:
        self.beta = beta
        self.nll += float(outputs["nll"].detach().sum())
        self.tokens += int(tokens)
        self.sequences += len(outputs["nll"])
        if "kl" not in outputs:  # latents from a sampler have no density, so there is no bound to log
            self.has_posterior = False
            return
        self.kl += float(outputs["kl"].detach().sum())
        mean = outputs["posterior_mean"].detach().double()
        sums = [mean.sum(0), mean.square().sum(0)]
        if self.mean_sums is not None and self.mean_sums[0].shape != sums[0].shape:
            self.comparable = False  # trajectories of different lengths have no units in common
        elif self.comparable:
            earlier = self.mean_sums or [torch.zeros_like(part) for part in sums]
            self.mean_sums = [one + other for one, other in zip(earlier, sums, strict=True)]

    def summary(self, state: TrainerState, model: LatentLM, start_time: float | None) -> dict[str, float]:
        self.seen_in_session += self.tokens
        if self.seen_before is None:  # a resumed run's log says how far it had come
            self.seen_before = max((entry["tokens"] for entry in state.log_history if "tokens" in entry), default=0)
        figures = {
            "nll_per_token": self.nll / max(self.tokens, 1),
            "beta": self.beta,
            "tokens": self.seen_before + self.seen_in_session,
        }
        if self.has_posterior:
            figures |= {
                "elbo_nll_per_token": (self.nll + self.kl) / max(self.tokens, 1),
                "kl_per_token": self.kl / max(self.tokens, 1),
                "kl_per_sequence": self.kl / max(self.sequences, 1),
            }
        if start_time is not None:
            figures["tokens_per_second"] = self.seen_in_session / (time.time() - start_time)
        if self.comparable and self.mean_sums is not None:
            mean, square = (part / self.sequences for part in self.mean_sums)
            figures["active_units"] = float((square - mean.square() > 0.01 * model.prior(1, 1).variance[0]).sum())
        self.reset()
        return figures
