"""Matrix products of a compiled step on the CPU."""

import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from lossloop._isa import vector_options
from lossloop._machine import matmul_precision, processor

aten = torch.ops.aten

# "auto" has our operator where it was measured to be faster, "on" wherever there is a
# compiler for it, "off" nowhere.
SWITCH = "LOSSLOOP_PRODUCTS"
SOURCE = "".join(
    Path(__file__).with_name(name).read_text() for name in ("_tiles.h", "_products.cpp")
)
FASTER = 1.05  # times: so much it has to be, for a choice that noise does not make
ROUNDS = 20  # of which the best counts
SECONDS_PER_PAIR = 0.03  # after which there are no more rounds, but three at least
NARROW = 16  # columns, rows, or what is summed
SMALL = 2**22  # multiplications

# What is measured for each kind of product: rows, depth and columns, after the size of
# the batch if there is one. A layer has one side or the other transposed.
KINDS = {
    "narrow": [(64, 128, 10), (256, 256, 10)],
    "thin": [(10, 64, 128), (64, 10, 128), (10, 64, 512), (64, 10, 512)],
    "small": [(64, 64, 128), (64, 128, 128), (128, 64, 128)],
    "large": [(64, 512, 1024), (512, 64, 512), (256, 256, 512)],
    "batches": [(64, 64, 32, 64), (64, 64, 64, 32)],
}

# What the C++ files implement. It takes any strides, so nothing is copied for it.
_library = torch.library.Library("lossloop", "FRAGMENT")
_library.define(
    "mm(Tensor a, Tensor b) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)


def _without_data(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


torch.library.register_fake("lossloop::mm", _without_data, lib=_library)


def kind_of(a: Tensor, b: Tensor) -> str | None:
    """The kind of a product, of which all are computed alike; None if it is not ours.

    Args:
        a: The left side, a matrix or a batch of them.
        b: The right side.
    """
    for side in (a, b):
        if side.device.type != "cpu" or side.dtype is not torch.float32:
            return None
        if side.layout is not torch.strided:
            return None
    if a.ndim == 3:
        return "batches"
    (m, depth), n = a.shape, b.shape[1]
    if n <= NARROW:
        return "narrow"
    if min(m, depth) <= NARROW:
        return "thin"
    return "small" if m * depth * n <= SMALL else "large"


class Products(CustomGraphPass):
    """Takes the bias out of matrix products, and sends them to the faster kernel.

    ATen's `addmm` first copies the bias into every row of the result. For a layer of
    128 units that takes as long as the product; as an addition, Inductor fuses it into
    the kernel that reads the result.
    """

    def __init__(self, ours: Collection[str]) -> None:
        """Rewrites nothing yet.

        Args:
            ours: The kinds of products that are for `lossloop::mm`.
        """
        self._ours = tuple(ours)

    def __call__(self, graph: Graph) -> None:
        """Rewrites `addmm(bias, a, b)` into `mm(a, b) + bias`, and `mm` into ours."""
        for node in _calls(graph, aten.addmm.default):
            if node.kwargs:  # factors
                continue
            bias, a, b = node.args
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (a, b))
                total = graph.call_function(aten.add.Tensor, (product, bias))
            product.meta.update(node.meta)
            total.meta.update(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)
        for target in (aten.mm.default, aten.bmm.default):
            for node in _calls(graph, target):
                sides: Any = node.args
                a, b = (side.meta.get("val") for side in sides)
                if isinstance(a, Tensor) and isinstance(b, Tensor):
                    ours = kind_of(a, b) in self._ours
                    node.target = torch.ops.lossloop.mm.default if ours else target

    def uuid(self) -> Any:
        """What the cache of compiled graphs knows it by."""
        return get_hash_for_files((__file__,)), self._ours


def _calls(graph: Graph, target: Any) -> Iterator[Node]:
    for node in graph.find_nodes(op="call_function", target=target):
        value: Any = node.meta.get("val")
        if value is not None and value.device.type == "cpu":
            yield node


class _Setting(NamedTuple):
    """What the choice depends on in a process."""

    switch: str
    precision: str
    threads: int


def _setting() -> _Setting:
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "on", "off"):
        raise ValueError(f"{SWITCH} must be auto, on or off, is {switch!r}.")
    return _Setting(switch, matmul_precision(), torch.get_num_threads())


