"""Signals: the first is noted, the second ends it, and others are left alone."""

import os
import signal
import threading
from contextlib import contextmanager

import pytest

from lossloop._interruption import Interruption

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def send(number):
    os.kill(os.getpid(), number)


@contextmanager
def heeded():
    signals = Interruption()
    signals.heed()
    try:
        yield signals
    finally:
        signals.restore()


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_first_is_noted_and_the_second_ends_it_at_once(first, second):
    before = [signal.getsignal(number) for number in SIGNALS]
    with heeded() as signals:
        assert signals.requested is None
        send(first)
        assert signals.requested == first.name
        with pytest.raises(KeyboardInterrupt):
            send(second)
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_waits_for_what_is_written_whole(number):
    written = []

    def write(signals):
        with signals.whole():
            send(number)
            written.append(number)

    with heeded() as signals:
        send(number)
        with pytest.raises(KeyboardInterrupt):
            write(signals)
        assert written == [number]


def test_a_handler_of_the_callers_is_left_alone():
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with heeded() as signals:
            send(signal.SIGTERM)
            assert signals.requested is None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_outside_the_main_thread_none_are_set():
    found = []

    def run():
        with heeded():
            found.extend(map(signal.getsignal, SIGNALS))

    before = [*map(signal.getsignal, SIGNALS)]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == before
