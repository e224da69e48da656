"""Compilation: once per shape, never for a rate, never stale; donation is honest."""

import math
import re
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import CASES, mlp
from torch import nn
from torch._inductor import config, custom_graph_pass
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import lossloop as ll
from lossloop import _compile
from lossloop._bounds import Bounds
from lossloop._compile import Compiled
from lossloop._logits import Logits
from lossloop._plan import CompileChoice, CompilePlan, count_cost, has_rnn
from lossloop._pooling import Pooling
from lossloop._products import Products
from lossloop._sums import Sums


class Backend:
    """A back end that counts how many graphs it is handed."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def start(model=None, optimizer=torch.optim.Adam, loss=None, **compiling):
    model = model or mlp()
    goal = ll.supervised(model, loss or nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, optimizer)
    step = ll.compile_step(ll.make_step(goal, optimizer), **compiling)
    return step, params, opt_state


def batch(size, seed=0):
    return CASES["mlp"].batch(size, seed)


def test_each_shape_is_compiled_once():
    backend = Backend()
    step, params, opt_state = start(backend=backend)
    for _ in range(3):
        for size in (8, 8, 5, 1):
            params, opt_state, *_ = step(params, opt_state, batch(size))
    assert backend.graphs == step.body.compilations == 3


def test_a_target_may_have_another_shape_than_the_output():
    """One that cannot be broadcast with it: the loss of one's own knows why."""

    def weighted(output, target):
        return ((output - target[:, :3]) ** 2).sum(1) * target[:, 3]

    step, *state = start(loss=weighted, backend="eager")
    plain = ll.make_step(ll.supervised(mlp(), weighted), torch.optim.Adam)
    data = torch.randn(6, 5), torch.rand(6, 4)
    assert torch.equal(step(*state, data)[2], plain(*state, data)[2])


def test_more_shapes_than_the_compiler_keeps_entries():
    backend = Backend()
    step, params, opt_state = start(backend=backend)
    for size in range(1, 13):
        params, opt_state, *_ = step(params, opt_state, batch(size))
    assert backend.graphs == 12


def test_twenty_models_compile_in_one_process():
    backend = Backend()
    steps = [start(nn.Linear(5, 3 + i), backend=backend) for i in range(20)]
    for step, params, opt_state in steps:
        for _ in range(2):
            params, opt_state, *_ = step(params, opt_state, batch(4))
    assert backend.graphs == 20


def test_rates_and_betas_do_not_recompile():
    backend = Backend()
    optimizer = torch.optim.AdamW(mlp().parameters(), lr=1.0)
    step, params, opt_state = start(optimizer=torch.optim.AdamW, backend=backend)
    losses = set()
    for i in range(10):
        group = opt_state.slots.groups[0]
        hyper = {name: value * 0.9 for name, value in group.hyper.items()}
        groups = (group._replace(hyper=hyper),)
        opt_state = opt_state._replace(slots=opt_state.slots._replace(groups=groups))
        params, opt_state, loss_sum, _ = step(params, opt_state, batch(8, i))
        losses.add(loss_sum.item())
    assert backend.graphs == 1
    assert len(losses) == 10
    assert optimizer.param_groups[0]["lr"] == 1.0


