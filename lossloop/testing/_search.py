"""Laws, and the search for the smallest example that breaks one."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Flaky, Unsatisfiable
from hypothesis.strategies import SearchStrategy

from lossloop._random import host_generators_kept


class Law(NamedTuple):
    """What must be true.

    Attributes:
        name: In two or three words.
        says: The law in one sentence.
        cause: What usually breaks it.
        remedy: What to do then.
    """

    name: str
    says: str
    cause: str
    remedy: str


class Limit(NamedTuple):
    """How large a difference may be.

    Attributes:
        tolerance: A larger difference breaks the law.
        origin: Why it is that large.
    """

    tolerance: float
    origin: str


EXACT = Limit(0.0, "the same bits")


class Outcome(NamedTuple):
    """What a check returns when the law holds.

    Attributes:
        law: Its name.
        examples: How many were tried.
        difference: The largest seen, relative to what `origin` says.
        tolerance: A larger difference would have broken the law.
        origin: Where the tolerance comes from.
        note: What was not looked at.
    """

    law: str
    examples: int
    difference: float
    tolerance: float
    origin: str
    note: str = ""


class LawBrokenError(AssertionError):
    """A law does not hold.

    Attributes:
        law: Its name.
        counterexample: The smallest one found, in words and numbers.
        samples: The indices of its samples in the data.
        difference: Its size, relative as `origin` says.
        tolerance: What it should not have exceeded.
        origin: Where the tolerance comes from.
        says: The law in one sentence.
        cause: What usually breaks it, or what breaks it here.
        remedy: What to do about it.
    """

    def __init__(
        self,
        law: Law,
        limit: Limit,
        difference: float,
        samples: Sequence[int],
        counterexample: str,
        advice: tuple[str, str] | None,
    ) -> None:
        self.law, self.says = law.name, law.says
        self.tolerance, self.origin = limit
        self.difference = difference
        self.samples = tuple(sorted(set(samples)))
        self.counterexample = counterexample
        self.cause, self.remedy = advice or (law.cause, law.remedy)
        super().__init__(
            f"{law.name} is broken. {law.says}\n"
            f"Counterexample: {counterexample}\n"
            f"Difference: {difference:.2g}. Tolerance: {self.tolerance:.2g} "
            f"({self.origin}).\n"
            f"Cause: {self.cause}\n"
            f"Remedy: {self.remedy}"
        )


class NotJudgedError(ValueError):
    """A law has nothing to say about a subject.

    Attributes:
        reason: Why.
    """

    def __init__(self, law: Law, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{law.name} cannot be judged: {reason}")


def not_repeatable(law: Law, what: str) -> NotJudgedError:
    """The error for a subject that changes between calls, where it should not."""
    return NotJudgedError(
        law,
        f"the results are not deterministic: {what}. Something is kept between calls, "
        f"or random numbers are drawn. Take that out first; check_determinism and "
        f"check_purity say more about it.",
    )


def listed(samples: Sequence[int]) -> str:
    """Indices of samples as a message shows them."""
    first, last = samples[0], samples[-1]
    whole = len(samples) > 4 and list(samples) == list(range(first, last + 1))
    return f"{first} to {last}" if whole else str(list(samples))


class RaisedError(RuntimeError):
    """The subject raised an error on some samples."""

    def __init__(self, samples: Sequence[int], error: Exception) -> None:
        self.samples = tuple(samples)
        text = " ".join(str(error).strip().split("\n\n")[0].split()).rstrip(".")
        super().__init__(f"{listed(samples)} raise {type(error).__name__}: {text}")


@contextmanager
def raised_on(samples: Sequence[int]) -> Generator[None]:
    """Tells errors of the subject from our own.

    Raises:
        RaisedError: For any error inside.
    """
    try:
        yield
    except Exception as error:
        raise RaisedError(samples, error) from error


class Finding(NamedTuple):
    """What one example showed.

    Attributes:
        samples: Indices of the samples in it.
        difference: Between what is and what should be.
        words: Makes the counterexample.
        advice: Makes `(cause, remedy)`, or None for those of the law.
    """

    samples: Sequence[int]
    difference: float
    words: Callable[[], str]
    advice: Callable[[], tuple[str, str] | None] = lambda: None


class _FoundError(Exception):
    """Tells Hypothesis that an example broke the law."""


@dataclass(frozen=True)
class Search:
    """How long to look for a counterexample, and from where."""

    examples: int
    seed: int

    def __post_init__(self) -> None:
        """Refuses what is no number of examples."""
        if not isinstance(self.examples, int) or self.examples < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"examples must be an int of at least 1, got {self.examples!r}."
            )

    def run(
        self,
        law: Law,
        limit: Limit,
        strategy: SearchStrategy[Any],
        judge: Callable[[Any], Finding],
        *,
        repeatable: bool = True,
    ) -> Outcome:
        """Tries examples, and shrinks the first that breaks the law.

        Args:
            law: What is judged.
            limit: What difference breaks it.
            strategy: Of examples.
            judge: Judges one.
            repeatable: Whether an example that breaks the law once and then not makes
                the law impossible to judge; if not, it is broken.

        Raises:
            LawBrokenError: With the smallest counterexample.
            ValueError: If the law cannot be judged.
        """
        differences: list[float] = []
        broken: list[Finding] = []
        trouble: ValueError | None = None

        @hypothesis.seed(self.seed)
        @settings(
            max_examples=self.examples,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=cast(list[HealthCheck], list(HealthCheck)),
            report_multiple_bugs=False,
            print_blob=False,
            verbosity=Verbosity.quiet,
        )
        @given(strategy)
        def attempt(example: Any) -> None:
            finding = _judged(judge, example)
            differences.append(finding.difference)
            if finding.difference > limit.tolerance:
                broken.append(finding)
                raise _FoundError

        with generators_kept():
            try:
                attempt()
            except _FoundError:
                pass
            except Flaky:
                what = "an example broke the law once, and did not when repeated"
                trouble = not_repeatable(law, what) if repeatable else None
            except Unsatisfiable:
                trouble = NotJudgedError(
                    law,
                    "no example could be evaluated: of few samples alone the mean is "
                    "not defined, or (for gradients) not smooth. Give other data.",
                )
            except ValueError as error:
                error.__notes__ = []  # of Hypothesis
                trouble = error
            # Raised from here, without Hypothesis in the traceback.
            if trouble is not None:
                raise trouble.with_traceback(None)
            if broken:
                found = broken[-1]
                if not repeatable:
                    found = min(reversed(broken), key=lambda one: len(set(one.samples)))
                raise LawBrokenError(
                    law,
                    limit,
                    found.difference,
                    found.samples,
                    found.words(),
                    found.advice(),
                )
        return Outcome(law.name, len(differences), max(differences), *limit)


def _judged(judge: Callable[[Any], Finding], example: Any) -> Finding:
    try:
        finding = judge(example)
    except RaisedError as error:
        text = f"samples {error}."
        return Finding(error.samples, math.inf, lambda: text)
    if math.isnan(finding.difference):
        return finding._replace(difference=math.inf)
    return finding


@contextmanager
def generators_kept() -> Generator[None]:
    """Puts the global random generators and modes of torch back to where they were."""
    grad_mode, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with host_generators_kept(), torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_grad_enabled(grad_mode)
        torch.set_default_dtype(dtype)
