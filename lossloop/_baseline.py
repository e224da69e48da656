"""What a run is judged against besides its curves: the best constant, and its data."""

import hashlib
import math
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lossloop._batches import (
    PaddedLast,
    as_batches,
    converted,
    generators_kept,
    is_one_shot,
    length,
    rows,
    to_device,
)
from lossloop._diagnosis import Facts
from lossloop._losses import is_torch_loss, loss_pair
from lossloop._mean import Mean
from lossloop._memory import read
from lossloop._model import FunctionalModel, device_of, model_params, skeleton
from lossloop._objective import Objective, forward, split_batch
from lossloop._random import seeded
from lossloop._types import Batch, PairFn

# Of LBFGS. A constant has few numbers and mostly a convex loss.
ITERATIONS = 100
# Share of the gain so far that going as far again may bring at a minimum.
CONVERGED = 1e-6

T = TypeVar("T")
Targets = list[tuple[Any, Tensor | None]]
"""`(target, weights)` of every batch, floats in float64, on the CPU."""


def constant_predictor(
    loss_fn: Callable[..., Any],
    train: Iterable[Batch],
    val: Iterable[Batch] | None = None,
    *,
    output_like: Tensor | None = None,
    at_most: int = 100_000,
) -> tuple[float, float | None] | None:
    """The mean losses of the best constant output, which looks at no input.

    A model that does not beat them has learned nothing from its inputs. The constant is
    fitted on the training targets alone:

    - `CrossEntropyLoss` and `NLLLoss`: the frequencies of the classes, each counted
      once more than it occurs (Laplace's rule), as log-probabilities. Class weights,
      `ignore_index`, label smoothing and probability targets count as in the loss.
    - `MSELoss`: the mean per output; `L1Loss`: a median per output.
    - Others: minimised by LBFGS, in float64.

    Every batch is read once, and the generators that reading moves are put back.

    Args:
        loss_fn: As for `fit`: a loss, or an objective made by `supervised`.
        train: The training data, as for `fit`.
        val: The validation data, likewise.
        output_like: What the model returns for one sample, shape without the batch;
            only the shape counts. Needed for functions; for losses of `torch.nn`
            otherwise the shape of a target is taken, and for classes the largest label.
        at_most: Samples of either, beyond which nothing is computed.

    Returns:
        The mean loss over the training and over the validation targets, the second None
        without validation data or if these cannot be read. None if nothing can be
        known: for iterators that are read once, batches of another form than `(inputs,
        targets)` with or without weights, losses that fail on a constant or have no
        minimum, too many samples.

    Raises:
        TypeError: If a loader is none, or `loss_fn` cannot be called.
        ValueError: If a loader is empty, or `at_most` is less than 1.

    Example:
        >>> targets = torch.tensor([[0.0], [0.0], [3.0]])
        >>> constant_predictor(nn.MSELoss(), (torch.ones(3, 2), targets))
        (2.0, None)
        >>> coins = (torch.ones(4, 1), torch.tensor([0, 1, 0, 1]))
        >>> train_loss, val_loss = constant_predictor(
        ...     nn.CrossEntropyLoss(), coins, coins
        ... )
        >>> round(train_loss, 4), round(val_loss, 4)
        (0.6931, 0.6931)
    """
    _check_at_most("constant_predictor", at_most)
    if isinstance(loss_fn, Objective):
        if loss_fn.loss_fn is None:
            return None
        loss_fn = loss_fn.loss_fn
    pair = loss_pair(loss_fn)
    classes = isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss))
    classes = classes and is_torch_loss(loss_fn)

    def target_of(batch: Batch) -> tuple[Any, Tensor | None]:
        _, target, weights = split_batch(batch)
        target, weights = converted((target, weights), torch.float64)
        return _per_label(target, weights) if classes else (target, weights)

    kept = _kept("train", train, target_of, at_most)
    kept_val = None if val is None else _kept("val", val, target_of, at_most)
    if kept is None:
        return None
    try:
        if classes:
            output = _log_frequencies(loss_fn, kept, kept_val or [], output_like)
        elif output_like is not None or is_torch_loss(loss_fn):
            output = _minimum(pair, kept, output_like)
        else:
            return None
        train_loss = _mean(pair, output, kept).value()
        val_loss = _mean(pair, output, kept_val).value() if kept_val else None
    except Exception:  # the caller's own loss, on outputs that it was not written for
        return None
    return (train_loss, val_loss) if math.isfinite(train_loss) else None


