"""A training step of our GPVAE beside the same model as the published code would have it in ordinary PyTorch.

The paper's (arXiv 2512.09535): texts of 64 tokens, batch 16, vocabulary 8192, width 256, 64 latent dimensions, a
causal convolutional encoder, a posterior that is diagonal over time, an RBF prior of lengthscale 8 and nugget 1e-2,
three horizons, label smoothing, the embedding regulariser. --encoder separable (SEQ) or full (PARA). A step is forward,
backward and fused AdamW's update. Rounds take the sides in turn; medians and bests over rounds.

The other side is `Restated`: the same layers, sizes and mathematics (its encoder causal, its time in steps and the
embeddings it compares of unit mean square, as ours; its factor in float64, since float32 is wrong), with logits for all
tokens and `cross_entropy`, and so for each horizon.

    as published      the T × T factor is broadcast over the batch · latent dimensions, each solved by itself
    with one solve    they are columns of one solve, to show how much of the ratio is the Gaussian process

Asserts first that loss and gradients agree, from our weights and our noise, and prints how far apart they are, relative
to the largest number of each gradient. Peak memory is how far three steps raise the resident memory of a fresh process.

    python benchmarks/gp_vae.py [--encoder full] [--threads 1] [--rounds 15] [--json FILE]
"""

import argparse
import importlib.metadata
import math
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _report import Comparison, add_json_option, write
from torch import Tensor, nn
from torch.nn import functional as F

from latentlm import GPVAE, GPVAEConfig
from latentlm.distributions import Stream, sequence_keys, sequence_noise

