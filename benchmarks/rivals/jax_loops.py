"""Loops in JAX over data that are on the device, in the order of the torch loader."""

from functools import partial
from time import perf_counter
from typing import Any

import jax
import numpy as np
import torch
from peers import jax_models
from peers.jax_models import State, Translated

from rivals import Turn, jax_large
from rivals.gpt import GPT
from rivals.resnet import ResNet
from rivals.tasks import Task

Data = list[jax.Array]


def per_batch(task: Task, device: torch.device, turn: Turn) -> str:
    """One call of a jitted step per batch, its state donated."""
    found = translated(task)
    state, data = found.state, _resident(found)

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, rows: jax.Array, data: Data) -> tuple[State, jax.Array]:
        inputs, targets = (array[rows] for array in data)
        return found.step(state, (inputs, targets))

    orders = _Orders(task)
    go_on = True
    while go_on:
        start = perf_counter()
        losses = []
        for rows in orders.next():
            state, loss = step(state, rows, data)
            losses.append(loss)
        mean = float(np.mean(jax.device_get(losses)))
        jax.block_until_ready(state)
        go_on = turn(perf_counter() - start, mean)
    return _remark(task)


def per_epoch(task: Task, device: torch.device, turn: Turn) -> str:
    """One call per epoch: a jitted `lax.scan` over the steps, the state donated."""
    found = translated(task)
    state, data = found.state, _resident(found)
    unroll = found.unroll and device.type == "cpu"

    @partial(jax.jit, donate_argnums=0)
    def epoch(state: State, order: jax.Array, data: Data) -> tuple[State, jax.Array]:
        def one(state: State, rows: jax.Array) -> tuple[State, jax.Array]:
            inputs, targets = (array[rows] for array in data)
            return found.step(state, (inputs, targets))

        state, losses = jax.lax.scan(one, state, order, unroll=unroll)
        return state, losses.mean()

    orders = _Orders(task)
    go_on = True
    while go_on:
        start = perf_counter()
        state, mean = epoch(state, orders.next(), data)
        jax.block_until_ready(state)
        go_on = turn(perf_counter() - start, float(mean))
    return _remark(task)


def translated(task: Task) -> Translated:
    """The same model, weights and data."""
    model = task.work.model()
    if isinstance(model, GPT):
        return jax_large.gpt(task, model)
    if isinstance(model, ResNet):
        return jax_large.resnet(task, model)
    return jax_models.translated(task.work, model)


def memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes in use and in the pool at most, since the start."""
    stats: dict[str, Any] = jax.devices()[0].memory_stats() or {}
    if device.type != "cuda" or not stats:
        return None
    used = stats["peak_bytes_in_use"]
    return used, stats.get("peak_pool_bytes", stats.get("pool_bytes", used))


def forget(device: torch.device) -> None:
    """There is no way to begin a new peak."""


class _Orders:
    """The rows of each batch, as the shuffling loader of the work draws them."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._draw = torch.Generator().manual_seed(0)

    def next(self) -> np.ndarray:
        """Of one epoch, of shape (steps, B)."""
        work = self._task.work
        # What a loader draws at the start of each pass, for workers.
        torch.empty((), dtype=torch.int64).random_(generator=self._draw)
        order = torch.randperm(len(work.inputs), generator=self._draw)
        # What its sampler draws at the end, for a part of a pass.
        torch.randperm(len(work.inputs), generator=self._draw)
        return order.numpy().astype(np.int32).reshape(work.steps, work.batch_size)


def _resident(found: Translated) -> Data:
    return jax.block_until_ready(jax.device_put([found.inputs, found.targets]))


def _remark(task: Task) -> str:
    return f"attention of {jax_large.attention()}" if task.precision == "bf16" else ""
