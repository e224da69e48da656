"""The probes: what they find where it is known, and that they leave no trace."""

import copy
import functools
import itertools
import math
import random
import statistics

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop import probes

CROSS_ENTROPY = nn.CrossEntropyLoss()


def digits(samples=96):
    """Ten classes that a linear map can tell apart, with some noise."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(10, 16, generator=generator)
    y = torch.arange(samples) % 10
    x = centres[y] + 0.3 * torch.randn(samples, 16, generator=generator)
    return TensorDataset(x, y)


def network(*last, dropout=0.0):
    return nn.Sequential(
        nn.Linear(16, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(32, 10),
        *last,
    )


def loader(batch_size=16, **options):
    return DataLoader(digits(), batch_size, shuffle=True, **options)


# --- nothing is touched ---------------------------------------------------------------

PROBES = {
    "overfit_batch": lambda model, sgd, data: probes.overfit_batch(
        model, CROSS_ENTROPY, sgd, data, steps=30
    ),
    "lr_range_test": lambda model, sgd, data: probes.lr_range_test(
        model, CROSS_ENTROPY, sgd, data, steps=20
    ),
    "gradient_noise_scale": lambda model, sgd, data: probes.gradient_noise_scale(
        model, CROSS_ENTROPY, data
    ),
    "count": lambda model, sgd, data: probes.count(model, CROSS_ENTROPY, data, sgd),
}


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_changes_nothing_outside(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = network(dropout=0.5).eval()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    own = torch.Generator().manual_seed(3)
    data = loader(generator=own)
    attributes = set(vars(sgd))

    def state():
        tensors = [*model.state_dict().values()]
        return copy.deepcopy(
            (tensors, sgd.state_dict(), own.get_state(), torch.get_rng_state())
        ), (random.getstate(), np.random.get_state()[1].tolist())

    before, host = state()
    first = PROBES[name](model, sgd, data)
    after, host_after = state()
    assert str(after) == str(before)
    for one, other in zip(after[0], before[0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(after[2], before[2])
    assert torch.equal(after[3], before[3])
    assert host_after == host
    assert not model.training
    assert not any(p.grad is not None for p in model.parameters())
    assert set(vars(sgd)) == attributes
    assert not [*tmp_path.iterdir()]
    # And so the same call gives the same, bit for bit.
    assert PROBES[name](model, sgd, data) == first


@pytest.mark.parametrize("name", PROBES)
def test_a_global_generator_that_shuffles_is_put_back(name):
    model = network()
    before = torch.get_rng_state()
    PROBES[name](model, torch.optim.SGD, loader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", PROBES)
def test_the_generator_behind_padding_is_put_back(name):
    own = torch.Generator().manual_seed(3)
    data = ll.pad_last(loader(36, generator=own))
    before = own.get_state()
    PROBES[name](nn.Linear(16, 10), torch.optim.SGD, data)
    assert torch.equal(own.get_state(), before)


def test_the_state_of_an_optimizer_is_taken():
    model = network()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = digits()[:8]
    fresh = probes.overfit_batch(model, CROSS_ENTROPY, adam, batch, steps=9)
    CROSS_ENTROPY(model(batch[0]), batch[1]).backward()
    for param in model.parameters():
        adam.state[param] = {
            "step": torch.tensor(5.0),
            "exp_avg": -param.grad,
            "exp_avg_sq": param.grad**2,
        }
    taken = probes.overfit_batch(model, CROSS_ENTROPY, adam, batch, steps=9)
    assert taken.losses[1] > fresh.losses[1]


# --- overfit_batch --------------------------------------------------------------------


def test_its_losses_are_those_of_steps_on_the_first_samples():
    model = network(dropout=0.2)
    batch = digits()[:16]
    found = probes.overfit_batch(
        model, CROSS_ENTROPY, torch.optim.Adam, batch, samples=5, steps=60, seed=4
    )
    goal = ll.supervised(model, CROSS_ENTROPY)
    step = ll.make_step(goal, torch.optim.Adam)
    params, opt_state = ll.init(goal, torch.optim.Adam, seed=4)
    five = tuple(t[:5] for t in batch)
    for loss in found.losses:
        params, opt_state, loss_sum, n = step(params, opt_state, five)
        assert loss == loss_sum.double().item() / n.item()
    assert len(found.losses) == 60
    assert (found.first, found.last) == (found.losses[0], found.losses[-1])


def test_a_sound_model_succeeds_and_stops_at_once():
    model = network()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    found = probes.overfit_batch(model, CROSS_ENTROPY, adam, loader())
    assert found.succeeded
    assert found.bound == 0.01 * found.first
    assert found.last < found.bound
    assert all(loss >= found.bound for loss in found.losses[:-1])
    assert "can learn 8 samples" in str(found)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class Constant(nn.Module):
    def forward(self, x):
        return x * 0.0


@pytest.mark.parametrize(
    "model",
    [network(nn.Softmax(1)), nn.Sequential(Constant(), network())],
    ids=["two softmaxes", "no information"],
)
def test_teeth_a_model_with_a_fault_fails(model):
    found = probes.overfit_batch(
        model, CROSS_ENTROPY, torch.optim.Adam, loader(), steps=200
    )
    assert not found.succeeded
    assert len(found.losses) == 200
    assert "did not learn 8 samples" in str(found)


def test_targets_of_another_order_are_learnt_from_few_samples_too():
    """The probe is about the model: wrong labels can be learnt like right ones."""
    x, y = digits()[:8]
    model = network()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    found = probes.overfit_batch(model, CROSS_ENTROPY, adam, (x, y.flip(0)))
    assert found.succeeded


def test_a_rate_that_is_too_high_ends_it():
    model = nn.Linear(16, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=1e6)
    batch = digits()[:8][0], torch.ones(8, 1)
    found = probes.overfit_batch(model, nn.MSELoss(), sgd, batch)
    assert not found.succeeded
    assert not math.isfinite(found.last)
    assert all(map(math.isfinite, found.losses[:-1]))
    assert "too high" in str(found)


def test_a_baseline_is_what_the_target_is_a_share_of():
    found = probes.overfit_batch(
        network(), CROSS_ENTROPY, torch.optim.Adam, loader(), baseline=400.0, steps=3
    )
    assert found.bound == 4.0
    assert found.succeeded
    assert len(found.losses) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: loader(),
        lambda: [*loader()],
        lambda: [tuple(batch) for batch in loader()],
        lambda: iter(loader()),
        lambda: digits()[:16],
        lambda: [*digits()[:16]],
    ],
    ids=["loader", "list of lists", "of tuples", "iterator", "batch", "list"],
)
def test_it_takes_a_loader_or_a_batch(make):
    found = probes.overfit_batch(
        network(), CROSS_ENTROPY, torch.optim.SGD, make(), steps=2
    )
    assert len(found.losses) == 2


def test_a_batch_of_another_form_with_an_objective():
    def function(model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).sum(), torch.tensor(8)

    model = nn.Linear(2, 1)
    goal = ll.objective(model, function)
    batch = {"x": torch.ones(8, 2), "y": torch.ones(8, 1)}
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    assert probes.overfit_batch(model, goal, sgd, batch).succeeded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 17}, r"samples=17\): the batch has only 16 samples"),
        ({"samples": 0}, r"samples=...\) must be at least 1, got 0"),
        ({"steps": 0}, r"steps=...\) must be at least 1, got 0"),
        ({"target": 1.5}, r"target=...\) must be between 0 and 1, got 1.5"),
        ({"baseline": -1.0}, r"baseline=...\) must be between 0 and inf"),
        ({"batch": []}, "has no batches: its length is 0"),
        ({"batch": iter([])}, "batch gave no batches"),
        ({"batch": digits()}, "gives samples, not batches"),
        ({"batch": (torch.full((8, 16), math.nan), torch.ones(8))}, "not finite"),
        ({"model": nn.Linear(3, 10)}, "looked at lossloop.probes.overfit_batch: the"),
        ({"loss_fn": ll.supervised(network(), CROSS_ENTROPY)}, "another module"),
        ({"model": network(Detached())}, "does not depend on any"),
        ({"batch": (torch.ones(8, 16), torch.full((8,), -100))}, "weight 0"),
    ],
)
def test_what_overfit_batch_refuses(options, message):
    call = {
        "model": network(),
        "loss_fn": CROSS_ENTROPY,
        "optimizer": torch.optim.SGD,
        "batch": loader(),
    }
    errors = (ValueError, TypeError, RuntimeError)
    with pytest.raises(errors, match=message):
        probes.overfit_batch(**{**call, **options})


def test_a_loss_that_can_be_negative_needs_a_baseline():
    def function(output, target):
        return (output.squeeze(1) - target) ** 2 - 100

    batch = torch.ones(8, 2), torch.ones(8)
    with pytest.raises(ValueError, match="Pass baseline"):
        probes.overfit_batch(nn.Linear(2, 1), function, torch.optim.SGD, batch)


# --- lr_range_test --------------------------------------------------------------------


def test_its_steps_are_those_with_growing_rates():
    data = [tuple(batch) for batch in loader()]
    model = network(dropout=0.2)
    found = probes.lr_range_test(
        model,
        CROSS_ENTROPY,
        torch.optim.Adam,
        data,
        lowest=1e-4,
        highest=1e-2,
        steps=20,
        seed=5,
    )
    assert found.rates[0] == 1e-4
    assert found.rates[-1] == pytest.approx(1e-2)
    growths = [b / a for a, b in itertools.pairwise(found.rates)]
    assert growths == pytest.approx([growths[0]] * 19)
    # By hand, with an instance whose rate is set as a scheduler sets it.
    adam = torch.optim.Adam(model.parameters())
    goal = ll.supervised(model, CROSS_ENTROPY)
    step = ll.make_step(goal, adam)
    params, opt_state = ll.init(goal, adam, seed=5)
    batches = itertools.cycle(data)
    for rate, loss in zip(found.rates, found.losses, strict=True):
        adam.param_groups[0]["lr"] = rate
        opt_state = ll.follow(adam, opt_state)
        params, opt_state, loss_sum, n = step(params, opt_state, next(batches))
        assert loss == loss_sum.double().item() / n.item()


def test_groups_keep_the_ratios_of_their_rates():
    model = nn.Linear(1, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    sgd = torch.optim.SGD(groups, lr=1.0)
    one = torch.ones(1, 1)
    found = probes.lr_range_test(
        model, nn.L1Loss(), sgd, (one, 100 * one), lowest=1e-3, highest=1, steps=20
    )
    # The gradient of both is -1: each step lowers the loss by rate + rate / 2.
    falls = [a - b for a, b in itertools.pairwise(found.losses)]
    assert falls == pytest.approx([1.5 * rate for rate in found.rates[:-1]], rel=1e-2)


def test_the_smoothed_loss_is_a_weighted_exact_mean():
    torch.manual_seed(2)
    weights = torch.randint(1, 5, (96,))
    x, y = digits()[:96]
    data = [(x[i : i + 7], y[i : i + 7], weights[i : i + 7]) for i in range(0, 96, 7)]
    found = probes.lr_range_test(
        network(), CROSS_ENTROPY, torch.optim.SGD, data, steps=20, highest=1e-3
    )
    n = [batch[2].sum().item() for batch in itertools.islice(itertools.cycle(data), 20)]
    for i in range(1, 19):
        near = [(1, i - 1), (2, i), (1, i + 1)]
        expected = sum(w * n[j] * found.losses[j] for w, j in near)
        expected /= sum(w * n[j] for w, j in near)
        assert found.smoothed[i] == pytest.approx(expected, rel=1e-12)
        plain = sum(w * found.losses[j] for w, j in near) / 4
        assert n[i - 1] == n[i + 1] or plain != found.smoothed[i]


@pytest.mark.parametrize("curvature", [1.0, 100.0])
def test_the_suggestion_lies_where_it_must_on_a_parabola(curvature):
    """Gradient descent on c/2 w^2 converges up to the rate 2/c and is best at 1/c."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)

    def parabola(output, target):
        return curvature / 2 * output.squeeze(1) ** 2

    data = torch.ones(4, 1), torch.zeros(4)
    found = probes.lr_range_test(
        model, parabola, torch.optim.SGD, data, lowest=1e-6, highest=100
    )
    assert found.diverged
    assert 0.02 / curvature < found.suggestion < 2 / curvature
    assert f"Suggested rate {found.suggestion:.2g}" in str(found)


