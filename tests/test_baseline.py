"""The best constant and the facts of the data, against fractions and by counting."""

import math
from collections import Counter
from fractions import Fraction
from statistics import median

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lossloop as ll
from lossloop._baseline import (
    constant_features,
    constant_predictor,
    count_duplicates,
    output_spread,
)

LABELS = [0, 1, 1, 2, 1, 0, 2, 1]
VAL_LABELS = [2, 2, 0]
WEIGHTS = [2, 0, 1, 1, 3, 1, 0, 1]


def of(targets, weights=None, dtype=None):
    """One batch whose inputs say nothing."""
    targets = torch.tensor(targets, dtype=dtype)
    batch = torch.ones(len(targets), 1), targets
    return batch if weights is None else (*batch, torch.tensor(weights))


def cut(batch, size=3):
    return list(zip(*(t.split(size) for t in batch), strict=True))


# --- the best constant ----------------------------------------------------------------


def exact_mean(losses, weights=None):
    weights = weights or [1] * len(losses)
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    return float(total / sum(weights))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_mse_is_that_of_the_mean_of_each_output(weights):
    targets = [[1, 0], [3, 8], [4, 0], [0, 8], [5, 0], [3, 8], [7, 8], [1, 0]]
    val = [[2, 4], [4, 6]]
    w = weights or [1] * 8
    means = [
        Fraction(sum(a * t[k] for a, t in zip(w, targets, strict=True)), sum(w))
        for k in range(2)
    ]

    def losses(rows):
        squares = (
            [(t - m) ** 2 for t, m in zip(row, means, strict=True)] for row in rows
        )
        return [Fraction(sum(row), 2) for row in squares]

    found = constant_predictor(
        nn.MSELoss(),
        cut(of(targets, weights, torch.float32)),
        of(val, None, torch.float32),
    )
    assert found == (
        pytest.approx(exact_mean(losses(targets), weights), rel=1e-15),
        pytest.approx(exact_mean(losses(val)), rel=1e-15),
    )


def test_mse_is_exact_where_nothing_rounds():
    train, val = of([0.0, 0.0, 8.0, 0.0]), of([2.0, 4.0])  # the mean is 2
    assert constant_predictor(nn.MSELoss(), train, val) == (12.0, 2.0)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_l1_is_that_of_a_median(weights):
    targets = [5, 1, 4, 9, 1, 7, 3, 0]
    w = weights or [1] * 8
    middle = Fraction(
        median([t for t, n in zip(targets, w, strict=True) for _ in range(n)])
    )
    found = constant_predictor(nn.L1Loss(), cut(of(targets, weights, torch.float32)))
    exact = exact_mean([abs(t - middle) for t in targets], weights)
    assert found == (pytest.approx(exact, rel=1e-12), None)


def cross_entropy(labels, p, weights=None, per_class=(1, 1, 1), smoothing=0.0):
    """By its definition, one label at a time."""
    weights = weights or [1] * len(labels)
    total = norm = 0.0
    for label, w in zip(labels, weights, strict=True):
        if label == -100:
            continue
        own = -per_class[label] * math.log(p[label])
        spread = -sum(c * math.log(q) for c, q in zip(per_class, p, strict=True)) / 3
        total += w * ((1 - smoothing) * own + smoothing * spread)
        norm += w * per_class[label]
    return total / norm


def frequencies(labels, weights=None, per_class=(1, 1, 1), smoothing=0):
    counts = Counter({0: 1, 1: 1, 2: 1})
    for label, w in zip(labels, weights or [1] * len(labels), strict=True):
        counts[label] += w
    kept = [counts[c] for c in range(3)]
    spread = Fraction(sum(kept), 3)
    mass = [
        c * ((1 - Fraction(smoothing)) * n + Fraction(smoothing) * spread)
        for c, n in zip(per_class, kept, strict=True)
    ]
    return [m / sum(mass) for m in mass]


