"""Trains in processes that are killed, for `test_kills` and `test_signals`.

A process of its own, because the one of pytest has threads, which a fork would tear off
in whatever they do. It imports torch once, and forks a process for each attempt.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

import lossloop as ll
from lossloop import _compile, _files, _journal, _scan
from lossloop._journal import Journal
from lossloop._mean import Mean

EPOCHS, BATCHES = 3, 4  # of 7 samples; the last one may be smaller
DRAW = torch.Generator().manual_seed(5)
X, Y = torch.randn(28, 6, generator=DRAW), torch.randint(0, 3, (28,), generator=DRAW)
VALIDATION = (
    torch.randn(9, 6, generator=DRAW),
    torch.randint(0, 3, (9,), generator=DRAW),
)


class Noisy(Dataset):
    """Draws from every global generator whenever a sample is read."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = torch.randn(6) + random.random() + np.random.random()
        return X[index] + 0.1 * noise, Y[index]


def model(*, dropout):
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.3) if dropout else nn.Tanh(),
        nn.Linear(8, 3),
    )


# Of `train`. With dropout, steps are compiled one by one; without, in a fold. What is
# compiled has one shape of batch, to save time.
KINDS = {
    "eager": {"size": 27},
    "workers": {"size": 25, "workers": 2},
    "compiled": {"compile": True},
    "folded": {"compile": True, "dropout": False, "noisy": False},
}


def train(directory, *, size=28, dropout=True, noisy=True, workers=0, compile=False):
    """A whole script, from its seeds on; returns a digest of all that it came to."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    module = model(dropout=dropout)
    if compile:
        optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
        options = {}
    else:
        optimizer = Adam(module.parameters(), lr=0.05)
        scheduler = ReduceLROnPlateau(optimizer, patience=0)
        options = {"scheduler": scheduler, "schedule_by": "epoch", "ema": 0.9}
    data = Noisy(size) if noisy else TensorDataset(X[:size], Y[:size])
    if directory is not None:
        options |= {"checkpoint": directory, "save_every": 1, "resume": True}
    result = ll.fit(
        module,
        nn.CrossEntropyLoss(),
        optimizer,
        DataLoader(data, 7, shuffle=True, num_workers=workers),
        VALIDATION,
        epochs=EPOCHS,
        progress=False,
        compile=compile,
        **options,
    )
    assert result.compiled.compiled == compile
    if directory is None:
        assert result.compiled.folded is not dropout
        return result.status, None
    saved = ll.load(directory)
    return result.status, sha256(
        {
            "result": [result.params, result.opt_state],
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "saved": [saved.params, saved.opt_state, saved.epoch, saved.batch],
            "best": saved.best and [saved.best.params, saved.best.loss],
            "history": rows(result.history),
            "history saved": rows(saved.history),
            "rest": [result.best_epoch, result.status],
            "resumed": [result.resume_exact, result.resume_reason],
        }
    )


def rows(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def sha256(state):
    """Of names, dtypes, shapes, strides and bits."""
    hashed = hashlib.sha256()
    for path, leaf in pytree.tree_flatten_with_path(state)[0]:
        hashed.update(pytree.keystr(path).encode())
        if isinstance(leaf, torch.Tensor):
            hashed.update(repr((leaf.dtype, leaf.shape, leaf.stride())).encode())
            leaf = leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            hashed.update(leaf.tobytes())
        else:
            hashed.update(repr(leaf).encode())
    return hashed.hexdigest()


# --- what is broken, to show that it is seen ------------------------------------------


def losing(field, nothing):
    """A journal that takes up a run without one of its fields."""
    newest = Journal.newest

    def forgetful(self, params, opt_state):
        run = newest(self, params, opt_state)
        return run and run._replace(**{field: nothing(run)})

    Journal.newest = forgetful


def no_place():
    _journal.after = lambda count, batches: batches


BROKEN = {
    "mean": lambda: losing("mean", lambda run: run.mean and Mean.empty("cpu")),
    "weights": lambda: losing(
        "params", lambda run: {name: t * 0 for name, t in run.params.items()}
    ),
    "history": lambda: losing("history", lambda run: ll.History()),
    "best": lambda: losing("best", lambda run: None),
    "place": no_place,
}


# --- one attempt ----------------------------------------------------------------------

HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


def child(kind, directory, broken, tell):
    """Trains, telling of every save that begins, and in the end how it went."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    create = _files.Files.create

    def told(self, path):
        os.write(tell, b"save\n")
        return create(self, path)

    _files.Files.create = told
    if broken is not None:
        BROKEN[broken]()
    told_last = {}
    try:
        try:
            told_last["status"], told_last["digest"] = train(directory, **KINDS[kind])
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, HANDLERS)
    except KeyboardInterrupt:
        told_last = {"status": "KeyboardInterrupt"}
    except BaseException:
        told_last = {"status": "error", "error": traceback.format_exc()}
    told_last["restored"] = all(
        signal.getsignal(number) == handler for number, handler in HANDLERS.items()
    )
    os.write(tell, json.dumps(told_last).encode() + b"\n")


