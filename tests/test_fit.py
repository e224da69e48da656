"""fit: the numbers of a hand-written loop, and a module that is never lost."""

import copy
import functools
import json
import pickle
import random
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from cases import CASES, mlp
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll

quiet = functools.partial(ll.fit, progress=False)


@functools.cache
def digits():
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float64).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    return (images[:500], labels[:500]), (images[500:700], labels[500:700])


def loaders(dtype=torch.float64):
    """Shuffled by the global generator, with an odd last batch."""
    (x, y), (vx, vy) = digits()
    train = TensorDataset(x.to(dtype), y)
    val = TensorDataset(vx.to(dtype), vy)
    return DataLoader(train, 64, shuffle=True), DataLoader(val, 64)


def conv_net(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(
            1, 8, 3, padding=1, bias=False
        ),  # of a bias the norm would leave noise
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).to(dtype)


def by_hand(model, loss_fn, optimizer, train, val, epochs, scheduler, by):
    """The loop of the first tutorial, on which every number must agree."""
    train_losses, val_losses, rates = [], [], []
    for _ in range(epochs):
        model.train()
        total = 0.0
        for inputs, labels in train:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * inputs.size(0)
            rate = optimizer.param_groups[0]["lr"]
            if by == "step":
                scheduler.step()
        train_losses.append(total / len(train.dataset))
        model.eval()
        total = 0.0
        with torch.no_grad():
            for inputs, labels in val:
                total += loss_fn(model(inputs), labels).item() * inputs.size(0)
        val_losses.append(total / len(val.dataset))
        rates.append(rate)
        if by == "epoch":
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(val_losses[-1])
            else:
                scheduler.step()
    return train_losses, val_losses, rates


SCHEDULES = {
    "none": (None, None),
    "one_cycle": (
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=8 * 3 + 1),
        "step",
    ),
    "step": (lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5), "epoch"),
    "plateau": (
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.9),
        "epoch",
    ),
    "sequential": (
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 0.1, total_iters=5),
                lr_scheduler.CosineAnnealingLR(o, 20),
            ],
            [5],
        ),
        "step",
    ),
}
OPTIMIZERS = {
    "adam": functools.partial(torch.optim.Adam, lr=1e-3),
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fit_is_the_hand_written_loop(dtype, schedule, optimizer):
    make_scheduler, by = SCHEDULES[schedule]
    theirs, ours = conv_net(dtype), conv_net(dtype)
    their_optimizer = OPTIMIZERS[optimizer](theirs.parameters())
    our_optimizer = OPTIMIZERS[optimizer](ours.parameters())
    their_scheduler = make_scheduler and make_scheduler(their_optimizer)
    our_scheduler = make_scheduler and make_scheduler(our_optimizer)
    train, val = loaders(dtype)
    loss_fn = nn.CrossEntropyLoss()

    torch.manual_seed(7)
    train_losses, val_losses, rates = by_hand(
        theirs, loss_fn, their_optimizer, train, val, 3, their_scheduler, by
    )
    after = torch.get_rng_state()
    torch.manual_seed(7)
    result = quiet(
        ours,
        loss_fn,
        our_optimizer,
        train,
        val,
        epochs=3,
        scheduler=our_scheduler,
        schedule_by=by,
        restore_best=False,
        compile=False,
    )
    assert torch.equal(torch.get_rng_state(), after)
    loose = dtype == torch.float32
    close = functools.partial(pytest.approx, rel=1e-5 if loose else 1e-12)
    assert result.history["train_loss"] == close(train_losses)
    assert result.history["val_loss"] == close(val_losses)
    assert result.history["lr"] == pytest.approx(rates, rel=1e-14)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if loose else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance)
    # and the optimizer can be used on, in plain PyTorch
    assert our_optimizer.state[ours[5].weight].keys() == (
        their_optimizer.state[theirs[5].weight].keys()
    )
    assert our_optimizer.param_groups[0]["lr"] == their_optimizer.param_groups[0]["lr"]


def test_going_on_in_plain_pytorch_equals_one_run():
    train, val = loaders()
    batches = list(train)
    loss_fn = nn.CrossEntropyLoss()
    one, two = mlp_on_digits(), mlp_on_digits()
    optimizers = [OPTIMIZERS["adam"](m.parameters()) for m in (one, two)]
    by_hand(one, loss_fn, optimizers[0], _Listed(batches), val, 4, None, None)
    quiet(two, loss_fn, optimizers[1], batches, epochs=2, compile=False)
    by_hand(two, loss_fn, optimizers[1], _Listed(batches), val, 2, None, None)
    torch.testing.assert_close(
        two.state_dict(), one.state_dict(), rtol=1e-9, atol=1e-12
    )


class _Listed(list):
    @property
    def dataset(self):
        return range(sum(len(y) for _, y in self))


def mlp_on_digits():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)
    ).double()


def test_two_fits_are_one():
    batches = list(loaders()[0])
    one, two = mlp_on_digits(), mlp_on_digits()
    fit = functools.partial(quiet, loss_fn=nn.CrossEntropyLoss(), compile=False)
    optimizers = [OPTIMIZERS["adam"](m.parameters()) for m in (one, two)]
    fit(one, optimizer=optimizers[0], train_loader=batches, epochs=4)
    fit(two, optimizer=optimizers[1], train_loader=batches, epochs=2)
    fit(two, optimizer=optimizers[1], train_loader=batches, epochs=2)
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=1e-12, atol=0)


