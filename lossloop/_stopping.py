"""When a run ends before its last epoch."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from lossloop._history import Row


class EarlyStopping(NamedTuple):
    """Ends a run once a column of the history has stopped to improve.

    An epoch improves if its value is better than the best so far by more than
    `min_delta`. The run ends after `patience` epochs in a row that do not; a value that
    is no number does not improve, and an epoch without a value does not count.

    Attributes:
        patience: Epochs to wait for, at least 1.
        min_delta: By how much a value must be better, at least 0.
        on: The column, "val_loss" or that of a metric.
        mode: Whether lower ("min") or higher ("max") is better; of a loss, lower is.

    Example:
        >>> EarlyStopping(5, on="val_accuracy", mode="max").patience
        5
    """

    patience: int
    min_delta: float = 0.0
    on: str = "val_loss"
    mode: Literal["min", "max"] | None = None


def as_early_stopping(
    early_stopping: Any, columns: Sequence[str]
) -> EarlyStopping | None:
    """What `fit(early_stopping=...)` may be, refused at the door if it cannot work."""
    if early_stopping is None:
        return None
    if isinstance(early_stopping, int) and not isinstance(early_stopping, bool):
        early_stopping = EarlyStopping(early_stopping)
    if not isinstance(early_stopping, EarlyStopping):
        raise TypeError(
            f"fit(early_stopping=...) must be a number of epochs or an EarlyStopping, "
            f"got {early_stopping!r}."
        )
    patience, min_delta, on, mode = early_stopping
    if patience < 1 or not min_delta >= 0:
        raise ValueError(
            f"fit(early_stopping=...) needs patience >= 1 and min_delta >= 0, got "
            f"{early_stopping!r}."
        )
    if mode not in ("min", "max", None):
        raise ValueError(
            f"fit(early_stopping=...): mode must be 'min' or 'max', got {mode!r}."
        )
    if on not in columns:
        raise ValueError(
            f"fit(early_stopping=...) watches {on!r}, which this run does not have; it "
            f"has {', '.join(columns)}. val_loss and metrics need a val_loader."
        )
    if mode is None and on not in ("train_loss", "val_loss"):
        raise ValueError(
            f"fit(early_stopping=...) watches {on!r}, of which nobody knows whether "
            f"higher is better: pass mode='max', or mode='min'."
        )
    return early_stopping


class Patience:
    """How long a run has waited for a better value.

    Attributes:
        best: The best value so far, or its negative if higher is better.
        waited: Epochs since then.
    """

    def __init__(self, rule: EarlyStopping) -> None:
        self._rule = rule
        self.best = math.inf
        self.waited = 0

    def lost(self, row: Row) -> bool:
        """Whether the run is to end after this epoch."""
        value = row[self._rule.on]
        if value is None:
            return False
        if self._rule.mode == "max":
            value = -value
        if value < self.best - self._rule.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.over

    @property
    def over(self) -> bool:
        """Whether the run has waited long enough."""
        return self.waited >= self._rule.patience
