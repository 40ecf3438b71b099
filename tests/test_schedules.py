import pytest

from latentlm.schedules import controlled, cyclical, linear, warm_up


@pytest.mark.parametrize("progress, value", [(0.0, 0.3), (0.25, 0.31), (1.0, 0.34)])
def test_linear(progress, value):
    assert linear(progress, 0.3, 0.34) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("progress, weight", [(0.0, 0), (0.1, 0.4), (0.25, 1), (0.3, 1), (1.0, 1)])
def test_warm_up(progress, weight):
    assert warm_up(progress, 0.25) == pytest.approx(weight, abs=1e-12)


def test_no_warm_up():
    assert warm_up(0.0, 0.0) == 1.0


def test_cycles_by_hand():
    """Two cycles with a quarter at 0, a quarter rising and half at 1."""
    expected = {0.0: 0, 0.1: 0, 0.125: 0, 0.1875: 0.5, 0.25: 1, 0.4: 1, 0.5: 0, 0.6: 0, 0.6875: 0.5, 0.75: 1, 1.0: 1}
    for progress, value in expected.items():
        assert cyclical(progress, 2, 0.25, 0.25) == pytest.approx(value)


def test_cycles_without_a_rise_jump():
    assert [cyclical(progress, 1, 0.5, 0.0) for progress in (0.0, 0.49, 0.5, 0.9)] == [0, 0, 1, 1]


def test_cycles_of_fu_et_al():
    """Their equation 6: τ = mod(t − 1, T/M) / (T/M), β = τ / R up to R and 1 after it."""
    steps, cycles, share = 400, 4, 0.5
    for step in range(steps):
        place = (step % (steps // cycles)) / (steps // cycles)
        expected = place / share if place <= share else 1.0
        assert cyclical(step / steps, cycles, 0.0, share) == pytest.approx(expected, abs=1e-9)


def test_a_whole_training_ends_in_its_last_cycle():
    assert cyclical(1.0, 3, 0.0, 1.0) == 1.0
    assert cyclical(1.2, 3, 0.0, 0.5) == 1.0  # resumed beyond what was planned


@pytest.mark.parametrize(
    "beta, kl, expected", [(0.5, 20.0, 0.515), (0.5, 0.0, 0.485), (0.5, 2.0, 0.5), (0.5, 3.0, 0.5075)]
)
def test_a_controller_moves_by_three_percent_at_most(beta, kl, expected):
    assert controlled(beta, kl, 2.0, 1e-4, 1.0) == pytest.approx(expected)


def test_a_controller_stays_in_its_bounds():
    assert controlled(1.0, 50.0, 2.0, 1e-4, 1.0) == 1.0
    assert controlled(1e-4, 0.0, 2.0, 1e-4, 1.0) == 1e-4


@pytest.mark.parametrize("start", [1e-3, 1.0])
def test_a_controller_finds_the_weight_that_gives_its_target(start):
    """A KL that answers at once, KL = 4 / (1 + 10 β): 2 nats at β = 0.1."""
    beta = start
    for _ in range(1000):
        beta = controlled(beta, 4 / (1 + 10 * beta), 2.0, 1e-4, 1.0)
    assert beta == pytest.approx(0.1, rel=1e-3)
