"""The progress bar and the line per epoch."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Literal

from torch import Tensor
from tqdm.auto import tqdm

from lossloop._history import Row
from lossloop._mean import Mean

SECONDS_BETWEEN_READS = 1.0


class Progress:
    """A bar over the steps of each epoch, and a line when it is done.

    If plain, or if the output is no terminal, there are the lines alone.

    The mean on the bar is the exact running mean of the epoch, read from the device
    once a second at most; when silent, nothing is read.
    """

    def __init__(
        self, *, shown: bool | Literal["plain"], epochs: int, batches: int | None
    ) -> None:
        # Without a console Python has no streams, and print says nothing.
        self._shown = bool(shown) and sys.stdout is not None
        self._plain = shown == "plain" or sys.stderr is None
        self._epochs = epochs
        self._batches = batches
        self._bar: Any = None
        self._next_read = 0.0

    def begin(self, epoch: int, step: Tensor) -> None:
        """Starts the bar of an epoch, before which so many steps were made."""
        self._before = int(step)
        if self._shown and self._bar is None:
            self._bar = tqdm(
                total=self._batches,
                desc=f"Epoch {epoch}/{self._epochs}",
                unit="batch",
                leave=False,
                disable=self._plain or None,  # None: not into files
            )
            self._next_read = monotonic() + SECONDS_BETWEEN_READS

    def step(self, mean: Mean, step: Tensor) -> None:
        """Moves the bar to where so many steps have been made."""
        if self._bar is None or self._bar.disable:
            return
        self._bar.update(int(step) - self._before - self._bar.n)
        if monotonic() >= self._next_read:
            total, weight = mean.read()
            if weight > 0:
                self._bar.set_postfix_str(f"train_loss {total / weight:.4g}")
            self._next_read = monotonic() + SECONDS_BETWEEN_READS

    @contextmanager
    def compiling(self, what: str) -> Generator[None]:
        """Says that something is compiled, and in a line how long it took."""
        if self._bar is None:
            yield
            return
        self._bar.set_postfix_str(f"compiling the {what}")
        start = monotonic()
        yield
        self._bar.set_postfix_str("")
        tqdm.write(f"Compiled the {what} in {monotonic() - start:.1f} s")

    def validate(self) -> None:
        """Says that the training part of the epoch is done."""
        if self._bar is not None:
            self._bar.set_postfix_str("validating")

    def end(self, row: Row) -> None:
        """Ends the bar and prints the epoch's line."""
        if self._bar is not None:
            self.close()
            line = describe(row, self._epochs)
            if getattr(tqdm, "_instances", True):
                tqdm.write(line)
            else:  # making room among bars takes longer than printing
                sys.stdout.write(f"{line}\n")

    def say(self, sentence: str) -> None:
        """Prints the last line of a run."""
        if self._shown:
            tqdm.write(sentence)

    def close(self) -> None:
        """Removes the bar, on every way out; one that is not shown serves again."""
        if self._bar is not None and not self._bar.disable:
            self._bar.close()
            self._bar = None


def describe(row: Row, epochs: int) -> str:
    """The line of an epoch, in columns."""
    line = (
        f"Epoch {row['epoch']:{len(str(epochs))}}/{epochs}  "
        f"train_loss {row['train_loss']:<9.4g}"
    )
    for name, value in row.items():
        if name.startswith("val_") and name != "val_se" and value is not None:
            line += f"  {name} {value:<9.4g}"
    if row["lr"] is not None:
        line += f"  lr {row['lr']:<8.3g}"
    return f"{line}  {row['seconds']:.2f} s of training"
