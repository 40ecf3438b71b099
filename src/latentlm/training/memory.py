"""Whether a recipe's model can fit in memory, asked before any of it is made."""

import dataclasses
import os

import torch

from latentlm.errors import InputError
from latentlm.latent_lm import LatentLM, LatentLMConfig, number_of_parameters

_FLOAT = 4  # bytes


def check_memory(family: type[LatentLM], config: LatentLMConfig) -> None:
    """Refuses weights that are sure not to fit; what may fit is for the allocator to say.

    Fresh weights are made in main memory; where there is no other device their gradients are there, too.

    Raises:
        InputError: they need more than the machine has.
    """
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    layers = [f.name for f in dataclasses.fields(config) if f.name.endswith("_layers")]
    numbers = {name: getattr(config, name) for name in layers if getattr(config, name)}
    one = dict.fromkeys(numbers, 1)
    # linear in each kind of layer, so one and two of them tell, and a million are never made
    parameters = least = _parameters(family, config, one)
    for name, number in numbers.items():
        if number > 1:
            parameters += (number - 1) * (_parameters(family, config, {**one, name: 2}) - least)
    needed = parameters * _FLOAT * (1 if torch.cuda.is_available() else 2)
    if needed > there:
        raise InputError(
            f"the model needs at least {needed / 2**30:,.0f} GiB of memory and there are {there / 2**30:,.0f}: "
            "make hidden_size or the number of layers smaller"
        )


def _parameters(family: type[LatentLM], config: LatentLMConfig, layers: dict[str, int]) -> int:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    with torch.device("meta"):
        return number_of_parameters(family(type(config)(**{**values, **layers})))
