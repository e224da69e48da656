"""A learning-rate scheduler of torch, stepped once per step or once per epoch."""

from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lossloop._optimizers import follow, host_hyper
from lossloop._types import OptState, Slots


class Schedule:
    """Steps a `torch.optim.lr_scheduler` and hands its rates on to the state.

    The scheduler writes into its optimizer's groups, on the host; what changed there
    becomes new 0-d tensors in the state, so the step is not compiled again.

    Attributes:
        rate: Of the first group in the last step; None if that is not known.
    """

    def __init__(
        self,
        scheduler: Any,
        by: Literal["step", "epoch"] | None,
        optimizer: Any,
    ) -> None:
        if scheduler is not None:
            _check(scheduler, by, optimizer)
        elif by is not None:
            raise ValueError(
                f"fit(schedule_by={by!r}) is the unit of a scheduler; pass one."
            )
        self._scheduler: Any = scheduler
        self._by = by
        instance = isinstance(optimizer, torch.optim.Optimizer)
        self._optimizer = optimizer if instance else None
        self.rate: float | None = None

    def begin(self, opt_state: OptState) -> None:
        """Notes the rates that a run starts with."""
        if isinstance(opt_state.slots, Slots):
            self.rate = opt_state.slots.groups[0].hyper["lr"].item()
        if self._optimizer is not None:
            self._followed = host_hyper(self._optimizer)

    def after_step(self, opt_state: OptState) -> OptState:
        """The state for the next step."""
        if self._by != "step":
            return opt_state
        self.rate = self._followed[0]["lr"]
        self._scheduler.step()
        return self._follow(opt_state)

    def after_epoch(self, opt_state: OptState, loss: float) -> OptState:
        """The state for the next epoch, in which a caller may have changed rates too.

        Args:
            opt_state: After the epoch's last step.
            loss: For `ReduceLROnPlateau`.
        """
        if self._by == "epoch":
            plateau = isinstance(self._scheduler, ReduceLROnPlateau)
            self._scheduler.step(*[loss] * plateau)
        if self._optimizer is None:
            return opt_state
        opt_state = self._follow(opt_state)
        self.rate = self._followed[0]["lr"]
        return opt_state

    def _follow(self, opt_state: OptState) -> OptState:
        assert self._optimizer is not None
        opt_state = follow(self._optimizer, opt_state, self._followed)
        self._followed = host_hyper(self._optimizer)
        return opt_state


def _check(scheduler: Any, by: str | None, optimizer: Any) -> None:
    if by not in ("step", "epoch"):
        raise ValueError(
            f"fit(scheduler=...) needs its unit: schedule_by='step' calls it after "
            f"every batch, schedule_by='epoch' after every epoch; got {by!r}."
        )
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "optimizer"):
        raise TypeError(
            f"fit(scheduler=...) must be a torch.optim.lr_scheduler object, got "
            f"{type(scheduler).__name__}."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"fit(scheduler=...) changes the rates of a torch optimizer: pass the "
            f"instance that the scheduler was built on as the optimizer, not a "
            f"{type(optimizer).__name__}."
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            "fit(scheduler=...) was built on another optimizer than the one passed to "
            "fit; its rates would change nothing. Build it on the same instance."
        )
    if isinstance(scheduler, ReduceLROnPlateau) and by == "step":
        raise ValueError(
            "fit(scheduler=ReduceLROnPlateau) compares losses of whole epochs; use "
            "schedule_by='epoch'."
        )
