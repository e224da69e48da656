"""The one place that compiles: a body, once for every shape of batch."""

import functools
import re
import reprlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, Protocol, overload
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    RecompileError,
    TorchDynamoException,
)
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from lossloop._replay import Pool, Replay
from lossloop._step import Body, Eager, EvalStep, MicroBatches, Seeding, TrainStep
from lossloop._types import Batch

CANNOT_COMPILE = """\
compile_step: this step cannot be compiled as one graph: {why}

It runs eagerly: use the step that make_step returned, or fit(..., compile=False).
{hint}"""

COMPILED_TOO_OFTEN = """\
compile_step: this step was compiled again and again for one shape of batch, because
something that it was compiled for keeps changing: a Python number that the model or the
loss refers to, or the shapes of params. Make the number a tensor, in a buffer or in the
batch. ({why})
"""

RNN_HINT = """\
torch.compile does not take nn.RNN, nn.LSTM or nn.GRU by default. Set
torch._dynamo.config.allow_rnn = True to have it unroll them (slow to compile), or
train eagerly.
"""

# With up to so many numbers in its inputs, a graph may update several parameters in one
# kernel, which is faster; with more, that takes too much memory.
LARGEST_FUSED = 1e7
BYTES_SHARED_BY_UPDATES = 256

# Guards are checked before every call, at up to a third of a small step's time. Those
# on torch's code, on ours and on the skeletons that only we can reach are dropped;
# what the caller's own classes, functions and modules of Python hold is still guarded.
_OWN_CODE = re.compile(
    r"__import_(torch|lossloop)(_dot_|'\])|__import__\('torch'\)|__builtins_dict__"
)
# The modules of a skeleton and their plain attributes, but not what lies behind those.
_SKELETON = re.compile(
    r"\._body(\._(modules|parameters|buffers)(\['[^']*'\])?|\._\w*hooks\w*)*"
    r"(\.\w+(\[\d+\])*)?$"
)
_CLASS = re.compile(r"type\(.*\)\.__mro__\[\d+\]\.__dict__\)(\['(\w+)'\])?")


def _guards_to_keep(guards: Sequence[Any]) -> list[bool]:
    return [
        guard.guard_type != "EMPTY_NN_MODULE_HOOKS_DICT"
        and not _OWN_CODE.search(guard.name)
        and not _SKELETON.search(guard.name)
        and not _of_torchs_class(guard)
        for guard in guards
    ]


def _of_torchs_class(guard: Any) -> bool:
    """Whether it is on a class of torch or ours, or on something in one."""
    found = _CLASS.search(guard.name)
    if not found:
        return False
    if found[2] in vars(nn.Module):
        return True
    value: Any = guard.value if guard.has_value else None
    inside = isinstance(value, dict) or hasattr(value, "keys")
    home = value.get("__module__") if inside else getattr(value, "__module__", None)
    return str(home).split(".")[0] in ("torch", "lossloop", "builtins")


def batch_shape(batch: Batch) -> Hashable:
    """What a compiled graph is specific to: form, shapes, strides, dtypes, device.

    None if there are leaves that are no tensors, which would be compiled in.
    """
    if type(batch) in (tuple, list) and all(type(t) is Tensor for t in batch):
        leaves, form = batch, (type(batch), len(batch))
    else:
        leaves, form = pytree.tree_flatten(batch)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            return None
    # One tensor in two places is another graph than two tensors.
    places = {id(leaf): place for place, leaf in enumerate(leaves)}
    return form, tuple(
        (
            t.shape,
            t.stride() if t.layout is torch.strided else t.layout,
            t.dtype,
            t.device,
            places[id(t)],
        )
        for t in leaves
    )


def _no_tensor(batch: Batch) -> str:
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if not isinstance(leaf, Tensor):
            return (
                f"batch{pytree.keystr(path)} is a {type(leaf).__name__}, and a "
                f"compiled step takes tensors only, because any other value would be "
                f"compiled in. Make it a tensor, leave it out, or do not compile"
            )
    raise AssertionError


class Plan(Protocol):
    """Who decides whether to compile; see `lossloop._plan.CompilePlan`."""

    def worth(self, shape: Hashable, args: tuple[Any, ...], /) -> bool:
        """Whether to compile for this shape now."""
        ...

    def give_up(self, reason: str, /) -> bool:
        """Whether to go on eagerly if it cannot be compiled."""
        ...

    def switch_off(self, reason: str, /) -> None:
        """Takes note that nothing is compiled."""
        ...

    def compiling(self) -> AbstractContextManager[None]:
        """In which a graph is compiled, at its first call."""
        ...

    @property
    def compiles(self) -> bool:
        """Whether the first shape is compiled."""
        ...


