"""Where the rows of a run go: files, TensorBoard, a picture that grows.

Each function makes a logger for `fit(on_epoch=...)`. It writes the row of an epoch at
once, so that a run that is cut off has lost nothing, and reads no tensor.
"""

import json
import os
import weakref
from collections.abc import Callable
from csv import DictReader, DictWriter
from importlib import import_module
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import Any

from lossloop._history import History, Row
from lossloop._training import EpochRecord

__all__ = ["Logger", "csv", "json_lines", "live_plot", "several", "tensorboard"]


class Logger:
    """What `fit(on_epoch=...)` calls after each epoch.

    Used as a context it is closed at the end; else it is when nothing refers to it any
    more. A logger that writes to a file has it open only while it writes.
    """

    def __init__(
        self, write: Callable[[Row], None], close: Callable[[], object] | None = None
    ) -> None:
        """Makes a logger of two functions.

        Args:
            write: Called with the row of each epoch.
            close: Called once at the end; must not refer to the logger.
        """
        self._write = write
        self._close = weakref.finalize(self, close or (lambda: None))
        self._close.atexit = False  # all is written, and who is to see a picture?

    def __call__(self, record: EpochRecord) -> None:
        """Writes the row of an epoch."""
        if not self._close.alive:
            raise ValueError(
                "lossloop.loggers: this logger is closed. Make a new one; with "
                "append=True it goes on where this one ended."
            )
        self._write(record.row)

    def close(self) -> None:
        """Ends it; a second time, nothing happens."""
        self._close()

    def __enter__(self) -> "Logger":
        """The logger itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()


def csv(path: str | os.PathLike[str], *, append: bool = False) -> Logger:
    """Logs to a CSV file: a header, then a line per epoch.

    Numbers are written so that they read back exactly; None is an empty cell. Should a
    row have columns that the file has not, the file is written anew (beside itself, and
    then put in its place), with empty cells in the rows so far.

    Args:
        path: Of the file. Its folder must exist.
        append: Whether to go on in a file that is there, as a run that is continued
            does. A new file is begun where there is none.

    Returns:
        The logger.

    Raises:
        ValueError: If the file exists and `append` is not set, if it ends in the middle
            of a line, or if there is no such folder.

    Example:
        >>> import tempfile, lossloop as ll
        >>> from lossloop import loggers
        >>> path = Path(tempfile.mkdtemp()) / "run.csv"
        >>> log = loggers.csv(path)
        >>> log(ll.EpochRecord({"epoch": 1, "train_loss": 0.5}, {}, None))
        >>> print(path.read_text(), end="")
        epoch,train_loss
        1,0.5
    """
    file = _begun("csv", path, append)
    with file.open(encoding="utf-8", newline="") as lines:
        columns = list(DictReader(lines).fieldnames or ())

    def write(row: Row) -> None:
        new = [name for name in row if name not in columns]
        if new:
            with file.open(encoding="utf-8", newline="") as lines:
                before = [*DictReader(lines)]
            columns.extend(new)
            beside = file.with_name(f"{file.name}.new")
            with beside.open("w", encoding="utf-8", newline="") as lines:
                writer = DictWriter(lines, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows([*before, row])
            beside.replace(file)
            return
        with file.open("a", encoding="utf-8", newline="") as lines:
            DictWriter(lines, columns, lineterminator="\n").writerow(row)

    return Logger(write)


def json_lines(path: str | os.PathLike[str], *, append: bool = False) -> Logger:
    """Logs to a file with one JSON object per epoch and line.

    Numbers read back exactly; None is null. What is not finite is written as Python's
    `json` does and reads it, as NaN and Infinity.

    Args:
        path: Of the file. Its folder must exist.
        append: Whether to go on in a file that is there; see `csv`.

    Returns:
        The logger.

    Raises:
        ValueError: As `csv` does.

    Example:
        >>> import tempfile, lossloop as ll
        >>> from lossloop import loggers
        >>> path = Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> log = loggers.json_lines(path)
        >>> log(ll.EpochRecord({"epoch": 1, "val_loss": None}, {}, None))
        >>> print(path.read_text(), end="")
        {"epoch": 1, "val_loss": null}
    """
    file = _begun("json_lines", path, append)

    def write(row: Row) -> None:
        line = json.dumps(dict(row))  # before the file is touched
        with file.open("a", encoding="utf-8", newline="") as lines:
            lines.write(f"{line}\n")

    return Logger(write)


def tensorboard(log_dir: str | os.PathLike[str], *, append: bool = False) -> Logger:
    """Logs to TensorBoard: each column with numbers is a scalar of the same name.

    The x axis is the column `step`, which therefore is no scalar of its own.
    TensorBoard keeps float32.

    Args:
        log_dir: Folder of the run, made if it is not there. `tensorboard --logdir` of
            its parent shows runs beside each other.
        append: Whether to go on in a folder that holds a run already.

    Returns:
        The logger.

    Raises:
        ImportError: Without tensorboard.
        ValueError: If the folder holds a run and `append` is not set.

    Example:
        >>> import tempfile, lossloop as ll
        >>> from lossloop import loggers
        >>> folder = Path(tempfile.mkdtemp()) / "first"
        >>> with loggers.tensorboard(folder) as log:
        ...     log(ll.EpochRecord({"step": 8, "train_loss": 0.5}, {}, None))
        >>> len(list(folder.glob("events.out.tfevents.*")))
        1
    """
    try:
        module: Any = import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ImportError(
            f"lossloop.loggers.tensorboard needs tensorboard ({error}). Install it: "
            f"python -m pip install tensorboard"
        ) from error
    if not append and any(Path(log_dir).glob("events.out.tfevents.*")):
        raise ValueError(
            f"lossloop.loggers.tensorboard(log_dir={os.fspath(log_dir)!r}) holds a run "
            f"already, with which this one would be mixed. Pass another folder, or "
            f"append=True to continue that run."
        )
    writer = module.SummaryWriter(os.fspath(log_dir))

    def write(row: Row) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return Logger(write, writer.close)


def live_plot(every: float = 1.0) -> Logger:
    """Shows `History.plot()` in a notebook, drawn anew as the run goes on.

    The last epochs are drawn when the logger is closed, or when nothing refers to it
    any more, as after `fit(..., on_epoch=live_plot())`.

    Args:
        every: Seconds between two pictures at least; 0 draws after every epoch.

    Returns:
        The logger.

    Raises:
        ImportError: Without IPython or matplotlib.
        ValueError: If `every` is no number of at least 0.

    Example:
        >>> from lossloop import loggers
        >>> loggers.live_plot(every=-1)
        Traceback (most recent call last):
        ...
        ValueError: lossloop.loggers.live_plot(every=...) must be at least 0, got -1.
    """
    if not every >= 0:
        raise ValueError(
            f"lossloop.loggers.live_plot(every=...) must be at least 0, got {every!r}."
        )
    try:
        display: Any = import_module("IPython.display")
        import_module("matplotlib")  # fail before training, not after an epoch of it
    except ImportError as error:
        raise ImportError(
            f"lossloop.loggers.live_plot shows pictures in a notebook and needs "
            f"IPython and matplotlib ({error}). Install them: python -m pip install "
            f"ipython matplotlib"
        ) from error
    rows: list[Row] = []
    drawn, next_time, handle = 0, monotonic(), None

    def draw() -> None:
        nonlocal drawn, next_time, handle
        if drawn == len(rows):
            return
        picture = BytesIO()
        # As a file: a notebook shows a figure without pyplot only if told how.
        History(rows).plot().savefig(picture, format="png", dpi=100)
        shown = display.Image(data=picture.getvalue(), format="png")
        if handle is None:
            handle = display.display(shown, display_id=True)
        else:
            handle.update(shown)
        # After drawing, so that a slow picture does not take all the time.
        drawn, next_time = len(rows), monotonic() + every

    def write(row: Row) -> None:
        rows.append(row)
        if monotonic() >= next_time:
            draw()

    return Logger(write, draw)


def several(
    *callbacks: Callable[[EpochRecord], object],
) -> Callable[[EpochRecord], str | None]:
    """One function for `fit(on_epoch=...)` that calls several, in this order.

    Args:
        *callbacks: Loggers, or functions of an `EpochRecord` of your own.

    Returns:
        A function that calls all of them, and returns "stop" if one of them did.

    Raises:
        TypeError: If one cannot be called.

    Example:
        >>> import lossloop as ll
        >>> from lossloop import loggers
        >>> seen = []
        >>> both = loggers.several(lambda record: "stop", seen.append)
        >>> both(ll.EpochRecord({"epoch": 1}, {}, None)), len(seen)
        ('stop', 1)
    """
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(
                f"lossloop.loggers.several takes functions of an EpochRecord, got "
                f"{callback!r}."
            )

    def on_epoch(record: EpochRecord) -> str | None:
        said = [callback(record) for callback in callbacks]
        return "stop" if "stop" in said else None

    return on_epoch


def _begun(name: str, path: str | os.PathLike[str], append: bool) -> Path:  # noqa: FBT001
    """The file, which exists from now on, and ends with a whole line."""
    file = Path(path)
    call = f"lossloop.loggers.{name}(path={str(file)!r})"
    if not file.parent.is_dir():
        raise ValueError(f"{call}: there is no folder {str(file.parent)!r}. Make it.")
    size = file.stat().st_size if file.exists() else 0
    if size and not append:
        raise ValueError(
            f"{call} exists. Pass append=True to continue it, or another path."
        )
    with file.open("ab+") as content:
        content.seek(max(0, size - 1))
        if size and content.read() != b"\n":
            raise ValueError(
                f"{call} ends in the middle of a line, as if its writing had been cut "
                f"off. Remove that line."
            )
    return file
