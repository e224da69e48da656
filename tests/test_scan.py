"""The compiled fold: bit for bit that of single steps, or the reason why not."""

import copy
import math
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import pytest
import torch
from cases import CASES, mlp
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import (
    DataLoader,
    Sampler,
    Subset,
    TensorDataset,
    default_collate,
)

import lossloop as ll
from lossloop import _compile, _scan
from lossloop._scan import LENGTH
from lossloop._schedule import Schedule


class Attention(nn.Module):
    """A small transformer without dropout."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(dim=1))


def without_dropout(name):
    model = CASES[name].model()
    for place, part in enumerate(model):
        if isinstance(part, nn.Dropout):
            model[place] = nn.Identity()
    return model


MODELS = {
    "mlp": (mlp, CASES["mlp"]),
    "conv net": (partial(without_dropout, "conv_net"), CASES["conv_net"]),
    "transformer": (Attention, CASES["encoder"]),
    "tied": (CASES["tied"].model, CASES["tied"]),
}


def loader_of(case, n=23, **options):
    data = TensorDataset(*case.batch(n))
    options = {"batch_size": 4, "shuffle": True, **options}
    return DataLoader(data, generator=torch.Generator().manual_seed(5), **options)


def folds(model, loss, optimizer, loader, epochs=2, backend="aot_eager"):
    """The state and the means after some epochs: compiled, and step by step."""
    goal = ll.supervised(model, loss)
    step = ll.make_step(goal, optimizer)
    results = []
    fold = ll.compile_fold(step, backend=backend)
    donating = ll.compile_step(step, donate=True, backend=backend)
    for epoch in (fold, partial(ll.fold, donating)):
        loader.generator.manual_seed(5)
        params, opt_state = ll.init(goal, optimizer)
        means = []
        for _ in range(epochs):
            params, opt_state, mean = epoch(params, opt_state, loader)
            means.append(mean.read())
        results.append((params, opt_state, means, loader.generator.get_state()))
    return fold, results


def assert_same(one, other):
    leaves = [torch.utils._pytree.tree_leaves(result) for result in (one, other)]
    for a, b in zip(*leaves, strict=True):
        assert type(a) is type(b)
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", MODELS)
def test_bit_for_bit_the_fold_of_steps(name):
    """With an odd last batch, buffers, integer counters and class weights."""
    model, case = MODELS[name]
    fold, (many, one) = folds(model(), case.loss, torch.optim.Adam, loader_of(case))
    assert fold.why_not is None
    assert int(many[1].step) == 12
    assert_same(many, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "conv net"])
def test_generated_code_does_the_same(name):
    model, case = MODELS[name]
    # Not Adam, which makes much of a gradient that is nothing but rounding.
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    fold, (many, one) = folds(
        model(), case.loss, sgd, loader_of(case), backend="inductor"
    )
    assert fold.why_not is None
    for found, expected in zip(many[2], one[2], strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(many[0], one[0], rtol=1e-4, atol=1e-5)


def follower():
    """Its slow weights are the fast ones of before: one tensor in two places."""

    def init(params):
        return {"slow": {name: p.clone() for name, p in params.items()}}

    def update(grads, slots, params):
        return {name: -0.1 * g for name, g in grads.items()}, {"slow": params}

    return ll.Optimizer(init, update)


@pytest.mark.parametrize(
    "optimizer",
    [
        ll.optim.SGD(lr=0.1, momentum=0.9),
        ll.optim.AdamW(lr=0.01, amsgrad=True),
        follower(),
    ],
    ids=["momentum", "AdamW", "follower"],
)
def test_with_any_optimizer(optimizer):
    case = CASES["mlp"]
    fold, (many, one) = folds(mlp(), case.loss, optimizer, loader_of(case), epochs=1)
    assert fold.why_not is None
    assert_same(many, one)


@pytest.mark.parametrize("n", [LENGTH * 8 + 5, 3])
def test_however_many_batches_there_are(n):
    """Whole calls, a part of one, and an odd batch; or fewer samples than a batch."""
    case, calls = CASES["mlp"], []
    fold, (many, one) = folds(
        mlp(), case.loss, torch.optim.SGD, loader_of(case, n), epochs=1
    )
    assert fold.why_not is None
    assert_same(many, one)
    steps = -(-n // 4)
    params, opt_state = ll.init(ll.supervised(mlp(), case.loss), torch.optim.SGD)

    def on_step(opt_state, mean):
        calls.append((int(opt_state.step), int(mean.weight)))
        return opt_state

    fold(params, opt_state, loader_of(case, n), on_step=on_step)
    assert calls[-1] == (steps, n)
    assert len(calls) <= steps // LENGTH + 2


def test_a_part_of_the_data_and_weights_that_are_no_counts():
    case = CASES["mlp"]
    data = Subset(TensorDataset(*case.batch(23)), [3, 1, 4, 1, 5, 9, 2, 6])
    loader = DataLoader(data, 3, shuffle=True, generator=torch.Generator())
    weights = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 0.7, 1.1]))
    fold, (many, one) = folds(mlp(), weights, torch.optim.Adam, loader)
    assert fold.why_not is None
    assert isinstance(many[2][0][1], float)
    assert_same(many, one)


class Backwards(Sampler):
    def __iter__(self):
        return iter(range(22, -1, -1))

    def __len__(self):
        return 23


WHY_NOT = {
    "random numbers": (lambda: CASES["conv_net"].model(), {}, {}, "conv_net"),
    "the sampler may look": (
        mlp,
        {},
        {"sampler": Backwards(), "shuffle": False},
        "mlp",
    ),
    "micro-batches": (mlp, {"accumulate": 2}, {}, "mlp"),
    "not read from memory": (
        mlp,
        {},
        {"collate_fn": lambda rows: default_collate(rows)},
        "mlp",
    ),
}


@pytest.mark.parametrize("words", WHY_NOT)
def test_what_cannot_be_folded_is_made_step_by_step(words):
    model, options, loading, name = WHY_NOT[words]
    case, model = CASES[name], model()
    goal = ll.supervised(model, case.loss)
    step = ll.make_step(goal, torch.optim.SGD, **options)
    fold = ll.compile_fold(step, backend="aot_eager")
    many = fold(*ll.init(goal, torch.optim.SGD), loader_of(case, **loading))
    donating = ll.compile_step(step, donate=True, backend="aot_eager")
    one = ll.fold(donating, *ll.init(goal, torch.optim.SGD), loader_of(case, **loading))
    assert words in fold.why_not
    assert_same(many[:2], one[:2])
    assert many[2].read() == one[2].read()


def test_other_data_may_follow():
    """And other shapes of batch than the first."""
    case = CASES["mlp"]
    goal = ll.supervised(mlp(), case.loss)
    step = ll.make_step(goal, torch.optim.SGD)
    fold = ll.compile_fold(step, backend="aot_eager")
    donating = ll.compile_step(step, donate=True, backend="aot_eager")
    many, one = (ll.init(goal, torch.optim.SGD) for _ in range(2))
    in_order = partial(loader_of, case, shuffle=False)
    for data in (in_order(), [case.batch(5)], in_order(batch_size=6)):
        many, one = fold(*many, data)[:2], ll.fold(donating, *one, data)[:2]
    assert fold.why_not is None
    assert int(many[1].step) == 6 + 1 + 4
    assert_same(many, one)


def test_keys_may_be_in_another_order():
    """Of weights of one shape, which could be taken for each other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    goal = ll.supervised(model, nn.MSELoss())
    loader = DataLoader(TensorDataset(torch.randn(12, 4), torch.randn(12, 4)), 4)
    fold = ll.compile_fold(ll.make_step(goal, torch.optim.SGD), backend="aot_eager")
    expected, _, _ = fold(*ll.init(goal, torch.optim.SGD), loader)
    params, opt_state = ll.init(goal, torch.optim.SGD)
    turned = {name: params[name] for name in reversed(params)}
    found, _, _ = fold(turned, opt_state, loader)
    assert fold.why_not is None
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)


