"""The front door: a whole training run, arranged from the public parts."""

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lossloop._baseline import data_facts
from lossloop._batches import (
    PaddedLast,
    as_batches,
    in_order,
    length,
    no_batches,
    peek,
    rows,
    split,
    to_device,
)
from lossloop._compile import RNN_HINT, compiled
from lossloop._coupling import (
    coupled_layers,
    coupled_loss,
    coupled_padding,
    coupled_samples,
)
from lossloop._diagnosis import ENOUGH, diagnose
from lossloop._gate import names_not_finite
from lossloop._history import History
from lossloop._journal import Journal
from lossloop._memory import Indexed, in_memory, read
from lossloop._model import check_functional, device_of
from lossloop._objective import Objective, supervised
from lossloop._order import Generators
from lossloop._plan import CompileChoice, CompilePlan, has_rnn
from lossloop._precision import Precision, autocast
from lossloop._progress import Progress
from lossloop._scan import LENGTH, CompiledFold
from lossloop._schedule import Schedule
from lossloop._step import EvalStep, TrainStep, init, make_eval_step, make_step
from lossloop._stopping import EarlyStopping, Patience, as_early_stopping
from lossloop._training import EpochRecord, Frozen, StepRecord, Training, products
from lossloop._types import Batch, OptState, Params, Slots
from lossloop._watch import Watch, reading


@dataclass(frozen=True)
class Result:
    """What `fit` returns.

    Attributes:
        history: A row per epoch; see `History`.
        params: The weights that the module now holds: those of the best epoch, or of
            the last one.
        opt_state: The optimizer's state after the last step.
        best_epoch: The epoch of the lowest validation loss, from 1; None without
            validation data, or if no validation loss was a number.
        compiled: Whether the training step was compiled, and why.
        status: "finished", or what ended the run before its last epoch:
            "early_stopping", "max_steps", "max_seconds", "on_step", "on_epoch" or
            "interrupted". An interrupted epoch has no row.
        resume_exact: Whether a run that was resumed has the bits of one that was not
            interrupted; True for one that was not resumed.
        resume_reason: Why not.
    """

    history: History
    params: Params
    opt_state: OptState
    best_epoch: int | None
    compiled: CompileChoice
    status: str
    resume_exact: bool = True
    resume_reason: str = ""

    def __repr__(self) -> str:
        """The history and what was decided, without the weights."""
        return (
            f"{self.history!r}\nbest epoch: {self.best_epoch}\n"
            f"status: {self.status}\n"
            f"compiled: {self.compiled.compiled} ({self.compiled.reason})"
        )