def count_duplicates(
    train: Iterable[Batch], val: Iterable[Batch], *, at_most: int = 100_000
) -> tuple[int, int] | None:
    """Counts the validation samples that occur in the training data, byte for byte.

    Inputs and targets are compared, weights are not. Each sample is hashed once.

    Args:
        train: The training data, as for `fit`.
        val: The validation data, likewise.
        at_most: Samples of either, beyond which nothing is computed.

    Returns:
        How many validation samples occur in training, and how many there are; None if
        that cannot be known: for iterators that are read once, samples that cannot be
        told apart in a batch, too many samples.

    Raises:
        TypeError: If a loader is none.
        ValueError: If a loader is empty, or `at_most` is less than 1.

    Example:
        >>> x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5)
        >>> count_duplicates((x, y), (x[3:] + 2, y[3:] + 1))
        (1, 2)
    """
    _check_at_most("count_duplicates", at_most)
    known = _kept("train", train, _digests, at_most)
    asked = None if known is None else _kept("val", val, _digests, at_most)
    if known is None or asked is None:
        return None
    seen = set[bytes]().union(*known)
    found = [digest in seen for digests in asked for digest in digests]
    return sum(found), len(found)


def constant_features(
    train: Iterable[Batch], *, at_most: int = 1000
) -> tuple[int, int] | None:
    """Counts the numbers of an input that are the same in all training samples.

    Args:
        train: The training data, as for `fit`.
        at_most: How many samples to look at, from the first; whole batches are read.

    Returns:
        How many numbers of an input are constant, and how many it has; None if that
        cannot be known: for iterators that are read once, inputs of varying shape,
        batches that are not `(inputs, targets)` with or without weights.

    Raises:
        TypeError: If the loader is none.
        ValueError: If it is empty, or `at_most` is less than 1.

    Example:
        >>> x = torch.tensor([[1.0, 7.0, 0.0], [2.0, 7.0, 0.0]])
        >>> constant_features((x, torch.zeros(2)))
        (2, 3)
    """
    _check_at_most("constant_features", at_most)

    def bounds(batch: Batch) -> list[tuple[Tensor, Tensor]]:
        leaves = pytree.tree_leaves(split_batch(batch)[0])
        cut = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
        return [(leaf.amin(0), leaf.amax(0)) for leaf in cut]

    found = _kept("train", train, bounds, at_most, whole=False)
    try:
        same = [
            torch.stack([low for low, _ in leaf]).amin(0)
            == torch.stack([high for _, high in leaf]).amax(0)
            for leaf in zip(*(found or ()), strict=True)
        ]
    except (RuntimeError, ValueError):  # another shape in another batch
        return None
    if found is None:
        return None
    return sum(int(leaf.sum()) for leaf in same), sum(leaf.numel() for leaf in same)


def output_spread(
    model: nn.Module, batches: Iterable[Batch], *, at_most: int = 1000
) -> tuple[float, float] | None:
    """How much the outputs of a model, in eval mode, differ between samples.

    Args:
        model: The module, which is not changed.
        batches: Of `(inputs, targets)`, with or without weights, as for `fit`.
        at_most: How many samples to look at, from the first; whole batches are read.

    Returns:
        The largest standard deviation of an output over the samples, and the largest
        absolute value of an output's mean; None if they cannot be known: for iterators
        that are read once, outputs whose shape varies or that have no dimension of
        samples, batches of another form.

    Raises:
        TypeError: If `batches` gives none.
        ValueError: If it is empty, or `at_most` is less than 1.

    Example:
        >>> x = torch.tensor([[0.0], [4.0]])
        >>> output_spread(nn.Identity(), (x, x))
        (2.0, 2.0)
    """
    _check_at_most("output_spread", at_most)
    params = model_params(model)
    pure = FunctionalModel(skeleton(model, train=False), forward)

    def outputs(batch: Batch) -> Tensor:
        inputs = to_device(split_batch(batch)[0], device_of(params))
        with seeded(0, device_of(params)), torch.no_grad():
            leaves = pytree.tree_leaves(pure(params, inputs)[0])
        n = rows(batch)
        found = [leaf.reshape(n, -1) for leaf in leaves if isinstance(leaf, Tensor)]
        return torch.cat(found, 1).to(torch.device("cpu"), torch.float64)

    found = _kept("batches", batches, outputs, at_most, whole=False)
    try:
        table = torch.cat(found or [])
        mean = table.mean(0)
        # Not by torch.std, which warns of a single sample.
        std = (table - mean).square().mean(0).sqrt()
        return float(std.amax()), float(mean.abs().amax())
    except (RuntimeError, ValueError, IndexError):
        return None


