"""Kernels captured once and replayed: where the tensors lie, and what is drawn.

On the CPU with a recorder in the place of CUDA's, on a GPU with CUDA's own.
"""

import copy
import gc
import weakref

import pytest
import torch
from cases import CASES, mlp
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop import _compile, _replay, _scan
from lossloop._compile import Compiled
from lossloop._plan import CompilePlan
from lossloop._replay import MOST_MOVES, Captured, Pool

X, Y = CASES["mlp"].batch(22)
LOSS = nn.CrossEntropyLoss()
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Recorder(Pool):
    """Records a call as CUDA would: by the tensors it reads and writes."""

    captures = replays = 0
    refuses = False

    def serves(self, args):
        return True

    def capture(self, function, args):
        if Recorder.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        Recorder.captures += 1
        with torch.random.fork_rng([]):  # nothing runs while CUDA captures
            outputs = function(*map(torch.clone, args))

        def replay():
            Recorder.replays += 1
            new = pytree.tree_leaves(function(*args))
            for old, result in zip(pytree.tree_leaves(outputs), new, strict=True):
                old.copy_(result)

        return Captured(replay, outputs)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(_compile, "Pool", Recorder)
    monkeypatch.setattr(_scan, "Pool", Recorder)
    monkeypatch.setattr(_scan, "loops", lambda device: False)
    for name, value in {"captures": 0, "replays": 0, "refuses": False}.items():
        monkeypatch.setattr(Recorder, name, value)
    return Recorder


def dropout():
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 3))


def norm():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def parts(model=mlp, optimizer=torch.optim.RMSprop, **options):
    # Not Adam, whose eager step is made by torch's own kernel, which rounds otherwise.
    torch.manual_seed(0)
    goal = ll.supervised(model(), LOSS)
    return ll.make_step(goal, optimizer, **options), ll.init(goal, optimizer)


def batches(count, size=4):
    draw = torch.Generator().manual_seed(1)
    order = torch.randint(len(X), (count, size), generator=draw)
    return [(X[rows], Y[rows]) for rows in order]


def losses(step, state, data):
    """The losses of some steps, each read when all are made, and the state."""
    found, params, opt_state = [], *state
    for batch in data:
        params, opt_state, loss_sum, n = step(params, opt_state, batch)
        found += [loss_sum, n]
    return found, (params, opt_state)


def same(one, other):
    leaves, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return all(
        a is b is None or torch.equal(a, b) for a, b in zip(leaves, others, strict=True)
    )


def donating(step):
    return ll.compile_step(step, donate=True, backend="aot_eager")


@pytest.mark.parametrize(
    ("model", "options"), [(mlp, {"clip_grad_norm": 0.1}), (dropout, {}), (norm, {})]
)
def test_a_replayed_step_is_the_step(model, options, recorder):
    step, state = parts(model, **options)
    expected = losses(
        ll.compile_step(step, backend="aot_eager"), copy.deepcopy(state), batches(6)
    )
    assert recorder.captures == 0, "a pure step is not captured"
    found = losses(donating(step), state, batches(6))
    assert same(found, expected)
    assert (recorder.captures, recorder.replays) == (1, 5)


def test_the_state_stays_where_it_is(recorder):
    step, state = parts()
    before = [t.data_ptr() for t in pytree.tree_leaves(state[0])]
    _, (params, _) = losses(donating(step), state, batches(4))
    assert [t.data_ptr() for t in pytree.tree_leaves(params)] == before


def test_rates_that_change_are_read(recorder):
    step, state = parts(optimizer=torch.optim.SGD)
    donated, again = donating(step), copy.deepcopy(state)

    def train(one, state):
        for number, batch in enumerate(batches(8)):
            params, opt_state, *_ = one(*state, batch)
            (group,) = opt_state.slots.groups
            hyper = group.hyper | {"lr": torch.full_like(group.hyper["lr"], number)}
            groups = (group._replace(hyper=hyper),)
            slots = opt_state.slots._replace(groups=groups)
            state = params, opt_state._replace(slots=slots)
        return state

    assert same(train(donated, state), train(step, again))
    assert recorder.captures == 1, "from the second step on, they are copied"


def test_another_run_leaves_the_first_alone(recorder):
    """The state of one must not be written into that of the other."""
    step, state = parts()
    other = copy.deepcopy(state)
    expected = losses(step, copy.deepcopy(state), batches(5))
    donated = donating(step)
    first = losses(donated, state, batches(5))
    second = losses(donated, other, batches(5))
    assert same(first, expected)
    assert same(second, expected)
    assert recorder.captures == 2


