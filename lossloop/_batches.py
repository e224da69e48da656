"""What comes out of a loader, and how it reaches the step."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lossloop._random import host_generators_kept
from lossloop._types import Batch


def as_batches(name: str, loader: Any, passes: int) -> Iterable[Batch]:
    """The batches of a loader, refused at the door if they cannot be read so often.

    Args:
        name: Of the argument, for messages.
        loader: A `DataLoader`; anything else that can be iterated repeatedly and gives
            batches; or a tuple of tensors, which is one batch holding all the data.
        passes: How often the batches will be read.

    Raises:
        TypeError: If it is not such a thing.
        ValueError: If it is empty, or an iterator that can be read only once.
    """
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"{name} is a {type(loader).__name__}, which gives samples, not batches. "
            f"Pass DataLoader({name}, batch_size=...)."
        )
    if (
        isinstance(loader, tuple)
        and loader
        and all(isinstance(t, Tensor) for t in loader)
    ):
        sizes = {len(t) if t.ndim else 0 for t in loader}
        if len(sizes) > 1 or sizes == {0}:
            raise ValueError(
                f"{name} is a tuple of tensors of lengths "
                f"{[len(t) if t.ndim else 0 for t in loader]}; they must hold the same "
                f"number of samples, at least one."
            )
        return [loader]
    if not isinstance(loader, Iterable) or isinstance(loader, Tensor | str | dict):
        raise TypeError(
            f"{name} must give batches when iterated, got a {type(loader).__name__}. "
            f"Pass a DataLoader, a list of batches, or a tuple of tensors."
        )
    if passes > 1 and is_one_shot(loader):  # which calls __iter__
        raise ValueError(
            f"{name} is a one-shot iterator ({type(loader).__name__}): it is used up "
            f"after one epoch, and {passes} are to be run. Pass a DataLoader, a list, "
            f"or an object whose __iter__ starts anew."
        )
    if length(loader) == 0:
        raise ValueError(
            f"{name} has no batches: its length is 0. Check the data set, batch_size "
            f"and drop_last."
        )
    return loader


def is_one_shot(loader: Iterable[Batch]) -> bool:
    """Whether it can be read once only: an iterator, or something that hands out one.

    Of a `DataLoader` over a stream, the stream is looked at.
    """
    source: Any = loader
    if isinstance(loader, DataLoader):
        if not isinstance(loader.dataset, IterableDataset):
            return False
        source = loader.dataset
    return isinstance(source, Iterator) or _is_shared(source)


def _is_shared(source: Any) -> bool:
    with host_generators_kept(), torch.random.fork_rng([]):
        return iter(source) is iter(source)


def length(loader: Iterable[Batch]) -> int | None:
    """Batches in one pass, or None where that is not known beforehand."""
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


@contextmanager
def _generators_kept(loader: Any) -> Generator[None]:
    """Puts every generator that reading a batch may move back to where it was."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    candidates = [torch.default_generator]
    candidates += [getattr(owner, "generator", None) for owner in owners]
    own = {id(g): g for g in candidates if isinstance(g, torch.Generator)}
    states = [(g, g.get_state()) for g in own.values()]
    try:
        with host_generators_kept():
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def peek(name: str, loader: Iterable[Batch]) -> Batch | None:
    """The first batch, leaving loader and generators as they were.

    None where that is impossible (iterators, streams) or dear (worker processes).
    """
    if isinstance(loader, DataLoader):
        if loader.num_workers or isinstance(loader.dataset, IterableDataset):
            return None
    elif isinstance(loader, IterableDataset) or is_one_shot(loader):
        return None
    with _generators_kept(loader):
        for batch in loader:
            return batch
    raise no_batches(name)


def no_batches(name: str) -> ValueError:
    """The error for a loader that gave nothing."""
    return ValueError(
        f"{name} gave no batches. Check the data set, batch_size, drop_last, and that "
        f"it is no iterator that has been read already."
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device; the same object if they are there.

    Pinned memory is copied without waiting.
    """
    if type(batch) in (tuple, list) and all(_on(t, device) for t in batch):
        return batch

    def move(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(move, batch)


def _on(leaf: Any, device: torch.device) -> bool:
    return type(leaf) is Tensor and leaf.device == device
