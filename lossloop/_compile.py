"""The one place that compiles: a body, once for every shape of batch."""

from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lossloop._random import seeded
from lossloop._step import EvalStep, Seeding, TrainStep
from lossloop._types import Batch

CANNOT_COMPILE = """\
compile_step: this step cannot be compiled as one graph: {why}

It runs eagerly: use the step that make_step returned, or fit(..., compile=False).
{hint}"""

RNN_HINT = """\
torch.compile does not take nn.RNN, nn.LSTM or nn.GRU by default. Set
torch._dynamo.config.allow_rnn = True to have it unroll them (slow to compile), or
train eagerly.
"""

# Guards are checked before every call, at up to a third of a small step's time. Those
# on tensors, on the form of the arguments and on values that the caller's functions
# refer to stay. Dropped are those that functions, classes and modules are still the
# same objects, and all on torch's code, on ours, and on skeletons only we can reach.
_IDENTITIES = frozenset(
    {
        "BUILTIN_MATCH",
        "CLASS_MATCH",
        "CLOSURE_MATCH",
        "DUPLICATE_INPUT",
        "EMPTY_NN_MODULE_HOOKS_DICT",
        "ID_MATCH",
        "MODULE_MATCH",
        "NOT_PRESENT_IN_GENERIC_DICT",
        "TYPE_MATCH",
    }
)
_UNCHANGING = (
    "__import_torch",
    "__import_lossloop",
    "__import__('torch')",
    "__builtins_dict__",
    "._body._modules",
    ".__mro__",
)


def _guards_to_keep(guards: Sequence[Any]) -> list[bool]:
    return [
        guard.guard_type not in _IDENTITIES
        and not any(mark in guard.name for mark in _UNCHANGING)
        for guard in guards
    ]


def batch_shape(batch: Batch) -> Hashable:
    """What a compiled graph is specific to: form, shapes, strides, dtypes, device."""
    if type(batch) in (tuple, list) and all(type(t) is Tensor for t in batch):
        leaves, form = batch, (type(batch), len(batch))
    else:
        leaves, form = pytree.tree_flatten(batch)
        for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"compile_step: batch{pytree.keystr(path)} is a "
                    f"{type(leaf).__name__}; a compiled step takes tensors only, "
                    f"because any other value is compiled in. Make it a tensor, or "
                    f"leave it out of the batch."
                )
    return form, tuple((t.shape, t.stride(), t.dtype, t.device) for t in leaves)