@pytest.mark.parametrize("smoothing", [0, 0.25])
@pytest.mark.parametrize("per_class", [(1, 1, 1), (1, 3, 2)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("labels", [LABELS, [-100, *LABELS[1:-1], -100]])
def test_cross_entropy_is_that_of_the_frequencies(
    labels, weights, per_class, smoothing
):
    loss_fn = nn.CrossEntropyLoss(
        weight=torch.tensor(per_class).float(), label_smoothing=smoothing
    )
    p = frequencies(labels, weights, per_class, smoothing)
    found = constant_predictor(loss_fn, cut(of(labels, weights)), of(VAL_LABELS))
    options = per_class, smoothing
    assert found == (
        pytest.approx(cross_entropy(labels, p, weights, *options), rel=1e-13),
        pytest.approx(cross_entropy(VAL_LABELS, p, None, *options), rel=1e-13),
    )


@pytest.mark.parametrize("smoothing", [0, 0.25])
def test_no_other_constant_is_better_for_the_smoothed_counts(smoothing):
    # Each class once more than it occurs, as further samples.
    per_class = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    loss_fn = nn.CrossEntropyLoss(per_class, label_smoothing=smoothing)
    labels = torch.tensor([*LABELS, 0, 1, 2])
    p = frequencies(LABELS, None, (1, 3, 2), smoothing)
    best = torch.tensor([float(q) for q in p], dtype=torch.float64).log()
    lowest = loss_fn(best.expand(11, 3), labels)
    for direction in torch.randn(50, 3, dtype=torch.float64):
        assert loss_fn((best + 0.1 * direction).expand(11, 3), labels) > lowest


def test_nll_and_cross_entropy_have_the_same_constant():
    train, val = of(LABELS), of(VAL_LABELS)
    found = constant_predictor(nn.NLLLoss(), train, val)
    same = constant_predictor(nn.CrossEntropyLoss(), train, val)
    assert found == pytest.approx(same, rel=1e-15)


def test_labels_of_every_position_count():
    images = of([[[0, 1], [1, 2]], [[1, 0], [2, 1]]])
    found = constant_predictor(nn.CrossEntropyLoss(), images)
    assert found == constant_predictor(nn.CrossEntropyLoss(), of(LABELS))
    twice = constant_predictor(nn.CrossEntropyLoss(), (*images, torch.tensor([2, 1])))
    same = constant_predictor(nn.CrossEntropyLoss(), of(LABELS, [2] * 4 + [1] * 4))
    assert twice == same


def test_probability_targets_that_are_certain_are_labels():
    certain = torch.eye(3)[torch.tensor(LABELS)]
    found = constant_predictor(nn.CrossEntropyLoss(), (torch.ones(8, 1), certain))
    labels = constant_predictor(nn.CrossEntropyLoss(), of(LABELS))
    assert found == (pytest.approx(labels[0], rel=1e-14), None)


def test_the_output_says_how_many_classes_there_are():
    p = [Fraction(2, 4), Fraction(1, 4), Fraction(1, 4)]
    loss_fn, batch = nn.CrossEntropyLoss(), of([0])
    found = constant_predictor(loss_fn, batch, output_like=torch.empty(3))
    assert found == (pytest.approx(-math.log(p[0]), rel=1e-15), None)
    assert constant_predictor(loss_fn, batch) == (0.0, None)  # one class is certain


def test_a_class_of_weight_zero_does_no_harm():
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 0.0]))
    train_loss, _ = constant_predictor(loss_fn, of(LABELS))
    without = constant_predictor(
        nn.CrossEntropyLoss(), of([x for x in LABELS if x < 2])
    )
    assert train_loss == pytest.approx(without[0], rel=1e-14)


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_logits_are_fitted():
    targets = of([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    train_loss, _ = constant_predictor(nn.BCEWithLogitsLoss(), targets)
    assert train_loss == pytest.approx((entropy(0.25) + entropy(0.75)) / 2, rel=1e-12)
    probabilities, _ = constant_predictor(nn.BCELoss(), targets)
    assert probabilities == pytest.approx(train_loss, rel=1e-12)


def test_a_function_is_fitted_if_the_shape_is_known():
    def log_cosh(output, target):
        return (output.squeeze(1) - target).cosh().log()

    train, like = cut(of([0.0, 1.0, 5.0, 6.0])), torch.empty(1)
    assert constant_predictor(log_cosh, train) is None
    train_loss, _ = constant_predictor(log_cosh, train, output_like=like)
    exact = [math.log(math.cosh(t - 3.0)) for t in (0, 1, 5, 6)]
    assert train_loss == pytest.approx(math.fsum(exact) / 4, rel=1e-9)


def test_an_objective_is_taken_by_its_loss():
    model = nn.Linear(1, 3)
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    own = ll.objective(model, lambda model, batch: (model(batch).sum(), batch.sum()))
    found = constant_predictor(goal, of(LABELS))
    assert found == constant_predictor(nn.CrossEntropyLoss(), of(LABELS))
    assert constant_predictor(own, of(LABELS)) is None


def test_padding_is_absent():
    batches = cut(of(LABELS))
    found = constant_predictor(nn.CrossEntropyLoss(), ll.pad_last(batches))
    assert found == constant_predictor(nn.CrossEntropyLoss(), batches)


def test_any_split_gives_the_same():
    batch = of(LABELS, WEIGHTS)
    found = {
        constant_predictor(nn.CrossEntropyLoss(), cut(batch, size))[0]
        for size in range(1, 9)
    }
    assert max(found) == pytest.approx(min(found), rel=1e-14)


def strange(output, target):
    raise KeyError("outputs that this loss was not written for")


@pytest.mark.parametrize(
    ("loss_fn", "train"),
    [
        pytest.param(strange, of([0.0, 1.0]), id="loss that raises"),
        pytest.param(
            lambda output, target: output[:, 0] * target, of([1.0]), id="no minimum"
        ),
        pytest.param(
            nn.KLDivLoss(), of([[0.5, 0.5]]), id="no minimum of a loss of torch"
        ),
        pytest.param(nn.CTCLoss(), of([[1, 2]]), id="other arguments"),
        pytest.param(nn.CrossEntropyLoss(), [torch.ones(2, 3)], id="other batches"),
        pytest.param(nn.CrossEntropyLoss(), of([0.5, 1.0]), id="real labels"),
        pytest.param(
            nn.CrossEntropyLoss(), [(torch.ones(1), {"y": torch.ones(1)})], id="tree"
        ),
        pytest.param(nn.CrossEntropyLoss(), of([0, 5]), id="too few classes"),
        pytest.param(nn.CrossEntropyLoss(), of([-100, -100]), id="no weight"),
        pytest.param(nn.MSELoss(), of([0.0, math.nan]), id="not a number"),
        pytest.param(
            nn.CrossEntropyLoss(), of([[0.0, math.nan]]), id="not a probability"
        ),
    ],
)
def test_what_cannot_be_known_is_none(loss_fn, train):
    found = constant_predictor(loss_fn, train, output_like=torch.empty(2))
    assert found is None


def test_teeth_zero_is_not_the_best_constant():
    train = of([1.0, 3.0])
    assert (
        nn.MSELoss()(torch.zeros(2), train[1])
        > constant_predictor(nn.MSELoss(), train)[0]
    )


def test_teeth_weights_of_classes_move_the_frequencies():
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 2.0]))
    found = constant_predictor(loss_fn, of(LABELS))[0]
    plain = torch.tensor([float(p) for p in frequencies(LABELS)]).log()
    usual = loss_fn(plain.expand(8, 3), torch.tensor(LABELS)).item()
    assert found < usual - 0.01