@pytest.mark.parametrize("kind", ["folded", "odd", "not_in_memory", "left_out"])
def test_a_state_that_is_to_be_kept_is_not_written_to(kind):
    """By steps in one call, and neither by the first that is made alone."""
    case, allowed = CASES["mlp"], 1 if kind == "left_out" else None
    goal = ll.supervised(mlp(), case.loss)
    step = ll.make_step(goal, torch.optim.Adam)
    fold = ll.compile_fold(step, backend="aot_eager")

    def start():
        return ll.init(goal, torch.optim.Adam, skip_nonfinite=allowed)

    fold(*start(), loader_of(case))
    loader = loader_of(case, 3 if kind == "odd" else 23)
    if kind == "left_out":
        loader.dataset.tensors[0][7] = math.nan
    batches = list(loader) if kind == "not_in_memory" else loader
    expected = ll.fold(step, *start(), batches)
    loader.generator.manual_seed(5)
    state = start()
    found = fold(*state, batches, keep=True)
    assert_same(state, start())
    torch.testing.assert_close(found[0], expected[0])
    assert fold.why_not is None
    if kind == "left_out":
        assert int(found[1].gate.skipped) == int(expected[1].gate.skipped) == 1


def test_what_is_no_step_is_refused():
    step = ll.make_step(ll.supervised(mlp(), nn.CrossEntropyLoss()), torch.optim.SGD)
    with pytest.raises(TypeError, match="takes a step of make_step, got a function"):
        ll.compile_fold(lambda: None)
    with pytest.raises(ValueError, match="compiled already"):
        ll.compile_fold(ll.compile_step(step))
    fold = ll.compile_fold(step, backend="aot_eager")
    start = ll.init(ll.supervised(mlp(), nn.CrossEntropyLoss()), torch.optim.SGD)
    with pytest.raises(ValueError, match="no batches"):
        fold(*start, loader_of(CASES["mlp"], 3, drop_last=True))


