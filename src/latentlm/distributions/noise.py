"""Noise that belongs to the sequence: a pure function of (seed, stream, step, sequence, element).

Bounds, gradient inference and generation draw their Gaussian noise here instead of from a global generator. A sequence
is known by a hash of its own tokens, so the order of a batch, its padding, gradient accumulation and the number of
processes change no figure; the caller's random state is never touched; and element i of a sequence's noise does not
depend on how many elements are asked for, so a trajectory's prefix keeps its noise when the trajectory grows.

The generator is counter based: SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators", section 3) over the counter, then Box and Muller's transform. Every operation is an ordinary tensor
operation, so the noise is made on the device that uses it.
"""

import math
from enum import IntEnum

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """What the noise is for. Two streams never share a draw: a score cannot reuse the noise that inference used."""

    INFERENCE = 0
    SCORE = 1
    IMPORTANCE = 2
    PRIOR = 3
    GENERATION = 4
    LANGEVIN = 5
    CONTINUATION = 6
    LATENT_DROPOUT = 7
    WORD_DROPOUT = 8
    SUBSAMPLING = 9


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_SIGNED_GOLDEN, _SIGNED_MULTIPLY_1, _SIGNED_MULTIPLY_2 = map(_signed, (_GOLDEN, _MULTIPLY_1, _MULTIPLY_2))


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLY_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLY_2) & _MASK
    return value ^ (value >> 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    # torch's >> keeps the sign; a logical shift is needed
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _SIGNED_MULTIPLY_1
    value = (value ^ _shift(value, 27)) * _SIGNED_MULTIPLY_2
    return value ^ _shift(value, 31)


# inductor (torch 2.13) takes a rank for an index, and its product with a large number wrong at some lengths
@torch.compiler.disable
def sequence_keys(
    input_ids: Int64[Tensor, "batch time"], attention_mask: Int64[Tensor, "batch time"] | None = None
) -> Int64[Tensor, " batch"]:
    """A 64-bit hash of each row's real tokens and their order; padding on either side does not enter."""
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rank = real.cumsum(1)
    token_hash = _mix(input_ids + _mix(rank * _SIGNED_GOLDEN))
    return _mix((token_hash * real).sum(1) + real.sum(1))


# a compiler would take the seed, which changes at every step, for a symbol and fail on its 64-bit arithmetic
@torch.compiler.disable
def sequence_noise(
    keys: Int64[Tensor, " batch"], event_shape: tuple[int, ...], *, seed: int, stream: Stream, step: int = 0
) -> Float[Tensor, "batch *event"]:
    """Standard normal noise, float32, one draw per (seed, stream, step, sequence).

    Args:
        keys: from `sequence_keys`.
        event_shape: the latent's shape without its batch dimension.
        seed: any integer.
        stream: what the noise is for.
        step: inference step or sample number; different steps are independent draws.
    """
    count = math.prod(event_shape)
    pairs = (count + 1) // 2
    salt = 0
    for part in (seed, int(stream), step):
        salt = _mix_int(salt + part * _GOLDEN + 1)
    base = _mix(keys ^ _signed(salt))
    counter = torch.arange(1, pairs + 1, device=keys.device) * _SIGNED_GOLDEN
    bits = _mix(base[:, None] + counter)
    # 24 bits for the angle and 32 for the radius: float32 holds no finer angle, and the tail reaches 6.7 deviations
    radius = (-2 * torch.log((_shift(bits, 32).double() + 0.5) * 2.0**-32)).sqrt().float()
    angle = (bits & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
    normal = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return normal.flatten(1)[:, :count].reshape(len(keys), *event_shape)
