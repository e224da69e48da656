"""A run that is interrupted and resumed has the bits of one that was not."""

import itertools
import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lossloop as ll
from lossloop import _checkpoint, _compile, _files
from lossloop._checkpoint import Checkpoints
from lossloop._journal import Journal

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
EPOCHS, BATCHES = 3, 7  # of 4 samples, and a last one of 3
DRAW = torch.Generator().manual_seed(5)
X, Y = torch.randn(27, 6, generator=DRAW), torch.randint(0, 3, (27,), generator=DRAW)
VALIDATION = (
    torch.randn(9, 6, generator=DRAW),
    torch.randint(0, 3, (9,), generator=DRAW),
)


class Noisy(Dataset):
    """Draws from the global generator whenever a sample is read."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index] + 0.1 * torch.randn(6), Y[index]


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def dropout():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3))


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).to(memory_format=torch.channels_last)


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return model


OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "adam": partial(Adam, lr=0.05),
    "adamw": partial(AdamW, lr=0.05),
}
MODELS = [mlp, dropout, conv, tied]


def loader(data=None, **options):
    data = TensorDataset(X, Y) if data is None else data
    return DataLoader(data, 4, shuffle=not isinstance(data, Stream), **options)


def run(
    directory, *, model=mlp, optimizer="momentum", data=None, schedule=None, **options
):
    """A whole script, from its seed on."""
    torch.manual_seed(3)
    module = model()
    torch_optimizer = OPTIMIZERS[optimizer](module.parameters())
    if schedule is not None:
        scheduler, by = schedule
        options |= {"scheduler": scheduler(torch_optimizer), "schedule_by": by}
    result = ll.fit(
        module,
        nn.CrossEntropyLoss(),
        torch_optimizer,
        loader() if data is None else data(),
        options.pop("val_loader", VALIDATION),
        **{"epochs": EPOCHS, "progress": False, "compile": False, **options},
        checkpoint=directory,
        resume=True,
    )
    return result, module, torch_optimizer


def same(one, other):
    """Whether two scripts ended with the same bits in everything."""
    (result, module, optimizer), (result_2, module_2, optimizer_2) = one, other
    states = [
        (r.params, r.opt_state, m.state_dict(), o.state_dict()["state"])
        for r, m, o in ((result, module, optimizer), (result_2, module_2, optimizer_2))
    ]
    leaves, leaves_2 = map(pytree.tree_leaves, states)
    assert len(leaves) == len(leaves_2)
    assert all(
        torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
        for a, b in zip(leaves, leaves_2, strict=True)
        if isinstance(a, torch.Tensor)
    )
    assert rows(result) == rows(result_2)
    assert result.best_epoch == result_2.best_epoch
    assert result.status == result_2.status
    assert result.compiled.compiled == result_2.compiled.compiled
    assert optimizer.param_groups[0]["lr"] == optimizer_2.param_groups[0]["lr"]


def rows(result):
    """The history without its times; repr tells every bit of a float."""
    history = result.history
    return repr([{k: v for k, v in row.items() if k != "seconds"} for row in history])


@pytest.fixture
def interrupt(monkeypatch):
    """Sends Ctrl-C when so many steps have been made."""
    due = Journal.due
    steps = []

    def due_and_interrupted(self, step):
        if step in steps:
            steps.remove(step)
            os.kill(os.getpid(), signal.SIGINT)
        return due(self, step)

    monkeypatch.setattr(Journal, "due", due_and_interrupted)
    return steps.append


def interrupted(directory, interrupt, steps, **options):
    """The script, started again after each interruption until it is finished."""
    for step in steps:
        interrupt(step)
        run(directory, **options)
    return run(directory, **options)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_batch_of_a_run(model, optimizer, tmp_path, interrupt):
    options = {"model": model, "optimizer": optimizer}
    straight = run(tmp_path / "straight", **options)
    assert straight[0].status == "finished"
    for step in range(EPOCHS * BATCHES):
        interrupt(step)
        directory = tmp_path / str(step)
        first = run(directory, **options)[0]
        assert first.status == ("interrupted" if step else "finished")
        resumed = run(directory, **options)
        same(straight, resumed)
        assert resumed[0].resume_exact
        assert resumed[0].resume_reason == ""


def test_it_says_where_it_was_interrupted_and_goes_on(tmp_path, interrupt, capsys):
    interrupt(5)
    run(tmp_path, progress="plain")
    said = capsys.readouterr().out.splitlines()
    step = int(ll.load(tmp_path).opt_state.step)
    assert said[-1] == f"Interrupted after step {step}, and saved in {tmp_path}."
    run(tmp_path, progress="plain")
    assert f"Going on after step {step}." in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("data", [loader, partial(loader, [*zip(X, Y, strict=True)])])
def test_fewer_steps_may_be_asked_for_than_were_made(data, tmp_path, interrupt):
    interrupt(5)
    first = run(tmp_path, data=data)[0]
    made = int(first.opt_state.step)
    assert (first.status, len(first.history)) == ("interrupted", 0)
    for _ in range(2):
        result = run(tmp_path, data=data, max_steps=3)[0]
        assert result.status == "max_steps"
        assert result.history["step"] == [made]
        assert result.history["n_train"] == [made * 4]


@pytest.fixture(scope="module")
def aot_eager():
    """compile=True without generating code."""
    patch = pytest.MonkeyPatch()
    backend = torch._dynamo.lookup_backend("aot_eager")
    patch.setattr(
        _compile, "inductor", lambda graph, inputs, **_: backend(graph, inputs)
    )
    yield
    patch.undo()


@pytest.mark.usefixtures("aot_eager")
@pytest.mark.parametrize("model", [mlp, dropout, conv])
def test_compiled_runs(model, tmp_path, interrupt):
    """A fold of many steps for the MLP, which is interrupted after every other one."""
    options = {"model": model, "compile": True, "save_every": 2}
    straight = run(tmp_path / "straight", **options)
    assert straight[0].compiled.compiled
    for step in range(1, 20) if LONG else (2, 6, 13) if model is mlp else (6,):
        directory = tmp_path / str(step)
        same(straight, interrupted(directory, interrupt, [step], **options))


@pytest.mark.usefixtures("aot_eager")
def test_a_compiled_run_that_goes_on_eagerly_is_not_exact(tmp_path):
    run(tmp_path, epochs=1, compile=True)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.warns(
            UserWarning, match="torch.compile was 'on', and is 'switched off'"
        ),
    ):
        result = run(tmp_path, epochs=2, compile=True)[0]
    assert not result.resume_exact
    assert "torch.compile was 'on'" in result.resume_reason
    assert "it was switched off" in result.compiled.reason
    result = run(tmp_path, epochs=3, compile=True)[0]
    assert result.resume_reason == "torch.compile was 'on', and is 'switched off'"
    assert not result.compiled.compiled


@pytest.mark.parametrize("step", [2, 7, 13])
def test_worker_processes(step, tmp_path, interrupt):
    options = {"data": partial(loader, Noisy(), num_workers=2)}
    straight = run(tmp_path / "straight", **options)
    same(straight, interrupted(tmp_path / "other", interrupt, [step], **options))


SCHEDULES = {
    "epoch": (partial(StepLR, step_size=2), "epoch"),
    "step": (partial(StepLR, step_size=5), "step"),
    "plateau": (partial(ReduceLROnPlateau, patience=0), "epoch"),
    "one cycle": (partial(OneCycleLR, max_lr=0.2, total_steps=21), "step"),
}


@pytest.mark.filterwarnings("ignore:.*samples act on each other")
@settings(max_examples=1000 if LONG else 100, deadline=None)
@given(data=st.data())
def test_interrupted_again_and_again(data, tmp_path_factory):
    """T7: twice in one epoch, at its ends, at one place twice, before the first save.

    With whatever a run may have.
    """
    options = data.draw(
        st.fixed_dictionaries(
            {
                "model": st.sampled_from(MODELS),
                "optimizer": st.sampled_from([*OPTIMIZERS]),
                "data": st.sampled_from([loader, partial(loader, Noisy())]),
                "schedule": st.sampled_from([None, *SCHEDULES.values()]),
            },
            optional={
                "ema": st.just(0.9),
                "accumulate": st.just(2),
                "clip_grad_norm": st.just(0.5),
                "restore_best": st.booleans(),
                "early_stopping": st.just(1),
                "save_every": st.integers(1, 5),
                "metrics": st.just({"accuracy": ll.metrics.accuracy()}),
                "max_steps": st.integers(1, 20),
                "frozen_train_loss": st.just(True),
            },
        )
    )
    steps = data.draw(st.lists(st.integers(1, 21), min_size=1, max_size=5))
    steps += data.draw(st.sampled_from([[], [6, 7], [7, 7], [7, 8], [1, 2, 3]]))
    directory = tmp_path_factory.mktemp("runs")
    straight = run(directory / "straight", **options)
    with pytest.MonkeyPatch.context() as patch:
        due, left = Journal.due, sorted(steps)

        def due_and_interrupted(self, step):
            if left and step >= left[0]:
                left.pop(0)
                os.kill(os.getpid(), signal.SIGINT)
            return due(self, step)

        patch.setattr(Journal, "due", due_and_interrupted)
        for _ in range(len(steps) + 1):
            ended = run(directory / "other", **options)
            if ended[0].status != "interrupted":
                break
    ended = run(directory / "other", **options)
    same(straight, ended)
    names = os.listdir(directory / "other")
    assert not [name for name in names if name.startswith(".tmp")]
    assert len([name for name in names if name.startswith("ckpt")]) <= 2


def test_a_finished_run_is_returned_again(tmp_path):
    one = run(tmp_path)
    same(one, run(tmp_path))


def test_more_epochs(tmp_path):
    """As if they had been asked for from the start."""
    straight = run(tmp_path / "straight", epochs=5)
    run(tmp_path / "other", epochs=2)
    same(straight, run(tmp_path / "other", epochs=5))


CHILD = """
import json, sys
sys.path.insert(0, {home!r})
import test_resume
steps = {steps}
import os, signal
from lossloop._journal import Journal
due = Journal.due
def due_and_interrupted(self, step):
    if step == steps:
        os.kill(os.getpid(), signal.SIGINT)
    return due(self, step)