def test_without_a_fall_there_is_no_suggestion_but_a_reason():
    """Targets that are noise: over 40 seeds, noise is never taken for a fall."""
    for seed in range(40):
        torch.manual_seed(seed)
        x, y = torch.zeros(1600, 1), torch.randn(1600, 1)
        data = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 1600, 16)]
        found = probes.lr_range_test(
            nn.Linear(1, 1), nn.MSELoss(), torch.optim.SGD, data, highest=1e-5
        )
        assert found.suggestion is None
        assert not found.diverged
        assert "noise" in found.reason
        # Teeth: the steepest descent alone would name a rate in every case.
        bottom = found.smoothed.index(min(found.smoothed[5:95]))
        assert any(b < a for a, b in itertools.pairwise(found.smoothed[: bottom + 1]))


def test_a_loss_that_falls_to_the_end_asks_for_higher_rates():
    x = torch.linspace(-1, 1, 32).reshape(-1, 1)
    found = probes.lr_range_test(
        nn.Linear(1, 1), nn.MSELoss(), torch.optim.SGD, (x, 3 * x), highest=1e-2
    )
    assert found.suggestion is None
    assert "raise highest" in str(found)


def test_rates_that_are_too_high_from_the_start():
    x = torch.linspace(-1, 1, 32).reshape(-1, 1)
    found = probes.lr_range_test(
        nn.Linear(1, 1), nn.MSELoss(), torch.optim.SGD, (x, x), lowest=1e3, highest=1e9
    )
    assert found.suggestion is None
    assert found.diverged
    assert "lower rate" in found.reason
    assert len(found.rates) <= 10


