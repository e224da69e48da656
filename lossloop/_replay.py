"""A compiled step on a GPU, launched as one: its kernels are captured and replayed."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

# Its state may come to lie somewhere else, as for another run; not again and again.
MOST_MOVES = 8
REPLAYS_FOR_A_MOVE = 100

_log = logging.getLogger("lossloop")


class Captured(NamedTuple):
    """Kernels that were recorded with the addresses they read and write.

    Attributes:
        replay: Launches them all.
        outputs: Where the results of each launch lie.
    """

    replay: Callable[[], None]
    outputs: Any


class Pool:
    """The memory that the graphs of one step share, for what they compute on the way.

    They never run at once, and their results are copied out of it.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._stream: Any = None
        self._first: Captured | None = None

    def serves(self, args: Sequence[Any]) -> bool:
        """Whether what takes these arguments runs on a GPU."""
        return any(isinstance(t, Tensor) and t.is_cuda for t in args)

    def capture(self, function: Callable[..., Any], args: Sequence[Tensor]) -> Captured:
        """Records what a function launches, without running it.

        A generator that it draws from is read anew by each replay.
        """
        device = args[0].device
        nothing_much = partial(torch.zeros, 1, device=device)
        with torch.cuda.device(device):
            if self._first is None:
                self._stream = torch.cuda.Stream()
                self._handle = torch.cuda.graph_pool_handle()
                # The memory is given up with its last graph, so that one must stay.
                self._first = self._captured(nothing_much)
            # One that fails leaves its stream the current one.
            with torch.cuda.stream(self._stream):
                try:
                    return self._captured(partial(function, *args))
                except Exception:
                    # And generators as if it went on, which the next puts right.
                    self._captured(nothing_much)
                    raise

    def _captured(self, call: Callable[[], Any]) -> Captured:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins batches, may go on meanwhile.
        with torch.cuda.graph(
            graph, self._handle, self._stream, capture_error_mode="thread_local"
        ):
            outputs = call()
        return Captured(graph.replay, outputs)


class Replay:
    """Calls compiled code on a GPU; from its second call on, in one launch.

    Launching the kernels of a small step takes longer than they run. They are captured
    in a CUDA graph, which knows its tensors by address: the state stays where it is,
    because the step writes to it in place; batches, and rates once they change, are
    copied to where the graph reads them.

    The code is called after its guards were checked, so that a value of Python that
    changes still compiles it again.

    Attributes:
        why_not: Why the kernels are launched one by one; None if they are not, or that
            is not decided yet.
    """

    def __init__(
        self, code: Callable[..., Any], graph: fx.GraphModule, batch: int, pool: Pool
    ) -> None:
        """Captures nothing yet.

        Args:
            code: Takes tensors.
            graph: What it was compiled from.
            batch: Which argument of the function that was traced is copied; that has
                none if it is -1.
            pool: For what the code computes on the way.
        """
        self._code = code
        self._written = _written(graph)
        self._copied = _of_argument(graph, batch)
        self._pool = pool
        self._inputs: Sequence[Tensor] = ()  # of the last call, or as captured
        self._addresses: list[int] = []
        self._captured: Captured | None = None
        self._moves = self._replays = 0
        self.why_not: str | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        """What the code returns."""
        if self.why_not is not None:
            return self._code(*inputs)
        if not self._addresses:
            self.why_not = _why_not(inputs)
            return self._anew(inputs)
        moved = {
            place
            for place, address in enumerate(self._addresses)
            if place not in self._copied and inputs[place].data_ptr() != address
        }
        if self._captured is not None and not moved:
            return self._replay(self._captured, inputs)
        self._captured = None
        rates = {i for i in moved - self._written if not inputs[i].dim()}
        self._copied |= rates
        if moved != rates:
            self._moves += 1
            if self._moves > MOST_MOVES + self._replays // REPLAYS_FOR_A_MOVE:
                self._give_up("the tensors of its state are others again and again")
        elif (captured := self._capture(inputs)) is not None:
            return self._replay(captured, inputs)
        return self._anew(inputs)

    @property
    def replays(self) -> bool:
        """Whether the kernels are captured."""
        return self._captured is not None

    def again(self) -> Any:
        """The same as the last call, of which all but the values is the same."""
        assert self._captured is not None
        return self._launch(self._captured)

    def _anew(self, inputs: Sequence[Tensor]) -> Any:
        """Calls the code as it is, which warms it up, and notes where its tensors are.

        They are held, so that no other can come to lie where one of them was.
        """
        if self.why_not is None:
            self._inputs, self._addresses = inputs, [t.data_ptr() for t in inputs]
        return self._code(*inputs)

    def _capture(self, inputs: Sequence[Tensor]) -> Captured | None:
        try:
            still = [
                _twin(t) if place in self._copied else t
                for place, t in enumerate(inputs)
            ]
            self._captured = self._pool.capture(self._code, still)
        except Exception as error:  # nothing has run yet
            why = f"{type(error).__name__}: {error}".split("\n")[0]
            self._give_up(f"they cannot be captured: {why}")
            return None
        self._inputs, self._addresses = still, [t.data_ptr() for t in still]
        return self._captured

    def _replay(self, captured: Captured, inputs: Sequence[Tensor]) -> Any:
        for place in self._copied:
            self._inputs[place].copy_(inputs[place], non_blocking=True)
        return self._launch(captured)

    def _launch(self, captured: Captured) -> Any:
        captured.replay()
        self._replays += 1
        # The next launch writes its results over these.
        return pytree.tree_map_only(Tensor, Tensor.clone, captured.outputs)

    def _give_up(self, why: str) -> None:
        _log.info("lossloop: kernels of a step are launched one by one: %s", why)
        self.why_not, self._captured, self._inputs = why, None, ()


def _twin(tensor: Tensor) -> Tensor:
    """A copy with the same strides, for which the code is compiled.

    Raises:
        RuntimeError: If elements share their memory.
    """
    twin = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return twin.copy_(tensor)


def _why_not(inputs: Sequence[Any]) -> str | None:
    if not all(isinstance(t, Tensor) for t in inputs):
        return "the step takes something else than tensors"
    devices = {t.device for t in inputs}
    if len(devices) > 1:  # the value of one on the host would be captured
        return f"the step takes tensors of {', '.join(sorted(map(str, devices)))}"
    return None


def _written(graph: fx.GraphModule) -> set[int]:
    """Places of the tensors that a traced step writes to: those it was donated."""
    places: dict[fx.Node, int] = {}
    written = set[int]()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            places[node] = len(places)
            continue
        first = node.args[0] if node.args else None
        if node.op == "call_method" and isinstance(first, fx.Node) and first in places:
            if node.target == "copy_":
                written.add(places[first])
            elif node.target == "view":
                places[node] = places[first]
    return written


def _of_argument(graph: fx.GraphModule, argument: int) -> set[int]:
    """Places of the tensors that one argument of a traced function holds."""
    places = set[int]()
    for place, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        name: Any = node.meta["grapharg"].source.name
        name = name() if callable(name) else name  # a method in torch 2.11
        if name.startswith(f"L['args'][{argument}]"):
            places.add(place)
    return places