def test_history_has_rows_and_columns():
    train, val = loaders()
    result = quiet(
        mlp_on_digits(),
        nn.CrossEntropyLoss(),
        torch.optim.SGD,
        train,
        val,
        epochs=2,
    )
    history = result.history
    assert history.columns == (
        *("epoch", "step", "train_loss", "val_loss", "lr", "seconds"),
        *("n_train", "n_val"),
    )
    assert history["epoch"] == [1, 2]
    assert history["step"] == [8, 16]
    assert history["n_train"] == [500, 500]
    assert history[-1]["n_val"] == 200
    assert isinstance(history[-1]["n_val"], int)
    assert all(s > 0 for s in history["seconds"])
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[1:]["epoch"] == [2]
    assert len(repr(history).splitlines()) == 3
    with pytest.raises(KeyError, match="no column 'loss'"):
        history["loss"]


def test_class_weights_count_in_both_means():
    weight = torch.rand(10, dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weight, ignore_index=3)
    train, val = loaders()
    model = mlp_on_digits()
    result = quiet(model, loss, ll.optim.SGD(lr=1e-30), train, val, epochs=1)
    (x, y), (vx, vy) = digits()
    with torch.no_grad():
        assert result.history[0]["train_loss"] == pytest.approx(
            loss(model(x), y).item(), rel=1e-12
        )
        assert result.history[0]["val_loss"] == pytest.approx(
            loss(model(vx), vy).item(), rel=1e-12
        )
    assert result.history[0]["n_train"] == pytest.approx(weight[y[y != 3]].sum().item())


def test_the_best_weights_are_restored():
    snapshots = {}
    val_losses = iter([3.0, 1.0, 2.0, float("nan")])

    class Val:
        def __iter__(self):  # the loss of the epoch, whatever the weights
            yield torch.tensor([[next(val_losses)]]), torch.zeros(1, 1)

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.w if self.training else x

    def keep(record):
        snapshots[record.row["epoch"]] = record.params["w"].clone()

    for restore, expected in ((True, 2), (False, 4)):
        val_losses = iter([9.0, 3.0, 1.0, 2.0, float("nan")])  # the first is looked at
        model = Scale()
        result = quiet(
            model,
            nn.L1Loss(),
            torch.optim.SGD,
            [(torch.ones(2, 1), torch.zeros(2, 1))],
            Val(),
            epochs=4,
            restore_best=restore,
            on_epoch=keep,
        )
        assert result.best_epoch == 2
        assert torch.equal(model.w, snapshots[expected])
        assert torch.equal(result.params["w"], snapshots[expected])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, RuntimeError("loader died"), MemoryError]
)
@pytest.mark.parametrize("compiled", [True, False])
def test_whatever_happens_the_last_finished_epoch_is_kept(
    training, error, compiled, monkeypatch
):
    monkeypatch.setattr("lossloop._fit.compiled", _traced())
    finished = {}
    calls = 0

    class Dies:
        def __iter__(self):
            nonlocal calls
            calls += 1
            yield CASES["conv_net"].batch()
            if calls == 3:
                raise error
            yield CASES["conv_net"].batch()

    model = CASES["conv_net"].model().train(training)
    first = copy.deepcopy(model.state_dict())

    def keep(record):
        finished.update({k: t.clone() for k, t in record.params.items()})

    with pytest.raises(error if isinstance(error, type) else type(error)):
        quiet(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.Adam,
            Dies(),
            epochs=5,
            on_epoch=keep,
            compile=compiled,
        )
    assert model.training is training
    assert all(m.training is training for m in model.modules())
    held = model.state_dict()
    assert all(torch.equal(held[k], t) for k, t in finished.items())
    assert not torch.equal(held["0.weight"], first["0.weight"])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def _traced():
    from lossloop._compile import compiled

    return functools.partial(compiled, backend="aot_eager")


def test_a_failure_in_the_first_epoch_changes_nothing():
    model = mlp()
    before = copy.deepcopy(model.state_dict())

    def dies():
        yield CASES["mlp"].batch()
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        quiet(model, nn.CrossEntropyLoss(), torch.optim.Adam, dies(), epochs=1)
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before.items())


def test_a_compiled_run_keeps_its_best_weights(monkeypatch):
    """Donating steps write over the tensors of the best epoch."""
    monkeypatch.setattr("lossloop._fit.compiled", _traced())
    kept = {}

    def keep(record):
        kept[record.row["epoch"]] = {k: t.clone() for k, t in record.params.items()}

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    result = quiet(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        [(X, Y)] * 4,
        [CASES["mlp"].batch(30, seed=8)],
        epochs=12,
        compile=True,
        on_epoch=keep,
    )
    assert result.best_epoch < 12
    for held in (result.params, model.state_dict()):
        best = kept[result.best_epoch]
        assert all(torch.equal(held[k], t) for k, t in best.items())


