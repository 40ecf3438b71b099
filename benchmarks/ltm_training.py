"""A training step of the LTM against Algorithm 1 done plainly, in one process, with the same noise.

A step is T fast steps on (μ, log σ²), the slow step's forward and backward, and AdamW's update of the weights. The
plain way calls backward() in each fast step, so the weights' gradients come with it and are thrown away; its attention
takes a dense [time, time] mask, and its likelihood is cross_entropy of all logits. Asserted is that both find the same
q(z | x) to 1e-4, the same loss and gradients of the weights. Adam's ε is 0.3 in both: a tiny one divides rounding by
almost nothing where a gradient is almost nothing, and no two ways of computing agree.
Prints tokens per second, FLOP/s as torch's FlopCounterMode counts them (it counts no attention scores on a CPU), the
ratio, and how a step's time divides. The parts are timed alone, forward and backward as in a fast step, so their shares
are estimates: the first layer's self-attention has no backward there.

With --each, ours also runs without each of its means in turn, and with one that is off by default: every fourth token
in the fast steps, which is no longer the same algorithm. On CUDA both sides are in bf16 by autocast, at LTM-Medium's
shapes (6 layers of 512, 16 texts of 1,024 tokens, GPT-2's vocabulary); agreement is asserted in float32 before. That
has never been run: no such device was at hand.

    python benchmarks/ltm_training.py [--threads 2] [--repeats 3] [--small] [--each] [--device cuda] [--json FILE]
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from _models import papers_ltm
from _report import Comparison, add_json_option, seconds, write
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from latentlm import LTM, LTMConfig
from latentlm.distributions import Stream, diagonal_gaussian, sample_from_noise, sequence_keys, sequence_noise
from latentlm.layers import causal_mask, rotation, token_log_likelihood
from latentlm.layers.transformer import Attention, Rotation, rotate

TARGET = {"cpu": 1.6, "cuda": 3.0}
ADAMW = {"lr": 4e-4, "betas": (0.9, 0.95)}


def plain_attention(
    layer: Attention, x: Tensor, memory: Tensor, by: Rotation, memory_by: Rotation, mask: Tensor | None
) -> Tensor:
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, layer.head_size)).transpose(1, 2)

    query, key = rotate(heads(layer.query(x)), by), rotate(heads(layer.key(memory)), memory_by)
    attended = nn.functional.scaled_dot_product_attention(query, key, heads(layer.value(memory)), mask)
    return layer.output(attended.transpose(1, 2).flatten(2))


def plain_log_likelihood(model: LTM, latents: Tensor, input_ids: Tensor) -> Tensor:
    """log p(x | z) of each text, in nats."""
    config, (given, targets) = model.config, (input_ids[:, :-1], input_ids[:, 1:])
    width = config.hidden_size // config.num_attention_heads
    position = torch.arange(given.shape[1], device=given.device)
    by = rotation(position[None], width, config.rope_theta)
    spacing = config.max_position_embeddings / config.latents_per_layer
    latent_position = (torch.arange(config.latents_per_layer, device=given.device) + 0.5) * spacing
    latent_by = rotation(latent_position[None], width, config.rope_theta)
    distance = position[:, None] - position
    mask = (distance >= 0) & (distance < config.sliding_window)
    x = model.embed_tokens(given)
    for index, layer in enumerate(model.layers):
        normed = layer.self_norm(x)
        x = x + plain_attention(layer.self_attention, normed, normed, by, by, mask)
        normed = layer.cross_norm(x)
        x = x + plain_attention(layer.cross_attention, normed, latents[:, index], by, latent_by, None)
        x = x + layer.feed_forward(layer.feed_forward_norm(x))
    logits = model.lm_head(model.norm(x))
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -nll.view_as(targets).sum(1)


def plain_elbo(model: LTM, mean: Tensor, log_variance: Tensor, input_ids: Tensor, noise: Tensor) -> Tensor:
    posterior = diagonal_gaussian(mean, log_variance)
    log_likelihood = plain_log_likelihood(model, sample_from_noise(posterior, noise), input_ids)
    return (log_likelihood - kl_divergence(posterior, model.prior(len(input_ids), input_ids.shape[1] - 1))).sum()


def plain_infer(model: LTM, input_ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1, lines 5 to 11: μ and log σ²."""
    shape, config = (len(input_ids), *model.latent_shape), model.config
    parameters = [torch.zeros(shape, device=input_ids.device, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.Adam(
        parameters, lr=config.inference_lr, betas=(0.9, 0.95), eps=config.inference_epsilon, maximize=True
    )
    keys = sequence_keys(input_ids)
    last = max(config.inference_steps - 1, 1)
    for step in range(config.inference_steps):
        optimizer.param_groups[0]["lr"] = config.inference_lr * (1 + step / last * (config.inference_lr_decay - 1))
        noise = sequence_noise(keys, model.latent_shape, seed=seed, stream=Stream.INFERENCE, step=step)
        optimizer.zero_grad()
        plain_elbo(model, *parameters, input_ids, noise).backward()
        optimizer.step()
    model.zero_grad()
    return parameters[0].detach(), parameters[1].detach()


def plain_loss(model: LTM, input_ids: Tensor, seed: int) -> Tensor:
    mean, log_variance = plain_infer(model, input_ids, seed)
    noise = sequence_noise(sequence_keys(input_ids), model.latent_shape, seed=seed, stream=Stream.SCORE)
    return -plain_elbo(model, mean, log_variance, input_ids, noise) / input_ids[:, 1:].numel()


def our_loss(model: LTM, input_ids: Tensor, seed: int) -> Tensor:
    loss = model(input_ids, seed=seed).loss
    assert loss is not None
    return loss


@contextmanager
def weights_gradients_too() -> Iterator[None]:
    """Fast steps by backward(), which fills the weights' gradients, too."""

    def by_backward(bound: Tensor, parameters: Tensor) -> tuple[Tensor]:
        parameters.grad = None
        bound.backward()
        assert parameters.grad is not None
        return (parameters.grad,)

    with (
        mock.patch("latentlm.inference.gradient.held", lambda model: torch.enable_grad()),
        mock.patch("torch.autograd.grad", by_backward),
    ):
        yield


def all_logits(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(nn.functional.linear(states, weight), targets, reduction="none")


#: what ours does, and how to leave it out
MEANS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no gradients of the weights in fast steps": weights_gradients_too,
    "attention by blocks": lambda: mock.patch("latentlm.layers.window._LEAST_BLOCKS", 10**9),
    "attention to few latents by products": lambda: mock.patch("latentlm.layers.transformer._FEW_KEYS", ()),
    "projection fused with softmax": lambda: mock.patch("latentlm.causal_lm.token_log_likelihood", all_logits),
    "what z does not change, once": lambda: mock.patch.object(LTM, "before_latents", lambda *_: None),
}


Loss = Callable[[LTM, Tensor, int], Tensor]


def training_step(loss: Loss, model: LTM, optimizer: torch.optim.Optimizer, input_ids: Tensor, seed: int) -> None:
    optimizer.zero_grad()
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=input_ids.device.type == "cuda"):
        value = loss(model, input_ids, seed)
    value.backward()
    optimizer.step()


def assert_agreement(model: LTM, plain: LTM, input_ids: Tensor) -> tuple[float, dict[str, int]]:
    """Same q, loss and gradients from the same weights; the largest difference of μ and σ², and each side's FLOPs."""
    posterior = model.infer(input_ids, seed=0)
    mean, log_variance = plain_infer(plain, input_ids, seed=0)
    torch.testing.assert_close(posterior.mean, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(posterior.variance, log_variance.exp(), atol=1e-4, rtol=1e-4)
    losses, flops = [], {}
    for name, one, loss in (("ours", model, our_loss), ("plain", plain, plain_loss)):
        with FlopCounterMode(display=False) as counter:
            losses.append(loss(one, input_ids, 0))
            losses[-1].backward()
        flops[name] = counter.get_total_flops()
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3)
    differences = posterior.mean - mean, posterior.variance - log_variance.exp()
    return max(float(difference.abs().max()) for difference in differences), flops


def parts(model: LTM, input_ids: Tensor) -> dict[str, Callable[[], object]]:
    """What one layer's parts and the projection do in a fast step: forward, and backward to all but the weights."""
    config, (batch, length) = model.config, input_ids[:, 1:].shape
    size, width = config.hidden_size, config.hidden_size // config.num_attention_heads
    x = torch.randn(batch, length, size, device=model.device, requires_grad=True)
    z = torch.randn(batch, config.latents_per_layer, config.latent_size, device=model.device, requires_grad=True)
    by = rotation(torch.arange(length, device=model.device)[None], width, config.rope_theta)
    latent_by = rotation(torch.arange(config.latents_per_layer, device=model.device)[None], width, config.rope_theta)
    mask = causal_mask(model.config, x)
    layer = copy.deepcopy(model.layers[0]).requires_grad_(False)
    weight, targets = model.lm_head.weight.detach(), input_ids[:, 1:].flatten()
    work = {
        "fused projection": lambda: token_log_likelihood(x.flatten(0, 1), weight, targets),
        "self-attention": lambda: layer.self_attention.self_attention(x, by, mask, None),
        "cross-attention": lambda: layer.cross_attention.cross_attention(x, z, by, latent_by, None),
        "feed-forward": lambda: layer.feed_forward(x),
    }
    return {
        name: lambda part=part: torch.autograd.grad(part().sum(), (x, z), allow_unused=True)
        for name, part in work.items()
    }


def each(
    model: LTM, optimizer: torch.optim.Optimizer, input_ids: Tensor, repeats: int
) -> dict[str, tuple[float, float]]:
    """Seconds of a step with everything and without each of the means, in turns; medians."""

    def step(seed: int) -> float:
        return seconds(lambda: training_step(our_loss, model, optimizer, input_ids, seed))

    def in_turns(changed: Callable[[], AbstractContextManager[Any]]) -> tuple[float, float]:
        as_it_is, otherwise = [], []
        for repeat in range(repeats):
            as_it_is.append(step(repeat))
            with changed():
                otherwise.append(step(repeat))
        return statistics.median(as_it_is), statistics.median(otherwise)

    found = {name: in_turns(left_out) for name, left_out in MEANS.items()}
    without, those_alone = in_turns(lambda: mock.patch.object(model.config, "inference_subsampling", 4))
    return found | {"every fourth token in fast steps": (those_alone, without)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--each", action="store_true", help="also without each of the means")
    parser.add_argument("--small", action="store_true", help="a quarter of the texts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LTMConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=256,
        sliding_window=64, latents_per_layer=8, inference_steps=16, inference_lr=0.3, inference_lr_decay=1.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    if arguments.device == "cuda":
        config = papers_ltm("medium", inference_lr=0.3, inference_lr_final=0.3, inference_epsilon=0.3)
    model = LTM(config).to(arguments.device).train()
    shape = (2 if arguments.small else 16 if arguments.device == "cuda" else 8, config.max_position_embeddings + 1)
    input_ids = torch.randint(1, config.vocab_size, shape, device=arguments.device)
    models = {"plain": copy.deepcopy(model), "ours": model}
    losses: dict[str, Loss] = {"plain": plain_loss, "ours": our_loss}
    difference, flops = assert_agreement(model, models["plain"], input_ids[:2])  # also warms up
    flops = {name: count * len(input_ids) // 2 for name, count in flops.items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), **ADAMW) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in [*models, "inference", *parts(model, input_ids)]}
    for repeat in range(arguments.repeats):
        for name, loss in losses.items():
            step = (loss, models[name], optimizers[name], input_ids, repeat)
            times[name].append(seconds(lambda step=step: training_step(*step)))
        times["inference"].append(seconds(lambda seed=repeat: model.infer(input_ids, seed=seed)))
        for name, part in parts(model, input_ids).items():
            part()
            times[name].append(statistics.median(seconds(part) for _ in range(5)))
    median = {name: statistics.median(values) for name, values in times.items()}

    tokens, steps = input_ids[:, 1:].numel(), config.inference_steps
    print(f"{steps} fast steps and a slow one, {tokens} tokens, {arguments.device}, {arguments.threads} threads")
    for name in models:
        print(
            f"{name:>5}: {median[name]:.2f} s a step, {tokens / median[name]:6.0f} tokens/s, "
            f"{flops[name] / 1e9:.0f} GFLOP at {flops[name] / median[name] / 1e9:.0f} GFLOP/s"
        )
    what, target = f"training step, {tokens} tokens, T = {steps}", TARGET[arguments.device]
    against = "Algorithm 1 done plainly"
    comparison = Comparison.of_costs(what, median["ours"], median["plain"], "s", against, target)
    print(comparison.line)
    print(f"largest difference of μ and σ²: {difference:.1e}")
    shares = {"fast loop, of a step": median["inference"] / median["ours"]}
    for name in parts(model, input_ids):
        times_a_step = 1 if name == "fused projection" else config.num_hidden_layers
        shares[f"{name}, of the fast loop"] = times_a_step * steps * median[name] / median["inference"]
    for name, share in shares.items():
        print(f"{name:>32}: {share:.0%}")
    rates = {f"FLOP/s, {name}": flops[name] / median[name] for name in models}
    if arguments.each:
        without = each(model, optimizers["ours"], input_ids, arguments.repeats)
        for name, (whole, less) in without.items():
            print(f"{name:>42}: {less:.3f} s without, {whole:.3f} s with, ratio {less / whole:.2f}")
            shares[f"time without / with: {name}"] = less / whole
    write(arguments.json, vars(arguments), [comparison], shares | rates, {"μ and σ²": difference})


if __name__ == "__main__":
    main()
