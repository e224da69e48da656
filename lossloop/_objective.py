"""What is minimised: a function from parameters and a batch to a loss pair."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lossloop._losses import as_pair, check_loss, loss_pair
from lossloop._model import (
    FunctionalModel,
    check_functional,
    device_of,
    model_params,
    skeleton,
)
from lossloop._random import host_generators_kept, seeded
from lossloop._types import Batch, LossPair, Params

HIDDEN_STATE = """\
the model or the loss is no pure function: called twice with the same parameters,
batch and random seed it gave {one} and then {other}. It keeps something between calls
(a counter, a plain attribute, a buffer with persistent=False), or draws random numbers
from elsewhere than torch's default generator (Python, numpy, a generator of its own).
Register what it keeps as a buffer; draw with torch.rand and the like.\
"""

NOTHING_TRAINABLE = """\
nothing is trainable: no parameter of the model has requires_grad=True. Unfreeze some
with p.requires_grad_(True)."""

NOT_DIFFERENTIABLE = """\
torch.func, which differentiates the step, refuses something in the model or the loss.
Give each torch.autograd.Function a setup_context, take torch.utils.checkpoint and
saved-tensor hooks out, do not call requires_grad_() or backward() inside, and give a
recurrent layer padded sequences instead of packed ones.
({error})\
"""


BESIDE_THE_MODEL = """\
the loss depends on {names} of the module itself, and not only through the model that a
step calls with weights of its own: this part would have no gradient. Take weights from
the model that is handed over, objective(model, lambda model, batch: ...), as for a
penalty on them; detach what is meant as a constant; and do not keep functions in a
module that hold it, or another of its parts (a lambda, or what torch.compile returns
for its forward: module.compile() instead)."""


class Checked(NamedTuple):
    """What was seen of a model while a batch was looked at.

    Attributes:
        output: What it returned, without the values; None if that is no tensor, or
            cannot be told from the loss.
        unused: Names of trainable parameters that the loss does not depend on.
    """

    output: Tensor | None
    unused: set[str]


class Objective:
    """A loss as a pure function of parameters and a batch.

    Made by `supervised` and `objective`. `objective(params, batch)` gives
    `(loss_sum, n)` in train mode and drops the buffers that the model wrote; steps use
    `train`, which returns them, and `evaluate`, which is in eval mode.

    Attributes:
        model: The caller's module; read by `init`, never called or changed.
        loss_fn: The loss given to `supervised`; None if made by `objective`.
        trainable: Names of the parameters that require a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any],
        *,
        where: str,
        loss_fn: Callable[..., Any] | None = None,
    ) -> None:
        check_functional(where, model)
        self.model = model
        self.loss_fn = loss_fn
        self.trainable = frozenset(
            name for name, t in model.named_parameters() if t.requires_grad
        )
        self._function = function
        self._functions = {
            mode: FunctionalModel(skeleton(model, train=mode), function)
            for mode in (True, False)
        }

    def __call__(self, params: Params, batch: Batch) -> LossPair:
        """Returns `(loss_sum, n)` of a batch in train mode."""
        loss_sum, n, _ = self.train(params, batch)
        return loss_sum, n

    def train(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor, Params]:
        """Returns `(loss_sum, n, buffers)` in train mode, the buffers as written."""
        (loss_sum, n), buffers = self._functions[True](params, batch)
        return loss_sum, n, buffers

    def evaluate(self, params: Params, batch: Batch) -> LossPair:
        """Returns `(loss_sum, n)` in eval mode."""
        pair, _ = self._functions[False](params, batch)
        return pair

    def measure(
        self,
        params: Params,
        batch: Batch,
        look: Callable[[Any, Any, Tensor | None], Any],
    ) -> tuple[Tensor, Tensor, Any]:
        """Returns `(loss_sum, n, look(output, targets, weights))` in eval mode.

        The model is called once. Of an objective made by `supervised` only: no other
        tells its output from its loss.
        """
        ((loss_sum, n), seen), _ = self._functions[False](params, batch, look)
        return loss_sum, n, seen

    def init(self) -> Params:
        """A detached copy of the model's parameters and buffers."""
        return {k: t.detach().clone() for k, t in model_params(self.model).items()}

    def check(
        self, place: str, params: Params, batch: Batch, *, train: bool = True
    ) -> Checked:
        """Looks at a batch as nothing inside a step may: reads values on the host.

        Args:
            place: What to call the batch in a message, like "train_loader, batch 1".
            params: A copy of the model's own, to call it with. What is called may write
                there, which is then an error.
            batch: The batch; a copy is used, and no generator moves.
            train: Whether it is to be trained on, and not only evaluated.

        Returns:
            What was seen of the model meanwhile.

        Raises:
            ValueError: If nothing is trainable, an input or target is not finite, the
                loss refuses the batch, depends on no trainable parameter, or the model
                or the loss is no pure function: it writes to its inputs, or gives
                something else when called again.
            TypeError: If the batch or the returned pair has the wrong form, or
                `torch.func` cannot differentiate the model.
        """
        if train and not self.trainable:
            raise ValueError(NOTHING_TRAINABLE)
        # A skeleton for this alone: what forward leaves on it is thrown away.
        model = skeleton(self.model, train=train)
        functional = FunctionalModel(model, self._function)
        output, unused = None, set[str]()

        def call(params: Params, batch: Batch) -> tuple[Tensor, Tensor, Params]:
            (loss_sum, n), buffers = functional(params, batch)
            return loss_sum, n, buffers

        def differentiate(
            params: Params, batch: Batch
        ) -> tuple[Tensor, Tensor, Params]:
            def loss(trained: Params) -> tuple[Tensor, tuple[Tensor, Tensor, Params]]:
                result = call({**params, **trained}, batch)
                return result[0], result

            trained = {name: params[name] for name in self.trainable}
            grads, result = torch.func.grad(loss, has_aux=True)(trained)
            unused.update(name for name, grad in grads.items() if not grad.any())
            return result

        try:
            with torch.no_grad(), host_generators_kept():
                if self.loss_fn is not None:
                    with seeded(0, device_of(params)):
                        look = functools.partial(_look_at, self.loss_fn)
                        output, _ = FunctionalModel(model, look)(params, _cloned(batch))
                watched = functools.partial(
                    _watched, model_params(self.model), model, params, batch
                )
                with torch.set_grad_enabled(train):
                    first = watched(call)
                    if first[0].requires_grad:  # not by what it was called with
                        self._refuse_own(first[0])
                    # One graph of autograd at a time.
                    first = tuple(t.detach() for t in first)
                    second = tuple(t.detach() for t in watched(call))
                for one, other in zip(first, second, strict=True):
                    # Some kernels of GPUs add in any order.
                    rtol = 0.0 if one.device.type == "cpu" else 1e-2
                    if not torch.allclose(one, other, rtol, 0.0, equal_nan=True):
                        raise ValueError(HIDDEN_STATE.format(one=one, other=other))
                if train:
                    watched(differentiate)
            if unused:  # or its gradient happens to be zero
                unused &= self.without_gradient(params, batch)
            return Checked(output, unused)
        except Exception as error:
            if type(error) in (TypeError, ValueError):
                raise type(error)(f"{place}: {error}") from error
            if isinstance(error, RuntimeError):
                _explain_dtypes(place, params, batch, error)
            if isinstance(error, RuntimeError) and _of_functorch(error):
                raise TypeError(
                    f"{place}: {NOT_DIFFERENTIABLE.format(error=error)}"
                ) from error
            error.add_note(f"This happened while lossloop looked at {place}.")
            raise

    def _refuse_own(self, loss_sum: Tensor) -> None:
        own = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss_sum, list(own.values()), allow_unused=True)
        found = [k for k, grad in zip(own, grads, strict=True) if grad is not None]  # pyright: ignore[reportUnnecessaryComparison]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            names = ", ".join(found[:3]) + more
            raise ValueError(BESIDE_THE_MODEL.format(names=names))

    def without_gradient(self, params: Params, batch: Batch) -> set[str]:
        """Names of trainable parameters that this batch's loss does not depend on.

        Raises:
            ValueError: If it depends on none of them.
        """
        leaves = {k: params[k].detach().requires_grad_() for k in self.trainable}
        with torch.enable_grad(), seeded(0, device_of(params)):
            loss_sum, _, _ = self.train({**params, **leaves}, _cloned(batch))
            grads: Sequence[Tensor | None] = [None] * len(leaves)
            if loss_sum.requires_grad:
                grads = torch.autograd.grad(
                    loss_sum, list(leaves.values()), allow_unused=True
                )
        if all(grad is None for grad in grads):
            raise ValueError(
                "the loss does not depend on any trainable parameter: something "
                "between them is detached, no operator has a derivative, or the model "
                "calls another module than its own."
            )
        found = zip(leaves, grads, strict=True)
        return {name for name, grad in found if grad is None}


