"""Weights of samples, padding to one shape, and samples that act on each other."""

import itertools
import re

import pytest
import torch
from cases import mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lossloop as ll

torch.manual_seed(0)
X, Y = torch.randn(22, 5), torch.randint(0, 3, (22,))
W = torch.tensor([1.0, 5.0, 0.2])
LOSS = nn.CrossEntropyLoss(weight=W)


def loader(size=8, *tensors):
    data = TensorDataset(*(tensors or (X, Y)))
    return DataLoader(data, size, shuffle=True, generator=torch.Generator())


def run(model, loss=LOSS, train=None, val=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"epochs": 3, "progress": False, **options}
    return ll.fit(
        model, loss, optimizer, loader() if train is None else train, val, **options
    )


def model(seed=1):
    torch.manual_seed(seed)
    return mlp()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.booleans())
def test_all_batches_are_as_large_as_the_first(sizes, weighted):
    sizes = sorted(sizes, reverse=True)
    batches = [
        (torch.randn(n, 2), torch.arange(n), *([torch.rand(n)] if weighted else []))
        for n in sizes
    ]
    padded = ll.pad_last(batches)
    assert len(padded) == len(batches)
    for _ in range(2):  # as often as the batches themselves
        for (x, y, *w), (inputs, targets, weights) in zip(batches, padded, strict=True):
            n = len(x)
            assert len(inputs) == len(targets) == len(weights) == sizes[0]
            assert inputs[:n].equal(x)
            assert targets[:n].equal(y)
            assert weights[:n].equal(w[0] if weighted else torch.ones(n).long())
            assert not weights[n:].any()
            assert all(row.equal(x[-1]) for row in inputs[n:])


def test_full_batches_are_not_copied():
    (inputs, targets, _), _ = ll.pad_last([(X[:3], Y[:3], None), (X[3:4], Y[3:4])])
    assert inputs.data_ptr() == X.data_ptr()
    assert targets.data_ptr() == Y.data_ptr()


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [1, 7])
def test_padding_keeps_the_memory_format(form, channels, last):
    images = torch.randn(8, channels, 6, 6).to(memory_format=form)
    other = torch.randn(last, channels, 6, 6).to(memory_format=form)
    batches = [(images, Y[:8]), (other, Y[:last])]
    one, two = ll.pad_last(batches)
    if last > 1:  # of one sample, the format cannot be told
        assert one[0].stride() == two[0].stride()
    assert two[0][:last].equal(other)


def test_padding_keeps_the_form_of_a_batch():
    inputs = {"a": torch.ones(1, 2), "b": [torch.zeros(1), torch.tensor(3.0), None]}
    batches = [(torch.ones(3), torch.ones(3)), [inputs, torch.ones(1)]]
    _, (padded, targets, weights) = ll.pad_last(batches)
    assert padded["a"].shape == (3, 2)
    assert padded["b"][0].shape == (3,)
    assert padded["b"][1] is inputs["b"][1]
    assert targets.tolist() == [1, 1, 1]
    assert weights.tolist() == [1, 0, 0]


