"""Random numbers of a step as a function of its seed and its number."""

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(seed: int, step: int) -> int:
    """A 63-bit seed for step number `step` of a run seeded with `seed`.

    The finalizer of SplitMix64 (Steele, Lea and Flood, 2014) spreads neighbouring
    seeds and steps over all bits, so that no two nearby streams are related.
    """
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95 + 1) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1


def _generators(device: torch.device) -> list[torch.Generator]:
    """The default generators that layers on `device` draw from."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        index = device.index
        if index is None:  # pyright: ignore[reportUnnecessaryComparison]
            index = torch.cuda.current_device()
        generators.append(torch.cuda.default_generators[index])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())  # pyright: ignore[reportPrivateUsage]
    return generators


class seeded:  # used as a context, like torch.no_grad
    """Seeds the default generators inside, and leaves them as they were outside.

    A class and not a generator function, because it stands around every step.
    """

    __slots__ = ("_generators", "_seed", "_states")

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generators = _generators(device)

    def __enter__(self) -> "seeded":
        """Notes the caller's states, then seeds."""
        self._states = self.states()
        for generator in self._generators:
            generator.manual_seed(self._seed)
        return self

    def __exit__(self, *error: object) -> None:
        """Puts the caller's states back."""
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)

    def states(self) -> list[Tensor]:
        """Where the generators are now."""
        return [generator.get_state() for generator in self._generators]

    def drew_since(self, states: list[Tensor]) -> bool:
        """Whether numbers have been drawn since the generators were there."""
        return not all(map(torch.equal, states, self.states()))


@contextmanager
def host_generators_kept() -> Generator[None]:
    """Puts the global generators of Python and numpy back to where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
