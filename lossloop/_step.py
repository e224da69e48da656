"""The step: gradient and update of one batch as one pure function."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils import _pytree as pytree

from lossloop._batches import split
from lossloop._ema import averaged, check_decay, start_ema
from lossloop._gate import (
    check_allowed,
    grand_total,
    is_traced,
    judged,
    on_host,
    seen_finite,
    start_gate,
)
from lossloop._malloc import keep_freed
from lossloop._model import device_of
from lossloop._objective import (
    NOTHING_TRAINABLE,
    FunctionObjective,
    Objective,
    as_objective,
)
from lossloop._optimizers import (
    as_optimizer,
    keeps_nonfinite,
    move,
    move_in_place,
)
from lossloop._precision import (
    Precision,
    autocast,
    check_precision,
    loss_scale,
    next_scale,
    unscaled,
)
from lossloop._random import mix, seeded
from lossloop._types import (
    Batch,
    Carry,
    LossPair,
    LossScale,
    OptState,
    Params,
    Slots,
)
from lossloop.metrics import as_metrics, sums_of

Scale = LossScale | tuple[()]

Seeding = Callable[..., Any]
"""`seeding(part=0)`: a context like `seeded`, in which part of a step draws numbers."""


class Body(Protocol):
    """The tensor part of a step and the way it is run.

    Called as `body(seeding, params, carry, batch)` in training and as
    `body(seeding, params, batch)` in evaluation. Seeding stays outside the function,
    because generators are no tensors, and is a callable, because a compiled body knows
    whether it draws random numbers at all.
    """

    @property
    def function(self) -> Callable[..., Any]:
        """The pure function from tensors to tensors."""
        ...

    def __call__(self, seeding: Seeding, /, *args: Any) -> Any:
        """What the function returns."""
        ...


class Eager(NamedTuple):
    """The tensor part of a step, run as it is."""

    function: Callable[..., Any]
    in_place: Callable[..., Any] | None = None  # the same, may overwrite the state
    # The same, but the gate lets everything pass: if loss or gradient are not finite,
    # then loss_sum or the state are not, and stay so. A loop is looked at in the end.
    watching: Callable[..., Any] | None = None

    def __call__(self, seeding: Seeding, *args: Any) -> Any:
        """Calls the function with its random numbers seeded."""
        with seeding():
            return self.function(*args)


class Measuring:
    """The tensor part of an evaluation step with metrics.

    Attributes:
        metrics: By name, as `as_metrics` makes them.
    """

    def __init__(
        self, function: Callable[..., Any], metrics: Mapping[str, Any]
    ) -> None:
        self._function = function
        self.metrics = metrics

    def __call__(self, params: Params, batch: Batch) -> Any:
        """Returns `(loss_sum, n, sums)`."""
        return self._function(params, batch)


class MicroBatches(NamedTuple):
    """The tensor part of a training step, run over a batch in micro-batches.

    The gradients of their loss sums add up to that of the batch, and are divided once,
    by the total of n. Only one micro-batch's activations are in memory at a time.
    """

    add: Body  # (sums, params, batch) -> (sums, buffers, loss_sum, n)
    update: Body  # (params, carry, (sums, loss_sum, n, buffers)) -> (params, carry)
    start: Callable[[Params, Carry], Any]  # sums of no gradients, and their scale
    parts: int

    def function(
        self, params: Params, carry: Carry, batch: Batch
    ) -> tuple[Params, Carry, Tensor, Tensor]:
        """All of it as one pure function, which draws its numbers without seeding."""
        return self.eager()(nullcontext, params, carry, batch)

    def eager(self) -> "MicroBatches":
        """The same, not compiled."""
        add, update = Eager(self.add.function), Eager(self.update.function)
        return self._replace(add=add, update=update)

    def __call__(
        self, seeding: Seeding, *args: Any
    ) -> tuple[Params, Carry, Tensor, Tensor]:
        """Returns `(params, carry, loss_sum, n)`."""
        params, carry, batch = args
        sums, buffers = self.start(params, carry), {}
        micro_batches = split(batch, self.parts)
        loss_sums, ns = [], []
        for part, micro_batch in enumerate(micro_batches):
            sums, buffers, loss_sum, n = self.add(
                partial(seeding, part), sums, {**params, **buffers}, micro_batch
            )
            loss_sums.append(loss_sum)
            ns.append(n)
        loss_sum, n = torch.stack(loss_sums).sum(), torch.stack(ns).sum()
        seeding = partial(seeding, len(micro_batches))
        total = sums, loss_sum, n, buffers
        params, carry = self.update(seeding, params, carry, total)
        return params, carry, loss_sum, n


class TrainStep(NamedTuple):
    """A pure training step: `step(params, opt_state, batch)`.

    Returns `(params, opt_state, loss_sum, n)`. The inputs are left bit for bit as they
    were, and the same inputs give the same outputs bit for bit: random layers draw
    from generators seeded with `(opt_state.seed, opt_state.step)`, and the caller's
    generators are put back.
    """

    body: Body

    def __call__(
        self, params: Params, opt_state: OptState, batch: Batch
    ) -> tuple[Params, OptState, Tensor, Tensor]:
        """Returns `(params, opt_state, loss_sum, n)`."""

        def seeding(part: int = 0) -> seeded:
            mixed = seed_of(opt_state)
            return seeded(mix(mixed, part) if part else mixed, device_of(params))

        params, carry, loss_sum, n = self.body(seeding, params, opt_state.carry, batch)
        return params, opt_state.after(carry), loss_sum, n


class EvalStep(NamedTuple):
    """A pure evaluation step: `eval_step(params, batch)` gives `(loss_sum, n)`.

    With metrics it gives `(loss_sum, n, sums)`; see `make_eval_step`. The model is in
    eval mode. A model that draws random numbers even then draws the same ones for every
    batch.
    """

    body: Body

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Those that it adds up, by name."""
        # Kept by the function, so that a compiled step has them too.
        function = self.body.function
        return function.metrics if isinstance(function, Measuring) else {}

    def __call__(self, params: Params, batch: Batch) -> Any:
        """Returns `(loss_sum, n)`, and the sums of the metrics if there are any."""

        def seeding(part: int = 0) -> seeded:
            return seeded(part, device_of(params))

        with torch.no_grad():
            return self.body(seeding, params, batch)


