"""GPT-2 in plain PyTorch, without dropout."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Shape(NamedTuple):
    """How large it is; the defaults are the 124 million of GPT-2, padded symbols."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024
    symbols: int = 50304


class Block(nn.Module):
    """Attention to the past and two linear layers, each added to its input."""

    def __init__(self, shape: Shape) -> None:
        """Of one layer."""
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm1 = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape, B x length x width."""
        parts = self.mix(self.norm1(x)).split(x.shape[2], 2)
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts
        )
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """The embedding is the head too."""

    def __init__(self, shape: Shape) -> None:
        """With the first weights of GPT-2."""
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.symbols, shape.width)
        self.place = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * shape.layers) ** (last / 2))

    def forward(self, tokens: Tensor) -> Tensor:
        """Gives B x length x symbols."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.place(places)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)
