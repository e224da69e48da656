"""Runs whose trouble is known, and what `diagnose` says of them.

Question: of training runs that are healthy, overfit, without signal and so on by their
construction, how many does `diagnose` judge rightly from their curves? And how many do
the rules in common use: patience of 10 epochs, one rising epoch, five in a row?

What is true of a scenario, and which verdicts count as right, is written down in the
code below. The thresholds were set on seeds below 20; the record is of seeds 100 to
119, which nobody looked at before. Data come with scikit-learn, or are drawn.

    python benchmarks/diagnose_runs.py --output record.md
    python benchmarks/diagnose_runs.py --seeds 0 1 2 3 4 --curves curves.json
    python benchmarks/diagnose_runs.py --judge curves.json --only H1 O1
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from time import perf_counter
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop._baseline import data_facts
from lossloop._diagnosis import Diagnosis, Facts, diagnose
from lossloop._machine import machine

Samples = tuple[Tensor, Tensor]

# --- what is trained ------------------------------------------------------------------


@dataclass
class Work:
    """A run to be made.

    Attributes:
        model: To be trained.
        loss_fn: A loss of `torch.nn`.
        train: Inputs and targets.
        val: The same, held out.
        epochs: How many.
        optimizer: Over the parameters of `model`.
        batch_size: All samples if None.
        steps: Steps on all samples that make an epoch, without a batch size.
        scheduler: Of `optimizer`, stepped every epoch.
        shuffle: Whether the batches are drawn anew in every epoch.
    """

    model: nn.Module
    loss_fn: nn.Module
    train: Samples
    val: Samples
    epochs: int
    optimizer: torch.optim.Optimizer
    batch_size: int | None = None
    steps: int = 1
    scheduler: Any = None
    shuffle: bool = True

    def loader(self, seed: int) -> Any:
        """The training batches."""
        if self.batch_size is None:
            return [self.train] * self.steps
        return DataLoader(
            TensorDataset(*self.train),
            self.batch_size,
            shuffle=self.shuffle,
            generator=torch.Generator().manual_seed(seed),
        )


@cache
def bundled(name: str) -> Samples:
    """A data set of scikit-learn with standardised inputs, targets as they are."""
    bunch: Any = getattr(datasets, f"load_{name}")()
    x = torch.tensor(bunch.data, dtype=torch.float32)
    y = torch.tensor(bunch.target)
    if name == "digits":
        return x / 16, y
    return (x - x.mean(0)) / x.std(0), y


def split(samples: Samples, train: int, seed: int, val: int | None = None) -> Any:
    """Random samples for training, and others to hold out."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples[0]), generator=draw)
    end = len(order) if val is None else train + val
    parts = order[:train], order[train:end]
    return tuple(tuple(t[part] for t in samples) for part in parts)


def digits(seed: int, train: int = 1200) -> tuple[Samples, Samples]:
    """1,797 handwritten digits of 8 x 8 pixels, ten classes."""
    return split(bundled("digits"), train, seed)


def cancer(seed: int, train: int = 380) -> tuple[Samples, Samples]:
    """569 tumours of 30 numbers each, two classes."""
    x, y = bundled("breast_cancer")
    return split((x, y.float()[:, None]), train, seed)


def diabetes(seed: int, train: int = 300) -> tuple[Samples, Samples]:
    """442 patients of 10 numbers each; a standardised progression to predict."""
    x, y = bundled("diabetes")
    return split((x, ((y - y.mean()) / y.std()).float()[:, None]), train, seed)


def mlp(*widths: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers[: -2 if dropout else -1])


def adam(model: nn.Module, rate: float, decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)


def sgd(model: nn.Module, rate: float, momentum: float = 0.0) -> torch.optim.Optimizer:
    """Gradient descent."""
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)


