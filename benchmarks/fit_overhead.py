"""What `fit` costs around its steps: an epoch of it against the same fold by itself.

On the smallest work, the MLP of 128 units, where it shows most. Both make the same
steps, compiled and folded, on the same data in the same order, by turns; the losses are
compared first.

    taskset -c 0 python benchmarks/fit_overhead.py
"""

import contextlib
import io
import itertools
import math
import sys
from time import perf_counter

import torch
from torch import nn

import lossloop as ll
from lossloop._machine import machine
from lossloop._works import Work, works

EPOCHS, ROUNDS, PROMISED = 60, 9, 0.03


def main() -> None:
    """Measures, prints, checks."""
    torch.set_num_threads(1)
    work = works()["MLP 128"]
    folded(work)  # fills the compiler's cache
    print(machine())
    print(f"{work.steps} steps an epoch, {EPOCHS} epochs, {ROUNDS} rounds")
    for name, progress in (("without a bar", False), ("with a bar", True)):
        by_fold, by_fit = math.inf, math.inf
        for _ in range(ROUNDS):
            seconds, losses = folded(work)
            by_fold = min(by_fold, seconds)
            seconds, own = fitted(work, progress=progress)
            by_fit = min(by_fit, seconds)
            assert own == losses, "the losses differ"
        overhead = by_fit / by_fold - 1
        print(f"{name:14} {by_fit * 1e6:6.0f} us an epoch, {overhead:+.1%} of the fold")
    print(f"at most {PROMISED:.0%} promised")
    sys.exit(overhead > PROMISED)


def folded(work: Work) -> tuple[float, list[float]]:
    """Seconds of the fastest epoch, and the losses."""
    goal = ll.supervised(work.model(), nn.CrossEntropyLoss())
    adam = ll.optim.Adam(lr=work.rate)
    params, opt_state = ll.init(goal, adam)
    fold = ll.compile_fold(ll.make_step(goal, adam))
    loader = work.loader()
    seconds: list[float] = []
    losses: list[float] = []
    for _ in range(EPOCHS):
        start = perf_counter()
        params, opt_state, mean = fold(params, opt_state, loader)
        losses.append(mean.value())
        seconds.append(perf_counter() - start)
    return min(seconds[2:]), losses


def fitted(work: Work, *, progress: bool) -> tuple[float, list[float]]:
    """Fewest seconds from the end of an epoch to that of the next, and the losses."""
    model, ends = work.model(), []
    with (
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
            on_epoch=lambda record: ends.append(perf_counter()),
        )
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return min(seconds[1:]), result.history["train_loss"]


if __name__ == "__main__":
    main()
