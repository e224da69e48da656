"""What a step costs on a GPU: by hand, by hand compiled, in JAX, in lossloop.

Question: how long does a training step take on a GPU, and how much memory, for the four
small works of `lossloop._works`, for GPT-2 124M (bfloat16 autocast, batches of 32 x
1024 tokens) and for ResNet-18 on images of 3 x 32 x 32? Two aims are checked: MLP 128
at least 5 times as fast as the eager loop; GPT-2 no slower and no larger than the best
compiled loop written by hand (ratios of 1.00, rounded).

The loops are those of benchmarks/rivals:

- eager: the loop of the tutorials, `loss.item()` for each batch;
- fused: a fused optimizer, pinned memory, the loss read once an epoch;
- compiled: the same, with model and loss together compiled by torch.compile;
- compiled, reduce-overhead: the same in CUDA graphs;
- lossloop: `fit(compile=True)`, the seconds of its history;
- jax: a jitted step per batch; jax scan, of small works: a jitted epoch. Data resident.

All train in the same order of samples. Float32 is computed as such, without TF32, by
all (in JAX by the matmul precision "highest"). A loop whose mean losses of the first
two epochs are not those of the eager loop is marked, and has no times.

Each loop has a process of its own, which compiles while others do; then it is timed
while the others wait, an epoch (of small works several) at a turn, in rounds over all
of them. GPT-2 in all loops does not fit the memory at once, so that there are several
such groups. The record is written after each.

    python benchmarks/compare_gpu.py --output record.md
    python benchmarks/compare_gpu.py --works "MLP 128" --rivals eager lossloop
    python benchmarks/compare_gpu.py --device cpu --tiny --gpt2-batch 4 --rounds 1
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import Empty, Queue
from signal import SIGKILL, SIGTERM, signal
from time import monotonic
from typing import Any, NamedTuple

import torch
from rivals.__main__ import LOOPS
from rivals.tasks import NAMES

from lossloop._machine import machine

GPT2, RESNET = "GPT-2 124M", "ResNet-18"
LARGE = (GPT2, RESNET)
BY_HAND = ("compiled", "compiled, reduce-overhead")
# Those whose pace is compared are in one group, if there is room.
GPT2_ORDER = ("lossloop", *BY_HAND, "eager", "jax", "fused")
TOLERANCE = {GPT2: 1e-2}  # in bfloat16
TOLERANCE_FLOAT32 = 2e-3
CHECKED = 2  # epochs
TURN = 0.2  # seconds, at least an epoch
SLOWEST_TURN = 120.0
GPT2_BYTES = 3e9, 1.1e9  # of one process, and for each sample of a batch
FASTER = 5.0
CORES_TO_SPARE = 8


class Key(NamedTuple):
    """A work in a loop."""

    work: str
    rival: str


@dataclass
class Found:
    """What is known of one.

    Attributes:
        losses: Of the first epochs.
        first: Seconds of the first epoch, with compiling.
        steps: In an epoch.
        seconds: Of the epochs that were timed.
        wholes: Of an epoch in each turn, with what a loop does between two.
        peak: Bytes allocated and reserved at most.
        timed: The same of the epochs that were timed.
        remark: Of the loop.
        error: What it ended with, if it did.
    """

    losses: list[float] = field(default_factory=list)
    first: float = math.nan
    steps: int = 1
    seconds: list[float] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    peak: list[int] | None = None
    timed: list[int] | None = None
    remark: str = ""
    error: str = ""


class Settings(NamedTuple):
    """What is the same for all processes."""

    device: str
    gpt2_batch: int
    tiny: bool
    threads: int


# --- The processes --------------------------------------------------------------------


class ChildError(Exception):
    """A process ended, or did not answer in time; the message says why."""


class Child:
    """A process that trains when it is told to.

    Attributes:
        key: What it trains.
    """

    def __init__(self, key: Key, settings: Settings) -> None:
        """Starts it; it imports, makes its data, and waits."""
        self.key = key
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name, "errors")
        folder = Path(__file__).resolve().parent
        paths = [str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")]
        cpu = settings.device == "cpu"
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": str(settings.threads),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(self._folder.name, "inductor")),
            "TORCHINDUCTOR_COMPILE_THREADS": "4" if key.work in LARGE else "1",
            "JAX_PLATFORMS": "cpu" if cpu else "cuda",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {}),
        }
        command = [sys.executable, "-m", "rivals", *key, "--device", settings.device]
        command += ["--gpt2-batch", str(settings.gpt2_batch)]
        command += ["--tiny"] if settings.tiny else []
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._lines = Queue[str]()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def tell(self, **message: int) -> None:
        """Sends a line."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its answer will say why
            self._process.stdin.write(f"{json.dumps(message)}\n")
            self._process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any]:
        """Waits for its answer.

        Raises:
            ChildError: If there is none.
            TimeoutError: If there is none yet.
        """
        try:
            line = self._lines.get(timeout=max(seconds, 0.0))
        except Empty:
            raise TimeoutError from None
        if not line:
            self._process.wait()
            lines = self._errors.read_text().strip().splitlines()
            errors = [text for text in lines if "Error" in text] or lines
            last = (errors or [f"status {self._process.returncode}"])[-1]
            raise ChildError(last[:300])
        return json.loads(line)

    def end(self) -> None:
        """Ends it and what it started, so that its memory is free."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, SIGKILL)
        self._process.wait()
        with suppress(OSError):  # a compiler's process may still be writing
            self._folder.cleanup()


# --- The measurements -----------------------------------------------------------------


class Comparison:
    """All that is found out, by work and loop.

    Attributes:
        found: What was.
        left_out: What was not begun.
    """

    def __init__(self, settings: Settings, deadline: float, rounds: int) -> None:
        """Finds out nothing yet."""
        self._settings = settings
        self._deadline = deadline
        self._rounds = rounds
        self.found: dict[Key, Found] = {}
        self.left_out: list[Key] = []

    def run(self, groups: Sequence[Sequence[Key]]) -> Iterator[None]:
        """Measures group by group; pauses after each."""
        rest = list(groups)
        ahead = self._start(rest[0])
        while rest:
            group, children = rest.pop(0), ahead
            ahead = []
            if monotonic() >= self._deadline:
                self.left_out += group
                self._end(children)
                continue
            try:
                if rest and _cores() >= CORES_TO_SPARE:  # the next begins to import
                    ahead = self._start(rest[0])
                ready = self._warm_up(children)
                self._time([c for c in ready if self.agrees(c.key) is not False])
                self._finish(ready)
            except BaseException:
                self._end(ahead)
                raise
            finally:
                self._end(children)
            rest += self._again(group)
            if rest and not ahead:
                ahead = self._start(rest[0])
            yield

    def _start(self, group: Sequence[Key]) -> list[Child]:
        return [Child(key, self._settings) for key in group]

    def _end(self, children: Sequence[Child]) -> None:
        for child in children:
            child.end()

    def _warm_up(self, children: Sequence[Child]) -> list[Child]:
        """Those that compiled and trained the epochs that are checked.

        As many at once as there are cores. JAX chooses kernels of large works by timing
        them, and does so when the others are ready.
        """
        waiting = sorted(children, key=_is_alone)
        active: list[Child] = []
        ready: list[Child] = []
        while active or waiting:
            alone = any(map(_is_alone, active))
            while waiting and not alone and len(active) < _cores():
                alone = _is_alone(waiting[0])
                if alone and active:
                    break
                active.append(waiting.pop(0))
                active[-1].tell(epochs=CHECKED)
            for child in tuple(active):
                try:
                    answer = child.answer(0.05 / len(active))
                except TimeoutError:
                    if monotonic() < self._deadline:
                        continue
                    self._fail(child, "not ready in time")
                except ChildError as error:
                    self._fail(child, str(error))
                else:
                    losses, first = answer["losses"], answer["first"]
                    self.found[child.key] = Found(losses, first, answer["steps"])
                    ready.append(child)
                    print(f"ready: {', '.join(child.key)}", file=sys.stderr)
                active.remove(child)
            if monotonic() >= self._deadline:
                self.left_out += [child.key for child in waiting]
                waiting = []
        order = [child.key for child in children]
        return sorted(ready, key=lambda child: order.index(child.key))

    def _time(self, children: Sequence[Child]) -> None:
        """Rounds over all of them; one at least."""
        epochs = dict.fromkeys(children, 1)
        for child in children:
            # How fast a small work was while others compiled says little.
            if child.key.work not in LARGE and (trial := self._turn(child, 1)):
                epochs[child] = min(max(1, round(TURN / trial["seconds"][0])), 200)
        for made in range(self._rounds):
            if made and monotonic() >= self._deadline:
                break
            for child in children:
                if answer := self._turn(child, epochs[child]):
                    found = self.found[child.key]
                    found.seconds += answer["seconds"]
                    found.wholes.append(answer["whole"])

    def _turn(self, child: Child, epochs: int) -> dict[str, Any] | None:
        """So many epochs of one that has not failed."""
        if self.found[child.key].error:
            return None
        child.tell(epochs=epochs)
        try:
            return child.answer(SLOWEST_TURN)
        except (TimeoutError, ChildError) as error:
            self._fail(child, str(error) or "did not answer")
            return None

    def _finish(self, children: Sequence[Child]) -> None:
        children = [child for child in children if not self.found[child.key].error]
        for child in children:
            child.tell()
        for child in children:
            found = self.found[child.key]
            try:
                answer = child.answer(SLOWEST_TURN)
            except (TimeoutError, ChildError) as error:
                found.remark = f"at the end: {error}"
            else:
                found.peak, found.timed = answer["peak"], answer["timed"]
                found.remark = answer["remark"]

    def _fail(self, child: Child, why: str) -> None:
        self.found.setdefault(child.key, Found()).error = why
        child.end()
        print(f"failed: {', '.join(child.key)}: {why}", file=sys.stderr)

    def _again(self, group: Sequence[Key]) -> list[list[Key]]:
        """Those that had no memory beside others, each on its own."""
        words = "out of memory", "out_of_memory", "resource_exhausted"
        return [
            [key]
            for key in group
            if len(group) > 1
            and key in self.found
            and any(word in self.found[key].error.lower() for word in words)
        ]

    def agrees(self, key: Key) -> bool | None:
        """Whether it has the losses of the eager loop; None if they are not known."""
        apart = self.apart(key)
        if apart is None:
            return None
        first, second, *_ = self.found[Key(key.work, "eager")].losses
        tolerance = TOLERANCE.get(key.work, TOLERANCE_FLOAT32)
        # Far less than another rate would make of it, where the loss hardly moves.
        return apart <= min(tolerance, abs(second / first - 1) / 10)

    def apart(self, key: Key) -> float | None:
        """The largest relative difference of its losses from the eager loop's."""
        own, eager = (self.found.get(k) for k in (key, Key(key.work, "eager")))
        if own is None or eager is None or not (own.losses and eager.losses):
            return None
        pairs = zip(own.losses, eager.losses, strict=True)
        differences = [abs(loss / right - 1) for loss, right in pairs]
        # Unlike Python's max, which may pass over one that is no number.
        return torch.tensor(differences).max().item()

    def timed(self, key: Key) -> Found | None:
        """What was found, if there are times that count."""
        found = self.found.get(key)
        usable = found is not None and bool(found.wholes) and not found.error
        return found if usable and self.agrees(key) is not False else None


