"""Reading a `DataLoader` over data in memory, against iterating it.

Both give the same samples in the same order, and leave the global generator at the same
place, which is checked first.

    taskset -c 0 python benchmarks/read_loader.py
"""

import statistics
import sys
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lossloop._machine import machine
from lossloop._memory import read

ROUNDS, PROMISED = 9, 10.0


def main() -> None:
    """Measures, prints, checks."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(6400, 64, generator=draw),
        torch.randint(0, 10, (6400,), generator=draw),
    )
    part = Subset(data, torch.randperm(6400, generator=draw)[:3200].tolist())
    loaders = {
        "shuffled, batches of 64": DataLoader(data, 64, shuffle=True),
        "in order, batches of 64": DataLoader(data, 64),
        "shuffled, batches of 32": DataLoader(data, 32, shuffle=True),
        "shuffled, batches of 256": DataLoader(data, 256, shuffle=True),
        "a subset, shuffled, batches of 64": DataLoader(part, 64, shuffle=True),
    }
    print(machine())
    worst = float("inf")
    for name, loader in loaders.items():
        passes = []
        for reader in (iter, read):
            torch.manual_seed(1)
            passes.append((list(reader(loader)), torch.get_rng_state()))
        (theirs, state), (ours, own_state) = passes
        assert torch.equal(state, own_state), name
        for one, other in zip(theirs, ours, strict=True):
            assert all(map(torch.equal, one, other)), name
        ratio = median_ratio(loader)
        worst = min(worst, ratio)
        print(f"{name:35} {ratio:5.1f} times as fast")
    print(f"at least {PROMISED:g} promised, {worst:.1f} found")
    sys.exit(worst < PROMISED)


def median_ratio(loader: DataLoader[tuple[torch.Tensor, ...]]) -> float:
    """Of the times of a pass, by turns."""
    return statistics.median(
        seconds(iter, loader) / seconds(read, loader) for _ in range(ROUNDS)
    )


def seconds(reader: Callable[[Any], Iterable[object]], loader: object) -> float:
    """Of one pass."""
    start = perf_counter()
    for _ in reader(loader):
        pass
    return perf_counter() - start


if __name__ == "__main__":
    main()