Journal.due = due_and_interrupted
import torch
torch.set_num_threads({threads})
if {options}.get("compile"):
    from lossloop import _compile
    backend = torch._dynamo.lookup_backend("aot_eager")
    _compile.inductor = lambda graph, inputs, **_: backend(graph, inputs)
result = test_resume.run({directory!r}, **{options})
from lossloop._order import digest
print(json.dumps([digest((result[0].params, result[0].opt_state)),
                  test_resume.rows(result[0]), result[0].resume_exact]))
"""


OPTIONS = {
    "eager": "dict(model=test_resume.conv)",
    "workers": "dict(model=test_resume.dropout, data=test_resume.two_workers)",
    "compiled": "dict(model=test_resume.dropout, compile=True)",
}


def two_workers():
    return loader(Noisy(), num_workers=2)


@pytest.mark.parametrize(
    "kind", ["eager", "workers", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_in_fresh_processes(kind, tmp_path):
    def child(directory, steps):
        code = CHILD.format(
            home=os.path.dirname(__file__),
            steps=steps,
            directory=str(tmp_path / directory),
            threads=torch.get_num_threads(),
            options=OPTIONS[kind],
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    straight = child("straight", None)
    child("other", 4)
    child("other", 11)
    assert child("other", None) == straight
    if kind == "eager":
        result = run(tmp_path / "straight", model=conv)[0]
        assert straight[1] == rows(result)


class Stateful:
    """Keeps its place and its random numbers to itself, like torchdata's loaders."""

    def __init__(self):
        self.generator_of_its_own = torch.Generator().manual_seed(7)
        self.order, self.given = [], 0
        self.resumed = False

    def __len__(self):
        return BATCHES

    def __iter__(self):
        if not self.resumed:
            self.order, self.given = (
                torch.randperm(27, generator=self.generator_of_its_own).tolist(),
                0,
            )
        self.resumed = False
        for start in range(4 * self.given, 27, 4):
            index = self.order[start : start + 4]
            self.given += 1
            yield X[index] + 0.1 * torch.randn(len(index), 6), Y[index]

    def state_dict(self):
        return {
            "order": self.order,
            "given": self.given,
            "generator": self.generator_of_its_own.get_state(),
        }

    def load_state_dict(self, state):
        self.order, self.given = state["order"], state["given"]
        self.generator_of_its_own.set_state(state["generator"])
        self.resumed = True


