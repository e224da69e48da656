"""Faults that fit refuses, each by name, and what it leaves behind: nothing."""

import contextlib
import copy
import functools
import random
import re
import signal

import numpy as np
import pytest
import torch
from cases import mlp
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import lossloop as ll
from lossloop import _compile, _scan
from lossloop._memory import Indexed
from lossloop._watch import Watch

torch.manual_seed(0)
X, Y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
NAN, INF = float("nan"), float("inf")
OWN = torch.Generator()  # of loaders that are read before the fault shows
LATE = torch.tensor([0, 1, 2, 0, 1, 3])  # the last one is no class


def world():
    """What belongs to the whole process, and no run may leave changed."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
    }


def bits(model):
    """The tensors of a module, as they are in memory, and the modes of its parts."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {
            name: (t.device, t.requires_grad, t.detach().clone().numpy().tobytes())
            for name, t in tensors.items()
            if not t.is_meta
        },
        [part.training for part in model.modules()],
        [name for name, t in tensors.items() if t.is_meta],
    )


def fit(model=None, loss_fn=None, optimizer=torch.optim.SGD, train_loader=None, **more):
    options = {"epochs": 1, "compile": False, "progress": False, **more}
    return ll.fit(
        mlp() if model is None else model,
        nn.CrossEntropyLoss() if loss_fn is None else loss_fn,
        optimizer,
        [(X, Y)] if train_loader is None else train_loader,
        **options,
    )


# --- refused --------------------------------------------------------------------------


class Fails(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        raise OSError("no such image")


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        yield from zip(X[: self.count], Y[: self.count], strict=True)


class Squares(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        return self.scale * (output - target) ** 2


def one():
    return nn.Linear(5, 1)


def with_norm():
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))


def half_on_meta():
    model = mlp()
    model[2].to("meta")
    return model


def pixels():
    target = torch.zeros(2, 3, 3, dtype=torch.int64)
    target[1, 2, 0] = 4
    return [(torch.randn(2, 1, 3, 3), target)]


def batches(*batch):
    return {"train_loader": [batch]}


def in_memory(labels=Y, size=2, inputs=X, **more):
    return DataLoader(TensorDataset(inputs, labels), size, **more)


def full(value, *shape):
    return torch.full(shape, value)


