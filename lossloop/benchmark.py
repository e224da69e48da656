"""How fast a step of yours is: by hand, pure, compiled, donating, folded."""

import copy
import itertools
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from lossloop._compile import compile_step, graphs_compiled, why_not_traced
from lossloop._losses import is_torch_loss, loss_pair, torch_mean
from lossloop._machine import machine
from lossloop._mean import Mean
from lossloop._model import device_of
from lossloop._objective import Objective, forward, split_batch, supervised
from lossloop._optimizers import is_of_torch
from lossloop._pace import AGREES, Pace, time_works
from lossloop._products import ours
from lossloop._scan import LENGTH, CannotScanError, Scan
from lossloop._step import TrainStep, init, make_step
from lossloop._types import Batch

__all__ = ["Comparison", "Form", "Pace", "compare", "time_works"]

_FIRST_STEPS = 3  # whose losses are compared

Run = Callable[[int], list[Tensor]]
"""Makes so many steps, and returns their mean losses."""


@dataclass(frozen=True)
class Form:
    """What one form of a step costs.

    Attributes:
        name: "by hand", "eager", "compiled", "donating" or "folded".
        microseconds: Of a step, the median of the rounds.
        low: Their lower quartile.
        high: Their upper quartile.
        speed: How many times as fast as the first form, by the medians.
        peak: Bytes allocated in a step at most, above those held between steps.
        cold: Seconds of the first call with empty caches; None if not compiled.
        warm: Seconds of the first call of another step of the same code, when the
            caches are filled.
        break_even: Steps after which it has saved what compiling cold costs; None if it
            saves nothing, or is not compiled.
        recompilations: Graphs that were compiled while steps were timed.
    """

    name: str
    microseconds: float
    low: float
    high: float
    speed: float
    peak: int
    cold: float | None = None
    warm: float | None = None
    break_even: int | None = None
    recompilations: int = 0


@dataclass(frozen=True)
class Comparison:
    """The forms of a step beside each other; `print` it.

    Attributes:
        forms: What each costs.
        left_out: Why a form is missing, by its name.
        machine: Processor or GPU, threads, versions and date.
    """

    forms: tuple[Form, ...]
    left_out: dict[str, str]
    machine: str

    def __str__(self) -> str:
        """A table, with the machine above it."""
        head = (
            f"{'':10}{'us/step':>10}{'quartiles':>17}{'speed':>8}{'peak MB':>9}"
            f"{'cold s':>8}{'warm s':>8}{'pays after':>12}{'recompiled':>12}"
        )
        lines = [
            f"{form.name:10}{form.microseconds:10.1f}"
            f"{f'{form.low:.1f}-{form.high:.1f}':>17}{form.speed:8.2f}"
            f"{form.peak / 1e6:9.2f}{_or_blank(form.cold, '.1f'):>8}"
            f"{_or_blank(form.warm, '.1f'):>8}{_or_blank(form.break_even, ','):>12}"
            f"{form.recompilations:12}"
            for form in self.forms
        ]
        missing = [f"{name}: left out, {why}" for name, why in self.left_out.items()]
        return "\n".join([self.machine, head, *lines, *missing])

    def to_frame(self) -> Any:
        """The forms as rows of a pandas data frame.

        Raises:
            ImportError: Without pandas.
        """
        frame: Any = _library("pandas").DataFrame([asdict(form) for form in self.forms])
        return frame.set_index("name")

    def plot(self, axes: Any = None) -> Any:
        """Draws the time of a step of each form, with quartiles.

        Args:
            axes: Of matplotlib; default new ones.

        Returns:
            The axes.

        Raises:
            ImportError: Without matplotlib.
        """
        if axes is None:
            axes = _library("matplotlib.pyplot").subplots()[1]
        names = [form.name for form in self.forms]
        spread = [
            [form.microseconds - form.low for form in self.forms],
            [form.high - form.microseconds for form in self.forms],
        ]
        axes.barh(names, [form.microseconds for form in self.forms], xerr=spread)
        axes.invert_yaxis()
        axes.set_xlabel("microseconds per step")
        return axes


