"""Diagonal Gaussians over a latent tensor, and the few verbs that every distribution over latents answers here."""

from functools import singledispatch

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from latentlm.errors import DivergedError

_NOT_FINITE = "the latents' mean or variance is no longer a finite number"


def diagonal_gaussian(mean: Float[Tensor, "batch *event"], log_variance: Float[Tensor, "batch *event"]) -> Independent:
    """N(mean, exp(log_variance)) with every dimension after the first in the event; float32 whatever comes in.

    Raises:
        DivergedError: a mean that is not finite, or a variance that float32 cannot hold: something has diverged. Asked
            on a CPU alone: elsewhere it would wait for the device, in every step of an inference.
    """
    validate = None if mean.device.type == "cpu" else False
    try:
        normal = Normal(mean.float(), (0.5 * log_variance.float()).exp(), validate_args=validate)
        return Independent(normal, mean.dim() - 1)
    except ValueError as error:
        raise DivergedError(_NOT_FINITE) from error


def check_finite(mean: Float[Tensor, "batch *event"], log_variance: Float[Tensor, "batch *event"]) -> None:
    """Raises DivergedError unless both are finite. It waits for the device: once for an inference, and in no step."""
    if not bool((mean.isfinite() & log_variance.isfinite()).all()):
        raise DivergedError(_NOT_FINITE)


def standard_normal(batch_size: int, event_shape: tuple[int, ...], device: torch.device | str = "cpu") -> Independent:
    """N(0, I) over latents of `event_shape`, one for each of `batch_size` sequences."""
    zeros = torch.zeros(batch_size, *event_shape, device=device)
    return diagonal_gaussian(zeros, zeros)


@singledispatch
def sample_from_noise(
    distribution: Distribution, noise: Float[Tensor, "batch *event"]
) -> Float[Tensor, "batch *event"]:
    """The distribution's reparameterised sample for given standard normal noise of the event's shape.

    A family whose posterior is of another kind registers its own transform with `sample_from_noise.register`.
    """
    raise TypeError(f"no transform from noise to {type(distribution).__name__} is registered with sample_from_noise")


@sample_from_noise.register
def _(distribution: Independent, noise: Tensor) -> Tensor:
    if not isinstance(distribution.base_dist, Normal):
        raise TypeError(
            f"no transform from noise to independent {type(distribution.base_dist).__name__}s is registered"
        )
    return distribution.base_dist.loc + distribution.base_dist.scale * noise


@singledispatch
def noise_shape(distribution: Distribution) -> tuple[int, ...]:
    """Of the noise that `sample_from_noise` takes for one row; the event's unless a distribution registers another."""
    return tuple(distribution.event_shape)


@singledispatch
def select_rows(distribution: Distribution, rows: Bool[Tensor, " batch"]) -> Distribution:
    """The distribution of some rows of a batch; register another kind with `select_rows.register`."""
    raise TypeError(f"no way to select rows of {type(distribution).__name__} is registered with select_rows")


@select_rows.register
def _(distribution: Independent, rows: Tensor) -> Independent:
    if not isinstance(distribution.base_dist, Normal):
        raise TypeError(f"no way to select rows of independent {type(distribution.base_dist).__name__}s is registered")
    base = distribution.base_dist
    # no fewer checks and no more than the distribution had
    of_rows = Normal(base.loc[rows], base.scale[rows], validate_args=base._validate_args)
    return Independent(of_rows, distribution.reinterpreted_batch_ndims)


@singledispatch
def kl_per_dimension(posterior: Distribution, prior: Distribution) -> Float[Tensor, "batch *dimensions"]:
    """KL(posterior ‖ prior) in nats for each latent dimension; both must factorise over dimensions.

    A trajectory's dimensions have a KL each, over all of its times; register another kind with its `register`.
    """
    if not (isinstance(posterior, Independent) and isinstance(prior, Independent)):
        raise TypeError(
            "a KL per dimension needs a posterior and a prior that factorise over dimensions, "
            f"not {type(posterior).__name__} and {type(prior).__name__}"
        )
    return kl_divergence(posterior.base_dist, prior.base_dist)
