"""What one batch contributes to the loss: the pair `(loss_sum, n)`."""

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss as TorchLoss  # pyright: ignore[reportPrivateUsage]
from torch.overrides import TorchFunctionMode

from lossloop._ctc import traceable_ctc
from lossloop._loss_checks import (
    any_values,
    class_shapes,
    cosine_shapes,
    ctc_labels,
    ctc_shapes,
    gaussian_shapes,
    kl_targets,
    label_sets,
    labels,
    loss_name,
    same_shape,
    same_shape_and_dtype,
    same_shape_labels,
    signs,
    unit_both,
    unit_targets,
    variance_per_element,
    variances,
)
from lossloop._random import seeded
from lossloop._types import LossPair, PairFn, accumulator_dtype

Args = tuple[Any, ...]
"""What a loss module's `forward` takes, in its order."""


def loss_pair(loss_fn: Callable[..., Any]) -> PairFn:
    """Makes a loss return its sum and the sum of its weights, which add over batches.

    The weights are those by which the loss's own `reduction="mean"` divides, so that
    over any batches, in any order, `sum of loss_sum / sum of n` is what `torch.nn`
    returns for one batch that holds everything:

    - elements, for element-wise losses; samples, for losses that give one per sample;
    - for class indices, the weight of the target's class, and 0 for `ignore_index`;
    - samples, for `KLDivLoss(reduction="batchmean")` and for `CTCLoss`, which divides
      the loss of each sample by the length of its target first.

    Samples may have weights of their own, which multiply both sums: a sample of weight
    0 is absent, and one of weight 2 counts twice. They come on top of class weights.

    The `reduction` of a module changes nothing else, and the module itself is copied,
    not touched. Losses in float16 and bfloat16 are computed in float32.

    Losses of more than two tensors take tuples: `(x1, x2)` and `target` for
    `MarginRankingLoss` and `CosineEmbeddingLoss`; `(anchor, positive, negative)` and
    `()` or None for the triplet losses; `(mean, var)` and `target`, or `mean` and
    `(target, var)`, for `GaussianNLLLoss`; `log_probs` and `(targets, input_lengths,
    target_lengths)`, or `(log_probs, input_lengths)` and `(targets, target_lengths)`,
    for `CTCLoss`.

    Args:
        loss_fn: A loss module of `torch.nn`, or a function `(output, target)` that
            returns a tensor with one loss per sample or element, or `(loss_sum, n)`.

    Returns:
        `(output, target, weights=None) -> (loss_sum, n)`, where `weights` has shape
        (B,), one for each sample, and the results have shape (), on the output's
        device: `loss_sum` in float64 (float32 where the device has none); `n` in int64
        if it counts, in the dtype of `loss_sum` if it adds real weights; no gradient
        flows through `n`. Reads nothing on the host, so it compiles and differentiates.

    Raises:
        TypeError: `loss_fn` cannot be called, has parameters to train, or its function
            returns neither a tensor nor a pair.
        ValueError: The function returns a scalar, whose weight nobody can know, or a
            pair although the samples have weights, or the shapes of output, target and
            weights do not fit (when the pair is computed).

    Example:
        >>> pair = loss_pair(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])))
        >>> loss_sum, n = pair(torch.zeros(3, 2), torch.tensor([0, 1, -100]))
        >>> n  # 1 + 3, and nothing for the ignored sample
        tensor(4., dtype=torch.float64)
        >>> round((loss_sum / n).item(), 4)
        0.6931
        >>> weights = torch.tensor([1, 0, 1])  # the second sample is absent
        >>> pair(torch.zeros(3, 2), torch.tensor([0, 1, 0]), weights)[1]
        tensor(2., dtype=torch.float64)
    """
    _check_loss_fn(loss_fn)
    rule = _rule(loss_fn)
    if rule is None:
        # A module may keep state of its own; the caller's is not touched.
        own = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
        return functools.partial(_function_pair, own)

    module = _private_copy(loss_fn)
    weigh = rule.weigh
    if isinstance(module, nn.KLDivLoss) and module.reduction == "batchmean":
        weigh = _weigh_sample_once
    elif module.reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"{loss_name(module)}: reduction is {module.reduction!r}, which it cannot "
            "take. Leave it out: every reduction gives the same pair."
        )
    module.reduction = "none"

    def module_pair(
        output: Any, target: Any, weights: Tensor | None = None
    ) -> LossPair:
        args = _arguments(module, rule, output, target)
        if isinstance(weights, Tensor) and weights.dim() == 1:
            args = _without_absent(module, args, weights)
        losses = rule.losses(module, args)
        return _pair(loss_name(module), losses, weigh(module, args, losses), weights)

    return module_pair