def seed_of(opt_state: OptState, ahead: int = 0) -> int:
    """Of the random numbers that the step so many ahead draws.

    Seed and step are on the CPU: reading them waits for no device.
    """
    return mix(int(opt_state.seed), int(opt_state.step) + ahead)


def init(
    objective: Objective | Callable[[Params, Batch], LossPair],
    optimizer: Any,
    *,
    seed: int = 0,
    params: Params | None = None,
    precision: Precision = "fp32",
    ema: float | None = None,
    skip_nonfinite: int | None = None,
) -> tuple[Params, OptState]:
    """The state a run starts from.

    On a CPU, memory that the steps free stays in the process afterwards, up to 256 MB,
    unless the environment sets malloc's thresholds.

    Args:
        objective: Of `supervised` or `objective`: its model's tensors are copied; a
            function of the caller's own: pass `params` too.
        optimizer: As for `make_step`. An instance of `torch.optim` is matched with the
            model by identity, and the state it has is copied.
        seed: Of the random numbers that layers like dropout draw.
        params: Start from these instead of the model's own; they are copied.
        precision: As for `make_step`; with "fp16" the state has a scale of the loss.
        ema: Average the trained parameters over the steps, keeping this share of the
            old average in each, like 0.999: `opt_state.ema.params`, which the first
            step sets to the parameters as they are then. As `AveragedModel` of
            `torch.optim.swa_utils` does.
        skip_nonfinite: Let no step whose loss or gradient is not finite change
            anything, buffers and `ema` included, and after so many of them no step at
            all; `opt_state.gate` counts. By default such numbers go through, as they
            do elsewhere.

    Returns:
        `(params, opt_state)`.

    Raises:
        ValueError: If nothing is trainable, the optimizer holds parameters that are
            not the model's, or `precision` or `ema` are not what they can be.

    Example:
        >>> import lossloop as ll
        >>> goal = ll.supervised(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> params, opt_state = ll.init(goal, torch.optim.SGD, seed=7)
        >>> sorted(params), int(opt_state.step), int(opt_state.seed)
        (['bias', 'weight'], 0, 7)
    """
    check_precision("init", precision)
    if ema is not None:
        check_decay("init", ema)
    if skip_nonfinite is not None:
        check_allowed("init", skip_nonfinite)
    goal = as_objective(objective)
    if isinstance(goal, Objective):
        named = goal.model.named_parameters()
        own: Params = {name: p for name, p in named if name in goal.trainable}
        start = goal.init()
        if params is not None:
            if params.keys() != start.keys():
                raise ValueError(
                    f"init(params=...) must have the names of the model's own params; "
                    f"they differ in {sorted(params.keys() ^ start.keys())}."
                )
            start = {name: params[name].detach().clone() for name in start}
    else:
        if params is None:
            raise ValueError(
                "init: an objective that is a plain function has no model to take "
                "params from; pass init(..., params={name: tensor})."
            )
        start = {name: t.detach().clone() for name, t in params.items()}
        own = {name: t for name, t in start.items() if t.is_floating_point()}
    if not own:
        raise ValueError(f"init: {NOTHING_TRAINABLE}")
    # An optimizer of one's own may keep a parameter, or what was computed from it.
    slots = pytree.tree_map_only(
        Tensor, Tensor.detach, as_optimizer(optimizer).init(own)
    )
    if isinstance(slots, Slots) and not any(g.moments for g in slots.groups):
        raise ValueError(
            "init: nothing is trainable: every parameter of the optimizer has "
            "requires_grad=False. Unfreeze some with p.requires_grad_(True)."
        )
    # An optimizer that has made steps goes on with other random numbers.
    groups = slots.groups if isinstance(slots, Slots) else ()
    made = max((int(group.step) for group in groups), default=0)
    step, seeds = (torch.tensor(n, dtype=torch.int64) for n in (made, seed))
    average = () if ema is None else start_ema(ema, {name: start[name] for name in own})
    device = device_of(start)
    if device.type == "cpu":
        keep_freed()
    scale = loss_scale(device=device) if precision == "fp16" else ()
    gate = ()
    if skip_nonfinite is not None:
        gate = start_gate(skip_nonfinite, made, device)
    return start, OptState(slots, step, seeds, scale, average, gate)


