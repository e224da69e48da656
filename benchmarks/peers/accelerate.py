"""The loop of Accelerate's examples, with everything prepared by an `Accelerator`."""

from time import perf_counter

import torch
from accelerate import Accelerator
from torch import nn

from lossloop._works import Work
from peers import Epochs, loader


def train(work: Work, model: nn.Module, epochs: int, *, shuffle: bool = True) -> Epochs:
    """As the package describes it."""
    accelerator, loss_fn = Accelerator(cpu=True), nn.CrossEntropyLoss()
    model, optimizer, batches = accelerator.prepare(
        model,
        torch.optim.Adam(model.parameters(), lr=work.rate),
        loader(work, shuffle=shuffle),
    )
    seconds, losses = [], []
    for _ in range(epochs):
        start = perf_counter()
        model.train()
        total_loss = 0
        for inputs, targets in batches:
            loss = loss_fn(model(inputs), targets)
            total_loss += loss.detach().float()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total_loss.item() / len(batches))
        seconds.append(perf_counter() - start)
    return seconds, losses
