"""Trees of tensors: copied, widened, compared bit for bit or by size, put in words."""

import copy
import hashlib
import io
import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# A leaf far smaller than the largest of its tree is rounding noise of that tree.
_NOISE = 1e-3

# How often the rounding error of one computation another may have.
_OF_ROUNDING = 10


class Gap(NamedTuple):
    """How far two trees are apart where they differ most.

    Attributes:
        size: The difference, relative to the size of the leaf that it is in; the
            difference itself for integers, and infinite for trees of another form.
        words: Where it is, and the two values.
    """

    size: float
    words: str


def copied(tree: Any) -> Any:
    """A copy that shares nothing; what is one tensor in two places stays so."""
    memo: dict[int, Tensor] = {}

    def copy_leaf(leaf: Any) -> Any:
        if id(leaf) not in memo:
            if isinstance(leaf, Tensor):
                memo[id(leaf)] = (
                    leaf.detach().clone().requires_grad_(leaf.requires_grad)
                )
            else:
                memo[id(leaf)] = copy.deepcopy(leaf)
        return memo[id(leaf)]

    return pytree.tree_map(copy_leaf, tree)


def shaken(tree: Any, eps: float, seed: int) -> Any:
    """The tree with its floating-point numbers changed by some `eps` of their size."""
    generator = torch.Generator().manual_seed(seed)

    def shake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return (leaf * (1 + eps * noise)).to(leaf.dtype)

    return pytree.tree_map(shake, tree)


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree under names like `params['weight']`."""
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        yield pytree.keystr(path).removeprefix("."), leaf


def bits(tree: Any) -> dict[str, Any]:
    """What two trees must have in common to be the same, bit for bit."""

    def leaf_bits(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return _pickled(leaf)
        dense = leaf.detach() if leaf.layout is torch.strided else leaf.to_dense()
        flat = dense.cpu().contiguous().view(-1).view(torch.uint8)
        return leaf.dtype, leaf.shape, leaf.requires_grad, flat.numpy().tobytes()

    return {name: leaf_bits(leaf) for name, leaf in named_leaves(tree)}


class _Pickler(pickle.Pickler):
    """Gives the same bytes for the same content: pickled tensors hold an address."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.Generator):
            return "generator", obj.get_state().numpy().tobytes()
        return ("tensor", bits(obj)) if isinstance(obj, Tensor) else None


def _pickled(leaf: Any) -> Any:
    """The state of what is no tensor: arrays of numpy, generators, numbers."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.fast = True  # one object in two places is as good as two
    try:
        pickler.dump(leaf)
    except Exception:  # whatever its class raises; then its kind is all that is known
        return type(leaf).__name__
    return type(leaf).__name__, file.getvalue()


def digest(tree: Any) -> str:
    """The bits of a tree as a short text."""
    return hashlib.sha256(repr(bits(tree)).encode()).hexdigest()


def gap(found: Any, expected: Any, scale: float = 0.0) -> Gap:
    """The largest difference between two trees of tensors and numbers.

    Args:
        found: A tree.
        expected: Another.
        scale: Of what the trees were computed from; where all they hold is rounding
            noise, their own sizes say nothing.
    """
    return max(gaps(found, expected, scale).values(), default=Gap(0.0, ""))


def gaps(found: Any, expected: Any, scale: float = 0.0) -> dict[str, Gap]:
    """The differences between two trees, leaf by leaf."""
    ours, theirs = dict(named_leaves(found)), dict(named_leaves(expected))
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        return {name: Gap(math.inf, f"{name} is in one of two only") for name in odd}
    sizes = {name: magnitude(leaf) for name, leaf in theirs.items()}
    # Of each field by itself: a large loss must not hide what is wrong in params.
    largest: dict[str, float] = {}
    for name, size in sizes.items():
        field = _field(name)
        largest[field] = max(largest.get(field, scale), size)
    return {
        name: _leaf_gap(
            name, leaf, theirs[name], sizes[name] + _NOISE * largest[_field(name)]
        )
        for name, leaf in ours.items()
    }


def _field(name: str) -> str:
    return name.split("[")[0].split(".")[0]


def beyond(found: Any, expected: Any, others: Sequence[Any]) -> Gap:
    """The largest difference between two trees that rounding does not explain.

    Args:
        found: A tree.
        expected: Another.
        others: What `expected` might be as well, if it was rounded otherwise. Ten times
            the difference to these, leaf by leaf, does not count.
    """
    rounding: dict[str, float] = {}
    for other in others:
        for name, (size, _) in gaps(other, expected).items():
            rounding[name] = max(size, rounding.get(name, 0.0))
    return max(
        (
            Gap(max(0.0, size - _OF_ROUNDING * rounding.get(name, 0.0)), words)
            for name, (size, words) in gaps(found, expected).items()
        ),
        default=Gap(0.0, ""),
    )


def magnitude(leaf: Any) -> float:
    """The largest absolute value of a floating-point tensor, and 0 of anything else."""
    if isinstance(leaf, float):
        return abs(leaf)
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
        return 0.0
    return leaf.detach().abs().max().item()


def _leaf_gap(name: str, found: Any, expected: Any, scale: float) -> Gap:
    if not isinstance(found, Tensor | int | float):
        same = _pickled(found) == _pickled(expected)
        return Gap(0.0 if same else math.inf, f"{name} is {found!r}, not {expected!r}")
    one, other = (torch.as_tensor(leaf).detach().cpu() for leaf in (found, expected))
    if one.shape != other.shape:
        return Gap(
            math.inf,
            f"{name} has shape {tuple(one.shape)}, not {tuple(other.shape)}",
        )
    if not one.numel():
        return Gap(0.0, "")
    whole = not (one.is_floating_point() or one.is_complex())
    apart = (one.double() - other.double()).abs()
    # Not a number in both is no difference, and in one of them is the largest.
    apart = torch.where(one.isnan() & other.isnan() | (one == other), 0.0, apart)
    apart = apart.nan_to_num(nan=math.inf, posinf=math.inf)
    index = tuple(torch.unravel_index(apart.argmax(), apart.shape))
    index = tuple(int(i) for i in index)
    size = apart[index].item()
    if size and not whole:
        size = size / scale if scale else math.inf
    place = f"{name}[{', '.join(map(str, index))}]" if index else name
    return Gap(size, f"{place} is {number(one[index])}, not {number(other[index])}")


def number(value: Any) -> str:
    """A number as a message shows it."""
    value = value.item() if isinstance(value, Tensor) else value
    return str(value) if isinstance(value, int) else f"{value:.8g}"
