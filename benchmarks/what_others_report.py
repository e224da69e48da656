"""What other trainers report where the usual loop is wrong, next to the exact number.

Question: on ten small data sets whose mean loss is a fraction known beforehand, which
number do Lightning, Keras, skorch, Ignite, Accelerate, the loops that people write by
hand, and lossloop give?

Every number printed was measured in this run, each trainer used as its documentation
shows. Where it is wrong and there is an argument or a recipe that could put it right,
that is measured too. A trainer that is not installed is left out. Ends with an error
if lossloop's number is not the exact one.

    python -m pip install -c tests/constraints.txt -r benchmarks/peers.txt
    python benchmarks/what_others_report.py --out record.md
    python benchmarks/what_others_report.py --case "class weights" --only Keras Ignite
"""

import argparse
import contextlib
import io
import logging
import math
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import lossloop as ll
from lossloop._machine import processor

os.environ["KERAS_BACKEND"] = "torch"  # read when Keras is imported
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes started here
torch.set_num_threads(1)

PADDING = -1.0  # the targets of real tokens are not negative
IGNORED = -100  # the default ignore_index of torch
START = 64.0  # the weight before training; whole, so that updates are exact

# --- The cases ------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Samples of known losses, and what is asked about them.

    If `k` is 0, their mean loss: the model returns its input. Else how far one epoch of
    SGD with rate 1 moves the one weight of a model whose loss is `weight * mean(x)`,
    with `k` micro-batches an update.
    """

    x: Tensor
    y: Tensor
    exact: Fraction
    batch_size: int = 2
    loss: nn.Module = field(default_factory=nn.L1Loss)
    pair: Callable[..., Any] | None = None  # the loss for lossloop, if not `loss`
    weight: Callable[[Tensor], Any] = len  # of a batch's targets, in `loss`
    k: int = 0
    shards: bool = False  # two processes share the data
    trouble: str = "weights"  # else "float32" or "bfloat16"
    other: Fraction | None = None  # the mean by another definition that makes sense

    def data(self) -> TensorDataset:
        """The samples."""
        return TensorDataset(self.x, self.y)

    def loader(self) -> DataLoader[Any]:
        """The samples in batches and in order."""
        return DataLoader(self.data(), self.batch_size)

    def own_loader(self, rank: int) -> DataLoader[Any]:
        """Every other sample: shards of 3 and 2, none of them twice."""
        own = range(rank, len(self.x), 2)
        return DataLoader(Subset(self.data(), own), self.batch_size)

    def in_float32(self) -> "Case":
        """The same, for trainers that lower the precision themselves."""
        return replace(self, x=self.x.float())

    def model(self) -> nn.Linear:
        """The identity, or a single weight to train."""
        width = self.x.shape[-1]
        model = nn.Linear(width, width, bias=False, dtype=self.x.dtype)
        model.weight.data = torch.eye(width, dtype=self.x.dtype)
        if self.k:
            model.weight.data *= START
        return model

    def moved(self, model: nn.Module) -> float:
        """What training has taken off the weight."""
        return START - next(model.parameters()).item()


def mean_of(losses: Sequence[int], weights: Sequence[int] | None = None) -> Fraction:
    """The exact mean, of integers."""
    weights = weights or [1] * len(losses)
    products = zip(weights, losses, strict=True)
    return Fraction(sum(w * loss for w, loss in products), sum(weights))


def regression(losses: Sequence[int], **fields: Any) -> Case:
    """Outputs whose absolute errors are these losses."""
    x = torch.tensor(losses).float()[:, None]
    return Case(x, torch.zeros_like(x), **{"exact": mean_of(losses)} | fields)


def classes(losses: Sequence[int], labels: Sequence[int], **fields: Any) -> Case:
    """Log-probabilities whose negative log-likelihoods are these losses.

    They are normalised, so that a cross-entropy finds the same losses in them.
    """
    y = torch.tensor(labels)
    loss = torch.tensor(losses, dtype=torch.float64)
    x = torch.log1p(-torch.exp(-loss))[:, None].repeat(1, 2)
    x[torch.arange(len(y)), y.clamp(min=0)] = -loss
    usual = {"exact": mean_of(losses), "loss": nn.NLLLoss()}
    return Case(x.float(), y, **usual | fields)


def masked_pair(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of absolute errors over the tokens that are not padding, and their number."""
    real = target != PADDING
    return ((output - target).abs() * real).sum(), real.sum()


