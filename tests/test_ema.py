"""The average of the weights, beside torch.optim.swa_utils."""

import pytest
import torch
from test_precision import batches, net
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lossloop as ll


def by_hand(model, data, decay):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for inputs, targets in data:
        adam.zero_grad()
        nn.CrossEntropyLoss()(model(inputs), targets).backward()
        adam.step()
        average.update_parameters(model)
    return dict(average.module.named_parameters())


def double(data):
    return [(inputs.double(), targets) for inputs, targets in data]


@pytest.mark.parametrize("compile", [None, "aot_eager"])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_that_of_swa_utils(decay, compile, accumulate):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    adam = ll.from_torch(torch.optim.Adam, lr=0.01)
    params, opt_state = ll.init(goal, adam, ema=decay)
    step = ll.make_step(goal, adam, accumulate=accumulate)
    if compile is not None:
        step = ll.compile_step(step, backend=compile, donate=True)
    for batch in double(batches()):
        params, opt_state, _, _ = step(params, opt_state, batch)
    expected = by_hand(model, double(batches()), decay)
    assert opt_state.ema.params.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            opt_state.ema.params[name], tensor, rtol=1e-12, atol=1e-12
        )


def test_many_steps_in_one_call_average_too():
    inputs, targets = zip(*batches(), strict=True)
    data = torch.utils.data.TensorDataset(torch.cat(inputs), torch.cat(targets))
    loader = torch.utils.data.DataLoader(data, 6)
    goal = ll.supervised(net(), nn.CrossEntropyLoss())
    # Adam would make steps of full size from the rounding of gradients that are zero.
    sgd = ll.optim.SGD(lr=0.1)
    step = ll.make_step(goal, sgd)
    stepwise = ll.fold(step, *ll.init(goal, sgd, ema=0.9), loader)[1]
    folding = ll.compile_fold(step, backend="aot_eager")
    folded = folding(*ll.init(goal, sgd, ema=0.9), loader)[1]
    assert folding.why_not is None
    assert int(folded.ema.updates) == 12
    torch.testing.assert_close(folded.ema.params, stepwise.ema.params)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_refused(decay):
    goal = ll.supervised(net(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"init\(ema=\.\.\.\)"):
        ll.init(goal, torch.optim.SGD, ema=decay)
    with pytest.raises(TypeError, match="must be a number"):
        ll.init(goal, torch.optim.SGD, ema=True)
