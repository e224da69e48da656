"""A training run while it goes on: its epochs, and what the caller sees of them."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lossloop._batches import (
    first,
    generators_kept,
    is_one_shot,
    length,
    split,
    to_device,
)
from lossloop._fold import EndPass, fold_metrics
from lossloop._gate import (
    NonFiniteError,
    gate_of,
    names_not_finite,
    on_host,
    with_allowance,
)
from lossloop._history import History, Row
from lossloop._interruption import Interruption
from lossloop._journal import Journal
from lossloop._mean import Mean
from lossloop._memory import Indexed, copied_once, gives_again, read
from lossloop._model import copy_tensors, device_of, load_params, model_params
from lossloop._objective import Objective
from lossloop._optimizers import held_moments, load_opt_state
from lossloop._order import Generators, after
from lossloop._plan import CompilePlan
from lossloop._precision import Precision, autocast
from lossloop._progress import Progress
from lossloop._random import mix, seeded
from lossloop._run import Best, Run
from lossloop._scan import CompiledFold
from lossloop._schedule import Schedule
from lossloop._step import EvalStep, divisor
from lossloop._stopping import Patience
from lossloop._types import Batch, OptState, Params
from lossloop._watch import Watch, reading

# Numbers in the state of an optimizer instance, up to which it is brought up to date
# after each epoch. Beyond, a second copy of them would take too much memory.
LARGEST_COPIED = 1e7

SMALLER = """\
The gradients were finite, and the numbers grew too large. The module holds the \
weights of the last finished epoch. Lower the learning rate, or bound the gradient \
(clip_grad_norm=1.0)."""
SKIP_OR_SMALLER = """\
Nothing of it has reached the weights; the module holds those of the last finished \
epoch. Look at the batch; lower the learning rate or bound the gradient \
(clip_grad_norm=1.0); or have a few such steps left out (skip_nonfinite=10)."""
NO_BEST = """\
It was finite after no epoch, so that there are no best weights; the module holds \
those of the last finished epoch. Look at the validation data and at what the loss \
does with the model in eval mode."""


class StepRecord(NamedTuple):
    """What `on_step` is handed; nothing in it has been read from the device."""

    epoch: int
    mean: Mean  # of the epoch so far; `mean.value()` reads the device
    params: Params  # after the step; the next may overwrite them: copy to keep
    opt_state: OptState  # likewise; `opt_state.step` is on the CPU


class EpochRecord(NamedTuple):
    """What `on_epoch` is handed."""

    row: Row  # of the history
    params: Params  # after the epoch; the next step may overwrite them: copy to keep
    opt_state: OptState  # likewise


class Frozen(NamedTuple):
    """Data that are measured with the weights frozen."""

    column: str  # of the history, for the loss
    prefix: str  # of the columns for metrics
    loader: str  # the argument of `fit` that they came with
    batches: Iterable[Batch]


@dataclass(kw_only=True, eq=False)
class Training:
    """A run while it goes on.

    Whenever the caller may look, the module, an optimizer instance and a scheduler are
    as they were after the last finished epoch.

    Attributes:
        opt_state: The optimizer's state after the last finished pass.
        history: A row per finished epoch.
        best: The epoch of the lowest validation loss, and its weights if they are to be
            restored; None as long as there is none.
        ended: Why there is no further epoch; None while there may be.
    """

    # What it is made of.
    goal: Objective
    optimizer: Any  # the caller's
    folding: CompiledFold  # holds the weights
    eval_step: EvalStep
    plans: list[CompilePlan]  # of the two steps
    schedule: Schedule
    train: Iterable[Batch]
    measured: list[Frozen]
    columns: list[str]  # of what is measured on them
    patience: Patience | None
    journal: Journal | None
    watch: Watch
    bar: Progress

    # What is asked of it.
    epochs: int
    planned: int | None  # of what the scheduler counts, as far as that is known
    max_steps: int | None
    max_seconds: float | None
    eval_every: int
    restore_best: bool
    accumulate: int
    precision: Precision
    skip_nonfinite: int
    on_step: Callable[[StepRecord], object] | None
    on_epoch: Callable[[EpochRecord], object] | None
    never_finite: set[str]  # names of what was not finite before any step

    # Where it stands.
    opt_state: OptState
    batches: Iterator[Batch] | None  # of the pass that is begun
    generators: Generators  # at the start of it
    history: History = field(default_factory=History, init=False)
    best: Best | None = field(default=None, init=False)
    ended: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Nothing is done yet."""
        self._signals = Interruption()
        self._own = model_params(self.goal.model)
        self._instance = isinstance(self.optimizer, torch.optim.Optimizer)
        leaves = pytree.tree_leaves(self.opt_state)
        numbers = sum(t.numel() for t in leaves if isinstance(t, Tensor))
        self._copied = self._instance and numbers <= LARGEST_COPIED
        self._updated = False  # whether load_opt_state has been called
        # The state of the last finished epoch, where module and instance do not have it
        self._kept: tuple[Params, OptState] | None = None
        self._per_epoch = length(self.train)
        # Then nobody needs to know where the generators were; noting it takes time.
        self._repeats = self.journal is None and gives_again(self.train)
        self._resumed: Run | None = None  # until its epoch goes on
        self._done = 0  # epochs, before this process
        self._epoch = 0
        self._first_step = self._epoch_step = int(self.opt_state.step)
        self._skipped = 0  # steps, in the epochs that have a row
        self._passed = 0  # steps that the gate skipped, when it was last looked at
        self._started = self._epoch_started = perf_counter()

    @property
    def params(self) -> Params:
        """The weights that are trained, after the last step."""
        return self.folding.params

    @property
    def shown(self) -> Params:
        """The weights that are measured: the average, if there is one."""
        average = self.opt_state.ema
        return {**self.params, **average.params} if average else self.params

    def run(self) -> Params:
        """Trains to the end.

        Returns:
            The weights that the module now holds.

        Raises:
            NonFiniteError: If a loss, a gradient or the state stops being finite, or no
                validation loss was finite.
        """
        stack = ExitStack()
        try:
            self._signals.heed()
            stack.enter_context(copied_once())
            if self.journal is not None:
                stack.enter_context(self.journal.lock())
                stack.callback(self.journal.finish)
                self._open(self.journal)
            self._begin()
            stack.callback(self.bar.close)
            for epoch in range(self._done + 1, self.epochs + 1):
                if self.ended is not None:
                    break
                self._epoch = epoch
                self._make_epoch()
            final = self._finish()
        except BaseException:
            with self._signals.whole():
                if self._kept is not None:
                    self._load(*self._kept)
                self.schedule.restore()
            raise
        finally:
            try:
                stack.close()
            finally:
                # No call comes before: at each of them a signal may be heeded.
                self._signals.held = True
                self._signals.restore()
        if final is None:
            step = int(self.opt_state.step)
            raise NonFiniteError(len(self.history), step, ["val_loss"], NO_BEST)
        return final

    def _open(self, journal: Journal) -> None:
        """Takes up the run of the journal, or begins it there."""
        saved = journal.newest(self.params, self.opt_state)
        if saved is None:
            assert self.batches is not None
            self.batches = journal.begin_epoch(self.batches)
            journal.begin(self._written(self.opt_state, 0), self.generators)
            return
        self.folding.params = saved.params
        self.opt_state = with_allowance(saved.opt_state, self.skip_nonfinite)
        self._passed = int(gate_of(self.opt_state).skipped)
        if self._passed > self.skip_nonfinite:
            raise ValueError(
                f"fit(skip_nonfinite={self.skip_nonfinite}, resume=True): "
                f"{self._passed} steps of the run were skipped already. Pass at least "
                f"that many."
            )
        self._done, self.history, self.best = saved.epoch, saved.history, saved.best
        assert self.batches is not None
        self.batches, self.generators = journal.rest_of_epoch(self.batches, saved)
        rest = saved.rest
        self._skipped, self._first_step = rest["skipped"], rest["first_step"]
        self._started -= rest["seconds"]
        if self.patience is not None and rest["patience"] is not None:
            self.patience.best, self.patience.waited = rest["patience"]
        known = [None] * len(self.plans) if journal.changed else rest["plans"]
        for plan, state in zip(self.plans, known, strict=True):
            plan.resume(self._done, state)
        with self._signals.whole():
            self.schedule.resume(rest["schedule"])
            self._load(self.params, self.opt_state)
            self.schedule.finish_epoch()
        self._resumed = saved
        self.bar.say(f"Going on after step {int(self.opt_state.step)}.")

    def _begin(self) -> None:
        """Looks whether there is anything left to do, and how much."""
        made, planned = int(self.opt_state.step) - self._first_step, self.planned
        if planned is not None:
            planned -= made if self.schedule.by == "step" else self._done
        self.schedule.begin(self.opt_state, planned)
        whole = self._resumed is not None and self._resumed.mean is None
        if self.patience is not None and self.patience.over:
            self.ended = "early_stopping"
        elif whole and self.max_steps is not None and made >= self.max_steps:
            self.ended = "max_steps"

    def _make_epoch(self) -> None:
        """Trains, measures, and tells of it."""
        mean = self._make_pass()
        if self.ended == "interrupted":
            return
        train_loss, n_train = mean.value_and_weight()
        step = int(self.opt_state.step)
        made = step - self._first_step
        if self.max_steps is not None and made >= self.max_steps:
            self.ended = self.ended or "max_steps"
        trained = None
        if self.journal is not None:
            trained = self._written(self.opt_state, self._epoch - 1, mean)
            if self.ended == "max_steps":
                self.journal.save(trained, self.generators)
        row: dict[str, Any] = {
            "epoch": self._epoch,
            "step": step,
            "train_loss": train_loss,
            "val_loss": None,
            "lr": self.schedule.last_rate(self.opt_state),
            "seconds": perf_counter() - self._epoch_started,
            "n_train": n_train,
            "n_val": None,
            **dict.fromkeys(self.columns),
        }
        if self.opt_state.scale or self.skip_nonfinite:
            before, self._skipped = self._skipped, self._passed
            if self.opt_state.scale:
                self._skipped += int(self.opt_state.scale.skipped)
            row["skipped"] = self._skipped - before
        last = self._epoch == self.epochs or self.ended is not None
        if self.measured and (last or self._epoch % self.eval_every == 0):
            try:
                row |= self._measure()
            except _InterruptedError:
                self.ended = "interrupted"
                if self.journal is not None and trained is not None:
                    self.journal.save(trained, self.generators)
                return
        self._end_epoch(row)

    def _make_pass(self) -> Mean:
        """Carries the step over the batches of the epoch.

        Returns:
            The mean of their losses.
        """
        resumed, self._resumed = self._resumed, None
        self.bar.begin(self._epoch, self.opt_state.step)
        self._epoch_started = perf_counter()
        if resumed is None or resumed.mean is None:
            self._epoch_step = int(self.opt_state.step)
            self.schedule.begin_epoch()
        else:  # goes on in the middle
            self._epoch_step = resumed.rest["epoch_step"]
            self._epoch_started -= resumed.rest["epoch_seconds"]
            self.schedule.begin_epoch(resumed.rest["schedule"]["rate"])
        batches, self.batches = self.batches, None
        if batches is None:
            if not self._repeats:
                self.generators = Generators.now(self.train)
            with reading("train_loader", self._epoch, 1):
                batches = read(self.train)
                if self.journal is not None:
                    batches = self.journal.begin_epoch(batches)
        begun = None if self._repeats else self.generators
        if isinstance(batches, Indexed) and batches.ahead:
            begun = batches
        batches = self.watch(
            "train_loader",
            batches,
            self._epoch,
            begin=0 if resumed is None else resumed.batch,
            planned=self._per_epoch,
        )
        if self.max_steps is not None:
            made = int(self.opt_state.step) - self._first_step
            # Fewer may be asked for than a run has made that is resumed.
            batches = first(max(self.max_steps - made, 0), batches)
        _, self.opt_state, mean = self.folding(
            self.params,
            self.opt_state,
            batches,
            mean=None if resumed is None else resumed.mean,
            on_step=self._after_step,
            keep=self._kept is not None,
        )
        if not self.folding.seen_finite:
            self._check_state(self.opt_state)
        gate = gate_of(self.opt_state)
        self._passed = int(gate.skipped)
        if self._passed > self.skip_nonfinite:
            number = int(gate.step)
            place = number - self._epoch_step - 1
            where = _not_finite(
                self.goal,
                self.train,
                begun,
                place,
                self.params,
                self.opt_state,
                self.precision,
                self.accumulate,
            )
            raise NonFiniteError(self._epoch, number, where, SKIP_OR_SMALLER)
        return mean

    def _after_step(self, opt_state: OptState, mean: Mean) -> OptState:
        self.bar.step(mean, opt_state.step)
        if on_host(mean.total) and int(gate_of(opt_state).skipped) > self._passed:
            self._check_state(opt_state)
            self._passed = int(gate_of(opt_state).skipped)
            if self._passed > self.skip_nonfinite:
                raise EndPass(opt_state)
        opt_state = self.schedule.after_step(opt_state)
        if self.on_step is not None:
            record = StepRecord(self._epoch, mean, self.params, opt_state)
            self.ended = "on_step" if self.on_step(record) == "stop" else None
        seconds = self.max_seconds
        if seconds is not None and perf_counter() - self._started >= seconds:
            self.ended = self.ended or "max_seconds"
        if self._signals.requested is not None:
            self.ended = self.ended or "interrupted"
        # What ends within an epoch is saved there, to go on from if it is resumed.
        journal = self.journal
        if journal is not None and (self.ended or journal.due(int(opt_state.step))):
            self._check_state(opt_state)
            now = self._written(opt_state, self._epoch - 1, mean)
            journal.save(now, self.generators)
        if self.ended is not None:
            raise EndPass(opt_state)
        return opt_state

    def _measure(self) -> dict[str, Any]:
        """The columns of what is measured with the weights frozen."""
        self.bar.validate()
        found: dict[str, Any] = {}
        step = _Heeding(self.eval_step, self._signals)
        for column, prefix, loader, batches in self.measured:
            passing = self.watch(loader, batches, self._epoch)
            mean, metrics = fold_metrics(step, self.shown, passing)
            found[column], n = mean.value_and_weight()
            if column == "val_loss":
                found["n_val"] = n
            for name, value in metrics.values().items():
                found[prefix + name] = value
        return found

    def _end_epoch(self, row: dict[str, Any]) -> None:
        """Ends an epoch: for all who look at it, and in the journal."""
        self.history = self.history.append(row)
        loss = row["val_loss"]
        lowest = math.inf if self.best is None else self.best.loss
        if loss is not None and math.isfinite(loss) and loss < lowest:
            weights = self.shown if self.restore_best else {}
            copy = {name: t.clone() for name, t in weights.items()}
            self.best = Best(self._epoch, loss, copy)
        self.opt_state = self.schedule.after_epoch(
            self.opt_state, row["train_loss"] if loss is None else loss
        )
        with self._signals.whole():
            self._write()
            self.schedule.finish_epoch()
        for plan in self.plans:
            plan.end_epoch()
        self.bar.end(row)
        if self.on_epoch is not None:
            record = EpochRecord(self.history[-1], self.params, self.opt_state)
            if self.on_epoch(record) == "stop":
                self.ended = self.ended or "on_epoch"
            # It may have changed rates.
            self.opt_state = self.schedule.follow(self.opt_state)
        if self.patience is not None and self.patience.lost(row):
            self.ended = self.ended or "early_stopping"
        if self._signals.requested is not None and self._epoch < self.epochs:
            self.ended = self.ended or "interrupted"
        # What ended within the epoch was saved there.
        between = self.ended in (None, "early_stopping", "on_epoch", "interrupted")
        if self.journal is not None and between:
            step = int(self.opt_state.step)
            last = self._epoch == self.epochs or self.ended is not None
            if last or self.journal.due_at_end_of_epoch(step):
                self.generators = Generators.now(self.train)
                self._epoch_step = step
                now = self._written(self.opt_state, self._epoch)
                self.journal.save(now, self.generators)

    def _write(self) -> None:
        """Writes the epoch to module and instance, or keeps it if nobody looks."""
        # Nobody does between epochs then, and the next pass leaves the state alone.
        unseen = self.on_epoch is None and self.schedule.by is None
        if unseen and self.folding.returns_new and (self._updated or not self._copied):
            self._kept = self.params, self.opt_state
        else:
            self._kept = None
        targets, sources = list[Tensor](), list[Tensor]()
        if self._kept is None or self.measured:
            targets += self._own.values()
            sources += [self.params[name] for name in self._own]
        if self._kept is None and self._copied:
            held = None
            if self._updated:
                held = held_moments(self.optimizer, self._own, self.opt_state)
            if held is None:
                load_opt_state(self.optimizer, self.goal.model, self.opt_state)
                self._updated = True
            else:
                targets += held[0]
                sources += held[1]
        copy_tensors(targets, sources)

    def _load(self, params: Params, opt_state: OptState) -> None:
        """Writes a state to the module, and to an instance that is kept up to date."""
        load_params(self.goal.model, params)
        if self._copied:
            load_opt_state(self.optimizer, self.goal.model, opt_state)
            self._updated = True

    def _finish(self) -> Params | None:
        """Leaves module, instance and scheduler as the result has them.

        Returns:
            The weights of the module; None if the best were wanted, and none was.
        """
        validated = any(row["val_loss"] is not None for row in self.history)
        interrupted = self.ended == "interrupted"
        final = self.shown
        if self.best is not None and self.restore_best:
            final = self.best.params
        elif self.best is None and validated and not interrupted:
            final = None
        with self._signals.whole():
            if self._instance and (not self._copied or self._kept or interrupted):
                load_opt_state(
                    self.optimizer,
                    self.goal.model,
                    self.opt_state,
                    copy=self._copied,
                )
            if final is not None:
                load_params(self.goal.model, final)
            self.schedule.finish_epoch()
        return final

    def _written(
        self, opt_state: OptState, epoch: int, mean: Mean | None = None
    ) -> Run:
        """The run after so many epochs and the batches in `mean`, for the journal."""
        assert self.journal is not None
        step, patience = int(opt_state.step), self.patience
        return Run(
            self.params,
            opt_state,
            epoch,
            0 if mean is None else step - self._epoch_step,
            mean,
            self.history,
            self.best,
            {
                "first_step": self._first_step,
                "epoch_step": self._epoch_step,
                "seconds": perf_counter() - self._started,
                "epoch_seconds": perf_counter() - self._epoch_started,
                "skipped": self._skipped,
                "schedule": self.schedule.state(),
                "patience": patience and [patience.best, patience.waited],
                "plans": [plan.state() for plan in self.plans],
                "products": products(self.plans, self.params),
                "place": self.journal.place(step - self._first_step),
            },
        )

    def _check_state(self, opt_state: OptState) -> None:
        """Refuses a state that is not finite, though the gradients were."""
        names = set(names_not_finite((self.params, opt_state.carry)))
        if names - self.never_finite:
            gate = gate_of(opt_state)
            # Weights that are not finite let no later step pass.
            made = int(gate.step) - (int(gate.skipped) - self._passed)
            found = sorted(names - self.never_finite)
            raise NonFiniteError(self._epoch, made, found, SMALLER)


