"""What is checked, and on which data: refused at the door, or in one form for all laws.

A subject is an objective, a plain function `(params, batch) -> (loss_sum, n)`, an eval
step, or a step `(params, opt_state, batch) -> (params, opt_state, loss_sum, n)` that
lossloop need not have made.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from lossloop._batches import (
    as_batches,
    no_batches,
    rows,
    taken,
    to_device,
)
from lossloop._batches import generators_kept as loader_generators_kept
from lossloop._compile import Compiled
from lossloop._losses import as_pair
from lossloop._model import device_of
from lossloop._objective import Objective, as_objective
from lossloop._random import seeded
from lossloop._step import (
    Eager,
    EvalStep,
    MicroBatches,
    TrainStep,
    init,
    make_eval_step,
    make_step,
)
from lossloop._types import Batch, EvalStepFn, LossPair, Params, StepFn, StepOutput
from lossloop.testing._search import (
    Law,
    NotJudgedError,
    RaisedError,
    generators_kept,
    raised_on,
)
from lossloop.testing._trees import copied, named_leaves, number

MAX_SAMPLES = 32

# Of a call of a step: enough for BatchNorm in train mode, and always as many, so that
# it is compiled once.
STEP_SAMPLES = 4

DEFAULT_OPTIMIZER = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class State(NamedTuple):
    """What a check is given besides the subject and the data."""

    params: Any = None
    opt_state: Any = None
    optimizer: Any = None


class Pair(NamedTuple):
    """`(loss_sum, n)` as Python numbers; `n` is an int if it counts."""

    loss_sum: float
    n: float

    def __str__(self) -> str:
        """As a counterexample shows it."""
        return f"loss_sum {number(self.loss_sum)}, n {number(self.n)}"


class Subject(NamedTuple):
    """A subject with its state and its data, as every law takes it.

    Attributes:
        name: "the objective", "the eval step" or "the step".
        pair: `(params, opt_state, batch) -> (loss_sum, n)` at these weights, without
            an update; of an objective, in eval mode.
        params: To call it with.
        opt_state: To call it with; () for an eval step.
        batch: All the data.
        size: Samples in it.
        cut: Whether there were more.
        objective: As it was given; None for steps.
        step: The step, or the one made of the objective; None for an eval step.
        eval_step: The same for evaluation; None for a step.
        optimizer: The step is made with it.
        narrow: The narrowest floating-point dtype in which it computes.
    """

    name: str
    pair: Callable[[Any, Any, Batch], LossPair]
    params: Any
    opt_state: Any
    batch: Batch = None
    size: int = 0
    cut: bool = False
    objective: Any = None
    step: StepFn | None = None
    eval_step: EvalStepFn | None = None
    optimizer: Any = None
    narrow: torch.dtype = torch.float64

    def take(self, samples: Sequence[int]) -> Batch:
        """The batch of the samples with these indices, in this order."""
        return taken(self.batch, samples)

    def measure(self, samples: Sequence[int]) -> Pair:
        """The pair of these samples.

        Raises:
            RaisedError: If the subject raises.
        """
        return measured(self.call(self.pair, samples))

    def call(
        self,
        function: Callable[[Any, Any, Batch], Any],
        samples: Sequence[int],
        batch: Batch = None,
    ) -> Any:
        """What a function of `(params, opt_state, batch)` returns for copies.

        Args:
            function: Such a function.
            samples: Indices of those in the batch.
            batch: Default the batch of these.

        Raises:
            RaisedError: If it raises.
        """
        params, opt_state = copied((self.params, self.opt_state))
        batch = self.take(samples) if batch is None else batch
        with raised_on(samples):
            return function(params, opt_state, batch)


def measured(pair: LossPair) -> Pair:
    """The pair as Python numbers."""
    loss_sum, n = pair
    return Pair(loss_sum.item(), n.item())


def eager(step: Any) -> Any:
    """A step of lossloop's own, not compiled; any other as it is."""
    if isinstance(step, functools.partial) and isinstance(step.func, Compiled):
        return step.func.function  # of `compile_step` of a plain function
    if not isinstance(step, TrainStep | EvalStep):
        return step
    body = step.body
    if isinstance(body, MicroBatches):
        return TrainStep(body.eager())
    return type(step)(Eager(body.function))


class Program(NamedTuple):
    """Something that is to be pure, as a step."""

    name: str
    call: Callable[[Any, Any, Batch], StepOutput]


def programs(subject: Subject) -> list[Program]:
    """The step, the eval step, or both."""
    found: list[Program] = []
    step, eval_step = subject.step, subject.eval_step
    if step is not None:

        def train(params: Any, opt_state: Any, batch: Batch) -> StepOutput:
            output = step(params, opt_state, batch)
            checked_output(output, params)
            return StepOutput(*output)

        found.append(Program("the step", train))
    if eval_step is not None:

        def evaluate(params: Any, opt_state: Any, batch: Batch) -> StepOutput:
            return StepOutput(params, opt_state, *eval_step(params, batch))

        found.append(Program("the eval step", evaluate))
    return found


