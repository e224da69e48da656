"""Peak memory of a training step against the number of its micro-batches.

The batch stays the same, so loss and update do too, which is checked first. Every
figure is from a process of its own: the highest resident memory during one step, above
what was resident before it, after a step that warms up (and compiles). Beside them,
the same accumulation written by hand with `backward()`.

    python benchmarks/accumulate_memory.py

Needs Linux, whose kernel notes the peak of a process and forgets it when asked to.
"""

import argparse
import ctypes
import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import lossloop as ll

BATCH = 256
PARTS = (1, 2, 4, 8, 16, 32)
WAYS = ("by hand", "eager", "compiled")
RATE = 0.01


def model() -> nn.Module:
    """A conv net whose activations are far larger than its parameters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


def make(way: str, parts: int):
    """The step as a function of nothing, and its parameters after the first call."""
    net, loss_fn = model(), nn.CrossEntropyLoss()
    batch = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    if way == "by hand":
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)

        def by_hand() -> dict[str, torch.Tensor]:
            optimizer.zero_grad()
            for x, y in zip(*(t.tensor_split(parts) for t in batch), strict=True):
                (loss_fn(net(x), y) * len(x) / BATCH).backward()
            optimizer.step()
            return dict(net.named_parameters())

        return by_hand
    goal = ll.supervised(net, loss_fn)
    optimizer = ll.optim.SGD(lr=RATE, momentum=0.9)
    step = ll.make_step(goal, optimizer, accumulate=parts)
    if way == "compiled":
        step = ll.compile_step(step, donate=True)
    state = ll.init(goal, optimizer)

    def with_lossloop() -> dict[str, torch.Tensor]:
        nonlocal state
        *state, _, _ = step(*state, batch)
        return state[0]

    return with_lossloop


def resident(field: str) -> float:
    """Resident memory of this process in MB: now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def measure(way: str, parts: int) -> None:
    """Prints the peak of one step, and a parameter that tells whether it is right."""
    torch.set_num_threads(1)
    step = make(way, parts)
    first = next(iter(step().values())).double().norm().item()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    step()
    print(first, resident("VmHWM") - before)


def child(way: str, parts: int) -> tuple[float, float]:
    """What `measure` prints in a process of its own."""
    # A fixed threshold, so that what is freed goes back to the system.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--measure", way, str(parts)]
    printed = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout
    first, peak = map(float, printed.split())
    return first, peak


def main() -> None:
    """Measures all ways and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "PARTS"))
    options = parser.parse_args()
    if options.measure:
        way, parts = options.measure
        return measure(way, int(parts))

    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    print(f"conv net, batch of {BATCH} x 3 x 32 x 32; peak of a step in MB (and share)")
    print("micro-batches  " + "".join(f"{way:>18}" for way in WAYS))
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for parts in PARTS:
        for way in WAYS:
            found[way, parts] = child(way, parts)
            reference, _ = found["by hand", 1]
            if abs(found[way, parts][0] / reference - 1) > 1e-5:
                sys.exit(f"{way} with {parts} micro-batches made another step")
        row = [(found[way, parts][1], found[way, 1][1]) for way in WAYS]
        cells = "".join(f"{peak:10.1f} ({peak / one:4.0%})" for peak, one in row)
        print(f"{parts:13}  {cells}")
    return None


if __name__ == "__main__":
    main()
