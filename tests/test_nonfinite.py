"""What is not finite, wherever and whenever it arises, is named and goes nowhere."""

import functools
import math
import random

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop import _compile, _training

EPOCHS, BATCHES, SIZE = 3, 4, 4
PLACES = {"first": 1, "middle": 6, "last": 12}  # the step, of twelve
VALUES = {"nan": 0.0, "inf": 1.0, "-inf": -1.0}  # what divided by zero is that
IN_STEP = ["input", "target", "loss", "gradient"]
IN_STATE = ["parameter", "buffer", "optimizer"]
# What the error names.
NAMES = {
    "input": {"batch[0]", "loss"},
    "target": {"batch[1]", "loss"},
    "loss": {"loss"},
    "gradient": {"gradient of 0.bias"},
    "parameter": {"[0]['0.weight']"},
    "buffer": {"[0]['1.running_mean']"},
    "optimizer": {"[1].slots['memory']"},
}
DRAW = torch.Generator().manual_seed(1)
X = torch.randn(EPOCHS * BATCHES * SIZE, 3, generator=DRAW)
Y = torch.randn(EPOCHS * BATCHES * SIZE, 2, generator=DRAW)
VALIDATION = (torch.randn(6, 3, generator=DRAW), torch.randn(6, 2, generator=DRAW))

cells = pytest.mark.parametrize("value", VALUES)
places = pytest.mark.parametrize("place", PLACES)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def goal(model, batch):
    """Squared errors, and the faults that the third part of a batch asks for."""
    if len(batch) == 5:  # validation: which step's weights are to have what loss
        x, y, step, on, code = batch
        here = on.bool() & (model[1].num_batches_tracked == step)
        loss = torch.where(here, code / 0.0, ((model(x) - y) ** 2).sum())
        return loss, torch.tensor(len(x))
    x, y, faults = batch
    in_loss, in_gradient, in_buffer, code = faults.sum(0).unbind()
    loss = ((model(x) - y) ** 2).sum()
    loss = loss + torch.where(in_loss.bool(), code / 0.0, 0.0)
    # A root of one, or of zero, where it has no finite slope.
    bias = model[0].bias.sum()
    nothing = in_gradient * code * (bias - bias.detach())
    loss = loss + torch.sqrt(1 - in_gradient + nothing) - (1 - in_gradient)
    poison = torch.where(in_buffer.bool(), code / 0.0, 0.0)
    model[1].running_mean = model[1].running_mean + poison
    return loss, torch.tensor(len(x))


def tensors(source=None, step=None, value=None):
    """The samples of all steps, with a fault in one sample of a step."""
    x, y, faults = X.clone(), Y.clone(), torch.zeros(len(X), 4)
    if source in ("input", "target", "loss", "gradient", "buffer"):
        at = SIZE * (step - 1) + 2
        if source in ("input", "target"):
            (x if source == "input" else y)[at, 1] = VALUES[value] / torch.zeros(())
        else:
            faults[at, ["loss", "gradient", "buffer"].index(source)] = 1
            faults[at, 3] = VALUES[value]
    return x, y, faults


class Loader:
    """Four batches an epoch, others in each."""

    def __init__(self, *fault, without=None):
        self.batches = list(zip(*(t.split(SIZE) for t in tensors(*fault)), strict=True))
        self.without = without
        self.epoch = 1

    def __iter__(self):
        for step in range(BATCHES * self.epoch - BATCHES, BATCHES * self.epoch):
            if step + 1 != self.without:
                yield self.batches[step]


class Failing:
    """SGD with momentum, whose weights or memory get a fault in one step."""

    def __init__(self, source=None, step=0, value="nan"):
        self.source, self.step, self.code = source, step, VALUES[value]
        self.base = ll.optim.SGD(lr=0.05, momentum=0.9)

    def init(self, params):
        zero = torch.zeros(())
        return {"base": self.base.init(params), "made": zero, "memory": zero.clone()}

    def update(self, grads, slots, params):
        updates, base = self.base.update(grads, slots["base"], params)
        made = slots["made"] + 1
        fault = torch.where(made == self.step, self.code / torch.zeros(()), 0.0)
        memory = slots["memory"]
        if self.source == "parameter":
            updates = {**updates, "0.weight": updates["0.weight"] + fault}
        if self.source == "optimizer":
            memory = memory + fault
        return updates, {"base": base, "made": made, "memory": memory}


