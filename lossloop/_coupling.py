"""Whether the samples of a batch act on each other, so that its parts do not add up."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]

from lossloop._batches import converted, rows, split, taken
from lossloop._losses import is_torch_loss, loss_pair
from lossloop._model import FunctionalModel, device_of, skeleton
from lossloop._objective import Objective, forward, split_batch
from lossloop._random import host_generators_kept, seeded
from lossloop._types import Batch, LossPair, Params

SAMPLES = 8  # are looked at: among more, what a few do to the others is hard to see
# Relative: above the rounding of what computes in float32 even if given float64, and of
# float32 itself; below what coupling does to a few samples.
TOLERANCE, TOLERANCE_NARROW = 1e-5, 1e-3
NEGLIGIBLE = 1e-8  # of one sample: what rounding leaves of a perfect fit

PairOf = Callable[[Params, Batch], LossPair]


class _Pair(NamedTuple):
    loss_sum: float
    n: float

    def __str__(self) -> str:
        return f"loss_sum {self.loss_sum:.6g} and n {self.n:g}"


class _CannotTellError(Exception):
    """What was called draws random numbers, or gives nothing finite."""


def coupled_layers(goal: Objective) -> str | None:
    """Says which layer of the model makes samples act on each other in train mode."""
    for name, module in skeleton(goal.model, train=True).named_modules():
        if isinstance(module, BatchNorm) and module.training:
            return (
                f"model.{name} ({type(module).__name__}) normalises by the statistics "
                f"of the batch in train mode"
            )
    return None


def coupled_samples(goal: Objective, params: Params, batch: Batch) -> str | None:
    """Says so if a part of a batch has another loss in train mode than by itself.

    Returns:
        None if not, or where that cannot be told: random layers, batches that cannot be
        cut.
    """
    return coupled_layers(goal) or _unequal_parts(goal, params, batch)


def coupled_loss(goal: Objective, params: Params, batch: Batch) -> str | None:
    """Says so if a loss of the user's own is not the sum of the losses of the samples.

    Looks at the outputs of a few samples, together and in parts, in eval mode.

    Returns:
        None if it is, or where that cannot be told: losses that draw random numbers,
        outputs without the samples first, a single sample.
    """
    if goal.loss_fn is None:
        return _unequal_parts(goal.evaluate, params, batch)
    if is_torch_loss(goal.loss_fn):
        return None
    pair = loss_pair(goal.loss_fn)
    inputs, *rest = split_batch(batch)
    model = FunctionalModel(skeleton(goal.model, train=False), forward)
    try:
        with torch.no_grad(), host_generators_kept(), seeded(0, device_of(params)):
            output, _ = model(params, inputs)
    except Exception:  # a model that is for training only
        return None
    one = dict(itertools.islice(params.items(), 1))  # says where the others are
    return _unequal_parts(lambda _, parts: pair(*parts), one, (output, *rest))


def coupled_padding(pair: PairOf, params: Params, batch: Batch) -> str | None:
    """Says so if samples of weight 0 change the loss of the others.

    Gives half of the samples weight 0, and then makes them repeat the first. All shapes
    stay, so random layers draw the same numbers.

    Args:
        pair: The objective, or its `evaluate`.
        params: To call it with.
        batch: `(inputs, targets, weights)`.
    """
    try:
        inputs, targets, weights = batch
        size = rows(batch)
        kept = (size + 1) // 2
        weights = (torch.arange(size) < kept).to(weights)
        padded = taken((inputs, targets), [*range(kept), *[0] * (size - kept)])
        before, _ = _read(pair, params, (inputs, targets, weights))
        after, _ = _read(pair, params, (*padded, weights))
    except Exception:  # whatever it is, the batch as it came is looked at elsewhere
        return None
    if _close([before], [after], TOLERANCE):
        return None
    return f"with other samples of weight 0, {before} became {after}"


def _unequal_parts(pair: PairOf, params: Params, batch: Batch) -> str | None:
    try:
        few = taken(batch, range(min(rows(batch), SAMPLES)))
    except (TypeError, ValueError):
        return None
    for wide, tolerance in ((True, TOLERANCE), (False, TOLERANCE_NARROW)):
        try:
            own = converted(params, torch.float64) if wide else params
            samples = converted(few, torch.float64) if wide else few
            return _compared(pair, own, samples, tolerance)
        except _CannotTellError:
            return None
        except Exception:  # it may not take float64, or so few samples
            continue
    return None


def _compared(
    pair: PairOf, params: Params, batch: Batch, tolerance: float
) -> str | None:
    size = rows(batch)
    whole = _drawing_nothing(pair, params, batch)
    for count in (2, 4):
        parts = split(batch, count)
        found = [_drawing_nothing(pair, params, part) for part in parts]
        if size < 2 or _close([whole], found, tolerance):
            continue
        pieces = ", ".join(map(str, found))
        figures = (
            f"{size} samples together have {whole}, in {len(found)} parts {pieces}"
        )
        sizes = [rows(part) for part in parts]
        weighted = zip(found, sizes, strict=True)
        average = sum(part.loss_sum * rows for part, rows in weighted) / size
        if math.isclose(whole.loss_sum, average, rel_tol=1e-6):
            return f"{figures}. loss_sum looks like a mean: return losses.sum() instead"
        return (
            f"{figures}. Samples are compared with each other, or something is added "
            f"once per batch (multiply a penalty on the weights by n)"
        )
    return None


def _drawing_nothing(pair: PairOf, params: Params, batch: Batch) -> _Pair:
    found, drew = _read(pair, params, batch)
    if drew:
        raise _CannotTellError
    return found


def _read(pair: PairOf, params: Params, batch: Batch) -> tuple[_Pair, bool]:
    """The pair as numbers, and whether random numbers were drawn for it."""
    scope = seeded(0, device_of(params))
    with torch.no_grad(), host_generators_kept(), scope:
        before = scope.states()
        loss_sum, n = pair(params, batch)
        drew = scope.drew_since(before)
    found = _Pair(float(loss_sum), float(n))
    if not all(map(math.isfinite, found)):
        raise _CannotTellError
    return found, drew


def _close(some: list[_Pair], others: list[_Pair], tolerance: float) -> bool:
    loss_sums = [[pair.loss_sum for pair in pairs] for pairs in (some, others)]
    ns = [[pair.n for pair in pairs] for pairs in (some, others)]
    weight = sum(map(abs, ns[0])) + sum(map(abs, ns[1]))
    apart, n_apart = (abs(sum(a) - sum(b)) for a, b in (loss_sums, ns))
    # Against the sizes of the parts: the losses of samples may cancel.
    size = sum(map(abs, loss_sums[0])) + sum(map(abs, loss_sums[1]))
    return apart <= tolerance * size + NEGLIGIBLE * weight and n_apart <= 1e-6 * weight