LABELS = {
    "MultiMarginLoss": (
        {"loss_fn": nn.MultiMarginLoss(), **batches(X, Y + 1)},
        ValueError,
        r"target\[2\] is 3.*\[0, 3\)",
    ),
    "NLLLoss, negative": (
        {"loss_fn": nn.NLLLoss(), **batches(X, Y - 1)},
        ValueError,
        r"target\[0\] is -1.*Number the classes from 0",
    ),
    "MultiLabelMarginLoss": (
        {"loss_fn": nn.MultiLabelMarginLoss(), **batches(X, full(3, 6, 3))},
        ValueError,
        r"target\[0, 0\] is 3.*-1 ends the list",
    ),
    "MultiLabelMarginLoss, -2": (
        {"loss_fn": nn.MultiLabelMarginLoss(), **batches(X, full(-2, 6, 3))},
        ValueError,
        "is -2",
    ),
    "a pixel": (
        {"model": nn.Conv2d(1, 4, 1), "train_loader": pixels()},
        ValueError,
        r"target\[1, 2, 0\] is 4",
    ),
    "the usual ignore_index": (
        {
            "loss_fn": nn.CrossEntropyLoss(ignore_index=0),
            **batches(X, torch.tensor([0, 1, 2, -100, 1, 2])),
        },
        ValueError,
        "Only ignore_index, 0, may lie outside",
    ),
    "of validation": (
        {"val_loader": [(X, Y + 1)]},
        ValueError,
        r"val_loader, batch 1.*target\[2\]",
    ),
    "of frozen data": (
        {"frozen_train_loss": [(X, Y), (X, Y + 1)]},
        ValueError,
        r"frozen_train_loss, epoch 1, batch 2.*target\[2\]",
    ),
    "late, in memory": (
        {"train_loader": in_memory(LATE)},
        ValueError,
        r"train_loader, all samples in memory.*target\[5\] is 3.*last layer",
    ),
    "late, in a subset": (
        {"train_loader": DataLoader(Subset(in_memory(LATE).dataset, [0, 1, 5]), 2)},
        ValueError,
        r"all samples in memory.*target\[5\] is 3",
    ),
    "late, in memory, of validation": (
        {"val_loader": in_memory(LATE)},
        ValueError,
        r"val_loader, all samples in memory.*target\[5\] is 3",
    ),
    "late, in a list": (
        {"train_loader": [(X, Y), (X, Y), (X, LATE)]},
        ValueError,
        r"train_loader, epoch 1, batch 3.*target\[5\] is 3",
    ),
    "late and negative": (
        {"train_loader": [(X, Y), (X, Y - 1)]},
        ValueError,
        r"train_loader, epoch 1, batch 2.*target\[0\] is -1",
    ),
    "late, in a list of validation": (
        {"val_loader": [(X, Y), (X, LATE)]},
        ValueError,
        r"val_loader, epoch 1, batch 2.*target\[5\] is 3",
    ),
    "late, padded": (
        {"train_loader": in_memory(LATE, 4, generator=OWN), "pad_last": True},
        ValueError,
        r"train_loader, epoch 1, batch 2.*target\[1\] is 3",
    ),
}
VALUES = {
    "negative probability": (
        batches(X, full(-0.5, 6, 3)),
        ValueError,
        "a probability is not negative.*softmax",
    ),
    "BCEWithLogitsLoss": (
        {
            "model": one(),
            "loss_fn": nn.BCEWithLogitsLoss(),
            **batches(X, full(2.0, 6, 1)),
        },
        ValueError,
        r"target\[0, 0\] is 2.0.*\[0, 1\]",
    ),
    "BCELoss of logits": (
        {
            "model": nn.Sequential(one(), nn.Threshold(9, 9.0)),
            "loss_fn": nn.BCELoss(),
            **batches(X, torch.ones(6, 1)),
        },
        ValueError,
        "BCEWithLogitsLoss",
    ),
    "SoftMarginLoss": (
        {"model": one(), "loss_fn": nn.SoftMarginLoss(), **batches(X, full(0.0, 6, 1))},
        ValueError,
        r"2 \* target - 1",
    ),
    "KLDivLoss": (
        {"loss_fn": nn.KLDivLoss(reduction="sum"), **batches(X, full(-1.0, 6, 3))},
        ValueError,
        "log_target=True",
    ),
    "negative variance": (
        {
            "model": one(),
            "loss_fn": nn.GaussianNLLLoss(),
            **batches(X, [torch.zeros(6, 1), full(-1.0, 6, 1)]),
        },
        ValueError,
        "variance is not negative.*softplus",
    ),
    "nan in a dictionary": (
        batches({"input": full(NAN, 6, 5)}, Y),
        ValueError,
        r"inputs\['input'\] has 30 values.*Clean or",
    ),
    "infinite target of validation": (
        {
            "loss_fn": nn.MSELoss(),
            **batches(X, torch.zeros(6, 3)),
            "val_loader": [(X, full(-INF, 6, 3))],
        },
        ValueError,
        "val_loader, batch 1: targets has 18 values.*-inf",
    ),
    "loss not finite": (
        {"loss_fn": lambda o, y: o.sum(1) * NAN},
        ll.NonFiniteError,
        "epoch 1, step 1.*loss",
    ),
    "negative weights": (
        batches(X, Y, full(-1.0, 6)),
        ValueError,
        r"weights\[0\] is negative",
    ),
    "weights not finite": (
        batches(X, Y, full(NAN, 6)),
        ValueError,
        "weights has 6 values that are not finite",
    ),
}
SHAPES = {
    "label column": (batches(X, Y[:, None]), ValueError, r"target.squeeze\(-1\)"),
    "one-hot": (
        batches(X, nn.functional.one_hot(Y, 3)),
        ValueError,
        r"target.argmax\(1\)",
    ),
    "classes last": (
        batches(torch.randn(2, 4, 5), torch.zeros(2, 4, dtype=torch.int64)),
        ValueError,
        r"output.movedim\(-1, 1\)",
    ),
    "fewer targets": (batches(X, Y[:4]), ValueError, "batch sizes differ"),
    "features": (batches(X[:, :4], Y), RuntimeError, r"6x4 and 5x7.*train_loader"),
    "one target": (
        {"loss_fn": nn.MSELoss(), **batches(X, torch.tensor(1.0))},
        ValueError,
        r"\(6, 3\) and target \(\)",
    ),
    "column against matrix": (
        {"loss_fn": nn.MSELoss(), **batches(X, torch.randn(6, 1))},
        ValueError,
        r"\(6, 3\) and target \(6, 1\).*with expand",
    ),
    "row against column": (
        {"model": one(), "loss_fn": nn.PoissonNLLLoss(), **batches(X, torch.ones(6))},
        ValueError,
        r"\(6, 1\) and target \(6,\).*squeeze\(1\)",
    ),
    "own loss, squares of pairs": (
        {
            "model": nn.Sequential(one(), nn.Flatten(0)),
            "loss_fn": lambda o, y: (o - y).abs().mean(1),
            **batches(X, torch.randn(6, 1)),
        },
        ValueError,
        r"broadcast to \(6, 6\)",
    ),
    "weights per element": (
        batches(X, Y, torch.ones(6, 1)),
        ValueError,
        r"weights has shape \(6, 1\).*shape \(6,\)",
    ),
    "fewer weights": (
        batches(X, Y, torch.ones(5)),
        ValueError,
        r"weights has shape \(5,\)",
    ),
    "weights of a sum": (
        {
            "loss_fn": lambda o, y: (o.square().sum(), torch.tensor(6)),
            **batches(X, Y, torch.ones(6)),
        },
        ValueError,
        "added up or averaged already",
    ),
    "a batch of no samples": (
        batches(X[:0], Y[:0]),
        ValueError,
        "mean of no data is undefined",
    ),
    "one sample and BatchNorm": (
        {"model": with_norm(), **batches(X[:1], Y[:1])},
        ValueError,
        r"train_loader, batch 1.*more than 1 value per channel",
    ),
    "last sample and BatchNorm": (
        {"model": with_norm(), "train_loader": in_memory(Y[:5], inputs=X[:5])},
        ValueError,
        "5 samples in batches of 2 leave a single one.*drop_last=True",
    ),
    "micro-batches of one and BatchNorm": (
        {"model": with_norm(), "accumulate": 6},
        ValueError,
        "more than 1 value per channel",
    ),
    "padding and BatchNorm": (
        {
            "model": with_norm(),
            "pad_last": True,
            "train_loader": [(X, Y), (X[:4], Y[:4])],
        },
        ValueError,
        "BatchNorm1d.*GroupNorm",
    ),
    "padding, a larger batch": (
        {"pad_last": True, "train_loader": [(X[:4], Y[:4]), (X, Y)]},
        ValueError,
        "batch 2 has 6 samples, more than the first",
    ),
    "more micro-batches than samples": (
        {"accumulate": 9},
        ValueError,
        "has 6 samples.*9 micro-batches.*batch_size",
    ),
    "micro-batches of unequal tensors": (
        {"accumulate": 2, **batches(X, Y[:3])},
        ValueError,
        "do not share their first dimension",
    ),
    "samples that do not stack": (
        {"train_loader": DataLoader([(X[0], Y[0]), (X[1, :3], Y[1])], 2)},
        RuntimeError,
        r"equal size.*while reading train_loader, epoch 1, batch 1\.",
    ),
}
DTYPES = {
    "labels in int32": (
        batches(X, Y.int()),
        TypeError,
        r"int32.*target.long\(\)",
    ),
    "labels in bool": (batches(X, Y.bool()), TypeError, "torch.bool.*int64"),
    "inputs in float16": (
        batches(X.half(), Y),
        TypeError,
        r"batch\[0\].*float16",
    ),
    "whole numbers": (
        batches(X.long(), Y),
        RuntimeError,
        "Long.*train_loader",
    ),
    "complex inputs": (
        batches(X + 0j, Y),
        RuntimeError,
        "Complex.*train_loader",
    ),
    "model in float64": (
        {"model": mlp().double()},
        TypeError,
        "float32, the model is torch.float64.*Convert",
    ),
    "validation in float64": (
        {"val_loader": [(X.double(), Y)]},
        TypeError,
        "val_loader, batch 1.*Convert the data",
    ),
    "HuberLoss": (
        {"loss_fn": nn.HuberLoss(), **batches(X, torch.zeros(6, 3).double())},
        TypeError,
        r"target.to\(output.dtype\)",
    ),
    "complex loss": (
        {"loss_fn": lambda o, y: o.sum(1) * 1j},
        TypeError,
        r"complex64.*abs\(\)",
    ),
    "arrays of numpy": (batches(X.numpy(), Y.numpy()), TypeError, "ndarray"),
    "targets in a list": (batches(X, Y.tolist()), TypeError, r"target \(list\)"),
    "weights in a list": (
        batches(X, Y, [1] * 6),
        TypeError,
        "must be a tensor",
    ),
    "sparse inputs": (
        batches(X.to_sparse(), Y),
        NotImplementedError,
        "SparseCPU.*train_loader, batch 1",
    ),
}
DEVICES = {
    "inputs on meta": (batches(X.to("meta"), Y), NotImplementedError, "meta tensor"),
    "targets on meta": (batches(X, Y.to("meta")), NotImplementedError, "meta tensor"),
    "validation on meta": (
        {"val_loader": [(X.to("meta"), Y.to("meta"))]},
        NotImplementedError,
        "meta tensor",
    ),
    "part of the model on meta": (
        {"model": half_on_meta()},
        ValueError,
        r"model\.2.*to_empty",
    ),
    "meta": ({"device": "meta"}, ValueError, "fit.*meta.*no values"),
    "no such device": ({"device": "gpu"}, RuntimeError, "device string: gpu"),
    "device of another type": ({"device": 3.5}, TypeError, "float"),
}
LOADERS = {
    "validation without full batch": (
        {"val_loader": in_memory(size=10, drop_last=True)},
        ValueError,
        "val_loader has no batches.*drop_last",
    ),
    "a dictionary": ({"train_loader": {"x": X}}, TypeError, "got a dict.*DataLoader"),
    "a name": ({"train_loader": "train"}, TypeError, "got a str"),
    "numbers": (
        {"train_loader": (torch.tensor(1.0), torch.tensor(1))},
        ValueError,
        r"lengths \[0, 0\]",
    ),
    "no frozen data": (
        {"frozen_train_loss": []},
        ValueError,
        "frozen_train_loss has no batches",
    ),
    "frozen data, a number": ({"frozen_train_loss": 3}, TypeError, "got a int"),
    "empty stream": (
        {"train_loader": DataLoader(Stream(0), 2)},
        ValueError,
        "train_loader gave no batches.*drop_last",
    ),
    "stream without full batch": (
        {"train_loader": DataLoader(Stream(3), 5, drop_last=True)},
        ValueError,
        "train_loader gave no batches",
    ),
    "empty stream of validation": (
        {"val_loader": DataLoader(Stream(0), 2, generator=OWN)},
        ValueError,
        "val_loader gave no batches",
    ),
    "empty generator of validation": (
        {"val_loader": (batch for batch in ())},
        ValueError,
        "val_loader gave no batches",
    ),
    "a data set that fails": (
        {"train_loader": DataLoader(Fails(), 2)},
        OSError,
        r"no such image.*while reading train_loader, epoch 1, batch 1\.",
    ),
    "validation that fails": (
        {"val_loader": DataLoader(Fails(), 2)},
        OSError,
        r"no such image.*while reading val_loader, epoch 1, batch 1\.",
    ),
    "None": ({"train_loader": [None]}, TypeError, "got a NoneType"),
    "batches in dictionaries": (
        {"train_loader": [{"x": X, "y": Y}]},
        TypeError,
        r"got a dict.*objective\(model, function\)",
    ),
    "loaders in a list": ({"train_loader": [in_memory()]}, TypeError, "a DataLoader"),
}
LOSSES = {
    "None": (
        {"loss_fn": lambda o, y: None},
        TypeError,
        "NoneType.*one loss per",
    ),
    "class": (
        {"loss_fn": nn.CrossEntropyLoss},
        TypeError,
        r"Pass an instance: CrossEntropyLoss\(\)",
    ),
    "name": ({"loss_fn": "mse"}, TypeError, r"cannot be called.*nn.MSELoss\(\)"),
    "own parameters": ({"loss_fn": Squares()}, TypeError, "parameters of its own"),
    "reduction": (
        {"loss_fn": nn.CrossEntropyLoss(reduction="median")},
        ValueError,
        "reduction is 'median'.*Leave it out",
    ),
}
OPTIONS = {
    "no micro-batch": ({"accumulate": 0}, ValueError, "accumulate.*at least 1, got 0"),
    "2.5 micro-batches": ({"accumulate": 2.5}, ValueError, "accumulate.*got 2.5"),
    "negative bound": ({"clip_grad_value": -1.0}, ValueError, "clip_grad_value.*> 0"),
    "bound not a number": ({"clip_grad_norm": NAN}, ValueError, "clip_grad_norm.*nan"),
    "precision": ({"precision": 16}, ValueError, "'fp32', 'bf16' or 'fp16', got 16"),
    "average, a word": ({"ema": "x"}, TypeError, "ema.*a number, got 'x'"),
    "average, True": ({"ema": True}, TypeError, "ema.*a number, got True"),
    "average, nan": ({"ema": NAN}, ValueError, "ema.*below 1, like 0.999"),
    "metric": (
        {"metrics": {"a": 3}, "val_loader": [(X, Y)]},
        TypeError,
        r"metrics\['a'\].*cannot be called",
    ),
    "metric named loss": (
        {"metrics": {"loss": ll.metrics.accuracy()}, "val_loader": [(X, Y)]},
        ValueError,
        "'loss' is the name of another column",
    ),
    "seconds, nan": ({"max_seconds": NAN}, ValueError, "max_seconds.*nan"),
    "progress": ({"progress": "yes"}, ValueError, "'plain', got 'yes'"),
    "skipping -1": ({"skip_nonfinite": -1}, ValueError, "skip_nonfinite.*at least 0"),
    "skipping 1.5": ({"skip_nonfinite": 1.5}, TypeError, "must be an int, got 1.5"),
    "directory": ({"checkpoint": 3}, TypeError, "path of a directory, got 3"),
    "saving nowhere": ({"save_every": 5}, ValueError, r"needs the directory"),
    "saving never": ({"save_every": 0}, ValueError, "save_every.*at least 1"),
    "resuming nothing": ({"resume": True}, ValueError, "needs the directory"),
    "resuming, a word": ({"resume": "yes"}, TypeError, "True or False, got 'yes'"),
    "epochs, True": ({"epochs": True}, TypeError, "epochs.*an int, got True"),
    "epochs, negative": ({"epochs": -1}, ValueError, "epochs.*at least 1, got -1"),
    "validating, True": ({"eval_every": True}, TypeError, "eval_every.*an int"),
    "no optimizer": ({"optimizer": None}, TypeError, "None is not an optimizer"),
    "negative rate": (
        {"optimizer": functools.partial(torch.optim.SGD, lr=-1.0)},
        ValueError,
        "learning rate: -1.0",
    ),
}
KINDS = (LABELS, VALUES, SHAPES, DTYPES, DEVICES, LOADERS, LOSSES, OPTIONS)
REFUSED = [
    pytest.param(*case, id=f"{name}: {fault}")
    for name, kind in zip(
        ("label", "value", "shape", "dtype", "device", "loader", "loss", "option"),
        KINDS,
        strict=True,
    )
    for fault, case in kind.items()
]