def _watched(
    originals: Params,
    model: nn.Module,
    params: Params,
    batch: Batch,
    call: Callable[[Params, Batch], tuple[Tensor, Tensor, Params]],
) -> LossPair:
    """Calls an objective on copies, and refuses what it wrote where it must not."""
    own_batch = _cloned(batch)
    constants = {
        name: (buffer, buffer.clone())
        for name, buffer in model.named_buffers()
        if not buffer.is_meta
    }
    with seeded(0, device_of(params)):
        loss_sum, n, buffers = call(params, own_batch)
    for name, (buffer, before) in constants.items():
        if not _same(buffer, before):
            raise ValueError(
                f"forward writes into model.{name}, which is registered with "
                f"persistent=False and so is no part of the params that a step "
                f"returns. Register it with persistent=True."
            )
    for name, param in params.items():
        if not _same(param, originals[name]):
            raise ValueError(
                f"forward writes into the parameter {name} in place. Register tensors "
                f"that forward is to change as buffers."
            )
    paths = pytree.tree_flatten_with_path(batch)[0]
    after = pytree.tree_leaves(own_batch)
    for (path, leaf), own_leaf in zip(paths, after, strict=True):
        if isinstance(leaf, Tensor) and not _same(leaf, own_leaf):
            raise ValueError(
                f"the model or the loss writes into batch{pytree.keystr(path)} in "
                f"place. Copy it first, and build the first layers with inplace=False."
            )
    for name, buffer in buffers.items():
        kept = params[name]
        if (buffer.shape, buffer.dtype) != (kept.shape, kept.dtype):
            raise ValueError(
                f"forward turns the buffer {name} of shape {tuple(kept.shape)} and "
                f"{kept.dtype} into one of shape {tuple(buffer.shape)} and "
                f"{buffer.dtype}; a step must return what it was given."
            )
    return loss_sum, n


