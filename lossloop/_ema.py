"""The exponential moving average of the weights."""

from typing import Any

import torch

from lossloop._types import Ema, Params


def check_decay(where: str, decay: Any) -> None:
    """Refuses what is no decay."""
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        raise TypeError(f"{where}(ema=...) must be a number, got {decay!r}.")
    if not 0 <= decay < 1:
        raise ValueError(
            f"{where}(ema=...) is the share of the old average that each step keeps, "
            f"at least 0 and below 1, like 0.999; got {decay!r}."
        )


def start_ema(decay: float, trained: Params) -> Ema:
    """An average of nothing yet."""
    device = next(iter(trained.values())).device
    return Ema(
        torch.tensor(decay, dtype=torch.float64, device=device),
        torch.tensor(0, dtype=torch.int64, device=device),
        {name: t.detach().clone() for name, t in trained.items()},
    )


def averaged(ema: Ema, params: Params) -> Ema:
    """The average with the parameters after one more step.

    As `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`: the first step
    gives the parameters themselves.
    """
    first = ema.updates == 0
    share = 1 - ema.decay
    moved = {
        name: torch.where(
            first, params[name], torch.lerp(old, params[name], share.to(old.dtype))
        )
        for name, old in ema.params.items()
    }
    return Ema(ema.decay, ema.updates + 1, moved)
