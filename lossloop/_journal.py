"""What `fit` writes down of a run, and how it takes it up again."""

import os
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lossloop._batches import is_one_shot, length, plain
from lossloop._checkpoint import CheckpointMismatch, Checkpoints
from lossloop._files import CheckpointWriteError
from lossloop._machine import matmul_precision, processor
from lossloop._memory import Indexed, in_memory, read
from lossloop._order import (
    Generators,
    after,
    digest,
    keeps_its_place,
    why_not_exact,
)
from lossloop._run import Run
from lossloop._types import Batch, OptState, Params

# What a resumed run may not have otherwise, because it would be another run.
_IDENTITY = ("seed", "restore_best", "samples", "first and last sample")


class Journal:
    """The checkpoints of a run.

    Attributes:
        inexact: Why the rest of a resumed run may differ from that of one that was
            not interrupted.
        changed: Whether it is resumed with other settings, or on another machine.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        resume: bool,
        every: int | None,
        train: Any,
        settings: dict[str, Any],
    ) -> None:
        """Opens a directory.

        Args:
            directory: For the checkpoints, made if there is none.
            resume: Whether the run may have begun already.
            every: Steps between two checkpoints; None for one after every epoch.
            train: The training data: an iterable of batches.
            settings: What the run is made with, as numbers and strings by name.

        Raises:
            ValueError: If there are checkpoints, and none is to be resumed.
        """
        self._store = Checkpoints(directory)
        if not resume and not self._store.empty:
            raise ValueError(
                f"fit(checkpoint={os.fspath(directory)!r}) has checkpoints of another "
                f"run. Pass resume=True to go on from them, or a directory of its own "
                f"for each run."
            )
        self._resume = resume
        self._every = every
        self._train = train
        self._saved_at = 0
        self._first: str | None = None  # digest of the first batch of the epoch
        self._settings = {**settings, **_facts(train)}
        self.inexact: list[str] = []
        self.changed = False

    def lock(self) -> AbstractContextManager[Any]:
        """Keeps other runs out of the directory."""
        return self._store.lock()

    def newest(self, params: Params, opt_state: OptState) -> Run | None:
        """The run to go on with, if there is one, in the form of a fresh one.

        Raises:
            CheckpointMismatch: If it is another run, naming the first difference.
            CheckpointCorrupt: If there are checkpoints, and none can be read.
        """
        found = self._store.newest() if self._resume else None
        if found is None:
            return None
        run, path = found
        if "settings" not in run.rest:
            raise CheckpointMismatch(
                f"fit(resume=True): {path} was not written by fit. Load it by "
                f"lossloop.load, and pass a directory of its own for each run."
            )
        where = f"fit(resume=True): {path}"
        params = _as(where, "params", params, run.params)
        opt_state = _as(where, "opt_state", opt_state, run.opt_state)
        best = run.best
        if best is not None and best.params:
            best = best._replace(params=_as(where, "best.params", params, best.params))
        self._compare(where, *self._then_and_now(run))
        self.inexact = list(run.rest["inexact"]) + self.inexact
        if reason := why_not_exact(self._train):
            self.inexact.append(f"train_loader: {reason}")
        self.inexact = list(dict.fromkeys(self.inexact))
        self._first = run.rest["first"]
        self._saved_at = int(opt_state.step)
        return run._replace(params=params, opt_state=opt_state, best=best)

    def _then_and_now(self, run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings, and what rounds otherwise in the rest of a compiled run."""
        then, now = {**run.rest["settings"]}, {**self._settings}
        # Late: these import the compiler.
        if any(plan["compiled"] for plan in run.rest["plans"]):
            from lossloop._compile import why_not_traced

            then["torch.compile"] = "on"
            now["torch.compile"] = "switched off" if why_not_traced() else "on"
        if run.rest.get("products") is not None:
            from lossloop._products import ours

            name = "matrix products by lossloop"
            then[name], now[name] = run.rest["products"], list(ours())
        return then, now

    def _compare(self, where: str, then: dict[str, Any], now: dict[str, Any]) -> None:
        names = dict.fromkeys([*then, *now])
        differ = [name for name in names if then.get(name) != now.get(name)]
        for name in differ:
            was, new = then.get(name), now.get(name)
            if name in _IDENTITY:
                raise CheckpointMismatch(
                    f"{where} is of another run: {name} was {was!r}, and is {new!r}. "
                    f"Pass what it was made with, or another directory."
                )
            self.inexact.append(f"{name} was {was!r}, and is {new!r}")
        self.changed = bool(differ)
        if differ:
            warnings.warn(
                f"{where}: the run goes on, but not bit for bit as it would have: "
                f"{'; '.join(self.inexact)}.",
                stacklevel=6,  # the call of fit
            )

    def rest_of_epoch(
        self, started: Iterator[Batch], run: Run
    ) -> tuple[Iterator[Batch], Generators]:
        """What is left of the epoch that was interrupted, and its generators.

        Args:
            started: A pass that was begun to look at its first batch.
            run: Of `newest`.

        Raises:
            CheckpointMismatch: If its first batch is another one.
        """
        generators = Generators.of(run.rest["generators"])
        if run.rest["place"] is not None:
            return self._from_place(run), generators
        if is_one_shot(self._train) or keeps_its_place(self._train):
            batches = started
        else:
            generators.put_back(self._train)
            batches = read(self._train)
        if run.batch:
            batches, first = _looked_at(batches)
            if self._first != first:
                was_exact = why_not_exact(self._train) is None
                why = f"the first batch of epoch {run.epoch + 1} is another one"
                if was_exact:
                    raise CheckpointMismatch(
                        f"fit(resume=True): {why} than the run has seen. Pass the "
                        f"same data, in a loader of the same batch_size, sampler and "
                        f"number of workers."
                    )
                self.inexact.append(f"train_loader: {why}")
            batches = after(run.batch, batches)
        else:
            batches = self.begin_epoch(batches)
        return batches, generators

    def place(self, steps: int) -> dict[str, Any] | None:
        """Where a loader is that keeps its place, and the generators with it.

        Args:
            steps: Of the run so far. Before the first, it is where it starts.
        """
        if not keeps_its_place(self._train) or not steps:
            return None
        generators = Generators.now(self._train).state()
        return {"loader": self._train.state_dict(), "generators": generators}

    def _from_place(self, run: Run) -> Iterator[Batch]:
        """What is left of an epoch, of a loader that keeps its place."""
        loader, place = self._train, run.rest["place"]
        generators = Generators.of(place["generators"])
        if run.batch not in (0, length(loader)):
            loader.load_state_dict(place["loader"])
            batches = read(loader)
            generators.put_back(loader)
            return batches
        # Between two passes torchdata's loaders keep nothing but generators, and would
        # draw from them twice. Of others, some go on with none of the last pass, some
        # with the next one, which is not to be begun yet.
        if not type(loader).__module__.startswith("torchdata."):
            loader.load_state_dict(place["loader"])
            if next(iter(loader), None) is not None:
                loader.load_state_dict(place["loader"])
        generators.put_back(loader)
        return iter(()) if run.batch else self.begin_epoch(read(loader))

    def begin_epoch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """A pass from its start, whose first batch is noted."""
        batches, self._first = _looked_at(batches)
        return batches

    def due(self, step: int) -> bool:
        """Whether to save after so many steps, in the middle of an epoch."""
        return self._every is not None and step - self._saved_at >= self._every

    def due_at_end_of_epoch(self, step: int) -> bool:
        """Likewise, between two epochs."""
        return self._every is None or self.due(step)

    def begin(self, run: Run, generators: Generators) -> None:
        """Writes the first checkpoint, before any training.

        Raises:
            CheckpointWriteError: If nothing can be written there.
            TypeError: If a checkpoint cannot hold something of the run.
        """
        self._store.save(self._complete(run, generators))

    def save(self, run: Run, generators: Generators) -> None:
        """Writes a checkpoint, in the background.

        One that cannot be written is warned of: those that are there stay, and the
        next one is tried.
        """
        complete = self._complete(run, generators)
        self.finish()  # or one that failed would take this one with it
        self._tried(lambda: self._store.save_soon(complete))

    def finish(self) -> None:
        """Waits until everything is written."""
        self._tried(self._store.wait)

    def _complete(self, run: Run, generators: Generators) -> Run:
        """The run with what the journal knows of it."""
        rest = {
            **run.rest,
            "settings": self._settings,
            "inexact": self.inexact,
            "first": self._first if run.batch else None,
            "generators": generators.state(),
        }
        self._saved_at = int(run.opt_state.step)
        return run._replace(rest=rest)

    def _tried(self, write: Callable[[], object]) -> None:
        try:
            write()
        except CheckpointWriteError as error:
            warnings.warn(
                f"fit: {error} The run goes on, and tries again at the next one.",
                stacklevel=7,  # the call of fit, at the end of an epoch
            )