def make_step(
    objective: Objective | Callable[[Params, Batch], LossPair],
    optimizer: Any,
    *,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    precision: Precision = "fp32",
) -> TrainStep:
    """Makes a pure training step, not compiled.

    The gradient is that of the batch's mean, `loss_sum / n`. A batch of total weight 0
    has no mean; its gradient is zero.

    With `accumulate=k` the step cuts its batch into k micro-batches, one after the
    other in memory, adds up the gradients of their loss sums, and divides once, by the
    n of the whole batch. Loss and update are those of the batch in one piece, to
    rounding, however the weights fall on the micro-batches: k trades time for memory
    and changes nothing else. Only what couples samples comes out otherwise: BatchNorm
    in train mode then sees micro-batches, and dropout draws other masks.

    Args:
        objective: Of `supervised` or `objective`, or any pure function
            `(params, batch) -> (loss_sum, n)`.
        optimizer: Of `lossloop.optim` or `from_torch`; a class, partial or instance of
            `torch.optim`; or an object with optax's two functions.
        accumulate: Micro-batches per batch, whose tensors must have the samples first.
            Their sizes differ by one at most; a batch of fewer samples has fewer.
        clip_grad_norm: Scale the gradient down to this total 2-norm if it is larger,
            as `torch.nn.utils.clip_grad_norm_` does.
        clip_grad_value: Clamp every element of the gradient to plus or minus this,
            before the norm is taken.
        precision: "fp32", which leaves the model as it is; or "bf16" or "fp16", which
            run it under `torch.autocast`. float16 needs a scale of the loss in the
            state: `init(..., precision="fp16")`. A step whose gradient is not finite
            then leaves weights and optimizer alone, is counted in
            `opt_state.scale.skipped`, and lowers the scale, as with `GradScaler`.

    Returns:
        `step(params, opt_state, batch) -> (params, opt_state, loss_sum, n)`.

    Raises:
        ValueError: If a bound is not positive, `accumulate` no int of at least 1, or
            `precision` unknown; from the step, if float16 finds no scale.
        TypeError: If the optimizer is not supported.

    Example:
        >>> import lossloop as ll
        >>> goal = ll.supervised(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> params, opt_state = ll.init(goal, torch.optim.Adam)
        >>> step = ll.make_step(goal, torch.optim.Adam)
        >>> batch = (torch.ones(4, 2), torch.zeros(4, 1))
        >>> params, opt_state, loss_sum, n = step(params, opt_state, batch)
        >>> int(opt_state.step), int(n)
        (1, 4)
    """
    goal = as_objective(objective)
    formulas = as_optimizer(optimizer)
    check_precision("make_step", precision)
    _check_options(
        accumulate, clip_grad_norm=clip_grad_norm, clip_grad_value=clip_grad_value
    )

    def batch_mean(
        trained: Params, params: Params, batch: Batch, scale: Scale
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Params]]:
        if precision == "fp16" and not scale:
            raise ValueError(
                "make_step(precision='fp16'): the state has no scale of the loss. Make "
                "it with init(..., precision='fp16')."
            )
        with autocast(precision, params):
            loss_sum, n, buffers = goal.train({**params, **trained}, batch)
        mean = loss_sum / divisor(n)
        return mean * scale.scale if scale else mean, (loss_sum, n, buffers)

    gradient = _gradient_of(batch_mean)

    def guarded(
        params: Params,
        carry: Carry,
        grads: Params,
        found: tuple[Tensor, Params],
        *,
        in_place: bool,
    ) -> tuple[Params, Carry]:
        loss_sum, buffers = found
        now = {**params, **buffers}
        if not carry.gate:
            return descend(now, carry, grads, in_place=in_place)
        # In float16 a gradient may overflow, which is the business of the scale.
        looked_at = [] if carry.scale else [*grads.values()]
        if _is_plain() and on_host(loss_sum):
            # What can be read need not be computed, nor chosen element by element.
            gate = carry.gate
            if gate.skipped > gate.allowed:
                return params, carry
            gate = gate._replace(step=gate.step + 1)
            if not seen_finite(loss_sum, looked_at):
                gate = gate._replace(skipped=gate.skipped + 1)
                return params, carry._replace(gate=gate)
            now, new = descend(now, carry, grads, in_place=in_place)
            return now, new._replace(gate=gate)
        good = torch.isfinite(grand_total(loss_sum, looked_at))
        passes, gate = judged(carry.gate, good)
        # What may have to be kept may not have been written to.
        new = descend(now, carry, grads, in_place=False)

        def choose(new: Any, old: Any) -> Any:
            # What is left alone, like a rate, is not to be returned as something new.
            if isinstance(new, Tensor) and new is not old:
                return torch.where(passes, new, old)
            return new if new is not old and passes else old

        kept = pytree.tree_map(choose, new, (params, carry))
        return kept[0], kept[1]._replace(gate=gate)

    def descend(
        params: Params, carry: Carry, grads: Params, *, in_place: bool
    ) -> tuple[Params, Carry]:
        slots, scale, ema, gate = carry
        overflown = None
        if scale:
            grads, overflown = unscaled(grads, scale.scale)
            scale = next_scale(scale, overflown)
            in_place = False  # what is left alone may not have been written to
        if clip_grad_value is not None:
            bound, clamp = clip_grad_value, Tensor.clamp_ if in_place else Tensor.clamp
            grads = {name: clamp(g, -bound, bound) for name, g in grads.items()}
        if clip_grad_norm is not None:
            factor = _clip_factor(grads, clip_grad_norm)
            times = Tensor.mul_ if in_place else Tensor.mul
            grads = {name: times(g, factor.to(g.dtype)) for name, g in grads.items()}
        trained = {name: params[name] for name in grads}
        moving = move_in_place if in_place else move
        moved, new_slots = moving(formulas, grads, slots, trained)
        if overflown is not None:
            left_alone = partial(torch.where, overflown)
            old, new = (trained, slots), (moved, new_slots)
            moved, new_slots = pytree.tree_map(left_alone, old, new)
        params = {**params, **moved}
        ema = averaged(ema, params) if ema else ()
        return params, Carry(new_slots, scale, ema, gate)

    def whole(
        params: Params, carry: Carry, batch: Batch, *, in_place: bool = False
    ) -> tuple[Params, Carry, Tensor, Tensor]:
        trained = {name: params[name] for name in _trained(goal, params, carry.slots)}
        grads, rest = gradient(trained, params, batch, carry.scale)
        loss_sum, n, buffers = rest
        found = loss_sum, buffers
        params, carry = guarded(params, carry, grads, found, in_place=in_place)
        return params, carry, loss_sum, n

    def watching(
        params: Params, carry: Carry, batch: Batch
    ) -> tuple[Params, Carry, Tensor, Tensor]:
        trained = {name: params[name] for name in _trained(goal, params, carry.slots)}
        grads, (loss_sum, n, buffers) = gradient(trained, params, batch, carry.scale)
        if clip_grad_value is not None or not keeps_nonfinite(formulas):
            finite = torch.isfinite(grand_total(loss_sum, [*grads.values()]))
            loss_sum = torch.where(finite, loss_sum, float("nan"))
        now = {**params, **buffers}
        return *descend(now, carry, grads, in_place=False), loss_sum, n

    def start(params: Params, carry: Carry) -> tuple[Params, Scale]:
        # In half precision a sum would soon stop growing, or overflow.
        sums = {
            name: torch.zeros_like(params[name], dtype=_sum_dtype(params[name]))
            for name in _trained(goal, params, carry.slots)
        }
        return sums, carry.scale

    def add(
        sums: tuple[Params, Scale], params: Params, batch: Batch
    ) -> tuple[tuple[Params, Scale], Params, Tensor, Tensor]:
        so_far, scale = sums
        trained = {name: params[name] for name in so_far}
        grads, (loss_sum, n, buffers) = gradient(trained, params, batch, scale)
        # The gradient of the mean, times n: that of the sum is too large for float16.
        so_far = {k: t + grads[k] * divisor(n).to(t.dtype) for k, t in so_far.items()}
        return (so_far, scale), buffers, loss_sum, n

    def finish(
        params: Params,
        carry: Carry,
        total: tuple[tuple[Params, Scale], Tensor, Tensor, Params],
        *,
        in_place: bool = False,
    ) -> tuple[Params, Carry]:
        (sums, _), loss_sum, n, buffers = total
        grads = {
            name: (t / divisor(n).to(t.dtype)).to(params[name].dtype)
            for name, t in sums.items()
        }
        found = loss_sum, buffers
        return guarded(params, carry, grads, found, in_place=in_place)

    if accumulate == 1:
        return TrainStep(Eager(whole, partial(whole, in_place=True), watching))
    update = Eager(finish, partial(finish, in_place=True))
    return TrainStep(MicroBatches(Eager(add), update, start, int(accumulate)))


