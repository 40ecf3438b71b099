"""The projection onto the vocabulary fused with its softmax: log p of given tokens, without logits for all of them."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits alive at a time: on a CPU what its caches hold, on a GPU what keeps its units busy
_LOGITS_ON_CPU = 2**22
_LOGITS_ON_GPU = 2**26
_LEAST_TOKENS = 256  # of a part, whatever that takes: with fewer, reading the weights takes longer than the products
_LONG = 4096  # vocabulary


def token_log_likelihood(
    states: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int64[Tensor, " tokens"],
) -> Float[Tensor, " tokens"]:
    """log softmax(states weightᵀ) at the targets, in nats, float32 (float64 for float64 states).

    Equal to `-cross_entropy(linear(states, weight), targets, reduction="none")`, but works on a part of the tokens at
    a time. ∂ log p / ∂ state = weight[target] − E_p[weight] is made with the value. So is, on a CPU, the gradient of
    the weight from the sum of all log p, since mostly all tokens count alike: where they turn out to, nothing is
    computed twice; where they do not, or on another device, logits are computed again for the weight.
    """
    if torch.is_autocast_enabled(states.device.type):
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight = states.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():  # of which a Function's needs_input_grad says nothing
        states, weight = states.detach(), weight.detach()
    return _TokenLogLikelihood.apply(states, weight, targets)


def logits_of_few(
    states: Float[Tensor, "batch few hidden"], weight: Float[Tensor, "vocabulary hidden"]
) -> Float[Tensor, "batch few vocabulary"]:
    """states weightᵀ as (weight statesᵀ)ᵀ, for the few rows of a step of generation on a CPU.

    Its libraries cut a product's result by rows to share it among cores; a few rows of a whole vocabulary are half as
    fast as a vocabulary of rows of a few.
    """
    return (weight @ states.flatten(0, 1).T).T.unflatten(0, states.shape[:2])


def _logits(states: Tensor, weight: Tensor) -> Tensor:
    """As `logits_of_few`, where a vocabulary is long beside a part of the tokens: in float32 a fifth less."""
    if states.device.type == "cpu" and len(weight) >= _LONG:
        return (weight @ states.T).T
    return states @ weight.T


class _TokenLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        precise = torch.promote_types(states.dtype, torch.float32)
        chosen = torch.empty(len(states), dtype=precise, device=states.device)
        wants_states, wants_weight, _ = ctx.needs_input_grad
        slope = torch.empty_like(states) if wants_states else None
        # whether it will do is a question to the data: elsewhere that would wait for the device, or cut the graph
        at_once = wants_weight and states.device.type == "cpu" and not torch.compiler.is_compiling()
        slope_of_weight = torch.zeros_like(weight, dtype=precise) if at_once else None
        for part in _parts(states, weight):
            # in place: memory that is new to the process costs as much as the softmax
            logits, here = _logits(states[part], weight).to(precise), targets[part, None]
            logits.sub_(logits.amax(-1, keepdim=True))
            of_targets = logits.gather(-1, here)
            totals = logits.exp_().sum(-1, keepdim=True)
            chosen[part] = (of_targets - totals.log())[:, 0]
            if slope is None and slope_of_weight is None:
                continue
            excess = logits.div_(totals)  # ∂ −log p / ∂ logits
            excess = excess.scatter_add_(1, here, excess.new_full(here.shape, -1.0)).to(weight.dtype)
            if slope is not None:
                torch.neg(excess @ weight, out=slope[part])
            if slope_of_weight is not None:
                _subtract_product(slope_of_weight, excess.T, states[part])
        ctx.save_for_backward(slope, slope_of_weight, *((states, weight, targets) if wants_weight else ()))
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        slope, slope_of_weight, *rest = ctx.saved_tensors
        gradient_of_states = None if slope is None else (gradient[:, None] * slope).to(slope.dtype)
        if not rest:
            return gradient_of_states, None, None
        states, weight, targets = rest
        if slope_of_weight is not None and bool((gradient == gradient[:1]).all()):
            return gradient_of_states, (gradient[:1].sum() * slope_of_weight).to(weight.dtype), None
        gradient_of_weight = torch.zeros_like(weight, dtype=gradient.dtype)
        for part in _parts(states, weight):
            weights = _logits(states[part], weight).softmax(-1, dtype=gradient.dtype)
            weights.mul_(gradient[part, None])
            weights.scatter_add_(1, targets[part, None], -gradient[part, None])
            _subtract_product(gradient_of_weight, weights.to(states.dtype).T, states[part])
        return gradient_of_states, gradient_of_weight.to(weight.dtype), None


def _subtract_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total −= left right, without another matrix of its size where all are of one type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=-1)
    else:
        total -= left @ right


def _parts(states: Tensor, weight: Tensor) -> list[slice]:
    logits = _LOGITS_ON_CPU if states.device.type == "cpu" else _LOGITS_ON_GPU
    size = max(logits // len(weight), _LEAST_TOKENS)
    return [slice(start, start + size) for start in range(0, len(states), size)]