def _is_alone(child: Child) -> bool:
    return child.key.rival == "jax" and child.key.work in LARGE


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def grouped(
    names: Sequence[str], rivals: Sequence[str], at_once: int
) -> list[list[Key]]:
    """What is timed in turn: all small works; the large ones, if they fit."""
    groups: list[list[Key]] = []
    small = [name for name in names if name not in LARGE]
    if small:
        groups.append([Key(name, rival) for name in small for rival in rivals])
    for name in names:
        if name not in LARGE:
            continue
        order = [rival for rival in GPT2_ORDER if rival in rivals]
        size = at_once if name == GPT2 else len(order)
        for begin in range(0, len(order), size):
            groups.append([Key(name, r) for r in order[begin : begin + size]])
    return groups


def room(settings: Settings) -> int:
    """How many processes with GPT-2 the memory has room for."""
    if settings.device == "cpu":
        return 1
    memory = 0.95 * torch.cuda.get_device_properties(0).total_memory
    base, each = GPT2_BYTES
    return max(1, int(memory / (base + each * settings.gpt2_batch)))


# --- The report -----------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of markdown, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    padded = [map(str.ljust, line, widths) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def results(compared: Comparison, name: str, rivals: Sequence[str]) -> str:
    """The table of a work."""
    eager = compared.timed(Key(name, "eager"))
    rows = []
    for rival in rivals:
        key = Key(name, rival)
        found, timed = compared.found.get(key), compared.timed(key)
        if found is None:
            continue
        apart = compared.apart(key)
        losses = "?" if apart is None else f"{apart:.0e}"
        if compared.agrees(key) is False:
            losses += " disagrees"
        first = "" if math.isnan(found.first) else f"{found.first:.1f}"
        row = [rival, *[""] * 6, first, losses]
        if timed is not None:
            per_step = 1e6 / timed.steps
            best, middle = _pace(timed)
            row[1:3] = f"{best:.0f}", f"{middle:.0f}"
            row[3] = f"{per_step * statistics.median(timed.wholes):.0f}"
            if eager is not None:
                row[4] = f"{_pace(eager)[0] / best:.2f}"
            row[5], row[6] = map(_megabytes, (timed.peak, timed.timed))
        if found.error:
            row[8] = "fails"
        rows.append(row)
    heads = ["", "best", "median", "whole", "ratio", "peak MB", "timed MB"]
    return table([*heads, "first s", "losses apart"], rows) if rows else ""


