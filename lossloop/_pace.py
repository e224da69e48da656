"""How fast `fit` trains four works, beside the loop of every tutorial."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import NamedTuple

import torch
from torch import nn

from lossloop._fit import Result, fit
from lossloop._machine import machine
from lossloop._plan import CompileChoice
from lossloop._works import Work, tutorial_loop, works

_LONG = 5000  # epochs planned, so that all is compiled that pays in a long run
AGREES = 1e-3  # relative; losses of the same steps are computed in another order


class Pace(NamedTuple):
    """How fast `fit` trains a work, beside the loop of every tutorial.

    Attributes:
        work: Its name.
        tutorial: Microseconds per step of the tutorial's loop, of its best epoch.
        eager: The same of `fit` without compiling.
        compiled: The same of `fit`, compiled.
        ratio: How many times as fast as the tutorial's loop the latter is.
        waited: Seconds from the call of `fit` to the end of its first epoch, compiled.
        apart: The largest difference of mean losses of the first epoch, relative.
        choice: What was decided about compiling, and why.
    """

    work: str
    tutorial: float
    eager: float
    compiled: float
    ratio: float
    waited: float
    apart: float
    choice: CompileChoice


def time_works(names: Sequence[str] | None = None, *, epochs: int = 10) -> list[Pace]:
    """Trains the works with `fit` and with the loop of every tutorial, by turns.

    All read a shuffling `DataLoader`. Each epoch of `fit` is followed by one of the
    tutorial's loop, in a process of its own, and the best epoch of each counts. Their
    losses of the first epoch are compared first. `fit` is told of 5,000 epochs, and
    stopped.

    Args:
        names: Of the works; default all: "MLP 128", "MLP 1024", "conv net" and
            "transformer".
        epochs: How many to make.

    Returns:
        A `Pace` for each.

    Raises:
        ValueError: For another name, or if the losses differ.

    Example:
        >>> from lossloop.benchmark import time_works
        >>> time_works(["MLP 64"])
        Traceback (most recent call last):
        ValueError: time_works: there is no work 'MLP 64'. There are MLP 128, ...
    """
    known = works()
    chosen = list(known) if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"time_works: there is no work {name!r}. There are {', '.join(known)}."
            )
    return [_pace(name, known[name], epochs) for name in chosen]


def _pace(name: str, work: Work, epochs: int) -> Pace:
    means: list[float] = []
    seconds: list[float] = []
    ended: list[float] = []
    results: dict[bool, Result] = {}
    begun = 0.0
    with _Tutorial(name) as tutorial:

        def turn(_: object) -> str | None:
            ended.append(perf_counter())
            mean, took = tutorial.epoch()
            means.append(mean)
            seconds.append(took)
            return "stop" if len(ended) == epochs else None

        for wish in (False, True):
            model = work.model()
            ended.clear()
            begun = perf_counter()
            results[wish] = fit(
                model,
                nn.CrossEntropyLoss(),
                torch.optim.Adam(model.parameters(), lr=work.rate),
                work.loader(),
                epochs=_LONG,
                compile=wish,
                progress=False,
                on_epoch=turn,
            )
            if results[wish].status == "interrupted":
                raise KeyboardInterrupt
    losses = [result.history[0]["train_loss"] for result in results.values()]
    apart = [abs(loss - means[0]) / means[0] for loss in losses]
    if not all(each <= AGREES for each in apart):  # nor if one is nan
        raise ValueError(
            f"time_works: the first epoch of {name} has the losses {losses} with fit "
            f"and {means[0]} in the tutorial's loop."
        )
    eager, compiled = (
        1e6 * min(result.history["seconds"]) / work.steps for result in results.values()
    )
    by_hand = 1e6 * min(seconds) / work.steps
    return Pace(
        name,
        by_hand,
        eager,
        compiled,
        by_hand / compiled,
        ended[0] - begun,
        max(apart),
        results[True].compiled,
    )


class _Tutorial:
    """The loop of every tutorial on a work, in a process of its own.

    In that of `fit` it would find memory that `fit` has malloc keep, which it does not
    where it was written.
    """

    def __init__(self, name: str) -> None:
        """Starts the process."""
        command = [sys.executable, "-m", __name__, name, str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "_Tutorial":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()  # which ends what it reads

    def epoch(self) -> tuple[float, float]:
        """Makes the next epoch, and returns its mean loss and its seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"time_works: the process of the tutorials' loop ended with status "
                f"{self._process.wait()} before its next epoch; see what it printed."
            )
        mean, seconds = json.loads(line)
        return mean, seconds


def _serve(name: str, threads: str) -> None:
    """Makes an epoch of the tutorial's loop for each line of the input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends the input
    torch.set_num_threads(int(threads))
    work = works()[name]
    model, loader = work.model(), work.loader()
    adam = torch.optim.Adam(model.parameters(), lr=work.rate)
    for _ in sys.stdin:
        start = perf_counter()
        mean = tutorial_loop(model, loader, adam)
        print(json.dumps([mean, perf_counter() - start]), flush=True)  # noqa: T201


def works_table(paces: Sequence[Pace]) -> str:
    """The paces of some works as a table, with the machine above it."""
    head = (
        f"{'us per step':12}{'tutorial loop':>14}{'fit, eager':>12}"
        f"{'fit, compiled':>15}{'ratio':>7}{'first epoch s':>15}{'losses apart':>14}"
    )
    lines = [
        f"{pace.work:12}{pace.tutorial:14.0f}{pace.eager:12.0f}{pace.compiled:15.0f}"
        f"{pace.ratio:7.2f}{pace.waited:15.1f}{pace.apart:14.1e}"
        for pace in paces
    ]
    reasons = [f"{pace.work}: {pace.choice.reason}" for pace in paces]
    return "\n".join([machine(), head, *lines, *reasons])


if __name__ == "__main__":
    _serve(*sys.argv[1:])
