"""What a trajectory holds, where each token has its latent (GP-VAE): time scales beside the prior's, and the text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from latentlm.distributions import GaussianProcess, Stream, kl_per_dimension, sequence_keys
from latentlm.errors import InputError
from latentlm.evaluation.batches import evaluating
from latentlm.latent_lm import LatentLM
from latentlm.probing.result import Draw, ProbeResult
from latentlm.probing.space import LatentSpace
from latentlm.probing.texts import Texts

LAGS = (0, 1, 2, 4, 8, 16, 32)
REACHES = (8, 4, 2, 1)
LEAST = 3  # of which two are fitted and one is held out


def trajectory(
    space: LatentSpace,
    texts: Texts,
    *,
    length: int | None = None,
    most: int = 300,
    frequent: int = 200,
    seed: int = 0,
) -> ProbeResult:
    """What trajectories hold: autocorrelation and power beside the prior's, and what z_t tells of the tokens near t.

    Example: latentlm probe trajectory MODEL --data texts.txt (a GP-VAE, or another model of a latent for each token)

    Args:
        length: texts of at least so many tokens are cut to that, and shorter ones left out; by default the length that
            keeps the most tokens.
        most: texts, the first that are as long; fewer where there are fewer.
        frequent: tokens that are told apart, the most frequent; all others are one.
        seed: of the samples and of the shuffled texts.
    """
    if not space.model.latent_per_token:
        raise InputError(
            f"{type(space.model).__name__} has no latent for each token: this probe is for models such as GP-VAE."
        )
    if (length is not None and length < 1) or frequent < 1:
        raise InputError(f"length and frequent must be at least 1, not {length} and {frequent}.")
    blocks = blocks_of(space, texts, length)
    if len(blocks) < LEAST:
        raise InputError(
            f"trajectories need at least {LEAST} texts of {blocks.shape[1] - 1} tokens or more, and there are "
            f"{len(blocks)}: give more texts, or a smaller length."
        )
    left_out = len(texts) - len(blocks)
    result = of_blocks(
        space.model, blocks[: max(most, LEAST)], frequent=frequent, seed=seed, batch_size=space.batch_size
    )
    about = f"Texts are cut to the same length before they are inferred; {left_out:,} of {len(texts):,} are shorter. "
    return ProbeResult("trajectory", about + result.about, result.table, result.details, result.panels)


def blocks_of(space: LatentSpace, texts: Texts, length: int | None = None) -> Int64[Tensor, "texts time"]:
    """BOS x_1 … x_length of each text that has so many tokens, in the texts' order; the length as in `trajectory`."""
    found: list[tuple[int, Tensor]] = []
    for indices, input_ids, attention_mask, _ in space.batches(texts):
        lengths = space.model.scored_tokens(input_ids, attention_mask).sum(1).tolist()
        found += [(index, ids[: n + 1]) for index, ids, n in zip(indices, input_ids, lengths, strict=True)]
    rows = [ids for _, ids in sorted(found, key=lambda one: one[0])]
    if length is None:
        sizes = sorted((len(ids) - 1 for ids in rows), reverse=True)
        length = max(sizes, key=lambda size: size * sum(other >= size for other in sizes))
    whole = [ids[: length + 1] for ids in rows if len(ids) > length]
    return torch.stack(whole) if whole else torch.zeros(0, length + 1, dtype=torch.long)


@dataclass
class Posteriors:
    """Of each text: means and a sample of q(z | x), and the KL of each dimension in nats."""

    means: Float[Tensor, "texts time dim"]
    samples: Float[Tensor, "texts time dim"]
    kl: Float[Tensor, "texts dim"]


