"""What a step costs in other training loops, in JAX and in lossloop, on one core.

Question: how long does one training step take, loader and loss included, in the loops
that people use, on the four small works of `lossloop._works`?

The loops are the modules of benchmarks/peers. Every measurement has a process of its
own, and the rounds go over all loops in turn. Before that, all loops train two epochs
in the same order of samples: a loop whose mean losses are not those of the loop of the
tutorials is marked, and not timed. A loop that is not installed is left out. Ends with
an error if lossloop's losses are not those of the tutorial loop.

    python -m pip install -c tests/constraints.txt -c benchmarks/peers.txt \
        -c benchmarks/peers-timing.txt -e '.[peers]'
    python benchmarks/compare_peers.py --output record.md
    python benchmarks/compare_peers.py --works "MLP 128" --peers lossloop jax_scan
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from lossloop._machine import processor
from lossloop._works import works

# Each with the package that it needs.
PEERS = {
    "tutorial": "torch",
    "fused_adam": "torch",
    "compiled_model": "torch",
    "lightning": "lightning",
    "keras_torch": "keras",
    "skorch": "skorch",
    "ignite": "pytorch-ignite",
    "accelerate": "accelerate",
    "jax_jit": "jax",
    "jax_scan": "jax",
    "lossloop": "lossloop",
}
JAX = ("jax_jit", "jax_scan")
TOLERANCE = 2e-3
CHECKED = 2  # epochs


class Run(NamedTuple):
    """What one process is asked to do."""

    work: str
    peer: str
    epochs: int
    shuffle: bool
    threads: int


class Trained(NamedTuple):
    """What it answers, with a number for each epoch."""

    seconds: list[float]
    losses: list[float]


class PeerError(Exception):
    """A loop ended with an error."""


# --- The processes --------------------------------------------------------------------


def answer(run: Run) -> Trained:
    """Trains, in this process."""
    torch.set_num_threads(run.threads)
    work = works()[run.work]
    peer = import_module(f"peers.{run.peer}")
    seconds, losses = peer.train(work, work.model(), run.epochs, shuffle=run.shuffle)
    return Trained([float(t) for t in seconds], [float(loss) for loss in losses])


def ask(run: Run) -> Trained:
    """Trains, in a fresh process, which inherits the cores of this one.

    Raises:
        PeerError: If it fails; the message is its last line.
    """
    script = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "OMP_NUM_THREADS": str(run.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_PLATFORMS": "cpu",
            "KERAS_BACKEND": "torch",
            "KERAS_HOME": folder,
        }
        if run.threads == 1:
            environment["XLA_FLAGS"] = (
                "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
            )
        done = subprocess.run(
            [sys.executable, str(script), "--run", json.dumps(run)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise PeerError(lines[-1])
    return Trained(*json.loads(done.stdout.splitlines()[-1]))


# --- The measurements -----------------------------------------------------------------


class Comparison:
    """All that is found out, by work and loop.

    Attributes:
        differences: The largest relative difference of a loss from the tutorial's.
        microseconds: The time of a step, in the best epoch of all rounds.
        failures: What loops that ended with an error said.
        moved: How far the tutorial's losses are apart, as a share of the first: what a
            loop that does not train would be off by.
    """

    def __init__(self, names: Sequence[str], peers: Sequence[str]) -> None:
        """Finds out nothing yet."""
        self.names = names
        self.peers = peers
        self.differences: dict[tuple[str, str], float] = {}
        self.microseconds: dict[tuple[str, str], float] = {}
        self.failures: dict[tuple[str, str], str] = {}
        self.moved: dict[str, float] = {}

    def check(self, threads: int) -> None:
        """Compares the losses of two epochs, in the order of the data."""
        for name in self.names:
            expected: list[float] = []
            for peer in self.peers:  # the tutorial loop is the first
                run = Run(name, peer, CHECKED, shuffle=False, threads=threads)
                found = self._ask(run)
                if found is None:
                    continue
                if peer == "tutorial":
                    expected = found.losses
                    self.moved[name] = abs(expected[1] / expected[0] - 1)
                pairs = zip(found.losses, expected, strict=True)
                differences = [abs(loss / right - 1) for loss, right in pairs]
                # Unlike Python's max, which may pass over one that is no number.
                self.differences[name, peer] = torch.tensor(differences).max().item()

    def time(self, *, epochs: int, rounds: int, threads: int) -> None:
        """Times those that agree, in turn; the first epoch of each run is warm-up."""
        steps = {name: work.steps for name, work in works().items()}
        for _ in range(rounds):
            for name in self.names:
                for peer in self.peers:
                    if not self.agrees(name, peer):
                        continue
                    run = Run(name, peer, epochs, shuffle=True, threads=threads)
                    found = self._ask(run)
                    if found is None:
                        continue
                    seconds = found.seconds[1:] or found.seconds
                    best = 1e6 * min(seconds) / steps[name]
                    before = self.microseconds.get((name, peer), best)
                    self.microseconds[name, peer] = min(best, before)

    def _ask(self, run: Run) -> Trained | None:
        key = run.work, run.peer
        print(f"{run.work}, {run.peer}, {run.epochs} epochs", file=sys.stderr)
        try:
            return ask(run)
        except PeerError as error:
            if run.peer == "tutorial":
                raise
            self.failures[key] = str(error)
            return None

    def agrees(self, name: str, peer: str) -> bool:
        """Whether it has the losses of the tutorial loop; not if there are none."""
        different = self.differences.get((name, peer), float("inf"))
        # Far less than another rate would make of it, where the loss hardly moves.
        allowed = min(TOLERANCE, self.moved.get(name, 0.0) / 10)
        return different <= allowed and (name, peer) not in self.failures

    def disagreeing(self, peer: str) -> list[str]:
        """The works on which a loop does not have them."""
        return [
            n for n in self.names if peer in self.peers and not self.agrees(n, peer)
        ]


# --- The report -----------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of markdown, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    padded = [map(str.ljust, line, widths) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def times(found: Comparison) -> str:
    """The time of a step in each loop."""

    def cell(name: str, peer: str) -> str:
        key = name, peer
        if key in found.failures:
            return "fails"
        if not found.agrees(name, peer):
            return "disagrees"
        now, usual = found.microseconds[key], found.microseconds[name, "tutorial"]
        return f"{now:.0f} ({usual / now:.2f})"

    rows = [[name] + [cell(name, p) for p in found.peers] for name in found.names]
    return table(["work", *found.peers], rows)


def beside_jax(found: Comparison) -> str:
    """The time of a step in lossloop and in the faster form of JAX."""
    rows = []
    for name in found.names:
        forms = {p: found.microseconds.get((name, p)) for p in JAX}
        timed = {peer: t for peer, t in forms.items() if t is not None}
        own = found.microseconds.get((name, "lossloop"))
        if timed and own is not None:
            best = min(timed, key=timed.__getitem__)
            numbers = f"{own:.0f}", f"{timed[best]:.0f}", f"{own / timed[best]:.2f}"
            rows.append([name, *numbers[:2], best, numbers[2]])
    heads = ["work", "lossloop", "JAX", "form of JAX", "lossloop / JAX"]
    return table(heads, rows) if rows else ""


def losses(found: Comparison) -> str:
    """The largest differences of the losses."""

    def cell(name: str, peer: str) -> str:
        different = found.differences.get((name, peer))
        return "fails" if different is None else f"{different:.0e}"

    peers = [peer for peer in found.peers if peer != "tutorial"]
    rows = [
        [name, f"{found.moved[name]:.0e}"] + [cell(name, peer) for peer in peers]
        for name in found.names
    ]
    return table(["work", "not trained", *peers], rows)


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those that are there."""
    versions = {"torch": torch.__version__}
    for package in packages:
        try:
            versions.setdefault(package, version(package))
        except PackageNotFoundError:
            continue
    return versions


