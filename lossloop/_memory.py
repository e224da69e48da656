"""Data in memory, read by whole batches instead of sample by sample."""

import copy
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lossloop._types import Batch

# Their order does not depend on what happens while it is read.
FIXED = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class _Copy(NamedTuple):
    of: Tensor  # held, so that no other has its id
    version: int  # of it, when it was copied
    copy: Tensor


Copies = dict[tuple[int, torch.device], _Copy]
_copies: ContextVar[Copies | None] = ContextVar("copies on a GPU", default=None)


@contextmanager
def copied_once() -> Generator[None]:
    """Lets data in memory stay on a GPU from one pass to the next while it lasts.

    Those that torch has written to since are copied again.
    """
    token = _copies.set({})
    try:
        yield
    finally:
        _copies.reset(token)


class Indexed(Iterator[Batch]):
    """A pass over data in memory.

    Attributes:
        tensors: All samples.
        ahead: Whether the order is fixed when the pass starts, so that several batches
            may be asked for at once.
    """

    def __init__(
        self, tensors: Sequence[Tensor], blocks: Iterator[Tensor], *, ahead: bool
    ) -> None:
        """Begins a pass.

        Args:
            tensors: All samples.
            blocks: Indices of shape (k, B), of k batches each.
            ahead: See the attribute.
        """
        self.tensors = tensors
        self.ahead = ahead
        self._blocks = blocks
        if ahead:  # or the order would be kept longer than it is needed
            self._blocks, self._all_blocks = itertools.tee(blocks)
        self._block = torch.empty(0, 0, dtype=torch.int64)
        self._place = 0  # in the block
        self._device = torch.device("cpu")

    def __next__(self) -> Batch:
        """The next batch: a list, as `default_collate` makes it."""
        batch = self.peek()
        self._place += 1
        return batch

    def _go_on(self) -> int:
        """Takes up another block if need be; returns how many batches it has left.

        Raises:
            StopIteration: If there is no batch.
        """
        while self._place == self._block.shape[0]:
            self._block, self._place = next(self._blocks), 0
        return self._block.shape[0] - self._place

    def take(self, order: Tensor) -> Batch:
        """The samples with these indices."""
        order = order.to(self._device)
        return [tensor.index_select(0, order) for tensor in self.tensors]

    def move(self, device: torch.device, own: Copies | None = None) -> None:
        """Keeps the samples on a GPU from now on, if they fit into half of its room.

        Args:
            device: Of the model.
            own: Those of the pass before, where `copied_once` does not keep them.
        """
        if device.type != "cuda" or self._device == device:
            return
        if any(t.is_inference() for t in self.tensors):
            return  # nobody could tell whether they were written to since
        copies = _copies.get()
        places = [(id(t), device) for t in self.tensors]
        if copies is None:
            copies = {} if own is None else own
            for place in copies.keys() - {*places}:
                del copies[place]
        new = {
            place: t
            for place, t in zip(places, self.tensors, strict=True)
            if place not in copies or copies[place].version != t._version
        }
        size = sum(t.nbytes for t in new.values())
        if size > torch.cuda.mem_get_info(device)[0] // 2:
            return
        for place, t in new.items():
            copies[place] = _Copy(t, t._version, t.to(device))
        self.tensors = [copies[place].copy for place in places]
        self._device = device

    def peek(self) -> Batch:
        """The next batch, which stays the next.

        Raises:
            StopIteration: If there is none.
        """
        self._go_on()
        return self.take(self._block[self._place])

    def again(self, place: int) -> Batch:
        """A batch that was given before, of a pass whose order is fixed.

        Args:
            place: Its number in the pass, from 0.
        """
        for block in copy.copy(self._all_blocks):
            if place < len(block):
                return self.take(block[place])
            place -= len(block)
        raise IndexError(place)

    def begin_after(self, count: int) -> None:
        """Leaves out the first batches, so many."""
        with suppress(StopIteration):
            while count > 0:
                passed = min(count, self._go_on())
                self._place += passed
                count -= passed

    def end_after(self, count: int) -> None:
        """Ends the pass after so many batches more."""
        blocks = itertools.chain([self._block[self._place :]], self._blocks)
        self._blocks, self._place = _first(count, blocks), self._block.shape[0]

    def orders(self, most: int) -> Iterator[Tensor]:
        """The indices of the samples of what is left, k batches of one size at once.

        Args:
            most: The largest k.

        Returns:
            Tensors of shape (k, B), which are read as they are asked for.
        """
        with suppress(StopIteration):
            while True:
                count = min(most, self._go_on())
                self._place += count
                yield self._block[self._place - count : self._place]