def data_facts(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch] | None = None,
) -> Facts:
    """What `diagnose` can use besides the curves, gathered after a run.

    The losses of the best constant output, inputs that are the same in all samples,
    outputs that are, and validation samples that occur in the training data. What
    cannot be known is left out. Reading the data moves no generator.

    Args:
        model: As the run left it; not changed.
        loss_fn: As for `fit`.
        train_loader: The training data, as for `fit`; every batch is read.
        val_loader: The validation data, likewise.

    Returns:
        The facts, for `diagnose(result, facts=...)`.

    Raises:
        TypeError: If a loader is none, or `loss_fn` cannot be called.
        ValueError: If a loader is empty.

    Example:
        >>> x = torch.tensor([[1.0, 7.0], [2.0, 7.0]])
        >>> facts = data_facts(nn.Linear(2, 1), nn.MSELoss(), (x, x[:, :1]))
        >>> facts.n_constant, facts.n_features, facts.baseline
        (1, 2, (0.25, None))
    """
    baseline = constant_predictor(loss_fn, train_loader, val_loader)
    if baseline is not None and not baseline[0] > 0:
        baseline = None  # there is nothing to learn, and nothing to compare with
    constant = constant_features(train_loader) or (None, None)
    facts = Facts(n_constant=constant[0], n_features=constant[1], baseline=baseline)
    if val_loader is None:
        return facts
    spread = output_spread(model, val_loader)
    if spread is not None and all(map(math.isfinite, spread)):
        facts = facts._replace(output_std=spread[0], output_mean=spread[1])
    found, count = count_duplicates(train_loader, val_loader) or (None, None)
    return facts._replace(n_duplicates=found, n_val=count)


# --- reading --------------------------------------------------------------------------


def _check_at_most(where: str, at_most: Any) -> None:
    if not isinstance(at_most, int) or isinstance(at_most, bool) or at_most < 1:
        raise ValueError(
            f"{where}(at_most=...) must be an int of at least 1, a number of samples, "
            f"got {at_most!r}."
        )


def _kept(
    name: str,
    loader: Iterable[Batch],
    keep: Callable[[Batch], T],
    at_most: int,
    *,
    whole: bool = True,
) -> list[T] | None:
    """`keep(batch)` of the batches, on the CPU; None if that cannot be had.

    With `whole`, more samples than `at_most` are too many, which the first batch and
    the number of batches mostly tell; otherwise reading stops there.
    """
    batches = as_batches(name, loader, passes=1)
    if isinstance(batches, PaddedLast):
        batches = batches.batches  # what is added has weight 0
    if is_one_shot(batches):
        return None
    kept: list[T] = []
    count = 0
    full = (length(batches) or 0) - 1  # batches but the last, which may be smaller
    with generators_kept(batches):
        for batch in read(batches):
            try:
                n = rows(batch)
                count, full = count + n, full - 1
                if whole and count + n * max(full, 0) > at_most:
                    return None
                kept.append(keep(to_device(batch, torch.device("cpu"))))
            except Exception:  # a batch of another form, which fit may well take
                return None
            if not whole and count >= at_most:
                break
    return kept or None


def _digests(batch: Batch) -> list[bytes]:
    """A hash for each sample."""
    if isinstance(batch, (tuple, list)) and len(batch) == 3:
        batch = batch[:2]  # no weights
    n = rows(batch)
    parts = [
        leaf.reshape(n, -1).contiguous().view(torch.uint8)
        for leaf in pytree.tree_leaves(batch)
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.numel()
    ]
    return [
        hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        for row in torch.cat(parts, 1).numpy()
    ]


