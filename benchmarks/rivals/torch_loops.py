"""Loops written by hand, and `lossloop.fit`."""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lossloop as ll
from rivals import Turn
from rivals.tasks import Task, mean_loss, token_losses

LONG = 5000  # epochs that fit is told of, so that it compiles what pays in a long run


def eager(task: Task, device: torch.device, turn: Turn) -> str:
    """The loop of every tutorial, with `loss.item()`."""
    model = task.work.model().to(device)
    optimizer = task.optimizer(model.parameters())
    batches, size = task.work.loader(), len(task.work.inputs)
    go_on = True
    while go_on:
        start, total = _now(device), 0.0
        for inputs, targets in batches:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            with task.autocast(device):
                loss = mean_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item() * inputs.size(0)
        go_on = turn(_now(device) - start, total / size)
    return ""


def fused(task: Task, device: torch.device, turn: Turn) -> str:
    """A fused optimizer, pinned memory, and the losses read once an epoch."""
    return _careful(task, device, turn)


def compiled(task: Task, device: torch.device, turn: Turn) -> str:
    """The same with model and loss compiled."""
    return _careful(task, device, turn, mode="default")


def reduce_overhead(task: Task, device: torch.device, turn: Turn) -> str:
    """The same with model and loss in CUDA graphs."""
    return _careful(task, device, turn, mode="reduce-overhead")


def fit(task: Task, device: torch.device, turn: Turn) -> str:
    """`lossloop.fit` with `compile=True`; the seconds are those of its history.

    It is told of a long run and stopped.
    """
    model = task.work.model()

    def on_epoch(record: Any) -> str | None:
        row = record.row
        return None if turn(row["seconds"], row["train_loss"]) else "stop"

    result = ll.fit(
        model,
        token_losses if task.precision == "bf16" else torch.nn.CrossEntropyLoss(),
        task.optimizer(model.parameters()),
        task.work.loader(),
        epochs=LONG,
        compile=True,
        precision=task.precision,
        device=device,
        progress=False,
        on_epoch=on_epoch,
    )
    choice = result.compiled
    how = "folded" if choice.folded else "not folded"
    return f"{choice.reason}, {how}"


def memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes allocated and reserved at most, since the last call of `forget`."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def forget(device: torch.device) -> None:
    """Begins a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _careful(
    task: Task, device: torch.device, turn: Turn, mode: str | None = None
) -> str:
    model = task.work.model().to(device)
    optimizer = task.optimizer(model.parameters(), fused=True)
    plain, size = task.work.loader(), len(task.work.inputs)
    batches = DataLoader(
        plain.dataset,
        plain.batch_size,
        shuffle=True,
        generator=plain.generator,
        pin_memory=device.type == "cuda",
    )

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with task.autocast(device):
            return mean_loss(model(inputs), targets)

    if mode is not None:
        loss_of = torch.compile(loss_of, mode=mode)
    go_on = True
    while go_on:
        start, total = _now(device), torch.zeros((), device=device)
        for inputs, targets in batches:
            inputs = inputs.to(device, non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            loss = loss_of(inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach() * inputs.size(0)
        mean = total.item() / size
        go_on = turn(_now(device) - start, mean)
    return ""


def _now(device: torch.device) -> float:
    """The time when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()