class Compiled:
    """The tensor part of a step, compiled once for every shape of batch.

    Attributes:
        function: What is compiled.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        donate: bool = False,
        backend: str | Callable[..., Any] = "inductor",
        worth: Callable[[Hashable, tuple[Any, ...]], bool] | None = None,
    ) -> None:
        self.function = function
        self._written = _donating(function) if donate else function
        self._donate = donate
        self._backend = backend
        self._options: dict[str, Any] = {"guard_filter_fn": _guards_to_keep}
        if backend == "inductor":
            self._options["size_asserts"] = False  # the guards know the sizes already
        self._worth = worth
        # For each shape the compiled function, and whether it draws random numbers:
        # a graph has no branches, so it does so at every call or never.
        self._by_shape: dict[Hashable, tuple[Callable[..., Any], bool]] = {}

    @property
    def compilations(self) -> int:
        """How many shapes of batch have been compiled."""
        return len(self._by_shape)

    def __call__(self, seeding: Seeding, *args: Any) -> Any:
        """Calls the function for this shape of batch, compiling it if it is new."""
        # Without no_grad, a second autograd graph would be kept beside the functional
        # one if a parameter requires a gradient.
        with torch.no_grad():
            shape = batch_shape(args[-1])
            known = self._by_shape.get(shape)
            if known is None:
                with seeding() as scope:
                    if self._worth is not None and not self._worth(shape, args):
                        return self.function(*args)
                    result = self._first_call(shape, args, scope)
            else:
                compiled, draws = known
                if draws:
                    with seeding():
                        result = compiled(*args)
                else:
                    result = compiled(*args)
        # A donating function wrote into its arguments and returns only what is new.
        return (*args[:-1], *result) if self._donate else result

    def _first_call(self, shape: Hashable, args: tuple[Any, ...], scope: seeded) -> Any:
        compiled = torch.compile(
            _own_code(self._written),
            fullgraph=True,
            dynamic=False,
            backend=self._backend,
            options=self._options,
        )
        before = scope.states()
        try:
            result = compiled(*args)
        except Exception as error:
            self.function(*args)  # the caller's own mistakes raise here, in plain words
            why = f"{type(error).__name__}: {error}".strip().split("\n\n")[0]
            hint = RNN_HINT if "RNN" in why else ""
            raise RuntimeError(CANNOT_COMPILE.format(why=why, hint=hint)) from error
        draws = not all(map(torch.equal, before, scope.states()))
        self._by_shape[shape] = compiled, draws
        return result


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own.

    Compiled code hangs on the code object, eight entries at most, and all steps of a
    process would share the one of a function inside `make_step`.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    return FunctionType(
        call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__
    )


def _donating(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body, writing its new state into the tensors of the old one."""

    def donating(params: Any, state: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        new_params, new_state, loss_sum, n = body(params, state, batch)
        _write((params, state), (new_params, new_state))
        return loss_sum, n

    return donating


def _write(old: Any, new: Any) -> None:
    """Copies the tensors of one tree into those of another of the same form."""
    if isinstance(old, Tensor):
        if old is not new and old.ndim:
            old.copy_(new)
        elif old is not new:
            # Compiled, a write into a 0-d float64 input on the CPU is silently lost
            # (seen in torch 2.13 with the aot_eager and inductor back ends).
            old.view(1).copy_(new.view(1))
    elif isinstance(old, dict):  # by key: the orders may differ
        for key in old:
            _write(old[key], new[key])
    else:
        for old_part, new_part in zip(old, new, strict=True):
            _write(old_part, new_part)


@overload
def compile_step(
    step: TrainStep, *, donate: bool = False, backend: str | Callable[..., Any] = ...
) -> TrainStep: ...
@overload
def compile_step(
    step: EvalStep, *, donate: bool = False, backend: str | Callable[..., Any] = ...
) -> EvalStep: ...
@overload
def compile_step(
    step: Callable[..., Any],
    *,
    donate: bool = False,
    backend: str | Callable[..., Any] = ...,
) -> Callable[..., Any]: ...
def compile_step(
    step: Callable[..., Any],
    *,
    donate: bool = False,
    backend: str | Callable[..., Any] = "inductor",
) -> Callable[..., Any]:
    """Compiles a step, forward, backward and update, as one graph.

    Each shape of batch is compiled once, at its first call, and no hyper-parameter
    that changes compiles it again. Any number of steps may be compiled in a process.

    Args:
        step: Of `make_step` or `make_eval_step`, or a pure function of the same
            signature.
        donate: Write the new state into the tensors of the old one, and return those:
            less memory and time, but the step is no longer pure, and what was passed
            in must not be read as the old state afterwards. Not for eval steps.
        backend: Of `torch.compile`.

    Returns:
        The compiled step, with the signature of `step`.

    Raises:
        ValueError: If an eval step is to donate.
        RuntimeError: At the first call, if the step does not compile as one graph.

    Example:
        >>> import lossloop as ll
        >>> goal = ll.supervised(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> params, opt_state = ll.init(goal, torch.optim.SGD)
        >>> step = ll.make_step(goal, torch.optim.SGD)
        >>> step = ll.compile_step(step, backend="aot_eager")
        >>> batch = (torch.ones(4, 2), torch.zeros(4, 1))
        >>> params, opt_state, loss_sum, n = step(params, opt_state, batch)
        >>> int(n)
        4
    """
    if isinstance(step, TrainStep):
        return TrainStep(Compiled(_function(step), donate=donate, backend=backend))
    if isinstance(step, EvalStep):
        if donate:
            raise ValueError(
                "compile_step(donate=True) is for training steps: an eval step has no "
                "new state to write."
            )
        return EvalStep(Compiled(_function(step), backend=backend))
    compiled = Compiled(step, donate=donate, backend=backend)
    return lambda *args: compiled(lambda: seeded(0, torch.device("cpu")), *args)


def _function(step: TrainStep | EvalStep) -> Callable[..., Any]:
    if isinstance(step.body, Compiled):
        raise ValueError("compile_step: this step is compiled already.")
    return step.body.function
