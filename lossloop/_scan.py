"""The compiled fold: many steps in one call, on data in memory."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop  # pyright: ignore[reportPrivateImportUsage]
from torch.torch_version import TorchVersion
from torch.utils import _pytree as pytree

from lossloop._batches import as_batches
from lossloop._compile import (
    Compiled,
    Graph,
    NotTracedError,
    Unseeded,
    batch_shape,
    compiled,
    inductor,
    pairs,
    write,
)
from lossloop._fold import EndPass, fold
from lossloop._gate import grand_total
from lossloop._mean import Mean
from lossloop._memory import Copies, Indexed, read
from lossloop._model import device_of
from lossloop._plan import CompilePlan
from lossloop._random import seeded
from lossloop._replay import Pool
from lossloop._step import MicroBatches, TrainStep, seed_of
from lossloop._types import Batch, Carry, OptState, Params

# Steps in one call, which costs about as much as a small step. More would make Ctrl-C
# and the progress bar wait.
LENGTH = 32

# Numbers that a thread takes of a loop in a folded step, at least; Inductor's own least
# is 512. Sharing so few among threads takes longer than computing them.
LEAST_OF_A_THREAD = 8192

# Earlier versions cannot compile a loop so.
_CALLS_IN_CPP = TorchVersion(torch.__version__) >= "2.13"

OnStep = Callable[[OptState, Mean], OptState]


class CannotScanError(Exception):
    """Why steps are made one by one."""


def loops(device: torch.device) -> bool:
    """Whether the loop is a part of the graph, and not of launching it."""
    return device.type == "cpu"


class Scan:
    """Calls one function many times, compiled for one shape of batch.

    What the function returns is carried on inside; what it leaves alone is not.

    On the CPU the loop is a part of the graph, which returns new tensors. On a GPU one
    step is, which reads the indices of its batch there and is launched again and again;
    the tensors that were passed in hold the result in the end.

    Attributes:
        loops: Whether the loop is a part of the graph.
        watches: Whether the state is looked at in the end only.
        made: Steps that the last call wrote, if it failed.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Params, Carry, Batch],
        backend: str | Callable[..., Any],
        announced: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        watches: bool = False,
    ) -> None:
        """Calls the function once, to see what it does.

        Args:
            function: `(params, carry, batch) -> (params, carry, loss_sum, n)`.
            args: To call it with.
            backend: Of `torch.compile`.
            announced: Makes a context to compile in.
            watches: Whether to return a sum of losses that is nan, if that sum or the
                state is not finite in the end; on the CPU.

        Raises:
            CannotScanError: If it draws random numbers on the CPU: those of a step are
                seeded by its number, and in a graph no generator can be seeded. If
                something in the state changes that is no tensor.
        """
        *state, batch = args
        device = device_of(args[0])
        self.loops = loops(device)
        with torch.no_grad(), seeded(0, device) as scope:
            before = scope.states()
            *new, _, n = function(*state, batch)
            if self.loops and scope.drew_since(before):
                raise CannotScanError("random numbers are drawn")
        # Its dicts give the order of the keys, which another state's may not have.
        self._like = pytree.tree_map_only(Tensor, lambda t: t.new_empty(0), state)
        self._leaves, self._form = pytree.tree_flatten(self._like)
        try:
            old, results = zip(*pairs(state, new), strict=True)
        except TypeError as error:
            raise CannotScanError(str(error)) from error
        self._size = len(batch[0])
        self._counts = not n.is_floating_point()
        self._carried = [i for i, t in enumerate(results) if t is not old[i]]
        # A loop may not return one tensor in two places, or what it was given.
        known, self._shared = set(map(id, old)), set[int]()
        for i, result in enumerate(results):
            if id(result) in known:
                self._shared.add(i)
            known.add(id(result))
        self._function = function
        self.watches = watches
        self.made = 0
        # Places in what is carried. A mask may hold infinities from the start.
        self._finite = [
            place
            for place, i in enumerate(self._carried)
            if old[i].is_floating_point() and bool(torch.isfinite(old[i]).all())
        ]
        self._orders = torch.zeros(LENGTH, self._size, dtype=torch.int64, device=device)
        if self.loops:
            self._graph = Graph(self._run, backend, announced)
            return
        self._place = torch.zeros((), dtype=torch.int64, device=device)
        self._sums = Mean.empty(device)
        if not self._counts:
            weight = self._sums.weight.to(self._sums.total.dtype)
            self._sums = self._sums._replace(weight=weight)
        self._graph = Graph(self._once, backend, announced, Pool())

    @property
    def why_not_replayed(self) -> str | None:
        """Why a GPU launches kernels one by one; None if a step is launched as one."""
        return self._graph.why_not_replayed

    def takes(self, orders: Tensor) -> bool:
        """Whether batches are of the size that it is compiled for."""
        return orders.shape[1] == self._size

    def __call__(
        self,
        params: Params,
        carry: Carry,
        mean: Mean,
        tensors: Sequence[Tensor],
        orders: Tensor,
        seeding: Callable[[int], Any] = lambda _: Unseeded(),
    ) -> tuple[Params, Carry, Mean]:
        """Makes a step for each row of indices.

        Args:
            params: On a GPU overwritten, unless there is an error and `made` is 0.
            carry: Likewise.
            mean: Of the steps before.
            tensors: All samples, on the device.
            orders: Of shape (steps, B).
            seeding: Makes a context for a step, in which it draws its numbers.

        Returns:
            `(params, carry, mean)`, the mean that of the steps before as well.
        """
        self.made = 0
        self._orders[: len(orders)] = orders
        leaves = [tensor for _, tensor in pairs(self._like, [params, carry])]
        if self.loops:
            weight = mean.weight if self._counts else mean.weight.to(mean.total.dtype)
            count = torch.tensor(len(orders))
            args = (count, self._orders, mean.total, weight, tensors, leaves)
            with torch.no_grad():
                total, weight, *end = self._graph(Unseeded, args)
            for place, tensor in zip(self._carried, end, strict=True):
                leaves[place] = tensor
            return *self._state(leaves), Mean(total, weight)
        sums = self._sums
        with torch.no_grad():
            self._place.zero_()
            sums.total.copy_(mean.total)
            sums.weight.copy_(mean.weight)
            args = (self._place, self._orders, *sums[:2], tensors, leaves)
            for step in range(len(orders)):
                # Nobody can change what was guarded before the first.
                call = self._graph.again if step else self._graph
                call(partial(seeding, step), args)
                self.made += 1
            return params, carry, Mean(sums.total.clone(), sums.weight.clone())

    def _state(self, leaves: Iterable[Tensor]) -> list[Any]:
        """Parameters and carry, of these tensors."""
        tensors = iter(leaves)
        now = [next(tensors) if isinstance(t, Tensor) else t for t in self._leaves]
        return pytree.tree_unflatten(now, self._form)

    def _step(
        self,
        tensors: Sequence[Tensor],
        orders: Tensor,
        leaves: list[Tensor],
        i: Tensor,
        total: Tensor,
        weight: Tensor,
        *moving: Tensor,
    ) -> tuple[Tensor, ...]:
        """What one step makes of `(i, total, weight, *moving)`."""
        now = list(leaves)
        for place, tensor in zip(self._carried, moving, strict=True):
            now[place] = tensor
        state = self._state(now)
        order = orders.index_select(0, i.view(1)).view(-1)
        batch = [tensor.index_select(0, order) for tensor in tensors]
        *new, loss_sum, n = self._function(*state, batch)
        mean = Mean(total, weight).add(loss_sum, n)
        results = [result for _, result in pairs(state, new)]
        moved = [
            results[i].clone() if i in self._shared else results[i]
            for i in self._carried
        ]
        return i + 1, mean.total, mean.weight, *moved

    def _once(
        self,
        i: Tensor,
        orders: Tensor,
        total: Tensor,
        weight: Tensor,
        tensors: Sequence[Tensor],
        leaves: list[Tensor],
    ) -> None:
        start = [i, total, weight, *(leaves[place] for place in self._carried)]
        write(start, list(self._step(tensors, orders, leaves, *start)))

    def _run(
        self,
        count: Tensor,
        orders: Tensor,
        total: Tensor,
        weight: Tensor,
        tensors: Sequence[Tensor],
        leaves: list[Tensor],
    ) -> tuple[Tensor, ...]:
        def goes_on(i: Tensor, *_: Tensor) -> Tensor:
            return i < count

        def step(*moving: Tensor) -> tuple[Tensor, ...]:
            return self._step(tensors, orders, leaves, *moving)

        start = [leaves[place] for place in self._carried]
        i = torch.zeros((), dtype=torch.int64)
        _, total, weight, *end = while_loop(goes_on, step, (i, total, weight, *start))
        if self.watches:
            looked_at = [end[place] for place in self._finite]
            finite = torch.isfinite(grand_total(total, looked_at))
            total = torch.where(finite, total, float("nan"))
        return total, weight, *end