def _traced_once(graph: Any) -> AbstractContextManager[Any]:
    """In which a graph is not traced a second time for nothing.

    To Dynamo a 0-d tensor of float64 on the CPU, as a learning rate is one, is also a
    number that the graph may read. Where it reads none, torch's pass for such numbers
    finds them unused, and has all of it traced again without them.

    Args:
        graph: What was traced.
    """
    for node in graph.graph.nodes:
        if isinstance(node.meta.get("example_value"), torch.SymFloat):
            return nullcontext()
    pass_ = "graph_compile._apply_tensorify_python_scalars"
    return patch(f"torch._functorch._aot_autograd.{pass_}", new=_nothing, create=True)


def _nothing(graph: Any) -> None:
    """A pass that changes nothing."""


def inductor(graph: Any, inputs: Any, **options: Any) -> Any:
    """torch.compile's own back end, set up for steps.

    Args:
        graph: What was traced.
        inputs: An example.
        options: Of `torch._inductor.config`, besides ours.
    """
    # Imported late: it takes seconds, which a run that is not compiled need not spend.
    from torch._higher_order_ops.while_loop import while_loop_op
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    from lossloop._bounds import Bounds
    from lossloop._in_turn import InTurn
    from lossloop._isa import kernels_for, vector_options
    from lossloop._logits import Logits
    from lossloop._pooling import Pooling
    from lossloop._products import Products, ours
    from lossloop._sums import Sums

    tensors = [t for t in inputs if isinstance(t, Tensor)]
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    multiplies = on_cpu and any(t.ndim > 1 for t in tensors)
    passes = {
        "joint_custom_post_pass": [Pooling(), Sums()] if on_cpu else [Logits()],
        "post_grad_custom_pre_pass": [Bounds()],
        "post_grad_custom_post_pass": [Products(ours() if multiplies else ())],
    }
    patches: dict[str, Any] = {
        name: InTurn(getattr(config, name), own) for name, own in passes.items()
    }
    patches["size_asserts"] = False  # the guards know the sizes of the inputs already
    settings: Any = torch.compiler.config
    tag = settings.cache_key_tag
    if on_cpu:
        patches |= vector_options()
        tag += kernels_for()
    else:
        # With Inductor's own 30 the gradient of a cross entropy may be computed in two
        # parts, of which neither can be written over the logits.
        patches["realize_opcount_threshold"] = 50
    if sum(t.numel() for t in tensors) > LARGEST_FUSED:
        # The updates of two parameters share a few scalars. In one kernel they would
        # keep the gradients of both waiting.
        patches["score_fusion_memory_threshold"] = BYTES_SHARED_BY_UPDATES
    # An operator with graphs of its own has to say that it may be kept in the cache,
    # which that of the loop does not do yet. What is kept goes by the text of them all.
    with (
        patch.object(while_loop_op, "_cacheable", new=True, create=True),
        settings.patch(cache_key_tag=tag),
    ):
        return compile_fx(graph, inputs, config_patches=patches | options)


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process."""
    return counters["stats"]["unique_graphs"]


class CompiledTooOftenError(RuntimeError):
    """A step was compiled again and again for one shape of batch."""


NOT_TRACED = """\
torch.compile left it as it is: it was switched off (TORCH_COMPILE_DISABLE, \
TORCHDYNAMO_DISABLE, torch.compiler.set_stance), or a mode was active that sees each \
operator, such as FlopCounterMode"""


class NotTracedError(Exception):
    """What was to be compiled was called as it is, before it did anything."""


class _MustCompileError(Exception):
    """A guard failed in a call that was not seeded: the new graph might draw."""


class Graph:
    """One function compiled for one shape of batch.

    A graph has no branches: it draws random numbers at every call, or never, and then
    needs no seeding. When a value that the caller changes makes torch compile again,
    that call is made again, seeded, because the new graph may be of the other kind.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        backend: str | Callable[..., Any],
        announced: Callable[[], AbstractContextManager[None]] = nullcontext,
        pool: Pool | None = None,
        batch: int = -1,
    ) -> None:
        """Compiles nothing yet.

        Args:
            function: From tensors to tensors.
            backend: Of `torch.compile`.
            announced: Makes a context to compile in.
            pool: Memory to capture it in where it runs on a GPU, for a function that
                keeps its state where it is, and returns nothing large.
            batch: Which of its arguments comes from somewhere else each time.
        """
        self._announced = announced
        self._pool, self._batch = pool, batch
        self._replay: Replay | None = None
        self._backend: Callable[..., Any]
        if not isinstance(backend, str):
            self._backend = backend
        elif backend == "inductor":
            self._backend = inductor
        else:
            self._backend = lookup_backend(backend)
        self._compiled = torch.compile(
            _own_code(function),
            fullgraph=True,
            dynamic=False,
            backend=self._compile,
            options={"guard_filter_fn": _guards_to_keep},
        )
        self._seeded = False
        self._draws = False
        self._compilations = 0

    def _compile(self, graph: Any, inputs: Any) -> Any:
        if not self._seeded:
            raise _MustCompileError
        self._compilations += 1
        with _traced_once(graph):
            code = self._backend(graph, inputs)
        if self._pool is None or not self._pool.serves(inputs):
            return code
        replay = Replay(code, graph, self._batch, self._pool)

        def call(*inputs: Any) -> Any:
            # One of several, if what is guarded has changed and changed back.
            self._replay = replay
            return replay(*inputs)

        return call

    @property
    def compiled(self) -> bool:
        """Whether it was, in some call."""
        return self._compilations > 0

    @property
    def why_not_replayed(self) -> str | None:
        """Why its kernels are launched one by one; None if they are not."""
        return None if self._replay is None else self._replay.why_not

    def again(self, seeding: Seeding, args: tuple[Any, ...]) -> Any:
        """A call like the last one, after which nothing that is guarded has changed."""
        if self._replay is None or not self._replay.replays:
            return self(seeding, args)
        if not self._draws:
            return self._replay.again()
        with seeding():
            return self._replay.again()

    def __call__(self, seeding: Seeding, args: tuple[Any, ...]) -> Any:
        try:
            if self._compilations and not self._draws:
                try:
                    return self._compiled(*args)
                except BackendCompilerFailed as error:
                    if not isinstance(error.inner_exception, _MustCompileError):
                        raise
            if self._compilations:
                return self._call_seeded(seeding, args)
            with self._announced():
                return self._call_seeded(seeding, args)
        except FailOnRecompileLimitHit as error:
            raise CompiledTooOftenError(COMPILED_TOO_OFTEN.format(why=error)) from error

    def _call_seeded(self, seeding: Seeding, args: tuple[Any, ...]) -> Any:
        known = self._compilations
        with seeding() as scope:
            before = scope.states()
            self._seeded = True
            try:
                result = self._compiled(*args)
            finally:
                self._seeded = False
            if self._compilations > known:
                self._draws = self._draws or scope.drew_since(before)
        return result


