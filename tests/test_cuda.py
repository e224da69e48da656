"""On a GPU: the same losses as on the CPU, wherever the batches come from."""

import copy

import pytest
import torch
from cases import CASES, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop._batches import transferred
from lossloop._memory import Indexed, read

CPU = torch.device("cpu")
X, Y = CASES["mlp"].batch(22)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LOADERS = {
    "in memory": lambda: DataLoader(TensorDataset(X, Y), 4),
    "samples": lambda: DataLoader(list(zip(X, Y, strict=True)), 4),
    "pinned": lambda: DataLoader(TensorDataset(X, Y), 4, pin_memory=True),
    "list": lambda: list(zip(X.split(4), Y.split(4), strict=True)),
}


def test_on_the_cpu_batches_are_handed_on_as_they_are():
    batches = [(X, Y), [Y]]
    assert all(
        one is other
        for one, other in zip(transferred(iter(batches), CPU), batches, strict=True)
    )
    passing = read(LOADERS["in memory"]())
    assert isinstance(passing, Indexed)
    passing.move(CPU)
    assert passing.tensors[0] is X


@gpu
@pytest.mark.parametrize("loader", LOADERS)
def test_batches_arrive_whole(loader):
    device = torch.device("cuda", torch.cuda.current_device())
    batches = LOADERS[loader]()
    moved = list(transferred(read(batches), device))
    for found, expected in zip(moved, batches, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert one.device == device
            assert one.cpu().equal(other)


@gpu
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fit_has_the_losses_of_the_cpu(loader, compile):
    model = mlp()
    histories = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model).to(device)
        result = ll.fit(
            own,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9),
            LOADERS[loader](),
            LOADERS[loader](),
            epochs=3,
            compile=compile,
            progress=False,
        )
        histories.append(result.history)
        assert next(own.parameters()).device.type == device
    for column in ("train_loss", "val_loss"):
        assert histories[1][column] == pytest.approx(histories[0][column], rel=1e-4)
