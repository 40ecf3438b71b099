"""Gradient inference: weights held against Algorithm 1 done plainly, in one process, with the same noise.

The plain way calls backward() and so computes the weights' gradients at each fast step, too, and throws them away.
Prints tokens per second of both, their ratio, and how far the posteriors are apart.

    python benchmarks/gradient_inference.py [--threads 2] [--repeats 3]
"""

import argparse
import statistics
import time

import torch

from latentlm import LTM, LTMConfig
from latentlm.distributions import Stream, diagonal_gaussian, sample_from_noise, sequence_keys, sequence_noise
from latentlm.objective import elbo


def plain(model: LTM, input_ids: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1, lines 6 to 11, with torch's own Adam and an ordinary backward()."""
    shape = (len(input_ids), *model.latent_shape)
    mean, log_variance = torch.zeros(shape, requires_grad=True), torch.zeros(shape, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_variance], lr=model.config.inference_lr, betas=(0.9, 0.95), maximize=True)
    prior = model.prior(len(input_ids), input_ids.shape[1] - 1)
    keys = sequence_keys(input_ids)
    for step in range(model.config.inference_steps):
        posterior = diagonal_gaussian(mean, log_variance)
        noise = sequence_noise(keys, model.latent_shape, seed=seed, stream=Stream.INFERENCE, step=step)
        log_likelihood = model.log_likelihood(sample_from_noise(posterior, noise), input_ids).sum(-1)
        bound = elbo(log_likelihood, torch.distributions.kl_divergence(posterior, prior))
        optimizer.zero_grad()
        bound.sum().backward()
        optimizer.step()
    model.zero_grad()
    return mean.detach(), log_variance.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LTMConfig(
        vocab_size=4096, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128,
        sliding_window=8, inference_steps=8, inference_lr_final=None, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LTM(config).eval()
    input_ids = torch.randint(1, config.vocab_size, (8, config.max_position_embeddings + 1))
    tokens = input_ids[:, 1:].numel()
    seconds: dict[str, list[float]] = {"plain": [], "held": []}
    for repeat in range(arguments.repeats + 1):
        start = time.perf_counter()
        mean, log_variance = plain(model, input_ids, seed=repeat)
        middle = time.perf_counter()
        posterior = model.infer(input_ids, seed=repeat)
        end = time.perf_counter()
        if repeat:  # the first round warms up
            seconds["plain"].append(middle - start)
            seconds["held"].append(end - middle)
        # ε = 1e-8 divides rounding by almost nothing where a gradient is almost nothing, hence not 1e-6
        torch.testing.assert_close(posterior.mean, mean, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(posterior.variance, log_variance.exp(), atol=1e-3, rtol=1e-3)
        difference = float((posterior.mean - mean).abs().max())
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{config.inference_steps} steps, {tokens} tokens, {arguments.threads} threads, {arguments.repeats} repeats")
    for name, value in median.items():
        print(f"{name:>6}: {tokens / value:8.0f} tokens/s")
    print(f"ratio held / plain: {median['plain'] / median['held']:.2f}; largest difference of μ: {difference:.1e}")


if __name__ == "__main__":
    main()
