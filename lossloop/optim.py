"""The optimizers of torch.optim, under its names, as pure functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore

from lossloop._optimizers import from_torch, scheduled
from lossloop._types import Optimizer

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "decay_groups",
    "scheduled",
]

_NORMALISATIONS = (
    _NormBase,  # of batches and instances
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

# `locals()` in the first line of a function is its arguments by name.


def SGD(
    lr: float = 1e-3,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Stochastic gradient descent, with momentum if asked for.

    Momentum: Polyak, 1964; nesterov: Sutskever, Martens, Dahl and Hinton, 2013.

    Args:
        lr: Learning rate.
        momentum: Share of the former step that is kept.
        dampening: Share of the gradient kept out of the momentum, after the first step.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: Look ahead along the momentum; needs a momentum and no dampening.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = SGD()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0010, -0.0010])
    """
    return from_torch(torch.optim.SGD, **locals())


def Adam(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """Steps scaled by averages of the gradient and of its square.

    Kingma and Ba, 2015; amsgrad: Reddi, Kale and Kumar, 2018.

    Args:
        lr: Learning rate.
        betas: Decay rates of the averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        amsgrad: Divide by the largest average of the square so far.
        maximize: Ascend instead of descend.
        decoupled_weight_decay: Shrink the parameter by `lr * weight_decay` instead of
            adding the decay to the gradient.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = Adam()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0010, -0.0010])
    """
    return from_torch(torch.optim.Adam, **locals())


def AdamW(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Adam with decoupled weight decay.

    Loshchilov and Hutter, 2019.

    Args:
        lr: Learning rate.
        betas: Decay rates of the averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: The parameter shrinks by `lr * weight_decay` of itself.
        amsgrad: Divide by the largest average of the square so far.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = AdamW()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0010, -0.0010])
    """
    return from_torch(torch.optim.AdamW, **locals())


def RMSprop(
    lr: float = 1e-2,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Steps divided by the root of an average of the squared gradient.

    Tieleman and Hinton, 2012; centered: Graves, 2013.

    Args:
        lr: Learning rate.
        alpha: Decay rate of the average.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        momentum: Share of the former step that is kept.
        centered: Divide by the estimated deviation: less the square of the mean.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = RMSprop()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.1000, -0.1000])
    """
    return from_torch(torch.optim.RMSprop, **locals())


def Adagrad(
    lr: float = 1e-2,
    *,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> Optimizer:
    """Steps divided by the root of the sum of squared gradients.

    Duchi, Hazan and Singer, 2011.

    Args:
        lr: Learning rate.
        lr_decay: The rate after `t` steps is `lr / (1 + t * lr_decay)`.
        weight_decay: L2 penalty, added to the gradient.
        initial_accumulator_value: The sum before the first step.
        eps: Added to the denominator.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = Adagrad()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0100, -0.0100])
    """
    return from_torch(torch.optim.Adagrad, **locals())


def Adadelta(
    lr: float = 1.0,
    *,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Steps scaled by the ratio of average step to average gradient.

    Zeiler, 2012.

    Args:
        lr: Learning rate.
        rho: Decay rate of the averages.
        eps: Added under both roots.
        weight_decay: L2 penalty, added to the gradient.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = Adadelta()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0032, -0.0032])
    """
    return from_torch(torch.optim.Adadelta, **locals())


def Adamax(
    lr: float = 2e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Adam with the largest gradient, decayed, in place of the mean square.

    Kingma and Ba, 2015, section 7.1.

    Args:
        lr: Learning rate.
        betas: Decay rates of the average and of the maximum.
        eps: Added to the size of the gradient.
        weight_decay: L2 penalty, added to the gradient.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = Adamax()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0020, -0.0020])
    """
    return from_torch(torch.optim.Adamax, **locals())


def NAdam(
    lr: float = 2e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Adam with Nesterov momentum.

    Dozat, 2016.

    Args:
        lr: Learning rate.
        betas: Decay rates of the averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        momentum_decay: How fast the momentum grows to `betas[0]`.
        decoupled_weight_decay: Shrink the parameter by `lr * weight_decay` instead of
            adding the decay to the gradient.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = NAdam()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0021, -0.0021])
    """
    return from_torch(torch.optim.NAdam, **locals())


def RAdam(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Adam with a rectified rate in the first steps.

    Liu, Jiang, He, Chen, Liu, Gao and Han, 2020.

    Args:
        lr: Learning rate.
        betas: Decay rates of the averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        decoupled_weight_decay: Shrink the parameter by `lr * weight_decay` instead of
            adding the decay to the gradient.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = RAdam()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0010, -0.0010])
    """
    return from_torch(torch.optim.RAdam, **locals())