def batch_mean(loss_fn: Callable[..., Any]) -> PairFn:
    """States that a function returns the plain mean over the samples of its batch.

    The batch then weighs as many as the target has rows. This is wrong for class
    weights, masks and `ignore_index`: return `(loss_sum, n)` for those. Weights of
    samples are refused: in a mean that is taken already they cannot be applied.

    Args:
        loss_fn: `(output, target)` that returns a mean, a tensor of one element.

    Returns:
        `(output, target) -> (mean * rows, rows)`, where `rows` is the leading
        dimension that all tensors in `target` share.

    Raises:
        TypeError: `loss_fn` is a `torch.nn` loss, whose weights are known, or does not
            return a tensor.
        ValueError: It returns more than one number, or the target has no rows or
            tensors with different numbers of them (when the pair is computed).

    Example:
        >>> def log_cosh(output, target):
        ...     return (output - target).cosh().log().mean()
        >>> loss_sum, n = batch_mean(log_cosh)(torch.zeros(4, 2), torch.zeros(4, 2))
        >>> n
        tensor(4)
    """
    _check_loss_fn(loss_fn)
    if is_torch_loss(loss_fn):
        raise TypeError(
            f"batch_mean: loss_fn is {type(loss_fn).__name__}, whose weights are "
            "known. Pass the module itself, without batch_mean."
        )

    def mean_pair(output: Any, target: Any, weights: Tensor | None = None) -> LossPair:
        if weights is not None:
            raise ValueError(_NO_PLACE_FOR_WEIGHTS.format(loss=loss_name(loss_fn)))
        mean = loss_fn(output, target)
        if not isinstance(mean, Tensor):
            raise TypeError(
                f"batch_mean: {loss_name(loss_fn)} returned {type(mean).__name__}. "
                "Return the mean loss as a tensor of one element."
            )
        if mean.numel() != 1:
            raise ValueError(
                f"batch_mean: {loss_name(loss_fn)} gave shape {tuple(mean.shape)}, not "
                "one mean. Losses per sample need no batch_mean: pass the function."
            )
        shapes = [tuple(tensor.shape) for tensor in _tensors(target)]
        rows = {shape[:1] for shape in shapes}
        if len(rows) != 1 or () in rows:
            raise ValueError(
                f"batch_mean: target has tensors of shapes {shapes}, which do not "
                "share one leading dimension. Return (loss_sum, n) from "
                f"{loss_name(loss_fn)} instead."
            )
        return _sum(mean * shapes[0][0]), _whole(shapes[0][0], mean)

    return mean_pair


def is_torch_loss(loss_fn: Any) -> bool:
    """Whether the weights of its mean are those that `torch.nn` documents."""
    return _torch_class(loss_fn) is not None