# --- reading --------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


SAMPLES = [
    (torch.tensor([float(i), 1.0]), torch.tensor(float(i % 4))) for i in range(8)
]
READERS = [
    pytest.param(lambda x: constant_predictor(nn.MSELoss(), x, x), id="predictor"),
    pytest.param(lambda x: count_duplicates(x, x), id="duplicates"),
    pytest.param(constant_features, id="features"),
    pytest.param(lambda x: output_spread(nn.Identity(), x), id="spread"),
]


@pytest.mark.parametrize("reader", READERS)
def test_every_kind_of_loader_gives_the_same(reader):
    stacked = tuple(torch.stack(parts) for parts in zip(*SAMPLES, strict=True))
    found = [
        reader(loader)
        for loader in (
            stacked,
            cut(stacked),
            DataLoader(SAMPLES, 3),
            DataLoader(TensorDataset(*stacked), 3, shuffle=True),
            DataLoader(Stream(SAMPLES), 3),
        )
    ]
    assert found[0] is not None
    assert all(other == pytest.approx(found[0], rel=1e-14) for other in found)


@pytest.mark.parametrize("reader", READERS)
def test_iterators_are_not_used_up(reader):
    batches = iter(DataLoader(SAMPLES, 3))
    stream = DataLoader(Stream(iter(SAMPLES)), 3)
    assert reader(batches) is None
    assert reader(stream) is None
    assert len(list(batches)) == len(list(stream)) == 3


