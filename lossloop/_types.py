"""The types that every part of lossloop speaks."""

from collections.abc import Callable, Mapping
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


class LossScale(NamedTuple):
    """By what losses are multiplied, so that float16 gradients do not vanish.

    The rule is that of `torch.amp.GradScaler` (Micikevicius et al., 2018): a step whose
    gradient is not finite changes no weight and lowers the scale, and after
    `growth_interval` good steps in a row it is raised.
    """

    scale: Tensor  # (), float32
    growth_factor: Tensor  # (), float32
    backoff_factor: Tensor  # (), float32
    growth_interval: Tensor  # (), int64
    good_steps: Tensor  # (), int64, since the scale last changed
    skipped: Tensor  # (), int64, steps that changed no weight


class Ema(NamedTuple):
    """An exponential moving average of the trained parameters."""

    decay: Tensor  # (), float64, share of the old average
    updates: Tensor  # (), int64; the first takes the parameters as they are
    params: Params


class Gate(NamedTuple):
    """What keeps numbers that are not finite away from the weights.

    A step whose loss or gradient is not finite changes nothing. Once more than
    `allowed` steps were such, no step changes anything any more, so that the state is
    that before the step that was one too many.
    """

    allowed: Tensor  # (), int64, steps that may be skipped
    skipped: Tensor  # (), int64, steps that were not finite
    step: Tensor  # (), int64, the last step that was looked at, from 1


class Carry(NamedTuple):
    """What the tensor part of a step carries besides the parameters.

    What a run has no use for is an empty tuple: to a pytree of torch, None would be a
    leaf, which no transform takes.
    """

    slots: Any
    scale: "LossScale | tuple[()]" = ()
    ema: "Ema | tuple[()]" = ()
    gate: "Gate | tuple[()]" = ()


class OptState(NamedTuple):
    """Everything a step carries besides the parameters."""

    slots: Any  # what `Optimizer.init` returned
    step: Tensor  # (), int64 on the CPU, steps made; part of the random seed
    seed: Tensor  # (), int64 on the CPU
    scale: "LossScale | tuple[()]" = ()  # of the loss in float16
    ema: "Ema | tuple[()]" = ()
    gate: "Gate | tuple[()]" = ()

    @property
    def carry(self) -> Carry:
        """The part of it that the tensor part of a step takes and returns."""
        return Carry(self.slots, self.scale, self.ema, self.gate)

    def after(self, carry: Carry, steps: int = 1) -> "OptState":
        """The state after so many steps, which came to this."""
        slots, scale, ema, gate = carry
        return OptState(slots, self.step + steps, self.seed, scale, ema, gate)


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


class MetricStepFn(Protocol):
    """A pure evaluation step that knows the metrics it adds up."""

    @property
    def metrics(self) -> Mapping[str, Any]:
        """By name; empty for a step that returns `(loss_sum, n)` only."""
        ...

    def __call__(self, params: Params, batch: Batch, /) -> Any:
        """Returns `(loss_sum, n, sums)`, with the sums of each metric by name."""
        ...


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The widest float the device adds in: float64, or float32 on Apple's MPS."""
    return torch.float32 if device.type == "mps" else torch.float64