def test_too_many_changes_of_a_number_go_on_eagerly(monkeypatch):
    monkeypatch.setattr("lossloop._fit.compiled", _traced())
    monkeypatch.setattr("lossloop._plan.SECONDS_TO_COMPILE", -1e9)
    factor = 1.0

    def change(record):
        nonlocal factor
        factor += 1

    result = quiet(
        nn.Linear(5, 3),
        lambda o, y: factor * nn.functional.cross_entropy(o, y, reduction="none"),
        ll.optim.SGD(lr=1e-9),
        [(X, Y)] * 10,
        epochs=12,
        on_epoch=change,
    )
    assert not result.compiled.compiled
    losses = result.history["train_loss"]
    assert losses == pytest.approx([losses[0] * k for k in range(1, 13)], rel=1e-5)


def test_compiled_and_eager_runs_agree(monkeypatch):
    monkeypatch.setattr("lossloop._fit.compiled", _traced())
    train, val = loaders()
    batches = list(train)
    results = [
        quiet(
            conv_net(),
            nn.CrossEntropyLoss(),
            ll.optim.SGD(lr=0.1, momentum=0.9),
            batches,
            val,
            epochs=2,
            compile=choice,
        )
        for choice in (True, False)
    ]
    compiled, eager = results
    assert compiled.compiled.compiled
    assert compiled.compiled.reason.startswith("compile=True")
    assert not eager.compiled.compiled
    for column in ("train_loss", "val_loss"):
        assert compiled.history[column] == pytest.approx(
            eager.history[column], rel=1e-9
        )
    torch.testing.assert_close(compiled.params, eager.params, rtol=1e-7, atol=1e-10)


def test_a_run_compiles_each_shape_at_most_once(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    from lossloop._compile import compiled

    monkeypatch.setattr(
        "lossloop._fit.compiled", functools.partial(compiled, backend=backend)
    )
    model = mlp_on_digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=100)
    train, val = loaders()  # 7 batches of 64 and one of 52; 3 of 64 and one of 8
    result = quiet(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        train,
        val,
        epochs=5,
        scheduler=scheduler,
        schedule_by="step",
        compile=True,
    )
    assert len(graphs) == 2  # a training and an evaluation step; odd batches run eager
    assert len(set(result.history["lr"])) == 5


def test_dropout_follows_the_seed_and_nothing_else():
    train = list(loaders(torch.float32)[0])

    def run(seed, global_seed):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))
        torch.manual_seed(global_seed)
        return quiet(
            net, nn.CrossEntropyLoss(), torch.optim.Adam, train, epochs=2, seed=seed
        ).history["train_loss"]

    assert run(1, 10) == run(1, 20)
    assert run(1, 10) != run(2, 10)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda b: b, id="list"),
        pytest.param(
            lambda b: tuple(torch.cat(t) for t in zip(*b, strict=True)), id="tensors"
        ),
        pytest.param(iter, id="iterator"),
        pytest.param(lambda b: (pair for pair in b), id="generator"),
        pytest.param(
            lambda b: DataLoader(
                TensorDataset(*map(torch.cat, zip(*b, strict=True))), 6
            ),
            id="DataLoader",
        ),
    ],
)
def test_kinds_of_loaders(data):
    batches = [CASES["mlp"].batch(6, seed) for seed in range(3)]
    model = mlp()
    result = quiet(
        model,
        nn.CrossEntropyLoss(),
        ll.optim.SGD(lr=1e-30),
        data(batches),
        data(batches),
        epochs=1,
    )
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    expected = nn.functional.cross_entropy(model(x), y).item()
    row = result.history[0]
    assert row["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert row["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert row["n_train"] == row["n_val"] == 18


def test_worker_processes():
    train = DataLoader(TensorDataset(*CASES["mlp"].batch(12)), 4, num_workers=1)
    result = quiet(
        mlp(), nn.CrossEntropyLoss(), torch.optim.Adam, train, train, epochs=2
    )
    assert result.history["n_val"] == [12, 12]


def test_inputs_in_tuples_and_dictionaries():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x, scale):
            return self.linear(x) * scale

    x, y = CASES["mlp"].batch()
    for inputs in ((x, torch.ones(6, 1)), {"scale": torch.ones(6, 1), "x": x}):
        quiet(Two(), nn.CrossEntropyLoss(), torch.optim.Adam, [(inputs, y)], epochs=1)


def test_progress_prints_a_line_per_epoch(capsys):
    ll.fit(
        mlp(),
        nn.CrossEntropyLoss(),
        torch.optim.Adam,
        [CASES["mlp"].batch()],
        [CASES["mlp"].batch()],
        epochs=2,
    )
    shown = capsys.readouterr()
    assert shown.err == ""  # the bar is not for files
    lines = shown.out.strip().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("Epoch 2/2  train_loss ")
    assert "val_loss" in lines[1]
    assert "lr 0.001" in lines[1]