def check_loss(
    loss_fn: Callable[..., Any],
    output: Any,
    target: Any,
    weights: Tensor | None = None,
) -> None:
    """Refuses a first batch whose values or shapes the loss would misread.

    Reads the values on the host, so it belongs before training, not into a step.

    Args:
        loss_fn: As for `loss_pair`.
        output: What the model returned for the batch.
        target: What the batch holds for it.
        weights: Of the samples, if the batch holds them.

    Raises:
        TypeError: A tensor has a dtype that the loss does not take, or `loss_pair`
            refuses `loss_fn`.
        ValueError: Shapes that differ and would broadcast, labels that are no class,
            probabilities outside [0, 1], signs other than -1 and 1, negative weights,
            a scalar loss.

    Example:
        >>> check_loss(nn.CrossEntropyLoss(), torch.zeros(2, 3), torch.tensor([0, 3]))
        Traceback (most recent call last):
        ValueError: CrossEntropyLoss: target[1] is 3, but output has 3 classes, so ...
    """
    pair = loss_pair(loss_fn)
    rule = _rule(loss_fn)
    devices = [tensor.device for tensor in _tensors((output, target))]
    device = devices[0] if devices else torch.device("cpu")
    # Seeded only to leave the caller's random state alone.
    with torch.no_grad(), seeded(0, device), warnings.catch_warnings():
        if rule is not None:
            module = cast(nn.Module, loss_fn)
            rule.check_values(module, *_arguments(module, rule, output, target))
        # torch only warns where its own functions are about to broadcast, and says
        # nothing where operators do.
        warnings.filterwarnings("error", message="Using a target size")
        try:
            if rule is None:
                _check_broadcasts(loss_fn, output, target)
            pair(output, target, weights)
        except UserWarning as warning:
            if not str(warning).startswith("Using a target size"):
                raise
            raise ValueError(
                f"{loss_name(loss_fn)}: output and target differ in shape and would "
                "broadcast, so that samples are compared with each other. "
                "Give both the same shape, with squeeze or unsqueeze."
            ) from None
    if weights is not None and (negative := weights.double() < 0).any():
        raise ValueError(
            f"{loss_name(loss_fn)}: weights[{int(negative.nonzero()[0])}] is negative. "
            "A sample counts 0 times or more."
        )


class _Broadcasts(TorchFunctionMode):
    """Notes operators that pair an output of shape (N, 1) with a target of (N,)."""

    found = False

    def __init__(self, output: Any, target: Any) -> None:
        super().__init__()
        tensors = isinstance(output, Tensor) and isinstance(target, Tensor)
        shapes = {tuple(output.shape), tuple(target.shape)} if tensors else set()
        rows = max((shape[0] for shape in shapes if shape), default=0)
        self._rows = rows if shapes == {(rows, 1), (rows,)} and rows > 1 else 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        n = self._rows
        if n and isinstance(result, Tensor) and tuple(result.shape) == (n, n):
            shapes = {tuple(arg.shape) for arg in args if isinstance(arg, Tensor)}
            self.found |= shapes == {(n, 1), (n,)}
        return result


def _check_broadcasts(loss_fn: Callable[..., Any], output: Any, target: Any) -> None:
    with _Broadcasts(output, target) as broadcasts:
        _function_pair(loss_fn, output, target)
    if broadcasts.found:
        n = len(target)
        raise ValueError(
            f"{loss_name(loss_fn)}: combines shapes ({n}, 1) and ({n},), which "
            f"broadcast to ({n}, {n}), so that samples are compared with each other. "
            "Use output.squeeze(1) or target.unsqueeze(1). If all pairs are meant, "
            "write output.view(-1, 1) - target.view(1, -1)."
        )


class _Rule(NamedTuple):
    """How one class of `torch.nn` losses is read."""

    names: tuple[str, ...]  # of the arguments, in the order of `forward`
    check_shapes: Callable[..., None]  # (module, *args), static: also while tracing
    check_values: Callable[..., None]  # (module, *args), reads the device
    losses: Callable[[Any, Args], Tensor]  # each one as its mean adds it
    weigh: Callable[[Any, Args, Tensor], Tensor | int]  # what its mean divides by: for
    # each sample, as a tensor whose rows are to be added, or as one number for all