def run(*fault, without=None, validation=(0, 0, 0.0), **options):
    """A run of twelve steps, and what it leaves: module, epochs, error, last state."""
    model = net()
    train = Loader(*fault, without=without)
    planned = (torch.tensor(n) for n in validation)
    optimizer = options.pop("optimizer", None) or Failing(*fault)
    if isinstance(optimizer, functools.partial):
        optimizer = optimizer(model.parameters())
    left = Left(model, optimizer)

    def on_epoch(record):
        train.epoch = record.row["epoch"] + 1
        left.note(record)

    with pytest.MonkeyPatch.context() as patch:
        found = _training._not_finite

        def spied(*args):
            left.state = copied((args[4], args[5].slots))
            return found(*args)

        patch.setattr(_training, "_not_finite", spied)
        try:
            left.result = ll.fit(
                *(model, ll.objective(model, goal), optimizer, train),
                [(*VALIDATION, *planned)],
                **{"epochs": EPOCHS, "progress": False, "compile": False, **options},
                on_epoch=on_epoch,
            )
        except ll.NonFiniteError as error:
            left.error = error
    return left


class Left:
    """What a run leaves behind."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.epochs = [copied(model.state_dict())]  # after none, one, ...
        self.torch_states = [copied(self.torch_state())]
        self.error = self.state = self.result = None

    def torch_state(self):
        is_torch = isinstance(self.optimizer, torch.optim.Optimizer)
        return self.optimizer.state_dict()["state"] if is_torch else {}

    def note(self, record):
        self.epochs.append(copied(self.model.state_dict()))
        assert same(self.epochs[-1], record.params)
        self.torch_states.append(copied(self.torch_state()))
        if isinstance(self.optimizer, torch.optim.Optimizer):
            [group] = record.opt_state.slots.groups
            held = self.torch_states[-1].values()
            for now, moments in zip(held, group.moments.values(), strict=True):
                assert same({k: now[k] for k in moments}, moments)

    def best(self):
        return self.result.params, self.result.best_epoch


def copied(tree):
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), tree)


def same(one, other):
    """Whether two trees have the same bits in the same places."""
    one, other = (
        {pytree.keystr(path): leaf for path, leaf in found[0]}
        for found in map(pytree.tree_flatten_with_path, (one, other))
    )
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k]
        for k in one
    )


@functools.cache
def clean(**options):
    """A run without a fault, or its first steps."""
    return run(**options)


def state_before(step):
    """The weights and the optimizer's state before a step of the run."""
    if step == 1:
        model = net()
        return model.state_dict(), Failing().init(dict(model.named_parameters()))
    left = clean(max_steps=step - 1, restore_best=False)
    return left.result.params, left.result.opt_state.slots


