"""The step: pure, repeatable, the gradient of the mean, and compiled the same."""

import copy

import pytest
import torch
from cases import CASES, mlp
from torch import nn
from torch.utils import _pytree as pytree

import lossloop as ll
from lossloop._random import mix

MODES = {
    "eager": lambda step: step,
    "aot_eager": lambda step: ll.compile_step(step, backend="aot_eager"),
    "inductor": ll.compile_step,
}
PURE = [
    pytest.param(case, mode, marks=[pytest.mark.slow] * (mode == "inductor"))
    for mode in MODES
    for case in CASES
]


def leaves(tree):
    return pytree.tree_leaves(tree)


def copied(tree):
    return pytree.tree_map(torch.clone, tree)


def same(one, other):
    return len(leaves(one)) == len(leaves(other)) and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(leaves(one), leaves(other), strict=True)
    )


def make(case, optimizer=torch.optim.AdamW, **options):
    model = CASES[case].model()
    goal = ll.supervised(model, CASES[case].loss)
    params, opt_state = ll.init(goal, optimizer, seed=5)
    return goal, ll.make_step(goal, optimizer, **options), params, opt_state


@pytest.mark.parametrize(("case", "mode"), PURE)
def test_a_step_is_pure(case, mode):
    goal, step, params, opt_state = make(case)
    reference = step
    step = MODES[mode](step)
    batch = CASES[case].batch()
    module = copied(goal.model.state_dict())
    inputs = copied((params, opt_state, batch))
    torch.manual_seed(99)
    generator = torch.get_rng_state()

    first = step(params, opt_state, batch)
    torch.rand(3)  # another global state must not matter
    torch.manual_seed(99)
    again = step(params, opt_state, batch)

    assert same((params, opt_state, batch), inputs)
    assert same(first, again)
    assert torch.equal(torch.get_rng_state(), generator)
    assert same(goal.model.state_dict(), module)
    assert goal.model.training
    assert all(p.grad is None for p in goal.model.parameters())
    new, _, loss_sum, n = first
    assert new.keys() == params.keys()
    assert all(
        new[k].dtype == t.dtype and new[k].shape == t.shape for k, t in params.items()
    )
    assert not any(t.requires_grad for t in leaves(first))
    assert loss_sum.shape == n.shape == ()
    assert loss_sum.dtype == torch.float64
    if mode == "aot_eager":  # traced, the same random numbers and the same arithmetic
        expected = reference(params, opt_state, batch)
        torch.testing.assert_close(first[0], expected[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["conv_net", "encoder"])
def test_dropout_depends_on_seed_and_step_alone(case):
    _, step, params, opt_state = make(case)
    batch = CASES[case].batch()
    loss = step(params, opt_state, batch)[2]
    later = opt_state._replace(step=opt_state.step + 1)
    other = opt_state._replace(seed=opt_state.seed + 1)
    assert step(params, later, batch)[2] != loss
    assert step(params, other, batch)[2] != loss


def test_seeds_of_neighbours_differ_in_half_of_their_bits():
    seeds = {mix(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500
    distances = [(mix(7, i) ^ mix(7, i + 1)).bit_count() for i in range(1000)]
    assert 30 < sum(distances) / len(distances) < 33  # of 63 bits


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_that_of_torch(case):
    """No dropout here: the streams of random numbers are not torch's."""
    loss_fn = CASES[case].loss
    model = CASES[case].model().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    loss_fn = copy.deepcopy(loss_fn).double()
    x, y = CASES[case].batch()
    batch = (x.double() if x.is_floating_point() else x, y)
    goal = ll.supervised(model, loss_fn)
    params, opt_state = ll.init(goal, torch.optim.SGD(model.parameters(), lr=0.1))
    params, _, loss_sum, n = ll.make_step(
        goal, torch.optim.SGD(model.parameters(), lr=0.1)
    )(params, opt_state, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = loss_fn(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(loss_sum / n, loss.detach(), rtol=1e-12, atol=0)
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    assert params.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            params[name], tensor.detach(), rtol=1e-10, atol=1e-13
        )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_inference_mode_changes_nothing(accumulate):
    """Autograd sees nothing there, and torch.func does."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    step = ll.make_step(goal, torch.optim.SGD, accumulate=accumulate)
    state, batch = ll.init(goal, torch.optim.SGD), CASES["mlp"].batch(8)
    expected = step(*state, batch)
    with torch.inference_mode():
        found = step(*state, batch)
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        torch.testing.assert_close(one, other)
    assert not same(expected[0], state[0])


def test_tied_weights_are_one_parameter():
    goal, step, params, opt_state = make("tied")
    assert "embed.weight" in params
    assert "out.weight" not in params
    new, *_ = step(params, opt_state, CASES["tied"].batch())
    ll.load_params(goal.model, new)
    assert torch.equal(goal.model.out.weight, new["embed.weight"])


def test_parts_of_one_flat_buffer_are_state_of_their_own():
    """As cuDNN packs the weights of recurrent layers."""
    model = mlp()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    sizes = [p.numel() for p in model.parameters()]
    for p, part in zip(model.parameters(), flat.split(sizes), strict=True):
        p.data = part.view(p.shape)
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, torch.optim.SGD)
    new, *_ = ll.make_step(goal, torch.optim.SGD)(
        params, opt_state, CASES["mlp"].batch()
    )
    ll.load_params(model, new)
    assert all(torch.equal(p, new[name]) for name, p in model.named_parameters())


def test_frozen_parameters_are_carried():
    _, step, params, opt_state = make("frozen")
    new, state, *_ = step(params, opt_state, CASES["frozen"].batch())
    assert torch.equal(new["0.weight"], params["0.weight"])
    assert not torch.equal(new["2.weight"], params["2.weight"])
    assert "0.weight" not in state.slots.groups[0].moments


def test_written_buffers_are_returned():
    goal, step, params, opt_state = make("conv_net")
    batch = CASES["conv_net"].batch()
    new, *_ = step(params, opt_state, batch)
    assert new["1.num_batches_tracked"] == 1
    assert not torch.equal(new["1.running_mean"], params["1.running_mean"])
    _, n = ll.make_eval_step(goal)(new, batch)
    assert n > 0
    assert new["1.num_batches_tracked"] == 1


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1  # assigned, not written in place
        return self.linear(x)


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_assigned_buffers_are_returned(mode):
    model = Counter()
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, torch.optim.SGD)
    step = MODES[mode](ll.make_step(goal, torch.optim.SGD))
    batch = CASES["mlp"].batch()
    for _ in range(3):
        params, opt_state, *_ = step(params, opt_state, batch)
    assert params["calls"] == 3
    assert model.calls == 0


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d, nn.BatchNorm1d])
def test_norms_with_statistics(norm):
    model = nn.Sequential(
        norm(4, track_running_stats=True), nn.Flatten(), nn.Linear(12, 3)
    )
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, torch.optim.SGD)
    batch = (torch.randn(6, 4, 3), torch.randint(0, 3, (6,)))
    new, *_ = ll.make_step(goal, torch.optim.SGD)(params, opt_state, batch)
    model(batch[0])
    torch.testing.assert_close(new["0.running_mean"], model[0].running_mean)
    torch.testing.assert_close(new["0.running_var"], model[0].running_var)


def test_recurrent_layers_train_eagerly():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(5, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model, batch = Last(), (torch.randn(6, 4, 5), torch.randint(0, 3, (6,)))
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, torch.optim.SGD(model.parameters(), lr=0.1))
    new, *_ = ll.make_step(goal, torch.optim.SGD(model.parameters(), lr=0.1))(
        params, opt_state, batch
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    torch.testing.assert_close(
        new, {k: p.detach() for k, p in model.named_parameters()}
    )


def test_old_weight_norm_leaves_that_deepcopy_refuses():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 3)))
    batch = CASES["mlp"].batch()
    model(batch[0])
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, torch.optim.SGD)
    new, *_ = ll.make_step(goal, torch.optim.SGD)(params, opt_state, batch)
    assert sorted(new) == ["0.bias", "0.weight_g", "0.weight_v"]
    assert not torch.equal(new["0.weight_v"], params["0.weight_v"])


def test_parametrizations_train_the_original():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)))
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, torch.optim.SGD)
    new, *_ = ll.make_step(goal, torch.optim.SGD)(
        params, opt_state, CASES["mlp"].batch()
    )
    assert all(not torch.equal(new[k], params[k]) for k in params)


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_a_batch_of_weight_zero_has_gradient_zero(mode):
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss(ignore_index=1))
    params, opt_state = ll.init(goal, torch.optim.SGD)
    step = MODES[mode](ll.make_step(goal, torch.optim.SGD))
    batch = (torch.randn(4, 5), torch.ones(4, dtype=torch.long))
    new, _, loss_sum, n = step(params, opt_state, batch)
    assert same(new, params)
    assert loss_sum == n == 0


@pytest.mark.parametrize(
    "clip",
    [
        {"clip_grad_norm": 0.1},
        {"clip_grad_value": 0.01},
        {"clip_grad_norm": 0.01, "clip_grad_value": 0.01},
    ],
)
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_clipping_is_torchs(clip, mode):
    _, step, params, opt_state = make("mlp", torch.optim.SGD, **clip)
    batch = CASES["mlp"].batch()
    new, *_ = MODES[mode](step)(params, opt_state, batch)
    model = mlp()
    ll.load_params(model, params)
    optimizer = torch.optim.SGD(model.parameters())
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    if "clip_grad_value" in clip:
        nn.utils.clip_grad_value_(model.parameters(), clip["clip_grad_value"])
    if "clip_grad_norm" in clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip["clip_grad_norm"])
    optimizer.step()
    unclipped = ll.make_step(
        ll.supervised(model, nn.CrossEntropyLoss()), torch.optim.SGD
    )
    assert not same(unclipped(params, opt_state, batch)[0], new)
    torch.testing.assert_close(
        new, {k: p.detach() for k, p in model.named_parameters()}
    )


@pytest.mark.parametrize("bad", [0, -1.0, float("nan")])
def test_clipping_bounds_are_positive(bad):
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"clip_grad_norm.*must be > 0"):
        ll.make_step(goal, torch.optim.SGD, clip_grad_norm=bad)


def test_any_pytree_of_a_batch():
    def masked(model, batch):
        losses = nn.functional.mse_loss(
            model(batch["x"]), batch["y"]["target"], reduction="none"
        ).mean(dim=1)
        return (losses * batch["mask"]).sum(), batch["mask"].sum()

    goal = ll.objective(nn.Linear(5, 3), masked)
    batch = {
        "x": torch.randn(6, 5),
        "y": {"target": torch.randn(6, 3)},
        "mask": torch.tensor([1.0, 0, 1, 1, 0, 0]),
    }
    params, opt_state = ll.init(goal, torch.optim.SGD)
    results = [
        MODES[mode](ll.make_step(goal, torch.optim.SGD))(params, opt_state, batch)
        for mode in ("eager", "aot_eager")
    ]
    torch.testing.assert_close(*results)
    assert results[0][3] == 3


def test_a_plain_function_is_an_objective():
    def squares(params, batch):
        return ((params["w"] - batch) ** 2).sum(), batch.numel()

    start = {"w": torch.zeros(3), "labels": torch.arange(3)}
    optimizer = ll.optim.SGD(lr=0.5)
    params, opt_state = ll.init(squares, optimizer, params=start)
    step = ll.make_step(squares, optimizer)
    params, _, loss_sum, n = step(params, opt_state, torch.ones(3))
    assert loss_sum == 3
    assert n == 3
    assert torch.equal(start["w"], torch.zeros(3))
    assert params["w"].tolist() == pytest.approx([1 / 3] * 3)


def test_differentiating_through_three_steps():
    goal = ll.supervised(mlp().double(), nn.CrossEntropyLoss())
    optimizer = ll.optim.SGD(lr=0.1)
    step = ll.make_step(goal, optimizer)
    x, y = CASES["mlp"].batch()
    params, opt_state = ll.init(goal, optimizer)

    def loss_after(rate):
        p, s = params, opt_state
        group = s.slots.groups[0]
        s = s._replace(
            slots=s.slots._replace(groups=(group._replace(hyper={"lr": rate}),))
        )
        for _ in range(3):
            p, s, *_ = step(p, s, (x.double(), y))
        return goal(p, (x.double(), y))[0]

    rate = torch.tensor(0.1, dtype=torch.float64)
    slope = torch.func.grad(loss_after)(rate)
    near = (loss_after(rate + 1e-5) - loss_after(rate - 1e-5)) / 2e-5
    torch.testing.assert_close(slope, near, rtol=1e-6, atol=0)


def test_stacked_models_step_together():
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    optimizer = ll.optim.Adam(lr=0.01)
    step = ll.make_step(goal, optimizer)
    batch = CASES["mlp"].batch()
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        params, opt_state = ll.init(
            ll.supervised(mlp(), nn.CrossEntropyLoss()), optimizer
        )
        members.append((params, opt_state.carry))
    stacked = pytree.tree_map(lambda *ts: torch.stack(ts), *members)
    together = torch.vmap(step.body.function, in_dims=(0, 0, None))(*stacked, batch)
    for i, member in enumerate(members):
        alone = step.body.function(*member, batch)
        torch.testing.assert_close(
            pytree.tree_map(lambda t, i=i: t[i], together), alone, rtol=1e-4, atol=1e-6
        )


def test_init_copies():
    goal, _, params, opt_state = make("mlp")
    params["0.weight"].zero_()
    assert goal.model[0].weight.abs().sum() > 0
    assert (opt_state.step, opt_state.seed) == (0, 5)


def test_init_from_other_params():
    goal, _, params, _ = make("mlp")
    moved = {k: t + 1 for k, t in params.items()}
    again, _ = ll.init(goal, torch.optim.SGD, params=moved)
    assert same(again, moved)
    assert again["0.weight"] is not moved["0.weight"]
    with pytest.raises(ValueError, match=r"differ in \['0.weight'\]"):
        ll.init(
            goal,
            torch.optim.SGD,
            params={k: t for k, t in moved.items() if k != "0.weight"},
        )


def test_nothing_trainable():
    model = mlp().requires_grad_(False)
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="nothing is trainable"):
        ll.init(goal, torch.optim.SGD)
    with pytest.raises(ValueError, match="pass init"):
        ll.init(lambda params, batch: None, torch.optim.SGD)


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (torch.ones(()), TypeError),
        ((torch.ones(()), "3"), TypeError),
        ((torch.ones(3), torch.ones(())), ValueError),
        ((torch.ones(()), torch.ones(3)), ValueError),
    ],
)
def test_an_objective_returns_a_pair(result, error):
    goal = ll.objective(mlp(), lambda model, batch: result)
    with pytest.raises(error, match=r"\(loss_sum, n\)"):
        goal(goal.init(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, None])
def test_weights_are_exact_whatever_their_type(dtype):
    n = 2**12 if dtype is None else torch.tensor(2**12, dtype=dtype)
    goal = ll.objective(mlp(), lambda model, batch: (torch.ones(()), n))
    eval_step = ll.make_eval_step(goal)
    mean = ll.fold_eval(eval_step, goal.init(), [None] * 4097)
    assert mean.value_and_weight()[1] == 2**12 * 4097  # past 2**24


def test_buffers_taken_from_the_batch_are_copies():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)
            self.register_buffer("last", torch.zeros(6, 5))

        def forward(self, x):
            self.last = x
            return self.linear(x)

    goal = ll.supervised(Remembers(), nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, torch.optim.SGD)
    x, y = CASES["mlp"].batch()
    new, *_ = ll.make_step(goal, torch.optim.SGD)(params, opt_state, (x, y))
    assert torch.equal(new["last"], x)
    assert new["last"] is not x
