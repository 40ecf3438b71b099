"""Fixtures that the tests of the core share. No conftest.py imports the library before `pytest_configure` is called."""

import gc
import sys

import pytest
from tests.family_names import FAMILY_NAMES

# Called ten thousands of times by these tests, and nothing in their signatures can be wrong.
UNCHECKED = ("_shift", "_mix", "_mix_int", "_signed", "_init_weights")


def pytest_configure(config):
    # what hands tests to processes runs none of them, and need not wait for all these imports
    if config.getoption("tx", None) and not config.getoption("collectonly") and not hasattr(config, "workerinput"):
        return
    import torch
    from transformers import PreTrainedConfig

    # Before latentlm is imported: configs check their own fields, and their __init__ takes keys that its signature does
    # not show (a file's, a misspelt one), at which the type checker of these tests would stop.
    PreTrainedConfig.__no_type_check__ = True

    from latentlm.distributions import noise
    from latentlm.families import FAMILIES

    for place in {noise, *(kind for family in FAMILIES.values() for kind in family.__mro__)}:
        for name in UNCHECKED:
            of_place = vars(place).get(name)
            if of_place is not None and of_place.__module__.startswith("latentlm"):
                of_place.__no_type_check__ = True
    # the models here are too small to gain from more, and sums in one order give one set of last digits
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    # what was trained in this process may have set another number (a sweep does), and on busy cores
    # threads that wait for each other make the small models of all later tests ten times slower
    sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_garbage():
    # A Trainer collects garbage when it begins. That walks through all objects there are, modules and tests among them,
    # and takes longer than the small runs of these tests, unless what is there already is exempt.
    gc.collect()
    gc.freeze()


@pytest.fixture(params=FAMILY_NAMES)
def family(request) -> str:
    """Each family's name in turn."""
    return request.param


@pytest.fixture
def model(family):
    """A small model of each family in turn, in evaluation mode."""
    from tests.toy import small_model

    return small_model(family)


@pytest.fixture
def ltm():
    """A small LTM, in evaluation mode."""
    from tests.toy import small_model

    return small_model("ltm")
