"""Runs that are saved, loaded, crashed, damaged and interrupted in any order."""

import contextlib
import errno
import functools
import itertools
import math
import os
import secrets
import shutil
import signal
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from disk import Crash, Disk, after_power_loss, contents
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.utils import _pytree as pytree

import lossloop as ll
from lossloop import _files
from lossloop._checkpoint import Checkpoints
from lossloop._fold import EndPass
from lossloop._interruption import Interruption
from lossloop._run import Best, Run

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
BATCHES, KEEP = 3, 2
NAN, INF = math.nan, math.inf
# Validation losses of the epochs: ties, and what is not finite.
PLAN = [NAN, 5.0, 4.0, INF, 4.0, 3.0, -INF, 3.0, 7.0, 2.0, NAN, 2.0, *[1.0] * 99]
SKIPPED = {2, 9, 10, 17, 30}  # steps whose batch is not finite
DRAW = torch.Generator().manual_seed(2)
X = torch.randn(7, 4, generator=DRAW)


def goal(params, batch):
    """Least squares with noise, so that the random numbers of a step count too."""
    if batch.ndim == 0:  # validation
        return batch, torch.tensor(1)
    error = params["weight"] * batch - 1 + 0.1 * torch.rand(len(batch))
    return (error**2).sum(), torch.tensor(len(batch))


OPTIMIZER = ll.optim.Adam(lr=0.05)
STEP = ll.make_step(goal, OPTIMIZER)
EVALUATE = ll.make_eval_step(goal)


def start():
    params = {"weight": torch.zeros(())}
    state = ll.init(goal, OPTIMIZER, params=params, ema=0.5, skip_nonfinite=99)
    return Run(*state)


def batch(step):
    """That of a step of the run, from 0."""
    return X[step % len(X)] / (0 if step in SKIPPED else 1)


def stepped(run, count, on_step=None):
    """The run after so many more batches of its epoch."""
    first = run.epoch * BATCHES + run.batch
    batches = [batch(step) for step in range(first, first + count)]
    params, opt_state, mean = ll.fold(
        *(STEP, run.params, run.opt_state, batches), mean=run.mean, on_step=on_step
    )
    made = int(opt_state.step) - int(run.opt_state.step)
    return run._replace(
        params=params, opt_state=opt_state, mean=mean, batch=run.batch + made
    )


def epoch_ended(run):
    """The run after the epoch whose batches have all been made."""
    epoch, train_loss = run.epoch + 1, run.mean.value()
    val_loss = ll.fold_eval(EVALUATE, run.params, [torch.tensor(PLAN[run.epoch])])
    row = {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss.value()}
    best = run.best
    lowest = INF if best is None else best.loss
    if math.isfinite(row["val_loss"]) and row["val_loss"] < lowest:
        params = {name: t.clone() for name, t in run.params.items()}
        best = Best(epoch, row["val_loss"], params)
    return run._replace(
        epoch=epoch, batch=0, mean=None, history=run.history.append(row), best=best
    )


REFERENCE = [start()]  # the run to which nothing happens, after each batch or epoch


def reference(epoch, place):
    """It, after so many epochs and batches of the next one."""
    while len(REFERENCE) <= epoch * (BATCHES + 1) + place:
        run = REFERENCE[-1]
        REFERENCE.append(epoch_ended(run) if run.batch == BATCHES else stepped(run, 1))
    return REFERENCE[epoch * (BATCHES + 1) + place]


@functools.cache
def reference_bits(epoch, place):
    return bits(reference(epoch, place))


def bits(run):
    """Everything in a run, NaN being equal to itself."""
    leaves, form = pytree.tree_flatten(run._replace(history=(), rest=()))
    return str(form), [
        (leaf.dtype, leaf.numpy().tobytes()) if torch.is_tensor(leaf) else leaf
        for leaf in (*leaves, repr(list(run.history)))
    ]


def copied(run):
    """A run whose tensors are its own."""
    return run._replace(
        params=pytree.tree_map(torch.clone, run.params),
        opt_state=pytree.tree_map(torch.clone, run.opt_state),
    )


def position(name):
    """The epoch and the batch that the name of a checkpoint tells."""
    return int(name[5:11]), int(name[12:20])