def test_there_are_many_faults():
    assert len(REFUSED) >= 60


def said(error):
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("changes", "error", "words"), REFUSED)
def test_refused_by_name_and_nothing_changed(changes, error, words, training):
    model = copy.deepcopy(changes.get("model") or mlp())
    for part in model.modules():
        part.training = training
    model.training = not training  # parts may differ in it
    before, around = bits(model), world()
    with pytest.raises(error) as refusal:
        fit(**{**changes, "model": model})
    assert type(refusal.value) is error
    assert re.search(f"(?s){words}", said(refusal.value))
    assert bits(model) == before
    assert world() == around
    assert len(fit().history) == 1  # another run is none the worse for it


# --- and otherwise --------------------------------------------------------------------


class Stopped(Exception):
    """Of the tests."""


def stop(*record):
    raise Stopped


def failing(error):
    """A loader that raises after its first batch."""

    class Loader:
        def __iter__(self):
            yield X, Y
            raise error

    return Loader()


ENDS = {
    "finished": ({"epochs": 2, "val_loader": [(X, Y)]}, None),
    "bounded": ({"epochs": 2, "max_steps": 1}, None),
    "half precision": ({"precision": "bf16"}, None),
    "dropout": ({"model": nn.Sequential(mlp(), nn.Dropout(0.5))}, None),
    "compiled": ({"compile": True, "epochs": 2}, None),
    "loader": ({"train_loader": failing(OSError("gone"))}, OSError),
    "validation": ({"val_loader": failing(OSError("gone"))}, OSError),
    "on_step": ({"on_step": stop}, Stopped),
    "on_epoch": ({"on_epoch": stop}, Stopped),
    "Ctrl-C in the loader": (
        {"train_loader": failing(KeyboardInterrupt())},
        KeyboardInterrupt,
    ),
    "Ctrl-C in validation": (
        {"val_loader": failing(KeyboardInterrupt())},
        KeyboardInterrupt,
    ),
}


