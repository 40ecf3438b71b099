"""A monitor of posterior collapse: says in one line that q = p, and what to turn, while there is time to turn it.

What each remedy does is measured in docs/collapse.md, on one collapsing set-up.
"""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from latentlm.latent_lm import LatentLM

# below this z names less than one text in ten of an even choice between two; and where it is taken to speak again
_NOTHING_NATS, _SOMETHING_NATS = 0.1, 0.2
# a share of the NLL per token: as far as random z are from the text's own
_NO_GAIN = 1e-3


def collapse(figures: Mapping[str, float], least_nats: float = _NOTHING_NATS) -> str | None:
    """What is wrong with the latent by the figures of a log or an evaluation; None where nothing is."""
    kl, units = figures.get("kl_per_sequence"), figures.get("active_units")
    if kl is not None and kl < least_nats:
        return f"q = p: the KL is {kl:.3f} nats a sequence, so z says nothing of the text"
    if kl is not None and units == 0:
        return f"q is the same for every text: the KL is {kl:.2f} nats a sequence, but no latent number is active"
    prior, own = figures.get("eval_prior_nll_per_token"), figures.get("eval_reconstruction_nll_per_token")
    kl = figures.get("eval_kl_per_sequence", 0.0)
    if prior is not None and own is not None and kl >= _NOTHING_NATS and prior - own < _NO_GAIN * own:
        return f"the decoder does not use z: a random one serves as well as the text's own, of {kl:.2f} nats of KL"
    return None


def remedies(model: LatentLM, pretrained: bool) -> str:
    """What to turn, of what is not turned yet, in the order of docs/collapse.md: what kept most of z alive first."""
    config, ways = model.config, []
    held = bool(config.free_bits) or config.kl_threshold is not None or config.kl_target is not None
    if not held:
        ways += ["model.free_bits=4 with model.free_bits_per=latent"]
    if config.kl_target is None and not config.beta_cycles and config.beta_warmup < 0.5:
        if not held and not config.beta_warmup:
            ways += ["model.kl_target=4"]
        ways += [f"model.beta_warmup=0.7 (now {config.beta_warmup})"]
    if held and getattr(config, "has_encoder", False) and not pretrained:
        ways += ["encoder.pretraining_steps (now 0)"]
    if getattr(config, "sliding_window", 1) is None and not model.latent_per_token:
        ways += ["model.sliding_window, so that the decoder needs z"]
    if config.kl_target is not None:
        ways += [f"model.kl_target (now {config.kl_target}) up"]
    elif not ways:
        ways += [f"model.beta (now {config.beta}) down"]
    return "turn " + " or ".join(ways[:3])


class CollapseMonitor(TrainerCallback):
    """Prints a line when the latent stops saying anything, and another when it speaks again, with some margin.

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
        fault = collapse(logs, _NOTHING_NATS if self.told is None else _SOMETHING_NATS)
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
