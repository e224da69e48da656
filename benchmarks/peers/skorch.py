"""skorch's `NeuralNet.fit` on arrays, without a validation split."""

from time import perf_counter
from typing import Any

import torch
from skorch import NeuralNet
from skorch.callbacks import Callback
from torch import nn

from lossloop._works import Work
from peers import Epochs


class _Clock(Callback):
    def __init__(self) -> None:
        self.start = 0.0
        self.seconds: list[float] = []

    def on_epoch_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        self.start = perf_counter()

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        self.seconds.append(perf_counter() - self.start)


def train(work: Work, model: nn.Module, epochs: int, *, shuffle: bool = True) -> Epochs:
    """As the package describes it."""
    clock = _Clock()
    net = NeuralNet(
        model,
        nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=work.rate,
        max_epochs=epochs,
        batch_size=work.batch_size,
        iterator_train__shuffle=shuffle,
        train_split=None,
        callbacks=[("clock", clock)],
        verbose=0,
    )
    net.fit(work.inputs.numpy(), work.targets.numpy())
    return clock.seconds, net.history[:, "train_loss"]