# --- the best constant ----------------------------------------------------------------


def _mean(pair: PairFn, output: Tensor, targets: Targets) -> Mean:
    mean = Mean.empty()
    for target, weights in targets:
        repeated = output.expand(rows(target), *output.shape)
        mean = mean.add(*pair(repeated, target, weights))
    return mean


def _per_label(target: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Labels of shape (N,), or probabilities of shape (N, C), one row per label."""
    flat = target.long().reshape(-1)
    if target.is_floating_point():
        flat = target.movedim(1, -1).reshape(-1, target.shape[1])
    if weights is not None:
        weights = weights.repeat_interleave(len(flat) // len(target))
    return flat, weights


def _log_frequencies(
    loss_fn: Any, train: Targets, val: Targets, output_like: Tensor | None
) -> Tensor:
    """Log-probabilities of shape (C,) of the constant, from `_per_label` targets."""
    if output_like is not None:
        classes = output_like.shape[0]
    elif loss_fn.weight is not None:
        classes = len(loss_fn.weight)
    elif train[0][0].dim() == 2:
        classes = train[0][0].shape[1]
    else:
        classes = 1 + max(int(target.max()) for target, _ in [*train, *val])
    counts = torch.ones(classes, dtype=torch.float64)
    for target, weights in train:
        if target.dim() == 2:
            counted = target if weights is None else target * weights[:, None]
            counts += counted.sum(0)
        else:
            kept = target != loss_fn.ignore_index
            own = None if weights is None else weights[kept]
            counts += torch.bincount(target[kept], own, minlength=classes)
    # The minimum of -sum(mass * log p) over probabilities p is at p = mass / sum(mass).
    smoothing = getattr(loss_fn, "label_smoothing", 0.0)
    mass = (1 - smoothing) * counts + smoothing * counts.mean()
    if loss_fn.weight is not None:
        mass = mass * loss_fn.weight.to(mass)
    tiny = torch.finfo(mass.dtype).tiny  # a class of weight 0: its loss is 0, not NaN
    return (mass / mass.sum()).clamp(min=tiny).log()


def _minimum(pair: PairFn, targets: Targets, output_like: Tensor | None) -> Tensor:
    """The constant of least loss, of the shape of one output.

    Raises:
        ValueError: If there is none, because the loss falls without bound.
    """
    shape = (targets[0][0][0] if output_like is None else output_like).shape
    zeros = torch.zeros(shape, dtype=torch.float64)
    starts = [zeros, *_centres(targets, shape)]

    def loss(output: Tensor) -> Tensor:
        mean = _mean(pair, output, targets)
        return mean.total / mean.weight

    tried = [(float(loss(start)), start) for start in starts]
    tried = [(value, start) for value, start in tried if math.isfinite(value)]
    lowest, best = min(tried, key=itemgetter(0))
    bias = best.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS(
        [bias],
        max_iter=ITERATIONS,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value = loss(bias)
        value.backward()
        return value

    with torch.enable_grad():
        lbfgs.step(closure)  # pyright: ignore[reportArgumentType]
    end = bias.detach()
    reached, beyond = float(loss(end)), float(loss(end + (end - best)))
    highest = max(value for value, _ in tried)
    if not reached - beyond <= CONVERGED * (highest - reached):
        raise ValueError("going as far again gains more: there is no minimum")
    return end if reached < lowest else best


def _centres(targets: Targets, shape: torch.Size) -> list[Tensor]:
    """Weighted mean and median of targets that have the shape of the output."""
    if any(not isinstance(t, Tensor) or t.shape[1:] != shape for t, _ in targets):
        return []
    target = torch.cat([target for target, _ in targets]).double()
    weight = torch.cat(
        [torch.ones(len(t)) if w is None else w for t, w in targets]
    ).double()
    mean = torch.tensordot(weight, target, 1) / weight.sum()
    ordered, order = target.sort(0)
    upper = 2 * weight[order].cumsum(0) >= weight.sum()
    median = ordered.gather(0, upper.int().argmax(0, keepdim=True))[0]
    return [mean, median]
