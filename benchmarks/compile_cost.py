"""What compiling a step costs and saves, beside the counts that `compile="auto"` uses.

Question: how far are the estimates of `lossloop._plan` from what is measured? For each
model: operators of a step and the elements they write, its time eager and compiled, the
time to compile with a cold cache, and both as estimated. One core, medians of many.

    python benchmarks/compile_cost.py
"""

import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from time import perf_counter

import torch
from torch import nn

import lossloop as ll
from lossloop._plan import count_cost
from lossloop._works import works


def seconds_of(run: Callable[[], object], budget: float = 2.0) -> float:
    """The median time of a call, over at least five."""
    times: list[float] = []
    while len(times) < 5 or sum(times) < budget:
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Counts, measures, prints."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cache = tempfile.mkdtemp()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one core")
    print(
        f"{'':12}{'operators':>10}{'M elem.':>8}{'eager ms':>10}{'compiled ms':>12}"
        f"{'saved ms':>9}{'(est.)':>8}{'compile s':>10}{'(est.)':>8}{'pays after':>11}"
        f"{'(est.)':>8}"
    )
    for number, (name, work) in enumerate(works().items()):
        model, batch = work.model(), work.batch
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/{number}"  # always cold
        goal = ll.supervised(model, nn.CrossEntropyLoss())
        params, opt_state = ll.init(goal, ll.optim.Adam())
        eager = ll.make_step(goal, ll.optim.Adam())
        cost = count_cost(eager.body.function, (params, opt_state.carry, batch))
        compiled = ll.compile_step(eager, donate=True)
        start = perf_counter()
        own = ll.init(goal, ll.optim.Adam())
        compiled(*own, batch)
        cold = perf_counter() - start
        with torch.no_grad():  # as in fit
            slow = seconds_of(lambda e=eager, b=batch, s=(params, opt_state): e(*s, b))
            fast = seconds_of(lambda c=compiled, b=batch, s=own: c(*s, b))
        saved, spent = cost.saved("cpu"), cost.compilation()
        print(
            f"{name:12}{cost.operators:10}{cost.elements / 1e6:8.3f}{slow * 1e3:10.2f}"
            f"{fast * 1e3:12.2f}{(slow - fast) * 1e3:9.2f}{saved * 1e3:8.2f}"
            f"{cold:10.1f}{spent:8.1f}{cold / (slow - fast):11.0f}{spent / saved:8.0f}"
        )


if __name__ == "__main__":
    main()