def make_eval_step(
    objective: Objective | Callable[[Params, Batch], LossPair],
    metrics: Mapping[str, Any] | None = None,
    *,
    precision: Precision = "fp32",
) -> EvalStep:
    """Makes a pure evaluation step, not compiled: eval mode, no gradient.

    Args:
        objective: As for `make_step`; with metrics, one that `supervised` made.
        metrics: Metrics by name. Each is a `Metric`, such as those of
            `lossloop.metrics`; a function `(output, target)` that returns one value per
            sample or `(sum, n)`; or an object of torchmetrics. The model is called once
            for all of them and the loss.
        precision: As for `make_step`; nothing is scaled.

    Returns:
        `eval_step(params, batch) -> (loss_sum, n)`; with metrics
        `(loss_sum, n, sums)`, where `sums` has by name a tuple of tensors for each
        `Metric`, which add over batches, and `(output, target)` for each object of
        torchmetrics. `fold_metrics` takes the step through an epoch.

    Raises:
        TypeError: If a metric is none, or the objective does not tell its output.
        ValueError: If the name of a metric cannot be that of a column, or `precision`
            is unknown.

    Example:
        >>> import lossloop as ll
        >>> goal = ll.supervised(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> eval_step = ll.make_eval_step(goal)
        >>> loss_sum, n = eval_step(goal.init(), (torch.ones(4, 2), torch.zeros(4, 1)))
        >>> int(n)
        4
    """
    check_precision("make_eval_step", precision)
    goal = as_objective(objective)

    own = {} if metrics is None else as_metrics("make_eval_step", metrics)
    if not own:

        def evaluate(params: Params, batch: Batch) -> LossPair:
            with autocast(precision, params):
                return goal.evaluate(params, batch)

        return EvalStep(Eager(evaluate))
    if not isinstance(goal, Objective) or goal.loss_fn is None:
        raise TypeError(
            "make_eval_step(metrics=...): metrics need the output of the model, which "
            "an objective of your own does not tell. Make it with supervised(model, "
            "loss_fn), or let a function of your own return the metric as "
            "(loss_sum, n)."
        )
    look = sums_of(own)

    def measure(params: Params, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        with autocast(precision, params):
            return goal.measure(params, batch, look)

    return EvalStep(Eager(Measuring(measure, own)))


def _check_options(accumulate: Any, **bounds: float | None) -> None:
    whole = hasattr(accumulate, "__index__") and not isinstance(accumulate, bool)
    if not whole or accumulate < 1:
        raise ValueError(
            f"make_step(accumulate=...) must be an int of at least 1, got "
            f"{accumulate!r}."
        )
    for name, bound in bounds.items():
        if bound is not None and not bound > 0:  # `not >` so that nan is refused too
            raise ValueError(f"make_step({name}=...) must be > 0, got {bound!r}.")


def _gradient_of(
    function: Callable[[Params, Params, Batch, Scale], tuple[Tensor, Any]],
) -> Callable[[Params, Params, Batch, Scale], tuple[Params, Any]]:
    """Makes `(trained, params, batch, scale) -> (gradients of the mean, the rest)`.

    Compiled, transformed or differentiated itself, it is that of `torch.func`. An eager
    step takes that of plain autograd, which is faster and the same.
    """
    transform = grad_and_value(function, has_aux=True)

    def gradient(
        trained: Params, params: Params, batch: Batch, scale: Scale
    ) -> tuple[Params, Any]:
        if not _is_plain():
            grads, (_, rest) = transform(trained, params, batch, scale)
            return grads, rest
        with torch.enable_grad():
            leaves = {name: t.detach().requires_grad_() for name, t in trained.items()}
            mean, rest = function(leaves, params, batch, scale)
        loss_sum, n, buffers = rest
        rest = loss_sum.detach(), n, {k: t.detach() for k, t in buffers.items()}
        if not mean.requires_grad:  # autograd sees nothing, as in inference mode
            grads, (_, rest) = transform(trained, params, batch, scale)
            return grads, rest
        grads = torch.autograd.grad(
            mean, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(trained, grads, strict=True)), rest

    return gradient


def _is_plain() -> bool:
    """Whether a step is neither compiled, transformed nor differentiated."""
    return not (torch.is_grad_enabled() or is_traced())


def _sum_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def divisor(n: Tensor) -> Tensor:
    """What to divide by: of an empty batch the gradient is zero, not nan."""
    return torch.where(n == 0, 1, n)


def _trained(
    goal: Objective | FunctionObjective, params: Params, slots: Any
) -> list[str]:
    """Names to differentiate by: those that the optimizer keeps, in params' order."""
    if isinstance(slots, Slots):
        names = {name for group in slots.groups for name in group.moments}
    elif isinstance(goal, Objective):
        names = goal.trainable
    else:
        names = {name for name, t in params.items() if t.is_floating_point()}
    return [name for name in params if name in names]


def _clip_factor(grads: Params, bound: float) -> Tensor:
    """By which `torch.nn.utils.clip_grad_norm_` multiplies."""
    norms = [torch.linalg.vector_norm(g) for g in grads.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return (bound / (norm + 1e-6)).clamp(max=1.0)
