"""The projection onto the vocabulary fused with its softmax: log p of given tokens, without logits for all of them."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits alive at a time: on a CPU what a core's cache holds, on a GPU what keeps its units busy
_LOGITS_ON_CPU = 2**22
_LOGITS_ON_GPU = 2**26


def token_log_likelihood(
    states: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int64[Tensor, " tokens"],
) -> Float[Tensor, " tokens"]:
    """log softmax(states weightᵀ) at the targets, in nats, float32 (float64 for float64 states).

    Equal to `-cross_entropy(linear(states, weight), targets, reduction="none")`, but works on a part of the tokens at
    a time. Where only the states need a gradient (gradient inference), ∂ log p / ∂ state = weight[target] − E_p[weight]
    is made with the value and nothing is computed twice; where the weight needs one, logits are computed again for it.
    """
    if torch.is_autocast_enabled(states.device.type):
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight = states.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():  # of which a Function's needs_input_grad says nothing
        states, weight = states.detach(), weight.detach()
    return _TokenLogLikelihood.apply(states, weight, targets)


class _TokenLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        precise = torch.promote_types(states.dtype, torch.float32)
        chosen = torch.empty(len(states), dtype=precise, device=states.device)
        wants_states, wants_weight, _ = ctx.needs_input_grad
        slope = torch.empty_like(states) if wants_states else None
        for part in _parts(states, weight):
            log_probabilities = (states[part] @ weight.T).log_softmax(-1, dtype=precise)
            chosen[part] = log_probabilities.gather(-1, targets[part, None])[:, 0]
            if slope is not None:
                probabilities = log_probabilities.exp_().to(weight.dtype)
                torch.sub(weight[targets[part]], probabilities @ weight, out=slope[part])
        ctx.save_for_backward(slope, *((states, weight, targets) if wants_weight else ()))
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        slope, *rest = ctx.saved_tensors
        gradient_of_states = None if slope is None else (gradient[:, None] * slope).to(slope.dtype)
        if not rest:
            return gradient_of_states, None, None
        states, weight, targets = rest
        gradient_of_weight = torch.zeros_like(weight, dtype=gradient.dtype)
        for part in _parts(states, weight):
            weights = (states[part] @ weight.T).softmax(-1, dtype=gradient.dtype)
            weights.mul_(-gradient[part, None])
            weights.scatter_add_(1, targets[part, None], gradient[part, None])
            gradient_of_weight += weights.to(states.dtype).T @ states[part]
        return gradient_of_states, gradient_of_weight.to(weight.dtype), None


def _parts(states: Tensor, weight: Tensor) -> list[slice]:
    logits = _LOGITS_ON_CPU if states.device.type == "cpu" else _LOGITS_ON_GPU
    size = max(logits // len(weight), 1)
    return [slice(start, start + size) for start in range(0, len(states), size)]
