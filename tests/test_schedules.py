"""Schedules against torch.optim.lr_scheduler, and as a part of the update."""

import copy
import pickle
import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop._formulas import RULES
from lossloop._optimizers import as_optimizer, move, move_in_place, rate_of
from lossloop._types import Slots
from lossloop.optim import scheduled
from lossloop.schedules import (
    constant,
    cosine,
    exponential,
    join,
    linear,
    one_cycle,
    polynomial,
    step,
    warm_up,
)

O = torch.optim  # noqa: E741
RATES = [0.1, 0.03]
STEPS = 1000


def one_cycle_of_torch(optimizer, **options):
    return lr_scheduler.OneCycleLR(
        optimizer, RATES, STEPS, cycle_momentum=False, **options
    )


def warm_then_cosine(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 100),
        lr_scheduler.CosineAnnealingLR(optimizer, 600),
        lr_scheduler.StepLR(optimizer, 70, 0.5),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [100, 700])


T = lr_scheduler
TWINS = {
    "constant": (constant(0.25), partial(T.ConstantLR, factor=0.25, total_iters=2000)),
    "linear": (
        linear(700, start=1 / 3, end=0.9),
        partial(T.LinearLR, start_factor=1 / 3, end_factor=0.9, total_iters=700),
    ),
    "linear to 0": (
        linear(700),
        partial(T.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=700),
    ),
    "warm_up": (
        warm_up(300, start=0.01),
        partial(T.LinearLR, start_factor=0.01, total_iters=300),
    ),
    "warm_up from 0": (
        warm_up(300),
        partial(T.LambdaLR, lr_lambda=lambda t: min(t, 300) / 300),
    ),
    "cosine": (cosine(STEPS), partial(T.CosineAnnealingLR, T_max=STEPS)),
    "one_cycle": (one_cycle(STEPS), one_cycle_of_torch),
    "one_cycle linear": (
        one_cycle(
            STEPS, pct_start=0.123, div_factor=7, final_div_factor=3, anneal="linear"
        ),
        partial(
            one_cycle_of_torch,
            pct_start=0.123,
            div_factor=7,
            final_div_factor=3,
            anneal_strategy="linear",
        ),
    ),
    "one_cycle down": (
        one_cycle(STEPS, pct_start=0),
        partial(one_cycle_of_torch, pct_start=0.0),
    ),
    "one_cycle up": (
        one_cycle(STEPS, pct_start=1),
        partial(one_cycle_of_torch, pct_start=1.0),
    ),
    "step": (step(30, gamma=0.7), partial(T.StepLR, step_size=30, gamma=0.7)),
    "exponential": (exponential(0.99), partial(T.ExponentialLR, gamma=0.99)),
    "polynomial": (polynomial(700), partial(T.PolynomialLR, total_iters=700)),
    "polynomial of power 2.5": (
        polynomial(700, power=2.5),
        partial(T.PolynomialLR, total_iters=700, power=2.5),
    ),
    "join": (
        join([warm_up(100, start=0.01), cosine(600), step(70, 0.5)], [100, 700]),
        warm_then_cosine,
    ),
}
every_twin = pytest.mark.parametrize("name", TWINS)
SCHEDULES = [
    *(schedule for schedule, _ in TWINS.values()),
    cosine(20, end=0.1),
    one_cycle(1),
    join([constant(0.5)], []),
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def rates_of_torch(make, rates, steps):
    """The rate of each group in each step, `(steps, groups)`."""
    weights = [nn.Parameter(torch.zeros(1)) for _ in rates]
    sgd = O.SGD(
        [{"params": [w], "lr": lr} for w, lr in zip(weights, rates, strict=True)]
    )
    scheduler = make(sgd)
    found = [scheduler.get_last_lr()]
    while len(found) < steps:
        sgd.step()
        scheduler.step()
        found.append(scheduler.get_last_lr())
    return torch.tensor(found, dtype=torch.float64)


def largest_gap(schedule, make):
    """Relative to the rate, over a thousand steps and two groups."""
    factors = torch.stack([schedule(number(float(t))) for t in range(STEPS)])
    rates = torch.tensor(RATES, dtype=torch.float64)
    ours, theirs = factors[:, None] * rates, rates_of_torch(make, RATES, STEPS)
    # Near 0 half a cosine cancels, in torch as here: relative to the base rate there.
    return ((ours - theirs).abs() / (theirs.abs() + 1e-3 * rates)).max().item()


# --- the factors ----------------------------------------------------------------------


@every_twin
def test_the_rate_falls_like_that_of_torch(name):
    assert largest_gap(*TWINS[name]) < 1e-12


def test_an_end_of_the_cosine_is_a_share_of_the_rate():
    make = partial(lr_scheduler.CosineAnnealingLR, T_max=1000, eta_min=0.02)
    theirs = rates_of_torch(make, [0.1], STEPS)[:, 0]
    ours = 0.1 * cosine(1000, end=0.2)(torch.arange(STEPS, dtype=torch.float64))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda t: step(30, gamma=0.7)(t + 1), "step"),
        (lambda t: cosine(STEPS)(t + 1), "cosine"),
        (lambda t: one_cycle(STEPS + 1)(t), "one_cycle"),
        (join([warm_up(100, start=0.01), cosine(600)], [101]), "join"),
        (lambda t: cosine(600)(t - 100), "join"),
    ],
)
def test_teeth_a_schedule_that_is_off_by_one_is_seen(wrong, name):
    assert largest_gap(wrong, TWINS[name][1]) > 1e-6


