"""One training step: compiled by lossloop against the same step by hand in eager torch.

Question: how much faster is the pure compiled step of a 64-128-128-10 MLP, batch 64,
Adam, than zero_grad, forward, backward, step, without any `.item()`?

All sides first make the same 20 steps and must end with the same weights. Then they
are timed in turn, in one process pinned to one core, and the medians are compared. The
step that is not compiled is there to show what it costs; `fit` uses it for short runs.
Ends with an error if the compiled step is less than 2.2 times as fast as by hand.

    python benchmarks/step_vs_eager.py
"""

import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from torch import nn

import lossloop as ll
from lossloop._machine import processor

ROUNDS, STEPS, BATCH = 25, 200, 64
PROMISED = 2.2


def mlp() -> nn.Module:
    """The model, the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def by_hand(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[Callable, nn.Module]:
    """The step as every tutorial writes it, less the read of the loss."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs, targets = batch

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()

    return run, model


def by_lossloop(
    batch: tuple[torch.Tensor, torch.Tensor], compiled: Callable
) -> tuple[Callable, nn.Module]:
    """The pure step, made faster by `compiled`."""
    model = mlp()
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    optimizer = ll.optim.Adam(lr=1e-3)
    state = list(ll.init(goal, optimizer))
    step = compiled(ll.make_step(goal, optimizer))

    def run(steps: int) -> None:
        params, opt_state = state
        with torch.no_grad():  # as fold calls it
            for _ in range(steps):
                params, opt_state, _, _ = step(params, opt_state, batch)
        state[:] = params, opt_state
        ll.load_params(model, params)

    return run, model


def main() -> None:
    """Checks, times, prints."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(1)
    batch = torch.randn(BATCH, 64), torch.randint(0, 10, (BATCH,))
    sides = {
        "eager by hand": by_hand(batch),
        "pure, not compiled": by_lossloop(batch, lambda step: step),
        "compiled, pure": by_lossloop(batch, ll.compile_step),
        "compiled, donating": by_lossloop(batch, partial(ll.compile_step, donate=True)),
    }
    for run, _ in sides.values():
        run(20)
    reference = sides["eager by hand"][1]
    for name, (_, model) in sides.items():
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(
                tensor, reference.state_dict()[key], rtol=1e-4, atol=1e-6, msg=name
            )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, (run, _) in sides.items():
            start = perf_counter()
            run(STEPS)
            seconds[name].append((perf_counter() - start) / STEPS)
    eager = statistics.median(seconds["eager by hand"])
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one core of")
    print(processor())
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:20} {1e6 * median:7.1f} us  (best {1e6 * min(times):7.1f})"
            f"  {eager / median:5.2f} times as fast as by hand"
        )
    ratio = eager / statistics.median(seconds["compiled, pure"])
    if ratio < PROMISED:
        raise SystemExit(f"the compiled step is only {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
