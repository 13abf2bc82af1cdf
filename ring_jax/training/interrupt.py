"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is noted, and a second SIGINT interrupts as usual.

    `signum` is the signal that came, or None. Only the main thread may enter it.
    """

    def __init__(self, on_request: Callable[[], None]):
        self.signum: int | None = None
        self._on_request = on_request
        self._previous = {}

    def __enter__(self) -> Self:
        self._previous = {signum: signal.signal(signum, self._handle) for signum in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        self._on_request()
