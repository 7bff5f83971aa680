"""Recurrent weights at half the bytes, for inference that waits for them.

With few batch rows a step is bound by reading W_hh from cache. Within `halved_recurrence` float32
layers on the CPU read it rounded to bfloat16, wherever no gradient is recorded; products, sums and
states stay float32. A layer gives what it would give if its W_hh had been rounded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Wish(threading.local):
    halved = False


_wish = _Wish()


def is_wished() -> bool:
    """Whether the calling thread is within `halved_recurrence`."""
    return _wish.halved


@contextmanager
def halved_recurrence(enabled: bool = True) -> Iterator[None]:
    """Context in which float32 layers compute with W_hh rounded to bfloat16 (8 bits of precision).

    ``with torch.no_grad(), rnnfast.halved_recurrence(): y, state = layer(x)``. Worth it for a few
    sequences at a time and a W_hh that is larger than a core's L2 cache. Nothing is gained with
    many rows, and single steps, which read all of W_hh as it is, take longer to round it. Of no
    effect where a gradient is recorded, under torch.compile, on other dtypes (but float16, which
    is computed in float32) and on other devices. It holds for the calling thread, and contexts
    nest; enabled=False undoes it inside.
    """
    before = _wish.halved
    _wish.halved = bool(enabled)
    try:
        yield
    finally:
        _wish.halved = before
