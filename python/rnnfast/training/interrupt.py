"""Ctrl-C and the notice of a batch system, turned into a wish that the training loop grants."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptWish:
    """Context in which the first SIGINT or SIGTERM only sets `signal`.

    The loop looks at it between two steps, so that nothing is left half done. A second signal acts
    as it did before the context, for those who can't wait.

    Attributes:
        signal: number of the signal received, None as long as there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
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
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