class ReadsItsScale(nn.Module):
    """Whose step has a number in it that a tensor held."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x):
        return self.layer(x) * self.scale.item()


@pytest.mark.parametrize("kind", [mlp, ReadsItsScale])
def test_a_graph_is_traced_again_only_if_it_reads_a_number(kind):
    graphs, back_end = [], torch._dynamo.lookup_backend("aot_eager")

    def counted(graph, inputs):
        graphs.append(graph)
        return back_end(graph, inputs)

    model, data = kind(), (torch.randn(6, 5), torch.randint(0, 3, (6,)))
    step, params, opt_state = start(model, backend=counted)
    plain = ll.make_step(ll.supervised(model, nn.CrossEntropyLoss()), torch.optim.Adam)
    for scale in (2.0, 0.5, -3.0):
        if "scale" in params:
            params["scale"] = torch.tensor(scale, dtype=torch.float64)
        expected = plain(params, opt_state, data)
        params, opt_state, loss_sum, _ = step(params, opt_state, data)
        assert torch.equal(loss_sum, expected[2])
    assert len(graphs) == (2 if "scale" in params else 1)


def test_values_that_the_loss_refers_to_are_not_stale():
    scale = 1.0
    step, params, opt_state = start(
        loss=lambda out, y: (
            scale * nn.functional.cross_entropy(out, y, reduction="none")
        ),
        backend="aot_eager",
    )
    once = step(params, opt_state, batch(8))[2]
    scale = 3.0
    assert step(params, opt_state, batch(8))[2].item() == pytest.approx(3 * once.item())


@pytest.mark.parametrize("case", ["conv_net", "tied", "frozen"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.NAdam])
def test_donating_is_the_same_arithmetic_in_place(case, optimizer):
    model = CASES[case].model().double()
    goal = ll.supervised(model, CASES[case].loss.double())
    pure = ll.make_step(goal, optimizer)
    donating = ll.compile_step(pure, donate=True, backend="aot_eager")
    state = ll.init(goal, optimizer)
    given = ll.init(goal, optimizer)
    addresses = [t.data_ptr() for t in pytree.tree_leaves((given[0], given[1].slots))]
    kept = given
    for i in range(4):
        x, y = CASES[case].batch(seed=i)
        data = (x.double() if x.is_floating_point() else x, y)
        *state, loss_sum, n = pure(*state, data)
        *given, given_sum, given_n = donating(*given, data)
        torch.testing.assert_close((given_sum, given_n), (loss_sum, n))
    torch.testing.assert_close(given[0], state[0], rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(given[1].slots.groups, state[1].slots.groups, strict=True):
        torch.testing.assert_close(ours.step, theirs.step)
        torch.testing.assert_close(ours.moments, theirs.moments, rtol=1e-9, atol=1e-12)
    assert kept[0] is given[0]
    after = pytree.tree_leaves((given[0], given[1].slots))
    assert addresses == [t.data_ptr() for t in after]


def test_a_zero_dimensional_float64_parameter_is_donated():
    """torch loses a compiled write into such an input; see `_write`."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            return x * self.log_scale.exp()

    goal = ll.supervised(Scale(), nn.MSELoss())
    optimizer = ll.optim.SGD(lr=0.1)
    params, opt_state = ll.init(goal, optimizer)
    step = ll.compile_step(
        ll.make_step(goal, optimizer), donate=True, backend="aot_eager"
    )
    x = torch.ones(3, dtype=torch.float64)
    for _ in range(100):
        params, opt_state, *_ = step(params, opt_state, (x, 2 * x))
    assert params["log_scale"].item() == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.slow
def test_generated_code_donates_and_repeats():
    """One model through the real back end: pure, donating and eager agree."""
    model = CASES["conv_net"].model()
    model[4].p = 0.0  # generated code draws other random numbers
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    optimizer = ll.optim.SGD(lr=0.1, momentum=0.9)
    eager = ll.make_step(goal, optimizer)
    states = {
        step: ll.init(goal, optimizer)
        for step in (eager, ll.compile_step(eager), ll.compile_step(eager, donate=True))
    }
    for i in range(5):
        data = CASES["conv_net"].batch(seed=i)
        states = {step: step(*state, data)[:2] for step, state in states.items()}
    expected, *others = (params for params, _ in states.values())
    for params in others:
        torch.testing.assert_close(params, expected, rtol=1e-4, atol=1e-6)


def test_no_graph_is_kept_even_if_parameters_ask_for_gradients():
    step, params, opt_state = start(backend="aot_eager")
    params = {name: t.requires_grad_() for name, t in params.items()}
    new, state, loss_sum, n = step(params, opt_state, batch(8))
    tensors = pytree.tree_leaves((new, state, loss_sum, n))
    assert all(t.grad_fn is None for t in tensors)


def test_any_step_of_the_same_signature_compiles():
    def step(params, opt_state, batch):
        w = params["w"] - 0.1 * (params["w"] - batch).mean()
        return {"w": w}, opt_state + 1, ((w - batch) ** 2).sum(), torch.tensor(4)

    backend = Backend()
    compiled = ll.compile_step(step, backend=backend)
    params, count = {"w": torch.zeros(4)}, torch.zeros(1)
    for _ in range(3):
        params, count, *_ = compiled(params, count, torch.ones(4))
    assert backend.graphs == 1
    assert count == 3
    assert (
        ll.compile_step(step, donate=True, backend="aot_eager")(
            params, count, torch.ones(4)
        )[0]["w"]
        is params["w"]
    )
    assert count == 4


