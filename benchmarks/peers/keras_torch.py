"""Keras on the torch backend: `fit` on a `DataLoader`, the module in a layer.

The loss is torch's own, which is faster than that of Keras, and the epsilon of Adam is
torch's. KERAS_BACKEND must be torch when this is imported.
"""

from time import perf_counter
from typing import Any

import keras
from torch import Tensor, nn

from lossloop._works import Work
from peers import Epochs, loader


class _Model(keras.Model):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped = keras.layers.TorchModuleWrapper(model)

    def call(self, inputs: Tensor) -> Tensor:
        return self.wrapped(inputs)


class _Clock(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.start = 0.0
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.start = perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(perf_counter() - self.start)


def _cross_entropy(targets: Tensor, output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, targets.long())  # they come as floats


def train(work: Work, model: nn.Module, epochs: int, *, shuffle: bool = True) -> Epochs:
    """As the package describes it."""
    clock, wrapper = _Clock(), _Model(model)
    adam = keras.optimizers.Adam(work.rate, epsilon=1e-8)
    wrapper.compile(adam, loss=_cross_entropy)
    batches = loader(work, shuffle=shuffle)
    history = wrapper.fit(batches, epochs=epochs, verbose=0, callbacks=[clock])
    return clock.seconds, history.history["loss"]
