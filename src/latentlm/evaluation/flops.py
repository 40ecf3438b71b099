"""Floating-point operations of a training step, counted as they run, and what of the model they serve.

A multiplication and an addition are two operations. Counted are products of matrices, attention and convolutions, as
`torch.utils.flop_counter` does, and beside these what it leaves out: attention on a CPU, products that are added in
place, Cholesky factors and triangular solutions. Sums, norms and softmaxes are not: they are few beside the products.
Attention through a window counts the blocks of scores that are computed (`layers.window`), more than the window itself.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from latentlm.evaluation.batches import by_hash, in_batches
from latentlm.inference import gathered
from latentlm.latent_lm import LatentLM

Part = Literal["decoder", "latents", "embeddings"]
PARTS: tuple[Part, ...] = ("decoder", "latents", "embeddings")
_SEQUENCES = 8
_aten = torch.ops.aten

# names of modules that make, carry or read a latent; what is in them is theirs, whatever it is
_OF_LATENTS = {"cross_attention", "cross_norm", "encoder", "encoder_norm", "latent_transformer", "injection"}


def training_flops(
    model: LatentLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    condition: Any = None,
) -> dict[str, float]:
    """Floating-point operations of one training step of these texts, forward and backward, without the optimiser's.

    Weights, gradients, dropout and torch's generator are afterwards what they were.

    Returns:
        `training_flops_per_token`, over scored tokens, and its parts, which sum to it: `…_of_embeddings` (the products
        with the vocabulary), `…_of_latents` (encoders, attention to latents, priors, Gaussian processes) and
        `…_of_decoder` (everything else: attention among tokens and feed-forward layers). Kong et al. 2025, section 2.4
        and Figure 3, take the last two together as "attention". `inference_flops_per_token` is what inferring q takes
        of these texts, as `change_inference` has it now: by gradient the fast steps, forward and backward.
    """
    tokens = int(model.scored_tokens(input_ids, attention_mask).sum())
    with _untouched(model):
        model.train()
        with _counting(model) as of_inference, torch.no_grad():
            model.infer_for_training(input_ids, attention_mask, condition, seed=0)
        with _counting(model) as of_step, torch.enable_grad(), model.inferring_as_trained():
            model(input_ids, attention_mask, condition, seed=0).loss.backward()
    return {
        "training_flops_per_token": sum(of_step.values()) / tokens,
        **{f"training_flops_per_token_of_{part}": of_step[part] / tokens for part in PARTS},
        "inference_flops_per_token": sum(of_inference.values()) / tokens,
    }


def training_cost(model: LatentLM, sequences: Dataset, tokens: int | None = None) -> dict[str, float]:
    """`training_flops` of sequences that a hash chooses, a few of them; how long they are is what matters.

    Args:
        tokens: scored tokens that the model was trained on; with them comes `training_flops`, of all of its training.
            Steps that train the encoder alone are counted as others are, if their tokens are.
    """
    chosen = Subset(sequences, by_hash(sequences)[:_SEQUENCES])
    [(_, input_ids, attention_mask, condition)] = in_batches(model, chosen, _SEQUENCES)
    with gathered(model):
        figures = training_flops(model, input_ids, attention_mask, condition)
    return figures if not tokens else {**figures, "training_flops": figures["training_flops_per_token"] * tokens}


@contextmanager
def _untouched(model: LatentLM) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
            yield
    finally:
        model.eval()
        for module in training:
            module.training = True
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def _counting(model: LatentLM) -> Iterator[dict[Part, int]]:
    """Operations by the part of the model that they serve; complete when the block ends."""
    found: dict[Part, int] = dict.fromkeys(PARTS, 0)
    places = _Places(model)
    vocabulary = model.config.vocab_size

    def counted(count: Callable[..., int]) -> Callable[..., int]:
        def counts(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            number = count(*args, out_val=out_val, **kwargs)
            place = places.now()
            # the product with the vocabulary stands outside of modules, or in one that does nothing else
            with_vocabulary = any(vocabulary in one.shape for one in args if isinstance(one, Tensor))
            if place is None:
                place = "embeddings" if with_vocabulary else "latents"
            found[place] += number
            return number

        counts._get_raw = True  # type: ignore[attr-defined]  # it is given tensors, not shapes
        return counts

    counter = FlopCounterMode(display=False, custom_mapping=_ALSO)
    counter.flop_registry = {operation: counted(count) for operation, count in counter.flop_registry.items()}
    with places, counter:
        yield found


class _Places:
    """Which part of a model an operation serves: that of the module which began last, unless all have ended, and in a
    backward pass that of the operation whose gradient it is. So a block's own operations are those of its last module:
    the attention after the projection of the values.

    A node of autograd's graph has a number that grows as the graph does, so the numbers at which modules began and
    ended say where a node was made. torch's own tracker of modules asks hooks on tensors, which are silent where
    nothing upstream needs a gradient, as in gradient inference.
    """

    def __init__(self, model: LatentLM):
        self.model = model
        self.numbers: list[int] = []
        self.parts: list[Part | None] = []
        self.depth = 0
        self.part: Part | None = None

    def __enter__(self) -> "_Places":
        self.hooks = []
        for name, module in self.model.named_modules():
            if not name:
                continue
            self.hooks.append(module.register_forward_pre_hook(partial(self._begins, _part_of(name))))
            self.hooks.append(module.register_forward_hook(self._ends, always_call=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begins(self, part: Part, *_: Any) -> None:
        self.depth += 1
        self._turn(part)

    def _ends(self, *_: Any) -> None:
        self.depth -= 1
        if not self.depth:
            self._turn(None)

    def _turn(self, part: Part | None) -> None:
        self.part = part
        self.numbers.append(torch._C._autograd._get_sequence_nr())
        self.parts.append(part)

    def now(self) -> Part | None:
        node = torch._C._current_autograd_node()
        if node is None:
            return self.part
        place = bisect_right(self.numbers, node._sequence_nr()) - 1
        return self.parts[place] if place >= 0 else None


def _part_of(name: str) -> Part:
    names = set(name.split("."))
    if names & _OF_LATENTS:
        return "latents"
    return "embeddings" if "lm_head" in names else "decoder"


def _products(*factors: int) -> int:
    total = 2
    for factor in factors:
        total *= factor
    return total


def _addmm_in_place(total: Any, left: Any, right: Any, **_: Any) -> int:
    return _products(*left, right[1])


def _cholesky(matrix: Any, *_: Any, **__: Any) -> int:
    """n³ / 3 (Golub and Van Loan, Matrix Computations, section 4.2)."""
    *batch, size, _size = matrix
    return _products(*batch, size**3) // 6


def _triangular(matrix: Any, right: Any, *_: Any, **__: Any) -> int:
    """n² for each right-hand side."""
    return _products(*right[:-1], right[-1], matrix[-1]) // 2


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_ALSO: dict[Any, Callable[..., int]] = {
    _aten.addmm_: _addmm_in_place,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.linalg_cholesky_ex: _cholesky,
    _aten.linalg_solve_triangular: _triangular,
}
