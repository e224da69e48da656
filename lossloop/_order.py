"""Where a run is in its data, so that another process can go on from there."""

import hashlib
import itertools
import random
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
)

from lossloop._batches import own_generators, plain
from lossloop._memory import FIXED, Indexed
from lossloop._types import Batch


def keeps_its_place(loader: Any) -> bool:
    """Whether it tells and takes its position, like torchdata's loaders."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def why_not_exact(loader: Any) -> str | None:
    """Why a pass of a loader may not be repeated exactly in another process.

    That of a `DataLoader` over a data set with a length follows from the generators of
    random numbers, if its sampler is one of torch's.
    """
    own = plain(loader)
    if keeps_its_place(loader):
        if getattr(loader, "num_workers", 0):
            return "worker processes that go on may draw other random numbers"
        return None
    if isinstance(own, list | tuple):
        return None
    kind = type(own).__name__
    if not isinstance(own, DataLoader):
        return f"nothing is known of how a {kind} is read again"
    if isinstance(own.dataset, IterableDataset):
        return "nothing is known of how the stream behind the DataLoader is read again"
    if own.persistent_workers:
        return "workers that persist have random states of their own"
    batch_sampler: Any = own.batch_sampler
    if isinstance(batch_sampler, list | tuple):
        return None
    sampler = own.sampler if batch_sampler is None else batch_sampler
    if type(batch_sampler) is BatchSampler:
        sampler = batch_sampler.sampler
    if type(sampler) in FIXED or isinstance(sampler, list | tuple | range):
        return None
    return f"nothing is known of the state of a {type(sampler).__name__}"


class Generators(NamedTuple):
    """Where every generator was that reading a loader on the host may draw from."""

    torch: list[Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls, loader: Any) -> "Generators":
        """Where they are."""
        own = [g.get_state() for g in own_generators(loader)]
        return cls(own, random.getstate(), np.random.get_state())

    def put_back(self, loader: Any) -> None:
        """Puts them there."""
        generators = own_generators(loader)
        for generator, state in zip(generators, self.torch, strict=True):
            generator.set_state(state)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def state(self) -> dict[str, Any]:
        """The same in tensors and numbers; see `of`."""
        version, numbers, gauss = self.python
        name, keys, *rest = self.numpy
        return {
            "torch": self.torch,
            "python": [version, torch.tensor(numbers), gauss],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Generators":
        """From what `state` returned."""
        version, numbers, gauss = state["python"]
        name, keys, *rest = state["numpy"]
        return cls(
            state["torch"],
            (version, tuple(numbers.tolist()), gauss),
            (name, keys.numpy().astype(np.uint32), *rest),
        )


def after(count: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """What is left of a pass after so many batches.

    Those are read again, so that whatever draws random numbers draws them; of data in
    memory their order is enough.
    """
    if isinstance(batches, Indexed):
        batches.begin_after(count)
        return batches
    deque(itertools.islice(batches, count), maxlen=0)
    return batches


def digest(batch: Batch) -> str:
    """Tells one batch from another, wherever it is and however it lies in memory."""
    hashed = hashlib.sha256()
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            hashed.update(str((leaf.dtype, tuple(leaf.shape))).encode())
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            hashed.update(flat.view(torch.uint8).numpy().data)
        else:
            hashed.update(repr(leaf).encode())
    return hashed.hexdigest()
