"""Products of which is asked whether they are finite: told by their sides."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import lossloop as ll
from lossloop._bounds import Bounds
from lossloop._gate import grand_total

aten = torch.ops.aten
MM = aten.mm.default


def rewritten(function, *examples):
    """The graph of a function after the pass, and whether that changed it."""
    decompositions = select_decomp_table()
    graph = make_fx(function, decompositions, tracing_mode="fake")(*examples)
    before = str(graph.graph)
    Bounds()(graph.graph)
    graph.recompile()
    graph.graph.lint()
    return graph, str(graph.graph) != before


def products(graph):
    return [node for node in graph.nodes if node.target in (MM, aten.bmm.default)]


def finite(a, b):
    return torch.isfinite((a @ b).sum())


def batches(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


ASKED = {
    "a matrix": finite,
    "transposed": lambda a, b: torch.isfinite((a @ b).T.sum()),
    "of other form": lambda a, b: torch.isfinite((a @ b).reshape(-1).sum()),
    "with other sums": lambda a, b: torch.isfinite(a.sum() + (a @ b).sum() + b.sum()),
    "in double precision": lambda a, b: torch.isfinite(
        (a @ b).sum() + torch.zeros((), dtype=torch.float64)
    ),
    "a gate": lambda a, b: torch.isfinite(grand_total(a.sum(), [a @ b, b])),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrices", "batches"])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
def test_the_answer_is_the_same(asked, batch, bad):
    a, b = batches((*batch, 9, 2), (*batch, 2, 8))
    if batch and asked is ASKED["transposed"]:
        pytest.skip("there is no .T")
    graph, changed = rewritten(asked, a, b)
    assert changed
    graph.graph.eliminate_dead_code()
    assert not products(graph.graph)
    for side in (a, b):
        for place in range(side.numel()):
            looked_at = a.clone(), b.clone()
            if bad is not None:
                looked_at[side is b].view(-1)[place] = bad
            assert graph(*looked_at) == asked(*looked_at) == (bad is None)


def test_an_element_that_is_too_large_is_always_seen():
    # Their sum is not a number, nor are the products of sums without their signs.
    a = torch.tensor([[1e30], [-1e30]] * 9)
    b = torch.tensor([[1e30, -1e30] * 9])
    graph, changed = rewritten(finite, a, b)
    assert changed
    assert not (a @ b).isfinite().any()
    assert not graph(a, b)
    unsigned = a.abs().sum(0) @ b.abs().sum(1)
    assert not unsigned.isfinite()
    assert (a.sum(0) @ b.sum(1)).isfinite()  # what the signs would have hidden


def test_a_sum_on_the_way_that_is_too_large_is_always_seen():
    a = torch.tensor([[3e38, 3e38, -3e38]] * 9)
    b = torch.ones(3, 8)
    graph, changed = rewritten(finite, a, b)
    assert changed
    assert not graph(a, b)


def used(a, b):
    product = a @ b
    return torch.where(torch.isfinite(product.sum()), product, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_that_overflows_where_float32_does_not(dtype):
    a, b = (
        torch.full((9, 2), 300.0, dtype=dtype),
        torch.full((2, 8), 300.0, dtype=dtype),
    )
    asked = lambda a, b: torch.isfinite((a @ b).sum(dtype=torch.float32))  # noqa: E731
    graph, changed = rewritten(asked, a, b)
    assert changed == (dtype is torch.bfloat16)
    assert graph(a, b) == asked(a, b) == (dtype is torch.bfloat16)


@pytest.mark.parametrize(
    ("left", "right"), [(1e39, 1e-10), (1e-50, 1e50), (1e30, 1e30)]
)
def test_a_product_in_double_precision_is_looked_at_in_it(left, right):
    a = torch.full((9, 2), left, dtype=torch.float64)
    b = torch.full((2, 8), right, dtype=torch.float64)
    asked = lambda a, b: torch.isfinite((a @ b).float().sum())  # noqa: E731
    graph, changed = rewritten(asked, a, b)
    assert changed
    assert graph(a, b) == asked(a, b) == (left * right < 1e38)


NOT_ASKED = {
    "the sum itself": lambda a, b: (a @ b).sum(),
    "the sum too": lambda a, b: (torch.isfinite(s := (a @ b).sum()), s),
    "its size": lambda a, b: (a @ b).sum().abs() != 3,
    "whether it is another": lambda a, b: (a @ b).sum() == a.sum(),
    "whether it is a number": lambda a, b: (s := (a @ b).sum()) == s,
    "whether it is infinite": lambda a, b: (a @ b).sum().abs() != float("inf"),
    "each": lambda a, b: ((s := (a @ b).sum()) == s, s.abs() != float("inf")),
    "a sum of squares": lambda a, b: torch.isfinite(((a @ b) ** 2).sum()),
    "parts": lambda a, b: torch.isfinite((a @ b)[1:].sum()),
    "factors": lambda a, b: torch.isfinite(torch.add(a.sum(), (a @ b).sum(), alpha=0)),
    "a narrow type": lambda a, b: torch.isfinite((a @ b).half().sum()),
}


@pytest.mark.parametrize("asked", NOT_ASKED.values(), ids=NOT_ASKED)
def test_other_questions_are_left_alone(asked):
    a, b = batches((9, 2), (2, 8))
    assert not rewritten(asked, a, b)[1]


def test_a_sum_over_more_gradients_than_calls_may_be_nested():
    def asked(a, b):
        return torch.isfinite(grand_total(a.sum(), [a @ b, *[b] * 1100]))

    assert rewritten(asked, *batches((9, 2), (2, 8)))[1]


def test_sides_that_are_larger_do_not_wait():
    assert rewritten(used, *batches((9, 2), (2, 8)))[1]
    assert not rewritten(used, *batches((9, 20), (20, 8)))[1]


def test_a_product_is_computed_before_it_is_used():
    graph, changed = rewritten(used, *batches((9, 2), (2, 8)))
    assert changed
    (product,) = products(graph.graph)
    assert product.next.target is aten.where.self


def mlp():
    torch.manual_seed(0)
    layers = (nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(20, 3))


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, partial(torch.optim.SGD, lr=1)]
)
@pytest.mark.parametrize("bad", [None, 0, 1], ids=["finite", "nan", "later"])
def test_a_step_is_the_same_with_one_gradient_at_a_time(optimizer, bad):
    graphs = []

    def as_it_is(graph, _):
        graphs.append(graph.graph)
        return graph.forward

    def bounded(graph, _):
        Bounds()(graph.graph)
        graph.recompile()
        return as_it_is(graph, _)

    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    step = ll.make_step(goal, optimizer)
    found = []
    for compiler in (as_it_is, bounded):
        backend = aot_autograd(
            fw_compiler=compiler, decompositions=select_decomp_table()
        )
        donating = ll.compile_step(step, donate=True, backend=backend)
        state = ll.init(goal, optimizer, skip_nonfinite=1)
        for number in range(3):
            torch.manual_seed(number)
            x = torch.randn(4, 20)
            if number == bad:
                x[2, 5] = float("nan")
            *state, _, _ = donating(*state, (x, torch.randint(0, 3, (4,))))
        found.append(tree_leaves(state))
    assert all(map(torch.equal, *found))
    assert int(state[1].gate.skipped) == (bad is not None)
    assert [most_at_once(graph) for graph in graphs] == [2, 1]


def most_at_once(graph):
    """How many gradients of the two large layers wait for their use at most."""
    order = {node: place for place, node in enumerate(graph.nodes)}

    def last_use(node):
        ends = [order[user] for user in node.users]
        views = [user for user in node.users if user.target is aten.permute.default]
        return max(ends + [last_use(view) for view in views])

    waiting = [
        range(order[node], last_use(node) + 1)
        for node in products(graph)
        if node.meta["val"].shape in ((30, 20), (20, 30))
    ]
    assert len(waiting) == 2
    return max(sum(place in each for each in waiting) for place in order.values())


def test_what_is_read_later_is_not_written_early():
    def functional(x, y, a, b):
        """As a graph of functions has it: all is written in the end."""
        view, product = x.view(-1), a @ b
        new = torch.where(torch.isfinite(product.sum()), product, x)
        later = view[:4] + y
        both = new.sum() + view.sum()
        x.copy_(new)
        y.copy_(later)
        return both

    x, y, a, b = batches((9, 8), (4,), (9, 2), (2, 8))
    graph, changed = rewritten(functional, x, y, a, b)
    assert changed
    one, other = (x.clone(), y.clone()), (x.clone(), y.clone())
    assert graph(*one, a, b).equal(functional(*other, a, b))
    assert one[0].equal(other[0])
    assert one[1].equal(other[1])


def test_what_is_returned_is_written_last():
    def functional(x, a, b):
        view, product = x.view(-1), a @ b
        x.copy_(torch.where(torch.isfinite(product.sum()), product, x))
        return view

    x, a, b = batches((9, 8), (9, 2), (2, 8))
    graph, changed = rewritten(functional, x, a, b)
    assert changed
    one, other = x.clone(), x.clone()
    assert graph(one, a, b).equal(functional(other, a, b))
    assert one.equal(other)
    assert not one.equal(x)
