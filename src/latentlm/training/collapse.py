"""A monitor of posterior collapse: says in one line that q = p, and what to turn, while there is time to turn it.

What each remedy does is measured in docs/collapse.md, on one collapsing set-up.
"""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from latentlm.latent_lm import LatentLM

# below this z names less than one text in ten of an even choice between two
_NOTHING_NATS = 0.1
# a share of the NLL per token: as far as random z are from the text's own
_NO_GAIN = 1e-3


def collapse(figures: Mapping[str, float]) -> str | None:
    """What is wrong with the latent by the figures of a log or an evaluation; None where nothing is."""
    kl, units = figures.get("kl_per_sequence"), figures.get("active_units")
    if kl is not None and kl < _NOTHING_NATS:
        return f"q = p: the KL is {kl:.3f} nats a sequence, so z says nothing of the text"
    if kl is not None and units == 0:
        return f"q is the same for every text: the KL is {kl:.2f} nats a sequence, but no latent number is active"
    prior, own = figures.get("eval_prior_nll_per_token"), figures.get("eval_reconstruction_nll_per_token")
    kl = figures.get("eval_kl_per_sequence")
    if (
        prior is not None
        and own is not None
        and kl is not None
        and kl >= _NOTHING_NATS
        and prior - own < _NO_GAIN * own
    ):
        return f"the decoder does not use z: a random one serves as well as the text's own ({kl:.2f} nats of KL for it)"
    return None


def remedies(model: LatentLM, pretrained: bool) -> str:
    """What to turn, of what is not turned yet, best first by docs/collapse.md."""
    config, ways = model.config, []
    if not config.free_bits and config.kl_threshold is None and config.kl_target is None:
        numbers = max(model.prior(1, 1).event_shape.numel(), 1)
        ways.append(f"model.free_bits={max(round(4 / numbers, 3), 0.001)} (now 0)")
    if getattr(config, "has_encoder", False) and not pretrained:
        ways.append("encoder.pretraining_steps (now 0)")
    if config.kl_target is None and not config.beta_cycles and config.beta_warmup < 0.5:
        ways.append(f"model.beta_warmup=0.5 (now {config.beta_warmup})")
    if not getattr(config, "word_dropout", 1):
        ways.append("model.word_dropout=0.3 (now 0)")
    if not ways:
        ways.append(f"model.beta (now {config.beta}) down")
    return "turn " + " or ".join(ways[:3])


class CollapseMonitor(TrainerCallback):
    """Prints a line when the latent stops saying anything, and another when it speaks again.

    Silent in the first tenth of training, in which every q is near p, and while the encoder is pre-trained.
    """

    def __init__(self, console: Console, *, pretrained: bool = False):
        self.console, self.pretrained = console, pretrained
        self.told: str | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        *,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if not logs or model is None or model.exact or float(model.training_progress) < 0.1:
            return
        if not {"kl_per_sequence", "eval_kl_per_sequence"} & logs.keys():
            return
        fault = collapse(logs)
        kind = None if fault is None else fault.partition(":")[0]
        of_evaluation = "eval_kl_per_sequence" in logs
        if fault is not None and kind != self.told:
            self._print(f"step {state.global_step}: {fault}; {remedies(model, self.pretrained)} (docs/collapse.md)")
            self.told = kind
        elif fault is None and self.told is not None and of_evaluation == self.told.startswith("the decoder"):
            self._print(f"step {state.global_step}: z speaks again")
            self.told = None

    def _print(self, line: str) -> None:
        self.console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
