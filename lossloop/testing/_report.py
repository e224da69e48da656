"""All laws at once, and what they say in words."""

import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lossloop._types import StepFn
from lossloop.testing._compile_laws import (
    COMPILED,
    RECOMPILATION,
    Backend,
    compiled_is_eager,
    no_recompilation,
)
from lossloop.testing._laws import (
    ORDER,
    PARTITION,
    ZERO_WEIGHT,
    PutWeights,
    order_invariance,
    partition_invariance,
    zero_weight_is_absence,
)
from lossloop.testing._search import (
    Law,
    LawBrokenError,
    NotJudgedError,
    Outcome,
    Search,
    generators_kept,
)
from lossloop.testing._step_laws import DETERMINISM, PURITY, determinism, purity
from lossloop.testing._subject import State, admit
from lossloop.testing._torch_loop import TORCH_LOOP, LossFn, torch_loop
from lossloop.testing._update_laws import (
    ACCUMULATION,
    GRADIENTS,
    accumulation,
    gradients,
)

_COLUMNS = 100


@dataclass(frozen=True)
class Row:
    """What became of one law.

    Attributes:
        law: Its name.
        says: The law in one sentence.
        result: "held", "broken", or "not checked".
        examples: How many were tried; None if it was not checked, or broken.
        difference: The largest seen; None if it was not checked.
        tolerance: What it should not exceed.
        origin: Where the tolerance comes from.
        counterexample: The smallest one, if it is broken.
        cause: What usually breaks it, or what breaks it here.
        remedy: What to do about it.
        reason: Why it was not checked.
        note: What was not looked at, though it held.
    """

    law: str
    says: str
    result: Literal["held", "broken", "not checked"]
    examples: int | None = None
    difference: float | None = None
    tolerance: float | None = None
    origin: str = ""
    counterexample: str = ""
    cause: str = ""
    remedy: str = ""
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What became of all laws; `print` it.

    Attributes:
        title: What was checked, and on what.
        rows: One for each law.
    """

    title: str
    rows: tuple[Row, ...]

    @property
    def held(self) -> bool:
        """Whether no law is broken, and at least one was checked."""
        results = {row.result for row in self.rows}
        return "held" in results and "broken" not in results

    def __str__(self) -> str:
        """A table, and a paragraph for each law that is broken or was not checked."""
        count = Counter(row.result for row in self.rows)
        numbers = ", ".join(
            f"{count[result]} {result}" for result in ("held", "broken", "not checked")
        )
        parts = [_wrapped(self.title), self._table()]
        parts += [_broken(row) for row in self.rows if row.result == "broken"]
        for head, texts in (
            ("NOT CHECKED", {row.law: row.reason for row in self.rows}),
            ("NOTE", {row.law: row.note for row in self.rows}),
        ):
            lines = [
                _wrapped(f"{law}: {text}", "  ") for law, text in texts.items() if text
            ]
            if lines:
                parts.append("\n".join([head, *lines]))
        return "\n\n".join([*parts, f"{numbers}."])

    def _table(self) -> str:
        head = "law", "result", "tried", "difference", "tolerance", "tolerance is"
        lines = [
            (
                row.law,
                row.result,
                _short(row.examples),
                _short(row.difference),
                _short(row.tolerance),
                row.origin,
            )
            for row in self.rows
        ]
        widths = 23, 12, 6, 11, 10, 0
        return "\n".join(
            "".join(f"{t:<{w}}" for t, w in zip(line, widths, strict=True)).rstrip()
            for line in [head, *lines]
        )


def _short(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.1e}" if 0 < number < 1e-3 else f"{number:.3g}"


def _broken(row: Row) -> str:
    fields = {
        "The law": row.says,
        "Counterexample": row.counterexample,
        "Cause": row.cause,
        "Remedy": row.remedy,
    }
    lines = [_wrapped(f"{name}: {text}", "  ") for name, text in fields.items()]
    return "\n".join([f"BROKEN: {row.law}", *lines])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        _COLUMNS,
        initial_indent=indent,
        subsequent_indent=2 * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def verify(
    subject: Any,
    data: Any,
    *,
    params: Any = None,
    opt_state: Any = None,
    optimizer: Any = None,
    with_weights: PutWeights | None = None,
    accumulated: Callable[[int], StepFn] | None = None,
    loss_fn: LossFn | None = None,
    factory: str | Callable[[], Any] | None = None,
    backend: Backend = "inductor",
    examples: int = 50,
    seed: int = 0,
) -> Report:
    """Checks all laws on an objective or a step of your own.

    A law that is broken, that cannot be judged or that fails does not stop the others.
    The laws about the mean and its gradient call an `Objective` in eval mode. Nothing
    is printed; the tensors, the module and the random generators that are passed in or
    used stay as they were.

    Args:
        subject: An objective of `supervised` or `objective`; a plain function
            `(params, batch) -> (loss_sum, n)`; an eval step; or a step, whoever made
            it, `(params, opt_state, batch) -> (params, opt_state, loss_sum, n)`.
        data: One batch, a tuple or other pytree of tensors that share their first
            dimension; or a `DataLoader` or list of batches. At most 32 samples are
            used, so some 10 to 30 are right.
        params: Default those of the objective's model.
        opt_state: For a step, the state to start from.
        optimizer: As for `make_step`; default SGD with momentum.
        with_weights: See `check_zero_weight_is_absence`.
        accumulated: See `check_accumulation`.
        loss_fn: What the mean loss should be; see `check_matches_torch_loop`.
        factory: See `check_determinism`.
        backend: Of `torch.compile`, for the law that compiled and eager step agree.
        examples: How many to try of each law.
        seed: Of the examples.

    Returns:
        The report: `print(report)`, `report.held`, `report.rows`.

    Raises:
        ValueError: If there are too few samples, their numbers differ, params are
            missing or come back in another form, or the loss is not finite.
        TypeError: If subject or data are of the wrong kind, or the subject has another
            signature or returns something else than it should.

    Example:
        >>> import torch
        >>> from lossloop.testing import verify
        >>> def mean(params, batch):
        ...     return ((batch - params["w"]) ** 2).mean(), 1
        >>> data, params = torch.rand(8), {"w": torch.ones(())}
        >>> report = verify(mean, data, params=params, backend="aot_eager")
        >>> report.held
        False
        >>> report.rows[0].law, report.rows[0].result
        ('partition invariance', 'broken')
        >>> report.rows[0].cause[:27]
        'loss_sum looks like a mean:'
    """
    state = State(params, opt_state, optimizer)
    checked = admit("verify", subject, data, state)
    search = Search(examples, seed)
    laws: list[tuple[Law, Callable[[], Outcome]]] = [
        (PARTITION, partial(partition_invariance, checked, search)),
        (ORDER, partial(order_invariance, checked, search)),
        (ZERO_WEIGHT, partial(zero_weight_is_absence, checked, search, with_weights)),
        (GRADIENTS, partial(gradients, checked, search)),
        (ACCUMULATION, partial(accumulation, checked, search, accumulated)),
        (TORCH_LOOP, partial(torch_loop, checked, search, loss_fn)),
        (PURITY, partial(purity, checked, search)),
        (DETERMINISM, partial(determinism, checked, search, factory)),
        (COMPILED, partial(compiled_is_eager, checked, search, None, backend)),
        (RECOMPILATION, partial(no_recompilation, checked)),
    ]
    with generators_kept():
        rows = tuple(_row(law, check) for law, check in laws)
    mode = " (in eval mode for the laws about mean and gradient)"
    size = f"{'the first ' * checked.cut}{checked.size}"
    return Report(
        f"{checked.name[0].upper()}{checked.name[1:]} on {size} samples, "
        f"numbered from 0{mode if checked.step and checked.objective else ''}. A "
        f"broken law comes with the smallest example found.",
        rows,
    )


def _row(law: Law, check: Callable[[], Outcome]) -> Row:
    try:
        found = check()
    except LawBrokenError as broken:
        return Row(
            law.name,
            law.says,
            "broken",
            difference=broken.difference,
            tolerance=broken.tolerance,
            origin=broken.origin,
            counterexample=broken.counterexample,
            cause=broken.cause,
            remedy=broken.remedy,
        )
    except NotJudgedError as error:
        return Row(law.name, law.says, "not checked", reason=error.reason)
    except Exception as error:  # of the subject, where no law expects one
        text = f"stopped by {type(error).__name__}: {error}"
        return Row(law.name, law.says, "not checked", reason=text)
    return Row(law.name, law.says, "held", *found[1:5], note=found.note)