class Compiled:
    """The tensor part of a step, compiled once for every shape of batch.

    Attributes:
        function: What is compiled.
        watching: What is compiled in a loop, if that is something else.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        donate: int = 0,
        backend: str | Callable[..., Any] = "inductor",
        plan: Plan | None = None,
        in_place: Callable[..., Any] | None = None,
        watching: Callable[..., Any] | None = None,
        replayed: bool = False,
    ) -> None:
        """Compiles nothing yet.

        Args:
            function: Pure, from tensors to tensors; its last argument is the batch.
            donate: How many of its first arguments the first results overwrite.
            backend: Of `torch.compile`.
            plan: Who decides whether to compile; None to do so in any case.
            in_place: The function as it runs where the plan says not to compile, if it
                may donate.
            watching: The function as it is compiled in a loop; see `Eager`.
            replayed: Whether to launch it as one on a GPU; see `Replay`.
        """
        self.function = function
        self._pool = Pool() if replayed else None
        self.watching = watching
        self._in_place = in_place if donate and plan is not None else None
        self._written = _donating(function, donate) if donate else function
        self._donate = donate
        self._plan = plan
        self._backend = backend
        self._graphs: dict[Hashable, Graph] = {}

    @property
    def compilations(self) -> int:
        """How many shapes of batch have been compiled."""
        return sum(graph.compiled for graph in self._graphs.values())

    @property
    def why_not_replayed(self) -> str | None:
        """Why a GPU launches its kernels one by one; None if they are launched as one.

        That of the first shape of batch.
        """
        if self._pool is None:
            return "a pure step returns a new state"
        return next((graph.why_not_replayed for graph in self._graphs.values()), None)

    def __call__(self, seeding: Seeding, *args: Any) -> Any:
        """Calls the function for this shape of batch, compiling it if it is new."""
        # Without no_grad, a second autograd graph would be kept beside the functional
        # one if a parameter requires a gradient.
        with torch.no_grad():
            shape = batch_shape(args[-1])
            graph = self._graphs.get(shape)
            if graph is not None:
                try:
                    result = graph(seeding, args)
                except NotTracedError as error:  # any more, or until now
                    if self._plan is not None:
                        self._plan.switch_off(str(error))
                        self._graphs.clear()
                    return self._eagerly(seeding, args)
                except CompiledTooOftenError as error:
                    # Nothing was written yet: it was to be compiled again.
                    if self._plan is None or not self._plan.give_up(str(error)):
                        raise
                    self._graphs.clear()
                    return self._eagerly(seeding, args)
                except RecompileError:  # which is what was asked for
                    raise
                except TorchDynamoException as error:
                    # Nor here, though it could be compiled for what it had before.
                    result = self._impossible(seeding, args, error)
                    self._graphs.clear()
                    return result
            elif self._runs_eagerly(shape, args):
                return self._eagerly(seeding, args)
            else:
                announced = nullcontext if self._plan is None else self._plan.compiling
                batch = len(args) - 1
                graph = Graph(
                    self._written, self._backend, announced, self._pool, batch
                )
                try:
                    result = graph(seeding, args)
                except NotTracedError as error:  # which is what was asked for
                    if self._plan is not None:
                        self._plan.switch_off(str(error))
                    else:
                        self._graphs[shape] = graph
                    return self._eagerly(seeding, args)
                except Exception as error:
                    return self._impossible(seeding, args, error)
                self._graphs[shape] = graph
        # A donating function wrote into its arguments and returns only what is new.
        return (*args[: self._donate], *result) if self._donate else result

    def _eagerly(self, seeding: Seeding, args: tuple[Any, ...]) -> Any:
        with seeding():
            result = (self._in_place or self.function)(*args)
        pool, count = self._pool, self._donate
        if self._plan is not None and not self._plan.compiles:
            pool = None
        if count and pool is not None and pool.serves(pytree.tree_leaves(args[0])):
            # Captured graphs, of other shapes of batch, know the state by address.
            write(args[:count], result[:count])
            return *args[:count], *result[count:]
        return result

    def _runs_eagerly(self, shape: Hashable, args: tuple[Any, ...]) -> bool:
        if shape is None:
            why = _no_tensor(args[-1])
            if self._plan is None or not self._plan.give_up(why):
                raise TypeError(f"compile_step: {why}.")
            return True
        return self._plan is not None and not self._plan.worth(shape, args)

    def _impossible(
        self, seeding: Seeding, args: tuple[Any, ...], error: Exception
    ) -> Any:
        if self._donate and isinstance(error, torch.OutOfMemoryError):
            raise error  # it may have written something already
        # The caller's own mistakes raise here, in plain words.
        result = self._eagerly(seeding, args)
        why = f"{type(error).__name__}: {error}".strip().split("\n\n")[0]
        if said := re.search(r"^.*\berror: .*$", str(error), re.MULTILINE):
            why = f"{why}\n{said[0]}"  # of the C++ compiler
        try:  # torch tells that something was raised, and not what
            list(pairs(args[: self._donate], result[: self._donate]))
        except TypeError as plainly:
            why = str(plainly)
        if self._plan is not None and self._plan.give_up(f"cannot be compiled: {why}"):
            return result
        hint = RNN_HINT if "RNN" in why else ""
        if torch.is_anomaly_enabled():
            hint += (
                "torch.autograd.set_detect_anomaly is on, which cannot be compiled.\n"
            )
        raise RuntimeError(CANNOT_COMPILE.format(why=why, hint=hint)) from error


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own.

    Compiled code hangs on the code object, eight entries at most, and all steps of a
    process would share the one of a function inside `make_step`.

    Raises:
        NotTracedError: From the function, if it is not compiled. A loop would not be
            one, a generator not be seeded, and a step that donates be made twice.
    """

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            raise NotTracedError(NOT_TRACED)
        return function(*args)

    return FunctionType(
        call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__
    )


