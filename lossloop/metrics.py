"""Metrics that any batching leaves as they are: sums over samples, and a function."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lossloop._loss_checks import class_shapes, same_shape
from lossloop._losses import loss_pair
from lossloop._types import PairFn, accumulator_dtype

__all__ = [
    "Measured",
    "Metric",
    "accuracy",
    "mean_absolute_error",
    "mean_squared_error",
    "perplexity",
    "r2",
    "standard_error",
    "top_k",
]

Sums = tuple[Tensor, ...]

NO_DATA = """\
Measured.values(): metrics[{name!r}] of no data is undefined: its total weight is \
{weight:g}. Every target was ignored or had weight 0; check ignore_index, the weights \
and the loader."""


class Metric(NamedTuple):
    """A metric as sums over samples and a function of the sums.

    Like `(loss_sum, n)`, the sums of batches add up to those of all the data, so that
    any split into batches gives the same value. Values of batches do not: the average
    of their accuracies is that of the data only if all batches weigh the same.

    The sums are pure tensors and read nothing on the host, so that they compile as a
    part of the evaluation step. They are added in float64, element by element.

    Example:
        >>> def sums(output, target, weights):
        ...     w = torch.ones_like(output) if weights is None else weights
        ...     found, there = output > 0, target == 1
        ...     both, either = found & there, found.int() + there.int()
        ...     return (w * both).sum(), (w * either).sum(), w.sum()
        >>> f1 = Metric(sums, lambda totals: 2 * totals[0] / totals[1])
        >>> output, target = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1, 0, 0])
        >>> totals = f1.sums(output, target, None)
        >>> round(f1.value(totals).item(), 4)
        0.6667
    """

    sums: Callable[[Any, Any, Tensor | None], Sums]
    """`(output, target, weights) -> (..., n)`. Weights, (B,), are None if the batch has
    none. The last sum, of shape (), is that of the weights: if it is 0 in the end,
    nothing was measured."""
    value: Callable[[Sums], Tensor]
    """`(totals) -> value` of shape (), on the device of the totals."""


class Measured(NamedTuple):
    """What the metrics came to, on the device until `values` reads it.

    Example:
        >>> Measured({"accuracy": torch.tensor(0.5)}, {}).values()
        {'accuracy': 0.5}
    """

    results: dict[str, Tensor]  # (), of each metric
    weights: dict[str, Tensor]  # (), total of each; none for those of torchmetrics

    def values(self) -> dict[str, float]:
        """The metrics as Python numbers, in one transfer from the device.

        Raises:
            ValueError: If the total weight of a metric is not positive, or the result
                of one is not one number.
        """
        for name, result in self.results.items():
            if not isinstance(result, Tensor) or result.numel() != 1:  # pyright: ignore[reportUnnecessaryIsInstance]
                shape = tuple(getattr(result, "shape", ()))
                raise ValueError(
                    f"Measured.values(): metrics[{name!r}] gives "
                    f"{type(result).__name__} of shape {shape}, not one number. Take "
                    f"its mean, or give each number a metric and a name."
                )
        parts = [*self.results.values(), *self.weights.values()]
        if not parts:
            return {}
        device = parts[0].device
        dtype = accumulator_dtype(device)
        stacked = torch.stack([part.reshape(()).to(device, dtype) for part in parts])
        numbers = stacked.tolist()
        for name, weight in zip(
            self.weights, numbers[len(self.results) :], strict=True
        ):
            if not weight > 0:
                raise ValueError(NO_DATA.format(name=name, weight=weight))
        return dict(zip(self.results, numbers, strict=False))


# --- ready ones -----------------------------------------------------------------------


def accuracy(ignore_index: int = -100) -> Metric:
    """The share of targets that are predicted right.

    Scores of classes, (N, C, ...), are compared with class indices, (N, ...), by their
    largest. An output of the shape of its target holds one logit for each yes or no: a
    logit above 0 predicts 1. (One-hot targets and probabilities have the shape of the
    output too: for these, write a function that takes `target.argmax(1)`.)

    Args:
        ignore_index: Targets of this value are absent, as in `nn.CrossEntropyLoss`.

    Returns:
        The metric, between 0 and 1.

    Example:
        >>> right = accuracy()
        >>> scores = torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        >>> totals = right.sums(scores, torch.tensor([0, 1, 1]), None)
        >>> round(right.value(totals).item(), 4)
        0.6667
    """

    def sums(output: Any, target: Any, weights: Tensor | None) -> Sums:
        _check_tensors("accuracy", output, target)
        if output.shape == target.shape:
            right = (output > 0) == (target > 0.5)
        else:
            right = output.argmax(_class_dim(accuracy, output, target)) == target
        return _counts(right, target != ignore_index, weights)

    return Metric(sums, _mean)


def top_k(k: int, ignore_index: int = -100) -> Metric:
    """The share of targets that are among the k classes of the largest scores.

    Scores are (N, C, ...), targets class indices, (N, ...).

    Args:
        k: At least 1, and less than the number of classes.
        ignore_index: Targets of this value are absent, as in `nn.CrossEntropyLoss`.

    Returns:
        The metric, between 0 and 1.

    Raises:
        ValueError: If `k` is no int of at least 1; from the step, if there are no more
            than k classes.

    Example:
        >>> among_two = top_k(2)
        >>> scores = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> totals = among_two.sums(scores, torch.tensor([1, 2]), None)
        >>> among_two.value(totals).item()
        0.5
    """
    if not hasattr(k, "__index__") or isinstance(k, bool) or k < 1:
        raise ValueError(
            f"lossloop.metrics.top_k(k=...) must be an int of at least 1, got {k!r}."
        )

    def sums(output: Any, target: Any, weights: Tensor | None) -> Sums:
        _check_tensors("top_k", output, target)
        dim = _class_dim(top_k, output, target)
        if k >= output.shape[dim]:
            raise ValueError(
                f"top_k: of {output.shape[dim]} classes, the target is always among "
                f"{k}. Choose a smaller k."
            )
        right = (output.topk(k, dim).indices == target.unsqueeze(dim)).any(dim)
        return _counts(right, target != ignore_index, weights)

    return Metric(sums, _mean)


def mean_absolute_error() -> Metric:
    """The mean of `|output - target|` over all elements, computed in float64.

    Output and target have the same shape.

    Returns:
        The metric, in the unit of the target.

    Example:
        >>> error = mean_absolute_error()
        >>> totals = error.sums(torch.tensor([1.0, 5.0]), torch.ones(2), None)
        >>> error.value(totals).item()
        2.0
    """
    return _mean_of(loss_pair(nn.L1Loss()), widened=True)


def mean_squared_error() -> Metric:
    """The mean of `(output - target)**2` over all elements, computed in float64.

    Output and target have the same shape.

    Returns:
        The metric, in the squared unit of the target.

    Example:
        >>> error = mean_squared_error()
        >>> totals = error.sums(torch.tensor([1.0, 5.0]), torch.ones(2), None)
        >>> error.value(totals).item()
        8.0
    """
    return _mean_of(loss_pair(nn.MSELoss()), widened=True)


def r2() -> Metric:
    """The coefficient of determination, `1 - sum (t - o)**2 / sum (t - mean t)**2`.

    Output and target have the same shape, (N, ...): the coefficient of each of the
    outputs of a sample is computed in float64, and the result is their mean, as by
    `sklearn.metrics.r2_score`. That of a target which is constant is 1 if every
    prediction is exact and 0 otherwise, as there. A single sample is constant, and so
    is a target that varies by less than about a millionth of its size, which the sums
    of t and t**2 cannot tell from rounding.

    Returns:
        The metric, at most 1, without unit.

    Example:
        >>> fit = r2()
        >>> target = torch.tensor([1.0, 2.0, 3.0])
        >>> fit.value(fit.sums(torch.tensor([1.0, 2.0, 4.0]), target, None)).item()
        0.5
    """

    def sums(output: Any, target: Any, weights: Tensor | None) -> Sums:
        _check_tensors("r2", output, target)
        same_shape(cast(Any, r2), output, target)
        # (N, outputs)
        o, t = (_widened(each).unsqueeze(1).flatten(1) for each in (output, target))
        w = t.new_ones(len(t)) if weights is None else weights.to(t)
        w = w.unsqueeze(1)

        def add(values: Tensor) -> Tensor:
            return (w * values).where(w != 0, 0).sum(0)

        return add(t), add(t**2), add((t - o) ** 2), w.sum()

    def value(totals: Sums) -> Tensor:
        total, squares, residual, n = totals
        spread = squares - total**2 / n
        constant = spread <= torch.finfo(spread.dtype).eps ** 0.75 * squares
        exact = residual == 0
        score = 1 - residual / spread.where(~constant, 1)
        return score.where(~constant | exact, 0).where(~exact, 1).mean()

    return Metric(sums, value)


def perplexity(ignore_index: int = -100) -> Metric:
    """The exponential of the mean cross-entropy of a token, in nats.

    Scores are (N, C, ...), not normalised; targets are class indices, (N, ...). The
    mean is that of `nn.CrossEntropyLoss`, computed as `loss_pair` does.

    Args:
        ignore_index: Targets of this value, such as padding, are absent.

    Returns:
        The metric, at least 1; that of guessing is C.

    Example:
        >>> surprise = perplexity()
        >>> totals = surprise.sums(torch.zeros(2, 7), torch.tensor([3, -100]), None)
        >>> round(surprise.value(totals).item(), 4)
        7.0
    """

    def value(totals: Sums) -> Tensor:
        return _mean(totals).exp()

    pair = loss_pair(nn.CrossEntropyLoss(ignore_index=ignore_index))
    return _mean_of(pair)._replace(value=value)


def standard_error(loss_fn: Callable[..., Any]) -> Metric:
    """The standard error of the mean loss, over samples drawn at random.

    As `metrics={"se": standard_error(loss_fn)}` of `fit` it gives the column `val_se`,
    which `History.plot` draws as a band and `diagnose` weighs differences by.

    The mean is a ratio, sum of s_i / sum of n_i over samples i, and its standard error
    is sqrt(B / (B - 1) * sum of (s_i - mean * n_i)**2) / sum of n_i for the B samples
    of n_i > 0 (Cochran, Sampling Techniques, 1977, section 6.4).

    Args:
        loss_fn: As for `fit`, where samples come first in every tensor of output and
            target, so that `torch.vmap` can take them apart.

    Returns:
        The metric, in the unit of the loss; infinite for a single sample.

    Example:
        >>> error = standard_error(nn.MSELoss())
        >>> output, target = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
        >>> totals = error.sums(output, target, None)
        >>> round(error.value(totals).item(), 4)  # of the losses 1, 4 and 9
        2.3333
    """
    pairs = sample_pairs(loss_fn)

    def sums(output: Any, target: Any, weights: Tensor | None) -> Sums:
        s, n = pairs(output, target, weights)
        columns = (s * s, s * n, n * n, n != 0, s, n)
        return tuple(_widened(column).sum() for column in columns)

    def value(totals: Sums) -> Tensor:
        ss, sn, squared_n, count, s, n = totals
        mean = s / n
        squares = (ss - 2 * mean * sn + mean**2 * squared_n).clamp(min=0)
        error = (count / (count - 1) * squares).sqrt() / n
        return error.where(count > 1, math.inf)

    return Metric(sums, value)


_READY = {
    accuracy: "accuracy()",
    mean_absolute_error: "mean_absolute_error()",
    mean_squared_error: "mean_squared_error()",
    perplexity: "perplexity()",
    r2: "r2()",
    standard_error: "standard_error(loss_fn)",
    top_k: "top_k(5)",
}


def sample_pairs(
    loss_fn: Callable[..., Any],
) -> Callable[[Any, Any, Tensor | None], tuple[Tensor, Tensor]]:
    """Makes a loss return the pair of each sample, two tensors of shape (B,)."""
    pair = loss_pair(loss_fn)

    def of_one(output: Any, target: Any, weight: Tensor | None) -> Any:
        alone = pytree.tree_map_only(
            Tensor, partial(torch.unsqueeze, dim=0), (output, target, weight)
        )
        return pair(*alone)

    def pairs(
        output: Any, target: Any, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        in_dims = (0, 0, None if weights is None else 0)
        s, n = torch.vmap(of_one, in_dims)(output, target, weights)
        return _widened(s), _widened(n)

    return pairs


def _mean(totals: Sums) -> Tensor:
    total, n = totals
    return total / n


def _mean_of(pair: PairFn, *, widened: bool = False) -> Metric:
    def sums(output: Any, target: Any, weights: Tensor | None) -> Sums:
        if widened:
            output, target = _widened(output), _widened(target)
        return pair(output, target, weights)

    return Metric(sums, _mean)


def _widened(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_complex():
        return value  # which is refused
    return value.to(accumulator_dtype(value.device))


def _counts(right: Tensor, counted: Tensor, weights: Tensor | None) -> Sums:
    """How many of those that count are right, and how many count; both (B, ...)."""
    w = _widened(counted)
    if weights is not None:
        w = w * weights.to(w).reshape(-1, *[1] * (w.dim() - 1))
    return (w * right).sum(), w.sum()


def _check_tensors(name: str, output: Any, target: Any) -> None:
    for what, value in (("output", output), ("target", target)):
        if not isinstance(value, Tensor) or value.is_complex():
            kind = getattr(value, "dtype", type(value).__name__)
            raise TypeError(
                f"{name}: {what} is {kind}, not a tensor of real numbers. For other "
                f"structures, write a function (output, target)."
            )


def _class_dim(metric: Callable[..., Metric], output: Tensor, target: Tensor) -> int:
    if output.dim() == target.dim() + 1 and output.shape[1:2] == (1,):
        raise ValueError(
            f"{metric.__name__}: output has shape {tuple(output.shape)}, so that there "
            f"is one class, which is always right. Of one logit for yes or no, take "
            f"output.squeeze(1)."
        )
    class_shapes(cast(Any, metric), output, target)
    return min(output.dim() - 1, 1)


# --- what users give ------------------------------------------------------------------


def as_metrics(where: str, metrics: Any) -> dict[str, Any]:
    """Metrics under their names, each as `as_metric` makes it."""
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"{where}(metrics=...) must be a mapping of names to metrics, like "
            f"{{'accuracy': accuracy()}}, got {type(metrics).__name__}."
        )
    for name in metrics:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                f"{where}(metrics=...): a metric is named by a word of letters, digits "
                f"and underscores, as columns are, got {name!r}."
            )
        if name == "loss":
            raise ValueError(
                f"{where}(metrics=...): 'loss' is the name of another column. Call "
                f"the metric something else."
            )
    return {name: as_metric(name, metric) for name, metric in metrics.items()}


def as_metric(name: str, metric: Any) -> Any:
    """A `Metric` as it is, and a function `(output, target)` as the `Metric` it means.

    Args:
        name: What to call it in a message.
        metric: A `Metric`; a function that returns one value per sample or element, or
            `(sum, n)`, or a loss of `torch.nn`, as for `loss_pair`; or an object of
            torchmetrics, which is returned as it is.

    Returns:
        A `Metric`, or the object of torchmetrics.

    Raises:
        TypeError: If it is neither, or is to be called first.
        ValueError: If `loss_pair` refuses the function.

    Example:
        >>> near = as_metric("near", lambda output, target: (output - target).abs() < 1)
        >>> totals = near.sums(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]), None)
        >>> near.value(totals).item()
        0.5
    """
    place = f"metrics[{name!r}]"
    if isinstance(metric, Metric) or _is("torchmetrics.metric.Metric", metric):
        return metric
    if _is("torchmetrics.collections.MetricCollection", metric):
        raise TypeError(
            f"{place} is a {type(metric).__name__}, which holds several metrics. Give "
            f"each of them its own name."
        )
    if isinstance(metric, str):
        raise TypeError(
            f"{place} is the string {metric!r}. Pass one of lossloop.metrics, "
            f"{', '.join(_READY.values())}, or a function (output, target)."
        )
    for ready, call in _READY.items():
        if metric is ready:
            raise TypeError(
                f"{place} is the function that makes the metric. Call it: {call}."
            )
    try:
        pair = loss_pair(metric)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error}") from error
    return _mean_of(pair)


def sums_of(
    metrics: Mapping[str, Any],
) -> Callable[[Any, Any, Tensor | None], dict[str, tuple[Any, ...]]]:
    """The part of an evaluation step that the metrics of `as_metrics` ask for.

    Returns:
        `(output, target, weights) -> sums`: by name the sums of each `Metric`, in
        float64, and `(output, target)` for objects of torchmetrics.
    """
    # Only functions: a compiled step would keep watch over objects.
    functions: dict[str, Callable[..., Any]] = {
        name: metric.sums if isinstance(metric, Metric) else _output_and_target
        for name, metric in metrics.items()
    }

    def sums(
        output: Any, target: Any, weights: Tensor | None
    ) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {}
        for name, function in functions.items():
            try:
                result = function(output, target, weights)
            except Exception as error:
                if type(error) in (TypeError, ValueError):
                    raise type(error)(f"metrics[{name!r}]: {error}") from error
                raise
            if function is not _output_and_target:
                if (
                    not isinstance(result, tuple)
                    or not result
                    or not all(isinstance(each, Tensor) for each in result)
                    or result[-1].dim()
                ):
                    raise TypeError(
                        f"metrics[{name!r}]: sums must return a tuple of tensors, the "
                        f"last of them of shape (), the sum of the weights. Without "
                        f"weights, that is the number of samples: "
                        f"target.new_tensor(len(target))."
                    )
                result = tuple(map(_widened, result))
            found[name] = result
        return found

    return sums


def _output_and_target(output: Any, target: Any, weights: Any) -> tuple[Any, Any]:
    if weights is not None:
        raise ValueError(
            "the batch holds weights of samples, which an object of torchmetrics would "
            "ignore. Leave them out (and with them pad_last), or write a function "
            "(output, target) that returns one value per sample, or a Metric."
        )
    return output, target


def _is(kind: str, value: Any) -> bool:
    """Whether a class of this name is among its own; nothing is imported for it."""
    classes = type(value).__mro__
    return kind in {f"{each.__module__}.{each.__qualname__}" for each in classes}
