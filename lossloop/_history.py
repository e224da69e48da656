"""What the epochs of a run came to, as rows and as columns."""

import csv
import html
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Row = Mapping[str, Any]

# What goes on counting over the runs of a merged history.
COUNTS = ("epoch", "step")
# A longer table shows so many of its first and last rows.
LONGEST_TABLE, FIRST, LAST = 40, 5, 20


class History(Sequence[Row]):
    """One row per epoch, and the same as columns.

    Columns: `epoch` (from 1), `step` (steps made so far), `train_loss` (mean of the
    losses as seen while training, weights moving, train mode), `val_loss` (mean with
    the weights frozen after the epoch, eval mode; None without validation data), `lr`
    (of the epoch's last step, first parameter group), `seconds` (wall time of the
    epoch's training), `n_train` and `n_val` (sums of weights; the number of samples
    for a loss that weighs them all 1).

    Rows may have different columns: all have the columns of all, in the order in which
    they first appear, and None where there was nothing. Printed, it is a table, with a
    star at the best epoch. Its methods change nothing and return what is new.

    Example:
        >>> history = History([{"epoch": 1, "train_loss": 0.5}])
        >>> history[-1]["train_loss"], history["train_loss"]
        (0.5, [0.5])
        >>> history.append({"epoch": 2, "train_loss": 0.25, "val_loss": 0.75})
        epoch  train_loss  val_loss
            1         0.5         -
           *2        0.25      0.75
    """

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        """Makes a history of rows, which are copied.

        Args:
            rows: A mapping for each epoch, from the names of the columns to values.
        """
        blank = dict.fromkeys(name for row in rows for name in row)
        # Rows are never changed, so that histories can share them.
        self._rows: list[dict[str, Any]] = [{**blank, **row} for row in rows]
        # What `merge` added to the numbers of the last run in it.
        self._added = dict.fromkeys(COUNTS, 0)

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

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the lowest finite `val_loss`, the first of several; or None."""
        best = self._best
        return None if best is None else self._rows[best].get("epoch")

    def append(self, row: Row) -> "History":
        """The history with one more epoch.

        Args:
            row: Of the epoch; None stands in columns that it lacks, and in rows so far
                for columns that are new.

        Returns:
            Another history.
        """
        if self._rows and row.keys() <= self._rows[0].keys():
            longer = History()
            longer._rows = [*self._rows, {**dict.fromkeys(self.columns), **row}]
        else:
            longer = History([*self._rows, row])
        longer._added = self._added
        return longer

    def merge(self, later: "History") -> "History":
        """The history of a run that another one continued.

        The columns `epoch` and `step` of `later` go on from the last ones here: these
        are added, unless the numbers go on already, as the steps do after a second
        `fit` with the same instance of an optimizer. They go on if the first is larger
        than the last of the run before it. (So a run that makes more steps in its first
        epoch than there were before it counts as one that goes on.) It does not matter
        in which order several runs are merged: `a.merge(b).merge(c)` is
        `a.merge(b.merge(c))`. For this a merged history remembers how its last run was
        numbered; sliced, or read from a file, it counts as one run.

        Args:
            later: Of the run that came after.

        Returns:
            Another history, with the columns of both and None where there was nothing.

        Raises:
            TypeError: If `later` is no History.
            ValueError: If a row has no `epoch`, or one that is no int.

        Example:
            >>> first = History([{"epoch": 1, "step": 8}, {"epoch": 2, "step": 16}])
            >>> second = History([{"epoch": 1, "step": 8, "train_loss": 0.5}])
            >>> first.merge(second)
            epoch  step  train_loss
                1     8           -
                2    16           -
                3    24         0.5
        """
        if not isinstance(later, History):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"History.merge(later=...) must be a History, got {type(later)}. Make "
                f"one of rows by History(rows); a Result of fit has one in .history."
            )
        for name, history in (("history", self), ("later", later)):
            for index, row in enumerate(history._rows):
                if not isinstance(row.get("epoch"), int):
                    raise ValueError(
                        f"History.merge: {name}[{index}]['epoch'] must be an int, got "
                        f"{row.get('epoch')!r}. Number the rows from 1."
                    )
        add, added = {}, {}
        for column in COUNTS:
            before, after = (
                [row[column] for row in rows if row.get(column) is not None]
                for rows in (self._rows, later._rows)
            )
            last, own = before[-1] if before else 0, self._added[column]
            if not after:
                added[column] = own
                continue
            add[column] = own if after[0] > last - own else last
            added[column] = add[column] + later._added[column]
        moved = [
            {
                name: value + add[name] if name in add and value is not None else value
                for name, value in row.items()
            }
            for row in later._rows
        ]
        merged = History([*self._rows, *moved])
        merged._added = added
        return merged

    def to_pandas(self) -> "DataFrame":
        """A data frame with the columns of the history; None becomes missing.

        Raises:
            ImportError: Without pandas.

        Example:
            >>> History([{"epoch": 1, "train_loss": 0.5}]).to_pandas()
               epoch  train_loss
            0      1         0.5
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError(
                f"History.to_pandas needs pandas ({error}), of the extra 'records'. "
                f"Install it: python -m pip install pandas"
            ) from error
        return DataFrame(list(self), columns=list(self.columns))

    @overload
    def to_csv(self, path: None = None) -> str: ...
    @overload
    def to_csv(self, path: str | os.PathLike[str]) -> None: ...
    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str | None:
        """Writes a header and a line per epoch, separated by commas.

        None is an empty cell. Numbers are written so that they read back exactly.

        Args:
            path: Of the file, which is replaced if there is one; None for the text.

        Returns:
            The text, if there is no path.

        Raises:
            TypeError: If a value is no int, float, bool, str or None.

        Example:
            >>> print(History([{"epoch": 1, "val_loss": None}]).to_csv(), end="")
            epoch,val_loss
            1,
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._plain("to_csv"))
        return _written(text.getvalue(), path)

    @overload
    def to_json(self, path: None = None) -> str: ...
    @overload
    def to_json(self, path: str | os.PathLike[str]) -> None: ...
    def to_json(self, path: str | os.PathLike[str] | None = None) -> str | None:
        """Writes a list with an object per epoch.

        None is null. Numbers are written so that they read back exactly; what is not
        finite as NaN and Infinity, as Python's `json` does and reads it.

        Args:
            path: Of the file, which is replaced if there is one; None for the text.

        Returns:
            The text, if there is no path.

        Raises:
            TypeError: If a value is no int, float, bool, str or None.

        Example:
            >>> print(History([{"epoch": 1}, {"epoch": 2}]).to_json(), end="")
            [
            {"epoch": 1},
            {"epoch": 2}
            ]
        """
        rows = ",\n".join(map(json.dumps, self._plain("to_json")))
        return _written(f"[\n{rows}\n]\n", path)

    @classmethod
    def from_csv(cls, text_or_path: str | os.PathLike[str]) -> "History":
        r"""Reads what `to_csv` or `loggers.csv` wrote.

        Args:
            text_or_path: The text, which has a line break, or the path of a file.

        Returns:
            The history. A cell is an int if it reads as one, else a float, else a bool,
            else a string; an empty one is None.

        Raises:
            ValueError: If a line has not as many cells as the header.

        Example:
            >>> History.from_csv("epoch,train_loss\n1,0.5\n")["train_loss"]
            [0.5]
        """
        lines = csv.reader(io.StringIO(_text(text_or_path, r".*\n"), newline=""))
        columns = next(lines, [])
        rows: list[Row] = []
        for cells in lines:
            if cells and len(cells) != len(columns):
                raise ValueError(
                    f"History.from_csv: line {lines.line_num} has {len(cells)} cells, "
                    f"and the header {len(columns)}. Was it cut off? Remove it."
                )
            if cells:
                rows.append(dict(zip(columns, map(_parsed, cells), strict=True)))
        return cls(rows)

    @classmethod
    def from_json(cls, text_or_path: str | os.PathLike[str]) -> "History":
        """Reads what `to_json` or `loggers.json_lines` wrote.

        Args:
            text_or_path: The text, which begins with a bracket or a brace, or the path
                of a file.

        Returns:
            The history.

        Raises:
            ValueError: If it is neither a list of objects nor an object per line.

        Example:
            >>> History.from_json('[{"epoch": 1, "train_loss": 0.5}]')["train_loss"]
            [0.5]
        """
        text = _text(text_or_path, r"\s*[\[{]").strip()
        try:
            if text.startswith("["):
                rows = json.loads(text)
            else:
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"History.from_json: this is no JSON ({error}). Was its writing cut "
                f"off? Remove what is incomplete."
            ) from error
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(
                "History.from_json needs a list of objects, or an object per line, "
                "each the row of an epoch."
            )
        return cls(rows)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        diagnosis: Any = None,
        title: str | None = None,
    ) -> "Figure":
        """Draws the losses, the metrics, and the learning rate if it changes.

        Training is solid and validation dashed; a column `val_se`, the standard error
        of the validation loss, is a band around it. The best epoch is marked. Losses
        that are all positive and span more than two decades have a logarithmic axis.
        Values that are not finite leave gaps, with crosses at the top.

        The figure is none of pyplot's: there is nothing to close, and no display is
        needed. In a notebook it shows itself.

        Args:
            path: Of a file to save it in, as its suffix says: .png, .pdf or .svg.
            diagnosis: What to write above the curves: an object with the name `primary`
                and the `findings`, each with a `name`, `advice` and `evidence`, as of
                `diagnose`. The epochs after `evidence["best_epoch"]` of "overfit", up
                to `as_of_epoch`, are shaded.
            title: Above all.

        Returns:
            The figure, 6.3 inches wide.

        Raises:
            ImportError: Without matplotlib.
            TypeError: If `diagnosis` is something else.
            ValueError: If there is nothing to draw, or matplotlib does not know the
                suffix.

        Example:
            >>> history = History([{"epoch": 1, "train_loss": 0.5, "val_loss": 0.75}])
            >>> figure = history.plot(title="One epoch")
            >>> figure.get_suptitle()
            'One epoch'
        """
        try:
            from lossloop._plot import plot_history
        except ImportError as error:
            raise ImportError(
                f"History.plot needs matplotlib ({error}), of the extra 'records'. "
                f"Install it: python -m pip install matplotlib"
            ) from error
        figure = plot_history(
            {name: self[name] for name in self.columns},
            best_epoch=self.best_epoch,
            diagnosis=diagnosis,
            title=title,
        )
        if path is not None:
            figure.savefig(path, dpi=200, bbox_inches="tight")
        return figure

    def __repr__(self) -> str:
        """A table for the terminal."""
        if not self._rows:
            return "History()"
        indices, left_out = self._shown()
        lines = [list(self.columns), *map(self._cells, indices)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True))
            for line in lines
        ]
        if left_out:
            shown.insert(1 + FIRST, f"... {left_out} ...")
        return "\n".join(shown)

    def _repr_html_(self) -> str:
        """A table for notebooks, with the best epoch in bold."""
        if not self._rows:
            return "<p>History()</p>"
        indices, left_out = self._shown()
        right = 'style="text-align: right"'
        head = "".join(
            f'<th scope="col" {right}>{html.escape(name)}</th>' for name in self.columns
        )
        lines: list[str] = []
        for index in indices:
            best = index == self._best
            cells = "".join(
                f"<td {right}>{html.escape(cell)}</td>" for cell in self._cells(index)
            )
            mark = ' style="font-weight: bold" title="lowest val_loss"' if best else ""
            lines.append(f"<tr{mark}>{cells}</tr>")
        if left_out:
            cell = f'<td colspan="{len(self.columns)}">{html.escape(left_out)}</td>'
            lines.insert(FIRST, f"<tr>{cell}</tr>")
        body = "\n".join(lines)
        return (
            f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
            f"</table>"
        )

    @cached_property
    def _best(self) -> int | None:
        """The index of the row with the lowest finite `val_loss`, if there is one."""
        losses = [
            (row["val_loss"], index)
            for index, row in enumerate(self._rows)
            if isinstance(row.get("val_loss"), int | float)
            and math.isfinite(row["val_loss"])
        ]
        return min(losses)[1] if losses else None

    def _shown(self) -> tuple[list[int], str]:
        """The indices of the rows that a table shows, and what it says of the rest."""
        count = len(self)
        if count <= LONGEST_TABLE:
            return [*range(count)], ""
        hidden = range(FIRST, count - LAST)
        best = f", the best, {self.best_epoch}, among them"
        return (
            [*range(FIRST), *range(count - LAST, count)],
            f"{len(hidden)} epochs left out{best if self._best in hidden else ''}",
        )

    def _cells(self, index: int) -> list[str]:
        """The cells of a row in a table, with a star at the best epoch."""
        cells: list[str] = []
        for name, value in self._rows[index].items():
            cell = f"{value:.6g}" if isinstance(value, float) else str(value)
            star = "*" if name == "epoch" and index == self._best else ""
            cells.append("-" if value is None else star + cell)
        return cells

    def _plain(self, method: str) -> list[dict[str, Any]]:
        """The rows, if all that they hold can be written and read back."""
        for index, row in enumerate(self._rows):
            for name, value in row.items():
                if not isinstance(value, int | float | str | None):
                    raise TypeError(
                        f"History.{method}: history[{index}][{name!r}] must be an int, "
                        f"float, bool, str or None, got {type(value)}. Convert it "
                        f"before it is appended, as by float(value)."
                    )
        return self._rows


def _written(text: str, path: str | os.PathLike[str] | None) -> str | None:
    """The text, unless there is a file to write it to."""
    if path is None:
        return text
    Path(path).write_text(text, encoding="utf-8", newline="")
    return None


def _text(text_or_path: str | os.PathLike[str], begins: str) -> str:
    """What begins like this regular expression, or else is in the file."""
    if isinstance(text_or_path, str) and re.match(begins, text_or_path):
        return text_or_path
    # Spreadsheets write a mark of the byte order.
    return Path(text_or_path).read_bytes().decode("utf-8-sig")


def _parsed(cell: str) -> int | float | bool | str | None:
    """What a cell of a CSV file stands for."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(cell)
    return {"": None, "True": True, "False": False}.get(cell, cell)
