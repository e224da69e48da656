"""Hypothesis strategies for what a training loop is given: data, weights, models."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy, sampled_from
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset, default_collate

from lossloop._random import host_generators_kept, seeded
from lossloop._types import Batch

Shape = tuple[int, ...]

_CPU = torch.device("cpu")
_DRAWN = 128  # numbers at most for one tensor; a larger one repeats them
_SEEDS = st.integers(0, 2**32 - 1)


# --- ways to cut data into batches ----------------------------------------------------


def partitions(n: int) -> SearchStrategy[list[list[int]]]:
    """Every way to cut `n` samples into batches, in any order.

    Shrinks towards one batch in natural order.

    Args:
        n: Number of samples, at least 1.

    Returns:
        A strategy for lists of batches: lists of indices, none empty, that together
        hold each of 0 to n - 1 once.

    Raises:
        ValueError: If `n` is no integer, or less than 1.

    Example:
        >>> from hypothesis import find
        >>> find(partitions(3), lambda batches: len(batches) > 1)
        [[0], [1, 2]]
    """
    _check_count("n", n)
    return _partitions(n)


@st.composite
def _partitions(draw: DrawFn, n: int) -> list[list[int]]:
    order = draw(st.permutations(range(n)))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    return [order[a:b] for a, b in itertools.pairwise([0, *cuts, n])]


def batches(dataset: Any) -> SearchStrategy[list[Batch]]:
    """Every way to hand out a data set in batches, in any order.

    Shrinks towards one batch that holds the data set as it is.

    Args:
        dataset: A pytree of tensors that share their first dimension, the samples; or
            a map-style `Dataset`, which is read once, now, and collated as a
            `DataLoader` does.

    Returns:
        A strategy for lists of batches, none empty, that together hold each sample
        once. Each batch has the form of the data set, and its tensors are copies
        without gradient.

    Raises:
        TypeError: If it holds anything but tensors, or is an `IterableDataset`.
        ValueError: If its tensors differ in length, or it is empty.

    Example:
        >>> from hypothesis import find
        >>> dataset = {"x": torch.tensor([1, 2, 3])}
        >>> find(batches(dataset), lambda batches: len(batches[-1]["x"]) == 2)
        [{'x': tensor([1])}, {'x': tensor([2, 3])}]
    """
    samples = _collated(dataset)
    sizes: dict[str, int] = {}
    for path, leaf in pytree.tree_flatten_with_path(samples)[0]:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"dataset{pytree.keystr(path)} is a {type(leaf).__name__}. Give a "
                f"pytree of tensors, or a map-style Dataset whose samples collate into "
                f"one."
            )
        sizes[pytree.keystr(path)] = len(leaf) if leaf.ndim else 0
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        found = ", ".join(f"dataset{place}: {size}" for place, size in sizes.items())
        raise ValueError(
            f"dataset has tensors of these lengths: {found or 'none at all'}. All must "
            f"hold the same number of samples, at least one."
        )
    return _batches(samples, next(iter(sizes.values())))


@st.composite
def _batches(draw: DrawFn, samples: Batch, n: int) -> list[Batch]:
    def take(batch: list[int]) -> Batch:
        def rows(tensor: Tensor) -> Tensor:
            return tensor.detach()[batch]

        return pytree.tree_map(rows, samples)

    return [take(batch) for batch in draw(_partitions(n))]


def _collated(dataset: Any) -> Batch:
    if not isinstance(dataset, Dataset):
        return dataset
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}, whose samples have no indices. "
            f"Give a map-style Dataset, with __getitem__ and __len__, or tensors."
        )
    # Augmentation draws random numbers; the caller's generators are not to move.
    with seeded(0, _CPU), host_generators_kept():
        samples = [dataset[i] for i in range(len(dataset))]
    return default_collate(samples) if samples else ()


# --- weights --------------------------------------------------------------------------

# Simplest first. In float32, 2**24 + 1 is 2**24: a sum kept in it loses samples.
_WEIGHTS = (1, 0, 2, 3, 4, 5, 7, 0.5, 0.25, 0.125, 0.75, 1.5, 3.5, 2**24)


def sample_weights(
    n: int, *, dtype: torch.dtype = torch.float64
) -> SearchStrategy[Tensor]:
    """Weights of samples: zeros, ones, small numbers, and now and then 2**24.

    All are multiples of 1/8, so that float64 adds them without rounding. A sum in
    float32 is wrong as soon as it passes 2**24. Shrinks towards ones.

    Args:
        n: Number of samples, at least 1.
        dtype: float64, float32, or int64 for whole numbers only.

    Returns:
        A strategy for tensors of shape (n,), not negative, at least one positive.

    Raises:
        ValueError: If `n` is no integer or less than 1, or for another dtype.

    Example:
        >>> from hypothesis import find
        >>> find(sample_weights(3), lambda weights: weights.sum() > 2**24)
        tensor([1.0000e+00, 1.0000e+00, 1.6777e+07], dtype=torch.float64)
    """
    _check_count("n", n)
    if dtype not in (torch.float64, torch.float32, torch.int64):
        raise ValueError(
            f"dtype is {dtype}, which does not hold all weights. Give torch.float64, "
            f"torch.float32 or torch.int64."
        )
    whole = not dtype.is_floating_point
    known = sampled_from([w for w in _WEIGHTS if not whole or w % 1 == 0])
    numbers = st.lists(known, min_size=n, max_size=n).filter(any)
    return numbers.map(functools.partial(torch.tensor, dtype=dtype))


# --- losses of torch.nn and their data ------------------------------------------------


def torch_losses(
    classes: Iterable[type[nn.Module]] | None = None,
) -> SearchStrategy[nn.Module]:
    """Loss modules of `torch.nn`, with options drawn.

    All reduce by their mean, `KLDivLoss` by "batchmean", because torch warns about its
    "mean". Each is a new module whose text shows its options. Shrinks towards the
    first class and its defaults.

    Args:
        classes: Loss classes to choose from; default all that lossloop knows.

    Returns:
        A strategy for loss modules, with weights in float32 where they have some; at
        least one class of each is neither ignored nor of weight 0.

    Raises:
        TypeError: If one of `classes` is no loss class of `torch.nn` that lossloop
            knows.
        ValueError: If there are none.

    Example:
        >>> from hypothesis import find
        >>> losses = torch_losses([nn.MSELoss, nn.SmoothL1Loss])
        >>> find(losses, lambda loss: isinstance(loss, nn.SmoothL1Loss))
        SmoothL1Loss(beta=1.0)
    """
    chosen = list(_OPTIONS if classes is None else classes)
    for kind in chosen:
        if kind not in _OPTIONS:
            raise TypeError(f"classes has {kind!r}. {_known()}")
    if not chosen:
        raise ValueError(f"classes is empty. {_known()}")
    return sampled_from(chosen).flatmap(_loss_modules)


@st.composite
def _loss_modules(draw: DrawFn, kind: Any) -> nn.Module:
    options = {name: draw(choice) for name, choice in _OPTIONS[kind].items()}
    module = kind(**options)
    # torch's own text shows no options, and so would no counterexample.
    text = ", ".join(f"{k}={v!r}" for k, v in options.items() if v is not None)
    module.extra_repr = functools.partial(str, text)
    return module


def loss_data(
    loss_fn: nn.Module, n: int | None = None, *, dtype: torch.dtype = torch.float32
) -> SearchStrategy[tuple[Any, Any]]:
    """Output and target that a loss of `torch.nn` takes.

    Numbers are multiples of 1/8 from -2 to 2, in half of the examples with random
    digits behind them, and shrink towards 0. Probabilities and their logarithms are
    made from such numbers where a loss wants them. Some class indices are
    `ignore_index`; at least one counts, if the loss gives any class a weight, so that
    the mean is defined.

    Losses of more than two tensors get tuples, as `loss_pair` takes them: for
    `GaussianNLLLoss` the variance, and for `CTCLoss` the lengths of the inputs, come
    with the output or with the target.

    Args:
        loss_fn: A loss module of `torch.nn`. Its options decide on shapes and values.
        n: Number of samples, at least 1; default drawn from 1 to 8. They are in
            dimension 0, but for the `log_probs` of `CTCLoss`, which are T x N x C.
        dtype: Of all floating-point tensors.

    Returns:
        A strategy for `(output, target)`.

    Raises:
        TypeError: If `loss_fn` is no loss of `torch.nn` that lossloop knows.
        ValueError: If `n` is no integer, or less than 1; or if `dtype` is not a
            floating-point dtype.

    Example:
        >>> from hypothesis import find
        >>> data = loss_data(nn.CrossEntropyLoss(ignore_index=0), n=2)
        >>> output, target = find(data, lambda data: (data[1] == 0).any())
        >>> target
        tensor([0, 1])
    """
    if n is not None:
        _check_count("n", n)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}. Give one of floating point.")
    if not isinstance(loss_fn, tuple(_OPTIONS)):
        got = f"the class {loss_fn.__name__}" if isinstance(loss_fn, type) else loss_fn
        raise TypeError(f"loss_fn is {got}. {_known()}")
    return _loss_data(loss_fn, n, dtype)


def _known() -> str:
    names = ", ".join(kind.__name__ for kind in _OPTIONS)
    return f"The losses of torch.nn that lossloop knows are {names}."


class _Source:
    """Tensors of drawn numbers, with or without random digits behind them."""

    def __init__(self, draw: DrawFn, n: int) -> None:
        self.draw, self.n = draw, n
        # Only digits, not whole numbers: an example that does not need them still fails
        # when Hypothesis, to which None is simpler, takes them away.
        seed = draw(st.none() | _SEEDS)
        self.digits = None if seed is None else torch.Generator().manual_seed(seed)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Of a tensor that may have any: the samples, then up to two dimensions."""
        return (self.n, *self.draw(st.lists(st.integers(1, 2), max_size=2)))

    def features(self, module: nn.Module | None = None) -> tuple[int, int]:
        """A shape (N, C), with C as the weights of the module want it."""
        weight: Tensor | None = getattr(module, "weight", None)
        return self.n, self.draw(st.integers(2, 4)) if weight is None else len(weight)

    def integer(self, low: int, high: int, shape: Shape | None = None) -> Tensor:
        """From `low` to `high`, both included."""
        shape = self.shape if shape is None else shape
        size = torch.Size(shape).numel()
        # All in one draw, which is fast. It may be longer than needed, so that what was
        # drawn stays valid while Hypothesis takes samples away. It is read backwards,
        # because the last number stays largest while it shrinks: the first sample does.
        numbers = self.draw(st.binary(min_size=min(size, _DRAWN), max_size=_DRAWN))
        backwards = -1 - torch.arange(size) % len(numbers)
        numbers = torch.tensor(list(numbers))[backwards].reshape(shape)
        return low + numbers % (high + 1 - low)

    def real(self, shape: Shape | None = None) -> Tensor:
        number = self.integer(0, 32, shape)
        # 0, 1, -1, 2, -2, ...: the earlier shrink better.
        return self.eighths((number + 1) // 2 * (number % 2 * 2 - 1))

    def unit(self, shape: Shape | None = None) -> Tensor:
        """Within [0, 1]."""
        return self.eighths(self.integer(0, 8, shape)).clamp(0, 1)

    def eighths(self, whole: Tensor) -> Tensor:
        if self.digits is None:
            return whole.double() / 8
        digits = torch.rand(whole.shape, generator=self.digits, dtype=torch.float64)
        return (whole + digits - 0.5) / 8

    def sign(self, shape: Shape | None = None) -> Tensor:
        return 1 - 2 * self.integer(0, 1, shape).double()

    def distribution(self, shape: Shape) -> Tensor:
        """Probabilities that add up to 1 over dimension 1."""
        n, classes, *more = shape
        pair = self.integer(0, classes - 1, (2, n, *more))
        halves = nn.functional.one_hot(pair, classes).double().mean(0).movedim(-1, 1)
        if self.digits is None:
            return halves
        digits = torch.rand(shape, generator=self.digits, dtype=torch.float64)
        return (halves + digits.softmax(1)) / 2


@st.composite
def _loss_data(
    draw: DrawFn, loss_fn: nn.Module, n: int | None, dtype: torch.dtype
) -> tuple[Any, Any]:
    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    source = _Source(draw, draw(st.integers(1, 8)) if n is None else n)
    return pytree.tree_map(convert, _data(source, loss_fn))


def _data(s: _Source, module: nn.Module) -> tuple[Any, Any]:
    match module:
        case nn.HingeEmbeddingLoss() | nn.SoftMarginLoss():
            return s.real(), s.sign()
        case nn.PoissonNLLLoss():
            output = s.real() if module.log_input else s.unit() + 0.125
            return output, s.integer(0, 4).double()
        case nn.KLDivLoss():
            shape = *s.features(), *s.shape[1:]
            logs = s.real(shape).log_softmax(1)
            if module.log_target:
                return logs, s.real(shape).log_softmax(1)
            return logs, s.distribution(shape)
        case nn.BCELoss() | nn.BCEWithLogitsLoss():
            weights = [weight.shape for weight in module.buffers()]
            shape = (s.n, *torch.broadcast_shapes(*weights)) if weights else s.shape
            logits = isinstance(module, nn.BCEWithLogitsLoss)
            return s.real(shape) if logits else s.unit(shape), s.unit(shape)
        case nn.MultiLabelSoftMarginLoss():
            shape = s.features(module)
            return s.real(shape), s.unit(shape)
        case nn.MultiLabelMarginLoss():
            shape = n, classes = s.features()
            labels = s.integer(0, 7, shape).argsort(dim=1, stable=True)
            # The first -1 ends a list; the numbers behind it mean nothing.
            ends = torch.arange(classes) == s.integer(0, classes, (n, 1))
            return s.real(shape), labels.masked_fill(ends, -1)
        case nn.MultiMarginLoss():
            shape = n, classes = s.features(module)
            return s.real(shape), s.integer(0, classes - 1, (n,))
        case nn.NLLLoss() | nn.CrossEntropyLoss():
            return _class_data(s, module)
        case nn.MarginRankingLoss():
            return (s.real(), s.real()), s.sign()
        case nn.CosineEmbeddingLoss():
            shape = n, _ = s.features()
            return (s.real(shape), s.real(shape)), s.sign((n,))
        case nn.TripletMarginLoss() | nn.TripletMarginWithDistanceLoss():
            shape = s.features()
            return (s.real(shape), s.real(shape), s.real(shape)), ()
        case nn.GaussianNLLLoss():
            shapes = [s.shape]
            if len(s.shape) > 1:  # the last dimension of var may be 1 or missing
                shapes += [(*s.shape[:-1], 1), s.shape[:-1]]
            var = s.unit(s.draw(sampled_from(shapes))) + 0.125
            if s.draw(st.booleans()):
                return (s.real(), var), s.real()
            return s.real(), (s.real(), var)
        case nn.CTCLoss():
            return _sequences(s, module)
        case _:  # L1Loss, MSELoss, SmoothL1Loss, HuberLoss
            return s.real(), s.real()


def _class_data(
    s: _Source, module: nn.NLLLoss | nn.CrossEntropyLoss
) -> tuple[Any, Any]:
    (n, *more), (_, classes) = s.shape, s.features(module)
    output = s.real((n, classes, *more))
    if isinstance(module, nn.NLLLoss):
        output = output.log_softmax(1)
    elif module.ignore_index < 0 and s.draw(st.booleans()):
        # torch takes no other ignore_index with probabilities.
        return output, s.distribution((n, classes, *more))
    labels = s.integer(0, classes - 1)
    if rate := s.draw(sampled_from([0, 1, 3])):
        labels = labels.masked_fill(s.integer(1, 4) <= rate, module.ignore_index)
    weight = torch.ones(classes) if module.weight is None else module.weight
    counting = [c for c in range(classes) if weight[c] > 0 and c != module.ignore_index]
    if counting and not torch.isin(labels, torch.tensor(counting)).any():
        labels.view(-1)[-1] = counting[0]
    return output, labels


def _sequences(s: _Source, module: nn.CTCLoss) -> tuple[Any, Any]:
    n, longest = s.n, s.draw(st.integers(1, 3))
    classes = max(module.blank + 1, s.draw(st.integers(2, 4)))
    log_probs = s.real((2 * longest, n, classes)).log_softmax(2)
    labels = s.integer(0, classes - 2, (n, longest))
    labels += labels >= module.blank
    # Between equal labels stands a blank; a shorter input makes the loss infinite.
    shortest = 1 if module.zero_infinity else 2 * longest - 1
    times, lengths = s.integer(shortest, 2 * longest, (n,)), s.integer(0, longest, (n,))
    if s.draw(st.booleans()):  # all labels in one row
        labels = labels[torch.arange(longest) < lengths.unsqueeze(1)]
    if s.draw(st.booleans()):
        return (log_probs, times), (labels, lengths)
    return log_probs, (labels, times, lengths)


# All of one length, because those of one loss broadcast. The last is never 0.
_WEIGHT = st.none() | st.tuples(
    sampled_from([1.0, 0.0, 0.5]), sampled_from([1.0, 0.0, 2.0]), st.just(1.5)
).map(torch.tensor)
_MARGIN = sampled_from([1.0, 0.0, 0.5])
_IGNORE_INDEX = sampled_from([-100, -1, 0, 255])
_CITY_BLOCK = st.builds(nn.PairwiseDistance, st.just(1.0))

_OPTIONS: dict[type, dict[str, SearchStrategy[Any]]] = {
    nn.L1Loss: {},
    nn.MSELoss: {},
    nn.SmoothL1Loss: {"beta": sampled_from([1.0, 0.0, 0.5])},
    nn.HuberLoss: {"delta": sampled_from([1.0, 0.5])},
    nn.PoissonNLLLoss: {
        "log_input": sampled_from([True, False]),
        "full": st.booleans(),
        "eps": sampled_from([1e-8, 0.1]),
    },
    nn.KLDivLoss: {"reduction": st.just("batchmean"), "log_target": st.booleans()},
    nn.BCELoss: {"weight": _WEIGHT},
    nn.BCEWithLogitsLoss: {"weight": _WEIGHT, "pos_weight": _WEIGHT},
    nn.HingeEmbeddingLoss: {"margin": _MARGIN},
    nn.SoftMarginLoss: {},
    nn.MultiLabelSoftMarginLoss: {"weight": _WEIGHT},
    nn.MultiLabelMarginLoss: {},
    nn.MultiMarginLoss: {
        "p": sampled_from([1, 2]),
        "margin": _MARGIN,
        "weight": _WEIGHT,
    },
    nn.NLLLoss: {"weight": _WEIGHT, "ignore_index": _IGNORE_INDEX},
    nn.CrossEntropyLoss: {
        "weight": _WEIGHT,
        "ignore_index": _IGNORE_INDEX,
        "label_smoothing": sampled_from([0.0, 0.25]),
    },
    nn.MarginRankingLoss: {"margin": _MARGIN},
    nn.CosineEmbeddingLoss: {"margin": sampled_from([0.0, 0.5, -0.5])},
    nn.TripletMarginLoss: {
        "margin": sampled_from([1.0, 0.5]),
        "p": sampled_from([2.0, 1.0, 3.0]),
        "eps": sampled_from([1e-6, 0.25]),
        "swap": st.booleans(),
    },
    nn.TripletMarginWithDistanceLoss: {
        "distance_function": st.none() | _CITY_BLOCK,
        "margin": sampled_from([1.0, 0.5]),
        "swap": st.booleans(),
    },
    nn.GaussianNLLLoss: {"full": st.booleans(), "eps": sampled_from([1e-6, 0.3])},
    nn.CTCLoss: {"blank": sampled_from([0, 1]), "zero_infinity": st.booleans()},
}


# --- models ---------------------------------------------------------------------------


def models(
    inputs: int = 5, outputs: int = 3, *, batch_norm: bool = True, dropout: bool = True
) -> SearchStrategy[nn.Module]:
    """Small modules made of the parts that a training loop may get wrong.

    A linear layer, which may be frozen, at most four other parts, and a linear layer:
    linear layers, some of which share a parameter, LayerNorm, attention, a conv net
    over B x C x H x W, BatchNorm and Dropout. Shrinks towards a multilayer perceptron.

    Args:
        inputs: Features of a sample, at least 1.
        outputs: Numbers that the model returns for a sample, at least 1.
        batch_norm: Whether there may be BatchNorm1d and BatchNorm2d, with buffers, one
            of them an integer. In train mode BatchNorm1d refuses a batch of one sample.
        dropout: Whether there may be Dropout, which draws random numbers in train mode.

    Returns:
        A strategy for new modules in train mode that take (B, inputs) and return
        (B, outputs). Their parameters come from a seed that is drawn.

    Raises:
        ValueError: If `inputs` or `outputs` is no integer, or less than 1.

    Example:
        >>> from hypothesis import find
        >>> find(models(2, 1), lambda model: len(model) > 3)
        Sequential(
          (0): Linear(in_features=2, out_features=8, bias=True)
          (1): Tanh()
          (2): Linear(in_features=8, out_features=8, bias=True)
          (3): Linear(in_features=8, out_features=1, bias=True)
        )
    """
    _check_count("inputs", inputs)
    _check_count("outputs", outputs)
    p = 0.5 if dropout else 0.0
    parts: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(8, 8),
        _tied_layers,
        lambda: nn.LayerNorm(8),
        lambda: nn.Sequential(  # two tokens of four numbers
            nn.Unflatten(1, (2, 4)),
            nn.TransformerEncoderLayer(4, 2, 8, p, batch_first=True),
            nn.Flatten(),
        ),
        lambda: nn.Sequential(  # an image of one channel, 2 x 4
            nn.Unflatten(1, (1, 2, 4)),
            nn.Conv2d(1, 2, 3, padding=1),
            nn.BatchNorm2d(2) if batch_norm else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 8),
        ),
    ]
    if batch_norm:
        parts.append(lambda: nn.BatchNorm1d(8))
    if dropout:
        parts.append(nn.Dropout)
    return _models(inputs, outputs, parts)


@st.composite
def _models(
    draw: DrawFn, inputs: int, outputs: int, parts: list[Callable[[], nn.Module]]
) -> nn.Module:
    chosen = draw(st.lists(sampled_from(parts), max_size=4))
    frozen, seed = draw(st.booleans()), draw(_SEEDS)
    with seeded(seed, _CPU):
        first = nn.Linear(inputs, 8).requires_grad_(not frozen)
        body = [part() for part in chosen]
        return nn.Sequential(first, nn.Tanh(), *body, nn.Linear(8, outputs))


def _tied_layers() -> nn.Module:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}. Give an integer, at least 1.")