def test_mistakes_of_the_caller_are_reported_in_their_own_words():
    def wrong(output, target):
        raise ArithmeticError("three is not four")

    step, params, opt_state = start(loss=wrong, backend="aot_eager")
    with pytest.raises(ArithmeticError, match="three is not four"):
        step(params, opt_state, batch(4))


def test_what_cannot_be_one_graph_says_so():
    def reads(output, target):
        losses = nn.functional.cross_entropy(output, target, reduction="none")
        return losses * 2 if losses.sum() > 0 else losses

    step, params, opt_state = start(loss=reads, backend="aot_eager")
    with pytest.raises(RuntimeError, match="cannot be compiled as one graph") as caught:
        step(params, opt_state, batch(4))
    assert "compile=False" in str(caught.value)


def test_recurrent_layers_are_explained():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 3, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0][:, -1]

    assert has_rnn(Last())
    assert not has_rnn(mlp())
    step, params, opt_state = start(Last(), backend="aot_eager")
    with pytest.raises(RuntimeError, match="allow_rnn"):
        step(params, opt_state, (torch.randn(2, 4, 5), torch.tensor([0, 1])))


def test_batches_hold_tensors_only():
    goal = ll.objective(mlp(), lambda model, b: (model(b["x"]).sum(), b["n"]))
    params, opt_state = ll.init(goal, torch.optim.SGD)
    step = ll.compile_step(ll.make_step(goal, torch.optim.SGD), backend="aot_eager")
    with pytest.raises(TypeError, match=r"batch\['n'\] is a int"):
        step(params, opt_state, {"x": torch.ones(2, 5), "n": 2})


def test_eval_steps_compile():
    backend = Backend()
    goal = ll.supervised(CASES["conv_net"].model(), nn.CrossEntropyLoss())
    params = goal.init()
    eager = ll.make_eval_step(goal)
    compiled = ll.compile_step(eager, backend=backend)
    for size in (6, 6, 3):
        data = CASES["conv_net"].batch(size)
        torch.testing.assert_close(compiled(params, data), eager(params, data))
    assert backend.graphs == 2
    with pytest.raises(ValueError, match="for training steps"):
        ll.compile_step(eager, donate=True)
    with pytest.raises(ValueError, match="compiled already"):
        ll.compile_step(compiled)


def momentum_beside(extra, then):
    """An optimizer whose state has something beside its tensors."""

    def start(params):
        return {name: torch.zeros_like(t) for name, t in params.items()}, extra

    def update(grads, state, params):
        moments = {name: 0.9 * state[0][name] + g for name, g in grads.items()}
        updates = {name: -0.1 * m for name, m in moments.items()}
        return updates, (moments, then(state[1]))

    return ll.Optimizer(start, update)


@pytest.mark.parametrize("extra", [None, 3, 0.5, math.nan, "name", (), torch.float32])
def test_a_state_may_hold_what_is_no_tensor(extra):
    optimizer = momentum_beside(extra, lambda old: old)
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    step, (params, opt_state) = ll.make_step(goal, optimizer), ll.init(goal, optimizer)
    donating = ll.compile_step(step, donate=True, backend="aot_eager")
    state = pytree.tree_map_only(torch.Tensor, torch.clone, [params, opt_state])
    for _ in range(3):
        params, opt_state, loss_sum, _ = step(params, opt_state, batch(8))
        *state, found, _ = donating(*state, batch(8))
        assert found == loss_sum
    assert repr(state[1].slots[1]) == repr(opt_state.slots[1]) == repr(extra)
    data = DataLoader(TensorDataset(*batch(16)), 8)
    ll.fit(
        *(goal.model, nn.CrossEntropyLoss(), optimizer, data),
        **{"epochs": 1, "progress": False, "compile": False},
    )


def test_what_changes_in_a_state_must_be_a_tensor():
    optimizer = momentum_beside(3, lambda old: old + 1)
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    step, state = ll.make_step(goal, optimizer), ll.init(goal, optimizer)
    assert step(*state, batch(8))[1].slots[1] == 4
    what = "3 in the state became 4: what changes must be a tensor"
    with pytest.raises(RuntimeError, match=what):
        ll.compile_step(step, donate=True, backend="aot_eager")(*state, batch(8))
    epoch = ll.compile_fold(step, backend="aot_eager")
    with pytest.raises(RuntimeError, match=what):
        epoch(*state, DataLoader(TensorDataset(*batch(16)), 8))
    assert epoch.why_not == what


@dataclass(eq=False)
class Moments:
    """A container that torch does not know."""

    by_name: dict[str, torch.Tensor]