WIDTH, LATENT, HORIZONS, REGULARISER, LENGTHSCALE, NUGGET = 256, 64, 3, 0.1, 8.0, 1e-2
FORMS: dict[str, dict[str, Any]] = {
    "separable": {"kernel": 3, "dilations": [1, 2, 4, 8, 16], "smoothing": 0.03, "horizon": 0.5},
    "full": {"kernel": 5, "dilations": [1, 2, 4, 8] * 3, "smoothing": 0.01, "horizon": 0.3},
}
SIDES = ("ours", "as published", "with one solve")
TARGET, AGREEMENT = 1.5, 1e-3
ADAMW = {"lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}


# ---- the same model in ordinary PyTorch: its weights have the names of ours -----------------------------------------


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class ChannelGroupNorm(nn.Module):
    """GroupNorm of each time by itself."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        times = x.transpose(1, 2)
        normal = F.group_norm(times.flatten(0, 1), self.groups, self.weight, self.bias)
        return normal.view(times.shape).transpose(1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.squeeze, self.excite = nn.Conv1d(channels, channels // 4, 1), nn.Conv1d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        until_now = x.cumsum(-1) / torch.arange(1, x.shape[-1] + 1, device=x.device)
        return x * torch.sigmoid(self.excite(F.silu(self.squeeze(until_now))))


class Block(nn.Module):
    def __init__(self, form: str, dilation: int):
        super().__init__()
        size = FORMS[form]["kernel"]
        if form == "separable":
            self.convolution: nn.Module = nn.Sequential(
                Causal(WIDTH, WIDTH, size, dilation=dilation, groups=WIDTH), nn.Conv1d(WIDTH, 2 * WIDTH, 1)
            )
            self.norm, self.gate = ChannelGroupNorm(2 * WIDTH, 8), SqueezeExcite(WIDTH)
        else:
            self.convolution = Causal(WIDTH, 2 * WIDTH, size, dilation=dilation)
            self.norm, self.gate = ChannelGroupNorm(2 * WIDTH, 1), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(F.glu(self.norm(self.convolution(x)), dim=1))


class Encoder(nn.Module):
    def __init__(self, form: str):
        super().__init__()
        self.blocks = nn.ModuleList(Block(form, dilation) for dilation in FORMS[form]["dilations"])
        self.norm = nn.LayerNorm(WIDTH)
        self.mean, self.log_variance = nn.Linear(WIDTH, LATENT), nn.Linear(WIDTH, LATENT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.transpose(1, 2))
        raised = -6 + F.softplus(self.log_variance(x) + 6)
        return self.mean(x), 2 - F.softplus(2 - raised)


class Decoder(nn.Module):
    def __init__(self, length: int):
        super().__init__()
        self.positions = nn.Embedding(length, LATENT)
        self.first, self.second = nn.Linear(LATENT, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH)])
        self.convolutions = nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, 3, padding=1)])

    def forward(self, z: Tensor) -> Tensor:
        x = self.norms[0](self.second(F.gelu(self.first(z + self.positions.weight))))
        return x + F.gelu(self.convolutions[0](x.transpose(1, 2)).transpose(1, 2))


class Prior(nn.Module):
    """RBF on a grid of steps; KL of a Gaussian that is diagonal over time."""

    def __init__(self) -> None:
        super().__init__()
        self.log_lengthscale, self.log_variance = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def kl(self, mean: Tensor, log_variance: Tensor, log_nugget: Tensor, one_solve: bool) -> Tensor:
        batch, length, size = mean.shape
        times = torch.arange(length, dtype=torch.float64, device=mean.device)
        lags = (times[:, None] - times) / self.log_lengthscale.double().exp()
        covariance = self.log_variance.double().exp() * (-0.5 * lags.square()).exp()
        factor = torch.linalg.cholesky(covariance + log_nugget.double().exp() * torch.eye(length, device=mean.device))
        if one_solve:
            columns = mean.double().transpose(0, 1).flatten(1)
            quadratic = (columns * torch.cholesky_solve(columns, factor)).sum()
        else:
            columns = mean.double().transpose(1, 2).reshape(batch * size, length, 1)
            quadratic = (columns * torch.cholesky_solve(columns, factor.expand(batch * size, -1, -1))).sum()
        log_determinant = 2 * factor.diagonal().log().sum()
        trace = (torch.cholesky_inverse(factor).diagonal()[:, None] * log_variance.double().exp()).sum()
        rest = batch * size * (log_determinant - length) - log_variance.double().sum()
        return (0.5 * (trace + quadratic + rest)).float()


class Restated(nn.Module):
    def __init__(self, form: str, vocabulary: int, length: int, one_solve: bool):
        super().__init__()
        self.form, self.one_solve = form, one_solve
        self.embed_tokens = nn.Embedding(vocabulary, WIDTH)
        self.kernel, self.log_nugget = Prior(), nn.Parameter(torch.zeros(1))
        self.encoder, self.decoder = Encoder(form), Decoder(length)
        self.horizons = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(HORIZONS))

    def forward(self, tokens: Tensor, noise: Tensor | None = None) -> Tensor:
        """What is trained on, in nats per token."""
        embedded = math.sqrt(WIDTH) * F.normalize(self.embed_tokens(tokens), dim=-1)
        mean, log_variance = self.encoder(embedded)
        noise = torch.randn_like(mean) if noise is None else noise
        states = self.decoder(mean + (0.5 * log_variance).exp() * noise)
        words = F.normalize(self.embed_tokens.weight, dim=-1)
        logits, smoothing = states @ words.T, FORMS[self.form]["smoothing"]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum", label_smoothing=smoothing)
        for ahead, horizon in enumerate(self.horizons, start=1):
            logits, later = horizon(states[:, :-ahead]) @ words.T, tokens[:, ahead:]
            loss_ahead = F.cross_entropy(logits.flatten(0, 1), later.flatten(), reduction="sum")
            loss = loss + FORMS[self.form]["horizon"] / ahead * loss_ahead
        distance = 1 - F.cosine_similarity(states, embedded, dim=-1) + (states - embedded).square().mean(-1)
        loss = loss + REGULARISER * distance.sum()
        kl = self.kernel.kl(mean, log_variance, self.log_nugget, self.one_solve)
        return (loss + kl) / tokens.numel()


# ---- both sides -----------------------------------------------------------------------------------------------------


def our_model(form: str, vocabulary: int, length: int) -> Any:
    torch.manual_seed(0)
    setting = FORMS[form]
    config = GPVAEConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        latent_size=LATENT,
        max_position_embeddings=length,
        posterior="diagonal",
        kernel_lengthscale=LENGTHSCALE,
        kernel_nugget=NUGGET,
        encoder_type=form,
        encoder_kernel_size=setting["kernel"],
        encoder_dilations=setting["dilations"],
        label_smoothing=setting["smoothing"],
        horizons=HORIZONS,
        horizon_weight=setting["horizon"],
        embedding_regulariser=REGULARISER,
        bos_token_id=0,
        pad_token_id=0,
    )
    return GPVAE(config).train()


def made(side: str, form: str, vocabulary: int, length: int) -> nn.Module:
    ours = our_model(form, vocabulary, length)
    if side == "ours":
        return ours
    model = Restated(form, vocabulary, length, side == "with one solve")
    model.load_state_dict({name: ours.state_dict()[name] for name in model.state_dict()})
    assert dict(model.named_parameters()).keys() == dict(ours.named_parameters()).keys()
    return model


def texts(batch: int, vocabulary: int, length: int) -> Tensor:
    """BOS x_1 … x_T."""
    input_ids = torch.randint(1, vocabulary, (batch, 1 + length), generator=torch.Generator().manual_seed(1))
    input_ids[:, 0] = 0
    return input_ids


def loss_of(side: str, model: Any, input_ids: Tensor) -> Tensor:
    return model(input_ids).loss if side == "ours" else model(input_ids[:, 1:])


def training_step(side: str, model: nn.Module, optimizer: torch.optim.Optimizer, input_ids: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(side, model, input_ids).backward()
    optimizer.step()


def assert_agreement(models: dict[str, Any], input_ids: Tensor) -> dict[str, float]:
    """The largest relative differences in the loss and in each gradient between ours and each of the others."""
    found, ours, tokens = {}, models["ours"], input_ids[:, 1:]
    output = ours(input_ids, seed=3)
    ours.zero_grad()
    output.loss.backward()
    with torch.no_grad():  # what is charged beside the ELBO has gradients alone in our loss
        beside = ours.likelihood_for_training(output.latents.detach(), input_ids)[1].sum()
        smoothed = float(output.loss.detach()) + float(beside) / tokens.numel()
    noise = sequence_noise(sequence_keys(input_ids), output.latents.shape[1:], seed=3, stream=Stream.SCORE)
    for side in SIDES[1:]:
        models[side].zero_grad()
        loss = models[side](tokens, noise)
        loss.backward()
        theirs = dict(models[side].named_parameters())
        apart = {
            name: float((ours_one.grad - theirs[name].grad).abs().max() / theirs[name].grad.abs().max())
            for name, ours_one in ours.named_parameters()
        }
        worst = max(apart, key=apart.__getitem__)
        found[f"loss, {side}"] = abs(smoothed / float(loss.detach()) - 1)
        found[f"gradients, {side} (most in {worst})"] = apart[worst]
    assert max(found.values()) < AGREEMENT, found
    return found


def megabytes(side: str, given: argparse.Namespace) -> float:
    """By which three steps raise the memory of this process."""
    torch.set_num_threads(given.threads)
    small = (made(side, given.encoder, 64, 8), texts(2, 64, 8))
    loss_of(side, *small).backward()  # what the first step of anything loads
    model = made(side, given.encoder, given.vocabulary, given.length)
    input_ids = texts(given.batch, given.vocabulary, given.length)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak so far
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for _ in range(3):
        training_step(side, model, optimizer, input_ids)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 0.001024 * int(status.split(f"{field}:")[1].split()[0])


def seconds(models: dict[str, nn.Module], input_ids: Tensor, rounds: int) -> dict[str, list[float]]:
    optimizers = {side: torch.optim.AdamW(model.parameters(), **ADAMW) for side, model in models.items()}
    times: dict[str, list[float]] = {side: [] for side in models}
    for turn in range(-1, rounds):  # the first round warms up
        for side in SIDES if turn % 2 else reversed(SIDES):
            begun = time.perf_counter()
            training_step(side, models[side], optimizers[side], input_ids)
            if turn >= 0:
                times[side].append(time.perf_counter() - begun)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=tuple(FORMS), default="separable")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="no memory, which takes fresh processes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=8192)
    add_json_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch_version = importlib.metadata.version("torch")
    print(
        f"{given.encoder} encoder, {given.batch} texts of {given.length} tokens, vocabulary {given.vocabulary}, "
        f"width {WIDTH}, {LATENT} latent dimensions; cpu, {given.threads} threads, {given.rounds} rounds; "
        f"torch {torch_version}",
        flush=True,
    )
    models = {side: made(side, given.encoder, given.vocabulary, given.length) for side in SIDES}
    input_ids = texts(given.batch, given.vocabulary, given.length)
    agreement = assert_agreement(models, input_ids)
    for name, apart in agreement.items():
        print(f"apart in {name}: {apart:.1e}")
    times = seconds(models, input_ids, given.rounds)
    median, best, peak = {}, {}, {}
    for side in SIDES:
        median[side], best[f"best, {side}, s"] = statistics.median(times[side]), min(times[side])
    for side in () if given.small else SIDES:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            peak[side] = fresh.apply(megabytes, (side, given))
    step, comparisons = f"training step, {given.encoder} encoder", []
    for side, target in (("as published", TARGET), ("with one solve", None)):
        comparisons.append(Comparison.of_costs(step, median["ours"], median[side], "s", side, target))
    if peak:
        peaks = peak["ours"], peak["as published"]
        comparisons.append(Comparison.of_costs(f"peak memory, {given.encoder} encoder", *peaks, "MB", "as published"))
    for one in comparisons:
        print(one.line)
    write(given.json, vars(given), comparisons, best, agreement)


if __name__ == "__main__":
    main()
