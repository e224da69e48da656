"""Optimizers as pure functions, read from torch.optim's and written back to them."""

import functools
import inspect
import reprlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from lossloop._formulas import NUMBERS, RULES, Rule
from lossloop._gate import is_traced
from lossloop._types import (
    Group,
    Optimizer,
    OptState,
    Params,
    Slots,
    accumulator_dtype,
)
from lossloop.schedules import check_schedule

TorchOptimizer = torch.optim.Optimizer
Options = dict[str, Any]
TorchLike = TorchOptimizer | type[TorchOptimizer] | functools.partial[TorchOptimizer]

# Ways of executing: they do not change the results.
_EXECUTION = {"foreach", "fused", "capturable", "differentiable"}

_STEP = "step"  # by name, since torch's annotations leave it partly unknown

_PAIRS = {
    "betas": ("beta1", "beta2"),
    "eps": ("eps1", "eps2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}


def _rule(kind: type[TorchOptimizer]) -> Rule:
    """The rule of a torch.optim class, or of a subclass that only sets options."""
    return RULES[_supported(kind, getattr(kind, _STEP, None))]


@functools.cache
def _supported(kind: type[TorchOptimizer], step: Any) -> type[TorchOptimizer]:
    for base in kind.__mro__:
        if base not in RULES:
            continue
        # torch wraps `step` of each class it makes instances of: compare the originals.
        if inspect.unwrap(step) is inspect.unwrap(getattr(base, _STEP)):
            return base
        raise TypeError(
            f"{kind.__name__} overrides {base.__name__}.step, which lossloop does not "
            f"call: its formulas are its own. Pass torch.optim.{base.__name__}, or an "
            f"object with `init` and `update`"
        )
    raise TypeError(
        f"{kind.__name__} is not supported. Supported of torch.optim: "
        f"{', '.join(sorted(known.__name__ for known in RULES))}; anything else as an "
        f"object with `init` and `update`"
    )


def _static(rule: Rule, group: Options) -> Options:
    fixed = {name: group[name] for name in rule.static}
    return {"decoupled_weight_decay": rule.decoupled, "maximize": False, **fixed}


def _statics(optimizer: TorchOptimizer) -> tuple[Options, ...]:
    rule = _rule(type(optimizer))
    return tuple(_static(rule, group) for group in optimizer.param_groups)


def _named(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """An option under the names of its hyper-parameters: betas as beta1 and beta2."""
    if isinstance(value, tuple | list):
        return zip(_PAIRS[name], cast(Sequence[Any], value), strict=True)
    return [(name, value)]


def _group_hyper(rule: Rule, group: Options) -> dict[str, float]:
    return {
        name: float(value)
        for option in rule.dynamic
        for name, value in _named(option, group[option])
        if value is not None and not (option in rule.optional and float(value) == 0)
    }


def host_hyper(optimizer: TorchOptimizer) -> tuple[dict[str, float], ...]:
    """The hyper-parameters of each param group of a torch optimizer, as floats.

    Terms that are switched off by a zero (weight decay, momentum, dampening, lr decay)
    are absent.

    Args:
        optimizer: Of a supported class of torch.optim.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> host_hyper(torch.optim.SGD([weight], lr=0.5, momentum=0.9))
        ({'lr': 0.5, 'momentum': 0.9},)
    """
    rule = _rule(type(optimizer))
    return tuple(_group_hyper(rule, group) for group in optimizer.param_groups)


def _scalar(value: float, like: Tensor) -> Tensor:
    # Filled on the device: copying one number there would wait for it.
    return torch.full((), value, dtype=like.dtype, device=like.device)


def follow(
    optimizer: TorchOptimizer,
    opt_state: OptState,
    before: Sequence[dict[str, float]] | None = None,
) -> OptState:
    """The state with the hyper-parameters that a torch optimizer's groups hold now.

    For learning-rate schedulers of torch, which write their rates there. The device is
    not read, and the step is not compiled again.

    Args:
        optimizer: The instance that the state was made for.
        opt_state: The state so far.
        before: `host_hyper(optimizer)` when the state was last brought up to date;
            only values that differ from it become new tensors. Without it, all do.

    Returns:
        The state to make the next step with.

    Raises:
        ValueError: If param groups came or went, or an option that shapes the graph
            changed: weight decay from zero to something, for example.

    Example:
        >>> import lossloop as ll
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> goal = ll.supervised(model, torch.nn.MSELoss())
        >>> params, opt_state = ll.init(goal, sgd)
        >>> sgd.param_groups[0]["lr"] = 0.25  # as a scheduler does
        >>> ll.follow(sgd, opt_state).slots.groups[0].hyper["lr"].item()
        0.25
    """
    slots = cast(Slots, opt_state.slots)
    rule = _rule(type(optimizer))
    _same_number_of_groups(optimizer, len(slots.groups))
    groups: list[Group] = []
    for index, group in enumerate(slots.groups):
        now = _group_hyper(rule, optimizer.param_groups[index])
        for name in sorted(now.keys() ^ group.hyper.keys()):
            # Decay by 0 is no decay; a momentum of 0 still would rewrite its buffer.
            if name in now or name == "momentum":
                raise ValueError(
                    f"param group {index}: {name} changed between zero and "
                    f"{now.get(name, 'a value')} after the optimizer was built, which "
                    f"is another formula. Start from a tiny value instead of zero, or "
                    f"build the optimizer anew"
                )
        changed = {
            name: _scalar(now.get(name, 0.0), old)
            for name, old in group.hyper.items()
            if before is None or before[index].get(name, 0.0) != now.get(name, 0.0)
        }
        groups.append(group._replace(hyper={**group.hyper, **changed}))
    return opt_state._replace(slots=Slots(tuple(groups)))


def _same_number_of_groups(optimizer: TorchOptimizer, number: int) -> None:
    if len(optimizer.param_groups) != number:
        raise ValueError(
            f"{type(optimizer).__name__} has {len(optimizer.param_groups)} param "
            f"groups, and {number} were expected: add param groups before the "
            f"optimizer is passed to lossloop"
        )


def _check_options(optimizer: TorchOptimizer, rule: Rule) -> None:
    known = {*rule.dynamic, *rule.static, *_EXECUTION}
    for name, value in optimizer.defaults.items():
        if name not in known and value:
            raise ValueError(
                f"{type(optimizer).__name__}({name}={value!r}): lossloop does not know "
                f"the option {name}. Leave it at its default"
            )


def _check_real(name: str, param: Tensor) -> None:
    if param.is_complex():
        raise TypeError(
            f"parameter {name!r} is complex ({param.dtype}): complex parameters are "
            f"not supported; keep their real view (torch.view_as_real) as the parameter"
        )


def _saved_count(
    rule: Rule, index: int, options: Options, states: dict[str, Options]
) -> float:
    """The number of steps that the parameters of a group have made."""
    if rule.counts:
        counts = {name: float(state.get("step", 0)) for name, state in states.items()}
    else:
        # torch does not count; what matters is whether the first step is over.
        counts = {
            name: float(state.get("momentum_buffer") is not None)
            for name, state in states.items()
        }
        if "dampening" not in _group_hyper(rule, options):
            # The first step is like the others: from a buffer of zeros.
            return max(counts.values(), default=0.0)
    if len(set(counts.values())) > 1:
        least = min(counts, key=counts.__getitem__)
        most = max(counts, key=counts.__getitem__)
        raise ValueError(
            f"param group {index}: its parameters have made different numbers of steps "
            f"({least!r} {counts[least]:g}, {most!r} {counts[most]:g}), and a group "
            f"has one count. Put them into param groups of their own"
        )
    return next(iter(counts.values()), 0.0)


def _start_group(
    rule: Rule,
    index: int,
    options: Options,
    members: Params,
    states: dict[str, Options],
) -> Group:
    device = next((param.device for param in members.values()), torch.device("cpu"))
    like = torch.empty((), dtype=accumulator_dtype(device), device=device)
    count = _scalar(_saved_count(rule, index, options, states), like)
    hyper = {
        name: _scalar(value, like)
        for name, value in _group_hyper(rule, options).items()
    }
    static = _static(rule, options)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, param in members.items():
        _check_real(name, param)
        fresh = rule.moments(param.detach(), hyper, static)
        saved = states.get(name, {})
        for moment, value in fresh.items():
            if saved.get(moment) is not None:
                # Numbers that torch keeps in float32 go on in the wider dtype.
                dtype = value.dtype if moment in NUMBERS else saved[moment].dtype
                kept = saved[moment].detach()
                fresh[moment] = kept.to(value.device, dtype, copy=True)
            elif "step" in saved and float(saved["step"]):
                raise ValueError(
                    f"the optimizer's state of parameter {name!r} has no {moment}: an "
                    f"option was changed after its first step. Build it anew"
                )
        moments[name] = fresh
    return Group(count, hyper, moments)


# What is added to a parameter, and its new moments. Named, because torch.compile takes
# no subscripts in the annotations of a function inside another.
Change = tuple[Tensor, Params]

# Elements of a parameter that are updated at a time when that is done in place: what
# is computed on the way then stays in the cache.
BLOCK = 2**16


class _Update(NamedTuple):
    """What an optimizer of torch.optim computes: `update(grads, slots, params)`."""

    rule: Rule
    statics: Sequence[Options]  # of each group
    schedule: Callable[[Tensor], Tensor] | None = None  # of the rates

    def __call__(
        self, grads: Params, slots: Slots, params: Params
    ) -> tuple[Params, Slots]:
        updates: Params = {}
        groups: list[Group] = []
        for static, group in zip(self.statics, slots.groups, strict=True):
            count, update = self._of_group(static, group)
            moments: dict[str, Params] = {}
            for name, old in group.moments.items():
                updates[name], moments[name] = update(params[name], grads[name], old)
            groups.append(Group(count, group.hyper, moments))
        return updates, Slots(tuple(groups))

    def in_place(
        self, grads: Params, slots: Slots, params: Params
    ) -> tuple[Params, Slots]:
        """As `move_in_place`, whose caller has no more use for the gradients."""
        moved: Params = {}
        groups: list[Group] = []
        for static, group in zip(self.statics, slots.groups, strict=True):
            count, update = self._of_group(static, group)
            moments: dict[str, Params] = {}
            for name, old in group.moments.items():
                param, grad = params[name], grads.pop(name)
                if param.numel() <= BLOCK:
                    change, moments[name] = update(param, grad, old)
                    moved[name] = param + change
                    continue
                whole = [param, grad, *old.values()]
                alike = all(t.shape == param.shape for t in whole)
                length = max(1, BLOCK * len(param) // param.numel())
                blocks = (
                    zip(*(t.split(length) for t in whole), strict=True)
                    if alike and self.rule.elementwise
                    else [whole]
                )
                for own, slope, *values in blocks:
                    kept = dict(zip(old, values, strict=True))
                    change, new = update(own, slope, kept)
                    own.add_(change)
                    for key, value in kept.items():
                        value.copy_(new[key])
                moved[name], moments[name] = param, old
            groups.append(Group(count, group.hyper, moments))
        return {name: moved[name] for name in params}, Slots(tuple(groups))

    def by_kernel(
        self, grads: Params, slots: Slots, params: Params, *, in_place: bool
    ) -> tuple[Params, Slots] | None:
        """The same by torch's own kernel; None if it is not for these tensors.

        It reads rates on the host, and tensors of one dtype as they lie in memory.
        """
        kernel = self.rule.kernel
        if kernel is None or is_traced():
            return None
        state, numbers = [*params.values(), *grads.values()], list[Tensor]()
        for group in slots.groups:
            state += [t for own in group.moments.values() for t in own.values()]
            numbers += [group.step, *group.hyper.values()]
        alike = len({t.dtype for t in state}) == 1
        if not alike or not all(map(_is_simple, state + numbers)):
            return None
        moved: Params = {}
        groups: list[Group] = []

        def own(tensor: Tensor) -> Tensor:
            keeps = in_place and tensor.numel() > BLOCK
            return tensor if keeps else tensor.clone()

        for static, group in zip(self.statics, slots.groups, strict=True):
            count, hyper = self._now(group)
            now = {name: own(params[name]) for name in group.moments}
            moments = {
                name: {key: own(t) for key, t in old.items()}
                for name, old in group.moments.items()
            }
            kernel(
                list(now.values()),
                [grads[name] for name in now],
                list(moments.values()),
                count,
                {key: t.item() for key, t in hyper.items()},
                static,
            )
            moved.update(now)
            groups.append(Group(count, group.hyper, moments))
        return {name: moved[name] for name in params}, Slots(tuple(groups))

    def _now(self, group: Group) -> tuple[Tensor, Params]:
        """The new count of a group's steps, and its hyper-parameters in this one."""
        hyper = group.hyper
        if self.schedule is not None:
            # A factor of exp(0), so that it is computed once: see _one_minus_power.
            factor = self.schedule(group.step) * torch.exp(0 * group.step)
            hyper = {**hyper, "lr": hyper["lr"] * factor}
        return group.step + 1, hyper

    def _of_group(
        self, static: Options, group: Group
    ) -> tuple[Tensor, Callable[[Tensor, Tensor, Params], Change]]:
        """The new count of its steps, and the formula for one of its parameters."""
        count, hyper = self._now(group)
        scalars = self.rule.scalars(count, hyper)
        decay = hyper.get("weight_decay")
        shrink = None
        if decay is not None and static["decoupled_weight_decay"]:
            shrink, decay = hyper["lr"] * decay, None

        # Run as it is, every product would convert the scalars once more.
        eager = not torch.compiler.is_compiling()
        known: dict[torch.dtype, tuple[Params, Options]] = {}

        def update(own: Tensor, slope: Tensor, old: Params) -> Change:
            param, grad = _wide(own), _wide(slope)
            if own.dtype not in known:
                rounded = {
                    key: t.to(param.dtype) if eager and t.is_floating_point() else t
                    for key, t in scalars.items()
                }
                known[own.dtype] = rounded, {**static, "dtype": own.dtype}
            if static["maximize"]:
                grad = -grad
            if decay is not None:
                grad = grad + decay * param
            wide = {key: _wide(value) for key, value in old.items()}
            change, new = self.rule.update(param, grad, wide, *known[own.dtype])
            if shrink is not None:
                change = change - shrink * param
            return _as(own, change), {k: _as(old[k], new[k]) for k in old}

        return count, update


def move(
    optimizer: Optimizer, grads: Params, slots: Any, params: Params
) -> tuple[Params, Any]:
    """The parameters after an update, and the new slots."""
    moved = _by_kernel(optimizer, grads, slots, params, in_place=False)
    if moved is not None:
        return moved
    updates, slots = optimizer.update(grads, slots, params)
    return {name: params[name] + updates[name] for name in params}, slots


def move_in_place(
    optimizer: Optimizer, grads: Params, slots: Any, params: Params
) -> tuple[Params, Any]:
    """The same, bit for bit, in less memory.

    Large tensors are written over the old ones, by formulas a block at a time; small
    tensors are new. The gradients are dropped as they are used.
    """
    moved = _by_kernel(optimizer, grads, slots, params, in_place=True)
    if moved is not None:
        grads.clear()
        return moved
    update = optimizer.update
    own = isinstance(update, _Update)
    return (update.in_place if own else partial(move, optimizer))(grads, slots, params)


def _by_kernel(
    optimizer: Optimizer, grads: Params, slots: Any, params: Params, *, in_place: bool
) -> tuple[Params, Any] | None:
    update = optimizer.update
    if not isinstance(update, _Update):
        return None
    return update.by_kernel(grads, slots, params, in_place=in_place)


def _is_simple(tensor: Tensor) -> bool:
    """Whether a kernel may take it for a row of numbers, and nothing else."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.dtype in (torch.float32, torch.float64)
    )


def _wide(tensor: Tensor) -> Tensor:
    # Half precision is computed in float32 and rounded once, like a fused optimizer.
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if half else tensor


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    # A call that changes nothing takes as long as an operator on a small tensor.
    return tensor if tensor.dtype is like.dtype else tensor.to(like.dtype)


def from_torch(optimizer: TorchLike, **hyperparameters: Any) -> Optimizer:
    """A torch optimizer as a pair of pure functions with the same results.

    A class, or a `functools.partial` of one, makes one group of all the parameters that
    `init` is given. An instance keeps its param groups, and the state and step counts
    that it has; `init` must then be given the very parameters that the instance was
    built over, and trains those that it has. The instance itself is never changed:
    `load_opt_state` writes back.

    `foreach`, `fused`, `capturable` and `differentiable` say how torch executes the
    formulas; they are accepted and ignored. float16 and bfloat16 parameters are
    computed in float32 and rounded once, as torch's fused optimizers do.

    Args:
        optimizer: Instance, class or partial of one of torch.optim's SGD, Adam, AdamW,
            RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop, Adafactor,
            Muon.
        **hyperparameters: For a class or a partial: its keyword arguments, with torch's
            defaults and checks.

    Returns:
        An `Optimizer` whose slots are `Slots`, moments under torch's own names.

    Raises:
        TypeError: For other optimizers, for subclasses with a `step` of their own, for
            hyper-parameters next to an instance; from `init`, for complex parameters.
        ValueError: For values that torch refuses and options that are not known; from
            `init`, for an instance over parameters that are not the model's, or with
            different step counts within a group.

    Example:
        >>> optimizer = from_torch(torch.optim.SGD, lr=0.5)
        >>> params = {"weight": torch.tensor([1.0, 2.0])}
        >>> slots = optimizer.init(params)
        >>> grads = {"weight": torch.tensor([0.5, -1.0])}
        >>> updates, slots = optimizer.update(grads, slots, params)
        >>> updates["weight"]
        tensor([-0.2500,  0.5000])
    """
    if isinstance(optimizer, TorchOptimizer):
        if hyperparameters:
            raise TypeError(
                f"from_torch was given an instance of {type(optimizer).__name__} and "
                f"{', '.join(hyperparameters)}: the hyper-parameters of an instance "
                f"are in its param groups. Set them there, or pass the class"
            )
        return _from_instance(optimizer)
    make, kind = optimizer, optimizer
    if isinstance(optimizer, functools.partial):
        kind = optimizer.func
        if optimizer.args:
            raise TypeError(
                "a partial of a torch optimizer may fix keyword arguments only: the "
                "first positional argument is the parameters, which `init` is given"
            )
    if not (isinstance(kind, type) and issubclass(kind, TorchOptimizer)):
        raise TypeError(
            f"from_torch takes an instance, a class or a partial of a class of "
            f"torch.optim, not {optimizer!r}"
        )
    rule = _rule(kind)
    # Built over a dummy (a matrix, for Muon), so that torch's own checks speak.
    dummy = torch.zeros(1, 1, requires_grad=True)
    built = cast(Callable[..., TorchOptimizer], make)([dummy], **hyperparameters)
    _check_options(built, rule)
    options = built.param_groups[0]

    def init(params: Params) -> Slots:
        return Slots((_start_group(rule, 0, options, params, {}),))

    return Optimizer(init, _Update(rule, [_static(rule, options)]))


def _from_instance(optimizer: TorchOptimizer) -> Optimizer:
    rule = _rule(type(optimizer))
    _check_options(optimizer, rule)
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    if any(getattr(optimizer, name, None) for name in hooks):
        raise TypeError(
            f"{type(optimizer).__name__} has step hooks, which would not be run: its "
            f"formulas are used, not its step(). Remove them"
        )
    statics = _statics(optimizer)

    def init(params: Params) -> Slots:
        _same_number_of_groups(optimizer, len(statics))
        if _statics(optimizer) != statics:
            raise ValueError(
                f"options of {type(optimizer).__name__} that shape its formula were "
                f"changed after it was passed to lossloop: pass it again"
            )
        # Tells schedulers built on it that it does step, by other means.
        cast(Any, optimizer)._opt_called = True
        names = {id(param): name for name, param in params.items()}
        groups: list[Group] = []
        for index, options in enumerate(optimizer.param_groups):
            members: Params = {}
            for position, param in enumerate(cast(list[Tensor], options["params"])):
                if not param.requires_grad:
                    continue
                if id(param) not in names:
                    raise ValueError(
                        f"{type(optimizer).__name__} was built over parameters that "
                        f"are not the model's: param group {index}, position "
                        f"{position}, shape {tuple(param.shape)}. Build it over the "
                        f"parameters of the model that you pass"
                    )
                members[names[id(param)]] = param
            # Not indexed: the state is a defaultdict, and this would write to it.
            states = {
                name: cast(Options, optimizer.state.get(param, {}))
                for name, param in members.items()
            }
            groups.append(_start_group(rule, index, options, members, states))
        return Slots(tuple(groups))

    return Optimizer(init, _Update(rule, statics))


def _takes(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C, without a signature
        return set()


def _has_init_and_update(value: object) -> TypeGuard[Any]:
    names = ("init", "update")
    return all(callable(getattr(value, name, None)) for name in names)


def is_of_torch(value: object) -> bool:
    """Whether it is an instance, class or partial of a class of torch.optim."""
    made: object = getattr(value, "func", value)  # of a partial
    return issubclass(made if isinstance(made, type) else type(made), TorchOptimizer)


def as_optimizer(value: object) -> Optimizer:
    """Whatever can serve as an optimizer, as an `Optimizer`.

    Args:
        value: An `Optimizer`; an instance, class or partial of a class of torch.optim
            (see `from_torch`); or an object with `init(params)` and
            `update(grads, state, params)`, like those of TorchOpt (params by keyword,
            and `inplace=False`, where `update` has them).

    Raises:
        TypeError: For anything else.

    Example:
        >>> optimizer = as_optimizer(torch.optim.SGD)
        >>> as_optimizer(optimizer) is optimizer
        True
    """
    if isinstance(value, Optimizer):
        return value
    if is_of_torch(value):
        return from_torch(cast(TorchLike, value))
    if isinstance(value, type) or not _has_init_and_update(value):
        raise TypeError(
            f"{reprlib.repr(value)} is not an optimizer: pass one of torch.optim (an "
            f"instance, as Adam(model.parameters()), a class or a partial of a class), "
            f"one of lossloop.optim, as Adam(lr=0.001), or an object with "
            f"`init(params)` and `update(grads, state, params)`"
        )
    init, foreign_update = value.init, value.update
    takes = _takes(foreign_update)
    fixed = {"inplace": False} if "inplace" in takes else {}

    def update(grads: Params, slots: Any, params: Params) -> tuple[Params, Any]:
        if "params" in takes:
            return foreign_update(grads, slots, params=params, **fixed)
        return foreign_update(grads, slots, params, **fixed)

    return Optimizer(init, update)


def scheduled(optimizer: Any, schedule: Callable[[Tensor], Tensor]) -> Optimizer:
    """An optimizer whose rates follow a schedule, as a part of its update.

    In each update the `lr` of every parameter group is multiplied by
    `schedule(step)`, with the number of updates that the group has made. The state
    keeps the rate itself. An instance with steps made goes on where it was.

    Args:
        optimizer: Of `lossloop.optim` or `from_torch`, or an instance, class or partial
            of `torch.optim`.
        schedule: Of `lossloop.schedules`, or a function of your own: from the number
            of updates made, (), to the factor, (), in tensor operations.

    Returns:
        The optimizer, with the same slots.

    Raises:
        TypeError: If the formulas of the optimizer are not lossloop's, or the schedule
            is no such function.
        ValueError: If the optimizer has a schedule already; from `init`, for an
            instance with momentum of a class that counts no steps (SGD, Muon).

    Example:
        >>> import lossloop as ll
        >>> from lossloop.schedules import step
        >>> optimizer = scheduled(ll.optim.SGD(lr=1.0), step(1, gamma=0.5))
        >>> params = {"weight": torch.ones(1)}
        >>> slots = optimizer.init(params)
        >>> for _ in range(3):
        ...     updates, slots = optimizer.update(params, slots, params)
        ...     print(updates["weight"].item())
        -1.0
        -0.5
        -0.25
    """
    init, update = as_optimizer(optimizer)
    if not isinstance(update, _Update):
        raise TypeError(
            f"lossloop.optim.scheduled(optimizer=...) must be one of torch.optim or "
            f"lossloop.optim, whose formulas take a rate, got {optimizer!r}. Schedule "
            f"others by the means of their own library, or in your own `update`."
        )
    if update.schedule is not None:
        raise ValueError(
            f"lossloop.optim.scheduled(optimizer=...) follows {update.schedule!r} "
            f"already. Put schedules one after the other with lossloop.schedules.join, "
            f"or multiply them in one function."
        )
    check_schedule("lossloop.optim.scheduled(schedule=...)", schedule)

    def begin(params: Params) -> Slots:
        slots = init(params)
        if not update.rule.counts and any(group.step.item() for group in slots.groups):
            raise ValueError(
                f"lossloop.optim.scheduled(optimizer=...) has made steps, and torch "
                f"did not count them, so nothing says where in {schedule!r} it is. Go "
                f"on from the opt_state of the run before, or build the optimizer anew."
            )
        return slots

    return Optimizer(begin, update._replace(schedule=schedule))


def keeps_nonfinite(optimizer: Optimizer) -> bool:
    """Whether a gradient that is not finite makes the state so, for good.

    Of the formulas of torch, Rprop alone looks at no more than its sign.
    """
    update = optimizer.update
    return isinstance(update, _Update) and update.rule is not RULES[torch.optim.Rprop]


def rate_of(optimizer: Optimizer, slots: Any) -> Tensor | None:
    """The first group's rate in the last step made (the first, if none was), ().

    None if the state is not of lossloop's own formulas.
    """
    if not isinstance(slots, Slots):
        return None
    group, update = slots.groups[0], optimizer.update
    rate = group.hyper["lr"]
    if not isinstance(update, _Update) or update.schedule is None:
        return rate
    return rate * update.schedule((group.step - 1).clamp(min=0))


def load_opt_state(
    optimizer: TorchOptimizer,
    model: nn.Module,
    opt_state: OptState,
    *,
    copy: bool = True,
) -> None:
    """Writes an optimizer state back into a torch optimizer, to go on without lossloop.

    Moments, step counts and hyper-parameters (the rates at this moment) are written in
    torch's own format. The parameters themselves are written by `load_params`.

    Args:
        optimizer: Over the parameters of `model`, with as many param groups as the
            state has; of the class that the state was made with.
        model: The model; its parameter names are those of the state.
        opt_state: What a step returned.
        copy: Whether the moments are copied. If not, both have the same tensors, and
            the next step of the one writes into the other.

    Raises:
        TypeError: If the state is not of one of lossloop's own formulas.
        ValueError: If param groups, parameters or moments do not match.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> torch_sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> slots = from_torch(torch.optim.SGD, lr=0.25).init(
        ...     dict(model.named_parameters())
        ... )
        >>> zero = torch.tensor(0)
        >>> load_opt_state(torch_sgd, model, OptState(slots, zero, zero))
        >>> torch_sgd.param_groups[0]["lr"]
        0.25
    """
    if not isinstance(opt_state.slots, Slots):
        raise TypeError(
            f"the state is of type {type(opt_state.slots).__name__}, not lossloop's "
            f"Slots: only states of from_torch and lossloop.optim can be written back"
        )
    rule = _rule(type(optimizer))
    _same_number_of_groups(optimizer, len(opt_state.slots.groups))
    params = dict(model.named_parameters(remove_duplicate=False))
    for index, group in enumerate(opt_state.slots.groups):
        options: Options = optimizer.param_groups[index]
        static = _static(rule, options)
        members = {id(param) for param in cast(list[Tensor], options["params"])}
        known: dict[int, set[str]] = {}
        # Everything is looked at before anything is written.
        for name, moments in group.moments.items():
            if name not in params or id(params[name]) not in members:
                raise ValueError(
                    f"the state has {name!r} in param group {index}, where "
                    f"{type(optimizer).__name__} has no such parameter of the model"
                )
            expected = _moment_names(rule, params[name], group.hyper, static, known)
            if moments.keys() != expected:
                raise ValueError(
                    f"the state of {name!r} has the moments {sorted(moments)}, and "
                    f"{type(optimizer).__name__} with these options has "
                    f"{sorted(expected)}: build it with the options of the run"
                )
    for options, group in zip(
        optimizer.param_groups, opt_state.slots.groups, strict=True
    ):
        _write_hyper(rule, options, group.hyper)
        for name, moments in group.moments.items():
            optimizer.state.pop(params[name], None)
            if group.step.item():
                param = params[name]
                saved = _torch_state(rule, options, param, group.step, moments, copy)
                if saved:
                    optimizer.state[param] = saved


def held_moments(
    optimizer: TorchOptimizer, params: Params, opt_state: OptState
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Moments and counts where `load_opt_state` wrote them, beside those of a state.

    Hyper-parameters are left alone: in a run the groups say what they are.

    Args:
        optimizer: The instance.
        params: The module's own parameters, by name.
        opt_state: The state.

    Returns:
        The tensors of the instance, and what they have to be; None if the instance
        does not hold all of them.
    """
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for group in cast(Slots, opt_state.slots).groups:
        for name, moments in group.moments.items():
            state = optimizer.state.get(params[name], {})
            if not state.keys() >= moments.keys():
                return None
            targets += [state[moment] for moment in moments]
            sources += moments.values()
            if "step" in state:
                targets.append(state["step"])
                sources.append(group.step)
    return targets, sources


def _moment_names(
    rule: Rule,
    param: Tensor,
    hyper: dict[str, Tensor],
    static: Options,
    known: dict[int, set[str]],
) -> set[str]:
    """Those of a parameter, which depend on how many dimensions it has."""
    if param.ndim not in known:
        empty = param.detach()[:0] if param.ndim else param.detach()
        known[param.ndim] = set(rule.moments(empty, hyper, static))
    return known[param.ndim]


def _write_hyper(rule: Rule, options: Options, hyper: dict[str, Tensor]) -> None:
    def written(name: str, old: Any) -> Any:
        if name not in hyper:  # switched off, or left to torch (eps1)
            return old if old is None else 0.0
        value = hyper[name]
        if isinstance(old, Tensor):  # the user's own, perhaps shared with a schedule
            with torch.no_grad():
                return old.copy_(value)
        now = value.item()
        # Where the device has no float64, an unchanged value must not lose digits.
        return old if now == old or torch.full_like(value, old) == value else now

    for option in rule.dynamic:
        old = options[option]
        values = [written(name, value) for name, value in _named(option, old)]
        options[option] = tuple(values) if isinstance(old, tuple | list) else values[0]


def _torch_state(
    rule: Rule,
    options: Options,
    param: Tensor,
    count: Tensor,
    moments: Params,
    copy: bool,  # noqa: FBT001
) -> Options:
    """The state of one parameter as its torch optimizer keeps it."""
    wide = torch.get_default_dtype() == torch.float64 and not options.get("fused")
    dtype = torch.float64 if wide else torch.float32
    on_device = options.get("capturable") or options.get("fused") or "eta" in moments
    device = param.device if on_device else torch.device("cpu")
    state: Options = {
        name: value.detach().to(device, dtype, copy=True)
        if name in NUMBERS
        else value.detach().to(copy=copy)
        for name, value in moments.items()
    }
    return (
        {"step": count.to(device, dtype, copy=True), **state} if rule.counts else state
    )