def _pace(found: Found) -> tuple[float, float]:
    """Microseconds per step of the best and of the median epoch."""
    times = min(found.seconds), statistics.median(found.seconds)
    return tuple(1e6 * seconds / found.steps for seconds in times)


def _megabytes(peak: Sequence[int] | None) -> str:
    return "" if peak is None else " / ".join(f"{size / 1e6:.0f}" for size in peak)


def aims(compared: Comparison) -> Iterator[str]:
    """Whether the two hold, as far as it is known."""
    own, eager = (
        compared.timed(Key("MLP 128", rival)) for rival in ("lossloop", "eager")
    )
    if own is not None and eager is not None:
        best, middle = (
            usual / now for usual, now in zip(_pace(eager), _pace(own), strict=True)
        )
        yield (
            f"MLP 128 at least {FASTER:.0f} times as fast as eager: "
            f"{_holds(best >= FASTER)}, {best:.2f} times (by the medians {middle:.2f})"
        )
    own = compared.timed(Key(GPT2, "lossloop"))
    found = {rival: compared.timed(Key(GPT2, rival)) for rival in BY_HAND}
    by_hand = {rival: timed for rival, timed in found.items() if timed is not None}
    if own is None or not by_hand:
        return
    name = min(by_hand, key=lambda rival: _pace(by_hand[rival])[0])
    best = by_hand[name]
    slower, middle = (
        now / usual for now, usual in zip(_pace(own), _pace(best), strict=True)
    )
    yield (
        f"{GPT2} no slower than the best compiled loop written by hand ({name}): "
        f"{_holds(slower < 1.005)}, {slower:.3f} of its time (by the medians "
        f"{middle:.3f})"
    )
    if own.peak and best.peak:
        allocated, reserved = (a / b for a, b in zip(own.peak, best.peak, strict=True))
        yield (
            f"{GPT2} no larger than it: {_holds(reserved < 1.005)}, {reserved:.3f} of "
            f"the memory it reserves ({allocated:.3f} of what it allocates)"
        )


