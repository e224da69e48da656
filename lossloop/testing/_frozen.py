"""The pair of any samples at frozen weights, in the widest precision there is."""

import functools
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lossloop._batches import converted
from lossloop.testing._search import (
    Law,
    LawBrokenError,
    Limit,
    NotJudgedError,
    RaisedError,
    listed,
    not_repeatable,
    raised_on,
)
from lossloop.testing._subject import Pair, Subject
from lossloop.testing._trees import Gap, beyond, gap, named_leaves, shaken

# Of sums over a few dozen samples, and of a few steps.
_LIMITS = {
    torch.float64: Limit(1e-10, "above float64 rounding"),
    torch.float32: Limit(1e-5, "above float32 rounding"),
    torch.bfloat16: Limit(2e-2, "above bfloat16 rounding"),
    torch.float16: Limit(2e-2, "above float16 rounding"),
}

# A loss near zero is a difference of larger terms: this times n is added to its size,
# and more of it where there are fewer digits to lose.
_FLOOR, _FLOOR_NARROW = 1e-3, 0.1


class Watch(TorchDispatchMode):
    """Notes what the operators of a call say about it.

    Attributes:
        couples: Operators that draw random numbers or take statistics of the batch.
        narrow: The narrowest floating-point dtype that something was computed in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.couples: set[str] = set()
        self.narrow = torch.float64

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.couples.add(f"random numbers are drawn ({name})")
        if "batch_norm" in name and "backward" not in name and _over_batch(args):
            self.couples.add(f"statistics of the batch are taken ({name})")
        result = func(*args, **(kwargs or {}))
        if any(_floating(leaf) for leaf in pytree.tree_leaves(args)):
            for leaf in filter(_floating, pytree.tree_leaves(result)):
                if leaf.itemsize < self.narrow.itemsize:
                    # Whole numbers (masks, counts) are exact in any dtype.
                    exact = leaf.double()  # which rounds, unlike float8
                    if bool((exact != exact.round()).any()):
                        self.narrow = leaf.dtype
        return result


def _over_batch(args: Sequence[Any]) -> bool:
    """Whether statistics are taken, and of more than one sample.

    InstanceNorm is the same operator, with all samples as channels of one.
    """
    return any(arg is True for arg in args) and args[0].shape[0] > 1


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def watched(call: Callable[[], object]) -> Watch:
    """What the operators of a call say, up to where it raises; nothing if compiled."""
    with suppress(Exception), Watch() as watch:
        call()
    return watch


def limit_of(law: Law, dtype: torch.dtype) -> Limit:
    """What rounding to a dtype amounts to.

    Raises:
        NotJudgedError: If it has too few digits to tell right from wrong.
    """
    if dtype not in _LIMITS:
        raise NotJudgedError(law, f"{dtype} has too few digits to tell.")
    return _LIMITS[dtype]


def narrowest(subject: Subject) -> torch.dtype:
    """Of the floating-point tensors that it is given."""
    state = subject.params, subject.opt_state, subject.batch
    dtypes = [leaf.dtype for _, leaf in named_leaves(state) if _floating(leaf)]
    return min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float64)


def in_float64(subject: Subject) -> Subject:
    """The subject with its state and data in float64.

    Raises:
        RaisedError: If the device has none.
    """
    state = subject.params, subject.opt_state, subject.batch
    with raised_on(range(subject.size)):
        params, opt_state, batch = converted(state, torch.float64)
    return subject._replace(params=params, opt_state=opt_state, batch=batch)


def _widest(law: Law, subject: Subject) -> tuple[Subject, Limit]:
    """The subject in float64 if it takes that, and what its rounding amounts to."""
    try:
        wide = in_float64(subject)
        wide.measure(range(subject.size))
    except RaisedError:
        narrow = narrowest(subject)
        limit = limit_of(law, narrow)
        limit = limit._replace(origin=f"{limit.origin} (no float64)")
        return subject._replace(narrow=narrow), limit
    narrow = watched(lambda: wide.measure(range(wide.size))).narrow
    limit = limit_of(law, narrow)
    if narrow != torch.float64:
        limit = limit._replace(origin=f"{limit.origin} (used inside)")
    return wide._replace(narrow=narrow), limit


def of_updates(limit: Limit) -> Limit:
    """The limit for what some steps of an optimizer make of rounding."""
    tolerance = min(100 * limit.tolerance, max(limit.tolerance, 1e-3))
    return Limit(tolerance, f"{limit.origin}, after steps")


def beyond_rounding(
    subject: Subject,
    limit: Limit,
    found: Any,
    expected: Any,
    run: Callable[[Subject], Any],
    precise: Callable[[], Sequence[Any]] = list,
) -> Gap:
    """The largest difference, without what rounding explains.

    An optimizer that divides by the size of a gradient makes much of one that is
    nothing but rounding (that of a bias before BatchNorm).

    Args:
        subject: What both come from.
        limit: Up to here, rounding is not looked at.
        found: A result.
        expected: What it should be.
        run: Computes `expected`, from params that are rounded otherwise.
        precise: Computes it more precisely, where that can be done.
    """
    apart = gap(found, expected)
    if apart.size <= limit.tolerance:
        return apart
    eps = torch.finfo(subject.narrow).eps
    others = [
        run(subject._replace(params=shaken(subject.params, eps, seed)))
        for seed in range(3)
    ]
    return beyond(found, expected, [*others, *precise()])


class Frozen:
    """A subject at frozen weights: from samples to their pair.

    Attributes:
        subject: In the widest precision it takes.
        limit: What its rounding amounts to, relative to the sizes of the loss sums.
    """

    def __init__(self, law: Law, subject: Subject) -> None:
        self.subject, self.limit = _widest(law, subject)
        exact = self.subject.narrow == torch.float64
        self._floor = _FLOOR if exact else _FLOOR_NARROW
        self._law = law
        self._seen: dict[tuple[int, ...], Pair] = {}
        everything = range(subject.size)
        for _ in range(2):
            self(everything)

    def __call__(self, samples: Sequence[int]) -> Pair:
        """The pair of these samples.

        Raises:
            RaisedError: If the subject raises.
            ValueError: If it gave something else for the same samples before.
        """
        pair = self.subject.measure(samples)
        first = self._seen.setdefault(tuple(samples), pair)
        # By their text, in which nan is nan.
        same = repr(first) == repr(pair)
        if not same and self.difference([first], [pair]) > self.limit.tolerance:
            what = f"samples {listed(samples)} gave {first}, and then {pair}"
            raise not_repeatable(self._law, what)
        return pair

    def drawing(self) -> tuple[str, str] | None:
        """Cause and remedy, if random numbers are drawn in eval mode."""
        if self.subject.objective is None:
            return None
        couples = watched(lambda: self(range(self.subject.size))).couples
        drawn = [text for text in sorted(couples) if text.startswith("random")]
        if not drawn:
            return None
        cause = (
            f"In eval mode, {' and '.join(drawn)}, so that the loss of a sample "
            f"depends on its batch. (The numbers are seeded for each batch.)"
        )
        remedy = "Draw none where model.training is false, or put them into the batch."
        return cause, remedy

    @property
    def as_trained(self) -> Callable[[], object] | None:
        """A call in train mode, as only steps are called; None for others."""
        if self.subject.objective is not None or self.subject.step is None:
            return None
        return functools.partial(self.subject.measure, range(self.subject.size))

    def difference(self, some: Sequence[Pair], others: Sequence[Pair]) -> float:
        """Between the sums of pairs, relative to the sum of their magnitudes.

        That of `n` is absolute where all are whole numbers: those are exact.
        """
        pairs = [*some, *others]
        apart = total(some).loss_sum - total(others).loss_sum
        weight = sum(abs(pair.n) for pair in pairs)
        size = sum(abs(pair.loss_sum) for pair in pairs) + self._floor * weight
        n_apart = abs(total(some).n - total(others).n)
        if any(pair.n % 1 for pair in pairs):
            n_apart /= weight
        found = abs(apart) / size if size else 0.0, n_apart
        return math.inf if any(map(math.isnan, found)) else max(found)


def frozen(law: Law, subject: Subject) -> tuple[Subject, Limit]:
    """The subject in the widest precision it takes, and what its rounding amounts to.

    Raises:
        NotJudgedError: If it is not deterministic.
    """
    mean = Frozen(law, subject)
    return mean.subject, mean.limit


def total(pairs: Sequence[Pair]) -> Pair:
    """The sum of pairs."""
    return Pair(sum(pair.loss_sum for pair in pairs), sum(pair.n for pair in pairs))


@contextmanager
def coupling_explained(law: Law, call: Callable[[], object] | None) -> Generator[None]:
    """Does not call wrong what couples samples because it is in train mode.

    Args:
        law: What is judged inside.
        call: Calls the step that is judged; None if what is judged is in eval mode.

    Raises:
        ValueError: Instead of `LawBrokenError`, if random layers or statistics of the
            batch are the reason.
    """
    try:
        yield
    except LawBrokenError as broken:
        couples = watched(call).couples if call else ()
        if not couples:
            raise
        raise NotJudgedError(
            law,
            f"{' and '.join(sorted(couples))}, so that samples act on each other on "
            f"purpose. Check the objective, or a step in eval mode. (Here: "
            f"{broken.counterexample})",
        ) from None
