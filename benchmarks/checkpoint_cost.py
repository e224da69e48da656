"""What safety costs: the gate and the checks in a step, a save while training waits.

Two questions. How much longer do steps of the MLP of 128 units take with the gate that
lets no number through that is not finite, and with the look at the state after each
epoch? And how long does training stand still for a checkpoint of 50 million parameters
with Adam, against the copy to memory that it cannot do without?

With the gate and without, the steps are compiled and folded, on the same data in the
same order, by turns; they must come to the same weights. The saves and the copies take
turns too, and what was saved is loaded and compared.

    taskset -c 0 python benchmarks/checkpoint_cost.py
"""

import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from time import perf_counter

import torch
from torch import nn
from torch.utils import _pytree as pytree

import lossloop as ll
from lossloop._checkpoint import Checkpoints
from lossloop._gate import names_not_finite
from lossloop._machine import machine
from lossloop._run import Run
from lossloop._works import works

EPOCHS, SAVES = 400, 5
MOST_OF_A_STEP = 0.02
LAYERS = (3072, 4096, 4096, 4096, 1024)  # 50.4 million parameters
# A save also writes down the names and places of the copies.
MOST_OF_A_COPY = 1.1


def main() -> None:
    """Measures, prints, checks."""
    torch.set_num_threads(1)
    print(machine())
    gate = cost_of_gate()
    print(
        f"gate and checks: {gate:+.2%} of a step of MLP 128, "
        f"at most {MOST_OF_A_STEP:.0%} promised"
    )
    blocked, copied = cost_of_save()
    print(
        f"a save in the background: training waits {blocked:.2f} s, a copy in memory "
        f"takes {copied:.2f} s, {blocked / copied:.2f} times"
    )
    sys.exit(gate > MOST_OF_A_STEP or blocked > MOST_OF_A_COPY * copied)


def cost_of_gate() -> float:
    """By how much epochs are longer, relative: the median over pairs of epochs."""
    work = works()["MLP 128"]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    epochs: dict[bool, Callable[[], ll.Mean]] = {}
    states = {}
    for gated in seconds:
        goal = ll.supervised(work.model(), nn.CrossEntropyLoss())
        adam = ll.optim.Adam(lr=work.rate)
        states[gated] = ll.init(goal, adam, skip_nonfinite=0 if gated else None)
        fold = ll.compile_fold(ll.make_step(goal, adam))
        loader = work.loader()

        def epoch(gated=gated, fold=fold, loader=loader) -> ll.Mean:
            *states[gated], mean = fold(*states[gated], loader)
            if gated and not fold.seen_finite:  # as fit does after each epoch
                assert not names_not_finite((states[gated][0], states[gated][1].carry))
            return mean

        epochs[gated] = epoch
    for _ in range(EPOCHS):
        for gated, epoch in epochs.items():
            start = perf_counter()
            epoch().value()
            seconds[gated].append(perf_counter() - start)
    (gated, _), (plain, _) = states[True], states[False]
    assert all(gated[name].equal(plain[name]) for name in plain), "the weights differ"
    pairs = list(zip(seconds[True], seconds[False], strict=True))[2:]
    return statistics.median(one / other for one, other in pairs) - 1


def cost_of_save() -> tuple[float, float]:
    """Seconds for which `save_soon` keeps its caller, and of a copy; medians."""
    layers = [nn.Linear(*sizes) for sizes in itertools.pairwise(LAYERS)]
    goal = ll.supervised(nn.Sequential(*layers), nn.MSELoss())
    params, opt_state = ll.init(goal, ll.optim.Adam())
    run = Run(params, opt_state, epoch=1)
    blocked, copied = [], []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(directory)
        with checkpoints.lock():
            for _ in range(SAVES):
                start = perf_counter()
                checkpoints.save_soon(run)
                blocked.append(perf_counter() - start)
                checkpoints.wait()
                start = perf_counter()
                pytree.tree_map(torch.clone, (params, opt_state))
                copied.append(perf_counter() - start)
        loaded = pytree.tree_leaves(ll.load(directory).params)
        assert all(map(torch.equal, loaded, pytree.tree_leaves(params)))
    return statistics.median(blocked), statistics.median(copied)


if __name__ == "__main__":
    main()