def test_a_state_that_always_moves_is_captured_no_more(recorder):
    step, state = parts()
    donated = donating(step)
    for batch in batches(2 * MOST_MOVES):
        donated(*copy.deepcopy(state), batch)
    assert recorder.captures == 0
    assert "again and again" in donated.body.why_not_replayed
    found = losses(donated, copy.deepcopy(state), batches(3))
    assert same(found, losses(step, state, batches(3)))


def test_captures_that_pay_are_no_waste(recorder, monkeypatch):
    monkeypatch.setattr(_replay, "REPLAYS_FOR_A_MOVE", 5)
    step, state = parts()
    donated = donating(step)
    for _ in range(2 * MOST_MOVES):
        losses(donated, copy.deepcopy(state), batches(7))
    assert donated.body.why_not_replayed is None
    assert recorder.captures == 2 * MOST_MOVES


def test_each_shape_is_captured(recorder):
    step, state = parts()
    data = [*batches(2), *batches(2, 3), *batches(2), *batches(2, 3)]
    found = losses(donating(step), copy.deepcopy(state), data)
    assert same(found, losses(step, state, data))
    assert recorder.captures == 2


def test_a_batch_with_gaps_is_copied_with_its_gaps(recorder):
    """The code is compiled for its strides."""
    step, state = parts()
    tables = [torch.cat([x, x], 1)[:, :5] for x, _ in batches(4)]
    gaps = [(x, y) for x, (_, y) in zip(tables, batches(4), strict=True)]
    donated = donating(step)
    assert same(
        losses(donated, copy.deepcopy(state), gaps), losses(step, state, batches(4))
    )
    (graph,) = donated.body._graphs.values()
    assert recorder.captures == 1
    assert (10, 1) in {t.stride() for t in graph._replay._inputs}


def test_a_batch_that_repeats_its_numbers_is_captured_no_more(recorder):
    step, state = parts()
    donated = donating(step)
    repeated = [(x[:1].expand(4, -1), y) for x, y in batches(4)]
    found = losses(donated, copy.deepcopy(state), repeated)
    assert same(found, losses(step, state, repeated))
    assert recorder.captures == 0
    assert "single memory location" in donated.body.why_not_replayed


def test_an_eager_step_moves_nothing_where_nothing_is_captured(recorder):
    step, state = parts()
    plan = CompilePlan(step.body.function, wish=False, epochs=1, batches=None)
    body = Compiled(step.body.function, donate=2, plan=plan, replayed=True)
    params, *_ = type(step)(body)(*state, batches(1)[0])
    assert not any(params[name] is t for name, t in state[0].items())