class Forked:
    """Such a process."""

    def __init__(self, kind, directory, broken=None):
        self.lines, tell = os.pipe()
        assert threading.active_count() == 1, "a fork would tear it off"
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                os.setpgid(0, 0)
                os.close(self.lines)
                child(kind, directory, broken, tell)
                status = 0
            os._exit(status)
        os.close(tell)

    @property
    def gone(self):
        """Whether it has ended, though `ended` was not called yet."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, options) is not None

    def ended(self):
        """How, as `waitpid` tells it."""
        os.close(self.lines)
        return os.waitpid(self.pid, 0)[1]


class Fresh(Forked):
    """One that has imported everything itself."""

    def __init__(self, kind, directory, broken=None):
        command = [sys.executable, __file__, kind, directory]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, process_group=0
        )
        self.lines, self.pid = self.process.stdout.fileno(), self.process.pid

    def ended(self):
        code = self.process.wait()
        self.process.stdout.close()
        return -code if code < 0 else code << 8


class Told:
    """What a process tells, a line for each save and one for its end."""

    def __init__(self, lines):
        self.text, self._lines, self._open = "", lines, True

    @property
    def over(self):
        return not self._open or self.text.endswith("}\n")

    def listen(self, until=lambda told: False, seconds=None):
        """Reads until then, until so many seconds have passed, or to the end."""
        end = None if seconds is None else time.perf_counter() + seconds
        while not self.over and not until(self):
            left = None if end is None else max(0.0, end - time.perf_counter())
            if not select.select([self._lines], [], [], left)[0]:
                return
            data = os.read(self._lines, 65536)
            self.text += data.decode()
            self._open = bool(data)

    @property
    def last(self):
        line = self.text.splitlines()[-1] if self.text else ""
        return json.loads(line) if line.endswith("}") else {}


def attempt(process, signals, *, seconds=0.0, saves=0, pause=0.0):
    """Sends signals to a process and waits for its end.

    Args:
        process: To send them to.
        signals: In this order.
        seconds: Before the first.
        saves: That are to have begun before those.
        pause: Between two signals.

    Returns:
        What it told of its end, how it ended, and whether all signals were sent.
    """
    told = Told(process.lines)
    told.listen(lambda told: told.text.count("save") >= saves)
    sent = 0
    for number in signals:
        told.listen(seconds=seconds)
        if told.over:
            break
        os.kill(process.pid, number)  # it is there, at least as a zombie
        sent += 1
        seconds = pause
    while not told.over and not process.gone:
        told.listen(seconds=0.05)
    if not told.over:
        # A worker of a loader whose process is killed before it asks for its number
        # takes another for that, and waits for ever with its end of the pipe open.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        told.listen()
    status = process.ended()
    return told.last, status, sent == len(signals)


def stage(directory, pid):
    """Where a process was killed, and the newest checkpoint, which is whole."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    newest = max((name for name in names if name.startswith("ckpt")), default="")
    if newest:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of one that is skipped
            ll.load(directory)
    if any(name.startswith(f".tmp-{pid}-") for name in names):
        return "during a save", newest
    return ("later" if newest else "before the first save"), newest


# --- many -----------------------------------------------------------------------------


@functools.cache
def left_alone(kind):
    """What a process tells that is left alone, and the seconds it takes."""
    told, duration = [], 0.0
    for _ in range(3):
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            result, status, _ = attempt(Forked(kind, directory), [])
        assert status == 0, result
        told.append(result)
        duration = time.perf_counter() - begin
    assert told[1:] == told[:-1]
    return told[0], duration


