"""GPT-2 and ResNet-18 in jax.numpy, from the weights of the modules."""

from functools import cache, partial

import jax
import numpy as np
from jax import numpy as jnp
from peers.jax_models import (
    Translated,
    Weights,
    batch_norm,
    cross_entropy,
    layer_norm,
    linear,
    start,
    training_step,
)

from rivals.gpt import GPT
from rivals.resnet import BLOCKS, ResNet
from rivals.tasks import Task


def gpt(task: Task, model: GPT) -> Translated:
    """Weights in float32, products in bfloat16, as under the autocast of torch."""
    weights = {name: t.numpy().copy() for name, t in model.state_dict().items()}
    inputs = task.work.inputs.numpy().astype(np.int32)
    targets = task.work.targets.numpy().astype(np.int32)
    forward = partial(_gpt, model.shape.layers, model.shape.heads)
    # Computed again in the backward pass: float32 of B x length x symbols are not kept.
    loss = jax.checkpoint(lambda half, t: cross_entropy(half.astype(jnp.float32), t))
    step = partial(
        training_step, forward, task.work.rate, decay=task.decay, loss_fn=loss
    )
    return Translated(start(weights, {}), step, inputs, targets, unroll=False)


def resnet(task: Task, model: ResNet) -> Translated:
    """Images and weights with their channels last."""
    weights = {name: t.numpy().copy() for name, t in model.state_dict().items()}
    running = ("running_mean", "running_var", "num_batches_tracked")
    names = [name for name in weights if name.endswith(running)]
    buffers = {name: weights.pop(name) for name in names}
    for name, weight in weights.items():
        if weight.ndim == 4:
            weights[name] = weight.transpose(2, 3, 1, 0)
    inputs = np.ascontiguousarray(np.moveaxis(task.work.inputs.numpy(), 1, -1))
    targets = task.work.targets.numpy().astype(np.int32)
    step = partial(training_step, _resnet, task.work.rate)
    return Translated(start(weights, buffers), step, inputs, targets, unroll=True)


@cache
def attention() -> str:
    """The implementation that works here, "cudnn" if it does."""
    if jax.default_backend() == "cpu":
        return "xla"
    x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    try:
        jax.block_until_ready(jax.jit(jax.grad(partial(_attend, "cudnn")))(x))
    except Exception as error:
        print(f"no attention of cuDNN: {error}")
        return "xla"
    return "cudnn"


def _attend(implementation: str, x: jax.Array) -> jax.Array:
    found = jax.nn.dot_product_attention(
        x, x, x, is_causal=True, implementation=implementation
    )
    return found.astype(jnp.float32).sum()


def _half(params: Weights, name: str, x: jax.Array) -> jax.Array:
    keys = f"{name}.weight", f"{name}.bias"
    half = {key: params[key].astype(jnp.bfloat16) for key in keys}
    return linear(half, name, x.astype(jnp.bfloat16))


def _gpt(
    layers: int, heads: int, params: Weights, buffers: Weights, tokens: jax.Array
) -> tuple[jax.Array, Weights]:
    n, length = tokens.shape
    x = params["embed.weight"][tokens] + params["place.weight"][:length]
    width = x.shape[-1]
    for layer in range(layers):
        name = f"blocks.{layer}"
        mixed = _half(params, f"{name}.mix", layer_norm(params, f"{name}.norm1", x))
        parts = mixed.reshape(n, length, 3, heads, width // heads)
        found = jax.nn.dot_product_attention(
            *(parts[:, :, place] for place in range(3)),
            is_causal=True,
            implementation=attention(),
        )
        x += _half(params, f"{name}.out", found.reshape(n, length, width))
        hidden = _half(params, f"{name}.up", layer_norm(params, f"{name}.norm2", x))
        x += _half(params, f"{name}.down", jax.nn.gelu(hidden, approximate=True))
    normed = layer_norm(params, "norm", x).astype(jnp.bfloat16)
    return normed @ params["embed.weight"].astype(jnp.bfloat16).T, buffers


def _resnet(
    params: Weights, buffers: Weights, x: jax.Array
) -> tuple[jax.Array, Weights]:
    moved: Weights = {}

    def conv(name: str, x: jax.Array, stride: int = 1) -> jax.Array:
        weight = params[f"{name}.weight"]
        edge = len(weight) // 2
        return jax.lax.conv_general_dilated(
            x,
            weight,
            (stride, stride),
            [(edge, edge)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def norm(name: str, x: jax.Array) -> jax.Array:
        x, now = batch_norm(params, buffers, name, x)
        moved.update(now)
        return x

    x = jax.nn.relu(norm("norm", conv("stem", x)))
    for number in range(4 * BLOCKS):
        name = f"blocks.{number}"
        beside = f"{name}.beside"
        stride = 2 if number and f"{beside}.0.weight" in params else 1
        hidden = jax.nn.relu(norm(f"{name}.norm1", conv(f"{name}.conv1", x, stride)))
        hidden = norm(f"{name}.norm2", conv(f"{name}.conv2", hidden))
        if f"{beside}.0.weight" in params:
            x = norm(f"{beside}.1", conv(f"{beside}.0", x, stride))
        x = jax.nn.relu(hidden + x)
    return linear(params, "head", x.mean((1, 2))), moved
