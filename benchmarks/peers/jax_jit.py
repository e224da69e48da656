"""JAX, one call of a jitted step per batch, its state donated, batches of numpy."""

from time import perf_counter

import jax
import numpy as np
from torch import nn

from lossloop._works import Work
from peers import Epochs
from peers.jax_models import translated


def train(work: Work, model: nn.Module, epochs: int, *, shuffle: bool = True) -> Epochs:
    """As the package describes it."""
    state, step, inputs, targets, _ = translated(work, model)
    jitted = jax.jit(step, donate_argnums=0)
    draw = np.random.default_rng(0)
    seconds, losses = [], []
    for _ in range(epochs):
        start = perf_counter()
        order = np.arange(len(inputs))
        if shuffle:
            draw.shuffle(order)
        found = []
        for rows in order.reshape(work.steps, work.batch_size):
            state, loss = jitted(state, (inputs[rows], targets[rows]))
            found.append(loss)
        losses.append(float(np.mean(jax.device_get(found))))
        seconds.append(perf_counter() - start)
    return seconds, losses