def in_a(container):
    """An optimizer that keeps its last gradients in one."""

    def start(params):
        return container({name: torch.zeros_like(t) for name, t in params.items()})

    def update(grads, state, params):
        return {name: -0.1 * g for name, g in grads.items()}, container(grads)

    return ll.Optimizer(start, update)


def growing(params):
    return ({name: torch.zeros_like(t) for name, t in params.items()},)


def grown(grads, state, params):
    return {name: -0.1 * g for name, g in grads.items()}, (*state, torch.ones(()))


def warm(params):
    return {"warm": torch.ones(()), "steps": torch.zeros(())}


def warmed(grads, state, params):
    return {name: -0.1 * g for name, g in grads.items()}, {"steps": state["steps"]}


CHANGING = {
    "grows": (ll.Optimizer(growing, grown), "1 parts in the state became 2"),
    "loses a key": (
        ll.Optimizer(warm, warmed),
        r"\['warm', 'steps'\] in .* \['steps'\]",
    ),
    "own container": (in_a(Moments), r"Moments.* in the state became .*Moments"),
    "numpy": (in_a(lambda params: np.ones(3)), r"array\(.* in the state became array"),
}


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("name", CHANGING)
def test_a_state_of_changing_form_trains_eagerly_and_is_told(name, folds, monkeypatch):
    optimizer, what = CHANGING[name]
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    step, state = ll.make_step(goal, optimizer), ll.init(goal, optimizer)
    expected = step(*state, batch(8))[0]
    compiled = ll.compile_step(step, donate=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=what):
        compiled(*state, batch(8))
    data = DataLoader(TensorDataset(*batch(8)), 8)
    worth = CompileChoice(compiled=True, reason="it is worth it")
    monkeypatch.setattr(CompilePlan, "_judge", lambda *given: worth)
    result = ll.fit(
        *(goal.model, nn.CrossEntropyLoss(), optimizer, data),
        **{"epochs": 1, "progress": False, "compile": "auto"},
        on_step=None if folds else lambda record: None,
    )
    assert same(result.params, expected)
    assert not result.compiled.compiled
    assert re.search(f"cannot be compiled: .*{what}", result.compiled.reason)


def test_a_queue_of_gradients_is_compiled():
    def start(params):
        zeros = [{k: torch.zeros_like(t) for k, t in params.items()} for _ in range(2)]
        return deque(zeros, maxlen=2)

    def update(grads, state, params):
        last = deque([state[1], grads], maxlen=2)
        return {k: -0.1 * (last[0][k] + g) for k, g in grads.items()}, last

    optimizer = ll.Optimizer(start, update)
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    step, state = ll.make_step(goal, optimizer), ll.init(goal, optimizer)
    donating = ll.compile_step(step, donate=True, backend="aot_eager")
    copied = pytree.tree_map_only(torch.Tensor, torch.clone, state)
    for _ in range(3):
        *state, _, _ = step(*state, batch(8))
        *copied, _, _ = donating(*copied, batch(8))
        assert same(copied, state)
    assert donating.body.compilations == 1


def test_without_memory_a_step_that_donates_is_not_made_again():
    """It may have written something already."""
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    step, state = ll.make_step(goal, torch.optim.SGD), ll.init(goal, torch.optim.SGD)
    failing = torch.OutOfMemoryError("no memory is left")

    def backend(graph, inputs):
        def run(*args):
            raise failing

        return run

    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        ll.compile_step(step, donate=True, backend=backend)(*state, batch(8))
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        ll.compile_step(step, backend=backend)(*state, batch(8))


def plan_of(wish, epochs, batches, width=16):
    model = nn.Sequential(nn.Linear(5, width), nn.Linear(width, 3))
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, torch.optim.Adam)
    body = ll.make_step(goal, torch.optim.Adam).body.function
    plan = CompilePlan(body, wish=wish, epochs=epochs, batches=batches)
    return plan, lambda size: (params, opt_state.carry, batch(size))


def test_short_runs_are_not_compiled_and_long_ones_are():
    plan, args = plan_of("auto", 1, 20)
    assert not plan.worth("shape", args(8))
    assert not plan.choice.compiled
    assert "20 steps planned" in plan.choice.reason
    plan, args = plan_of("auto", 1000, 1000)
    assert plan.worth("shape", args(8))
    assert plan.choice.compiled
    assert "1000000 steps planned" in plan.choice.reason