def compare(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    optimizer: Any,
    batch: Batch,
    *,
    rounds: int = 15,
    backend: str | Callable[..., Any] = "inductor",
) -> Comparison:
    """Times a training step of your model in every form, on one batch.

    By hand is `zero_grad`, loss, `backward`, `step`, without reading the loss. All
    forms first make the same three steps, and must see the same losses. Then they take
    turns, so that whatever else the machine does meets all of them; the median of the
    rounds is reported. For one core, start Python with `taskset -c 0` and
    `OMP_NUM_THREADS=1`.

    Args:
        model: Is copied; its own weights stay.
        loss_fn: As for `fit`.
        optimizer: As for `fit`. Only one of `torch.optim` can be stepped by hand.
        batch: As the loader gives it, on the device of the model.
        rounds: How often each form has its turn, of some 20 ms.
        backend: Of `torch.compile`.

    Returns:
        What each form costs: `print` it, or see `forms`, `to_frame()`, `plot()`.

    Raises:
        ValueError: If `rounds` is no int of at least 1, or a form gives other losses.
        RuntimeError: If the step cannot be compiled, or nothing is.

    Example:
        >>> from lossloop.benchmark import compare
        >>> batch = torch.randn(8, 2), torch.randn(8, 1)
        >>> found = compare(
        ...     nn.Linear(2, 1), nn.MSELoss(), torch.optim.SGD, batch,
        ...     rounds=1, backend="aot_eager",
        ... )
        >>> [form.name for form in found.forms]
        ['by hand', 'eager', 'compiled', 'donating', 'folded']
    """
    if isinstance(rounds, bool) or not hasattr(rounds, "__index__") or rounds < 1:
        raise ValueError(f"compare(rounds=...) must be at least 1, got {rounds!r}.")
    if why := why_not_traced():
        raise RuntimeError(f"compare: there is nothing to compare: {why}.")
    model, optimizer = copy.deepcopy((model, optimizer))
    goal = loss_fn if isinstance(loss_fn, Objective) else supervised(model, loss_fn)
    step = make_step(goal, optimizer)
    device = device_of(goal.init())
    if backend == "inductor":  # what a process does once, no form is to bear alone
        import_module("torch._inductor.compile_fx")
        if device.type == "cpu":
            ours()
    left_out: dict[str, str] = {}

    def start() -> list[Any]:
        return list(init(goal, optimizer))

    def stepping(step: TrainStep) -> Run:
        state = start()

        def run(steps: int) -> list[Tensor]:
            means: list[Tensor] = []
            with torch.no_grad():
                for _ in range(steps):
                    *state[:], loss_sum, n = step(state[0], state[1], batch)
                    means.append(loss_sum / n)
            return means

        return run

    def folding() -> Run:
        state = start()
        params, carry = state[0], state[1].carry
        scan = Scan(step.body.function, (params, carry, batch), backend)
        order = torch.arange(len(batch[0]))

        def run(steps: int) -> list[Tensor]:
            nonlocal params, carry
            means: list[Tensor] = []
            # One by one only for as many as are compared.
            most = 1 if steps <= _FIRST_STEPS else LENGTH
            for done in range(0, steps, most):
                orders = order.expand(min(most, steps - done), -1)
                params, carry, mean = scan(
                    params, carry, Mean.empty(device), batch, orders
                )
                means.append(mean.total / mean.weight)
            return means

        return run

    makers: dict[str, Callable[[], Run]] = {}
    try:
        makers["by hand"] = _by_hand(goal, optimizer, batch)
    except TypeError as error:
        left_out["by hand"] = str(error)
    makers["eager"] = lambda: stepping(step)
    makers["compiled"] = lambda: stepping(compile_step(step, backend=backend))
    makers["donating"] = lambda: stepping(
        compile_step(step, donate=True, backend=backend)
    )
    plain = isinstance(batch, tuple | list) and all(type(t) is Tensor for t in batch)
    if plain and device.type in ("cpu", "cuda"):
        makers["folded"] = folding
    else:
        left_out["folded"] = "only batches of tensors on the CPU or on CUDA are folded"
    return _timed(makers, left_out, rounds)