def test_the_bar_shows_the_exact_running_mean(capsys, monkeypatch):
    monkeypatch.setattr("lossloop._progress.SECONDS_BETWEEN_READS", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    ll.fit(
        nn.Linear(1, 1),
        lambda out, target: target + 0 * out.squeeze(1),
        ll.optim.SGD(lr=1e-9),
        [(torch.zeros(n, 1), torch.full((n,), v)) for n, v in ((3, 1.0), (1, 5.0))],
        epochs=1,
    )
    shown = capsys.readouterr().err
    assert "train_loss 1" in shown
    assert "train_loss 2" in shown


def test_the_bar_goes_on_every_way_out(monkeypatch):
    from lossloop import _progress

    closed = []

    class Bar(_progress.tqdm):
        def close(self):
            closed.append(True)
            super().close()

    monkeypatch.setattr(_progress, "tqdm", Bar)

    def dies():
        yield X, Y
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ll.fit(mlp(), nn.CrossEntropyLoss(), torch.optim.SGD, dies(), epochs=1)
    assert closed


def test_silent_runs_print_nothing_and_read_the_device_once_an_epoch(
    capsys, monkeypatch
):
    reads = []
    original = ll.Mean.read
    monkeypatch.setattr(ll.Mean, "read", lambda m: reads.append(1) or original(m))
    batches = [CASES["mlp"].batch(6, seed) for seed in range(5)]
    quiet(mlp(), nn.CrossEntropyLoss(), torch.optim.Adam, batches, epochs=3)
    assert len(reads) == 3
    assert capsys.readouterr() == ("", "")


# --- refused at the door --------------------------------------------------------------

X, Y = CASES["mlp"].batch()


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.LazyLinear(3)

    def forward(self, x):
        return self.linear(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(x.unsqueeze(1))[0][:, 0]


class Layer(nn.Module):
    """A linear layer, before which `before` is called."""

    def __init__(self, before):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.before = before

    def forward(self, x):
        return self.linear(self.before(self, x))


def counts(layer, x):
    layer.calls = getattr(layer, "calls", 0) + 1
    return x * layer.calls


def clamps(layer, x):
    layer.linear.weight.data.clamp_(-0.1, 0.1)
    return x


class Old(torch.autograd.Function):
    """A function of the style before setup_context."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Merges(nn.Module):
    """Merges its adapter into the weight for evaluation, like loralib."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.adapter = nn.Parameter(torch.randn(3, 5))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += self.adapter.data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        weight = self.weight if self.merged else self.weight + self.adapter
        return x @ weight.T


class Grows(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        self.seen = torch.cat([self.seen, x.new_ones(1)])
        return self.linear(x)


class Silent(nn.Module):
    """Overrides train() without returning self."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def train(self, mode=True):
        super().train(mode)

    def forward(self, x):
        return self.linear(x)


class Forgets(nn.Module):
    """Writes to a buffer that is no part of its state."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


def hooked():
    model = mlp()
    model[0].register_full_backward_hook(lambda *args: None)
    return model


def with_gradient_hook():
    model = mlp()
    model[0].weight.register_hook(lambda grad: grad)
    return model


def with_step_hook():
    model = mlp()
    arguments = with_optimizer(model)
    arguments["optimizer"].register_step_post_hook(lambda *args: None)
    return arguments


def inf_input():
    x = X.clone()
    x[2, 1] = float("inf")
    return [(x, Y)]


def with_optimizer(model, make=torch.optim.SGD):
    return {"model": model, "optimizer": make(model.parameters(), lr=0.1)}


def scheduled(model, by, **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "schedule_by": by,
        **more,
    }


def one_cycle(steps):
    arguments = with_optimizer(mlp())
    scheduler = lr_scheduler.OneCycleLR(
        arguments["optimizer"], max_lr=0.1, total_steps=steps
    )
    return arguments | {"scheduler": scheduler}


class HandsOutOne:
    """A loader whose every iteration goes on with the same iterator."""

    def __init__(self):
        self.iterator = iter([(X, Y), (X, Y)])

    def __iter__(self):
        return self.iterator


class Shares(nn.Module):
    """A buffer that is a view of a parameter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("view", self.linear.weight.data[0])

    def forward(self, x):
        return self.linear(x)


class Expands(Shares):
    def __init__(self):
        super().__init__()
        self.register_buffer("view", torch.zeros(1).expand(4))


def penalised():
    """A penalty on the weights of the module itself, which are others in a step."""
    model = mlp()

    def loss(output, target):
        losses = nn.functional.cross_entropy(output, target, reduction="none")
        return losses + model[0].weight.square().sum()

    return {"model": model, "loss_fn": loss}


def wrapped(model):
    """As `torch.compile(model.forward)` does it."""
    forward = model.forward
    model.forward = lambda x: forward(x)
    return model


def of_another():
    """Nothing of it is trained, though something else could be."""
    scale = torch.ones((), requires_grad=True)
    return lambda o, y: (
        scale * nn.functional.cross_entropy(o.detach(), y, reduction="none")
    )


class Packed(nn.Module):
    """Packs its sequences, which `torch.func` cannot differentiate."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        lengths = torch.ones(len(x), dtype=torch.int64)
        pack = nn.utils.rnn.pack_padded_sequence
        packed = pack(x.unsqueeze(1), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.recurrent(packed)[1][0])


REFUSED = {
    "packed sequences": (
        {"model": Packed()},
        TypeError,
        "train_loader, batch 1: .*padded sequences instead of packed ones",
    ),
    "parameters for an optimizer": (
        {"optimizer": list(nn.Linear(500, 3).parameters())},
        TypeError,
        r"^.{0,99} is not an optimizer: pass .*as Adam\(model.parameters\(\)\)",
    ),
    "a penalty by another way": (
        penalised(),
        ValueError,
        r"depends on 0.weight of the module itself.*objective\(model",
    ),
    "forward replaced": (
        {"model": wrapped(mlp())},
        ValueError,
        r"depends on 0.weight, 0.bias, 2.weight and 1 more of.*module.compile\(\)",
    ),
    "forward of a part replaced": (
        {"model": nn.Sequential(wrapped(nn.Linear(5, 3)))},
        ValueError,
        "depends on 0.weight, 0.bias of the module itself",
    ),
    "nothing of the model": (
        {"loss_fn": of_another()},
        ValueError,
        "does not depend on any trainable",
    ),
    "shared iterator": (
        {"train_loader": HandsOutOne(), "epochs": 2},
        ValueError,
        "train_loader is a one-shot",
    ),
    "buffer that views a parameter": (
        {"model": Shares()},
        ValueError,
        "view shares its memory with model.linear.weight",
    ),
    "expanded buffer": ({"model": Expands()}, ValueError, "shares its memory"),
    "no batches": ({"train_loader": []}, ValueError, "train_loader has no batches"),
    "empty loader": (
        {"train_loader": DataLoader(TensorDataset(X, Y), 10, drop_last=True)},
        ValueError,
        "drop_last",
    ),
    "empty validation": ({"val_loader": []}, ValueError, "val_loader has no batches"),
    "empty generator": (
        {"train_loader": (b for b in ())},
        ValueError,
        "gave no batches",
    ),
    "no samples": (
        {"train_loader": (X[:0], Y[:0])},
        ValueError,
        "at least one",
    ),
    "unequal tensors": ({"train_loader": (X, Y[:3])}, ValueError, r"\[6, 3\]"),
    "one-shot": (
        {"train_loader": iter([(X, Y)]), "epochs": 2},
        ValueError,
        "train_loader is a one-shot iterator",
    ),
    "one-shot validation": (
        {"val_loader": (b for b in [(X, Y)]), "epochs": 2},
        ValueError,
        "val_loader is a one-shot iterator",
    ),
    "zero epochs": ({"epochs": 0}, ValueError, "at least 1, got 0"),
    "epochs of another type": ({"epochs": 2.0}, TypeError, "must be an int, got 2.0"),
    "a data set": (
        {"train_loader": TensorDataset(X, Y)},
        TypeError,
        r"DataLoader\(train_loader, batch_size",
    ),
    "a tensor": ({"train_loader": X}, TypeError, "got a Tensor"),
    "no loader": ({"train_loader": 3}, TypeError, "got a int"),
    "broadcast": (
        {"loss_fn": nn.MSELoss(), "train_loader": [(X, torch.randn(6))]},
        ValueError,
        "train_loader, batch 1.*MSELoss",
    ),
    "broadcast (N, 1)": (
        {
            "model": nn.Linear(5, 1),
            "loss_fn": nn.L1Loss(),
            "train_loader": [(X, torch.randn(6))],
        },
        ValueError,
        r"\(6, 1\).*\(6,\).*squeeze",
    ),
    "own loss, broadcast": (
        {
            "model": nn.Linear(5, 1),
            "loss_fn": lambda o, y: (o - y).square().mean(1),
            "train_loader": [(X, torch.randn(6))],
        },
        ValueError,
        r"\(6, 1\) and \(6,\).*squeeze",
    ),
    "validation broadcast": (
        {
            "model": nn.Linear(5, 1),
            "loss_fn": nn.L1Loss(),
            "train_loader": [(X, torch.randn(6, 1))],
            "val_loader": [(X, torch.randn(6))],
        },
        ValueError,
        "val_loader, batch 1",
    ),
    "label too large": ({"train_loader": [(X, Y + 7)]}, ValueError, "3"),
    "label negative": ({"train_loader": [(X, Y - 3)]}, ValueError, "-"),
    "float labels": ({"train_loader": [(X, Y.float())]}, TypeError, "long"),
    "infinite input": (
        {"train_loader": inf_input()},
        ValueError,
        r"inputs.*not finite.*\(2, 1\)",
    ),
    "nan target": (
        {
            "loss_fn": nn.MSELoss(),
            "train_loader": [(X, torch.full((6, 3), float("nan")))],
        },
        ValueError,
        "targets.*not finite",
    ),
    "scalar loss": (
        {"loss_fn": nn.functional.cross_entropy},
        ValueError,
        "CrossEntropyLoss",
    ),
    "own scalar loss": (
        {"loss_fn": lambda o, y: nn.functional.cross_entropy(o, y)},
        ValueError,
        "batch_mean",
    ),
    "batch of four": ({"train_loader": [(X, X, Y, Y)]}, TypeError, "tuple of length 4"),
    "batch of tensor": ({"train_loader": [X]}, TypeError, r"\(inputs, targets\)"),
    "another model's optimizer": (
        {"optimizer": torch.optim.SGD(mlp().parameters(), lr=0.1)},
        ValueError,
        "not the model's",
    ),
    "unsupported optimizer": (
        with_optimizer(mlp(), torch.optim.LBFGS),
        TypeError,
        "LBFGS",
    ),
    "no optimizer": ({"optimizer": "adam"}, TypeError, "optimizer"),
    "scheduler without unit": (
        scheduled(mlp(), None),
        ValueError,
        "schedule_by='step'",
    ),
    "scheduler, other unit": (scheduled(mlp(), "batch"), ValueError, "'batch'"),
    "unit without scheduler": ({"schedule_by": "step"}, ValueError, "scheduler"),
    "scheduler of another optimizer": (
        scheduled(mlp(), "step") | with_optimizer(mlp()),
        ValueError,
        "another optimizer",
    ),
    "scheduler, class of optimizer": (
        scheduled(mlp(), "step", optimizer=torch.optim.SGD),
        ValueError,
        "instance",
    ),
    "scheduler too short": (
        one_cycle(3) | {"epochs": 4, "schedule_by": "step"},
        ValueError,
        "3 steps left.*makes 4.*total_steps=4",
    ),
    "float64 data": (
        {"train_loader": [(X.double(), Y)]},
        TypeError,
        r"batch\[0\] is torch.float64.*\.float\(\)",
    ),
    "both loaders wrong": (
        {"train_loader": [(X, Y + 7)], "val_loader": [(X, Y + 7)]},
        ValueError,
        "train_loader, batch 1",
    ),
    "detached, no decay": (
        {
            "loss_fn": lambda o, y: nn.functional.cross_entropy(
                o.detach(), y, reduction="none"
            )
        },
        ValueError,
        "does not depend on any trainable",
    ),
    "nothing trainable": (
        {"model": mlp().requires_grad_(False)},
        ValueError,
        "nothing is trainable",
    ),
    "lazy": ({"model": Lazy()}, ValueError, "model.linear.*not yet initialised"),
    "meta": ({"model": mlp().to("meta")}, ValueError, "meta device"),
    "hooks": ({"model": hooked()}, TypeError, r"model\.0.*backward hooks"),
    "compiled": ({"model": torch.compile(mlp())}, TypeError, "compiled already"),
    "wrapped": ({"model": nn.DataParallel(mlp())}, TypeError, r"\.module"),
    "no module": ({"model": lambda x: x}, TypeError, "torch.nn.Module"),
    "sparse": (
        {"model": nn.Sequential(nn.Embedding(5, 3, sparse=True))},
        ValueError,
        "sparse=False",
    ),
    "recurrent, compiled": (
        {"model": Recurrent(), "compile": True},
        ValueError,
        "allow_rnn",
    ),
    "compile": ({"compile": "yes"}, ValueError, "'auto', True or False"),
    "hidden buffer": ({"model": Forgets()}, ValueError, "persistent=True"),
    "hidden counter": ({"model": Layer(counts)}, ValueError, "no pure function"),
    "random numbers of Python": (
        {"model": Layer(lambda layer, x: x * random.random())},
        ValueError,
        "no pure function",
    ),
    "random numbers of numpy": (
        {"model": Layer(lambda layer, x: x * np.random.rand())},
        ValueError,
        "torch.rand",
    ),
    "inputs written": (
        {"model": Layer(lambda layer, x: x.mul_(2))},
        ValueError,
        r"batch\[0\].*in place",
    ),
    "parameters written": ({"model": Layer(clamps)}, ValueError, "linear.weight"),
    "adapters merged": ({"model": Merges()}, TypeError, r"train\(\) changes weights"),
    "old autograd.Function": (
        {"model": Layer(lambda layer, x: Old.apply(layer.linear.weight).sum() * x)},
        TypeError,
        "train_loader, batch 1.*setup_context",
    ),
    "checkpoint": (
        {
            "model": Layer(
                lambda layer, x: checkpoint(
                    lambda t: t * layer.linear.bias.sum(), x, use_reentrant=False
                )
            )
        },
        TypeError,
        "checkpoint",
    ),
    "buffer that grows": ({"model": Grows()}, ValueError, r"buffer seen.*\(1,\)"),
    "lock": (
        {"model": Layer(threading.Lock())},
        TypeError,
        "cannot be copied",
    ),
    "gradient hook": ({"model": with_gradient_hook()}, TypeError, "gradient hooks"),
    "step hook": (with_step_hook(), TypeError, "step hooks"),
    "detached": (
        {
            "loss_fn": lambda o, y: nn.functional.cross_entropy(
                o.detach(), y, reduction="none"
            ),
            "optimizer": torch.optim.AdamW,
        },
        ValueError,
        "does not depend on any trainable",
    ),
    "mean over samples": (
        {
            "loss_fn": lambda o, y: (o - 1).square().mean(0),
        },
        ValueError,
        r"returned 3 losses, of shape \(3,\), for 6 rows",
    ),
    "on_epoch": ({"on_epoch": 3}, TypeError, "on_epoch"),
    "seed": ({"seed": 1.5}, TypeError, "seed"),
    "large seed": ({"seed": 2**70}, ValueError, "64 bits"),
    "compile, a number": ({"compile": 1}, ValueError, "got 1"),
    "clipping": ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm"),
    "another model's objective": (
        {"loss_fn": ll.supervised(mlp(), nn.CrossEntropyLoss())},
        ValueError,
        "another module",
    ),
    "everything ignored": (
        {"loss_fn": nn.CrossEntropyLoss(ignore_index=0), "train_loader": [(X, Y * 0)]},
        ValueError,
        "no data is undefined",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_words_and_nothing_trained(case):
    changes, error, words = REFUSED[case]
    arguments = {
        "model": mlp(),
        "loss_fn": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD,
        "train_loader": [(X, Y)],
        "epochs": 1,
        **changes,
    }
    model = arguments["model"]
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    before = {k: t.clone() for k, t in state.items() if not nn.parameter.is_lazy(t)}
    generator = torch.get_rng_state()
    with pytest.raises(error, match=f"(?s){words}"):
        quiet(**arguments)
    for name, tensor in before.items():
        assert tensor.is_meta or torch.equal(state[name], tensor)
    if case != "everything ignored":
        assert torch.equal(torch.get_rng_state(), generator)


def test_validation_batches_are_looked_at_in_eval_mode():
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    one = [(X[:1], Y[:1])]  # too few for BatchNorm in train mode
    quiet(model, nn.CrossEntropyLoss(), torch.optim.SGD, [(X, Y)], one, epochs=1)


def test_overridden_train_is_respected():
    quiet(Silent(), nn.CrossEntropyLoss(), torch.optim.SGD, [(X, Y)], epochs=1)


def test_weight_decay_of_unused_parameters_is_said():
    model = Layer(lambda layer, x: x)
    model.unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"unused\.bias.*Freeze them"):
        quiet(model, nn.CrossEntropyLoss(), torch.optim.AdamW, [(X, Y)], epochs=1)
    before = copy.deepcopy(model.unused.state_dict())
    quiet(model, nn.CrossEntropyLoss(), torch.optim.Adam, [(X, Y)], epochs=1)
    assert torch.equal(model.unused.weight, before["weight"])


def test_rates_may_be_changed_between_epochs():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def halve(record):
        optimizer.param_groups[0]["lr"] /= 2

    result = quiet(
        model, nn.CrossEntropyLoss(), optimizer, [(X, Y)], epochs=3, on_epoch=halve
    )
    assert result.history["lr"] == [0.1, 0.05, 0.025]


class Dropped(nn.Module):
    """Dropout of a transposed tensor: under torch.func it draws another mask."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return nn.functional.dropout(self.linear(x).T, 0.5, self.training).T


@pytest.mark.parametrize(
    "model", [Dropped, lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)]
)
def test_dropout_is_no_hidden_state(model):
    x = torch.randn(16, 6) if model is Dropped else torch.randn(16, 5, 6)
    quiet(model(), nn.MSELoss(), torch.optim.Adam, (x, x), (x, x), epochs=2)


def test_a_run_may_be_stopped_and_gone_on_with():
    def stop(record):
        assert int(record.opt_state.step) == record.row["step"]
        return "stop" if record.row["epoch"] == 2 else None

    result = quiet(
        mlp(),
        nn.CrossEntropyLoss(),
        torch.optim.Adam,
        [(X, Y)],
        [(X, Y)],
        epochs=9,
        on_epoch=stop,
    )
    assert result.history["epoch"] == [1, 2]
    assert result.best_epoch == 2


@pytest.mark.parametrize("by", ["step", "epoch"])
def test_after_an_interruption_everything_is_at_the_last_finished_epoch(by):
    batches = list(loaders()[0])

    def setting():
        model = mlp_on_digits()
        optimizer = OPTIMIZERS["adam"](model.parameters())
        total = 4 * (len(batches) if by == "step" else 1)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=total)
        return model, optimizer, scheduler

    class Interrupted:
        passes = 0

        def __iter__(self):
            self.passes += 1
            for number, batch in enumerate(batches):
                if self.passes == 3 and number == 4:
                    raise KeyboardInterrupt
                yield batch

    fit = functools.partial(
        quiet, loss_fn=nn.CrossEntropyLoss(), compile=False, schedule_by=by
    )
    whole, optimizer, scheduler = setting()
    fit(whole, optimizer=optimizer, scheduler=scheduler, train_loader=batches, epochs=4)
    model, optimizer, scheduler = setting()
    run = functools.partial(fit, model, optimizer=optimizer, scheduler=scheduler)
    with pytest.raises(KeyboardInterrupt):
        run(train_loader=Interrupted(), epochs=4)
    run(train_loader=batches, epochs=2)
    torch.testing.assert_close(
        model.state_dict(), whole.state_dict(), rtol=1e-12, atol=0
    )


def test_a_large_state_is_handed_over_at_the_end_alone(monkeypatch):
    monkeypatch.setattr("lossloop._training.LARGEST_COPIED", 10)
    model = mlp_on_digits()
    optimizer = torch.optim.Adam(model.parameters())
    batches = list(loaders()[0])

    def interrupt(record):
        if record.row["epoch"] == 2:
            raise KeyboardInterrupt

    fit = functools.partial(quiet, model, nn.CrossEntropyLoss(), optimizer, batches)
    with pytest.raises(KeyboardInterrupt):
        fit(epochs=3, on_epoch=interrupt)
    assert not optimizer.state
    result = fit(epochs=3)
    for name, param in model.named_parameters():
        held = optimizer.state[param]
        assert held["step"] == 3 * len(batches)
        moments = result.opt_state.slots.groups[0].moments[name]
        assert held["exp_avg"].data_ptr() == moments["exp_avg"].data_ptr()
    assert int(fit(epochs=1).opt_state.step) == 4 * len(batches)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),  # which has nothing to bring up to date
    ],
)
def test_between_epochs_an_optimizer_is_up_to_date(kind, options):
    model = mlp_on_digits()
    optimizer = kind(model.parameters(), lr=0.01, **options)
    batches = list(loaders()[0])

    def look(record):
        group = record.opt_state.slots.groups[0]
        for name, param in model.named_parameters():
            held = optimizer.state[param]
            assert held.get("step", group.step) == group.step
            for moment, value in group.moments[name].items():
                torch.testing.assert_close(held[moment].to(value), value)
        assert torch.equal(param, record.params[name])
        if record.row["epoch"] == 2:
            optimizer.state.clear()

    result = quiet(
        model, nn.CrossEntropyLoss(), optimizer, batches, epochs=4, on_epoch=look
    )
    assert int(result.opt_state.step) == 4 * len(batches)


def test_eager_steps_of_large_parameters_are_made_in_place(monkeypatch):
    def trained(**options):
        model = mlp_on_digits()
        adam = torch.optim.Adam(model.parameters(), weight_decay=0.1)
        batches = list(loaders()[0])
        return quiet(model, nn.CrossEntropyLoss(), adam, batches, epochs=2, **options)

    for options in ({}, {"clip_grad_norm": 0.1, "clip_grad_value": 0.02}):
        whole = trained(**options)
        micro = trained(accumulate=2, **options)
        with monkeypatch.context() as patched:
            patched.setattr("lossloop._optimizers.BLOCK", 100)
            again, micro_again = trained(**options), trained(accumulate=2, **options)
        for one, other in ((whole, again), (micro, micro_again)):
            assert all(torch.equal(t, other.params[k]) for k, t in one.params.items())


def test_a_result_is_shown_without_its_weights():
    result = quiet(mlp(), nn.CrossEntropyLoss(), torch.optim.SGD, [(X, Y)], epochs=1)
    shown = repr(result)
    assert "train_loss" in shown
    assert "best epoch: None" in shown
    assert "tensor" not in shown


def test_a_second_fit_draws_other_dropout_masks():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-30)
    losses = [
        quiet(model, nn.CrossEntropyLoss(), optimizer, [(X, Y)], epochs=1)
        for _ in range(2)
    ]
    one, two = (result.history[0] for result in losses)
    assert one["train_loss"] != two["train_loss"]
    assert (one["step"], two["step"]) == (1, 2)


def test_results_can_be_stored():
    result = quiet(mlp(), nn.CrossEntropyLoss(), torch.optim.SGD, [(X, Y)], epochs=1)
    again = pickle.loads(pickle.dumps(result))
    assert list(again.history) == list(result.history)
    assert json.loads(json.dumps(list(result.history))) == list(result.history)


def test_the_loader_runs_in_the_callers_grad_mode():
    modes = []

    class Loader:
        def __iter__(self):
            for _ in range(2):
                modes.append(torch.is_grad_enabled())
                yield X, Y

    quiet(mlp(), nn.CrossEntropyLoss(), torch.optim.SGD, Loader(), Loader(), epochs=1)
    assert all(modes)


def test_recurrent_models_train_eagerly_by_default():
    result = quiet(
        Recurrent(), nn.CrossEntropyLoss(), torch.optim.SGD, [(X, Y)], epochs=1
    )
    assert not result.compiled.compiled
    assert "nn.GRU" in result.compiled.reason


def test_peeking_at_validation_data_moves_no_generator():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return X[i] + torch.rand(()) + np.random.rand() * 0.1, Y[i]

    generator = torch.Generator().manual_seed(3)
    val = DataLoader(Noisy(), 2, shuffle=True, generator=generator)
    before = (
        generator.get_state(),
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
    )
    from lossloop._batches import peek

    assert peek("val_loader", val) is not None
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


def test_without_a_console_nothing_is_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    result = ll.fit(
        *(mlp(), nn.CrossEntropyLoss(), torch.optim.SGD, [(X, Y)]), epochs=8
    )
    assert len(result.history) == 8


def test_the_first_batch_is_looked_at_with_one_graph_of_autograd_at_a_time():
    """A teacher that is not frozen has its own, as in a step."""
    teacher, seen, alive = nn.Linear(5, 3), [], []

    class Token:
        """Lives as long as the graph."""

    def loss(output, target):
        alive.append([token() for token in seen if token() is not None])
        hidden = teacher(X[: len(output)]).exp()
        if hidden.requires_grad:
            token = hidden.grad_fn.metadata["token"] = Token()
            seen.append(weakref.ref(token))
        losses = nn.functional.cross_entropy(output, target, reduction="none")
        return losses + 0 * hidden.mean()

    ll.fit(
        *(mlp(), loss, torch.optim.SGD, [(X, Y)]),
        **{"epochs": 1, "progress": False, "compile": False},
    )
    assert len(seen) > 2
    assert not any(alive)