class MaskedL1(nn.Module):
    """Their mean: the loss as users write it for padded batches."""

    reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar."""
        loss_sum, n = masked_pair(output, target)
        return loss_sum / n


def tokens(sequences: Sequence[Sequence[int]], **fields: Any) -> Case:
    """Padded sequences, the absolute errors of whose tokens are these losses."""
    longest = max(map(len, sequences))
    rows = [[*s, *[PADDING] * (longest - len(s))] for s in sequences]
    x = torch.tensor(rows)[..., None]
    exact = mean_of([loss for s in sequences for loss in s])
    usual: dict[str, Any] = {"loss": MaskedL1(), "pair": masked_pair, "exact": exact}
    usual["weight"] = lambda y: (y != PADDING).sum()
    return Case(x, torch.where(x == PADDING, PADDING, 0.0), **usual | fields)


def smaller_last_batch() -> Case:
    """The mean loss of 5 samples, in batches of 2."""
    return regression([1, 1, 1, 1, 9])


def class_weights() -> Case:
    """The mean loss of 6 samples, those of class 1 counting three times."""
    losses, labels = [1, 2, 1, 4, 5, 7], [0, 0, 0, 1, 1, 1]
    per_class = torch.tensor([1.0, 3.0])
    weights = [(1, 3)[label] for label in labels]
    return classes(
        losses,
        labels,
        loss=nn.NLLLoss(weight=per_class),
        exact=mean_of(losses, weights),
        weight=lambda y: per_class[y].sum(),
        other=mean_of([w * n for w, n in zip(weights, losses, strict=True)]),
    )


def ignore_index() -> Case:
    """The mean loss of the 5 targets of 8 that are not -100, in batches of 4."""
    losses = [1, 1, 2, 2, 1, 1, 1, 8]
    labels = [0, 1, 0, 1, IGNORED, IGNORED, IGNORED, 1]
    exact = mean_of(losses, [int(label != IGNORED) for label in labels])
    fields = {"batch_size": 4, "weight": lambda y: (y != IGNORED).sum()}
    return classes(losses, labels, exact=exact, **fields)


def variable_length() -> Case:
    """The mean loss of the 8 tokens of 4 padded sequences, in batches of 2."""
    return tokens([[1, 1, 1, 1], [1, 1], [7], [3]])


def uneven_micro_batches() -> Case:
    """The update of a batch of 5, made in micro-batches of 3 and 2."""
    return regression([1, 1, 4, 10, 4], batch_size=3, k=2)


def uneven_tokens() -> Case:
    """The update of a batch of 4 sequences, in micro-batches of 6 tokens and of 2."""
    return tokens([[1, 1, 1, 1], [1, 1], [7], [3]], k=2)


def short_last_window() -> Case:
    """The updates of batches of 4 and 2, in micro-batches of 2: two, and one."""
    x = [1, 5, 2, 4, 5, 7]
    return regression(x, k=2, exact=mean_of(x[:4]) + mean_of(x[4:]))


def uneven_shards() -> Case:
    """The mean loss of 5 samples that two processes (gloo) share."""
    return regression([1, 1, 1, 1, 9], batch_size=3, shards=True)


def float32_sum() -> Case:
    """The mean loss of 4097 samples, one by one, the first an outlier of 2**24."""
    return regression([2**24] + [1] * 4096, batch_size=1, trouble="float32")


def bfloat16_model() -> Case:
    """The mean loss of 4 samples, the model in bfloat16, where 4096 + 16 is 4096."""
    case = classes([4096, 16, 16, 16], [0, 1, 0, 1], trouble="bfloat16")
    return replace(case, x=case.x.bfloat16())


CASES: dict[str, Callable[[], Case]] = {
    "smaller last batch": smaller_last_batch,
    "class weights": class_weights,
    "ignore_index": ignore_index,
    "variable length": variable_length,
    "uneven micro-batches": uneven_micro_batches,
    "uneven tokens": uneven_tokens,
    "short last window": short_last_window,
    "uneven shards": uneven_shards,
    "float32 sum": float32_sum,
    "bfloat16 model": bfloat16_model,
}

# --- The trainers ---------------------------------------------------------------------


class NoNumberError(Exception):
    """The trainer has nothing for this case; the message says why."""


class _Trainer:
    """A column: `evaluate` and `shard` give a mean loss, `accumulate` what SGD moved.

    `shard` runs in each of two processes. `tuned` asks for the argument or the recipe
    that could put a wrong number right. `how` and `tuning` say what was run.
    """

    package = "torch"
    how: str
    tuning = ""  # empty if there is nothing
    no_shards = ""  # why, if it cannot
    no_tuned_accumulation = ""  # the same

    def __init__(self, *, tuned: bool) -> None:
        self.tuned = tuned

    def number(self, case: Case) -> float:
        if case.k and self.tuned and self.no_tuned_accumulation:
            raise NoNumberError(self.no_tuned_accumulation)
        return float(self.accumulate(case) if case.k else self.evaluate(case))

    def evaluate(self, case: Case) -> float:
        raise NotImplementedError

    accumulate = shard = evaluate


class _ByHand(_Trainer):
    how = (
        "`loss.item() * inputs.size(0)` added up, over `len(dataset)`. Accumulation: "
        "`(loss / k).backward()`, a step after every k batches and after the last. "
        "Shards: `DistributedSampler`, and the average of both processes."
    )

    def evaluate(self, case: Case) -> float:
        return self._mean(case, case.loader())

    def _mean(self, case: Case, loader: DataLoader[Any]) -> float:
        model, total, size = case.model(), 0.0, 0
        with torch.no_grad():
            for x, y in loader:
                total += case.loss(model(x), y).item() * x.size(0)
                size += x.size(0)
        return total / size

    def accumulate(self, case: Case) -> float:
        model, loader = case.model(), case.loader()
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        for i, (x, y) in enumerate(loader, start=1):
            (case.loss(model(x), y) / case.k).backward()
            if i % case.k == 0 or i == len(loader):
                sgd.step()
                sgd.zero_grad()
        return case.moved(model)

    def shard(self, case: Case) -> float:
        dist.init_process_group("gloo")
        sampler = DistributedSampler(case.data(), shuffle=False)
        loader = DataLoader(case.data(), case.batch_size, sampler=sampler)
        mean = torch.tensor(self._mean(case, loader))
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size()


class _MeanOfMeans(_ByHand):
    how = "`loss.item()` added up, over `len(loader)`. The rest is the usual loop's."

    def _mean(self, case: Case, loader: DataLoader[Any]) -> float:
        model = case.model()
        with torch.no_grad():
            means = [case.loss(model(x), y).item() for x, y in loader]
        return sum(means) / len(means)


class _Lossloop(_Trainer):
    package = "lossloop"
    how = (
        "`fold_eval` of `make_eval_step`; for tokens, a loss that returns "
        "`(loss_sum, n)`. Accumulation: `make_step(..., accumulate=k)` on the whole "
        "batches. Shards: `data[rank::2]`, and `Mean.merge` of both means."
    )

    def evaluate(self, case: Case) -> float:
        return self._mean(case, case.loader()).value()

    def _mean(self, case: Case, loader: DataLoader[Any]) -> ll.Mean:
        goal = ll.supervised(case.model(), case.pair or case.loss)
        return ll.fold_eval(ll.make_eval_step(goal), goal.init(), loader)

    def accumulate(self, case: Case) -> float:
        model, sgd = case.model(), ll.optim.SGD(lr=1.0)
        goal = ll.supervised(model, case.pair or case.loss)
        step = ll.make_step(goal, sgd, accumulate=case.k)
        loader = DataLoader(case.data(), case.batch_size * case.k)
        params, _, _ = ll.fold(step, *ll.init(goal, sgd), loader)
        ll.load_params(model, params)
        return case.moved(model)

    def shard(self, case: Case) -> float:
        dist.init_process_group("gloo")
        means: list[Any] = [None, None]
        own = self._mean(case, case.own_loader(dist.get_rank()))
        dist.all_gather_object(means, own)
        return means[0].merge(means[1]).value()


class _Lightning(_Trainer):
    package = "lightning"
    how = (
        '`self.log("val_loss", loss)` in `validation_step`, `Trainer.validate`. '
        "Accumulation: `accumulate_grad_batches=k`. Shards: `devices=2, "
        'strategy="ddp"` and `sync_dist=True`. bfloat16: `precision="bf16-true"`.'
    )
    tuning = (
        "`self.log(..., batch_size=...)` with the sum of the weights. Shards: "
        "`use_distributed_sampler=False` and `data[rank::2]`. "
        'float32 sum: `precision="64-true"`. bfloat16: `precision="bf16-mixed"`.'
    )
    no_tuned_accumulation = (
        "Lightning's other way, manual optimization, is a loop of one's own."
    )

    def _trainer(self, **options: Any) -> Any:
        from lightning.pytorch import Trainer

        off = ["checkpointing", "progress_bar", "model_summary"]
        quiet = dict.fromkeys([f"enable_{name}" for name in off], False)
        return Trainer(accelerator="cpu", logger=False, **quiet, **options)

    def _module(self, case: Case, **log: Any) -> Any:
        from lightning.pytorch import LightningModule

        tuned = self.tuned

        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = case.model()

            def training_step(self, batch: Any) -> Tensor:
                return case.loss(self.model(batch[0]), batch[1])

            def validation_step(self, batch: Any) -> None:
                x, y = batch
                size = {"batch_size": float(case.weight(y))} if tuned else {}
                self.log("val_loss", case.loss(self.model(x), y), **size, **log)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=1.0)

        return Module()

    def evaluate(self, case: Case) -> float:
        precision = "bf16-true" if case.trouble == "bfloat16" else "32-true"
        if self.tuned:
            others = {"bfloat16": "bf16-mixed", "float32": "64-true"}
            precision = others.get(case.trouble, precision)
        case = case.in_float32()
        trainer = self._trainer(devices=1, precision=precision)
        module = self._module(case)
        return trainer.validate(module, case.loader(), verbose=False)[0]["val_loss"]

    def accumulate(self, case: Case) -> float:
        module = self._module(case)
        trainer = self._trainer(devices=1, max_epochs=1, accumulate_grad_batches=case.k)
        trainer.fit(module, case.loader())
        return case.moved(module)

    def shard(self, case: Case) -> float:
        options: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
        module, loader = self._module(case, sync_dist=True), case.loader()
        if self.tuned:
            options["use_distributed_sampler"] = False
            loader = case.own_loader(int(os.environ["RANK"]))
        trainer = self._trainer(**options)
        return trainer.validate(module, loader, verbose=False)[0]["val_loss"]


class _Keras(_Trainer):
    package = "keras"
    how = (
        "`evaluate` on the torch backend. Class weights: `sample_weight`, as "
        "`class_weight` is of `fit` alone. Ignored targets: `ignore_class` of "
        "`SparseCategoricalCrossentropy`. Tokens: a `Masking` layer. Accumulation: "
        "`fit`, and `gradient_accumulation_steps=k` of the optimizer; its windows run "
        "on into the next epoch. bfloat16: the dtype policy of the layers."
    )
    tuning = (
        '`weighted_metrics=` with the loss as a metric, of `dtype="float64"`. Ignored '
        "targets: `sample_weight` 0."
    )
    no_shards = (
        "`keras.distribution.initialize` has no implementation for the torch backend; "
        "Keras' guide to several devices with PyTorch is a loop of one's own."
    )
    no_tuned_accumulation = "Keras has no other way within `fit`."

    def _model(self, case: Case) -> Any:
        import keras

        masked = isinstance(case.loss, MaskedL1)
        layers = [keras.layers.Masking(PADDING)] if masked else []
        kernel = keras.initializers.Identity(START if case.k else 1.0)
        dtype = "bfloat16" if case.trouble == "bfloat16" else "float32"
        options = {"use_bias": False, "kernel_initializer": kernel, "dtype": dtype}
        layers.append(keras.layers.Dense(case.x.shape[-1], **options))
        return keras.Sequential([keras.Input(case.x.shape[1:]), *layers])

    def evaluate(self, case: Case) -> float:
        import keras

        x, y, weight = case.x.float().numpy(), case.y.numpy(), None
        loss, metric = keras.losses.MeanAbsoluteError, keras.metrics.MeanAbsoluteError
        options: dict[str, Any] = {}
        if isinstance(case.loss, nn.NLLLoss):
            loss = keras.losses.SparseCategoricalCrossentropy
            metric = keras.metrics.SparseCategoricalCrossentropy
            options["from_logits"] = True
            if case.loss.weight is not None:
                weight = case.loss.weight[case.y].numpy()
            elif self.tuned:
                weight, y = (y != IGNORED).astype("float32"), y.clip(min=0)
            elif (y == IGNORED).any():
                options["ignore_class"] = IGNORED
        tuned = metric(**options, dtype="float64", name="tuned")
        model = self._model(case)
        model.compile(
            loss=loss(**options), weighted_metrics=[tuned] if self.tuned else None
        )
        logs = model.evaluate(
            x, y, case.batch_size, verbose=0, sample_weight=weight, return_dict=True
        )
        return logs["tuned" if self.tuned else "loss"]

    def accumulate(self, case: Case) -> float:
        import keras

        model = self._model(case)
        sgd = keras.optimizers.SGD(1.0, gradient_accumulation_steps=case.k)
        model.compile(sgd, loss="mae")
        x, y = case.x.numpy(), case.y.numpy()
        model.fit(x, y, case.batch_size, shuffle=False, verbose=0)
        return START - model.get_weights()[0].item()


class _Skorch(_Trainer):
    package = "skorch"
    how = (
        "`NeuralNet.fit` at rate 0 with `predefined_split`, `valid_loss` of the "
        "history. Accumulation: nothing built in; the recipe of its FAQ, which leaves "
        "the step after a short last window to the reader. Shards: `AccelerateMixin`, "
        "and the history of process 0."
    )
    tuning = (
        "`EpochScoring` of the loss over all outputs. Accumulation: `AccelerateMixin` "
        "with `gradient_accumulation_steps=k`."
    )

    def _fit(self, case: Case, net: Any, **options: Any) -> Any:
        options |= {"max_epochs": 1, "batch_size": case.batch_size, "verbose": 0}
        return net(case.model(), case.loss, **options).fit(case.data())

    def _accelerated(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        from skorch import NeuralNet
        from skorch.hf import AccelerateMixin

        net = type("Net", (AccelerateMixin, NeuralNet), {})
        return net, {"accelerator": _accelerator(**options)}

    def evaluate(self, case: Case) -> float:
        from skorch import NeuralNet

        return self._valid_loss(case, NeuralNet)

    def _valid_loss(self, case: Case, net: Any, **options: Any) -> float:
        from skorch.callbacks import EpochScoring
        from skorch.dataset import Dataset
        from skorch.helper import predefined_split

        def whole(net: Any, data: Any, y: Any) -> float:
            return net.criterion_(net.forward(data), torch.as_tensor(y)).item()

        options["train_split"] = predefined_split(Dataset(case.x, case.y))
        if self.tuned:
            scoring = EpochScoring(whole, name="tuned", use_caching=False)
            options["callbacks"] = [scoring]
        net = self._fit(case, net, lr=0.0, **options)
        return net.history[-1, "tuned" if self.tuned else "valid_loss"]

    def accumulate(self, case: Case) -> float:
        from skorch import NeuralNet

        class FromFAQ(NeuralNet):
            def get_loss(self, *args: Any, **options: Any) -> Tensor:
                return super().get_loss(*args, **options) / case.k

            def train_step(self, batch: Any, **options: Any) -> Any:
                result = self.train_step_single(batch, **options)
                if len(self.history[-1, "batches"]) % case.k == 0:
                    self.optimizer_.step()
                    self.optimizer_.zero_grad()
                return result

        net, options = FromFAQ, {}
        if self.tuned:
            net, options = self._accelerated(gradient_accumulation_steps=case.k)
        net = self._fit(case, net, lr=1.0, train_split=None, **options)
        return case.moved(net.module_)

    def shard(self, case: Case) -> float:
        class Criterion:  # On CPUs, Accelerate refuses modules without parameters.
            def __call__(self, output: Tensor, target: Tensor) -> Tensor:
                return nn.functional.l1_loss(output, target)

        net, options = self._accelerated()
        case = replace(case, loss=Criterion)
        return self._valid_loss(case, net, **options)


class _Ignite(_Trainer):
    package = "pytorch-ignite"
    how = (
        "`create_supervised_evaluator` with `metrics.Loss`. Accumulation: "
        "`create_supervised_trainer(..., gradient_accumulation_steps=k)`; its windows "
        "run on into the next epoch. Shards: `idist.Parallel` and "
        "`idist.auto_dataloader`."
    )
    tuning = (
        "`Loss(..., batch_size=...)` with the sum of the weights. Shards: "
        "`data[rank::2]` instead of `auto_dataloader`. float32 sum and bfloat16: "
        "`metrics.Average` of the losses of the samples."
    )
    no_tuned_accumulation = "Ignite has no other way within its trainer."

    def evaluate(self, case: Case) -> float:
        return self._mean(case, case.loader())

    def _mean(self, case: Case, loader: DataLoader[Any]) -> float:
        from ignite.engine import create_supervised_evaluator
        from ignite.metrics import Average, Loss

        def losses(output: Any) -> Tensor:
            each = type(case.loss)(reduction="none")
            return each(*output).reshape(-1, 1)  # `Average` counts rows

        metric: Any = Loss(case.loss)
        if self.tuned and case.trouble != "weights":
            metric = Average(output_transform=losses)
        elif self.tuned:
            metric = Loss(case.loss, batch_size=lambda y: float(case.weight(y)))
        engine = create_supervised_evaluator(case.model(), metrics={"loss": metric})
        return float(engine.run(loader).metrics["loss"])

    def accumulate(self, case: Case) -> float:
        from ignite.engine import create_supervised_trainer

        model = case.model()
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        engine = create_supervised_trainer(
            model, sgd, case.loss, gradient_accumulation_steps=case.k
        )
        engine.run(case.loader(), max_epochs=1)
        return case.moved(model)

    def shard(self, case: Case) -> float:
        import ignite.distributed as idist

        numbers = []

        def run(rank: int) -> None:
            loader = case.own_loader(rank)
            if not self.tuned:
                size = case.batch_size * idist.get_world_size()  # it divides by that
                loader = idist.auto_dataloader(
                    case.data(), batch_size=size, shuffle=False
                )
            numbers.append(self._mean(case, loader))

        with idist.Parallel(backend="gloo") as parallel:
            parallel.run(run)
        return numbers[0]


def _accelerator(**options: Any) -> Any:
    """A fresh Accelerator; all in one process share its settings otherwise."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