def _holds(holds: bool) -> str:  # noqa: FBT001
    return "holds" if holds else "does not hold"


COLUMNS = """\
Microseconds per step, of the best and of the median epoch, with what the loop itself
does: the loader in shuffled order and the mean loss. Whole: the same with what a loop
does between epochs, the median of the turns. Ratio: how many times as fast as the eager
loop, by the best. Peak: megabytes allocated / reserved at most, with compiling and
checks; timed: in the epochs that were timed (JAX counts from the start). A graph of
CUDA keeps what it reserves. First: seconds of the first epoch, with compiling from
empty caches while other processes compile. Losses apart: the largest relative
difference of the mean losses of two epochs from the eager loop's; allowed is a tenth of
what these losses differ by, at most 2e-3, in bfloat16 1e-2."""


def report(compared: Comparison, head: str, rivals: Sequence[str]) -> str:
    """All of it, as markdown."""
    parts = [f"# {date.today()}, a step on a GPU", head, COLUMNS]
    for name in NAMES:
        if text := results(compared, name, rivals):
            remarks = [
                f"- {rival}: {said}"
                for rival in rivals
                if (found := compared.found.get(Key(name, rival)))
                and (said := f"fails: {found.error}" if found.error else found.remark)
            ]
            parts += [f"## {name}", text, *(["\n".join(remarks)] if remarks else [])]
    if found := list(aims(compared)):
        parts += ["## The aims", "\n".join(f"- {line}" for line in found)]
    if compared.left_out:
        names = "; ".join(f"{work} {rival}" for work, rival in compared.left_out)
        parts.append(f"Left out, for want of time: {names}.")
    return "\n\n".join(parts)


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def header(settings: Settings, rounds: int, absent: Sequence[str]) -> str:
    """On what it was measured, and how."""
    versions = [
        f"{package} {number}"
        for package in ("torch", "triton", "jax", "jaxlib", "numpy", "lossloop")
        if (number := installed(package))
    ]
    if settings.device == "cuda":
        cudnn = torch.backends.cudnn.version()
        versions += [f"CUDA {torch.version.cuda}", f"cuDNN {cudnn}"]
    how = (
        f"What `benchmarks/compare_gpu.py` printed: {rounds} rounds, device "
        f"{settings.device}, {settings.threads} threads\neach, GPT-2 in batches of "
        f"{settings.gpt2_batch}{', tiny models for GPT-2 and ResNet' * settings.tiny}."
    )
    lines = [
        how,
        f"{machine()}; {platform.platform()}.",
        f"{', '.join(versions)}.",
    ]
    lines += [f"Not installed: {', '.join(absent)}."] if absent else []
    return "\n".join(lines)


