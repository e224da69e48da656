"""The pair `(loss_sum, n)` of every torch loss against torch's own mean.

The number of examples per case is a fifth of the Hypothesis profile's `max_examples`:
the environment variable `HYPOTHESIS_PROFILE=thorough` raises it.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import lossloop as ll
from lossloop._losses import batch_mean, check_loss, loss_pair

PER_CASE = settings(max_examples=max(2, settings().max_examples // 5), deadline=None)
# Classes, and the size of one more dimension; C a power of two: exact quotients.
C, D = 4, 3


class Same(nn.Module):
    """A model whose output is its input."""

    def forward(self, *output: Tensor) -> Any:
        return output if len(output) > 1 else output[0]


def fold_mean(loss: Callable[..., Any], batches: Iterable[tuple[Any, Any]]) -> float:
    """The mean over all batches, as an epoch reports it."""
    eval_step = ll.make_eval_step(ll.supervised(Same(), loss))
    return ll.fold_eval(eval_step, {}, batches).value()


# --- the table of cases ---------------------------------------------------------------


class Draw:
    """Random tensors with `rows` rows, from a seed."""

    def __init__(self, seed: int, rows: int, dtype: torch.dtype):
        self.rows, self.dtype = rows, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def real(self, *shape: int) -> Tensor:
        draw = torch.randn(self.rows, *shape, generator=self.generator)
        return draw.to(self.dtype)

    def unit(self, *shape: int) -> Tensor:
        return self.real(*shape).sigmoid()

    def integer(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(
            low, high, (self.rows, *shape), generator=self.generator, dtype=torch.int64
        )

    def sign(self, *shape: int) -> Tensor:
        return (2 * self.integer(0, 2, *shape) - 1).to(self.dtype)

    def label(self, ignored: int, *shape: int) -> Tensor:
        label = self.integer(0, C, *shape)
        return label.where(self.integer(0, 4, *shape) > 0, ignored)


Data = tuple[Any, Any]


class Case(NamedTuple):
    make: Callable[..., nn.Module]  # takes `reduction`
    draw: Callable[[Draw], Data]  # output and target, rows in dimension 0
    adapt: Callable[[Any, Any], Data] = lambda output, target: (output, target)
    forward: Callable[..., Any] | None = None  # order of arguments, if not ours
    mean: str = "mean"  # the reduction that is the oracle
    alone: bool = True  # a single row without its dimension is a sample too

    def oracle(self, output: Any, target: Any, reduction: str = "") -> Tensor:
        module = self.make(reduction=reduction or self.mean).to(many(output)[0].dtype)
        order = self.forward or (lambda output, target: (*many(output), *many(target)))
        with warnings.catch_warnings():  # KLDivLoss warns about its mean
            warnings.filterwarnings("ignore", message="reduction: 'mean' divides")
            return module(*order(output, target))


def many(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


WEIGHT = torch.tensor([0.5, 3.0, 0.0, 1.7], dtype=torch.float64)
ROW = torch.tensor([0.5, 3.0, 1.7], dtype=torch.float64)


def options(**choices: Iterable[Any]) -> Iterable[dict[str, Any]]:
    names = list(choices)
    for values in itertools.product(*choices.values()):
        yield {n: v for n, v in zip(names, values, strict=True) if v is not None}


def elementwise_cases() -> Iterable[Case]:
    real = lambda d: (d.real(D), d.real(D))  # noqa: E731
    for cls, choices, draw in [
        (nn.L1Loss, {}, real),
        (nn.MSELoss, {}, real),
        (nn.SmoothL1Loss, {"beta": [0.0, 0.3, 1.0]}, real),
        (nn.HuberLoss, {"delta": [0.3, 1.0]}, real),
        (nn.SoftMarginLoss, {}, lambda d: (d.real(D), d.sign(D))),
        (
            nn.HingeEmbeddingLoss,
            {"margin": [0.3, 1.0]},
            lambda d: (d.real(D), d.sign(D)),
        ),
        (
            nn.PoissonNLLLoss,
            {"log_input": [True], "full": [False, True]},
            lambda d: (d.real(D), d.integer(0, 5, D).to(d.dtype)),
        ),
        (
            nn.PoissonNLLLoss,
            {"log_input": [False], "full": [False, True], "eps": [1e-8, 0.1]},
            lambda d: (d.unit(D), d.integer(0, 5, D).to(d.dtype)),
        ),
        (nn.BCELoss, {"weight": [None, ROW]}, lambda d: (d.unit(D), d.unit(D))),
        (
            nn.BCEWithLogitsLoss,
            {"weight": [None, ROW], "pos_weight": [None, ROW]},
            lambda d: (d.real(D), d.unit(D)),
        ),
        (
            nn.MultiLabelSoftMarginLoss,
            {"weight": [None, ROW]},
            lambda d: (d.real(D), d.unit(D)),
        ),
        (
            nn.MultiLabelMarginLoss,
            {},
            lambda d: (d.real(C), d.integer(-1, C, C)),
        ),
    ]:
        for kw in options(**choices):
            yield Case(functools.partial(cls, **kw), draw)
    for log_target, mean in itertools.product([False, True], ["mean", "batchmean"]):
        yield Case(
            functools.partial(nn.KLDivLoss, log_target=log_target),
            lambda d, log=log_target: (
                d.real(D).log_softmax(1),
                d.real(D).log_softmax(1) if log else d.real(D).softmax(1),
            ),
            mean=mean,
            alone=mean == "mean",
        )


def class_cases() -> Iterable[Case]:
    for more in ((), (D,)):
        for kw in options(weight=[None, WEIGHT], ignore_index=[None, -1, 2, 255]):
            ignored = kw.get("ignore_index", -100)
            nll = (nn.NLLLoss, nn.modules.loss.NLLLoss2d)[len(more)]
            yield Case(
                functools.partial(quiet(nll), **kw),
                lambda d, m=more, i=ignored: (
                    d.real(C, *m).log_softmax(1),
                    d.label(i, *m),
                ),
                alone=not more,
            )
            for smoothing in (0.0, 0.3):
                yield Case(
                    functools.partial(
                        nn.CrossEntropyLoss, label_smoothing=smoothing, **kw
                    ),
                    lambda d, m=more, i=ignored: (d.real(C, *m), d.label(i, *m)),
                    alone=not more,
                )
        for kw in options(weight=[None, WEIGHT], label_smoothing=[0.0, 0.3]):
            yield Case(
                functools.partial(nn.CrossEntropyLoss, **kw),
                lambda d, m=more: (d.real(C, *m), d.real(C, *m).softmax(1)),
                alone=not more,
            )
    for kw in options(weight=[None, WEIGHT], p=[1, 2], margin=[0.5]):
        yield Case(
            functools.partial(nn.MultiMarginLoss, **kw),
            lambda d: (d.real(C), d.integer(0, C)),
        )


def quiet(cls: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(cls, updated=())
    def make(**kw: Any) -> nn.Module:
        with warnings.catch_warnings():  # NLLLoss2d is deprecated, and still a loss
            warnings.simplefilter("ignore", FutureWarning)
            return cls(**kw)

    return make


def manhattan(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().sum(-1)


def many_input_cases() -> Iterable[Case]:
    for margin in (0.0, 0.5):
        yield Case(
            functools.partial(nn.CosineEmbeddingLoss, margin=margin),
            lambda d: ((d.real(D), d.real(D)), d.sign()),
        )
        for more in ((), (D,)):
            yield Case(
                functools.partial(nn.MarginRankingLoss, margin=margin),
                lambda d, m=more: ((d.real(*m), d.real(*m)), d.sign(*m)),
            )
    triplet = lambda d: ((d.real(D), d.real(D), d.real(D)), ())  # noqa: E731
    for swap in (False, True):
        for p in (1.0, 2.0):
            yield Case(functools.partial(nn.TripletMarginLoss, swap=swap, p=p), triplet)
        for distance in (None, manhattan):
            yield Case(
                functools.partial(
                    nn.TripletMarginWithDistanceLoss,
                    swap=swap,
                    distance_function=distance,
                ),
                triplet,
            )
    for full in (False, True):
        make = functools.partial(nn.GaussianNLLLoss, full=full, eps=0.3)
        for shape in ((D,), (), (1,)):
            yield Case(
                make,
                lambda d, s=shape: ((d.real(D), d.unit(*s)), d.real(D)),
                forward=lambda output, target: (output[0], target, output[1]),
            )
        yield Case(make, lambda d: (d.real(D), (d.real(D), d.unit(D))))


def ctc_data(draw: Draw, blank: int) -> Data:
    log_probs = draw.real(9, C).log_softmax(2)
    labels = draw.integer(0, C - 1, 3)
    labels = labels + (labels >= blank)
    return log_probs, (labels, draw.integer(7, 10), draw.integer(0, 4))


def ctc_cases() -> Iterable[Case]:
    def padded(output: Tensor, target: Any) -> Data:
        return output.transpose(0, 1), target

    def concatenated(output: Tensor, target: Any) -> Data:
        labels, input_lengths, ends = target
        rows = [row[:end] for row, end in zip(labels, ends, strict=True)]
        return output.transpose(0, 1), (torch.cat(rows), input_lengths, ends)

    def measured_by_model(output: Tensor, target: Any) -> Data:
        labels, input_lengths, ends = target
        return (output.transpose(0, 1), input_lengths), (labels, ends)

    for blank, zero_infinity in itertools.product([0, 2], [False, True]):
        make = functools.partial(nn.CTCLoss, blank=blank, zero_infinity=zero_infinity)
        draw = functools.partial(ctc_data, blank=blank)
        for adapt in (padded, concatenated):
            yield Case(make, draw, adapt, alone=False)
        yield Case(
            make,
            draw,
            measured_by_model,
            lambda output, target: (output[0], target[0], output[1], target[1]),
            alone=False,
        )


CASES = [*elementwise_cases(), *class_cases(), *many_input_cases(), *ctc_cases()]


def name_of(case: Case) -> str:
    func = case.make
    kw = {}
    while isinstance(func, functools.partial):
        kw, func = {**func.keywords, **kw}, func.func
    shown = [
        f"{k}={'w' if isinstance(v, Tensor) else getattr(v, '__name__', v)}"
        for k, v in kw.items()
    ]
    shown += [case.adapt.__name__] * (case.adapt.__name__ != "<lambda>")
    return "-".join([func.__name__, case.mean, *shown])


over_cases = pytest.mark.parametrize("case", CASES, ids=name_of)

SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.float64])
BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}


@st.composite
def partitions(draw: Any, rows: int) -> list[list[int]]:
    """Batches of any sizes from 1, in any order, that hold each row once."""
    order = draw(st.permutations(range(rows)))
    cuts = sorted(draw(st.sets(st.integers(1, rows - 1)))) if rows > 1 else []
    return [order[a:b] for a, b in itertools.pairwise([0, *cuts, rows])]


def pick(case: Case, data: Data, rows: list[int]) -> Data:
    return case.adapt(*tree_map(lambda tensor: tensor[rows], data))


def scale_of(case: Case, output: Any, target: Any) -> float:
    """Size of the losses that the mean adds, against which rounding is measured."""
    losses = case.oracle(output, target, "none").abs().sum()
    _, n = loss_pair(case.make())(output, target)
    return max(1e-3, (losses / n.clamp(min=1e-3)).item())


# --- laws over the table --------------------------------------------------------------


def test_every_torch_loss_is_a_case_or_refused():
    modules = (getattr(nn.modules.loss, name) for name in nn.modules.loss.__all__)
    losses = {cls.__name__ for cls in modules if issubclass(cls, nn.Module)}
    covered = {name_of(case).split("-")[0] for case in CASES}
    refused = {"LinearCrossEntropyLoss"}  # see test_parameters_are_refused
    assert losses <= covered | refused
    assert covered <= losses


@over_cases
@PER_CASE
@given(data=st.data(), seed=SEEDS, rows=st.integers(1, 12), dtype=DTYPES)
def test_any_batches_give_torchs_mean_of_everything(case, data, seed, rows, dtype):
    drawn = case.draw(Draw(seed, rows, dtype))
    everything = pick(case, drawn, list(range(rows)))
    batches = [pick(case, drawn, b) for b in data.draw(partitions(rows))]
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    loss = case.make(reduction=case.mean if case.mean != "mean" else reduction)
    check_loss(loss, *everything)
    expected = case.oracle(*everything).item()
    if math.isnan(expected):  # no weight at all
        with pytest.raises(ValueError, match="the mean of no data is undefined"):
            fold_mean(loss, batches)
    else:
        bound = BOUND[dtype] * scale_of(case, *everything)
        assert fold_mean(loss, batches) == pytest.approx(expected, rel=0, abs=bound)


@over_cases
@PER_CASE
@given(seed=SEEDS, rows=st.integers(1, 6))
def test_gradient_is_that_of_torchs_mean(case, seed, rows):
    drawn = case.draw(Draw(seed, rows, torch.float64))
    output, target = pick(case, drawn, list(range(rows)))
    outputs = [
        tensor.requires_grad_() for tensor in many(output) if tensor.is_floating_point()
    ]
    loss_sum, n = loss_pair(case.make(reduction=case.mean))(output, target)
    assert not n.requires_grad
    assert n.dtype in (torch.int64, torch.float64)
    assert n.is_floating_point() == is_weighted(case, target)
    assert loss_sum.dtype == torch.float64
    assert loss_sum.shape == n.shape == ()
    if n == 0:
        return  # the mean is NaN: nothing to follow
    ours = torch.autograd.grad(loss_sum / n, outputs)
    theirs = torch.autograd.grad(case.oracle(output, target), outputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@over_cases
@PER_CASE
@given(seed=SEEDS, weights=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_a_weight_is_how_often_a_sample_counts(case, seed, weights):
    rows = len(weights)
    drawn = case.draw(Draw(seed, rows, torch.float64))
    repeated = [row for row, weight in enumerate(weights) for _ in range(weight)]
    pair = loss_pair(case.make(reduction=case.mean))
    everything = pick(case, drawn, list(range(rows)))
    expected, count = 0.0, 0
    if repeated:
        expected, count = pair(*pick(case, drawn, repeated))
    for given_weights in (torch.tensor(weights), torch.tensor(weights).double()):
        loss_sum, n = pair(*everything, given_weights)
        torch.testing.assert_close(loss_sum.item(), float(expected))
        assert n == pytest.approx(float(count), rel=1e-15)
        assert loss_sum.shape == n.shape == ()
    ones = pair(*everything, torch.ones(rows, dtype=torch.int64))
    torch.testing.assert_close(ones, pair(*everything))


def is_weighted(case: Case, target: Any) -> bool:
    """Whether the loss divides by a sum of real weights, so that `n` is no count."""
    loss = case.make()
    indices = isinstance(target, Tensor) and not target.is_floating_point()
    weighted = isinstance(loss, (nn.NLLLoss, nn.CrossEntropyLoss))
    return weighted and indices and loss.weight is not None


def differentiated(case: Case) -> Callable[[Any, Any], Any]:
    """What a training step computes: the gradient, the sum and n."""
    pair = loss_pair(case.make(reduction=case.mean))

    def step(output: Any, target: Any) -> Any:
        # The lengths that may follow CTC's log_probs are integers: no gradient.
        floats = [tensor for tensor in many(output) if tensor.is_floating_point()]
        rest = many(output)[len(floats) :]

        def of(floats: list[Tensor]) -> Any:
            return pair((*floats, *rest), target)

        return torch.func.grad_and_value(of, has_aux=True)(floats)

    return step


@over_cases
def test_compiled_equals_eager(case):
    torch.compiler.reset()
    output, target = pick(case, case.draw(Draw(7, 5, torch.float32)), list(range(5)))
    step = differentiated(case)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(output, target), step(output, target), rtol=1e-6, atol=1e-7
    )


@over_cases
def test_a_module_is_left_as_it_is(case):
    data = pick(case, case.draw(Draw(3, 4, torch.float64)), [0, 1, 2, 3])
    loss = case.make(reduction="sum")
    before = {k: repr(v) for k, v in vars(loss).items()}
    check_loss(loss, *data)
    pair = loss_pair(loss)
    pair(*data)
    assert {k: repr(v) for k, v in vars(loss).items()} == before
    result = pair(*data)
    loss.reduction, loss.weight, loss.margin = "none", None, 99.0
    torch.testing.assert_close(pair(*data), result, rtol=0, atol=0)


@pytest.mark.parametrize("case", [c for c in CASES if c.alone], ids=name_of)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap in torch
def test_one_sample_without_batch_dimension(case):
    drawn = case.draw(Draw(5, 6, torch.float64))
    pair = loss_pair(case.make())
    total, count = torch.vmap(pair)(*drawn)
    expected = pair(*drawn)
    torch.testing.assert_close((total.sum(), count.sum()), expected, rtol=1e-12, atol=0)
    for row in range(6):
        sample = tree_map(lambda tensor, row=row: tensor[row], drawn)
        loss_sum, n = pair(*sample)
        if n > 0:
            torch.testing.assert_close(loss_sum / n, case.oracle(*sample))


def test_ctc_of_one_sample():
    log_probs, (labels, _, _) = ctc_data(Draw(5, 1, torch.float64), blank=0)
    for loss in (nn.CTCLoss(), nn.CTCLoss(zero_infinity=True)):
        for lengths in [(torch.tensor(9), torch.tensor(3)), ((9,), (3,))]:
            target = (labels[0], *lengths)
            check_loss(loss, log_probs[0], target)
            loss_sum, n = loss_pair(loss)(log_probs[0], target)
            expected = loss(log_probs[0], *target)
            torch.testing.assert_close(loss_sum / n, expected)


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_sample_too_short_for_its_labels(zero_infinity):
    torch.compiler.reset()
    log_probs, (labels, _, _) = ctc_data(Draw(1, 2, torch.float64), blank=0)
    target = (labels, torch.tensor([9, 1]), torch.tensor([3, 3]))
    loss = nn.CTCLoss(zero_infinity=zero_infinity)
    pair = loss_pair(loss)
    compiled = torch.compile(pair, backend="aot_eager", fullgraph=True)
    expected = loss(log_probs.transpose(0, 1), *target)
    for f in (pair, compiled):
        loss_sum, n = f(log_probs.transpose(0, 1), target)
        if zero_infinity:
            torch.testing.assert_close(loss_sum / n, expected)
        else:
            assert not loss_sum.isfinite()  # compiled, it is NaN


@over_cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(case, dtype):
    drawn = pick(case, case.draw(Draw(2, 4, torch.float32)), [0, 1, 2, 3])
    half = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, drawn)
    wide = tree_map(lambda t: t.float() if t.is_floating_point() else t, half)
    pair = loss_pair(case.make())
    check_loss(case.make(), *half)
    torch.testing.assert_close(pair(*half), pair(*wide), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_a_batch_without_labels_weighs_nothing(smoothing, weight):
    loss = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    output = Draw(0, 4, torch.float64).real(C)
    nothing = output, torch.full((4,), -100)
    something = output, torch.tensor([0, 1, 1, 3])
    loss_sum, n = loss_pair(loss)(*nothing)
    assert loss_sum == n == 0
    assert fold_mean(loss, [nothing, something]) == fold_mean(loss, [something])
    with pytest.raises(ValueError, match="the mean of no data is undefined"):
        fold_mean(loss, [nothing])
    empty = output[:0], torch.empty(0, dtype=torch.int64)
    assert fold_mean(loss, [empty, something]) == fold_mean(loss, [something])


def test_counts_stay_exact_past_float32():
    losses = torch.zeros(1).expand(2**24 + 1)
    _, n = loss_pair(lambda output, target: output)(losses, None)
    assert n == 2**24 + 1
    assert n.dtype == torch.int64


def test_weights_count_exactly_past_float32():
    losses = torch.zeros(2)
    weights = torch.tensor([2.0**24, 1.0])
    for given_weights in (weights, weights.long(), weights.double()):
        _, n = loss_pair(lambda output, target: output)(losses, None, given_weights)
        assert n == 2**24 + 1


def test_an_infinite_loss_of_an_absent_sample_is_absent():
    output = torch.tensor([1.0, math.inf], requires_grad=True)
    weights = torch.tensor([2, 0])
    loss_sum, n = loss_pair(nn.L1Loss())(output, torch.zeros(2), weights)
    assert (loss_sum, n) == (2, 2)
    assert torch.autograd.grad(loss_sum, output)[0].tolist() == [2, 0]


def singular(name):
    """A loss, and data of three samples whose last has no finite derivative."""
    if name == "CTCLoss":  # too short for its labels
        labels = torch.tensor([[1, 2], [3, 1], [1, 1]])
        target = labels, torch.tensor([3, 3, 2]), torch.tensor([2, 2, 2])
        return nn.CTCLoss(), torch.randn(3, 3, 4).log_softmax(2), target
    if name == "PoissonNLLLoss":
        output = torch.tensor([1.0, 2.0, 0.0])
        return nn.PoissonNLLLoss(log_input=False, eps=0.0), output, torch.ones(3)
    target = torch.ones(3), torch.tensor([1.0, 2.0, -1.0])
    return nn.GaussianNLLLoss(), torch.zeros(3), target


@pytest.mark.parametrize("name", ["CTCLoss", "PoissonNLLLoss", "GaussianNLLLoss"])
def test_no_gradient_comes_from_an_absent_sample(name):
    loss, output, target = singular(name)
    output.requires_grad_()
    samples = 1 if name == "CTCLoss" else 0
    for weights in (torch.tensor([1, 2, 0]), torch.tensor([0, 0, 0])):
        loss_sum, _ = loss_pair(loss)(output, target, weights)
        (gradient,) = torch.autograd.grad(loss_sum, output)
        assert gradient.isfinite().all()
        assert not gradient.select(samples, 2).any()
        assert gradient.any() == weights.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_weights_are_applied_in_float64(dtype):
    weights = torch.full((5000,), 100).to(dtype)
    for losses in (torch.ones(5000, dtype=torch.bool), torch.ones(5000).half()):
        loss_sum, n = loss_pair(lambda output, target: output)(losses, None, weights)
        assert (loss_sum, n) == (500_000, 500_000)
        assert loss_sum.dtype == torch.float64


WRONG_WEIGHTS = {
    "per element": (torch.ones(4, 3), r"weights has shape \(4, 3\).*shape \(4,\)"),
    "too few": (torch.ones(3), r"weights has shape \(3,\)"),
    "a list": ([1, 1, 1, 1], "weights must be a tensor of real numbers, got list"),
    "complex": (torch.ones(4, dtype=torch.complex64), "got torch.complex64"),
    "negative": (torch.tensor([1, 1, -1, 1]), r"weights\[2\] is negative"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_are_none_are_refused(name):
    weights, words = WRONG_WEIGHTS[name]
    for loss in (nn.MSELoss(), per_sample):
        with pytest.raises((ValueError, TypeError), match=words):
            check_loss(loss, torch.ones(4, 3), torch.ones(4, 3), weights)


def test_weights_are_refused_where_they_cannot_be_applied():
    x = torch.ones(4)
    added_up = [
        lambda output, target: (output.sum(), 4),
        batch_mean(lambda output, target: output.mean()),
    ]
    for loss in added_up:
        with pytest.raises(ValueError, match="so that they cannot be applied"):
            loss_pair(loss)(x, x, x)
    with pytest.raises(ValueError, match=r"\(B,\) for a batch of B"):
        loss_pair(nn.CrossEntropyLoss())(x, torch.tensor(1), torch.tensor(1.0))


# --- laws in exact arithmetic ---------------------------------------------------------

NUMBERS = st.integers(-8, 8)
VECTORS = st.lists(NUMBERS, min_size=C, max_size=C)
LABELS = st.integers(0, C - 1)
INTEGER_WEIGHT = (1, 3, 0, 5)
Row = tuple[Any, Any]


def hinges(x: list[int], y: int) -> Fraction:
    return Fraction(sum(max(0, 1 - x[y] + x[j]) for j in range(C) if j != y), C)


def label_hinges(x: list[int], y: list[int]) -> Fraction:
    own = list(itertools.takewhile(lambda label: label >= 0, y))
    others = [j for j in range(C) if j not in own]
    return Fraction(sum(max(0, 1 - x[i] + x[j]) for i in own for j in others), C)


def huber(a: int, b: int) -> Fraction:
    return Fraction((a - b) ** 2, 2) if abs(a - b) < 2 else 2 * abs(a - b) - Fraction(2)


# Each: the loss, output and target of one row, (weight * loss, weight) of that row.
EXACT: list[tuple[nn.Module, Any, Any, Callable[[Any, Any], tuple[Any, Any]]]] = [
    (nn.L1Loss(), NUMBERS, NUMBERS, lambda a, b: (abs(a - b), 1)),
    (nn.MSELoss(), NUMBERS, NUMBERS, lambda a, b: ((a - b) ** 2, 1)),
    (nn.HuberLoss(delta=2.0), NUMBERS, NUMBERS, lambda a, b: (huber(a, b), 1)),
    (
        nn.SmoothL1Loss(beta=2.0),
        NUMBERS,
        NUMBERS,
        lambda a, b: (huber(a, b) / 2, 1),
    ),
    (
        nn.HingeEmbeddingLoss(margin=3.0),
        NUMBERS,
        st.sampled_from([-1, 1]),
        lambda a, y: (a if y == 1 else max(0, 3 - a), 1),
    ),
    (
        nn.MarginRankingLoss(margin=2.0),
        st.tuples(NUMBERS, NUMBERS),
        st.sampled_from([-1, 1]),
        lambda x, y: (max(0, -y * (x[0] - x[1]) + 2), 1),
    ),
    (nn.MultiMarginLoss(), VECTORS, LABELS, lambda x, y: (hinges(x, y), 1)),
    (
        nn.MultiMarginLoss(weight=torch.tensor(INTEGER_WEIGHT).double()),
        VECTORS,
        LABELS,
        lambda x, y: (INTEGER_WEIGHT[y] * hinges(x, y), 1),
    ),
    (
        nn.MultiLabelMarginLoss(),
        VECTORS,
        st.permutations([0, 1, 2, 3]).map(lambda y: [*y[:2], -1, 0]),
        lambda x, y: (label_hinges(x, y), 1),
    ),
    (nn.NLLLoss(), VECTORS, LABELS, lambda x, y: (-x[y], 1)),
    (
        nn.NLLLoss(torch.tensor(INTEGER_WEIGHT).double(), ignore_index=255),
        VECTORS,
        st.sampled_from([0, 1, 2, 3, 255]),
        lambda x, y: (
            (0, 0) if y == 255 else (-INTEGER_WEIGHT[y] * x[y], INTEGER_WEIGHT[y])
        ),
    ),
    (
        nn.KLDivLoss(reduction="batchmean"),
        VECTORS,
        st.lists(st.sampled_from([0, 1]), min_size=C, max_size=C),
        lambda x, p: (-sum(a * b for a, b in zip(x, p, strict=True)), 1),
    ),
]


@pytest.mark.parametrize(("loss", "outputs", "targets", "oracle"), EXACT)
@PER_CASE
@given(data=st.data())
def test_integers_are_folded_exactly(loss, outputs, targets, oracle, data):
    rows = data.draw(st.lists(st.tuples(outputs, targets), min_size=1, max_size=9))
    batches = [
        (
            floats([rows[i][0] for i in batch]),
            targets_of(loss, [rows[i][1] for i in batch]),
        )
        for batch in data.draw(partitions(len(rows)))
    ]
    total, weight = (
        sum(part) for part in zip(*(oracle(*row) for row in rows), strict=True)
    )
    if weight == 0:
        with pytest.raises(ValueError, match="the mean of no data is undefined"):
            fold_mean(loss, batches)
    else:
        expected = float(Fraction(total) / Fraction(weight))
        assert fold_mean(loss, batches) == expected


def floats(rows: list[Any]) -> Any:
    if isinstance(rows[0], tuple):
        return tuple(floats(list(column)) for column in zip(*rows, strict=True))
    return torch.tensor(rows, dtype=torch.float64)


def targets_of(loss: nn.Module, rows: list[Any]) -> Tensor:
    labels = (nn.NLLLoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss)
    dtype = torch.int64 if isinstance(loss, labels) else torch.float64
    return torch.tensor(rows, dtype=dtype)


# --- teeth ----------------------------------------------------------------------------

WEIGHTED = nn.CrossEntropyLoss(WEIGHT + 0.1, ignore_index=-1)
PLAIN = nn.CrossEntropyLoss(ignore_index=-1)


def mean_of_means(loss: nn.Module, batches: list[Data]) -> Tensor:
    return torch.stack([loss(*batch) for batch in batches]).mean()


def mean_by_batch_size(loss: nn.Module, batches: list[Data]) -> Tensor:
    sizes = [len(target) for _, target in batches]
    means = [loss(*batch) * size for batch, size in zip(batches, sizes, strict=True)]
    return torch.stack(means).sum() / sum(sizes)


def mean_counting_ignored(loss: nn.Module, batches: list[Data]) -> Tensor:
    total = sum(loss_pair(loss)(*batch)[0] for batch in batches)
    return total / sum(len(target) for _, target in batches)


@pytest.mark.parametrize(
    ("wrong", "loss", "ignored"),
    [
        (mean_of_means, PLAIN, 0),  # 0: no label is ignored
        (mean_of_means, WEIGHTED, 0),
        (mean_by_batch_size, WEIGHTED, 0),
        (mean_by_batch_size, PLAIN, -1),
        (mean_counting_ignored, PLAIN, -1),
        (mean_counting_ignored, WEIGHTED, -1),
    ],
)
def test_a_wrong_denominator_is_found(wrong, loss, ignored):
    @st.composite
    def splits(draw: Any) -> list[Data]:
        rows = draw(st.integers(1, 6))
        drawn = Draw(draw(SEEDS), rows, torch.float64)
        output, target = drawn.real(C), drawn.label(ignored)
        return [(output[b], target[b]) for b in draw(partitions(rows))]

    def refutes(batches: list[Data]) -> bool:
        # All pairs add up to torch's mean, and the wrong way to add them does not.
        everything = tuple(torch.cat(part) for part in zip(*batches, strict=True))
        right = loss.double()(*everything)
        if right.isnan():
            return False
        assert fold_mean(loss, batches) == pytest.approx(right.item())
        return bool((wrong(loss, batches) - right).abs() > 1e-6)

    quick = settings(max_examples=500, deadline=None, database=None)
    assert refutes(find(splits(), refutes, settings=quick))


# --- users' functions -----------------------------------------------------------------


def per_sample(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="none").mean(1)


def test_a_function_returns_losses_or_a_pair():
    output, target = Draw(0, 5, torch.float32).real(D), torch.zeros(5, D)
    loss_sum, n = loss_pair(per_sample)(output, target)
    assert (n, n.dtype, loss_sum.dtype) == (5, torch.int64, torch.float64)
    torch.testing.assert_close((loss_sum / n).float(), nn.MSELoss()(output, target))
    for weight in (2, 2.0, torch.tensor(2), torch.tensor([2.0]), torch.tensor([True])):
        pair = loss_pair(lambda output, target, w=weight: (output.sum(), w))
        loss_sum, n = pair(output, target)
        assert n == float(weight)
        real = isinstance(weight, float) or (
            torch.is_tensor(weight) and weight.is_floating_point()
        )
        assert n.dtype == (torch.float64 if real else torch.int64)
        again = loss_pair(pair)(output, target)
        assert all(
            a == b and a.dtype == b.dtype
            for a, b in zip(again, (loss_sum, n), strict=True)
        )
    check_loss(per_sample, output, target)


def test_a_subclass_counts_as_its_base_unless_it_overrides_forward():
    class Named(nn.CrossEntropyLoss):
        pass

    class Focal(nn.CrossEntropyLoss):
        def forward(self, input, target):
            losses = F.cross_entropy(input, target, reduction="none")
            return losses * (1 - (-losses).exp()) ** 2

    output, target = Draw(0, 3, torch.float64).real(C), torch.tensor([0, -100, 2])
    assert loss_pair(Named())(output, target)[1] == 2
    assert loss_pair(Focal())(output, target)[1] == 3


def test_weights_follow_the_output():
    output, target = torch.zeros(2, C, dtype=torch.float64), torch.tensor([0, 1])
    loss_sum, n = loss_pair(nn.CrossEntropyLoss(WEIGHT.float()))(output, target)
    assert n == 3.5
    meta = loss_pair(nn.CrossEntropyLoss(WEIGHT))(output.to("meta"), target.to("meta"))
    assert all(part.device.type == "meta" for part in meta)
    assert loss_sum.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_labels_may_be_bytes(dtype):
    loss = nn.CrossEntropyLoss(ignore_index=255, label_smoothing=0.1)
    target = torch.tensor([[0, 255], [1, 3]]).to(dtype)
    check_loss(loss, torch.zeros(2, C, 2), target)
    assert loss_pair(loss)(torch.zeros(2, C, 2), target)[1] == 3


def test_batch_mean_weighs_by_rows():
    output, target = Draw(0, 5, torch.float64).real(D), torch.zeros(5, D).double()
    mean = batch_mean(lambda output, target: per_sample(output, target).mean())
    batches = [(output[:2], target[:2]), (output[2:], target[2:])]
    expected = nn.MSELoss()(output, target).item()
    assert fold_mean(mean, batches) == pytest.approx(expected, rel=1e-14)
    tree = batch_mean(lambda output, target: output.mean())
    assert tree(output, {"a": target, "b": [target[:, 0]]})[1] == 5


def test_checking_leaves_the_random_state_alone():
    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return (output + torch.randn_like(output) - target) ** 2

    before = torch.get_rng_state()
    check_loss(noisy, torch.zeros(2), torch.zeros(2))
    assert torch.equal(torch.get_rng_state(), before)


# --- refusals -------------------------------------------------------------------------

X, X1 = torch.zeros(4, C), torch.zeros(4, 1)
Y = torch.tensor([0, 1, 2, 3])
ONES, HALVES = torch.ones(4, C), torch.full((4, C), 0.5)
LOG_PROBS, TEXT = torch.zeros(9, 2, C), torch.tensor([[1, 2], [3, -1]])

# Shapes and dtypes are refused by the pair too, so also while a step is traced.
STATIC: list[tuple[Any, Any, Any, type[Exception], str]] = [
    (nn.MSELoss(), X1, torch.zeros(4), ValueError, r"\(4, 1\).*\(4,\).*squeeze\(1\)"),
    (nn.MSELoss(), torch.zeros(4), X1, ValueError, r"target.*squeeze\(1\)"),
    (nn.L1Loss(), X, X[:3], ValueError, "batch sizes differ"),
    (nn.L1Loss(), X, torch.zeros(4, 2), ValueError, "same shape"),
    (nn.KLDivLoss(), X, X[0], ValueError, r"batch sizes|same shape"),
    (nn.MSELoss(), X.to(torch.complex64), X, TypeError, "complex"),
    (nn.MSELoss(), (X, X), X, TypeError, "takes output, target, but got 3 values"),
    (nn.MSELoss(), {"logits": X}, X, TypeError, "output is dict"),
    (nn.MSELoss(), X, None, TypeError, "got 1 values"),
    (nn.BCEWithLogitsLoss(), X, ONES.long(), TypeError, r"target.to\(output.dtype\)"),
    (nn.HuberLoss(), X, ONES.double(), TypeError, r"target.to\(output.dtype\)"),
    (nn.CrossEntropyLoss(), X, Y.float(), TypeError, r"target.long\(\).*probabilities"),
    (nn.NLLLoss(), X, Y.float(), TypeError, r"target.long\(\)\.$"),
    (nn.CrossEntropyLoss(), X, Y.int(), TypeError, r"int32.*target.long\(\)"),
    (nn.MultiMarginLoss(), X, Y.short(), TypeError, r"target.long\(\)"),
    (nn.MultiLabelMarginLoss(), X, ONES.int(), TypeError, r"target.long\(\)"),
    (nn.CrossEntropyLoss(), X, Y[:3], ValueError, "batch sizes differ"),
    (nn.CrossEntropyLoss(), X, Y[:, None], ValueError, r"target.squeeze\(-1\)"),
    (nn.CrossEntropyLoss(), X, ONES.long(), ValueError, r"target.argmax\(1\)"),
    (nn.NLLLoss(), X, HALVES, ValueError, r"target.argmax\(1\)\.$"),
    (
        nn.CrossEntropyLoss(),
        torch.zeros(4, 5, C),
        torch.zeros(4, 5),
        ValueError,
        "movedim",
    ),
    (nn.CrossEntropyLoss(), X.sum(), Y[0], ValueError, "dimension of classes"),
    (nn.CrossEntropyLoss(), X, torch.zeros(4, 2, 2), ValueError, "classes in dim"),
    (nn.CosineEmbeddingLoss(), (X, X), X1, ValueError, r"\(N, D\)"),
    (nn.MarginRankingLoss(), (X1, X1), Y, ValueError, "squeeze"),
    (nn.TripletMarginLoss(), (X, X), None, TypeError, "anchor, positive, negative"),
    (nn.GaussianNLLLoss(), (X1, X1), torch.ones(4), ValueError, "squeeze"),
    (nn.GaussianNLLLoss(), (X, X[:2]), X, ValueError, "var has shape"),
    (nn.CTCLoss(), X[0], (TEXT, Y[:2], Y[:2]), ValueError, "time before batch"),
    (nn.CTCLoss(), LOG_PROBS, (TEXT, Y, Y), ValueError, "input_lengths has shape"),
    (F.cross_entropy, X, Y, ValueError, r"nn.CrossEntropyLoss\(\)"),
    (functools.partial(F.cross_entropy, weight=X[0]), X, Y, ValueError, "nn.Cross"),
    (
        F.binary_cross_entropy_with_logits,
        X,
        X,
        ValueError,
        r"nn.BCEWithLogitsLoss\(\)",
    ),
    (F.smooth_l1_loss, X, X, ValueError, r"nn.SmoothL1Loss\(\)"),
    (lambda x, y: (x - y).mean(), X, X, ValueError, "lossloop.batch_mean"),
    (lambda x, y: 1.0, X, X, TypeError, "returned float"),
    (lambda x, y: None, X, X, TypeError, "returned NoneType"),
    (lambda x, y: (x, 4), X, X, ValueError, r"\(4, 4\)"),
    (lambda x, y: (x.sum(), "4"), X, X, TypeError, r"\(Tensor, str\)"),
    (lambda x, y: (1.0, 4), X, X, TypeError, r"\(float, int\)"),
    (lambda x, y: (x.sum(), y), X, X, ValueError, "one number"),
    (lambda x, y: x * 1j, X, X, TypeError, "complex"),
    (lambda x, y: (x - y) ** 2, X1, torch.zeros(4), ValueError, "broadcast.*squeeze"),
    (batch_mean(lambda x, y: x), X, X, ValueError, "not one mean"),
    (batch_mean(lambda x, y: 1.0), X, X, TypeError, "returned float"),
    (batch_mean(lambda x, y: x.mean()), X, (X, X[:2]), ValueError, "do not share"),
    (batch_mean(lambda x, y: x.mean()), X, None, ValueError, "do not share"),
    (batch_mean(lambda x, y: x.mean()), X, X.sum(), ValueError, "do not share"),
]

# Values are refused by the check alone, which reads them on the host.
VALUES: list[tuple[Any, Any, Any, str]] = [
    (nn.CrossEntropyLoss(), X, Y + 1, r"target\[3\] is 4.*4 classes.*from 0"),
    (nn.CrossEntropyLoss(), X, Y - 1, r"target\[0\] is -1.*ignore_index, -100"),
    (nn.NLLLoss(ignore_index=9), X, Y + 7, r"target\[0\] is 7"),
    (
        nn.NLLLoss(),
        torch.zeros(1, C, 2),
        torch.tensor([[0, 8]]),
        r"target\[0, 1\] is 8",
    ),
    (nn.CrossEntropyLoss(), X[0], Y[3] + 1, r"target is 4"),
    (nn.MultiMarginLoss(), X, Y + 1, r"target\[3\] is 4"),
    (nn.MultiLabelMarginLoss(), X, (Y + 1).expand(4, C), r"target\[0, 3\] is 4.*-1"),
    (nn.CrossEntropyLoss(), X, -HALVES, r"target\[0, 0\] is -0.5.*softmax"),
    (nn.KLDivLoss(), X, -HALVES, "log_target"),
    (nn.BCELoss(), HALVES * 4, HALVES, r"output\[0, 0\] is 2.0.*BCEWithLogitsLoss"),
    (nn.BCELoss(), HALVES, -HALVES, r"target\[0, 0\] is -0.5.*\[0, 1\]"),
    (nn.BCEWithLogitsLoss(), X, HALVES * 3, r"target\[0, 0\] is 1.5"),
    (nn.HingeEmbeddingLoss(), X, X, r"target\[0, 0\] is 0.0.*2 \* target - 1"),
    (nn.SoftMarginLoss(), X, X, "-1 or 1"),
    (nn.MarginRankingLoss(), (X, X), X, "-1 or 1"),
    (nn.CosineEmbeddingLoss(), (X, X), Y.float(), r"target\[0\] is 0.0"),
    (nn.GaussianNLLLoss(), (X, -ONES), X, r"var\[0, 0\] is -1.0"),
    (nn.CTCLoss(), LOG_PROBS, (TEXT, Y[:2] + 8, Y[:2] + 1), r"targets\[1, 1\] is -1"),
    (nn.CTCLoss(blank=3), LOG_PROBS, (TEXT, Y[:2] + 8, Y[:2]), r"targets\[1, 0\] is 3"),
    (lambda x, y: F.mse_loss(x, y, reduction="none").mean(1), X, X[0], "broadcast"),
]


@pytest.mark.parametrize(("loss", "output", "target", "kind", "words"), STATIC)
def test_shapes_and_types_are_refused(loss, output, target, kind, words):
    for refuse in (check_loss, lambda loss, *data: loss_pair(loss)(*data)):
        with pytest.raises(kind, match=words):
            refuse(loss, output, target)


@pytest.mark.parametrize(("loss", "output", "target", "words"), VALUES)
def test_values_are_refused(loss, output, target, words):
    with pytest.raises(ValueError, match=words):
        check_loss(loss, output, target)


def test_padding_of_ctc_is_no_label():
    lengths = torch.tensor([9, 9]), torch.tensor([2, 1])
    check_loss(nn.CTCLoss(), LOG_PROBS.log_softmax(2), (TEXT, *lengths))


def test_a_negative_variance_in_a_step_is_not_clamped_away():
    loss_sum, _ = loss_pair(nn.GaussianNLLLoss())((X, -ONES), X)
    assert loss_sum.isnan()


@pytest.mark.parametrize("loss", ["mse", None, nn.MSELoss, nn.Linear(2, 2)], ids=str)
@pytest.mark.parametrize("door", [loss_pair, batch_mean])
def test_what_is_no_loss_is_refused(loss, door):
    words = {"mse": "cannot be called", "None": "cannot", "Linear": "requires_grad_"}
    key = type(loss).__name__ if isinstance(loss, nn.Module) else str(loss)
    with pytest.raises(TypeError, match=words.get(key, r"MSELoss\(\)")):
        door(loss)


@pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no such loss"
)
def test_parameters_are_refused():
    with pytest.raises(TypeError, match=r"LinearCrossEntropyLoss.*lossloop.objective"):
        loss_pair(nn.LinearCrossEntropyLoss(2, 2))

    class WithLoss(nn.Module):  # the remedy of the message, against torch's own mean
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 5)
            options = {"weight": torch.tensor([1.0, 2, 3, 4]), "ignore_index": 2}
            self.loss = nn.LinearCrossEntropyLoss(5, 4, reduction="none", **options)

    def summed(model: Any, batch: Any) -> Any:
        x, y = batch
        return model.loss(model.body(x), y).sum(), model.loss.weight[y[y != 2]].sum()

    model = WithLoss()
    goal = ll.objective(model, summed)
    x, y = torch.randn(9, 5), torch.arange(9) % 4
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    mean = ll.fold_eval(ll.make_eval_step(goal), goal.init(), batches)
    model.loss.reduction = "mean"
    with torch.no_grad():
        expected = model.loss(model.body(x), y).item()
    assert mean.value() == pytest.approx(expected, rel=1e-6)


def test_a_frozen_module_is_a_function():
    features = nn.Linear(D, 2).requires_grad_(False)

    class Perceptual(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = features

        def forward(self, output, target):
            return (self.features(output) - self.features(target)).square().mean(1)

    assert loss_pair(Perceptual())(torch.zeros(4, D), torch.ones(4, D))[1] == 4


def test_batch_mean_of_a_known_loss_is_refused():
    with pytest.raises(TypeError, match="without batch_mean"):
        batch_mean(nn.CrossEntropyLoss())


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction is 'batchmean'"):
        loss_pair(nn.MSELoss(reduction="batchmean"))
