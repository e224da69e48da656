"""Several passes over a graph, where torch 2.11 takes one."""

from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph


class InTurn(CustomGraphPass):
    """Passes of which each rewrites what the one before has left."""

    def __init__(self, *passes: CustomGraphPass) -> None:
        """Rewrites nothing yet."""
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        """Calls each of them."""
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        """What the cache of compiled graphs knows them by."""
        return [each.uuid() for each in self.passes]
