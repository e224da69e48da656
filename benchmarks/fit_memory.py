"""Peak memory of `fit` against that of the loop by hand, for a large model with Adam.

Every figure is the highest resident memory of a process of its own, libraries and the
compiler included. All ways give the same losses, which is checked.

    python benchmarks/fit_memory.py

Needs Linux, whose kernel notes the peak of a process.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop._machine import machine
from lossloop._works import tutorial_loop

WAYS = ("by hand", "fit, eager", "fit, compiled")
WIDTH, BATCH, BATCHES, EPOCHS = 4096, 64, 3, 2
PROMISED = 1.05


def train(way: str) -> tuple[int, list[float]]:
    """Parameters of the model, and the mean loss of each epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, WIDTH),
        nn.ReLU(),
        *(layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())),
        nn.Linear(WIDTH, 10),
    )
    size = BATCH * BATCHES
    data = TensorDataset(torch.randn(size, 64), torch.randint(0, 10, (size,)))
    loader = DataLoader(data, BATCH)
    adam = torch.optim.Adam(model.parameters(), lr=1e-5)
    count = sum(p.numel() for p in model.parameters())
    if way != "by hand":
        compiled = way == "fit, compiled"
        result = ll.fit(
            model,
            nn.CrossEntropyLoss(),
            adam,
            loader,
            epochs=EPOCHS,
            compile=compiled,
            progress=False,
        )
        return count, result.history["train_loss"]
    return count, [tutorial_loop(model, loader, adam) for _ in range(EPOCHS)]


def measured(way: str) -> tuple[float, int, list[float]]:
    """Megabytes, parameters, losses, of a process of its own."""
    # Else what was freed may stay with the process, more or less of it by chance.
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.run(
        [sys.executable, __file__, way],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return json.loads(printed)


def main() -> None:
    """Measures, prints, checks."""
    if len(sys.argv) > 1:
        count, losses = train(sys.argv[1])
        lines = Path("/proc/self/status").read_text().splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
        print(json.dumps([int(peak) / 1000, count, losses]))
        return
    found = {way: measured(way) for way in WAYS}
    by_hand, count, expected = found["by hand"]
    print(machine())
    print(f"{count / 1e6:.1f} million parameters, Adam")
    for way, (peak, _, losses) in found.items():
        assert all(
            math.isclose(one, other, rel_tol=1e-4)
            for one, other in zip(losses, expected, strict=True)
        ), f"{way}: {losses}, not {expected}"
        print(f"{way:14} {peak:6.0f} MB, {peak / by_hand:.3f} of by hand")
    ratio = found["fit, compiled"][0] / by_hand
    print(f"compiled: at most {PROMISED} promised, {ratio:.3f} found")
    sys.exit(ratio > PROMISED)


if __name__ == "__main__":
    main()
