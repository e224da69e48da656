"""Small tools on the parts of `fit`: what a model can do before it is trained for long.

Each works on copies. The model, the optimizer, the random generators and the disk are
afterwards as they were; only of an iterator, what was read is gone. Steps are eager and
in train mode, so dropout draws and BatchNorm compares samples as in training.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lossloop._batches import (
    as_batches,
    generators_kept,
    in_order,
    no_batches,
    rows,
    taken,
    to_device,
)
from lossloop._fold import fold, fold_eval
from lossloop._memory import read
from lossloop._model import (
    FunctionalModel,
    check_functional,
    device_of,
    model_params,
    skeleton,
)
from lossloop._objective import Objective, forward, split_batch, supervised
from lossloop._optimizers import as_optimizer
from lossloop._random import seeded
from lossloop._step import TrainStep, init, make_eval_step, make_step
from lossloop._types import (
    Batch,
    Carry,
    Optimizer,
    OptState,
    Params,
    Slots,
    StepFn,
    accumulator_dtype,
)
from lossloop.metrics import sample_pairs

__all__ = [
    "Compared",
    "Count",
    "NoiseScale",
    "OverfitResult",
    "PermutationTest",
    "RangeTest",
    "RateFork",
    "compare_models",
    "count",
    "gradient_noise_scale",
    "label_permutation",
    "lower_rate",
    "lr_range_test",
    "overfit_batch",
    "reference_model",
]

_OVERFIT_CHUNK = 25  # steps between two looks at the losses
_RANGE_CHUNK = 5  # likewise, where they may explode
_EXPLODED = 4.0  # times the lowest loss
_NOISE = 4.0  # standard errors that a fall of the loss must have
_FEWEST_BATCHES = 3  # two, and one to leave out


# --- can it learn a few samples? ------------------------------------------------------


@dataclass(frozen=True)
class OverfitResult:
    """What `overfit_batch` found; `print` it.

    Attributes:
        losses: Mean loss in each step, before its update. The last is the first one
            below `bound`, or the first that is no finite number, or that of the last
            step.
        bound: Below which the loss was to fall.
        samples: How many were to be learnt.
    """

    losses: list[float]
    bound: float
    samples: int

    @property
    def succeeded(self) -> bool:
        """Whether the loss fell below the bound."""
        return self.last < self.bound

    @property
    def first(self) -> float:
        """The loss before the first update."""
        return self.losses[0]

    @property
    def last(self) -> float:
        """The loss in the last step."""
        return self.losses[-1]

    def __str__(self) -> str:
        """In plain words, with what to look at if it failed."""
        what = f"{self.samples} samples" if self.samples > 1 else "one sample"
        steps = f"{len(self.losses)} steps" if len(self.losses) > 1 else "one step"
        went = (
            f"the loss went from {self.first:.3g} to {self.last:.3g} in {steps} "
            f"(to be below {self.bound:.3g})"
        )
        if self.succeeded:
            return f"The model can learn {what}: {went}."
        if not math.isfinite(self.last):
            return (
                f"The model did not learn {what}: {went}. The learning rate is too "
                f"high, or something in the model or the loss overflows."
            )
        return (
            f"The model did not learn {what}: {went}. Try other learning rates and "
            f"more steps. If that does not help, look for targets that do not belong "
            f"to their inputs, layers that pass on no gradient, an activation after "
            f"the last layer that the loss has already, and strong regularisation."
        )


def overfit_batch(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    optimizer: Any,
    batch: Batch | Iterable[Batch],
    *,
    samples: int = 8,
    steps: int = 500,
    target: float = 0.01,
    baseline: float | None = None,
    seed: int = 0,
) -> OverfitResult:
    """Trains a copy of the model on a few samples alone, to see if it can learn them.

    A model that cannot has a fault which no amount of data will mend. Dropout draws in
    every step as in training, which keeps the loss up: leave it out, or be content with
    a higher `target`. So does a loss whose lowest value is not 0, as with label
    smoothing.

    Args:
        model: Is copied; stays as it is.
        loss_fn: As for `fit`.
        optimizer: As for `fit`. The state of an instance is copied.
        batch: A batch on any device; or a `DataLoader` or other iterable of batches,
            whose first is taken. A list is a batch if a tensor is in it.
        samples: How many to learn, the first ones of the batch.
        steps: How many to make at most; it stops when the loss is low enough.
        target: What the loss is to fall to, as a share of the first loss.
        baseline: A loss that `target` is a share of instead: that of the best constant
            predictor, for example.
        seed: Of dropout and other random layers.

    Returns:
        The losses, and whether they fell far enough.

    Raises:
        ValueError: If the batch has fewer samples, a number is out of range, or the
            first loss is not positive, so that a share of it says nothing; and for what
            `fit` refuses.
        TypeError: Likewise, for things of the wrong kind.

    Example:
        >>> from lossloop import probes
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2))
        >>> batch = torch.randn(16, 3), torch.arange(16) % 2
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> probes.overfit_batch(model, nn.CrossEntropyLoss(), sgd, batch).succeeded
        True
    """
    where = "lossloop.probes.overfit_batch"
    _check_whole(where, "samples", samples, 1)
    _check_whole(where, "steps", steps, 1)
    _check_number(where, "target", target, 0, 1)
    if baseline is not None:
        _check_number(where, "baseline", baseline, 0, math.inf)
    goal, step, params, opt_state = _start(where, model, loss_fn, optimizer, seed)
    whole = _one_batch(where, batch)
    if rows(whole) < samples:
        raise ValueError(
            f"{where}(samples={samples}): the batch has only {rows(whole)} samples. "
            f"Pass a larger batch, or ask for fewer."
        )
    few = to_device(taken(whole, range(samples)), device_of(params))
    goal.check(f"{where}: the batch", params, few)
    losses: list[float] = []
    bound = math.nan
    while len(losses) < steps:
        chunk = itertools.repeat(few, min(_OVERFIT_CHUNK, steps - len(losses)))
        params, opt_state, pairs = _made(step, params, opt_state, chunk)
        for loss_sum, n in pairs:
            if not n:
                raise ValueError(
                    f"{where}: the {samples} samples have total weight 0: their "
                    f"targets are ignored. Take others."
                )
            losses.append(loss_sum / n)
            if len(losses) == 1:
                bound = target * (losses[0] if baseline is None else baseline)
                if bound <= 0:
                    raise ValueError(
                        f"{where}(target={target}) is a share of the first loss, which "
                        f"is {losses[0]:g}; that says something about positive losses "
                        f"only. Pass baseline=..., a positive loss to compare with."
                    )
            if losses[-1] < bound or not math.isfinite(losses[-1]):
                return OverfitResult(losses, bound, samples)
    return OverfitResult(losses, bound, samples)


# --- which rates can it take? ---------------------------------------------------------


@dataclass(frozen=True)
class RangeTest:
    """What `lr_range_test` found; `print` or `plot` it.

    Attributes:
        rates: Of each step; of the first parameter group.
        losses: Mean loss of each step's batch, before its update; nan for a batch of
            weight 0. What came after the first infinity or nan is left out.
        smoothed: Mean over each step and its neighbours, weighed by the triangle of
            their distance and by the weights of their samples.
        suggestion: A rate to train with, or None.
        reason: How it was found, or why there is none.
        diverged: Whether the test was ended because the loss exploded.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None
    reason: str
    diverged: bool

    def __str__(self) -> str:
        """The suggestion and its reason, in a sentence."""
        found = self.suggestion
        head = "No suggestion" if found is None else f"Suggested rate {found:.2g}"
        return f"{head}: {self.reason}."

    def plot(self, path: Any = None) -> Any:
        """Draws the losses over the rates, with the suggestion.

        Args:
            path: Where to save the picture, if anywhere; the suffix says how.

        Returns:
            A `matplotlib.figure.Figure`, which pyplot does not know.

        Raises:
            ImportError: Without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"RangeTest.plot needs matplotlib ({error}). Install it with the extra "
                f"demo: python -m pip install -e '.[demo]'"
            ) from error
        figure = Figure(figsize=(6.3, 3.6), layout="constrained")
        axes: Any = figure.subplots()
        axes.plot(self.rates, self.losses, ".", color="0.6", label="each batch")
        axes.plot(self.rates, self.smoothed, color="0.1", label="smoothed")
        if self.suggestion is not None:
            label = f"suggestion: {self.suggestion:.2g}"
            axes.axvline(self.suggestion, color="C3", ls="--", label=label)
        axes.set(xscale="log", xlabel="learning rate", ylabel="mean loss of a batch")
        if self.smoothed:
            bottom = min(self.smoothed)
            before = self.smoothed[: self.smoothed.index(bottom) + 1]
            height = max(before) - bottom
            if height > 0:  # else what exploded would flatten what matters
                axes.set_ylim(bottom - 0.5 * height, bottom + 2 * height)
        axes.set_title("Learning-rate range test")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(loc="lower left")  # the curve begins above it
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def lr_range_test(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    optimizer: Any,
    loader: Iterable[Batch],
    *,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    seed: int = 0,
) -> RangeTest:
    """Trains a copy of the model with a rate that grows from step to step.

    Where the loss falls most steeply the rate is a good one to begin with; where it
    turns up, it is too high (Smith, "Cyclical Learning Rates for Training Neural
    Networks", 2017). The rate grows by the same factor in every step. The suggestion is
    the rate at which the smoothed loss falls most for such a factor, before its lowest
    point. It is a starting point: with a schedule or many epochs, others may be better.

    The test ends when the loss is no finite number, or when the mean over five steps is
    4 times as high as the lowest such mean before (if that is positive).

    Args:
        model: Is copied; stays as it is.
        loss_fn: As for `fit`.
        optimizer: As for `fit`, one of `torch.optim` or `lossloop.optim`. With several
            parameter groups, the rates of the others keep their ratio to the first.
        loader: As for `fit`; begun anew if it has fewer batches than there are steps.
        lowest: Rate of the first step.
        highest: Rate of the last step.
        steps: How many to make at most, at least 20.
        seed: Of dropout and other random layers.

    Returns:
        Rates, losses, and a suggestion if there is one.

    Raises:
        ValueError: If a number is out of range, the loader gives no batches, or the
            rate of the first parameter group is 0; and for what `fit` refuses.
        TypeError: If the optimizer has no rate that is known; likewise.

    Example:
        >>> from lossloop import probes
        >>> x = torch.linspace(-1, 1, 64).reshape(-1, 1)
        >>> found = probes.lr_range_test(
        ...     nn.Linear(1, 1), nn.MSELoss(), torch.optim.SGD, (x, 3 * x + 1)
        ... )
        >>> found.diverged, 0.001 < found.suggestion < 1
        (True, True)
    """
    where = "lossloop.probes.lr_range_test"
    _check_whole(where, "steps", steps, 20)
    _check_number(where, "highest", highest, 0, math.inf)
    _check_number(where, "lowest", lowest, 0, highest)
    goal, step, params, opt_state = _start(where, model, loss_fn, optimizer, seed)
    slots = opt_state.slots
    if not isinstance(slots, Slots) or "lr" not in slots.groups[0].hyper:
        raise TypeError(
            f"{where}: only the optimizer itself knows its rate. Pass one of "
            f"torch.optim or lossloop.optim."
        )
    own = slots.groups[0].hyper["lr"]
    if not float(own) > 0:
        raise ValueError(
            f"{where}: the rate of the first parameter group is {float(own):g}, and "
            f"the others keep their ratio to it. Put a group with a rate > 0 first."
        )
    ratios = [group.hyper["lr"] / own for group in slots.groups]
    growth = (highest / lowest) ** (1 / (steps - 1))
    rates = [lowest * growth**number for number in range(steps)]
    to_come = iter(rates)

    def step_at_next_rate(
        params: Params, opt_state: OptState, batch: Batch
    ) -> tuple[Params, OptState, Tensor, Tensor]:
        rate = next(to_come)
        groups = tuple(
            group._replace(hyper={**group.hyper, "lr": ratio * rate})
            for group, ratio in zip(opt_state.slots.groups, ratios, strict=True)
        )
        return step(params, opt_state._replace(slots=Slots(groups)), batch)

    pairs: list[tuple[float, float]] = []
    lowest_mean, diverged = math.inf, False
    with generators_kept(loader):
        batches = _repeated(f"{where}: loader", loader)
        first = to_device(next(batches), device_of(params))
        goal.check(f"{where}: loader, batch 1", params, first)
        batches = itertools.chain([first], batches)
        while len(pairs) < steps and not diverged:
            chunk = itertools.islice(batches, min(_RANGE_CHUNK, steps - len(pairs)))
            params, opt_state, made = _made(step_at_next_rate, params, opt_state, chunk)
            finite = [*itertools.takewhile(lambda pair: math.isfinite(pair[0]), made)]
            pairs += finite
            mean = _mean(made)
            exploded = mean > _EXPLODED * lowest_mean > 0
            diverged = exploded or len(finite) < len(made)
            lowest_mean = min(lowest_mean, mean)
    rates = rates[: len(pairs)]
    reach = steps // 20
    smoothed = [
        _mean(
            [
                (weight * loss_sum, weight * n)
                for weight, (loss_sum, n) in _neighbours(pairs, index, reach)
            ]
        )
        for index in range(len(pairs))
    ]
    losses = [_mean([pair]) for pair in pairs]
    best, reason = _steepest(losses, smoothed, reach, diverged=diverged)
    found = None if best is None else rates[best]
    return RangeTest(rates, losses, smoothed, found, reason, diverged)


def _repeated(name: str, loader: Iterable[Batch]) -> Iterator[Batch]:
    batches = as_batches(name, loader, passes=1)
    while True:
        seen = False
        for batch in read(batches):
            yield batch
            seen = True
        if not seen:
            raise no_batches(name)


def _neighbours(
    pairs: Sequence[tuple[float, float]], index: int, reach: int
) -> Iterator[tuple[int, tuple[float, float]]]:
    """A pair and those on both sides, with weights that fall with the distance."""
    reach = min(reach, index, len(pairs) - 1 - index)  # as many on either side
    for offset in range(-reach, reach + 1):
        yield reach + 1 - abs(offset), pairs[index + offset]


def _steepest(
    losses: list[float], smoothed: list[float], reach: int, *, diverged: bool
) -> tuple[int | None, str]:
    """The step at which the loss fell most, and the reason; or None and why not."""
    inside = range(reach, len(losses) - reach)  # with neighbours on both sides
    if len(inside) < 3:
        return None, (
            f"the loss exploded within {len(losses)} steps: start at a lower rate"
        )
    bottom = min(inside, key=smoothed.__getitem__)
    start = min(smoothed[0], smoothed[reach])
    fall = start - smoothed[bottom]
    jumps = [abs(b - a) for a, b in itertools.pairwise(losses) if b - a == b - a]
    # Of normal numbers, the median size is 0.6745 standard deviations; of a difference
    # of two, sqrt(2) times that.
    deviation = statistics.median(jumps or [0.0]) / (0.6745 * math.sqrt(2))
    # A mean with weights 1, ..., r, ..., 1 has this share of the variance of one.
    share = (2 * (reach + 1) ** 2 + 1) / (3 * (reach + 1) ** 3)
    noise = deviation * math.sqrt(2 * share)
    if not fall > _NOISE * noise:
        return None, (
            f"the loss did not fall by more than its noise: from "
            f"{start:.3g} to {smoothed[bottom]:.3g} at best, where batches differ by "
            f"{deviation:.2g}"
        )
    if bottom == inside[-1] and not diverged:
        return None, "the loss still fell at the highest rate: raise highest"
    best = min(range(reach, bottom), key=lambda i: smoothed[i + 1] - smoothed[i - 1])
    return best, (
        f"there the smoothed loss falls most steeply; it is lowest, "
        f"{smoothed[bottom]:.3g}, {bottom - best} steps later"
    )


# --- how large may batches be? --------------------------------------------------------


@dataclass(frozen=True)
class NoiseScale:
    """What `gradient_noise_scale` found; `print` it.

    Attributes:
        noise_scale: `trace / gradient`, in samples; infinite if the gradient cannot be
            told from zero.
        low: Lower end of its interval.
        high: Upper end; infinite if the batches are too few to say.
        level: Of the interval, like 0.95.
        trace: Estimate of tr(Sigma), the sum of the variances of the elements of one
            sample's gradient.
        gradient: Estimate of the squared length of the true gradient, without bias, so
            that it may be negative.
        batches: How many were looked at.
        batch_size: Samples in one, on average.
    """

    noise_scale: float
    low: float
    high: float
    level: float
    trace: float
    gradient: float
    batches: int
    batch_size: float

    def __str__(self) -> str:
        """The scale with its interval, and what it says about the batch size."""
        return (
            f"Gradient noise scale {self.noise_scale:.3g} samples "
            f"({100 * self.level:g} % interval {self.low:.3g} to {self.high:.3g}; "
            f"{self.batches} batches of {self.batch_size:.4g}). Where batches are much "
            f"smaller, twice the size saves almost half of the steps; where they are "
            f"much larger, hardly any."
        )


def gradient_noise_scale(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    loader: Iterable[Batch],
    *,
    batches: int = 32,
    level: float = 0.95,
    seed: int = 0,
) -> NoiseScale:
    """Estimates the batch size at which the gradient is as large as its noise.

    That is the simple noise scale `tr(Sigma) / |G|^2`, with the gradient G of the loss
    over all data and the covariance Sigma of one sample's gradient (McCandlish et al.,
    "An Empirical Model of Large-Batch Training", 2018). Both are estimated without bias
    from gradients at two batch sizes (their appendix A.1): those of the batches, and
    that of all of them together, here weighed by n, so that batches need not be equal.

    The interval is Fieller's (1954), with the variances of both estimates from the
    jackknife over batches. The scale belongs to these weights: it grows in training,
    often a hundredfold.

    Args:
        model: Is copied; stays as it is. The scale is that at its weights.
        loss_fn: As for `fit`.
        loader: As for `fit`; its batches, samples first, are independent samples of
            the data, so it should shuffle.
        batches: How many to look at, at least 3; fewer if the loader has fewer. They
            are kept in memory, and each gradient is computed twice.
        level: Of the interval, between 0 and 1.
        seed: Of dropout and other random layers, whose noise counts like that of data.

    Returns:
        The scale in samples, its interval, and what it was computed from.

    Raises:
        ValueError: If a number is out of range, there are fewer than 3 batches, one has
            weight 0, or all gradients are zero; and for what `fit` refuses.
        TypeError: Likewise, for things of the wrong kind.

    Example:
        >>> from lossloop import probes
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(512, 3)
        >>> y = x.sum(dim=1, keepdim=True) + torch.randn(512, 1)
        >>> data = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 512, 16)]
        >>> found = probes.gradient_noise_scale(nn.Linear(3, 1), nn.MSELoss(), data)
        >>> 0 < found.low < found.noise_scale < found.high
        True
    """
    where = "lossloop.probes.gradient_noise_scale"
    _check_whole(where, "batches", batches, _FEWEST_BATCHES)
    _check_number(where, "level", level, 0, 1)
    goal, step, params, start = _start(where, model, loss_fn, _GRADIENT, seed)
    device = device_of(params)
    with generators_kept(loader):
        source = read(as_batches(f"{where}: loader", loader, passes=1))
        kept = [*itertools.islice(source, batches)]
    if len(kept) < _FEWEST_BATCHES:
        raise ValueError(
            f"{where}: loader gives {len(kept)} batches; the noise is seen between "
            f"batches, at least {_FEWEST_BATCHES}. Make the batch_size smaller."
        )
    goal.check(f"{where}: loader, batch 1", params, to_device(kept[0], device))

    def gradients() -> Iterator[tuple[Params, Tensor]]:
        opt_state = start
        for batch in kept:
            with torch.no_grad():  # not around what is done with them
                _, after, _, n = step(params, opt_state, to_device(batch, device))
            yield after.slots, n
            opt_state = start._replace(step=after.step)  # for other random numbers

    wide = accumulator_dtype(device)
    total = {name: t.to(wide) for name, t in start.slots.items()}
    ns: list[Tensor] = []
    squares: list[Tensor] = []
    for gradient, n in gradients():
        ns.append(n.to(wide))
        squares.append(_dot(gradient, gradient))
        total = {name: t + gradient[name].to(wide) * n for name, t in total.items()}
    along = [_dot(gradient, total) for gradient, _ in gradients()]
    found = [torch.stack(column).tolist() for column in (ns, squares, along)]
    if not all(found[0]):
        raise ValueError(
            f"{where}: loader, batch {found[0].index(0) + 1} has total weight 0, and "
            f"so no gradient. Check its targets."
        )
    columns = zip(*found, strict=True)
    trace, square, low, high = _ratio([*columns], float(_dot(total, total)), level)
    samples = sum(map(rows, kept))
    unit = samples / sum(found[0])  # from weights to samples
    if not trace and not square:
        raise ValueError(
            f"{where}: all gradients are zero, so that they have no noise scale. Is "
            f"the loss at its minimum, or does it not depend on the parameters?"
        )
    return NoiseScale(
        unit * trace / square if square > 0 else math.inf,
        unit * low,
        unit * high,
        level,
        unit * trace,
        square,
        len(kept),
        samples / len(kept),
    )


def _zeros(params: Params) -> Params:
    return {name: torch.zeros_like(t) for name, t in params.items()}


def _record(grads: Params, _: Any, params: Params) -> tuple[Params, Params]:
    return _zeros(params), grads


_GRADIENT = Optimizer(_zeros, _record)
"""Changes nothing; the state after a step is its gradient."""


def _dot(one: Params, other: Params) -> Tensor:
    """The inner product of two gradients, shape ()."""
    wide = accumulator_dtype(device_of(one))
    parts = [(one[name].to(wide) * other[name].to(wide)).sum() for name in one]
    return torch.stack(parts).sum()


def _ratio(
    found: list[tuple[float, float, float]], square: float, level: float
) -> tuple[float, float, float, float]:
    """Trace and squared gradient, and an interval of their ratio.

    Args:
        found: Of each batch n, |g|^2 and g T, where T is the sum of all n g.
        square: |T|^2.
        level: Of the interval.
    """
    k, n_all = len(found), sum(n for n, _, _ in found)
    squares = sum(n * q for n, q, _ in found)

    def estimates(
        k: int, n: float, squares: float, square: float
    ) -> tuple[float, float]:
        # The sum of n |g - T/N|^2 is squares - square / N, and k - 1 times the trace on
        # average. |T/N|^2 is on average |G|^2 + trace / N.
        trace = max(0.0, (squares - square / n) / (k - 1))
        return trace, square / n**2 - trace / n

    trace, gradient = estimates(k, n_all, squares, square)
    without = [
        estimates(k - 1, n_all - n, squares - n * q, square - 2 * n * d + n * n * q)
        for n, q, d in found
    ]
    means = [statistics.fmean(column) for column in zip(*without, strict=True)]

    def covariance(i: int, j: int) -> float:
        apart = [(one[i] - means[i]) * (one[j] - means[j]) for one in without]
        return (k - 1) / k * math.fsum(apart)

    # Fieller: the ratios b for which trace - b * gradient is less than z of its own
    # standard errors from zero, a * b^2 - 2 * h * b + c <= 0.
    z2 = statistics.NormalDist().inv_cdf((1 + level) / 2) ** 2
    a = gradient**2 - z2 * covariance(1, 1)
    h = trace * gradient - z2 * covariance(0, 1)
    c = trace**2 - z2 * covariance(0, 0)
    if gradient <= 0:
        a = min(a, 0.0)
    root = h + math.sqrt(max(0.0, h * h - a * c))
    low = 0.0 if c <= 0 else c / root if root > 0 else math.inf
    return trace, gradient, low, root / a if a > 0 else math.inf


# --- how large is it? -----------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """What `count` found; `print` it.

    Attributes:
        trainable: Numbers in parameters that require a gradient, tied ones once.
        frozen: Numbers in the other parameters.
        buffers: Numbers in buffers.
        bytes: Of parameters and buffers.
        optimizer_bytes: Of the state of the optimizer; None without one.
        forward_flops: Floating-point operations of the model and the loss for the
            batch; None without a batch. Products of matrices, convolutions and
            attention are counted, a multiplication and an addition as two.
        step_flops: Of a whole training step: forward, backward and update.
    """

    trainable: int
    frozen: int
    buffers: int
    bytes: int
    optimizer_bytes: int | None = None
    forward_flops: int | None = None
    step_flops: int | None = None

    def __str__(self) -> str:
        """A line for each, with units."""
        lines = [
            f"parameters  {self.trainable:,} trainable, {self.frozen:,} frozen",
            f"buffers     {self.buffers:,} numbers",
            f"memory      {_scaled(self.bytes, 'B')} of parameters and buffers",
        ]
        if self.optimizer_bytes is not None:
            state = _scaled(self.optimizer_bytes, "B")
            lines.append(f"optimizer   {state} of state")
        if self.forward_flops is not None:
            lines.append(f"forward     {_scaled(self.forward_flops, 'FLOP')} a batch")
        if self.step_flops is not None:
            lines.append(f"step        {_scaled(self.step_flops, 'FLOP')} a batch")
        return "\n".join(lines)


def count(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None = None,
    batch: Batch | Iterable[Batch] | None = None,
    optimizer: Any = None,
) -> Count:
    """Counts parameters, bytes, and the floating-point operations of a step.

    Operations are counted on tensors without data, so nothing is computed, unless the
    model or the loss looks at values.

    Args:
        model: Stays as it is.
        loss_fn: As for `fit`; for the operations.
        batch: As for `overfit_batch`; for the operations.
        optimizer: As for `fit`; for its state, and its share of the operations.

    Returns:
        The counts.

    Raises:
        ValueError: If there is a loss without a batch or a batch without a loss; and
            for what `fit` refuses.
        TypeError: For things of the wrong kind.

    Example:
        >>> from lossloop import probes
        >>> batch = torch.ones(64, 100), torch.ones(64, 10)
        >>> found = probes.count(
        ...     nn.Linear(100, 10), nn.MSELoss(), batch, torch.optim.Adam
        ... )
        >>> print(found)
        parameters  1,010 trainable, 0 frozen
        buffers     0 numbers
        memory      4.04 kB of parameters and buffers
        optimizer   8.12 kB of state
        forward     128 kFLOP a batch
        step        256 kFLOP a batch
    """
    where = "lossloop.probes.count"
    if (loss_fn is None) != (batch is None):
        raise ValueError(
            f"{where}: operations are counted for a loss and a batch; pass both "
            f"loss_fn and batch, or neither."
        )
    check_functional(where, model)
    parameters = dict(model.named_parameters())
    buffers = [*model.buffers()]
    trained: Params = {name: t for name, t in parameters.items() if t.requires_grad}
    trainable = sum(t.numel() for t in trained.values())
    formulas = _GRADIENT if optimizer is None else as_optimizer(optimizer)
    with _untold(optimizer):
        slots = formulas.init(trained)
    found = Count(
        trainable,
        sum(t.numel() for t in parameters.values()) - trainable,
        sum(t.numel() for t in buffers),
        sum(t.nbytes for t in (*parameters.values(), *buffers)),
        None if optimizer is None else sum(t.nbytes for t in pytree.tree_leaves(slots)),
    )
    if loss_fn is None:
        return found
    goal = _goal(where, model, loss_fn)
    params = goal.init()
    args = params, Carry(slots), to_device(_one_batch(where, batch), device_of(params))
    step = make_step(goal, formulas)

    def counted(function: Callable[..., Any], *args: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    # Importing it takes seconds, which other probes need not wait for.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with seeded(0, device_of(params)):
        try:
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            fakes = pytree.tree_map_only(Tensor, fake.from_tensor, args)
            with fake:
                flops = counted(goal.train, fakes[0], fakes[2])
                step_flops = counted(step.body.function, *fakes)
        except Exception:  # values are looked at; or it fails with data, too
            flops = counted(goal.train, args[0], args[2])
            step_flops = counted(step.body.function, *args)
    return replace(found, forward_flops=flops, step_flops=step_flops)


def _scaled(number: int, unit: str) -> str:
    """A number with a unit and its prefix: 4040 as 4.04 kB."""
    power = min(4, max(0, (len(str(number)) - 1) // 3))
    return f"{number / 1000**power:.3g} {['', 'k', 'M', 'G', 'T'][power]}{unit}"


# --- is there anything to learn? ------------------------------------------------------


@dataclass(frozen=True)
class PermutationTest:
    """What `label_permutation` found; `print` it.

    Attributes:
        val_loss: Lowest validation loss of a model trained on the data as they are.
        permuted: The same of models trained on permuted targets, in the order trained.
        permutations: How many were to be trained at most.
    """

    val_loss: float
    permuted: tuple[float, ...]
    permutations: int

    @property
    def informed(self) -> bool:
        """Whether no model that was trained on permuted targets did as well."""
        won = sum(not loss > self.val_loss for loss in self.permuted)
        return not won and len(self.permuted) == self.permutations

    @property
    def p_value(self) -> float:
        """Of no information, `(1 + won) / (1 + trained)`; large if stopped early."""
        won = sum(not loss > self.val_loss for loss in self.permuted)
        return (1 + won) / (1 + len(self.permuted))

    def __str__(self) -> str:
        """In words."""
        if self.informed:
            return (
                f"The inputs say something about the targets: validation loss "
                f"{self.val_loss:.4g}, against {min(self.permuted):.4g} at best in "
                f"{len(self.permuted)} trainings on permuted targets "
                f"(p = {self.p_value:.2g})."
            )
        return (
            f"No information was found: after {len(self.permuted)} trainings on "
            f"permuted targets one reached a validation loss of "
            f"{self.permuted[-1]:.4g}, no worse than {self.val_loss:.4g} of the real "
            f"ones. Check whether inputs and targets belong together; if they do, try "
            f"other inputs or more samples."
        )


def label_permutation(
    train: Callable[[Any], float],
    loader: Any,
    *,
    permutations: int = 19,
    seed: int = 0,
) -> PermutationTest:
    """Whether the inputs say anything about the targets: trains on permuted ones too.

    Where they do not, a model trained on targets that were dealt out anew does as well
    on validation data. Each training costs as much as the first. It ends with the first
    permuted one that does as well, because p is above 1 / (1 + permutations) then:
    without information after 3.5 on average of 19 (Ojala and Garriga, 2010).

    Args:
        train: Trains a fresh model on the data it is given, and returns its lowest
            validation loss, such as `lambda data: min(fit(make_model(), loss_fn, Adam,
            data, val_data, epochs=20).history["val_loss"])`.
        loader: The training data: a tuple of tensors, or a `DataLoader` over a
            `TensorDataset`; the second tensor holds the targets. It is not read itself:
            `train` gets the like of it, in the same batches, shuffled if it is.
        permutations: How many permuted trainings at most; 19 give p = 0.05.
        seed: Of the permutations, and of the shuffling of a loader.

    Returns:
        The losses, and what they say.

    Raises:
        TypeError: If the data are no such thing, or `train` returns no number.
        ValueError: If a number is out of range.

    Example:
        >>> from lossloop import probes
        >>> x = torch.linspace(-1, 1, 40).reshape(-1, 1)
        >>> def train(data):  # a linear model by least squares, against y = 2 x
        ...     inputs, targets = data
        ...     slope = torch.linalg.lstsq(inputs, targets).solution
        ...     return float(((x @ slope - 2 * x) ** 2).mean())
        >>> probes.label_permutation(train, (x, 2 * x)).informed
        True
    """
    where = "lossloop.probes.label_permutation"
    _check_whole(where, "permutations", permutations, 1)
    _check_whole(where, "seed", seed, 0)
    tensors = loader if isinstance(loader, tuple) else None
    if isinstance(loader, DataLoader) and type(loader.dataset) is TensorDataset:
        tensors = loader.dataset.tensors
        if loader.batch_size is None:  # a batch sampler of the caller's own
            tensors = None
    if tensors is None or len(tensors) < 2:
        raise TypeError(
            f"{where}(loader=...) must be a tuple of inputs and targets, or a "
            f"DataLoader with a batch_size over a TensorDataset of them, got "
            f"{type(loader).__name__}. Put the data into memory first."
        )
    draw = torch.Generator().manual_seed(seed)

    def trained(targets: Tensor) -> float:
        data: Any = (tensors[0], targets, *tensors[2:])
        if isinstance(loader, DataLoader):
            data = DataLoader(
                TensorDataset(*data),
                batch_size=loader.batch_size,
                shuffle=not isinstance(loader.sampler, SequentialSampler),
                drop_last=loader.drop_last,
                generator=torch.Generator().manual_seed(seed),
            )
        loss = train(data)
        if isinstance(loss, bool) or not isinstance(loss, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"{where}(train=...) must return the lowest validation loss, a number, "
                f"got {loss!r}."
            )
        return float(loss)

    targets = tensors[1]
    val_loss = trained(targets)
    permuted: list[float] = []
    for _ in range(permutations):
        order = torch.randperm(len(targets), generator=draw).to(targets.device)
        permuted.append(trained(targets[order]))
        if not permuted[-1] > val_loss:
            break
    return PermutationTest(val_loss, tuple(permuted), permutations)


# --- is the model too simple? ---------------------------------------------------------


def reference_model(
    batch: Batch | Iterable[Batch], outputs: int, *, width: int = 256
) -> nn.Module:
    """A plain network to compare a model with: two hidden layers of ReLU.

    Trained as long on the same data, it tells whether the model is too simple, or the
    rest of its loss is noise; see `compare_models`.

    Args:
        batch: A batch `(inputs, targets)` or a loader of such; the inputs are one
            tensor, (B, ...), which is flattened.
        outputs: Numbers per sample that the loss takes, such as classes.
        width: Of the hidden layers.

    Returns:
        The module, B x ... to B x outputs, initialised by torch's generator.

    Raises:
        TypeError: If the inputs are no tensor of real numbers.
        ValueError: If a number is out of range.

    Example:
        >>> from lossloop import probes
        >>> images, labels = torch.ones(4, 1, 8, 8), torch.zeros(4)
        >>> probes.reference_model((images, labels), 10)(images).shape
        torch.Size([4, 10])
    """
    where = "lossloop.probes.reference_model"
    _check_whole(where, "outputs", outputs, 1)
    _check_whole(where, "width", width, 1)
    inputs = split_batch(_one_batch(where, batch))[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = getattr(inputs, "dtype", type(inputs).__name__)
        raise TypeError(
            f"{where}: the inputs must be one tensor of real numbers, got {kind}. For "
            f"others, build a model that is larger than yours."
        )
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs[0].numel(), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    ).to(inputs.device, inputs.dtype)


@dataclass(frozen=True)
class Compared:
    """What `compare_models` found.

    Attributes:
        loss: Mean loss of the model.
        other_loss: Mean loss of the other.
        z: How surely the other is better: the difference in standard errors, from the
            losses of the same samples.
    """

    loss: float
    other_loss: float
    z: float


def compare_models(
    model: nn.Module, other: nn.Module, loss_fn: Callable[..., Any], loader: Any
) -> Compared:
    """Compares two models by their losses on the same samples, in eval mode.

    As the samples are the same, much smaller differences are seen than two means with
    their standard errors would show. For `diagnose`, of a run of `model`: `facts=
    facts._replace(reference_val_loss=found.other_loss, reference_z=found.z)`.

    Args:
        model: The one; not changed.
        other: The other, likewise.
        loss_fn: As for `fit`, where samples come first in every tensor.
        loader: Data that neither was trained on, as for `fit`.

    Returns:
        Both means, and how surely they differ.

    Raises:
        ValueError: If there are no batches, or fewer than two samples that count.
        TypeError: For things of the wrong kind.

    Example:
        >>> from lossloop import probes
        >>> x = torch.tensor([[1.0], [2.0], [4.0]])
        >>> exact, off = nn.Identity(), nn.Hardtanh()
        >>> found = probes.compare_models(off, exact, nn.MSELoss(), (x, x))
        >>> round(found.loss, 3), found.other_loss, round(found.z, 3)
        (3.333, 0.0, 1.17)
    """
    where = "lossloop.probes.compare_models"
    pairs = sample_pairs(loss_fn)
    pure: list[tuple[Params, FunctionalModel]] = []
    for each in (model, other):
        check_functional(where, each)
        body = FunctionalModel(skeleton(each, train=False), forward)
        pure.append((model_params(each), body))
    found: list[Tensor] = []
    name = f"{where}: loader"
    with torch.no_grad(), generators_kept(loader):
        for batch in read(as_batches(name, loader, passes=1)):
            columns: list[Tensor] = []
            for params, body in pure:
                device = device_of(params)
                inputs, targets, weights = split_batch(to_device(batch, device))
                with seeded(0, device):
                    output = body(params, inputs)[0]
                columns += pairs(output, targets, weights)
            found.append(torch.stack([column.cpu() for column in columns]))
    if not found:
        raise no_batches(name)
    s, n, other_s, _ = torch.cat(found, 1)
    counted = int((n != 0).sum())
    if counted < 2:
        raise ValueError(f"{where}: two samples of weight are needed, got {counted}.")
    apart = s - other_s
    mean = apart.sum() / n.sum()
    spread = (counted / (counted - 1) * ((apart - mean * n) ** 2).sum()).sqrt()
    error = spread / n.sum()
    # No error: all samples differ by the same, or not at all.
    z = float(mean / error) if error else (math.inf if mean > 0 else -math.inf)
    return Compared(
        float(s.sum() / n.sum()), float(other_s.sum() / n.sum()), z if mean else 0.0
    )


# --- is the rate too high? ------------------------------------------------------------


@dataclass(frozen=True)
class RateFork:
    """What `lower_rate` found; `print` it.

    Attributes:
        loss: Training loss, weights frozen, after going on with the rate.
        lower_loss: The same after going on with the lower rate.
        divisor: By which that is lower.
    """

    loss: float
    lower_loss: float
    divisor: float

    @property
    def too_high(self) -> bool:
        """Whether the lower rate came to a loss that is 5 % lower, or alone to one."""
        if not math.isfinite(self.loss):
            return math.isfinite(self.lower_loss)
        return self.loss - self.lower_loss >= 0.05 * abs(self.loss) > 0

    def __str__(self) -> str:
        """In words."""
        verdict = (
            "The rate is too high for where the run is: let it fall, or start lower."
            if self.too_high
            else "The rate is not too high."
        )
        return (
            f"{verdict} From the same weights and in the same order, the training loss "
            f"came to {self.loss:.4g}, and to {self.lower_loss:.4g} with the rate "
            f"divided by {self.divisor:g}."
        )


def lower_rate(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    optimizer: Any,
    loader: Iterable[Batch],
    *,
    params: Params,
    opt_state: OptState,
    epochs: int = 1,
    divisor: float = 10.0,
) -> RateFork:
    """Goes on from a state twice, with its rate and with a lower one.

    Both forks see the same batches in the same order and draw the same random numbers,
    so that the rate is all they differ by. After a rate that only stirs the weights the
    lower one comes to a lower loss at once.

    Args:
        model: Stays as it is.
        loss_fn: As for `fit`.
        optimizer: The one of the run, as for `fit`.
        loader: The training data, which can be read several times.
        params: To go on from, such as `result.params` of a `fit` with
            `restore_best=False`, or a copy of those of an `EpochRecord`.
        opt_state: That belongs to them.
        epochs: How long to go on.
        divisor: Of the rate.

    Returns:
        Both losses, and what they say.

    Raises:
        ValueError: If a number is out of range, or the loader is empty or an iterator.
        TypeError: If the state is not of an optimizer of torch or lossloop.

    Example:
        >>> import lossloop as ll
        >>> from lossloop import probes
        >>> model, data = nn.Linear(1, 1), (torch.ones(4, 1), torch.zeros(4, 1))
        >>> sgd = ll.optim.SGD(lr=0.499)  # from 0.5 on it would diverge
        >>> result = ll.fit(model, nn.MSELoss(), sgd, data, epochs=3, progress=False)
        >>> found = probes.lower_rate(
        ...     model, nn.MSELoss(), sgd, data,
        ...     params=result.params, opt_state=result.opt_state,
        ... )
        >>> found.too_high
        True
    """
    where = "lossloop.probes.lower_rate"
    _check_whole(where, "epochs", epochs, 1)
    _check_number(where, "divisor", divisor, 1.0, math.inf)
    goal = _goal(where, model, loss_fn)
    if not isinstance(opt_state.slots, Slots):
        raise TypeError(
            f"{where}(opt_state=...) has no rates: its slots are of type "
            f"{type(opt_state.slots).__name__}. Use an optimizer of torch or lossloop."
        )
    batches = as_batches(f"{where}: loader", loader, 2 * epochs + 2)
    step, eval_step = make_step(goal, as_optimizer(optimizer)), make_eval_step(goal)
    losses: list[float] = []
    for factor in (1.0, divisor):
        groups = tuple(
            group._replace(hyper={**group.hyper, "lr": group.hyper["lr"] / factor})
            for group in opt_state.slots.groups
        )
        now, state = params, opt_state._replace(slots=Slots(groups))
        with generators_kept(loader):
            for _ in range(epochs):
                now, state, _ = fold(step, now, state, batches)
        losses.append(fold_eval(eval_step, now, in_order(batches)).value())
    return RateFork(losses[0], losses[1], float(divisor))


# --- what all of them do --------------------------------------------------------------


def _goal(where: str, model: nn.Module, loss_fn: Callable[..., Any]) -> Objective:
    check_functional(where, model)
    goal = loss_fn if isinstance(loss_fn, Objective) else supervised(model, loss_fn)
    if goal.model is not model:
        raise ValueError(
            f"{where}(model, objective, ...): the objective was made for another "
            f"module. Make it with supervised(model, ...) or objective(model, ...)."
        )
    return goal


def _start(
    where: str, model: nn.Module, loss_fn: Callable[..., Any], optimizer: Any, seed: Any
) -> tuple[Objective, TrainStep, Params, OptState]:
    _check_whole(where, "seed", seed, -(2**63))
    goal = _goal(where, model, loss_fn)
    formulas = as_optimizer(optimizer)
    with _untold(optimizer):
        params, opt_state = init(goal, formulas, seed=seed)
    return goal, make_step(goal, formulas), params, opt_state


@contextmanager
def _untold(optimizer: Any) -> Generator[None]:
    """Leaves an instance as it was: `init` notes on it that it makes steps."""
    own = vars(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else {}
    kept = dict(own)
    yield
    for name in own.keys() - kept.keys():
        del own[name]


def _one_batch(where: str, given: Any) -> Batch:
    """A batch as it is, or the first of a loader, whose generators stay in place."""
    if isinstance(given, list):
        is_batch = any(isinstance(t, Tensor) for t in given)
    else:
        is_batch = isinstance(given, Tensor | Mapping) or not pytree.tree_is_leaf(given)
    if is_batch:
        return given
    name = f"{where}: batch"
    with generators_kept(given):
        for batch in read(as_batches(name, given, passes=1)):
            return batch
    raise no_batches(name)


def _made(
    step: StepFn, params: Params, opt_state: OptState, batches: Iterable[Batch]
) -> tuple[Params, OptState, list[tuple[float, float]]]:
    """Makes steps, and reads their pairs (loss_sum, n) at the end, all at once."""
    pairs: list[Tensor] = []

    def recorded(
        params: Params, opt_state: OptState, batch: Batch
    ) -> tuple[Params, OptState, Tensor, Tensor]:
        params, opt_state, loss_sum, n = step(params, opt_state, batch)
        wide = accumulator_dtype(loss_sum.device)
        pairs.append(torch.stack((loss_sum.to(wide), n.to(wide))))
        return params, opt_state, loss_sum, n

    params, opt_state, _ = fold(recorded, params, opt_state, batches)
    return params, opt_state, torch.stack(pairs).tolist()


def _mean(pairs: Iterable[tuple[float, float]]) -> float:
    loss_sums, ns = zip(*pairs, strict=True)
    n = math.fsum(ns)
    return math.fsum(loss_sums) / n if n else math.nan


def _check_whole(where: str, name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{where}({name}=...) must be an int, got {value!r}.")
    if value < least:
        raise ValueError(f"{where}({name}=...) must be at least {least}, got {value}.")


def _check_number(where: str, name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{where}({name}=...) must be a number, got {value!r}.")
    if not low < value < high:
        raise ValueError(
            f"{where}({name}=...) must be between {low:g} and {high:g}, got {value!r}."
        )