def fit(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    optimizer: Any,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch] | None = None,
    *,
    epochs: int,
    scheduler: Any = None,
    schedule_by: Literal["step", "epoch"] | None = None,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    precision: Precision = "fp32",
    ema: float | None = None,
    metrics: Mapping[str, Any] | None = None,
    early_stopping: int | EarlyStopping | None = None,
    restore_best: bool = True,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    eval_every: int = 1,
    frozen_train_loss: bool | Iterable[Batch] = False,
    compile: Literal["auto", True, False] = "auto",
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool | Literal["plain"] = True,
    pad_last: bool = False,
    skip_nonfinite: int = 0,
    on_step: Callable[[StepRecord], object] | None = None,
    on_epoch: Callable[[EpochRecord], object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    resume: bool = False,
) -> Result:
    """Trains a model, and reports losses that are exact.

    Every epoch carries a pure step over the training batches, then measures the
    validation loss with the weights frozen. The module itself is changed between
    epochs only: whatever happens, it holds the weights of the last finished epoch (of
    the best one in the end), in the train or eval mode it came in. So do an optimizer
    instance and a scheduler: after an exception, another call goes on from there.
    (Where nothing of yours is called between epochs, this is written when the run ends,
    however it ends. An instance with more than ten million numbers of state is not
    written to before the end, and then has the tensors of the result: a copy would take
    too much memory.)

    Numbers that are not finite never reach the weights: a step whose loss or gradient
    is not finite changes nothing, and ends the run (see `skip_nonfinite`). Ctrl-C and
    SIGTERM end it after the step that is being made, with the status "interrupted",
    saved if there is a `checkpoint`; a second one raises KeyboardInterrupt at once.

    With `checkpoint` the run can go on in another process, after an interruption as
    after a crash, with the same bits as if nothing had happened:
    `fit(..., checkpoint="run", resume=True)`, over and over until it is finished.

    Args:
        model: The module to train.
        loss_fn: A loss module of `torch.nn`, a function `(output, target)` that returns
            one loss per sample or `(loss_sum, n)`, or an `Objective` of this model.
        optimizer: An instance of `torch.optim` (its groups, rates and state are taken,
            and it holds the final state afterwards), a class or partial of one, an
            optimizer of `lossloop.optim`, or an object with optax's two functions.
        train_loader: A `DataLoader`, anything that gives batches each time it is
            iterated, or a tuple of tensors, which is one batch of all the data.
        val_loader: The same, for validation.
        epochs: How often to go through the training data.
        scheduler: A `torch.optim.lr_scheduler` built on `optimizer`, or one of
            `lossloop.schedules`: a function of the step that multiplies the rates.
        schedule_by: When to step a scheduler of torch: after every "step" or every
            "epoch".
        accumulate: Cut each batch into this many micro-batches, to save memory; loss
            and update stay those of the batch. See `make_step`. (Trainers that make one
            step of k loader batches want `batch_size` k times larger here.)
        clip_grad_norm: See `make_step`.
        clip_grad_value: See `make_step`.
        precision: "fp32", "bf16" or "fp16"; see `make_step`. In float16 the history has
            a column `skipped`: steps of the epoch that changed no weight.
        ema: Average the weights, keeping this share of the old average in each step,
            like 0.999. Validation measures the average, and the module ends with it;
            between epochs the module holds the weights that are trained.
        metrics: Functions of the output and the target by name; see `make_eval_step`
            and `lossloop.metrics`. Measured with the validation loss, in columns
            `val_<name>`; with `frozen_train_loss` also of the training data, in
            `train_<name>`.
        early_stopping: Epochs without a lower validation loss after which to end, or
            an `EarlyStopping`, which may watch another column.
        restore_best: Whether to end with the weights of the lowest validation loss.
        max_steps: End after so many steps, in the middle of an epoch if need be.
        max_seconds: End after the step (in a compiled fold, the call) in which so much
            time has passed since the first.
        eval_every: Validate after every so many epochs, and after the last. In between,
            `val_loss` is None.
        frozen_train_loss: True measures the training data too whenever it validates,
            in the way of the validation data: weights frozen, eval mode. The column of
            that name compares with `val_loss`, as `train_loss` does not. Or a loader
            of other data to measure so, such as a fixed part of them.
        compile: True, False, or "auto": compile if the planned steps save more time
            than compiling costs, judging by counts and not by clocks. Shapes of batch
            other than the first, as of the odd last one, go by count in any case.
        device: Where to move the model first; default, where it is.
        seed: Of dropout and other random layers. Shuffling is the loader's.
        progress: Whether to show a bar and print a line per epoch, and at the end what
            the curves say (see `diagnose`, which can be told more); "plain" prints the
            lines alone.
        pad_last: Whether to pad smaller batches, such as the last, to the size of the
            first with samples of weight 0, so that one shape is compiled; see the
            function `pad_last`. Batches must be (inputs, targets), with or without
            weights, and samples must not act on each other.
        skip_nonfinite: How many steps whose loss or gradient is not finite may be
            skipped; the history then has a column `skipped`, and the losses are
            reported as they were. With one more, or by default the first, the run ends
            with a `NonFiniteError`.
        on_step: Called with a `StepRecord` after each step; steps are then made one by
            one. May end the run by returning "stop".
        on_epoch: Called with an `EpochRecord` after each epoch. It may change rates in
            the groups of a torch optimizer, and end the run by returning "stop". What
            it changes in the model is not seen: the run has a copy.
        checkpoint: A directory of the run's own, where it is saved; the last two
            checkpoints are kept. `load` reads them, and safetensors the weights.
        save_every: Steps after which to save, up to 3 % more where they are folded;
            default, after each epoch.
        resume: Whether to go on from the last checkpoint there that is undamaged, if
            there is one. Everything else must be as it was: what makes it another run
            is refused, and what may round differently is warned of and in the result.
            What callbacks hold is theirs to restore.

    Returns:
        The history, the weights, and what was decided.

    Raises:
        ValueError: Before any training, for what cannot be right: no batches, shapes
            that would broadcast, labels out of range, values that are not finite, an
            optimizer over another model's parameters, a scheduler without its unit,
            a model that is no pure function, and the like. The first batches are looked
            at; those of validation only if that takes no worker processes and the
            loader is no iterator. Also if a mean turns out to have no weight.
        TypeError: Likewise, for things of the wrong kind.
        NonFiniteError: If a loss, a gradient or the state stops being finite, or no
            validation loss was finite.
        CheckpointMismatch: If what is resumed is another run.
        CheckpointCorrupt: If there are checkpoints, and none can be read.

    Example:
        >>> import lossloop as ll
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> x = torch.linspace(-1, 1, 32).reshape(-1, 1)
        >>> model = torch.nn.Linear(1, 1)
        >>> result = ll.fit(
        ...     model, torch.nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=0.1),
        ...     (x, 3 * x + 1), epochs=100, progress=False,
        ... )
        >>> result.history[-1]["train_loss"] < 0.01
        True
    """
    _check_counts(epochs=epochs, eval_every=eval_every, seed=seed)
    if max_steps is not None:
        _check_counts(max_steps=max_steps)
    _check_checkpoint(checkpoint, save_every, resume)
    _check_options(max_seconds, compile, progress, on_step=on_step, on_epoch=on_epoch)
    check_functional("fit", model)
    schedule = Schedule(scheduler, schedule_by, optimizer, eval_every)
    formulas = schedule.optimizer
    train = as_batches("train_loader", train_loader, epochs)
    val = None if val_loader is None else as_batches("val_loader", val_loader, epochs)
    frozen = None
    if frozen_train_loss is not False:
        frozen = as_batches(
            "frozen_train_loss",
            in_order(train) if frozen_train_loss is True else frozen_train_loss,
            epochs,
        )
    if device is not None:
        if torch.device(device).type == "meta":
            raise ValueError(
                "fit(device='meta'): tensors there have no values, and those of the "
                "model would be lost. Name a device that computes."
            )
        model.to(torch.device(device))
    goal = loss_fn if isinstance(loss_fn, Objective) else supervised(model, loss_fn)
    if goal.model is not model:
        raise ValueError(
            "fit(model, objective, ...): the objective was made for another module. "
            "Make it with supervised(model, ...) or objective(model, ...) of this one."
        )
    if pad_last and goal.loss_fn is None:
        raise TypeError(
            "fit(pad_last=True) gives the loss weights, and only a loss_fn "
            "(output, target) takes them. For an objective of your own, pass "
            "pad_last(loader) as the loader and use the weights in its function."
        )
    if pad_last:
        train, val, frozen = (
            None if each is None else PaddedLast(each) for each in (train, val, frozen)
        )
        assert train is not None
    eval_step = make_eval_step(goal, metrics, precision=precision)
    if eval_step.metrics and val is None and frozen is None:
        raise ValueError(
            "fit(metrics=...) measures validation data, and there are none. Pass a "
            "val_loader, or frozen_train_loss=True to measure the training data."
        )
    measured = [
        Frozen(column, prefix, loader, each)
        for column, prefix, loader, each in (
            ("val_loss", "val_", "val_loader", val),
            ("frozen_train_loss", "train_", "frozen_train_loss", frozen),
        )
        if each is not None
    ]
    columns = [
        name
        for each in measured
        for name in (each.column, *(each.prefix + m for m in eval_step.metrics))
    ]
    rule = as_early_stopping(early_stopping, ["train_loss", *columns])
    patience = None if rule is None else Patience(rule)
    step = make_step(
        goal,
        formulas,
        accumulate=accumulate,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=clip_grad_value,
        precision=precision,
    )
    # Needs the memory of gradients, so it is done while there is no state yet.
    generators = Generators.now(train)
    watch = Watch(goal)
    try:
        batches, unused = _checked(
            goal, train, val, frozen, accumulate, precision, eval_step, watch
        )
    except BaseException:
        generators.put_back(train)
        raise
    params, opt_state = init(
        goal,
        formulas,
        seed=seed,
        precision=precision,
        ema=ema,
        skip_nonfinite=skip_nonfinite,
    )
    never_finite = set(names_not_finite((params, opt_state.carry)))
    groups = opt_state.slots.groups if isinstance(opt_state.slots, Slots) else ()
    decayed = {name for g in groups if "weight_decay" in g.hyper for name in g.moments}
    if decayed & unused:
        warnings.warn(
            f"fit: the loss of the first batch does not depend on "
            f"{sorted(decayed & unused)}. Their gradient is zero, so weight decay "
            f"shrinks them, where torch.optim would leave them alone. Freeze them with "
            f"requires_grad_(False) if they are not used.",
            stacklevel=2,
        )
    per_epoch = length(train)
    steps_planned, epochs_planned = None, epochs
    if per_epoch is not None:
        steps_planned = min(epochs * per_epoch, max_steps or epochs * per_epoch)
        epochs_planned = -(-steps_planned // per_epoch)
    bar = Progress(shown=progress, epochs=epochs, batches=per_epoch)
    plans: list[CompilePlan] = []

    def planned(
        what: str, total: int | None, function: Callable[..., Any], calls: int
    ) -> CompilePlan:
        plan = CompilePlan(
            function,
            wish=compile,
            epochs=epochs_planned,
            batches=None if total is None else -(-total * calls // epochs_planned),
            announced=partial(bar.compiling, what),
        )
        plans.append(plan)
        return plan

    # The tensors of params and opt_state are our own: the step may write to them.
    step = TrainStep(
        compiled(
            step.body,
            donate=True,
            plan=partial(planned, "training step", steps_planned),
        )
    )
    lengths = [length(each.batches) for each in measured]
    known = [count for count in lengths if count is not None]
    eval_steps = sum(known) * -(-epochs_planned // eval_every)
    eval_step = EvalStep(
        compiled(
            eval_step.body,
            donate=False,
            plan=partial(
                planned,
                "validation step",
                eval_steps if len(known) == len(lengths) else None,
            ),
        )
    )
    if has_rnn(model):
        for plan in plans:
            if not plan.give_up(" ".join(RNN_HINT.split())):
                raise ValueError(f"fit(compile=True): {RNN_HINT}")

    why_not = None
    if schedule.by == "step":
        why_not = "every step has a rate of the scheduler"
    elif on_step is not None:
        why_not = "on_step is called after every step"
    elif precision == "fp16":
        why_not = "the loss is scaled"
    # A checkpoint is saved between calls of a compiled fold, so these are of one size.
    size = LENGTH
    if save_every is not None:
        size = -(-save_every // -(-save_every // LENGTH))
    folding = CompiledFold(step, plan=plans[0], why_not=why_not, length=size)
    folding.params = params

    journal = None
    if checkpoint is not None:
        journal = Journal(
            checkpoint,
            resume=resume,
            every=save_every,
            train=train,
            settings={
                "seed": int(seed),
                "device": str(device_of(params)),
                "compile": str(compile),
                "precision": precision,
                "accumulate": int(accumulate),
                "clip_grad_norm": clip_grad_norm,
                "clip_grad_value": clip_grad_value,
                "restore_best": restore_best,
                "loss": type(goal.loss_fn or goal).__name__,
            },
        )

    training = Training(
        goal=goal,
        optimizer=optimizer,
        folding=folding,
        eval_step=eval_step,
        plans=plans,
        schedule=schedule,
        train=train,
        measured=measured,
        columns=columns,
        patience=patience,
        journal=journal,
        watch=watch,
        bar=bar,
        epochs=epochs,
        planned=steps_planned if schedule.by == "step" else epochs_planned,
        max_steps=max_steps,
        max_seconds=max_seconds,
        eval_every=eval_every,
        restore_best=restore_best,
        accumulate=int(accumulate),
        precision=precision,
        skip_nonfinite=skip_nonfinite,
        on_step=on_step,
        on_epoch=on_epoch,
        never_finite=never_finite,
        opt_state=opt_state,
        batches=batches,
        generators=generators,
    )
    del params, opt_state, batches  # or they would be kept beside what follows
    final = training.run()
    if training.ended == "interrupted":
        where = "" if checkpoint is None else f", and saved in {checkpoint}"
        bar.say(f"Interrupted after step {int(training.opt_state.step)}{where}.")
    if progress and len(training.history) >= ENOUGH:
        known = all(in_memory(each) for each in (train, () if val is None else val))
        facts = data_facts(model, goal, train, val) if known else None
        bar.say(str(diagnose(training.history, facts=facts)))
    choice = plans[0].choice
    if choice.compiled:
        choice = choice.with_fold(folding.why_not)
        choice = choice._replace(products=tuple(products(plans, final) or ()))
        if device_of(final).type == "cuda":
            choice = choice.with_replay(folding.why_not_replayed)
    inexact = [] if journal is None else journal.inexact
    return Result(
        training.history,
        final,
        training.opt_state,
        None if training.best is None else training.best.epoch,
        choice,
        training.ended or "finished",
        resume_exact=not inexact,
        resume_reason="; ".join(inexact),
    )


def _check_checkpoint(checkpoint: Any, save_every: Any, resume: Any) -> None:
    if not isinstance(checkpoint, str | os.PathLike | None):
        raise TypeError(
            f"fit(checkpoint=...) must be the path of a directory, got {checkpoint!r}."
        )
    if save_every is not None:
        _check_counts(save_every=save_every)
    if not isinstance(resume, bool):
        raise TypeError(f"fit(resume=...) must be True or False, got {resume!r}.")
    if checkpoint is None and (resume or save_every is not None):
        what = "resume=True" if resume else f"save_every={save_every}"
        raise ValueError(
            f"fit({what}) needs the directory of the checkpoints: checkpoint=..."
        )


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not hasattr(value, "__index__") or isinstance(value, bool):
            raise TypeError(f"fit({name}=...) must be an int, got {value!r}.")
        if name == "seed":
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"fit(seed=...) must fit into 64 bits, got {value}.")
        elif value < 1:
            raise ValueError(f"fit({name}=...) must be at least 1, got {value}.")


def _check_options(
    max_seconds: Any, compile: Any, progress: Any, **functions: Any
) -> None:
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"fit(max_seconds=...) must be > 0, got {max_seconds!r}.")
    if not (compile is True or compile is False or compile == "auto"):
        raise ValueError(
            f"fit(compile=...) must be 'auto', True or False, got {compile!r}."
        )
    if not (progress is True or progress is False or progress == "plain"):
        raise ValueError(
            f"fit(progress=...) must be True, False or 'plain', got {progress!r}."
        )
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(
                f"fit({name}=...) must be a function of one record, got {function!r}."
            )


def _check_padding(name: str, goal: Objective, params: Params, batch: Batch) -> None:
    train = name == "train_loader"
    reason = coupled_layers(goal) if train else None
    pair = goal if train else goal.evaluate
    reason = reason or coupled_padding(pair, params, batch)
    if reason is not None:
        raise ValueError(
            f"fit: {name} pads batches with samples of weight 0, and these would "
            f"change the others: {reason}. Leave pad_last out (an odd last batch then "
            f"has a graph of its own, or runs eagerly); of layers, use GroupNorm or "
            f"LayerNorm instead."
        )


def _checked(
    goal: Objective,
    train: Iterable[Batch],
    val: Iterable[Batch] | None,
    frozen: Iterable[Batch] | None,
    accumulate: int,
    precision: Precision,
    eval_step: EvalStep,
    watch: Watch,
) -> tuple[Iterator[Batch], set[str]]:
    """The training batches, looked at before anything is trained on them.

    And the names of the parameters that the loss of the first does not depend on.
    """
    params = goal.init()
    try:
        with reading("train_loader", 1, 1):
            iterator = read(train)
            first = iterator.peek() if isinstance(iterator, Indexed) else next(iterator)
    except StopIteration:
        raise no_batches("train_loader") from None
    device = device_of(params)
    batch = to_device(first, device)
    if accumulate > 1 and accumulate > rows(batch):
        raise ValueError(
            f"fit(accumulate={accumulate}): train_loader, batch 1 has {rows(batch)} "
            f"samples, which cannot be cut into {accumulate} micro-batches. One batch "
            f"makes one step here: raise the batch_size of the loader."
        )
    # No more at once than a step will take.
    looks = split(batch, accumulate) if accumulate > 1 else [batch]
    with autocast(precision, params):  # or it would take more memory than a step
        seen = [goal.check("train_loader, batch 1", params, look) for look in looks]
    watch.learn(seen[0].output)
    watch.whole("train_loader", train)
    watch.last("train_loader", train, looks[0])
    if frozen is not None:
        watch.whole("frozen_train_loss", frozen)
    if reason := coupled_loss(goal, params, looks[0]):
        warnings.warn(
            f"fit: the loss of the first batch is not the sum of the losses of its "
            f"parts: {reason}. As it stands there is no mean over samples: train_loss "
            f"and val_loss are the sum of loss_sum over the batches, as the loader cut "
            f"them, divided by the sum of n. Compare them only between runs with the "
            f"same batch size.",
            stacklevel=3,
        )
    if isinstance(train, PaddedLast):
        _check_padding("train_loader", goal, params, looks[0])
    if accumulate > 1 and (reason := coupled_samples(goal, params, looks[0])):
        warnings.warn(
            f"fit(accumulate={accumulate}): samples act on each other, so that a step "
            f"over micro-batches is not that of the whole batch: {reason}.",
            stacklevel=3,
        )
    with reading("val_loader", 1, 1):
        peeked = None if val is None else peek("val_loader", val)
    if val is not None and peeked is not None:
        batch = to_device(peeked, device)
        with autocast(precision, params):
            goal.check("val_loader, batch 1", params, batch, train=False)
        watch.whole("val_loader", val)
        if isinstance(val, PaddedLast):
            _check_padding("val_loader", goal, params, batch)
    if eval_step.metrics:
        eval_step(params, batch)
    unused = set[str].intersection(*(each.unused for each in seen))
    if isinstance(iterator, Indexed):
        return iterator, unused
    return itertools.chain([first], iterator), unused