def of_blocks(
    model: LatentLM,
    blocks: Int64[Tensor, "texts time"],
    *,
    frequent: int = 200,
    seed: int = 0,
    batch_size: int = 32,
) -> ProbeResult:
    """The probe of texts of one length, `input_ids` of BOS x_1 … x_T without padding.

    Raises:
        InputError: a prior that is no Gaussian process.
    """
    blocks = blocks.to(model.device)
    number, times = len(blocks), blocks.shape[1] - 1
    with evaluating(model), torch.no_grad():
        prior = model.prior(1, times)
        if not isinstance(prior, GaussianProcess):
            raise InputError(f"the prior of a {type(model).__name__} is no Gaussian process, beside which to put z.")
        found = _posteriors(model, blocks, batch_size, seed)
        lags = [lag for lag in LAGS if lag < times]
        of_prior = prior_autocorrelation(prior, lags)
        of_samples = torch.stack([autocorrelation(found.samples, lag) for lag in lags], 1)
        of_means = torch.stack([autocorrelation(found.means, lag) for lag in lags], 1)
        variance = prior.variance[0, 0].cpu()
        names, of_mean = octaves(found.means)
        power = {"mean": of_mean / variance, "sample": octaves(found.samples)[1] / variance}
        power["prior"] = prior_octaves(prior) / variance
    near = pd.DataFrame(
        {"lag": lag, **{name: float(values[:, place].mean()) for name, values in (
            ("prior", of_prior), ("z ~ q", of_samples), ("mean of q", of_means))}}
        for place, lag in enumerate(lags)
    )  # fmt: skip
    order = found.kl.mean(0).argsort(descending=True).tolist()
    table = _by_dimension(prior, found, order, of_prior, of_samples, power)
    by_octave = pd.DataFrame(
        {"dimension": place, "octave": name, **{kind: float(values[row, place]) for kind, values in power.items()}}
        for place in order
        for row, name in enumerate(names)
    )
    ahead = _ahead(blocks, found.means, frequent, seed)
    fitted = 2 * number // 3
    about = (
        f"{number:,} texts of {times} tokens, {prior.dim} dimensions, KL(q ‖ p) {float(found.kl.sum(1).mean()):.2f} "
        "nats per text. Dimensions by their KL. Autocorrelation over time about the prior's mean, of one sample "
        "z ~ q(z | x) of each text, beside that of the prior's kernel: where all texts' posteriors together are the "
        "prior, they agree. Power: mean square over texts and times as a share of the prior's variance, in octaves of "
        "the period in tokens; of the posterior mean, of the sample, and what the prior has. Told: nats of the "
        f"token at t + k (the {frequent} most frequent, and all others as one) that a linear softmax fitted to "
        f"{fitted:,} texts tells of the other {number - fitted:,}, beyond the tokens' frequencies: of the mean of "
        "q(z_t | x), of the mean of all the text's other z, and (control) of the z_t of a text at random; below 0 "
        f"where it learned what does not hold. Seed {seed}."
    )
    details = {"autocorrelation": near, "power by octave": by_octave, "told of tokens": ahead}
    panels = _panels(near, names, power["mean"][:, order], order, ahead)
    return ProbeResult("trajectory", about, table, details, panels)


def autocorrelation(z: Float[Tensor, "texts time dim"], lag: int) -> Float[Tensor, " dim"]:
    """Of each dimension, over texts and times; the mean is the prior's, 0. NaN of a dimension that is 0 throughout."""
    product = (z[:, : z.shape[1] - lag] * z[:, lag:]).mean((0, 1))
    return product / z.square().mean((0, 1))


def prior_autocorrelation(prior: GaussianProcess, lags: Sequence[int]) -> Float64[Tensor, "dim lags"]:
    """k(lag) ÷ (k(0) + nugget), and 1 at lag 0, of each dimension."""
    kernel, nugget = _covariances(prior, lags)
    expected = kernel / (_covariances(prior, [0])[0] + nugget[:, None])
    expected[:, [place for place, lag in enumerate(lags) if lag == 0]] = 1
    return expected


def _covariances(prior: GaussianProcess, lags: Sequence[int]) -> tuple[Tensor, Tensor]:
    """k(lag) [dim, lags] and nugget [dim], without gradients."""
    at = torch.tensor(lags, dtype=torch.float64, device=prior.times.device)
    each = prior.dim // prior.groups
    kernel = prior.kernel(at).expand(prior.groups, -1).repeat_interleave(each, 0)
    return kernel.detach().cpu(), prior.nugget.detach().expand(prior.groups).repeat_interleave(each).cpu()