def _by_hand(goal: Objective, optimizer: Any, batch: Batch) -> Callable[[], Run]:
    """The loop that everybody writes, on a model of its own.

    Raises:
        TypeError: If there is none.
    """
    if goal.loss_fn is None:
        raise TypeError("an objective of one's own has no loop that everybody writes")
    if not is_of_torch(optimizer):
        raise TypeError("only an optimizer of torch.optim can be stepped by hand")
    loss_fn: Any = goal.loss_fn

    def make() -> Run:
        model, own = copy.deepcopy((goal.model, optimizer))
        model.train()
        stepped = own if isinstance(own, Optimizer) else own(model.parameters())
        inputs, targets, weights = split_batch(batch)
        pair = loss_pair(loss_fn)

        def mean_of_pair(output: Any, targets: Any, weights: Tensor | None) -> Tensor:
            loss_sum, n = pair(output, targets, weights)
            return loss_sum / n

        mean = torch_mean(loss_fn) if is_torch_loss(loss_fn) else mean_of_pair

        def run(steps: int) -> list[Tensor]:
            means: list[Tensor] = []
            for _ in range(steps):
                stepped.zero_grad()
                loss = mean(forward(model, inputs), targets, weights)
                loss.backward()
                stepped.step()
                means.append(loss.detach())
            return means

        return run

    return make


def _timed(
    makers: dict[str, Callable[[], Run]], left_out: dict[str, str], rounds: int
) -> Comparison:
    runs: dict[str, Run] = {}
    cold: dict[str, tuple[float, float] | tuple[None, None]] = {}
    expected: list[float] = []
    for name, make in makers.items():
        compiled = name not in ("by hand", "eager")
        try:
            with fresh_cache():
                runs[name], first, seconds = _first_call(make)
                warm = _first_call(make)[2] if compiled else None
        except CannotScanError as error:
            left_out[name] = str(error)
            continue
        cold[name] = (seconds, warm) if warm is not None else (None, None)
        losses = [float(loss) for loss in (*first, *runs[name](1), *runs[name](1))]
        expected = expected or losses
        bound = AGREES * max(map(abs, expected))
        apart = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
        if not all(each <= bound for each in apart):  # nor if one is nan
            raise ValueError(
                f"compare: the first losses differ, so that times would say nothing: "
                f"{name} has {losses}, {next(iter(runs))} has {expected}. Take dropout "
                f"and other random layers out: each form draws other numbers."
            )
    turns = {name: _turn(run) for name, run in runs.items()}
    graphs = dict.fromkeys(runs, 0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            before = graphs_compiled()
            times[name].append(1e6 * _seconds(run, turns[name]) / turns[name])
            graphs[name] += graphs_compiled() - before
    reference = statistics.median(next(iter(times.values())))
    forms: list[Form] = []
    for name, found in times.items():
        middle = statistics.median(found)
        low, _, high = statistics.quantiles(found, n=4) if rounds > 1 else (middle,) * 3
        cold_seconds, warm_seconds = cold[name]
        saved = (reference - middle) / 1e6
        pays = None if cold_seconds is None or saved <= 0 else cold_seconds / saved
        forms.append(
            Form(
                name,
                microseconds=middle,
                low=low,
                high=high,
                speed=reference / middle,
                peak=_peak(runs[name], LENGTH if name == "folded" else 1),
                cold=cold_seconds,
                warm=warm_seconds,
                break_even=None if pays is None else round(pays),
                recompilations=graphs[name],
            )
        )
    return Comparison(tuple(forms), left_out, machine())


def _first_call(make: Callable[[], Run]) -> tuple[Run, list[Tensor], float]:
    run = make()
    start = perf_counter()
    means = run(1)
    return run, means, perf_counter() - start


def _seconds(run: Run, steps: int) -> float:
    start = perf_counter()
    means = run(steps)
    if means[-1].is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - start


def _turn(run: Run) -> int:
    """How many steps take about 20 ms."""
    run(LENGTH)
    steps = round(0.02 * LENGTH / _seconds(run, LENGTH))
    return max(1, steps) if steps < LENGTH else steps - steps % LENGTH


def _peak(run: Run, steps: int) -> int:
    """Bytes allocated at most above what is held between steps."""
    (mean, *_) = run(steps)
    if mean.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(steps)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it has nothing to say
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        run(steps)
    events: Any = traced.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    changes = [e for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in changes), default=0)


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"This needs {package}. Install it: python -m pip install {package}"
        ) from error
