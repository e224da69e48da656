"""Whether to compile: decided from counts before the first step, never from clocks."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import torch
from torch import _dynamo, nn  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# What compilation saves and costs, as measured by benchmarks/compile_cost.py on two
# cores: an operator that is not dispatched saves its overhead, fusion saves part of the
# arithmetic, and every operator adds to the time of compiling with a cold cache.
SECONDS_SAVED_PER_OPERATOR = 3e-6
SECONDS_SAVED_PER_FLOP = {"cpu": 5e-12, "cuda": 2e-14}
SECONDS_TO_COMPILE = 5.0
SECONDS_TO_COMPILE_PER_OPERATOR = 0.02
FEWEST_STEPS = 100  # below, the cost is not even counted


class Cost(NamedTuple):
    """The counted cost of one call of a step."""

    operators: int
    flops: int

    def saved(self, device: str) -> float:
        """Estimated seconds that a compiled call is faster than an eager one."""
        per_flop = SECONDS_SAVED_PER_FLOP.get(device, SECONDS_SAVED_PER_FLOP["cuda"])
        return self.operators * SECONDS_SAVED_PER_OPERATOR + self.flops * per_flop

    def compilation(self) -> float:
        """Estimated seconds of compiling it with a cold cache."""
        return SECONDS_TO_COMPILE + self.operators * SECONDS_TO_COMPILE_PER_OPERATOR


class CompileChoice(NamedTuple):
    """What was decided about compiling, and why."""

    compiled: bool
    reason: str


class _OperatorCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


def count_cost(body: Callable[..., Any], args: tuple[Any, ...]) -> Cost:
    """Counts the operators and FLOPs of a pure body by calling it once."""
    flops = FlopCounterMode(display=False)
    cuda = [t.device for t in pytree.tree_leaves(args) if t.is_cuda][:1]
    counter = _OperatorCounter()
    with torch.random.fork_rng(cuda), torch.no_grad(), flops, counter:
        body(*args)
    return Cost(counter.operators, flops.get_total_flops())


def has_rnn(model: nn.Module) -> bool:
    """Whether it has a layer that torch.compile does not take by default."""
    allowed = getattr(_dynamo.config, "allow_rnn", False)
    return not allowed and any(isinstance(m, nn.RNNBase) for m in model.modules())


class CompilePlan:
    """Says of each shape of batch, when it comes, whether to compile it now.

    The first shape is worth compiling if the planned number of its steps saves more
    than compiling costs (or if the caller says so); another shape, such as that of the
    odd last batch, if it will recur often enough, judging by how often it has come in
    this epoch and how many epochs are left.

    Attributes:
        choice: About the first shape, once it has come.
    """

    def __init__(
        self,
        wish: Literal["auto", True, False],
        body: Callable[..., Any],
        *,
        epochs: int,
        batches: int | None,
    ) -> None:
        self._wish = wish
        self._body = body
        self._epochs_left = epochs
        self._batches = batches
        self._seen = Counter[Hashable]()
        self._costs: dict[Hashable, Cost] = {}
        self._first: Hashable = None
        why = "compile=False" if wish is False else "no batch has come yet"
        self.choice = CompileChoice(compiled=False, reason=why)

    def end_epoch(self) -> None:
        """Tells that one epoch less is to come."""
        self._epochs_left -= 1
        self._seen.clear()

    def worth(self, shape: Hashable, args: tuple[Any, ...]) -> bool:
        """Whether to compile the body for this shape of batch, which is to run now."""
        if self._first is None:
            self._first = shape
        first = shape == self._first
        self._seen[shape] += 1
        if first and self._wish is True:
            self.choice = CompileChoice(compiled=True, reason="compile=True")
            return True
        expected = self._epochs_left * (
            self._batches if first and self._batches else self._seen[shape]
        )
        if expected < FEWEST_STEPS:
            if first:
                why = f"{expected} steps planned, fewer than {FEWEST_STEPS}"
                self.choice = CompileChoice(compiled=False, reason=why)
            return False
        if shape not in self._costs:
            self._costs[shape] = count_cost(self._body, args)
        cost = self._costs[shape]
        device = pytree.tree_leaves(args)[0].device.type
        saved, spent = expected * cost.saved(device), cost.compilation()
        if first:
            self.choice = CompileChoice(
                saved >= spent,
                f"{expected} steps planned of {cost.operators} operators and "
                f"{cost.flops:.3g} FLOPs, estimated to save {saved:.2g} s; compiling, "
                f"{spent:.2g} s",
            )
        return saved >= spent