def test_bigger_steps_are_compiled_sooner():
    plan, args = plan_of("auto", 5, 100)
    assert not plan.worth("shape", args(8))
    plan, args = plan_of("auto", 5, 100, width=2**17)
    assert plan.worth("shape", args(512))


def test_an_odd_batch_is_compiled_only_if_it_recurs_often():
    plan, args = plan_of(True, 50, 100)
    assert plan.worth("full", args(8))
    assert plan.choice[:2] == (True, "compile=True")
    assert not plan.worth("odd", args(5))
    assert plan.choice.compiled
    plan, args = plan_of(True, 10**7, 100)
    assert plan.worth("full", args(8))
    assert plan.worth("odd", args(5))


def test_what_was_decided_is_known_however_often_a_run_is_resumed():
    plan, args = plan_of(True, 10**7, 100)
    assert plan.worth("full", args(8))
    assert plan.worth("odd", args(5))
    for resumed in range(1, 4):  # few epochs are left, for which none would be compiled
        before, (plan, args) = plan, plan_of("auto", resumed + 1, 1)
        plan.resume(resumed, before.state())
        assert plan.state() == before.state(), "no batch has come yet"
    assert plan.is_first("full")
    assert not plan.is_first("odd")
    assert plan.worth("odd", args(5))
    before, (plan, args) = plan, plan_of("auto", 5, 1)
    plan.resume(4, before.state())
    assert plan.is_first("full")
    assert plan.worth("full", args(8)), "though only the odd one came in the last"
    assert plan.choice[:2] == (True, "compile=True")


def test_on_another_machine_it_is_decided_anew_for_the_epochs_that_are_left():
    plan, args = plan_of("auto", 1000, 1000)
    plan.resume(999, None)
    assert not plan.worth("full", args(8))
    assert "1000 steps planned" in plan.choice.reason


def test_counting_leaves_generators_alone_and_repeats():
    goal = ll.supervised(CASES["conv_net"].model(), CASES["conv_net"].loss)
    params, opt_state = ll.init(goal, torch.optim.SGD)
    body = ll.make_step(goal, torch.optim.SGD).body.function
    state = torch.get_rng_state()
    costs = {
        count_cost(body, (params, opt_state.carry, CASES["conv_net"].batch()))
        for _ in range(2)
    }
    assert torch.equal(torch.get_rng_state(), state)
    (cost,) = costs
    assert cost.operators > 50
    activations = 6 * 4 * 16  # of each of the layers before the last, and their slopes
    assert 8 * activations < cost.elements < 40 * activations


@pytest.mark.parametrize("case", ["conv_net", "encoder"])
def test_a_large_step_is_counted_without_data(case, monkeypatch):
    monkeypatch.setattr("lossloop._plan.LARGEST_COUNTED_WITH_DATA", 10)
    goal = ll.supervised(CASES[case].model(), CASES[case].loss)
    # Without data Adam is counted as formulas, for which torch has a kernel.
    params, opt_state = ll.init(goal, torch.optim.NAdam)
    body = ll.make_step(goal, torch.optim.NAdam).body.function
    args = params, opt_state.carry, CASES[case].batch()
    called = []

    def seen(*args):
        called.append(type(next(iter(args[0].values()))))
        return body(*args)

    cost = count_cost(seen, args)
    # Nor does a gate need data, which is read on the host where there are values.
    _, gated = ll.init(goal, torch.optim.NAdam, skip_nonfinite=0)
    count_cost(seen, (params, gated.carry, CASES[case].batch()))
    monkeypatch.undo()
    assert cost == count_cost(seen, args)
    kinds = [kind.__name__ for kind in called]
    assert kinds == ["FakeTensor", "FakeTensor", "Tensor"]


def test_a_large_step_that_reads_a_value_is_counted_with_data(monkeypatch):
    monkeypatch.setattr("lossloop._plan.LARGEST_COUNTED_WITH_DATA", 10)
    cost = count_cost(lambda x: x * x.sum().item(), (torch.ones(20),))
    assert cost.operators == 3


def test_the_choice_is_made_once_and_kept():
    plan, args = plan_of("auto", 200, 2)
    for _ in range(200):
        for _ in range(2):
            plan.worth("shape", args(8))
        plan.end_epoch()
    assert "400 steps planned" in plan.choice.reason


def test_epochs_of_unknown_length_are_judged_by_what_has_come():
    plan, args = plan_of("auto", 10**6, None)
    assert plan.worth("shape", args(8))
    plan, args = plan_of("auto", 1, None)
    assert not any(plan.worth("shape", args(8)) for _ in range(200))


