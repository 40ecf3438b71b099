"""What a trained GP-VAE's trajectory holds: time scales beside the prior's, and what z_t knows of the text.

    python studies/gp_vae_trajectory.py runs/gp-vae [--blocks 600] [--plot FILE.png]

On blocks of the validation data of the model's own recipe, all of one length:

- the autocorrelation of z ~ q(z | x) over time, each dimension by itself, beside that of the prior's kernel: where the
  aggregate posterior is the prior, they agree;
- for each dimension its lengthscale, its KL, and the power of its posterior mean (its variance over texts and times) in
  octaves of the period, as a share of the prior's variance;
- how many nats of the token at t + k a linear softmax of the mean of q(z_t | x) tells on blocks that it was not fitted
  to: ln of the frequencies' perplexity less its own NLL, tokens outside of the 200 most frequent being one. Beside it
  the same of the mean of all z of the block but z_t's own (what the rest of the trajectory tells);
- trajectories of the prior drawn one time after another (SEQ) and at once (PARA): the same, for the same noise.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import latentlm
from latentlm.data.recipe import evaluation_sequences
from latentlm.distributions import Stream, sequence_keys
from latentlm.families import GPVAE

FREQUENT = 200
LAGS = (0, 1, 2, 4, 8, 16, 32)
AHEAD = (-8, -4, -2, -1, 0, 1, 2, 4, 8)


def posterior(model: GPVAE, blocks: Tensor, batch: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Means, one sample and the KL of each dimension of every block."""
    means, samples, kls = [], [], []
    for part in blocks.split(batch):
        q = model.infer(part)
        means.append(q.mean.float())
        samples.append(model.draw_latents(q, sequence_keys(part), 1, seed=0, stream=Stream.SCORE)[0].float())
        kls.append(q.kl())
    return torch.cat(means), torch.cat(samples), torch.cat(kls)


def autocorrelation(z: Tensor, lag: int) -> Tensor:
    """Of each dimension, over blocks and times; the mean is the prior's, 0."""
    product = (z[:, : z.shape[1] - lag] * z[:, lag:]).mean((0, 1))
    return product / z.square().mean((0, 1))


