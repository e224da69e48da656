"""The best epoch is the first of the lowest finite losses, whatever comes around it."""

import contextlib
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import lossloop as ll
from lossloop import _optimizers

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module", autouse=True)
def _every_weight_is_written_over():
    """As large ones are, so that what is kept has to be a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_optimizers, "BLOCK", 0)
        yield


class Planned(nn.Module):
    """Its validation losses are written in the batch, one for each epoch of one step.

    The weight is the number of the epoch too, and so tells whose it is.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))


def planned(model, batch):
    if "plan" in batch:
        return batch["plan"][(model.epoch - 1).clamp(min=0)], torch.tensor(1)
    model.epoch = model.epoch + 1
    return -(batch["up"] * model.weight).sum(), torch.tensor(1)


def run(values, **options):
    """A run with these validation losses, and its average after each epoch."""
    model, averages = Planned(), []
    stop = options.pop("stop", None)

    def on_epoch(record):
        if record.opt_state.ema:
            averages.append(record.opt_state.ema.params["weight"].clone())
        return "stop" if record.row["epoch"] == stop else None

    result = ll.fit(
        model,
        ll.objective(model, planned),
        torch.optim.SGD(model.parameters(), lr=1.0),
        [{"up": torch.ones(1)}],
        [{"plan": torch.tensor(values)}] if values else None,
        **{"epochs": len(values) or 3, "progress": False, "compile": False, **options},
        on_epoch=on_epoch,
    )
    return result, model, averages


def first_lowest(values, every=1):
    """What History and fit are to find, in plain Python; None if nothing is finite."""
    seen = {
        epoch: value
        for epoch, value in enumerate(values, 1)
        if (epoch % every == 0 or epoch == len(values)) and math.isfinite(value)
    }
    return min(seen, key=seen.__getitem__) if seen else None


VALUES = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0, 1e-45, 3e38]) | (
    st.floats(width=32)
)
SEQUENCES = (
    st.lists(VALUES, max_size=50)
    | st.lists(st.sampled_from([1.0, 2.0]), max_size=50)
    | st.builds(lambda value, n: [value] * n, VALUES, st.integers(1, 9))
    | st.lists(st.sampled_from([NAN, INF, -INF]), max_size=9)
)


@example(values=[float(n) for n in range(50, 0, -1)], every=1, ema=None)
@example(values=[float(n) for n in range(50)], every=1, ema=0.5)
@example(values=[NAN, *[1.0] * 48, NAN], every=3, ema=0.5)
@example(values=[NAN] * 50, every=1, ema=None)
@example(values=[], every=1, ema=None)
@settings(max_examples=500)
@given(
    values=SEQUENCES,
    every=st.sampled_from([1, 1, 1, 2, 7]),
    ema=st.sampled_from([None, None, 0.5]),
)
def test_the_best_is_the_first_lowest_of_the_finite(values, every, ema):
    best = first_lowest(values, every)
    if values and best is None:
        with pytest.raises(ll.NonFiniteError, match="finite after no epoch") as caught:
            run(values, eval_every=every, ema=ema)
        assert caught.value.where == ("val_loss",)
        assert (caught.value.epoch, caught.value.step) == (len(values), len(values))
        return
    result, model, averages = run(values, eval_every=every, ema=ema)
    assert result.best_epoch == result.history.best_epoch == best
    last = best or 3
    weight = torch.tensor([float(last)]) if ema is None else averages[last - 1]
    for held in (result.params, model.state_dict()):
        assert torch.equal(held["weight"], weight)
        assert int(held["epoch"]) == last


@settings(max_examples=40)
@given(
    values=SEQUENCES.filter(lambda values: len(values) > 1),
    ema=st.sampled_from([None, 0.5]),
    data=st.data(),
)
def test_the_best_of_a_run_that_was_resumed(values, ema, data, tmp_path_factory):
    """It was before the stop, or is after it; what was saved is not changed."""
    directory = tmp_path_factory.mktemp("runs")
    stop = data.draw(st.integers(1, len(values) - 1))
    options = {"checkpoint": directory, "resume": True, "ema": ema}
    with contextlib.suppress(ll.NonFiniteError):  # not finite so far
        run(values, stop=stop, **options)
    saved = ll.load(directory)
    best = first_lowest(values[:stop])
    assert saved.epoch == stop
    assert (None if saved.best is None else saved.best.epoch) == best
    if best is not None:
        assert int(saved.best.params["epoch"]) == best
    best = first_lowest(values)
    if best is None:
        with pytest.raises(ll.NonFiniteError):
            run(values, **options)
        return
    straight, resumed = run(values, ema=ema), run(values, **options)
    assert resumed[0].best_epoch == straight[0].best_epoch == best
    for one, other in ((r[0].params, r[1].state_dict()) for r in (straight, resumed)):
        assert int(one["epoch"]) == int(other["epoch"]) == best
        assert torch.equal(one["weight"], other["weight"])
    assert torch.equal(straight[0].params["weight"], resumed[0].params["weight"])
