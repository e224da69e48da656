"""T14: signals at any time leave a checkpoint that loads, and all else as it was."""

import os
import random
import signal
import sys

import killing
import numpy as np
import pytest
import torch
from killing import HANDLERS, VALIDATION, Noisy, model, rows, sha256
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, RandomSampler

import lossloop as ll
from lossloop import _files, _training
from lossloop._checkpoint import Checkpoints
from lossloop._interruption import Interruption
from lossloop._journal import Journal
from lossloop._run import Run

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
EPOCHS = 2
LAST = 19  # calls while handlers are put back
ANY_TIME = 944 if LONG else 44


class Script:
    """A script that trains, and what it holds."""

    def __init__(self, directory, **options):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(3)
        self.module = model(dropout=True)
        self.optimizer = Adam(self.module.parameters(), lr=0.05)
        self.scheduler = ReduceLROnPlateau(self.optimizer, patience=0)
        self.loader = DataLoader(Noisy(27), 9, shuffle=True)
        self.options = {
            "epochs": EPOCHS,
            "scheduler": self.scheduler,
            "schedule_by": "epoch",
            "progress": False,
            "compile": False,
            "checkpoint": directory,
            "save_every": 1,
            "resume": True,
            **options,
        }

    def __call__(self):
        return ll.fit(
            self.module,
            nn.CrossEntropyLoss(),
            self.optimizer,
            self.loader,
            VALIDATION,
            **self.options,
        )

    def holds(self):
        """What it can go on with after an exception."""
        return sha256(
            [
                self.module.state_dict(),
                self.optimizer.state_dict(),
                self.scheduler.state_dict(),
            ]
        )


def digest(result):
    return sha256([result.params, result.opt_state, rows(result.history)])


def handlers_are_back():
    now = {number: signal.getsignal(number) for number in HANDLERS}
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    return now == HANDLERS


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a script comes to that is left alone, and what it held after each epoch."""
    script = Script(tmp_path_factory.mktemp("alone"))
    held = {script.holds()}
    script.options["on_epoch"] = lambda record: held.add(script.holds()) and None
    return digest(script()), held


def goes_on(directory, alone):
    """What a script is to do after any signal."""
    assert handlers_are_back()
    ll.load(directory)
    result = Script(directory)()
    assert result.resume_exact
    assert result.status == "finished"
    assert digest(result) == alone[0]


# What is called, and when. The first batch is read before the training begins.
PHASES = {
    "after a step": (Journal, "due", 1, 6),
    "reading a sample": (Noisy, "__getitem__", 10, 54),
    "shuffling": (RandomSampler, "__iter__", 2, 2),
    "validating": (_training._Heeding, "__call__", 1, 2),
    "saving": (Journal, "save", 1, 6),
    "writing": (_files.Files, "write", 100, 200),
    "bringing to the disk": (_files.Files, "fsync", 2, 6),
    "scheduling": (ReduceLROnPlateau, "step", 1, 1),
    "between weights and optimizer": (_training, "load_opt_state", 1, 1),
}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("first", HANDLERS, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_signals_in_every_phase(phase, first, twice, alone, tmp_path, monkeypatch):
    owner, name, least, most = PHASES[phase]
    # Two of one kind may be told as one.
    second = signal.SIGINT if first == signal.SIGTERM else signal.SIGTERM
    left = random.Random(f"{phase} {first} {twice}").randint(least, most)
    called = getattr(owner, name)

    def and_signals(*args, **options):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), first)
            if twice:
                os.kill(os.getpid(), second)
        return called(*args, **options)

    monkeypatch.setattr(owner, name, and_signals)
    script = Script(tmp_path)
    if twice:
        with pytest.raises(KeyboardInterrupt):
            script()
        assert script.holds() in alone[1]
    else:
        assert script().status == "interrupted"
    assert left <= 0
    goes_on(tmp_path, alone)


class Calls:
    """Interrupts after so many calls, from the first one of a function, if any.

    Python heeds signals when a function is called, and when one in C returns.
    """

    def __init__(self, first, count):
        self.left = count
        self._first = first and first.__code__
        self._begun = first is None

    def __enter__(self):
        sys.setprofile(self._note)

    def __exit__(self, *error):
        sys.setprofile(None)

    def _note(self, frame, event, arg):
        self._begun |= frame.f_code is self._first
        if self._begun and event in ("call", "c_return"):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("count", range(1, 1 + LAST))
def test_a_second_one_while_the_handlers_are_put_back(count, alone, tmp_path):
    def interrupted(record):
        if record.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    script = Script(tmp_path, on_step=interrupted)
    calls = Calls(Interruption.restore, count)
    with pytest.raises(KeyboardInterrupt), calls:
        script()
    assert calls.left <= 0
    goes_on(tmp_path, alone)


def test_one_at_any_call_of_a_save_in_the_background(tmp_path):
    """Locks of Python's own threads would stay locked, and be waited for forever."""
    run = Run({"weight": torch.ones(2)}, (), 1)
    interrupted, count = 0, 0
    while interrupted == count:
        count += 1
        directory = tmp_path / str(count)
        checkpoints = Checkpoints(directory)
        signal.alarm(20)  # ends the tests, as nothing else would
        with checkpoints.lock():
            checkpoints.save_soon(run)
            try:
                with Calls(None, count):
                    checkpoints.wait()
                    checkpoints.save_soon(run._replace(epoch=2))
                    checkpoints.wait()
            except KeyboardInterrupt:
                interrupted += 1
        signal.alarm(0)
        assert ll.load(directory).epoch in (1, 2)
        assert not [*directory.glob(".tmp*")]
    assert count > 100


def test_one_that_comes_when_all_is_done(alone, tmp_path, monkeypatch):
    """The module is not left with some tensors of the best epoch, some of the last."""
    load_params, calls = _training.load_params, []

    def and_a_signal(model, params):
        calls.append(params)
        if len(calls) == EPOCHS + 1:
            os.kill(os.getpid(), signal.SIGINT)
        load_params(model, params)

    monkeypatch.setattr(_training, "load_params", and_a_signal)
    script = Script(tmp_path)
    result = script()
    assert result.status == "finished"
    state = script.module.state_dict()
    assert all(torch.equal(result.params[name], t) for name, t in state.items())
    goes_on(tmp_path, alone)


@pytest.mark.parametrize("twice", [False, True])
def test_signals_at_any_time(twice, tmp_path_factory):
    """Of processes, because one that comes before or after the training ends them."""
    names = [signal.SIGINT, signal.SIGTERM]
    signals = [[a, b] for a in names for b in names] if twice else [[a] for a in names]
    with killing.served(lambda: tmp_path_factory.mktemp("runs")) as campaign:
        answer = campaign(kind="eager", count=ANY_TIME // 2, signals=signals)
    assert sum(answer["ends"].values()) == ANY_TIME // 2
    assert answer["same"] == answer["runs"]
    assert answer["ends"].keys() >= {"KeyboardInterrupt" if twice else "interrupted"}
    known = {"KeyboardInterrupt", "interrupted", "finished", "exit -15"}
    assert answer["ends"].keys() <= known


def test_there_are_100_signals():
    assert 2 * 2 * len(PHASES) + LAST + 1 + ANY_TIME == (1000 if LONG else 100)
