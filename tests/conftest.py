"""Fixtures that force what would otherwise be the machine's choice, or torch's version's."""

from __future__ import annotations

import pytest
import torch
from rnnfast import _native

pytest.register_assert_rewrite("short_way")  # its tests are inherited, and say what failed


@pytest.fixture(params=_native.build_info()["isas_available"])
def isa(request):
    """Runs the test once under every instruction set this processor has."""
    with _native.using_isa(request.param):
        yield request.param


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    """Runs the test with one thread, with two, and with more than most test machines have cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["exchange", "attributes"])
def reading(request):
    """Both ways in which the core may read a tensor."""
    before = _native.core.use_exchange(request.param == "exchange")
    yield
    _native.core.use_exchange(before)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers whichever tests run, in whichever order."""
    torch.manual_seed(0)
