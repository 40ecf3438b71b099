"""Noise that belongs to the sequence.

Seeds are fixed, so each statistic is one number; limits are 4.5 standard errors.
"""

import math
from itertools import combinations, product

import pytest
import torch
from scipy import stats
from tests.toy import padded, texts

from latentlm.distributions import Stream, sequence_keys, sequence_noise
from latentlm.distributions.noise import _mix

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def noise(rows=512, shape=(512,), *, seed=0, stream=Stream.SCORE, step=0, text_seed=0):
    return sequence_noise(sequence_keys(texts(rows, 12, seed=text_seed)), shape, seed=seed, stream=stream, step=step)


def correlation(a, b):
    """Of the values and of their squares: noise that shares only its radius has the second alone."""
    pairs = [(a, b), (a.square(), b.square())]
    return [abs(float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]).double())[0, 1])) for x, y in pairs]


def assert_uncorrelated(a, b):
    assert max(correlation(a, b)) < 4.5 / math.sqrt(a.numel())


# ---- it is standard normal -------------------------------------------------------------------------------------------


def test_moments():
    x = noise(1024, (1024,)).double().flatten()
    n = len(x)
    assert abs(x.mean()) < 4.5 / n**0.5
    assert abs(x.var() - 1) < 4.5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4.5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4.5 * (96 / n) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, -1])
def test_distribution_by_kolmogorov_and_smirnov(seed):
    assert stats.kstest(noise(seed=seed).flatten().numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("element", [0, 1, 2, 63])
def test_each_element_is_normal_over_sequences(element):
    assert stats.kstest(noise(20000, (element + 1,))[:, element].numpy(), "norm").pvalue > 0.01


def test_tails():
    x = noise(2048, (2048,)).flatten().numpy()
    assert abs(x).max() < 6.8
    for limit in (3.0, 4.0, 4.5):
        for count in ((x > limit).sum(), (x < -limit).sum()):
            expected = len(x) * stats.norm.sf(limit)
            assert abs(count - expected) < 4.5 * expected**0.5


# ---- draws are independent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", range(1, 9))
def test_neighbouring_elements(lag):
    x = noise()
    assert_uncorrelated(x[:, lag:], x[:, :-lag])


def test_neighbouring_sequences():
    x = noise()
    assert_uncorrelated(x[1:], x[:-1])


def test_neighbouring_keys():
    keys = torch.arange(512)
    x = sequence_noise(keys, (512,), seed=0, stream=Stream.SCORE)
    assert_uncorrelated(x[1:], x[:-1])


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (0, -1), (0, 2**32), (7, 2**62 + 7)])
def test_seeds(seeds):
    assert_uncorrelated(noise(seed=seeds[0]), noise(seed=seeds[1]))


@pytest.mark.parametrize("streams", combinations(Stream, 2))
def test_streams(streams):
    assert_uncorrelated(noise(stream=streams[0]), noise(stream=streams[1]))


@pytest.mark.parametrize("steps", [(0, 1), (1, 2), (0, 1023)])
def test_steps(steps):
    assert_uncorrelated(noise(step=steps[0]), noise(step=steps[1]))


def test_seed_stream_and_step_are_not_interchangeable():
    draws = [
        noise(1, (4,), seed=seed, stream=stream, step=step)[0]
        for seed, stream, step in product(range(5), Stream, range(5))
    ]
    assert len(torch.stack(draws).unique(dim=0)) == 25 * len(Stream)


# ---- it is a function of what it should be, and of nothing else ------------------------------------------------------


def test_mixing_is_splitmix64():
    """The published generator's first outputs from state 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [(1234567 + GOLDEN * count) & MASK for count in range(1, 5)]
    signed = torch.tensor([state - (1 << 64) if state >> 63 else state for state in states])
    assert [value & MASK for value in _mix(signed).tolist()] == published


def test_against_python_integers():
    """The same noise one number at a time, with integers that do not overflow and `math` in float64."""

    def mix(value):
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        return value ^ (value >> 31)

    seed, stream, step, keys = -5, Stream.PRIOR, 3, [0, 1, -1, 2**63 - 1, -(2**63)]
    salt = 0
    for part in (seed, int(stream), step):
        salt = mix((salt + part * GOLDEN + 1) & MASK)
    expected = []
    for key in keys:
        row = []
        for pair in (1, 2, 3):
            bits = mix((mix((key & MASK) ^ salt) + pair * GOLDEN) & MASK)
            radius = math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32))
            angle = 2 * math.pi * (bits % 2**24) / 2**24
            row += [radius * math.cos(angle), radius * math.sin(angle)]
        expected.append(row[:5])
    drawn = sequence_noise(torch.tensor(keys), (5,), seed=seed, stream=stream, step=step)
    # float32 angles up to 2π are good to 5e-7, times a radius up to 7
    torch.testing.assert_close(drawn.double(), torch.tensor(expected, dtype=torch.float64), atol=4e-6, rtol=0)


def test_a_prefix_keeps_its_noise():
    whole = noise(3, (101,))
    for count in (1, 2, 37, 100):
        assert torch.equal(noise(3, (count,)), whole[:, :count])
    assert torch.equal(noise(3, (7, 4)), noise(3, (9, 4))[:, :7])


def test_shape_only_arranges():
    assert torch.equal(noise(3, (2, 3, 5)).flatten(1), noise(3, (30,)))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), ()])
def test_empty_and_single_events(shape):
    assert noise(4, shape).shape == (4, *shape)
    assert noise(4, shape).dtype == torch.float32


def test_rows_do_not_depend_on_the_batch():
    keys = sequence_keys(texts(6, 9))
    whole = sequence_noise(keys, (5,), seed=1, stream=Stream.SCORE)
    order = torch.tensor([4, 1, 1, 5])
    assert torch.equal(sequence_noise(keys[order], (5,), seed=1, stream=Stream.SCORE), whole[order])


@pytest.mark.parametrize("seed", [-1, -(2**70), 2**63, 2**100 + 3])
def test_any_integer_is_a_seed(seed):
    drawn = noise(64, (64,), seed=seed)
    assert torch.equal(drawn, noise(64, (64,), seed=seed))
    assert_uncorrelated(drawn, noise(64, (64,), seed=seed + 1))
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 0.01


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    noise()
    assert torch.equal(torch.get_rng_state(), before)


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("total", [10, 11, 64])
def test_padding_does_not_enter_a_key(side, total):
    input_ids, lengths = texts(4, 10), [10, 7, 2, 1]
    rows, mask = padded(input_ids, lengths, side, total=total)
    rows = torch.where(mask.bool(), rows, torch.randint(0, 20, rows.shape))  # whatever stands in the padding
    alone = torch.cat([sequence_keys(row[None, :length]) for row, length in zip(input_ids, lengths, strict=True)])
    assert torch.equal(sequence_keys(rows, mask), alone)


def test_every_short_text_has_its_own_key():
    """All texts of up to three of 20 tokens: order, repetition and length enter."""
    keys = [sequence_keys(torch.tensor(list(product(range(20), repeat=length)))) for length in (1, 2, 3)]
    assert len(torch.cat(keys).unique()) == 20 + 20**2 + 20**3


@pytest.mark.parametrize("length", [19, 24])
def test_a_compiler_leaves_keys_alone(length):
    """inductor gets the last few of 19 wrong, so a compiled model would have other noise."""
    input_ids = texts(4, length)
    assert torch.equal(torch.compile(lambda given: sequence_keys(given))(input_ids), sequence_keys(input_ids))