@pytest.mark.parametrize("reader", READERS)
def test_generators_stay_where_they_are(reader):
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(SAMPLES, 3, shuffle=True, generator=generator)
    before = generator.get_state(), torch.get_rng_state()
    reader(loader)
    after = generator.get_state(), torch.get_rng_state()
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("at_most", [0, -1, 1.5, True])
def test_the_limit_is_a_number_of_samples(at_most):
    for call in (
        lambda x: constant_predictor(nn.MSELoss(), x, at_most=at_most),
        lambda x: count_duplicates(x, x, at_most=at_most),
        lambda x: constant_features(x, at_most=at_most),
        lambda x: output_spread(nn.Identity(), x, at_most=at_most),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            call(of([1.0]))


def test_what_is_too_large_is_not_read():
    def endless():
        while True:
            yield from cut(of([1.0, 2.0]), 1)

    class Endless:
        def __iter__(self):
            return endless()

    assert constant_predictor(nn.MSELoss(), Endless(), at_most=50) is None
    assert count_duplicates(of([1.0]), Endless(), at_most=50) is None
    assert constant_features(Endless(), at_most=50) == (1, 1)
    assert output_spread(nn.Identity(), Endless(), at_most=50) == (0.0, 1.0)


def test_the_first_batch_shows_what_is_too_large():
    class Samples(torch.utils.data.Dataset):
        asked = 0

        def __len__(self):
            return 10**6

        def __getitem__(self, i):
            self.asked += 1
            return torch.ones(1), torch.ones(1)

    samples = Samples()
    assert constant_predictor(nn.MSELoss(), DataLoader(samples, 32)) is None
    assert samples.asked == 32


def test_validation_data_that_cannot_be_read_do_not_matter():
    train = of([1.0, 3.0])
    assert constant_predictor(nn.MSELoss(), train, iter([train])) == (1.0, None)


def test_a_set_that_just_fits_is_read():
    assert constant_predictor(nn.MSELoss(), of([1.0, 3.0]), at_most=2) == (1.0, None)
    assert constant_predictor(nn.MSELoss(), of([1.0, 3.0]), at_most=1) is None
    loader = DataLoader(TensorDataset(*of([1.0, 3.0, 1.0, 3.0, 2.0])), 2)
    assert constant_predictor(nn.MSELoss(), loader, at_most=5) == (0.8, None)
    assert constant_predictor(nn.MSELoss(), loader, at_most=4) is None


# --- facts of the data ----------------------------------------------------------------


@pytest.mark.parametrize("copied", [0, 1, 5])
def test_copies_are_counted(copied):
    x, y = torch.randn(20, 3), torch.arange(20)
    others = torch.randn(7, 3), torch.arange(7)
    val = torch.cat([x[:copied], others[0]]), torch.cat([y[:copied], others[1]])
    assert count_duplicates((x, y), val) == (copied, copied + 7)
    assert count_duplicates(cut((x, y)), cut(val, 2)) == (copied, copied + 7)


def test_a_copy_has_the_same_target_too():
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    assert count_duplicates((x, y), (x[:1], y[:1] + 5)) == (0, 1)
    assert count_duplicates((x, y), (x[:1], y[1:])) == (1, 1)


def test_weights_do_not_hide_a_copy():
    x, y = torch.randn(4, 3), torch.arange(4)
    assert count_duplicates((x, y, torch.ones(4)), (x, y, torch.zeros(4))) == (4, 4)


def test_any_form_of_batch_can_be_compared():
    batches = [
        {"x": torch.randn(3, 2).bfloat16(), "y": torch.tensor([True, False, True])}
    ]
    assert count_duplicates(batches, batches) == (3, 3)
    assert count_duplicates(batches, [{"name": ["a"]}]) is None


def test_constant_features_are_counted():
    x = torch.randn(9, 2, 3)
    x[:, 0, 1] = 4.0
    x[:, 1] = 0.0
    loader = cut((x, torch.zeros(9)), 2)
    assert constant_features(loader) == (4, 6)
    x[8, 1, 0] = 1.0  # in the last batch, on its own
    assert constant_features(cut((x, torch.zeros(9)), 2)) == (3, 6)
    assert constant_features(cut((x, torch.zeros(9)), 2), at_most=8) == (4, 6)


def test_features_of_several_inputs_are_added_up():
    inputs = {"a": torch.zeros(4, 2), "b": (torch.arange(4), torch.ones(4, dtype=bool))}
    assert constant_features([(inputs, torch.zeros(4))]) == (3, 4)


def test_features_of_varying_shape_are_unknown():
    batches = [(torch.zeros(2, n), torch.zeros(2)) for n in (3, 4)]
    assert constant_features(batches) is None


def test_the_spread_is_that_in_eval_mode():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    x = torch.randn(11, 3)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    found = output_spread(model, cut((x, torch.zeros(11))))
    outputs = model.eval()(x).double()
    exact = (
        outputs.std(0, correction=0).max().item(),
        outputs.mean(0).abs().max().item(),
    )
    assert found == pytest.approx(exact, rel=1e-6)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


def test_dead_units_have_no_spread():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.constant_(model[0].bias, -100.0)
    std, mean = output_spread(model, (torch.randn(50, 3), torch.zeros(50)))
    assert std <= 1e-12 + 1e-6 * mean
    nn.init.zeros_(model[0].bias)
    std, mean = output_spread(model, (torch.randn(50, 3), torch.zeros(50)))
    assert std > 0.01 * mean


def test_outputs_of_varying_shape_have_none():
    batches = [(torch.zeros(2, n), torch.zeros(2)) for n in (3, 4)]
    assert output_spread(nn.Identity(), batches) is None