def main() -> None:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rivals", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpt2-batch", type=int, default=32)
    parser.add_argument("--gpt2-at-once", type=int, help="default what should fit")
    parser.add_argument("--tiny", action="store_true", help="for a trial")
    parser.add_argument("--threads", type=int, default=4, help="of each process")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds in all")
    parser.add_argument("--output", type=Path, help="write the record here too")
    options = parser.parse_args()
    signal(SIGTERM, lambda *_: sys.exit("terminated"))  # and so are the processes
    deadline = monotonic() + options.limit
    settings = Settings(
        options.device, options.gpt2_batch, options.tiny, options.threads
    )
    absent = [
        name
        for name in options.rivals
        if LOOPS[name][0] == "jax_loops" and installed("jax") is None
    ]
    rivals = [name for name in LOOPS if name in options.rivals and name not in absent]
    names = [name for name in NAMES if name in options.works]
    at_once = options.gpt2_at_once or room(settings)
    groups = grouped(names, rivals, at_once)
    compared = Comparison(settings, deadline, options.rounds)
    head = header(settings, options.rounds, absent)
    text = ""
    for _ in compared.run(groups):
        text = report(compared, head, rivals)
        if options.output:
            options.output.write_text(f"{text}\n")
    text = report(compared, head, rivals)
    print(text)
    if options.output:
        options.output.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
