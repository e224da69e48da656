"""The laws that concern the mean: how samples are split, ordered and weighted."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from lossloop._objective import Objective
from lossloop._types import Batch, LossPair, Params
from lossloop.testing._frozen import Frozen, coupling_explained, total
from lossloop.testing._search import (
    Finding,
    Law,
    Limit,
    NotJudgedError,
    Outcome,
    RaisedError,
    Search,
    generators_kept,
)
from lossloop.testing._subject import (
    Pair,
    State,
    Subject,
    admit,
    checked_output,
    eager,
    evaluate,
    measured,
    trained_names,
)
from lossloop.testing._trees import gap, number

PutWeights = Callable[[Batch, Tensor], Batch]

PARTITION = Law(
    "partition invariance",
    "However the samples are split into batches, the pairs (loss_sum, n) of the "
    "batches add up to the pair of one batch that holds them all.",
    "The loss of a sample depends on what else is in its batch: samples are compared "
    "with each other, or weights are normalised over the batch.",
    "Return the sum of the weighted losses and the sum of the weights, like "
    "(weights * losses).sum(), weights.sum(). A loss that compares samples on purpose "
    "has no mean over samples: report it for one fixed size of batch.",
)
ORDER = Law(
    "order invariance",
    "The pair of a batch depends neither on the order of its samples nor on the "
    "batches that were seen before.",
    "Something depends on the position in the batch (a recurrent layer without "
    "batch_first=True, a cumulative sum over samples, the first sample as a "
    "reference), or is kept from one batch to the next.",
    "Let the loss of each sample be a function of this sample and the parameters.",
)
ZERO_WEIGHT = Law(
    "zero weight is absence",
    "A sample of weight 0 is absent, one of weight 2 counts twice, a weight of 1 is no "
    "weight, and whole weights add up exactly, also past 2**24.",
    "n counts samples instead of adding their weights, the weights are normalised "
    "within the batch, or they are added in float32.",
    "Return (weights * losses).sum() and weights.sum(dtype=torch.float64).",
)

_HEAVY = 2**24  # in float32, one more is no more


def check_partition_invariance(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    opt_state: Any = None,
    optimizer: Any = None,
    examples: int = 100,
    seed: int = 0,
) -> Outcome:
    """Checks that the pairs of the parts of any batch add up to its own pair.

    An `Objective` is called in eval mode: dropout and the statistics of a batch couple
    samples on purpose. It is called in float64 where it takes that.

    Args:
        subject: An objective of `supervised` or `objective`; a plain function
            `(params, batch) -> (loss_sum, n)`; an eval step; or a step, whoever made
            it, `(params, opt_state, batch) -> (params, opt_state, loss_sum, n)`.
        data: One batch, a tuple or other pytree of tensors that share their first
            dimension; or a `DataLoader` or list of batches. At most 32 samples are
            used.
        params: To call it with; default those of the objective's model.
        opt_state: For a step, the state to call it with.
        optimizer: As for `make_step`; default SGD with momentum.
        examples: How many to try.
        seed: Of the examples.

    Returns:
        The largest difference seen, and the tolerance.

    Raises:
        LawBrokenError: With the smallest counterexample.
        ValueError: If the law cannot be judged: too few samples, a subject that is not
            deterministic, a step whose random layers or batch statistics couple
            samples.
        TypeError: If subject or data are of the wrong kind.

    Example:
        >>> import lossloop as ll
        >>> from lossloop.testing import check_partition_invariance
        >>> goal = ll.supervised(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> data = torch.randn(8, 2), torch.randn(8, 1)
        >>> check_partition_invariance(goal, data).difference < 1e-12
        True
    """
    state = State(params, opt_state, optimizer)
    admitted = admit("check_partition_invariance", subject, data, state)
    return partition_invariance(admitted, Search(examples, seed))


@generators_kept()
def partition_invariance(subject: Subject, search: Search) -> Outcome:
    """Judges `PARTITION`."""
    mean = Frozen(PARTITION, subject)

    def judge(labelled: list[tuple[int, int]]) -> Finding:
        samples = [sample for sample, _ in labelled]
        parts: dict[int, list[int]] = {}
        for sample, label in labelled:
            parts.setdefault(label, []).append(sample)
        whole = mean(samples)
        pairs = [mean(part) for part in parts.values()]

        def words() -> str:
            found = zip(parts.values(), pairs, strict=True)
            pieces = "; ".join(f"{part}: {pair}" for part, pair in found)
            return (
                f"samples {samples} in one batch: {whole}. In parts, {pieces}; "
                f"together {total(pairs)}."
            )

        def advice() -> tuple[str, str] | None:
            found = mean.drawing() or _added_once(mean, parts.values())
            sizes = [len(part) for part in parts.values()]
            return found or _looks_like(whole, pairs, sizes)

        return Finding(samples, mean.difference([whole], pairs), words, advice)

    labelled = st.lists(
        st.tuples(st.integers(0, subject.size - 1), st.integers(0, 3)),
        min_size=2,
        unique_by=lambda pair: pair[0],
    )
    with coupling_explained(PARTITION, mean.as_trained):
        return search.run(PARTITION, mean.limit, labelled, judge)


def _added_once(mean: Frozen, parts: Iterable[Sequence[int]]) -> tuple[str, str] | None:
    """What is added to each batch, whatever is in it."""
    added: list[float] = []
    for sample in {sample for part in parts for sample in part}:
        once, twice = mean([sample]), mean([sample, sample])
        added.append(2 * once.loss_sum - twice.loss_sum)
        if once.n * 2 != twice.n:
            return None
    size = max(map(abs, added))
    same = max(added) - min(added) <= 1e-6 * size
    if not same or min(added) <= 0 or size <= mean.limit.tolerance:
        return None
    cause = (
        f"Something is added once per batch, whatever is in it: {number(added[0])}. (A "
        f"penalty on the weights?)"
    )
    return cause, "Multiply it by n, or leave it to the optimizer (weight_decay)."


def _looks_like(
    whole: Pair, parts: Sequence[Pair], sizes: Sequence[int]
) -> tuple[str, str] | None:
    """What a pair that does not add up probably is."""

    def same(one: float, other: float) -> bool:
        return math.isclose(one, other, rel_tol=1e-4)

    size = sum(sizes)
    weighted = zip(parts, sizes, strict=True)
    average = sum(part.loss_sum * count for part, count in weighted) / size
    means = [part.loss_sum / count for part, count in zip(parts, sizes, strict=True)]
    if not all(math.isfinite(part.loss_sum) for part in parts):
        cause = (
            "loss_sum looks like a mean over what counts, and is 0 / 0 where nothing "
            "does."
        )
        return cause, "Return sums: (weights * losses).sum() and weights.sum()."
    adds_up = same(whole.loss_sum, total(parts).loss_sum)
    if not adds_up and same(whole.loss_sum, average):
        cause = (
            "loss_sum looks like a mean: that of the whole is the average of those of "
            "the parts, not their sum."
        )
        remedy = (
            "Return losses.sum() and losses.numel(), or with weights "
            "(weights * losses).sum() and weights.sum(); never a mean."
        )
        return cause, remedy
    if all(part.n == whole.n for part in parts):
        return (
            f"n is {whole.n:g} for every batch, whatever is in it.",
            "Return losses.numel() as n, or the sum of the weights.",
        )
    by_size = whole.n == size
    if not adds_up and by_size and min(means) <= whole.loss_sum / size <= max(means):
        cause = (
            "loss_sum looks like the number of samples times a mean that has weights "
            "of its own (class weights, ignored targets), and so does not divide by "
            "the number of samples."
        )
        remedy = (
            "Pass the loss of torch.nn itself, or return (weights * losses).sum() and "
            "weights.sum()."
        )
        return cause, remedy
    return None


def check_order_invariance(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    opt_state: Any = None,
    optimizer: Any = None,
    examples: int = 100,
    seed: int = 0,
) -> Outcome:
    """Checks that neither the order of samples nor that of batches changes a pair.

    An `Objective` is called in eval mode, and in float64 where it takes that.

    Args:
        subject: As for `check_partition_invariance`.
        data: As for `check_partition_invariance`.
        params: To call it with; default those of the objective's model.
        opt_state: For a step, the state to call it with.
        optimizer: As for `make_step`; default SGD with momentum.
        examples: How many to try.
        seed: Of the examples.

    Returns:
        The largest difference seen, and the tolerance.

    Raises:
        LawBrokenError: With the smallest counterexample.
        ValueError: If the law cannot be judged, as for `check_partition_invariance`.
        TypeError: If subject or data are of the wrong kind.

    Example:
        >>> from lossloop.testing import check_order_invariance
        >>> def discounted(params, batch):  # by the place in the batch
        ...     losses = (batch - params["w"]) ** 2
        ...     return (losses * 0.9 ** torch.arange(len(batch))).sum(), len(batch)
        >>> data = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> check_order_invariance(discounted, data, params={"w": torch.zeros(())})
        Traceback (most recent call last):
        lossloop.testing._search.LawBrokenError: order invariance is broken...
    """
    state = State(params, opt_state, optimizer)
    admitted = admit("check_order_invariance", subject, data, state)
    return order_invariance(admitted, Search(examples, seed))


@generators_kept()
def order_invariance(subject: Subject, search: Search) -> Outcome:
    """Judges `ORDER`."""
    mean = Frozen(ORDER, subject)

    def judge(orders: tuple[list[int], list[int], list[int]]) -> Finding:
        samples, order, others = orders
        first, turned = mean.subject.measure(samples), mean.subject.measure(order)
        mean.subject.measure(others)
        later = mean.subject.measure(samples)
        by_order, by_time = (
            mean.difference([first], [pair]) for pair in (turned, later)
        )

        def words() -> str:
            if by_order >= by_time:
                return f"samples {samples}: {first}. In the order {order}: {turned}."
            return f"samples {samples}: {first}. After samples {others}: {later}."

        return Finding(samples, max(by_order, by_time), words, mean.drawing)

    sample = st.integers(0, subject.size - 1)
    orders = st.lists(sample, min_size=2, unique=True).flatmap(
        lambda samples: st.tuples(
            st.just(samples),
            st.permutations(samples),
            st.lists(sample, min_size=1, max_size=4),
        )
    )
    with coupling_explained(ORDER, mean.as_trained):
        return search.run(ORDER, mean.limit, orders, judge)


def check_zero_weight_is_absence(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    opt_state: Any = None,
    optimizer: Any = None,
    with_weights: PutWeights | None = None,
    examples: int = 100,
    seed: int = 0,
) -> Outcome:
    """Checks that weights of samples count as often as they say.

    A batch in which samples have the weights 0, 1, 2 and 3 must give the same loss_sum
    and n as one in which each sample stands as often as its weight says; and the same
    gradient, or for a step the same update. Half the weights must give half of both
    sums. Whole weights past 2**24 must add up exactly; they are passed in float32.

    An `Objective` is called in eval mode, and in float64 where it takes that.

    Args:
        subject: As for `check_partition_invariance`.
        data: As for `check_partition_invariance`. Weights that it has are replaced.
        params: To call it with; default those of the objective's model.
        opt_state: For a step, the state to call it with.
        optimizer: As for `make_step`; default SGD with momentum.
        with_weights: `(batch, weights) -> batch`, which puts weights of shape (B,) into
            a batch of data. Default, for an objective of `supervised`: `(inputs,
            targets)` becomes `(inputs, targets, weights)`.
        examples: How many to try.
        seed: Of the examples.

    Returns:
        The largest difference seen, and the tolerance.

    Raises:
        LawBrokenError: With the smallest counterexample.
        ValueError: If the law cannot be judged: as for `check_partition_invariance`,
            or the subject takes no weights, or nobody says how.
        TypeError: If subject or data are of the wrong kind.

    Example:
        >>> import lossloop as ll
        >>> from lossloop.testing import check_zero_weight_is_absence
        >>> goal = ll.supervised(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> data = torch.randn(8, 2), torch.randn(8, 1)
        >>> check_zero_weight_is_absence(goal, data).difference < 1e-10
        True
    """
    state = State(params, opt_state, optimizer)
    admitted = admit("check_zero_weight_is_absence", subject, data, state)
    return zero_weight_is_absence(admitted, Search(examples, seed), with_weights)


@generators_kept()
def zero_weight_is_absence(
    subject: Subject,
    search: Search,
    with_weights: PutWeights | None,
) -> Outcome:
    """Judges `ZERO_WEIGHT`."""
    objective = subject.objective
    if with_weights is not None:
        put = with_weights
    elif isinstance(objective, Objective) and objective.loss_fn is not None:
        subject, put = subject._replace(batch=subject.batch[:2]), _third
    else:
        raise NotJudgedError(
            ZERO_WEIGHT,
            f"nobody says where {subject.name} takes the weights of samples. Pass "
            f"with_weights=..., a function (batch, weights) -> batch.",
        )
    _check_takes_weights(subject, put)
    mean = Frozen(ZERO_WEIGHT, subject)
    wide = mean.subject
    effect = _effect(wide)
    dtype = torch.float32 if wide is subject else torch.float64

    def judge(weighted: list[tuple[int, int]]) -> Finding:
        samples = [sample for sample, _ in weighted]
        weights = [weight for _, weight in weighted]
        repeated = [sample for sample, weight in weighted for _ in range(weight)]
        batch = _with(put, wide, samples, weights, dtype)
        pair, change = wide.call(effect, samples, batch)
        if repeated:
            plain = wide.take(repeated)
            if with_weights is not None:
                plain = _with(put, wide, repeated, [1] * len(repeated), dtype)
            expected = wide.call(effect, repeated, plain)
        else:
            expected = Pair(0.0, 0), pytree.tree_map(torch.zeros_like, change)
        apart = mean.difference([pair], [expected[0]])
        change_apart = gap(change, expected[1], abs(pair.loss_sum) + pair.n)
        halves = [weight / 2 for weight in weights]
        half = measured(
            wide.call(wide.pair, samples, _with(put, wide, samples, halves, dtype))
        )
        half_apart = mean.difference([half, half], [pair])

        def words() -> str:
            if half_apart > max(apart, change_apart.size):
                return (
                    f"samples {samples} with weights {weights}: {pair}. With weights "
                    f"{halves}: {half}, which is not half."
                )
            found = f"{pair}, not {expected[0]}"
            if apart < change_apart.size:
                found = change_apart.words
            return (
                f"samples {samples} with weights {weights} against {repeated} without "
                f"weights: {found}."
            )

        largest = max(apart, change_apart.size, half_apart)
        return Finding(samples, largest, words, mean.drawing)

    weighted = st.lists(
        st.tuples(st.integers(0, subject.size - 1), st.integers(0, 3)),
        min_size=1,
        unique_by=lambda pair: pair[0],
    )
    if objective is None:  # the update for a batch without weight is a step's own
        weighted = weighted.filter(lambda pairs: any(weight for _, weight in pairs))
    with coupling_explained(ZERO_WEIGHT, mean.as_trained):
        outcome = search.run(ZERO_WEIGHT, mean.limit, weighted, judge)
        _large_weights(subject, search, put)
    return outcome


def _third(batch: Batch, weights: Tensor) -> Batch:
    """As `supervised` takes weights."""
    return (*batch, weights)


def _with(
    put: PutWeights,
    subject: Subject,
    samples: Sequence[int],
    weights: Sequence[float],
    dtype: torch.dtype,
) -> Batch:
    """The batch of these samples with weights."""
    batch = subject.take(samples)
    tensors = (t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))
    device = next(tensors).device
    return put(batch, torch.tensor(weights, dtype=dtype, device=device))


def _check_takes_weights(subject: Subject, put: PutWeights) -> None:
    everything = range(subject.size)
    batch = _with(put, subject, everything, [1] * subject.size, torch.float32)
    try:
        subject.call(subject.pair, everything, batch)
    except RaisedError as error:
        raise NotJudgedError(
            ZERO_WEIGHT, f"{subject.name} takes no batches with weights: {error}."
        ) from None


class _Change(NamedTuple):
    """What weights may change besides the pair, under a name for messages."""

    gradient: Params


def _effect(subject: Subject) -> Callable[[Any, Any, Batch], tuple[Pair, Any]]:
    """All that weights may change: the pair, and the gradient or the update."""
    if subject.objective is not None:
        names = trained_names(subject)

        def effect(params: Any, opt_state: Any, batch: Batch) -> tuple[Pair, Any]:
            def loss(trained: Params) -> LossPair:
                return evaluate(subject.objective, {**params, **trained}, batch)

            trained = {name: params[name] for name in names}
            if not trained:
                return measured(loss(trained)), ()
            grads, pair = torch.func.grad_and_value(loss, has_aux=True)(trained)
            return measured(pair), _Change(grads)

    else:

        def effect(params: Any, opt_state: Any, batch: Batch) -> tuple[Pair, Any]:
            if subject.step is None:
                return measured(subject.pair(params, opt_state, batch)), ()
            output = checked_output(
                eager(subject.step)(params, opt_state, batch), params
            )
            return measured(output[2:]), output._replace(loss_sum=None, n=None)

    return effect


def _large_weights(subject: Subject, search: Search, put: PutWeights) -> None:
    """Judges that whole weights which float32 cannot add still add up."""

    def n(samples: Sequence[int], weights: Sequence[int]) -> float:
        batch = _with(put, subject, samples, weights, torch.float32)
        return measured(subject.call(subject.pair, samples, batch)).n

    counts = {sample: n([sample], [1]) for sample in range(subject.size)}
    countable = [sample for sample, count in counts.items() if count and not count % 1]
    if not countable:
        return

    def judge(weighted: list[tuple[int, int]]) -> Finding:
        samples = [sample for sample, _ in weighted]
        weights = [weight for _, weight in weighted]
        found = n(samples, weights)
        expected = sum(counts[sample] * weight for sample, weight in weighted)

        def words() -> str:
            return (
                f"samples {samples} with weights {weights} in float32: n is "
                f"{found:.0f}, not {expected:.0f}."
            )

        return Finding(samples, abs(found - expected), words)

    weighted = st.lists(
        st.tuples(st.sampled_from(countable), st.sampled_from([1, _HEAVY])),
        min_size=1,
        max_size=4,
        unique_by=lambda pair: pair[0],
    )
    search.run(ZERO_WEIGHT, Limit(0.0, "counts are exact"), weighted, judge)
