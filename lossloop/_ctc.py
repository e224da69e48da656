"""The CTC loss as an operator that torch can trace."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn


def traceable_ctc(
    module: nn.CTCLoss,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
) -> Tensor:
    # torch cannot trace its own: the shape of what it saves depends on the lengths. The
    # operator below hides that. It returns the gradient with the losses, which enters
    # by a term of value 0, because neither the autograd of custom operators nor
    # autograd.Function works inside a compiled torch.func.grad (torch 2.13).
    lengths = (
        torch.as_tensor(length).reshape(-1)
        for length in (input_lengths, target_lengths)
    )
    fixed = log_probs.detach()
    losses, grad = _ctc_loss_and_grad(
        fixed, targets, *lengths, module.blank, module.zero_infinity
    )
    zero = (log_probs - fixed).where(fixed.isfinite(), 0)  # -inf - -inf would be NaN
    return losses + (grad * zero).sum((0, -1))


@torch.library.custom_op("lossloop::ctc_loss_and_grad", mutates_args=())
def _ctc_loss_and_grad(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,  # noqa: FBT001  (operators take no keyword-only tensors)
) -> tuple[Tensor, Tensor]:
    batched = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    lengths = input_lengths, target_lengths
    losses, alpha = torch.ops.aten._ctc_loss(
        batched, targets, *lengths, blank, zero_infinity
    )
    grad = torch.ops.aten._ctc_loss_backward(
        torch.ones_like(losses),
        batched,
        targets,
        *lengths,
        losses,
        alpha,
        blank,
        zero_infinity,
    )
    if zero_infinity:
        losses = losses.where(losses != math.inf, 0)
    return losses.reshape(log_probs.shape[1:-1]), grad.reshape(log_probs.shape)


def _ctc_results(log_probs: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return log_probs.new_empty(log_probs.shape[1:-1]), log_probs.new_empty(
        log_probs.shape
    )


cast(Any, _ctc_loss_and_grad).register_fake(_ctc_results)