def test_what_came_after_infinity_is_left_out():
    x = torch.linspace(-1, 1, 32).reshape(-1, 1)
    found = probes.lr_range_test(
        nn.Linear(1, 1), nn.MSELoss(), torch.optim.SGD, (x, x), highest=1e30, steps=30
    )
    assert found.diverged
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 30
    assert all(map(math.isfinite, found.losses + found.smoothed))


def test_the_picture_shows_the_suggestion(tmp_path):
    x = torch.linspace(-1, 1, 64).reshape(-1, 1)
    found = probes.lr_range_test(
        nn.Linear(1, 1), nn.MSELoss(), torch.optim.SGD, (x, 3 * x + 1)
    )
    figure = found.plot(tmp_path / "range.png")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["smoothed"].get_ydata()) == found.smoothed
    assert list(lines["each batch"].get_xdata()) == found.rates
    (marked,) = (line for name, line in lines.items() if name.startswith("suggestion"))
    assert marked.get_xdata()[0] == found.suggestion
    assert (tmp_path / "range.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_a_suggestion_is_drawn_too():
    x = torch.zeros(32, 1)
    found = probes.lr_range_test(
        nn.Linear(1, 1, bias=False), nn.MSELoss(), torch.optim.SGD, (x, x + 1)
    )
    assert found.suggestion is None
    assert len(found.plot().axes[0].lines) == 2
    assert probes.RangeTest([], [], [], None, "", diverged=True).plot().axes


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install"):
        probes.RangeTest([], [], [], None, "", diverged=True).plot()


class Sign:
    def init(self, params):
        return ()

    def update(self, grads, state, params):
        return {name: -0.01 * g.sign() for name, g in grads.items()}, state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": []}, "has no batches: its length is 0"),
        ({"loader": iter([])}, "gave no batches"),
        ({"loader": (x for x in [*loader()][:2])}, "gave no batches"),
        ({"steps": 19}, r"steps=...\) must be at least 20, got 19"),
        ({"steps": 20.0}, r"steps=...\) must be an int"),
        ({"lowest": 1.0, "highest": 0.1}, r"lowest=...\) must be between 0 and 0.1"),
        ({"highest": math.inf}, r"highest=...\) must be between 0 and inf"),
        ({"lowest": "a"}, r"lowest=...\) must be a number"),
        ({"optimizer": Sign()}, "only the optimizer itself knows its rate"),
        ({"optimizer": ll.optim.SGD(lr=0.0)}, "the first parameter group is 0"),
    ],
)
def test_what_lr_range_test_refuses(options, message):
    call = {
        "model": network(),
        "loss_fn": CROSS_ENTROPY,
        "optimizer": torch.optim.SGD,
        "loader": loader(),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        probes.lr_range_test(**{**call, **options})


# --- gradient_noise_scale -------------------------------------------------------------


def per_sample(model, x, y):
    """The gradient of each sample's own squared error, (B, P), float64."""
    rows = []
    for one, target in zip(x, y, strict=True):
        loss = ((model(one[None]) - target[None]) ** 2).mean()
        grads = torch.autograd.grad(loss, [*model.parameters()])
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows).double().numpy()


