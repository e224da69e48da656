"""What the epochs of a run came to, as rows and as columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

Row = Mapping[str, Any]


class History(Sequence[Row]):
    """One row per epoch, and the same as columns.

    Columns: `epoch` (from 1), `step` (steps made so far), `train_loss` (mean of the
    losses as seen while training, weights moving, train mode), `val_loss` (mean with
    the weights frozen after the epoch, eval mode; None without validation data), `lr`
    (of the epoch's last step, first parameter group), `seconds` (wall time of the
    epoch's training), `n_train` and `n_val` (sums of weights; the number of samples
    for a loss that weighs them all 1).

    Example:
        >>> history = History([{"epoch": 1, "train_loss": 0.5}])
        >>> history[-1]["train_loss"], history["train_loss"]
        (0.5, [0.5])
    """

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self._rows = [dict(row) for row in rows]

    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    @overload
    def __getitem__(self, key: int) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> "History": ...
    def __getitem__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key: str | int | slice
    ) -> "list[Any] | Row | History":
        """A column by name, an epoch's row by index, or a part of the history."""
        if isinstance(key, str):
            if key not in self.columns:
                raise KeyError(f"history has no column {key!r}, only {self.columns}.")
            return [row[key] for row in self._rows]
        if isinstance(key, slice):
            return History(self._rows[key])
        return dict(self._rows[key])

    def __len__(self) -> int:
        """The number of epochs."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        """The rows, in order; copies, so that the history stays as it is."""
        return map(dict, self._rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in order."""
        return tuple(self._rows[0]) if self._rows else ()

    def append(self, row: Row) -> "History":
        """The history with one more epoch."""
        return History([*self._rows, row])

    def __repr__(self) -> str:
        """A table for the terminal."""
        cells = [
            list(self.columns),
            *([_cell(value) for value in row.values()] for row in self._rows),
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True))
            for line in cells
        )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