@pytest.mark.parametrize("steps", [1, 3, 7, 49, 1000])
@pytest.mark.parametrize("low", [0.0, 0.1, 1 / 3, 0.7])
def test_starts_and_ends_are_exact(steps, low):
    def ends(schedule, last=steps):
        return [schedule(number(float(t))).item() for t in (0, last, last + 1, 1e6)]

    assert ends(linear(steps, start=low, end=0.9)) == [low, 0.9, 0.9, 0.9]
    assert ends(warm_up(steps, start=low)) == [low, 1, 1, 1]
    assert ends(cosine(steps, end=low)) == [1, low, low, low]
    assert ends(polynomial(steps, power=0.5 + low)) == [1, 0, 0, 0]
    if steps > 3:
        cycle = one_cycle(steps, div_factor=3, final_div_factor=7)
        assert ends(cycle, steps - 1) == [1 / 3, *[1 / 3 / 7] * 3]


@every_schedule
def test_a_schedule_is_a_pure_function_of_tensors(schedule):
    at = torch.arange(50, dtype=torch.float64)
    one_by_one = torch.stack([schedule(t) for t in at])
    assert one_by_one.dtype == torch.float64
    torch.testing.assert_close(schedule(at), one_by_one, rtol=1e-15, atol=0)
    stacked = torch.vmap(schedule)(at)
    torch.testing.assert_close(stacked, one_by_one, rtol=1e-15, atol=1e-16)
    assert torch.isfinite(torch.func.grad(schedule)(number(7.0)))


def test_what_a_schedule_is_made_of_can_be_seen_kept_and_compared():
    schedule = join([warm_up(10), one_cycle(90, anneal="linear")], [10])
    assert repr(schedule) == (
        "join(schedules=(warm_up(steps=10, start=0.0), one_cycle(steps=90, "
        "pct_start=0.3, div_factor=25.0, final_div_factor=10000.0, "
        "anneal='linear')), boundaries=(10,))"
    )
    assert pickle.loads(pickle.dumps(schedule)) == schedule == copy.deepcopy(schedule)
    assert schedule != join([warm_up(11), one_cycle(90, anneal="linear")], [10])


