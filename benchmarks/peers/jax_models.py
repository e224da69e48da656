"""The works' models in jax.numpy, from the weights of the modules, and their step."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from torch import nn

from lossloop._works import Characters, Work

HEADS = 4  # of the transformer
EPS = 1e-5  # of all normalizations
MOMENTUM = 0.1  # of the running statistics
BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8

Weights = dict[str, Any]
Forward = Callable[[Weights, Weights, jax.Array], tuple[jax.Array, Weights]]


class State(NamedTuple):
    """What a step carries on.

    Attributes:
        params: What is trained.
        buffers: The running statistics.
        m: Adam's first moments.
        v: Its second moments.
        t: The number of steps made.
    """

    params: Weights
    buffers: Weights
    m: Weights
    v: Weights
    t: jax.Array


Step = Callable[[State, tuple[jax.Array, jax.Array]], tuple[State, jax.Array]]


class Translated(NamedTuple):
    """A work for JAX.

    Attributes:
        state: To start from.
        step: Of training, `(state, (inputs, targets)) -> (state, loss)`, not jitted.
        inputs: All samples; images have their channels last.
        targets: Their classes.
        unroll: Whether a scan is better unrolled: on the CPU, XLA's convolutions are
            many times slower inside a loop.
    """

    state: State
    step: Step
    inputs: np.ndarray
    targets: np.ndarray
    unroll: bool


def translated(work: Work, model: nn.Module) -> Translated:
    """The same model, weights and data."""
    weights = {name: t.numpy().copy() for name, t in model.state_dict().items()}
    inputs = work.inputs.numpy()
    buffers: Weights = {}
    if isinstance(model, Characters):
        weights.pop("mask")
        forward, inputs = _transformer, inputs.astype(np.int32)
    elif any(isinstance(module, nn.BatchNorm2d) for module in model):
        forward, inputs = _conv_net, np.moveaxis(inputs, 1, -1)
        names = [name for name in weights if name.split(".")[1][:3] in ("run", "num")]
        buffers = {name: weights.pop(name) for name in names}
        for name, weight in weights.items():
            if weight.ndim == 4:
                weights[name] = weight.transpose(2, 3, 1, 0)
        classes = len(weights["8.weight"])  # for channels, rows, columns
        flat = weights["8.weight"].reshape(classes, 64, 4, 4)
        weights["8.weight"] = np.moveaxis(flat, 1, -1).reshape(classes, -1)
    else:
        forward = partial(_mlp, tuple(sorted({int(n.split(".")[0]) for n in weights})))
    state = start(weights, buffers)
    step = partial(training_step, forward, work.rate)
    targets = work.targets.numpy().astype(np.int32)
    return Translated(state, step, inputs, targets, unroll=forward is _conv_net)


def start(weights: Weights, buffers: Weights) -> State:
    """The state before the first step."""
    params, buffers = jax.tree.map(jnp.array, (weights, buffers))
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return State(params, buffers, zeros(params), zeros(params), jnp.zeros(()))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over all targets; the classes come last."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1).mean()


def training_step(
    forward: Forward,
    rate: float,
    state: State,
    batch: tuple[jax.Array, jax.Array],
    *,
    decay: float = 0.0,
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
) -> tuple[State, jax.Array]:
    """One step of Adam, or with a decay of the weights AdamW; returns the loss too."""
    inputs, targets = batch

    def loss_of(params: Weights) -> tuple[jax.Array, Weights]:
        logits, buffers = forward(params, state.buffers, inputs)
        return loss_fn(logits, targets), buffers

    (loss, buffers), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    t = state.t + 1
    rate_now, root = rate / (1 - BETA1**t), jnp.sqrt(1 - BETA2**t)
    m = jax.tree.map(lambda m, g: m + (1 - BETA1) * (g - m), state.m, grads)
    v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, state.v, grads)
    params = jax.tree.map(
        lambda p, m, v: (
            p * (1 - rate * decay) - rate_now * m / (jnp.sqrt(v) / root + ADAM_EPS)
        ),
        state.params,
        m,
        v,
    )
    return State(params, buffers, m, v, t), loss


def linear(params: Weights, name: str, x: jax.Array) -> jax.Array:
    """As `nn.Linear`."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def _mlp(
    layers: tuple[int, ...], params: Weights, buffers: Weights, x: jax.Array
) -> tuple[jax.Array, Weights]:
    for layer in layers[:-1]:
        x = jax.nn.relu(linear(params, str(layer), x))
    return linear(params, str(layers[-1]), x), buffers


def _conv_net(
    params: Weights, buffers: Weights, x: jax.Array
) -> tuple[jax.Array, Weights]:
    moved: Weights = {}
    for conv, norm in (("0", "1"), ("3", "4")):
        x = jax.lax.conv_general_dilated(
            x,
            params[f"{conv}.weight"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x += params[f"{conv}.bias"]
        x, now = batch_norm(params, buffers, norm, x)
        moved |= now
        x = jax.nn.relu(x)
    n, rows, columns, channels = x.shape
    x = x.reshape(n, rows // 2, 2, columns // 2, 2, channels).max((2, 4))
    return linear(params, "8", x.reshape(n, -1)), moved


def batch_norm(
    params: Weights, buffers: Weights, name: str, x: jax.Array
) -> tuple[jax.Array, Weights]:
    """As `nn.BatchNorm2d` of channels that come last; and its buffers, moved."""
    moved: Weights = {}
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    size = x.size // x.shape[-1]
    now = {"mean": mean, "var": var * size / (size - 1)}
    for statistic, value in now.items():
        key = f"{name}.running_{statistic}"
        moved[key] = buffers[key] + MOMENTUM * (value - buffers[key])
    count = f"{name}.num_batches_tracked"
    moved[count] = buffers[count] + 1
    scale = params[f"{name}.weight"] * jax.lax.rsqrt(var + EPS)
    return (x - mean) * scale + params[f"{name}.bias"], moved


def layer_norm(params: Weights, name: str, x: jax.Array) -> jax.Array:
    """As `nn.LayerNorm`."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(var + EPS)
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]


def _attention(params: Weights, name: str, x: jax.Array) -> jax.Array:
    n, length, width = x.shape
    mixed = x @ params[f"{name}.in_proj_weight"].T + params[f"{name}.in_proj_bias"]
    heads = mixed.reshape(n, length, 3, HEADS, width // HEADS)
    q, k, v = heads.transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / (width // HEADS) ** 0.5
    past = np.tril(np.ones((length, length), dtype=bool))
    found = jax.nn.softmax(jnp.where(past, scores, -jnp.inf)) @ v
    found = found.swapaxes(1, 2).reshape(n, length, width)
    return linear(params, f"{name}.out_proj", found)


def _transformer(
    params: Weights, buffers: Weights, tokens: jax.Array
) -> tuple[jax.Array, Weights]:
    x = params["embed.weight"][tokens] + params["place"]
    for name in ("layers.layers.0", "layers.layers.1"):
        normed = layer_norm(params, f"{name}.norm1", x)
        x += _attention(params, f"{name}.self_attn", normed)
        normed = layer_norm(params, f"{name}.norm2", x)
        hidden = jax.nn.relu(linear(params, f"{name}.linear1", normed))
        x += linear(params, f"{name}.linear2", hidden)
    return linear(params, "head", x), buffers
