"""What the thread pool does in a process of its own, before and after forks; prints it as JSON.

A program, because a test process may have any number of threads already, and because a pool that
does not survive a fork hangs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from one_layer import Case, differentiate
from torch.utils.data import DataLoader, Dataset

CASE = Case("lstm", 40, 64, 64, 96)  # enough work for several threads
SECONDS = 30

torch.set_num_threads(1)  # so that torch has started none of the threads counted below

# Made before any fork: torch's own parallel loops, which make them, hang in a forked process.
INPUTS, COTANGENTS = CASE.inputs(torch.float32), CASE.cotangents(torch.float32)


def results() -> list[bytes]:
    """Every output and gradient."""
    return [v.numpy().tobytes() for v in differentiate(CASE, INPUTS, COTANGENTS).values()]


class Layers(Dataset):
    """A data set that runs a layer to make a sample, as one with a frozen encoder does."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return results()


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def threads_started_by_a_layer(count: int) -> int:
    torch.set_num_threads(count)
    before = native_threads()
    results()
    return native_threads() - before


def in_a_fork(function) -> bool:
    """What the function gives in a child process; False if it does not come back."""
    child = os.fork()
    if child == 0:
        ok = False
        try:
            ok = function()
        finally:
            os._exit(not ok)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def main() -> None:
    report = {"one": threads_started_by_a_layer(1)}
    alone = results()
    report["three"] = threads_started_by_a_layer(3)

    def same() -> bool:
        return results() == alone

    report["before the fork"] = same()
    report["in a fork"] = in_a_fork(same)
    report["in a fork of a fork"] = in_a_fork(lambda: in_a_fork(same))
    report["after the fork"] = same()
    loader = DataLoader(
        Layers(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS
    )
    report["in workers"] = [sample == alone for sample in loader]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
