"""Data in memory: read faster than the loader reads them, and no different."""

import itertools
import random

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

import lossloop as ll
from lossloop._memory import gives_again, read

N = 23
X, Y = torch.randn(N, 2, 3), torch.randint(0, 9, (N,))
DATA = TensorDataset(X, Y)
PARTS = {
    "all": DATA,
    "one tensor": TensorDataset(X),
    "part": Subset(DATA, [3, 1, -4, 1, 5, 9, 2, 6]),
    "part of a part": Subset(Subset(DATA, range(3, 20)), [0, -1, 5, 7, 2]),
    "split": random_split(DATA, [15, 8], torch.Generator())[0],
    "strided": TensorDataset(X.transpose(1, 2), Y[:, None].expand(N, 4)),
}


class Backwards(Sampler):
    """Of one's own, and from the end."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter([-1 - i for i in range(self.n)])

    def __len__(self):
        return self.n


class Shuffled(Backwards):
    """Draws when it is asked for an iterator, and not when for a number."""

    def __iter__(self):
        return iter(torch.randperm(self.n).tolist())


class Bunches:
    """Batches of other sizes each time."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        order = list(range(self.n))
        random.shuffle(order)
        while order:
            size = random.randint(1, 3)
            yield order[:size]
            del order[:size]

    def __len__(self):
        return self.n


def samplers(n):
    half = range(0, n, 2)
    return {
        "order": {},
        "shuffle": {"shuffle": True},
        "own generator": {"shuffle": True, "generator": torch.Generator()},
        "loader's generator": {"generator": torch.Generator()},
        "replacement": {"sampler": RandomSampler(range(n), replacement=True)},
        "more": {"sampler": RandomSampler(range(n), num_samples=2 * n + 1)},
        "twice": {"sampler": RandomSampler(range(n), num_samples=2 * n)},
        "fewer": {"sampler": RandomSampler(range(n), num_samples=max(1, n - 3))},
        "subset": {"sampler": SubsetRandomSampler(half)},
        "weighted": {"sampler": WeightedRandomSampler(torch.ones(n), n)},
        "backwards": {"sampler": Backwards(n)},
        "shuffled": {"sampler": Shuffled(n)},
        "bunches": {"batch_sampler": Bunches(n)},
        "batch sampler": {"batch_sampler": BatchSampler(Backwards(n), 3, True)},
    }


def seen(passes, loader):
    """Two passes, and where they leave the generators."""
    torch.manual_seed(3)
    random.seed(3)
    own = loader.generator
    if own is not None:
        own.manual_seed(4)
    batches = [list(passes(loader)) for _ in range(2)]
    states = [torch.get_rng_state(), *([] if own is None else [own.get_state()])]
    return batches, states, random.getstate()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 4, 40])
@pytest.mark.parametrize("sampler", samplers(1))
@pytest.mark.parametrize("part", PARTS)
def test_the_samples_are_those_of_the_loader(part, sampler, size, drop_last):
    data = PARTS[part]
    options = samplers(len(data))[sampler]
    if "batch_sampler" not in options:
        options |= {"batch_size": size, "drop_last": drop_last}
    loader = DataLoader(data, **options)
    expected, states, python = seen(iter, loader)
    found, own_states, own_python = seen(read, loader)
    for ours, theirs in zip(found, expected, strict=True):
        for batch, other in zip(ours, theirs, strict=True):
            assert type(batch) is type(other)
            for one, two in zip(batch, other, strict=True):
                assert one.dtype == two.dtype
                assert one.stride() == two.stride()
                assert one.equal(two)
    assert all(map(torch.equal, own_states, states))
    assert own_python == python


@pytest.mark.parametrize("sampler", samplers(1))
@pytest.mark.parametrize("part", PARTS)
def test_a_batch_is_given_again(part, sampler):
    """If the order is fixed; also where the ends of a pass are left out."""
    data = PARTS[part]
    options = samplers(len(data))[sampler]
    if "batch_sampler" not in options:
        options |= {"batch_size": 2}
    loader = DataLoader(data, **options)

    def passed(cut=lambda passing: None):
        torch.manual_seed(3)
        if loader.generator is not None:
            loader.generator.manual_seed(4)
        passing = read(loader)
        cut(passing)
        return passing, list(passing)

    def without_ends(passing):
        passing.begin_after(1)
        passing.end_after(len(given) - 2)

    passing, given = passed()
    assert gives_again(loader) == passing.ahead
    if not passing.ahead:
        return
    cut, middle = passed(without_ends)
    assert_equal(middle, given[1:-1])
    state = torch.get_rng_state()
    assert_equal([passing.again(place) for place in range(len(given))], given)
    before = range(max(1, len(given) - 1))
    assert_equal([cut.again(place) for place in before], [given[i] for i in before])
    assert torch.equal(torch.get_rng_state(), state)


def assert_equal(found, expected):
    for batch, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, batch, other))


class Loud(TensorDataset):
    def __getitem__(self, index):
        return tuple(t + 1 for t in super().__getitem__(index))


class Other(DataLoader):
    def __iter__(self):
        return (batch for batch in itertools.islice(super().__iter__(), 1))


def added(samples):
    return [t + 1 for t in default_collate(samples)]


SPECIAL = {
    "data set": DataLoader(Loud(X, Y), 4),
    "loader": Other(DATA, 4),
    "collate_fn": DataLoader(DATA, 4, collate_fn=added),
    "no batches": DataLoader(DATA, None),
    "gradient": DataLoader(TensorDataset(X.clone().requires_grad_()), 4),
    "list": [(X, Y)],
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_special_is_read_as_it_is(name):
    assert_equal(*(list(way(SPECIAL[name])) for way in (read, iter)))


def test_a_step_may_not_write_to_the_data():
    inputs, _ = next(read(DataLoader(DATA, 4)))
    inputs.zero_()
    assert X[:4].any()


def test_runs_are_the_same_bit_for_bit(monkeypatch):
    def run():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(6, 9))
        loaders = (DataLoader(PARTS["split"], 4, shuffle=True) for _ in range(2))
        return ll.fit(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.Adam(model.parameters()),
            *loaders,
            epochs=3,
            progress=False,
        )

    ours = run()
    for module in ("_fold", "_training"):
        monkeypatch.setattr(f"lossloop.{module}.read", iter)
    theirs = run()
    for column in ("train_loss", "val_loss"):
        assert ours.history[column] == theirs.history[column]
    assert all(ours.params[k].equal(t) for k, t in theirs.params.items())