def test_join_asks_each_about_its_own_steps_only():
    asked = [set(), set(), set()]

    def noting(seen, t):
        seen.add(t.item())
        return t / 100

    parts = [exponential(1e10), constant(1.0), constant(2.0)]
    schedule = join(parts, [5, 8])
    mine = [partial(noting, seen) for seen in asked]
    object.__setattr__(schedule, "schedules", mine)  # they do read on the host
    factors = [schedule(number(float(t))).item() for t in range(12)]
    assert factors == [t / 100 for t in [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]
    assert asked == [set(range(5)), set(range(3)), set(range(4))]


@pytest.mark.parametrize("boundary", [5, 400])
def test_join_has_a_derivative_where_the_other_schedule_overflows(boundary):
    def after(gamma):
        parts = [exponential(gamma), exponential(gamma)]
        return join(parts, [boundary])(number(402.0))

    assert torch.isfinite(torch.func.grad(after)(number(0.5)))
    assert torch.isfinite(torch.func.grad(after)(number(5.0)))


STACKED = {
    "constant": constant,
    "linear": lambda x: linear(20, start=x, end=x / 2),
    "warm_up": partial(warm_up, 20),
    "cosine": partial(cosine, 20),
    "one_cycle": lambda x: one_cycle(20, div_factor=1 + x, final_div_factor=2 + x),
    "step": partial(step, 3),
    "exponential": exponential,
    "polynomial": partial(polynomial, 20),
    "join": lambda x: join([warm_up(5, start=x), exponential(x)], [5]),
}


@pytest.mark.parametrize("make", STACKED.values(), ids=STACKED)
def test_parameters_stack_and_have_derivatives(make):
    values = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    at, tiny = number(7.0), 1e-6
    stacked = torch.vmap(lambda value: make(value)(at))(values)
    one_by_one = torch.stack([make(value.item())(at) for value in values])
    torch.testing.assert_close(stacked, one_by_one, rtol=1e-15, atol=0)
    slope = torch.func.grad(lambda value: make(value)(at))(values[1])
    low, high = (make(values[1] + sign * tiny)(at) for sign in (-1, 1))
    torch.testing.assert_close(slope, (high - low) / (2 * tiny), rtol=1e-6, atol=1e-9)


# --- as a part of the update ----------------------------------------------------------


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [(draw(6, 3), draw(6, 2)) for _ in range(count)]


def net():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)
        return nn.Sequential(*layers).double()


def two_groups(kind, model):
    first, second = model[0], model[2]
    groups = [
        {"params": [*first.parameters()]},
        {"params": [*second.parameters()], "lr": 0.02},
    ]
    return kind(groups, lr=0.05)


