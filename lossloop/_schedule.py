"""A scheduler of torch, stepped once per step or epoch, or a pure schedule."""

import copy
from typing import Any, Literal, cast

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lossloop._optimizers import (
    as_optimizer,
    follow,
    host_hyper,
    rate_of,
    scheduled,
)
from lossloop._types import OptState, Slots


class Schedule:
    """Steps a `torch.optim.lr_scheduler` and hands its rates on to the state.

    It writes into its optimizer's groups, on the host; what changed there becomes new
    0-d tensors in the state, so the step is not compiled again. A pure schedule is a
    part of the update and needs none of this.

    Attributes:
        optimizer: The formulas of the optimizer, with the schedule if it is pure.
        by: When a scheduler of torch is stepped; None without one.
    """

    def __init__(
        self,
        scheduler: Any,
        by: Literal["step", "epoch"] | None,
        optimizer: Any,
        eval_every: int,
    ) -> None:
        self.optimizer = as_optimizer(optimizer)
        self._pure = callable(scheduler) and not hasattr(scheduler, "optimizer")
        if self._pure:
            if by not in (None, "step"):
                raise ValueError(
                    f"fit(schedule_by={by!r}): {scheduler!r} is a function of the "
                    f"step. Leave schedule_by out."
                )
            self.optimizer = scheduled(optimizer, cast(Any, scheduler))
            scheduler = by = None
        if scheduler is not None:
            _check(scheduler, by, optimizer, eval_every)
        elif by is not None:
            raise ValueError(
                f"fit(schedule_by={by!r}) is the unit of a scheduler; pass one."
            )
        self._scheduler: Any = scheduler
        self.by = by
        instance = isinstance(optimizer, torch.optim.Optimizer)
        self._optimizer = optimizer if instance else None
        self._rate: float | None = None
        self.finish_epoch()

    def begin(self, opt_state: OptState, steps: int | None) -> None:
        """Notes the rates that a run of so many scheduler steps starts with."""
        if self._optimizer is not None:
            self._followed = host_hyper(self._optimizer)
        self.finish_epoch()
        if isinstance(opt_state.slots, Slots):
            self._rate = opt_state.slots.groups[0].hyper["lr"].item()
        total = getattr(self._scheduler, "total_steps", None)
        if steps is not None and isinstance(total, int):
            left = total - self._scheduler.last_epoch
            if left < steps:
                raise ValueError(
                    f"fit(scheduler={type(self._scheduler).__name__}) has "
                    f"{left} steps left, but this run makes {steps} with "
                    f"schedule_by={self.by!r}. Build it with total_steps={steps}."
                )

    def finish_epoch(self) -> None:
        """Notes where the scheduler is, for `restore`."""
        if self._scheduler is not None:
            self._finished = copy.deepcopy(self._scheduler.state_dict())
            groups = self._scheduler.optimizer.param_groups
            self._options = [
                copy.deepcopy({k: v for k, v in group.items() if k != "params"})
                for group in groups
            ]

    def state(self) -> dict[str, Any]:
        """Where the scheduler and the groups of its optimizer are; for `resume`."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return copy.deepcopy(
            {
                "scheduler": self._scheduler and self._scheduler.state_dict(),
                "groups": [
                    {k: v for k, v in group.items() if k not in ("params", "names")}
                    for group in groups
                ],
                "rate": self._rate,
            }
        )

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a state; before `begin`."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        if self._optimizer is not None:
            groups = self._optimizer.param_groups
            for group, saved in zip(groups, state["groups"], strict=True):
                group.update(saved)

    def restore(self) -> None:
        """Puts the scheduler back to the end of the last finished epoch."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(self._finished)
            groups = self._scheduler.optimizer.param_groups
            for group, options in zip(groups, self._options, strict=True):
                group.update(options)

    def after_step(self, opt_state: OptState) -> OptState:
        """The state for the next step."""
        if self.by != "step":
            return opt_state
        self._rate = self._followed[0]["lr"]
        self._scheduler.step()
        return self.follow(opt_state)

    def after_epoch(self, opt_state: OptState, loss: float) -> OptState:
        """The state for the next epoch; `loss` is for `ReduceLROnPlateau`."""
        if self.by != "epoch":
            return opt_state
        plateau = isinstance(self._scheduler, ReduceLROnPlateau)
        self._scheduler.step(*[loss] * plateau)
        return self.follow(opt_state)

    def follow(self, opt_state: OptState) -> OptState:
        """The state with the rates that the optimizer's groups hold now."""
        if self._optimizer is None:
            return opt_state
        now = host_hyper(self._optimizer)
        if now != self._followed:
            opt_state = follow(self._optimizer, opt_state, self._followed)
            self._followed = now
        return opt_state

    def last_rate(self, opt_state: OptState) -> float | None:
        """Of the first group in the last step; None if that is not known."""
        if self._pure:
            rate = rate_of(self.optimizer, opt_state.slots)
            return None if rate is None else rate.item()
        return self._rate

    def begin_epoch(self, rate: float | None = None) -> None:
        """Notes the rate of the epoch's first step, or that of its last one so far."""
        if rate is not None:
            self._rate = rate
        elif self._optimizer is not None:
            self._rate = self._followed[0]["lr"]


def _check(scheduler: Any, by: str | None, optimizer: Any, eval_every: int) -> None:
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "optimizer"):
        raise TypeError(
            f"fit(scheduler=...) must be a schedule of lossloop.schedules or a "
            f"torch.optim.lr_scheduler object, got {type(scheduler).__name__}."
        )
    if by not in ("step", "epoch"):
        raise ValueError(
            f"fit(scheduler=...) needs its unit: schedule_by='step' calls it after "
            f"every batch, schedule_by='epoch' after every epoch; got {by!r}."
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
    if isinstance(scheduler, ReduceLROnPlateau) and eval_every > 1:
        raise ValueError(
            f"fit(scheduler=ReduceLROnPlateau, eval_every={eval_every}) would compare "
            f"the validation losses of some epochs with the training losses of others; "
            f"use eval_every=1."
        )
