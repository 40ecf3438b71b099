"""Whether what a recipe asks for can be made, asked before data is read: weights in memory, optimiser, schedule."""

import dataclasses
import os

import torch
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from latentlm.config import LatentLMConfig
from latentlm.errors import InputError
from latentlm.latent_lm import LatentLM, number_of_parameters

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


def check_optimisation(arguments: TrainingArguments) -> None:
    """Makes the optimiser's class, the schedule and the loader's options, as the Trainer will.

    Raises:
        ValueError: what they have against their settings, naming one of `training`.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, ImportError) as error:  # most of them need a package of their own
        raise ValueError(f"optim cannot be used: {error}") from error
    for key in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(arguments, key) and not arguments.dataloader_num_workers:
            raise ValueError(f"{key} needs dataloader_num_workers of at least 1")
    options = arguments.lr_scheduler_kwargs
    if options and not isinstance(options, dict):
        raise ValueError("lr_scheduler_kwargs must be a mapping of the schedule's options to values")
    steps = max(arguments.max_steps, 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=arguments.learning_rate)
    schedule = {"num_warmup_steps": arguments.get_warmup_steps(steps), "num_training_steps": steps}
    try:
        get_scheduler(arguments.lr_scheduler_type, optimizer, **schedule, scheduler_specific_kwargs=options)
    except TypeError as error:  # names a Python function before what it lacks
        reason = str(error).partition(") ")[2]
        raise ValueError(f"lr_scheduler_kwargs: the schedule is {reason.replace('got', 'given', 1)}") from error
    except ZeroDivisionError as error:
        if arguments.max_steps > 0:  # else the number of steps is known when the data is
            raise ValueError("lr_scheduler_type leaves no step after warmup_steps: raise max_steps") from error