def octaves(means: Tensor) -> tuple[list[str], Tensor]:
    """Power of each dimension's mean in octaves of the period, as parts of its mean square."""
    times = means.shape[1]
    power = torch.fft.rfft(means, dim=1).abs().square().mean(0) / times**2
    power[1 : (times + 1) // 2] *= 2  # the negative frequencies
    names, parts = ["constant"], [power[0]]
    high = 1
    while high <= times // 2:
        parts.append(power[high : 2 * high].sum(0))
        shortest, longest = times // min(2 * high - 1, times // 2), times // high
        names.append(f"{shortest}–{longest}" if shortest < longest else str(longest))
        high *= 2
    return names, torch.stack(parts)


def told(features: Tensor, tokens: Tensor, classes: int, fitted: int) -> float:
    """Nats of a token that a linear softmax of features tells, on the rows after the first `fitted`."""
    x = features.flatten(0, 1) if features.dim() == 3 else features
    split = fitted * (features.shape[1] if features.dim() == 3 else 1)
    y = tokens.flatten()
    x = (x - x[:split].mean(0)) / x[:split].std(0).clamp_min(1e-6)
    frequencies = ((torch.bincount(y[:split], minlength=classes).double() + 1) / (split + classes)).log()
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = frequencies.float().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(x[:split] @ weight + bias, y[:split]) + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        own = torch.nn.functional.cross_entropy(x[split:] @ weight + bias, y[split:])
    return float(-frequencies[y[split:]].mean() - own)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--blocks", type=int, default=600)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    model, tokenizer = latentlm.load(options.model)
    assert isinstance(model, GPVAE)
    model.eval()
    times = model.config.max_position_embeddings
    data = evaluation_sequences(options.model, tokenizer, times, None)
    rows = [data[index]["input_ids"] for index in range(len(data))]
    blocks = torch.stack([row for row in rows if len(row) == times + 1][: options.blocks])
    means, samples, kls = posterior(model, blocks)
    prior = model.prior(len(blocks), times)
    size = model.config.latent_size
    print(
        f"{options.model}: {len(blocks)} blocks of {times} tokens, {size} dimensions, KL {float(kls.sum(1).mean()):.2f}"
    )

    nugget = prior.nugget.expand(prior.groups)
    kernel = model.kernel(torch.tensor(LAGS, dtype=torch.float64)).expand(prior.groups, -1)
    expected = kernel / (kernel[:, :1] + nugget[:, None])
    expected[:, 0] = 1
    expected = expected.repeat_interleave(size // prior.groups, 0)
    found = torch.stack([autocorrelation(samples, lag) for lag in LAGS], 1)
    of_mean = torch.stack([autocorrelation(means, lag) for lag in LAGS], 1)
    print("\nautocorrelation over time, mean of dimensions | " + " | ".join(f"lag {lag}" for lag in LAGS))
    for name, values in (("prior", expected), ("z ~ q(z | x)", found), ("mean of q(z | x)", of_mean)):
        print(f"{name} | " + " | ".join(f"{value:.3f}" for value in values.mean(0).tolist()))

    names, power = octaves(means)
    variance = prior.variance[0, 0]
    scale = getattr(model.kernel, "log_lengthscale", torch.zeros(1)).double().exp().expand(prior.groups)
    scale = scale.repeat_interleave(size // prior.groups)
    nuggets = nugget.repeat_interleave(size // prior.groups)
    print("\ndimension | lengthscale | nugget ÷ variance | KL, nats a block | power of the mean | " + " | ".join(names))
    for place in kls.mean(0).argsort(descending=True)[:16].tolist():
        shares = [f"{float(part[place] / variance[place]):.3f}" for part in power]
        whole = float(means[..., place].square().mean() / variance[place])
        noise = float(nuggets[place] / variance[place])
        print(
            f"{place} | {float(scale[place]):.2f} | {noise:.3f} | {float(kls[:, place].mean()):.2f} | {whole:.3f} | "
            + " | ".join(shares)
        )

    tokens = blocks[:, 1:]
    frequent = torch.bincount(tokens.flatten(), minlength=model.config.vocab_size).argsort(descending=True)[:FREQUENT]
    number = torch.full((model.config.vocab_size,), FREQUENT)
    number[frequent] = torch.arange(len(frequent))
    classes = number[tokens]
    fitted = 2 * len(blocks) // 3
    print("\nnats of the token at t + k that a linear map tells | " + " | ".join(f"k {k:+d}" for k in AHEAD))
    inner = slice(max(AHEAD), times - max(AHEAD))
    rest = (means.sum(1, keepdim=True) - means) / (times - 1)
    rows_of = []
    for name, features in (("of the mean of z_t", means), ("of the mean of all other z", rest)):
        with torch.enable_grad():
            values = [
                told(
                    features[:, inner].contiguous(),
                    classes[:, inner.start + k : inner.stop + k].contiguous(),
                    FREQUENT + 1,
                    fitted,
                )
                for k in AHEAD
            ]
        rows_of.append((name, values))
        print(f"{name} | " + " | ".join(f"{value:.3f}" for value in values))

    noise = torch.randn(64, times, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_64 = model.prior(64, times)
    at_once, one_by_one = of_64.color(noise), of_64.sequentially().color(noise)
    difference = float((at_once - one_by_one).abs().max())
    print(f"\nprior trajectories, SEQ against PARA, same noise: largest difference {difference:.1e}")
    texts = {
        name: model.generate(num_return_sequences=64, max_new_tokens=times, do_sample=True, seed=0, sequential=flag)
        for name, flag in (("PARA", False), ("SEQ", True))
    }
    print(f"64 texts of the prior, tokens that agree: {float((texts['PARA'] == texts['SEQ']).float().mean()):.4f}")
    if options.plot is not None:
        draw(options.plot, expected, found, of_mean, names, power / variance, kls.mean(0), scale, rows_of)


def draw(path, expected, found, of_mean, names, power, kl, scale, told_of) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    first, second, third = figure.subplots(1, 3)
    for name, values, style in (("prior", expected, "k-"), ("z ~ q", found, "C0o-"), ("mean of q", of_mean, "C1.--")):
        first.plot(range(len(LAGS)), values.mean(0).tolist(), style, label=name)
    first.set_xticks(range(len(LAGS)), LAGS)
    first.set(xlabel="lag, tokens", title="Autocorrelation, mean of dimensions")
    first.legend(frameon=False)
    image = second.imshow(
        power[:, kl.argsort(descending=True)].T.clamp_min(1e-4).log10(), aspect="auto", cmap="viridis"
    )
    second.set_xticks(range(len(names)), names, rotation=45)
    second.set(xlabel="period, tokens", ylabel="dimension, by KL", title="Power of the mean, log10 of prior variance")
    figure.colorbar(image, ax=second)
    for name, values in told_of:
        third.plot(AHEAD, values, "o-", label=name)
    third.set(xlabel="k", ylabel="nats", title="Nats of token t + k that a linear map tells")
    third.set_xticks(AHEAD)
    third.set_ylim(top=1.3 * third.get_ylim()[1])  # room for the legend
    third.legend(frameon=False, loc="upper left", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