@pytest.mark.parametrize("flags", ["defaults", "others"])
@pytest.mark.parametrize("end", ENDS)
def test_no_run_changes_what_belongs_to_the_process(end, flags, monkeypatch):
    monkeypatch.setattr(_compile, "inductor", lambda graph, inputs, **_: graph.forward)
    changes, error = ENDS[end]
    model = copy.deepcopy(changes.get("model") or mlp())
    modes = [part.training for part in model.modules()]
    with contextlib.ExitStack() as stack:
        if flags == "others":
            stack.enter_context(other_flags())
        around = world()
        if error is None:
            fit(**{**changes, "model": model})
        else:
            stack.enter_context(pytest.raises(error))
            try:
                fit(**{**changes, "model": model})
            finally:
                assert world() == around
        assert world() == around
    assert [part.training for part in model.modules()] == modes


@contextlib.contextmanager
def other_flags():
    """Everything that a run might set back to a default of its own."""
    matmul = torch.get_float32_matmul_precision()
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        with torch.no_grad():
            yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.rand(1),
        random.random,
        np.random.rand,
        lambda: torch.backends.cudnn.__setattr__("benchmark", True),
        lambda: signal.signal(signal.SIGINT, lambda number, frame: None),
        lambda: torch.set_float32_matmul_precision("high"),
    ],
)
def test_teeth_a_run_that_leaves_something_changed_is_seen(change):
    with keeping():
        around = world()
        fit(on_epoch=lambda record: change() and None)
        assert world() != around


