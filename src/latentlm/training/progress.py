"""Progress in the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@contextmanager
def counted(console: Console, name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for a function that calls back with (done, in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class ProgressLine(TrainerCallback):
    """The Trainer's progress: steps done, time left and the latest figures.

    Where output is no terminal, one line for each tenth of the run.
    """

    def __init__(self, console: Console, name: str):
        self.console, self.name = console, name
        self.figures, self.figures_step = "", 0
        self.due = False
        self.tenth = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.start()
        self.task = self.progress.add_task(self.name, total=state.max_steps, completed=state.global_step, figures="")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "nll_per_token" in logs:
            if getattr(kwargs.get("model"), "exact", False):
                self.figures = f"NLL {logs['nll_per_token']:.3f} nats/token"
            elif "elbo_nll_per_token" in logs:
                kl = f"KL {logs['kl_per_sequence']:.2f} nats/sequence"
                self.figures = f"ELBO {logs['elbo_nll_per_token']:.3f} nats/token, {kl}"
            else:
                self.figures = f"NLL under sampled z {logs['nll_per_token']:.3f} nats/token"
            if "tokens_per_second" in logs:
                self.figures += f", {logs['tokens_per_second']:,.0f} tokens/s"
            self.figures_step = state.global_step
        if self.due:
            self._show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # a step's own figures come after its end: where they are due, the line waits for them
        self.due = control.should_log
        if not self.due:
            self._show(state)

    def _show(self, state: TrainerState) -> None:
        self.due = False
        self.progress.update(self.task, completed=state.global_step, figures=self.figures)
        tenth = 10 * state.global_step // max(state.max_steps, 1)
        if not self.console.is_terminal and tenth > self.tenth:
            self.tenth = tenth
            parts = [f"{self.name}: step {state.global_step} of {state.max_steps}"]
            if self.figures:
                earlier = self.figures_step != state.global_step
                parts.append(f"at step {self.figures_step} {self.figures}" if earlier else self.figures)
            self.console.print("; ".join(parts), soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.stop()
