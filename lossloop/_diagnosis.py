"""What the loss curves of a run say, and what they cannot say."""

import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import zip_longest
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

# Fewer values than this, and a trend test can hardly reach p < 0.01.
ENOUGH = 8
# Of a trend test; the usual level of "highly significant".
TREND_P = 0.01
# The tail, of which medians are taken: this share of the epochs, but at least so many.
TAIL_SHARE, TAIL_LEAST = 1 / 20, 3
# The recent past, of which trends are taken: likewise.
RECENT_SHARE, RECENT_LEAST = 1 / 4, 8
# A trend is taken of so many points at most, evenly spaced: its cost is quadratic.
TREND_POINTS = 250
# Noise is measured after the best epoch, but on so many epochs before the tail, if
# there are. Fewer say too little; more take the bend of a short run for noise.
NOISE_POINTS = 6
# Standard errors above which a difference is not luck: 1 in 700, one-sided.
STANDARD_ERRORS = 3.0
# Skill below which nothing was learned: one standard error of it for 500 samples.
LEAST_SKILL = 0.02
# Skill on training data above which much was learned; the least gain over a simple
# model in deepchecks.
TRAINING_SKILL = 0.10
# Share of the training skill that at least carries over to validation, if there is any
# signal; less may be luck, if it is also within the standard error.
CARRIED_OVER = 0.10
# Losses lower than this share of the scale count as much: ratios to them are huge.
LEAST_SCALE = 0.05
# Rise of the validation loss, in per cent: deepchecks' default, and between the real
# curves of OverfitGuard that overfit (5.8 or more) and all but one other (3.8 or less).
RISE, SEVERE_RISE = 5.0, 20.0
# Skill lost from training to validation data, of a model that is not seen to get worse.
# Sound models of small data sets lose about 0.1.
GAP = 0.20
# How much easier than the training data validation data may be before it is noted.
EASIER = 0.05
# Per cent by which the training loss may exceed its start: it is not meant to, at all.
DIVERGED = 5.0
# Factor over its lowest value at which a rising training loss has diverged; loss spikes
# are defined by the same in llm-foundry.
GROWN = 2.0
# Outputs that spread by less, relative to their mean or absolutely, are constant.
SPREAD, SPREAD_ABSOLUTE = 1e-6, 1e-12
# Share of validation samples that occur in training; near-duplicates are common.
DUPLICATES = 0.01
# Upward share of the changes of the loss: 0.5 for noise alone, 0 for a smooth descent.
UPWARD = 0.35
# Noise of the training loss relative to how far it fell, and to the scale.
JUMPS, JUMPS_OF_SCALE = 0.05, 0.02
# What the recent past, repeated, must bring to be worth waiting for.
EXPECTED_GAIN = 0.02
# Per cent by which a reference model must be better.
REFERENCE_GAIN = 5.0
# Standard error of the validation loss relative to the scale: above, it says little.
UNCERTAIN = 0.10
# Losses are scaled to at most 1; what then is smaller than this is no scale.
TINY = 1e-300

Evidence = dict[str, Any]
"""The numbers of a finding by name: float, int, str or None."""

Severity = Literal["note", "mild", "severe"]

Column = npt.NDArray[np.float64]


class Facts(NamedTuple):
    """What is known of a run besides its curves; None if it is not.

    Attributes:
        n_constant: Numbers of an input that are the same in all training samples.
        n_features: Numbers of an input.
        output_std: Largest standard deviation of an output over the validation samples,
            after the last epoch.
        output_mean: Largest absolute value of an output's mean over them.
        n_duplicates: Validation samples that occur in the training data.
        n_val: Validation samples.
        first_nonfinite: Where a number first was NaN or infinite: a dictionary with an
            `epoch` (from 1) and, if known, `step`, `where` (in words) and `count`.
        baseline: Losses of the best constant output, on the training and the validation
            data; the second may be None.
        initial_val_loss: Validation loss before training.
        paired_z: How surely the last epoch is worse on validation data than the best:
            mean over standard error of the differences of the samples' losses. The best
            epoch is chosen on half of the samples and compared on the others, both ways
            round; the lesser of the two.
        reference_val_loss: Lowest validation loss of a larger model, trained as long.
        reference_z: How surely that is lower, in standard errors of the difference.

    Example:
        >>> Facts(n_duplicates=3, n_val=100).n_duplicates
        3
    """

    n_constant: int | None = None
    n_features: int | None = None
    output_std: float | None = None
    output_mean: float | None = None
    n_duplicates: int | None = None
    n_val: int | None = None
    first_nonfinite: Mapping[str, Any] | None = None
    baseline: tuple[float, float | None] | None = None
    initial_val_loss: float | None = None
    paired_z: float | None = None
    reference_val_loss: float | None = None
    reference_z: float | None = None


