"""What is looked at in every batch, on the host, before it goes to the device."""

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from lossloop._batches import (
    generators_kept,
    length,
    no_batches,
    taken,
    to_device,
)
from lossloop._loss_checks import label_sets, labels
from lossloop._losses import is_torch_loss
from lossloop._memory import Indexed, in_memory, read
from lossloop._model import FunctionalModel, device_of, model_params, skeleton
from lossloop._objective import Objective, forward, split_batch
from lossloop._random import host_generators_kept, seeded
from lossloop._types import Batch

# The losses whose targets are numbers of classes. On a GPU one that is no class reads
# memory that is not the model's, or ends the process.
_LABELS: dict[type, Callable[..., None]] = {
    nn.CrossEntropyLoss: labels,
    nn.NLLLoss: labels,
    nn.MultiMarginLoss: labels,
    nn.MultiLabelMarginLoss: label_sets,
}

_END = object()

# What to do, by words in the messages of a DataLoader.
_KILLED = """\
A worker process crashed or was killed, most often for want of memory. Use fewer \
num_workers or smaller batches; with num_workers=0 an error of its own shows."""
_HANGS = """\
The workers gave nothing for the timeout of the loader. Raise it, or read with \
num_workers=0 to see what hangs."""
_REMEDIES = {
    "exited unexpectedly": _KILLED,
    "killed by signal": _KILLED,
    "timed out": _HANGS,
}


