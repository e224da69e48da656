"""The laws have teeth: they catch plausible mistakes, and let right things pass."""

import contextlib
import os
import random
from functools import partial

import numpy as np
import pytest
import torch
from cases import CASES, mlp
from torch import nn
from torch.func import functional_call, grad, grad_and_value
from torch.nn.functional import cross_entropy, dropout

import lossloop as ll
from lossloop.testing import (
    LawBrokenError,
    check_accumulation,
    check_compiled_matches_eager,
    check_determinism,
    check_gradients,
    check_matches_torch_loop,
    check_no_recompilation,
    check_order_invariance,
    check_partition_invariance,
    check_purity,
    check_zero_weight_is_absence,
)

FEW = {"examples": 25}
CLASSES = CASES["mlp"].batch(8)
WEIGHTED = *CLASSES, torch.linspace(0.5, 2, 8)
IGNORED = CLASSES[0], CLASSES[1].masked_fill(torch.arange(8) % 3 == 0, -100)
LINE = torch.linspace(-1, 1, 8), torch.linspace(2, 5, 8)
START = {"params": {"w": torch.tensor(0.3)}, "opt_state": {"v": torch.tensor(0.1)}}


def put_weights(batch, weights):
    return *batch[:2], weights


def per_sample(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def goal(function):
    torch.manual_seed(1)
    return ll.objective(mlp(), function)


# --- losses that are wrong ------------------------------------------------------------


def mean_of_means(model, batch):
    return per_sample(model, batch).mean(), 1


def mean_times_size(model, batch):
    weight = torch.tensor([1.0, 3.0, 0.5]).to(batch[0])
    return cross_entropy(model(batch[0]), batch[1], weight) * len(batch[1]), len(
        batch[1]
    )


def ignored_times_size(model, batch):
    return cross_entropy(model(batch[0]), batch[1]) * len(batch[1]), len(batch[1])


def contrastive(model, batch):
    z = nn.functional.normalize(model(batch[0]), dim=1)
    return cross_entropy(z @ z.T, torch.arange(len(z)), reduction="sum"), len(z)


def weights_normalised(model, batch):
    losses, weights = per_sample(model, batch), batch[2] / batch[2].sum()
    return (losses * weights).sum() * len(losses), len(losses)


def penalty_once(model, batch):
    losses = per_sample(model, batch)
    return losses.sum() + sum(p.abs().sum() for p in model.parameters()), len(losses)


def discounted(model, batch):
    losses = per_sample(model, batch)
    return (losses * 0.9 ** torch.arange(len(losses))).sum(), len(losses)


def relative_to_first(model, batch):
    losses = per_sample(model, batch)
    return (losses - 0.5 * losses[0].detach()).sum(), len(losses)


class Recurrent(nn.Module):
    """Reads the samples as if they were times: batch_first=True is missing."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(5, 3)

    def forward(self, x):
        return self.rnn(x)[0]


def counts_absent(model, batch):
    losses = per_sample(model, batch)
    return (losses * batch[2]).sum(), len(losses)


def counts_in_float32(model, batch):
    return (per_sample(model, batch) * batch[2]).sum(), batch[2].float().sum()


def weights_twice(model, batch):
    return (per_sample(model, batch) * batch[2] ** 2).sum(), batch[2].sum()


def weights_without_gradient(model, batch):
    losses, weights = per_sample(model, batch), batch[2]
    value = (losses * weights).sum() - losses.sum()
    return losses.sum() + value.detach(), weights.sum()


def weights_cut_off(model, batch):
    whole = batch[2].long()
    return (per_sample(model, batch) * whole).sum(), whole.sum()


def scale_detached(model, batch):
    losses = per_sample(model, batch)
    return (losses * model[0].weight.norm().detach()).sum(), len(losses)


def scale_as_number(model, batch):
    losses = per_sample(model, batch)
    with torch.no_grad():
        scale = model[2].bias.square().sum() + 1
    return (losses * scale).sum(), len(losses)


class Square(torch.autograd.Function):
    """x ** 2, whose backward forgets the 2."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0]


def wrong_backward(model, batch):
    losses = per_sample(model, batch) + Square.apply(model(batch[0])).sum(1)
    return losses.sum(), len(losses)


def counts_ignored(output, target):
    return cross_entropy(output, target, reduction="sum"), len(target)


# --- gradients and accumulation that are wrong ----------------------------------------


def of_the_sum(params, batch):
    return grad(lambda params: squares(params, batch)[0])(params)


def squares(params, batch):
    x, y = batch
    return ((params["w"] * x - y) ** 2).sum(), torch.tensor(len(x))


def accumulating(k, combine):
    """A step of SGD whose gradient is combined of (gradient sum, n) of its parts."""

    def step(params, state, batch):
        parts = list(zip(*(t.tensor_split(k) for t in batch), strict=True))
        found = [grad_and_value(squares, has_aux=True)(params, part) for part in parts]
        pairs = [(grads["w"], n) for grads, (_, n) in found]
        w = params["w"] - 0.1 * combine(pairs)
        loss_sum = sum(loss for _, (loss, _) in found)
        return {"w": w}, state, loss_sum, sum(n for _, n in pairs)

    return step


def divided_once(pairs):
    return sum(g for g, _ in pairs) / sum(n for _, n in pairs)


def counting_parts(k):
    """Adam's bias correction would be wrong: a micro-batch is no step."""
    right = accumulating(k, divided_once)

    def step(params, state, batch):
        params, state, loss_sum, n = right(params, state, batch)
        return params, {**state, "count": state["count"] + k}, loss_sum, n

    return step


def divided_by_own_n(pairs):
    return sum(g / n for g, n in pairs) / len(pairs)


def divided_by_own_n_only(pairs):
    return sum(g / n for g, n in pairs)


def divided_by_full_windows(pairs):
    return sum(g for g, _ in pairs) / (len(pairs) * pairs[0][1])


# --- optimizers that are wrong --------------------------------------------------------


def optimizer_of(update):
    """An optimizer with one moment and a count for each parameter."""

    def init(params):
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return {"m": zeros, "v": zeros, "count": torch.zeros((), dtype=torch.int64)}

    def update_all(grads, slots, params):
        count = slots["count"] + 1
        done = {
            name: update(params[name], g, slots["m"][name], slots["v"][name], count)
            for name, g in grads.items()
        }
        moments = [{name: parts[i] for name, parts in done.items()} for i in (1, 2)]
        updates = {name: parts[0] for name, parts in done.items()}
        return updates, {"m": moments[0], "v": moments[1], "count": count}

    return ll.Optimizer(init, update_all)


def adam(p, g, m, v, count, *, corrected=True, coupled=False):
    if coupled:
        g = g + 0.1 * p
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    first = m / (1 - 0.9**count) if corrected else m
    second = v / (1 - 0.999**count) if corrected else v
    update = -0.01 * first / (second.sqrt() + 1e-8)
    return update if coupled else update - 0.001 * p, m, v


def dampened(p, g, m, v, count):
    m = 0.9 * m + 0.1 * g
    return -0.1 * m, m, v


def against_loop(update, optimizer):
    """Compares a step with an optimizer of its own with one of torch."""
    model = ll.supervised(mlp(), nn.CrossEntropyLoss())
    own = optimizer_of(update)
    params, opt_state = ll.init(model, own)
    return check_matches_torch_loop(
        model,
        CLASSES,
        params=params,
        opt_state=opt_state,
        optimizer=optimizer,
        step=ll.make_step(model, own),
        **FEW,
    )


def reports_another_mean(step, params, opt_state, batch):
    """The update is right; the mean it reports counts the ignored targets."""
    params, opt_state, loss_sum, _ = step(params, opt_state, batch)
    return params, opt_state, loss_sum, len(batch[1])


ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
RIGHT = ll.supervised(mlp(), nn.CrossEntropyLoss())


# --- steps that are wrong -------------------------------------------------------------


def descend(params, state, batch, rate=0.1):
    """A right step of SGD with momentum, of nobody's library."""
    grads, (loss_sum, n) = grad_and_value(squares, has_aux=True)(params, batch)
    v = 0.9 * state["v"] + grads["w"] / n
    return {"w": params["w"] - rate * v}, {"v": v}, loss_sum, n


def in_place_momentum(params, state, batch):
    grads, (loss_sum, n) = grad_and_value(squares, has_aux=True)(params, batch)
    state["v"].mul_(0.9).add_(grads["w"] / n)
    return {"w": params["w"] - 0.1 * state["v"]}, state, loss_sum, n


def replaces_in_dictionary(params, state, batch):
    new, state, loss_sum, n = descend(params, state, batch)
    params["w"] = new["w"]
    return params, state, loss_sum, n


def backward_on_inputs(params, state, batch):
    w = params["w"].requires_grad_()
    loss_sum, n = squares({"w": w}, batch)
    loss_sum.backward()
    new = w.detach() - 0.1 * w.grad / n
    w.requires_grad_(False)
    return {"w": new}, state, loss_sum.detach(), n


def seeds_globally(params, state, batch):
    torch.manual_seed(0)
    return descend(params, state, batch)


def draws_in_python(params, state, batch):
    random.random()
    return descend(params, state, batch)


def leaves_gradients_on(params, state, batch):
    torch.set_grad_enabled(not torch.is_grad_enabled())
    return descend(params, state, batch)


def sets_the_default_dtype(params, state, batch):
    torch.set_default_dtype(torch.float64)
    return descend(params, state, batch)


def shuffles_with_numpy(params, state, batch):
    order = torch.from_numpy(np.random.permutation(len(batch[0])))
    return descend(params, state, tuple(t[order] for t in batch))


class ReusesMemory:
    """Returns the same tensor every time."""

    def __init__(self):
        self.w = torch.zeros(())

    def __call__(self, params, state, batch):
        new, state, loss_sum, n = descend(params, state, batch)
        self.w.copy_(new["w"])
        return {"w": self.w.view(())}, state, loss_sum, n


class ReusesLoss:
    """Returns the loss in the same tensor every time."""

    def __init__(self):
        self.loss_sum = torch.zeros(())

    def __call__(self, params, state, batch):
        new, state, loss_sum, n = descend(params, state, batch)
        return new, state, self.loss_sum.copy_(loss_sum), n


BATCH_NORM = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))


