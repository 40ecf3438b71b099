import pytest

from latentlm.schedules import linear, warm_up


@pytest.mark.parametrize("progress, value", [(0.0, 0.3), (0.25, 0.31), (1.0, 0.34)])
def test_linear(progress, value):
    assert linear(progress, 0.3, 0.34) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("progress, weight", [(0.0, 0), (0.1, 0.4), (0.25, 1), (0.3, 1), (1.0, 1)])
def test_warm_up(progress, weight):
    assert warm_up(progress, 0.25) == pytest.approx(weight, abs=1e-12)


def test_no_warm_up():
    assert warm_up(0.0, 0.0) == 1.0
