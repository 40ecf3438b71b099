import pytest


@pytest.fixture(autouse=True)
def long_enough(monkeypatch):
    """The few times of these tests count as many: the Toeplitz algebra takes Durbin's steps, not a factor."""
    monkeypatch.setattr("latentlm.distributions.algebra._FACTOR_UNTIL", 0)
