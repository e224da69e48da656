"""The law that a loop written by hand in PyTorch is followed."""

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lossloop._losses import is_torch_loss, torch_mean
from lossloop._model import device_of, load_params, model_params
from lossloop._objective import Objective, as_objective, forward, split_batch
from lossloop._optimizers import is_of_torch
from lossloop._random import mix, seeded
from lossloop._types import Batch, OptState, Params, StepFn
from lossloop.testing._frozen import (
    beyond_rounding,
    coupling_explained,
    frozen,
    of_updates,
)
from lossloop.testing._search import (
    Finding,
    Law,
    NotJudgedError,
    Outcome,
    Search,
    generators_kept,
)
from lossloop.testing._subject import (
    State,
    Subject,
    admit,
    checked_output,
    eager,
    must_train,
    trained_names,
)
from lossloop.testing._trees import copied

_OWN_MEAN = (
    "the loss of the loop was loss_sum / n of the objective itself, so this says "
    "nothing about the mean. Pass loss_fn=..., a function (output, targets) that "
    "returns the mean you want."
)

LossFn = Callable[[Any, Any], Tensor]

TORCH_LOOP = Law(
    "the torch loop",
    "A few steps give the losses and the weights of a loop written by hand in PyTorch, "
    "with backward() and an optimizer of torch.optim.",
    "The mean divides by something else than the loss of the loop does (ignored "
    "targets, class weights), or the formula of the optimizer is another one (weight "
    "decay, bias correction, momentum).",
    "Compare loss_sum / n with the loss of the loop on the first batch, and then the "
    "update with that of torch.optim, for one step and one parameter.",
)


def check_matches_torch_loop(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    opt_state: Any = None,
    optimizer: Any = None,
    loss_fn: LossFn | None = None,
    step: StepFn | None = None,
    steps: int = 5,
    examples: int = 100,
    seed: int = 0,
) -> Outcome:
    """Checks some steps against a loop written by hand, as everybody writes it.

    The loop takes a copy of the model in train mode, and calls `zero_grad()`,
    `loss.backward()` and `step()` of an optimizer of torch.optim. Its loss is the loss
    of `torch.nn` that the objective was made with, called as it is; or `loss_fn`; or
    else `loss_sum / n`. Where the optimizer would skip a parameter without a gradient,
    the loop gives it a gradient of zero, as lossloop does.

    Batches of different sizes are drawn, and losses and params compared, in float64
    where the model takes that. Dropout is off. Before each step of the loop, torch's
    generator is seeded as lossloop's steps seed it, so that other random layers draw
    the same numbers.

    Args:
        subject: An objective of `supervised` or `objective`, or a plain function
            `(params, batch) -> (loss_sum, n)`.
        data: As for `check_partition_invariance`.
        params: To start from; default those of the objective's model.
        opt_state: To start `step` from; default that of `init`.
        optimizer: A class of torch.optim, a `functools.partial` of one, or an instance
            over the parameters of the model; default SGD with momentum.
        loss_fn: `(output, targets) -> mean`, what the mean loss should be.
        step: A step of your own to compare with the loop; default that of `make_step`.
        steps: The largest number of steps.
        examples: How many to try.
        seed: Of the examples.

    Returns:
        The largest difference seen, and the tolerance.

    Raises:
        LawBrokenError: With the smallest counterexample.
        ValueError: If the law cannot be judged: too few samples, no objective, no
            optimizer of torch.optim.
        TypeError: If subject or data are of the wrong kind.

    Example:
        >>> import lossloop as ll
        >>> from lossloop.testing import check_matches_torch_loop
        >>> goal = ll.supervised(torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss())
        >>> data = torch.randn(8, 2), torch.tensor([0, 1, 2, -100] * 2)
        >>> adam = torch.optim.Adam
        >>> check_matches_torch_loop(goal, data, optimizer=adam).difference < 1e-8
        True
    """
    if steps < 1:
        raise ValueError(f"check_matches_torch_loop: steps must be > 0, got {steps!r}.")
    state = State(params, opt_state, optimizer)
    admitted = admit("check_matches_torch_loop", subject, data, state)
    return torch_loop(admitted, Search(examples, seed), loss_fn, step, steps)


@generators_kept()
def torch_loop(
    subject: Subject,
    search: Search,
    loss_fn: LossFn | None = None,
    step: StepFn | None = None,
    steps: int = 5,
) -> Outcome:
    """Judges `TORCH_LOOP`."""
    if subject.objective is None:
        raise NotJudgedError(
            TORCH_LOOP,
            f"{subject.name} has no model. Pass the objective to "
            f"check_matches_torch_loop, and the step as step=...",
        )
    must_train(TORCH_LOOP, subject)
    goal = as_objective(subject.objective)
    if loss_fn is not None and not isinstance(goal, Objective):
        raise NotJudgedError(
            TORCH_LOOP, "loss_fn needs an output, which a plain function does not show."
        )
    if not is_of_torch(subject.optimizer):
        raise NotJudgedError(
            TORCH_LOOP,
            "there is no optimizer of torch.optim to compare with. Pass "
            "optimizer=torch.optim.Adam, or another class, partial or instance.",
        )
    subject, limit = frozen(TORCH_LOOP, subject)
    limit = of_updates(limit)
    own = eager(subject.step if step is None else step)
    try:
        _by_hand(subject, loss_fn, [subject.batch])
    except Exception as error:
        text = f"the loop raises {type(error).__name__}: {error}"
        raise NotJudgedError(TORCH_LOOP, text) from error

    def judge(batches: list[list[int]]) -> Finding:
        samples = [sample for batch in batches for sample in batch]

        def by_hand(subject: Subject) -> _Run:
            return _by_hand(subject, loss_fn, map(subject.take, batches))

        with _NoDropout():
            try:
                expected = by_hand(subject)
            except (RuntimeError, ValueError):  # BatchNorm refuses single samples
                reject()
            if not all(map(torch.isfinite, expected.loss)):
                reject()
            found = _by_steps(subject, own, batches)
            apart = beyond_rounding(subject, limit, found, expected, by_hand)

        def words() -> str:
            text = ", ".join(map(str, batches))
            return f"after steps on samples {text}: {apart.words} as in the loop."

        return Finding(samples, apart.size, words)

    batch = st.lists(st.integers(0, subject.size - 1), min_size=1, unique=True)
    batches = st.lists(batch, min_size=1, max_size=steps)

    def call() -> None:
        if step is not None:
            with _NoDropout():
                subject.call(step, range(subject.size))

    with coupling_explained(TORCH_LOOP, call):
        outcome = search.run(TORCH_LOOP, limit, batches, judge)
    if loss_fn is None and not is_torch_loss(getattr(goal, "loss_fn", None)):
        return outcome._replace(note=_OWN_MEAN)
    return outcome


