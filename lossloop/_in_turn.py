"""Several passes over a graph, where torch 2.11 takes one."""

from collections.abc import Callable, Sequence
from typing import Any

from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

# Passes of a kind that torch 2.11 does not have yet.
_TOLD: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())


class InTurn(CustomGraphPass):
    """Passes of which each rewrites what the one before has left."""

    def __init__(self, theirs: Any, ours: Sequence[CustomGraphPass]) -> None:
        """Rewrites nothing yet.

        Args:
            theirs: What the caller has set: a pass, a list of them, or None.
            ours: Come after them.
        """
        several = isinstance(theirs, list | tuple)
        before = [theirs] if theirs is not None and not several else theirs or []
        self.passes: list[Callable[..., object]] = [*before, *ours]

    def __call__(self, graph: Graph) -> None:
        """Calls each of them."""
        for each in self.passes:
            if isinstance(each, _TOLD):
                each(graph, is_inference=True)  # autograd has nothing to do with it
            else:
                each(graph)

    def uuid(self) -> Any:
        """What the cache of compiled graphs knows them by; None if one has no name."""
        names = [
            each.uuid() if isinstance(each, CustomGraphPass) else None
            for each in self.passes
        ]
        return None if None in names else names
