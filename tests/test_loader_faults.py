"""Loaders that fail: the error says where, comes in time, and leaves nothing behind."""

import gc
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lossloop as ll
from lossloop._watch import Watch

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
LATE = [*zip(X, Y + torch.arange(6) // 5, strict=True)]  # the last is no class
BATCHES = [(X[i : i + 2], Y[i : i + 2]) for i in (0, 2, 4)]


class BadSampleError(Exception):
    """One whose constructor cannot be called with a message alone."""

    def __init__(self, name, index):
        super().__init__(f"sample {index} of {name}")


def raise_own():
    raise BadSampleError("train", 4)


def raise_plain():
    raise ValueError("a truncated image")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(60)


def dawdle():
    time.sleep(2)


def leave():
    os._exit(3)


def no_memory():
    raise MemoryError("out of memory")


class Samples(Dataset):
    """Six samples, and a fault when so many have been read by all processes."""

    def __init__(self, fault, at):
        self.fault = fault
        self.at = at
        self.reads = multiprocessing.Value("i", 0)

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        with self.reads.get_lock():
            self.reads.value += 1
            reads = self.reads.value
        if reads == self.at:
            self.fault()
        return X[index], Y[index]


class Streamed(IterableDataset):
    def __init__(self, fault, at):
        self.fault = fault
        self.at = at

    def __iter__(self):
        for number, sample in enumerate(zip(X, Y, strict=True), 1):
            if number == self.at:
                self.fault()
            yield sample


def samples(fault, at, kind=Samples, **options):
    return DataLoader(kind(fault, at), 2, **{"num_workers": 1, **options})


class Passes:
    """A loader whose passes are given one by one; an error among batches is raised."""

    def __init__(self, *passes):
        self.passes = list(passes)

    def __iter__(self):
        for batch in self.passes.pop(0) if len(self.passes) > 1 else self.passes[0]:
            if isinstance(batch, Exception):
                raise batch
            yield batch


class Sized(Passes):
    def __init__(self, size, *passes):
        super().__init__(*passes)
        self.size = size

    def __len__(self):
        return self.size


class FailsToStart(Passes):
    def __iter__(self):
        if len(self.passes) == 1:
            raise ConnectionError("no more files")
        return super().__iter__()


class Draws:
    """A sampler that fails in its second pass."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        if self.passes == 2:
            raise KeyError("class 7")
        return iter(range(6))

    def __len__(self):
        return 6


def unfit(batch):
    raise TypeError("cannot be collated")


def bad_start(worker):
    raise PermissionError("no such share")


def run(train, val=None, epochs=3, model=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(5, 3) if model is None else model
    options = {"compile": False, "progress": False, "restore_best": False, **options}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    return ll.fit(model, loss_fn, optimizer, train, val, epochs=epochs, **options)


def after(epochs):
    """The weights after so many epochs over the samples in order."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    if epochs:
        run(BATCHES, epochs=epochs, model=model)
    return model.state_dict()


def failure(kind, call):
    """What the error of a call says, without its frames.

    These have the iterator of the loader, and so its workers.
    """
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    said = "\n".join([str(error), *getattr(error, "__notes__", [])])
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    return said


def reading(name, epoch, batch):
    return f"fit: while reading {name}, epoch {epoch}, batch {batch}."


# Loaders of training and validation data, the error, its words, and finished epochs.
FAULTS = {
    "worker raises": (
        lambda: (samples(raise_plain, 3), None),
        ValueError,
        ["worker process 0", "in raise_plain", reading("train_loader", 1, 2)],
        0,
    ),
    "worker raises in the second epoch": (
        lambda: (samples(raise_plain, 11), None),
        ValueError,
        ["a truncated image", "in raise_plain", reading("train_loader", 2, 3)],
        1,
    ),
    "two workers": (
        lambda: (samples(raise_plain, 9, num_workers=2), None),
        ValueError,
        ["a truncated image", "while reading train_loader, epoch 2"],
        1,
    ),
    "workers that persist": (
        lambda: (samples(raise_plain, 13, persistent_workers=True), None),
        ValueError,
        ["a truncated image", reading("train_loader", 3, 1)],
        2,
    ),
    "worker raises what has another constructor": (
        lambda: (samples(raise_own, 1), None),
        RuntimeError,  # as torch does it
        ["BadSampleError", "sample 4 of train", reading("train_loader", 1, 1)],
        0,
    ),
    "no worker": (
        lambda: (samples(raise_own, 5, num_workers=0), None),
        BadSampleError,
        ["sample 4 of train", reading("train_loader", 1, 3)],
        0,
    ),
    "worker without memory": (
        lambda: (samples(no_memory, 7), None),
        MemoryError,
        ["out of memory", reading("train_loader", 2, 1)],
        1,
    ),
    "stream": (
        lambda: (samples(raise_plain, 5, Streamed), None),
        ValueError,
        ["a truncated image", reading("train_loader", 1, 3)],
        0,
    ),
    "worker cannot start": (
        lambda: (samples(kill, 0, worker_init_fn=bad_start), None),
        PermissionError,
        ["no such share", reading("train_loader", 1, 1)],
        0,
    ),
    "collate": (
        lambda: (samples(kill, 0, collate_fn=unfit), None),
        TypeError,
        ["cannot be collated", "in unfit", reading("train_loader", 1, 1)],
        0,
    ),
    "sampler": (
        lambda: (samples(kill, 0, num_workers=0, sampler=Draws()), None),
        KeyError,
        ["class 7", reading("train_loader", 2, 1)],
        1,
    ),
    "worker is killed": (
        lambda: (samples(kill, 1), None),
        RuntimeError,
        ["DataLoader worker", reading("train_loader", 1, 1), "fewer num_workers"],
        0,
    ),
    "worker leaves": (
        lambda: (samples(leave, 1), None),
        RuntimeError,
        ["DataLoader worker", reading("train_loader", 1, 1), "fewer num_workers"],
        0,
    ),
    "worker is killed in the second epoch": (
        lambda: (samples(kill, 7), None),
        RuntimeError,
        ["DataLoader worker", reading("train_loader", 2, 1), "fewer num_workers"],
        1,
    ),
    "worker of validation is killed": (
        lambda: (BATCHES, samples(kill, 7)),
        RuntimeError,
        ["DataLoader worker", reading("val_loader", 2, 1), "fewer num_workers"],
        1,
    ),
    "worker hangs": (
        lambda: (samples(hang, 1, timeout=1), None),
        RuntimeError,
        ["timed out after 1", reading("train_loader", 1, 1), "num_workers=0"],
        0,
    ),
    "worker of validation hangs": (
        lambda: (BATCHES, samples(dawdle, 1, timeout=1)),
        RuntimeError,
        ["timed out after 1", reading("val_loader", 1, 1), "num_workers=0"],
        0,
    ),
    "used up in the second epoch": (
        lambda: (Passes(BATCHES, []), None),
        ValueError,
        ["train_loader gave no batches", reading("train_loader", 2, 1)],
        1,
    ),
    "validation used up in the second epoch": (
        lambda: (BATCHES, Passes(BATCHES, BATCHES, [])),  # one pass is for the door
        ValueError,
        ["val_loader gave no batches", reading("val_loader", 2, 1)],
        1,
    ),
    "cannot start again": (
        lambda: (FailsToStart(*[BATCHES] * 3), None),
        ConnectionError,
        ["no more files", reading("train_loader", 3, 1)],
        2,
    ),
    "fails in the last batch of the last epoch": (
        lambda: (Passes(BATCHES, BATCHES, [*BATCHES[:2], OSError("gone")]), None),
        OSError,
        ["gone", reading("train_loader", 3, 3)],
        2,
    ),
    "another form of batch": (
        lambda: (Passes(BATCHES, [BATCHES[0], (X, X, Y, Y)]), None),
        TypeError,
        ["tuple of length 4"],
        1,
    ),
    "a label that is no class, from a worker": (
        lambda: (DataLoader(LATE, 2, num_workers=1), None),
        ValueError,
        ["train_loader, epoch 1, batch 3", "target[1] is 3"],
        0,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_time_and_the_last_epoch_is_kept(fault):
    loaders, kind, words, finished = FAULTS[fault]
    model = nn.Linear(5, 3)
    model.load_state_dict(after(0))
    began = time.monotonic()
    said = failure(kind, lambda: run(*loaders(), model=model))
    assert time.monotonic() - began < 10
    assert [word for word in words if word not in said] == []
    for name, tensor in after(finished).items():
        assert torch.equal(model.state_dict()[name], tensor)
    gc.collect()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("where", ["on_step", "on_epoch"])
def test_workers_are_gone_after_an_error_of_the_callers(where):
    def stop(record):
        raise LookupError

    failure(LookupError, lambda: run(samples(raise_plain, 0), **{where: stop}))
    gc.collect()
    assert multiprocessing.active_children() == []


# --- passes of another length ---------------------------------------------------------

LENGTHS = {
    "longer than it says": (
        lambda: Sized(2, BATCHES),
        "train_loader gave 3 batches in epoch 1, but its length says 2",
    ),
    "shorter than it says": (
        lambda: Sized(9, BATCHES),
        "train_loader gave 3 batches in epoch 1, but its length says 9",
    ),
    "shorter later": (
        lambda: Passes(BATCHES, BATCHES[:2], BATCHES[:1]),
        "train_loader gave 2 batches in epoch 2, but epoch 1 had 3",
    ),
    "longer later": (
        lambda: Passes(BATCHES, BATCHES * 2),
        "train_loader gave 6 batches in epoch 2, but epoch 1 had 3",
    ),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_another_number_of_batches_is_warned_of_once(case):
    make, words = LENGTHS[case]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(make())
    assert [str(warning.message).partition(". ")[0] for warning in caught] == [
        f"fit: {words}"
    ]
    assert "mean is not affected" in str(caught[0].message)
    assert len(result.history) == 3


def test_the_mean_is_exact_whatever_the_length_says():
    numbers = [1.0, 2.0, 6.0, 0.5, 1.5]
    batches = [(torch.tensor([[n]]), torch.zeros(1)) for n in numbers]
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Flatten(0))
    with torch.no_grad():
        model[0].weight.fill_(1)
    with pytest.warns(UserWarning, match="its length says 50"):
        result = ll.fit(
            model,
            nn.L1Loss(),
            ll.optim.SGD(lr=0.0),
            Sized(50, batches),
            epochs=1,
            compile=False,
            progress=False,
        )
    expected = sum(map(Fraction, numbers)) / len(numbers)
    assert result.history["train_loss"] == [float(expected)]
    assert result.history["n_train"] == [5]


def test_validation_of_another_length_is_warned_of():
    with pytest.warns(UserWarning, match="val_loader gave 1 batches in epoch 2, but"):
        run(BATCHES, Passes(BATCHES, BATCHES, BATCHES[:1]))


@pytest.mark.parametrize(
    "loader",
    [
        BATCHES,
        DataLoader([*zip(X, Y, strict=True)], 4),
        DataLoader([*zip(X, Y, strict=True)], 4, drop_last=True),
        Sized(3, BATCHES),
        ll.pad_last(DataLoader([*zip(X, Y, strict=True)], 4)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"max_steps": 4}])
def test_nothing_is_said_of_a_loader_as_it_should_be(loader, options):
    run(loader, loader, **options)  # warnings are errors


def test_an_epoch_that_is_gone_on_with_is_counted_from_its_start():
    watch = Watch(ll.supervised(nn.Linear(5, 3), nn.CrossEntropyLoss()))
    list(watch("train_loader", BATCHES, 1))
    list(watch("train_loader", iter(BATCHES[2:]), 2, begin=2))
    with pytest.warns(UserWarning, match="gave 4 batches in epoch 3"):
        list(watch("train_loader", iter(BATCHES[1:]), 3, begin=2))
    broken = Passes([BATCHES[0], OSError("gone")])
    with pytest.raises(OSError, match="gone") as error:
        list(watch("train_loader", broken, 4, begin=1))
    assert error.value.__notes__ == [reading("train_loader", 4, 3)]
    with pytest.raises(ConnectionError) as error:
        watch("train_loader", FailsToStart(BATCHES), 5, begin=1)
    assert error.value.__notes__ == [reading("train_loader", 5, 2)]
