"""The cross entropy of many classes on a GPU, without a second copy of the logits."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from lossloop import _inlined
from lossloop._inlined import inlined

aten = torch.ops.aten

LEAST = 1e8  # logits; fewer take no memory that matters


class Logits(CustomGraphPass):
    """Lets the gradient of a cross entropy be written over the logits.

    In a language model these two are the largest tensors of a step. Inductor writes
    one over the other if nobody else reads the old numbers, and the loss does: it
    gathers one of each row, in a kernel of its own. So this one is picked while the row
    is read for its maximum, as a sum of which all other terms are zero. The gradient
    waits for it: it takes the larger of the maximum and that number, which is the
    maximum.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrites log-probabilities that a loss gathers and a gradient reads.

        Args:
            graph: Of a step, with examples of the values.
        """
        for gather in graph.find_nodes(op="call_function", target=aten.gather.default):
            parts = _parts_of(gather)
            if parts is None:
                continue
            log_probs, dim, index = gather.args
            logits, largest, log = parts
            gradient = [user for user in log_probs.users if user is not gather]
            if not gradient or any(user < gather for user in gradient):
                continue
            picked = inlined(gather, partial(_picked, dim=dim), logits, index)
            later = inlined(gather, _log_probs, logits, largest, picked, log)
            for user in gradient:
                user.replace_input_with(log_probs, later)
            loss = partial(_log_prob, classes=logits.meta["val"].shape[dim])
            gather.replace_all_uses_with(
                inlined(gather, loss, picked, index, largest, log)
            )
            graph.erase_node(gather)

    def uuid(self) -> bytes:
        """What the cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__, _inlined.__file__))


def _parts_of(gather: Any) -> tuple[Node, Node, Node] | None:
    """Logits, their maximum, and the logarithm of the sum of `exp(logits - maximum)`.

    None if it is no number of each row of many log-probabilities that is gathered.
    """
    log_probs, dim, index = gather.args
    shifted = _of_difference(log_probs)
    parts = None if shifted is None else _of_difference(shifted[0])
    if shifted is None or parts is None:
        return None
    (logits, largest), log = parts, shifted[1]
    shape = logits.meta["val"].shape
    row = [*shape]
    row[dim] = 1
    ours = (
        shape.numel() >= LEAST
        and largest.target is aten.amax.default
        and largest.args == (logits, [dim], True)
        and list(log.meta["val"].shape) == list(index.meta["val"].shape) == row
    )
    return (logits, largest, log) if ours else None


def _of_difference(node: Any) -> tuple[Node, Node] | None:
    nodes = node.target is aten.sub.Tensor and len(node.all_input_nodes) == 2
    return node.args if nodes else None


def _picked(logits: Tensor, index: Tensor, *, dim: int) -> Tensor:
    places = torch.arange(logits.shape[dim], device=logits.device)
    places = places.view(-1, *[1] * (logits.ndim - 1 - dim % logits.ndim))
    return torch.where(places == index, logits, 0.0).sum(dim, keepdim=True)


def _log_probs(logits: Tensor, largest: Tensor, picked: Tensor, log: Tensor) -> Tensor:
    return logits - torch.maximum(largest, picked) - log


def _log_prob(
    picked: Tensor, index: Tensor, largest: Tensor, log: Tensor, *, classes: int
) -> Tensor:
    # A gather would end the process at an index that is no class.
    picked = torch.where((index >= 0) & (index < classes), picked, float("nan"))
    return picked - largest - log
