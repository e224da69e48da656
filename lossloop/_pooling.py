"""The gradient of max pooling on a CPU, where windows do not overlap."""

import math
import operator
from functools import partial, reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from lossloop import _inlined
from lossloop._inlined import inlined

aten = torch.ops.aten

LARGEST_WINDOW = 9  # places, each of which is a few operations
FEWEST_CHANNELS = 16  # of which a vector is looked at as one
_INDICES = "prims._low_memory_max_pool_offsets_to_indices.default"


class Pooling(CustomGraphPass):
    """Asks each place of the input whether it was the largest of its window.

    Torch 2.13 adds the gradient of a window to the place that was, number by number,
    to zeros in memory of their own. The question is arithmetic on rows of channels,
    which lie beside each other after a convolution, and becomes one kernel with what
    comes before and after.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrites gradients of pooling in a graph with convolutions.

        Args:
            graph: Of a step, with examples of the values.
        """
        if not graph.find_nodes(op="call_function", target=aten.convolution.default):
            return
        for scatter in graph.find_nodes(
            op="call_function", target=aten.scatter_add.default
        ):
            found = _pooling_of(scatter)
            if found is None:
                continue
            x, window = found
            gradient = _without_views(scatter.args[3])
            if (
                gradient.target is aten.mm.default
                and len(gradient.users) == 1
                and len(gradient.meta["val"]) == len(x.meta["val"])
            ):
                function = partial(_after_linear, window=window)
                args = x, *gradient.args
            else:
                function = partial(_gradient, window=window)
                args = x, gradient
            new = inlined(scatter, function, *args)
            scatter.replace_all_uses_with(new)
            graph.erase_node(scatter)

    def uuid(self) -> bytes:
        """What the cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__, _inlined.__file__))


def _pooling_of(scatter: Any) -> tuple[Node, tuple[int, int]] | None:
    """What is pooled, and its windows; None if they are none of ours."""
    start, dim, index, source = scatter.args
    indices = _without_views(index)
    if str(indices.target) != _INDICES:
        return None
    offsets, window, size, stride, padding, dilation = indices.args
    if offsets.target is not operator.getitem:
        return None
    x = offsets.args[0].args[0]
    value = x.meta["val"]
    rows, places = value.shape[:2].numel(), value.shape[2:].numel()
    each = (rows, places // math.prod(window))
    ours = (
        value.device.type == "cpu"
        and value.dtype is torch.float32
        and value.ndim == 4
        and value.shape[1] >= FEWEST_CHANNELS
        and list(window) == list(stride)
        and math.prod(window) <= LARGEST_WINDOW
        and not any(padding)
        and set(dilation) == {1}
        and not any(n % width for n, width in zip(size, window, strict=True))
        # As torch writes it, and not something of the caller's.
        and (start.target, start.args[1:]) == (aten.full.default, (0,))
        and dim == 1
        and start.meta["val"].shape == (rows, places)
        and index.meta["val"].shape == source.meta["val"].shape == each
    )
    return (x, window) if ours else None


def _without_views(node: Any) -> Any:
    while node.target in (aten.view.default, aten.reshape.default):
        node = node.args[0]
    return node


def _gradient(x: Tensor, pooled: Tensor, window: tuple[int, int]) -> Tensor:
    """By `x`, from that by what was pooled, in any form."""
    n, channels, height, width = x.shape
    pooled = pooled.reshape(n, channels, height // window[0], width // window[1])
    return _by_channels(x, pooled.permute(0, 2, 3, 1), window)


def _after_linear(
    x: Tensor, outputs: Tensor, weight: Tensor, window: tuple[int, int]
) -> Tensor:
    """The same, for a linear layer on all that was pooled of a sample.

    Its weights are put into the order of the channels, and not the gradient.
    """
    channels, size = x.shape[1], x.shape[2] * x.shape[3] // math.prod(window)
    weight = weight.reshape(-1, channels, size).permute(0, 2, 1)
    pooled = outputs @ weight.reshape(-1, size * channels)
    return _by_channels(x, pooled, window)


def _by_channels(x: Tensor, pooled: Tensor, window: tuple[int, int]) -> Tensor:
    n, channels, height, width = x.shape
    high, wide = window
    rows, columns = height // high, width // wide
    pooled = pooled.reshape(n, rows, 1, columns, 1, channels)
    x = x.permute(0, 2, 3, 1).reshape(n, rows, high, columns, wide, channels)
    places = [
        x[:, :, i : i + 1, :, j : j + 1] for i, j in product(range(high), range(wide))
    ]
    largest = reduce(torch.maximum, places)

    def is_largest(place: Tensor) -> Tensor:
        return (place == largest) | (place != place)  # undefined numbers are

    # Numbers and no masks, which are written slowly if they are too many operations.
    gradient = torch.where(is_largest(x), pooled, 0.0)
    number = torch.arange(high * wide, device=x.device).view(high, 1, wide, 1)
    for before, place in enumerate(places[:-1]):  # the first of several has it
        has_it = is_largest(place) & (number > before)
        gradient = torch.where(has_it, 0.0, gradient)
    return (
        gradient.reshape(n, height, width, channels)
        .permute(0, 3, 1, 2)
        .reshape(n * channels, height * width)
    )