def ASGD(
    lr: float = 1e-2,
    *,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Stochastic gradient descent that also averages its parameters.

    Polyak and Juditsky, 1992. The averages are the moments `ax` of the slots.

    Args:
        lr: Learning rate.
        lambd: Shrinks the parameter in each step, and the rate over time.
        alpha: Power by which the rate falls.
        t0: Steps before averaging starts.
        weight_decay: L2 penalty, added to the gradient.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = ASGD()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0100, -0.0100])
    """
    return from_torch(torch.optim.ASGD, **locals())


def Rprop(
    lr: float = 1e-2,
    *,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50),
    maximize: bool = False,
) -> Optimizer:
    """Steps that grow while the sign of the gradient stays, for full batches.

    Riedmiller and Braun, 1993.

    Args:
        lr: Size of the first step.
        etas: Factors of the step size where the sign turned, and where it stayed.
        step_sizes: Smallest and largest step size.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = Rprop()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0100, -0.0100])
    """
    return from_torch(torch.optim.Rprop, **locals())


def Adafactor(
    lr: float = 1e-2,
    *,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Adam's scaling from sums of rows and columns, in little memory.

    Shazeer and Stern, 2018, with torch's use of `lr` as the largest rate.

    Args:
        lr: Largest relative step size, and factor of the weight decay.
        beta2_decay: Power of the step count in the decay rate of the averages.
        eps: Smallest root of a mean square (None: the precision of the parameter's
            dtype) and smallest scale of a parameter.
        d: Root mean square at which an update is clipped.
        weight_decay: The parameter shrinks by `lr * weight_decay` of itself.
        maximize: Ascend instead of descend.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> optimizer = Adafactor()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([-0.0100, -0.0100])
    """
    return from_torch(torch.optim.Adafactor, **locals())


def Muon(
    lr: float = 1e-3,
    *,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> Optimizer:
    """Momentum made orthogonal, for matrices only.

    Jordan and others, 2024; match_rms_adamw: Liu and others, 2025.

    Args:
        lr: Learning rate.
        weight_decay: The parameter shrinks by `lr * weight_decay` of itself.
        momentum: Decay rate of the average of the gradient.
        nesterov: Look ahead along the momentum.
        ns_coefficients: Of the Newton-Schulz polynomial.
        eps: Smallest norm that the momentum is divided by.
        ns_steps: Number of Newton-Schulz steps, in bfloat16.
        adjust_lr_fn: How the rate depends on the shape: "original" (None
            means it too) or "match_rms_adamw".

    Example:
        >>> params = {"weight": torch.eye(2)}
        >>> optimizer = Muon()
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["weight"]
        tensor([[-0.0012, -0.0000],
                [-0.0000, -0.0012]])
    """
    return from_torch(torch.optim.Muon, **locals())


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decays: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of which only the first decays, for any torch optimizer.

    By default what decays are the weights of products: parameters of two dimensions and
    more, unless they belong to a normalisation layer. Biases and the scales of
    normalisations stay as they are.

    Args:
        model: Whose trainable parameters are sorted, a tied one once.
        weight_decay: Of the first group; that of the second is 0.
        decays: Another rule: whether the parameter of this name decays.

    Returns:
        Two groups, of which one that is empty is left out.

    Raises:
        ValueError: If `weight_decay` is negative, or nothing is trainable.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
        >>> groups = decay_groups(model, 0.1)
        >>> [(group["weight_decay"], len(group["params"])) for group in groups]
        [(0.1, 1), (0.0, 3)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    if not weight_decay >= 0:
        raise ValueError(
            f"decay_groups(weight_decay=...) must be at least 0, got {weight_decay!r}."
        )
    normal = {
        id(param)
        for module in model.modules()
        if isinstance(module, _NORMALISATIONS)
        for param in module.parameters(recurse=False)
    }

    def by_shape(name: str, param: nn.Parameter) -> bool:
        return param.ndim >= 2 and id(param) not in normal

    rule = by_shape if decays is None else decays
    sorted_out: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, param in model.named_parameters():
        if param.requires_grad:
            sorted_out[bool(rule(name, param))].append(param)
    groups = [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0}
        for decayed, params in sorted_out.items()
        if params
    ]
    if not groups:
        raise ValueError(
            "decay_groups: no parameter of the model has requires_grad=True."
        )
    return groups