def torch_training(model, optimizer, scheduler, data):
    for inputs, targets in data:
        optimizer.zero_grad()
        nn.MSELoss()(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def ours(model, optimizer, data):
    goal = ll.supervised(model, nn.MSELoss())
    params, opt_state = ll.init(goal, optimizer)
    return ll.fold(ll.make_step(goal, optimizer), params, opt_state, data)


def close(one, other, tolerance=1e-12):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def in_torch(optimizer):
    parts = [T.LinearLR(optimizer, 0.1, 1.0, 5), T.CosineAnnealingLR(optimizer, 25)]
    return T.SequentialLR(optimizer, parts, [5])


RUNS = {
    "cosine": (cosine(30), partial(T.CosineAnnealingLR, T_max=30)),
    "step": (step(7, gamma=0.5), partial(T.StepLR, step_size=7, gamma=0.5)),
    "one_cycle": (
        one_cycle(30),
        partial(
            T.OneCycleLR, max_lr=[0.05, 0.02], total_steps=30, cycle_momentum=False
        ),
    ),
    "join": (join([warm_up(5, start=0.1), cosine(25)], [5]), in_torch),
}
KINDS = {
    "SGD": partial(O.SGD, momentum=0.9),
    "Adam": partial(O.Adam, weight_decay=0.1),
    "AdamW": partial(O.AdamW, weight_decay=0.1),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@every_kind
@pytest.mark.parametrize(("schedule", "make"), RUNS.values(), ids=RUNS)
def test_training_equals_torch_with_its_scheduler(kind, schedule, make):
    data, model, other = batches(30), net(), net()
    optimizer = scheduled(two_groups(kind, model), schedule)
    params, opt_state, _ = ours(model, optimizer, data)
    reference = two_groups(kind, other)
    close(params, torch_training(other, reference, make(reference), data))
    # The state has the rates themselves, and so has an instance that it is written to.
    assert [group.hyper["lr"] for group in opt_state.slots.groups] == [0.05, 0.02]
    written = two_groups(kind, model)
    ll.load_opt_state(written, model, opt_state)
    assert [group["lr"] for group in written.param_groups] == [0.05, 0.02]


@every_kind
def test_teeth_a_schedule_of_the_count_after_the_update_is_seen(kind):
    schedule, make = RUNS["cosine"]
    data, model, other = batches(30), net(), net()
    late = scheduled(two_groups(kind, model), lambda t: schedule(t + 1))
    params, _, _ = ours(model, late, data)
    reference = two_groups(kind, other)
    expected = torch_training(other, reference, make(reference), data)
    assert (params["0.weight"] - expected["0.weight"]).abs().max() > 1e-3


@pytest.fixture
def _double() -> Iterator[None]:
    # torch keeps mu_product, eta and mu in the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.__name__)
def test_every_optimizer_sees_the_rate_of_the_schedule(kind):
    schedule = join([warm_up(4, start=0.1), exponential(0.8)], [4])
    start = torch.arange(12.0).reshape(3, 4).sin()
    grads = [(start + t).cos() for t in range(12)]
    weight = nn.Parameter(start.clone())
    reference = kind([weight])
    scheduler = T.LambdaLR(reference, lambda t: schedule(number(float(t))).item())
    optimizer = scheduled(kind, schedule)
    params, own = {"w": start}, {"w": start.clone()}
    slots, own_slots = optimizer.init(params), optimizer.init(params)
    for grad in grads:
        params, slots = move(optimizer, {"w": grad}, slots, params)
        own, own_slots = move_in_place(optimizer, {"w": grad.clone()}, own_slots, own)
        weight.grad = grad
        reference.step()
        scheduler.step()
    close(params["w"], weight.detach())
    assert torch.equal(own["w"], params["w"])
    if kind is not O.Rprop:  # which takes the rate for its first step only
        plain, slots = {"w": start}, as_optimizer(kind).init({"w": start})
        for grad in grads:
            plain, slots = move(as_optimizer(kind), {"w": grad}, slots, plain)
        assert (plain["w"] - params["w"]).abs().max() > 1e-6


def test_an_instance_with_steps_made_goes_on_where_it_was():
    schedule, make = RUNS["join"]
    data, model = batches(30), net()
    reference = two_groups(O.Adam, model)
    torch_training(model, reference, make(reference), data[:12])
    for group, lr in zip(reference.param_groups, [0.05, 0.02], strict=True):
        group["lr"] = lr
    params, opt_state, _ = ours(model, scheduled(reference, schedule), data[12:])
    other = net()
    whole = two_groups(O.Adam, other)
    close(params, torch_training(other, whole, make(whole), data))
    assert [group.step for group in opt_state.slots.groups] == [30, 30]


def test_an_instance_whose_steps_torch_did_not_count_is_refused():
    model = net()
    sgd = O.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = scheduled(sgd, cosine(10))
    assert optimizer.init(dict(model.named_parameters())).groups[0].step == 0
    torch_training(model, sgd, T.ConstantLR(sgd), batches(1))
    message = "and torch did not count them, so nothing says where in cosine(steps=10, "
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.init(dict(model.named_parameters()))


def test_a_step_that_float16_skips_does_not_count():
    goal = ll.supervised(net().float(), nn.MSELoss())
    optimizer = scheduled(O.Adam, cosine(9))
    params, opt_state = ll.init(goal, optimizer, precision="fp16")
    step = ll.make_step(goal, optimizer, precision="fp16")
    counts = []
    for size in (1.0, 1e30, 1.0):
        batch = torch.full((4, 3), size), torch.zeros(4, 2)
        params, opt_state, _, _ = step(params, opt_state, batch)
        counts.append(opt_state.slots.groups[0].step.item())
    assert counts == [1, 1, 2]


def test_a_compiled_step_is_compiled_once_whatever_the_rate():
    data = batches(12)
    goal = ll.supervised(net(), nn.MSELoss())
    optimizer = scheduled(ll.optim.Adam(0.05), RUNS["join"][0])
    eager = ll.make_step(goal, optimizer)
    step = ll.compile_step(eager, backend="aot_eager")
    params, _, _ = ll.fold(step, *ll.init(goal, optimizer), data)
    expected, _, _ = ll.fold(eager, *ll.init(goal, optimizer), data)
    close(params, expected)
    assert step.body.compilations == 1


@every_kind
def test_many_steps_in_one_call_follow_the_schedule(kind):
    inputs, targets = map(torch.cat, zip(*batches(12), strict=True))
    loader = DataLoader(TensorDataset(inputs, targets), 6)
    goal = ll.supervised(net(), nn.MSELoss())
    optimizer = scheduled(partial(kind, lr=0.05), cosine(8, end=0.1))
    step = ll.make_step(goal, optimizer)
    stepwise = ll.fold(step, *ll.init(goal, optimizer), loader)
    folding = ll.compile_fold(step, backend="aot_eager")
    folded = folding(*ll.init(goal, optimizer), loader)
    assert folding.why_not is None
    close(folded[0], stepwise[0], 1e-14)
    assert folded[1].slots.groups[0].step == 12
    # Teeth: without the schedule, or with its first rate only, it is another run.
    plain = ll.make_step(goal, partial(kind, lr=0.05))
    other = ll.fold(plain, *ll.init(goal, optimizer), loader)
    assert (folded[0]["0.weight"] - other[0]["0.weight"]).abs().max() > 1e-3


def three_steps(lr, schedule):
    optimizer = scheduled(ll.optim.AdamW(), schedule)
    params = {"w": torch.linspace(-1, 1, 4, dtype=torch.float64)}
    (group,) = optimizer.init(params).groups
    slots = Slots((group._replace(hyper={**group.hyper, "lr": lr}),))
    for _ in range(3):
        params, slots = move(optimizer, {"w": params["w"].sin()}, slots, params)
    return params["w"].square().sum()


@pytest.mark.parametrize("by", ["base rate", "parameter"])
def test_there_is_a_derivative_through_three_steps(by):
    def result(x):
        if by == "base rate":
            return three_steps(x, cosine(4, end=0.1))
        return three_steps(number(0.1), cosine(4, end=x))

    x, tiny = number(0.2), 1e-6
    slope = torch.func.grad(result)(x)
    assert slope.abs() > 1e-3
    difference = (result(x + tiny) - result(x - tiny)) / (2 * tiny)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=0)


def test_members_with_rates_and_schedules_of_their_own_stack():
    rates = torch.tensor([0.1, 0.02], dtype=torch.float64)
    ends = torch.tensor([0.0, 0.5], dtype=torch.float64)

    def result(lr, end):
        return three_steps(lr, cosine(4, end=end))

    one_by_one = torch.stack([result(*pair) for pair in zip(rates, ends, strict=True)])
    close(torch.vmap(result)(rates, ends), one_by_one, 1e-14)


def test_the_rate_of_the_last_step_is_known():
    params = {"w": torch.ones(2)}
    optimizer = scheduled(ll.optim.SGD(0.5), step(2, gamma=0.1))
    slots = optimizer.init(params)
    rates = [rate_of(optimizer, slots)]
    for _ in range(4):
        _, slots = optimizer.update(params, slots, params)
        rates.append(rate_of(optimizer, slots))
    assert all(rate.shape == () for rate in rates)
    close(torch.stack(rates), torch.tensor([0.5, 0.5, 0.5, 0.05, 0.05]).double(), 1e-8)
    assert rate_of(ll.optim.SGD(0.5), slots) == 0.5
    assert rate_of(optimizer, ()) is None


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: cosine(0), ValueError, "cosine(steps=...) must be an int of at least"),
        (lambda: cosine(1.5), ValueError, "an int of at least 1, got 1.5."),
        (lambda: linear(True), ValueError, "an int of at least 1, got True."),
        (lambda: warm_up(None), TypeError, "warm_up(steps=...) must be an int of at"),
        (lambda: polynomial(number(3.0)), TypeError, "polynomial(steps=...) must be"),
        (lambda: step(0), ValueError, "step(every=...) must be an int of at least 1"),
        (lambda: step(3, 0.0), ValueError, "step(gamma=...) must be a number above 0"),
        (lambda: exponential(-0.5), ValueError, "exponential(gamma=...) must be"),
        (lambda: exponential(float("nan")), ValueError, "a number above 0, got nan."),
        (lambda: constant(-1.0), ValueError, "a number of at least 0, got -1.0."),
        (lambda: constant(torch.ones(2)), TypeError, "constant(factor=...) must be a"),
        (lambda: linear(3, end=float("inf")), ValueError, "linear(end=...) must be"),
        (lambda: polynomial(3, -1), ValueError, "polynomial(power=...) must be"),
        (lambda: one_cycle(3, pct_start=1.5), ValueError, "a number from 0 to 1, got"),
        (lambda: one_cycle(3, div_factor=0), ValueError, "one_cycle(div_factor=...)"),
        (lambda: one_cycle(3, anneal="up"), ValueError, "'cos' or 'linear', got 'up'"),
        (lambda: join([], []), ValueError, "between 0 schedules there must be 0"),
        (
            lambda: join([cosine(3), cosine(3)], []),
            ValueError,
            "between 2 schedules there must be 1 boundaries, got 0. The first",
        ),
        (
            lambda: join([cosine(3)] * 3, [4, 4]),
            ValueError,
            "each larger than the one before, got (4, 4).",
        ),
        (lambda: join([cosine(3)] * 2, [0]), ValueError, "ints of at least 1, each"),
        (lambda: join([cosine(3)] * 2, ["4"]), ValueError, "ints of at least 1, each"),
        (lambda: join(cosine(3), []), TypeError, "must be a list or a tuple, got cos"),
        (lambda: join([0.5], []), TypeError, "the one at 0 must be a function that"),
    ],
)
def test_parameters_that_cannot_be_right_are_refused(make, kind, message):
    with pytest.raises(kind, match=re.escape(message)) as caught:
        make()
    assert str(caught.value).startswith("lossloop.schedules.")