def campaign(
    kind, directory, count, seed, signals=None, broken=None, saves=None, fresh=False
):
    """Trains in processes that are sent so many signals, until all runs are finished.

    Some are sent at any time in a run, some before its first save, and some just after
    a save has begun.

    Args:
        kind: Of `KINDS`.
        directory: For the runs.
        count: How often to kill a process, or send it signals.
        seed: Of when.
        signals: Those to choose from, each a list; default, SIGKILL.
        broken: What is broken, of `BROKEN`.
        saves: After which to send them; default, drawn.
        fresh: Whether the processes import everything themselves.

    Returns:
        How many came where, how the processes ended, after how many different batches,
        how many runs there were, and how many had the digest of one left alone.
    """
    draw = random.Random(seed)
    expected, duration = left_alone(kind)
    stages = dict.fromkeys(("before the first save", "during a save", "later"), 0)
    ends, places = dict[str, int](), set[str]()
    runs = same = done = 0
    end = ""
    while done < count or end != "finished":
        place = os.path.join(directory, f"run-{runs}")
        process = (Fresh if fresh else Forked)(kind, place, broken)
        chosen = draw.choice(signals or [[signal.SIGKILL]]) if done < count else []
        left = saves_left(place)
        how = "save" if fresh else draw.choice(["any time", "save"])
        if left > EPOCHS * BATCHES and draw.random() < 0.4 and not fresh:
            when = {"seconds": draw.uniform(0, duration / 4)}
        elif how == "any time":
            when = {"seconds": draw.uniform(0, duration)}
        else:
            when = {"saves": draw.randint(1, left), "seconds": draw.uniform(0, 0.002)}
        if saves is not None:
            when = {"saves": saves}
        result, status, sent = attempt(
            process, chosen, pause=draw.uniform(0, 0.01), **when
        )
        end = result.get("status") or f"exit {os.waitstatus_to_exitcode(status)}"
        assert end != "error", result["error"]
        assert result.get("restored", True), "handlers are not as they were"
        if chosen and sent and (signals or status == signal.SIGKILL):
            done += 1
            where, newest = stage(place, process.pid)
            stages[where] += 1
            places.add(newest)
            ends[end] = ends.get(end, 0) + 1
        if end == "finished":
            runs += 1
            same += result == expected
            names = os.listdir(place)
            assert not [name for name in names if name.startswith(".tmp")]
            assert len([name for name in names if name.startswith("ckpt")]) == 2
    return {
        "stages": stages,
        "ends": ends,
        "places": len(places),
        "runs": runs,
        "same": same,
    }


def saves_left(place):
    """In a run that goes on there: one at its start, one for each step, and one."""
    names = sorted(glob.glob("ckpt-*", root_dir=place))
    if not names:
        return 2 + EPOCHS * BATCHES
    epoch, batch = names[-1].removesuffix(".safetensors").split("-")[1:]
    return 1 + BATCHES * (EPOCHS - int(epoch)) - int(batch)


# --- compiled once for all ------------------------------------------------------------


GRAPHS = {}


class Shared:
    """A graph that the processes have from the one that they were forked from."""

    def __init__(self, function, *options):
        self._new = (function, *options)

    def __call__(self, seeding, args):
        leaves, form = pytree.tree_flatten(args)
        function = self._new[0].__qualname__
        key = (function, str(form), tuple((t.shape, t.stride()) for t in leaves))
        if key not in GRAPHS:
            GRAPHS[key] = GRAPH(*self._new)
        return GRAPHS[key](seeding, args)


GRAPH = _compile.Graph


def compile_once(kind):
    """What the runs of this kind compile is compiled here and now."""
    tqdm.monitor_interval = 0  # or the first bar of torch's would start a thread
    backend = torch._dynamo.lookup_backend("aot_eager")
    _compile.inductor = lambda graph, inputs, **_: backend(graph, inputs)
    for module in (_compile, _scan):
        module.Graph = Shared
    GRAPHS.clear()
    train(None, **KINDS[kind])


def main():
    torch.set_num_threads(1)
    if len(sys.argv) > 1:  # a fresh process
        child(sys.argv[1], sys.argv[2], None, sys.stdout.fileno())
        return
    for line in sys.stdin:
        wish = json.loads(line)
        begin = time.perf_counter()
        try:
            if "compile" in KINDS[wish["kind"]]:
                compile_once(wish["kind"])
            answer = campaign(**wish)
        except BaseException:
            answer = {"error": traceback.format_exc()}
        answer["seconds"] = time.perf_counter() - begin
        print(json.dumps(answer), flush=True)  # noqa: T201


@contextlib.contextmanager
def served(new_directory):
    """`campaign`, in a process that has imported torch once for all."""
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def asked(**wish):
        wish = {"directory": str(new_directory()), "seed": 0} | wish
        print(json.dumps(wish), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        print(answer)  # noqa: T201
        assert "error" not in answer, answer["error"]
        return answer

    yield asked
    server.stdin.close()
    assert server.wait(30) == 0
    server.stdout.close()


if __name__ == "__main__":
    main()
