"""Lightning's `Trainer`, automatic optimization; no logger, checkpoints or bar."""

from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lossloop._works import Work
from peers import Epochs, loader


class _Module(LightningModule):
    def __init__(self, work: Work, model: nn.Module) -> None:
        super().__init__()
        self.model, self.rate = model, work.rate
        self.loss_fn = nn.CrossEntropyLoss()

    def training_step(self, batch: Any) -> Tensor:
        inputs, targets = batch
        loss = self.loss_fn(self.model(inputs), targets)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


class _Clock(Callback):
    def __init__(self) -> None:
        self.start = 0.0
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.start = perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.losses.append(trainer.callback_metrics["loss"].item())
        self.seconds.append(perf_counter() - self.start)


def train(work: Work, model: nn.Module, epochs: int, *, shuffle: bool = True) -> Epochs:
    """As the package describes it."""
    clock = _Clock()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(_Module(work, model), loader(work, shuffle=shuffle))
    return clock.seconds, clock.losses