def epoch_of(step):
    return -(-step // BATCHES)


def finite(tree):
    leaves = [t for t in pytree.tree_leaves(tree) if torch.is_tensor(t)]
    return all(bool(t.isfinite().all()) for t in leaves)


def test_the_run_without_a_fault_ends_well():
    left = clean()
    assert left.error is None
    assert left.result.history["step"] == [4, 8, 12]
    assert all(map(math.isfinite, left.result.history["val_loss"]))


@cells
@places
@pytest.mark.parametrize("source", IN_STEP)
def test_a_step_that_is_not_finite_is_named_and_changes_nothing(source, place, value):
    step = PLACES[place]
    left = run(source, step, value)
    assert (left.error.epoch, left.error.step) == (epoch_of(step), step)
    named = {name for name in left.error.where if source not in ("input", "target")
             or not name.startswith("gradient")}  # fmt: skip
    assert named == NAMES[source]
    assert same(left.state, state_before(step))
    # The module holds the last finished epoch.
    assert len(left.epochs) == epoch_of(step)
    assert same(left.epochs, clean().epochs[: epoch_of(step)])
    assert same(left.model.state_dict(), left.epochs[-1])


@pytest.mark.filterwarnings("ignore:.*batches in epoch")
@cells
@places
@pytest.mark.parametrize("source", IN_STEP)
def test_a_step_that_is_skipped_is_as_if_it_had_not_been(source, place, value):
    step = PLACES[place]
    left, right = run(source, step, value, skip_nonfinite=1), run(without=step)
    assert left.error is None
    assert left.result.history["skipped"] == [
        int(epoch == epoch_of(step)) for epoch in (1, 2, 3)
    ]
    losses = left.result.history["train_loss"]
    for epoch, loss in enumerate(losses, 1):  # told as they were
        bad = epoch == epoch_of(step) and source != "gradient"
        assert math.isfinite(loss) != bad
    assert left.result.history["val_loss"] == right.result.history["val_loss"]
    assert same(left.epochs, right.epochs)
    assert same(left.result.opt_state.slots, right.result.opt_state.slots)
    assert same(left.best(), right.best())
    assert int(left.result.opt_state.step) == 12  # random layers count those too


@pytest.mark.parametrize("source", IN_STEP)
def test_one_more_than_may_be_skipped_is_named(source):
    class Twice(Loader):
        def __iter__(self):
            yield from (self.batches[step] for step in (0, 5, 2, 5))

    left = Left(net(), None)
    with pytest.raises(ll.NonFiniteError) as caught:
        ll.fit(
            *(left.model, ll.objective(left.model, goal), Failing()),
            Twice(source, 6, "nan"),
            **{"epochs": 2, "progress": False, "compile": False},
            **{"skip_nonfinite": 2, "on_epoch": left.note},
        )
    assert (caught.value.epoch, caught.value.step) == (2, 6)
    assert len(left.epochs) == 2
    assert same(left.model.state_dict(), left.epochs[-1])


@cells
@places
@pytest.mark.parametrize("source", IN_STATE)
def test_a_state_that_is_not_finite_ends_the_epoch_and_is_not_kept(
    source, place, value
):
    """Though the gradient was finite: so the next step tells, or the epoch's end."""
    step = PLACES[place]
    for skipped in (0, 10):
        left = run(source, step, value, skip_nonfinite=skipped)
        error = left.error
        assert error.epoch == epoch_of(step)
        assert set(error.where) >= NAMES[source]
        assert all(name.startswith("[") for name in error.where)
        last = BATCHES * error.epoch
        assert error.step == (step if source == "parameter" else last)
        assert "Lower the learning rate" in str(error)
        assert same(left.epochs, clean().epochs[: error.epoch])
        assert same(left.model.state_dict(), left.epochs[-1])


@cells
@places
@pytest.mark.parametrize("source", IN_STATE)
def test_with_a_save_each_step_a_state_is_told_exactly_and_never_saved(
    source, place, value, tmp_path
):
    step = PLACES[place]
    left = run(source, step, value, checkpoint=tmp_path, save_every=1)
    assert (left.error.epoch, left.error.step) == (epoch_of(step), step)
    assert set(left.error.where) >= NAMES[source]
    saved = ll.load(tmp_path)
    assert int(saved.opt_state.step) == step - 1
    assert same((saved.params, saved.opt_state.slots), state_before(step))
    assert finite((saved.params, saved.opt_state, saved.best or ()))


@cells
@places
def test_a_validation_loss_that_is_not_finite_is_not_the_best(place, value):
    epoch = epoch_of(PLACES[place])
    left = run(validation=(BATCHES * epoch, 1, VALUES[value]))
    expected = clean().result.history["val_loss"]
    losses = left.result.history["val_loss"]
    assert [math.isfinite(loss) for loss in losses] == [n != epoch for n in (1, 2, 3)]
    assert str(losses[epoch - 1]) == value
    expected[epoch - 1] = math.inf
    best = min((1, 2, 3), key=lambda n: expected[n - 1])
    assert left.result.best_epoch == best
    assert same(dict(left.result.params), dict(clean().epochs[best]))
    assert same(left.model.state_dict(), clean().epochs[best])
    assert same(left.epochs, clean().epochs)  # training saw nothing of it


@cells
def test_no_finite_validation_loss_is_an_error(value):
    bad = VALIDATION[1].clone()
    bad[-1, -1] = VALUES[value] / torch.zeros(())
    left = Left(net(), None)
    with pytest.raises(ll.NonFiniteError, match="finite after no epoch") as caught:
        ll.fit(
            *(left.model, ll.objective(left.model, goal), Failing(), Loader()),
            [(VALIDATION[0], bad, *(torch.tensor(n) for n in (0, 0, 0.0)))],
            **{"epochs": 3, "progress": False, "compile": False},
            on_epoch=left.note,
        )
    error = caught.value
    assert (error.epoch, error.step, error.where) == (3, 12, ("val_loss",))
    assert same(left.model.state_dict(), left.epochs[-1])


@places
def test_an_instance_of_torch_holds_the_last_finished_epoch_too(place):
    optimizer = functools.partial(torch.optim.Adam, lr=0.01)
    step = PLACES[place]
    left = run("gradient", step, "inf", optimizer=optimizer)
    assert left.error.step == step
    assert same(
        left.torch_states, clean(optimizer=optimizer).torch_states[: epoch_of(step)]
    )
    assert same(left.torch_state(), left.torch_states[-1])


def test_numbers_that_grow_too_large_by_themselves():
    """Adam squares a gradient that is finite; BatchNorm, an input that is."""
    x = torch.ones(4, 1)
    large = [(x, x), (x, 1e25 * x), (x, x)]
    model = nn.Linear(1, 1)
    before = copied(model.state_dict())
    adam = torch.optim.Adam(model.parameters())
    options = {"epochs": 1, "progress": False, "compile": False}
    with pytest.raises(ll.NonFiniteError, match="exp_avg_sq"):
        ll.fit(model, nn.L1Loss(), adam, [(x, x)], **options) and ll.fit(
            model, lambda o, y: (o * y).sum(1), adam, large, **options
        )
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    before = copied(model.state_dict())
    x = torch.randn(4, 1)
    with pytest.raises(ll.NonFiniteError, match="running_var"):
        ll.fit(
            model, nn.L1Loss(), ll.optim.SGD(lr=0.1), [(x, x), (1e25 * x, x)], **options
        )
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("source", IN_STEP)
def test_a_step_of_ones_own_changes_nothing_once_its_gate_is_closed(source, plain):
    """Computed where values can be read, or chosen element by element."""
    model = net()
    own, optimizer = ll.objective(model, goal), ll.optim.Adam(lr=0.1)
    good, bad = (
        tuple(t[:SIZE] for t in data) for data in (tensors(), tensors(source, 1, "nan"))
    )
    step = ll.make_step(own, optimizer)
    state = ll.init(own, optimizer, ema=0.5, skip_nonfinite=1)
    made = []
    with torch.set_grad_enabled(not plain):
        for batch in (good, bad, good, bad, good):
            state = step(*state, batch)[:2]
            made.append(copied((state[0], state[1].carry)))
    gates = [carry.gate for _, carry in made]
    assert [int(gate.skipped) for gate in gates] == [0, 1, 1, 2, 2]
    assert [int(gate.step) for gate in gates] == [1, 2, 3, 4, 4]
    rest = [(params, carry._replace(gate=())) for params, carry in made]
    assert same(rest[0], rest[1])
    assert not same(rest[1], rest[2])
    assert same(rest[2], rest[3])
    assert same(rest[3], rest[4])
    assert finite(rest)


@pytest.mark.parametrize("plain", [True, False])
def test_a_step_that_is_skipped_changes_no_number_of_python(plain):
    def start(params):
        return {"made": 0, "rate": 0.1}

    def update(grads, state, params):
        updates = {name: -state["rate"] * g for name, g in grads.items()}
        return updates, {"made": state["made"] + 1, "rate": state["rate"] * 0.5}

    optimizer = ll.Optimizer(start, update)
    own = ll.objective(net(), goal)
    step = ll.make_step(own, optimizer)
    state = ll.init(own, optimizer, skip_nonfinite=1)
    good, bad = (
        tuple(t[:SIZE] for t in data) for data in (tensors(), tensors("loss", 1, "nan"))
    )
    with torch.set_grad_enabled(not plain):
        for batch in (good, bad, good, bad, good):
            state = step(*state, batch)[:2]
    assert state[1].slots == {"made": 2, "rate": 0.025}


def test_what_was_not_finite_is_told_in_inference_mode():
    """Where no gradient can be looked at."""
    x, y, _ = tensors()
    with torch.inference_mode(), pytest.raises(ll.NonFiniteError, match="loss"):
        ll.fit(
            *(nn.Linear(3, 2), nn.MSELoss(), ll.optim.SGD(lr=1e30)),
            DataLoader(TensorDataset(x, y), SIZE),
            **{"epochs": 4, "progress": False, "compile": False},
        )


@pytest.mark.parametrize("in_memory", [True, False])
def test_looking_for_what_was_not_finite_moves_no_generator(in_memory):
    model, states = nn.Linear(3, 2), []
    x, y, _ = tensors("input", 6, "nan")
    data = TensorDataset(x, y)
    train = DataLoader(data if in_memory else list(data), SIZE, shuffle=True)
    found = _training._not_finite

    def spied(*args):
        states.append((torch.get_rng_state(), random.getstate()))
        where = found(*args)
        states.append((torch.get_rng_state(), random.getstate()))
        return where

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_training, "_not_finite", spied)
        with pytest.raises(ll.NonFiniteError, match=r"batch\[0\], loss, gradient"):
            ll.fit(
                *(model, nn.MSELoss(), ll.optim.SGD(lr=0.1), train),
                **{"epochs": 1, "progress": False, "compile": False},
                on_step=lambda record: random.random() + torch.rand(()) and None,
            )
    before, after = states
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore:.*one batch holds")
def test_looking_moves_no_generator_of_the_loader(padded):
    x, y, _ = tensors("input", 6, "nan")
    own = torch.Generator().manual_seed(0)
    data = DataLoader([*zip(x, y, strict=True)], SIZE, shuffle=True, generator=own)
    left = []
    with pytest.raises(ll.NonFiniteError, match=r"batch\[0\], loss, gradient"):
        ll.fit(
            *(nn.Linear(3, 2), nn.MSELoss(), ll.optim.SGD(lr=0.1)),
            ll.pad_last(data) if padded else data,
            **{"epochs": 1, "progress": False, "compile": False},
            on_step=lambda record: left.append(own.get_state()),
        )
    assert torch.equal(own.get_state(), left[0])


