"""Learning-rate schedules as pure functions of the number of updates made.

A schedule turns the number of updates made so far, a tensor of shape () that is 0 for
the first, into the factor, also of shape (), by which every parameter group's rate is
multiplied. Any pure function of tensors will do; those here follow
`torch.optim.lr_scheduler`, with factors where torch has rates. After its last step a
schedule stays at its end.

Counts of steps are ints. Other parameters may also be tensors of shape (), whose values
are not checked: schedules then stack under `torch.vmap`, and have derivatives by them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "constant",
    "cosine",
    "exponential",
    "join",
    "linear",
    "one_cycle",
    "polynomial",
    "step",
    "warm_up",
]

Number = float | Tensor


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any, least: float = 0.0) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0  # reading more would wait for the device
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= least


def _is_positive(value: Any) -> bool:
    return _is_number(value, least=math.ulp(0.0))


_COUNT = (_is_count, "an int of at least 1")
_FACTOR = (_is_number, "a number of at least 0")
_POSITIVE = (_is_positive, "a number above 0")
_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": _COUNT,
    "every": _COUNT,
    "factor": _FACTOR,
    "start": _FACTOR,
    "end": _FACTOR,
    "gamma": _POSITIVE,
    "power": _POSITIVE,
    "div_factor": _POSITIVE,
    "final_div_factor": _POSITIVE,
    "pct_start": (
        lambda value: (
            not isinstance(value, Tensor) and _is_number(value) and value <= 1
        ),
        "a number from 0 to 1",
    ),
    "anneal": (lambda value: value in ("cos", "linear"), "'cos' or 'linear'"),
}


def check_schedule(place: str, schedule: object) -> None:
    """Refuses what is not a pure function of the step.

    Raises:
        TypeError: If it is not callable, reads its step on the host, or does not return
            a tensor of shape ().
    """
    wanted = (
        f"{place} must be a function that turns the number of updates made, a tensor "
        f"of shape (), into the factor of the rate, another one: a schedule of "
        f"lossloop.schedules, or one of your own in tensor operations (torch.where in "
        f"place of if)"
    )
    if not callable(schedule):
        raise TypeError(f"{wanted}. Got {schedule!r}.")
    try:
        # Under vmap a value cannot be read: `if step < 10` raises.
        factors = torch.vmap(schedule)(torch.zeros(1, dtype=torch.float64))
    except (RuntimeError, ValueError) as error:
        raise TypeError(f"{wanted}. Got {schedule!r}: {error}") from error
    if not isinstance(factors, Tensor) or factors.shape != (1,):
        shape = tuple(getattr(factors, "shape", ()))[1:]
        raise TypeError(f"{wanted}. {schedule!r} returns one of shape {shape}.")


@dataclass(frozen=True)
class _Schedule(ABC):
    """A formula and its parameters."""

    def __post_init__(self) -> None:
        """Refuses parameters that cannot be right."""
        for name, value in vars(self).items():
            fits, wanted = _WANTED[name]
            if not fits(value):
                known = isinstance(value, int | float | str)
                raise (ValueError if known else TypeError)(
                    f"lossloop.schedules.{type(self).__name__}({name}=...) must be "
                    f"{wanted}, got {value!r}."
                )

    def __call__(self, step: Tensor) -> Tensor:
        """The factor of the rate after so many updates; both of shape ()."""
        return self._factor(step)

    @abstractmethod
    def _factor(self, step: Tensor) -> Tensor: ...


def _between(start: Number, end: Number, share: Tensor, rest: Tensor) -> Tensor:
    # Not start + (end - start) * share, which may miss the end in the last place.
    return start * rest + end * share


def _along(step: Tensor, steps: int, start: Number, end: Number) -> Tensor:
    done = step.clamp(0, steps)
    # Not 1 - share, which cancels near the end.
    return _between(start, end, done / steps, (steps - done) / steps)


def _along_cosine(done: Tensor, start: Number, end: Number) -> Tensor:
    wave = torch.cos(math.pi * done)
    return _between(start, end, (1 - wave) / 2, (1 + wave) / 2)


@dataclass(frozen=True)
class constant(_Schedule):
    """The same factor at every step.

    Args:
        factor: Of the rate.

    Example:
        >>> constant(0.5)(torch.tensor(7.0))
        tensor(0.5000)
    """

    factor: Number = 1.0

    def _factor(self, step: Tensor) -> Tensor:
        return self.factor * torch.ones_like(step)


@dataclass(frozen=True)
class linear(_Schedule):
    """From one factor to another in a straight line: torch's `LinearLR`.

    Args:
        steps: Updates until the end is reached; torch's `total_iters`.
        start: Factor of the first update.
        end: Factor after `steps` updates, and from then on.

    Example:
        >>> schedule = linear(10, start=1.0, end=0.5)
        >>> [schedule(torch.tensor(t)).item() for t in (0.0, 5.0, 10.0, 11.0)]
        [1.0, 0.75, 0.5, 0.5]
    """

    steps: int
    start: Number = 1.0
    end: Number = 0.0

    def _factor(self, step: Tensor) -> Tensor:
        return _along(step, self.steps, self.start, self.end)


@dataclass(frozen=True)
class warm_up(_Schedule):
    """From a low factor to 1 in a straight line, and 1 from then on.

    That of Goyal and others, 2017, made at every step.

    Args:
        steps: Updates made at less than the full rate.
        start: Factor of the first update; with 0, it changes no weight.

    Example:
        >>> schedule = warm_up(4)
        >>> [schedule(torch.tensor(t)).item() for t in (0.0, 1.0, 4.0, 100.0)]
        [0.0, 0.25, 1.0, 1.0]
    """

    steps: int
    start: Number = 0.0

    def _factor(self, step: Tensor) -> Tensor:
        return _along(step, self.steps, self.start, 1.0)


@dataclass(frozen=True)
class cosine(_Schedule):
    """From 1 to a lower factor along half a cosine: torch's `CosineAnnealingLR`.

    Loshchilov and Hutter, 2017, without restarts. torch's rate rises again after its
    `T_max` steps; this one stays.

    Args:
        steps: Updates until the end is reached; torch's `T_max`.
        end: Last factor; torch's `eta_min` divided by the rate.

    Example:
        >>> schedule = cosine(10)
        >>> [round(schedule(torch.tensor(t)).item(), 4) for t in (0.0, 5.0, 10.0)]
        [1.0, 0.5, 0.0]
    """

    steps: int
    end: Number = 0.0

    def _factor(self, step: Tensor) -> Tensor:
        return _along_cosine(step.clamp(0, self.steps) / self.steps, 1.0, self.end)


@dataclass(frozen=True)
class one_cycle(_Schedule):
    """Up to the rate of the optimizer and down to almost nothing: `OneCycleLR`.

    Smith and Topin, 2018, in torch's two phases. The rate of the optimizer is the
    largest, torch's `max_lr`. Momentum is not cycled: torch's equal has
    `cycle_momentum=False`.

    Args:
        steps: Updates of the whole cycle; torch's `total_steps`.
        pct_start: Share of them in which the rate rises.
        div_factor: The first factor is `1 / div_factor`.
        final_div_factor: The last is `1 / (div_factor * final_div_factor)`.
        anneal: "cos" or "linear"; torch's `anneal_strategy`.

    Example:
        >>> schedule = one_cycle(100)
        >>> [round(schedule(torch.tensor(t)).item(), 3) for t in (0.0, 29.0, 99.0)]
        [0.04, 1.0, 0.0]
    """

    steps: int
    _: KW_ONLY
    pct_start: float = 0.3
    div_factor: Number = 25.0
    final_div_factor: Number = 1e4
    anneal: Literal["cos", "linear"] = "cos"

    def _factor(self, step: Tensor) -> Tensor:
        last = self.steps - 1
        top = self.pct_start * self.steps - 1
        first = 1 / self.div_factor
        at = step.clamp(0, last)
        # A phase of no length is not entered, and needs any divisor but 0.
        rise = at / (top or 1.0)
        fall = (at - top) / ((last - top) or 1.0)
        end = first / self.final_div_factor
        if self.anneal == "cos":
            up, down = _along_cosine(rise, first, 1.0), _along_cosine(fall, 1.0, end)
        else:
            up = _between(first, 1.0, rise, 1 - rise)
            down = _between(1.0, end, fall, 1 - fall)
        return torch.where(at < top, up, down)


@dataclass(frozen=True)
class step(_Schedule):
    """A lower factor after every so many updates: torch's `StepLR`.

    Args:
        every: Updates at the same rate; torch's `step_size`.
        gamma: Factor between one such stretch and the next.

    Example:
        >>> schedule = step(30, gamma=0.5)
        >>> [schedule(torch.tensor(t)).item() for t in (0.0, 29.0, 30.0, 60.0)]
        [1.0, 1.0, 0.5, 0.25]
    """

    every: int
    gamma: Number = 0.1

    def _factor(self, step: Tensor) -> Tensor:
        return self.gamma ** torch.floor(step / self.every)


@dataclass(frozen=True)
class exponential(_Schedule):
    """The same factor between one update and the next: torch's `ExponentialLR`.

    Args:
        gamma: That factor; above 1, the rate grows.

    Example:
        >>> exponential(0.5)(torch.tensor(3.0))
        tensor(0.1250)
    """

    gamma: Number

    def _factor(self, step: Tensor) -> Tensor:
        return self.gamma**step


@dataclass(frozen=True)
class polynomial(_Schedule):
    """From 1 to 0 by a power of the share of steps that are left: `PolynomialLR`.

    Args:
        steps: Updates until 0 is reached; torch's `total_iters`.
        power: Of the share; 1 is a straight line.

    Example:
        >>> schedule = polynomial(10, power=2.0)
        >>> [schedule(torch.tensor(t)).item() for t in (0.0, 5.0, 10.0)]
        [1.0, 0.25, 0.0]
    """

    steps: int
    power: Number = 1.0

    def _factor(self, step: Tensor) -> Tensor:
        return ((self.steps - step.clamp(0, self.steps)) / self.steps) ** self.power


@dataclass(frozen=True)
class join(_Schedule):
    """One schedule after the other: torch's `SequentialLR`.

    Each counts from its own start and is asked about its own steps only. All multiply
    the rate of the optimizer, not where the one before ended.

    Args:
        schedules: Of this module, or functions of your own.
        boundaries: The step at which each but the first starts; torch's `milestones`.

    Example:
        >>> schedule = join([warm_up(10), cosine(90)], [10])
        >>> [schedule(torch.tensor(t)).item() for t in (5.0, 10.0, 100.0)]
        [0.5, 1.0, 0.0]
    """

    schedules: Sequence[Callable[[Tensor], Tensor]]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        """Refuses schedules and boundaries that do not fit each other."""
        place = "lossloop.schedules.join"
        for name in ("schedules", "boundaries"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise TypeError(
                    f"{place}({name}=...) must be a list or a tuple, got {value!r}."
                )
            object.__setattr__(self, name, tuple(value))
        for index, schedule in enumerate(self.schedules):
            check_schedule(f"{place}(schedules=...): the one at {index}", schedule)
        if len(self.boundaries) != len(self.schedules) - 1:
            raise ValueError(
                f"{place}: between {len(self.schedules)} schedules there must be "
                f"{max(0, len(self.schedules) - 1)} boundaries, got "
                f"{len(self.boundaries)}. The first schedule starts at 0 without one."
            )
        rising = all(one < other for one, other in pairwise(self.boundaries))
        if not all(map(_is_count, self.boundaries)) or not rising:
            raise ValueError(
                f"{place}(boundaries=...) must be ints of at least 1, each larger than "
                f"the one before, got {self.boundaries}."
            )

    def _factor(self, step: Tensor) -> Tensor:
        # Beyond its own steps a schedule may overflow, and 0 * inf is nan in a
        # derivative.
        spans = pairwise((0, *self.boundaries, math.inf))
        factor, *others = (
            schedule((step - start).clamp(0, end - start - 1))
            for schedule, (start, end) in zip(self.schedules, spans, strict=True)
        )
        for start, other in zip(self.boundaries, others, strict=True):
            factor = torch.where(step < start, factor, other)
        return factor
