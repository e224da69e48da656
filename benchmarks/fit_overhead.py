"""What `fit` costs around its steps: progress, history, looking at the state.

On the smallest work, the MLP of 128 units, where it shows most. What anybody has to do
for an epoch, a fold by itself included, is to begin a pass over the loader, to make the
steps and to read the mean; the time of an epoch that is spent elsewhere is around them.
So both are of the same epochs of the same run, and the medians count. The losses are
compared with those of a fold by itself.

    taskset -c 0 python benchmarks/fit_overhead.py
"""

import contextlib
import io
import itertools
import statistics
import sys
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import lossloop as ll
from lossloop import _training
from lossloop._machine import machine
from lossloop._mean import Mean
from lossloop._scan import CompiledFold
from lossloop._works import Work, works

EPOCHS, ROUNDS, PROMISED = 60, 9, 0.03
WARMING_UP = 5  # epochs


def main() -> None:
    """Measures, prints, checks."""
    torch.set_num_threads(1)
    work = works()["MLP 128"]
    losses = folded(work)
    print(machine())
    print(f"{work.steps} steps an epoch, {EPOCHS} epochs, {ROUNDS} rounds")
    worst = 0.0
    for name, progress in (("without a bar", False), ("with a bar", True)):
        around, needed = [], []
        for _ in range(ROUNDS):
            epochs, inside, own = fitted(work, progress=progress)
            assert own == losses, "the losses differ"
            around += [e - i for e, i in zip(epochs, inside, strict=True)]
            needed += inside
        cost, of = statistics.median(around), statistics.median(needed)
        worst = max(worst, cost / of)
        print(f"{name:14} {cost * 1e6:4.0f} us around {of * 1e6:5.0f}, {cost / of:.1%}")
    print(f"at most {PROMISED:.0%} promised")
    sys.exit(worst > PROMISED)


def folded(work: Work) -> list[float]:
    """The mean loss of each epoch."""
    goal = ll.supervised(work.model(), nn.CrossEntropyLoss())
    adam = ll.optim.Adam(lr=work.rate)
    params, opt_state = ll.init(goal, adam)
    fold = ll.compile_fold(ll.make_step(goal, adam))
    loader = work.loader()
    losses: list[float] = []
    for _ in range(EPOCHS):
        params, opt_state, mean = fold(params, opt_state, loader)
        losses.append(mean.value())
    return losses


class Clock:
    """Adds up the time that is spent in some functions and not in others."""

    def __init__(self) -> None:
        """At 0."""
        self.seconds = 0.0

    def counting(self, function: Any, sign: int = 1) -> Any:
        """The function, whose time counts; with a sign of -1, that of a part not."""

        def counted(*args: Any, **options: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += sign * (perf_counter() - start)

        return counted


def fitted(
    work: Work, *, progress: bool
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each epoch, those of them for what has to be done, and the losses.

    From its first step to that of the next; the first few are in the losses alone.
    """
    model, clock = work.model(), Clock()
    starts, inside = list[float](), list[float]()
    steps = CompiledFold.__call__

    def counted(self: CompiledFold, *args: Any, on_step: Any, **options: Any) -> Any:
        starts.append(perf_counter())
        inside.append(clock.seconds)
        between = clock.counting(on_step, -1)
        return clock.counting(steps)(self, *args, on_step=between, **options)

    with (
        patch.object(CompiledFold, "__call__", counted),
        patch.object(_training, "read", clock.counting(_training.read)),
        patch.object(Mean, "value_and_weight", clock.counting(Mean.value_and_weight)),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        result = ll.fit(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.Adam(model.parameters(), lr=work.rate),
            work.loader(),
            epochs=EPOCHS,
            compile=True,
            progress=progress,
        )
    epochs, parts = (
        [after - before for before, after in itertools.pairwise(times[WARMING_UP:])]
        for times in (starts, inside)
    )
    return epochs, parts, result.history["train_loss"]


if __name__ == "__main__":
    main()
