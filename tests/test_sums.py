"""Sums over many rows, block by block: the same sums, and only where it pays."""

from uuid import uuid4

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import lossloop as ll
from lossloop._in_turn import InTurn
from lossloop._pooling import Pooling
from lossloop._sums import BLOCK, FEWEST_ROWS, LEAST, Sums

aten = torch.ops.aten


def rewritten(function, *inputs):
    """A function as a graph, the same after the pass, and how many sums each has."""
    before, after = (make_fx(function, tracing_mode="fake")(*inputs) for _ in range(2))
    Sums()(after.graph)
    after.graph.lint()
    after.recompile()
    counts = [
        len(each.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList))
        for each in (before, after)
    ]
    return before, after, counts


SHAPES = {
    "a matrix": (2048, 512),
    "rows that are no blocks": (1037, 130),
    "samples and places": (32, 64, 128),
    "fewer places than a block": (50, 19, 144),
    "places that are no blocks": (9, 197, 96),
    "one sample": (1, 2048, 80),
    "images": (6, 5, 64, 90),
}


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_same_sum(shape, keepdim):
    torch.manual_seed(0)
    x, dims = torch.randn(shape), list(range(len(shape) - 1))
    before, after, counts = rewritten(lambda x: x.sum(dims, keepdim=keepdim), x)
    assert counts[1] > counts[0] == 1
    exact = x.double().sum(dims, keepdim=keepdim)
    assert after(x).shape == exact.shape
    torch.testing.assert_close(after(x).double(), exact, rtol=1e-6, atol=1e-4)
    errors = [(each(x) - exact).abs().mean() for each in (before, after)]
    assert errors[1] <= 2 * errors[0], "it rounds more"


def test_the_last_dimensions_may_be_several():
    x = torch.randn(FEWEST_ROWS, 16, 40)
    _, after, counts = rewritten(lambda x: x.sum(-3), x)
    assert counts == [1, 2]
    torch.testing.assert_close(after(x), x.sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("row", [0, 1000, 1036])
def test_what_is_not_finite_does_not_disappear(value, row):
    x = torch.ones(1037, 130)
    x[row, 3] = value
    _, after, _ = rewritten(lambda x: x.sum(0), x)
    torch.testing.assert_close(after(x), x.sum(0), equal_nan=True)


OTHERS = {
    "few rows": (torch.zeros(FEWEST_ROWS - 1, LEAST // 64), [0]),
    "few numbers": (torch.zeros(LEAST // 65, 64), [0]),
    "hardly any places": (torch.zeros(2048, BLOCK // 2 - 1, 64), [0, 1]),
    "columns": (torch.zeros(2048, 512), [1]),
    "what is not side by side": (torch.zeros(64, 64, 64), [0, 2]),
    "everything": (torch.zeros(2048, 512), [0, 1]),
    "no dimension": (torch.zeros(2048, 512), []),
    "double precision": (torch.zeros(2048, 512, dtype=torch.float64), [0]),
    "whole numbers": (torch.zeros(2048, 512, dtype=torch.int64), [0]),
    "another device": (torch.zeros(2048, 512, device="meta"), [0]),
}


@pytest.mark.parametrize(("x", "dims"), OTHERS.values(), ids=OTHERS)
def test_other_sums_are_left_alone(x, dims):
    _, _, counts = rewritten(lambda x: aten.sum.dim_IntList(x, dims), x)
    assert counts == [1, 1]


def test_a_sum_into_another_type_is_left_alone():
    def wide(x):
        return aten.sum.dim_IntList(x, [0], dtype=torch.float64)

    _, _, counts = rewritten(wide, torch.zeros(2048, 512))
    assert counts == [1, 1]


def test_a_step_has_it_and_learns_the_same(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 512), nn.LayerNorm(512), nn.Linear(512, 3))
    batch = torch.randn(512, 8), torch.randint(0, 3, (512,))
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    plain = ll.make_step(goal, torch.optim.SGD)
    rewrite, found = Sums.__call__, []

    def looked_at(self, graph):
        rewrite(self, graph)
        sums = graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
        found.extend(node.meta["val"].shape for node in sums)

    monkeypatch.setattr(Sums, "__call__", looked_at)
    monkeypatch.setattr(Sums, "uuid", lambda self: uuid4().hex)  # not from the cache
    state = ll.init(goal, torch.optim.SGD)
    params, *_ = ll.compile_step(plain)(*state, batch)
    assert found.count((512 // BLOCK, 512)) >= 3  # a bias, and those of the LayerNorm
    for name, expected in plain(*state, batch)[0].items():
        torch.testing.assert_close(params[name], expected, rtol=1e-5, atol=1e-6)


def test_passes_in_turn_are_known_by_all_of_them():
    one, other = InTurn(None, [Pooling()]), InTurn(None, [Pooling(), Sums()])
    assert one.uuid() != other.uuid() == InTurn(None, [Pooling(), Sums()]).uuid()
    order = []
    graph = torch.fx.Graph()
    ours, theirs = ([lambda _, i=i: order.append(i)] for i in range(2))
    for given in (theirs, theirs[0], None):
        both = InTurn(given, ours)
        both(graph)
        assert both.uuid() is None, "one has no name"
    assert order == [1, 0, 1, 0, 0]