class _Accelerate(_Trainer):
    package = "accelerate"
    how = (
        "no loss of its own; as in its examples, `total_loss += loss.detach().float()` "
        "over `len(dataloader)`, here at rate 0. Accumulation: `accumulate(model)`. "
        'Shards: the number of process 0. bfloat16: `mixed_precision="bf16"`.'
    )
    tuning = (
        "the loss of all outputs and targets of `gather_for_metrics` at once. "
        "Accumulation: the loop of its guide for samples of variable size."
    )

    def evaluate(self, case: Case) -> float:
        mixed = "bf16" if case.trouble == "bfloat16" else "no"
        accelerator, case = _accelerator(mixed_precision=mixed), case.in_float32()
        model = case.model()
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        model, sgd, loader = accelerator.prepare(model, sgd, case.loader())
        if self.tuned:
            with torch.no_grad():
                pairs = [
                    accelerator.gather_for_metrics((model(x), y)) for x, y in loader
                ]
            outputs, targets = map(torch.cat, zip(*pairs, strict=True))
            return case.loss(outputs, targets).item()
        total: Any = 0
        for x, y in loader:
            loss = case.loss(model(x), y)
            total += loss.detach().float()
            accelerator.backward(loss)
            sgd.step()
            sgd.zero_grad()
        return total.item() / len(loader)

    shard = evaluate  # the same script

    def accumulate(self, case: Case) -> float:
        accelerator = _accelerator(gradient_accumulation_steps=case.k)
        model = case.model()
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        model, sgd, loader = accelerator.prepare(model, sgd, case.loader())
        if not self.tuned:
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(case.loss(model(x), y))
                    sgd.step()
                    sgd.zero_grad()
            return case.moved(model)
        batches = iter(loader)
        for left in range(len(loader), 0, -case.k):
            window = [next(batches) for _ in range(min(case.k, left))]
            total = sum(case.weight(y) for _, y in window)
            for x, y in window:
                loss_sum = case.loss(model(x), y) * case.weight(y)
                # `backward` divides by k, whatever the length of the window.
                accelerator.backward(loss_sum * case.k / total)
            sgd.step()
            sgd.zero_grad()
        return case.moved(model)