def leaks_statistics(params, state, batch):
    """BatchNorm writes its statistics into the params that it was given."""
    names = [name for name in params if name[2:] in ("weight", "bias")]
    trained = {name: params[name].clone().requires_grad_() for name in names}
    output = functional_call(BATCH_NORM, {**params, **trained}, (batch[0],))
    loss_sum, n = cross_entropy(output, batch[1], reduction="sum"), len(batch[1])
    grads = torch.autograd.grad(loss_sum / n, list(trained.values()))
    new = {name: params[name] - 0.1 * g for name, g in zip(names, grads, strict=True)}
    return {**params, **new}, state, loss_sum.detach(), n


MODULE = nn.Linear(5, 3)
BIAS = MODULE.bias.detach().numpy()  # the same memory


def switches_the_module(model, batch):
    MODULE.train(not MODULE.training)
    return per_sample(model, batch).sum(), len(batch[1])


def moves_the_module(model, batch):
    BIAS[0] += 0.1
    return per_sample(model, batch).sum(), len(batch[1])


def fills_gradients(model, batch):
    weight = next(MODULE.parameters())
    weight.grad = torch.ones_like(weight) + (0 if weight.grad is None else weight.grad)
    return per_sample(model, batch).sum(), len(batch[1])


class Counter:
    """The rate falls with the number of calls."""

    def __init__(self, patience=0):
        self.calls, self.patience = 0, patience

    def __call__(self, params, state, batch):
        self.calls += 1
        late = max(0, self.calls - self.patience)
        return descend(params, state, batch, rate=0.1 / (1 + late))


