"""The projection onto a vocabulary with its softmax: log p of given tokens and its gradient, in one process.

Ours, a part of the tokens at a time, against all logits (`linear` and `cross_entropy`), at GPT-2's vocabulary of 50,257
and at 8,192, float32. As in a fast step, with the gradient of the states alone, and as in a step of the weights, with
theirs, too. Asserts that values and gradients agree. Sides in turns, medians. torch's own `linear_cross_entropy` in
chunks of as many tokens as ours (from torch 2.13) is beside them; the chunks that it chooses by itself on a CPU, of two
tokens at 50,257, take 20 times as long.

    python benchmarks/projection.py [--threads 2] [--rounds 5] [--vocabularies 8192 50257] [--small] [--json FILE]
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from _report import Comparison, add_json_option, seconds, write
from torch import Tensor
from torch.nn import functional

from latentlm.layers import token_log_likelihood

HIDDEN = 384
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -token_log_likelihood(states, weight, targets).sum()


def all_logits(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(states, weight), targets, reduction="sum")


def in_chunks(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    return functional.linear_cross_entropy(states, weight, targets, reduction="sum", options=options)


def gradients(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], wanted: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*inputs), wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 50257])
    parser.add_argument("--small", action="store_true", help="half of the tokens")
    add_json_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    tokens = 512 if given.small else 1024
    comparisons = []
    for vocabulary in given.vocabularies:
        states, weight = torch.randn(tokens, HIDDEN), 0.05 * torch.randn(vocabulary, HIDDEN)
        targets = torch.randint(vocabulary, (tokens,))
        sides: dict[str, Loss] = {"ours": ours, "all logits": all_logits}
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            sides["torch, in chunks"] = in_chunks
        for what, wanted in (("of states", [states]), ("of states and weights", [states, weight])):
            states.requires_grad_(), weight.requires_grad_(len(wanted) == 2)
            inputs = (states, weight, targets)
            plain = gradients(all_logits, inputs, wanted)
            times: dict[str, list[float]] = {name: [] for name in sides}
            for loss in sides.values():  # also warms up
                torch.testing.assert_close(gradients(loss, inputs, wanted), plain, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(loss(*inputs), all_logits(*inputs), atol=0, rtol=1e-5)
            for _ in range(given.rounds):
                for name, loss in sides.items():
                    times[name].append(seconds(partial(gradients, loss, inputs, wanted)))
            median = {name: statistics.median(values) for name, values in times.items()}
            for name in [*sides][1:]:
                size = f"{tokens} x {HIDDEN} x {vocabulary:,}, gradients {what}"
                comparisons.append(Comparison.of_costs(size, median["ours"], median[name], "s", name))
                print(comparisons[-1].line)
    write(given.json, vars(given), comparisons)


if __name__ == "__main__":
    main()
