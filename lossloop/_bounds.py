"""Whether the product of two matrices is finite, told by its sides."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.fx_utils import get_node_storage
from torch.fx import Graph, Node

from lossloop import _inlined
from lossloop._inlined import inlined

aten, prims = torch.ops.aten, torch.ops.prims

# Products of which may be as large as those in float32.
_WIDE = (torch.float32, torch.float64, torch.bfloat16)
_SAME_ELEMENTS = (
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten.clone.default,
)


class Bounds(CustomGraphPass):
    """Lets a gate look at the sides of a product, which then is computed where used.

    A gate adds up all gradients before it lets any of them be used, so that all would
    have to be in memory at once. But that of a linear layer is a product `a @ b`, whose
    elements and their partial sums are at most `sum_k (sum_i |a_ik|) (sum_j |b_kj|)`.
    This is finite only if they are, and it is not if a side is not. Like the sum in its
    place, it may overflow where no element has, at numbers that are lost in any case.

    The sides wait in memory instead, so this is for products that are larger.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrites sums over products that are only asked whether they are finite.

        Args:
            graph: Of a step, with examples of the values.
        """
        found = False
        for total in graph.find_nodes(op="call_function", target=aten.sum.default):
            product = _product_of(total.args[0])
            if product is None or not _is_larger_than_sides(product):
                continue
            if not _asks_finite(total):
                continue
            bound = partial(_bound, dtype=total.meta["val"].dtype)
            total.replace_all_uses_with(inlined(total, bound, *product.args))
            graph.erase_node(total)
            _compute_late(product)
            found = True
        if found:
            _write_early(graph)

    def uuid(self) -> bytes:
        """What the cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__, _inlined.__file__))


def _product_of(node: Any) -> Node | None:
    """The product of matrices whose elements a node has; None if it is of others."""
    while isinstance(node, Node):
        if node.target in (aten.mm.default, aten.bmm.default):
            return node if node.meta["val"].dtype in _WIDE else None
        if node.target is prims.convert_element_type.default:
            if node.meta["val"].dtype not in (torch.float32, torch.float64):
                return None  # numbers might become infinite
        elif node.target not in _SAME_ELEMENTS:
            return None
        node = node.args[0]
    return None


def _is_larger_than_sides(product: Node) -> bool:
    sides: Any = product.args
    return product.meta["val"].numel() > sum(s.meta["val"].numel() for s in sides)


def _asks_finite(total: Node) -> bool:
    """Whether `isfinite` is all that is asked of a sum, or of what it is added to."""
    users = list(total.users)
    while len(users) == 1 and users[0].target in (
        aten.add.Tensor,
        prims.convert_element_type.default,
    ):
        if users[0].kwargs:
            return False
        total = users[0]
        users = list(total.users)
    by_target = {user.target: user for user in users}
    if len(users) != 2 or by_target.keys() != {aten.eq.Tensor, aten.abs.default}:
        return False
    is_number, size = by_target[aten.eq.Tensor], by_target[aten.abs.default]
    both = list(is_number.users)
    return (
        is_number.args == (total, total)
        and [user.target for user in both] == [aten.mul.Tensor]
        and len(size.users) == 1
        and all(
            small.target is aten.ne.Scalar
            and small.args == (size, math.inf)
            and list(small.users) == both
            for small in size.users
        )
    )


def _bound(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """What no element of `a @ b` is larger than."""
    wide = torch.promote_types(a.dtype, torch.float32)
    columns, rows = a.abs().sum(-2, dtype=wide), b.abs().sum(-1, dtype=wide)
    return (columns * rows).sum().to(dtype)


def _compute_late(node: Node) -> None:
    """Moves a node to where it is first used, other than as another form of it."""
    for user in node.users:
        if user.target in _SAME_ELEMENTS:
            _compute_late(user)
    if node.users:
        min(node.users).prepend(node)


def _write_early(graph: Graph) -> None:
    """Writes into an input as soon as nothing reads what was there.

    These come last in a graph of functions. Inductor computes what is written where the
    write is, and would have all products first.
    """
    aliases: dict[int | None, list[Node]] = {}
    for node in graph.nodes:
        aliases.setdefault(get_node_storage(node), []).append(node)
    for write in graph.find_nodes(op="call_function", target=aten.copy_.default):
        old, new = write.args[:2]
        if not isinstance(old, Node) or not isinstance(new, Node):
            continue
        if old.op != "placeholder" or new.op != "call_function":
            continue
        same = aliases[get_node_storage(old)]
        readers = {reader for node in same for reader in node.users} - {write}
        if all(reader.op == "call_function" for reader in readers):
            max(new, *readers).append(write)
