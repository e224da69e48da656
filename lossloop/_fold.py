"""The fold: one epoch is a step carried over batches."""

from collections.abc import Callable, Iterable

import torch

from lossloop._batches import as_batches, no_batches, transferred
from lossloop._mean import Mean
from lossloop._memory import read
from lossloop._model import device_of
from lossloop._types import Batch, EvalStepFn, OptState, Params, StepFn


class EndPass(Exception):  # noqa: N818 - no error: a pass that ends early
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
        on_step: Called after every step with the new state and the mean so far; returns
            the state to go on with. The place for a changing rate or a progress bar.
            It may `raise EndPass(opt_state)` to end the pass there.

    Returns:
        `(params, opt_state, mean)`; the mean is that of the losses as seen while
        training, with the weights that moved from batch to batch.

    Raises:
        ValueError: If there are no batches.

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
    mean = Mean.empty(device)
    seen = False
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
        eval_step: `eval_step(params, batch) -> (loss_sum, n)`.
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
    batches = as_batches("batches", batches, passes=1)
    device = device_of(params)
    mean = Mean.empty(device)
    seen = False
    for batch in transferred(read(batches), device):
        mean = mean.add(*eval_step(params, batch))
        seen = True
    if not seen:
        raise no_batches("batches")
    return mean
