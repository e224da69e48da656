"""The gradient of max pooling, as arithmetic on rows of channels."""

import pytest
import torch
import torch._inductor.lowering  # which decompositions refer to
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.func import functional_call, grad
from torch.fx.experimental.proxy_tensor import make_fx

from lossloop._pooling import Pooling

CHANNELS, SIZE = 16, 12


def model(pool, after, channels=CHANNELS):
    torch.manual_seed(0)
    first = nn.Conv2d(2, channels, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), pool, after)


def gradient(module):
    """Of a sum that depends on every output in its own way."""

    def loss(params, x):
        output = functional_call(module, params, x)
        weights = torch.arange(output.numel(), dtype=output.dtype) % 7 - 3
        return (output * weights.view(output.shape)).sum()

    return grad(loss)


def traced(module, x):
    """The graph of a gradient as Inductor gets it, and the same after the pass."""
    params = {name: p.detach() for name, p in module.named_parameters()}
    make = make_fx(gradient(module), select_decomp_table(), tracing_mode="fake")
    before, after = make(params, x), make(params, x)
    Pooling()(after.graph)
    after.graph.lint()
    after.graph.eliminate_dead_code()
    after.recompile()
    return before, after, params


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def scatters(graph):
    target = torch.ops.aten.scatter_add.default
    return len(graph.graph.find_nodes(op="call_function", target=target))


WINDOWS = {"2": 2, "3": 3, "2 by 3": (2, 3), "1 by 4": (1, 4)}


def afters(window):
    high, wide = window if isinstance(window, tuple) else (window, window)
    size = CHANNELS * (SIZE // high) * (SIZE // wide)
    return {
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(size, 5)),
        "convolution": nn.Conv2d(CHANNELS, 3, 1),
        "nothing": nn.Identity(),
        "a sum": nn.Flatten(),
    }


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("after", afters(2))
@pytest.mark.parametrize("values", ["random", "equal"])
def test_it_is_the_same_gradient(window, after, values):
    module = model(nn.MaxPool2d(window), afters(window)[after])
    x = torch.randn(3, 2, SIZE, SIZE)
    if values == "equal":  # rounded, and many zeros of the ReLU
        x = x.round()
        with torch.no_grad():
            module[0].weight.round_()
    plain, ours, params = traced(module, x)
    assert scatters(plain) == 1
    assert scatters(ours) == 0
    assert_same(plain(params, x), ours(params, x))


@pytest.mark.parametrize("samples", [0, 1])
def test_hardly_any_samples(samples):
    x = torch.randn(samples, 2, SIZE, SIZE)
    plain, ours, params = traced(model(nn.MaxPool2d(2), afters(2)["linear"]), x)
    assert_same(plain(params, x), ours(params, x))


def test_what_is_not_a_number_does_not_disappear():
    module = model(nn.MaxPool2d(2), afters(2)["linear"])
    x = torch.randn(3, 2, SIZE, SIZE)
    x[1, 0, 3, 4] = float("nan")
    plain, ours, params = traced(module, x)
    assert scatters(ours) == 0
    for one, other in zip(
        plain(params, x).values(), ours(params, x).values(), strict=True
    ):
        assert one.isnan().any() == other.isnan().any()
    # A sum over places, of which one has the gradient of an undefined window.
    assert_same(*(graph(params, x)["0.bias"] for graph in (ours, plain)))


AFTER = {
    "a linear layer on places": nn.Sequential(nn.Flatten(2), nn.Linear(36, 16)),
    "a linear layer on rows": nn.Linear(6, 5),
    "on wide rows": nn.Linear(6, 96),
    "on two samples at once": nn.Sequential(
        nn.Flatten(0), nn.Unflatten(0, (2, -1)), nn.Linear(CHANNELS * 72, 3)
    ),
    "on parts of a sample": nn.Sequential(
        nn.Flatten(0), nn.Unflatten(0, (8, -1)), nn.Linear(CHANNELS * 18, 3)
    ),
}


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
def test_a_linear_layer_need_not_take_a_sample(after):
    x = torch.randn(4, 2, SIZE, SIZE)
    plain, ours, params = traced(model(nn.MaxPool2d(2), after), x)
    assert scatters(ours) == 0
    assert_same(plain(params, x), ours(params, x))


