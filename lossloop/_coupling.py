"""Whether the samples of a batch act on each other, so that its parts do not add up."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]

from lossloop._batches import rows, split
from lossloop._losses import is_torch_loss, loss_pair
from lossloop._model import FunctionalModel, device_of, skeleton
from lossloop._objective import Objective, forward, split_batch
from lossloop._random import host_generators_kept, seeded
from lossloop._types import Batch, LossPair, Params

# Far above the rounding of float32, far below what a coupled loss is off by.
TOLERANCE = 1e-3


class _Pair(NamedTuple):
    loss_sum: float
    n: float

    def __str__(self) -> str:
        return f"loss_sum {self.loss_sum:.6g} and n {self.n:g}"


def coupled_layers(goal: Objective) -> str | None:
    """Says which layer of the model makes samples act on each other in train mode."""
    for name, module in skeleton(goal.model, train=True).named_modules():
        if isinstance(module, BatchNorm) and module.training:
            return (
                f"model.{name} ({type(module).__name__}) normalises by the statistics "
                f"of the batch in train mode"
            )
    return None


def coupled_model(goal: Objective, params: Params, batch: Batch) -> str | None:
    """Says so if the train-mode loss of a batch is not the sum of those of its halves.

    None also where that cannot be told: random layers, batches that cannot be cut.
    """
    layers = coupled_layers(goal)
    return layers or _difference(partial(goal, params), params, batch)


def coupled_loss(goal: Objective, params: Params, batch: Batch) -> str | None:
    """Says so if a loss of the user's own is not the sum of the losses of the samples.

    Looks at the outputs of one batch, as a whole and in halves, in eval mode.

    Returns:
        None if the loss adds up, or where that cannot be told: losses that draw random
        numbers, outputs without the samples first, a single sample.
    """
    if goal.loss_fn is None:
        return _difference(partial(goal.evaluate, params), params, batch)
    if is_torch_loss(goal.loss_fn):
        return None
    pair = loss_pair(goal.loss_fn)
    inputs, *rest = split_batch(batch)
    model = FunctionalModel(skeleton(goal.model, train=False), forward)
    with torch.no_grad(), seeded(0, device_of(params)), host_generators_kept():
        output, _ = model(params, inputs)
    return _difference(lambda parts: pair(*parts), params, (output, *rest))


def _difference(
    pair: Callable[[Any], LossPair], params: Params, batch: Batch
) -> str | None:
    def read(batch: Batch) -> _Pair:
        nonlocal drew
        scope = seeded(0, device_of(params))
        with torch.no_grad(), host_generators_kept(), scope:
            before = scope.states()
            found = pair(batch)
            drew = drew or not all(map(torch.equal, before, scope.states()))
        return _Pair(*torch.stack([t.double() for t in found]).tolist())

    drew = False
    try:
        if rows(batch) < 2:
            return None
        whole, parts = read(batch), [read(part) for part in split(batch, 2)]
    except (ValueError, TypeError, RuntimeError, IndexError):
        return None  # the whole batch is checked elsewhere; parts may be impossible
    sums = [part.loss_sum for part in parts]
    if drew or _close(whole, _Pair(sum(sums), sum(part.n for part in parts))):
        return None
    halves = " and ".join(map(str, parts))
    figures = f"{whole} for its {rows(batch)} samples together, {halves} for its halves"
    if min(sums) <= whole.loss_sum <= max(sums):
        return f"{figures}. loss_sum looks like a mean: return losses.sum() instead"
    return (
        f"{figures}. The loss compares samples with each other, or adds something once "
        f"per batch (multiply a penalty on the weights by n)"
    )


def _close(one: _Pair, other: _Pair) -> bool:
    return all(
        abs(a - b) <= TOLERANCE * (abs(a) + abs(b))
        for a, b in zip(one, other, strict=True)
    )