class CompiledFold:
    """A fold that makes many steps in one call, where that pays; see `compile_fold`.

    Attributes:
        why_not: Why steps are made one by one; None if they are not, or that is not
            decided yet.
        seen_finite: Whether the state has been seen to be finite after the last step.
        params: The weights after the last step; for `on_step`.
    """

    def __init__(
        self,
        step: TrainStep,
        *,
        backend: str | Callable[..., Any] = "inductor",
        plan: CompilePlan | None = None,
        why_not: str | None = None,
        length: int = LENGTH,
    ) -> None:
        """Compiles nothing yet.

        Args:
            step: Compiled and donating, for what is not folded.
            backend: Of `torch.compile`.
            plan: Who decides whether to compile; None to do so in any case.
            why_not: Why not to fold, if that is known already.
            length: Steps in one call, at most `LENGTH`.
        """
        self._step = step
        self._backend = backend
        self._plan = plan
        self._length = length
        self._scan: Scan | None = None
        self._copies: Copies = {}  # of the data, on a GPU
        self._kept = False  # whether the state may not be written to
        self.why_not = why_not
        self.seen_finite = False
        self.params: Params = {}

    def __call__(
        self,
        params: Params,
        opt_state: OptState,
        batches: Iterable[Batch],
        *,
        mean: Mean | None = None,
        on_step: OnStep | None = None,
        keep: bool = False,
    ) -> tuple[Params, OptState, Mean]:
        """As `fold` with the step, but `on_step` is called once for several.

        Args:
            params: See `fold`; may be overwritten, like the next.
            opt_state: See `fold`.
            batches: See `fold`.
            mean: See `fold`.
            on_step: See `fold`.
            keep: Whether `params` and `opt_state` must stay what they are.
        """
        self.seen_finite, self._kept = False, keep
        passing = read(as_batches("batches", batches, passes=1))
        if isinstance(passing, Indexed):
            passing.move(device_of(params), self._copies)
        if self._folds(passing, params, opt_state):
            mean = mean or Mean.empty(device_of(params))
            for orders in passing.orders(self._length):
                params, opt_state, mean = self._several(
                    params, opt_state, mean, passing, orders
                )
                self.params = params
                if on_step is not None:
                    try:
                        opt_state = on_step(opt_state, mean)
                    except EndPass as end:
                        return params, end.opt_state, mean
            return params, opt_state, mean
        return fold(self._one, params, opt_state, passing, mean=mean, on_step=on_step)

    @property
    def returns_new(self) -> bool:
        """Whether many steps are made in one call, which returns new tensors."""
        return self._scan is not None and self._scan.loops

    @property
    def why_not_replayed(self) -> str | None:
        """Why a GPU launches kernels one by one; None if a step is launched as one."""
        if self._scan is not None:
            return self._scan.why_not_replayed
        body = self._step.body
        if isinstance(body, Compiled):
            return body.why_not_replayed
        return "batches are cut into micro-batches"

    def _folds(
        self, passing: Iterator[Batch], params: Params, opt_state: OptState
    ) -> TypeGuard[Indexed]:
        """Whether a pass is made many steps at a time, deciding it if need be."""
        if self.why_not is None and self._scan is None:
            try:
                self._scan = self._new_scan(params, opt_state, passing)
            except CannotScanError as error:
                self._give_up(str(error))
        ahead = isinstance(passing, Indexed) and passing.ahead
        return ahead and self._scan is not None

    def _new_scan(
        self, params: Params, opt_state: OptState, passing: Iterator[Batch]
    ) -> Scan | None:
        if isinstance(self._step.body, MicroBatches):
            raise CannotScanError("batches are cut into micro-batches")
        if not isinstance(passing, Indexed):
            raise CannotScanError("the data are not read from memory")
        if not passing.ahead:
            raise CannotScanError("the sampler may look at what was done before")
        device = device_of(params)
        if device.type not in ("cpu", "cuda"):
            raise CannotScanError(f"on {device.type} there is no loop")
        if any(tensor.device != device for tensor in passing.tensors):
            raise CannotScanError("the data are not kept on the GPU")
        try:
            args = (params, opt_state.carry, passing.peek())
        except StopIteration:  # which the fold of nothing will tell, if it is wrong
            return None
        body, plan = self._step.body, self._plan
        watches = bool(opt_state.gate) and loops(device)
        function = getattr(body, "watching", None) if watches else body.function
        if function is None:
            raise CannotScanError("its gate has to see each step")
        if plan is None:
            return Scan(function, args, self._backend_on(device), watches=watches)
        shape = batch_shape(args[-1])
        # What is left of a pass that is resumed may begin with its odd last batch.
        if not plan.is_first(shape) or not plan.worth(shape, args):
            return None
        if not plan.worth_folding(shape, args):
            raise CannotScanError("a call is no cost beside such a step")
        return Scan(
            function, args, self._backend_on(device), plan.compiling, watches=watches
        )

    def _backend_on(self, device: torch.device) -> str | Callable[..., Any]:
        if self._backend != "inductor" or not loops(device):
            return self._backend
        fast = self._plan is not None and self._plan.worth_fast_calls()
        options: dict[str, Any] = {
            "cpp_wrapper": fast and _CALLS_IN_CPP,
            "cpp.min_chunk_size": LEAST_OF_A_THREAD,
        }
        return partial(inductor, **options)

    def _several(
        self,
        params: Params,
        opt_state: OptState,
        mean: Mean,
        passing: Indexed,
        orders: Tensor,
    ) -> tuple[Params, OptState, Mean]:
        """A step for each row of indices, in one call if they are of the right size."""
        self.seen_finite = False
        scan, gate, steps = self._scan, opt_state.gate, len(orders)
        if scan is None or not scan.watches:
            gate = ()  # or it is a part of the step
        finite = not gate or (
            int(gate.skipped) <= int(gate.allowed) and math.isfinite(mean.total)
        )
        if finite and scan is not None and scan.takes(orders):

            def seeding(step: int) -> seeded:
                return seeded(seed_of(opt_state, step), device_of(params))

            if not scan.loops:
                params, opt_state = self._writable(params, opt_state)
            try:
                new, carry, now = scan(
                    params, opt_state.carry, mean, passing.tensors, orders, seeding
                )
            except NotTracedError as error:
                self._give_up(str(error))
            except Exception as error:
                if scan.made:
                    raise
                # Nothing was written yet. The caller's own mistakes raise again below.
                self._give_up(f"{type(error).__name__}: {error}".split("\n\n")[0])
            else:
                if gate and math.isfinite(now.total):
                    self.seen_finite = True
                    carry = carry._replace(gate=gate._replace(step=gate.step + steps))
                if not gate or self.seen_finite:
                    self._kept = False
                    return new, opt_state.after(carry, steps), now
                # Or else the old state still holds, and the gate is to see each step.
        batches = [passing.take(order) for order in orders]
        return fold(self._one, params, opt_state, batches, mean=mean)

    def _one(
        self, params: Params, opt_state: OptState, batch: Batch
    ) -> tuple[Params, OptState, Tensor, Tensor]:
        result = self._step(*self._writable(params, opt_state), batch)
        self.params = result[0]
        return result

    def _writable(self, params: Params, opt_state: OptState) -> tuple[Params, OptState]:
        """The state, or if it is to be kept, a copy of it."""
        if self._kept:
            self._kept = False
            return pytree.tree_map_only(Tensor, torch.clone, (params, opt_state))
        return params, opt_state

    def _give_up(self, why: str) -> None:
        self.why_not, self._scan = why, None