class RunningMean:
    """Losses relative to a running average of themselves."""

    def __init__(self):
        self.average = 0.0

    def __call__(self, params, batch):
        loss_sum, n = squares(params, batch)
        loss_sum = loss_sum - n * self.average
        self.average += 0.1 * loss_sum.item()
        return loss_sum, n


def drops_globally(params, state, batch):
    return descend(params, state, (dropout(batch[0], 0.5), batch[1]))


def noisy(seed):
    def step(params, state, batch):
        generator = torch.Generator().manual_seed(seed % 2**32)
        noise = torch.rand(len(batch[0]), generator=generator)
        return descend(params, state, (batch[0] + noise.to(batch[0]), batch[1]))

    return {"subject": step, "data": LINE, **START}


def by_hash():
    return noisy(hash("dropout"))


def by_process():
    return noisy(os.getpid())


def in_fresh_process(factory):
    return check_determinism(
        **{**factory(), "factory": f"test_laws:{factory.__name__}"}, examples=1
    )


class FrozenRate:
    """Compiled with the count of steps of the first call."""

    def __init__(self):
        self.count = None

    def __call__(self, params, state, batch):
        if self.count is None:
            self.count = int(state["count"])
        rate = 0.1 / (1 + self.count)
        new, v, loss_sum, n = descend(params, state, batch, rate)
        return new, {**v, "count": state["count"] + 1}, loss_sum, n


