"""ResNet-18 for images of 32 x 32 in plain PyTorch: a stem of 3 x 3, no pooling."""

from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = 2  # in each of the four stages


def _conv(channels: int, width: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, width, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """Two convolutions, added to the input."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        """With a convolution beside them where the shape changes."""
        super().__init__()
        self.stride = stride
        self.conv1, self.norm1 = _conv(channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width), nn.BatchNorm2d(width)
        self.beside: nn.Sequential | None = None
        if channels != width:
            self.beside = nn.Sequential(
                _conv(channels, width, stride, 1), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Gives B x width x rows / stride x columns / stride."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        hidden = self.norm2(self.conv2(hidden))
        return F.relu(hidden + (x if self.beside is None else self.beside(x)))


class ResNet(nn.Module):
    """Four stages, each but the first with half the side and twice the width."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        """Of so many channels at first."""
        super().__init__()
        self.stem, self.norm = _conv(3, width), nn.BatchNorm2d(width)
        blocks, channels = [], width
        for stage in range(4):
            for place in range(BLOCKS):
                stride = 2 if stage and not place else 1
                blocks.append(Block(channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Gives B x classes."""
        x = F.relu(self.norm(self.stem(images)))
        return self.head(self.blocks(x).mean((2, 3)))