def _donating(body: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The body, writing its first results into the tensors of its first arguments."""

    def donating(*args: Any) -> tuple[Any, ...]:
        results = body(*args)
        write(args[:count], results[:count])
        return results[count:]

    return donating


def write(old: Any, new: Any) -> None:
    """Copies the tensors of one tree into those of another of the same form."""
    moved = [
        (target, source) for target, source in pairs(old, new) if target is not source
    ]
    # A new tensor may be an old one of another place (slow weights that follow), or a
    # view of it: it is read before anything is written. The compiler fuses this away.
    for target, source in [(target, source.clone()) for target, source in moved]:
        if target.ndim:
            target.copy_(source)
        else:
            # Compiled, a write into a 0-d float64 input on the CPU is silently lost
            # (seen in torch 2.13 with the aot_eager and inductor back ends).
            target.view(1).copy_(source.view(1))


# What a state may be made of beside dicts, and what may be in it beside tensors.
_PARTS = (tuple, list, deque)
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def pairs(old: Any, new: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two trees of one form, in the order of the first.

    Raises:
        TypeError: If something else differs, which compiled code cannot carry on.
    """
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        yield old, new
    elif isinstance(old, dict) and isinstance(new, dict):
        if old.keys() != new.keys():
            raise TypeError(
                f"the keys {[*old]} in the state became {[*new]}: they must stay"
            )
        for key in old:  # the orders may differ
            yield from pairs(old[key], new[key])
    elif isinstance(old, _PARTS) and isinstance(new, _PARTS):
        if len(old) != len(new):
            raise TypeError(
                f"{len(old)} parts in the state became {len(new)}: they must stay"
            )
        for old_part, new_part in zip(old, new, strict=True):
            yield from pairs(old_part, new_part)
    elif new is not old and (
        type(new) is not type(old) or not isinstance(old, _PLAIN) or new != old
    ):
        raise TypeError(
            f"{reprlib.repr(old)} in the state became {reprlib.repr(new)}: what "
            f"changes must be a tensor"
        )


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
        # One that is pure returns the whole state, which would have to be copied.
        return TrainStep(
            compiled(step.body, donate=donate, backend=backend, replayed=donate)
        )
    if isinstance(step, EvalStep):
        if donate:
            raise ValueError(
                "compile_step(donate=True) is for training steps: an eval step has no "
                "new state to write."
            )
        return EvalStep(compiled(step.body, donate=False, backend=backend))
    own = Compiled(step, donate=2 if donate else 0, backend=backend, replayed=donate)
    return functools.partial(own, Unseeded)


class Unseeded:
    """For steps of the caller's own, who see to their random numbers themselves."""

    def __enter__(self) -> "Unseeded":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def states(self) -> list[Tensor]:
        return []

    def drew_since(self, states: list[Tensor]) -> bool:
        return False


def why_not_traced() -> str | None:
    """Why torch.compile leaves alone what it is given; None if it does not."""
    try:
        Graph(lambda: None, "eager")(Unseeded, ())
    except NotTracedError as error:
        return str(error)
    return None


def compiled(
    body: Body,
    *,
    donate: bool,
    backend: str | Callable[..., Any] = "inductor",
    plan: Callable[[Callable[..., Any], int], Plan] | None = None,
    replayed: bool = True,
) -> Body:
    """The body of a step, compiled.

    That of one with micro-batches is compiled in two parts, what is done for each and
    what is done once: in one graph nobody would have to free the activations of one
    micro-batch before the next, and the time to compile would grow with their number.

    Args:
        body: Not compiled yet.
        donate: Whether the first results overwrite the state that is passed in.
        backend: Of `torch.compile`.
        plan: Makes the plan for a function and the number of its calls per batch.
        replayed: Whether to launch it as one on a GPU, unless there are micro-batches.
    """

    def compile_body(
        body: Body, *, donate: int, calls: int = 1, replayed: bool = False
    ) -> Compiled:
        if isinstance(body, Compiled):
            raise ValueError("compile_step: this step is compiled already.")
        own_plan = None if plan is None else plan(body.function, calls)
        return Compiled(
            body.function,
            donate=donate,
            backend=backend,
            plan=own_plan,
            in_place=body.in_place if isinstance(body, Eager) else None,
            watching=body.watching if isinstance(body, Eager) else None,
            replayed=replayed,
        )

    state = 2 if donate else 0
    if isinstance(body, MicroBatches):
        # The sum of gradients is the step's own in any case.
        add = compile_body(body.add, donate=1, calls=body.parts)
        return body._replace(add=add, update=compile_body(body.update, donate=state))
    return compile_body(body, donate=state, replayed=replayed)
