"""The pure optimizers against torch.optim, which is the oracle."""

import functools
import math
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves, tree_map

import lossloop.optim
from lossloop import _optimizers
from lossloop._formulas import RULES
from lossloop._optimizers import (
    as_optimizer,
    follow,
    from_torch,
    host_hyper,
    load_opt_state,
    move,
    move_in_place,
)
from lossloop._types import Optimizer, OptState, Params, Slots

O = torch.optim  # noqa: E741

CASES = [
    (O.SGD, {}),
    (O.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (O.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    (O.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (O.Adam, {}),
    (O.Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    (O.Adam, {"lr": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    (O.Adam, {"betas": (0.0, 0.0), "eps": 1e-3}),
    (O.AdamW, {}),
    (O.AdamW, {"amsgrad": True, "maximize": True, "weight_decay": 0.0}),
    (O.RMSprop, {}),
    (O.RMSprop, {"centered": True, "alpha": 0.9, "weight_decay": 0.1}),
    (O.RMSprop, {"momentum": 0.9, "eps": 0.1, "maximize": True}),
    (O.Adagrad, {}),
    (O.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    (O.Adagrad, {"weight_decay": 0.1, "maximize": True, "eps": 1e-2}),
    (O.Adadelta, {}),
    (O.Adadelta, {"rho": 0.7, "weight_decay": 0.1, "maximize": True}),
    (O.Adamax, {}),
    (O.Adamax, {"betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True}),
    (O.NAdam, {}),
    (O.NAdam, {"weight_decay": 0.1, "momentum_decay": 0.1, "maximize": True}),
    (O.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (O.RAdam, {}),
    (O.RAdam, {"weight_decay": 0.1, "maximize": True, "betas": (0.9, 0.9)}),
    (O.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (O.RAdam, {"betas": (0.9, 0.6)}),  # never rectified
    (O.ASGD, {}),
    (O.ASGD, {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 5}),
    (O.ASGD, {"weight_decay": 0.1, "maximize": True}),
    (O.Rprop, {}),
    (O.Rprop, {"maximize": True, "etas": (0.4, 1.3), "step_sizes": (0.005, 0.02)}),
    (O.Adafactor, {}),
    (O.Adafactor, {"lr": 0.5, "eps": (1e-4, 2.0), "beta2_decay": -0.5}),
    (O.Adafactor, {"d": 1.5, "weight_decay": 0.1, "maximize": True}),
    (O.Muon, {}),
    (O.Muon, {"nesterov": False, "momentum": 0.5, "weight_decay": 0.0}),
    (O.Muon, {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 2}),
    (O.Muon, {"ns_coefficients": (1.5, -0.5, 0.0), "eps": 100.0}),
]
NAMES = {
    id(case): case[0].__name__ + "".join(f"-{key}" for key in case[1]) for case in CASES
}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: NAMES[id(case)])
every_class = pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.__name__)


def followed(torch_optimizer, slots, before=None):
    counts = torch.tensor(0), torch.tensor(0)
    return follow(torch_optimizer, OptState(slots, *counts), before).slots


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    # torch keeps mu_product, eta and mu in the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def _forget() -> None:
    # The cases share one code object, and dynamo keeps eight graphs of each.
    torch._dynamo.reset()


class Model(nn.Module):
    """Parameters of many shapes; a Muon model has matrices only."""

    def __init__(self, kind: type, dtype: torch.dtype = torch.float64, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [(), (5,), (4, 3), (2, 3, 2, 2)]
        shapes = [(4, 3), (2, 5)] if kind is O.Muon else shapes
        for index, shape in enumerate(shapes):
            value = torch.randn(shape, generator=generator).to(dtype)
            setattr(self, f"p{index}", nn.Parameter(value))

    def groups(self, kind: type, options: dict) -> list[dict]:
        """Two param groups, the second with a lower rate and other decays."""
        first, *others = self.parameters()
        lr = kind([nn.Parameter(torch.zeros(1, 1))], **options).defaults["lr"]
        decay = {} if kind is O.Rprop else {"weight_decay": 0.05}
        return [
            {"params": others},
            {"params": [first], "lr": lr / 2, **decay},
        ]


def detached(model: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(params: Params, step: int) -> Params:
    generator = torch.Generator().manual_seed(step)
    return {
        name: p.detach().sin()
        + torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in params.items()
    }


def torch_steps(optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        params = dict(model.named_parameters())
        for name, grad in gradients(params, step).items():
            params[name].grad = grad
        optimizer.step()


def pure_steps(
    optimizer: Optimizer, params: Params, slots, steps: range, update=None
) -> tuple[Params, Slots]:
    for step in steps:
        updates, slots = (update or optimizer.update)(
            gradients(params, step), slots, params
        )
        assert updates.keys() == params.keys()
        params = {name: params[name] + updates[name] for name in params}
    return params, slots


def worst(ours: Params, theirs: Params) -> float:
    """Largest difference, relative to the largest value of the same tensor."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - other).abs().max() / other.abs().max().clamp(min=1e-300))
        for name, other in theirs.items()
    )


def worst_state(slots: Slots, model: nn.Module, optimizer) -> float:
    named = dict(model.named_parameters())
    figures = [0.0]
    for group in slots.groups:
        for name, moments in group.moments.items():
            state = optimizer.state[named[name]]
            theirs = {
                key: value
                for key, value in state.items()
                if key != "step" and value is not None
            }
            figures += [worst(moments, theirs)] if moments else []
            if "step" in state:
                assert state["step"] == group.step
    return max(figures)


# Against torch.optim


@every_case
def test_twenty_steps_with_param_groups_equal_torch(case):
    kind, options = case
    model = Model(kind)
    torch_optimizer = kind(model.groups(kind, options), **options)
    optimizer = from_torch(torch_optimizer)
    slots = optimizer.init(dict(model.named_parameters()))
    params, slots = pure_steps(optimizer, detached(model), slots, range(20))
    torch_steps(torch_optimizer, model, range(20))
    figure = max(
        worst(params, detached(model)), worst_state(slots, model, torch_optimizer)
    )
    assert figure < 1e-12


@every_case
def test_every_option_of_the_table_matters(case):
    # Teeth: were an option ignored on both sides, the test above would not notice.
    kind, options = case
    run = functools.partial(Model, kind)

    def result(chosen: dict) -> Params:
        optimizer = from_torch(kind, **chosen)
        params = detached(run())
        return pure_steps(optimizer, params, optimizer.init(params), range(8))[0]

    for name in options:
        rest = {key: value for key, value in options.items() if key != name}
        if name == "momentum" and "nesterov" in rest:
            continue
        if name == "weight_decay" and "decoupled_weight_decay" in rest:
            continue
        if name == "alpha" or (kind is O.ASGD and name == "t0"):
            continue  # of ASGD: in the averages only, or slight
        assert worst(result(options), result(rest)) > 1e-9, name


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case[0] is not O.Muon],
    ids=lambda case: NAMES[id(case)],
)
@pytest.mark.parametrize("foreach", [False, True])
def test_ways_of_executing_do_not_matter(case, foreach):
    kind, options = case
    model = Model(kind)
    torch_optimizer = kind(model.parameters(), foreach=foreach, **options)
    optimizer = from_torch(functools.partial(kind, foreach=foreach), **options)
    params = detached(model)
    params, _ = pure_steps(optimizer, params, optimizer.init(params), range(5))
    torch_steps(torch_optimizer, model, range(5))
    assert worst(params, detached(model)) < 1e-12


@every_case
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # torch's own float16 is nan: most eps are zero there.
    [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, None)],
    ids=str,
)
def test_dtypes_are_kept(case, dtype, tolerance):
    kind, options = case
    model = Model(kind, dtype)
    optimizer = from_torch(kind, **options)
    slots = optimizer.init(dict(model.named_parameters()))
    for params in (detached(model), tree_map(torch.zeros_like, detached(model))):
        updates, after = optimizer.update(gradients(params, 0), slots, params)
        assert {update.dtype for update in updates.values()} == {dtype}
        kept = [leaf.dtype for leaf in tree_leaves(slots)]
        assert [leaf.dtype for leaf in tree_leaves(after)] == kept
    params, _ = pure_steps(optimizer, detached(model), slots, range(5))
    assert all(torch.isfinite(p).all() for p in params.values())
    if tolerance is not None:
        torch_steps(kind(model.parameters(), **options), model, range(5))
        largest = max(p.abs().max() for p in params.values())
        for name, other in model.named_parameters():
            assert (params[name] - other).abs().max() < tolerance * largest


@every_case
def test_existing_state_is_read(case):
    kind, options = case
    model = Model(kind)
    torch_optimizer = kind(model.groups(kind, options), **options)
    torch_steps(torch_optimizer, model, range(5))
    optimizer = from_torch(torch_optimizer)
    slots, params = optimizer.init(dict(model.named_parameters())), detached(model)
    kept = tree_map(torch.clone, slots)
    torch_steps(torch_optimizer, model, range(5, 10))
    assert all(map(torch.equal, tree_leaves(slots), tree_leaves(kept))), "an alias"
    params, _ = pure_steps(optimizer, params, slots, range(5, 10))
    assert worst(params, detached(model)) < 1e-12


@every_case
def test_state_is_written_back(case):
    kind, options = case
    model, other = Model(kind), Model(kind)
    optimizer = from_torch(kind(model.groups(kind, options), **options))
    slots = optimizer.init(dict(model.named_parameters()))
    params, slots = pure_steps(optimizer, detached(model), slots, range(5))
    slots = slots._replace(
        groups=tuple(
            group._replace(hyper={**group.hyper, "lr": group.hyper["lr"] / 4})
            for group in slots.groups
        )
    )
    torch_optimizer = kind(model.groups(kind, options), **options)
    opt_state = OptState(slots, torch.tensor(5), torch.tensor(0))
    kept = tree_map(torch.clone, opt_state)
    load_opt_state(torch_optimizer, model, opt_state)
    model.load_state_dict(params)
    torch_steps(torch_optimizer, model, range(5, 10))

    uninterrupted = kind(other.groups(kind, options), **options)
    torch_steps(uninterrupted, other, range(5))
    for group in uninterrupted.param_groups:
        group["lr"] /= 4
    torch_steps(uninterrupted, other, range(5, 10))
    assert worst(detached(model), detached(other)) < 1e-12
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in uninterrupted.state[theirs].items():
            mine = torch_optimizer.state[ours][key]
            if value is not None:
                assert (mine.dtype, mine.device) == (value.dtype, value.device)
    assert all(map(torch.equal, tree_leaves(opt_state), tree_leaves(kept))), "an alias"
    assert [group["lr"] for group in torch_optimizer.param_groups] == [
        group["lr"] for group in uninterrupted.param_groups
    ]


def test_tensor_rates_are_read_and_written_in_place():
    weight = nn.Parameter(torch.ones(2))
    rate = torch.tensor([0.5])
    torch_optimizer = O.SGD([weight], lr=rate)
    optimizer = from_torch(torch_optimizer)
    slots = optimizer.init({"0": weight})
    assert slots.groups[0].hyper["lr"] == 0.5
    hyper = {"lr": torch.tensor(0.25)}
    slots = Slots((slots.groups[0]._replace(hyper=hyper),))
    model = nn.ParameterList([weight])
    load_opt_state(torch_optimizer, model, OptState(slots, rate, rate))
    assert torch_optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.25


# Compiled, stacked, differentiated


@every_case
@pytest.mark.usefixtures("_forget")
def test_compiled_equals_eager(case):
    kind, options = case
    optimizer = from_torch(kind, **options)
    params = detached(Model(kind))
    params = {name: params[name] for name in list(params)[::2]}  # 0-d and a matrix
    slots = optimizer.init(params)
    compiled = torch.compile(
        lambda *given: optimizer.update(*given), backend="aot_eager", fullgraph=True
    )
    ours, ours_slots = pure_steps(optimizer, params, slots, range(3))
    with torch.no_grad():
        theirs, their_slots = pure_steps(optimizer, params, slots, range(3), compiled)
    assert worst(ours, theirs) < 1e-14
    for mine, other in zip(
        tree_leaves(ours_slots), tree_leaves(their_slots), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-15)
    pointers = [leaf.data_ptr() for leaf in tree_leaves(their_slots)]
    assert len(set(pointers)) == len(pointers)


# torch's own imports warn when Inductor is first used.
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.usefixtures("_forget")
def test_generated_code_equals_eager():
    model = Model(O.Adam)
    optimizer = from_torch(O.Adam, amsgrad=True)
    params = detached(model)
    slots = optimizer.init(params)
    compiled = torch.compile(lambda *given: optimizer.update(*given), fullgraph=True)
    ours, _ = pure_steps(optimizer, params, slots, range(3))
    with torch.no_grad():
        theirs, _ = pure_steps(optimizer, params, slots, range(3), compiled)
    assert worst(ours, theirs) < 1e-13


@every_case
def test_stacked_members_equal_the_loop(case):
    kind, options = case
    optimizer = from_torch(kind, **options)
    members = [detached(Model(kind, seed=seed)) for seed in range(3)]
    lrs = [0.1, 0.02, 0.3]

    def with_rate(slots: Slots, lr: Tensor) -> Slots:
        (group,) = slots.groups
        return Slots((group._replace(hyper={**group.hyper, "lr": lr}),))

    def run(params: Params, lr: Tensor, grads: list[Params]) -> Params:
        slots = with_rate(optimizer.init(params), lr)
        for each in grads:
            updates, slots = optimizer.update(each, slots, params)
            params = {name: params[name] + updates[name] for name in params}
        return params

    given = [[gradients(params, step) for step in range(4)] for params in members]
    expected = [
        run(params, torch.tensor(lr), grads)
        for params, lr, grads in zip(members, lrs, given, strict=True)
    ]
    stack = functools.partial(tree_map, lambda *leaves: torch.stack(leaves))
    together = torch.vmap(run)(stack(*members), torch.tensor(lrs), stack(*given))
    # Batched products of bfloat16 matrices round in another order.
    tolerance = 0.05 if kind is O.Muon else 1e-12
    assert worst(together, stack(*expected)) < tolerance


@every_class
def test_derivative_by_the_rate_through_three_steps(kind):
    optimizer = from_torch(kind)
    params = detached(Model(kind))
    start = optimizer.init(params)

    def result(lr: Tensor) -> Tensor:
        (group,) = start.groups
        slots = Slots((group._replace(hyper={**group.hyper, "lr": lr}),))
        at = params
        for step in range(3):
            noise = gradients(params, step)
            grads = {name: at[name].sin() + noise[name] for name in at}
            updates, slots = optimizer.update(grads, slots, at)
            at = {name: at[name] + updates[name] for name in at}
        return sum((p * p).sum() for p in at.values())

    lr, tiny = torch.tensor(0.03), 1e-6
    slope = torch.func.grad(result)(lr)
    assert torch.isfinite(slope)
    assert slope != 0
    if kind is not O.Muon:  # bfloat16 within
        difference = (result(lr + tiny) - result(lr - tiny)) / (2 * tiny)
        torch.testing.assert_close(slope, difference, rtol=1e-6, atol=0)


@every_class
def test_a_zero_gradient_does_not_spoil_the_derivative(kind):
    # The root of a second moment of zero has an infinite slope.
    optimizer = from_torch(kind)
    params = {"weight": torch.ones(2, 2)}

    def result(scale: Tensor) -> Tensor:
        grads = {"weight": scale * torch.tensor([[0.0, 1.0], [2.0, 3.0]])}
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return updates["weight"].sum()

    assert torch.isfinite(torch.func.grad(result)(torch.tensor(0.5)))


def test_derivative_by_a_beta_of_zero_is_finite():
    optimizer = from_torch(O.Adam, betas=(0.0, 0.0))
    params = {"weight": torch.ones(2)}
    (group,) = optimizer.init(params).groups

    def result(beta: Tensor) -> Tensor:
        slots = Slots((group._replace(hyper={**group.hyper, "beta1": beta}),))
        updates, _ = optimizer.update(params, slots, params)
        return updates["weight"].sum()

    assert torch.isfinite(torch.func.grad(result)(torch.tensor(0.0)))


@every_case
def test_update_is_pure(case):
    kind, options = case
    optimizer = from_torch(kind, **options)
    params = detached(Model(kind))
    _, slots = pure_steps(optimizer, params, optimizer.init(params), range(2))
    given = (gradients(params, 2), slots, params)
    kept = tree_map(torch.clone, given)
    first, again = optimizer.update(*given), optimizer.update(*given)
    assert all(map(torch.equal, tree_leaves(given), tree_leaves(kept)))
    assert all(map(torch.equal, tree_leaves(first), tree_leaves(again)))
    # Nothing that came out shares memory with what went in, or twice with itself.
    updates, after = first
    moments = [(group.step, group.moments) for group in after.groups]
    fresh = [leaf.data_ptr() for leaf in tree_leaves((updates, moments))]
    old = [leaf.data_ptr() for leaf in tree_leaves(given)]
    assert len({*fresh, *old}) == len(fresh) + len(old)


# Schedules


@pytest.mark.usefixtures("_forget")
def test_schedules_do_not_recompile():
    model, other = Model(O.AdamW), Model(O.AdamW)
    torch_optimizer = O.AdamW(model.groups(O.AdamW, {}))
    reference = O.AdamW(other.groups(O.AdamW, {}))
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(each, 0.1, total_steps=10)  # lr and betas
        for each in (torch_optimizer, reference)
    ]
    optimizer = from_torch(torch_optimizer)
    params = detached(model)
    slots = optimizer.init(dict(model.named_parameters()))
    counter = CompileCounter()
    compiled = torch.compile(
        lambda *given: optimizer.update(*given), backend=counter, fullgraph=True
    )
    torch_optimizer.step()  # without gradients: only so that the scheduler is content
    for step in range(6):
        with torch.no_grad():
            params, slots = pure_steps(
                optimizer, params, slots, range(step, step + 1), compiled
            )
        before = host_hyper(torch_optimizer)
        schedulers[0].step()
        after = followed(torch_optimizer, slots, before)
        for old, new in zip(slots.groups, after.groups, strict=True):
            changed = {
                name for name in old.hyper if old.hyper[name] is not new.hyper[name]
            }
            assert changed == {"lr", "beta1"}
            assert new.moments is old.moments
        slots = after
        torch_steps(reference, other, range(step, step + 1))
        schedulers[1].step()
    assert counter.frame_count == 1
    assert worst(params, detached(other)) < 1e-12


@pytest.mark.parametrize("kind", [O.ASGD, O.Rprop, O.SGD])
def test_a_rate_set_before_the_first_step_is_the_first_rate(kind):
    model = Model(kind)
    torch_optimizer = kind(model.parameters(), lr=0.1)
    optimizer = from_torch(torch_optimizer)
    params, slots = detached(model), optimizer.init(dict(model.named_parameters()))
    torch_optimizer.param_groups[0]["lr"] = 0.02
    slots = followed(torch_optimizer, slots)
    params, _ = pure_steps(optimizer, params, slots, range(3))
    torch_steps(torch_optimizer, model, range(3))
    assert worst(params, detached(model)) < 1e-12


def test_terms_that_appear_later_are_refused():
    weight = nn.Parameter(torch.ones(2))
    torch_optimizer = O.SGD([weight], momentum=0.9)
    slots = from_torch(torch_optimizer).init({"weight": weight})
    group = torch_optimizer.param_groups[0]
    group["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="param group 0: weight_decay changed"):
        followed(torch_optimizer, slots)
    group.update(weight_decay=0.0, momentum=0.0)
    with pytest.raises(ValueError, match="param group 0: momentum changed"):
        followed(torch_optimizer, slots)


def test_decay_may_fall_to_zero():
    weight = nn.Parameter(torch.ones(2))
    torch_optimizer = O.AdamW([weight])
    slots = from_torch(torch_optimizer).init({"weight": weight})
    torch_optimizer.param_groups[0]["weight_decay"] = 0
    slots = followed(torch_optimizer, slots)
    assert slots.groups[0].hyper["weight_decay"] == 0


# Which parameters


def test_frozen_and_unlisted_parameters_are_not_trained():
    model = Model(O.SGD)
    model.p1.requires_grad_(requires_grad=False)
    torch_optimizer = O.SGD([model.p0, model.p1, model.p2], lr=0.1)
    optimizer = from_torch(torch_optimizer)
    trainable = {k: p for k, p in model.named_parameters() if p.requires_grad}
    slots = optimizer.init(trainable)
    assert [list(group.moments) for group in slots.groups] == [["p0", "p2"]]
    params = detached(model)
    updates, _ = optimizer.update(gradients(params, 0), slots, params)
    assert updates.keys() == {"p0", "p2"}


def test_foreign_parameters_are_refused():
    model, other = Model(O.SGD), Model(O.SGD)
    groups = [{"params": [model.p0]}, {"params": [model.p1, other.p2]}]
    optimizer = from_torch(O.SGD(groups))
    message = (
        "SGD was built over parameters that are not the model's: param group 1, "
        "position 1, shape (4, 3). Build it over the parameters of the model that you "
        "pass"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.init(dict(model.named_parameters()))


def test_different_step_counts_in_a_group_are_refused():
    model = Model(O.Adam)
    torch_optimizer = O.Adam(model.parameters())
    model.p1.grad = torch.ones(5)
    torch_optimizer.step()
    with pytest.raises(ValueError, match=r"param group 0: .*'p0' 0, 'p1' 1.*their own"):
        from_torch(torch_optimizer).init(dict(model.named_parameters()))


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_begun_for_some_parameters_only(dampening):
    model = Model(O.SGD)
    torch_optimizer = O.SGD(model.parameters(), momentum=0.9, dampening=dampening)
    model.p1.grad = torch.ones(5)
    torch_optimizer.step()
    optimizer = from_torch(torch_optimizer)
    named = dict(model.named_parameters())
    if dampening:
        with pytest.raises(ValueError, match="different numbers of steps"):
            optimizer.init(named)
        return
    params, _ = pure_steps(optimizer, detached(model), optimizer.init(named), range(3))
    torch_steps(torch_optimizer, model, range(3))
    assert worst(params, detached(model)) < 1e-12


def test_state_without_a_moment_is_refused():
    model = Model(O.Adam)
    torch_optimizer = O.Adam(model.parameters())
    torch_steps(torch_optimizer, model, range(1))
    torch_optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="parameter 'p0' has no max_exp_avg_sq"):
        from_torch(torch_optimizer).init(dict(model.named_parameters()))


def test_options_changed_after_from_torch_are_refused():
    model = Model(O.Adam)
    torch_optimizer = O.Adam([model.p0])
    optimizer = from_torch(torch_optimizer)
    torch_optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="pass it again"):
        optimizer.init({"p0": model.p0})
    torch_optimizer.add_param_group({"params": [model.p1]})
    with pytest.raises(ValueError, match="2 param groups, and 1 were expected"):
        optimizer.init(dict(model.named_parameters()))


# What is refused, and in which words


class OwnStep(O.SGD):
    def step(self, closure=None):
        return super().step(closure)


class OtherDefaults(O.SGD):
    def __init__(self, params, lr=0.125):
        super().__init__(params, lr=lr)


class NewOption(O.SGD):
    def __init__(self, params, cautious=True):
        super().__init__(params)
        self.defaults["cautious"] = cautious


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (O.SparseAdam, "SparseAdam is not supported. Supported of torch.optim: ASGD"),
        (O.LBFGS, "LBFGS is not supported"),
        (OwnStep, "OwnStep overrides SGD.step"),
    ],
)
@pytest.mark.parametrize("way", ["class", "partial", "instance"])
def test_unsupported_classes_are_refused(kind, message, way):
    given = {
        "class": kind,
        "partial": functools.partial(kind, lr=0.1),
        "instance": kind([nn.Parameter(torch.ones(2))], lr=0.1),
    }[way]
    with pytest.raises(TypeError, match=re.escape(message)):
        as_optimizer(given)


def test_subclasses_that_only_set_options_are_taken():
    params = {"weight": torch.ones(2)}
    for given in (OtherDefaults, functools.partial(OtherDefaults)):
        slots = from_torch(given).init(params)
        assert slots.groups[0].hyper["lr"] == 0.125


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"NewOption\(cautious=True\)"):
        from_torch(NewOption)
    from_torch(NewOption, cautious=False)


def test_torch_checks_the_values():
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        from_torch(O.Adam, lr=-1.0)
    with pytest.raises(ValueError, match="Nesterov momentum requires"):
        lossloop.optim.SGD(nesterov=True)
    with pytest.raises(TypeError, match="nesterow"):
        from_torch(O.SGD, nesterow=True)


def test_hyperparameters_next_to_an_instance_are_refused():
    torch_optimizer = O.SGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="an instance of SGD and lr: "):
        from_torch(torch_optimizer, lr=0.1)


def test_partials_with_parameters_are_refused():
    with pytest.raises(TypeError, match="keyword arguments only"):
        from_torch(functools.partial(O.SGD, [nn.Parameter(torch.ones(2))]))


def test_complex_parameters_are_refused():
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    for given in (O.SGD, O.SGD([weight])):
        with pytest.raises(TypeError, match=r"'weight' is complex.*view_as_real"):
            from_torch(given).init({"weight": weight})


def test_muon_refuses_what_is_not_a_matrix():
    with pytest.raises(ValueError, match=r"matrices only.*shape \(5,\)"):
        lossloop.optim.Muon().init({"bias": torch.ones(5)})


def at_rest(case, dtype, size):
    """The moments after a step without a gradient, if they were all so large before."""
    optimizer = as_optimizer(functools.partial(case[0], **case[1]))
    params = {"p": torch.zeros(4, 3, dtype=dtype)}
    slots = tree_map(
        lambda t: torch.full_like(t, size) if t.ndim else t, optimizer.init(params)
    )
    _, slots = optimizer.update(tree_map(torch.zeros_like, params), slots, params)
    return [t for t in tree_leaves(slots) if t.ndim]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moments_never_decay_into_subnormal_numbers(case, dtype):
    smallest = torch.finfo(dtype).tiny
    for moment in at_rest(case, dtype, 1.01 * smallest):
        assert ((moment == 0) | (moment.abs() >= smallest)).all()
        assert moment.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 1e-6), (torch.float32, 1e-37), (torch.float64, 1e-307)],
)
def test_moments_above_them_decay_as_they_should(dtype, size):
    average, square = at_rest((O.Adam, {}), dtype, size)
    for moment, share in ((average, 0.9), (square, 0.999)):
        wanted = torch.full((4, 3), size, dtype=dtype) * share
        torch.testing.assert_close(moment, wanted, rtol=1e-2, atol=0.0)


def test_infinite_and_undefined_moments_stay_so():
    for size in (math.inf, -math.inf, math.nan):
        (buffer,) = at_rest((O.SGD, {"lr": 0.1, "momentum": 0.9}), torch.float32, size)
        torch.testing.assert_close(
            buffer, torch.full_like(buffer, size), equal_nan=True
        )


@pytest.mark.parametrize("given", [None, 0.1, "Adam", nn.Linear, dict, print])
def test_what_is_no_optimizer_is_refused(given):
    with pytest.raises(
        TypeError, match=r"is not an optimizer: pass one of torch\.optim"
    ):
        as_optimizer(given)
    with pytest.raises(TypeError, match="from_torch takes an instance, a class"):
        from_torch(given)


def test_write_back_refuses_what_does_not_match():
    model, other = Model(O.Adam), Model(O.Adam)
    zero = torch.tensor(0)
    slots = from_torch(O.Adam).init(dict(model.named_parameters()))
    opt_state = OptState(slots, zero, zero)
    with pytest.raises(ValueError, match=r"Adam has no such parameter of the model"):
        load_opt_state(O.Adam(other.parameters()), model, opt_state)
    with pytest.raises(
        ValueError, match=r"has the moments \['exp_avg', 'exp_avg_sq'\]"
    ):
        load_opt_state(O.SGD(model.parameters()), model, opt_state)
    with pytest.raises(ValueError, match="has 2 param groups, and 1 were expected"):
        load_opt_state(O.Adam(model.groups(O.Adam, {})), model, opt_state)
    with pytest.raises(TypeError, match="not lossloop's Slots"):
        load_opt_state(O.Adam(model.parameters()), model, OptState(None, zero, zero))


# The other ways to name an optimizer


@every_class
def test_constructors_have_the_names_and_defaults_of_torch(kind):
    constructor = getattr(lossloop.optim, kind.__name__)
    assert kind.__name__ in lossloop.optim.__all__
    params = detached(Model(kind))
    slots = constructor().init(params)
    expected = from_torch(kind).init(params)
    assert all(map(torch.equal, tree_leaves(slots), tree_leaves(expected)))
    assert slots.groups[0].hyper.keys() == expected.groups[0].hyper.keys()
    ways = {"foreach", "fused", "capturable", "differentiable"}
    dummy = nn.Parameter(torch.zeros(1, 1))
    defaults = {k: v for k, v in kind([dummy]).defaults.items() if k not in ways}
    if kind is O.AdamW:
        defaults.pop("decoupled_weight_decay")  # its name says it
    assert constructor.__kwdefaults__ == {
        k: v for k, v in defaults.items() if k != "lr"
    }
    assert constructor.__defaults__ == (defaults["lr"],)


def test_our_own_records_are_taken_as_they_are():
    optimizer = lossloop.optim.SGD()
    assert as_optimizer(optimizer) is optimizer


def test_objects_with_init_and_update_are_taken():
    class Descent:
        def init(self, params):
            return len(params)

        def update(self, grads, state, parameters):
            assert parameters.keys() == grads.keys()
            return {name: -grad for name, grad in grads.items()}, state + 1

    optimizer = as_optimizer(Descent())
    params = {"weight": torch.ones(2)}
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert state == 2
    assert torch.equal(updates["weight"], -params["weight"])


def test_torchopt_optimizers_are_taken():
    torchopt = pytest.importorskip("torchopt")
    pairs = [
        (torchopt.adam(lr=0.1), lossloop.optim.Adam(lr=0.1)),
        (
            torchopt.adamw(lr=0.1, weight_decay=0.1),
            lossloop.optim.AdamW(0.1, weight_decay=0.1),
        ),
        (torchopt.sgd(lr=0.1, momentum=0.9), lossloop.optim.SGD(0.1, momentum=0.9)),
    ]
    for theirs, ours in pairs:
        params = detached(Model(O.Adam))
        adapted = as_optimizer(theirs)
        start = adapted.init(params)
        kept = tree_map(torch.clone, (params, start))
        result, _ = pure_steps(adapted, params, start, range(5))
        expected, _ = pure_steps(ours, params, ours.init(params), range(5))
        assert worst(result, expected) < 1e-9
        assert all(map(torch.equal, tree_leaves((params, start)), tree_leaves(kept))), (
            "mutated"
        )


def test_powers_do_not_cancel():
    from lossloop._formulas import _one_minus_power

    for base in (0.0, 0.5, 0.999, 1 - 1e-9):
        for exponent in (1.0, 3.0, 1e6):
            ours = _one_minus_power(torch.tensor(base), torch.tensor(exponent)).item()
            exact = -math.expm1(exponent * math.log(base)) if base else 1.0
            assert math.isclose(ours, exact, rel_tol=1e-14)


@every_case
def test_a_move_in_place_is_the_same_bit_for_bit(case, monkeypatch):
    kind, options = case
    monkeypatch.setattr(_optimizers, "BLOCK", 7)
    model = Model(kind)
    optimizer = from_torch(kind(model.groups(kind, options), **options))
    pure = {name: p.detach().clone() for name, p in model.named_parameters()}
    slots = optimizer.init(dict(model.named_parameters()))
    ours, own_slots = tree_map(torch.clone, (pure, slots))
    large = [name for name, p in ours.items() if p.numel() > 7]
    assert large
    held = {name: ours[name] for name in large}
    for seed in range(3):
        grads = dict(Model(kind, seed=seed + 1).named_parameters())
        grads = {name: grad.detach() for name, grad in grads.items()}
        pure, slots = move(optimizer, grads, slots, pure)
        ours, own_slots = move_in_place(optimizer, grads, own_slots, ours)
        assert not grads
        for one, other in zip(
            tree_leaves((pure, slots)),
            tree_leaves((ours, own_slots)),
            strict=True,
        ):
            assert torch.equal(one, other)
    assert all(ours[name] is held[name] for name in large)


def test_a_move_in_place_with_formulas_of_ones_own():
    optimizer = Optimizer(
        lambda params: (),
        lambda grads, slots, params: ({k: -g for k, g in grads.items()}, slots),
    )
    params, grads = {"w": torch.ones(3)}, {"w": torch.full((3,), 0.25)}
    moved, _ = move_in_place(optimizer, grads, (), params)
    assert moved["w"].tolist() == [0.75] * 3


def test_a_state_can_be_handed_over_without_a_copy():
    model = Model(O.Adam)
    adam = O.Adam(model.parameters())
    optimizer, params = from_torch(adam), detached(model)
    slots = optimizer.init(dict(model.named_parameters()))
    _, slots = move(optimizer, params, slots, params)
    opt_state = OptState(slots, torch.tensor(1), torch.tensor(0))
    load_opt_state(adam, model, opt_state, copy=False)
    for name, param in model.named_parameters():
        for moment, value in slots.groups[0].moments[name].items():
            assert adam.state[param][moment].data_ptr() == value.data_ptr()
    assert adam.state[param]["step"] == 1
    assert adam.state[param]["step"].data_ptr() != slots.groups[0].step.data_ptr()


# Torch's own kernels.


every_kernel = pytest.mark.parametrize(
    "case",
    [case for case in CASES if RULES[case[0]].kernel],
    ids=lambda case: NAMES[id(case)],
)


@pytest.fixture
def calls(monkeypatch):
    """What the kernels were called with, for optimizers that are made from now on."""
    seen = []

    def counted(kernel):
        def call(params, *rest):
            seen.append(params)
            kernel(params, *rest)

        return call

    for kind, rule in RULES.items():
        if rule.kernel:
            own = rule._replace(kernel=counted(rule.kernel))
            monkeypatch.setitem(RULES, kind, own)
    return seen


def without_kernel(optimizer):
    update = optimizer.update
    rule = update.rule._replace(kernel=None)
    return optimizer._replace(update=update._replace(rule=rule))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_computes_what_the_formulas_do(case, dtype, calls):
    """And what torch does with `fused=True`, bit for bit."""
    kind, options = case
    model, other = (Model(kind, dtype) for _ in range(2))
    fused = kind(other.groups(kind, options), fused=True, **options)
    optimizer = from_torch(kind(model.groups(kind, options), **options))
    plain = without_kernel(optimizer)
    params = detached(model)
    slots = optimizer.init(dict(model.named_parameters()))
    exact, exact_slots = tree_map(torch.clone, (params, slots))
    for step in range(1, 5):
        grads = gradients(params, step)
        for name, param in other.named_parameters():
            param.grad = grads[name].clone()
        held = tree_map(torch.clone, (params, slots, grads))
        new = move(optimizer, grads, slots, params)
        for one, before in zip(
            tree_leaves((params, slots, grads)), tree_leaves(held), strict=True
        ):
            assert one.equal(before)
        exact, exact_slots = move(plain, grads, exact_slots, exact)
        params, slots = new
        fused.step()
        assert len(calls) == 2 * step
    # The formulas take a root of 0 for one of the smallest number.
    rtol, atol = (1e-12, 1e-12) if dtype is torch.float64 else (1e-5, 1e-6)
    torch.testing.assert_close(params, exact, rtol=rtol, atol=atol)
    torch.testing.assert_close(slots, exact_slots, rtol=rtol, atol=atol)
    for name, param in other.named_parameters():
        assert param.equal(params[name])
        for group in slots.groups:
            for moment, value in group.moments.get(name, {}).items():
                assert value.equal(fused.state[param][moment])


class Own(Tensor):
    """A tensor that may mean anything."""


def start(optimizer):
    params = detached(Model(O.Adam))
    return params, optimizer.init(params)


def turned(params):
    """The same numbers, the matrix column by column."""
    return {**params, "p2": params["p2"].T.contiguous().T}


@pytest.mark.parametrize(
    "change",
    [
        turned,
        lambda params: {**params, "p1": params["p1"].float()},
        lambda params: {k: t.bfloat16() for k, t in params.items()},
        lambda params: {k: t.as_subclass(Own) for k, t in params.items()},
    ],
    ids=["strides", "dtypes", "half", "subclass"],
)
def test_a_kernel_is_not_for_other_tensors(change, calls):
    optimizer = from_torch(O.Adam)
    params = change(detached(Model(O.Adam)))
    slots = optimizer.init(params)
    grads = gradients(params, 1)
    found = move(optimizer, grads, slots, params)
    assert not calls
    torch.testing.assert_close(
        found, move(without_kernel(optimizer), grads, slots, params)
    )
    move(optimizer, detached(Model(O.Adam)), *reversed(start(optimizer)))
    assert calls


def test_a_kernel_is_not_for_what_is_differentiated_or_transformed(calls):
    optimizer = from_torch(O.Adam)
    params, slots = start(optimizer)
    grads = gradients(params, 1)

    def total(lr):
        (group,) = slots.groups
        own = group._replace(hyper={**group.hyper, "lr": lr})
        moved, _ = move(optimizer, grads, Slots((own,)), params)
        return sum(t.sum() for t in moved.values())

    lr = torch.tensor(0.1, requires_grad=True)
    (slope,) = torch.autograd.grad(total(lr), lr)
    assert slope.equal(torch.func.grad(total)(lr.detach()))
    batch = torch.vmap(total)(torch.tensor([0.1, 0.2]))
    assert batch[0] != batch[1]
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(total(lr), batch[0])
    assert calls