# --- losses and weights ---------------------------------------------------------------


def _sum(losses: Tensor) -> Tensor:
    return losses.sum(dtype=accumulator_dtype(losses.device))


def _whole(n: int, like: Tensor) -> Tensor:
    return torch.full((), n, dtype=torch.int64, device=like.device)


def _pair(
    where: str, losses: Tensor, counts: Tensor | int, weights: Tensor | None
) -> LossPair:
    """Adds up the losses and what each sample counts, with weights if there are any."""
    if weights is None:
        if isinstance(counts, int):
            return _sum(losses), _whole(counts * _rows(losses), losses)
        return _sum(losses), counts.sum(dtype=_sum_dtype(counts))
    _check_weights(where, losses, weights)
    wide = accumulator_dtype(losses.device)
    counted = weights.detach().to(losses.device, _sum_dtype(weights))
    weights = weights.to(losses.device, wide)
    each = _by_sample(losses).sum(1, dtype=wide)
    # An infinite loss of an absent sample must not make the sum NaN.
    loss_sum = (each * weights).where(weights != 0, 0).sum()
    if isinstance(counts, Tensor):
        counts = _by_sample(counts).sum(1, dtype=_sum_dtype(counts))
    return loss_sum, (counted * counts).sum()


def _sum_dtype(values: Tensor) -> torch.dtype:
    wide = accumulator_dtype(values.device)
    return wide if values.is_floating_point() else torch.int64


def _without_absent(module: nn.Module, args: Args, weights: Tensor) -> Args:
    """Arguments through which no gradient reaches samples of weight 0.

    The derivative of their loss may be infinite, and 0 times that is not 0.
    """

    def detach(number: int, arg: Any) -> Any:
        samples = 1 if isinstance(module, nn.CTCLoss) and number == 0 else 0
        if not isinstance(arg, Tensor) or not arg.is_floating_point():
            return arg
        if arg.dim() <= samples or arg.shape[samples] != len(weights):
            return arg  # of weights that do not fit, which is refused below
        shape = [1] * arg.dim()
        shape[samples] = -1
        return arg.where(weights.to(arg.device).reshape(shape) != 0, arg.detach())

    return tuple(itertools.starmap(detach, enumerate(args)))


def _rows(losses: Tensor) -> int:
    return losses.shape[0] if losses.dim() else 1