class Watch:
    """Passes batches on unchanged, and looks at what goes by.

    Labels that are no class are refused. What the loader raises is told where it was
    raised. A pass that gives another number of batches than it should is warned of.
    """

    def __init__(self, goal: Objective) -> None:
        self._goal = goal
        loss_fn = goal.loss_fn
        self._check = next(
            (
                check
                for kind, check in _LABELS.items()
                if isinstance(loss_fn, kind) and is_torch_loss(loss_fn)
            ),
            None,
        )
        self._output: Tensor | None = None  # of the first batch, without its values
        self._last = self._check is label_sets  # dimension of the classes
        self._clean: set[str] = set()  # names of data in memory that were looked at
        self._counts: dict[str, tuple[int, int]] = {}  # batches, and in which epoch
        self._warned: set[str] = set()

    def learn(self, output: Tensor | None) -> None:
        """Learns how many classes there are, from the output for a batch.

        Args:
            output: Of the model, its values are not read; None if that is no tensor.
        """
        if self._check is not None and output is not None and output.dim():
            self._output = output

    def whole(self, name: str, loader: Iterable[Batch]) -> None:
        """Looks at all labels at once where they are in memory, before any training.

        Their batches are not looked at later. Only samples that the sampler leaves out
        may have other labels; then the batches are looked at as they come.

        Args:
            name: Of the argument, for messages.
            loader: The batches; no generator moves.

        Raises:
            ValueError: If a label is no class.
        """
        if self._output is None or not in_memory(loader):
            return
        with generators_kept(loader):
            passing = read(loader)
            if not isinstance(passing, Indexed):
                return
            targets = _targets(passing.tensors)
            if targets is not None and self._refusal(self._output, targets):
                left_out = torch.ones(len(targets), dtype=torch.bool)
                for order in passing.orders(1):
                    left_out[order.reshape(-1)] = False
                drawn = targets.clone()
                drawn[left_out] = 0
                if refusal := self._refusal(self._output, drawn):
                    raise ValueError(f"{name}, all samples in memory: {refusal}")
                return
        self._clean.add(name)

    def last(self, name: str, loader: Iterable[Batch], batch: Batch) -> None:
        """Refuses a last batch of one sample if the model cannot be trained on one.

        As with BatchNorm, and at the end of the first epoch only.

        Args:
            name: Of the argument, for messages.
            loader: The training batches.
            batch: The first of them, which the objective has checked.

        Raises:
            ValueError: If it is so.
        """
        sampler = loader.batch_sampler if isinstance(loader, DataLoader) else None
        if type(sampler) is not BatchSampler or sampler.drop_last:
            return
        samples, size = length(sampler.sampler), sampler.batch_size
        if samples is None or samples % size != 1:
            return
        params = model_params(self._goal.model)
        device = device_of(params)
        try:
            with torch.no_grad(), host_generators_kept(), seeded(0, device):
                self._goal.train(params, to_device(taken(batch, [0]), device))
        except ValueError as error:
            raise ValueError(
                f"{name}: {samples} samples in batches of {size} leave a single one "
                f"for the last batch, which the model cannot be trained on: {error}. "
                f"Leave it out (drop_last=True), or change batch_size."
            ) from error

    def __call__(
        self,
        name: str,
        batches: Iterable[Batch],
        epoch: int,
        *,
        begin: int = 0,
        planned: int | None = None,
    ) -> Iterator[Batch]:
        """Starts a pass, or goes on with one.

        Args:
            name: Of the loader's argument, for messages.
            batches: A loader, or a pass that was started.
            epoch: Which it is, from 1.
            begin: How many batches of the pass went before.
            planned: How many a whole pass has; default, what `batches` says, if it
                has a length.

        Returns:
            The batches. A pass over data in memory stays one.

        Raises:
            ValueError: While it is read: a label is no class, or there are no batches.
        """
        with reading(name, epoch, begin + 1):
            passing = read(batches)
        if isinstance(passing, Indexed) and (
            self._output is None or name in self._clean
        ):
            return passing
        return self._each(name, passing, epoch, begin, planned or length(batches))

    def _each(
        self,
        name: str,
        passing: Iterator[Batch],
        epoch: int,
        count: int,
        planned: int | None,
    ) -> Iterator[Batch]:
        while True:
            with reading(name, epoch, count + 1):
                batch = next(passing, _END)
            if batch is _END:
                break
            count += 1
            if self._output is not None:
                self._look(name, epoch, count, batch)
            yield batch
        if not count:
            with reading(name, epoch, 1):
                raise no_batches(name)
        self._compare(name, epoch, count, planned)

    def _look(self, name: str, epoch: int, number: int, batch: Batch) -> None:
        """Refuses a batch with a label that is no class."""
        targets = _targets(batch)
        if targets is None or self._refusal(self._output, targets) is None:
            return
        # A model may have as many classes as its inputs have places.
        own = self._output_of(batch, train=name == "train_loader")
        if refusal := self._refusal(own, targets):
            raise ValueError(f"{name}, epoch {epoch}, batch {number}: {refusal}")
        self._output = None  # so nobody knows beforehand how many there are

    def _refusal(self, output: Any, targets: Tensor) -> ValueError | None:
        """The error of a label that is neither a class nor to be ignored."""
        assert self._check is not None
        classes = output.shape[-1 if self._last or output.dim() == 1 else 1]
        low, high = torch.aminmax(targets)
        if int(low) >= 0 and int(high) < classes:  # nearly always, in one look
            return None
        try:
            self._check(self._goal.loss_fn, output, targets)
        except ValueError as error:
            return error
        return None

    def _output_of(self, batch: Batch, *, train: bool) -> Any:
        """What the model returns for a batch, without its values."""

        def output(model: nn.Module, batch: Batch) -> Any:
            return forward(model, split_batch(batch)[0])

        model = self._goal.model
        params, device = model_params(model), device_of(model_params(model))
        functional = FunctionalModel(skeleton(model, train=train), output)
        with torch.no_grad(), host_generators_kept(), seeded(0, device):
            found, _ = functional(params, to_device(batch, device))
        return found.to("meta") if isinstance(found, Tensor) else found

    def _compare(self, name: str, epoch: int, count: int, planned: int | None) -> None:
        """Warns once of a loader that gave another number of batches than it should."""
        before, when = self._counts.setdefault(name, (count, epoch))
        if name in self._warned:
            return
        if planned is not None and count != planned:
            instead = f"its length says {planned}"
        elif count != before:
            instead = f"epoch {when} had {before}"
        else:
            return
        self._warned.add(name)
        warnings.warn(
            f"fit: {name} gave {count} batches in epoch {epoch}, but {instead}. The "
            f"exact mean is not affected; a schedule by steps is. Let its length be "
            f"what it gives.",
            stacklevel=2,
        )


def _targets(batch: Any) -> Tensor | None:
    """The labels of a batch, if there are any and they are on the host."""
    targets = split_batch(batch)[1]
    if isinstance(targets, tuple | list) and len(targets) == 1:
        targets = targets[0]
    if not isinstance(targets, Tensor) or targets.device.type != "cpu":
        return None
    if targets.is_floating_point() or targets.is_complex() or not targets.numel():
        return None
    return targets


@contextmanager
def reading(name: str, epoch: int, number: int) -> Generator[None]:
    """Notes in an error where it was raised, and what to do if that is known.

    Args:
        name: Of the loader's argument.
        epoch: From 1.
        number: Of the batch in the epoch, from 1.
    """
    try:
        yield
    except Exception as error:
        error.add_note(f"fit: while reading {name}, epoch {epoch}, batch {number}.")
        if isinstance(error, RuntimeError) and "DataLoader" in str(error):
            for words, remedy in _REMEDIES.items():
                if words in str(error):
                    error.add_note(remedy)
        raise
