"""The mean: exact sums, one division, and nothing that is never zero."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lossloop import Mean

PAIRS = st.lists(st.tuples(st.integers(-999, 999), st.integers(1, 9)), min_size=1)


def fold(pairs, mean=None):
    mean = mean or Mean.empty()
    for loss_sum, n in pairs:
        mean = mean.add(torch.tensor(float(loss_sum)), torch.tensor(n))
    return mean


@given(pairs=PAIRS, cut=st.integers(0, 20))
def test_merging_does_not_matter(pairs, cut):
    exact = float(Fraction(sum(s for s, _ in pairs), sum(n for _, n in pairs)))
    whole = fold(pairs)
    assert whole.value() == exact
    assert fold(pairs[:cut]).merge(fold(pairs[cut:])).value() == exact
    assert fold(pairs[cut:]).merge(fold(pairs[:cut])).value() == exact
    assert Mean.empty().merge(whole).value() == exact


def test_counts_are_exact_past_what_float32_holds():
    mean = fold([(0.0, 2**24), (0.0, 1)])
    assert mean.value_and_weight() == (0.0, 2**24 + 1)
    assert isinstance(mean.value_and_weight()[1], int)


def test_a_million_batches_are_added_as_by_fsum():
    # Losses of all sizes, so that the small ones are rounded away at every step.
    exponents = torch.empty(10**6, dtype=torch.float64).uniform_(-12, 4)
    losses = (10**exponents).float()
    mean, one = Mean.empty(), torch.tensor(1)
    for loss in losses.unbind():
        mean = mean.add(loss, one)
    exact = math.fsum(losses.tolist()) / 10**6
    assert mean.value() == pytest.approx(exact, rel=1e-12, abs=0)
    in_float32 = losses.cumsum(0, dtype=torch.float32)[-1].item() / 10**6
    assert in_float32 != pytest.approx(exact, rel=1e-12)


def test_real_weights_are_added_in_float64():
    mean = Mean.empty().add(torch.tensor(1.0), torch.tensor(0.1, dtype=torch.float64))
    mean = mean.add(torch.tensor(2.0), torch.tensor(0.2, dtype=torch.float64))
    assert mean.weight.dtype == torch.float64
    assert mean.value() == pytest.approx(10.0, rel=1e-15)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=300))
def test_sums_are_those_of_fsum(losses):
    mean = Mean.empty()
    for loss in losses:
        mean = mean.add(torch.tensor(loss), torch.tensor(1))
    exact = math.fsum(losses) / len(losses)
    assert mean.value() == pytest.approx(exact, rel=1e-13, abs=0)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=300))
def test_without_float64_the_sums_are_compensated(losses):
    exact = math.fsum(losses) / len(losses)
    mean = Mean.empty(dtype=torch.float32)
    half = Mean.empty(dtype=torch.float32)
    for i, loss in enumerate(losses):
        mean = mean.add(torch.tensor(loss), torch.tensor(1))
        if i % 2:
            half = half.add(torch.tensor(loss), torch.tensor(1))
    assert mean.low is not None
    assert all(part.dtype == torch.float32 for part in (*mean[:2], *mean.low))
    assert mean.value() == pytest.approx(exact, rel=1e-11, abs=0)
    if half.weight > 0:
        both = mean.merge(half)
        exact = math.fsum(losses + losses[1::2]) / (len(losses) + len(losses) // 2)
        assert both.value() == pytest.approx(exact, rel=1e-11, abs=0)


def test_plain_float32_sums_would_be_caught():
    losses = [0.1] * 5000
    plain = torch.zeros(())
    for loss in losses:
        plain += loss
    assert abs(plain.item() / 5000 - 0.1) > 1e-7
    mean = Mean.empty(dtype=torch.float32)
    for loss in losses:
        mean = mean.add(torch.tensor(loss), torch.tensor(1))
    assert mean.value() == pytest.approx(torch.tensor(0.1).item(), rel=1e-11)


@pytest.mark.parametrize("n", [0, -1, float("nan")])
def test_nothing_has_no_mean(n):
    mean = Mean.empty().add(torch.tensor(0.0), torch.tensor(n))
    with pytest.raises(ValueError, match="the mean of no data is undefined"):
        mean.value()
    with pytest.raises(ValueError, match="ignore_index"):
        Mean.empty().value()


def test_reading_is_one_transfer(monkeypatch):
    reads = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: reads.append(1) or original(t))
    monkeypatch.setattr(Tensor, "item", None)

    class Elsewhere(Tensor):
        device = torch.device("cuda")
        __torch_function__ = torch._C._disabled_torch_function_impl

    mean = fold([(1, 1), (2, 2)])
    mean = Mean(mean.total.as_subclass(Elsewhere), mean.weight.as_subclass(Elsewhere))
    assert mean.value_and_weight() == (1, 3)
    assert len(reads) == 1
