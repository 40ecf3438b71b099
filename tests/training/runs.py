"""One small recipe of each family, and runs of it that several test files look at."""

import atexit
import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping

from latentlm import LatentLM
from latentlm.data.recipe import Corpus
from latentlm.training.recipe import Recipe, parse_recipe
from latentlm.training.run import train

_SHARED = """\
  hidden_size: 16
  num_hidden_layers: 2
  num_attention_heads: 2
  sliding_window: 4
  initializer_range: 0.2
data:
  source: builtin:sentences
  limit: 200
  unit: sentences
  length: 48
  vocab_size: 300
training:
  max_steps: 3
  per_device_train_batch_size: 8
  learning_rate: 1e-2
  logging_steps: 1
  eval_strategy: "no"
  save_strategy: "no"
  report_to: none
  use_cpu: true
evaluation:
  sequences: 8
  iw_samples: 2
"""
RECIPES = {
    "ltm": "model:\n  family: ltm\n  latents_per_layer: 2\n  latent_size: 4\n  inference_steps: 2\n" + _SHARED,
    "gpt_vae": "model:\n  family: gpt_vae\n  latent_size: 4\n  encoder_layers: 1\n" + _SHARED,
    "gp_vae": (
        "model:\n  family: gp_vae\n  latent_size: 4\n  kernel_groups: 2\n  encoder_dilations: [1, 2]\n"
        "  encoder_layers: 1\n" + _SHARED
    ),
    "autoregressive": "model:\n  family: autoregressive\n" + _SHARED,
}


@dataclass
class Run:
    model: LatentLM
    corpus: Corpus
    history: list[dict[str, Any]]

    def logged(self, key: str) -> list[Any]:
        return [entry[key] for entry in self.history if key in entry]


def small_recipe(family: str = "ltm", *overrides: str) -> Recipe:
    return parse_recipe(RECIPES[family], "small.yaml", overrides)


def run(output: Path, *overrides: str, family: str = "ltm", **options: Any) -> Run:
    """The small recipe with overrides, trained in a folder."""
    return Run(*train(small_recipe(family, *overrides), output, **options))


@contextmanager
def unchecked() -> Iterator[None]:
    """Without checks of shapes and types at run time: as people run it, or where transformers and typer differ."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@functools.cache
def trained(family: str) -> Path:
    """A folder with the small recipe's model after three steps; trained once, not to be changed."""
    folder = tempfile.TemporaryDirectory(prefix="latentlm-tests-")
    atexit.register(folder.cleanup)
    run(Path(folder.name) / family, family=family)
    return Path(folder.name) / family
