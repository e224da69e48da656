"""Mixed precision: what is computed in half, and the scale that float16 needs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from lossloop._model import device_of
from lossloop._types import LossScale, Params

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(where: str, precision: Any) -> None:
    """Refuses what is no precision."""
    if precision not in ("fp32", *_DTYPES):
        raise ValueError(
            f"{where}(precision=...) must be 'fp32', 'bf16' or 'fp16', got "
            f"{precision!r}."
        )


def autocast(precision: Precision, params: Params) -> AbstractContextManager[Any]:
    """A context in which the model is computed in this precision.

    Products run in half, losses and what sums many numbers in float32, by the lists of
    `torch.autocast`. Weights, gradients and the optimizer stay as they are.
    """
    if precision == "fp32":
        return nullcontext()
    # A cache of converted weights would outlive the transform they belong to.
    return torch.autocast(
        device_of(params).type, dtype=_DTYPES[precision], cache_enabled=False
    )


def loss_scale(
    scale: float = 2.0**16,
    *,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    device: torch.device | str = "cpu",
) -> LossScale:
    """The scale that a run in float16 starts with; see `LossScale`.

    `init(..., precision="fp16")` makes one with the defaults, which are those of
    `torch.amp.GradScaler`. For another, put it into the state:
    `opt_state._replace(scale=loss_scale(2.0**10))`.

    Args:
        scale: To start with.
        growth_factor: By which it grows, larger than 1.
        backoff_factor: By which it shrinks, between 0 and 1.
        growth_interval: Good steps in a row after which it grows.
        device: Where the parameters are.

    Returns:
        The scale, as tensors of shape ().

    Raises:
        ValueError: If a number is not in its range.

    Example:
        >>> loss_scale(1024.0).scale.item()
        1024.0
    """
    for name, value, right in (
        ("scale", scale, scale > 0),
        ("growth_factor", growth_factor, growth_factor > 1),
        ("backoff_factor", backoff_factor, 0 < backoff_factor < 1),
        ("growth_interval", growth_interval, growth_interval >= 1),
    ):
        if not right:
            raise ValueError(f"loss_scale({name}=...) is out of range: {value!r}.")

    def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    return LossScale(
        number(scale),
        number(growth_factor),
        number(backoff_factor),
        number(growth_interval, torch.int64),
        number(0, torch.int64),
        number(0, torch.int64),
    )


def unscaled(grads: Params, scale: Tensor) -> tuple[Params, Tensor]:
    """The gradients of the loss itself, and whether one of them is not finite."""
    inverse = scale.double().reciprocal().float()  # as GradScaler rounds it
    grads = {name: g * inverse.to(g.dtype) for name, g in grads.items()}
    finite = torch.stack([torch.isfinite(g).all() for g in grads.values()])
    return grads, ~finite.all()


def next_scale(scale: LossScale, overflown: Tensor) -> LossScale:
    """The scale for the next step."""
    good = scale.good_steps + 1
    grows = good >= scale.growth_interval
    grown = scale.scale * scale.growth_factor
    grown = torch.where(torch.isfinite(grown) & grows, grown, scale.scale)
    return scale._replace(
        scale=torch.where(overflown, scale.scale * scale.backoff_factor, grown),
        good_steps=torch.where(overflown | grows, 0, good),
        skipped=scale.skipped + overflown,
    )
