"""Data in memory, read by whole batches instead of sample by sample."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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
    orders = _orders(batches.batch_sampler, len(tensors[0] if rows is None else rows))
    # What a loader draws at the start of each pass, for workers that are not there.
    torch.empty((), dtype=torch.int64).random_(generator=batches.generator)
    return _indexed(tensors, rows, orders)


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
        return tensors, own if rows is None else rows[own]
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


def _orders(batch_sampler: Any, size: int) -> Iterator[Tensor]:
    """The indices of each batch."""
    sampler: Any = getattr(batch_sampler, "sampler", None)
    if type(batch_sampler) is BatchSampler and type(sampler) in _FIXED:
        return _cut(sampler, batch_sampler, size)
    return (_index(indices, size) for indices in batch_sampler)


def _cut(
    sampler: Iterable[int], batch_sampler: BatchSampler, size: int
) -> Iterator[Tensor]:
    # A generator, because samplers draw when the first batch is asked for.
    for order in _index(sampler, size).split(batch_sampler.batch_size):
        if len(order) == batch_sampler.batch_size or not batch_sampler.drop_last:
            yield order


def _indexed(
    tensors: Sequence[Tensor], rows: Tensor | None, orders: Iterator[Tensor]
) -> Iterator[Batch]:
    for order in orders:
        index = order if rows is None else rows[order]
        # A list, as `default_collate` makes it.
        yield [tensor.index_select(0, index) for tensor in tensors]
