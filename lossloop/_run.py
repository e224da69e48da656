"""A training run as a value: all that it takes to go on from there."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lossloop._history import History
from lossloop._mean import Mean
from lossloop._types import Params


class Best(NamedTuple):
    """The weights of the lowest validation loss so far."""

    epoch: int  # from 1
    loss: float
    params: Params  # a copy: training does not change it


class Run(NamedTuple):
    """A training run between two steps.

    It is what `save` writes and `load` returns.

    Attributes:
        params: The weights and buffers after the last step, under their `state_dict`
            names.
        opt_state: What the step carries besides: an `OptState`, or any tree of
            dictionaries, lists, tuples and tensors.
        epoch: Epochs finished.
        batch: Batches made of the next one.
        mean: Of the losses of those batches; None if there are none.
        history: A row per finished epoch.
        best: The best epoch so far and its weights; None if there is none.
        rest: Whatever else is to be kept, by name: numbers, strings, tensors, and
            dictionaries, lists and tuples of them.

    Example:
        >>> import torch
        >>> run = Run({"weight": torch.zeros(2)}, (), epoch=3)
        >>> run.epoch, run.batch, dict(run.rest)
        (3, 0, {})
    """

    params: Params
    opt_state: Any
    epoch: int = 0
    batch: int = 0
    mean: Mean | None = None
    history: History = History()
    best: Best | None = None
    rest: Mapping[str, Any] = MappingProxyType({})