TRAINERS: dict[str, type[_Trainer]] = {
    "usual loop": _ByHand,
    "mean of means": _MeanOfMeans,
    "lossloop": _Lossloop,
    "Lightning": _Lightning,
    "Keras": _Keras,
    "skorch": _Skorch,
    "Ignite": _Ignite,
    "Accelerate": _Accelerate,
}

# --- The run --------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, logs or warnings of the trainers, and no files left behind."""
    home, silent = Path.cwd(), io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(silent),
        contextlib.redirect_stderr(silent),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        os.chdir(folder)
        os.environ["KERAS_HOME"] = folder
        try:
            yield
        finally:
            os.chdir(home)
            logging.disable(logging.NOTSET)


def in_two_processes(trainer: str, case: str, *, tuned: bool) -> float:
    """`shard` of the trainer as torchrun runs a script; the number of process 0."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        logs_specs=DefaultLogsSpecs(log_dir=str(Path.cwd()), redirects=Std.ALL),
        max_restarts=0,
        monitor_interval=0.1,
    )
    return elastic_launch(config, one_process)(trainer, case, {"tuned": tuned})[0]


def one_process(trainer: str, case: str, options: dict[str, bool]) -> float:
    """One of the two."""
    with quiet():
        return float(TRAINERS[trainer](**options).shard(CASES[case]()))


def measure(trainer: str, name: str, *, tuned: bool = False) -> float | str:
    """The number that a trainer reports, or why there is none."""
    column, case = TRAINERS[trainer], CASES[name]()
    try:
        with quiet():
            if not case.shards:
                return column(tuned=tuned).number(case)
            return column.no_shards or in_two_processes(trainer, name, tuned=tuned)
    except NoNumberError as reason:
        return str(reason)
    except Exception as error:
        if trainer == "lossloop":
            raise
        return f"{trainer} fails: {type(error).__name__}: {error}".splitlines()[0]


def is_right(value: float | str, exact: Fraction | None) -> bool:
    """To the rounding of float32 losses, which is what the others compute in."""
    numbers = isinstance(value, float) and exact is not None
    return numbers and math.isclose(value, exact, rel_tol=1e-5)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of markdown, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    padded = [map(str.ljust, line, widths) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


LEGEND = """\
✗: wrong by more than 1e-5 of the number. †: exact by another definition, the sum of
weighted losses over the number of samples. lossloop's numbers are the exact ones to the
last bit; the script fails if not.

