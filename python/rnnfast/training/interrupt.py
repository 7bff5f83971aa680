"""Ctrl-C and the notice of a batch system, turned into a wish that the training loop grants."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# torchrun sends its processes the signal that the terminal has just sent them itself.
SECONDS_OF_ONE_WISH = 1.0


class InterruptWish:
    """Context in which a first SIGINT or SIGTERM only sets `signal`.

    The loop looks at it between two steps, so that nothing is left half done. A signal more than
    `SECONDS_OF_ONE_WISH` later acts as it did before the context, for those who can't wait.

    Attributes:
        signal: number of the signal received, None as long as there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._received = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> InterruptWish:
        # Python lets only the main thread handle signals; elsewhere the caller's handling stays.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            self._received = time.monotonic()
        elif time.monotonic() - self._received > SECONDS_OF_ONE_WISH:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
