"""Quantities that change over training: as functions of its progress in [0, 1], or of what it measures."""

import math

# the share by which a controller changes β at a step, at most (papers: GP-VAE, arXiv 2512.09535)
_SHARE = 0.03


def linear(progress: float, start: float | int, end: float | int) -> float:
    """`start` at the beginning of training, `end` at its end, a straight line between."""
    return start + (end - start) * progress


def warm_up(progress: float, fraction: float | int) -> float:
    """0 at the beginning of training, 1 from `fraction` of it onwards, a straight line between."""
    return 1.0 if progress >= fraction else progress / fraction


def cyclical(progress: float, cycles: int, zero: float | int, rise: float | int) -> float:
    """Equal cycles, each 0 for the share `zero` of it, then rising linearly to 1 over `rise`, then 1 until its end.

    Fu et al. 2019 (arXiv 1903.10145, equation 6) have zero = 0; Li et al. 2020 (Optimus) begin cycles with a part at 0.
    """
    place = min(progress, 1.0) * cycles
    place = 1.0 if progress >= 1 else place - math.floor(place)  # training ends in the last cycle, not in a new one
    if place < zero:
        return 0.0
    return 1.0 if place >= zero + rise else (place - zero) / rise


def controlled(beta: float, kl: float, target: float | int, least: float, most: float | int) -> float:
    """The next β of a controller that brings the KL to a target: up to 3% more where it is above, less where below.

    The share is in proportion to the error, and all of the 3% from an error as large as the target on. So near its goal
    β settles, where a step of ±3% by the error's sign alone (GP-VAE, arXiv 2512.09535) would go on swinging.
    """
    error = max(-1.0, min(1.0, (kl - target) / target))
    return min(max(beta * (1 + _SHARE * error), least), most)