def _by_sample(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


def _check_weights(where: str, losses: Tensor, weights: Any) -> None:
    if not isinstance(weights, Tensor) or weights.is_complex():
        raise TypeError(
            f"{where}: weights must be a tensor of real numbers, got "
            f"{getattr(weights, 'dtype', type(weights).__name__)}."
        )
    if not losses.dim() or weights.shape != losses.shape[:1]:
        raise ValueError(
            f"{where}: weights has shape {tuple(weights.shape)}, but the losses have "
            f"{tuple(losses.shape)}: give one weight to each sample, in a tensor of "
            f"shape {tuple(losses.shape[:1]) or '(B,) for a batch of B'}."
        )


_NO_PLACE_FOR_WEIGHTS = """\
{loss}: the batch holds weights of samples, but this loss is added up or averaged \
already, so that they cannot be applied. Return one loss per sample from it, or apply \
the weights inside and leave them out of the batch."""


def torch_mean(loss_fn: Any) -> Callable[[Any, Any, Tensor | None], Tensor]:
    """A loss of `torch.nn` as its own mean, `(output, target, weights) -> mean`.

    That of the module itself, for the form that it takes: two tensors, no weights.
    """
    own, pair = copy.deepcopy(loss_fn), loss_pair(loss_fn)
    if own.reduction != "batchmean":
        own.reduction = "mean"

    def mean(output: Any, target: Any, weights: Tensor | None) -> Tensor:
        plain = isinstance(output, Tensor) and isinstance(target, Tensor)
        if plain and weights is None:
            return own(output, target)
        loss_sum, n = pair(output, target, weights)
        return loss_sum / n

    return mean


def _module_losses(module: nn.Module, args: Args) -> Tensor:
    buffers = _buffers(module, args[0])
    return (
        torch.func.functional_call(module, buffers, args) if buffers else module(*args)
    )


def _buffers(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    # The user builds the loss before the model moves, so weights move at the call.
    return {name: weight.to(output) for name, weight in module.named_buffers()}


def _gaussian_losses(module: nn.GaussianNLLLoss, args: Args) -> Tensor:
    # torch's own function asks on the host whether a variance is negative. Here such
    # a variance makes the loss NaN, and check_loss refuses it in the first batch.
    mean, target, var = args
    var = variance_per_element(mean, var)
    bounded = var.clamp(min=module.eps).where(var >= 0, math.nan)
    var = var + (bounded - var).detach()  # eps bounds the value, not the gradient
    losses = 0.5 * (var.log() + (mean - target) ** 2 / var)
    return losses + 0.5 * math.log(2 * math.pi) if module.full else losses


def _label_set_losses(module: nn.MultiLabelMarginLoss, args: Args) -> Tensor:
    if not torch.compiler.is_compiling():
        return _module_losses(module, args)
    # Compiled, torch's own goes on past the -1 and returns wrong losses without a word
    # (pytorch#141017, still in 2.13). The compiler fuses what follows, which in eager
    # mode would take (N, C, C) numbers.
    output, target = args
    listed = (target < 0).cumsum(-1) == 0  # up to the first -1
    label = target.where(listed, 0)
    wanted = torch.zeros_like(target).scatter_add(-1, label, listed.long()) > 0
    gaps = output.unsqueeze(-2) - output.gather(-1, label).unsqueeze(-1)
    counted = listed.unsqueeze(-1) & ~wanted.unsqueeze(-2)
    hinges = (1 + gaps).clamp(min=0) * counted
    return hinges.sum((-1, -2)) / output.shape[-1]


def _ctc_losses(module: nn.CTCLoss, args: Args) -> Tensor:
    if torch.compiler.is_compiling():
        losses = traceable_ctc(module, *args)
    else:
        losses = _module_losses(module, args)
    lengths = torch.as_tensor(args[3], device=losses.device).reshape(losses.shape)
    return losses / lengths.clamp(min=1)


def _weigh_elements(module: nn.Module, args: Args, losses: Tensor) -> int:
    return math.prod(losses.shape[1:])


def _weigh_sample_once(module: nn.Module, args: Args, losses: Tensor) -> int:
    return 1


def _weigh_classes(module: Any, args: Args, losses: Tensor) -> Tensor | int:
    output, target = args
    if target.is_floating_point():
        # Class weights scale the losses of probability targets, not their denominator.
        return _weigh_elements(module, args, losses)
    kept = target != module.ignore_index
    if module.weight is None:
        return kept
    weight = _buffers(module, output)["weight"].detach()
    return weight[target.where(kept, 0)] * kept


# --- arguments ------------------------------------------------------------------------


def _arguments(module: nn.Module, rule: _Rule, output: Any, target: Any) -> Args:
    args = (*_unpacked(output), *_unpacked(target))
    if len(args) != len(rule.names):
        raise TypeError(
            f"{loss_name(module)}: takes {', '.join(rule.names)}, but got "
            f"{len(args)} values from output ({type(output).__name__}) and target "
            f"({type(target).__name__}). Give it one value for each, or write a "
            "function (output, target) that picks them."
        )
    if len(_unpacked(output)) == 2 and isinstance(module, nn.GaussianNLLLoss):
        args = (args[0], args[2], args[1])  # the model returned (mean, var)
    elif len(_unpacked(output)) == 2 and isinstance(module, nn.CTCLoss):
        args = (args[0], args[2], args[1], args[3])  # it returned input_lengths too
    for name, value in zip(rule.names, args, strict=True):
        if not isinstance(value, Tensor) and name not in _MAY_BE_NUMBERS:
            raise TypeError(
                f"{loss_name(module)}: {name} is {type(value).__name__}, not a tensor. "
                "For other structures, write a function (output, target)."
            )
        if isinstance(value, Tensor) and value.is_complex():
            raise TypeError(
                f"{loss_name(module)}: {name} is complex ({value.dtype}); a loss is a "
                "real number. Return its abs() or view_as_real()."
            )
    args = tuple(_widened(value) for value in args)
    rule.check_shapes(module, *args)
    return args


_MAY_BE_NUMBERS = ("var", "input_lengths", "target_lengths")


def _unpacked(value: Any) -> Args:
    if value is None:
        return ()
    # A DataLoader turns tuples into lists.
    return tuple(cast(Any, value)) if isinstance(value, (tuple, list)) else (value,)


def _widened(value: Any) -> Any:
    # As torch.autocast does for losses; several do not exist in half precision, and
    # labels in uint8 pass for some shapes only. Both conversions are exact.
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    if isinstance(value, Tensor) and value.dtype == torch.uint8:
        return value.long()
    return value


# --- users' functions -----------------------------------------------------------------


def _function_pair(
    loss_fn: Callable[..., Any],
    output: Any,
    target: Any,
    weights: Tensor | None = None,
) -> LossPair:
    result = loss_fn(output, target)
    kind = type(result).__name__
    if isinstance(result, tuple) and len(cast(tuple[Any, ...], result)) == 2:
        if weights is not None:
            raise ValueError(_NO_PLACE_FOR_WEIGHTS.format(loss=loss_name(loss_fn)))
        return as_pair(loss_name(loss_fn), result)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"{loss_name(loss_fn)}: returned {kind}. Return a tensor with "
            "one loss per sample, or the tuple (loss_sum, n)."
        )
    if result.dim() == 0:
        raise ValueError(
            f"{loss_name(loss_fn)}: returned a scalar. If it is a mean, its weight can "
            "not be known, and means of batches do not add up to the mean of all. "
            f"{_remedy_for_scalar(loss_fn)}"
        )
    _check_real(loss_name(loss_fn), result)
    _check_rows(loss_fn, output, target, result)
    if isinstance(output, Tensor) and isinstance(target, Tensor):
        shapes = output.shape, target.shape
        if result.shape not in shapes and result.shape == _broadcast(*shapes):
            raise ValueError(
                f"{loss_name(loss_fn)}: output has shape {tuple(output.shape)}, target "
                f"{tuple(target.shape)}, and the losses {tuple(result.shape)}: they "
                "were broadcast, so that samples are compared with each other. Give "
                "both the same shape, with squeeze(1) or unsqueeze(1). If all pairs "
                "are meant, write output.view(-1, 1) - target.view(1, -1), and return "
                "(losses.sum(), losses.numel())."
            )
    counts = math.prod(result.shape[1:])
    return _pair(loss_name(loss_fn), result, counts, weights)


def as_pair(where: str, result: Any) -> LossPair:
    """What a user's function returned, as a pair: 0-d, `n` exact and without gradient.

    Raises:
        TypeError: If it is no pair of a tensor and a tensor or number.
        ValueError: If either holds more than one number.
    """
    if not isinstance(result, tuple) or len(cast(tuple[Any, ...], result)) != 2:
        shape = f" of shape {tuple(result.shape)}" if isinstance(result, Tensor) else ""
        raise TypeError(
            f"{where}: returned a {type(result).__name__}{shape}. Return the pair "
            "(loss_sum, n): the sum of the weighted losses and the sum of the weights, "
            "like (losses.sum(), losses.numel()); never a mean, whose weight is lost."
        )
    loss_sum, n = cast(tuple[Any, Any], result)
    if not isinstance(loss_sum, Tensor) or not isinstance(n, (Tensor, int, float)):
        raise TypeError(
            f"{where}: returned ({type(loss_sum).__name__}, {type(n).__name__}). "
            "Return (loss_sum, n): a tensor, and a tensor or a number."
        )
    if not isinstance(n, Tensor):
        dtype = (
            torch.int64 if isinstance(n, int) else accumulator_dtype(loss_sum.device)
        )
        n = torch.full((), n, dtype=dtype, device=loss_sum.device)
    if loss_sum.numel() != 1 or n.numel() != 1:
        raise ValueError(
            f"{where}: returned (loss_sum, n) of shapes "
            f"{tuple(loss_sum.shape)} and {tuple(n.shape)}, but each is one number. "
            "Add the losses up, and the weights: (losses * w).sum(), w.sum()."
        )
    _check_real(where, loss_sum)
    _check_real(where, n)
    real = n.is_floating_point()
    dtype = accumulator_dtype(loss_sum.device) if real else torch.int64
    n = n.detach().reshape(()).to(loss_sum.device, dtype, copy=True)
    return _sum(loss_sum), n


def _broadcast(*shapes: torch.Size) -> torch.Size | None:
    """The shape that two have together, if they have one."""
    # That of torch raises, which no compiled step may.
    size = max(map(len, shapes))
    one, other = ((1,) * (size - len(shape)) + tuple(shape) for shape in shapes)
    sizes = [b if a == 1 else a for a, b in zip(one, other, strict=True)]
    fits = all(b in (1, n) for b, n in zip(other, sizes, strict=True))
    return torch.Size(sizes) if fits else None


def _check_rows(
    loss_fn: Callable[..., Any], output: Any, target: Any, losses: Tensor
) -> None:
    rows = [tensor.shape[0] for tensor in (output, target) if _is_batch(tensor)]
    if rows and losses.numel() < min(rows):
        raise ValueError(
            f"{loss_name(loss_fn)}: returned {losses.numel()} losses, of shape "
            f"{tuple(losses.shape)}, for {min(rows)} rows: where it averages over "
            "samples, the weight of the mean is lost. Return one loss per sample, for "
            "example losses.mean(dim=1), or the pair (loss_sum, n)."
        )


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _check_real(where: str, value: Tensor) -> None:
    if value.is_complex():
        raise TypeError(
            f"{where}: returned a complex tensor ({value.dtype}); a loss "
            "is a real number. Return its abs() or real part."
        )


def _remedy_for_scalar(loss_fn: Callable[..., Any]) -> str:
    function = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    name = getattr(function, "__name__", "")
    if name and getattr(F, name, None) is function:
        short = name.replace("binary_cross_entropy", "bce").replace("_", "")
        for cls in _RULES:
            if cls.__name__.lower() == short.removesuffix("loss") + "loss":
                return f"Use nn.{cls.__name__}() in its place."
    return (
        "Return one loss per sample, or (loss_sum, n); or, if it is the plain mean "
        "over the samples, pass lossloop.batch_mean(loss_fn)."
    )


# --- what a loss is -------------------------------------------------------------------


def _check_loss_fn(loss_fn: Any) -> None:
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is {type(loss_fn).__name__}, which cannot be called. Pass a loss "
            "module such as nn.MSELoss(), or a function (output, target)."
        )
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        raise TypeError(
            f"loss_fn is the class {loss_fn.__name__}. Pass an instance: "
            f"{loss_fn.__name__}()."
        )
    if isinstance(loss_fn, nn.Module) and any(
        weight.requires_grad for weight in loss_fn.parameters()
    ):
        raise TypeError(
            f"loss_fn is {loss_name(loss_fn)}, which has parameters of its own that "
            "nobody would train. Make it part of the model, with reduction='none', and "
            "write lossloop.objective(model, f), where f(model, batch) returns "
            "(loss_sum, n); or freeze it: loss_fn.requires_grad_(False)."
        )


