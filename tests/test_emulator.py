"""The emulator finds the faults it claims to find, each planted in a kernel of its own."""

from __future__ import annotations

import pytest
import rnnfast
from emulated import native


def test_shares_a_process_with_the_kernels_for_a_gpu():
    """Where nvcc was found rnnfast loads both, and pybind11 refuses a second type of one name."""
    cuda = rnnfast._native.cuda
    if cuda is None:
        pytest.skip("rnnfast was built without CUDA")
    assert cuda.Device is not native.Device


FAULTS = {
    "race": "two threads use shared memory, one to write",
    "cluster race": "two threads use shared memory, one to write",
    "barrier": "wait at a barrier that others have passed by",
    "number": "wait for a number that nobody publishes",
    "residency": "wait for a number that nobody publishes",
    "bounds": "shared memory is used out of bounds",
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("fault", "message"), FAULTS.items(), ids=FAULTS)
def test_fault(fault, message, seed):
    native.set_seed(seed)
    native.run_fault(fault, False)
    with pytest.raises(RuntimeError, match=f"^{fault}: .*{message}"):
        native.run_fault(fault, True)
    native.run_fault(fault, False)  # and it works as before
