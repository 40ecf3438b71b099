"""What the latents of a corpus say together: active units, information, KL of each number, the aggregate posterior.

Over N texts, each equally likely, q(z) = (1/N) Σ_j q(z | x_j) is the aggregate posterior, and

    E_x KL(q(z | x) ‖ p(z)) = I(x; z) + KL(q(z) ‖ p(z))        (Hoffman and Johnson 2016)

so a KL is spent on telling texts apart (I) or lost where q(z) is not the prior that samples are drawn from.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.distributions import Distribution

from latentlm.distributions import GaussianProcess, kl_per_dimension, select_rows
from latentlm.processes import gather_rows

#: texts that `mutual_information_per_batch` compares at a time
MUTUAL_INFORMATION_BATCH = 32
_NAMES = (
    "active_units",
    "latent_units",
    "latent_sequences",
    "mutual_information",
    "mutual_information_sequences",
    "mutual_information_per_batch",
    "mutual_information_batch",
    "kl_per_dimension",
    "aggregate_kl",
    "aggregate_mean_rms",
    "aggregate_variance_ratio",
)


class LatentStatistics:
    """The statistics of latents, and what inference cost, gathered batch by batch and over all processes.

    Args:
        length: trajectories of texts of so many tokens are compared, and others left out; None compares none that
            differ in length.
    """

    def __init__(self, length: int | None = None) -> None:
        self.length = length
        self.count = 0
        self.inference_seconds = 0.0
        self.comparable = True
        # of each latent number, over texts: its posterior mean in prior standard deviations, the square of that, its
        # posterior variance in prior variances
        self.sums = torch.zeros(3, 0, dtype=torch.double)
        # of each dimension: a trajectory has one KL for all of its times
        self.kl = torch.zeros((), dtype=torch.double)
        self.compared: list[tuple[Distribution, Tensor, Tensor, Tensor]] = []

    def add(
        self,
        posterior: Distribution,
        prior: Distribution,
        latents: Float[Tensor, "batch *event"],
        places: Int64[Tensor, " batch"] | None = None,
    ) -> None:
        """Takes in a batch: q, p and one z ~ q of each row.

        Args:
            places: of each row in the order in which texts are compared, −1 for one that is not; by default all are, in
                the order in which they come.
        """
        if places is None:
            places = torch.arange(self.count, self.count + len(latents), device=latents.device)
        if isinstance(prior, GaussianProcess):
            lengths, times = prior.row_lengths(len(latents)), latents.shape[1]
            if self.length is None:
                self.comparable &= bool((lengths == times).all())
            elif times != self.length or not bool((lengths == times).any()):
                return
            elif not bool((whole := lengths == times).all()):
                posterior, prior = select_rows(posterior, whole), select_rows(prior, whole)
                latents, places = latents[whole], places[whole]
        mean = posterior.mean.double()
        if not self.count:
            self.sums = mean.new_zeros(3, *mean.shape[1:])
        if not self.comparable or mean.shape[1:] != self.sums.shape[1:]:
            self.comparable = False
            return
        self.count += len(mean)
        prior_variance = prior.variance.double()
        mean = (mean - prior.mean.double()) / prior_variance.sqrt()
        variance = posterior.variance.double() / prior_variance
        self.sums = self.sums + torch.stack([mean, mean.square(), variance]).sum(1)
        self.kl = self.kl + _kl_per_dimension(posterior, prior).flatten(1).sum(0)
        rows = places >= 0
        if bool(rows.any()):
            log_prior = prior.log_prob(latents).double()
            self.compared.append((select_rows(posterior, rows), latents[rows], log_prior[rows], places[rows]))

    def summary(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The figures over the batches of all processes; None each where latents differ in shape.

        Returns:
            Over the `latent_sequences` texts, all or those of one length: `latent_units`, the numbers in a latent;
            `active_units`, those with Var_x E_q[z] > 0.01 × prior variance (Burda et al. 2016, section 5.1);
            `kl_per_dimension`, the mean KL of each in nats, in the order of the flattened latent (of a trajectory, of
            each dimension over all times), None where q or p does not factorise; `aggregate_mean_rms`, the root mean
            square over numbers of E_q(z)[z] − prior mean, in prior standard deviations, and `aggregate_variance_ratio`,
            the mean over numbers of Var_q(z)[z] ÷ prior variance, which are 0 and 1 where q(z) = p(z) (and for a latent
            of no numbers). Over the `mutual_information_sequences` texts compared, in nats: `mutual_information`,
            `mutual_information_per_batch` of `mutual_information_batch` texts, `aggregate_kl`.
        """
        # a process without a batch knows no shape, and one with several knows that there is none
        of_process = -1 if not self.comparable else self.sums[0].numel() if self.count else None
        known = torch.tensor([] if of_process is None else [of_process], dtype=torch.long, device=device)
        numbers = gather_rows(known).unique().tolist()
        if len(numbers) != 1 or numbers[0] < 0:
            return dict.fromkeys(_NAMES)
        units = numbers[0]
        dimensions = int(gather_rows(torch.tensor([self.kl.numel() if self.count else 0], device=device)).max())
        own = torch.zeros(0, 1 + 3 * units + dimensions, dtype=torch.double, device=device)
        if self.count:
            own = torch.cat([self.sums.new_tensor([self.count]), self.sums.flatten(), self.kl])[None]
        total = gather_rows(own).sum(0)
        mean, square, variance = (total[1 : 1 + 3 * units] / total[0]).view(3, units)
        kl = total[1 + 3 * units :] / total[0]
        variance_of_mean = square - mean.square()
        log_q, log_prior = self._densities(units, device)
        return {
            "active_units": int((variance_of_mean > 0.01).sum()),
            "latent_units": units,
            "latent_sequences": int(total[0]),
            "mutual_information": mutual_information(log_q),
            "mutual_information_sequences": len(log_q),
            "mutual_information_per_batch": mutual_information_per_batch(log_q, MUTUAL_INFORMATION_BATCH),
            "mutual_information_batch": min(MUTUAL_INFORMATION_BATCH, len(log_q)),
            "kl_per_dimension": None if bool(kl.isnan().any()) else kl.tolist(),
            "aggregate_kl": aggregate_kl(log_q, log_prior),
            "aggregate_mean_rms": float(mean.square().mean().sqrt()) if units else 0.0,
            "aggregate_variance_ratio": float((variance + variance_of_mean).mean()) if units else 1.0,
        }

    def _densities(
        self, units: int, device: torch.device | str
    ) -> tuple[Float64[Tensor, "texts texts"], Float64[Tensor, " texts"]]:
        """log q(z_i | x_j) in row j and column i, and log p(z_i); in the order of the texts' places."""
        posteriors, latents, log_priors, places = zip(*self.compared, strict=True) if self.compared else ((),) * 4
        nothing = torch.zeros(0, dtype=torch.double, device=device)
        log_prior = gather_rows(torch.cat([nothing, *log_priors]))
        order = gather_rows(torch.cat([nothing.long(), *places])).argsort()
        log_q = log_densities(posteriors, latents, units, device)
        return log_q[order][:, order], log_prior[order]