class _NoDropout(TorchFunctionMode):
    """Switches dropout off, whoever calls it.

    Attention draws its numbers in another way under `torch.func` than otherwise.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "dropout" in func.__name__:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            # query, key, value, mask, dropout
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = kwargs if len(args) > 4 else {**kwargs, "dropout_p": 0.0}
        if func is F.multi_head_attention_forward:
            kwargs = {**kwargs, "training": False}
        return func(*args, **kwargs)


class _Run(NamedTuple):
    """What some steps gave."""

    loss: list[Tensor]
    params: Params


def _by_steps(subject: Subject, step: Any, batches: Sequence[Sequence[int]]) -> _Run:
    losses: list[Tensor] = []
    for samples in batches:
        output = checked_output(subject.call(step, samples), subject.params)
        subject = subject._replace(params=output.params, opt_state=output.opt_state)
        losses.append(output.loss_sum / output.n)
    return _Run(losses, subject.params)


class _Loop(NamedTuple):
    """What a loop works on: copies of its own."""

    params: Params  # those of the model itself, if there is one
    optimizer: torch.optim.Optimizer
    mean: Callable[[Batch], Tensor]


def _by_hand(
    subject: Subject, loss_fn: LossFn | None, batches: Iterable[Batch]
) -> _Run:
    """The loop, from the state of the subject."""
    if isinstance(as_objective(subject.objective), Objective):
        loop = _over_model(subject, loss_fn)
    else:
        loop = _over_params(subject)
    trained = [loop.params[name] for name in trained_names(subject)]
    losses: list[Tensor] = []
    for count, batch in enumerate(batches):
        with torch.enable_grad(), _seeding(subject, count):
            loop.optimizer.zero_grad()
            loss = loop.mean(batch)
            loss.backward()
            for param in trained:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
            loop.optimizer.step()
        losses.append(loss.detach())
    return _Run(losses, {name: t.detach() for name, t in loop.params.items()})


def _seeding(subject: Subject, count: int) -> AbstractContextManager[Any]:
    """Seeds as the steps of lossloop do, for random layers other than dropout."""
    state = subject.opt_state
    if not isinstance(state, OptState):
        return nullcontext()
    mixed = mix(int(state.seed), int(state.step) + count)
    return seeded(mixed, device_of(subject.params))


def _over_params(subject: Subject) -> _Loop:
    goal, params = as_objective(subject.objective), copied(subject.params)
    trained = [params[name].requires_grad_() for name in trained_names(subject)]

    def mean(batch: Batch) -> Tensor:
        loss_sum, n = goal.evaluate(params, batch)
        return loss_sum / n

    return _Loop(params, subject.optimizer(trained), mean)


def _over_model(subject: Subject, loss_fn: LossFn | None) -> _Loop:
    goal: Objective = subject.objective
    given = subject.optimizer
    built = isinstance(given, torch.optim.Optimizer)
    model, optimizer = copy.deepcopy((goal.model, given if built else None))
    model.train()
    params = model_params(model)
    for name, tensor in params.items():
        tensor.data = tensor.data.to(subject.params[name].dtype)
    load_params(model, subject.params)
    if optimizer is None:
        optimizer = given([params[name] for name in trained_names(subject)])
    # What state it has follows the parameters into their dtype.
    optimizer.load_state_dict(optimizer.state_dict())
    own = loss_fn is None and is_torch_loss(goal.loss_fn)
    oracle: Any = goal.loss_fn if own else loss_fn
    if isinstance(oracle, nn.Module):
        dtype = next(t.dtype for t in params.values() if t.is_floating_point())
        oracle = copy.deepcopy(oracle).to(dtype=dtype)
    torchs = torch_mean(oracle) if own else None

    def mean(batch: Batch) -> Tensor:
        if oracle is None:
            loss_sum, n, buffers = goal.train(params, batch)
            with torch.no_grad():
                for name, buffer in buffers.items():
                    params[name].copy_(buffer)
            return loss_sum / n
        inputs, targets, weights = split_batch(batch)
        output = forward(model, inputs)
        with warnings.catch_warnings():  # of KLDivLoss, about a later release
            warnings.simplefilter("ignore")
            if torchs is not None:
                return torchs(output, targets, weights)
            return oracle(output, targets)

    return _Loop(params, optimizer, mean)