def decaying(params, state, batch):
    rate = 0.1 / (1 + state["count"])
    new, v, loss_sum, n = descend(params, state, batch, rate)
    return new, {**v, "count": state["count"] + 1}, loss_sum, n


def follows(params, state, batch):
    """The slow weights follow those of the step before."""
    new, v, loss_sum, n = descend(params, state, batch)
    return new, {**v, "slow": params["w"].clone()}, loss_sum, n


def naive_donation(params, state, batch):
    new, v, loss_sum, n = descend(params, state, batch)
    params["w"].copy_(new["w"])
    state["v"].copy_(v["v"])
    state["slow"].copy_(params["w"])  # which is the new one already
    return params, state, loss_sum, n


class OtherMask:
    """Dropout draws other numbers than the step that is not compiled."""

    def __call__(self, params, state, batch):
        generator = torch.Generator().manual_seed(int(state["seed"]) + 1)
        return drops_by_seed(params, state, batch, generator)


def drops_by_seed(params, state, batch, generator=None):
    generator = generator or torch.Generator().manual_seed(int(state["seed"]))
    mask = torch.rand(len(batch[0]), generator=generator) < 0.5
    new, v, loss_sum, n = descend(params, state, (batch[0] * mask, batch[1]))
    return new, {**v, "seed": state["seed"]}, loss_sum, n


def with_rate(params, state, batch):
    rate = state["rate"]
    new, v, loss_sum, n = descend(params, state, batch, rate)
    return new, {**v, "rate": rate}, loss_sum, n


def with_count(params, state, batch):
    new, v, loss_sum, n = descend(params, state, batch, 0.1 / (1 + state["count"]))
    return new, {**v, "count": state["count"] + 1}, loss_sum, n


def start(**more):
    return {**START, "opt_state": {**START["opt_state"], **more}}


def number(value):
    return torch.tensor(float(value))


PARTITION = check_partition_invariance
ORDER = check_order_invariance
WEIGHT = partial(check_zero_weight_is_absence, data=WEIGHTED, with_weights=put_weights)
GRADIENT = partial(check_gradients, data=CLASSES)
ACCUMULATION = partial(check_accumulation, descend, LINE, **START)
PURITY = partial(check_purity, data=LINE, **START)
DETERMINISM = partial(check_determinism, data=LINE, **START)
COMPILED = partial(check_compiled_matches_eager, data=LINE)
RECOMPILED = partial(check_no_recompilation, data=LINE)


def accumulated(combine):
    whole = accumulating(1, combine)
    return check_accumulation(
        whole, LINE, **START, accumulated=lambda k: accumulating(k, combine), **FEW
    )