def _not_finite(
    goal: Objective,
    train: Iterable[Batch],
    begun: Indexed | Generators | None,
    place: int,
    params: Params,
    opt_state: OptState,
    precision: Precision,
    accumulate: int,
) -> list[str]:
    """What was not finite, found by making the step again that changed nothing.

    Args:
        goal: The objective.
        train: The training data, which are read again if need be.
        begun: The pass, if it gives a batch once more; or the generators at its start;
            None if neither is known.
        place: Of the batch in the epoch, from 0.
        params: Before the step.
        opt_state: Likewise.
        precision: Of the run.
        accumulate: Micro-batches that a batch is cut into, which are few enough to fit
            into memory.
    """
    unknown = ["loss or gradient"]
    if isinstance(begun, Indexed):
        batch = begun.again(place)
    elif begun is None or is_one_shot(train):
        return unknown
    else:
        with generators_kept(train):
            begun.put_back(train)
            batch = next(after(place, read(train)), None)
    if batch is None:
        return unknown
    batch = to_device(batch, device_of(params))
    where = [f"batch{name}" for name in names_not_finite(batch)]
    step = mix(int(opt_state.seed), int(gate_of(opt_state).step) - 1)
    device = device_of(params)
    found = dict[str, None]()
    micro_batches = split(batch, accumulate) if accumulate > 1 else [batch]
    for part, micro_batch in enumerate(micro_batches):
        seed = mix(step, part) if part else step
        with seeded(seed, device), torch.enable_grad():
            leaves = {
                name: t.detach().requires_grad_(name in goal.trainable)
                for name, t in params.items()
            }
            with autocast(precision, params):
                loss_sum, n, buffers = goal.train(leaves, micro_batch)
            if not math.isfinite(loss_sum.detach()):
                found["loss"] = None
            params = {**params, **buffers}
            if not loss_sum.requires_grad:  # in inference mode
                continue
            trained = {name: t for name, t in leaves.items() if t.requires_grad}
            grads = torch.autograd.grad(
                loss_sum / divisor(n),
                [*trained.values()],
                allow_unused=True,
                materialize_grads=True,
            )
        names = names_not_finite(dict(zip(trained, grads, strict=True)))
        found |= {f"gradient of {name[2:-2]}": None for name in names}
    return [*where, *found] or unknown


def products(plans: list[CompilePlan], params: Params) -> list[str] | None:
    """The kinds of products that our kernel computes; None if that was not asked."""
    float32 = any(t.dtype is torch.float32 for t in params.values())
    if not float32 or device_of(params).type != "cpu":
        return None
    if not any(plan.choice.compiled for plan in plans):
        return None
    from lossloop._products import in_use  # late: it imports the compiler

    kinds = in_use()
    return None if kinds is None else list(kinds)


class _InterruptedError(Exception):
    """A signal came while validation data were read."""


class _Heeding:
    """An evaluation step that is not made any more once a signal has come."""

    def __init__(self, step: EvalStep, signals: Interruption) -> None:
        self.metrics = step.metrics
        self._step = step
        self._signals = signals

    def __call__(self, params: Params, batch: Batch) -> Any:
        if self._signals.requested is not None:
            raise _InterruptedError
        return self._step(params, batch)
