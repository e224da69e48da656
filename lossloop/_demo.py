"""The demo: a small conv net on handwritten digits, from data to curves."""

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lossloop._fit import EpochRecord, Result, fit
from lossloop._fold import fold_eval
from lossloop._history import History
from lossloop._objective import supervised
from lossloop._step import make_eval_step
from lossloop._works import conv_net

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


def is_right(output: Tensor, target: Tensor) -> Tensor:
    """1 for each sample whose class is right: a loss whose mean is the accuracy."""
    return (output.argmax(dim=1) == target).float()


def what_the_curves_say(history: History, best_epoch: int, chance: float) -> str:
    """One plain sentence about the training and the validation loss.

    Args:
        history: Of the run, with validation losses.
        best_epoch: The epoch of the lowest validation loss.
        chance: The loss of a model that knows only how often each class occurs.
    """
    last, best = history[-1], history[best_epoch - 1]
    if last["train_loss"] > 0.9 * chance:
        return (
            f"The training loss ({last['train_loss']:.3f}) hardly fell below that of "
            f"guessing ({chance:.3f}): the model is too simple, or the inputs hold no "
            f"information about the targets."
        )
    if best["val_loss"] > 0.9 * chance:
        return (
            f"The training loss fell to {last['train_loss']:.3f}, but the validation "
            f"loss never fell below that of guessing ({chance:.3f}): the model does "
            f"not generalise."
        )
    parted = last["val_loss"] > 1.2 * best["val_loss"]
    if parted and last["train_loss"] < best["train_loss"]:
        return (
            f"The curves part after epoch {best_epoch}: the training loss went on "
            f"falling while the validation loss rose from {best['val_loss']:.3f} to "
            f"{last['val_loss']:.3f}, so from there on the model overfits; the weights "
            f"of epoch {best_epoch} are restored."
        )
    return (
        f"Both losses fell far below that of guessing ({chance:.3f}), training to "
        f"{last['train_loss']:.3f} and validation to {best['val_loss']:.3f} without "
        f"rising again: the model fits the training data and generalises."
    )


def plot(result: Result, accuracy: list[float], path: Path) -> None:
    """Writes the loss curves, the best epoch marked, and the accuracy below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    history = result.history
    figure, (losses, right) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1), layout="constrained"
    )
    losses.plot(history["epoch"], history["train_loss"], "o-", label="training")
    losses.plot(history["epoch"], history["val_loss"], "s--", label="validation")
    if result.best_epoch is not None:
        losses.axvline(
            result.best_epoch, color="0.6", ls=":", label=f"best: {result.best_epoch}"
        )
    losses.set(yscale="log", ylabel="mean cross-entropy (nats)")
    losses.set_title(
        "Handwritten digits: training (weights moving) and validation loss"
    )
    losses.legend()
    right.plot(history["epoch"], [100 * a for a in accuracy], "s--", color="C1")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, right):
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def demo(epochs: int, device: str, out: Path) -> str:
    """Trains, prints a line per epoch, writes the curves to `out`.

    Returns:
        What the two curves say, in one sentence.
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train_loader = DataLoader(train_set, batch_size=64, shuffle=True)
    val_loader = DataLoader(val_set, batch_size=256)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=epochs * len(train_loader)
    )
    right_step = make_eval_step(supervised(model, is_right))
    accuracy: list[float] = []

    def print_line(record: EpochRecord) -> None:
        row = record.row
        accuracy.append(fold_eval(right_step, record.params, val_loader).value())
        print(  # noqa: T201  # a program speaks to its user
            f"Epoch {row['epoch']:{len(str(epochs))}}/{epochs}  "
            f"train_loss {row['train_loss']:.4f}  val_loss {row['val_loss']:.4f}  "
            f"accuracy {100 * accuracy[-1]:.2f} %  lr {row['lr']:.1e}  "
            f"{row['n_train'] / row['seconds']:,.0f} samples/s",
            flush=True,
        )

    result = fit(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        train_loader,
        val_loader,
        epochs=epochs,
        scheduler=scheduler,
        schedule_by="step",
        progress=False,
        on_epoch=print_line,
    )
    plot(result, accuracy, out)
    counts = torch.bincount(train_set.tensors[1]).double()
    frequencies = counts / counts.sum()
    chance = -(frequencies * frequencies.log()).sum().item()
    best = result.best_epoch or epochs
    said = what_the_curves_say(result.history, best, min(chance, math.log(10)))
    return (
        f"\nBest epoch {best}: accuracy {100 * accuracy[best - 1]:.2f} %, validation "
        f"loss {result.history[best - 1]['val_loss']:.4f}. The model has its weights.\n"
        f"{said}\nThe curves are in {out}."
    )