def cut(x, y, size):
    return [
        (x[i : i + size], y[i : i + size]) for i in range(0, len(x) - size + 1, size)
    ]


@pytest.mark.parametrize(("size", "outputs"), [(1, 1), (4, 1), (4, 3)])
def test_it_is_the_estimator_of_the_paper(size, outputs):
    torch.manual_seed(0)
    model = nn.Linear(3, outputs).double()
    x, y = torch.randn(40, 3).double(), torch.randn(40, outputs).double()
    found = probes.gradient_noise_scale(model, nn.MSELoss(), cut(x, y, size))
    gradients = per_sample(model, x, y)
    small = gradients[: 40 // size * size].reshape(-1, size, gradients.shape[1])
    small = small.mean(axis=1)[: found.batches]
    g_small = (small**2).sum(axis=1).mean()
    g_big = (small.mean(axis=0) ** 2).sum()
    big = size * len(small)
    square = (big * g_big - size * g_small) / (big - size)
    trace = (g_small - g_big) / (1 / size - 1 / big)
    assert found.gradient == pytest.approx(square, rel=1e-9)
    assert found.trace == pytest.approx(trace, rel=1e-9)
    assert found.noise_scale == pytest.approx(trace / square, rel=1e-9)
    assert found.batch_size == size


def test_single_samples_give_the_covariance_of_numpy():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(30, 3).double(), torch.randn(30, 2).double()
    found = probes.gradient_noise_scale(model, nn.MSELoss(), cut(x, y, 1), batches=30)
    gradients = per_sample(model, x, y)
    assert found.trace == pytest.approx(np.trace(np.cov(gradients.T)), rel=1e-9)


class Offset(nn.Module):
    """y = b + x, so that the gradient of half a squared error is b + x - y."""

    def __init__(self, size):
        super().__init__()
        self.b = nn.Parameter(torch.full((size,), 0.5).double())

    def forward(self, x):
        return self.b + x


def half_square(output, target):
    return ((output - target) ** 2).sum(dim=1) / 2


def noise_around(sizes, seed, sigma=2.0, width=5):
    """Batches in which |G|^2 = width / 4, tr(Sigma) = width sigma^2, in closed form."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.zeros(size, width).double(),
            sigma * torch.randn(size, width, generator=generator).double(),
        )
        for size in sizes
    ]


SIZES = {"equal": [8] * 16, "unequal": [4, 12] * 8, "odd last": [8] * 15 + [1]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_both_estimates_are_unbiased_and_the_interval_holds(sizes):
    """Closed form: tr(Sigma) = 20, |G|^2 = 1.25, so the scale is 16."""
    found = [
        probes.gradient_noise_scale(Offset(5), half_square, noise_around(sizes, seed))
        for seed in range(200)
    ]
    for name, truth in (("trace", 20.0), ("gradient", 1.25)):
        values = [getattr(each, name) for each in found]
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert abs(statistics.fmean(values) - truth) < 4 * error
    covered = sum(each.low <= 16 <= each.high for each in found)
    assert 0.88 * 200 <= covered < 200
    # Teeth: the squared mean gradient itself is biased by trace / N.
    naive = [each.gradient + each.trace / sum(sizes) for each in found]
    error = statistics.stdev(naive) / math.sqrt(len(naive))
    assert statistics.fmean(naive) - 1.25 > 4 * error


def test_weights_of_samples_that_are_all_the_same_change_nothing():
    data = noise_around([8] * 10, 0)
    heavy = [(x, y, torch.full((8,), 3)) for x, y in data]
    one, other = (
        probes.gradient_noise_scale(Offset(5), half_square, each)
        for each in (data, heavy)
    )
    assert other.noise_scale == pytest.approx(one.noise_scale, rel=1e-9)
    assert other.trace == pytest.approx(one.trace, rel=1e-9)
    assert other.high == pytest.approx(one.high, rel=1e-9)


def test_at_the_minimum_the_scale_has_no_upper_end():
    model = Offset(5)
    nn.init.zeros_(model.b)
    ends = [
        probes.gradient_noise_scale(model, half_square, noise_around([8] * 12, seed))
        for seed in range(50)
    ]
    assert sum(each.high == math.inf for each in ends) >= 45
    assert any(each.noise_scale == math.inf for each in ends)
    assert all(0 <= each.low <= each.noise_scale for each in ends)
    assert "inf" in str(ends[0])


def test_without_noise_the_scale_is_zero():
    batch = torch.zeros(4, 5).double(), torch.zeros(4, 5).double()
    found = probes.gradient_noise_scale(Offset(5), half_square, [batch] * 4)
    assert found.noise_scale == found.low == found.high == 0


def test_the_interval_is_that_of_gradients_kept_in_memory():
    """Leaving batches out one by one, with dropout, BatchNorm and class weights."""
    model = network(dropout=0.5).double()
    loss_fn = nn.CrossEntropyLoss(torch.arange(1, 11).double())
    data = [(x.double(), y) for x, y in loader(20)]
    found = probes.gradient_noise_scale(model, loss_fn, data, level=0.9, seed=2)

    recording = ll.Optimizer(
        lambda params: dict.fromkeys(params),
        lambda grads, _, params: ({k: 0 * t for k, t in grads.items()}, grads),
    )
    goal = ll.supervised(model, loss_fn)
    step = ll.make_step(goal, recording)
    params, opt_state = ll.init(goal, recording, seed=2)
    g, n = [], []
    for batch in data:
        with torch.no_grad():
            _, opt_state, _, weight = step(params, opt_state, batch)
        g.append(torch.cat([t.flatten() for t in opt_state.slots.values()]).numpy())
        n.append(weight.item())
    g, n, k = np.stack(g), np.array(n), len(g)

    def estimates(g, n):
        mean = (n[:, None] * g).sum(axis=0) / n.sum()
        trace = (n * ((g - mean) ** 2).sum(axis=1)).sum() / (len(g) - 1)
        return np.array([trace, (mean**2).sum() - trace / n.sum()])

    trace, square = estimates(g, n)
    rest = [estimates(np.delete(g, i, 0), np.delete(n, i)) for i in range(k)]
    covariance = np.cov(np.stack(rest).T, ddof=0) * (k - 1)
    unit = 96 / n.sum()
    assert found.batch_size == 96 / 5
    assert found.trace == pytest.approx(unit * trace, rel=1e-9)
    assert found.gradient == pytest.approx(square, rel=1e-9)
    for end in (found.low, found.high):
        along = np.array([1.0, -end / unit])
        error = math.sqrt(along @ covariance @ along)
        apart = abs(along @ [trace, square]) / error
        assert apart == pytest.approx(statistics.NormalDist().inv_cdf(0.95), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": [*loader()][:2]}, "loader gives 2 batches"),
        ({"loader": []}, "has no batches: its length is 0"),
        ({"batches": 2}, r"batches=...\) must be at least 3, got 2"),
        ({"level": 1.0}, r"level=...\) must be between 0 and 1, got 1.0"),
        (
            {
                "loader": [
                    *[*loader()][:3],
                    (torch.ones(2, 16), torch.tensor([-100] * 2)),
                ]
            },
            "batch 4 has total weight 0",
        ),
    ],
)
def test_what_gradient_noise_scale_refuses(options, message):
    call = {"model": network(), "loss_fn": CROSS_ENTROPY, "loader": loader()}
    with pytest.raises((ValueError, TypeError), match=message):
        probes.gradient_noise_scale(**{**call, **options})


def test_gradients_that_are_zero_have_no_scale():
    batch = torch.zeros(4, 5).double(), torch.full((4, 5), 0.5).double()
    with pytest.raises(ValueError, match="all gradients are zero"):
        probes.gradient_noise_scale(Offset(5), half_square, [batch] * 4)


# --- count ----------------------------------------------------------------------------


def test_parameters_buffers_and_bytes():
    model = network()
    model[0].weight.requires_grad_(False)
    found = probes.count(model)
    assert (found.trainable, found.frozen) == (32 + 64 + 320 + 10, 16 * 32)
    assert found.buffers == 32 + 32 + 1
    assert found.bytes == 4 * (found.trainable + found.frozen + 64) + 8
    assert found.optimizer_bytes is found.forward_flops is found.step_flops is None
    assert str(found).splitlines()[0] == "parameters  426 trainable, 512 frozen"


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert probes.count(model).trainable == 16 + 4 + 4


@pytest.mark.parametrize(
    ("optimizer", "per_parameter", "numbers"),
    [
        (ll.optim.SGD(), 0, 2),
        (ll.optim.SGD(momentum=0.9), 1, 3),
        (ll.optim.AdamW(), 2, 6),
        (torch.optim.Adam, 2, 5),
    ],
)
def test_bytes_of_the_optimizer(optimizer, per_parameter, numbers):
    model = nn.Linear(100, 10)
    found = probes.count(model, optimizer=optimizer)
    state = 4 * 1010 * per_parameter
    assert state <= found.optimizer_bytes <= state + 8 * (numbers + 2)


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW])
def test_operations_of_a_perceptron(optimizer):
    """2 B n m forward; backward as much for the weights, and for inner inputs."""
    model = nn.Sequential(nn.Linear(100, 30), nn.ReLU(), nn.Linear(30, 10))
    batch = torch.ones(64, 100), torch.ones(64, 10)
    found = probes.count(model, nn.MSELoss(), batch, optimizer)
    first, second = 2 * 64 * 100 * 30, 2 * 64 * 30 * 10
    assert found.forward_flops == first + second
    assert found.step_flops == 2 * first + 3 * second


def test_operations_of_layers_that_are_not_plain():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten()
    )
    batch = torch.ones(8, 1, 8, 8), torch.ones(8, 144)
    found = probes.count(model, nn.MSELoss(), batch)
    assert found.forward_flops == 2 * 8 * 4 * 36 * 9
    assert found.step_flops == 2 * found.forward_flops


class Peeks(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


def test_a_model_that_looks_at_values_is_counted_with_data():
    batch = torch.ones(8, 4), torch.ones(8, 4)
    found = probes.count(Peeks(4, 4), nn.MSELoss(), batch)
    assert found.forward_flops == 2 * 8 * 4 * 4


def test_no_operation_is_computed():
    """The output for these rows, all the same in memory, would take 40 TB."""
    rows = 10**10
    batch = torch.ones(1, 100).expand(rows, 100), torch.ones(1, 1000).expand(rows, 1000)
    found = probes.count(nn.Linear(100, 1000), nn.MSELoss(), batch)
    assert found.forward_flops == 2 * rows * 100 * 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_fn": CROSS_ENTROPY}, "pass both loss_fn and batch"),
        ({"batch": loader()}, "pass both loss_fn and batch"),
        ({"model": 3}, r"probes.count: model must be a torch.nn.Module, got int"),
        ({"optimizer": 3}, "is not an optimizer"),
    ],
)
def test_what_count_refuses(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        probes.count(**{"model": network(), **options})


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (4040, "4.04 kB"),
        (10**7, "10 MB"),
        (5 * 10**15, "5e+03 TB"),
    ],
)
def test_numbers_have_units(number, text):
    found = probes.Count(1, 0, 0, number)
    assert f"memory      {text} of" in str(found)


# --- label permutation ----------------------------------------------------------------


def lowest_loss(val):
    def train(data):
        torch.manual_seed(0)
        result = ll.fit(
            nn.Linear(16, 10),
            CROSS_ENTROPY,
            ll.optim.Adam(lr=0.05),
            data,
            val,
            epochs=6,
            compile=False,
            progress=False,
        )
        return min(result.history["val_loss"])

    return train


@pytest.mark.parametrize("batched", [False, True])
def test_permuted_labels_tell_information_from_none(batched):
    x, y = digits(160).tensors
    val = x[96:], y[96:]
    for inputs, informed in ((x, True), (torch.randn(160, 16), False)):
        data = inputs[:96], y[:96]
        if batched:
            data = DataLoader(TensorDataset(*data), 16, shuffle=True)
        before = torch.get_rng_state()
        kept = lowest_loss((inputs[96:], y[96:]) if not informed else val)
        found = probes.label_permutation(kept, data, permutations=9)
        assert found.informed == informed
        assert ("say something" in str(found)) == informed
        if informed:
            assert found.p_value == 0.1
            assert len(found.permuted) == 9
        if not batched and informed:
            torch.manual_seed(0)
            assert torch.equal(y, digits(160).tensors[1]), "the targets were changed"
        torch.set_rng_state(before)


@pytest.mark.parametrize(
    ("losses", "informed", "p_value"),
    [
        ([1.0, 2.0, 2.0, 2.0], True, 1 / 4),
        ([1.0, 2.0, 1.0], False, 2 / 3),
        ([1.0, math.nan], False, 1.0),
        ([math.inf, math.inf], False, 1.0),
    ],
)
def test_it_ends_with_the_first_permutation_that_does_as_well(
    losses, informed, p_value
):
    seen, left = [], iter(losses)

    def train(data):
        seen.append(data[1])
        return next(left)

    y = torch.arange(20)
    found = probes.label_permutation(train, (torch.ones(20, 1), y), permutations=3)
    assert (found.informed, found.p_value) == (informed, p_value)
    assert next(left, None) is None, "it went on, or ended too early"
    assert torch.equal(seen[0], y)
    for permuted in seen[1:]:
        assert torch.equal(permuted.sort()[0], y)
        assert not torch.equal(permuted, y)


def test_the_like_of_the_loader_is_passed_on():
    dataset = TensorDataset(torch.arange(10.0), torch.arange(10), torch.ones(10))
    seen = []

    def train(data):
        seen.append(list(data))
        return float(len(seen))

    probes.label_permutation(train, DataLoader(dataset, 4, drop_last=True))
    assert [len(inputs) for inputs, _, _ in seen[0]] == [4, 4]
    assert torch.equal(seen[0][0][0], torch.arange(4.0))
    assert len(seen) == 20


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([torch.ones(3)], {}, TypeError, "Put the data into memory"),
        ((torch.ones(3),), {}, TypeError, "inputs and targets"),
        ((torch.ones(3), torch.ones(3)), {"permutations": 0}, ValueError, "at least 1"),
    ],
)
def test_permutations_that_cannot_be_are_refused(data, options, error, message):
    with pytest.raises(error, match=message):
        probes.label_permutation(lambda data: 1.0, data, **options)
    with pytest.raises(TypeError, match="lowest validation loss, a number"):
        probes.label_permutation(lambda data: "low", (torch.ones(3), torch.ones(3)))


# --- a reference model ----------------------------------------------------------------


def test_models_are_compared_on_the_same_samples():
    """As by scipy's paired t-test."""
    x, y = torch.randn(41, 3).double(), torch.randn(41, 1).double()
    one, other = (
        nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)).double() for _ in "ab"
    )
    loader = DataLoader(TensorDataset(x, y), 8)
    found = probes.compare_models(one, other, nn.MSELoss(), loader)
    with torch.no_grad():
        losses = [((each[0](x) - y) ** 2).flatten().numpy() for each in (one, other)]
    assert found.loss == pytest.approx(losses[0].mean(), rel=1e-12)
    assert found.other_loss == pytest.approx(losses[1].mean(), rel=1e-12)
    assert found.z == pytest.approx(stats.ttest_rel(*losses).statistic, rel=1e-9)
    turned = probes.compare_models(other, one, nn.MSELoss(), loader)
    assert turned.z == pytest.approx(-found.z)
    assert probes.compare_models(one, one, nn.MSELoss(), loader).z == 0
    assert one.training
    assert other.training