def flipped(labels: Tensor, share: float, classes: int) -> Tensor:
    """Labels, this share of which are replaced by another class."""
    wrong = torch.rand(labels.shape) < share
    shift = torch.randint(1, classes, labels.shape).to(labels.dtype)
    return torch.where(wrong, (labels + shift) % classes, labels)


# --- the scenarios --------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A construction, and what is true of it.

    Attributes:
        make: The run of a seed; torch's generator is seeded with it beforehand.
        truth: The verdict that names what was done.
        accept: The other verdicts that are right.
        also: A check of the whole diagnosis against the record, and what it is called.
    """

    make: Callable[[int], Work]
    truth: str
    accept: tuple[str, ...] = ()
    also: tuple[str, Callable[[Diagnosis, dict[str, Any]], bool]] | None = None

    def is_right(self, verdict: str) -> bool:
        """Whether the verdict is true or may be given."""
        return verdict in (self.truth, *self.accept)


def h1(seed: int) -> Work:
    """Digits, MLP of 64 hidden units, weight decay 0.3."""
    train, val = digits(seed)
    model = mlp(64, 64, 10)
    loss_fn = nn.CrossEntropyLoss()
    return Work(model, loss_fn, train, val, 40, adam(model, 3e-3, 0.3), 128)


def h2(seed: int) -> Work:
    """Breast cancer, logistic regression, weight decay."""
    train, val = cancer(seed)
    model, loss_fn = nn.Linear(30, 1), nn.BCEWithLogitsLoss()
    return Work(model, loss_fn, train, val, 60, adam(model, 1e-2, 0.1), 64)


def h3(seed: int) -> Work:
    """Wine (178 samples), logistic regression, weight decay."""
    train, val = split(bundled("wine"), 120, seed)
    model, loss_fn = nn.Linear(13, 3), nn.CrossEntropyLoss()
    return Work(model, loss_fn, train, val, 60, adam(model, 1e-2, 0.1), 32)


def h4(seed: int) -> Work:
    """Diabetes, ridge regression: half of the variance is noise, which is no fault."""
    train, val = diabetes(seed)
    model = nn.Linear(10, 1)
    ridge = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1)
    return Work(model, nn.MSELoss(), train, val, 60, ridge, 64)


def h5(seed: int) -> Work:
    """Digits with dropout 0.5: the training loss stays above that of validation."""
    train, val = digits(seed)
    model = mlp(64, 64, 64, 10, dropout=0.5)
    return Work(model, nn.CrossEntropyLoss(), train, val, 80, adam(model, 2e-3), 128)


def h6(seed: int) -> Work:
    """Linear data of which inputs explain 9 %: a weak signal is a signal."""
    x = torch.randn(5000, 10)
    weight = torch.randn(10, 1)
    y = x @ (weight / weight.norm()) * math.sqrt(0.09 / 0.91) + torch.randn(5000, 1)
    train, val = split((x, y), 4000, seed)
    model = nn.Linear(10, 1)
    return Work(model, nn.MSELoss(), train, val, 40, adam(model, 1e-2), 250)


def h7(seed: int) -> Work:
    """Digits, a rate that drops in steps (even seeds) or as a cosine (odd seeds)."""
    train, val = digits(seed)
    model = mlp(64, 64, 10)
    optimizer = sgd(model, 0.3, 0.9)
    scheduler: Any = lr_scheduler.StepLR(optimizer, 12, 0.2)
    if seed % 2:
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 40)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    return Work(model, loss_fn, train, val, 40, optimizer, 128, scheduler=scheduler)


def xor(seed: int) -> tuple[Samples, Samples]:
    """Four clouds, opposite ones of a class: no line tells the classes apart."""
    x = torch.randn(2000, 2).sign()
    y = (x.prod(1) > 0).float()[:, None]
    return split((x + 0.3 * torch.randn(2000, 2), y), 1500, seed)


def u1(seed: int) -> Work:
    """XOR, linear model."""
    train, val = xor(seed)
    model, loss_fn = nn.Linear(2, 1), nn.BCEWithLogitsLoss()
    return Work(model, loss_fn, train, val, 40, adam(model, 1e-2), 250)


def u2(seed: int) -> Work:
    """Two circles, one inside the other, linear model."""
    x, y = datasets.make_circles(2000, noise=0.1, factor=0.5, random_state=seed)
    samples = torch.tensor(x).float(), torch.tensor(y).float()[:, None]
    train, val = split(samples, 1500, seed)
    model, loss_fn = nn.Linear(2, 1), nn.BCEWithLogitsLoss()
    return Work(model, loss_fn, train, val, 40, adam(model, 1e-2), 250)


def u3(seed: int) -> Work:
    """Digits, learning rate 1e-6."""
    train, val = digits(seed)
    model = mlp(64, 64, 10)
    return Work(model, nn.CrossEntropyLoss(), train, val, 20, adam(model, 1e-6), 128)


def u4(seed: int) -> Work:
    """Digits, stopped after 10 epochs of a small rate."""
    train, val = digits(seed)
    model = mlp(64, 64, 10)
    return Work(model, nn.CrossEntropyLoss(), train, val, 10, adam(model, 3e-4), 128)


def u5(seed: int) -> Work:
    """Digits whose pixels are all 0."""
    (x, y), (x_val, y_val) = digits(seed)
    train, val = (torch.zeros_like(x), y), (torch.zeros_like(x_val), y_val)
    model = mlp(64, 64, 10)
    return Work(model, nn.CrossEntropyLoss(), train, val, 20, adam(model, 1e-3), 128)


def u6(seed: int) -> Work:
    """Digits, hidden units that are dead from the start (biases -100)."""
    train, val = digits(seed)
    model = mlp(64, 64, 10)
    nn.init.constant_(model[0].bias, -100.0)
    return Work(model, nn.CrossEntropyLoss(), train, val, 20, adam(model, 1e-3), 128)


def n1(seed: int) -> Work:
    """Digits, shuffled labels, wide MLP."""
    (x, y), (x_val, y_val) = digits(seed)
    train = x, y[torch.randperm(len(y))]
    val = x_val, y_val[torch.randperm(len(y_val))]
    model = mlp(64, 512, 10)
    return Work(model, nn.CrossEntropyLoss(), train, val, 60, adam(model, 1e-3), 128)


def n2(seed: int) -> Work:
    """Diabetes, shuffled targets, wide MLP."""
    (x, y), (x_val, y_val) = diabetes(seed, 140)
    train = x, y[torch.randperm(len(y))]
    val = x_val, y_val[torch.randperm(len(y_val))]
    model = mlp(10, 512, 1)
    return Work(model, nn.MSELoss(), train, val, 100, adam(model, 2e-3), 64)


def n3(seed: int) -> Work:
    """Normal inputs, random labels, a model too small to learn them by heart."""
    samples = torch.randn(4000, 5), torch.randint(2, (4000, 1)).float()
    train, val = split(samples, 3000, seed)
    model, loss_fn = nn.Linear(5, 1), nn.BCEWithLogitsLoss()
    return Work(model, loss_fn, train, val, 40, adam(model, 1e-2), 250)


def o1(seed: int) -> Work:
    """20 digits, MLP of 256-256, 300 epochs."""
    train, val = split(bundled("digits"), 20, seed, 500)
    model = mlp(64, 256, 256, 10)
    return Work(model, nn.CrossEntropyLoss(), train, val, 300, adam(model, 3e-3))


def o2(seed: int) -> Work:
    """40 patients of the diabetes data, MLP."""
    train, val = diabetes(seed, 40)
    model = mlp(10, 128, 1)
    return Work(model, nn.MSELoss(), train, val, 300, adam(model, 2e-3))


def o3(seed: int) -> Work:
    """Breast cancer, 30 % of the training labels flipped, wide MLP."""
    (x, y), val = cancer(seed)
    train = x, flipped(y, 0.3, 2)
    model, loss_fn = mlp(30, 256, 1), nn.BCEWithLogitsLoss()
    return Work(model, loss_fn, train, val, 100, adam(model, 2e-3), 64)


def o4(seed: int) -> Work:
    """Polynomial of degree 15 through 20 noisy points, low powers learned first."""
    x = torch.rand(520, dtype=torch.float64) * 2 - 1
    y = torch.sin(3 * x) + 0.5 * torch.randn(520, dtype=torch.float64)
    powers = np.polynomial.legendre.legvander(x.numpy(), 15)
    scale = torch.arange(1, 17, dtype=torch.float64) ** -0.5
    features = torch.tensor(powers) * scale
    train, val = (features[:20], y[:20, None]), (features[20:], y[20:, None])
    model = nn.Linear(16, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    rate = 1 / steepness(train[0])
    return Work(model, nn.MSELoss(), train, val, 300, sgd(model, rate, 0.9))


def steepness(x: Tensor) -> float:
    """The largest curvature of the mean squared error of a linear model without bias.

    Gradient descent converges if, and only if, its rate is less than 2 over that.
    """
    return 2 * torch.linalg.matrix_norm(x.double(), 2).item() ** 2 / len(x)


def descent(seed: int, rate: float) -> Work:
    """Linear regression by gradient descent, its rate in units of 1 / steepness."""
    x = torch.randn(600, 8, dtype=torch.float64)
    y = x @ torch.randn(8, 1, dtype=torch.float64)
    y += 0.3 * torch.randn(600, 1, dtype=torch.float64)
    train, val = split((x, y), 400, seed)
    model = nn.Linear(8, 1, bias=False).double()
    optimizer = sgd(model, rate / steepness(train[0]))
    return Work(model, nn.MSELoss(), train, val, 60, optimizer)


def d1(seed: int) -> Work:
    """Linear regression, rate 10 % above the limit of gradient descent."""
    return descent(seed, 2.2)


def d2(seed: int) -> Work:
    """Linear regression, rate 5 % below the limit."""
    return descent(seed, 1.9)


def d3(seed: int) -> Work:
    """Digits, learning rate 1e20."""
    train, val = digits(seed)
    model = mlp(64, 64, 10)
    return Work(model, nn.CrossEntropyLoss(), train, val, 10, sgd(model, 1e20), 128)


def d4(seed: int) -> Work:
    """Diabetes, one target of the last batch of an epoch is NaN."""
    (x, y), val = diabetes(seed)
    y = y.clone()
    y[-1] = math.nan
    model = nn.Linear(10, 1)
    work = Work(model, nn.MSELoss(), (x, y), val, 10, adam(model, 1e-2))
    work.loader = lambda _: list(zip(x.split(64), y.split(64), strict=True))
    return work


def l1(seed: int) -> Work:
    """Digits, half of the validation samples copied from training."""
    train, (x_val, y_val) = digits(seed)
    half = len(x_val) // 2
    x_val = torch.cat([x_val[half:], train[0][:half]])
    y_val = torch.cat([y_val[half:], train[1][:half]])
    model, loss_fn = mlp(64, 64, 10), nn.CrossEntropyLoss()
    optimizer = adam(model, 3e-3, 0.3)
    return Work(model, loss_fn, train, (x_val, y_val), 30, optimizer, 128)


def l2(seed: int) -> Work:
    """Digits, 30 % of the training labels wrong and those of validation right."""
    (x, y), val = digits(seed)
    train = x, flipped(y, 0.3, 10)
    model, loss_fn = nn.Linear(64, 10), nn.CrossEntropyLoss()
    return Work(model, loss_fn, train, val, 40, adam(model, 1e-2, 0.1), 128)


def s1(seed: int) -> Work:
    """Digits, as H1, with 10 validation samples."""
    train, val = split(bundled("digits"), 1200, seed, 10)
    model, loss_fn = mlp(64, 64, 10), nn.CrossEntropyLoss()
    return Work(model, loss_fn, train, val, 40, adam(model, 3e-3, 0.3), 128)


def double_descent(seed: int, epochs: int, steps: int) -> Work:
    """Linear data whose weak features carry much of the signal, and are learned late.

    60 strong features of 100 samples are learned first, and then fitted to the noise,
    which the weak ones are a part of as long as they are not learned (Heckel and
    Yilmaz, Early stopping in deep networks: double descent and how to eliminate it,
    2021).
    """
    strength = torch.tensor([1.0] * 60 + [0.1] * 2, dtype=torch.float64)
    strong, weak = torch.randn(60, 1).double(), torch.randn(2, 1).double()
    effect = torch.cat([2.5 * strong / strong.norm(), 25 * weak / weak.norm()])
    x = torch.randn(600, 62, dtype=torch.float64) * strength
    y = x @ effect + 0.1 * torch.randn(600, 1, dtype=torch.float64)
    model = nn.Linear(62, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    train, val = (x[:100], y[:100]), (x[100:], y[100:])
    return Work(model, nn.MSELoss(), train, val, epochs, sgd(model, 0.1), steps=steps)


def s2a(seed: int) -> Work:
    """Epoch-wise double descent, stopped at the hump."""
    return double_descent(seed, epochs=30, steps=2)


def s2b(seed: int) -> Work:
    """Epoch-wise double descent, to its end, where validation is at its best."""
    return double_descent(seed, epochs=400, steps=15)


def first_bad_epoch(found: Diagnosis, record: dict[str, Any]) -> bool:
    """Whether the first epoch with a loss that is not finite is named."""
    pairs = zip(record["train_loss"], record["val_loss"], strict=True)
    bad = [not (math.isfinite(a) and math.isfinite(b)) for a, b in pairs]
    evidence = [f.evidence for f in found.findings if f.name == "nonfinite"]
    return any(e.get("epoch") == 1 + bad.index(True) for e in evidence)


def val_below_train(found: Diagnosis, record: dict[str, Any]) -> bool:
    """Whether it is noted that validation is easier than training."""
    return any(f.name == "val_below_train" for f in found.findings)


SCENARIOS = {
    "H1": Scenario(h1, "healthy"),
    "H2": Scenario(h2, "healthy", ("undertrained",)),
    "H3": Scenario(h3, "healthy", ("inconclusive",)),
    "H4": Scenario(h4, "healthy"),
    "H5": Scenario(h5, "healthy"),
    "H6": Scenario(h6, "healthy"),
    "H7": Scenario(h7, "healthy"),
    "U1": Scenario(u1, "no_progress"),
    "U2": Scenario(u2, "no_progress", ("healthy",)),
    "U3": Scenario(u3, "no_progress", ("undertrained",)),
    "U4": Scenario(u4, "undertrained"),
    "U5": Scenario(u5, "dead_input"),
    "U6": Scenario(u6, "dead_input"),
    "N1": Scenario(n1, "no_signal"),
    "N2": Scenario(n2, "no_signal"),
    "N3": Scenario(n3, "no_progress", ("no_signal",)),
    "O1": Scenario(o1, "overfit"),
    "O2": Scenario(o2, "overfit"),
    "O3": Scenario(o3, "overfit"),
    "O4": Scenario(o4, "overfit"),
    "D1": Scenario(d1, "diverging", ("nonfinite",)),
    "D2": Scenario(d2, "healthy", ("unstable",)),
    "D3": Scenario(d3, "nonfinite", (), ("names the first epoch", first_bad_epoch)),
    "D4": Scenario(d4, "nonfinite", (), ("names the first epoch", first_bad_epoch)),
    "L1": Scenario(l1, "leak_duplicates"),
    "L2": Scenario(l2, "healthy", (), ("notes val_below_train", val_below_train)),
    "S1": Scenario(s1, "healthy", ("inconclusive",)),
    "S2a": Scenario(s2a, "overfit"),
    "S2b": Scenario(s2b, "healthy"),
}

# --- training -------------------------------------------------------------------------


def record(name: str, seed: int) -> dict[str, Any]:
    """Trains, and returns the curves and the facts, to be stored."""
    start = perf_counter()
    torch.manual_seed(seed)
    work = SCENARIOS[name].make(seed)
    loader = work.loader(seed)
    frozen: list[float] = []
    per_sample: list[Tensor] = []

    def measure(row: ll.EpochRecord | None) -> None:
        work.model.eval()
        with torch.no_grad():
            frozen.append(losses_of(work, work.train).mean().item())
            per_sample.append(losses_of(work, work.val))
        work.model.train()

    measure(None)
    result = ll.fit(
        work.model,
        work.loss_fn,
        work.optimizer,
        loader,
        work.val,
        epochs=work.epochs,
        scheduler=work.scheduler,
        schedule_by=work.scheduler and "epoch",
        restore_best=False,
        compile=False,
        progress=False,
        seed=seed,
        on_epoch=measure,
    )
    val = torch.stack(per_sample).numpy()
    facts = data_facts(work.model, work.loss_fn, work.train, work.val)
    return {
        "scenario": name,
        "seed": seed,
        "train_loss": result.history["train_loss"],
        "val_loss": result.history["val_loss"],
        "frozen_train_loss": frozen[1:],
        "val_se": (val[1:].std(1, ddof=1) / math.sqrt(val.shape[1])).tolist(),
        "baseline": facts.baseline,
        "initial_val_loss": float(val[0].mean()),
        "facts": facts._replace(paired_z=paired_z(val[1:]))._asdict(),
        "seconds": perf_counter() - start,
    }


def losses_of(work: Work, samples: Samples) -> Tensor:
    """One loss per sample, in float64, in the mode the model is in."""
    inputs, targets = samples
    loss_fn = type(work.loss_fn)(reduction="none")
    if isinstance(work.loss_fn, nn.CrossEntropyLoss):
        loss_fn.label_smoothing = work.loss_fn.label_smoothing
    return loss_fn(work.model(inputs), targets).double().reshape(len(inputs))


def paired_z(losses: Any) -> float | None:
    """How surely the last epoch is worse than the best, in standard errors.

    The best epoch is chosen on one half of the samples and compared on the other, both
    ways round, so that the luck of the minimum does not count; the lesser is returned.

    Args:
        losses: Of every epoch and validation sample, shape (T, N).
    """
    if not np.isfinite(losses).all() or losses.shape[1] < 4:
        return None
    scores = []
    for chosen, other in ((0, 1), (1, 0)):
        best = losses[:, chosen::2].mean(1).argmin()
        rise = losses[-1, other::2] - losses[best, other::2]
        error = rise.std(ddof=1) / math.sqrt(len(rise))
        scores.append(float(rise.mean() / error) if error else 0.0)
    return min(scores)


# --- judging --------------------------------------------------------------------------


def judged(record: dict[str, Any], *, curves_only: bool = False) -> Diagnosis:
    """The diagnosis of a record: of all there is, or of two curves and the baseline."""
    facts = {
        name: value
        for name, value in record["facts"].items()
        if name in Facts._fields and not curves_only
    }
    return diagnose(
        {name: record[name] for name in ("train_loss", "val_loss")},
        baseline=record["baseline"] and tuple(record["baseline"]),
        initial_val_loss=None if curves_only else record["initial_val_loss"],
        frozen_train_loss=None if curves_only else record["frozen_train_loss"],
        val_se=None if curves_only else record["val_se"],
        facts=Facts(**facts),
    )


def patience_10(val: Sequence[float]) -> bool:
    """No new lowest validation loss for 10 epochs at some time."""
    best, since = math.inf, 0
    for value in val:
        best, since = (value, 0) if value < best else (best, since + 1)
        if since >= 10:
            return True
    return False


def rises(count: int) -> Callable[[Sequence[float]], bool]:
    """So many rising epochs in a row at some time."""

    def rule(val: Sequence[float]) -> bool:
        row = 0
        for before, after in pairwise(val):
            row = row + 1 if after > before else 0
            if row >= count:
                return True
        return False

    return rule


RULES: dict[str, Callable[[Sequence[float]], bool]] = {
    "patience of 10 epochs": patience_10,
    "one rising epoch": rises(1),
    "five rising epochs in a row": rises(5),
}


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, by Wilson's formula (1927)."""
    z = NormalDist().inv_cdf(0.975)
    share, scale = right / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return middle - half, middle + half


