"""bf16, and fp16 with a scale of the loss, beside the loop with torch.amp by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.utils import _pytree as pytree

import lossloop as ll
from lossloop._step import init, make_eval_step, make_step

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)
    )


def batches(count=12, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 8, generator=draw), torch.randint(4, (6,), generator=draw))
        for _ in range(count)
    ]


def by_hand(model, data, precision, scaler=None, clip=None):
    """Losses, which steps were skipped, and the scale after each."""
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    loss_fn, losses, skipped, scales = nn.CrossEntropyLoss(), [], [], []
    for inputs, targets in data:
        adam.zero_grad()
        with torch.autocast("cpu", dtype=DTYPES[precision]):
            loss = loss_fn(model(inputs), targets)
        losses.append(loss.item())
        if clip is not None and scaler is not None:
            scaler.scale(loss).backward()
            scaler.unscale_(adam)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        elif scaler is not None:
            scaler.scale(loss).backward()
        if scaler is None:
            loss.backward()
            adam.step()
            continue
        before = model[0].weight.clone()
        scaler.step(adam)
        scaler.update()
        skipped.append(torch.equal(before, model[0].weight))
        scales.append(scaler.get_scale())
    return losses, skipped, scales


def ours(model, data, precision, scale=None, compile=None, **options):
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    adam = ll.from_torch(torch.optim.Adam, lr=0.01)
    params, opt_state = init(goal, adam, precision=precision)
    if scale is not None:
        opt_state = opt_state._replace(scale=scale)
    step = make_step(goal, adam, precision=precision, **options)
    if compile is not None:
        step = ll.compile_step(step, backend=compile, donate=True)
    losses, skipped, scales = [], [], []
    for batch in data:
        before = params["0.weight"].clone()
        params, opt_state, loss_sum, n = step(params, opt_state, batch)
        losses.append((loss_sum / n).item())
        if opt_state.scale:
            skipped.append(torch.equal(before, params["0.weight"]))
            scales.append(opt_state.scale.scale.item())
    return losses, skipped, scales, params, opt_state


@pytest.mark.parametrize("compile", [None, "aot_eager"])
def test_bf16_is_the_loop_under_autocast(compile):
    expected, _, _ = by_hand(net(), batches(), "bf16")
    losses, *_ = ours(net(), batches(), "bf16", compile=compile)
    assert losses == pytest.approx(expected, rel=1e-4)
    in_full, *_ = ours(net(), batches(), "fp32", compile=compile)
    assert losses != pytest.approx(in_full, rel=1e-4), "nothing was computed in half"


@pytest.mark.parametrize("compile", [None, "aot_eager"])
@pytest.mark.parametrize("start", [2.0**10, 2.0**126])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_fp16_is_the_loop_with_a_grad_scaler(start, compile, clip):
    """From a scale that overflows, the same steps are skipped."""
    options = {"growth_factor": 4.0, "backoff_factor": 2.0**-20, "growth_interval": 3}
    scaler = GradScaler("cpu", init_scale=start, **options)
    model = net()
    expected = by_hand(model, batches(), "fp16", scaler, clip)
    scale = ll.loss_scale(start, **options)
    losses, skipped, scales, params, state = ours(
        net(), batches(), "fp16", scale, compile, clip_grad_norm=clip
    )
    assert losses == pytest.approx(expected[0], rel=1e-3)
    assert (skipped, scales) == expected[1:]
    assert sum(skipped) == int(state.scale.skipped)
    assert any(skipped) == (start > 2.0**100)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(params[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_skipped_step_leaves_weights_and_optimizer_alone():
    goal = ll.supervised(net(), nn.CrossEntropyLoss())
    params, opt_state = init(goal, torch.optim.Adam, precision="fp16")
    opt_state = opt_state._replace(scale=ll.loss_scale(3e38))
    step = make_step(goal, torch.optim.Adam, precision="fp16", clip_grad_norm=1.0)
    new_params, new_state, _, _ = step(params, opt_state, batches()[0])
    trained = dict(goal.model.named_parameters())
    assert all(torch.equal(new_params[name], params[name]) for name in trained)
    assert not torch.equal(new_params["1.running_mean"], params["1.running_mean"])
    for new, old in zip(
        pytree.tree_leaves(new_state.slots),
        pytree.tree_leaves(opt_state.slots),
        strict=True,
    ):
        assert torch.equal(new, old)
    assert int(new_state.step) == 1


def test_the_scale_cannot_grow_to_infinity():
    goal = ll.supervised(nn.Linear(8, 4), nn.CrossEntropyLoss())
    tiny = [(inputs * 1e-30, targets) for inputs, targets in batches(3)]
    params, opt_state = init(goal, torch.optim.SGD, precision="fp16")
    scale = ll.loss_scale(2.0**127, growth_interval=1)
    state = opt_state._replace(scale=scale)
    for _ in range(200):  # down to what fits, and up again
        params, state, _, _ = make_step(goal, torch.optim.SGD, precision="fp16")(
            params, state, tiny[0]
        )
        assert torch.isfinite(state.scale.scale)


def test_micro_batches_have_the_same_scale():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    scale = ll.loss_scale(2.0**126, backoff_factor=2.0**-20)
    whole = ours(copy.deepcopy(model), batches(), "fp16", scale)
    parts = ours(model, batches(), "fp16", scale, accumulate=3)
    assert whole[0] == pytest.approx(parts[0], rel=1e-2)
    assert whole[1:3] == parts[1:3]
    assert 0 < sum(whole[1]) < 12


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_half_is_pure(precision):
    goal = ll.supervised(net(), nn.CrossEntropyLoss())
    params, opt_state = init(goal, torch.optim.Adam, precision=precision)
    step = make_step(goal, torch.optim.Adam, precision=precision)
    before = copy.deepcopy((params, opt_state))
    first, second = (step(params, opt_state, batches()[0]) for _ in range(2))
    for one, other in ((before, (params, opt_state)), (first, second)):
        pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_an_eval_step_in_half():
    goal = ll.supervised(net(), nn.CrossEntropyLoss())
    batch = batches()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = goal.evaluate(goal.init(), batch)[0]
    in_half = make_eval_step(goal, precision="bf16")(goal.init(), batch)[0]
    assert in_half == expected
    assert in_half != make_eval_step(goal)(goal.init(), batch)[0]


def test_refused():
    goal = ll.supervised(net(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"precision=\.\.\.\) must be 'fp32', 'bf16'"):
        make_step(goal, torch.optim.SGD, precision="half")
    with pytest.raises(ValueError, match=r"init\(\.\.\., precision='fp16'\)"):
        make_step(goal, torch.optim.SGD, precision="fp16")(
            *init(goal, torch.optim.SGD), batches()[0]
        )
    for option in (
        {"scale": 0.0},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"growth_interval": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(option))):
            ll.loss_scale(**option)
