"""A process that trains one work in one loop, an epoch when it is told to.

It reads lines of JSON, `{"epochs": 3}` to make so many or `{}` to end, and answers each
with one: the losses and seconds of these epochs, or what remains to be said.
"""

import argparse
import json
import os
import sys
from importlib import import_module
from time import perf_counter
from typing import Any, TextIO

# Each with its module and its function.
LOOPS = {
    "eager": ("torch_loops", "eager"),
    "fused": ("torch_loops", "fused"),
    "compiled": ("torch_loops", "compiled"),
    "compiled, reduce-overhead": ("torch_loops", "reduce_overhead"),
    "lossloop": ("torch_loops", "fit"),
    "jax": ("jax_loops", "per_batch"),
    "jax scan": ("jax_loops", "per_epoch"),
}


class Turns:
    """Is called after each epoch, and waits until the next is wanted."""

    def __init__(self, loop: Any, device: Any, steps: int, answers: TextIO) -> None:
        """Nothing is wanted yet."""
        self._steps = steps
        self._loop = loop
        self._device = device
        self._answers = answers
        self._wanted = self._asked = 0
        self._begun = 0.0
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self._first: float | None = None
        self.peak: tuple[int, int] | None = None  # with compiling and all

    def __call__(self, seconds: float, loss: float) -> bool:
        """Notes an epoch, and answers if it was the last that was wanted."""
        if self._first is None:
            self._first = perf_counter() - self._begun
        self._seconds.append(seconds)
        self._losses.append(loss)
        if len(self._seconds) < self._wanted:
            return True
        whole = (perf_counter() - self._begun) / self._wanted
        answer = {"seconds": self._seconds, "losses": self._losses, "whole": whole}
        self.say(answer | {"first": self._first, "steps": self._steps})
        return self.wait()

    def wait(self) -> bool:
        """Waits for the next line; False at the end."""
        self._seconds, self._losses = [], []
        self._wanted = json.loads(sys.stdin.readline() or "{}").get("epochs", 0)
        self._asked += 1
        if self._asked == 2:  # all that comes is timed
            self.peak = self._loop.memory(self._device)
            self._loop.forget(self._device)
        self._begun = perf_counter()
        return self._wanted > 0

    def say(self, answer: dict[str, Any]) -> None:
        """Writes a line."""
        print(json.dumps(answer), file=self._answers, flush=True)


def main() -> None:
    """Trains by turns."""
    parser = argparse.ArgumentParser(prog="rivals", description=__doc__.splitlines()[0])
    parser.add_argument("work")
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpt2-batch", type=int, default=32)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    # What libraries print goes to the errors.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, function = LOOPS[options.loop]
    if module == "jax_loops":  # before torch, which brings libraries of CUDA too
        import jax

        jax.devices()
    loop = import_module(f"rivals.{module}")
    import torch

    from rivals.tasks import task

    device = torch.device(options.device)
    chosen = task(options.work, gpt2_batch=options.gpt2_batch, tiny=options.tiny)
    # Products and convolutions of float32 are those of float32, in all loops.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if module == "jax_loops" and chosen.precision == "fp32":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
    turns = Turns(loop, device, chosen.work.steps, answers)
    if not turns.wait():
        return
    remark = getattr(loop, function)(chosen, device, turns)
    timed = loop.memory(device)
    turns.say({"peak": turns.peak or timed, "timed": timed, "remark": remark})


if __name__ == "__main__":
    main()
