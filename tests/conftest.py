"""Fixtures that the tests of the core share."""

import gc

import pytest
import torch
from transformers import PreTrainedConfig

# Before latentlm is imported: configs check their own fields, and their __init__ takes keys that its signature does not
# show (a file's, a misspelt one), at which the type checker of these tests would stop.
PreTrainedConfig.__no_type_check__ = True

from tests.toy import small_model  # noqa: E402

from latentlm.families import FAMILIES  # noqa: E402


def pytest_configure():
    # the models here are too small to gain from more, and sums in one order give one set of last digits
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    # what was trained in this process may have set another number (a sweep does), and on busy cores
    # threads that wait for each other make the small models of all later tests ten times slower
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_garbage():
    # A Trainer collects garbage when it begins. That walks through all objects there are, modules and tests among them,
    # and takes longer than the small runs of these tests, unless what is there already is exempt.
    gc.collect()
    gc.freeze()


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    """Each family's name in turn."""
    return request.param


@pytest.fixture
def model(family):
    """A small model of each family in turn, in evaluation mode."""
    return small_model(family)


@pytest.fixture
def ltm():
    """A small LTM, in evaluation mode."""
    return small_model("ltm")