def test_a_linear_model_of_rings_is_too_simple():
    """The reference tells, and the diagnosis says so."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=generator)
    y = (x.norm(dim=1) > 1.2).long()
    train, val = (x[:200], y[:200]), (x[200:], y[200:])

    def fitted(model):
        return ll.fit(
            model,
            CROSS_ENTROPY,
            ll.optim.Adam(lr=0.02),
            train,
            val,
            epochs=40,
            compile=False,
            progress=False,
        )

    torch.manual_seed(0)
    model, reference = nn.Linear(2, 2), probes.reference_model(train, 2, width=32)
    result = fitted(model)
    fitted(reference)
    found = probes.compare_models(model, reference, CROSS_ENTROPY, val)
    assert found.other_loss < found.loss
    assert found.z > 3
    facts = ll.Facts(reference_val_loss=found.other_loss, reference_z=found.z)
    names = [f.name for f in ll.diagnose(result, facts=facts).findings]
    assert "too_simple" in names
    alone = [f.name for f in ll.diagnose(result).findings]
    assert "too_simple" not in alone


def test_references_that_cannot_be_are_refused():
    words = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4)
    with pytest.raises(TypeError, match="one tensor of real numbers"):
        probes.reference_model(words, 2)
    with pytest.raises(ValueError, match="outputs"):
        probes.reference_model((torch.ones(2, 2), torch.ones(2)), 0)
    model, one = nn.Linear(2, 1), (torch.ones(1, 2), torch.ones(1, 1))
    with pytest.raises(ValueError, match="two samples"):
        probes.compare_models(model, model, nn.MSELoss(), one)


# --- a lower rate ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "too_high"), [(0.999, True), (1.02, True), (0.2, False)]
)
def test_a_rate_near_its_limit_is_too_high(share, too_high):
    """Gradient descent on a quadratic diverges from 2 / largest curvature on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator).double()
    y = (x @ torch.tensor([1.0, 2.0, 3.0, 4.0]).double()).unsqueeze(1)
    curvature = 2 * torch.linalg.eigvalsh(x.T @ x / 64)[-1].item()
    model = nn.Linear(4, 1, bias=False).double()
    sgd = ll.optim.SGD(lr=share * 2 / curvature)
    if not too_high:  # at a minimum that is not zero, no rate is better
        y = y + torch.randn(64, 1, generator=generator).double()
    epochs = 100  # then only the steepest direction is left
    result = ll.fit(
        model, nn.MSELoss(), sgd, (x, y), epochs=epochs, progress=False, compile=False
    )
    state = {"params": result.params, "opt_state": result.opt_state}
    kept = copy.deepcopy(state)
    found = probes.lower_rate(model, nn.MSELoss(), sgd, (x, y), **state, epochs=3)
    assert found.too_high == too_high
    assert ("is too high" in str(found)) == too_high
    assert torch.equal(result.params["weight"], kept["params"]["weight"])


