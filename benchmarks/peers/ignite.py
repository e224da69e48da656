"""Ignite's `create_supervised_trainer`, with an `Average` of its losses."""

from time import perf_counter

import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.metrics import Average
from torch import nn

from lossloop._works import Work
from peers import Epochs, loader


def train(work: Work, model: nn.Module, epochs: int, *, shuffle: bool = True) -> Epochs:
    """As the package describes it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=work.rate)
    trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
    starts: list[float] = []
    seconds: list[float] = []
    losses: list[float] = []

    @trainer.on(Events.EPOCH_STARTED)
    def begin(engine: Engine) -> None:
        starts.append(perf_counter())

    Average().attach(trainer, "loss")

    @trainer.on(Events.EPOCH_COMPLETED)
    def end(engine: Engine) -> None:
        losses.append(float(engine.state.metrics["loss"]))
        seconds.append(perf_counter() - starts[-1])

    trainer.run(loader(work, shuffle=shuffle), max_epochs=epochs)
    return seconds, losses