def must_train(law: Law, subject: Subject) -> None:
    """Refuses to judge an objective of which no parameter is trained.

    Raises:
        NotJudgedError: If it is one.
    """
    if subject.objective is not None and subject.step is None:
        raise NotJudgedError(law, "the objective has nothing to train.")


def must_run(
    law: Law, subject: Subject, function: Callable[[Any, Any, Batch], Any]
) -> None:
    """Refuses to judge what fails anyhow, on the first samples.

    Raises:
        NotJudgedError: If it does.
    """
    try:
        with generators_kept():
            subject.call(function, range(min(STEP_SAMPLES, subject.size)))
    except RaisedError as error:
        raise NotJudgedError(law, f"samples {error}.") from error


def step_samples(subject: Subject) -> st.SearchStrategy[list[int]]:
    """Samples for a call of a step."""
    size = min(STEP_SAMPLES, subject.size)
    sample = st.integers(0, subject.size - 1)
    return st.lists(sample, min_size=size, max_size=size)


def evaluate(objective: Any, params: Params, batch: Batch) -> LossPair:
    """What an eval step computes, for those who differentiate it."""
    with seeded(0, device_of(params)):
        return as_objective(objective).evaluate(params, batch)


def trained_names(subject: Subject) -> list[str]:
    """Names of the params that an objective is differentiated by."""
    goal = as_objective(subject.objective)
    if isinstance(goal, Objective):
        return [name for name in subject.params if name in goal.trainable]
    return [k for k, t in subject.params.items() if t.is_floating_point()]


# --- the door -------------------------------------------------------------------------


@generators_kept()
def admit(where: str, subject: Any, data: Any, state: State) -> Subject:
    """The subject in one form, after one call on all the data.

    Args:
        where: The check, for messages.
        subject: See the module.
        data: One batch, or batches.
        state: What it needs besides.

    Raises:
        TypeError: If subject or data are of the wrong kind, or the subject has another
            signature or returns something else than it should.
        ValueError: If there are too few samples, their numbers differ, params are
            missing or come back in another form, or the loss is not finite.
    """
    try:
        if isinstance(subject, EvalStep):
            admitted = _eval_step_subject(subject, state)
        elif isinstance(subject, TrainStep) or (
            state.opt_state is not None and not isinstance(subject, Objective)
        ):
            admitted = _step_subject(subject, state)
        else:
            admitted = _objective_subject(subject, state)
        batch, cut = _one_batch(data)
        device = device_of(dict(_tensors(admitted.params)))
        admitted = admitted._replace(
            batch=to_device(batch, device), size=rows(batch), cut=cut
        )
        _check_call(admitted)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:
        error.add_note(f"This happened while {where} looked at subject and data.")
        raise
    return admitted


def _step_subject(step: Any, state: State) -> Subject:
    if state.params is None or state.opt_state is None:
        raise ValueError(
            "a step needs the state to start from. Pass params=... and opt_state=..., "
            "for example those of lossloop.init(objective, optimizer)."
        )
    _check_takes("the step", step, ("params", "opt_state", "batch"))
    plain = eager(step)

    def pair(params: Any, opt_state: Any, batch: Batch) -> LossPair:
        output = checked_output(plain(params, opt_state, batch), params)
        return output.loss_sum, output.n

    return Subject(
        "the step",
        pair,
        state.params,
        state.opt_state,
        step=step,
        optimizer=state.optimizer,
    )


def _eval_step_subject(step: EvalStep, state: State) -> Subject:
    if state.params is None:
        raise ValueError("an eval step needs params=... to be called with.")
    plain = eager(step)

    def pair(params: Any, opt_state: Any, batch: Batch) -> LossPair:
        return as_pair("the eval step", plain(params, batch))

    return Subject("the eval step", pair, state.params, (), eval_step=step)


def _objective_subject(objective: Any, state: State) -> Subject:
    goal = as_objective(objective)
    if isinstance(goal, Objective):
        params = goal.init() if state.params is None else state.params
    else:
        _check_takes("the objective", objective, ("params", "batch"))
        params = state.params
    if params is None:
        raise ValueError(
            "an objective that is a plain function needs params=..., a dictionary of "
            "tensors. If it is a step (params, opt_state, batch), pass opt_state=... "
            "too."
        )

    eval_step = make_eval_step(objective)

    def pair(params: Any, opt_state: Any, batch: Batch) -> LossPair:
        return eval_step(params, batch)

    subject = Subject(
        "the objective",
        pair,
        params,
        (),
        objective=objective,
        eval_step=eval_step,
    )
    if not trained_names(subject):  # a loss alone, which has a mean nevertheless
        return subject
    optimizer = DEFAULT_OPTIMIZER if state.optimizer is None else state.optimizer
    params, opt_state = init(objective, optimizer, params=state.params)
    return subject._replace(
        params=params,
        opt_state=opt_state if state.opt_state is None else state.opt_state,
        step=make_step(objective, optimizer),
        optimizer=optimizer,
    )


