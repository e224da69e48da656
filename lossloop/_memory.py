"""Data in memory, read by whole batches instead of sample by sample."""

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
_FIXED = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class _Copy(NamedTuple):
    of: Tensor  # held, so that no other has its id
    version: int  # of it, when it was copied
    copy: Tensor


_Copies = dict[tuple[int, torch.device], _Copy]
_copies: ContextVar[_Copies | None] = ContextVar("copies on a GPU", default=None)


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
        self._block = torch.empty(0, 0, dtype=torch.int64)
        self._place = 0  # in the block
        self._left: int | None = None  # batches to go, if there are not all of them
        self._device = torch.device("cpu")

    def __next__(self) -> Batch:
        """The next batch: a list, as `default_collate` makes it."""
        place = self._pass_over(1)
        return self.take(self._block[place])

    def _pass_over(self, most: int) -> int:
        """Passes over the next batches of one block; returns the place of the first.

        Raises:
            StopIteration: If there are none.
        """
        if self._left == 0:
            raise StopIteration
        while self._place == self._block.shape[0]:
            self._block, self._place = next(self._blocks), 0
        if self._left is not None:
            most = min(most, self._left)
        first = self._place
        self._place = min(first + most, self._block.shape[0])
        if self._left is not None:
            self._left -= self._place - first
        return first

    def take(self, order: Tensor) -> Batch:
        """The samples with these indices."""
        order = order.to(self._device)
        return [tensor.index_select(0, order) for tensor in self.tensors]

    def move(self, device: torch.device) -> None:
        """Keeps the samples on a GPU from now on, if they fit into half of its room."""
        if device.type != "cuda" or self._device == device:
            return
        copies = _copies.get()
        copies = {} if copies is None else copies
        places = [(id(t), device) for t in self.tensors]
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
        before = self._left
        self._place = self._pass_over(1)
        self._left = before
        return self.take(self._block[self._place])

    def begin_after(self, count: int) -> None:
        """Leaves out the first batches, so many."""
        with suppress(StopIteration):
            while count > 0:
                first = self._pass_over(count)
                count -= self._place - first

    def end_after(self, count: int) -> None:
        """Ends the pass after so many batches more."""
        self._left = count if self._left is None else min(count, self._left)

    def orders(self, most: int) -> Iterator[Tensor]:
        """The indices of the samples of what is left, k batches of one size at once.

        Args:
            most: The largest k.

        Returns:
            Tensors of shape (k, B), which are read as they are asked for.
        """
        with suppress(StopIteration):
            while True:
                first = self._pass_over(most)
                yield self._block[first : self._place]


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


def draws_torch_alone(batches: Iterable[Batch]) -> bool:
    """Whether a pass draws from generators of torch, if it draws at all."""
    sampler: Any = getattr(batches, "batch_sampler", None)
    fixed = type(sampler) is BatchSampler and type(sampler.sampler) in _FIXED
    return fixed and in_memory(batches)


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

    def chosen(indices: Iterable[int]) -> Tensor:
        if rows is None:
            return _index(indices, size)
        return rows.index_select(0, _index(indices, len(rows)))

    def cut() -> Iterator[Tensor]:
        # A generator, because samplers draw when the first batch is asked for.
        drawn = _drawn(sampler)
        if drawn is None:
            order = chosen(sampler)
        else:
            order = drawn if rows is None else rows.index_select(0, drawn)
        length = batch_sampler.batch_size
        whole = len(order) // length * length
        if whole:
            yield order[:whole].view(-1, length)
        if whole < len(order) and not batch_sampler.drop_last:
            yield order[whole:][None]

    sampler: Any = getattr(batch_sampler, "sampler", None)
    if type(batch_sampler) is BatchSampler and type(sampler) in _FIXED:
        return cut(), True
    return (chosen(indices)[None] for indices in batch_sampler), False