@pytest.mark.parametrize("steps", [[0], [1], [7], [8, 9], [3, 14]])
def test_loaders_that_keep_their_place(steps, tmp_path, interrupt):
    straight = run(tmp_path / "straight", data=Stateful)
    ended = interrupted(tmp_path / "other", interrupt, steps, data=Stateful)
    same(straight, ended)
    assert ended[0].resume_exact


class Ahead(Stateful):
    """At the end of a pass, its state is that of the next one's beginning."""

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.resumed = self.given < BATCHES


@pytest.mark.parametrize("data", [Stateful, Ahead])
def test_loaders_that_keep_their_place_between_epochs(data, tmp_path):
    straight = run(tmp_path / "straight", data=data, epochs=5)
    run(tmp_path / "other", data=data, epochs=2)
    ended = run(tmp_path / "other", data=data, epochs=5)
    same(straight, ended)
    assert ended[0].resume_exact


def test_more_steps_may_be_skipped_when_it_goes_on(tmp_path):
    """As the message of the error says."""

    def bad():
        x = X.clone()
        x[[3, 9]] = torch.nan
        return loader(TensorDataset(x, Y))

    with pytest.raises(ll.NonFiniteError, match="skip_nonfinite"):
        run(tmp_path / "other", data=bad)
    resumed = run(tmp_path / "other", data=bad, skip_nonfinite=50)
    straight = run(tmp_path / "straight", data=bad, skip_nonfinite=50)
    same(straight, resumed)
    assert sum(resumed[0].history["skipped"]) == int(resumed[0].opt_state.gate.skipped)