def test_padding_changes_no_sum_and_no_update():
    plain = model()
    one = run(plain, val=loader(5))
    padded = model()
    two = run(padded, val=loader(5), pad_last=True)
    for name in ("train_loss", "val_loss", "n_train", "n_val"):
        assert two.history[name] == pytest.approx(one.history[name], rel=1e-6)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(padded.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_padding_makes_one_shape():
    goal = ll.supervised(model(), LOSS)
    eager = ll.make_step(goal, torch.optim.SGD)
    for batches, shapes in ((loader(), 2), (ll.pad_last(loader()), 1)):
        step = ll.compile_step(eager, backend="eager")
        ll.fold(step, *ll.init(goal, torch.optim.SGD), batches)
        assert step.body.compilations == shapes


def test_weights_in_the_batch_weigh_the_mean():
    weights = torch.rand(22)
    net = model()
    result = run(
        net, nn.MSELoss(), loader(8, X, X[:, :3], weights), (X, X[:, :3], weights)
    )
    errors = ((net(X) - X[:, :3]) ** 2).double().mean(1)
    expected = (errors * weights).sum() / weights.double().sum()
    assert min(result.history["val_loss"]) == pytest.approx(expected.item(), rel=1e-6)
    assert result.history[0]["n_val"] == pytest.approx(
        3 * weights.double().sum().item(), rel=1e-12
    )


def test_padded_loaders_are_looked_at_like_any():
    own = loader()
    state = own.generator.get_state()
    ll.fit(
        model(),
        LOSS,
        torch.optim.SGD,
        (X, Y),
        ll.pad_last(own),
        epochs=1,
        progress=False,
        on_epoch=lambda record: "stop",
    )
    # One pass over the validation data, and the look at it before was undone.
    once = torch.Generator().set_state(state)
    list(DataLoader(TensorDataset(X), 8, shuffle=True, generator=once))
    assert own.generator.get_state().equal(once.get_state())
    with pytest.raises(ValueError, match="one-shot iterator"):
        run(model(), train=ll.pad_last(iter(own)))


class Stream(IterableDataset):
    def __iter__(self):
        return zip(X, Y, strict=True)


def test_a_stream_is_padded_too():
    streams = DataLoader(Stream(), 8)
    with pytest.raises(TypeError):
        len(ll.pad_last(streams))
    result = run(model(), train=streams, pad_last=True)
    assert (
        result.history["n_train"]
        == [pytest.approx(LOSS.weight[Y].double().sum().item())] * 3
    )


def test_a_stream_may_be_validated_on_in_a_run_that_is_told_of():
    """In the end progress tells of overfitting, from data that lie in memory."""
    for val in (DataLoader(Stream(), 8), ll.pad_last(DataLoader(Stream(), 8))):
        result = run(model(), val=val, epochs=8, progress=True)
        assert len(result.history) == 8


GROWING = [(X[:2], Y[:2]), (X[:3], Y[:3])]
NOT_PADDED = {
    "growing": (GROWING, ValueError, "batch 2 has 3 samples, more than the first"),
    "a dictionary": ([{"x": X}], TypeError, "got a dict"),
    "empty": ([(X[:0], Y[:0])], ValueError, "no sample to repeat"),
    "lengths": ([(X, Y[:3])], ValueError, "do not share their first dimension"),
    "a number as weights": ([(X, Y, 1.0)], TypeError, "weights of a batch are a float"),
}


@pytest.mark.parametrize("name", NOT_PADDED)
def test_what_cannot_be_padded_is_refused(name):
    batches, kind, words = NOT_PADDED[name]
    with pytest.raises(kind, match=words):
        list(ll.pad_last(batches))


# --- samples that act on each other ---------------------------------------------------


def contrastive(output, target):
    """One loss per sample, of which each depends on all samples."""
    unit = F.normalize(output, dim=1)
    return F.cross_entropy(unit @ unit.T, torch.arange(len(unit)), reduction="none")


def pairwise(output, target):
    gaps = (output.view(-1, 1) - output.view(1, -1)).abs()
    return gaps.sum(), gaps.numel()


def mean_as_sum(output, target):
    return F.cross_entropy(output, target), len(target)


def normalised(output, target):
    losses = F.cross_entropy(output, target, reduction="none")
    return losses * losses.detach() / losses.detach().mean()


def with_penalty(output, target):
    losses = F.cross_entropy(output, target, reduction="none")
    return losses.sum() + 1.0, len(target)


NOT_ADDITIVE = {
    contrastive: "Samples are compared with each other",
    pairwise: "Samples are compared with each other",
    mean_as_sum: "looks like a mean: return losses.sum",
    normalised: "Samples are compared with each other",
    with_penalty: "multiply a penalty on the weights by n",
    ll.batch_mean(lambda output, target: F.cross_entropy(output, target, W)): "with",
}


@pytest.mark.parametrize("loss", NOT_ADDITIVE, ids=lambda loss: loss.__name__)
def test_a_loss_that_does_not_add_up_is_noticed(loss):
    words = NOT_ADDITIVE[loss]
    with pytest.warns(UserWarning, match="no mean over samples") as caught:
        run(model(), loss, epochs=1)
    (warning,) = caught
    assert words in str(warning.message)
    assert "8 samples together have loss_sum" in str(warning.message)
    assert __file__ == warning.filename


def smooth(output, target):
    return F.cross_entropy(output, target, reduction="none", label_smoothing=0.1)


def weighted(output, target):
    weights = W.to(output)[target]
    losses = F.cross_entropy(output, target, reduction="none")
    return (weights * losses).sum(), weights.sum()


def noisy(output, target):
    return F.cross_entropy(output + torch.rand_like(output), target, reduction="none")


def only_whole_batches(output, target):
    assert_whole = output.view(8, 3) if len(output) == 8 else output.view(6, 3)
    return F.cross_entropy(assert_whole, target, reduction="none")


ADDITIVE = [
    smooth,
    weighted,
    noisy,  # cannot be told
    only_whole_batches,  # likewise
    ll.batch_mean(lambda output, target: F.cross_entropy(output, target)),
]


@pytest.mark.parametrize("loss", ADDITIVE, ids=lambda loss: loss.__name__)
def test_no_false_alarm(loss):  # warnings are errors
    run(model(), loss, epochs=1)


@pytest.mark.parametrize("size", [8, 64, 512])
@pytest.mark.parametrize("seed", range(5))
def test_what_many_samples_would_hide_is_noticed(size, seed):
    torch.manual_seed(seed)
    batch = torch.randn(size, 5), torch.randint(0, 3, (size,))
    with pytest.warns(UserWarning, match="no mean over samples"):
        run(model(seed), normalised, batch, epochs=1)


def cancelling(output, target):
    """A policy gradient with normalised advantages: the sum is about 0."""
    actions, advantages = target
    logs = output.log_softmax(1).gather(1, actions[:, None])[:, 0]
    return -(logs * advantages.to(logs)).sum(), len(actions)


def infinite(output, target):
    return output[:, 0] * torch.where(torch.arange(len(output)) == 0, torch.inf, 1.0)


def test_no_false_alarm_for_sums_that_cancel():
    advantages = torch.randn(64)
    advantages = (advantages - advantages.mean()) / advantages.std()
    actions = torch.randint(0, 3, (64,))
    net = model()
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    run(net, cancelling, [(torch.randn(64, 5), (actions, advantages))], epochs=1)


def test_no_false_alarm_for_a_perfect_fit():
    net = model()
    targets = net(X).detach()
    run(net, nn.MSELoss(), [(X, targets)], epochs=1, accumulate=2)
    run(net, nn.MSELoss(), [(X, targets)], epochs=1, pad_last=True)


def test_no_false_alarm_for_a_loss_that_is_not_finite():
    with pytest.raises(ll.NonFiniteError, match="loss"):  # and no warning before
        run(model(), infinite, (X, Y), epochs=1, compile=False)


class Auxiliary(nn.Module):
    """Has another output in training, as Inception has."""

    def __init__(self):
        super().__init__()
        self.main, self.aux = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        both = {"main": self.main(x)}
        return {**both, "aux": self.aux(x)} if self.training else both


class WholeBatches(nn.Module):
    """Takes batches of one size only."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        assert len(x) == 8
        return self.layer(x)


def both_heads(output, target):
    return smooth(output["main"], target) + 0.3 * smooth(output["aux"], target)


def table(output, target):
    return smooth(output, target) * {8: 1.0, 6: 1.0}[len(output)]


@pytest.mark.parametrize(
    ("net", "loss", "options"),
    [
        (Auxiliary, both_heads, {}),
        (WholeBatches, smooth, {"pad_last": True}),
        (WholeBatches, LOSS, {"pad_last": True}),
        (model, table, {}),
    ],
)
def test_a_look_that_fails_stops_nothing(net, loss, options):
    result = run(net(), loss, epochs=1, **options)
    assert len(result.history) == 1


def test_no_false_alarm_for_layers_that_couple_only_in_training():
    net = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)
    )
    run(net, smooth, epochs=1)


def test_an_objective_of_ones_own_is_looked_at_too():
    def function(model, batch):
        return contrastive(model(batch["x"]), None).sum(), len(batch["x"])

    net = model()
    batches = [{"x": X[:8]}, {"x": X[8:]}]
    goal = ll.objective(net, function)
    with pytest.warns(UserWarning, match="compared with each other"):
        run(net, goal, batches, epochs=1)


def test_looking_moves_no_generator():
    net, before = model(), torch.get_rng_state()
    run(net, noisy, (X, Y), epochs=1)
    assert torch.get_rng_state().equal(before)


class CentredByDropout(nn.Module):
    """Couples samples where random numbers hide it from a look at parts."""

    def forward(self, x):
        return F.dropout(x - x.mean(0), 0.2, self.training)


class Centred(nn.Module):
    """Couples samples without being a BatchNorm."""

    def forward(self, x):
        return x - x.mean(0) if self.training else x


def batch_norm():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


REFUSED = {
    "BatchNorm": (batch_norm, LOSS, r"model\.1 \(BatchNorm1d\) normalises.*GroupNorm"),
    "centring": (
        lambda: nn.Sequential(nn.Linear(5, 3), Centred()),
        LOSS,
        "train_loader pads batches.*became.*Leave pad_last out",
    ),
    "centring and dropout": (
        lambda: nn.Sequential(nn.Linear(5, 3), CentredByDropout()),
        LOSS,
        "train_loader pads batches.*became.*Leave pad_last out",
    ),
    "time first by mistake": (
        lambda: nn.TransformerEncoderLayer(5, 1, 4),
        lambda output, target: F.cross_entropy(output, target % 3, reduction="none"),
        "train_loader pads batches.*became.*Leave pad_last out",
    ),
    "a pair": (model, weighted, "weights of samples.*cannot be applied"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fit_does_not_pad_where_samples_are_coupled(name):
    net, loss, words = REFUSED[name]
    with pytest.raises(ValueError, match=re.compile(words, re.DOTALL)):
        run(net(), loss, pad_last=True)


def test_fit_does_not_pad_for_a_coupled_loss():
    with pytest.warns(UserWarning, match="no mean over samples"):  # noqa: SIM117
        with pytest.raises(ValueError, match="train_loader pads batches"):
            run(model(), contrastive, pad_last=True)


def test_validation_data_padded_by_hand_are_looked_at():
    val = ll.pad_last(loader(5))
    with pytest.warns(UserWarning, match="no mean over samples"):  # noqa: SIM117
        with pytest.raises(ValueError, match="val_loader pads batches"):
            run(model(), contrastive, val=val)
    with pytest.raises(ValueError, match=r"val_loader, batch 1.*cannot be applied"):
        run(model(), weighted, val=val)


def test_fit_does_not_pad_for_an_objective_of_ones_own():
    net = model()
    goal = ll.objective(net, lambda net, batch: weighted(net(batch[0]), batch[1]))
    with pytest.raises(TypeError, match=r"pass\s+pad_last\(loader\) as the loader"):
        run(net, goal, pad_last=True)


def test_frozen_batch_norm_may_be_padded():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    net = nn.Sequential(nn.Linear(5, 4), Frozen(4), nn.Linear(4, 3))
    result = run(net, pad_last=True, epochs=1)
    assert len(result.history) == 1


def test_teeth_padding_changes_the_statistics_of_batch_norm():
    # What padding would do to BatchNorm, had it not been refused.
    net = batch_norm()
    goal = ll.supervised(net, LOSS)
    params = goal.init()
    (batch,) = itertools.islice(ll.pad_last([(X[:5], Y[:5])]), 1)
    grown = [torch.cat([t, t[-1:]]) for t in batch[:2]]
    padded = (*grown, torch.tensor([1, 1, 1, 1, 1, 0]))
    assert goal.evaluate(params, padded)[0] == pytest.approx(
        goal.evaluate(params, batch)[0].item(), rel=1e-6
    )
    assert goal(params, padded)[0] != pytest.approx(
        goal(params, batch)[0].item(), rel=1e-3
    )
