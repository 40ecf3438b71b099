"""Ways from one latent to another."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentlm.distributions import RBF, GaussianProcess, Matern
from latentlm.probing.paths import bridge, linear, spherical

numbers = st.floats(-50, 50).map(lambda x: round(x, 3))


def vectors(size):
    return st.lists(numbers, min_size=size, max_size=size).map(lambda row: np.array(row, dtype=np.float64))


@given(vectors(3), vectors(3), st.floats(0, 1))
def test_spherical_ends_and_norms(a, b, share):
    np.testing.assert_array_equal(spherical(a, b, 0.0), a)
    np.testing.assert_array_equal(spherical(a, b, 1.0), b)
    found = spherical(a, b, share)
    assert np.isfinite(found).all()
    if np.linalg.norm(a) and np.linalg.norm(b):
        norm = (1 - share) * np.linalg.norm(a) + share * np.linalg.norm(b)
        assert np.linalg.norm(found) == pytest.approx(norm, rel=1e-5)


def test_the_direction_turns_evenly_in_the_plane_of_both():
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 2, 3))

    def angle(one, other):
        return np.arccos((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))

    for share in (0.2, 0.5, 0.9):
        found = spherical(a, b, share)
        assert angle(a, found) == pytest.approx(share * angle(a, b))
        assert angle(found, b) == pytest.approx((1 - share) * angle(a, b))
    # of equal norms, the published formula
    b = b / np.linalg.norm(b) * np.linalg.norm(a)
    whole = angle(a, b)
    expected = (np.sin(0.7 * whole) * a + np.sin(0.3 * whole) * b) / np.sin(whole)
    np.testing.assert_allclose(spherical(a, b, 0.3), expected)


def test_vectors_that_leave_the_way_open():
    a = np.array([3.0, 4.0, 0.0])
    np.testing.assert_allclose(spherical(a, -a, 0.5), [0, 0, 5], atol=1e-12)  # over the axis that is the most across
    np.testing.assert_allclose(spherical(a, a, 0.3), a)
    np.testing.assert_allclose(spherical(a, 3 * a, 0.5), 2 * a)
    np.testing.assert_allclose(spherical(0 * a, a, 0.25), a / 4)
    np.testing.assert_array_equal(spherical(0 * a, 0 * a, 0.25), 0 * a)
    np.testing.assert_allclose(spherical(np.array([2.0]), np.array([-2.0]), 0.25), [1.0])  # no way around
    nearly = spherical(a, -a + np.array([0, 0, 1e-3]), 0.5)
    np.testing.assert_allclose(nearly, [0, 0, 5], atol=1e-2)
    np.testing.assert_allclose(linear(a, -a, 0.25), a / 2)


def dense_mean(covariance, nugget, known, values):
    """Conditioning of a Gaussian, with numpy alone."""
    total = covariance + nugget * np.eye(len(covariance))
    inverse = np.linalg.inv(total[np.ix_(known, known)])
    return total[np.ix_(~known, known)] @ inverse @ values


@pytest.mark.parametrize(("begun", "ended"), [(3, 2), (4, 0), (0, 5), (1, 1)])
def test_the_bridge_is_the_conditional_mean(begun, ended):
    scales, variances, nuggets = [1.5, 4.0], [1.0, 2.0], [0.1, 0.02]
    times = torch.arange(7.0)
    process = GaussianProcess(
        RBF(scales, variances), times, 4, torch.tensor(nuggets).double(), lengths=torch.tensor([7])
    )
    generator = np.random.default_rng(0)
    begin, end = (generator.standard_normal((number, 4)) for number in (begun, ended))
    found = bridge(process, torch.from_numpy(begin), torch.from_numpy(end)).numpy()
    np.testing.assert_array_equal(found[:begun], begin)
    np.testing.assert_array_equal(found[7 - ended :], end)
    known = np.ones(7, dtype=bool)
    known[begun : 7 - ended] = False
    lags = np.subtract.outer(np.arange(7), np.arange(7))
    for dimension in range(4):
        group = dimension // 2
        covariance = variances[group] * np.exp(-(lags**2) / 2 / scales[group] ** 2)
        values = np.concatenate([begin, end])[:, dimension]
        expected = dense_mean(covariance, nuggets[group], known, values)
        np.testing.assert_allclose(found[~known, dimension], expected, rtol=1e-6, atol=1e-9)


def test_a_bridge_to_nowhere_is_the_forecast_and_a_whole_one_what_is_given():
    process = GaussianProcess(Matern(1.5, 3.0, 1.0), torch.arange(6.0), 2, 0.05, lengths=torch.tensor([6]))
    begin = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    nothing = begin[:0]
    found = bridge(process, begin, nothing)
    torch.testing.assert_close(found[4:], process.conditional(begin[None]).mean[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(bridge(process, begin, begin[:2]), torch.cat((begin, begin[:2])))
    assert not bridge(process, nothing, nothing).any()
