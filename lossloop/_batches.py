"""What comes out of a loader, and how it reaches the step."""

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lossloop._memory import Indexed, read
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
    if isinstance(loader, PaddedLast):
        return is_one_shot(loader.batches)
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


def plain(loader: Any) -> Any:
    """The loader itself, without padding."""
    return plain(loader.batches) if isinstance(loader, PaddedLast) else loader


def own_generators(loader: Any) -> list[torch.Generator]:
    """The generators of torch that reading a loader may move, each once."""
    loader = plain(loader)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    candidates = [torch.default_generator]
    candidates += [getattr(owner, "generator", None) for owner in owners]
    return list(
        {id(g): g for g in candidates if isinstance(g, torch.Generator)}.values()
    )


@contextmanager
def generators_kept(loader: Any) -> Generator[None]:
    """Puts every generator that reading a loader may move back to where it was."""
    states = [(g, g.get_state()) for g in own_generators(loader)]
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
    if isinstance(loader, PaddedLast):
        first = peek(name, loader.batches)
        return None if first is None else padded(first, rows(first))
    if isinstance(loader, DataLoader):
        if loader.num_workers or isinstance(loader.dataset, IterableDataset):
            return None
    elif isinstance(loader, IterableDataset) or is_one_shot(loader):
        return None
    with generators_kept(loader):
        for batch in loader:
            return batch
    raise no_batches(name)


def no_batches(name: str) -> ValueError:
    """The error for a loader that gave nothing."""
    return ValueError(
        f"{name} gave no batches. Check the data set, batch_size, drop_last, and that "
        f"it is no iterator that has been read already."
    )


def rows(batch: Batch) -> int:
    """How many samples a batch holds: the leading dimension its tensors share.

    Tensors of shape () and numbers belong to all samples.

    Raises:
        ValueError: If the tensors do not share it, or there is none.
        TypeError: If there is anything else in the batch, which cannot be cut.
    """
    found: dict[str, int] = {}
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, Tensor):
            if leaf.dim():
                found[f"batch{pytree.keystr(path)}"] = leaf.shape[0]
        elif leaf is not None and not isinstance(leaf, Number):
            raise TypeError(
                f"batch{pytree.keystr(path)} is a {type(leaf).__name__}, which cannot "
                f"be cut into samples. Make it a tensor, with the samples first."
            )
    if len(set(found.values())) != 1:
        raise ValueError(
            f"the batch cannot be cut into samples, because its tensors do not share "
            f"their first dimension: {found or 'none has one'}. Put the samples first "
            f"in all of them (batch_first=True, padded targets)."
        )
    return next(iter(found.values()))


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cuts a batch along its samples into parts whose sizes differ by one at most.

    The parts are views. A batch of fewer samples gives as many parts as it has samples,
    and an empty one gives itself.

    Args:
        batch: See `rows` for what can be cut.
        parts: How many.
    """
    parts = max(1, min(parts, rows(batch)))
    leaves, form = pytree.tree_flatten(batch)
    cut = [
        leaf.tensor_split(parts) if _is_cut(leaf) else [leaf] * parts for leaf in leaves
    ]
    return [pytree.tree_unflatten(part, form) for part in zip(*cut, strict=True)]


def taken(batch: Batch, samples: Sequence[int]) -> Batch:
    """The samples with these indices, in this order, copied."""
    index = torch.tensor(samples, dtype=torch.int64)

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[index.to(leaf.device)] if leaf.dim() else leaf.clone()

    return pytree.tree_map(take, batch)


def converted(tree: Any, dtype: torch.dtype) -> Any:
    """The tree with its floating-point tensors in another dtype."""

    def convert(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if floating else leaf

    return pytree.tree_map(convert, tree)


class PaddedLast:
    """Batches of one size; see `pad_last`.

    Attributes:
        batches: As they come, not padded.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """As many as there are without padding."""
        return len(self.batches)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[Batch]:
        """Starts a pass; its first batch says how large they all become."""
        size = None
        for number, batch in enumerate(read(self.batches), 1):
            size = size or rows(batch)
            if rows(batch) > size:
                raise ValueError(
                    f"pad_last: batch {number} has {rows(batch)} samples, more than "
                    f"the first, which has {size}. Let the first be the largest."
                )
            yield padded(batch, size)


