"""The laws that concern the gradient and what an optimizer makes of it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

from lossloop._step import make_step
from lossloop._types import Batch, LossPair, Params, StepFn, StepOutput
from lossloop.testing._frozen import (
    beyond_rounding,
    coupling_explained,
    frozen,
    of_updates,
)
from lossloop.testing._search import (
    Finding,
    Law,
    Limit,
    NotJudgedError,
    Outcome,
    Search,
    generators_kept,
)
from lossloop.testing._subject import (
    State,
    Subject,
    admit,
    checked_output,
    eager,
    evaluate,
    measured,
    must_run,
    must_train,
    trained_names,
)
from lossloop.testing._trees import number

Gradient = Callable[[Params, Batch], Params]

GRADIENTS = Law(
    "gradients",
    "The gradient of the mean loss is the slope that finite differences show.",
    "A part of the loss is detached (.detach(), .item(), .data, torch.no_grad()), or "
    "an autograd.Function has a wrong backward.",
    "Let everything that depends on the parameters stay in the graph; compare each "
    "backward with torch.autograd.gradcheck.",
)
ACCUMULATION = Law(
    "accumulation",
    "A step that splits its batch into k micro-batches makes the update of the step "
    "that takes it whole.",
    "The mean of each micro-batch is divided by k or by its own n, so that a sample "
    "of a small or light one counts more than others.",
    "Add up the gradients of loss_sum and add up n, and divide once, by the total n.",
)
# Where the step is lossloop's own.
_NOT_ADDITIVE = (
    "The step is lossloop's own, so the pairs of the objective do not add up.",
    "See partition invariance, which says more about it.",
)

_STEP = 1e-3  # of finite differences, along a direction of length 1
_SLOPES = Limit(1e-6, "finite differences in float64")


# --- gradients ------------------------------------------------------------------------


def check_gradients(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    gradient: Gradient | None = None,
    examples: int = 100,
    seed: int = 0,
) -> Outcome:
    """Checks the gradient of the mean loss against finite differences in float64.

    Differences are taken along random directions, with two step sizes. Where the two
    disagree (at the kink of a ReLU, for example) the example is worth as much less. The
    counterexample names one number of one parameter. An `Objective` is called in eval
    mode.

    Args:
        subject: An objective of `supervised` or `objective`, or a plain function
            `(params, batch) -> (loss_sum, n)`.
        data: As for `check_partition_invariance`.
        params: To call it with; default those of the objective's model.
        gradient: `(params, batch) -> gradients` of `loss_sum / n`, a dictionary with
            the names of the params; default what `make_step` takes, by `torch.func`.
        examples: How many to try.
        seed: Of the examples.

    Returns:
        The largest difference seen, and the tolerance.

    Raises:
        LawBrokenError: With the smallest counterexample.
        ValueError: If the law cannot be judged: too few samples, a subject that is no
            objective, is not deterministic, or does not take float64.
        TypeError: If subject or data are of the wrong kind.

    Example:
        >>> from lossloop.testing import check_gradients
        >>> def relative(params, batch):  # the scale is detached
        ...     losses = (batch - params["w"]) ** 2 / params["w"].detach()
        ...     return losses.sum(), len(batch)
        >>> check_gradients(relative, torch.rand(8), params={"w": torch.ones(())})
        Traceback (most recent call last):
        lossloop.testing._search.LawBrokenError: gradients is broken...
    """
    admitted = admit("check_gradients", subject, data, State(params))
    return gradients(admitted, Search(examples, seed), gradient)


def _by_autograd(subject: Subject) -> Gradient:
    names = trained_names(subject)

    def gradient(params: Params, batch: Batch) -> Params:
        def mean(trained: Params) -> Tensor:
            whole = {**params, **trained}
            loss_sum, n = evaluate(subject.objective, whole, batch)
            return loss_sum / n

        return torch.func.grad(mean)({name: params[name] for name in names})

    return gradient


class _Slopes:
    """The mean loss of some samples as a function of one long vector of numbers."""

    def __init__(
        self, subject: Subject, samples: Sequence[int], gradient: Gradient
    ) -> None:
        self._subject, self._samples = subject, samples
        self._names = trained_names(subject)
        grads = subject.call(lambda params, _, batch: gradient(params, batch), samples)
        missing = [name for name in self._names if name not in grads]
        if missing:
            raise ValueError(
                f"check_gradients: gradient(params, batch) returned nothing for "
                f"{missing}. Return a dictionary with the names of the params."
            )
        self._grads = self._vector(grads)
        self._start = self._vector(subject.params)

    def _vector(self, params: Params) -> Tensor:
        parts = [params[name].detach().double().flatten() for name in self._names]
        return torch.cat(parts)

    def _mean(self, vector: Tensor) -> float:
        def pair(params: Params, _: Any, batch: Batch) -> LossPair:
            sizes = [params[name].numel() for name in self._names]
            parts = zip(self._names, vector.split(sizes), strict=True)
            moved = {name: part.view(params[name].shape) for name, part in parts}
            with torch.no_grad():
                whole = {**params, **moved}
                return evaluate(self._subject.objective, whole, batch)

        loss_sum, n = measured(self._subject.call(pair, self._samples))
        return loss_sum / n if n else reject()

    def along(self, direction: Tensor) -> tuple[float, float, float, float]:
        """`(gradient, finite difference, doubt, size)` along a direction of length 1.

        The doubt is what two step sizes disagree by; the size is what both are
        relative to.
        """
        middle = self._mean(self._start)
        slopes, bends = [], []
        for step in (_STEP, _STEP / 2):
            ahead = self._mean(self._start + step * direction)
            behind = self._mean(self._start - step * direction)
            slopes.append((ahead - behind) / (2 * step))
            bends.append((ahead - 2 * middle + behind) / step)
        # Of a smooth function the bends shrink with the step, those of a kink do not.
        doubt = abs(slopes[0] - slopes[1]) + abs(2 * bends[1] - bends[0])
        numeric = (4 * slopes[1] - slopes[0]) / 3  # Richardson
        exact = (self._grads @ direction).item()
        typical = self._grads.norm().item() / len(direction) ** 0.5
        # Of a saturated loss all of them are rounding noise.
        size = abs(numeric) + abs(exact) + typical + 1e-3 * (abs(middle) + 1)
        return exact, numeric, doubt, size

    def random(self, seed: int) -> Tensor:
        """A direction of length 1."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(len(self._start), generator=generator, dtype=torch.float64)
        return (draw / draw.norm()).to(self._start.device)

    def worst(self, direction: Tensor) -> tuple[str, float, float]:
        """Follows the error along a direction down to one number.

        Returns:
            Its name, its gradient, and its finite difference.
        """
        low, high = 0, len(direction)
        while high - low > 1:
            errors: dict[tuple[int, int], float] = {}
            for ends in ((low, (low + high) // 2), ((low + high) // 2, high)):
                part = torch.zeros_like(direction)
                part[slice(*ends)] = direction[slice(*ends)]
                length = part.norm().item()
                exact, numeric, _, _ = self.along(part / length)
                errors[ends] = abs(exact - numeric) * length
            low, high = max(errors, key=errors.__getitem__)
        one = torch.zeros_like(direction)
        one[low] = 1.0
        exact, numeric, _, _ = self.along(one)
        params, names = self._subject.params, iter(self._names)
        name = next(names)
        while low >= params[name].numel():
            low -= params[name].numel()
            name = next(names)
        index = torch.unravel_index(torch.tensor(low), params[name].shape)
        place = f"[{', '.join(str(int(i)) for i in index)}]" if index else ""
        return f"params['{name}']{place}", exact, numeric


@generators_kept()
def gradients(
    subject: Subject, search: Search, gradient: Gradient | None = None
) -> Outcome:
    """Judges `GRADIENTS`."""
    if subject.objective is None:
        raise NotJudgedError(
            GRADIENTS,
            f"{subject.name} shows no gradient. Check the objective that it was made "
            f"of.",
        )
    must_train(GRADIENTS, subject)
    wide, limit = frozen(GRADIENTS, subject)
    if wide is subject or limit.tolerance > _SLOPES.tolerance:
        raise NotJudgedError(
            GRADIENTS,
            f"finite differences need float64, and {subject.name} does not take it, or "
            f"computes in less.",
        )
    take = gradient or _by_autograd(wide)
    must_run(GRADIENTS, wide, lambda params, _, batch: take(params, batch))

    def judge(example: tuple[list[int], int]) -> Finding:
        samples, number_of_direction = example
        slopes = _Slopes(wide, samples, take)
        direction = slopes.random(number_of_direction)
        exact, numeric, doubt, size = slopes.along(direction)
        if doubt > 1e-3 * size:
            reject()

        def words() -> str:
            place, exact, numeric = slopes.worst(direction)
            return (
                f"of samples {samples}, the gradient by {place} is {number(exact)}, "
                f"and finite differences give {number(numeric)}."
            )

        apart = abs(exact - numeric)
        if apart <= doubt:  # which is no more than the tolerance then
            return Finding(samples, min(apart / size, _SLOPES.tolerance), words)
        return Finding(samples, (apart - doubt) / size, words)

    examples = st.tuples(
        st.lists(st.integers(0, subject.size - 1), min_size=1, max_size=4, unique=True),
        st.integers(0, 2**32 - 1),
    )
    return search.run(GRADIENTS, _SLOPES, examples, judge)


# --- accumulation ---------------------------------------------------------------------


def check_accumulation(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    opt_state: Any = None,
    optimizer: Any = None,
    accumulated: Callable[[int], StepFn] | None = None,
    examples: int = 100,
    seed: int = 0,
) -> Outcome:
    """Checks that k micro-batches make the update of one batch.

    Params, the state of the optimizer, loss_sum and n are compared, for batches of any
    size up to that of the data and any k up to that size. An `Objective` is in eval
    mode, unless `accumulated` is given, and in float64 where it takes that.

    Args:
        subject: An objective, whose plain step of `make_step` is what others are
            compared with; or, with `accumulated`, a step, which is that itself.
        data: As for `check_partition_invariance`.
        params: To start from; default those of the objective's model.
        opt_state: To start from; default that of `init`.
        optimizer: As for `make_step`; default SGD with momentum.
        accumulated: `k -> step`, where the step splits its batch into k micro-batches;
            default `make_step(objective, optimizer, accumulate=k)`.
        examples: How many to try.
        seed: Of the examples.

    Returns:
        The largest difference seen, and the tolerance.

    Raises:
        LawBrokenError: With the smallest counterexample.
        ValueError: If the law cannot be judged: too few samples, an eval step, a step
            without `accumulated`, random layers or batch statistics.
        TypeError: If subject or data are of the wrong kind.

    Example:
        >>> import lossloop as ll
        >>> from lossloop.testing import check_accumulation
        >>> goal = ll.supervised(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> data = torch.randn(8, 2), torch.randn(8, 1)
        >>> adam = ll.optim.Adam(lr=0.01)
        >>> check_accumulation(goal, data, optimizer=adam).difference < 1e-8
        True
    """
    state = State(params, opt_state, optimizer)
    admitted = admit("check_accumulation", subject, data, state)
    return accumulation(admitted, Search(examples, seed), accumulated)


@generators_kept()
def accumulation(
    subject: Subject,
    search: Search,
    accumulated: Callable[[int], StepFn] | None = None,
) -> Outcome:
    """Judges `ACCUMULATION`."""
    must_train(ACCUMULATION, subject)
    if subject.step is None or (accumulated is None and subject.objective is None):
        raise NotJudgedError(
            ACCUMULATION,
            f"nobody says how {subject.name} is made for micro-batches. Check the "
            f"objective, or pass accumulated=..., a function k -> step.",
        )
    subject, limit = frozen(ACCUMULATION, subject)
    limit = of_updates(limit)
    whole = eager(subject.step)
    make, advice = accumulated, None
    if make is None:
        advice = _NOT_ADDITIVE
        subject, function = _in_eval_mode(subject)
        whole = make_step(function, subject.optimizer)
        optimizer = subject.optimizer

        def own(k: int) -> StepFn:
            return make_step(function, optimizer, accumulate=k)

        make = own
    must_run(ACCUMULATION, subject, whole)
    made = functools.cache(make)

    def run(step: Any, subject: Subject, samples: Sequence[int]) -> StepOutput:
        return checked_output(subject.call(step, samples), subject.params)

    def judge(example: tuple[list[int], int]) -> Finding:
        samples, k = example
        found, expected = (run(step, subject, samples) for step in (made(k), whole))
        apart = beyond_rounding(
            subject, limit, found, expected, lambda other: run(whole, other, samples)
        )

        def words() -> str:
            return (
                f"samples {samples} in {k} micro-batches: {apart.words} as in one "
                f"batch."
            )

        return Finding(samples, apart.size, words, lambda: advice)

    examples = st.lists(
        st.integers(0, subject.size - 1), min_size=1, unique=True
    ).flatmap(lambda samples: st.tuples(st.just(samples), st.integers(1, len(samples))))
    everything = range(subject.size)
    with coupling_explained(ACCUMULATION, lambda: run(whole, subject, everything)):
        return search.run(ACCUMULATION, limit, examples, judge)


def _in_eval_mode(
    subject: Subject,
) -> tuple[Subject, Callable[[Params, Batch], LossPair]]:
    """A subject whose params are those that are trained, and its objective."""
    names = trained_names(subject)
    trained = {name: subject.params[name] for name in names}

    def function(trained: Params, batch: Batch) -> LossPair:
        return evaluate(subject.objective, {**subject.params, **trained}, batch)

    return subject._replace(params=trained), function
