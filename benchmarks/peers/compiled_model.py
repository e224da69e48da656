"""The loop of every tutorial with `torch.compile(model)` and `Adam(fused=True)`."""

import torch
from torch import nn

from lossloop._works import Work
from peers import Epochs
from peers.tutorial import loop


def train(work: Work, model: nn.Module, epochs: int, *, shuffle: bool = True) -> Epochs:
    """As the package describes it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=work.rate, fused=True)
    return loop(work, torch.compile(model), optimizer, epochs, shuffle=shuffle)