def _rule(loss_fn: Any) -> _Rule | None:
    kind = _torch_class(loss_fn)
    return None if kind is None else _RULES[kind]


def _torch_class(loss_fn: Any) -> Any:
    """The class of `torch.nn` that `loss_fn` is or computes as, or None."""
    # A subclass that overrides `forward` means something else by its mean.
    kind = cast(Any, type(loss_fn))
    bases = [base for base in kind.__mro__ if base in _RULES]
    return bases[0] if bases and kind.forward is bases[0].forward else None


def _private_copy(loss_fn: Any) -> TorchLoss:
    kind = _torch_class(loss_fn)
    module = kind.__new__(kind)  # of torch's class: copying an NLLLoss2d warns
    module.__dict__ = copy.deepcopy(loss_fn.__dict__)
    return module


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in cast(list[Any], tree):
            yield from _tensors(branch)
    elif isinstance(tree, dict):
        yield from _tensors(list(cast(dict[Any, Any], tree).values()))


_PAIR = ("output", "target")


def _elementwise(
    check_values: Callable[..., None] = any_values,
    check_shapes: Callable[..., None] = same_shape,
) -> _Rule:
    return _Rule(_PAIR, check_shapes, check_values, _module_losses, _weigh_elements)


def _classes(weigh: Callable[[Any, Args, Tensor], Tensor | int]) -> _Rule:
    return _Rule(_PAIR, class_shapes, labels, _module_losses, weigh)


