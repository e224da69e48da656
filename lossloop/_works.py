"""The works that are timed, four small models with data, and the tutorials' loop."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Work(NamedTuple):
    """A model, the data it is trained on, and how: cross entropy, Adam, shuffled.

    Attributes:
        model: Makes the model, with the same weights each time.
        inputs: All samples.
        targets: Their classes, of shape (N,) or (N, length).
        batch_size: Divides N, so that there is one shape.
        rate: Of Adam.
    """

    model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    batch_size: int
    rate: float = 1e-3

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """The first batch."""
        return self.inputs[: self.batch_size], self.targets[: self.batch_size]

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return len(self.inputs) // self.batch_size

    def loader(self, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
        """A shuffling loader, as everybody makes it."""
        return DataLoader(
            TensorDataset(self.inputs, self.targets),
            self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
        )


class Characters(nn.Module):
    """A two-layer causal transformer over characters."""

    def __init__(self, width: int = 128, length: int = 64, symbols: int = 65) -> None:
        """All of it is trained but the mask."""
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, symbols)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask)

    def forward(self, tokens: Tensor) -> Tensor:
        """Gives B x symbols x length."""
        hidden = self.embed(tokens) + self.place
        hidden = self.layers(hidden, mask=self.mask, is_causal=True)
        return self.head(hidden).transpose(1, 2)


def _mlp(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def conv_net(dropout: float = 0.0) -> nn.Module:
    """A small conv net: B x 1 x 8 x 8 to B x 10."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *([nn.Dropout(dropout)] if dropout else []),
        nn.Linear(64 * 4 * 4, 10),
    )


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return make()

    return seeded


def works() -> dict[str, Work]:
    """All of them, under their names."""
    draw = torch.Generator().manual_seed(1)

    def digits(n: int, *shape: int) -> tuple[Tensor, Tensor]:
        inputs = torch.rand(n, *shape, generator=draw)
        return inputs, torch.randint(0, 10, (n,), generator=draw)

    text = torch.randint(0, 65, (192, 65), generator=draw)
    return {
        "MLP 128": Work(_seeded(_mlp(128)), *digits(1792, 64), 64),
        "MLP 1024": Work(_seeded(_mlp(1024)), *digits(1792, 64), 64),
        "conv net": Work(_seeded(conv_net), *digits(1792, 1, 8, 8), 64),
        "transformer": Work(_seeded(Characters), text[:, :-1], text[:, 1:], 32),
    }


def tutorial_loop(
    model: nn.Module, loader: Iterable[Any], optimizer: torch.optim.Optimizer
) -> float:
    """One epoch as tutorials write it; returns the mean loss."""
    loss_fn, total, size = nn.CrossEntropyLoss(), 0.0, 0
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        total += loss.item() * inputs.size(0)
        size += inputs.size(0)
    return total / size
