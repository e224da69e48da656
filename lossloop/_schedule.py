"""A learning-rate scheduler of torch, stepped once per step or once per epoch."""

from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lossloop._optimizers import host_hyper, hyper_from_torch
from lossloop._types import OptState


class Schedule:
    """Steps a `torch.optim.lr_scheduler` and hands its rates on to the state.

    The scheduler writes into its optimizer's groups, on the host; what changed there
    becomes new 0-d tensors in the state, so the step is not compiled again.
    """

    def __init__(
        self,
        scheduler: Any,
        by: Literal["step", "epoch"] | None,
        optimizer: Any,
    ) -> None:
        if scheduler is None:
            if by is not None:
                raise ValueError(
                    f"fit(schedule_by={by!r}) is the unit of a scheduler; pass one."
                )
        else:
            _check(scheduler, by, optimizer)
            # Tells the scheduler that the optimizer does step, only not by itself.
            optimizer._opt_called = True
        self._scheduler: Any = scheduler
        self._by = by
        self._optimizer = optimizer

    def after_step(self, opt_state: OptState) -> OptState:
        """The state for the next step."""
        return self._advance(opt_state) if self._by == "step" else opt_state

    def after_epoch(self, opt_state: OptState, loss: float) -> OptState:
        """The state for the next epoch; `loss` is for `ReduceLROnPlateau`."""
        if self._by != "epoch":
            return opt_state
        if isinstance(self._scheduler, ReduceLROnPlateau):
            return self._advance(opt_state, loss)
        return self._advance(opt_state)

    def _advance(self, opt_state: OptState, *loss: float) -> OptState:
        before = host_hyper(self._optimizer)
        self._scheduler.step(*loss)
        slots = hyper_from_torch(self._optimizer, opt_state.slots, before)
        return opt_state._replace(slots=slots)


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
