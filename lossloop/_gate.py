"""The gate: numbers that are not finite do not reach the weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lossloop._types import Gate, OptState


def check_allowed(where: str, allowed: Any) -> None:
    """Refuses what is no number of steps."""
    if isinstance(allowed, bool) or not isinstance(allowed, int):
        raise TypeError(f"{where}(skip_nonfinite=...) must be an int, got {allowed!r}.")
    if allowed < 0:
        raise ValueError(
            f"{where}(skip_nonfinite=...) is how many steps may be skipped, at least "
            f"0; got {allowed}."
        )


def start_gate(allowed: int, step: int, device: torch.device) -> Gate:
    """A gate that lets so many bad steps pass by, before step number `step + 1`."""
    numbers = (torch.tensor(n, device=device) for n in (allowed, 0, step))
    return Gate(*numbers)


def on_host(tensor: Tensor) -> bool:
    """Whether its value can be read, and without waiting for a device."""
    return tensor.is_cpu and not hasattr(tensor, "fake_mode")  # that has no value


def is_traced() -> bool:
    """Whether what runs is compiled or transformed, so that tensors have no values."""
    transform = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore
    return torch.compiler.is_compiling() or transform is not None


def gate_of(opt_state: OptState) -> Gate:
    """That of a state which has one."""
    assert opt_state.gate
    return opt_state.gate


def with_allowance(opt_state: OptState, allowed: int) -> OptState:
    """A state whose gate lets so many bad steps pass by in all."""
    gate = gate_of(opt_state)
    number = torch.full_like(gate.allowed, allowed)
    return opt_state._replace(gate=gate._replace(allowed=number))


def judged(gate: Gate, good: Tensor) -> tuple[Tensor, Gate]:
    """Whether a step may change anything, and the gate after it.

    Args:
        gate: Before the step.
        good: Whether its loss and gradients are finite, shape (), bool.
    """
    opened = gate.skipped <= gate.allowed
    skipped = gate.skipped + (opened & ~good)
    return opened & good, Gate(gate.allowed, skipped, gate.step + opened)


def grand_total(loss_sum: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """A number that is finite if the loss and all elements of the tensors are.

    Their sum: no other question is answered by faster code. It may overflow where no
    element has, but numbers of that size are lost in any case.
    """
    wide = (torch.promote_types(t.dtype, torch.float32) for t in tensors)
    sums = [t.sum(dtype=dtype) for t, dtype in zip(tensors, wide, strict=True)]
    return sum(sums, loss_sum)


def seen_finite(loss_sum: Tensor, grads: Sequence[Tensor]) -> bool:
    """The same, read on the host: for tensors that are there."""
    # The quickest of torch's reductions, though it overflows sooner.
    norms = torch._foreach_norm(grads) if grads else [loss_sum]  # pyright: ignore
    if math.isfinite(torch.stack(norms).sum() + loss_sum):
        return True
    return math.isfinite(grand_total(loss_sum, grads))


def names_not_finite(tree: Any) -> list[str]:
    """The places in a tree of tensors that hold numbers that are not finite."""
    # Most often there are none, and then nobody asks for names, which take longer.
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            kinds.setdefault(leaf.dtype, []).append(leaf)
    norms = (torch._foreach_norm(tensors) for tensors in kinds.values())  # pyright: ignore
    if all(math.isfinite(torch.stack(each).sum()) for each in norms):
        return []
    return [
        pytree.keystr(path)
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
        if not bool(torch.isfinite(leaf).all())
    ]


class NonFiniteError(FloatingPointError):
    """A number is not finite, and has not reached the weights.

    Args:
        epoch: From 1.
        step: Of the run, from 1.
        where: What was not finite: places in the batch like "batch[0]", "loss",
            "gradient of NAME", places in the weights and in the state of the optimizer,
            or "val_loss".
        remedy: What the caller can do.
    """

    def __init__(
        self, epoch: int, step: int, where: Sequence[str], remedy: str
    ) -> None:
        shown = ", ".join(where[:4]) + (", ..." if len(where) > 4 else "")
        super().__init__(
            f"fit: epoch {epoch}, step {step} of the run: not finite: {shown}. {remedy}"
        )
        self.epoch = epoch
        self.step = step
        self.where = tuple(where)