class Runs(RuleBasedStateMachine):
    """One process after the other goes on with a run, and things happen to them."""

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda fd: None)  # what it does is simulated
        self.directory = Path(tempfile.mkdtemp())
        self.damaged = set()  # names of files
        self.seen = None  # the run that was looked at last
        self.process = contextlib.ExitStack()
        self.begin()

    def teardown(self):
        self.process.close()
        self.patch.undo()
        shutil.rmtree(self.directory)

    # --- processes

    def begin(self):
        """Another process takes the run up, or starts it."""
        self.process.close()
        self.patch.setattr(_files, "_TOKEN", secrets.token_hex(4))
        self.disk = Disk(most=1500)
        self.checkpoints = Checkpoints(self.directory, self.disk, KEEP)
        before = {*self.names()}
        self.process.enter_context(self.checkpoints.lock())
        for name in before - {*self.names()}:  # it deletes those that are too many
            assert sum(newer > name for newer in self.whole()) >= KEEP
        self.damaged &= {*self.names()}
        if not self.whole() and self.names():
            with self.skipping(), pytest.raises(ll.CheckpointCorrupt):
                self.checkpoints.newest()
            for name in self.names():
                (self.directory / name).unlink()
            self.damaged = set()
        if self.names():
            self.load()
        else:
            self.run = copied(start())
            self.checkpoints.save(self.run)

    def names(self):
        names = [n for n in os.listdir(self.directory) if n.startswith("ckpt")]
        return sorted(names, reverse=True)

    def whole(self):
        return [name for name in self.names() if name not in self.damaged]

    @contextlib.contextmanager
    def skipping(self):
        """Damaged files that are newer than what is loaded are warned of."""
        newest = self.whole()[:1]
        skipped = {n for n in self.damaged & {*self.names()} if [n] > newest}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        words = [str(warning.message) for warning in caught]
        assert len(words) == len(skipped)
        assert all(any(name in each for each in words) for name in skipped)

    def may_fail(self, at, when):
        """From now on, the disk does so at its operation of that number."""
        self.disk.at, self.disk.when = len(self.disk.calls) + at, when

    # --- training

    def left(self):
        return BATCHES - self.run.batch

    @precondition(lambda self: self.left())
    @rule(count=st.integers(1, BATCHES))
    def step(self, count):
        self.run = stepped(self.run, min(count, self.left()))

    @precondition(lambda self: not self.left())
    @rule()
    def evaluate(self):
        self.run = epoch_ended(self.run)

    @precondition(lambda self: self.left())
    @rule(after=st.integers(1, BATCHES), twice=st.booleans())
    def interrupt(self, after, twice):
        """The run ends after a step, is saved, and is taken up by another process."""
        before = signal.getsignal(signal.SIGINT)
        count, made = self.left(), itertools.count(1)

        def on_step(opt_state, mean):
            if next(made) == min(after, count):
                for _ in range(1 + twice):
                    os.kill(os.getpid(), signal.SIGINT)
            if signals.requested is not None:
                raise EndPass(opt_state)
            return opt_state

        with contextlib.ExitStack() as stack:
            if twice:
                stack.enter_context(pytest.raises(KeyboardInterrupt))
            signals = Interruption()
            signals.heed()
            stack.callback(signals.restore)
            self.run = stepped(self.run, count, on_step)
            assert signals.requested == "SIGINT"
            self.save()
        assert signal.getsignal(signal.SIGINT) is before
        self.begin()

    # --- checkpoints

    @rule()
    def save(self):
        self.checkpoints.save(self.run)
        self.saved()

    @rule()
    def save_soon(self):
        """In the background, while the tensors are written over."""
        run, self.run = self.run, copied(self.run)
        self.checkpoints.save_soon(run)
        for tensor in pytree.tree_leaves((run.params, run.opt_state)):
            tensor.fill_(77)
        self.checkpoints.wait()
        self.saved()

    def saved(self):
        name = f"ckpt-{self.run.epoch:06}-{self.run.batch:08}.safetensors"
        assert name in self.names()
        self.damaged.discard(name)
        assert len(self.whole()) <= KEEP
        self.damaged &= {*self.names()}
        assert len(self.names()) <= KEEP + len(self.damaged)

    @precondition(lambda self: self.whole())
    @rule()
    def load(self):
        """What is there, the newest that is not damaged."""
        with self.skipping():
            run, path = self.checkpoints.newest()
        name = os.path.basename(path)
        assert name == self.whole()[0]
        assert (run.epoch, run.batch) == position(name)
        assert bits(run) == reference_bits(*position(name))
        self.run = run

    @rule()
    def alone(self):
        """In a file of its own."""
        path = self.directory / "run.safetensors"
        ll.save(self.run, path)
        assert bits(ll.load(path)) == bits(self.run)
        path.unlink()

    @precondition(lambda self: self.whole())
    @rule(how=st.sampled_from(["shorter", "longer", "other"]), data=st.data())
    def corrupt_newest(self, how, data):
        path = self.directory / self.whole()[0]
        found = path.read_bytes()
        at = data.draw(st.integers(0, len(found) - 1))
        if how == "shorter":
            found = found[:at]
        elif how == "longer":
            found += b"\0" * (at + 1)
        else:
            found = found[:at] + bytes([found[at] ^ 1]) + found[at + 1 :]
        path.write_bytes(found)
        self.damaged.add(path.name)
        with pytest.raises(ll.CheckpointCorrupt):
            ll.load(path)

    @rule(
        at=st.integers(1, 12),
        code=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EDQUOT]),
    )
    def fill_disk(self, at, code):
        """What was there is there still, unless all was well but the very last."""
        before, error = contents(self.directory), None
        self.may_fail(at, code)
        try:
            self.checkpoints.save(self.run)
        except ll.CheckpointWriteError as refusal:
            error = refusal
        failed_at, self.disk.at = self.disk.at, 0
        if error is not None:
            assert error.errno == code
            if self.disk.calls[failed_at - 1] != "fsync_directory":
                assert contents(self.directory) == before
                return
        self.checkpoints.save(self.run)  # there is room again
        self.saved()

    @rule(at=st.integers(1, 12), when=st.sampled_from(["before", "torn", "after"]))
    def crash(self, at, when):
        self.may_fail(at, when)
        before = contents(self.directory)
        try:
            self.checkpoints.save(self.run)
        except Crash:
            self.came_back(before)
        else:
            self.disk.at = 0
            self.saved()

    @rule(cut=st.integers(0, 20), seed=st.integers(0, 9))
    def lose_power(self, cut, seed):
        """In a save or after it: any part of what was not synced may be lost."""
        before, made = contents(self.directory), len(self.disk.log)
        self.checkpoints.save(self.run)
        log = self.disk.log[made:]
        states = after_power_loss(before, log[: len(log) - cut if cut else None], 64, 9)
        for state in itertools.islice(states, seed, seed + 1):
            shutil.rmtree(self.directory)
            self.directory.mkdir()
            for name, data in state.items():
                (self.directory / name).write_bytes(data)
        self.came_back(before)

    def came_back(self, before):
        """The save that was cut off is whole or is not there, and the rest is."""
        name = f"ckpt-{self.run.epoch:06}-{self.run.batch:08}.safetensors"
        after = contents(self.directory)
        if name in after and after[name] != before.get(name):
            assert bits(ll.load(self.directory / name)) == bits(self.run)
            self.damaged.discard(name)
        for each in before.keys() | after.keys():
            if each.startswith("ckpt") and each != name and each in after:
                assert after[each] == before[each]
        if name in self.damaged or name not in after:
            kept = {n for n in before if n.startswith("ckpt")} - {name}
            assert kept <= after.keys()
        self.begin()

    # --- always

    @invariant()
    def is_the_reference(self):
        run = self.run
        if run is not self.seen:
            assert bits(run) == reference_bits(run.epoch, run.batch)
            assert math.isfinite(run.params["weight"])
        self.seen = run

    @invariant()
    def the_best_is_the_first_lowest(self):
        losses = [(row["val_loss"], row["epoch"]) for row in self.run.history]
        finite = [each for each in losses if math.isfinite(each[0])]
        best = self.run.best
        assert (best and (best.loss, best.epoch)) == (min(finite) if finite else None)

    @invariant()
    def nothing_else_lies_there(self):
        names = {*os.listdir(self.directory)} - {".lock"}
        assert names == {*self.names()}
        assert self.damaged <= names
        # After a loss of power, what was deleted may be there again.
        assert len(self.whole()) <= KEEP + 1


def test_any_order_of_events():
    run_state_machine_as_test(
        Runs,
        settings=settings(
            max_examples=2000 if LONG else 200, stateful_step_count=50, deadline=None
        ),
    )
