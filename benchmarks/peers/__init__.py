"""The training loops that benchmarks/compare_peers.py times, one in each module.

Each has `train(work, model, epochs, *, shuffle=True)`. It trains the module, which is
its own, on all the data of the work, with cross entropy and Adam, and returns two
lists with a number for each epoch: the seconds that training took, and the mean loss.
"""

from typing import Any

from torch.utils.data import DataLoader, TensorDataset

from lossloop._works import Work

Epochs = tuple[list[float], list[float]]


def loader(work: Work, *, shuffle: bool) -> DataLoader[Any]:
    """The batches of a work, in a new order each time or as they come."""
    if shuffle:
        return work.loader()
    return DataLoader(TensorDataset(work.inputs, work.targets), work.batch_size)