# Facts that belong to the last epoch.
MEASURED_LAST = (
    *("output_std", "output_mean", "paired_z"),
    *("reference_val_loss", "reference_z"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that is the case.

    Attributes:
        name: The verdict, like "overfit".
        severity: "note", "mild" or "severe".
        evidence: The numbers it follows from.
        advice: What to do.
        rule: The rule that found it; a verdict may have several.
    """

    name: str
    severity: Severity
    evidence: Evidence
    advice: str
    rule: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` returns; as a string, its main finding in plain words.

    Attributes:
        primary: The verdict: "nonfinite", "diverging", "dead_input", "no_progress",
            "leak_duplicates", "no_signal", "overfit", "unstable", "undertrained",
            "too_simple", "healthy" or "inconclusive". If several hold, the first.
        subtype: Of "overfit": "val_rising" or "gap". Otherwise None.
        findings: All that was found, in that order; then notes.
        levels: The losses that were compared, by name.
        as_of_epoch: How many epochs were judged. Later ones may change the verdict.
        skipped_rules: Rules that could not be applied, and why.
    """

    primary: str
    subtype: str | None
    findings: tuple[Finding, ...]
    levels: Evidence
    as_of_epoch: int
    skipped_rules: dict[str, str]

    def __str__(self) -> str:
        """The main finding with its numbers, and what to do."""
        first = self.findings[0]
        return f"{RULES[first.rule].sentence(first.evidence)} {first.advice}"

    def __repr__(self) -> str:
        """A table of the findings."""
        head = f"{self.primary}, as of epoch {self.as_of_epoch}"
        rows = [
            f"{f.name:<15}  {f.severity:<6}  {RULES[f.rule].sentence(f.evidence)}"
            for f in self.findings
        ]
        return "\n".join([head, *rows])

    def to_json(self) -> str:
        """All of it, as a JSON text."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Diagnosis":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: If the text is something else.
        """
        try:
            fields = json.loads(text)
            found = tuple(Finding(**finding) for finding in fields.pop("findings"))
            return cls(findings=found, **fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Diagnosis.from_json(text=...) must be what to_json wrote: {error}."
            ) from None


def diagnose(
    history: Any,
    *,
    baseline: float | tuple[float, float | None] | None = None,
    initial_val_loss: float | None = None,
    floor: float = 0.0,
    frozen_train_loss: float | Iterable[float | None] | None = None,
    val_se: float | Iterable[float | None] | None = None,
    facts: Facts | None = None,
    as_of_epoch: int | None = None,
) -> Diagnosis:
    """Says what the curves of a run mean: healthy, overfit, undertrained, and so on.

    Losses are compared with noise, and with two reference levels: the floor, and the
    loss of the best constant output, which looks at no input. Between them the *skill*
    of a loss goes from 1 to 0. No verdict depends on the unit of the loss. What cannot
    be told is not guessed: rules whose inputs are missing are listed as skipped, and
    the verdict may be "inconclusive".

    The verdicts and their limits are explained in `docs/explanation/diagnosis.md`.

    Args:
        history: A `History`, a `Result`, or a mapping of columns: `train_loss`, and if
            there is one `val_loss`, both of shape (epochs,); None in the second stands
            for an epoch without validation. Losses that are NaN or infinite are judged,
            not refused. The columns `frozen_train_loss` and `val_se` are used too.
        baseline: Mean loss of the best constant output, or a pair of it on the training
            and the validation data. Rules that need it are skipped without.
        initial_val_loss: Validation loss before training.
        floor: The lowest value that the loss can have.
        frozen_train_loss: Training loss in eval mode: a number for the last epoch, or a
            column. `train_loss` is measured while the weights move, with dropout, so
            that it says little about the gap to validation.
        val_se: Standard error of the validation loss: a number or a column.
        facts: What else is known; taken from `history.facts` if that exists. Arguments
            go before facts.
        as_of_epoch: Judge this many epochs only, as if no later ones had been.

    Returns:
        The verdict, its evidence, and all other findings.

    Raises:
        TypeError: If something is no number, or no column of numbers.
        ValueError: If columns differ in length or lack a training loss, `as_of_epoch`
            is out of range, or a level is not finite or makes no sense.

    Example:
        >>> falling = [1 / epoch for epoch in range(1, 21)]
        >>> rising = [0.5 + abs(epoch - 8) / 40 for epoch in range(1, 21)]
        >>> found = diagnose({"train_loss": falling, "val_loss": rising})
        >>> found.primary, found.findings[0].evidence["best_epoch"]
        ('overfit', 8)
    """
    run = _read(
        history,
        baseline=baseline,
        initial=initial_val_loss,
        floor=floor,
        frozen=frozen_train_loss,
        val_se=val_se,
        facts=facts,
        as_of_epoch=as_of_epoch,
    )
    findings: list[Finding] = []
    skipped: dict[str, str] = {}
    found: set[str] = set()
    for name, rule in RULES.items():
        if found & rule.unless:
            continue
        evidence = rule.measure(run)
        if isinstance(evidence, str):
            skipped[name] = evidence
        elif rule.holds(evidence):
            rise = evidence.get("rise", 0.0)
            severity = "severe" if rise >= SEVERE_RISE else rule.severity
            findings.append(
                Finding(rule.verdict, severity, evidence, rule.advice, name)
            )
            found.add(rule.verdict)
    first = findings[0]
    subtype = first.rule if first.rule != first.name else None
    return Diagnosis(
        first.name, subtype, tuple(findings), run.levels, run.epochs, skipped
    )


# --- statistics -----------------------------------------------------------------------


class Trend(NamedTuple):
    """Direction of a series: Theil-Sen slope, Mann-Kendall test."""

    slope: float  # per value
    p: float  # two-sided; of no trend, if values are independent
    direction: int  # 1, 0 or -1

    @property
    def clear(self) -> int:
        """The direction if it is significant, otherwise 0."""
        return self.direction if self.p < TREND_P else 0


def _trend(y: Column) -> Trend:
    """The trend of a series (Mann, 1945; Theil, 1950; Sen, 1968; Kendall, 1975).

    The test takes the values as independent. Correlated noise makes p too small, so no
    verdict rests on it alone: a trend must also be worth something.
    """
    at = np.arange(len(y))
    if len(y) > TREND_POINTS:
        at = np.linspace(0, len(y) - 1, TREND_POINTS).round().astype(int)
    y, n = y[at], len(at)
    one, two = np.triu_indices(n, 1)
    rises = y[two] - y[one]
    score = int(np.sign(rises).sum())
    slope = float(np.median(rises / (at[two] - at[one])))
    _, ties = np.unique(y, return_counts=True)
    if n < 10 and len(ties) == n:
        p = _kendall_p(n, abs(score))
    else:
        variance = n * (n - 1) * (2 * n + 5) / 18
        variance -= float((ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
        z = max(abs(score) - 1, 0) / math.sqrt(variance) if variance > 0 else 0.0
        p = math.erfc(z / math.sqrt(2))
    return Trend(slope, p, (score > 0) - (score < 0))


@cache
def _kendall_p(n: int, score: int) -> float:
    """P(|S| >= score) for the sum S of the signs of all differences, without ties.

    The number of orders of n values with k inversions follows by putting in one value
    after the other: the m-th adds 0 to m - 1 inversions.
    """
    orders = [1]
    for m in range(2, n + 1):
        orders = [
            sum(orders[max(0, k - m + 1) : k + 1]) for k in range(len(orders) + m - 1)
        ]
    pairs = len(orders) - 1
    extreme = sum(c for k, c in enumerate(orders) if abs(pairs - 2 * k) >= score)
    return extreme / math.factorial(n)


def _sigma(y: Column, lag: int = 1) -> float:
    """Standard deviation of the noise, from second differences `lag` values apart.

    A smooth trend hardly has any (Gasser, Sroka and Jennen-Steinmetz, 1986); their
    median makes it robust. Differences of correlated values are too small: with lag.
    """
    second = y[: -2 * lag] - 2 * y[lag:-lag] + y[2 * lag :]
    return 1.4826 * float(np.median(np.abs(second))) / math.sqrt(6)


class Curve:
    """A series of at least `ENOUGH` finite values, and what is measured of it."""

    def __init__(self, y: Column) -> None:
        n = len(y)
        self.y = y
        self.window = max(TAIL_LEAST, math.ceil(n * TAIL_SHARE))
        self.recent = max(RECENT_LEAST, math.ceil(n * RECENT_SHARE))
        self.best = int(y.argmin())  # the first

    @cached_property
    def tail(self) -> float:
        """The median of the tail."""
        return float(np.median(self.y[-self.window :]))

    @cached_property
    def lowest_median(self) -> float:
        """The lowest median of a piece as long as the tail, cut from the end."""
        pieces = len(self.y) // self.window
        cut = self.y[-pieces * self.window :].reshape(pieces, self.window)
        return float(np.median(cut, axis=1).min())

    @cached_property
    def trend(self) -> Trend:
        """The trend of the recent past."""
        return _trend(self.y[-self.recent :])

    def luck(self, at: int) -> float:
        """How far the tail may lie above an early minimum, at this index, by noise.

        `sigma * (z + 3 * sqrt(v)) * (1 + 2 / m)`: z is what the minimum of n normal
        numbers lies below their mean (Blom, 1958); v is the variance of the tail's
        median, `pi / (2 w) * (1 + r) / (1 - r)` for noise of autocorrelation r (Bayley
        and Hammersley, 1946) but at most 1, and of the minimum, `pi**2 / (12 log n)`
        (Gumbel, 1958); m differences measure sigma, mostly too low for small m.

        Sigma is the larger of `_sigma` at lag 1 and at a lag as long as the tail: of
        AR(1) noise of variance s**2, second differences have variance
        `2 s**2 (1 - r**lag) (3 - r**lag)`. The ratio of the two gives r, to which its
        standard error is added. All this is measured before the tail, so that no rise
        of the tail raises the bound.
        """
        n, head = len(self.y), self.y[: -self.window]
        calm = head[max(0, min(at, len(head) // 2, len(head) - NOISE_POINTS)) :]
        near = _sigma(calm)
        sigma = max(near, _sigma(calm, max(1, min(self.window, (len(calm) - 1) // 3))))
        if sigma == 0:
            return 0.0
        count = len(calm) - 2
        r = 2 - math.sqrt(1 + 3 * (near / sigma) ** 2) + 1 / math.sqrt(count)
        r = min(r, 0.95)
        median = min(1.0, math.pi / (2 * self.window) * (1 + r) / (1 - r))
        error = math.sqrt(median + math.pi**2 / (12 * math.log(n)))
        z = NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
        return sigma * (z + STANDARD_ERRORS * error) * (1 + 2 / count)


# --- reading --------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run, its losses scaled to at most 1 and measured from the floor."""

    epochs: int
    unit: int  # losses were divided by two to this power
    floor: float  # scaled
    train_loss: Column  # shape (epochs,)
    val_loss: Column  # shape (validations,)
    val_epochs: npt.NDArray[np.int64]  # likewise, from 1
    baseline: tuple[float | None, float | None]  # training, validation
    initial: float | None
    frozen: Column  # shape (epochs,), NaN where it is not known
    val_se: Column  # shape (validations,), or empty; NaN where it is not known
    nonfinite: Evidence
    facts: Facts

    def level(self, x: float | None) -> float | None:
        """A height above the floor as a loss of the user's."""
        largest = 1 - 2.0**-53  # rounding may not lead beyond the largest float
        if x is None:
            return None
        return math.ldexp(max(-largest, min(x + self.floor, largest)), self.unit)

    def lacks(self, *needs: str) -> str | None:
        """Why a rule that needs these cannot be applied; None if it can."""
        return next((self.missing[need] for need in needs if self.missing[need]), None)

    @cached_property
    def missing(self) -> dict[str, str | None]:
        """Why a rule cannot be applied, by what it needs; None if it can."""
        heights = [x for x in (*self.baseline, self.initial) if x is not None]
        heights += [float(y.min()) for y in (self.train_loss, self.val_loss) if len(y)]
        constant, constant_val = (x or 0.0 for x in self.baseline)
        frozen, val_se = (np.isfinite(y[-1:]).any() for y in (self.frozen, self.val_se))
        reasons = {
            "curves": [
                (self.nonfinite["count"] > 0, "not all losses are finite"),
                (
                    min(heights, default=0) < 0,
                    "losses lie below the floor: pass floor=",
                ),
                (self.epochs < ENOUGH, f"fewer than {ENOUGH} epochs"),
                (self.scale_train < TINY, "the loss starts at the floor"),
            ],
            "val": [
                (not len(self.val_loss), "no validation loss"),
                (len(self.val_loss) < ENOUGH, f"fewer than {ENOUGH} validation losses"),
                (self.scale_val < TINY, "the validation loss starts at the floor"),
            ],
            "baseline": [(constant < TINY, "no baseline above the floor")],
            "val_baseline": [(constant_val < TINY, "no baseline for validation")],
            "frozen": [(not frozen, "no training loss in eval mode")],
            "val_se": [(not val_se, "no standard error of the validation loss")],
        }
        return {
            need: next((why for bad, why in tried if bad), None)
            for need, tried in reasons.items()
        }

    @property
    def scale_train(self) -> float:
        """Height of the baseline on training data, or else of the first loss."""
        return self.baseline[0] or float(self.train_loss[:1].sum())

    @property
    def scale_val(self) -> float:
        """Height of the baseline on validation data, or else of the first loss."""
        return self.baseline[1] or float(self.val_loss[:1].sum())

    @cached_property
    def train(self) -> Curve:
        """The training losses."""
        return Curve(self.train_loss)

    @cached_property
    def val(self) -> Curve:
        """The validation losses that there are."""
        return Curve(self.val_loss)

    @cached_property
    def skill_train(self) -> float | None:
        """The best on training data, with the weights frozen if that was measured."""
        if self.lacks("curves", "baseline"):
            return None
        frozen = self.frozen[np.isfinite(self.frozen)]
        best = float(frozen.min()) if len(frozen) else self.train.lowest_median
        return 1 - best / self.scale_train

    @cached_property
    def skill_val(self) -> float | None:
        """The best on validation data."""
        if self.lacks("curves", "val", "val_baseline"):
            return None
        return 1 - float(self.val_loss.min()) / self.scale_val

    def error(self, at: int) -> float | None:
        """Standard error of the skill on validation data, at this index."""
        if self.lacks("curves", "val") or not len(self.val_se):
            return None
        return _finite(float(self.val_se[at]) / self.scale_val)

    @property
    def levels(self) -> Evidence:
        """The losses that are compared."""
        judged = not self.lacks("curves")
        val = judged and not self.lacks("val")
        return {
            "baseline_train": self.level(self.baseline[0]),
            "baseline_val": self.level(self.baseline[1]),
            "initial_val": self.level(self.initial),
            "floor": self.level(0.0),
            "tail_train": self.level(self.train.tail) if judged else None,
            "best_val": self.level(float(self.val_loss.min())) if val else None,
            "best_epoch": int(self.val_epochs[self.val.best]) if val else None,
            "tail_val": self.level(self.val.tail) if val else None,
            "skill_train": self.skill_train,
            "skill_val": self.skill_val,
        }


def _read(
    history: Any,
    *,
    baseline: Any,
    initial: Any,
    floor: Any,
    frozen: Any,
    val_se: Any,
    facts: Any,
    as_of_epoch: Any,
) -> Run:
    """The run, with all that the caller passed checked."""
    facts = getattr(history, "facts", None) if facts is None else facts
    facts = _checked_facts(Facts() if facts is None else facts)
    train, val, frozen, val_se, total = _columns(history, frozen, val_se)
    if as_of_epoch is not None:
        if not hasattr(as_of_epoch, "__index__") or isinstance(as_of_epoch, bool):
            raise TypeError(
                f"diagnose(as_of_epoch=...) must be an int, got {as_of_epoch!r}."
            )
        if not 1 <= as_of_epoch <= total:
            raise ValueError(
                f"diagnose(as_of_epoch=...) must be from 1 to {total}, the number of "
                f"epochs, got {as_of_epoch}."
            )
    n = total if as_of_epoch is None else int(as_of_epoch)
    if n < total:
        facts = facts._replace(**dict.fromkeys(MEASURED_LAST))
    train, val, frozen, val_se = train[:n], val[:n], frozen[:n], val_se[:n]

    floor = _number("floor", floor)
    pair = baseline if isinstance(baseline, (tuple, list)) else (baseline, baseline)
    if len(pair) != 2:
        raise ValueError(
            f"diagnose(baseline=...) must be a number, or a pair of the losses on the "
            f"training and the validation data, got {baseline!r}."
        )
    levels = [None if x is None else _number("baseline", x) for x in pair]
    for name, x in (("floor", floor), *(("baseline", x) for x in levels)):
        if x is not None and not math.isfinite(x):
            raise ValueError(f"diagnose({name}=...) must be finite, got {x}.")
        if x is not None and x < floor:
            raise ValueError(
                f"diagnose({name}=...) is {x}, below floor={floor}, the lowest value "
                f"that the loss can have. Pass the right floor."
            )
    if baseline is None and facts.baseline is not None:
        levels = [_finite(x) for x in facts.baseline]
    initial = facts.initial_val_loss if initial is None else initial
    initial = None if initial is None else _number("initial_val_loss", initial)

    seen = [x for x in val if x is not None]
    known = [floor, *levels, initial, *train, *seen, *frozen, *val_se]
    known.append(facts.reference_val_loss)
    finite = [x for x in known if x is not None and math.isfinite(x)]
    unit = math.frexp(max(map(abs, finite)))[1]

    def scaled(values: Iterable[float | None], zero: float = 0.0) -> Column:
        column = np.array([math.nan if x is None else x for x in values], np.float64)
        with np.errstate(under="ignore", invalid="ignore"):
            return np.ldexp(column, -unit) - math.ldexp(zero, -unit)

    def height(x: float | None) -> float | None:
        return None if _finite(x) is None else float(scaled([x], floor)[0])

    return Run(
        epochs=n,
        unit=unit,
        floor=math.ldexp(floor, -unit),
        train_loss=scaled(train, floor),
        val_loss=scaled(seen, floor),
        val_epochs=np.array([e for e, x in enumerate(val, 1) if x is not None], int),
        baseline=(height(levels[0]), height(levels[1])),
        initial=height(initial),
        frozen=scaled(frozen, floor),
        val_se=scaled(e for e, x in zip(val_se, val, strict=False) if x is not None),
        nonfinite=_first_nonfinite(train, val, initial, facts, n),
        facts=facts._replace(reference_val_loss=height(facts.reference_val_loss)),
    )


def _columns(history: Any, frozen: Any, val_se: Any) -> tuple[Any, Any, Any, Any, int]:
    """Training, validation, frozen training loss and standard errors; their length."""
    history = getattr(history, "history", history)
    if isinstance(history, Mapping):
        names = [*history]
    elif hasattr(history, "columns") and hasattr(history, "__getitem__"):
        names = [*history.columns]
    else:
        raise TypeError(
            f"diagnose(history=...) must be a History, a Result, or a mapping of "
            f"columns, got {type(history).__name__}."
        )
    if "train_loss" not in names and (names or isinstance(history, Mapping)):
        raise ValueError(
            f"diagnose(history=...) must have a column 'train_loss', it has {names}."
        )

    def column(name: str) -> list[float | None]:
        values = history[name] if name in names else None
        return [] if values is None else _column(f"history[{name!r}]", values)

    train = column("train_loss")
    if None in train:
        raise ValueError(
            f"diagnose(history=...): train_loss of epoch {train.index(None) + 1} is "
            f"None. Leave out what was not trained."
        )
    n = len(train)
    found = {"history['val_loss']": column("val_loss")}
    for name, given in (("frozen_train_loss", frozen), ("val_se", val_se)):
        if given is None:
            found[name] = column(name)
        elif isinstance(given, numbers.Real):
            # A standard error belongs to all epochs, a frozen loss to the last one.
            earlier = _number(name, given) if name == "val_se" else None
            found[name] = [*[earlier] * (n - 1), _number(name, given)][:n]
        else:
            found[name] = _column(name, given)
    for name, values in found.items():
        if values and len(values) != n:
            raise ValueError(
                f"diagnose: {name} has {len(values)} values, train_loss has {n}. Every "
                f"column has one for each epoch; None where there is none."
            )
    val, frozen, val_se = found.values()
    if any(x is not None and x < 0 for x in val_se):
        raise ValueError("diagnose(val_se=...) must be at least 0, a standard error.")
    return train, val, frozen, val_se, n


def _first_nonfinite(
    train: list[float],
    val: list[float | None],
    initial: float | None,
    facts: Facts,
    n: int,
) -> Evidence:
    """Where losses first are not finite: epoch, step, place, and how many in all."""
    places = [(0, "the validation loss before training", initial)]
    for epoch, (one, two) in enumerate(zip_longest(train, val), 1):
        places += [
            (epoch, "the training loss", one),
            (epoch, "the validation loss", two),
        ]
    bad = [p for p in places if p[2] is not None and not math.isfinite(p[2])]
    evidence: Evidence = {"epoch": None, "step": None, "where": None, "count": len(bad)}
    if bad:
        evidence.update(epoch=bad[0][0], where=bad[0][1])
    noted = facts.first_nonfinite
    if noted is not None and noted["epoch"] <= min(n, bad[0][0] if bad else n):
        evidence.update({name: noted[name] for name in evidence if name in noted})
        evidence["count"] = max(evidence["count"], len(bad), 1)
    return evidence


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def _number(name: str, value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            pass
    raise TypeError(f"diagnose: {name} must be a number, a float, got {value!r}.")


def _column(name: str, values: Any) -> list[float | None]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(
            f"diagnose: {name} must be a column of numbers, got {values!r}."
        )
    return [
        None if x is None else _number(f"{name}, epoch {epoch},", x)
        for epoch, x in enumerate(values, 1)
    ]


def _checked_facts(facts: Any) -> Facts:
    """Facts that are numbers; those that are not finite are not known."""
    if not isinstance(facts, Facts):
        raise TypeError(f"diagnose(facts=...) must be a Facts, got {facts!r}.")
    baseline: Any = facts.baseline
    noted: Any = facts.first_nonfinite
    if baseline is not None and (
        not isinstance(baseline, (tuple, list)) or len(baseline) != 2
    ):
        raise TypeError(f"diagnose: facts.baseline must be a pair, got {baseline!r}.")
    if noted is not None and not (
        isinstance(noted, Mapping)
        and isinstance(noted.get("epoch"), int)
        and isinstance(noted.get("count", 1), int)
        and isinstance(noted.get("step"), int | None)
        and isinstance(noted.get("where"), str | None)
    ):
        raise TypeError(
            f"diagnose: facts.first_nonfinite must be a dictionary of an 'epoch', and "
            f"maybe a 'step', a 'count' and a 'where' in words, got {noted!r}."
        )
    checked: dict[str, Any] = {}
    for name, value in facts._asdict().items():
        if name in ("baseline", "first_nonfinite") or value is None:
            continue
        number = _number(f"facts.{name}", value)
        count = isinstance(value, numbers.Integral)
        if name.startswith("n_") and not (count and number >= 0):
            raise ValueError(f"diagnose: facts.{name} must be a count, got {value!r}.")
        checked[name] = int(value) if count else _finite(number)
    if baseline is not None:
        checked["baseline"] = tuple(
            None if x is None else _number("facts.baseline", x) for x in baseline
        )
    return facts._replace(**checked)


# --- rules ----------------------------------------------------------------------------


class Rule(NamedTuple):
    """What a verdict follows from.

    Attributes:
        verdict: What it finds.
        measure: The evidence, or why it cannot be had.
        holds: Whether the verdict follows, from the evidence alone. What is compared
            has no unit.
        sentence: The verdict in words, with the numbers of the evidence.
        advice: What to do.
        severity: How bad it is; a large rise is severe anyway.
        unless: Verdicts that explain the same better.
    """

    verdict: str
    measure: Callable[[Run], Evidence | str]
    holds: Callable[[Evidence], bool]
    sentence: Callable[[Evidence], str]
    advice: str
    severity: Severity = "severe"
    unless: frozenset[str] = frozenset()


def recheck(finding: Finding) -> bool:
    """Whether a finding follows from its evidence, by the rule that it names."""
    return RULES[finding.rule].holds(finding.evidence)


def _nonfinite(run: Run) -> Evidence:
    return run.nonfinite


def _nonfinite_holds(e: Evidence) -> bool:
    return e["count"] > 0


def _nonfinite_sentence(e: Evidence) -> str:
    step = "" if e["step"] is None else f" (step {e['step']})"
    where = e["where"] or "a number"
    return f"not finite since epoch {e['epoch']}{step}: {where} is NaN or infinite."


def _diverging(run: Run) -> Evidence | str:
    if why := run.lacks("curves"):
        return why
    train, lowest = run.train, float(run.train_loss.min())
    first = float(run.train_loss[0])
    start = max(first, run.initial or 0.0, run.baseline[0] or 0.0)
    return {
        "tail": run.level(train.tail),
        "start": run.level(start),
        "lowest": run.level(lowest),
        "excess": 100 * (train.tail / start - 1),
        "noise": 100 * train.luck(0) / start,
        "growth": train.tail / max(lowest, LEAST_SCALE * run.scale_train),
        "lowest_epoch": train.best + 1,
        "tail_from": run.epochs - train.window + 1,
        "trend": train.trend.clear,
        "p": train.trend.p,
    }


def _diverging_holds(e: Evidence) -> bool:
    above = e["excess"] >= max(DIVERGED, e["noise"]) and e["trend"] >= 0
    grown = e["growth"] >= GROWN and e["lowest_epoch"] < e["tail_from"]
    return above or (grown and e["trend"] > 0)


def _diverging_sentence(e: Evidence) -> str:
    if e["excess"] >= DIVERGED:
        return (
            f"diverging: the training loss ended at {e['tail']:.3g}, above the "
            f"{e['start']:.3g} that it should start from."
        )
    return (
        f"diverging: the training loss rose from {e['lowest']:.3g} in epoch "
        f"{e['lowest_epoch']} to {e['tail']:.3g}."
    )


def _dead_input(run: Run) -> Evidence | str:
    facts = run.facts
    if not facts.n_features and (facts.output_std is None or facts.output_mean is None):
        return "inputs and outputs were not looked at"
    names = ("n_constant", "n_features", "output_std", "output_mean")
    return {name: getattr(facts, name) for name in names}


def _same_inputs(e: Evidence) -> bool:
    return bool(e["n_features"]) and e["n_constant"] == e["n_features"]


def _dead_input_holds(e: Evidence) -> bool:
    std, mean = e["output_std"], e["output_mean"]
    if std is None or mean is None:
        return _same_inputs(e)
    return _same_inputs(e) or std <= SPREAD * abs(mean) + SPREAD_ABSOLUTE


def _dead_input_sentence(e: Evidence) -> str:
    if _same_inputs(e):
        return "dead input: every number of an input is the same in all samples."
    return (
        f"dead input: the outputs are the same for all validation samples (they spread "
        f"by {e['output_std']:.2g})."
    )


def _no_progress(run: Run) -> Evidence | str:
    if why := run.lacks("curves", "baseline"):
        return why
    return {
        "baseline": run.level(run.baseline[0]),
        "tail": run.level(run.train.tail),
        "skill_train": run.skill_train,
        "skill_val": run.skill_val,
    }


def _no_progress_holds(e: Evidence) -> bool:
    learned = e["skill_val"] is not None and e["skill_val"] >= LEAST_SKILL
    return e["skill_train"] < LEAST_SKILL and not learned


def _no_progress_sentence(e: Evidence) -> str:
    return (
        f"nothing learned: the training loss ended at {e['tail']:.3g}; an output that "
        f"looks at no input reaches {e['baseline']:.3g}."
    )


def _leak_duplicates(run: Run) -> Evidence | str:
    found, n = run.facts.n_duplicates, run.facts.n_val
    if found is None or not n:
        return "duplicates were not counted"
    return {"n_duplicates": found, "n_val": n, "share": found / n}


def _leak_duplicates_holds(e: Evidence) -> bool:
    return e["share"] >= DUPLICATES


def _leak_duplicates_sentence(e: Evidence) -> str:
    return (
        f"leak: {e['n_duplicates']} of {e['n_val']} validation samples "
        f"({100 * e['share']:.0f} %) occur in the training data."
    )


def _no_signal(run: Run) -> Evidence | str:
    if why := run.lacks("curves", "val", "baseline", "val_baseline"):
        return why
    return {
        "best_val": run.level(float(run.val_loss.min())),
        "baseline": run.level(run.baseline[1]),
        "skill_train": run.skill_train,
        "skill_val": run.skill_val,
        "error": run.error(run.val.best),
    }


def _no_signal_holds(e: Evidence) -> bool:
    # Of many epochs, one may do better than the baseline by luck.
    luck = e["error"] is not None and e["skill_val"] < min(
        STANDARD_ERRORS * e["error"], CARRIED_OVER * e["skill_train"]
    )
    nothing = e["skill_val"] < LEAST_SKILL or luck
    return e["skill_train"] >= TRAINING_SKILL and nothing


def _no_signal_sentence(e: Evidence) -> str:
    return (
        f"no signal: the training samples were learned (skill {e['skill_train']:.2f}), "
        f"but the validation loss, at best {e['best_val']:.3g}, never was clearly "
        f"better than the {e['baseline']:.3g} of an output that looks at no input."
    )


def _val_rising(run: Run) -> Evidence | str:
    if why := run.lacks("curves", "val"):
        return why
    val, train = run.val, run.train
    best_val, best = float(run.val_loss[val.best]), int(run.val_epochs[val.best])
    per_cent = 100 / max(best_val, LEAST_SCALE * run.scale_val)
    then = float(run.train_loss[best - 1])
    return {
        "best_epoch": best,
        "tail_from": int(run.val_epochs[-val.window]),
        "best_val": run.level(best_val),
        "tail_val": run.level(val.tail),
        "rise": per_cent * (val.tail - best_val),
        "noise": per_cent * val.luck(val.best),
        "z": run.facts.paired_z,
        "train_then": run.level(then),
        "tail_train": run.level(train.tail),
        "train_rise": (train.tail - then) / run.scale_train,
        "train_noise": train.luck(best - 1) / run.scale_train,
        "skill_val": run.skill_val,
    }


def _val_rising_holds(e: Evidence) -> bool:
    sure = e["z"] is not None and e["z"] >= STANDARD_ERRORS
    return (
        e["best_epoch"] < e["tail_from"]
        and e["rise"] >= RISE
        and (e["rise"] >= e["noise"] or sure)
        and e["train_rise"] <= e["train_noise"]
        and (e["skill_val"] is None or e["skill_val"] >= LEAST_SKILL)
    )


def _val_rising_sentence(e: Evidence) -> str:
    fell = e["tail_train"] < e["train_then"]
    return (
        f"overfitting since epoch {e['best_epoch']}: the validation loss rose from "
        f"{e['best_val']:.3g} to {e['tail_val']:.3g} (+{e['rise']:.0f} %) while the "
        f"training loss {'kept falling' if fell else 'did not get worse'}."
    )


def _expected_val(run: Run) -> Evidence:
    """What validation would gain from as many epochs as the recent past has."""
    if run.lacks("val"):
        return {"expected_gain_val": None, "p_val": None}
    slope, p, _ = run.val.trend
    return {
        "expected_gain_val": -slope * run.val.recent / run.scale_val,
        "p_val": p,
    }


def _val_falls(e: Evidence) -> bool:
    return e["p_val"] < TREND_P and e["expected_gain_val"] >= EXPECTED_GAIN


def _frozen_gap(run: Run) -> Evidence | str:
    """Skill with the weights frozen, on both kinds of data."""
    needs = ("curves", "val", "baseline", "val_baseline", "frozen", "val_se")
    if why := run.lacks(*needs):
        return why
    skill_train = 1 - float(run.frozen[-1]) / run.scale_train
    skill_val = 1 - run.val.tail / run.scale_val
    return {
        "skill_train": skill_train,
        "skill_val": skill_val,
        "gap": skill_train - skill_val,
        "error": run.error(-1),
        "best_skill": run.skill_val,
        **_expected_val(run),
    }


def _gap_holds(e: Evidence) -> bool:
    large = e["gap"] >= max(GAP, STANDARD_ERRORS * e["error"])
    return large and e["best_skill"] >= LEAST_SKILL and not _val_falls(e)


def _gap_sentence(e: Evidence) -> str:
    return (
        f"overfitting: the skill is {e['skill_train']:.2f} on training data, but "
        f"{e['skill_val']:.2f} on validation data, and no longer rising there."
    )


def _easier_holds(e: Evidence) -> bool:
    return -e["gap"] >= max(EASIER, STANDARD_ERRORS * e["error"])


def _easier_sentence(e: Evidence) -> str:
    return (
        f"the validation data are easier than the training data: skill "
        f"{e['skill_val']:.2f} against {e['skill_train']:.2f}, both in eval mode."
    )


def _unstable(run: Run) -> Evidence | str:
    if why := run.lacks("curves"):
        return why
    half = run.train_loss[run.epochs // 2 :]
    changes, path = np.diff(half), float(np.abs(np.diff(half)).sum())
    start = max(float(run.train_loss[0]), run.baseline[0] or 0.0)
    fall = start - float(run.train_loss.min())
    if fall < TINY or path < TINY:
        return "the training loss did not move"
    noise = _sigma(half)
    return {
        "up_fraction": float(changes.clip(min=0).sum()) / path,
        "noise_of_fall": noise / fall,
        "noise_of_scale": noise / run.scale_train,
        "tail": run.level(run.train.tail),
    }


def _unstable_holds(e: Evidence) -> bool:
    jumps = e["noise_of_fall"] >= JUMPS and e["noise_of_scale"] >= JUMPS_OF_SCALE
    return e["up_fraction"] >= UPWARD and jumps


def _unstable_sentence(e: Evidence) -> str:
    return (
        f"unstable: from epoch to epoch the training loss, now about {e['tail']:.3g}, "
        f"jumps by {100 * e['noise_of_fall']:.0f} % of all that it fell."
    )


def _undertrained(run: Run) -> Evidence | str:
    if why := run.lacks("curves"):
        return why
    trend, recent = run.train.trend, run.train.recent
    return {
        "epochs": recent,
        "tail": run.level(run.train.tail),
        "expected_gain": -trend.slope * recent / run.scale_train,
        "p": trend.p,
        **_expected_val(run),
    }


def _undertrained_holds(e: Evidence) -> bool:
    falls = e["p"] < TREND_P and e["expected_gain"] >= EXPECTED_GAIN
    return falls and (e["p_val"] is None or _val_falls(e))


def _undertrained_sentence(e: Evidence) -> str:
    gain = f"{100 * e['expected_gain']:.0f} %"
    return (
        f"not finished: the training loss, now about {e['tail']:.3g}, still falls; "
        f"{e['epochs']} more epochs like the last are worth {gain} of the way from "
        f"knowing nothing to the floor."
    )


def _too_simple(run: Run) -> Evidence | str:
    if why := run.lacks("curves", "val"):
        return why
    other, z = run.facts.reference_val_loss, run.facts.reference_z
    if other is None or z is None:
        return "no reference model"
    best = float(run.val_loss.min())
    return {
        "best_val": run.level(best),
        "reference": run.level(other),
        "gain": 100 * (best - other) / max(best, LEAST_SCALE * run.scale_val),
        "z": z,
    }


def _too_simple_holds(e: Evidence) -> bool:
    return e["gain"] >= REFERENCE_GAIN and e["z"] >= STANDARD_ERRORS


def _too_simple_sentence(e: Evidence) -> str:
    return (
        f"too simple: the validation loss got down to {e['best_val']:.3g}, that of a "
        f"larger model to {e['reference']:.3g}."
    )


def _progress(run: Run) -> Evidence:
    """Evidence of "healthy", and of "inconclusive" if that does not hold."""
    why = run.lacks("curves", "val")
    evidence: Evidence = {"epochs": run.epochs, "reason": why}
    if why is None:
        best, first = float(run.val_loss.min()), float(run.val_loss[0])
        evidence |= {
            "best_val": run.level(best),
            "best_epoch": int(run.val_epochs[run.val.best]),
            "tail_val": run.level(run.val.tail),
            "skill_val": run.skill_val,
            "fall": 1 - best / max(first, run.initial or 0.0, TINY),
            "error": run.error(-1),
        }
    return evidence


def _doubt(e: Evidence) -> str | None:
    """Why a run that shows no trouble cannot be called healthy."""
    if e["reason"] is not None:
        return e["reason"]
    if e["error"] is not None and e["error"] > UNCERTAIN:
        return (
            f"the validation loss is uncertain by {100 * e['error']:.0f} % of the scale"
        )
    if e["skill_val"] is None and e["fall"] < LEAST_SKILL:
        return "the validation loss did not fall, and there is no baseline"
    if e["skill_val"] is not None and e["skill_val"] < LEAST_SKILL:
        return "the validation loss never was clearly better than the baseline"
    return None


def _healthy_holds(e: Evidence) -> bool:
    return _doubt(e) is None


def _healthy_sentence(e: Evidence) -> str:
    return (
        f"healthy: the validation loss fell to {e['best_val']:.3g} in epoch "
        f"{e['best_epoch']} and ended at {e['tail_val']:.3g}."
    )


def _inconclusive_holds(e: Evidence) -> bool:
    return not _healthy_holds(e)


def _inconclusive_sentence(e: Evidence) -> str:
    return f"inconclusive after {e['epochs']} epochs: {_doubt(e)}."


# In the order in which they explain a run. Curves that are broken tell no more.
BROKEN = frozenset({"nonfinite", "diverging"})
TROUBLE = BROKEN | {
    *("dead_input", "no_progress", "leak_duplicates", "no_signal"),
    *("overfit", "unstable", "undertrained", "too_simple"),
}
RULES: dict[str, Rule] = {
    "nonfinite": Rule(
        "nonfinite",
        _nonfinite,
        _nonfinite_holds,
        _nonfinite_sentence,
        "Look for NaN in the data of that epoch; lower the learning rate; clip the "
        "gradients.",
    ),
    "diverging": Rule(
        "diverging",
        _diverging,
        _diverging_holds,
        _diverging_sentence,
        "Lower the learning rate, to a tenth first, or warm it up.",
    ),
    "dead_input": Rule(
        "dead_input",
        _dead_input,
        _dead_input_holds,
        _dead_input_sentence,
        "Look at a batch as the model gets it, and for activations that are all zero.",
    ),
    "no_progress": Rule(
        "no_progress",
        _no_progress,
        _no_progress_holds,
        _no_progress_sentence,
        "See whether the model can learn one small batch by heart. If so, raise the "
        "learning rate or take a larger model; if not, look for a bug.",
        unless=BROKEN,
    ),
    "leak_duplicates": Rule(
        "leak_duplicates",
        _leak_duplicates,
        _leak_duplicates_holds,
        _leak_duplicates_sentence,
        "Split the data so that no sample is in both parts; as it is, the validation "
        "loss is too good.",
    ),
    "no_signal": Rule(
        "no_signal",
        _no_signal,
        _no_signal_holds,
        _no_signal_sentence,
        "See whether inputs and targets still belong together, and whether the inputs "
        "can say anything about the targets.",
        unless=BROKEN,
    ),
    "val_rising": Rule(
        "overfit",
        _val_rising,
        _val_rising_holds,
        _val_rising_sentence,
        "Stop earlier, regularise, or get more data.",
        "mild",
        unless=BROKEN | {"no_signal"},
    ),
    "gap": Rule(
        "overfit",
        _frozen_gap,
        _gap_holds,
        _gap_sentence,
        "Regularise, or get more data.",
        "mild",
        unless=BROKEN | {"no_signal", "overfit"},
    ),
    "unstable": Rule(
        "unstable",
        _unstable,
        _unstable_holds,
        _unstable_sentence,
        "Lower the learning rate, or take larger batches.",
        "mild",
        unless=BROKEN,
    ),
    "undertrained": Rule(
        "undertrained",
        _undertrained,
        _undertrained_holds,
        _undertrained_sentence,
        "Train longer, or raise the learning rate.",
        "mild",
        unless=BROKEN | {"overfit"},
    ),
    "too_simple": Rule(
        "too_simple",
        _too_simple,
        _too_simple_holds,
        _too_simple_sentence,
        "Take a larger model.",
        "mild",
        unless=BROKEN,
    ),
    "healthy": Rule(
        "healthy",
        _progress,
        _healthy_holds,
        _healthy_sentence,
        "Whether another model would do better, the curves cannot say.",
        "note",
        unless=TROUBLE,
    ),
    "inconclusive": Rule(
        "inconclusive",
        _progress,
        _inconclusive_holds,
        _inconclusive_sentence,
        "More epochs, more validation data or a baseline would tell.",
        "note",
        unless=TROUBLE | {"healthy"},
    ),
    "val_below_train": Rule(
        "val_below_train",
        _frozen_gap,
        _easier_holds,
        _easier_sentence,
        "This is no leak by itself; see whether the training targets are noisier.",
        "note",
        unless=BROKEN,
    ),
}