def octaves(z: Float[Tensor, "texts time dim"]) -> tuple[list[str], Float[Tensor, "octaves dim"]]:
    """Power of each dimension in octaves of the period, as parts of its mean square over texts and times.

    Returns:
        Names of the octaves, the periods in tokens (“constant” for what does not change over the text), and the parts.
    """
    return _octaves(torch.fft.rfft(z, dim=1).abs().square().mean(0) / z.shape[1] ** 2, z.shape[1])


def prior_octaves(prior: GaussianProcess) -> Float64[Tensor, "octaves dim"]:
    """What `octaves` of the prior's own samples are on average."""
    times = len(prior.times)
    kernel, nugget = _covariances(prior, range(times))
    kernel[:, 0] += nugget
    # E |Σ_t z_t e^(−2πi f t)|² = Σ_s c(s) (T − |s|) cos 2πfs over lags s of both signs
    counts = times - torch.arange(times, dtype=torch.float64)
    weighted = kernel * counts
    angles = 2 * math.pi * torch.outer(torch.arange(times // 2 + 1), torch.arange(times)).double() / times
    power = (2 * torch.cos(angles) @ weighted.T - weighted[:, 0]) / times**2
    return _octaves(power, times)[1]


def _octaves(power: Float[Tensor, "frequencies dim"], times: int) -> tuple[list[str], Tensor]:
    power = power.clone()
    power[1 : (times + 1) // 2] *= 2  # the negative frequencies
    names, parts = ["constant"], [power[0]]
    high = 1
    while high <= times // 2:
        parts.append(power[high : 2 * high].sum(0))
        shortest, longest = times // min(2 * high - 1, times // 2), times // high
        names.append(f"{shortest}–{longest}" if shortest < longest else str(longest))
        high *= 2
    return names, torch.stack(parts)


def told(
    features: Float[Tensor, "texts time width"], tokens: Int64[Tensor, "texts time"], classes: int, fitted: int
) -> float:
    """Nats of a token that a linear softmax of features tells, on the texts after the first `fitted`: how much its NLL
    is below that of the fitted texts' frequencies (each counted once more than it is).
    """
    x, split = features.detach().float().flatten(0, 1), fitted * features.shape[1]
    y = tokens.flatten()
    x = (x - x[:split].mean(0)) / x[:split].std(0, correction=0).clamp_min(1e-6)
    frequencies = ((torch.bincount(y[:split], minlength=classes).double() + 1) / (split + classes)).log()
    with torch.enable_grad():
        weight = torch.zeros(x.shape[1], classes, requires_grad=True)
        bias = frequencies.float().clone().requires_grad_()
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            of_tokens = torch.nn.functional.cross_entropy(x[:split] @ weight + bias, y[:split])
            value = of_tokens + 1e-4 * weight.square().sum()
            value.backward()
            return value

        optimiser.step(loss)
    with torch.no_grad():
        own = torch.nn.functional.cross_entropy(x[split:] @ weight + bias, y[split:])
    return float(-frequencies[y[split:]].mean() - own)


def _posteriors(model: LatentLM, blocks: Tensor, batch_size: int, seed: int) -> Posteriors:
    means, samples, kls = [], [], []
    for part in blocks.split(batch_size):
        q = model.infer(part, seed=seed)
        means.append(q.mean.float())
        samples.append(model.draw_latents(q, sequence_keys(part), 1, seed=seed, stream=Stream.SCORE)[0].float())
        kls.append(kl_per_dimension(q, model.prior(len(part), part.shape[1] - 1)))
    found = Posteriors(*(torch.cat(parts).cpu() for parts in (means, samples, kls)))
    if not bool(found.means.isfinite().all()):
        raise InputError("the latents of these texts are not finite: the model has diverged.")
    return found


def _by_dimension(
    prior: GaussianProcess,
    found: Posteriors,
    order: Sequence[int],
    of_prior: Tensor,
    of_samples: Tensor,
    power: dict[str, Tensor],
) -> pd.DataFrame:
    scale = getattr(prior.kernel, "log_lengthscale", None)
    each = prior.dim // prior.groups
    scales = torch.full((1,), float("nan")) if scale is None else scale.detach().cpu().double().exp()
    scales = scales.expand(prior.groups).repeat_interleave(each)
    _, nugget = _covariances(prior, [0])
    variance, kl = prior.variance[0, 0].detach().cpu(), found.kl.mean(0)
    rows = []
    for place in order:
        row = {
            "dimension": place,
            "lengthscale": float(scales[place]),
            "nugget share": float(nugget[place] / variance[place]),
            "kl per text": float(kl[place]),
        }
        if of_prior.shape[1] > 1:
            row["autocorrelation at lag 1"] = float(of_samples[place, 1])
            row["autocorrelation at lag 1, prior"] = float(of_prior[place, 1])
        rows.append(row | {f"power, {kind}": float(values[:, place].sum()) for kind, values in power.items()})
    return pd.DataFrame(rows)


def _ahead(blocks: Tensor, means: Tensor, frequent: int, seed: int) -> pd.DataFrame:
    """What z_t tells of the token at t + k, for the same places t at every k."""
    tokens, times = blocks[:, 1:].cpu(), blocks.shape[1] - 1
    counts = torch.bincount(tokens.flatten())
    chosen = counts.argsort(descending=True, stable=True)[:frequent]
    number = torch.full((len(counts),), len(chosen))
    number[chosen] = torch.arange(len(chosen))
    classes = number[tokens]
    reach = next((reach for reach in REACHES if 3 * reach <= times), 0)
    steps = [step for step in REACHES if step <= reach]
    inner = slice(reach, times - reach)
    rest = (means.sum(1, keepdim=True) - means) / max(times - 1, 1)
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(blocks)))
    features = {"of z_t": means, "of all other z": rest, "of another text's z_t": means[shuffled]}
    rows = []
    for k in [*(-step for step in steps), 0, *reversed(steps)]:
        near = classes[:, inner.start + k : inner.stop + k].contiguous()
        row: dict[str, Any] = {"k": k}
        for name, values in features.items():
            row[name] = told(values[:, inner].contiguous(), near, len(chosen) + 1, 2 * len(blocks) // 3)
        rows.append(row)
    return pd.DataFrame(rows)


def _panels(
    near: pd.DataFrame, names: Sequence[str], power: Tensor, order: Sequence[int], ahead: pd.DataFrame
) -> list[Draw]:
    def correlations(panel: Any) -> None:
        for name, style in (("prior", "k-"), ("z ~ q", "C0o-"), ("mean of q", "C1.--")):
            panel.plot(range(len(near)), near[name], style, label=name)
        panel.set_xticks(range(len(near)), near["lag"])
        panel.set(xlabel="lag, tokens", title="Autocorrelation, mean of dimensions")
        panel.legend(frameon=False)

    def periods(panel: Any) -> None:
        image = panel.imshow(power.T.clamp_min(1e-4).log10(), aspect="auto", cmap="viridis")
        panel.set_xticks(range(len(names)), names, rotation=45)
        if len(order) <= 32:
            panel.set_yticks(range(len(order)), order, fontsize=8)
        panel.set(xlabel="period, tokens", ylabel="dimension, by KL")
        panel.set_title("Power of the mean, log10 of prior variance")
        panel.figure.colorbar(image, ax=panel)

    def tokens(panel: Any) -> None:
        for name, style in (("of z_t", "C0o-"), ("of all other z", "C1o-"), ("of another text's z_t", "k:")):
            panel.plot(ahead["k"], ahead[name], style, label=name)
        panel.set_xticks(ahead["k"])
        panel.set(xlabel="k", ylabel="nats", title="Nats of token t + k that a linear map tells")
        panel.set_ylim(top=1.3 * max(panel.get_ylim()[1], 0.01))  # room for the legend
        panel.legend(frameon=False, loc="upper left", fontsize="small")

    return [correlations, periods, tokens]
