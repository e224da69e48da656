"""Micro-batches: one step of k of them is the step of the whole batch."""

import re
from typing import NamedTuple

import pytest
import torch
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop import _compile

SIZE = 7


def deterministic(model):
    """Without what makes samples act on each other or draws random numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


class Goal(NamedTuple):
    """An objective and a batch that is not easy on it."""

    objective: ll.Objective
    batch: object


def goal(name, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(SIZE, 5, dtype=dtype)
    labels = torch.tensor([0, 2, 1, 2, 0, 1, 1])
    if name in CASES:
        case = CASES[name]
        model = deterministic(case.model()).to(dtype)
        inputs, targets = case.batch(SIZE)
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        return Goal(ll.supervised(model, case.loss), (inputs, targets))
    model = CASES["mlp"].model().to(dtype)
    if name == "class weights":
        loss = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 10.0, 0.0]))
        return Goal(ll.supervised(model, loss), (x, labels))
    if name == "ignored":
        masked = labels.index_fill(0, torch.tensor([0, 1, 2, 5]), -100)
        return Goal(ll.supervised(model, nn.CrossEntropyLoss()), (x, masked))
    if name == "sample weights":
        weights = torch.tensor([0.0, 0.0, 0.0, 1.0, 8.0, 0.5, 2.0], dtype=dtype)
        return Goal(ll.supervised(model, nn.CrossEntropyLoss()), (x, labels, weights))
    if name == "mask":

        def masked_error(model, batch):
            error = (model(batch["x"]) ** 2).sum(1) * batch["scale"]
            return (error * batch["mask"]).sum(), batch["mask"].sum()

        mask = torch.tensor([1, 1, 1, 0, 0, 0, 1])
        batch = {"x": x, "mask": mask, "scale": torch.tensor(0.5, dtype=dtype)}
        return Goal(ll.objective(model, masked_error), batch)
    raise ValueError(name)


# BatchNorm is the exception, with a test of its own.
GOALS = ["mlp", "encoder", "tied", "frozen"]
GOALS += ["class weights", "ignored", "sample weights", "mask"]
SGD = ll.optim.SGD(lr=0.1, momentum=0.9, weight_decay=1e-2)


def relative(one, other):
    """The largest difference of two trees of tensors, relative to their largest."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)]
)
@pytest.mark.parametrize("name", GOALS)
def test_any_number_of_micro_batches_is_one_batch(name, dtype, tolerance):
    objective, batch = goal(name, dtype)
    start = ll.init(objective, SGD)
    whole = ll.make_step(objective, SGD)
    for k in range(1, SIZE + 2):
        cut = ll.make_step(objective, SGD, accumulate=k)
        ours, theirs = start, start
        for _ in range(3):
            *ours, loss_sum, n = cut(*ours, batch)
            *theirs, expected, weight = whole(*theirs, batch)
            assert n == weight
            assert n.dtype == weight.dtype
            assert loss_sum.item() == pytest.approx(expected.item(), rel=tolerance)
        assert relative(ours[0], theirs[0]) <= tolerance, k


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("clip", [{}, {"clip_grad_norm": 0.1}])
def test_clipping_and_adaptive_rates_see_the_gradient_of_the_batch(optimizer, clip):
    objective, batch = goal("class weights")
    start = ll.init(objective, optimizer)
    expected = ll.make_step(objective, optimizer, **clip)(*start, batch)
    for k in (2, 3, SIZE):
        step = ll.make_step(objective, optimizer, accumulate=k, **clip)
        assert relative(step(*start, batch)[0], expected[0]) <= 1e-12


@given(
    weights=st.lists(st.integers(0, 3), min_size=1, max_size=9).filter(any),
    k=st.integers(1, 10),
    data=st.data(),
)
def test_sums_of_whole_numbers_are_exact(weights, k, data):
    size = len(weights)
    whole = st.lists(st.integers(-8, 8), min_size=size, max_size=size)
    x, y = (torch.tensor(data.draw(whole)).double()[:, None] for _ in range(2))
    model = nn.Linear(1, 1).double()
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    objective = ll.supervised(model, nn.MSELoss())
    sgd = ll.optim.SGD(lr=0.1)
    start = ll.init(objective, sgd)
    batch = x, y, torch.tensor(weights)
    one = ll.make_step(objective, sgd)(*start, batch)
    cut = ll.make_step(objective, sgd, accumulate=k)(*start, batch)
    assert one[2:] == cut[2:]
    exact = sum(
        w * (a - b) ** 2 for w, a, b in zip(weights, x[:, 0], y[:, 0], strict=True)
    )
    assert cut[2] == exact
    for name, param in one[0].items():
        assert torch.allclose(cut[0][name], param, rtol=1e-12, atol=1e-12)