def _first(count: int, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The first batches of blocks, so many; of what follows, nothing is drawn."""
    while count > 0 and (block := next(blocks, None)) is not None:
        yield block[:count]
        count -= block.shape[0]


def read(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Starts a pass over batches, as `iter` does.

    A plain `DataLoader` over a `TensorDataset`, or a `Subset` of one, puts batches
    together from samples that it has taken apart before. Here whole batches are
    indexed: the same samples in the same order, which is that of the loader's own
    sampler, with the random generators where a whole pass of the loader leaves them.
    """
    if type(batches) is not DataLoader or not _is_plain(batches):
        return iter(batches)
    found = _tensors(batches.dataset)
    if found is None:
        return iter(batches)
    tensors, rows = found
    blocks, ahead = _blocks(batches.batch_sampler, len(tensors[0]), rows)
    # What a loader draws at the start of each pass, for workers that are not there.
    torch.empty((), dtype=torch.int64).random_(generator=batches.generator)
    return Indexed(tensors, blocks, ahead=ahead)


def in_memory(batches: Iterable[Batch]) -> bool:
    """Whether another pass reads nothing but memory."""
    if isinstance(batches, list | tuple):
        return True
    if type(batches) is not DataLoader or not _is_plain(batches):
        return False
    return _tensors(batches.dataset) is not None


def gives_again(batches: Iterable[Batch]) -> bool:
    """Whether passes can give a batch once more; see `Indexed.again`."""
    return _is_fixed(getattr(batches, "batch_sampler", None)) and in_memory(batches)


def _is_fixed(batch_sampler: Any) -> bool:
    return type(batch_sampler) is BatchSampler and type(batch_sampler.sampler) in FIXED


def _is_plain(loader: DataLoader[Any]) -> bool:
    return (
        loader.num_workers == 0
        and not loader.pin_memory
        and loader.collate_fn is default_collate
        and loader.batch_sampler is not None
    )


def _tensors(dataset: Any) -> tuple[Sequence[Tensor], Tensor | None] | None:
    """The tensors behind a data set, and which of their rows it has, if not all."""
    if type(dataset) is Subset:
        found = _tensors(dataset.dataset)
        if found is None:
            return None
        tensors, rows = found
        own = _index(dataset.indices, len(tensors[0] if rows is None else rows))
        return tensors, own if rows is None else rows.index_select(0, own)
    if type(dataset) is not TensorDataset:
        return None
    plain = all(
        type(t) is Tensor
        and t.layout is torch.strided
        and t.device.type == "cpu"
        and not t.requires_grad
        for t in dataset.tensors
    )
    return (dataset.tensors, None) if plain else None


def _index(indices: Iterable[int], size: int) -> Tensor:
    """Indices of lists, of which negative ones count from the end."""
    index = np.fromiter(indices, np.int64)
    return torch.from_numpy(np.where(index < 0, index + size, index))


def _drawn(sampler: Any) -> Tensor | None:
    """What a sampler gives, without a number of Python for each; None if not known.

    It draws what the sampler draws, from the same generator.
    """
    if type(sampler) is SequentialSampler:
        return torch.arange(len(sampler.data_source))
    if type(sampler) is not RandomSampler or sampler.replacement:
        return None
    size, wanted = len(sampler.data_source), sampler.num_samples
    if not size:
        return None
    generator = sampler.generator
    if generator is None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        generator = torch.Generator().manual_seed(seed)
    # The sampler draws another permutation for what is left, even if nothing is.
    found = [torch.randperm(size, generator=generator) for _ in range(wanted // size)]
    rest = torch.randperm(size, generator=generator)[: wanted % size]
    return found[0] if wanted == size else torch.cat([*found, rest])


def _blocks(
    batch_sampler: Any, size: int, rows: Tensor | None
) -> tuple[Iterator[Tensor], bool]:
    """The rows of the batches, and whether they are fixed from the start."""
    length = size if rows is None else len(rows)

    def chosen(index: Tensor) -> Tensor:
        return index if rows is None else rows.index_select(0, index)

    def cut() -> Iterator[Tensor]:
        # A generator, because samplers draw when the first batch is asked for.
        sampler = batch_sampler.sampler
        drawn = _drawn(sampler)
        order = chosen(_index(sampler, length) if drawn is None else drawn)
        whole = len(order) - len(order) % batch_sampler.batch_size
        if whole:
            yield order[:whole].view(-1, batch_sampler.batch_size)
        if whole < len(order) and not batch_sampler.drop_last:
            yield order[whole:][None]

    if _is_fixed(batch_sampler):
        return cut(), True
    return (chosen(_index(each, length))[None] for each in batch_sampler), False
