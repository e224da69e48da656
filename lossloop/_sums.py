"""Sums over many rows on a CPU, block by block."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from lossloop import _inlined
from lossloop._inlined import inlined

aten = torch.ops.aten

BLOCK = 32  # rows
FEWEST_ROWS = 8 * BLOCK
LEAST = 2**17  # numbers; fewer are in the nearest cache, however they are read


class Sums(CustomGraphPass):
    """Adds up rows in blocks, and then the blocks.

    The gradients of biases and of normalization are sums over all rows, as many as a
    batch has samples or places. Torch 2.13 adds up one strip of columns, as wide as a
    vector, from the first row to the last, then the next. Each row lies in another page
    of memory, and before the next strip begins they are forgotten. The pages of a block
    are remembered, and what is read next of them is fetched ahead.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrites sums over leading dimensions.

        Args:
            graph: Of a step, with examples of the values.
        """
        for total in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
            if _is_over_many_rows(total):
                x, dims = total.args[:2]
                last, shape = len(dims) - 1, total.meta["val"].shape
                new = inlined(total, partial(_by_blocks, last=last, shape=shape), x)
                total.replace_all_uses_with(new)
                graph.erase_node(total)

    def uuid(self) -> bytes:
        """What the cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__, _inlined.__file__))


def _is_over_many_rows(total: Any) -> bool:
    x, dims = total.args[0].meta["val"], total.args[1] or ()
    leading = x.shape[: len(dims)]
    return (
        x.device.type == "cpu"
        and x.dtype is total.meta["val"].dtype is torch.float32
        and len(dims) < x.ndim
        and sorted(dim % x.ndim for dim in dims) == [*range(len(dims))]
        and leading.numel() >= FEWEST_ROWS
        and leading[-1] >= BLOCK // 2
        and x.numel() >= LEAST
    )


def _by_blocks(x: Tensor, *, last: int, shape: torch.Size) -> Tensor:
    """The sum over all dimensions up to the last one of the rows."""
    dims, size = [*range(last + 1)], x.shape[last]
    block = min(BLOCK, size)
    whole = size - size % block
    blocks = x.narrow(last, 0, whole).unflatten(last, (-1, block))
    total = blocks.sum(last + 1).sum(dims)
    if whole < size:
        total = total + x.narrow(last, whole, size - whole).sum(dims)
    return total.view(shape)