HALF = {
    # n is past what float16 holds, and so is the gradient of the sum.
    torch.float16: (128 * 128, 0.1, 1.0),
    # Ones are added up, 512 of them: bfloat16 stops at 256.
    torch.bfloat16: (1, 1.0, 1.0),
}


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_added_up_in_float32(dtype):
    width, target, rate = HALF[dtype]
    size = 8 if dtype == torch.float16 else 512
    model = nn.Linear(width, width).to(dtype) if width == 1 else nn.Conv2d(1, 1, 1)
    model = model.to(dtype)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    shape = (size, 1) if width == 1 else (size, 1, 128, 128)
    x = torch.ones(shape, dtype=dtype)
    loss = nn.L1Loss() if width == 1 else nn.MSELoss()
    objective, sgd = ll.supervised(model, loss), ll.optim.SGD(lr=rate)
    start, batch = ll.init(objective, sgd), (x, target * x)
    exact = {torch.float16: 2 * 0.1, torch.bfloat16: 1.0}[dtype]
    for k in (2, size // 2, size):
        found = ll.make_step(objective, sgd, accumulate=k)(*start, batch)[0]
        assert found["bias"].dtype == dtype
        assert found["bias"].item() == pytest.approx(exact, rel=5e-3)


def by_own_n(objective, k):
    """Wrong: divides each micro-batch by its own n."""
    gradient = torch.func.grad(
        lambda params, batch: (lambda pair: pair[0] / pair[1])(objective(params, batch))
    )

    def gradients(params, batch):
        parts = [p.tensor_split(k) for p in batch]
        grads = [gradient(params, part) for part in zip(*parts, strict=True)]
        return {name: sum(g[name] for g in grads) / k for name in params}

    return gradients


def test_teeth_dividing_by_each_own_n_is_another_gradient():
    objective, batch = goal("ignored")
    params, _ = ll.init(objective, SGD)
    batch = batch[0][3:], batch[1][3:]  # no part without any label
    right = by_own_n(objective, 1)(params, batch)
    wrong = by_own_n(objective, 2)(params, batch)
    assert relative(wrong, right) > 1e-2


def test_batch_norm_counts_micro_batches_and_keeps_the_last_statistics():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    objective = ll.supervised(model, nn.CrossEntropyLoss())
    _, batch = goal("mlp", torch.float32)
    params, opt_state = ll.init(objective, SGD)
    step = ll.make_step(objective, SGD, accumulate=3)
    after, *_ = step(params, opt_state, batch)
    assert after["1.num_batches_tracked"] == 3
    mean = params["1.running_mean"]
    for part in batch[0].tensor_split(3):
        mean = 0.9 * mean + 0.1 * (part @ model[0].weight.T + model[0].bias).mean(0)
    assert torch.allclose(after["1.running_mean"], mean, atol=1e-6)


def test_micro_batches_draw_masks_of_their_own():
    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * torch.nn.functional.dropout(x, 0.5, self.training)

    objective = ll.objective(
        Mask(), lambda model, x: ((model(x) * 2.0 ** torch.arange(16)).sum(), 1)
    )
    params, opt_state = ll.init(objective, SGD)
    step = ll.make_step(objective, SGD, accumulate=2)
    part = ll.make_step(objective, SGD)
    x = torch.ones(2, 16)
    _, _, total, _ = step(params, opt_state, x)
    _, _, first, _ = part(params, opt_state, x[:1])
    assert total == step(params, opt_state, x)[2]
    assert total != 2 * first  # the bits of a sum tell its mask


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ["conv_net", "encoder", "mask"])
def test_compiled_equals_eager(name, donate):
    objective, batch = (
        goal(name, torch.float32)
        if name not in CASES
        else Goal(
            ll.supervised(CASES[name].model(), CASES[name].loss),
            CASES[name].batch(SIZE),
        )
    )
    # Not Adam, which makes much of a gradient that is nothing but rounding.
    sgd = ll.optim.SGD(lr=0.1, momentum=0.9)
    start = ll.init(objective, sgd)
    eager = ll.make_step(objective, sgd, accumulate=3)
    step = ll.compile_step(eager, donate=donate, backend="aot_eager")
    given_tensors = pytree.tree_map(torch.clone, start)
    ours, theirs = pytree.tree_map(torch.clone, start), start
    for _ in range(2):
        *theirs, expected, weight = eager(*theirs, batch)
        before = ours[0]
        *ours, loss_sum, n = step(*ours, batch)
        assert n == weight
        assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
        assert relative(ours, theirs) <= 1e-5
        assert all(ours[0][k] is before[k] for k in before) == donate
    for one, other in zip(
        pytree.tree_leaves(start), pytree.tree_leaves(given_tensors), strict=True
    ):
        assert torch.equal(one, other)
    # Two sizes of micro-batches, and one update.
    assert (step.body.add.compilations, step.body.update.compilations) == (2, 1)
    with pytest.raises(ValueError, match="compiled already"):
        ll.compile_step(step)


