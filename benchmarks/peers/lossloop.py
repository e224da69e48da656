"""`lossloop.fit` with `compile=True`; the seconds are those of its history.

It is told of a long run and stopped, so that it compiles what pays in one.
"""

import torch
from torch import nn

import lossloop as ll
from lossloop._works import Work
from peers import Epochs, loader


def train(work: Work, model: nn.Module, epochs: int, *, shuffle: bool = True) -> Epochs:
    """As the package describes it."""
    result = ll.fit(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.Adam(model.parameters(), lr=work.rate),
        loader(work, shuffle=shuffle),
        epochs=5000,
        compile=True,
        progress=False,
        on_epoch=lambda record: "stop" if record.row["epoch"] == epochs else None,
    )
    return list(result.history["seconds"]), list(result.history["train_loss"])
