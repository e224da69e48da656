"""Signals that end a run without losing anything."""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Interruption:
    """Takes note of the first Ctrl-C or SIGTERM; a second raises KeyboardInterrupt.

    From `heed` to `restore`. Handlers that are not Python's defaults are left alone, as
    are all of them outside the main thread, where none can be set.

    Attributes:
        requested: The name of the signal that came, or None.
        held: Whether a second one has to wait, until `restore` or the end of `whole`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.held = False
        self._again = False
        self._process = os.getpid()
        self._handlers: dict[signal.Signals, Any] = {}

    def heed(self) -> None:
        """Sets the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if handler in _DEFAULTS:
                    self._handlers[number] = handler
                    signal.signal(number, self._note)

    def restore(self) -> None:
        """Puts the handlers back; set `held` before, or it may be interrupted."""
        # That of Ctrl-C last: from then on an exception may come at any time.
        for number, handler in reversed(self._handlers.items()):
            signal.signal(number, handler)
        self._tell()

    @contextmanager
    def whole(self) -> Generator[None]:
        """In which a second signal waits, so that what is written is written whole."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
        self._tell()

    def _tell(self) -> None:
        if self._again:
            self._again = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A worker process, forked meanwhile. A terminal sends Ctrl-C to all.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.requested is not None:
            self._again = True
            if not self.held:
                self._tell()
            return
        self.requested = signal.Signals(number).name