def test_looking_takes_no_more_memory_than_the_step():
    seen = []

    def goal(model, batch):
        x, y = batch
        if torch.is_grad_enabled():
            seen.append(len(x))
        return ((model(x) - y) ** 2).sum(), torch.tensor(len(x))

    x, y, _ = tensors("input", 6, "nan")
    model = nn.Linear(3, 2)
    with pytest.raises(
        ll.NonFiniteError, match=r"batch\[0\], loss, gradient of weight"
    ):
        ll.fit(
            *(model, ll.objective(model, goal), ll.optim.SGD(lr=0.1)),
            DataLoader(TensorDataset(x, y), SIZE),
            **{"epochs": 1, "progress": False, "compile": False, "accumulate": 2},
        )
    assert set(seen[-2:]) == {SIZE // 2}


# --- compiled -------------------------------------------------------------------------


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


def marked(output, target):
    """Squared errors, and no finite slope where a sample is marked so."""
    losses = ((output - target[:, :2]) ** 2).sum(1)
    mark, moved = target[:, 2], (output - output.detach()).sum(1)
    return losses + torch.sqrt(1 - mark + mark * moved) - (1 - mark)


def run_compiled(folded, step, **options):
    """Twelve steps in one epoch; from memory, in one call."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    mark = torch.zeros(len(X), 1)
    mark[SIZE * step - 2] = 1
    data = TensorDataset(X, torch.cat([Y, mark], 1))
    train = DataLoader(data, SIZE)
    optimizer = ll.optim.SGD(lr=0.05, momentum=0.9)
    options = {"epochs": 1, "progress": False, "compile": True, **options}
    train = train if folded else list(train)
    return model, lambda: ll.fit(model, marked, optimizer, train, **options)


@pytest.mark.usefixtures("aot_eager")
@pytest.mark.parametrize("folded", [False, True])
def test_compiled(folded, monkeypatch):
    """A step is named, and the state is that before it; or it is left out."""
    model, fit = run_compiled(folded, 6)
    before, states, found = copied(model.state_dict()), [], _training._not_finite

    def spied(*args):
        states.append(copied(args[4]))
        return found(*args)

    monkeypatch.setattr(_training, "_not_finite", spied)
    with pytest.raises(ll.NonFiniteError, match="gradient of weight") as caught:
        fit()
    assert (caught.value.epoch, caught.value.step) == (1, 6)
    assert same(model.state_dict(), before)
    _, fit = run_compiled(folded, 12, max_steps=5)
    result = fit()
    assert result.compiled.compiled
    assert result.compiled.folded == folded
    assert same(states[0], result.params)


@pytest.mark.usefixtures("aot_eager")
@pytest.mark.parametrize("folded", [False, True])
def test_compiled_and_skipped(folded):
    _, fit = run_compiled(folded, 6, skip_nonfinite=1)
    result = fit()
    assert result.compiled.folded == folded
    assert result.history["skipped"] == [1]
    data = [
        (x, torch.cat([y, torch.zeros(SIZE, 1)], 1))
        for x, y in zip(X.split(SIZE), Y.split(SIZE), strict=True)
    ]
    del data[5]
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = ll.optim.SGD(lr=0.05, momentum=0.9)
    options = {"epochs": 1, "progress": False, "compile": True}
    without = ll.fit(model, marked, optimizer, data, **options)
    assert same(result.params, without.params)
    assert same(result.opt_state.slots, without.opt_state.slots)
