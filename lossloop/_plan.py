"""Whether to compile: decided from counts before the first step, never from clocks."""

from collections import Counter
from collections.abc import Callable, Generator, Hashable
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, _dynamo, nn  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# What compilation saves and costs, as measured by benchmarks/compile_cost.py on one
# core: an operator that is not dispatched saves its overhead, one that is fused saves
# writing its result, and every operator adds to the time of compiling from scratch.
# What matrix products and convolutions compute, they compute compiled or not. On a GPU
# the first two are the time to launch a kernel and to write to memory, estimated.
SECONDS_SAVED_PER_OPERATOR = {"cpu": 5e-6, "cuda": 1e-5}
SECONDS_SAVED_PER_ELEMENT = {"cpu": 5e-10, "cuda": 1e-11}
SECONDS_TO_COMPILE = 10.0
SECONDS_TO_COMPILE_PER_OPERATOR = 0.05
FEWEST_STEPS = 100  # below, the cost is not even counted
LARGEST_COUNTED_WITH_DATA = 1e6  # numbers in the arguments
# In one call with others, a step on the CPU writes its new state to new memory: beyond
# this number of elements that costs more than the call. On a GPU it does not, but
# nothing is seen or saved before the end of the call.
LARGEST_FOLDED_STEP = {"cpu": 1e7, "cuda": 1e9}
# In C++ instead of Python, the calls of kernels in a fold take some 25 us less a step,
# and 4 s more to compile.
STEPS_FOR_FAST_CALLS = 100_000


class Cost(NamedTuple):
    """The counted cost of one call of a step."""

    operators: int
    elements: int  # written, by all operators together

    def saved(self, device: str) -> float:
        """Estimated seconds that a compiled call is faster than an eager one."""
        kind = device if device in SECONDS_SAVED_PER_OPERATOR else "cuda"
        return (
            self.operators * SECONDS_SAVED_PER_OPERATOR[kind]
            + self.elements * SECONDS_SAVED_PER_ELEMENT[kind]
        )

    def compilation(self) -> float:
        """Estimated seconds of compiling it with a cold cache."""
        return SECONDS_TO_COMPILE + self.operators * SECONDS_TO_COMPILE_PER_OPERATOR


class CompileChoice(NamedTuple):
    """What was decided about compiling, and why.

    Attributes:
        compiled: Whether the step is compiled.
        reason: Why, or why not; also why a compiled step is not folded or replayed.
        folded: Whether many steps are made in one call.
        replayed: Whether a GPU launches the kernels of a step as one.
        products: The kinds of matrix products that a kernel of our own computes, where
            it was measured to be faster; see "How to compile".
    """

    compiled: bool
    reason: str
    folded: bool = False
    replayed: bool = False
    products: tuple[str, ...] = ()

    def with_fold(self, why_not: str | None) -> "CompileChoice":
        """The choice, with why the steps of a compiled one are made one by one."""
        if why_not is None:
            return self._replace(folded=True)
        return self._replace(reason=f"{self.reason}; steps one by one: {why_not}")

    def with_replay(self, why_not: str | None) -> "CompileChoice":
        """The choice, with why kernels on a GPU are launched one by one."""
        if why_not is None:
            return self._replace(replayed=True)
        return self._replace(reason=f"{self.reason}; kernels one by one: {why_not}")


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # the device of a tensor without data
            return result
        self.operators += 1
        if not func.is_view:
            tensors = (t for t in pytree.tree_leaves(result) if isinstance(t, Tensor))
            self.elements += sum(t.numel() for t in tensors)
        return result


def count_cost(function: Callable[..., Any], args: tuple[Any, ...]) -> Cost:
    """Counts what a pure function does by calling it once.

    That of a large state on tensors without data, which takes no memory, but seconds to
    import; an update by torch's own kernel then counts as formulas.
    """
    tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    if sum(t.numel() for t in tensors) > LARGEST_COUNTED_WITH_DATA:
        with suppress(Exception):  # it may read a value
            from torch._subclasses.fake_tensor import FakeTensorMode

            fake = FakeTensorMode(allow_non_fake_inputs=True)
            without_data = pytree.tree_map_only(Tensor, fake.from_tensor, args)
            with fake, torch.no_grad(), _Counter() as counter:
                function(*without_data)
            return Cost(counter.operators, counter.elements)
    cuda = [t.device for t in tensors if t.is_cuda][:1]
    with torch.random.fork_rng(cuda), torch.no_grad(), _Counter() as counter:
        function(*args)
    return Cost(counter.operators, counter.elements)


def has_rnn(model: nn.Module) -> bool:
    """Whether it has a layer that torch.compile does not take by default."""
    allowed = getattr(_dynamo.config, "allow_rnn", False)
    return not allowed and any(isinstance(m, nn.RNNBase) for m in model.modules())


