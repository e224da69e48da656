"""Models that a step must be pure for, each with a batch and a loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """A tiny language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens)))).transpose(1, 2)


class Encoder(nn.Module):
    """A transformer encoder layer with dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(dim=1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4 * 16, 3),
    )


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    targets: Callable[[int], Tensor]
    loss: nn.Module

    def batch(self, size: int = 6, seed: int = 3) -> tuple[Any, Any]:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self.inputs(size), self.targets(size)


def _labels(size: int) -> Tensor:
    return torch.randint(0, 3, (size,))


CASES = {
    "mlp": Case(mlp, lambda n: torch.randn(n, 5), _labels, nn.CrossEntropyLoss()),
    "conv_net": Case(
        conv_net,
        lambda n: torch.randn(n, 1, 4, 4),
        _labels,
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])),
    ),
    "encoder": Case(
        Encoder,
        lambda n: torch.randn(n, 4, 8),
        _labels,
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ),
    "tied": Case(
        Tied,
        lambda n: torch.randint(0, 11, (n, 4)),
        lambda n: torch.randint(0, 11, (n, 4)),
        nn.CrossEntropyLoss(ignore_index=0),
    ),
    "frozen": Case(frozen, lambda n: torch.randn(n, 5), _labels, nn.CrossEntropyLoss()),
}
