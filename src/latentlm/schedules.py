"""Quantities that change over training, as functions of its progress in [0, 1]."""


def linear(progress: float, start: float | int, end: float | int) -> float:
    """`start` at the beginning of training, `end` at its end, a straight line between."""
    return start + (end - start) * progress


def warm_up(progress: float, fraction: float | int) -> float:
    """0 at the beginning of training, 1 from `fraction` of it onwards, a straight line between."""
    return 1.0 if progress >= fraction else progress / fraction