OTHERS = {
    "windows overlap": lambda: model(nn.MaxPool2d(3, stride=1), nn.Identity()),
    "windows apart": lambda: model(nn.MaxPool2d(2, stride=3), nn.Identity()),
    "padded": lambda: model(nn.MaxPool2d(2, padding=1), nn.Identity()),
    "dilated": lambda: model(nn.MaxPool2d(2, stride=2, dilation=2), nn.Identity()),
    "a rest": lambda: model(nn.MaxPool2d(5), nn.Identity()),
    "large windows": lambda: model(nn.MaxPool2d(4), nn.Identity()),
    "few channels": lambda: model(nn.MaxPool2d(2), nn.Identity(), channels=8),
    "in double precision": lambda: model(nn.MaxPool2d(2), nn.Identity()).double(),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_pooling_is_left_alone(other):
    module = other()
    x = torch.randn(3, 2, SIZE, SIZE, dtype=module[0].weight.dtype)
    plain, ours, _ = traced(module, x)
    assert scatters(plain) == scatters(ours) == 1


def test_without_a_convolution_it_is_left_alone():
    # The channels then do not lie beside each other.
    module = nn.Sequential(
        nn.BatchNorm2d(16, track_running_stats=False), nn.MaxPool2d(2)
    )
    plain, ours, _ = traced(module, torch.randn(3, 16, SIZE, SIZE))
    assert scatters(plain) == scatters(ours) == 1


def test_a_product_that_is_used_twice_is_not_computed_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.linear = nn.Conv2d(2, 16, 3), nn.Linear(16 * 25, 3)
            self.offset = nn.Parameter(torch.ones(16 * 25))

        def forward(self, x):
            pooled = nn.functional.max_pool2d(self.first(x), 2).flatten(1)
            return self.linear(pooled + self.offset)

    plain, ours, params = traced(Twice(), x := torch.randn(2, 2, SIZE, SIZE))
    assert scatters(ours) == 0
    assert_same(plain(params, x), ours(params, x))
    products = [
        len(
            graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
        )
        for graph in (plain, ours)
    ]
    assert products[0] == products[1]


class Unpooled(nn.Module):
    """Puts what was pooled where it was, onto what is given."""

    def __init__(self, base, flat):
        super().__init__()
        self.first, self.base, self.flat = nn.Conv2d(2, 16, 3, padding=1), base, flat

    def forward(self, x):
        x = self.first(x)
        pooled, places = nn.functional.max_pool2d(x, 2, return_indices=True)
        start = x if self.base is None else torch.full_like(x, self.base)
        if self.flat:
            parts = [t.flatten(2).flatten(0, 1) for t in (start, places, pooled)]
            return parts[0].scatter_add(1, *parts[1:])
        return start.flatten(2).scatter_add(2, places.flatten(2), pooled.flatten(2))


def test_one_place_has_it_if_numbers_are_undefined():
    def unpooled(x, weight):
        x = nn.functional.conv2d(x, weight)
        x = torch.where(x > 0.5, float("nan"), x)
        pooled, places = nn.functional.max_pool2d(x, 2, return_indices=True)
        places, pooled = (t.flatten(2).flatten(0, 1) for t in (places, pooled))
        start = torch.zeros(len(places), SIZE * SIZE)
        return start.scatter_add(1, places, pooled.nan_to_num(1.0))

    torch.manual_seed(0)
    args = torch.randn(2, 2, SIZE, SIZE), torch.randn(16, 2, 1, 1)
    graph = make_fx(unpooled, select_decomp_table(), tracing_mode="fake")(*args)
    expected = graph(*args)
    Pooling()(graph.graph)
    graph.recompile()
    assert scatters(graph) == 0
    torch.testing.assert_close(graph(*args).sum(1), expected.sum(1))


@pytest.mark.parametrize("base", [0.0, 1.0, None])
@pytest.mark.parametrize("flat", [True, False])
def test_what_is_put_elsewhere_is_right(base, flat):
    module = Unpooled(base, flat)
    plain, ours, params = traced(module, x := torch.randn(2, 2, SIZE, SIZE))
    assert_same(plain(params, x), ours(params, x))
