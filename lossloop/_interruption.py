"""Signals that end a run without losing anything."""

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Interruption:
    """Takes note of the first Ctrl-C or SIGTERM; a second raises KeyboardInterrupt.

    A context. Handlers that are not Python's defaults are left alone, as are all of
    them outside the main thread, where none can be set.

    Attributes:
        requested: The name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._process = os.getpid()
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        """Sets the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if handler in _DEFAULTS:
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Puts the handlers back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A worker process, forked meanwhile. A terminal sends Ctrl-C to all.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
