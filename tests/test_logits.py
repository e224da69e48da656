"""Cross entropy whose gradient may be written over the logits: the same bits."""

import math

import pytest
import torch
import torch._inductor.lowering  # which decompositions refer to
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.func import grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import lossloop as ll
from lossloop import _logits
from lossloop._logits import Logits

ROWS, CLASSES = 6, 11
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def any_number(monkeypatch):
    monkeypatch.setattr(_logits, "LEAST", 1)


def data(shape=(ROWS, CLASSES)):
    torch.manual_seed(0)
    target = torch.randint(0, CLASSES, (shape[0], *shape[2:]))
    target.view(-1)[2] = -100  # which is left out
    return 3 * torch.randn(shape), target


def traced(loss, logits, target, *, train=True):
    """The graph as Inductor gets it, and the same after the pass."""
    function = grad_and_value(loss) if train else loss
    make = make_fx(function, select_decomp_table(), tracing_mode="fake")
    before, after = make(logits, target), make(logits, target)
    Logits()(after.graph)
    after.graph.lint()
    after.graph.eliminate_dead_code()
    after.recompile()
    return before, after


def gathers(graph):
    target = torch.ops.aten.gather.default
    return len(graph.graph.find_nodes(op="call_function", target=target))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


LOSSES = {
    "mean": (ROWS, CLASSES),
    "bfloat16": (ROWS, CLASSES),
    "negative dim": (ROWS, CLASSES),
    "first dim": (ROWS, CLASSES),
    "middle dim": (2, CLASSES, 3),
}


def loss_of(name):
    def gathered(logits, target):
        dim = {"first dim": 0, "negative dim": -1}.get(name, 1)
        logits = logits.T if name == "first dim" else logits
        index = target.clamp(min=0).unsqueeze(dim)
        return -logits.log_softmax(dim).gather(dim, index).sum()

    def given(logits, target):
        if name == "bfloat16":
            logits = logits.bfloat16().float()
        return F.cross_entropy(logits, target)

    return gathered if name.endswith("dim") else given


@pytest.mark.parametrize("name", LOSSES)
def test_no_number_is_gathered_and_the_bits_are_the_same(name):
    logits, target = data(LOSSES[name])
    before, after = traced(loss_of(name), logits, target)
    assert gathers(before) == 1
    assert gathers(after) == 0
    assert_same(after(logits, target), before(logits, target))


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["label", "elsewhere", "row"])
def test_numbers_that_are_not_finite(number, where):
    logits, target = data()
    label = int(target[1])
    if where == "row":
        logits[1] = number
    else:
        logits[1, label if where == "label" else label - 1] = number
    before, after = traced(loss_of("mean"), logits, target)
    assert gathers(after) == 0
    assert_same(after(logits, target), before(logits, target))


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_a_label_that_is_no_class_is_not_passed_over(label):
    """As a gather would end the process of a GPU."""
    logits, target = data()
    _, after = traced(loss_of("mean"), logits, target)
    [output] = after.graph.find_nodes(op="output")
    output.args = output.args[0][1:]  # the loss alone: a gradient is refused on a CPU
    after.graph.eliminate_dead_code()
    after.recompile()
    assert math.isfinite(after(logits, target))
    target[0] = label
    assert math.isnan(after(logits, target))


def without_softmax(logits, target):
    return -logits.gather(1, target.clamp(min=0)[:, None]).sum()


def of_two(logits, target):
    index = target.clamp(min=0)[:, None].expand(-1, 2)
    return -logits.log_softmax(1).gather(1, index).sum()


def of_few_rows(logits, target):
    index = target.clamp(min=0)[:2, None]
    return -logits.log_softmax(1).gather(1, index).sum()


def of_other_maximum(logits, target):
    shifted = logits - logits.clamp(max=0.5).amax(1, keepdim=True)
    log_probs = shifted - shifted.exp().sum(1, keepdim=True).log()
    own = log_probs.gather(1, target.clamp(min=0)[:, None])
    return log_probs.exp().square().sum() - own.sum()


def read_before(logits, target):
    log_probs = logits.log_softmax(1)
    entropy = -(log_probs.exp() * log_probs).sum()
    return entropy - log_probs.gather(1, target.clamp(min=0)[:, None]).sum()


def weighted(logits, target):
    """Whose log-probabilities are multiplied before one is gathered."""
    return F.cross_entropy(logits, target, torch.arange(1.0, CLASSES + 1))


@pytest.mark.parametrize(
    "loss",
    [without_softmax, of_two, of_few_rows, of_other_maximum, read_before, weighted],
)
def test_what_is_something_else_is_left_alone(loss):
    before, after = traced(loss, *data())
    assert gathers(before) == gathers(after) > 0


def test_what_needs_no_gradient_or_is_small_is_left_alone(monkeypatch):
    _, after = traced(loss_of("mean"), *data(), train=False)
    assert gathers(after) == 1
    monkeypatch.undo()
    _, after = traced(loss_of("mean"), *data())
    assert gathers(after) == 1


@gpu
def test_there_is_no_second_copy_of_the_logits_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    torch.manual_seed(0)
    rows, width, classes = 8192, 64, 32768
    model = nn.Linear(width, classes, bias=False)
    goal = ll.supervised(model.cuda(), nn.CrossEntropyLoss())
    optimizer = ll.optim.SGD(lr=1.0)
    batch = torch.randn(rows, width), torch.randint(0, classes, (rows,))
    batch = tuple(t.cuda() for t in batch)
    plain = ll.make_step(goal, optimizer, precision="bf16")
    results = []
    for step in (plain, ll.compile_step(plain, donate=True)):
        params, opt_state = ll.init(goal, optimizer, skip_nonfinite=0)
        params, opt_state, loss_sum, _ = step(params, opt_state, batch)
        results.append((loss_sum, params["weight"].clone()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-4)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    params, opt_state = ll.init(goal, optimizer, skip_nonfinite=0)
    step(params, opt_state, batch)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.5 * 2 * rows * classes