def test_fewer_steps_than_were_skipped_are_refused(tmp_path):
    x = X.clone()
    x[[3, 9]] = torch.nan
    data = partial(loader, TensorDataset(x, Y))
    run(tmp_path, data=data, skip_nonfinite=50)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"skip_nonfinite=1.*were skipped already"):
        run(tmp_path, data=data, skip_nonfinite=1, epochs=EPOCHS + 1)
    assert sorted(os.listdir(tmp_path)) == before


# --- what is not exact, and what is another run ---------------------------------------


@pytest.mark.filterwarnings("ignore:.*not bit for bit")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: loader(Stream()), "stream"),
        (lambda: Anew(), "Anew"),
        (lambda: loader(num_workers=1, persistent_workers=True), "persist"),
        (
            lambda: DataLoader(TensorDataset(X, Y), 4, sampler=Backwards()),
            "Backwards",
        ),
    ],
)
def test_loaders_that_cannot_be_seen_into(data, words, tmp_path, interrupt):
    interrupt(9)
    run(tmp_path, data=data)
    result = run(tmp_path, data=data)[0]
    assert not result.resume_exact
    assert words in result.resume_reason
    assert len(result.history) == EPOCHS


class Anew:
    def __iter__(self):
        return iter(loader())


class Backwards:
    def __iter__(self):
        return iter(range(26, -1, -1))

    def __len__(self):
        return 27


def other_model():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def deeper():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Identity())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": other_model}, r"0\.weight.*\(8, 6\).*\(9, 6\)"),
        ({"model": tied}, "2.bias|3.weight|0.weight"),
        ({"model": lambda: mlp().double(), "data": lambda: loader(wide())}, "float64"),
        ({"optimizer": "adam"}, "opt_state"),
        ({"seed": 1}, "seed was 0, and is 1"),
        ({"ema": 0.9}, "opt_state"),
        (
            {"data": lambda: loader(TensorDataset(X[:26], Y[:26]))},
            "samples was 27, and is 26",
        ),
        (
            {"data": lambda: loader(TensorDataset(X + 1, Y))},
            "first and last sample",
        ),
    ],
)
def test_another_run_is_refused(changes, words, tmp_path, interrupt):
    interrupt(9)
    run(tmp_path)
    before = sorted(os.listdir(tmp_path))
    if "float64" in words:
        changes["val_loader"] = (VALIDATION[0].double(), VALIDATION[1])
    with pytest.raises(ll.CheckpointMismatch, match=f"(?s){words}"):
        run(tmp_path, **changes)
    assert sorted(os.listdir(tmp_path)) == before


def wide():
    return TensorDataset(X.double(), Y)