def test_what_cannot_be_compiled_runs_eagerly_if_that_is_left_open():
    def named(model, batch):
        return model(batch["x"]).square().sum(), len(batch["name"])

    def reads(model, batch):
        out = model(batch["x"])
        return (out.sum() if out.detach().sum().item() > 0 else -out.sum()), 2

    for function, words in (
        (named, r"batch['name'] is a str"),
        (reads, "data-dependent"),
    ):
        goal = ll.objective(mlp(), function)
        params, opt_state = ll.init(goal, torch.optim.SGD)
        eager = ll.make_step(goal, torch.optim.SGD)
        plan = CompilePlan(eager.body.function, wish="auto", epochs=10**6, batches=10)
        compiled = Compiled(eager.body.function, plan=plan, backend="aot_eager")
        step = type(eager)(compiled)
        data = {"x": torch.ones(2, 5)} | ({"name": "ab"} if function is named else {})
        for _ in range(2):
            torch.testing.assert_close(
                step(params, opt_state, data)[0], eager(params, opt_state, data)[0]
            )
        assert words in plan.choice.reason
        assert not plan.choice.compiled


def test_randomness_that_starts_later_is_seeded():
    class Anneal(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x):
            return nn.functional.dropout(self.linear(x), rate)

    rate = 0.0
    step, params, opt_state = start(Anneal(), backend="aot_eager")
    step(params, opt_state, batch(8))
    rate = 0.5
    state = torch.get_rng_state()
    first = step(params, opt_state, batch(8))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = step(params, opt_state, batch(8))
    assert first[2] == again[2]
    later = step(params, opt_state._replace(step=opt_state.step + 1), batch(8))
    assert first[2] != later[2]
    rate = 0.0
    assert step(params, opt_state, batch(8))[2] != first[2]