# --- in fit ---------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Graphs are run as they are instead of as generated code."""
    monkeypatch.setattr(_compile, "inductor", lambda graph, inputs, **_: graph.forward)


def trained(model=None, loader=None, **options):
    torch.manual_seed(0)
    model = model or mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if "scheduler" in options:
        options["scheduler"] = options["scheduler"](optimizer)
    options = {"epochs": 3, "compile": True, "progress": False, **options}
    loader = loader or loader_of(CASES["mlp"])
    return ll.fit(model, nn.CrossEntropyLoss(), optimizer, loader, **options)


@pytest.mark.usefixtures("quick")
def test_fit_folds_and_reports_the_same():
    folded, plain = trained(), trained(compile=False)
    assert folded.compiled.folded
    assert not plain.compiled.folded
    assert folded.history["train_loss"] == pytest.approx(plain.history["train_loss"])
    assert folded.history["step"] == plain.history["step"] == [6, 12, 18]
    torch.testing.assert_close(folded.params, plain.params)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {
                "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
                "schedule_by": "step",
            },
            "every step has a rate of the scheduler",
        ),
        ({"accumulate": 2}, "cut into micro-batches"),
        ({"pad_last": True}, "not read from memory"),
    ],
)
def test_fit_says_why_steps_are_made_one_by_one(options, words):
    result = trained(**options)
    assert result.compiled.compiled
    assert not result.compiled.folded
    _, _, why_not = result.compiled.reason.partition("; steps one by one: ")
    assert words in why_not


@pytest.mark.usefixtures("quick")
def test_a_rate_that_changes_by_epoch_is_followed():
    options = {
        "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        "schedule_by": "epoch",
    }
    folded, plain = trained(**options), trained(compile=False, **options)
    assert folded.compiled.folded
    assert folded.history["lr"] == plain.history["lr"] == [0.01, 0.005, 0.0025]
    torch.testing.assert_close(folded.params, plain.params)


class Kept(NamedTuple):
    """What a run leaves to the one who called it."""

    weights: dict
    moments: list