def test_other_data_in_the_middle_of_an_epoch(tmp_path, interrupt):
    """Their ends are the same, but the first batch is not."""
    interrupt(9)
    run(tmp_path)
    changed = X.clone()
    changed[1:-1] += 1
    with pytest.raises(ll.CheckpointMismatch, match="first batch of epoch 2"):
        run(tmp_path, data=lambda: loader(TensorDataset(changed, Y)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compile": "auto"}, "compile was 'False', and is 'auto'"),
        ({"accumulate": 2}, "accumulate was 1, and is 2"),
        ({"clip_grad_norm": 1.0}, "clip_grad_norm was None, and is 1.0"),
    ],
)
def test_what_may_round_otherwise_is_said(changes, words, tmp_path, interrupt):
    interrupt(9)
    run(tmp_path)
    with pytest.warns(UserWarning, match=words):
        result = run(tmp_path, **changes)[0]
    assert not result.resume_exact
    assert words in result.resume_reason


def test_threads_are_a_difference(tmp_path, interrupt):
    interrupt(9)
    run(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match="threads was"):
            assert not run(tmp_path)[0].resume_exact
    finally:
        torch.set_num_threads(threads)


def test_a_directory_of_another_run_is_refused(tmp_path):
    run(tmp_path)
    model = mlp()
    with pytest.raises(ValueError, match=r"resume=True.*directory of its own"):
        ll.fit(
            model, nn.CrossEntropyLoss(), SGD, loader(), epochs=1, checkpoint=tmp_path
        )


@pytest.mark.parametrize("schedule", [None, SCHEDULES["plateau"]])
def test_a_directory_in_use_is_refused(schedule, tmp_path):
    with (
        Checkpoints(tmp_path).lock(),
        pytest.raises(RuntimeError, match="Another run is writing"),
    ):
        run(tmp_path, schedule=schedule)
    assert run(tmp_path, schedule=schedule)[0].status == "finished"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"resume": True}, ValueError, "directory of the checkpoints"),
        ({"save_every": 3}, ValueError, "directory of the checkpoints"),
        ({"checkpoint": 3}, TypeError, "path of a directory"),
        ({"checkpoint": "x", "save_every": 0}, ValueError, "at least 1"),
        ({"checkpoint": "x", "resume": "yes"}, TypeError, "True or False"),
    ],
)
def test_refused_at_the_door(options, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        ll.fit(mlp(), nn.CrossEntropyLoss(), SGD, loader(), epochs=1, **options)
    assert os.listdir(tmp_path) == []


def test_a_damaged_checkpoint_costs_one_interval(tmp_path, interrupt):
    straight = run(tmp_path / "straight")
    interrupt(16)
    run(tmp_path / "other", save_every=5)
    names = sorted(
        name for name in os.listdir(tmp_path / "other") if name.startswith("ckpt")
    )
    newest = tmp_path / "other" / names[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=names[-1]):
        resumed = run(tmp_path / "other", save_every=5)
    same(straight, resumed)


def test_a_full_disk_is_warned_of_and_the_run_goes_on(tmp_path, monkeypatch):
    """Once it has begun; what was saved stays, and the next epochs try again."""
    straight = run(tmp_path / "straight")
    write_file, saves = _checkpoint.write_file, itertools.count()

    def full(path, chunks, files):
        if next(saves):
            raise ll.CheckpointWriteError(path, OSError(28, "No space left on device"))
        write_file(path, chunks, files)

    monkeypatch.setattr(_checkpoint, "write_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        other = run(tmp_path / "other")
    same(straight, other)
    assert [path.name for path in (tmp_path / "other").glob("*ckpt*")] == [
        "ckpt-000000-00000000.safetensors"
    ]
    monkeypatch.undo()
    same(straight, run(tmp_path / "other"))


def test_a_full_disk_before_the_start_is_refused(tmp_path, monkeypatch):
    def full(self, fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.Files, "write", full)
    with pytest.raises(ll.CheckpointWriteError, match="No space left"):
        run(tmp_path)
    assert not [*tmp_path.glob("*ckpt*"), *tmp_path.glob(".tmp*")]


def test_the_weights_are_read_by_safetensors_alone(tmp_path):
    from safetensors.torch import load_file

    result, module, _ = run(tmp_path, restore_best=False, model=conv)
    newest = sorted(tmp_path.glob("ckpt-*"))[-1]
    tensors = load_file(newest)
    assert all(torch.equal(tensors[name], t) for name, t in module.state_dict().items())
    assert module.load_state_dict(tensors, strict=False).missing_keys == []
    loaded = ll.load(tmp_path)
    assert loaded.epoch == EPOCHS
    assert repr(list(loaded.history)) == repr(list(result.history))
