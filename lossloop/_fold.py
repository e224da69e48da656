"""The fold: one epoch is a step carried over batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from lossloop._batches import as_batches, no_batches, transferred
from lossloop._mean import Mean
from lossloop._memory import read
from lossloop._model import device_of
from lossloop._types import (
    Batch,
    EvalStepFn,
    MetricStepFn,
    OptState,
    Params,
    StepFn,
)
from lossloop.metrics import Measured, Metric


class EndPass(Exception):
    """Raised by `on_step` to end the pass after the step that was just made.

    Args:
        opt_state: To end with.
    """

    def __init__(self, opt_state: OptState) -> None:
        super().__init__("the pass ends here")
        self.opt_state = opt_state


def fold(
    step: StepFn,
    params: Params,
    opt_state: OptState,
    batches: Iterable[Batch],
    *,
    mean: Mean | None = None,
    on_step: Callable[[OptState, Mean], OptState] | None = None,
) -> tuple[Params, OptState, Mean]:
    """Carries a training step over batches.

    Reads nothing from the device: `mean.value()` does, once, when it is called.

    Args:
        step: `step(params, opt_state, batch) -> (params, opt_state, loss_sum, n)`.
        params: To start from.
        opt_state: To start from.
        batches: A `DataLoader`, any iterable of batches, or a tuple of tensors, which
            is one batch of all the data; moved to the device of `params`.
        mean: Of the batches before, if these are the rest of a pass.
        on_step: Called after every step with the new state and the mean so far; returns
            the state to go on with. The place for a changing rate or a progress bar.
            It may `raise EndPass(opt_state)` to end the pass there.

    Returns:
        `(params, opt_state, mean)`; the mean is that of the losses as seen while
        training, with the weights that moved from batch to batch.

    Raises:
        ValueError: If there are no batches, and no `mean` of those before.

    Example:
        >>> import lossloop as ll
        >>> goal = ll.supervised(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> params, opt_state = ll.init(goal, torch.optim.SGD)
        >>> batches = [(torch.ones(n, 2), torch.zeros(n, 1)) for n in (4, 4, 1)]
        >>> step = ll.make_step(goal, torch.optim.SGD)
        >>> params, opt_state, mean = ll.fold(step, params, opt_state, batches)
        >>> int(mean.weight)
        9
    """
    batches = as_batches("batches", batches, passes=1)
    device = device_of(params)
    seen = mean is not None
    mean = mean or Mean.empty(device)
    for batch in transferred(read(batches), device):
        with torch.no_grad():  # not around the loader, which is the caller's
            params, opt_state, loss_sum, n = step(params, opt_state, batch)
        mean = mean.add(loss_sum, n)
        seen = True
        if on_step is not None:
            try:
                opt_state = on_step(opt_state, mean)
            except EndPass as end:
                opt_state = end.opt_state
                break
    if not seen:
        raise no_batches("batches")
    return params, opt_state, mean


def fold_eval(eval_step: EvalStepFn, params: Params, batches: Iterable[Batch]) -> Mean:
    """Carries an evaluation step over batches, with the weights frozen.

    Args:
        eval_step: `eval_step(params, batch) -> (loss_sum, n)`. For one with metrics,
            which are left out here, see `fold_metrics`.
        params: Of the model.
        batches: As for `fold`.

    Returns:
        The mean over all of them; `mean.value()` reads it.

    Raises:
        ValueError: If there are no batches.

    Example:
        >>> import lossloop as ll
        >>> goal = ll.supervised(torch.nn.Flatten(0), torch.nn.L1Loss())
        >>> batches = [(torch.ones(n), torch.zeros(n)) for n in (4, 4, 1)]
        >>> ll.fold_eval(ll.make_eval_step(goal), goal.init(), batches).value()
        1.0
    """
    mean = Mean.empty(device_of(params))
    for loss_sum, n, *_ in _evaluated(eval_step, params, batches):
        mean = mean.add(loss_sum, n)
    return mean


def fold_metrics(
    eval_step: MetricStepFn, params: Params, batches: Iterable[Batch]
) -> tuple[Mean, Measured]:
    """Carries an evaluation step with metrics over batches, with the weights frozen.

    Reads nothing from the device: `mean.value()` and `measured.values()` do, once each.
    Objects of torchmetrics are reset first, moved to the device of `params`, and called
    batch by batch outside the step; what they read is up to them.

    Args:
        eval_step: Of `make_eval_step(objective, metrics)`, compiled or not.
        params: Of the model.
        batches: As for `fold`.

    Returns:
        `(mean, measured)`, over all of the batches.

    Raises:
        ValueError: If there are no batches.
        TypeError: If the step is none of `make_eval_step`.

    Example:
        >>> import lossloop as ll
        >>> from lossloop.metrics import mean_absolute_error
        >>> goal = ll.supervised(torch.nn.Flatten(0), torch.nn.MSELoss())
        >>> eval_step = ll.make_eval_step(goal, {"mae": mean_absolute_error()})
        >>> batches = [(torch.full((n,), 2.0), torch.zeros(n)) for n in (4, 4, 1)]
        >>> mean, measured = fold_metrics(eval_step, goal.init(), batches)
        >>> mean.value(), measured.values()
        (4.0, {'mae': 2.0})
    """
    metrics = getattr(eval_step, "metrics", None)
    if metrics is None:
        raise TypeError(
            f"fold_metrics(eval_step, ...) takes a step that knows its metrics, got a "
            f"{type(eval_step).__name__}. Make it with make_eval_step(objective, "
            f"metrics)."
        )
    device = device_of(params)
    for metric in metrics.values():
        if not isinstance(metric, Metric):
            metric.reset()
            metric.to(device)
    mean = Mean.empty(device)
    totals: dict[str, tuple[torch.Tensor, ...]] = {}
    for loss_sum, n, *sums in _evaluated(eval_step, params, batches):
        mean = mean.add(loss_sum, n)
        for name, metric in metrics.items():
            new = sums[0][name]
            if not isinstance(metric, Metric):
                metric.update(*new)
            elif name in totals:
                totals[name] = tuple(map(torch.add, totals[name], new))
            else:
                totals[name] = new
    results = {
        name: metric.value(totals[name])
        if isinstance(metric, Metric)
        else metric.compute()
        for name, metric in metrics.items()
    }
    weights = {name: total[-1] for name, total in totals.items()}
    return mean, Measured(results, weights)


def _evaluated(
    eval_step: EvalStepFn | MetricStepFn, params: Params, batches: Iterable[Batch]
) -> Iterator[Any]:
    """What the step returns for each batch."""
    seen = False
    batches = as_batches("batches", batches, passes=1)
    for batch in transferred(read(batches), device_of(params)):
        yield eval_step(params, batch)
        seen = True
    if not seen:
        raise no_batches("batches")
