"""The demo: a small conv net on handwritten digits, from data to curves."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossloop._baseline import data_facts
from lossloop._diagnosis import diagnose
from lossloop._fit import fit
from lossloop._works import conv_net
from lossloop.metrics import accuracy
from lossloop.optim import AdamW
from lossloop.schedules import cosine

MISSING = """\
The demo needs scikit-learn and matplotlib ({error}). Install them with

    python -m pip install -c tests/constraints.txt -e '.[demo]'
"""


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1,797 digits, B x 1 x 8 x 8 in [0, 1]: 80 % and 20 % held out."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, val = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return (
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[val], labels[val]),
    )


def demo(epochs: int, device: str, out: Path) -> str:
    """Trains, prints a line per epoch and what they say, writes the curves to `out`.

    Returns:
        How it ended.
    """
    try:
        train_set, val_set = digits(seed=0)
        import_module("matplotlib")  # fail before training, not after
    except ImportError as error:
        raise SystemExit(MISSING.format(error=error)) from error

    # Batches this small gain little from more threads, and lose much on a busy machine,
    # where the threads wait for one another.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = conv_net(dropout=0.25).to(device)
    train_loader = DataLoader(train_set, batch_size=64, shuffle=True)
    result = fit(
        model,
        nn.CrossEntropyLoss(),
        AdamW(lr=3e-3),
        train_loader,
        DataLoader(val_set, batch_size=256),
        epochs=epochs,
        scheduler=cosine(epochs * len(train_loader)),
        metrics={"accuracy": accuracy()},
        progress="plain",
    )
    facts = data_facts(model, nn.CrossEntropyLoss(), train_set.tensors, val_set.tensors)
    history = result.history
    history.plot(
        out, diagnosis=diagnose(history, facts=facts), title="Handwritten digits"
    )
    best = result.best_epoch or epochs
    row = history[best - 1]
    return (
        f"Best epoch {best}: accuracy {100 * row['val_accuracy']:.2f} %, validation "
        f"loss {row['val_loss']:.4f}. The model has its weights.\n"
        f"The curves are in {out}."
    )