@contextlib.contextmanager
def keeping():
    handler = signal.getsignal(signal.SIGINT)
    matmul = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.benchmark = False


# --- labels that are let through ------------------------------------------------------


def test_what_is_to_be_ignored_may_lie_outside():
    ignored = Y.clone()
    ignored[1] = -100
    for train in ([(X, Y), (X, ignored)], in_memory(ignored), [(X, Y), (X, Y.byte())]):
        fit(train_loader=train)
    sets = torch.tensor([[0, -1, -1]] * 6)
    fit(loss_fn=nn.MultiLabelMarginLoss(), train_loader=[(X, sets), (X, sets)])


def test_labels_of_samples_that_are_left_out_are_not_looked_at():
    dataset = in_memory(LATE).dataset
    left_out = Subset(dataset, [4, 2, 0, 1])
    assert len(fit(train_loader=DataLoader(left_out, 2, shuffle=True)).history) == 1
    with pytest.raises(ValueError, match=r"val_loader, all samples.*target\[5\]"):
        fit(val_loader=DataLoader(Subset(dataset, [4, 2, 0, -1]), 2))


class Points(nn.Module):
    """Points at one of its inputs: as many classes as there are."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(2, 1)

    def forward(self, x):
        return self.score(x).squeeze(-1)


def test_a_model_may_have_other_classes_for_each_batch():
    x, y = torch.randn(3, 4, 2), torch.tensor([0, 3, 1])
    more, ours = torch.randn(3, 9, 2), torch.tensor([8, 0, 5])
    fit(Points(), train_loader=[(x, y), (more, ours), (x, y)])
    with pytest.raises(ValueError, match=r"batch 2.*target\[0\] is 8.*\[0, 7\)"):
        fit(Points(), train_loader=[(x, y), (more[:, :7], ours)])


def test_where_classes_differ_labels_are_looked_at_no_more(monkeypatch):
    watch = Watch(ll.supervised(Points(), nn.CrossEntropyLoss()))
    batch = torch.randn(2, 4, 2), torch.tensor([3, 0])
    more = torch.randn(2, 9, 2), torch.tensor([8, 0])
    watch.learn(Points()(batch[0]))
    passing = watch("train_loader", [batch, more, more], 1)
    assert (next(passing), next(passing)) == (batch, more)
    monkeypatch.setattr(Points, "forward", None)
    assert next(passing) is more


@pytest.mark.parametrize("labels", [Y, LATE])
def test_looking_at_data_in_memory_moves_no_generator(labels):
    watch = Watch(ll.supervised(mlp(), nn.CrossEntropyLoss()))
    watch.learn(mlp()(X))
    around = world()
    subset = Subset(in_memory(labels).dataset, range(5))
    watch.whole("train_loader", DataLoader(subset, 2, shuffle=True))
    assert world() == around


def test_targets_that_are_no_classes_are_not_looked_at():
    fit(train_loader=[(X, Y.float()[:, None] * torch.eye(3)[0])] * 2)
    outside = [(X, torch.full((6, 3), 7.0))] * 2
    fit(loss_fn=nn.MSELoss(), train_loader=outside)

    class Own(nn.CrossEntropyLoss):
        def forward(self, output, target):
            return super().forward(output, target % 3)

    fit(loss_fn=Own(reduction="none"), train_loader=[(X, Y + 30)] * 2)


def test_data_in_memory_stay_in_memory_and_are_looked_at_once(monkeypatch):
    looks = []
    original = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda t: looks.append(len(t)) or original(t))
    passes = []
    fold = _scan.fold
    monkeypatch.setattr(
        _scan, "fold", lambda *a, **k: passes.append(type(a[3])) or fold(*a, **k)
    )
    fit(train_loader=in_memory(shuffle=True), epochs=3)
    assert looks == [6]
    assert passes == [Indexed] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_after_a_bad_label_the_device_still_works():
    with pytest.raises(ValueError, match="train_loader, epoch 1, batch 2"):
        fit(mlp().cuda(), train_loader=[(X, Y), (X, LATE)])
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_a_watch_passes_batches_on_unchanged():
    goal = ll.supervised(mlp(), nn.CrossEntropyLoss())
    for loader in ([(X, Y), (X[:2], Y[:2])], in_memory(size=4)):
        watch = Watch(goal)
        watch.learn(goal.model(X))
        found = list(watch("train_loader", loader, 1))
        for batch, expected in zip(found, loader, strict=True):
            assert all(map(torch.equal, batch, expected))
    first = [(X, Y)]
    assert next(watch("train_loader", first, 1)) is first[0]
