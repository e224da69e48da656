"""Matrix products of a compiled step on the CPU."""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

aten = torch.ops.aten


class BiasApart(CustomGraphPass):
    """Takes the bias out of matrix products, for the kernel that reads them to add.

    ATen's `addmm` first copies the bias into every row of the result. For a layer of
    128 units that takes as long as the product; as an addition, Inductor fuses it.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrites `addmm(bias, a, b)` into `mm(a, b) + bias`, where it is that."""
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            value: Any = node.meta.get("val")
            if value is None or value.device.type != "cpu" or node.kwargs:
                continue
            bias, a, b = node.args
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (a, b))
                total = graph.call_function(aten.add.Tensor, (product, bias))
            product.meta.update(node.meta)
            total.meta.update(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> str:
        """What the cache of compiled graphs knows it by."""
        return "lossloop: bias apart, 1"
