"""The loop of every tutorial, with `loss.item() * inputs.size(0)` added up."""

from time import perf_counter

import torch
from torch import nn

from lossloop._works import Work, tutorial_loop
from peers import Epochs, loader


def train(work: Work, model: nn.Module, epochs: int, *, shuffle: bool = True) -> Epochs:
    """As the package describes it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=work.rate)
    return loop(work, model, optimizer, epochs, shuffle=shuffle)


def loop(
    work: Work,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    shuffle: bool,
) -> Epochs:
    """The same for any optimizer, and any callable that has the module's weights."""
    batches = loader(work, shuffle=shuffle)
    seconds, losses = [], []
    for _ in range(epochs):
        start = perf_counter()
        losses.append(tutorial_loop(model, batches, optimizer))
        seconds.append(perf_counter() - start)
    return seconds, losses
