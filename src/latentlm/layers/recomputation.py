"""Layers whose activations are computed anew in backward instead of being kept (Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from latentlm.errors import InputError


def recompute_layers(model: nn.Module, checkpoint: Callable[..., Any] | None, every: int = 1) -> None:
    """Lets backward compute layers anew, ours and those of transformers, wherever a gradient is asked for.

    transformers does so in training mode alone, in which a frozen model would drop out, and in which inference by
    gradients, whose model is held, would keep everything; and it drops the cache.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` or one like it; None keeps everything again.
        every: of so many layers one is computed anew.

    Raises:
        InputError: a model without layers that say that they may be computed anew.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"a {type(model).__name__} has no layers to compute anew: do without gradient_checkpointing.")
    for place, layer in enumerate(layers):
        forward: Any = layer.forward
        if isinstance(forward, partial) and forward.func is _forward_or_anew:
            forward = forward.args[1]
        if checkpoint is not None and place % every == 0:
            forward = partial(_forward_or_anew, checkpoint, forward)
        layer.forward = forward


def _forward_or_anew(checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # a cache would be written to a second time
    if not torch.is_grad_enabled() or any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
        return forward(*args, **kwargs)
    # gradients of what stands in `kwargs`, among it z's keys and values, would be lost by the reentrant kind
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)