@pytest.mark.slow
def test_compiled_for_real():
    objective, batch = goal("class weights", torch.float32)
    start = ll.init(objective, torch.optim.Adam)
    eager = ll.make_step(objective, torch.optim.Adam, accumulate=2)
    step = ll.compile_step(eager, donate=True)
    *ours, loss_sum, n = step(*pytree.tree_map(torch.clone, start), batch)
    *theirs, expected, weight = eager(*start, batch)
    assert n == weight
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative(ours[0], theirs[0]) <= 1e-5


def loader(size, n=22):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(n, 5), torch.randint(0, 3, (n,)))
    return DataLoader(data, size, shuffle=True, generator=torch.Generator())


def run(model=None, **options):
    torch.manual_seed(1)
    model = model or CASES["mlp"].model()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    given_loader = options.pop("loader", None) or loader(8)
    result = ll.fit(
        model, loss, optimizer, given_loader, epochs=3, progress=False, **options
    )
    return model, result


def test_fit_reports_and_learns_the_same():
    model, plain = run()
    other, cut = run(accumulate=4)  # the last batch of 6 is cut into 2, 2, 1, 1
    assert cut.history["n_train"] == plain.history["n_train"]
    assert cut.history["step"] == plain.history["step"]
    assert cut.history["train_loss"] == pytest.approx(
        plain.history["train_loss"], rel=1e-6
    )
    assert relative(other.state_dict(), model.state_dict()) <= 1e-5


def test_fit_compiles_both_parts_or_none(monkeypatch):
    monkeypatch.setattr(_compile, "inductor", lambda graph, inputs, **_: graph.forward)
    model, result = run(accumulate=2, compile=True)
    assert result.compiled.compiled
    other, plain = run(accumulate=2, compile=False)
    assert not plain.compiled.compiled
    assert relative(other.state_dict(), model.state_dict()) <= 1e-5


def test_fit_looks_at_one_micro_batch_at_a_time():
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.sizes = nn.Linear(5, 3), []

        def __deepcopy__(self, memo):
            copied = Seen()
            copied.sizes = self.sizes  # shared, to be read here
            for name, parameter in self.layer.named_parameters():
                empty = nn.Parameter(parameter.detach().to("meta"))
                setattr(copied.layer, name, empty)
            return copied

        def forward(self, x):
            self.sizes.append(len(x))
            return self.layer(x)

    model = Seen()
    run(model, accumulate=4, compile=False)
    assert max(model.sizes) == 2


def test_a_plan_counts_micro_batches(monkeypatch):
    torch.manual_seed(0)
    batches = [(torch.randn(8, 5), torch.randint(0, 3, (8,)))] * 20
    _, plain = run(loader=batches)
    assert plain.compiled.reason == "60 steps planned, fewer than 100"
    _, cut = run(loader=batches, accumulate=2)
    assert cut.compiled.reason.startswith("120 steps planned of")


REFUSED = {
    "more than samples": (
        {"accumulate": 9},
        r"fit\(accumulate=9\): train_loader, batch 1 has 8 samples, .* raise the batch",
    ),
    "no count": ({"accumulate": 0}, r"accumulate=...\) must be an int of at least 1"),
    "no int": ({"accumulate": 2.0}, r"must be an int of at least 1, got 2.0"),
    "a bool": ({"accumulate": True}, r"must be an int of at least 1, got True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fit_refuses(name):
    options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        run(**options)


def test_fit_says_that_batch_norm_sees_micro_batches():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"accumulate=2.*model\.1 \(BatchNorm1d\)"):
        run(model, accumulate=2)


CANNOT_BE_CUT = {
    "lengths": (
        (torch.ones(4, 2), torch.ones(3)),
        "do not share their first dimension: {'batch[0]': 4, 'batch[1]': 3}",
    ),
    "none": ((torch.ones(()), 1.0), "none has one"),
    "strings": (
        {"x": torch.ones(2), "names": ["a", "b"]},
        "batch['names'][0] is a str",
    ),
}


@pytest.mark.parametrize("name", CANNOT_BE_CUT)
def test_a_batch_that_cannot_be_cut_is_refused(name):
    batch, words = CANNOT_BE_CUT[name]
    params = {"w": torch.ones(())}
    step = ll.make_step(lambda params, _: (params["w"], 1), SGD, accumulate=2)
    _, opt_state = ll.init(lambda params, _: (params["w"], 1), SGD, params=params)
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        step(params, opt_state, batch)


def test_an_empty_batch_moves_nothing_but_the_momentum():
    objective, _ = goal("mlp", torch.float32)
    start = ll.init(objective, ll.optim.SGD(lr=0.1))
    step = ll.make_step(objective, ll.optim.SGD(lr=0.1), accumulate=2)
    batch = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    params, _, loss_sum, n = step(*start, batch)
    assert (loss_sum, n) == (0, 0)
    assert relative(params, start[0]) == 0