def shown(right: int, total: int) -> str:
    """Like `19 of 20, 95.0 % (76.4 to 99.1)`."""
    low, high = wilson(right, total)
    share = 100 * right / total
    return f"{right} of {total}, {share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def rise(record: dict[str, Any]) -> float:
    """How far the last validation losses lie above the lowest, in per cent of it."""
    val = record["val_loss"]
    tail = max(3, math.ceil(len(val) / 20))
    lowest = min(v for v in val if math.isfinite(v))
    return 100 * (float(np.median(val[-tail:])) / lowest - 1)


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of markdown, its columns aligned."""
    cells = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [cells[0], ["-" * width for width in widths], *cells[1:]]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


INTRODUCTION = """\
What `benchmarks/diagnose_runs.py` printed: runs whose trouble is known from their
construction, seeds {first} to {last}. In brackets, 95 % intervals by Wilson's formula.
A run is right if the verdict is the true one or another that was accepted beforehand.

- right: {right}
- right from the two curves and the baseline alone, in which dead inputs and copied
  samples do not show: {alone}
- false alarms on healthy runs: {alarms}
- promises: {promises}"""

WORST = """\
The worst seed is the one whose last validation losses lie highest above the lowest, or
least so where they should rise."""

COMMON = """\
How many runs each calls overfit at some time: of those that are, and of those that are
healthy or still improving, where it is a false alarm."""


@dataclass(frozen=True)
class Judged:
    """A run and its verdict."""

    record: dict[str, Any]
    found: Diagnosis

    @property
    def scenario(self) -> Scenario:
        """Of which it is a run."""
        return SCENARIOS[self.record["scenario"]]

    @property
    def right(self) -> bool:
        """Whether the verdict is one of the right ones."""
        return self.scenario.is_right(self.found.primary)


def scenario_row(name: str, runs: Sequence[Judged]) -> list[object]:
    """What the table says of the runs of a scenario."""
    scenario = runs[0].scenario
    counts = Counter(run.found.primary for run in runs)
    worst = ""
    if scenario.truth in ("healthy", "undertrained", "overfit"):
        extreme = min if scenario.truth == "overfit" else max
        most, seed = extreme((rise(run.record), run.record["seed"]) for run in runs)
        worst = f"{most:+.1f} %, seed {seed}"
    return [
        name,
        " ".join((scenario.make.__doc__ or "").split()).rstrip("."),
        ", ".join((scenario.truth, *scenario.accept)),
        f"{sum(run.right for run in runs)} of {len(runs)}",
        ", ".join(f"{verdict} {n}" for verdict, n in counts.most_common()),
        worst,
    ]


def report(records: Sequence[dict[str, Any]]) -> tuple[str, bool]:
    """Markdown, and whether the promises are kept."""
    runs = [Judged(r, judged(r)) for r in records]
    alone = [Judged(r, judged(r, curves_only=True)) for r in records]

    def count(of: Sequence[Judged]) -> tuple[int, int]:
        return sum(run.right for run in of), len(of)

    def of_truth(*truths: str) -> list[Judged]:
        return [run for run in runs if run.scenario.truth in truths]

    truths = sorted({run.scenario.truth for run in runs})
    verdicts = sorted({run.found.primary for run in runs} | {*truths})
    pairs = Counter((run.scenario.truth, run.found.primary) for run in runs)
    matrix = [[t, *(pairs[t, v] or "" for v in verdicts)] for t in truths]
    recalls = {truth: count(of_truth(truth)) for truth in truths}

    by_name: dict[str, list[Judged]] = {}
    for run in runs:
        by_name.setdefault(run.record["scenario"], []).append(run)
    checks = [
        f"- {name} {run.scenario.also[0]}: "
        f"{sum(run.scenario.also[1](r.found, r.record) for r in own)} of {len(own)}"
        for name, own in by_name.items()
        if (run := own[0]).scenario.also
    ]
    wrong = [
        f"- {run.record['scenario']}, seed {run.record['seed']}: {run.found}"
        for run in runs
        if not run.right
    ]

    overfit, fine = of_truth("overfit"), of_truth("healthy", "undertrained")
    common: dict[str, Callable[[Judged], bool]] = {
        "`diagnose`": lambda run: run.found.primary == "overfit"
    }
    for name, rule in RULES.items():
        common[name] = lambda run, rule=rule: rule(run.record["val_loss"])
    rules = [
        [name, *(f"{sum(map(rule, of))} of {len(of)}" for of in (overfit, fine))]
        for name, rule in common.items()
    ]

    healthy = of_truth("healthy")
    alarms = len(healthy) - count(healthy)[0]
    promises = {
        "at least 95 % right": count(runs)[0] >= 0.95 * len(runs),
        "at least 90 % of each class": all(n >= 0.9 * m for n, m in recalls.values()),
        "at most 5 % false alarms": alarms <= 0.05 * len(healthy),
    }
    seeds = sorted({run.record["seed"] for run in runs})
    introduction = INTRODUCTION.format(
        first=seeds[0],
        last=seeds[-1],
        right=shown(*count(runs)),
        alone=shown(*count(alone)),
        alarms=shown(alarms, len(healthy)) if healthy else "no healthy runs",
        promises=", ".join(
            f"{p}: {'kept' if k else 'BROKEN'}" for p, k in promises.items()
        ),
    )
    seconds = sum(run.record["seconds"] for run in runs)
    rows = [scenario_row(name, own) for name, own in by_name.items()]
    heads = ["", "construction", "right verdicts", "right", "verdicts", "worst seed"]
    parts = [
        f"# {date.today()}, what `diagnose` says of labelled runs",
        introduction,
        "## Truth against verdict",
        table(["truth", *verdicts], matrix),
        table(["truth", "right"], [[t, shown(*n)] for t, n in recalls.items()]),
        "## Scenarios",
        WORST,
        table(heads, rows),
        "\n".join(checks),
        "## Misjudged runs",
        "\n".join(wrong) or "None.",
        "## Rules in common use",
        COMMON,
        table(["rule", "overfit runs", "healthy and undertrained runs"], rules),
        "## Versions",
        f"{machine()}. Training took {seconds:.0f} s.",
    ]
    return "\n\n".join(part for part in parts if part), all(promises.values())


def main() -> None:
    """Trains, judges, prints, checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(100, 120)))
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--curves", type=Path, help="train only, and store here")
    parser.add_argument("--judge", type=Path, help="judge what was stored, only")
    parser.add_argument("--output", type=Path, help="write the report here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.judge:
        stored = json.loads(options.judge.read_text())
        records = [r for r in stored if r["scenario"] in options.only]
    else:
        records = [record(s, seed) for s in options.only for seed in options.seeds]
    if options.curves:
        options.curves.write_text(json.dumps(records))
        return
    text, kept = report(records)
    print(text)
    if options.output:
        options.output.write_text(f"{text}\n")
    if not kept:
        sys.exit("a promise is not kept")


if __name__ == "__main__":
    main()
