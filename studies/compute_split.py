"""What a training step of the paper's LTMs spends, and on what (Kong et al. 2025, Table 1's trFLOPs/tok and Figure 3).

    python studies/compute_split.py [--length 1024]

Operations are counted on the models themselves (`latentlm.evaluation.flops`), with one fast step and with two: from
there they grow by the same number with each step (tested), so 16 and 64 steps need not be run. Beside them the formula
of the paper, section 2.4, with two operations to a multiplication and a backward pass of two forward ones, which
charges fast steps for gradients of weights that nobody needs: (T + 1) · 6 · (L (8 H² + 3 H I + 2 N H) + V H), with
8 H² for the projections of both attentions, I the width of a feed-forward layer and N the length.
"""

import argparse

import torch

from latentlm import LTM, LTMConfig
from latentlm.evaluation.flops import PARTS, training_flops

REPORTED = {"small": 4.07e9, "medium": 5.52e9, "large": 32.2e9}  # the paper's Table 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024, help="scored tokens of the text that is counted on")
    length = parser.parse_args().length
    print("| LTM | parameters | T | FLOPs a token, counted | decoder | latents | embeddings | formula | the paper's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for size, reported in REPORTED.items():
        steps = LTMConfig.preset(size).inference_steps
        found = []
        for few in (1, 2):
            config = LTMConfig.preset(size, inference_steps=few, max_position_embeddings=length, sliding_window=256)
            torch.manual_seed(0)
            model = LTM(config)
            found.append(training_flops(model, torch.randint(config.vocab_size, (1, length + 1))))
        key = "training_flops_per_token"
        keys = [key, *(f"{key}_of_{part}" for part in PARTS)]
        flops = [found[0][name] + (steps - 1) * (found[1][name] - found[0][name]) for name in keys]
        hidden, layers = config.hidden_size, config.num_hidden_layers
        products = layers * (8 * hidden**2 + 3 * hidden * config.intermediate_size + 2 * length * hidden)
        formula = (steps + 1) * 6 * (products + config.vocab_size * hidden)
        shares = " | ".join(f"{part / flops[0]:.0%}" for part in flops[1:])
        parameters = sum(one.numel() for one in model.parameters())
        print(
            f"| {size} | {parameters / 1e6:.0f}M | {steps} | {flops[0] / 1e9:.2f}G | {shares} "
            f"| {formula / 1e9:.2f}G | {reported / 1e9:.2f}G |",
            flush=True,
        )


if __name__ == "__main__":
    main()