def padded(batch: Batch, size: int) -> Batch:
    """`(inputs, targets, weights)` with `size` samples, those added having weight 0."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise TypeError(
            f"pad_last: a batch must be (inputs, targets) or (inputs, targets, "
            f"weights), got a {type(batch).__name__}. Weights have no place in others."
        )
    count = rows(batch)
    if not count:
        raise ValueError("pad_last: an empty batch has no sample to repeat.")
    inputs, targets, weights = (*batch, None)[:3]
    if weights is None:
        device = next(t.device for t in pytree.tree_leaves(batch) if _is_cut(t))
        # Whole numbers, so that n stays a count.
        weights = torch.ones(count, dtype=torch.int64, device=device)
    if not _is_cut(weights):
        raise TypeError(
            f"pad_last: the weights of a batch are a {type(weights).__name__}. Make "
            f"them a tensor of shape (B,)."
        )
    if count == size:
        return inputs, targets, weights
    absent = torch.zeros_like(weights[:1]).expand(size - count, *weights.shape[1:])

    def pad(leaf: Any) -> Any:
        if not _is_cut(leaf):
            return leaf
        # A real sample, and not zeros: whatever the model does to it is finite.
        last = leaf[-1:].expand(size - count, *leaf.shape[1:])
        return torch.cat([leaf, last]).contiguous(memory_format=_format(leaf))

    return *pytree.tree_map(pad, (inputs, targets)), torch.cat([weights, absent])


def _is_cut(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _format(tensor: Tensor) -> torch.memory_format:
    """That of a batch whose samples lie in memory like those of this one."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.dim(), torch.contiguous_format)
    fits = tensor.is_contiguous(memory_format=wanted) and not tensor.is_contiguous()
    return wanted if fits else torch.contiguous_format


def pad_last(batches: Iterable[Batch]) -> PaddedLast:
    """Pads smaller batches to the size of the first, with samples of weight 0.

    So all batches have one shape, and one graph is compiled for them. The padding
    repeats the last sample of the batch. It changes no sum and no gradient, as long as
    samples do not act on each other: in BatchNorm in train mode and in losses that
    compare samples they do.

    Args:
        batches: A `DataLoader` or other iterable of `(inputs, targets)` or `(inputs,
            targets, weights)`, pytrees of tensors with the samples first.

    Returns:
        An iterable of `(inputs, targets, weights)`, as long as `batches`, and as often
        to be read. `supervised` takes such batches.

    Raises:
        ValueError: When a batch is larger than the first, or cannot be padded.
        TypeError: When a batch has another form.

    Example:
        >>> batches = [(torch.ones(n, 2), torch.ones(n)) for n in (2, 1)]
        >>> for inputs, targets, weights in pad_last(batches):
        ...     print(tuple(inputs.shape), weights.tolist())
        (2, 2) [1, 1]
        (2, 2) [1, 0]
    """
    return PaddedLast(batches)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device; the same object if they are there.

    Pinned memory is copied without waiting.
    """
    if type(batch) in (tuple, list) and all(_on(t, device) for t in batch):
        return batch

    def move(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(move, batch)


def first(count: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The first batches of a pass, so many at most."""
    if isinstance(batches, Indexed):
        batches.end_after(count)
        return batches
    return itertools.islice(batches, count)


def in_order(loader: Iterable[Batch]) -> Iterable[Batch]:
    """A loader over all data of another in their own order, which moves no generator.

    What is no `DataLoader` over a data set with a length is read as it is.
    """
    if isinstance(loader, PaddedLast):
        return PaddedLast(in_order(loader.batches))
    if not isinstance(loader, DataLoader) or isinstance(
        loader.dataset, IterableDataset
    ):
        return loader
    size = loader.batch_size
    if size is None and loader.batch_sampler is not None:  # one of the caller's own
        size = getattr(loader.batch_sampler, "batch_size", 1)
    return DataLoader(
        loader.dataset,
        batch_size=size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )


def transferred(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a device.

    Data in memory go to a GPU as a whole, if they fit. Other batches are copied from
    pinned memory on a stream of their own, while the steps before are still at work.
    """
    if isinstance(batches, Indexed):
        batches.move(device)
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = to_device(pytree.tree_map_only(Tensor, _pinned, batch), device)
        stepping = torch.cuda.current_stream(device)
        stepping.wait_stream(copying)
        for leaf in pytree.tree_leaves(moved):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(stepping)  # or its memory may be used again too soon
        yield moved


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


def _on(leaf: Any, device: torch.device) -> bool:
    return type(leaf) is Tensor and leaf.device == device