WRONG = {
    "partition invariance": {
        "mean of means": lambda: PARTITION(goal(mean_of_means), CLASSES),
        "class weights": lambda: PARTITION(goal(mean_times_size), CLASSES),
        "ignored targets": lambda: PARTITION(goal(ignored_times_size), IGNORED),
        "contrastive": lambda: PARTITION(goal(contrastive), CLASSES),
        "normalised": lambda: PARTITION(goal(weights_normalised), WEIGHTED),
        "penalty": lambda: PARTITION(goal(penalty_once), CLASSES),
        "step": lambda: PARTITION(
            lambda p, s, b: (p, s, squares(p, b)[0] / len(b[0]), len(b[0])),
            LINE,
            **START,
        ),
    },
    "order invariance": {
        "discounted": lambda: ORDER(goal(discounted), CLASSES),
        "first sample": lambda: ORDER(goal(relative_to_first), CLASSES),
        "recurrent": lambda: ORDER(
            ll.supervised(Recurrent(), nn.CrossEntropyLoss()), CLASSES
        ),
    },
    "zero weight is absence": {
        "counted": lambda: WEIGHT(goal(counts_absent)),
        "normalised": lambda: WEIGHT(goal(weights_normalised)),
        "float32": lambda: WEIGHT(goal(counts_in_float32)),
        "twice": lambda: WEIGHT(goal(weights_twice)),
        "gradient": lambda: WEIGHT(goal(weights_without_gradient)),
        "cut off": lambda: WEIGHT(goal(weights_cut_off)),
    },
    "gradients": {
        "detached": lambda: GRADIENT(goal(scale_detached)),
        "number": lambda: GRADIENT(goal(scale_as_number)),
        "backward": lambda: GRADIENT(goal(wrong_backward)),
        "of the sum": lambda: check_gradients(
            squares, LINE, params=START["params"], gradient=of_the_sum
        ),
    },
    "accumulation": {
        "own n": lambda: accumulated(divided_by_own_n),
        "own n only": lambda: accumulated(divided_by_own_n_only),
        "short last window": lambda: accumulated(divided_by_full_windows),
        "count": lambda: check_accumulation(
            counting_parts(1), LINE, **start(count=0), accumulated=counting_parts
        ),
        "objective": lambda: check_accumulation(goal(mean_of_means), CLASSES, **FEW),
    },
    "the torch loop": {
        "ignored targets": lambda: check_matches_torch_loop(
            ll.supervised(mlp(), counts_ignored),
            IGNORED,
            loss_fn=nn.CrossEntropyLoss(),
            **FEW,
        ),
        "coupled decay": lambda: against_loop(partial(adam, coupled=True), ADAMW),
        "no bias correction": lambda: against_loop(
            partial(adam, corrected=False), ADAMW
        ),
        "dampened": lambda: against_loop(dampened, MOMENTUM),
        "another mean": lambda: check_matches_torch_loop(
            RIGHT,
            IGNORED,
            optimizer=MOMENTUM,
            step=partial(reports_another_mean, ll.make_step(RIGHT, MOMENTUM)),
            **FEW,
        ),
    },
    "purity": {
        "momentum": lambda: PURITY(in_place_momentum),
        "dictionary": lambda: PURITY(replaces_in_dictionary),
        "backward": lambda: PURITY(backward_on_inputs),
        "seeds": lambda: PURITY(seeds_globally),
        "numpy": lambda: PURITY(shuffles_with_numpy),
        "Python": lambda: PURITY(draws_in_python),
        "grad mode": lambda: PURITY(leaves_gradients_on),
        "default dtype": lambda: PURITY(sets_the_default_dtype),
        "memory": lambda: PURITY(ReusesMemory()),
        "memory of the loss": lambda: PURITY(ReusesLoss()),
        "statistics": lambda: check_purity(
            leaks_statistics,
            CLASSES,
            params={k: t.detach() for k, t in BATCH_NORM.state_dict().items()},
            opt_state={},
        ),
        "module": lambda: check_purity(
            ll.objective(MODULE, switches_the_module), CLASSES
        ),
        "weights of the module": lambda: check_purity(
            ll.objective(MODULE, moves_the_module), CLASSES
        ),
        "gradients of the module": lambda: check_purity(
            ll.objective(MODULE, fills_gradients), CLASSES
        ),
        "donation": lambda: PURITY(
            ll.compile_step(descend, donate=True, backend="aot_eager")
        ),
    },
    "determinism": {
        "counter": lambda: DETERMINISM(Counter()),
        "late counter": lambda: DETERMINISM(Counter(patience=100)),
        "running mean": lambda: check_determinism(
            RunningMean(), LINE, params=START["params"]
        ),
        "torch": lambda: DETERMINISM(drops_globally),
        "numpy": lambda: DETERMINISM(shuffles_with_numpy),
        "Python": lambda: DETERMINISM(
            lambda p, s, b: descend(p, s, b, rate=random.random())
        ),
        "hash": lambda: in_fresh_process(by_hash),
        "process": lambda: in_fresh_process(by_process),
    },
    "compiled = eager": {
        "frozen": lambda: COMPILED(
            decaying, **start(count=number(0)), compiled=FrozenRate()
        ),
        "donation": lambda: COMPILED(
            follows, **start(slow=number(0)), compiled=naive_donation
        ),
        "dropout": lambda: COMPILED(
            drops_by_seed, **start(seed=torch.tensor(3)), compiled=OtherMask()
        ),
    },
    "no recompilation": {
        "rate": lambda: RECOMPILED(with_rate, **start(rate=0.1)),
        "count": lambda: RECOMPILED(with_count, **start(count=0)),
    },
}
CAUGHT = [
    pytest.param(law, check, id=f"{law}: {name}")
    for law, checks in WRONG.items()
    for name, check in checks.items()
]


