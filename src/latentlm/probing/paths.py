"""Ways from one latent to another."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentlm.distributions import GaussianProcess


def linear(
    a: Float[np.ndarray, " *event"], b: Float[np.ndarray, " *event"], share: float
) -> Float[np.ndarray, " *event"]:
    """(1 − s) a + s b."""
    return (1 - share) * a + share * b


def spherical(
    a: Float[np.ndarray, " *event"], b: Float[np.ndarray, " *event"], share: float
) -> Float[np.ndarray, " *event"]:
    """The direction turns evenly from a's to b's in the plane of both (Shoemake 1985, slerp), and the norm
    goes evenly from the one to the other (White 2016, arXiv 1609.04468, has it for latents of a Gaussian prior).

    Opposite vectors leave the plane open: the way is over the axis that is the most across. Where there is no direction
    (a vector of zeros) or no way around (one dimension), and for parallel vectors, it is the straight line.
    """
    if share in (0.0, 1.0):
        return a if share == 0 else b
    first, last = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not first or not last:
        return linear(a, b, share)
    u, v = a / first, b / last
    # of nearly parallel or opposite vectors, the arc cosine of their product would know half of the digits
    angle = 2 * math.atan2(float(np.linalg.norm(u - v)), float(np.linalg.norm(u + v)))
    across = v - float((u * v).sum()) * u
    if np.linalg.norm(across) < 1e-6:
        if angle < 1:
            return linear(a, b, share)
        axis = np.zeros(a.size)
        axis[np.abs(u).argmin()] = 1.0
        across = axis.reshape(a.shape) - u.reshape(-1)[np.abs(u).argmin()] * u
        if np.linalg.norm(across) < 1e-6:
            return linear(a, b, share)
    across = across / np.linalg.norm(across)
    norm = (1 - share) * first + share * last
    return norm * (math.cos(share * angle) * u + math.sin(share * angle) * across)


@torch.no_grad()
def bridge(
    process: GaussianProcess, begin: Float[Tensor, "begun dim"], end: Float[Tensor, "ended dim"]
) -> Float[Tensor, "T dim"]:
    """A trajectory that begins and ends as given, and between them is the mean of the process given both: K_uo (K_oo +
    nugget)⁻¹ z_o for the times u between and the others o (Rasmussen and Williams 2006, equation 2.23).

    Args:
        process: at T times, no fewer than begin and end have together.
    """
    times, total = process.times, len(process.times)
    known = torch.ones(total, dtype=torch.bool, device=times.device)
    known[len(begin) : total - len(end)] = False
    given = torch.cat((begin, end)).to(times)
    values = times.new_zeros(total, process.dim)
    values[known] = given
    if not bool(known.any()) or bool(known.all()):
        return values
    covariance = process.kernel(times[:, None] - times[None]).expand(process.groups, -1, -1)
    # what is independent from time to time tells nothing of other times
    observed = covariance[:, known][:, :, known] + torch.diag_embed(process.noise(process.groups)[:, known])
    grouped = given.unflatten(-1, (process.groups, -1)).transpose(0, 1)
    mean = covariance[:, ~known][:, :, known] @ torch.linalg.solve(observed, grouped)
    values[~known] = mean.transpose(0, 1).flatten(1)
    return values