def scheduler_of_torch():
    return T.StepLR(O.SGD([nn.Parameter(torch.ones(1))]), 3)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (0.5, "Got 0.5."),
        (scheduler_of_torch(), "StepLR object"),
        (lambda t: 1.0 if t < 3 else 0.5, "data-dependent control flow"),
        (lambda t: torch.tensor(t.item()), r"item\(\)"),
        (lambda t: 0.5, "float"),
        (lambda t: t * torch.ones(2), r"returns one of shape \(2,\)"),
        (lambda t: (t, t), r"returns one of shape \(\)"),
    ],
    ids=["number", "scheduler", "if", "item", "float", "vector", "pair"],
)
def test_what_is_no_function_of_the_step_is_refused(schedule, message):
    with pytest.raises(TypeError, match=message) as caught:
        scheduled(O.SGD, schedule)
    assert str(caught.value).startswith("lossloop.optim.scheduled(schedule=...) must")
    assert "torch.where" in str(caught.value)


def test_functions_of_ones_own_are_taken():
    optimizer = scheduled(ll.optim.SGD(1.0), lambda t: torch.where(t < 2, 1.0, 0.5))
    params = {"w": torch.ones(1)}
    slots, moved = optimizer.init(params), [params["w"]]
    for _ in range(4):
        params, slots = move(optimizer, {"w": torch.ones(1)}, slots, params)
        moved.append(params["w"])
    assert [(one - other).item() for one, other in pairwise(moved)] == [1, 1, 0.5, 0.5]


def test_optimizers_without_a_rate_to_schedule_are_refused():
    own = ll.Optimizer(lambda params: (), lambda grads, slots, params: (grads, slots))
    with pytest.raises(TypeError, match="by the means of their own library"):
        scheduled(own, cosine(3))
    with pytest.raises(TypeError, match="is not an optimizer"):
        scheduled(0.1, cosine(3))
    once = scheduled(O.SGD, cosine(3))
    with pytest.raises(ValueError, match=r"follows cosine.* already.*schedules.join"):
        scheduled(once, warm_up(3))