def _looked_at(batches: Iterator[Batch]) -> tuple[Iterator[Batch], str | None]:
    """A pass, and the digest of its first batch."""
    if isinstance(batches, Indexed):
        try:
            return batches, digest(batches.peek())
        except StopIteration:
            return batches, None
    for batch in batches:
        return _chained(batch, batches), digest(batch)
    return batches, None


def _chained(batch: Batch, batches: Iterator[Batch]) -> Iterator[Batch]:
    yield batch
    yield from batches


def _as(where: str, name: str, template: Any, loaded: Any) -> Any:
    """What was loaded, in the form and on the devices of a fresh state."""
    places, form = pytree.tree_flatten_with_path(template)
    if isinstance(template, dict):
        for key in dict.fromkeys([*template, *loaded]):
            if (key in template) != (key in loaded):
                which = "the run has none" if key in template else "the model has none"
                raise CheckpointMismatch(
                    f"{where} is of another run: {name}[{key!r}]: {which}. Resume "
                    f"with the model that it was made with."
                )
        loaded = {key: loaded[key] for key in template}
    leaves = pytree.tree_leaves(loaded)
    if len(leaves) != len(places):
        raise CheckpointMismatch(
            f"{where} is of another run: its {name} has {len(leaves)} parts, where "
            f"this one has {len(places)}. Resume with the same optimizer and options "
            f"(precision, ema, skip_nonfinite) that it was made with."
        )
    taken: list[Any] = []
    for (path, fresh), leaf in zip(places, leaves, strict=True):
        if isinstance(fresh, Tensor):
            was, now = (_kind(each) for each in (leaf, fresh))
            if was != now:
                raise CheckpointMismatch(
                    f"{where} is of another run: {name}{pytree.keystr(path)} was "
                    f"{was}, and is {now}. Resume with the model and the optimizer "
                    f"that it was made with."
                )
            leaf = leaf.to(fresh.device)
        taken.append(leaf)
    return pytree.tree_unflatten(taken, form)


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return type(leaf).__name__


def _facts(train: Iterable[Batch]) -> dict[str, Any]:
    """What bits depend on besides the settings of a run."""
    own = plain(train)
    facts: dict[str, Any] = {
        "torch": str(torch.__version__),
        "processor": processor(),
        "system": platform.platform(terse=True),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "matrix products": matmul_precision(),
        "batches": length(train),
    }
    if isinstance(own, DataLoader):
        facts["workers"] = own.num_workers
        facts["samples"] = length(cast(Any, own.dataset))
        if in_memory(own):
            data = cast(Any, own.dataset)
            facts["first and last sample"] = digest([data[0], data[len(data) - 1]])
    elif isinstance(own, list | tuple):
        facts["first and last sample"] = digest([own[0], own[-1]])
    return facts