_known = dict[_Setting, tuple[str, ...]]()


def ours() -> tuple[str, ...]:
    """The kinds of products that `lossloop::mm` computes on this machine.

    Measured once, which takes about a second, and noted beside Inductor's cache: the
    same run makes the same choice, so it repeats itself bit for bit.

    Raises:
        ValueError: If the switch is none.
    """
    setting = _setting()
    if setting not in _known:
        # Asked for less than float32, torch may be faster.
        off = setting.switch == "off" or setting.precision != "highest"
        if off or not loaded():
            _known[setting] = ()
        elif setting.switch == "on":
            _known[setting] = tuple(KINDS)
        else:
            times = _remembered(setting.threads)
            _known[setting] = tuple(k for k in KINDS if times[k] >= FASTER)
    return _known[setting]


def in_use() -> tuple[str, ...] | None:
    """What `ours` is, if it was asked for in this process; None if not yet."""
    return _known.get(_setting())


@functools.cache
def loaded() -> bool:
    """Whether the operator could be compiled and loaded, and multiplies.

    Inductor compiles it, with what it compiles its kernels with, and keeps it.
    """
    try:
        from torch._inductor import config
        from torch._inductor.codecache import CppCodeCache

        with config.patch(vector_options()):
            CppCodeCache.load(SOURCE)
        # Whole numbers whose products and sums do not round; tiles have to split them.
        a = 119 * torch.arange(15.0, dtype=torch.float32, device="cpu").view(3, 5)
        found = torch.ops.lossloop.mm(a, a.T)
        return found.equal((a[:, None] * a).sum(-1))
    except Exception:  # there is no compiler, or torch has its kernels no longer
        return False


def _remembered(threads: int) -> dict[str, float]:
    """How many times as fast as torch's it is, measured or from the note of it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    facts = (processor(), threads, torch.__version__, SOURCE, KINDS)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    note = Path(cache_dir()) / f"lossloop-products-{digest[:16]}"
    try:
        return json.loads(note.read_text())
    except ValueError:  # half of one
        note.unlink(missing_ok=True)
    except OSError:  # there is none yet
        pass
    times = {kind: measured(kind) for kind in KINDS}
    with suppress(OSError):  # without a note another process measures again
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=note.parent) as own:
            draft = Path(own) / "note"
            draft.write_text(json.dumps(times))
            with suppress(FileExistsError):  # another was first: its note holds
                os.link(draft, note)
        return json.loads(note.read_text())
    return times


def measured(kind: str) -> float:
    """How many times as fast as torch's the operator is, over sizes and layouts."""
    ratios: list[float] = []
    for *batch, m, depth, n in KINDS[kind]:
        left, right = _ones(*batch, m, depth), _ones(*batch, depth, n)
        for a, b in (
            (left, right),
            (left, right.mT.contiguous().mT),
            (left.mT.contiguous().mT, right),
        ):
            ratios.append(_times_as_fast(a, b))
    return math.prod(ratios) ** (1 / len(ratios))


def _ones(*sizes: int) -> Tensor:
    return torch.ones(sizes, dtype=torch.float32, device="cpu")


def _times_as_fast(a: Tensor, b: Tensor) -> float:
    """The two in turn, so that what disturbs one disturbs the other, and the best.

    As in a step, the sides were just written and the result is read, by this thread if
    they are small: what another thread computes of it has to go from cache to cache.
    """
    rivals = (torch.bmm if a.ndim == 3 else torch.mm, torch.ops.lossloop.mm.default)
    best = [math.inf, math.inf]
    began = perf_counter()
    for count in range(ROUNDS + 1):
        if count > 3 and perf_counter() - began > SECONDS_PER_PAIR:
            break
        for place, product in enumerate(rivals):
            a.mul_(1.0)
            b.mul_(1.0)
            start = perf_counter()
            product(a, b).mul_(1.0)
            if count:  # the first makes the kernel
                best[place] = min(best[place], perf_counter() - start)
    return best[0] / best[1]