def _check_takes(name: str, function: Any, wanted: tuple[str, ...]) -> None:
    if not callable(function):
        raise TypeError(
            f"{name} is a {type(function).__name__}, which cannot be called. Pass a "
            f"function ({', '.join(wanted)})."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, without a signature
        return
    try:
        signature.bind(*wanted)
    except TypeError:
        if wanted == ("params", "batch") and _takes(signature, 3):
            raise TypeError(
                f"{name} takes {signature}, like a step (params, opt_state, batch). A "
                f"step needs the state to start from: pass params=... and "
                f"opt_state=... too."
            ) from None
        raise TypeError(
            f"{name} takes {signature}, and is to be called as ({', '.join(wanted)}). "
            f"Wrap it in a function that takes these."
        ) from None


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _one_batch(data: Any) -> tuple[Batch, bool]:
    """Up to `MAX_SAMPLES` samples as one batch, and whether there may be more."""
    one = isinstance(data, Tensor | tuple | dict) or not isinstance(
        data, Iterable | Dataset
    )
    with loader_generators_kept(data):
        batch = data if one else _joined(as_batches("data", data, passes=1))
    found = rows(batch)
    if found < 2:
        raise ValueError(
            f"data has {found} sample{'s' * (not found)}, which cannot be split. Give "
            f"at least 2; some 10 "
            f"make a good check."
        )
    cut = found > MAX_SAMPLES or (not one and found == MAX_SAMPLES)
    return taken(batch, range(min(found, MAX_SAMPLES))), cut


def _joined(batches: Iterable[Batch]) -> Batch:
    """The first batches as one, as far as they fit together."""
    parts: list[Batch] = []
    total = 0
    for batch in batches:
        if parts and _form(batch) != _form(parts[0]):
            if isinstance(batches, list) and isinstance(batch, Tensor):
                raise ValueError(
                    "data is a list of tensors that differ in form. A list is one of "
                    "batches; for one batch of inputs and targets pass a tuple."
                )
            break
        parts.append(batch)
        total += rows(batch)
        if total >= MAX_SAMPLES:
            break
    if not parts:
        raise no_batches("data")

    def join(first: Any, *others: Any) -> Any:
        cut = isinstance(first, Tensor) and first.dim() > 0
        return torch.cat([first, *others]) if cut else first

    return pytree.tree_map(join, *parts)


def _form(batch: Batch) -> Any:
    """What two batches must have in common to be put together."""
    return [
        (name, leaf.dtype, leaf.shape[1:]) if isinstance(leaf, Tensor) else name
        for name, leaf in named_leaves(batch)
    ]


def _tensors(tree: Any) -> Iterable[tuple[str, Tensor]]:
    return ((k, leaf) for k, leaf in named_leaves(tree) if isinstance(leaf, Tensor))


def _check_call(subject: Subject) -> None:
    params, opt_state, batch = copied(
        (subject.params, subject.opt_state, subject.batch)
    )
    pair = measured(subject.pair(params, opt_state, batch))
    if not all(map(math.isfinite, pair)):
        raise ValueError(
            f"{subject.name} gives {pair} for the data as one batch. Give data and "
            f"params for which both are finite."
        )
    if not pair.n > 0:
        raise ValueError(
            f"{subject.name} gives {pair} for the data as one batch. A mean needs a "
            f"positive weight: give data of which some samples count."
        )


def checked_output(output: Any, params: Any) -> StepOutput:
    """What a step returned for these params.

    Raises:
        TypeError: If it is no 4-tuple, or the last two are no pair.
        ValueError: If the params are of another form, or the pair is no two numbers.
    """
    if not isinstance(output, tuple) or len(output) != 4:
        got = f"a {type(output).__name__}"
        got += f" of length {len(output)}" if isinstance(output, tuple | list) else ""
        raise TypeError(
            f"the step returned {got}. Return the tuple (params, opt_state, loss_sum, "
            f"n)."
        )
    forms = [
        {name: f"{tuple(t.shape)} of {t.dtype}" for name, t in _tensors(tree)}
        for tree in (params, output[0])
    ]
    for name in sorted(forms[0].keys() | forms[1].keys()):
        before, after = (form.get(name, "nothing") for form in forms)
        if before != after:
            raise ValueError(
                f"the step was given params{name} as {before}, and returned {after}. "
                f"Return params of the same names, shapes and dtypes."
            )
    return StepOutput(*output[:2], *as_pair("the step", output[2:]))