@pytest.mark.parametrize(("law", "check"), CAUGHT)
def test_what_is_wrong_is_caught(law, check):
    with pytest.raises(LawBrokenError) as caught:
        check()
    broken = caught.value
    assert broken.law == law
    assert 1 <= len(broken.samples) <= 4
    assert broken.difference > broken.tolerance
    assert broken.counterexample in str(broken)
    assert not getattr(broken, "__notes__", None)
    assert broken.__cause__ is None
    assert "hypothesis" not in "".join(str(entry.path) for entry in caught.traceback)


def test_each_law_has_two_teeth():
    assert len(WRONG) == 10
    assert all(len(checks) >= 2 for checks in WRONG.values())


# --- what is right holds --------------------------------------------------------------


def objective_of(case):
    torch.manual_seed(2)
    return ll.supervised(CASES[case].model(), CASES[case].loss)


ON_OBJECTIVES = {
    "partition": check_partition_invariance,
    "order": check_order_invariance,
    "weight": check_zero_weight_is_absence,
    "gradients": check_gradients,
    "accumulation": check_accumulation,
    "torch loop": check_matches_torch_loop,
    "purity": check_purity,
    "determinism": check_determinism,
    "compiled": partial(check_compiled_matches_eager, backend="aot_eager"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("check", sorted(set(ON_OBJECTIVES) - {"compiled"}))
def test_every_law_holds_for_every_case(check, case):
    """With BatchNorm, dropout, tied and frozen weights, and ignored targets."""
    data = CASES[case].batch(8)
    outcome = ON_OBJECTIVES[check](objective_of(case), data, examples=8)
    assert outcome.examples >= 8
    assert outcome.difference <= outcome.tolerance


def test_the_laws_about_compiling_hold():
    subject, data = objective_of("conv_net"), CASES["conv_net"].batch(8)
    ON_OBJECTIVES["compiled"](subject, data, examples=15)
    check_no_recompilation(subject, data)


@pytest.mark.parametrize("kind", ["AdamW", "RMSprop", "Adagrad"])
def test_the_loop_is_followed_with_other_optimizers(kind):
    optimizer = getattr(torch.optim, kind)
    check_matches_torch_loop(
        objective_of("conv_net"), CASES["conv_net"].batch(8), optimizer=optimizer, **FEW
    )


def test_the_loop_is_followed_with_an_instance_that_has_made_steps():
    model, data = mlp(), CASES["mlp"].batch(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()
    before = [p.clone() for p in model.parameters()]
    check_matches_torch_loop(
        ll.supervised(model, nn.CrossEntropyLoss()), data, optimizer=optimizer, **FEW
    )
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.state[model[0].weight]["step"] == 1


ON_STEPS = {
    "partition": check_partition_invariance,
    "order": check_order_invariance,
    "weight": partial(
        check_zero_weight_is_absence, with_weights=lambda batch, w: (*batch[:2], w)
    ),
    "purity": check_purity,
    "determinism": check_determinism,
    "compiled": partial(check_compiled_matches_eager, backend="aot_eager"),
}


@pytest.mark.parametrize("check", ON_STEPS)
@pytest.mark.parametrize("compiled", [False, True])
def test_every_law_holds_for_a_step_of_lossloop(check, compiled):
    model = objective_of("mlp")
    params, opt_state = ll.init(model, torch.optim.Adam)
    step = ll.make_step(model, torch.optim.Adam)
    if compiled:
        step = ll.compile_step(step, backend="aot_eager")
    ON_STEPS[check](step, CLASSES, params=params, opt_state=opt_state, examples=10)


@pytest.mark.parametrize("check", sorted(set(ON_STEPS) - {"weight"}))
def test_every_law_holds_for_a_step_of_nobodys_library(check):
    ON_STEPS[check](descend, LINE, **START, **FEW)


def test_micro_batches_of_nobodys_library():
    assert accumulated(divided_once).difference < 1e-12


@pytest.mark.parametrize("check", sorted(set(ON_STEPS) - {"weight"}))
def test_every_law_holds_for_an_eval_step(check):
    model = objective_of("conv_net")
    eval_step, data = ll.make_eval_step(model), CASES["conv_net"].batch(8)
    ON_STEPS[check](eval_step, data, params=model.init(), **FEW)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["conv_net", "encoder"])
def test_generated_code_draws_the_same_dropout(case):
    check_compiled_matches_eager(
        objective_of(case), CASES[case].batch(8), optimizer=torch.optim.AdamW, **FEW
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_model_that_takes_no_float64_is_judged_in_its_own_precision(dtype):
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3, dtype=dtype)

        def forward(self, x):
            if x.dtype != dtype:
                raise TypeError("I take one dtype only")
            return self.linear(x)

    narrow = ll.supervised(Narrow(), nn.CrossEntropyLoss())
    data = CLASSES[0].to(dtype), CLASSES[1]
    outcome = check_partition_invariance(narrow, data, **FEW)
    assert "no float64" in outcome.origin
    assert 1e-6 < outcome.tolerance < 0.1
    wrong = ll.objective(Narrow(), mean_of_means)
    with pytest.raises(LawBrokenError, match="looks like a mean"):
        check_partition_invariance(wrong, data, **FEW)
    with pytest.raises(ValueError, match="need float64"):
        check_gradients(narrow, data)


def test_a_loss_in_float32_inside_is_given_room():
    def in_float32(model, batch):
        losses = cross_entropy(model(batch[0]).float(), batch[1], reduction="none")
        return losses.sum(), len(losses)

    outcome = check_partition_invariance(goal(in_float32), CLASSES)
    assert outcome.tolerance > 1e-7 > outcome.difference > 0
    assert "used inside" in outcome.origin


def test_losses_that_cancel_are_given_room():
    """In float32 the order of a sum shows where large terms cancel."""

    def signed(model, batch):
        losses = (
            0.01 * model(batch[0]).float()[:, 0] + 30 * batch[0][:, 0].sign().float()
        )
        return losses.sum(), len(losses)

    check_order_invariance(goal(signed), CLASSES)
    check_partition_invariance(goal(signed), CLASSES)


def test_rounding_inside_is_not_made_large_by_adam():
    """The bias of keys has a gradient of zero, but for the rounding of float32."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x):
            q, k, v = self.qkv(x).float().chunk(3, dim=-1)
            seen = (q @ k.mT).softmax(-1) @ v
            return self.head(seen.to(x.dtype).mean(1))

    torch.manual_seed(0)
    attention = ll.supervised(Attention(), nn.CrossEntropyLoss())
    data = torch.randn(8, 5, 4), CLASSES[1]
    adam = partial(torch.optim.Adam, lr=0.01)
    outcome = check_accumulation(attention, data, optimizer=adam)
    assert "used inside" in outcome.origin


def test_kinks_are_not_taken_for_wrong_gradients():
    def kinks(params, batch):
        x, y = batch
        losses = (params["w"] * x).relu() + (params["w"] - y).abs()
        return losses.sum(), len(x)

    x, on_the_kink = LINE[0], torch.zeros(8)
    check_gradients(kinks, LINE, params=START["params"], **FEW)
    with pytest.raises(ValueError, match="no example could be evaluated"):
        check_gradients(kinks, (x, on_the_kink), params={"w": torch.zeros(())})


# --- what cannot be judged, and what is left alone ------------------------------------


@pytest.mark.parametrize("check", [check_partition_invariance, check_order_invariance])
def test_steps_that_couple_samples_on_purpose_are_not_called_wrong(check):
    model = objective_of("conv_net")
    params, opt_state = ll.init(model, torch.optim.SGD)
    step = ll.make_step(model, torch.optim.SGD)
    with pytest.raises(
        ValueError, match=r"random numbers are drawn.*statistics of the batch"
    ):
        check(
            step,
            CASES["conv_net"].batch(8),
            params=params,
            opt_state=opt_state,
            **FEW,
        )


@pytest.mark.parametrize(
    "check",
    [
        check_partition_invariance,
        check_order_invariance,
        check_gradients,
        check_accumulation,
    ],
)
def test_what_is_not_deterministic_is_said_to_be(check):
    def noisy_loss(model, batch):
        losses = per_sample(model, batch) * np.random.rand()
        return losses.sum(), len(losses)

    with pytest.raises(ValueError, match=r"deterministic: .* gave .* and then"):
        check(goal(noisy_loss), CLASSES, **FEW)


@pytest.mark.parametrize("check", ON_OBJECTIVES)
def test_checks_leave_no_trace(check):
    """Right or wrong: generators, grad mode, module and data stay as they are."""
    np.random.seed(7)
    random.seed(7)
    model, data = mlp(), tuple(t.clone() for t in CLASSES)

    def traces():
        return (
            [t.tolist() for t in (*model.state_dict().values(), *data)],
            [p.grad for p in model.parameters()],
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            random.getstate(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
        )

    before = traces()
    ON_OBJECTIVES[check](ll.supervised(model, nn.CrossEntropyLoss()), data, examples=5)
    with contextlib.suppress(LawBrokenError, ValueError):
        ON_OBJECTIVES[check](ll.objective(model, mean_of_means), data, examples=5)
    assert traces() == before


def test_examples_are_those_of_the_seed():
    results = [
        check_partition_invariance(objective_of("mlp"), CLASSES, seed=seed, **FEW)
        for seed in (1, 1, 2)
    ]
    assert results[0] == results[1] != results[2]


# --- what a reviewer found ------------------------------------------------------------


def test_a_saturated_loss_has_no_broken_gradient():
    torch.manual_seed(0)
    x = torch.randn(20, 4) * torch.tensor([1.0, 10.0, 100.0, 1000.0])
    data = x, torch.randint(0, 3, (20,))
    check_gradients(ll.supervised(nn.Linear(4, 3), nn.CrossEntropyLoss()), data, **FEW)


def test_a_gradient_in_float32_is_not_judged():
    narrow = ll.supervised(
        nn.Linear(5, 3), lambda o, y: cross_entropy(o.float(), y, reduction="none")
    )
    with pytest.raises(ValueError, match="computes in less"):
        check_gradients(narrow, CLASSES, **FEW)


def still(params, opt_state, batch):
    x, y = batch
    error = x @ params["w"] - y
    return params, opt_state, (error**2).sum(), len(y)


def moving(params, opt_state, batch):
    x, y = batch
    gradient = x.T @ (x @ params["w"] - y)
    step = 0.01 * gradient / gradient.norm()
    return {"w": params["w"] - step}, *still(params, opt_state, batch)[1:]


def test_a_large_loss_does_not_hide_what_is_wrong_in_params():
    torch.manual_seed(0)
    data = torch.randn(8, 3), 1000 * torch.randn(8)
    start = {"params": {"w": torch.zeros(3)}, "opt_state": torch.zeros(())}
    with pytest.raises(LawBrokenError, match="params"):
        check_compiled_matches_eager(moving, data, compiled=still, **start, **FEW)


def test_a_compiled_step_is_compared_with_the_torch_loop():
    objective = ll.supervised(mlp(), nn.CrossEntropyLoss())
    step = ll.make_step(objective, torch.optim.SGD)
    check_matches_torch_loop(
        objective,
        CLASSES,
        optimizer=torch.optim.SGD,
        step=ll.compile_step(step, backend="aot_eager"),
        examples=5,
    )


def test_a_compiled_function_is_taken_as_a_compiled_step():
    torch.manual_seed(0)
    data = torch.randn(8, 3), torch.randn(8)
    start = {"params": {"w": torch.zeros(3)}, "opt_state": torch.zeros(())}
    compiled = ll.compile_step(moving, backend="aot_eager")
    check_no_recompilation(compiled, data, **start)
    check_compiled_matches_eager(compiled, data, **start, **FEW)


def test_a_loaders_own_generator_stays():
    generator = torch.Generator()
    before = generator.get_state()
    data = torch.utils.data.TensorDataset(*CLASSES)
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=generator)
    objective = ll.supervised(mlp(), nn.CrossEntropyLoss())
    check_partition_invariance(objective, loader, **FEW)
    assert generator.get_state().equal(before)


@pytest.mark.parametrize("law", [check_purity, check_determinism])
@pytest.mark.parametrize("kind", ["array", "generator"])
def test_state_that_is_no_tensor_is_compared_too(law, kind):
    kept = np.zeros(()) if kind == "array" else torch.Generator()

    def counting(params, opt_state, batch):
        state = opt_state["kept"]
        if kind == "array":
            state += 1
        else:
            torch.rand((), generator=state)
        return params, opt_state, ((batch - params["w"]) ** 2).sum(), len(batch)

    start = {"params": {"w": torch.ones(())}, "opt_state": {"kept": kept}}
    if law is check_purity:
        with pytest.raises(LawBrokenError, match="opt_state"):
            law(counting, torch.rand(8), **start, **FEW)
    else:  # each call gets a copy, and does the same to it
        law(counting, torch.rand(8), **start, **FEW)


def test_where_nothing_is_compiled_the_law_is_not_judged():
    """Eager beside eager would say nothing."""
    goal = ll.supervised(nn.Linear(2, 1), nn.MSELoss())
    data = torch.randn(8, 2), torch.randn(8, 1)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(ValueError, match=r"Nothing is compiled: torch\.compile left"),
    ):
        check_compiled_matches_eager(goal, data, backend="aot_eager")