def _kl_per_dimension(posterior: Distribution, prior: Distribution) -> Float64[Tensor, "batch *dimensions"]:
    """NaN where a KL has no parts that belong to numbers, or of a trajectory to dimensions."""
    nothing = torch.full((posterior.batch_shape[0], 1), math.nan, dtype=torch.double, device=posterior.mean.device)
    try:
        kl = kl_per_dimension(posterior, prior).double()
    except TypeError:
        return nothing
    return kl if isinstance(prior, GaussianProcess) or kl.shape == posterior.mean.shape else nothing


def log_densities(
    posteriors: Sequence[Distribution],
    latents: Sequence[Float[Tensor, "_ *event"]],
    units: int,
    device: torch.device | str = "cpu",
) -> Float64[Tensor, "texts texts"]:
    """log q(z_i | x_j) in nats, row j for a text x_j and column i for a latent z_i ~ q(z | x_i), of all processes.

    Args:
        posteriors, latents: batches of q(z | x) and of one z from each row; of several processes, each gives its own.
        units: numbers in a latent.
    """
    own = torch.cat([torch.zeros(0, units, device=device), *(z.flatten(1) for z in latents)])
    every = gather_rows(own)
    # a row for each of this process' texts, a column for each latent of all processes
    densities = torch.zeros(0, len(every), dtype=torch.double, device=device)
    for posterior, z in zip(posteriors, latents, strict=True):
        columns = [posterior.log_prob(one.view(z.shape[1:]).expand(z.shape)).double() for one in every]
        densities = torch.cat([densities, torch.stack(columns, dim=1)])
    return gather_rows(densities)


def mutual_information(log_q: Float64[Tensor, "texts texts"]) -> float:
    """I(x; z) in nats between N texts, each equally likely, and a latent drawn from its posterior.

    I = (1/N) Σ_i [log q(z_i | x_i) − log (1/N) Σ_j q(z_i | x_j)], z_i ~ q(z | x_i) (Hoffman and Johnson 2016). It
    cannot exceed ln N.

    Args:
        log_q: `log_densities`.
    """
    information = log_q.diagonal() - log_q.logsumexp(0) + math.log(len(log_q))
    return float(information.mean())


def mutual_information_per_batch(log_q: Float64[Tensor, "texts texts"], batch: int) -> float:
    """The literature's estimate: `mutual_information` within each batch, and its mean over texts, in nats.

    He et al. 2019 (their `calc_mi`); Dieng et al. 2019. It cannot exceed ln `batch`, so that figures of
    different batches are not to be compared. They take E_q log q(z | x) in closed form, here it is taken at the same
    sample as log q(z), which has the same expectation and less noise.

    Args:
        log_q: `log_densities`; a batch is `batch` neighbours in its order, the last one may be smaller.
    """
    parts = [slice(first, first + batch) for first in range(0, len(log_q), batch)]
    blocks = [log_q[part, part] for part in parts]
    return math.fsum(len(block) * mutual_information(block) for block in blocks) / len(log_q)


def aggregate_kl(log_q: Float64[Tensor, "texts texts"], log_prior: Float64[Tensor, " texts"]) -> float:
    """KL(q(z) ‖ p(z)) in nats, q(z) the mixture of the N texts' posteriors (Hoffman and Johnson 2016).

    (1/N) Σ_i [log q(z_i) − log p(z_i)], z_i ~ q(z | x_i). As their information cannot exceed ln N, N texts of an
    informative posterior leave at least their mean KL − ln N here, however close all texts together are to the prior.

    Args:
        log_q: `log_densities`.
        log_prior: log p(z_i).
    """
    return float((log_q.logsumexp(0) - math.log(len(log_q)) - log_prior).mean())
