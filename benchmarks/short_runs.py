"""What a run costs from start to end: `fit` as people call it beside the loop by hand.

The MLP of 128 units, for few epochs and for many. Every run has a process of its own,
with an empty cache of the compiler, and makes its model, loader and optimizer inside
the time that is measured; what it imports is not. The two take turns, and their losses
are compared.

    taskset -c 0 python benchmarks/short_runs.py
    taskset -c 0 python benchmarks/short_runs.py --epochs 1 10 --rounds 9 --warm
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from time import perf_counter

import torch
from torch import nn

import lossloop as ll
from lossloop._machine import machine
from lossloop._works import tutorial_loop, works

PROMISED = {1: 1.2, 10: 1.2, 100: 1.2, 5000: 0.4}
TOLERANCE = 2e-3  # of mean losses, which begin at log(10)


def run(who: str, epochs: int) -> tuple[float, float, str]:
    """Seconds of one run, its last mean loss, and what was said of compiling."""
    torch.set_num_threads(1)
    work = works()["MLP 128"]
    torch.rand(8).sum().item()  # torch itself has begun
    start = perf_counter()
    model = work.model()
    loader = work.loader()
    optimizer = torch.optim.Adam(model.parameters(), lr=work.rate)
    if who == "by hand":
        for _ in range(epochs):
            loss = tutorial_loop(model, loader, optimizer)
        return perf_counter() - start, loss, ""
    result = ll.fit(
        model, nn.CrossEntropyLoss(), optimizer, loader, epochs=epochs, progress=False
    )
    seconds = perf_counter() - start
    return seconds, result.history["train_loss"][-1], result.compiled.reason


def in_process(who: str, epochs: int, cache: str) -> tuple[float, float, str]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--run", who, "--epochs", str(epochs)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    return tuple(json.loads(done.stdout))


def main() -> None:
    """Measures, prints, checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, nargs="+", default=list(PROMISED))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="keep the compiler's cache")
    parser.add_argument("--run", choices=["by hand", "fit"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        print(json.dumps(run(asked.run, asked.epochs[0])))
        return
    print(machine())
    broken = False
    with tempfile.TemporaryDirectory() if asked.warm else nullcontext() as one:
        for epochs in asked.epochs:
            seconds: dict[str, list[float]] = {"by hand": [], "fit": []}
            for _ in range(asked.rounds if epochs <= 100 else 1):
                losses: list[float] = []
                for who, times in seconds.items():
                    with tempfile.TemporaryDirectory() as own:
                        found, loss, why = in_process(who, epochs, one or own)
                    times.append(found)
                    losses.append(loss)
                assert abs(losses[0] - losses[1]) < TOLERANCE, losses
            by_hand, fit = seconds["by hand"], seconds["fit"]
            best = min(fit) / min(by_hand)
            median = statistics.median(fit) / statistics.median(by_hand)
            print(
                f"{epochs:5} epochs: by hand {min(by_hand):8.3f} s, fit "
                f"{min(fit):8.3f} s: {best:.2f} times (medians {median:.2f}); {why}",
                flush=True,
            )
            broken |= median > PROMISED.get(epochs, math.inf)
    sys.exit(broken)


if __name__ == "__main__":
    main()