class CompilePlan:
    """Says of each shape of batch, when it comes, whether to compile it now.

    The first shape is compiled if the planned number of its steps saves more time than
    compiling costs, or if the caller wishes; another, such as that of the odd last
    batch, if it will recur often enough, judging by how often it has come in this epoch
    and how many epochs are left.

    Attributes:
        choice: About the first shape, once it has come.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        wish: bool | Literal["auto"],
        epochs: int,
        batches: int | None,
        announced: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._announced = announced
        self._has_compiled = False
        self._wish = wish
        self._function = function
        self._epochs_left = epochs
        self._batches = batches
        self._impossible = wish is False
        # Shapes of batches go by names, which another process can be told.
        self._names: dict[Hashable, str] = {}
        self._first: str | None = None
        self._seen = Counter[str]()
        self._compiled = set[str]()
        self._costs: dict[str, Cost] = {}
        why = "no batch has come yet" if wish else "compile=False"
        self.choice = CompileChoice(compiled=False, reason=why)

    @property
    def compiles(self) -> bool:
        """Whether the first shape is compiled."""
        return self.choice.compiled

    def end_epoch(self) -> None:
        """Tells that one epoch less is to come."""
        self._epochs_left -= 1
        self._seen.clear()

    def state(self) -> dict[str, Any]:
        """What was decided, for `resume`."""
        return {
            "choice": list(self.choice[:2]),
            "first": self._first,
            "compiled": sorted(self._compiled),
            "seen": dict(self._seen),
            "impossible": self._impossible,
        }

    def resume(self, epochs: int, state: dict[str, Any] | None) -> None:
        """Goes on where another process was.

        Compiled steps and eager ones round differently, so that a run is exact only if
        every shape of batch is treated as it was.

        Args:
            epochs: That have ended there.
            state: What was decided there; None to decide anew.
        """
        self._epochs_left -= epochs
        if state is None:
            return
        self._impossible, self._first = state["impossible"], state["first"]
        self._compiled, self._seen = set(state["compiled"]), Counter(state["seen"])
        compiles, reason, *_ = state["choice"]
        self.choice = CompileChoice(compiles, reason)

    def is_first(self, shape: Hashable) -> bool:
        """Whether a shape of batch is the first that came, or would be."""
        return self._first in (None, self._name(shape))

    def _name(self, shape: Hashable) -> str:
        if shape not in self._names:
            self._names[shape] = repr(shape)
        return self._names[shape]

    def worth(self, shape: Hashable, args: tuple[Any, ...]) -> bool:
        """Whether to compile for this shape of batch, of which one is to run now."""
        name = self._name(shape)
        compiles = self._worth(name, args)
        if compiles:
            self._compiled.add(name)
        return compiles

    def _worth(self, shape: str, args: tuple[Any, ...]) -> bool:
        new = self._first is None
        if new:
            self._first = shape
        self._seen[shape] += 1
        if self._impossible:
            return False
        if shape in self._compiled:
            return True
        if shape != self._first:
            return self._judge(shape, args, self._epochs_left * self._seen[shape])[0]
        if new and self._wish is True:
            self.choice = CompileChoice(compiled=True, reason="compile=True")
        elif new and self._batches is not None:
            self.choice = self._judge(shape, args, self._epochs_left * self._batches)
        elif self._batches is None and not self.choice.compiled:
            # How long an epoch is, is not known: as many batches as have come so far.
            expected = self._epochs_left * self._seen[shape]
            self.choice = self._judge(shape, args, expected)
        return self.choice.compiled

    @contextmanager
    def compiling(self) -> Generator[None]:
        """In which a graph is compiled."""
        with self._announced():
            yield
        self._has_compiled = True

    def give_up(self, reason: str) -> bool:
        """Takes note that compiling is impossible; whether to go on eagerly."""
        if self._wish is True:
            return False
        self.switch_off(reason)
        return True

    def switch_off(self, reason: str) -> None:
        """Takes note that nothing is compiled."""
        if not self._impossible:
            self._impossible = True
            if self._has_compiled:
                reason = f"compiled at first, and then no more: {reason}"
            self.choice = CompileChoice(compiled=False, reason=reason)

    def worth_fast_calls(self) -> bool:
        """Whether so many steps are planned that even the calls in a fold matter."""
        if self._batches is None:
            return False
        return self._epochs_left * self._batches >= STEPS_FOR_FAST_CALLS

    def worth_folding(self, shape: Hashable, args: tuple[Any, ...]) -> bool:
        """Whether to make many steps in one call."""
        device = pytree.tree_leaves(args)[0].device.type
        cost = self._cost(self._name(shape), args)
        return cost.elements <= LARGEST_FOLDED_STEP[device]

    def _cost(self, shape: str, args: tuple[Any, ...]) -> Cost:
        if shape not in self._costs:
            self._costs[shape] = count_cost(self._function, args)
        return self._costs[shape]

    def _judge(self, shape: str, args: tuple[Any, ...], expected: int) -> CompileChoice:
        if expected < FEWEST_STEPS:
            why = f"{expected} steps planned, fewer than {FEWEST_STEPS}"
            return CompileChoice(compiled=False, reason=why)
        cost = self._cost(shape, args)
        device = pytree.tree_leaves(args)[0].device.type
        saved, spent = expected * cost.saved(device), cost.compilation()
        return CompileChoice(
            saved >= spent,
            f"{expected} steps planned of {cost.operators} operators that write "
            f"{cost.elements:.3g} elements: estimated to save {saved:.2g} s, "
            f"compiling takes {spent:.2g} s",
        )