def _explain_dtypes(
    place: str, params: Params, batch: Batch, error: RuntimeError
) -> None:
    if "dtype" not in str(error):
        return
    known = {t.dtype for t in params.values() if t.is_floating_point()}
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        if known and leaf.dtype not in known:
            names = ", ".join(sorted(map(str, known)))
            raise TypeError(
                f"{place}: batch{pytree.keystr(path)} is {leaf.dtype}, the model is "
                f"{names}. Convert the data, for example with .float(), or the model "
                f"with .double(). ({error})"
            ) from error


def _of_functorch(error: RuntimeError) -> bool:
    if "Could not run" in str(error):  # lists all of torch's parts
        return False
    marks = (
        *("functorch", "torch.func", "FuncTorch", "TensorWrapper", "vmap, grad"),
        "data pointer of Tensor that doesn't have storage",  # packed sequences
    )
    return any(mark in str(error) for mark in marks)


def _cloned(tree: Any) -> Any:
    def clone(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(clone, tree)


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, with NaN equal to itself."""
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return torch.equal(
        one.contiguous().view(-1).view(torch.uint8),
        other.contiguous().view(-1).view(torch.uint8),
    )


class FunctionObjective:
    """A user's own pure function `(params, batch) -> (loss_sum, n)` as an objective.

    Every floating-point tensor of `params` is trained, and there is no train or eval
    mode: what differs between them is the caller's to pass.
    """

    def __init__(self, function: Callable[[Params, Batch], LossPair]) -> None:
        self.function = function

    def train(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor, Params]:
        """Returns `(loss_sum, n, {})`."""
        return *self.evaluate(params, batch), {}

    def evaluate(self, params: Params, batch: Batch) -> LossPair:
        """Returns `(loss_sum, n)`."""
        return as_pair("the objective", self.function(params, batch))


def as_objective(
    function: Objective | Callable[[Params, Batch], LossPair],
) -> Objective | FunctionObjective:
    """An `Objective` as it is, a plain function as a `FunctionObjective`."""
    if isinstance(function, Objective):
        return function
    if not callable(function) or isinstance(function, nn.Module):
        raise TypeError(
            f"objective must be a function (params, batch) -> (loss_sum, n), got "
            f"{type(function).__name__}. Build one with supervised(model, loss_fn) or "
            f"objective(model, function)."
        )
    return FunctionObjective(function)


def objective(
    model: nn.Module, function: Callable[[Any, Batch], LossPair]
) -> Objective:
    """Turns `function(model, batch) -> (loss_sum, n)` into an objective.

    For batches that are not `(inputs, targets)`, losses of several outputs, masks,
    regularisers, or anything else: the batch may be any pytree of tensors.

    Args:
        model: The module to train. It is not called; the function receives a private
            copy that holds the parameters of the step.
        function: Returns the sum of the weighted losses and the sum of the weights,
            both of shape (); `loss_pair` makes such pairs from losses of `torch.nn`.

    Returns:
        The objective, for `make_step`, `make_eval_step`, `init` and `fit`.

    Raises:
        TypeError: If the model cannot be used as a pure function (TorchScript,
            compiled or wrapped modules, backward hooks).
        ValueError: If parts of it are not initialised yet.

    Example:
        >>> def masked(model, batch):
        ...     error = (model(batch["x"]).squeeze(1) - batch["y"]) ** 2
        ...     return (batch["mask"] * error).sum(), batch["mask"].sum()
        >>> goal = objective(torch.nn.Linear(3, 1), masked)
        >>> batch = {"x": torch.ones(4, 3), "y": torch.ones(4), "mask": torch.ones(4)}
        >>> loss_sum, n = goal(goal.init(), batch)
        >>> n.item()
        4.0
    """
    where = "the function given to objective"

    def pair(model: Any, batch: Batch) -> LossPair:
        return as_pair(where, function(model, batch))

    return Objective(model, pair, where=where)


def supervised(model: nn.Module, loss_fn: Callable[..., Any]) -> Objective:
    """Turns a module and a loss into an objective over `(inputs, targets)` batches.

    The model is called as `model(inputs)`; a tuple or list of inputs is unpacked as
    positional, a dictionary as keyword arguments. The loss is called as
    `loss_fn(output, targets)`; see `loss_pair` for how its weights are found. A batch
    may carry weights of its samples, `(inputs, targets, weights)` with weights of shape
    (B,), which multiply the losses and the weights of the loss itself: 0 is absence.

    Args:
        model: The module to train; see `objective`.
        loss_fn: A loss module of `torch.nn` (class weights, `ignore_index`, label
            smoothing and the rest count as in its own `reduction="mean"`, whatever its
            `reduction`; `KLDivLoss` keeps "batchmean"); or a function
            `(output, targets)` that returns one loss per sample, or `(loss_sum, n)`.

    Returns:
        The objective, for `make_step`, `make_eval_step`, `init` and `fit`.

    Raises:
        TypeError: If the model cannot be used as a pure function, or the loss has
            parameters of its own.
        ValueError: If parts of the model are not initialised yet.

    Example:
        >>> goal = supervised(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss())
        >>> labels = torch.tensor([0, 1, 1, -100])
        >>> loss_sum, n = goal(goal.init(), (torch.ones(4, 3), labels))
        >>> n.item()  # the label -100 is ignored and has weight 0
        3
        >>> weights = torch.tensor([2, 1, 0, 1])
        >>> loss_sum, n = goal(goal.init(), (torch.ones(4, 3), labels, weights))
        >>> n.item()
        3
    """
    pair = loss_pair(loss_fn)

    def function(model: Any, batch: Batch, look: Any = None) -> Any:
        inputs, targets, weights = split_batch(batch)
        output = forward(model, inputs)
        losses = pair(output, targets, weights)
        return (losses, look(output, targets, weights)) if look else losses

    return Objective(model, function, where="supervised", loss_fn=loss_fn)


def split_batch(batch: Batch) -> tuple[Any, Any, Tensor | None]:
    """`(inputs, targets, weights)` of a batch for `supervised`."""
    if isinstance(batch, tuple | list) and len(batch) in (2, 3):
        inputs, targets, *weights = batch
        return inputs, targets, weights[0] if weights else None
    got = type(batch).__name__
    got += f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise TypeError(
        f"a batch must be (inputs, targets) or (inputs, targets, weights), got a "
        f"{got}. For batches of another form use objective(model, function), whose "
        f"function takes them whole."
    )


def forward(model: Any, inputs: Any) -> Any:
    """Calls the model of `supervised` on the inputs of a batch."""
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def _look_at(loss_fn: Callable[..., Any], model: Any, batch: Batch) -> Any:
    inputs, targets, weights = split_batch(batch)
    for name, tree in (("inputs", inputs), ("targets", targets), ("weights", weights)):
        check_finite(name, tree)
    output = forward(model, inputs)
    check_loss(loss_fn, output, targets, weights)
    return output.to("meta") if isinstance(output, Tensor) else None


def check_finite(name: str, tree: Any) -> None:
    """Refuses a pytree with a NaN or an infinity, saying where it is."""
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        finite = torch.isfinite(leaf)
        if not finite.all():
            index = tuple(torch.nonzero(~finite)[0].tolist())
            raise ValueError(
                f"{name}{pytree.keystr(path)} has {int((~finite).sum())} values that "
                f"are not finite, the first {leaf[index].item()} at {index}. Clean or "
                f"impute the data first."
            )
