"""A model as a pure function: called in less time, it does what torch's call does."""

import pytest
import torch
from torch import nn

import lossloop as ll
from lossloop._model import FunctionalModel, model_params, skeleton


class Writes(nn.Module):
    """Writes to one buffer, and puts another in the place of the next."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("left_alone", torch.ones(2))

    def forward(self, x):
        y = self.linear(x) * self.left_alone
        self.written.add_(y.detach().sum(0))
        self.replaced = self.replaced + y.detach().amax(0)
        return y


class TwoNames(Writes):
    """Its buffers and weights have a second name each, in another module."""

    def __init__(self):
        super().__init__()
        self.other = Writes()
        self.other.linear.weight = self.linear.weight
        self.other.written = self.written
        self.other.replaced = self.replaced

    def forward(self, x):
        return super().forward(x) + self.other(x)


class HandsOut(nn.Module):
    """Keeps a tensor of the batch as a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("last", torch.zeros(4, 3))

    def forward(self, x):
        self.last = x
        return self.linear(x)


MODELS = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    "writes": Writes,
    "two names": TwoNames,
    "hands out": HandsOut,
}
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def pure(model, function=lambda model, x: model(x)):
    return FunctionalModel(skeleton(model, train=True), function)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_torchs_call(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    params = {k: t.detach().clone() + 0.5 for k, t in model_params(model).items()}
    before = {k: t.clone() for k, t in params.items()}
    function, by_torch = pure(model), pure(model)
    by_torch._called = by_torch._called_by_torch
    for _ in range(2):
        output, buffers = function(params, X)
        expected, expected_buffers = by_torch(params, X)
        assert torch.equal(output, expected)
        assert buffers.keys() == expected_buffers.keys()
        for k, t in buffers.items():
            assert torch.equal(t, expected_buffers[k])
            assert all(t is not each for each in (X, *params.values()))
        assert all(torch.equal(params[k], t) for k, t in before.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_call_that_fails_leaves_nothing_in_the_module(name):
    def fails(model, x):
        model(x)
        raise RuntimeError("no more")

    model = MODELS[name]()
    body = skeleton(model, train=True)
    own = dict(body.named_parameters(remove_duplicate=False))
    own |= dict(body.named_buffers(remove_duplicate=False))
    function = FunctionalModel(body, fails)
    with pytest.raises(RuntimeError, match="no more"):
        function(model_params(model), X)
    left = dict(body.named_parameters(remove_duplicate=False))
    left |= dict(body.named_buffers(remove_duplicate=False))
    assert left.keys() == own.keys()
    assert all(left[k] is t for k, t in own.items())


def test_gradients_reach_what_it_was_called_with():
    model = TwoNames()
    params = {k: t.detach().clone() for k, t in model_params(model).items()}
    leaves = {k: t.requires_grad_() for k, t in params.items() if "linear" in k}
    output, _ = pure(model)(params, X)
    grads = torch.autograd.grad(output.sum(), list(leaves.values()))
    torch.testing.assert_close(grads[0], 2 * X.sum(0).expand(2, 3))
    assert len(grads) == 3  # one weight and two biases


@pytest.mark.parametrize("train", [True, False])
def test_tensors_of_other_names_are_refused(train):
    """A missing one would be without values, and the loss too; nobody takes another."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, torch.optim.SGD)
    batch = X, torch.tensor([0, 1, 1, 0])
    step, eval_step = ll.make_step(goal, torch.optim.SGD), ll.make_eval_step(goal)
    for name in ("0.weight", "1.weight", "1.running_var", "stranger"):
        changed = {**params, "stranger": X} if name == "stranger" else {**params}
        if name != "stranger":
            del changed[name]
        what = "unknown" if name == "stranger" else "missing"
        with pytest.raises(ValueError, match=f"{what}: {name}"):
            step(changed, opt_state, batch) if train else eval_step(changed, batch)


def test_a_compiled_step_refuses_them_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    goal = ll.supervised(model, nn.CrossEntropyLoss())
    params, opt_state = ll.init(goal, torch.optim.SGD)
    step = ll.compile_step(ll.make_step(goal, torch.optim.SGD), backend="aot_eager")
    batch = X, torch.tensor([0, 1, 1, 0])
    step(params, opt_state, batch)
    del params["0.weight"]
    with pytest.raises(ValueError, match=r"missing: 0\.weight"):
        step(params, opt_state, batch)