def compile_fold(
    step: TrainStep, *, backend: str | Callable[..., Any] = "inductor"
) -> CompiledFold:
    """Compiles a fold: many steps in one call, where the data are in memory.

    A small step costs less than calling it. For a `DataLoader` over a `TensorDataset`
    (or a `Subset` of one) with one of torch's own samplers, batches are put together
    inside the graph, and a call makes 32 steps. Losses, weights and order are those of
    `fold`. Where it cannot be, the steps are made one by one, compiled, and `why_not`
    says why: random layers on the CPU, other data, samplers of one's own,
    micro-batches.

    Args:
        step: Of `make_step`, not compiled.
        backend: Of `torch.compile`.

    Returns:
        `epoch(params, opt_state, batches, *, on_step=None)`, which returns `(params,
        opt_state, mean)` as `fold` does. It may write into the tensors of the old
        state. `on_step` is called after each call, so once for several steps.

    Raises:
        TypeError: If `step` is none of `make_step`.
        ValueError: If it is compiled already.

    Example:
        >>> import lossloop as ll
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> goal = ll.supervised(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> params, opt_state = ll.init(goal, torch.optim.SGD)
        >>> step = ll.make_step(goal, torch.optim.SGD)
        >>> epoch = ll.compile_fold(step, backend="aot_eager")
        >>> data = TensorDataset(torch.ones(9, 2), torch.zeros(9, 1))
        >>> loader = DataLoader(data, batch_size=4)
        >>> params, opt_state, mean = epoch(params, opt_state, loader)
        >>> int(opt_state.step), int(mean.weight), epoch.why_not
        (3, 9, None)
    """
    if not isinstance(step, TrainStep):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"compile_fold takes a step of make_step, got a {type(step).__name__}."
        )
    one = TrainStep(compiled(step.body, donate=True, backend=backend))
    return CompiledFold(one, backend=backend)
