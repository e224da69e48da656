"""The fold and the way of a batch to the step."""

import pytest
import torch
from cases import CASES, mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lossloop as ll
from lossloop._batches import to_device


def setting():
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3, 0.5])))
    params, opt_state = ll.init(goal, torch.optim.SGD)
    return goal, ll.make_step(goal, torch.optim.SGD), params, opt_state


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_fold_carries_the_state_and_adds_the_pairs(sizes):
    _, step, params, opt_state = setting()
    batches = [CASES["mlp"].batch(size, seed) for seed, size in enumerate(sizes)]
    folded, folded_state, mean = ll.fold(step, params, opt_state, batches)
    total = weight = 0.0
    for batch in batches:
        params, opt_state, loss_sum, n = step(params, opt_state, batch)
        total, weight = total + loss_sum, weight + n
    torch.testing.assert_close(folded, params, rtol=0, atol=0)
    assert folded_state.step == len(sizes)
    assert mean.value() == (total / weight).item()


def test_on_step_sees_the_mean_so_far_and_may_change_the_state():
    _, step, params, opt_state = setting()
    seen = []

    def on_step(state, mean):
        seen.append((int(state.step), mean.value()))
        return state._replace(seed=state.seed + 1)

    batches = [CASES["mlp"].batch(4, seed) for seed in range(3)]
    _, state, mean = ll.fold(step, params, opt_state, batches, on_step=on_step)
    assert [number for number, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == mean.value()
    assert state.seed == 3


def test_a_fold_begins_to_read_its_loader_once():
    class Loader:
        begun = 0

        def __iter__(self):
            self.begun += 1
            return iter([CASES["mlp"].batch()])

    _, step, params, opt_state = setting()
    loader = Loader()
    ll.fold(step, params, opt_state, loader)
    assert loader.begun == 1


def test_nothing_to_fold():
    goal, step, params, opt_state = setting()
    with pytest.raises(ValueError, match="no batches"):
        ll.fold(step, params, opt_state, [])
    with pytest.raises(ValueError, match="no batches"):
        ll.fold_eval(ll.make_eval_step(goal), params, [])


def test_the_fold_reads_nothing_on_the_host(monkeypatch):
    goal, step, params, opt_state = setting()
    batches = [CASES["mlp"].batch(4, seed) for seed in range(3)]
    reads = []
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda t, *a, name=name, original=original: (
                reads.append(name) or original(t, *a)
            ),
        )
    params, _, mean = ll.fold(step, params, opt_state, batches)
    means = mean, ll.fold_eval(ll.make_eval_step(goal), params, batches)
    assert reads == []
    assert all(m.value() > 0 for m in means)
    assert reads == ["item"] * 4  # two numbers of each


def test_batches_that_are_there_stay_as_they_are():
    batch = CASES["mlp"].batch()
    assert to_device(batch, torch.device("cpu")) is batch


def test_any_tree_is_moved_and_other_leaves_stay():
    batch = {"x": torch.ones(2), "names": ["a", "b"], "y": (torch.ones(1), 3)}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"].is_meta
    assert moved["y"][0].is_meta
    assert moved["names"] == ["a", "b"]
    assert moved["y"][1] == 3
