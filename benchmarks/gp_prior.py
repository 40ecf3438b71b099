"""The algebra of a Gaussian-process prior: KL with gradients, and sampling step by step; gpytorch beside it.

Batch 16, 64 latent dimensions that share a kernel, a diagonal Gaussian q for each row and dimension.

KL: value and gradients in q's mean and log-variance and in lengthscale, variance and nugget, with the factorisation;
T = 1024 under an RBF (ours: Toeplitz) and a Matérn 3/2 (ours: state space), T = 16,384 by state space. gpytorch's
`kl_divergence` (version printed) by Cholesky (`fast_computations(False, False, False)`) takes the root of q's
covariance as so many right-hand sides as there are times, so it has one dimension of the 64, and so do we beside it;
asserts that both agree. Peak memory is how far the process' resident memory rises, each size in a fresh process.

SEQ: 1024 times of batch 8, one after another, after one factorisation; asserts that it is the block's trajectory.

    pip install gpytorch
    python benchmarks/gp_prior.py [--threads 4] [--rounds 5] [--json FILE]
"""

import argparse
import importlib.metadata
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _report import Comparison, add_json_option, write
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from latentlm.distributions import RBF, GaussianProcess, Kernel, Matern

BATCH, DIMS, NUGGET, LENGTHSCALE = 16, 64, 0.01, 8.0
SECONDS = {"rbf, T = 1024": 0.15, "matern, T = 1024": 0.15, "matern, T = 16384": 3.0}
MEGABYTES, GROWTH, SEQ_SECONDS = 300, 20, 0.1


def kernel_of(name: str) -> Kernel:
    return RBF(LENGTHSCALE) if name.startswith("rbf") else Matern(1.5, LENGTHSCALE)


def our_kl(name: str, length: int, dims: int) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    kernel, times = kernel_of(name), torch.arange(length).double()
    nugget = torch.tensor(NUGGET, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    mean = torch.randn(BATCH, length, dims).requires_grad_()
    log_variance = torch.randn(BATCH, length, dims).requires_grad_()

    def run() -> tuple[Tensor, list[Tensor]]:
        lengths = torch.full((BATCH,), length)
        prior = GaussianProcess(kernel, times, dims, nugget, lengths=lengths)
        posterior = Independent(Normal(mean, (0.5 * log_variance).exp()), 2)
        kl = kl_divergence(posterior, prior)
        parameters = [mean, log_variance, *kernel.parameters(), nugget]
        return kl.detach(), list(torch.autograd.grad(kl.sum(), parameters))

    return run


def gpytorch_kl(name: str, length: int) -> Callable[[], Tensor]:
    import gpytorch
    from linear_operator.operators import DiagLinearOperator

    base = gpytorch.kernels.RBFKernel() if name.startswith("rbf") else gpytorch.kernels.MaternKernel(nu=1.5)
    kernel = gpytorch.kernels.ScaleKernel(base).double()
    kernel.outputscale = torch.ones(1).double()
    base.lengthscale = torch.full((1,), LENGTHSCALE).double()
    times = torch.arange(length).double()[:, None]
    torch.manual_seed(0)
    mean = torch.randn(BATCH, length, 1).double()[..., 0].requires_grad_()
    log_variance = torch.randn(BATCH, length, 1).double()[..., 0].requires_grad_()
    nugget = torch.tensor(NUGGET, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        with gpytorch.settings.fast_computations(False, False, False):
            covariance = kernel(times).add_jitter(0.0) + DiagLinearOperator(nugget.expand(length))
            prior = gpytorch.distributions.MultivariateNormal(torch.zeros(length).double(), covariance)
            posterior = gpytorch.distributions.MultivariateNormal(mean, DiagLinearOperator(log_variance.exp()))
            kl = kl_divergence(posterior, prior.expand((BATCH,)))
            torch.autograd.grad(kl.sum(), [mean, log_variance, *kernel.parameters(), nugget])
        return kl.detach()

    return run


def seconds(function: Callable[[], Any], rounds: int) -> float:
    function()
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def in_fresh_process(name: str, length: int, dims: int, rounds: int, threads: int) -> tuple[float, float]:
    """Median seconds of a KL with its gradients, and the megabytes by which the process' peak memory rose."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (name, length, dims, rounds, threads))


def _measure(name: str, length: int, dims: int, rounds: int, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    our_kl(name, 64, 1)()  # what the first call of anything loads
    function = our_kl(name, length, dims)
    before = _resident()
    function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return seconds(function, rounds), peak


def _resident() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def sequential(rounds: int) -> dict[str, float]:
    found = {}
    for name in ("rbf", "matern"):
        process = GaussianProcess(kernel_of(name), torch.arange(1024).double(), DIMS, NUGGET)
        noise = torch.randn(8, 1024, DIMS)
        with torch.no_grad():
            block = process.color(noise)
            steps = torch.stack(list(process.steps(noise)), 1)
            assert float((steps - block).abs().max()) < 1e-4
            found[name] = seconds(lambda: list(process.steps(noise)), rounds)  # noqa: B023
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="beside gpytorch alone, for one kernel")
    add_json_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    figures: dict[str, Any] = {}
    agreement, comparisons = {}, []
    versions = {name: importlib.metadata.version(name) for name in ("torch", "gpytorch")}
    setting = f"batch {BATCH}, {DIMS} dimensions, cpu, {given.threads} threads, {given.rounds} rounds"
    print(f"{setting}; {versions}", flush=True)
    for name, target in () if given.small else SECONDS.items():
        length = int(name.split("= ")[1])
        taken, peak = in_fresh_process(name, length, DIMS, given.rounds, given.threads)
        figures[name] = {"seconds": taken, "megabytes": peak}
        memory = f"{peak:.0f} MB" + (f" (target {MEGABYTES})" if length == 1024 else "")
        print(f"KL and gradients, {name}: {taken:.3f} s (target {target}), {memory}")
    if not given.small:
        growth = figures["matern, T = 16384"]["seconds"] / figures["matern, T = 1024"]["seconds"]
        figures["growth"] = growth
        print(f"state space, from T = 1024 to 16,384: {growth:.1f} times (target {GROWTH})")
    for name in ("rbf",) if given.small else ("rbf", "matern"):
        ours, theirs = our_kl(name, 1024, 1), gpytorch_kl(name, 1024)
        error = float((ours()[0] / theirs() - 1).abs().max())
        assert error < 1e-5, error  # ours takes float32 means and variances
        pair = seconds(ours, given.rounds), seconds(theirs, 1)
        agreement[name] = error
        what = f"KL and gradients, {name}, T = 1024, one dimension"
        comparisons.append(Comparison.of_costs(what, *pair, "s", "gpytorch"))
        print(f"{comparisons[-1].line}; {error:.0e} apart")
    for name, taken in () if given.small else sequential(given.rounds).items():
        figures[f"SEQ, {name}"] = taken
        print(f"SEQ, {name}: 1024 steps of batch 8 in {taken:.3f} s (target {SEQ_SECONDS})")
    write(given.json, vars(given), comparisons, figures, agreement)


if __name__ == "__main__":
    main()