def _of_three(
    names: tuple[str, ...],
    check_shapes: Callable[..., None],
    check_values: Callable[..., None] = any_values,
) -> _Rule:
    return _Rule(names, check_shapes, check_values, _module_losses, _weigh_elements)


_TWO_INPUTS = ("x1", "x2", "target")
_TRIPLET = ("anchor", "positive", "negative")

_RULES: dict[type, _Rule] = {
    nn.L1Loss: _elementwise(),
    nn.MSELoss: _elementwise(),
    nn.SmoothL1Loss: _elementwise(),
    nn.HuberLoss: _elementwise(check_shapes=same_shape_and_dtype),
    nn.PoissonNLLLoss: _elementwise(),
    nn.KLDivLoss: _elementwise(kl_targets, same_shape_and_dtype),
    nn.BCELoss: _elementwise(unit_both, same_shape_and_dtype),
    nn.BCEWithLogitsLoss: _elementwise(unit_targets, same_shape_and_dtype),
    nn.HingeEmbeddingLoss: _elementwise(signs),
    nn.SoftMarginLoss: _elementwise(signs),
    nn.MultiLabelSoftMarginLoss: _elementwise(unit_targets),
    nn.MultiLabelMarginLoss: _Rule(
        _PAIR, same_shape_labels, label_sets, _label_set_losses, _weigh_elements
    ),
    nn.MultiMarginLoss: _classes(_weigh_elements),  # its weights are not in its mean
    nn.NLLLoss: _classes(_weigh_classes),
    nn.CrossEntropyLoss: _classes(_weigh_classes),
    nn.MarginRankingLoss: _of_three(_TWO_INPUTS, same_shape, signs),
    nn.CosineEmbeddingLoss: _of_three(_TWO_INPUTS, cosine_shapes, signs),
    nn.TripletMarginLoss: _of_three(_TRIPLET, same_shape),
    nn.TripletMarginWithDistanceLoss: _of_three(_TRIPLET, same_shape),
    nn.GaussianNLLLoss: _Rule(
        ("mean", "target", "var"),
        gaussian_shapes,
        variances,
        _gaussian_losses,
        _weigh_elements,
    ),
    nn.CTCLoss: _Rule(
        ("log_probs", "targets", "input_lengths", "target_lengths"),
        ctc_shapes,
        ctc_labels,
        _ctc_losses,
        _weigh_elements,
    ),
}