class Scaled(nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return self.linear(x) * self.factor * outer()


def outer():
    return 1.0


def test_what_a_model_refers_to_is_not_stale(monkeypatch):
    step, params, opt_state = start(Scaled(), backend="aot_eager")
    goal = ll.supervised(Scaled(), nn.CrossEntropyLoss())
    eager = ll.make_step(goal, torch.optim.Adam)

    def agreed():
        losses = [s(params, opt_state, batch(8))[2].item() for s in (step, eager)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        return losses[0]

    first = agreed()
    monkeypatch.setattr(Scaled, "factor", 3.0)
    second = agreed()
    monkeypatch.setitem(globals(), "outer", lambda: 5.0)
    assert len({first, second, agreed()}) == 3


class Child(Scaled):
    """Inherits the factor."""


@pytest.mark.parametrize("kind", [Scaled, Child])
def test_class_attributes_are_not_stale(kind, monkeypatch):
    step, params, opt_state = start(kind(), backend="aot_eager")
    first = step(params, opt_state, batch(8))[2]
    monkeypatch.setattr(Scaled, "factor", 3.0)
    assert step(params, opt_state, batch(8))[2] != first


def test_one_tensor_in_two_places_is_another_graph():
    model = nn.Linear(5, 5)
    step, params, opt_state = start(model, loss=nn.MSELoss(), backend="aot_eager")
    eager = ll.make_step(ll.supervised(model, nn.MSELoss()), torch.optim.Adam)
    x = torch.randn(4, 5)
    for data in ((x, x), (x + 1, x), (x, x)):
        expected = eager(params, opt_state, data)[2]
        assert step(params, opt_state, data)[2].item() == pytest.approx(expected.item())


def test_donation_keeps_apart_what_is_an_old_tensor_of_another_place():
    def step(params, slow, batch):
        moved = {"w": params["w"] - 0.1 * batch}
        return moved, {"before": params["w"]}, batch.sum(), torch.tensor(1)

    donating = ll.compile_step(step, donate=True, backend="aot_eager")
    params, slow = {"w": torch.ones(3)}, {"before": torch.zeros(3)}
    for k in range(3):
        params, slow, *_ = donating(params, slow, torch.ones(3))
        assert slow["before"].tolist() == pytest.approx([1 - 0.1 * k] * 3)
        assert params["w"].tolist() == pytest.approx([0.9 - 0.1 * k] * 3)


def test_too_many_changes_are_explained():
    def loss(output, target):
        return scale * nn.functional.cross_entropy(output, target, reduction="none")

    scale = 0.0
    step, params, opt_state = start(loss=loss, backend="aot_eager")
    for value in range(8):
        scale = float(value)
        step(params, opt_state, batch(8))
    scale = 20.0
    with pytest.raises(RuntimeError, match="Make the number a tensor"):
        step(params, opt_state, batch(8))


@pytest.mark.parametrize(("largest", "together"), [(1e7, True), (10, False)])
def test_a_step_is_compiled_with_our_passes_and_a_large_one_update_by_update(
    monkeypatch, largest, together
):
    patches = {}

    def compile_fx(graph, inputs, config_patches):
        patches.update(config_patches)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr("lossloop._compile.LARGEST_FUSED", largest)
    goal = ll.supervised(CASES["mlp"].model(), CASES["mlp"].loss)
    step = ll.compile_step(ll.make_step(goal, torch.optim.Adam))
    step(*ll.init(goal, torch.optim.Adam), CASES["mlp"].batch())

    def kinds(name):
        return [type(each) for each in patches[name].passes]

    assert kinds("joint_custom_post_pass") == [Pooling, Sums]
    assert "realize_opcount_threshold" not in patches
    assert kinds("post_grad_custom_pre_pass") == [Bounds]
    assert kinds("post_grad_custom_post_pass") == [Products]
    assert together == ("score_fusion_memory_threshold" not in patches)
    graph = torch.fx.symbolic_trace(nn.Identity())
    _compile.inductor(graph, [torch.ones(2, 2, device="meta")])
    assert kinds("joint_custom_post_pass") == [Logits]
    assert patches["realize_opcount_threshold"] > 30


@pytest.mark.parametrize(
    "name",
    [
        "joint_custom_post_pass",
        "post_grad_custom_pre_pass",
        "post_grad_custom_post_pass",
    ],
)
def test_passes_of_the_callers_own_are_called_too(name):
    seen = []
    x = torch.arange(4.0)
    with config.patch({name: seen.append}):
        found = torch.compile(lambda x: (x * x).sum(), backend=_compile.inductor)(x)
    assert found == x.square().sum()
    assert len(seen) == 1


class Told(getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", object)):
    """A pass that is told whether a graph is for inference alone."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, is_inference):
        self.seen.append(is_inference)

    def uuid(self):  # it is not to be found in the cache
        return None


@pytest.mark.skipif(Told.__base__ is object, reason="this torch has no such passes")
@pytest.mark.parametrize("where", ["pre", "post"])
def test_passes_that_are_told_of_inference_are(where):
    x = torch.arange(4.0)
    name, theirs = f"post_grad_custom_{where}_pass", (Told(), Told())
    with config.patch({name: theirs[0]}):
        torch.compile(lambda x: x.exp().sum(), backend="inductor")(x)
    with config.patch({name: theirs[1]}):
        torch.compile(lambda x: x.exp().sum(), backend=_compile.inductor)(x)
    assert theirs[0].seen == theirs[1].seen == [True]


# --- where torch.compile leaves it as it is -------------------------------------------


@contextmanager
def dynamo_disabled():
    with torch._dynamo.config.patch(disable=True):
        yield


@contextmanager
def run_eagerly():
    with torch.compiler.set_stance("force_eager"):
        yield


LEFT_ALONE = [dynamo_disabled, run_eagerly, lambda: FlopCounterMode(display=False)]


@pytest.mark.parametrize("left_alone", LEFT_ALONE)
def test_what_is_not_compiled_trains_all_the_same(left_alone):
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    step, state = ll.make_step(goal, torch.optim.SGD), ll.init(goal, torch.optim.SGD)
    data = DataLoader(TensorDataset(*batch(16)), 8)
    expected = ll.fold(step, *state, data)
    pure = ll.compile_step(step, backend="aot_eager")
    donating = ll.compile_step(step, donate=True, backend="aot_eager")
    epoch = ll.compile_fold(step, backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with left_alone():
        for compiled in (pure, donating):
            copied = pytree.tree_map_only(torch.Tensor, torch.clone, state)
            assert same(ll.fold(compiled, *copied, data), expected)
        assert same(epoch(*state, data), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def same(one, other):
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)


def test_it_is_compiled_once_that_is_possible_and_nothing_piles_up():
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    step, state = ll.make_step(goal, torch.optim.SGD), ll.init(goal, torch.optim.SGD)
    compiled = ll.compile_step(step, backend="aot_eager")
    with run_eagerly():
        for _ in range(3):
            assert same(compiled(*state, batch(8)), step(*state, batch(8)))
    assert len(compiled.body._graphs) == 1
    assert compiled.body.compilations == 0
    compiled(*state, batch(8))
    assert compiled.body.compilations == 1


@pytest.mark.parametrize("folds", [True, False])
def test_a_run_that_is_switched_off_while_it_goes_on_says_so(folds):
    torch.manual_seed(0)
    model = mlp() if folds else nn.Sequential(nn.Dropout(0.1), mlp())
    data = DataLoader(TensorDataset(*batch(16)), 8)

    def off(*record):
        torch.compiler.set_stance("force_eager")

    try:
        result = ll.fit(
            *(model, nn.CrossEntropyLoss(), torch.optim.SGD, data),
            **{"epochs": 3, "progress": False, "compile": True, "on_epoch": off},
        )
    finally:
        torch.compiler.set_stance("default")
    assert not result.compiled.compiled
    assert "compiled at first, and then no more: torch.comp" in result.compiled.reason


@pytest.mark.parametrize("left_alone", LEFT_ALONE)
def test_a_fold_that_is_not_compiled_says_why(left_alone):
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    step = ll.make_step(goal, torch.optim.SGD)
    epoch = ll.compile_fold(step, backend="aot_eager")
    data = DataLoader(TensorDataset(*batch(16)), 8)
    state = ll.init(goal, torch.optim.SGD)
    expected = ll.fold(step, *state, data)
    with left_alone():
        assert same(epoch(*state, data), expected)
    assert "it was switched off" in epoch.why_not
    with left_alone():
        result = ll.fit(
            *(goal.model, nn.CrossEntropyLoss(), torch.optim.SGD, data),
            **{"epochs": 1, "progress": False, "compile": True},
        )
    assert not result.compiled.compiled
    assert "it was switched off" in result.compiled.reason
    assert same(result.history["train_loss"], [expected[2].value()])


def test_what_was_compiled_runs_eagerly_while_that_is_asked_for():
    """With the numbers that are drawn seeded as ever."""

    def loss(output, target):
        output = nn.functional.dropout(output, rate)
        return nn.functional.cross_entropy(output, target, reduction="none")

    rate = 0.0
    goal = ll.supervised(mlp(), loss)
    step, state = ll.make_step(goal, torch.optim.SGD), ll.init(goal, torch.optim.SGD)
    compiled = ll.compile_step(step, backend="aot_eager")
    compiled(*state, batch(8))
    generator, rate = torch.get_rng_state(), 0.5
    with torch.compiler.set_stance("force_eager"):
        found = [compiled(*state, batch(8)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), generator)
    assert same(found[0], found[1])
    assert same(found[0], step(*state, batch(8)))


# --- what cannot be compiled any more -------------------------------------------------


@pytest.mark.parametrize("donate", [False, True])
def test_what_can_be_compiled_no_longer_is_told_or_runs_eagerly(donate):
    """The graph of before is there; what has changed asks for one that cannot be."""

    def loss(output, target):
        losses = nn.functional.cross_entropy(output, target, reduction="none")
        return losses if not reads or float(losses.detach().sum()) > 0 else -losses

    reads = False
    goal = ll.supervised(mlp(), loss)
    step, state = ll.make_step(goal, torch.optim.SGD), ll.init(goal, torch.optim.SGD)
    expected = step(*state, batch(8))
    plan = CompilePlan(step.body.function, wish="auto", epochs=10**7, batches=100)
    body = step.body.function
    body = Compiled(body, donate=2 * donate, plan=plan, backend="aot_eager")
    planned = type(step)(body)
    by_hand = ll.compile_step(step, donate=donate, backend="aot_eager")
    for compiled in (planned, by_hand):
        copied = pytree.tree_map_only(torch.Tensor, torch.clone, state)
        compiled(*copied, batch(8))
    assert plan.choice.compiled
    reads = True
    copied = pytree.tree_map_only(torch.Tensor, torch.clone, state)
    with pytest.raises(
        RuntimeError, match="cannot be compiled as one graph: UserError"
    ):
        by_hand(*copied, batch(8))
    assert same(copied, state)
    for _ in range(2):
        copied = pytree.tree_map_only(torch.Tensor, torch.clone, state)
        assert same(planned(*copied, batch(8)), expected)
    assert not plan.choice.compiled
    assert "cannot be compiled: UserError" in plan.choice.reason
    assert body.compilations == 0
