"""The strategies: only valid things, all that they claim, and small counterexamples."""

import inspect
import itertools
import random
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, find, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lossloop as ll
from lossloop._losses import _RULES, check_loss, loss_pair
from lossloop.testing._strategies import (
    _OPTIONS,
    batches,
    loss_data,
    models,
    partitions,
    sample_weights,
    torch_losses,
)

PER_CASE = settings(max_examples=max(2, settings().max_examples // 5), deadline=None)
COUNTS = st.integers(1, 8)
QUICK = settings(max_examples=1000, database=None, deadline=None)
UNSHRUNK = settings(QUICK, phases=[Phase.generate])
over_losses = pytest.mark.parametrize("kind", _OPTIONS, ids=lambda kind: kind.__name__)


def drawn(strategy, condition):
    """Anything of the strategy for which the condition holds."""
    return find(strategy, condition, settings=UNSHRUNK, random=random.Random(0))


def smallest(strategy, condition=lambda drawn: True):
    """What the strategy shrinks to."""
    return find(strategy, condition, settings=QUICK, random=random.Random(0))


# --- ways to cut data into batches ----------------------------------------------------


@given(data=st.data(), n=COUNTS)
def test_a_partition_holds_each_sample_once(data, n):
    cut = data.draw(partitions(n))
    assert all(cut)
    assert sorted(itertools.chain(*cut)) == list(range(n))


def test_every_partition_can_be_drawn():
    seen = set()

    @settings(max_examples=2000, database=None)
    @given(partitions(3))
    def collect(cut):
        seen.add(tuple(map(tuple, cut)))

    collect()
    assert len(seen) == 3 * 2 * 1 * 2**2  # orders, and a cut or none in two places


def test_partitions_shrink_to_natural_order():
    assert smallest(partitions(4)) == [[0, 1, 2, 3]]
    assert smallest(partitions(4), lambda cut: len(cut) > 1) == [[0], [1, 2, 3]]
    assert smallest(partitions(2), lambda cut: len(cut) > 1) == [[0], [1]]
    assert smallest(partitions(3), lambda cut: len(cut) == 3) == [[0], [1], [2]]
    assert smallest(partitions(3), lambda cut: cut[0][0] > 0) == [[1, 0, 2]]


class Point(NamedTuple):
    x: Any
    more: Any


POINTS = Point(
    torch.arange(6).reshape(3, 2),
    {"w": torch.ones(3, requires_grad=True), "i": (torch.arange(3),)},
)


class Jittered(Dataset):
    """A map-style data set that moves every global generator."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return {"i": i, "x": torch.full((2,), noise)}


@given(batches(POINTS))
def test_batches_have_the_form_of_the_data_set(parts):
    whole = tree_map(lambda *tensors: torch.cat(tensors), *parts)
    assert isinstance(whole, Point)
    order = whole.more["i"][0]
    assert torch.equal(order.sort().values, torch.arange(3))
    assert torch.equal(whole.x, POINTS.x[order])
    assert all(len(batch.x) == len(batch.more["w"]) > 0 for batch in parts)
    leaves = tree_leaves(parts)
    assert not any(leaf.requires_grad for leaf in leaves)
    for leaf in leaves:
        leaf.zero_()  # a copy: the next example and the data set do not change
    assert torch.equal(POINTS.x, torch.arange(6).reshape(3, 2))


@given(batches(TensorDataset(torch.arange(3.0), torch.arange(3))))
def test_batches_of_a_data_set_are_those_of_a_loader(parts):
    assert all(type(batch) is list and len(batch) == 2 for batch in parts)
    assert sorted(i for _, y in parts for i in y.tolist()) == [0, 1, 2]
    assert all(torch.equal(x, y.float()) for x, y in parts)


def test_a_data_set_is_read_once_and_moves_no_generator():
    with unmoved():
        strategy = batches(Jittered())
    first, second = (
        smallest(strategy, lambda parts, k=k: len(parts) == k) for k in (1, 2)
    )
    assert torch.equal(first[0]["x"], torch.cat([batch["x"] for batch in second]))


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(2)


class Unsized(Dataset):
    def __getitem__(self, i):
        return torch.zeros(2)


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("dataset", "kind", "words"),
    [
        ((X, X[:2]), ValueError, r"dataset\[0\]: 3, dataset\[1\]: 2"),
        ({"a": X, "b": torch.tensor(1.0)}, ValueError, r"dataset\['b'\]: 0"),
        (X[:0], ValueError, "dataset: 0"),
        ((), ValueError, "none at all"),
        (TensorDataset(X[:0]), ValueError, "none at all"),
        ((X, [1, 2, 3]), TypeError, r"dataset\[1\]\[0\] is a int"),
        ((X, None), TypeError, r"dataset\[1\] is a NoneType"),
        (X.numpy(), TypeError, "dataset is a ndarray"),
        (DataLoader(X), TypeError, "DataLoader"),
        (Stream(), TypeError, "Stream.*__getitem__ and __len__"),
        (Unsized(), TypeError, "Unsized.*__getitem__ and __len__"),
    ],
)
def test_what_is_no_data_set_is_refused(dataset, kind, words):
    with pytest.raises(kind, match=words):
        batches(dataset)


# --- weights --------------------------------------------------------------------------


@given(data=st.data(), n=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_weights_add_exactly(data, n, dtype):
    weights = data.draw(sample_weights(n, dtype=dtype))
    assert (weights.shape, weights.dtype) == ((n,), dtype)
    assert (weights >= 0).all()
    assert weights.any()
    eighths = weights.double() * 8
    assert torch.equal(eighths, eighths.round())
    assert eighths.sum() < 2**53


@pytest.mark.parametrize("weight", [0, 1, 2, 0.125, 2**24])
def test_weights_of_each_kind_are_drawn(weight):
    drawn(sample_weights(3), lambda weights: (weights == weight).any())


def test_a_sum_of_weights_in_float32_goes_wrong():
    weights = smallest(sample_weights(2), lambda w: w.sum() != w.float().sum().double())
    assert weights.tolist() == [1, 2**24]


def test_weights_shrink_to_ones():
    assert smallest(sample_weights(3)).tolist() == [1, 1, 1]


# --- losses of torch.nn and their data ------------------------------------------------


def many(value):
    return value if isinstance(value, tuple) else (value,)


def arguments(loss, output, target):
    """What torch's own loss takes, in its order."""
    args = (*many(output), *many(target))
    if isinstance(loss, nn.GaussianNLLLoss) and isinstance(output, tuple):
        return args[0], args[2], args[1]
    if isinstance(loss, nn.CTCLoss) and isinstance(output, tuple):
        return args[0], args[2], args[1], args[3]
    return args


def rows(loss, output, target, batch):
    """Some samples of `(output, target)`."""
    if not isinstance(loss, nn.CTCLoss):
        return tree_map(lambda tensor: tensor[batch], (output, target))
    log_probs, labels, times, lengths = arguments(loss, output, target)
    if labels.dim() == 1:
        each = labels.split(lengths.tolist())
        labels = torch.cat([each[i] for i in batch])
    else:
        labels = labels[batch]
    return log_probs[:, batch], (labels, times[batch], lengths[batch])


def test_every_loss_with_every_option_is_drawn():
    assert set(_OPTIONS) == set(_RULES)
    for kind, options in _OPTIONS.items():
        known = set(inspect.signature(kind.__init__).parameters)
        left_out = {"self", "size_average", "reduce", "reduction"}
        assert set(options) | left_out == known | left_out


@over_losses
@PER_CASE
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_mean_of_drawn_data_is_torchs_over_any_batches(kind, data, dtype):
    loss = data.draw(torch_losses([kind])).to(dtype)
    output, target = data.draw(loss_data(loss, dtype=dtype))
    check_loss(loss, output, target)
    tensors = tree_leaves((output, target))
    assert {t.dtype for t in tensors} <= {dtype, torch.int64}
    assert not any(t.requires_grad for t in tensors)

    expected = loss(*arguments(loss, output, target))
    assert expected.isfinite()
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    loss_sum, n = loss_pair(loss)(output, target)
    assert n > 0
    close = {"rtol": bound, "atol": bound, "check_dtype": False}
    torch.testing.assert_close(loss_sum, expected.double() * n, **close)

    size = many(output)[0].shape[isinstance(loss, nn.CTCLoss)]
    parts = [
        loss_pair(loss)(*rows(loss, output, target, batch))
        for batch in data.draw(partitions(size))
    ]
    sums = [torch.stack(part).sum() for part in zip(*parts, strict=True)]
    torch.testing.assert_close(sums, [loss_sum, n], **close)


@over_losses
@PER_CASE
@given(data=st.data(), n=COUNTS)
def test_data_have_the_samples_asked_for(kind, data, n):
    loss = data.draw(torch_losses([kind]))
    output, _ = data.draw(loss_data(loss, n))
    assert many(output)[0].shape[isinstance(loss, nn.CTCLoss)] == n


def test_kinds_of_data_are_drawn():
    cross, ignoring = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=0)
    weighted = nn.NLLLoss(weight=torch.tensor([0.0, 0.0, 1.0]), ignore_index=-1)
    ctc, gaussian = nn.CTCLoss(blank=2), nn.GaussianNLLLoss()
    kl = nn.KLDivLoss(reduction="batchmean", log_target=True)
    loss_and_condition = [
        (cross, lambda o, t: t.is_floating_point() and t.dim() == 4),
        (cross, lambda o, t: t.dim() == 3 and not t.is_floating_point()),
        (cross, lambda o, t: (t == -100).float().mean() > 0.7),
        (ignoring, lambda o, t: (t == 0).any()),
        (weighted, lambda o, t: (t == -1).any() and (t == 0).any()),
        (nn.MSELoss(), lambda o, t: o.dim() == 1 and len(o) == 8),
        (nn.MSELoss(), lambda o, t: not torch.equal(o * 8, (o * 8).round())),
        (nn.BCELoss(weight=torch.ones(2, 3)), lambda o, t: o.dim() == 3),
        (kl, lambda o, t: (t < 0).all()),
        (nn.MultiLabelMarginLoss(), lambda o, t: (t[:, 0] == -1).any()),
        (gaussian, lambda o, t: isinstance(o, tuple) and o[1].dim() < o[0].dim()),
        (gaussian, lambda o, t: isinstance(t, tuple) and t[1].shape[1:] == (1,)),
        (ctc, lambda o, t: len(t) == 3 and t[0].dim() == 1 and t[2].max() == 3),
        (ctc, lambda o, t: len(o) == len(t) == 2 and t[0].dim() == 2),
        (nn.CTCLoss(zero_infinity=True), lambda o, t: len(t) > 2 and t[1].min() < 2),
    ]
    for loss, condition in loss_and_condition:
        found = drawn(loss_data(loss), lambda data, holds=condition: holds(*data))
        check_loss(loss, *found)


def test_data_of_a_float_dtype():
    output, target = drawn(
        loss_data(nn.BCELoss(), dtype=torch.float16), lambda data: True
    )
    assert output.dtype == target.dtype == torch.float16


def test_labels_that_count_are_left_wherever_there_can_be_some():
    everything_ignored = nn.CrossEntropyLoss(torch.tensor([0.0, 1.0]), ignore_index=1)
    _, target = smallest(loss_data(everything_ignored, 2))
    assert target.tolist() == [0, 0]


def test_data_shrink_to_small_numbers():
    output, target = smallest(
        loss_data(nn.MSELoss()), lambda data: (data[0] > 0.1).any()
    )
    assert (output.tolist(), target.tolist()) == ([0.125], [0.0])
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    output, target = smallest(loss_data(loss), lambda data: (data[1] == -1).any())
    assert torch.equal(output, torch.zeros(2, 2))
    assert sorted(target.tolist()) == [-1, 0]


def test_the_usual_recipe_is_refuted_by_two_samples():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    cut_data = loss_data(loss).flatmap(lambda data: batches(data))

    def recipe_is_wrong(parts):
        whole = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        added = sum(loss(*part) * len(part[1]) for part in parts)
        return not torch.isclose(added / len(whole[1]), loss(*whole))

    parts = smallest(cut_data, recipe_is_wrong)
    assert [len(target) for _, target in parts] == [1, 1]
    assert torch.cat([output for output, _ in parts]).abs().max() <= 0.125


def test_more_samples_than_are_drawn_repeat():
    output, _ = smallest(
        loss_data(nn.MSELoss(), 1000), lambda data: (data[0] > 0).any()
    )
    assert len(output) == 1000


@over_losses
def test_each_loss_is_drawn(kind):
    assert type(drawn(torch_losses(), lambda loss: type(loss) is kind)) is kind


def test_losses_shrink_to_defaults_and_show_their_options():
    assert repr(smallest(torch_losses())) == "L1Loss()"
    cross = torch_losses([nn.CrossEntropyLoss])
    defaults = "CrossEntropyLoss(ignore_index=-100, label_smoothing=0.0)"
    assert repr(smallest(cross)) == defaults
    weighted = smallest(cross, lambda loss: loss.weight is not None)
    assert "weight=tensor([1.0000, 1.0000, 1.5000])" in repr(weighted)


def test_drawn_losses_share_nothing():
    drawn = []

    @settings(max_examples=50, database=None)
    @given(torch_losses([nn.BCELoss]))
    def collect(loss):
        drawn.extend(loss.buffers())

    collect()
    assert len({weight.data_ptr() for weight in drawn}) == len(drawn) > 5


@pytest.mark.parametrize(
    ("build", "kind", "words"),
    [
        (lambda: partitions(0), ValueError, "n is 0. Give an integer, at least 1"),
        (lambda: partitions(2.0), ValueError, "n is 2.0"),
        (lambda: sample_weights(-1), ValueError, "n is -1"),
        (lambda: sample_weights(2, dtype=torch.int8), ValueError, "int8.*torch.int64"),
        (lambda: loss_data(nn.MSELoss(), 0), ValueError, "n is 0"),
        (lambda: loss_data(nn.MSELoss), TypeError, "the class MSELoss"),
        (lambda: loss_data(nn.Linear(2, 2)), TypeError, "Linear.*knows are L1Loss"),
        (
            lambda: loss_data(nn.MSELoss(), dtype=torch.int64),
            ValueError,
            "int64.*floating point",
        ),
        (lambda: torch_losses([nn.Linear]), TypeError, "Linear.*knows are L1Loss"),
        (lambda: torch_losses([]), ValueError, "classes is empty"),
        (lambda: models(0), ValueError, "inputs is 0"),
        (lambda: models(outputs="3"), ValueError, "outputs is '3'"),
    ],
)
def test_arguments_out_of_range_are_refused(build, kind, words):
    with pytest.raises(kind, match=words):
        build()


# --- models ---------------------------------------------------------------------------


def parts(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@given(data=st.data(), inputs=COUNTS, outputs=COUNTS, size=st.integers(2, 4))
def test_models_train_and_evaluate(data, inputs, outputs, size):
    model = data.draw(models(inputs, outputs))
    assert model.training
    goal = ll.supervised(model, nn.MSELoss())
    x = torch.arange(size * inputs).reshape(size, inputs) / 8
    for train in (True, False):
        goal.check(
            "the batch", goal.init(), (x, torch.ones(size, outputs)), train=train
        )
    assert all(param.dtype == torch.float32 for param in model.parameters())


@PER_CASE
@given(st.data())
def test_batches_of_one_pass_but_for_batch_norm_in_one_dimension(data):
    model = data.draw(models(batch_norm=False))
    assert not parts(model, BATCH_NORMS)
    assert model(torch.ones(1, 5)).shape == (1, 3)


@PER_CASE
@given(st.data())
def test_models_without_dropout_draw_no_random_numbers(data):
    model = data.draw(models(dropout=False))
    with unmoved():
        model(torch.ones(2, 5))


def is_tied(model):
    weights = Counter(id(layer.weight) for layer in parts(model, nn.Linear))
    return max(weights.values()) == 2


@pytest.mark.parametrize(
    "condition",
    [
        is_tied,
        lambda model: not model[0].weight.requires_grad,
        lambda model: parts(model, nn.BatchNorm1d),
        lambda model: parts(model, nn.BatchNorm2d),
        lambda model: parts(model, nn.Dropout) and not parts(model, nn.Flatten),
        lambda model: parts(model, nn.TransformerEncoderLayer),
        lambda model: any(b.dtype == torch.int64 for b in model.buffers()),
        lambda model: parts(model, BATCH_NORMS) and is_tied(model),
    ],
)
def test_models_of_each_kind_are_drawn(condition):
    drawn(models(), condition)


def test_models_shrink_to_a_plain_one():
    model = smallest(models())
    assert [type(part) for part in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert all(param.requires_grad for param in model.parameters())
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        assert torch.equal(model[0].weight, nn.Linear(5, 8).weight)


# --- values depend on what Hypothesis draws, and on nothing else ----------------------


class unmoved:  # used as a context
    """Asserts that the global generators stay where they are."""

    def __enter__(self):
        self.before = self.states()

    def __exit__(self, *error):
        assert self.states() == self.before

    def states(self):
        _, numbers, *place = np.random.get_state()
        numpy = numbers.tolist(), place
        return random.getstate(), numpy, torch.get_rng_state().tolist()


EVERYTHING = st.tuples(
    partitions(4),
    batches(X),
    sample_weights(4),
    models(),
    torch_losses().flatmap(lambda loss: st.tuples(st.just(loss), loss_data(loss))),
)


@given(st.data())
def test_the_callers_generators_stay(data):
    with unmoved():
        data.draw(EVERYTHING)


def test_the_same_draws_give_the_same_values():
    def values(global_seed):
        torch.manual_seed(global_seed)
        found = []

        @seed(1)
        @settings(max_examples=30, database=None, phases=[Phase.generate])
        @given(EVERYTHING)
        def collect(drawn):
            *rest, model, loss = drawn
            found.append(repr((rest, model, model.state_dict(), loss)))

        collect()
        return found

    assert values(1) == values(2)