def test_what_is_guarded_compiles_again(recorder):
    """A number of Python that changes is no part of the capture."""

    class Scaled(nn.Module):
        scale = 1.0

        def forward(self, output, target):
            return self.scale * nn.functional.mse_loss(output, target, reduction="none")

    loss = Scaled()
    goal = ll.supervised(nn.Linear(5, 1), lambda o, t: loss(o, t))
    step = ll.make_step(goal, torch.optim.SGD)
    donated, state = donating(step), ll.init(goal, torch.optim.SGD)
    batch = X, torch.zeros(len(X), 1)
    for number in range(6):
        loss.scale = float(number // 3)
        *_, found, _ = donated(*copy.deepcopy(state), batch)
        *_, expected, _ = step(*state, batch)
        assert found == expected


def test_what_was_compiled_before_is_what_is_repeated(recorder):
    """When the number comes back, and a fold launches it again and again."""

    def scaled(output, target):
        losses = nn.functional.mse_loss(output, target, reduction="none")
        return factors[-1] * losses

    factors: list[float] = []
    goal = ll.supervised(nn.Linear(5, 1), scaled)
    step, state = ll.make_step(goal, torch.optim.SGD), ll.init(goal, torch.optim.SGD)
    epoch = ll.compile_fold(step, backend="aot_eager")
    data = DataLoader(TensorDataset(X, torch.zeros(len(X), 1)), 2)
    for factor in (1.0, 2.0, 1.0):
        factors[:] = [factor]
        expected = ll.fold(step, *copy.deepcopy(state), data)
        assert same(epoch(*state, data), expected)
        state = expected[:2]
    assert epoch.why_not is None


def test_what_cannot_be_captured_runs_as_it_is(recorder):
    recorder.refuses = True
    step, state = parts()
    donated = donating(step)
    found = losses(donated, copy.deepcopy(state), batches(4))
    assert same(found, losses(step, state, batches(4)))
    assert "not permitted when stream is capturing" in donated.body.why_not_replayed


def test_an_evaluation_step_is_captured(recorder):
    torch.manual_seed(0)
    goal = ll.supervised(norm(), LOSS)
    eval_step = ll.make_eval_step(goal, {"accuracy": ll.metrics.accuracy()})
    captured = ll.compile_step(eval_step, backend="aot_eager")
    params = goal.init()
    for _ in range(2):  # new weights in the second pass
        found = [captured(params, batch) for batch in batches(4)]
        assert same(found, [eval_step(params, batch) for batch in batches(4)])
        params = {name: 2 * t for name, t in params.items()}
    assert recorder.captures == 2


def test_what_is_held_goes_with_the_step(recorder):
    step, state = parts()
    donated = donating(step)
    held = weakref.ref(next(iter(state[0].values())))
    losses(donated, state, batches(3))
    del state, donated, step
    torch._dynamo.reset()
    gc.collect()
    assert held() is None


def loader(size=4):
    return DataLoader(TensorDataset(X, Y), size, shuffle=True)


def test_a_replayed_fold_is_the_fold(recorder):
    """With the odd last batch, and with random numbers, which a loop cannot draw."""
    step, state = parts(dropout)
    epoch = ll.compile_fold(step, backend="aot_eager")
    folded = expected = None
    for seed in range(3):
        torch.manual_seed(seed)
        folded = epoch(*(folded or copy.deepcopy(state))[:2], loader())
        torch.manual_seed(seed)
        one = ll.compile_step(step, backend="aot_eager")
        expected = ll.fold(one, *(expected or state)[:2], loader())
        assert same(folded, expected)
    assert epoch.why_not is None
    assert epoch.why_not_replayed is None
    assert recorder.replays >= 3 * 5 - 1


@pytest.mark.parametrize("model", [mlp, dropout])
def test_fit_is_the_same(model, recorder, monkeypatch):
    backend = torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(_compile, "inductor", lambda g, inputs, **_: backend(g, inputs))

    def run(**options):
        torch.manual_seed(0)
        module = model()
        adam = torch.optim.Adam(module.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(adam, 2)
        result = ll.fit(
            module,
            LOSS,
            adam,
            loader(),
            (X, Y),
            epochs=6,
            progress=False,
            scheduler=scheduler,
            schedule_by="epoch",
            compile=True,
            **options,
        )
        assert result.compiled.folded == ("on_step" not in options)
        losses = [(row["train_loss"], row["val_loss"]) for row in result.history]
        return losses, result.params, result.opt_state

    folded = run()
    one_by_one = run(on_step=lambda record: None)
    assert folded[0] == one_by_one[0]
    assert same(folded[1:], one_by_one[1:])
    assert recorder.replays >= 2 * 6 * 4


def test_after_steps_were_made_an_error_is_the_callers(recorder):
    """Making them again by hand would make them twice."""
    step, state = parts(dropout)
    epoch = ll.compile_fold(step, backend="aot_eager")
    epoch(*state, loader())
    scan = epoch._scan
    again, calls = scan._graph.again, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return again(*args)

    scan._graph.again = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        epoch(*state, loader())


# --- on a GPU -------------------------------------------------------------------------


def moved(tree):
    return pytree.tree_map_only(Tensor, lambda t: t.cuda(), tree)


def on_gpu(state):
    """Step count and seed stay on the host."""
    params, opt_state = state
    carry = moved(opt_state.carry)
    return moved(params), opt_state.after(carry, 0)


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("model", [mlp, dropout, norm])
def test_cuda_replays_are_the_steps(model, monkeypatch):
    """Bit for bit, with the random numbers of steps that are not captured."""
    step, state = parts(model, clip_grad_norm=1.0)
    state, data = on_gpu(state), moved(batches(6))
    donated = ll.compile_step(step, donate=True)
    found = losses(donated, copy.deepcopy(state), data)
    assert donated.body.why_not_replayed is None
    monkeypatch.setattr(Pool, "serves", lambda self, args: False)
    plain = ll.compile_step(step, donate=True)
    assert same(found, losses(plain, state, data))


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("model", [mlp, dropout, norm])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_fit_is_the_same_one_by_one(model, precision):
    def run(**options):
        torch.manual_seed(0)
        module = model().cuda()
        result = ll.fit(
            module,
            LOSS,
            torch.optim.AdamW(module.parameters(), lr=0.01),
            loader(),
            (X, Y),
            epochs=4,
            progress=False,
            compile=True,
            precision=precision,
            **options,
        )
        assert result.compiled.replayed, result.compiled
        assert result.compiled.folded == (not options and precision != "fp16")
        return result

    folded, one_by_one = run(), run(on_step=lambda record: None)
    for column in ("train_loss", "val_loss"):
        assert folded.history[column] == pytest.approx(
            one_by_one.history[column], rel=1e-5
        )
    assert folded.history["train_loss"][-1] < folded.history["train_loss"][0]


@gpu
def test_cuda_data_in_memory_are_copied_once_in_a_run():
    device = torch.device("cuda", torch.cuda.current_device())
    data = loader()
    with ll._memory.copied_once():
        passes = []
        for _ in range(3):
            passing = ll._memory.read(data)
            passing.move(device)
            passes.append(passing.tensors)
        assert passes[0][0] is passes[1][0]
        X.add_(0)  # noted by torch
        passing = ll._memory.read(data)
        passing.move(device)
        assert passing.tensors[0] is not passes[0][0]
        assert passing.tensors[1] is passes[0][1]


@gpu
def test_cuda_a_fold_of_ones_own_keeps_the_data_there(monkeypatch):
    """Or else each pass would move them, and the graph of CUDA be given up."""
    goal = ll.supervised(mlp().cuda(), LOSS)
    epoch = ll.compile_fold(ll.make_step(goal, torch.optim.SGD), backend="aot_eager")
    state, data = ll.init(goal, torch.optim.SGD), loader()
    for _ in range(2 * MOST_MOVES):
        state = epoch(*state, data)[:2]
    assert epoch.why_not is None
    assert epoch.why_not_replayed is None


@gpu
def test_cuda_data_of_inference_stay_where_they_are():
    with torch.inference_mode():
        features = X * 2
    passing = ll._memory.read(DataLoader(TensorDataset(features, Y), 4))
    passing.move(torch.device("cuda", torch.cuda.current_device()))
    assert passing.tensors[0] is features


class Waits(nn.Module):
    """Reads the host, which no graph of CUDA can."""

    def forward(self, x):
        return nn.functional.dropout(x + torch.ops.lossloop_test.from_host(x), 0.5)


@gpu
@pytest.mark.slow
def test_cuda_goes_on_after_a_capture_that_failed():
    """With the stream and the generators as they were."""

    @torch.library.custom_op("lossloop_test::from_host", mutates_args=())
    def from_host(x: Tensor) -> Tensor:
        return torch.ones(x.shape).to(x.device)

    from_host.register_fake(torch.empty_like)
    from_host.register_autograd(lambda ctx, grad: None)
    stream = torch.cuda.current_stream()
    goal = ll.supervised(nn.Sequential(Waits(), nn.Linear(5, 3)).cuda(), LOSS)
    step = ll.make_step(goal, torch.optim.SGD)
    state, data = ll.init(goal, torch.optim.SGD), moved(batches(5))
    donated = ll.compile_step(step, donate=True)
    found = losses(donated, copy.deepcopy(state), data)
    assert "cannot be captured" in donated.body.why_not_replayed
    assert torch.cuda.current_stream() == stream
    assert all(bool(torch.isfinite(t)) for t in found[0])
    assert torch.nn.functional.dropout(data[0][0], 0.5).isfinite().all()
    other, state = parts(dropout)
    donated = ll.compile_step(other, donate=True)
    losses(donated, on_gpu(state), data)
    assert donated.body.why_not_replayed is None


@gpu
@pytest.mark.slow
def test_cuda_tensors_on_the_host_are_a_reason():
    replay = _replay.Replay
    graph = torch.fx.symbolic_trace(lambda a, b: a + b)
    for node in graph.graph.find_nodes(op="placeholder"):
        source = type("Source", (), {"name": "L['args'][0]"})
        node.meta["grapharg"] = type("Argument", (), {"source": source})
    mixed = replay(lambda a, b: a + b, graph, -1, Pool())
    assert mixed(torch.ones((), device="cuda"), torch.ones(())).item() == 2
    assert "cpu, cuda" in mixed.why_not
