"""The laws that concern a compiled step."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch._inductor import config as inductor
from torch.utils import _pytree as pytree

from lossloop._compile import (
    Compiled,
    CompiledTooOftenError,
    compile_step,
    graphs_compiled,
    why_not_traced,
)
from lossloop._step import EvalStep, MicroBatches, TrainStep
from lossloop._types import StepOutput
from lossloop.testing._frozen import beyond_rounding, in_float64, limit_of, narrowest
from lossloop.testing._search import (
    Finding,
    Law,
    LawBrokenError,
    Limit,
    NotJudgedError,
    Outcome,
    RaisedError,
    Search,
    generators_kept,
)
from lossloop.testing._subject import (
    STEP_SAMPLES,
    Program,
    State,
    Subject,
    admit,
    eager,
    must_run,
    programs,
    step_samples,
)
from lossloop.testing._trees import Gap

Backend = str | Callable[..., Any]

COMPILED = Law(
    "compiled = eager",
    "The compiled step gives what the step gives without compiling.",
    "A value that changes was frozen when the step was traced (a number of Python, a "
    "closure), or an input is overwritten before all of it was read.",
    "Make everything that changes a tensor in params, opt_state or the batch, and "
    "write to inputs only after all of them have been read.",
)
RECOMPILATION = Law(
    "no recompilation",
    "After the first call for a shape, other values compile nothing again.",
    "A number of Python is compiled in: a rate, a count of steps, an attribute.",
    "Make every number that changes a tensor in opt_state.",
)

_TOO_OFTEN = (
    "the step is compiled anew at each call, because a number of Python changes (a "
    "counter, an attribute). Make it a tensor in opt_state."
)
_NO_GRAPH = Limit(0.0, "no graph more")


def check_compiled_matches_eager(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    opt_state: Any = None,
    optimizer: Any = None,
    compiled: Callable[..., Any] | None = None,
    backend: Backend = "inductor",
    examples: int = 100,
    seed: int = 0,
) -> Outcome:
    """Checks a compiled step against the eager one, along some steps.

    Both get copies of the same inputs, so a compiled step may donate. All batches have
    one shape, so that there is one compilation. Ten times what the eager step differs
    by from itself, in float64 or from params rounded otherwise, counts as rounding and
    not as a difference. Inductor is told to draw the random numbers of the eager step.

    Args:
        subject: As for `check_partition_invariance`. Of an objective, the step of
            `make_step` is checked; a compiled step of lossloop against its eager one.
        data: As for `check_partition_invariance`.
        params: To start from; default those of the objective's model.
        opt_state: To start from; default that of `init`.
        optimizer: As for `make_step`; default SGD with momentum.
        compiled: The compiled step; default `compile_step(step, backend=backend)`.
        backend: Of `torch.compile`.
        examples: How many to try.
        seed: Of the examples.

    Returns:
        The largest difference seen, and the tolerance.

    Raises:
        LawBrokenError: With the smallest counterexample.
        ValueError: If the law cannot be judged: too few samples, a missing state, a
            step that cannot be compiled.
        TypeError: If subject or data are of the wrong kind.

    Example:
        >>> import lossloop as ll
        >>> from lossloop.testing import check_compiled_matches_eager
        >>> goal = ll.supervised(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> data = torch.randn(8, 2), torch.randn(8, 1)
        >>> check_compiled_matches_eager(goal, data, backend="aot_eager").law
        'compiled = eager'
    """
    state = State(params, opt_state, optimizer)
    admitted = admit("check_compiled_matches_eager", subject, data, state)
    return compiled_is_eager(admitted, Search(examples, seed), compiled, backend)


@generators_kept()
def compiled_is_eager(
    subject: Subject,
    search: Search,
    compiled: Callable[..., Any] | None = None,
    backend: Backend = "inductor",
) -> Outcome:
    """Judges `COMPILED`."""
    if why := why_not_traced():
        raise NotJudgedError(COMPILED, f"Nothing is compiled: {why}.")
    plain, fast = _eager_program(subject), _compiled_program(subject, compiled, backend)
    narrow = narrowest(subject)
    limit, subject = limit_of(COMPILED, narrow), subject._replace(narrow=narrow)

    def judge(batches: list[list[int]]) -> Finding:
        current, worst = subject, Gap(0.0, "")
        for count, samples in enumerate(batches, 1):
            expected = current.call(plain.call, samples)
            try:
                found = current.call(fast.call, samples)
            except RaisedError as error:
                if isinstance(error.__cause__, CompiledTooOftenError):
                    raise NotJudgedError(COMPILED, _TOO_OFTEN) from None
                raise
            apart = beyond_rounding(
                current,
                limit,
                found,
                expected,
                lambda other, samples=samples: other.call(plain.call, samples),
                functools.partial(_in_float64, current, plain, samples),
            )
            text = f"step {count} on samples {samples}: compiled, {apart.words}."
            worst = max(worst, Gap(apart.size, text))
            current = current._replace(
                params=expected.params, opt_state=expected.opt_state
            )
        everything = [sample for samples in batches for sample in samples]
        return Finding(everything, worst.size, lambda: worst.words)

    batches = st.lists(step_samples(subject), min_size=1, max_size=3)
    with inductor.patch(fallback_random=True):
        must_run(COMPILED, subject, fast.call)
        return search.run(COMPILED, limit, batches, judge)


def _eager_program(subject: Subject) -> Program:
    step, eval_step = eager(subject.step), eager(subject.eval_step)
    return programs(subject._replace(step=step, eval_step=eval_step))[0]


def _compiled_program(
    subject: Subject, compiled: Callable[..., Any] | None, backend: Backend
) -> Program:
    step: Any = subject.step or subject.eval_step
    if compiled is None:
        compiled = step if _is_compiled(step) else compile_step(step, backend=backend)
    kind = "eval_step" if subject.step is None else "step"
    return programs(subject._replace(**{kind: compiled}))[0]


def _is_compiled(step: Any) -> bool:
    if isinstance(step, functools.partial):
        return isinstance(step.func, Compiled)
    if not isinstance(step, TrainStep | EvalStep):
        return False
    body = step.body
    return isinstance(body.add if isinstance(body, MicroBatches) else body, Compiled)


def _in_float64(
    subject: Subject, program: Program, samples: list[int]
) -> list[StepOutput]:
    """The results in float64; none where it is not taken."""
    try:
        return [in_float64(subject).call(program.call, samples)]
    except RaisedError:
        return []


def check_no_recompilation(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    opt_state: Any = None,
    optimizer: Any = None,
    compiled: Callable[..., Any] | None = None,
    backend: Backend = "aot_eager",
) -> Outcome:
    """Checks that a compiled step is compiled once for a shape of batch.

    After the first call, the samples, the params, and the numbers in `opt_state` (rates
    and betas, counts of steps) are changed one after the other, twice each, and the
    graphs counted that torch.compile makes.

    Args:
        subject: As for `check_partition_invariance`. Of an objective, the step of
            `make_step` is checked.
        data: As for `check_partition_invariance`.
        params: To start from; default those of the objective's model.
        opt_state: To start from; default that of `init`.
        optimizer: As for `make_step`; default SGD with momentum.
        compiled: The compiled step, by torch.compile and not called before; default
            `compile_step(step, backend=backend)`.
        backend: Of `torch.compile`.

    Returns:
        How many calls were made; there is no difference.

    Raises:
        LawBrokenError: With the change that compiled something.
        ValueError: If the law cannot be judged: too few samples, a missing state, a
            step that cannot be compiled, or that torch.compile has nothing to do with.
        TypeError: If subject or data are of the wrong kind.

    Example:
        >>> from lossloop.testing import check_no_recompilation
        >>> def step(params, rate, batch):  # the rate is a number of Python
        ...     w = params["w"] - rate * (params["w"] - batch.mean())
        ...     return {"w": w}, rate * 0.99, ((w - batch) ** 2).sum(), len(batch)
        >>> start = {"params": {"w": torch.ones(3)}, "opt_state": 0.1}
        >>> check_no_recompilation(step, torch.rand(8, 3), **start)
        Traceback (most recent call last):
        lossloop.testing._search.LawBrokenError: no recompilation is broken...
    """
    state = State(params, opt_state, optimizer)
    admitted = admit("check_no_recompilation", subject, data, state)
    return no_recompilation(admitted, compiled, backend)


@generators_kept()
def no_recompilation(
    subject: Subject,
    compiled: Callable[..., Any] | None = None,
    backend: Backend = "aot_eager",
) -> Outcome:
    """Judges `RECOMPILATION`."""
    if compiled is None:
        step, eval_step = eager(subject.step), eager(subject.eval_step)
        subject = subject._replace(step=step, eval_step=eval_step)
    program = _compiled_program(subject, compiled, backend)
    size = min(STEP_SAMPLES, subject.size)
    samples, others = list(range(size)), list(range(subject.size))[-size:]
    before = graphs_compiled()
    must_run(RECOMPILATION, subject, program.call)
    if graphs_compiled() == before:
        raise NotJudgedError(
            RECOMPILATION,
            f"torch.compile made no graph in the first call. Pass a step that it "
            f"compiles, and that was not called before for batches of {size} samples.",
        )
    current = subject
    changes: list[tuple[str, Callable[[Subject], Subject], list[int]]] = [
        ("the same inputs", lambda now: now, samples),
        ("other samples", lambda now: now, others),
        ("the state that it returned", _stepper(program, samples), samples),
        ("other params", lambda now: now._replace(params=_shrunk(now.params)), samples),
        (
            "other numbers in opt_state",
            lambda now: now._replace(opt_state=_shrunk(now.opt_state)),
            samples,
        ),
    ]
    for words, change, batch in changes:
        for time in ("first", "second"):
            before = graphs_compiled()
            current = change(current)
            current.call(program.call, batch)
            more = graphs_compiled() - before
            if more:
                text = f"a call with {words}, for the {time} time, compiled {more} more"
                raise LawBrokenError(
                    RECOMPILATION, _NO_GRAPH, more, batch, f"{text}.", None
                )
    return Outcome(RECOMPILATION.name, 2 * len(changes), 0.0, *_NO_GRAPH)


def _stepper(program: Program, samples: list[int]) -> Callable[[Subject], Subject]:
    def step(now: Subject) -> Subject:
        output = now.call(program.call, samples)
        return now._replace(params=output.params, opt_state=output.opt_state)

    return step


def _shrunk(tree: Any) -> Any:
    """The tree with all its floating-point numbers a little smaller."""

    def shrink(leaf: Any) -> Any:
        floating = isinstance(leaf, float) or (
            isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        )
        return 0.9 * leaf if floating else leaf

    return pytree.tree_map(shrink, tree)