TIMES = """\
Microseconds per step, of the fastest epoch, with what the loop itself does: the loader
in shuffled order and the mean loss. In brackets, how many times as fast as the tutorial
loop. A loop that disagrees has other losses and was not timed."""

BESIDE_JAX = """\
lossloop and the faster form of JAX: microseconds per step, and the quotient; below 1
lossloop is faster."""

LOSSES = """\
The largest relative difference of a mean loss from the tutorial loop's, in two epochs
in the order of the data. "Not trained" is what the losses of these epochs differ by:
what a loop that left the weights alone would be off by. A tenth of that is allowed, and
2e-3 at most."""


def report(found: Comparison, head: str, absent: Sequence[str]) -> str:
    """All of it, as markdown."""
    parts = [f"# {date.today()}, a step in other training loops", head]
    parts += [TIMES, times(found)]
    parts += [f"Not installed: {', '.join(absent)}."] if absent else []
    parts += [
        f"{name}, {peer} fails: {why}" for (name, peer), why in found.failures.items()
    ]
    if quotients := beside_jax(found):
        parts += [BESIDE_JAX, quotients]
    parts += [LOSSES, losses(found)]
    return "\n\n".join(parts)


def main() -> None:
    """Checks, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", choices=works(), default=list(works()))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="and as many cores")
    parser.add_argument("--output", type=Path, help="write the record here too")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(f"\n{json.dumps(answer(Run(*json.loads(options.run))))}")
        return
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cores)
    wanted = [p for p in PEERS if p in {*options.peers, "tutorial"}]
    versions = installed([PEERS[peer] for peer in wanted])
    peers = [peer for peer in wanted if PEERS[peer] in versions]
    found = Comparison(options.works, peers)
    found.check(options.threads)
    found.time(epochs=options.epochs, rounds=options.rounds, threads=options.threads)
    built = ", ".join(f"{package} {number}" for package, number in versions.items())
    head = (
        f"What `benchmarks/compare_peers.py` printed: {options.rounds} rounds of "
        f"{options.epochs} epochs,\n{options.threads} thread(s), cores "
        f"{', '.join(map(str, cores))} of {processor()}.\n"
        f"Python {platform.python_version()}, {built}."
    )
    absent = [peer for peer in wanted if peer not in peers]
    text = report(found, head, absent)
    print(text)
    if options.output:
        options.output.write_text(f"{text}\n")
    if wrong := found.disagreeing("lossloop"):
        sys.exit(f"lossloop's losses are not the tutorial's on: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
