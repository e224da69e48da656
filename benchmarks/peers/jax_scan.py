"""JAX, one call per epoch: a jitted `lax.scan` over indices, the data resident."""

from functools import partial
from time import perf_counter

import jax
import numpy as np
from torch import nn

from lossloop._works import Work
from peers import Epochs
from peers.jax_models import State, translated


def train(work: Work, model: nn.Module, epochs: int, *, shuffle: bool = True) -> Epochs:
    """As the package describes it."""
    state, step, *arrays, unroll = translated(work, model)
    data = jax.device_put(arrays)

    @partial(jax.jit, donate_argnums=0)
    def epoch(
        state: State, order: jax.Array, data: list[jax.Array]
    ) -> tuple[State, jax.Array]:
        def one(state: State, rows: jax.Array) -> tuple[State, jax.Array]:
            inputs, targets = (array[rows] for array in data)
            return step(state, (inputs, targets))

        state, found = jax.lax.scan(one, state, order, unroll=unroll)
        return state, found.mean()

    draw = np.random.default_rng(0)
    seconds, losses = [], []
    for _ in range(epochs):
        start = perf_counter()
        order = np.arange(len(work.inputs), dtype=np.int32)
        if shuffle:
            draw.shuffle(order)
        order = order.reshape(work.steps, work.batch_size)
        state, mean = epoch(state, order, data)
        losses.append(float(mean))
        seconds.append(perf_counter() - start)
    return seconds, losses
