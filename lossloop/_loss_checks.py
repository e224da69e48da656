"""What the losses of torch.nn ask of their arguments."""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn


def loss_name(loss_fn: Any) -> str:
    if isinstance(loss_fn, functools.partial):
        return loss_name(cast(Any, loss_fn.func))
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)


# --- shapes and dtypes, known while tracing -------------------------------------------


def same_shape(module: nn.Module, output: Tensor, *others: Tensor) -> None:
    for other in others:
        if output.shape == other.shape:
            continue
        ours, theirs = tuple(output.shape), tuple(other.shape)
        if ours[:-1] == theirs and ours[-1] == 1:
            remedy = "Use output.squeeze(-1) or target.unsqueeze(-1)"
            remedy += ", that is squeeze(1) or unsqueeze(1)." if len(ours) == 2 else "."
        elif theirs[:-1] == ours and theirs[-1:] == (1,):
            remedy = "Use target.squeeze(-1) or output.unsqueeze(-1)"
            remedy += ", that is squeeze(1) or unsqueeze(1)." if len(ours) < 2 else "."
        elif ours[:1] != theirs[:1]:
            remedy = "The batch sizes differ: check what the loader and model return."
        else:
            remedy = "Give both the same shape, with expand if repeating is meant."
        raise ValueError(
            f"{loss_name(module)}: output has shape {ours} and target {theirs}, which "
            f"must be equal, or elements would be compared across samples. {remedy}"
        )


def same_shape_and_dtype(module: nn.Module, output: Tensor, target: Tensor) -> None:
    same_shape(module, output, target)
    if output.dtype != target.dtype:
        raise TypeError(
            f"{loss_name(module)}: target is {target.dtype}, output is {output.dtype}. "
            "Use target.to(output.dtype)."
        )


def same_shape_labels(module: nn.Module, output: Tensor, target: Tensor) -> None:
    same_shape(module, output, target)
    _integer_labels(module, target)


def _integer_labels(module: nn.Module, target: Tensor, also: str = "") -> None:
    if target.dtype != torch.int64:
        raise TypeError(
            f"{loss_name(module)}: target is {target.dtype}; class indices are int64. "
            f"Use target.long(){also}."
        )


def class_shapes(module: nn.Module, output: Tensor, target: Tensor) -> None:
    name, ours, theirs = loss_name(module), tuple(output.shape), tuple(target.shape)
    if not ours:
        raise ValueError(
            f"{name}: output has shape (), but needs a dimension of classes: (C,) for "
            "one sample, (N, C) or (N, C, d1, ...) for a batch."
        )
    probabilities = isinstance(module, nn.CrossEntropyLoss)
    if ours == theirs and target.is_floating_point() and probabilities:
        return
    labels = ours[:1] + ours[2:] if len(ours) > 1 else ()
    if theirs == labels:
        also = f", or give probabilities of shape {ours}" if probabilities else ""
        _integer_labels(module, target, also)
        return
    if ours == theirs:
        remedy = "Of one-hot targets, take target.argmax(1)"
        remedy += ", or target.to(output.dtype)." if probabilities else "."
    elif theirs == (*labels, 1):
        remedy = "Use target.squeeze(-1)."
    elif len(ours) > 2 and theirs == ours[:-1]:
        remedy = "Classes belong in dimension 1: use output.movedim(-1, 1)."
    elif len(ours) > 1 and ours[:1] != theirs[:1]:
        remedy = "The batch sizes differ: check what the loader and model return."
    else:
        remedy = "Output is (C,), (N, C) or (N, C, d1, ...), classes in dimension 1."
    raise ValueError(
        f"{name}: output has shape {ours}, so class indices have shape {labels}, but "
        f"target has {theirs}. {remedy}"
    )


def cosine_shapes(module: nn.Module, x1: Tensor, x2: Tensor, target: Tensor) -> None:
    if x1.shape != x2.shape or target.shape != x1.shape[:-1] or x1.dim() not in (1, 2):
        raise ValueError(
            f"{loss_name(module)}: output has shapes {tuple(x1.shape)} and "
            f"{tuple(x2.shape)} and target {tuple(target.shape)}. "
            "Give (N, D), (N, D) and (N,), or (D,), (D,) and ()."
        )


def gaussian_shapes(
    module: nn.Module, mean: Tensor, target: Tensor, var: Tensor | float
) -> None:
    # As torch documents: in target, dimensions of 1 may repeat; in var, a single one.
    ours, theirs = tuple(mean.shape), tuple(target.shape)
    if len(ours) != len(theirs) or any(
        b not in (a, 1) for a, b in zip(ours, theirs, strict=True)
    ):
        same_shape(module, mean, target)
    shape = tuple(variance_per_element(mean, var).shape)
    if len(shape) != len(ours) or [
        b for a, b in zip(ours, shape, strict=True) if a != b
    ] not in ([], [1]):
        raise ValueError(
            f"{loss_name(module)}: var has shape {shape}, but the mean has {ours}. "
            "Give var that shape, with one dimension left out at the end or of size 1."
        )


