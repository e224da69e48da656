"""Checkpoints: runs in files that are whole, verified, and run no code when loaded."""

import hashlib
import json
import math
import os
import re
import stat
import warnings
from _thread import allocate_lock, start_new_thread
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lossloop._files import DISK, Files, is_left_over, write_file
from lossloop._history import History
from lossloop._mean import Mean
from lossloop._run import Best, Run
from lossloop._types import (
    Carry,
    Ema,
    Gate,
    Group,
    LossScale,
    OptState,
    Params,
    Slots,
)

VERSION = 1
# Where the tensors are that are no parameters; a slash is in no name of a module.
_OWN = "lossloop/"
# The header begins like this, so that the digest is found before anything is parsed.
_OPENING = '{"__metadata__":{'
_START = _OPENING + '"format":"lossloop","version":"%s","sha256":"%s'
_BEGINS = re.compile((re.escape(_START) % (r"(\d{1,9})", '([0-9a-f]{64})"')).encode())
_UNKNOWN = "0" * 64  # stands where the digest goes while it is computed
# As in safetensors.
_LONGEST_HEADER = 100_000_000
_DEEPEST = 100
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_SCALARS = (type(None), bool, int, float, str)
_MAPPINGS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
# A new class of the state is added here.
_RECORDS = {
    kind.__name__: kind
    for kind in (
        *(Run, Best, Mean),
        *(OptState, Carry, Slots, Group, LossScale, Ema, Gate),
    )
}
# What the fields of a run are.
_FIELDS: dict[str, Any] = {
    "params": dict,
    "epoch": int,
    "batch": int,
    "mean": Mean | None,
    "history": History,
    "best": Best | None,
    "rest": dict,
}
# What reading a damaged file may come to.
_DAMAGE = (
    *(ArithmeticError, AttributeError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
_FILE = re.compile(r"ckpt-(\d{6,18})-(\d{8,18})\.safetensors")

# Locks of this process.
_HELD: set[int] = set()


def _let_go() -> None:
    """In a forked process, such as a loader's worker, which may outlive its parent."""
    for fd in _HELD:
        os.close(fd)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class CheckpointCorrupt(ValueError):
    """A file is no whole checkpoint; `path` says which, and `reason` why not."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"{path} is no whole checkpoint: {reason}. Load another one, or start "
            f"without it."
        )
        self.path = path
        self.reason = reason


class CheckpointMismatch(ValueError):
    """A checkpoint is whole, but of another run than the one that would go on."""


class Trained(Protocol):
    """What a training came to, as `fit` returns it."""

    @property
    def params(self) -> Params:
        """The weights."""
        ...

    @property
    def opt_state(self) -> Any:
        """What a step carries besides."""
        ...

    @property
    def history(self) -> History:
        """A row per epoch."""
        ...


def save(run: Run | Trained, path: str | os.PathLike[str]) -> None:
    """Writes a run to a file, which is there whole or not at all.

    When it returns, the file survives a loss of power, where the file system and the
    disk honour fsync. Until then there is what was there before. The file is one of
    safetensors: other programs find `params` under their own names, and all else under
    names that begin with `lossloop/`. It holds a SHA-256 of itself. The same tensor in
    two places is written once, and is one again when loaded.

    Args:
        run: What to write: a `Run`, or what `fit` returns. It holds None, bools, ints,
            floats, strings, bytes, tensors, dictionaries, lists, tuples, Counters, and
            the records of lossloop; other named tuples become tuples.
        path: Of the file, which is replaced if there is one.

    Raises:
        TypeError: If it holds something else; the place is named.
        ValueError: If `path` is a directory, or the name of a parameter is taken.
        CheckpointWriteError: If the disk is full, or another of its errors.

    Example:
        >>> import tempfile
        >>> run = Run({"weight": torch.ones(2)}, opt_state=(), epoch=1)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(run, f"{directory}/run.safetensors")
        ...     load(f"{directory}/run.safetensors").params
        {'weight': tensor([1., 1.])}
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(
            f"lossloop.save(path=...) is a directory: {path!r}. Name a file in it, "
            f"such as {os.path.join(path, 'run.safetensors')!r}."
        )
    if not isinstance(run, Run):
        run = Run(run.params, run.opt_state, len(run.history), history=run.history)
    write_file(path, _Packed(run, copy=False).chunks(), DISK)


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Run:
    """Reads a run that was saved, and hands it out if its checksum is right.

    It runs no code from the file, and takes at most about twice its size in memory.

    Args:
        path: Of the file; or a directory that `fit` wrote checkpoints to, for the
            newest that is whole. Those that are not are skipped with a warning.
        device: Where to put the tensors. The step count and the seed of an `OptState`
            stay on the CPU, where steps read them.

    Returns:
        The run, equal to the one that was saved: values, dtypes, shapes, strides, and
        which tensors are one and the same.

    Raises:
        FileNotFoundError: If there is no file.
        CheckpointCorrupt: If it is not whole, for whatever reason, or was not written
            by lossloop; of a directory, if no checkpoint in it is whole.

    Example:
        >>> import tempfile
        >>> run = Run({"weight": torch.ones(2)}, opt_state=(), rest={"seed": 7})
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(run, f"{directory}/run.safetensors")
        ...     load(f"{directory}/run.safetensors").rest
        {'seed': 7}
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        return _read(path, torch.device(device))
    found = _newest(path, torch.device(device), DISK)
    if found is None:
        raise FileNotFoundError(
            f"lossloop.load: there is no checkpoint in the directory {path!r}. Name "
            f"the one that fit wrote to, or a file."
        )
    return found[0]


class Checkpoints:
    """The checkpoints of one run, in a directory of their own.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     checkpoints = Checkpoints(directory)
        ...     with checkpoints.lock():
        ...         for epoch in range(1, 4):
        ...             checkpoints.save(Run({"weight": torch.ones(2)}, (), epoch))
        ...     sorted(os.listdir(directory))[-2:], load(directory).epoch
        (['ckpt-000002-00000000.safetensors', 'ckpt-000003-00000000.safetensors'], 3)
    """

    def __init__(
        self, directory: str | os.PathLike[str], files: Files = DISK, keep: int = 2
    ) -> None:
        """Makes the directory if there is none.

        Args:
            directory: Of the run.
            files: The system calls.
            keep: How many whole checkpoints to leave there, at least 1.

        Raises:
            ValueError: If that is less than 1, or `directory` is a file.
        """
        if keep < 1:
            raise ValueError(
                f"Checkpoints(keep=...) must be an int of at least 1, got {keep}."
            )
        self.directory = os.fspath(directory)
        self._files = files
        self._keep = keep
        # By name, whether it is whole, where that is known.
        self._whole: dict[str, bool] = {}
        self._pending: _Background | None = None
        place = Path(self.directory)
        if place.exists() and not place.is_dir():
            raise ValueError(
                f"The checkpoints of a run go into a directory, and "
                f"{self.directory!r} is a file. Name a directory; it is made if there "
                f"is none."
            )
        missing = [each for each in (place, *place.parents) if not each.exists()]
        place.mkdir(parents=True, exist_ok=True)
        for each in missing:
            files.fsync_directory(str(each.parent))

    @contextmanager
    def lock(self) -> Generator[None]:
        """Keeps other runs from writing here, until the context or the process ends.

        First it removes what dead processes left: files that are not finished, and
        checkpoints that are too many. In the end it waits until everything is written.

        Raises:
            RuntimeError: If another run writes here.
            CheckpointWriteError: If in the end something could not be written.
        """
        fd = self._locked()
        try:
            for name in self._files.listdir(self.directory):
                if is_left_over(name):
                    with suppress(OSError):
                        self._files.unlink(os.path.join(self.directory, name))
            self._prune()
            yield
        except BaseException as error:
            try:
                self.wait()
            except OSError as failed:  # is not to hide what came first
                error.add_note(f"And then: {failed}")
            raise
        else:
            self.wait()
        finally:
            if fd in _HELD:  # and this is no forked process
                _HELD.remove(fd)
                os.close(fd)

    def _locked(self) -> int | None:
        """A file that holds the lock as long as it is open."""
        try:
            import fcntl
        except ImportError:  # as on Windows
            return None
        fd = os.open(
            os.path.join(self.directory, ".lock"), os.O_CREAT | os.O_RDWR, 0o666
        )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                raise
            raise RuntimeError(
                f"Another run is writing checkpoints to {self.directory!r}. Wait for "
                f"it, end it, or name another directory."
            ) from None
        _HELD.add(fd)
        return fd

    @property
    def empty(self) -> bool:
        """Whether there is no checkpoint, not even a damaged one."""
        return not _names(self.directory, self._files)

    def newest(self, device: torch.device | str = "cpu") -> tuple[Run, str] | None:
        """The newest run that is whole and the path of its file; None without any.

        Args:
            device: As for `load`.

        Raises:
            CheckpointCorrupt: If there are checkpoints, and none is whole.
        """
        found = _newest(self.directory, torch.device(device), self._files)
        if found is not None:
            self._whole[os.path.basename(found[1])] = True
        return found

    def save(self, run: Run) -> None:
        """Writes a checkpoint and then deletes those that are too many.

        Args:
            run: After its `epoch` and `batch`, which are the name of the file.

        Raises:
            CheckpointWriteError: If that fails, now or for the one before.
        """
        self.wait()
        self._commit(run.epoch, run.batch, _Packed(run, copy=False))

    def save_soon(self, run: Run) -> None:
        """The same, in the background, once the one before is written.

        Args:
            run: Its tensors are copied before this returns, and may then be
                overwritten.

        Raises:
            CheckpointWriteError: If the one before could not be written.
        """
        self.wait()
        packed = _Packed(run, copy=True)
        commit = partial(self._commit, run.epoch, run.batch, packed)
        self._pending = _Background(commit)
        self._pending.start()

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            CheckpointWriteError: If it could not be.
        """
        pending = self._pending
        if pending is not None:
            pending.wait()  # if this is interrupted, it is waited for again
            self._pending = None
            if pending.error is not None:
                raise pending.error

    def _commit(self, epoch: int, batch: int, packed: "_Packed") -> None:
        name = f"ckpt-{epoch:06}-{batch:08}.safetensors"
        path = os.path.join(self.directory, name)
        write_file(path, packed.chunks(), self._files)
        self._whole[name] = True
        self._prune()

    def _prune(self) -> None:
        """Deletes the checkpoints that are too many, the oldest."""
        whole = 0
        # What cannot be deleted now is, after the next.
        with suppress(OSError):
            names = _names(self.directory, self._files)
            for name in names if len(names) > self._keep else ():
                path = os.path.join(self.directory, name)
                if whole >= self._keep:
                    self._files.unlink(path)
                    self._whole.pop(name, None)
                elif self._is_whole(name, path):
                    whole += 1

    def _is_whole(self, name: str, path: str) -> bool:
        if name not in self._whole:
            try:
                _verified(path)
                self._whole[name] = True
            except (CheckpointCorrupt, FileNotFoundError):
                self._whole[name] = False
        return self._whole[name]


class _Background:
    """Something that is done in a thread, and waited for again after interruptions.

    Those of `threading` and `concurrent.futures` take locks in Python: a signal that
    raises at the wrong moment leaves them locked, and everybody waits forever. Here a
    signal is heeded only where that changes nothing.

    Attributes:
        error: What it raised.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._function = function
        self._over = True
        self._lock = allocate_lock()  # until it is over
        self._lock.acquire()

    def start(self) -> None:
        """Begins."""
        self._over = False
        try:
            start_new_thread(self._run, ())
        except RuntimeError:  # there can be no more threads
            self._over = True
            raise

    def wait(self) -> None:
        """Waits until it is over."""
        while not self._over:
            self._lock.acquire()

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self.error = error
        finally:
            # What it holds is let go of here. Afterwards the process may end at any
            # time, and a thread that is freeing tensors then aborts it: torch waits
            # for Python's lock in C++, where no thread may be ended.
            del self._function
            self._over = True
            self._lock.release()


def _names(directory: str, files: Files) -> list[str]:
    """The names of the checkpoints in a directory, the newest first."""
    found = filter(None, map(_FILE.fullmatch, files.listdir(directory)))
    order = {match[0]: (int(match[1]), int(match[2])) for match in found}
    return sorted(order, key=order.__getitem__, reverse=True)


def _newest(
    directory: str, device: torch.device, files: Files
) -> tuple[Run, str] | None:
    skipped = None
    for name in _names(directory, files):
        path = os.path.join(directory, name)
        try:
            return _read(path, device), path
        except CheckpointCorrupt as error:
            skipped = skipped or error
            warnings.warn(
                f"Skipped the checkpoint {path}: {error.reason}.", stacklevel=3
            )
        except FileNotFoundError:  # deleted by a run that goes on there
            continue
    if skipped is not None:
        raise skipped
    return None


class _Packed:
    """A run taken apart: tensors by name, row-major on the host, and the rest as JSON.

    Args:
        run: What to take apart.
        copy: Whether to copy every tensor.
    """

    def __init__(self, run: Run, *, copy: bool) -> None:
        fields: dict[str, Any] = run._asdict()
        for name in ("params", "rest"):
            if isinstance(fields[name], Mapping):
                fields[name] = dict(fields[name])
        run = _checked(Run(**fields))
        for name in run.params:
            if name.startswith(_OWN) or name == "__metadata__":
                raise ValueError(
                    f"run.params has the name {name!r}, which the file needs itself. "
                    f"Rename the module."
                )
        self._copy = copy
        self._tensors: dict[str, Tensor] = {}
        self._strides: dict[str, tuple[int, ...]] = {}
        self._seen: dict[Any, str] = {}
        self._run = self._encoded(run, "run", ())

    def chunks(self) -> list[bytes | memoryview]:
        """What the file is made of; the tensors are not copied."""
        # Wide types first, so that all are aligned.
        order = sorted(self._tensors, key=lambda n: (-self._tensors[n].itemsize, n))
        entries: dict[str, Any] = {}
        views: list[memoryview] = []
        end = 0
        for name in order:
            tensor = self._tensors[name]
            views.append(_memory(tensor))
            begin, end = end, end + views[-1].nbytes
            entries[name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        rest = {
            "run": json.dumps(self._run, separators=(",", ":")),
            "strides": json.dumps(self._strides, separators=(",", ":")),
        }
        start = _START % (VERSION, _UNKNOWN)
        ending = json.dumps({"__metadata__": rest, **entries}, separators=(",", ":"))
        text = f'{start}",{ending.removeprefix(_OPENING)}'
        header = text.encode().ljust(-(-len(text) // 8) * 8)
        if len(header) > _LONGEST_HEADER:
            raise ValueError(
                f"A checkpoint cannot hold so many numbers and strings: "
                f"{len(header):,} bytes. Keep long lists of numbers as tensors."
            )
        length = len(header).to_bytes(8, "little")
        digest = hashlib.sha256(length + header)
        for view in views:
            digest.update(view)
        at = len(start)
        header = header[: at - 64] + digest.hexdigest().encode() + header[at:]
        return [length + header, *views]

    def _encoded(self, value: Any, place: str, path: tuple[str, ...]) -> Any:
        """A value as JSON: an array is a list, an object has its kind as the one key.

        Args:
            value: What to encode.
            place: Where it is, for messages.
            path: Where it is, for the names of tensors.
        """
        if len(path) > _DEEPEST:
            raise ValueError(
                f"A checkpoint cannot hold what is nested more than {_DEEPEST} deep, "
                f"as {place[:200]}... is. Does it contain itself?"
            )
        kind: Any = type(value)
        if kind is float and not math.isfinite(value):
            return {"float": str(value)}
        if kind in _SCALARS:
            return value
        if kind in (Tensor, nn.Parameter):
            return {"tensor": self._stored(value, place, path)}
        if kind is bytes:
            data = torch.empty(len(value), dtype=torch.uint8)
            _memory(data)[:] = value
            return {"bytes": self._named(data, path)}
        if kind is History:
            rows = [dict(row) for row in value]
            return {"History": self._encoded(rows, place, path)}
        if kind.__name__ in _MAPPINGS and kind is _MAPPINGS[kind.__name__]:
            for key in value:
                if type(key) not in _SCALARS:
                    raise TypeError(
                        f"A key of {place} is a {type(key).__name__}, which a "
                        f"checkpoint cannot hold. Use strings or numbers."
                    )
            return {
                kind.__name__: [
                    [
                        self._encoded(key, place, path),
                        self._encoded(each, f"{place}[{key!r}]", (*path, str(key))),
                    ]
                    for key, each in value.items()
                ]
            }
        names = getattr(kind, "_fields", None)
        if issubclass(kind, tuple) and names is not None:
            fields = [
                self._encoded(each, f"{place}.{name}", (*path, name))
                for name, each in zip(names, value, strict=True)
            ]
            if _RECORDS.get(kind.__name__) is not kind:
                return {"tuple": fields}
            return {kind.__name__: dict(zip(names, fields, strict=True))}
        if kind in (list, tuple):
            items = [
                self._encoded(each, f"{place}[{i}]", (*path, str(i)))
                for i, each in enumerate(value)
            ]
            return items if kind is list else {"tuple": items}
        raise TypeError(
            f"{place} is a {kind.__name__}, which a checkpoint cannot hold. It holds "
            f"None, bool, int, float, str, bytes, tensors, and dictionaries, lists and "
            f"tuples of them."
        )

    def _stored(self, tensor: Tensor, place: str, path: tuple[str, ...]) -> str:
        """The name under which the file has a tensor."""
        if tensor.dtype not in _CODES or tensor.layout != torch.strided:
            raise TypeError(
                f"{place} is a tensor of {tensor.dtype} and {tensor.layout}, which a "
                f"safetensors file cannot hold. Convert it before."
            )
        if tensor.device.type == "meta":
            raise TypeError(f"{place} is on the device 'meta', and has no values.")
        shape, strides = tuple(tensor.shape), tensor.stride()
        key = (
            *(tensor.device, tensor.data_ptr(), tensor.dtype, shape, strides),
            *(tensor.is_conj(), tensor.is_neg()),
        )
        if tensor.numel() and key in self._seen:
            return self._seen[key]
        # A view of the values, without the bits that stand for operations.
        plain = tensor.detach().resolve_conj().resolve_neg()
        host = plain.to("cpu", copy=self._copy).contiguous()
        name = self._named(host, path)
        if strides != _row_major(shape) and _is_dense(shape, strides):
            self._strides[name] = strides
        self._seen[key] = name
        return name

    def _named(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        if len(path) == 2 and path[0] == "params":
            name = path[1]
        else:
            name = first = _OWN + "/".join(path)
            number = 1
            while name in self._tensors:  # a key may be like a path of two others
                number += 1
                name = f"{first}~{number}"
        self._tensors[name] = tensor
        return name


def _checked(run: Any) -> Run:
    if type(run) is not Run:
        raise TypeError(f"It must be a Run, got a {type(run).__name__}.")
    for name, kind in _FIELDS.items():
        value = getattr(run, name)
        if not isinstance(value, kind):
            wanted = getattr(kind, "__name__", kind)
            raise TypeError(f"run.{name} must be {wanted}, got {type(value).__name__}.")
    params: dict[Any, Any] = run.params
    for name, tensor in params.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise TypeError(
                f"run.params must hold tensors by their names, got {name!r}: "
                f"{type(tensor).__name__}."
            )
    return run


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, as torch chooses them."""
    strides: list[int] = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill a block of memory, in whatever order of dimensions."""
    expected = 1
    sizes = ((step, n) for step, n in zip(strides, shape, strict=True) if n != 1)
    for step, size in sorted(sizes):
        if step != expected:
            return False
        expected *= size
    return True


def _memory(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    # Flat by force: the only element of a view may have another stride than 1.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def _read(path: str, device: torch.device) -> Run:
    metadata, tensors = _verified(path)
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    try:
        return _checked(_decoded(json.loads(metadata["run"]), moved, tensors))
    except _DAMAGE as error:
        raise CheckpointCorrupt(path, f"it holds no run ({error})") from error


def _verified(path: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file whose digest is right."""
    try:
        # Or a pipe would be waited for.
        nonblocking = getattr(os, "O_NONBLOCK", 0)
        with open(
            path, "rb", opener=lambda p, flags: os.open(p, flags | nonblocking)
        ) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is no ordinary file")
            start = file.read(8)
            length = int.from_bytes(start, "little")
            payload = status.st_size - 8 - length
            if payload < 0 or length > _LONGEST_HEADER:
                raise ValueError(f"it has {status.st_size} bytes, its header {length}")
            header = file.read(length)
            begins = _BEGINS.match(header)
            if begins is None:
                raise ValueError("there is no checksum: not written by lossloop")
            version, digest = (group.decode() for group in begins.groups())
            if int(version) != VERSION:
                raise ValueError(
                    f"it has version {version} of the format, and this lossloop reads "
                    f"version {VERSION}; use the lossloop that wrote it"
                )
            at = begins.start(2)
            seen = hashlib.sha256(start)
            seen.update(header[:at] + _UNKNOWN.encode() + header[at + 64 :])
            entries = json.loads(header)
            metadata = entries.pop("__metadata__")
            end = 0
            found: list[tuple[str, torch.dtype, list[int]]] = []
            for name, entry in sorted(
                entries.items(), key=lambda item: item[1]["data_offsets"]
            ):
                dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
                if any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
                    raise ValueError(f"{name} has the shape {shape}")
                begin, end = end, end + math.prod(shape) * dtype.itemsize
                if entry["data_offsets"] != [begin, end]:
                    raise ValueError(f"{name} is not where it should be")
                found.append((name, dtype, shape))
            if end != payload:
                raise ValueError(f"it has {payload} bytes of tensors, not {end}")
            tensors: dict[str, Tensor] = {}
            for name, dtype, shape in found:
                tensors[name] = torch.empty(shape, dtype=dtype)
                view = _memory(tensors[name])
                if file.readinto(view) != view.nbytes:
                    raise ValueError("it became shorter while it was read")
                seen.update(view)
            if seen.hexdigest() != digest:
                raise ValueError("its checksum is wrong")
            for name, strides in json.loads(metadata["strides"]).items():
                tensors[name] = _laid_out(tensors[name], strides)
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise CheckpointCorrupt(path, f"{error}") from error
    return metadata, tensors


def _laid_out(tensor: Tensor, strides: list[int]) -> Tensor:
    """The same values in another order of memory."""
    if any(type(n) is not int or not 0 <= n < 2**63 for n in strides):
        raise ValueError(f"a tensor has the strides {strides}")
    if not _is_dense(tensor.shape, strides):
        raise ValueError(f"strides {strides} do not fit the shape {[*tensor.shape]}")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _decoded(code: Any, tensors: dict[str, Tensor], host: dict[str, Tensor]) -> Any:
    """What `_Packed` encoded.

    Args:
        code: A value as JSON.
        tensors: By name, where they are wanted.
        host: The same on the CPU.
    """
    if isinstance(code, list):
        return [_decoded(each, tensors, host) for each in code]
    if not isinstance(code, dict):
        return code
    [(kind, inner)] = code.items()
    match kind:
        case "float":
            return float(inner)
        case "tensor":
            return tensors[inner]
        case "bytes":
            return bytes(_memory(host[inner]))
        case "tuple":
            return tuple(_decoded(each, tensors, host) for each in inner)
        case "History":
            return History(_decoded(inner, tensors, host))
        case _ if kind in _MAPPINGS:
            pairs = [_decoded(pair, tensors, host) for pair in inner]
            return _MAPPINGS[kind](dict(pairs))
        case _:
            # Steps read these on the CPU.
            there = ("step", "seed") if kind == OptState.__name__ else ()
            fields = {
                name: _decoded(each, host if name in there else tensors, host)
                for name, each in inner.items()
            }
            return _RECORDS[kind](**fields)
