"""What is trained: the four small works, GPT-2 124M and ResNet-18."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lossloop._works import Work, works
from rivals.gpt import GPT, Shape
from rivals.resnet import ResNet

NAMES = (*works(), "GPT-2 124M", "ResNet-18")


class Task(NamedTuple):
    """A work, and what of its training is not the same for all of them.

    Attributes:
        work: Model, data, size of the batches, rate.
        precision: "bf16" trains under autocast.
        decay: Of the weights; with any, the optimizer is AdamW, else Adam.
    """

    work: Work
    precision: Literal["fp32", "bf16"] = "fp32"
    decay: float = 0.0

    def optimizer(self, parameters: Iterable[Tensor], **options: Any) -> Optimizer:
        """A new one, of `torch.optim`."""
        if self.decay:
            options |= {"weight_decay": self.decay}
            return torch.optim.AdamW(parameters, lr=self.work.rate, **options)
        return torch.optim.Adam(parameters, lr=self.work.rate, **options)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of the forward pass."""
        half = self.precision == "bf16"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


def mean_loss(output: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy; of B x length x symbols too, as `GPT` gives them."""
    if output.ndim == 3 and output.shape[:2] == targets.shape:
        return F.cross_entropy(output.flatten(0, 1), targets.flatten())
    return F.cross_entropy(output, targets)


def token_losses(output: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Their sum and how many there are, of B x length x symbols."""
    flat = output.flatten(0, 1), targets.flatten()
    return F.cross_entropy(*flat, reduction="sum"), targets.numel()


def task(name: str, *, gpt2_batch: int = 32, tiny: bool = False) -> Task:
    """One of `NAMES`, the large ones with tiny models and data for a trial."""
    if name == "GPT-2 124M":
        return _gpt2(Shape(1, 2, 32, 16, 64) if tiny else Shape(), gpt2_batch)
    if name == "ResNet-18":
        return _resnet(8, 16, 16, 6) if tiny else _resnet(64, 32, 512, 20)
    return Task(works()[name])


def _gpt2(shape: Shape, batch_size: int, steps: int = 24) -> Task:
    draw = torch.Generator().manual_seed(1)
    # Some tokens are more frequent than others, so that there is something to learn.
    uniform = torch.rand(steps * batch_size, shape.context + 1, generator=draw)
    tokens = (shape.symbols * uniform**4).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    work = Work(_seeded(lambda: GPT(shape)), inputs, targets, batch_size, 3e-4)
    return Task(work, "bf16", decay=0.1)


def _resnet(width: int, side: int, batch_size: int, steps: int) -> Task:
    draw = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 10, (steps * batch_size,), generator=draw)
    # A pattern for each class, under noise.
    patterns = torch.randn(10, 3, side, side, generator=draw)
    inputs = torch.randn(len(targets), 3, side, side, generator=draw)
    inputs += 0.1 * patterns[targets]
    return Task(Work(_seeded(lambda: ResNet(width)), inputs, targets, batch_size, 1e-4))


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return make()

    return seeded