def variance_per_element(mean: Tensor, var: Tensor | float) -> Tensor:
    if not isinstance(var, Tensor):
        return torch.full_like(mean, var)
    one_per_row = var.shape != mean.shape and var.shape == mean.shape[:-1]
    return var.unsqueeze(-1) if one_per_row else var


def ctc_shapes(module: nn.Module, log_probs: Tensor, *others: Any) -> None:
    if log_probs.dim() not in (2, 3):
        raise ValueError(
            f"{loss_name(module)}: log_probs has shape {tuple(log_probs.shape)}. Give "
            "(T, N, C), time before batch, or (T, C) for one sample."
        )
    batch = tuple(log_probs.shape[1:-1])
    for name, lengths in zip(
        ("input_lengths", "target_lengths"), others[1:], strict=True
    ):
        shape = tuple(torch.as_tensor(lengths).shape)
        if shape != batch and not (batch == () and shape == (1,)):
            raise ValueError(
                f"{loss_name(module)}: {name} has shape {shape}, log_probs has shape "
                f"{tuple(log_probs.shape)}, time before batch: give shape {batch}."
            )


# --- values, read on the host ---------------------------------------------------------


def any_values(module: nn.Module, *args: Any) -> None:
    pass


def _refuse(module: nn.Module, name: str, value: Tensor, bad: Tensor, why: str) -> None:
    """Raises for the first element that is `bad`, naming it and its place."""
    if not bool(bad.any()):
        return
    place = [int(index) for index in bad.nonzero()[0]]
    number = value[tuple(place)]
    shown = float(number) if number.is_floating_point() else int(number)
    raise ValueError(f"{loss_name(module)}: {name}{place or ''} is {shown}, {why}")


def labels(module: nn.Module, output: Tensor, target: Tensor) -> None:
    if target.is_floating_point():
        why = "but a probability is not negative. For scores, use target.softmax(1)."
        _refuse(module, "target", target, target < 0, why)
        return
    classes = output.shape[1] if output.dim() > 1 else output.shape[0]
    bad = (target < 0) | (target >= classes)
    remedy = "Number the classes from 0, or widen the model's last layer."
    if hasattr(module, "ignore_index"):
        bad &= target != module.ignore_index
        remedy += f" Only ignore_index, {module.ignore_index}, may lie outside."
    why = f"but output has {classes} classes, so labels lie in [0, {classes}). {remedy}"
    _refuse(module, "target", target, bad, why)


def label_sets(module: nn.Module, output: Tensor, target: Tensor) -> None:
    classes = output.shape[-1]
    why = f"but labels lie in [0, {classes}), and -1 ends the list of a sample."
    _refuse(module, "target", target, (target < -1) | (target >= classes), why)


def signs(module: nn.Module, *args: Tensor) -> None:
    why = "but targets are -1 or 1. Of 0 and 1, take 2 * target - 1."
    _refuse(module, "target", args[-1], args[-1].abs() != 1, why)


def unit_targets(module: nn.Module, output: Tensor, target: Tensor) -> None:
    why = "but targets are probabilities in [0, 1]. Scale them, or use MSELoss."
    _refuse(module, "target", target, (target < 0) | (target > 1), why)


def unit_both(module: nn.Module, output: Tensor, target: Tensor) -> None:
    why = "but outputs are probabilities in [0, 1]. For logits: BCEWithLogitsLoss."
    _refuse(module, "output", output, (output < 0) | (output > 1), why)
    unit_targets(module, output, target)


def kl_targets(module: nn.KLDivLoss, output: Tensor, target: Tensor) -> None:
    if not module.log_target:
        why = "but a probability is not negative. For logarithms: log_target=True."
        _refuse(module, "target", target, target < 0, why)


def variances(
    module: nn.Module, mean: Tensor, target: Tensor, var: Tensor | float
) -> None:
    value = torch.as_tensor(var)
    why = "but a variance is not negative. Use softplus or exp in the model."
    _refuse(module, "var", value, value < 0, why)


def ctc_labels(
    module: nn.CTCLoss, log_probs: Tensor, targets: Tensor, *lengths: Any
) -> None:
    classes, used = log_probs.shape[-1], torch.ones_like(targets, dtype=torch.bool)
    if targets.dim() == 2:  # what lies past the length of a sample is padding
        ends = torch.as_tensor(lengths[1], device=targets.device).reshape(-1, 1)
        used = torch.arange(targets.shape[1], device=targets.device) < ends
    bad = (targets < 0) | (targets >= classes) | (targets == module.blank)
    why = f"but labels lie in [0, {classes}) and are not blank, {module.blank}."
    _refuse(module, "targets", targets, bad & used, why)
