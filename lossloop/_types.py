"""The types that every part of lossloop speaks."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Tensor state of a model under its `state_dict` names, tied weights once."""

Batch = Any
"""Any pytree of tensors; `(inputs, targets)` for `supervised`."""

LossPair = tuple[Tensor, Tensor]
"""`(loss_sum, n)`: weighted sum of losses and sum of weights, both of shape ()."""


class Group(NamedTuple):
    """State of one parameter group of an optimizer.

    Membership is written in the state itself: a parameter belongs to the group if its
    name is a key of `moments`, with an empty dictionary if it needs no tensors.
    """

    step: Tensor  # (), float64 (float32 where the device has none), updates made
    hyper: dict[str, Tensor]  # (), same dtype; a new rate is new data, not a new graph
    moments: dict[str, dict[str, Tensor]]  # per parameter, under torch.optim's names


class Slots(NamedTuple):
    """State of one of lossloop's optimizers: its parameter groups."""

    groups: tuple[Group, ...]


class OptState(NamedTuple):
    """Everything a step carries besides the parameters."""

    slots: Any  # what `Optimizer.init` returned
    step: Tensor  # (), int64 on the CPU, steps made; part of the random seed
    seed: Tensor  # (), int64 on the CPU


class Optimizer(NamedTuple):
    """An optimizer as a record of two pure functions, in the order of optax.

    `init(params)` returns the slots; `update(grads, slots, params)` returns
    `(updates, slots)`, where the new parameter is `params[name] + updates[name]`.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params], tuple[Params, Any]]


class StepOutput(NamedTuple):
    """Result of a training step; unpacks as `params, opt_state, loss_sum, n`."""

    params: Params
    opt_state: OptState
    loss_sum: Tensor  # ()
    n: Tensor  # ()


class PairFn(Protocol):
    """A loss that returns its sum and the sum of its weights."""

    def __call__(
        self, output: Any, target: Any, weights: Tensor | None = None, /
    ) -> LossPair:
        """Returns `(loss_sum, n)`; `weights` has shape (B,), one for each sample."""
        ...


class StepFn(Protocol):
    """A pure training step."""

    def __call__(
        self, params: Params, opt_state: OptState, batch: Batch, /
    ) -> tuple[Params, OptState, Tensor, Tensor]:
        """Returns `(params, opt_state, loss_sum, n)`."""
        ...


class EvalStepFn(Protocol):
    """A pure evaluation step."""

    def __call__(self, params: Params, batch: Batch, /) -> LossPair:
        """Returns `(loss_sum, n)`."""
        ...


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The widest float the device adds in: float64, or float32 on Apple's MPS."""
    return torch.float32 if device.type == "mps" else torch.float64