For the cases of accumulation the number is not a loss but what one epoch of SGD with
rate 1 takes off the weight: the sum of the gradients of its updates."""

SECOND = """\
Where a number is wrong, the same with the argument or the recipe that could put it
right (below):"""


def report(cases: Sequence[str], trainers: Sequence[str]) -> tuple[str, list[str]]:
    """Measures. Returns markdown, and the cases that lossloop has wrong."""
    packages = {trainer: TRAINERS[trainer].package for trainer in trainers}
    versions = {"torch": torch.__version__}
    for package in packages.values():
        with contextlib.suppress(PackageNotFoundError):
            versions.setdefault(package, version(package))
    trainers = [t for t in trainers if packages[t] in versions]
    absent = [t for t in packages if t not in trainers]
    exact = {name: CASES[name]().exact for name in cases}
    plain = {(c, t): measure(t, c) for c in cases for t in trainers}
    tuned = {
        (c, t): measure(t, c, tuned=True)
        for (c, t), value in plain.items()
        if TRAINERS[t].tuning
        and isinstance(value, float)
        and not is_right(value, exact[c])
    }
    retried = {trainer for _, trainer in tuned}
    notes: list[str] = []

    def cell(case: str, value: float | str | None) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            notes.extend([value] * (value not in notes))
            return f"none [{notes.index(value) + 1}]"
        if is_right(value, exact[case]):
            return f"{value:.6g}"
        return f"{value:.6g} {'†' if is_right(value, CASES[case]().other) else '✗'}"

    def numbers(measured: dict[tuple[str, str], float | str]) -> str:
        columns = [t for t in trainers if any(t == key[1] for key in measured)]
        rows = [
            [c, f"{float(exact[c]):.6g}"]
            + [cell(c, measured.get((c, t))) for t in columns]
            for c in cases
            if any(c == key[0] for key in measured)
        ]
        return table(["case", "exact", *columns], rows)

    parts = [f"# {date.today()}, what others report"]
    parts += ["What `benchmarks/what_others_report.py` printed.", numbers(plain)]
    parts += [f"Not installed: {', '.join(absent)}."] if absent else []
    parts += [LEGEND, SECOND, numbers(tuned)] if tuned else [LEGEND]
    parts += [f"[{i}] {note}" for i, note in enumerate(notes, start=1)]
    wishes = [f"- {name}: {CASES[name].__doc__}" for name in cases]
    hows = [f"- {t}: {TRAINERS[t].how}" for t in trainers]
    parts += ["## The cases", "\n".join(wishes)]
    parts += ["## How each was run", "\n".join(hows)]
    if tuned:
        hows = [f"- {t}: {c.tuning}" for t, c in TRAINERS.items() if t in retried]
        parts += ["In the second table:", "\n".join(hows)]
    built = ", ".join(f"{package} {number}" for package, number in versions.items())
    machine = f"Python {platform.python_version()}, {built}; {processor()}."
    parts += ["## Versions", machine]
    wrong = [c for c in cases if plain[c, "lossloop"] != float(exact[c])]
    return "\n\n".join(parts), wrong


def main() -> None:
    """Measures, prints, checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here too")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    options = parser.parse_args()
    trainers = [t for t in TRAINERS if t in {*options.only, "lossloop"}]
    text, wrong = report(options.case, trainers)
    print(text)
    if options.out:
        options.out.write_text(f"{text}\n")
    if wrong:
        sys.exit(f"lossloop's number is not the exact one in: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
