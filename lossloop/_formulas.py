"""The update formulas of torch.optim's optimizers, in pure tensor arithmetic."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

Tensors = dict[str, Tensor]
Static = Mapping[str, Any]
Result = tuple[Tensor, Tensors]
Kernel = Callable[
    [list[Tensor], list[Tensor], list[Tensors], Tensor, Mapping[str, float], Static],
    None,
]


def _hyper_alone(count: Tensor, hyper: Tensors) -> Tensors:
    return hyper


class Rule(NamedTuple):
    """How one optimizer is computed; the three callables are pure.

    `moments(param, hyper, static)` is the state of a parameter before its first step.
    `update(param, grad, moments, scalars, static)` returns what is added to the
    parameter, and its new moments. `scalars(count, hyper)` is what the updates of all
    parameters of a group share, with `count` 1 in the first step. `maximize`, weight
    decay and the dtypes of the results are the caller's business.
    """

    moments: Callable[[Tensor, Tensors, Static], Tensors]
    update: Callable[[Tensor, Tensor, Tensors, Tensors, Static], Result]
    dynamic: tuple[str, ...]  # options that may change between steps: tensors
    static: tuple[str, ...] = ("maximize",)  # options that shape the graph
    scalars: Callable[[Tensor, Tensors], Tensors] = _hyper_alone
    optional: tuple[str, ...] = ("weight_decay",)  # dynamic; no term in it when zero
    decoupled: bool = False  # weight decay is, if that is not an option
    counts: bool = True  # torch keeps a step count
    elementwise: bool = True  # an element's update depends on no other's
    # torch's own kernel for all parameters of a group at once, which writes over them
    # and their moments: `kernel(params, grads, moments, count, hyper, static)`.
    kernel: Kernel | None = None


# In the formulas: p parameter, g gradient, m moments, s scalars, o static options.
# The scalar "size" has the sign of the step; a "share" is the new value's, in averages.


def _zeros(*names: str) -> Callable[[Tensor, Tensors, Static], Tensors]:
    def moments(p: Tensor, hyper: Tensors, o: Static) -> Tensors:
        return {name: torch.zeros_like(p) for name in names}

    return moments


def _one_minus_power(base: Tensor, exponent: Tensor) -> Tensor:
    # Inductor keeps a scalar that several kernels read in a buffer of its own only if
    # it holds a log or an exp; otherwise each element computes the power again. The
    # clamp keeps a base of 0, and its derivative, finite; expm1 does not cancel.
    base = base.clamp(min=torch.finfo(base.dtype).tiny)
    return -torch.expm1(exponent * torch.log(base))


def _mix(old: Tensor, keep: Tensor, new: Tensor, share: Tensor) -> Tensor:
    # Not old + (new - old) * share, which cancels where old is much the larger.
    return _normal(old * keep + new * share)


def _normal(moment: Tensor) -> Tensor:
    # Where gradients stay zero (a dead ReLU, a word that does not come up) a moment
    # decays into subnormal numbers, with which processors are so slow that the whole
    # step of a small MLP took half as long again, from its 640th on. Zero instead moves
    # no weight by more than 1e-18 of the rate.
    return hardshrink(moment, torch.finfo(moment.dtype).tiny)


def _root(square: Tensor) -> Tensor:
    # The slope of sqrt at 0 is infinite, and 0 * inf is nan: a gradient that is exactly
    # zero (a dead ReLU) must not spoil the derivative through training.
    return torch.sqrt(square.clamp(min=torch.finfo(square.dtype).tiny))


# SGD with momentum (Polyak, 1964), as Sutskever et al. (2013) for nesterov.


def _sgd_moments(p: Tensor, hyper: Tensors, o: Static) -> Tensors:
    return {"momentum_buffer": torch.zeros_like(p)} if "momentum" in hyper else {}


def _sgd_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    if "dampening" not in hyper:
        return hyper
    # The first gradient enters undamped; the buffer is zero before it.
    undamped = torch.where(count == 1, 1.0, 1 - hyper["dampening"])
    return {**hyper, "undamped": undamped}


def _sgd(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    if "momentum" not in s:
        return -s["lr"] * g, {}
    fresh = g * s["undamped"] if "undamped" in s else g
    buffer = _normal(m["momentum_buffer"] * s["momentum"] + fresh)
    direction = g + buffer * s["momentum"] if o["nesterov"] else buffer
    return -s["lr"] * direction, {"momentum_buffer": buffer}


# Adam (Kingma and Ba, 2015), amsgrad (Reddi et al., 2018), AdamW (Loshchilov and
# Hutter, 2019: the decay, at the caller).


def _adam_moments(p: Tensor, hyper: Tensors, o: Static) -> Tensors:
    names = ("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(o.get("amsgrad")))
    return {name: torch.zeros_like(p) for name in names}


def _adam_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    # The root of the second correction multiplies the fraction instead of dividing
    # every element of the denominator.
    root = torch.sqrt(_one_minus_power(hyper["beta2"], count))
    size = -hyper["lr"] * root / _one_minus_power(hyper["beta1"], count)
    return {**_shares(hyper), "size": size, "eps": hyper["eps"] * root}


def _shares(hyper: Tensors) -> Tensors:
    return {**hyper, "share1": 1 - hyper["beta1"], "share2": 1 - hyper["beta2"]}


def _adam_averages(g: Tensor, m: Tensors, s: Tensors) -> Tensors:
    return {
        "exp_avg": _mix(m["exp_avg"], s["beta1"], g, s["share1"]),
        "exp_avg_sq": _mix(m["exp_avg_sq"], s["beta2"], g * g, s["share2"]),
    }


def _adam(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    new = _adam_averages(g, m, s)
    square = new["exp_avg_sq"]
    if o["amsgrad"]:
        square = torch.maximum(m["max_exp_avg_sq"], square)
        new["max_exp_avg_sq"] = square
    return s["size"] * new["exp_avg"] / (_root(square) + s["eps"]), new


def _adam_kernel(
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensors],
    count: Tensor,
    hyper: Mapping[str, float],
    o: Static,
) -> None:
    decoupled = o["decoupled_weight_decay"]
    kernel = torch.ops.aten._fused_adamw_ if decoupled else torch.ops.aten._fused_adam_
    kernel(
        params,
        grads,
        [m["exp_avg"] for m in moments],
        [m["exp_avg_sq"] for m in moments],
        [m["max_exp_avg_sq"] for m in moments] if o["amsgrad"] else [],
        [count.float()] * len(params),
        lr=hyper["lr"],
        beta1=hyper["beta1"],
        beta2=hyper["beta2"],
        weight_decay=hyper.get("weight_decay", 0.0),
        eps=hyper["eps"],
        amsgrad=o["amsgrad"],
        maximize=o["maximize"],
    )


# RMSprop (Tieleman and Hinton, 2012; centered: Graves, 2013).


def _rmsprop_moments(p: Tensor, hyper: Tensors, o: Static) -> Tensors:
    names = ["square_avg"]
    names += ["momentum_buffer"] * ("momentum" in hyper) + ["grad_avg"] * o["centered"]
    return {name: torch.zeros_like(p) for name in names}


def _rmsprop_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    return {**hyper, "share": 1 - hyper["alpha"]}


def _rmsprop(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    new = {"square_avg": _mix(m["square_avg"], s["alpha"], g * g, s["share"])}
    variance = new["square_avg"]
    if o["centered"]:
        new["grad_avg"] = _mix(m["grad_avg"], s["alpha"], g, s["share"])
        variance = variance - new["grad_avg"] * new["grad_avg"]
    direction = g / (_root(variance) + s["eps"])
    if "momentum" in s:
        direction = _normal(m["momentum_buffer"] * s["momentum"] + direction)
        new["momentum_buffer"] = direction
    return -s["lr"] * direction, new


# Adagrad (Duchi et al., 2011).


def _adagrad_moments(p: Tensor, hyper: Tensors, o: Static) -> Tensors:
    return {"sum": torch.full_like(p, o["initial_accumulator_value"])}


def _adagrad_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    if "lr_decay" not in hyper:
        return hyper
    # lr / (1 + (count - 1) * lr_decay), with a log: see _one_minus_power.
    shrink = torch.exp(-torch.log1p((count - 1) * hyper["lr_decay"]))
    return {**hyper, "lr": hyper["lr"] * shrink}


def _adagrad(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    total = m["sum"] + g * g
    return -s["lr"] * g / (_root(total) + s["eps"]), {"sum": total}


# Adadelta (Zeiler, 2012).


def _adadelta_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    return {**hyper, "share": 1 - hyper["rho"]}


def _adadelta(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    square = _mix(m["square_avg"], s["rho"], g * g, s["share"])
    delta = _root(m["acc_delta"] + s["eps"]) / _root(square + s["eps"]) * g
    acc = _mix(m["acc_delta"], s["rho"], delta * delta, s["share"])
    return -s["lr"] * delta, {"square_avg": square, "acc_delta": acc}


# Adamax (Kingma and Ba, 2015, section 7.1).


def _adamax_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    size = -hyper["lr"] / _one_minus_power(hyper["beta1"], count)
    return {**_shares(hyper), "size": size}


def _adamax(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    average = _mix(m["exp_avg"], s["beta1"], g, s["share1"])
    bound = torch.maximum(m["exp_inf"] * s["beta2"], g.abs() + s["eps"])
    return s["size"] * average / bound, {"exp_avg": average, "exp_inf": bound}


# NAdam (Dozat, 2016).


def _nadam_moments(p: Tensor, hyper: Tensors, o: Static) -> Tensors:
    product = torch.ones_like(hyper["lr"])
    return {**_adam_moments(p, hyper, o), "mu_product": product}


def _nadam_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    def momentum(at: Tensor) -> Tensor:
        shrink = torch.exp(at * hyper["momentum_decay"] * math.log(0.96))
        return hyper["beta1"] * (1 - 0.5 * shrink)

    root = torch.sqrt(_one_minus_power(hyper["beta2"], count))
    return {
        **_shares(hyper),
        "mu": momentum(count),
        "mu_next": momentum(count + 1),
        "size": -hyper["lr"] * root,
        "eps": hyper["eps"] * root,
    }


def _nadam(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    new = _adam_averages(g, m, s)
    product = m["mu_product"] * s["mu"]
    of_grad = s["size"] * (1 - s["mu"]) / (1 - product)
    of_average = s["size"] * s["mu_next"] / (1 - product * s["mu_next"])
    numerator = of_grad * g + of_average * new["exp_avg"]
    update = numerator / (_root(new["exp_avg_sq"]) + s["eps"])
    return update, {**new, "mu_product": product}


# RAdam (Liu et al., 2020).


def _radam_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    correction = _one_minus_power(hyper["beta2"], count)
    longest = 2 / (1 - hyper["beta2"]) - 1
    length = longest - 2 * count * (1 - correction) / correction
    rectified = length > 5
    # Any value above 5 does where the result is not taken: value and slope stay finite.
    length = torch.where(rectified, length, 6.0)
    longest = torch.where(rectified, longest, 6.0)
    rate = (length - 4) * (length - 2) * longest
    rate = torch.sqrt(rate / ((longest - 4) * (longest - 2) * length) * correction)
    size = -hyper["lr"] / _one_minus_power(hyper["beta1"], count)
    size = size * torch.where(rectified, rate, 1.0)
    return {**_shares(hyper), "size": size, "rectified": rectified}


def _radam(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    new = _adam_averages(g, m, s)
    bound = torch.where(s["rectified"], _root(new["exp_avg_sq"]) + s["eps"], 1.0)
    return s["size"] * new["exp_avg"] / bound, new


# ASGD (Polyak and Juditsky, 1992).


def _asgd_moments(p: Tensor, hyper: Tensors, o: Static) -> Tensors:
    rate = hyper["lr"]
    return {"eta": rate.clone(), "mu": torch.ones_like(rate), "ax": torch.zeros_like(p)}


def _asgd_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    grown = torch.log1p(hyper["lambd"] * hyper["lr"] * count)
    return {
        **hyper,
        "first": count == 1,
        "eta": hyper["lr"] * torch.exp(-hyper["alpha"] * grown),
        "mu": 1 / (count - hyper["t0"]).clamp(min=1),
    }


def _asgd(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    # torch reads the first rate when it makes the first step: after a warm-up scheduler
    # has set it.
    eta = torch.where(s["first"], s["lr"], m["eta"])
    update = -eta * (s["lambd"] * p + g)
    moved = p + update
    average = _mix(m["ax"], 1 - m["mu"], moved, m["mu"])
    # One tensor per parameter: two inputs of a later step must not share memory.
    return update, {"eta": s["eta"].clone(), "mu": s["mu"].clone(), "ax": average}


# Rprop (Riedmiller and Braun, 1993).


def _rprop_moments(p: Tensor, hyper: Tensors, o: Static) -> Tensors:
    size = (torch.zeros_like(p) + hyper["lr"]).to(p.dtype)
    return {"prev": torch.zeros_like(p), "step_size": size}


def _rprop_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    return {**hyper, "first": count == 1}


def _rprop(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    agreement = g * m["prev"]
    turned = agreement < 0
    factor = torch.where(agreement > 0, s["etaplus"], 1.0)
    factor = torch.where(turned, s["etaminus"], factor)
    size = torch.where(s["first"], s["lr"], m["step_size"]) * factor
    size = torch.maximum(size, s["step_size_min"])
    size = torch.minimum(size, s["step_size_max"])
    g = torch.where(turned, 0.0, g)
    return -torch.sign(g) * size, {"prev": g, "step_size": size}


# Adafactor (Shazeer and Stern, 2018), with torch's use of lr and of the first eps.


def _adafactor_moments(p: Tensor, hyper: Tensors, o: Static) -> Tensors:
    if p.ndim < 2:
        return {"variance": torch.zeros_like(p)}
    rows, columns = p.shape[-2:]
    return {
        "row_var": p.new_zeros((*p.shape[:-2], rows, 1)),
        "col_var": p.new_zeros((*p.shape[:-2], 1, columns)),
    }


def _adafactor_scalars(count: Tensor, hyper: Tensors) -> Tensors:
    log = torch.log(count)
    rate = torch.exp(log * hyper["beta2_decay"])
    size = torch.minimum(hyper["lr"], torch.exp(-0.5 * log))
    return {**hyper, "keep": 1 - rate, "share": rate, "size": size}


def _adafactor(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    def rms(x: Tensor) -> Tensor:
        return _root((x * x).mean())

    square = g * g
    # Without the option, the precision of the parameter, whatever we compute in.
    eps = s["eps1"] if "eps1" in s else torch.finfo(o["dtype"]).eps
    if "variance" in m:
        variance = _mix(m["variance"], s["keep"], square, s["share"])
        new = {"variance": variance}
    else:
        of_rows, of_columns = (square.mean(dim, keepdim=True) for dim in (-1, -2))
        row = _mix(m["row_var"], s["keep"], of_rows, s["share"])
        column = _mix(m["col_var"], s["keep"], of_columns, s["share"])
        variance = row * column / row.mean(-2, keepdim=True).clamp(min=eps)
        new = {"row_var": row, "col_var": column}
    step = g * torch.rsqrt(variance.clamp(min=eps * eps))
    size = torch.maximum(rms(p), s["eps2"]) * s["size"]
    return -size / (rms(step) / s["d"]).clamp(min=1) * step, new


# Muon (Jordan et al., 2024; match_rms_adamw: Liu et al., 2025).


def _muon_moments(p: Tensor, hyper: Tensors, o: Static) -> Tensors:
    if p.ndim != 2:
        raise ValueError(
            f"Muon takes matrices only, and was given a parameter of shape "
            f"{tuple(p.shape)}: train the other parameters with another optimizer"
        )
    return {"momentum_buffer": torch.zeros_like(p)}


def _orthogonal(matrix: Tensor, eps: Tensor, o: Static) -> Tensor:
    """The nearest orthogonal matrix, roughly: Newton-Schulz steps in bfloat16."""
    a, b, c = o["ns_coefficients"]
    x = matrix.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    norm = cast(Tensor, x.norm())  # pyright: ignore[reportUnknownMemberType]
    x = x / torch.maximum(norm, eps.to(x.dtype))
    for _ in range(o["ns_steps"]):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _muon(p: Tensor, g: Tensor, m: Tensors, s: Tensors, o: Static) -> Result:
    # torch.lerp, as in torch: a difference in the last place may round to another
    # bfloat16 below.
    fresh, momentum = (1 - s["momentum"]).to(g.dtype), s["momentum"].to(g.dtype)
    buffer = _normal(torch.lerp(m["momentum_buffer"], g, fresh))
    direction = torch.lerp(g, buffer, momentum) if o["nesterov"] else buffer
    rows, columns = p.shape
    ratio = (
        0.2 * math.sqrt(max(rows, columns))
        if o["adjust_lr_fn"] == "match_rms_adamw"
        else math.sqrt(max(1, rows / columns))
    )
    step = _orthogonal(direction, s["eps"], o).to(g.dtype)
    return -(s["lr"] * ratio) * step, {"momentum_buffer": buffer}


# Moments that are one number each, which torch keeps like its step counts.
NUMBERS = frozenset({"mu_product", "eta", "mu"})

_decay = "weight_decay"

RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: Rule(
        _sgd_moments,
        _sgd,
        ("lr", "momentum", "dampening", _decay),
        ("nesterov", "maximize"),
        _sgd_scalars,
        ("momentum", "dampening", _decay),
        counts=False,
    ),
    torch.optim.Adam: Rule(
        _adam_moments,
        _adam,
        ("lr", "betas", "eps", _decay),
        ("amsgrad", "maximize", "decoupled_weight_decay"),
        _adam_scalars,
        kernel=_adam_kernel,
    ),
    torch.optim.RMSprop: Rule(
        _rmsprop_moments,
        _rmsprop,
        ("lr", "alpha", "eps", "momentum", _decay),
        ("centered", "maximize"),
        _rmsprop_scalars,
        ("momentum", _decay),
    ),
    torch.optim.Adagrad: Rule(
        _adagrad_moments,
        _adagrad,
        ("lr", "lr_decay", "eps", _decay),
        ("initial_accumulator_value", "maximize"),
        _adagrad_scalars,
        ("lr_decay", _decay),
    ),
    torch.optim.Adadelta: Rule(
        _zeros("square_avg", "acc_delta"),
        _adadelta,
        ("lr", "rho", "eps", _decay),
        scalars=_adadelta_scalars,
    ),
    torch.optim.Adamax: Rule(
        _zeros("exp_avg", "exp_inf"),
        _adamax,
        ("lr", "betas", "eps", _decay),
        scalars=_adamax_scalars,
    ),
    torch.optim.NAdam: Rule(
        _nadam_moments,
        _nadam,
        ("lr", "betas", "eps", "momentum_decay", _decay),
        ("maximize", "decoupled_weight_decay"),
        _nadam_scalars,
    ),
    torch.optim.RAdam: Rule(
        _zeros("exp_avg", "exp_avg_sq"),
        _radam,
        ("lr", "betas", "eps", _decay),
        ("maximize", "decoupled_weight_decay"),
        _radam_scalars,
    ),
    torch.optim.ASGD: Rule(
        _asgd_moments,
        _asgd,
        ("lr", "lambd", "alpha", "t0", _decay),
        scalars=_asgd_scalars,
    ),
    torch.optim.Rprop: Rule(
        _rprop_moments,
        _rprop,
        ("lr", "etas", "step_sizes"),
        scalars=_rprop_scalars,
    ),
    torch.optim.Adafactor: Rule(
        _adafactor_moments,
        _adafactor,
        ("lr", "beta2_decay", "eps", "d", _decay),
        scalars=_adafactor_scalars,
        decoupled=True,
        elementwise=False,
    ),
    torch.optim.Muon: Rule(
        _muon_moments,
        _muon,
        ("lr", "momentum", "eps", _decay),
        ("nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn"),
        decoupled=True,
        counts=False,
        elementwise=False,
    ),
}
RULES[torch.optim.AdamW] = RULES[torch.optim.Adam]
