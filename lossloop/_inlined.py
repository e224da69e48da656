"""A function written into a graph."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx


def inlined(before: Node, function: Callable[..., Tensor], *args: Any) -> Node:
    """Writes what a function does into a graph that Inductor compiles.

    Args:
        before: Where to put it.
        function: Of tensors.
        args: What to call it with, nodes that have an example of their value.

    Returns:
        Its result.
    """
    examples = [arg.meta["val"] for arg in args]
    # Tensors that the function makes are to be examples, too.
    with detect_fake_mode(examples) or nullcontext():
        traced = make_fx(function, select_decomp_table())(*examples).graph
    known = dict(zip(traced.find_nodes(op="placeholder"), args, strict=True))
    with before.graph.inserting_before(before):
        result = before.graph.graph_copy(traced, known)
    assert isinstance(result, Node)
    return result