def left_by(epochs, at_end=lambda *_: None, *, error=None, n=23, **options):
    """A folded run, in which something happens before each epoch is finished."""
    torch.manual_seed(0)
    loader, model, calls = loader_of(CASES["mlp"], n), mlp(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    after_epoch = Schedule.after_epoch

    def spied(self, opt_state, loss):
        calls.append(loss)
        at_end(len(calls), loader)
        return after_epoch(self, opt_state, loss)

    options = {"progress": False, "compile": True, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "after_epoch", spied)
        with pytest.raises(error) if error else nullcontext():
            loss = nn.CrossEntropyLoss()
            result = ll.fit(model, loss, optimizer, loader, epochs=epochs, **options)
    left = Kept(dict(model.named_parameters()), list(optimizer.state.values()))
    return left, None if error else result


def fails(epoch, loader):
    if epoch == 3:
        raise LookupError


def spoils(epoch, loader):
    if epoch == 2:
        loader.dataset.tensors[0][7] = math.nan


SEEN = {
    "unseen": {},
    "seen": {"on_epoch": lambda record: None},
    "validated": {"val_loader": [CASES["mlp"].batch(5)], "restore_best": False},
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("n", [23, 24], ids=["odd_batch", "whole_batches"])
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize(
    ("at_end", "error"),
    [(fails, LookupError), (spoils, ll.NonFiniteError)],
    ids=["after", "in"],
)
def test_module_and_optimizer_hold_the_last_finished_epoch(n, seen, at_end, error):
    """Though the next one was trained on, in steps that write to no old tensor."""
    expected, result = left_by(2, n=n, **SEEN[seen])
    assert result.compiled.folded
    found, _ = left_by(5, at_end, error=error, n=n, **SEEN[seen])
    assert_same(found, expected)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seen", ["seen", "validated"])
def test_who_looks_between_epochs_sees_the_last_one(seen):
    torch.manual_seed(0)
    model, looks, finished = mlp(), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def looked_at():
        state = [list(model.parameters()), list(optimizer.state.values())]
        return copy.deepcopy(state)

    class Validation(list):
        def __iter__(self):
            looks.append(looked_at())
            return super().__iter__()

    options = {"epochs": 3, "progress": False, "compile": True}
    if seen == "seen":
        options["on_epoch"] = lambda record: looks.append(looked_at())
    else:
        options |= {"val_loader": Validation([CASES["mlp"].batch(5)])}
    loader = loader_of(CASES["mlp"])
    result = ll.fit(model, nn.CrossEntropyLoss(), optimizer, loader, **options)
    assert result.compiled.folded
    for epochs in (1, 2):
        left, _ = left_by(epochs)
        finished.append(left)
    if seen == "seen":
        for look, left in zip(looks[:2], finished, strict=True):
            assert_same(look, [list(left.weights.values()), left.moments])
    else:  # before the epoch is finished; the first look is at the first batch
        for look, left in zip(looks[-2:], finished, strict=True):
            assert_same(look[0], list(left.weights.values()))


@pytest.mark.usefixtures("quick")
def test_the_result_has_a_state_of_its_own():
    found, result = left_by(3)
    assert result.compiled.folded
    mine = copy.deepcopy(result.opt_state)
    for state, moments in zip(
        found.moments, result.opt_state.slots.groups[0].moments.values(), strict=True
    ):
        assert_same({name: state[name] for name in moments}, moments)
        for value in state.values():
            value.fill_(7)
    assert_same(result.opt_state, mine)


@pytest.mark.usefixtures("quick")
def test_it_is_said_that_something_is_compiled(capsys):
    """Once for the steps in one call, and once for those of validation."""
    trained(progress=True, val_loader=[CASES["mlp"].batch(5)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "ompil" in line]
    assert [line.split(" in ")[0] for line in lines] == [
        "Compiled the training step",
        "Compiled the validation step",
    ]


@pytest.mark.parametrize(("epochs", "in_cpp"), [(3, False), (20_000, True)])
def test_only_a_long_run_calls_its_kernels_from_cpp(monkeypatch, epochs, in_cpp):
    seen = []

    def noting(graph, inputs, **options):
        seen.append(options)
        return graph.forward

    monkeypatch.setattr(_compile, "inductor", noting)
    monkeypatch.setattr(_scan, "inductor", noting)
    monkeypatch.setattr(_scan, "_CALLS_IN_CPP", True)
    result = trained(epochs=epochs, on_epoch=lambda record: "stop")
    assert result.compiled.folded
    least = {"cpp.min_chunk_size": _scan.LEAST_OF_A_THREAD}
    assert seen[0] == {"cpp_wrapper": in_cpp, **least}


@pytest.mark.usefixtures("quick")
def test_a_large_step_is_not_folded(monkeypatch):
    monkeypatch.setattr("lossloop._plan.LARGEST_FOLDED_STEP", {"cpu": 10})
    result = trained()
    assert "a call is no cost beside such a step" in result.compiled.reason


def test_what_does_not_compile_as_a_loop_is_compiled_as_a_step(monkeypatch):
    def no_loops(graph, inputs, **_):
        if "while_loop" in graph.code:
            raise NotImplementedError("no loops here")
        return graph.forward

    monkeypatch.setattr(_compile, "inductor", no_loops)
    monkeypatch.setattr(_scan, "inductor", no_loops)
    result = trained()
    assert result.compiled.compiled
    assert not result.compiled.folded
    assert "no loops here" in result.compiled.reason
    plain = trained(compile=False)
    torch.testing.assert_close(result.params, plain.params)


class Times(nn.Module):
    """A graph that differs from others of its kind in a number inside the loop."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) * self.factor


@pytest.mark.slow
def test_a_compiled_loop_is_kept_in_the_cache_by_all_that_is_in_it():
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(24, 4, generator=draw), torch.randint(0, 2, (24,), generator=draw)
    )
    hits = []
    for factor in (1.5, 2.5, 1.5):
        torch.manual_seed(0)
        goal = ll.supervised(Times(factor), nn.CrossEntropyLoss())
        step = ll.make_step(goal, torch.optim.SGD)
        before = counters["inductor"]["fxgraph_cache_hit"]
        fold = ll.compile_fold(step)
        _, _, mean = fold(*ll.init(goal, torch.optim.SGD), DataLoader(data, 8))
        hits.append(counters["inductor"]["fxgraph_cache_hit"] - before)
        _, _, expected = ll.fold(
            step, *ll.init(goal, torch.optim.SGD), DataLoader(data, 8)
        )
        assert fold.why_not is None
        assert mean.value() == pytest.approx(expected.value(), rel=1e-6)
    assert hits[-1] == 1