def test_forks_differ_by_the_rate_alone():
    torch.manual_seed(0)
    model = network(dropout=0.5)
    data = DataLoader(digits(), 16, shuffle=True, generator=torch.Generator())
    adam = torch.optim.Adam(model.parameters())
    goal = ll.supervised(model, CROSS_ENTROPY)
    params, opt_state = ll.init(goal, adam)
    before = data.generator.get_state(), torch.get_rng_state()
    state = {"params": params, "opt_state": opt_state}
    first, again = (
        probes.lower_rate(model, CROSS_ENTROPY, adam, data, **state, divisor=d)
        for d in (2.0, 4.0)
    )
    assert first.loss == again.loss
    assert first.lower_loss < again.lower_loss
    assert torch.equal(data.generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_forks_that_cannot_be_are_refused():
    model, data = nn.Linear(2, 1), (torch.ones(4, 2), torch.ones(4, 1))
    goal = ll.supervised(model, nn.MSELoss())
    params, opt_state = ll.init(goal, ll.optim.SGD())
    state = {"params": params, "opt_state": opt_state}
    call = functools.partial(
        probes.lower_rate, model, nn.MSELoss(), ll.optim.SGD(), data
    )
    with pytest.raises(ValueError, match="divisor"):
        call(**state, divisor=1.0)
    with pytest.raises(ValueError, match="epochs"):
        call(**state, epochs=0)
    with pytest.raises(TypeError, match="has no rates"):
        call(params=params, opt_state=opt_state._replace(slots={}))
    found = probes.RateFork(math.nan, 1.0, 10.0)
    assert found.too_high
    assert not probes.RateFork(math.nan, math.nan, 10.0).too_high
