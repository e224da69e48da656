"""Checkpoints: what is saved is loaded, and what is damaged is refused."""

import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import struct
import sys
import threading
import time
import weakref
from collections import Counter, OrderedDict, namedtuple
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import lossloop as ll
from lossloop import _checkpoint
from lossloop._checkpoint import CheckpointCorrupt, Checkpoints, load, save
from lossloop._files import CheckpointWriteError, Files
from lossloop._history import History
from lossloop._mean import Mean
from lossloop._run import Best, Run

fork = multiprocessing.get_context("fork")
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


def same(a, b):
    """Whether two values are the same to the bit, strides and kinds included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            and bits(a) == bits(b)
        )  # fmt: skip
    if isinstance(a, History):
        return same(list(a), list(b))
    if isinstance(a, dict):
        return same([*a.items()], [*b.items()])
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b


def bits(tensor):
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def returned(value, path):
    """A value of `rest`, saved and loaded."""
    save(Run({"weight": torch.ones(2)}, (), rest={"value": value}), path)
    return load(path).rest["value"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def small_run(size=2):
    model = torch.nn.Linear(size, 3)
    goal = ll.supervised(model, torch.nn.MSELoss())
    params, opt_state = ll.init(goal, ll.optim.AdamW(lr=0.1))
    mean = Mean.empty().add(torch.tensor(6.0), torch.tensor(3))
    history = History([{"epoch": 1, "train_loss": 0.5, "val_loss": math.nan}])
    return Run(params, opt_state, 1, 2, mean, history, Best(1, 0.5, params), {"a": 7})


def test_a_whole_run_comes_back(path):
    run = small_run()
    save(run, path)
    assert same(load(path)._replace(rest={}), run._replace(rest={}))
    assert load(path).rest == {"a": 7}
    save(load(path), path)
    assert same(load(path)._replace(rest={}), run._replace(rest={}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_state_of_every_option_comes_back_and_goes_on(precision, path):
    model = torch.nn.Linear(2, 1)
    goal = ll.supervised(model, torch.nn.MSELoss())
    optimizer = ll.optim.AdamW(lr=0.1)
    params, opt_state = ll.init(goal, optimizer, precision=precision, ema=0.9)
    step = ll.make_step(goal, optimizer, precision=precision)
    batch = torch.randn(4, 2), torch.randn(4, 1)
    for _ in range(3):
        params, opt_state, _, _ = step(params, opt_state, batch)
    save(Run(params, opt_state), path)
    loaded = load(path)
    assert same(loaded.opt_state, opt_state)
    assert same(
        step(loaded.params, loaded.opt_state, batch), step(params, opt_state, batch)
    )


def test_what_fit_returns_is_saved(path):
    model = torch.nn.Linear(1, 1)
    x = torch.linspace(-1, 1, 8).reshape(-1, 1)
    result = ll.fit(
        *(model, torch.nn.MSELoss(), torch.optim.Adam(model.parameters()), (x, x)),
        **{"epochs": 2, "progress": False, "compile": False},
    )
    save(result, path)
    run = load(path)
    assert same(run.params, {n: t.detach() for n, t in result.params.items()})
    assert same(run.opt_state, result.opt_state)
    assert same(run.history, result.history)
    assert (run.epoch, run.batch, run.best) == (2, 0, None)
    model.load_state_dict(safetensors.torch.load_file(path), strict=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3), (2, 3, 4, 5)])
def test_tensors_of_every_dtype_come_back_and_strangers_can_read_them(
    dtype, shape, path
):
    values = torch.randint(0, 2, shape).to(dtype)
    random_bits = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,))
    if dtype != torch.bool and values.numel():
        values = random_bits.to(torch.uint8).view(dtype).reshape(shape)  # nan, inf, -0
    save(Run({"weight": values}, [values + 0 if dtype.is_complex else None]), path)
    assert same(load(path).params["weight"], values)
    stranger = safetensors.torch.load_file(path)["weight"]
    assert same(stranger, values)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        # Contiguous in either way, but convolutions look at the strides.
        torch.randn(8, 1, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4).permute(2, 0, 1),
        torch.empty_strided((1, 3), (7, 1)).fill_(2),
        torch.arange(6)[::5][:1],
        torch.nn.Parameter(torch.randn(3, 2)).detach().t(),
    ],
    ids=lambda t: str((tuple(t.shape), t.stride())),
)
def test_strides_come_back(tensor, path):
    assert same(returned(tensor, path), tensor)
    stranger = safetensors.torch.load_file(path)["lossloop/rest/value"]
    assert torch.equal(stranger, tensor)
    assert stranger.is_contiguous()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(10)[::2],
        torch.arange(3).expand(4, 3),
        torch.arange(12).reshape(3, 4)[:, 1:3],
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j, 3j]).conj().imag,
        torch.nn.Parameter(torch.randn(2)),
        torch.randn(2, requires_grad=True) * 2,
    ],
)
def test_views_become_tensors_of_their_own(tensor, path):
    found = returned(tensor, path)
    assert torch.equal(found, tensor)
    assert type(found) is torch.Tensor
    assert found.is_contiguous()
    assert not found.requires_grad
    assert found.untyped_storage().nbytes() == found.numel() * found.itemsize


def test_one_tensor_in_two_places_is_one_again(path):
    weight, other = torch.randn(3, 3), torch.zeros(0)
    square = weight.t()
    part = weight[0]
    run = Run(
        {"a": weight, "tied": weight, "view": weight.view(3, 3), "turned": square},
        [weight, square, part, weight.clone()],
        best=Best(1, 0.5, {"a": weight}),
        rest={"empty": [other, torch.zeros(0), torch.zeros(0, dtype=torch.int64)]},
    )
    save(run, path)
    found = load(path)
    weight = found.params["a"]
    assert weight is found.params["tied"] is found.params["view"]
    assert weight is found.opt_state[0] is found.best.params["a"]
    assert found.params["turned"] is found.opt_state[1]
    ids = {id(t) for t in (weight, *found.params.values(), *found.opt_state)}
    assert len(ids) == 4
    assert [t.dtype for t in found.rest["empty"]][2] == torch.int64
    assert path.stat().st_size < 36 * 4 + 2500
    stored = safetensors.torch.load_file(path)
    assert [name for name in stored if "/" not in name] == ["a", "turned"]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text()
)  # fmt: skip
# The bits of a NaN that are no value are not kept.
SCALARS = SCALARS.map(lambda x: math.nan if x != x else x)
VALUES = st.recursive(
    SCALARS | st.binary() | st.builds(torch.tensor, st.integers(-9, 9)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(SCALARS, inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict)
        | st.dictionaries(SCALARS, st.integers(), max_size=4).map(Counter)
    ),
    max_leaves=20,
)


@given(value=VALUES)
def test_nested_values_come_back(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "nested.safetensors"
    assert same(returned(value, path), value)


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, -0.0, 5e-324, 0.1, 1e16, 2**70, True, 1, "\ud800\n"]
)
def test_numbers_are_exact(value, path):
    assert same(returned([value, {value: value}], path), [value, {value: value}])


def test_names_that_collide_are_kept_apart(path):
    one, two, three = (torch.tensor(n) for n in (1, 2, 3))
    value = {"a": {"b": one}, "a/b": two, "a/b~2": three, 1: one + 9, "1": two + 9}
    assert same(returned(value, path), value)


class Momentum(NamedTuple):
    velocity: dict
    count: torch.Tensor


def test_named_tuples_of_others_become_tuples(path):
    state = [Momentum({"weight": torch.ones(2)}, torch.tensor(3))]
    save(Run({"weight": torch.ones(2)}, state), path)
    found = load(path).opt_state
    assert same(found, [tuple(state[0])])
    # A class that only has the name of one of lossloop's is another's too.
    assert same(returned(namedtuple("Mean", "total")(3), path), (3,))


def test_every_named_tuple_of_a_state_has_its_place():
    """Those of `_types` that are no part of a state are named here."""
    others = {"Optimizer", "StepOutput"}
    kinds = {
        name
        for name, kind in vars(ll._types).items()
        if isinstance(kind, type) and hasattr(kind, "_fields")
    }
    assert kinds - others <= set(_checkpoint._RECORDS)


def test_a_stranger_loads_the_weights_into_the_model(path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    save(Run(model.state_dict(), (torch.ones(2),), rest={"é": torch.ones(1)}), path)
    copy = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    stored = safetensors.torch.load_file(path)
    left = copy.load_state_dict(stored, strict=False)
    assert left.missing_keys == []
    assert left.unexpected_keys == ["lossloop/opt_state/0", "lossloop/rest/é"]
    assert same(copy.state_dict(), model.state_dict())


def test_the_step_count_and_the_seed_stay_on_the_host(path):
    save(small_run(), path)
    run = load(path, device="meta")
    assert run.params["weight"].device.type == "meta"
    assert run.opt_state.slots.groups[0].step.device.type == "meta"
    assert run.opt_state.step.device.type == run.opt_state.seed.device.type == "cpu"


class Foo:
    pass


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"opt_state": ({"foo": [Foo()]},)}, TypeError, r"state\[0\]\['foo'\]\[0\]"),
        ({"opt_state": Momentum(Foo(), 1)}, TypeError, "state.velocity is a Foo"),
        ({"rest": {"a": np.float64(1)}}, TypeError, r"rest\['a'\] is a float64"),
        ({"rest": {"a": {(1, 2): 3}}}, TypeError, r"key of run.rest\['a'\] is a tuple"),
        ({"rest": {"a": torch.Size([1])}}, TypeError, "is a Size"),
        ({"rest": {"a": {1, 2}}}, TypeError, "is a set"),
        ({"rest": {"a": torch.eye(2).to_sparse()}}, TypeError, "sparse"),
        ({"rest": {"a": torch.zeros(1).cdouble()}}, TypeError, "complex128"),
        ({"rest": {"a": torch.empty(2, device="meta")}}, TypeError, "meta"),
        ({"rest": None}, TypeError, "run.rest must be dict"),
        ({"params": [torch.ones(1)]}, TypeError, "run.params must be dict"),
        ({"params": {"a": 1.0}}, TypeError, "'a': float"),
        ({"params": {1: torch.ones(1)}}, TypeError, "got 1: Tensor"),
        ({"params": {"lossloop/a": torch.ones(1)}}, ValueError, "lossloop/a"),
        ({"params": {"__metadata__": torch.ones(1)}}, ValueError, "__metadata__"),
        ({"epoch": torch.tensor(1)}, TypeError, "run.epoch must be int"),
        ({"mean": 1.0}, TypeError, "run.mean must be"),
        ({"history": [{"epoch": 1}]}, TypeError, "run.history must be History"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named(change, kind, match, path):
    run = Run({"weight": torch.ones(2)}, ())._replace(**change)
    with pytest.raises(kind, match=match):
        save(run, path)
    assert not path.exists()


def test_what_contains_itself_is_refused(path):
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match="contain itself"):
        returned(loop, path)
    deep = []
    for _ in range(45):
        deep = [{"a": deep}] if len(deep) % 2 else [deep]
    assert same(returned(deep, path), deep)


def test_a_header_too_long_to_be_read_is_not_written(path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "_LONGEST_HEADER", 5000)
    with pytest.raises(ValueError, match="Keep long lists of numbers as tensors"):
        returned(list(range(5000)), path)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory.*run\.safetensors"):
        save(small_run(), tmp_path)


# What is damaged is refused.


class Damaged:
    """A checkpoint that is damaged in place, and repaired after each try."""

    def __init__(self, path, run):
        save(run, path)
        self.path, self.data = path, path.read_bytes()
        self.header = 8 + int.from_bytes(self.data[:8], "little")
        self.fd = os.open(path, os.O_RDWR)

    def refused(self, data, at):
        """Whether the file is refused with these bytes at that place."""
        os.pwrite(self.fd, data, at)
        try:
            load(self.path)
        except CheckpointCorrupt:
            return True
        finally:
            os.pwrite(self.fd, self.data[at : at + len(data)], at)
            os.ftruncate(self.fd, len(self.data))
        return False


def test_every_beginning_of_a_file_is_refused(path):
    damaged = Damaged(path, small_run(450))
    size = len(damaged.data)
    assert 18_000 < size < 30_000
    load(path)
    for end in range(size - 1, -1, -1):
        os.ftruncate(damaged.fd, end)
        with pytest.raises(CheckpointCorrupt):
            load(path)
    os.close(damaged.fd)


@pytest.mark.parametrize("count", [1, 4096])
@pytest.mark.parametrize("byte", [b"\0", b" ", b"\xff"])
def test_bytes_at_the_end_are_refused(count, byte, path):
    damaged = Damaged(path, small_run())
    assert damaged.refused(byte * count, len(damaged.data))
    load(path)
    os.close(damaged.fd)


def test_every_bit_of_the_header_counts(path):
    damaged = Damaged(path, Run({"w": torch.ones(2)}, (torch.ones(1),), rest={"a": 1}))
    assert damaged.header > 500
    for at in range(damaged.header):
        for bit in range(8):
            assert damaged.refused(bytes([damaged.data[at] ^ 1 << bit]), at), (at, bit)
    load(path)
    os.close(damaged.fd)


def test_bits_and_blocks_of_the_payload_count(path):
    damaged = Damaged(path, small_run(450))
    rng = random.Random(0)
    data, size = damaged.data, len(damaged.data)
    for _ in range(2000):
        at = rng.randrange(damaged.header, size)
        assert damaged.refused(bytes([data[at] ^ 1 << rng.randrange(8)]), at)
    swapped = 0
    while swapped < 500:
        one, two = (rng.randrange(damaged.header, size - 64) for _ in range(2))
        block = bytearray(data[damaged.header :])
        a, b = (slice(n - damaged.header, n - damaged.header + 64) for n in (one, two))
        block[a], block[b] = block[b], block[a]
        if block != data[damaged.header :]:
            swapped += 1
            assert damaged.refused(bytes(block), damaged.header)
    load(path)
    os.close(damaged.fd)


def test_teeth_only_the_checksum_sees_a_changed_weight(path):
    save(Run({"w": torch.ones(2)}, ()), path)
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    changed = data[:-1] + b"\0"
    path.write_bytes(changed)
    with pytest.raises(CheckpointCorrupt, match="checksum is wrong"):
        load(path)
    assert safetensors.torch.load_file(path)["w"].tolist() != [1, 1]
    path.write_bytes(with_header(changed, header))
    assert load(path).params["w"].tolist() != [1, 1]


def test_garbage_is_refused(path):
    rng = random.Random(0)
    for _ in range(1500):
        length = rng.randrange(200)
        start = rng.choice([b"", (length // 2).to_bytes(8, "little")])
        path.write_bytes(start + rng.randbytes(length))
        with pytest.raises(CheckpointCorrupt):
            load(path)


def with_header(data, header):
    """A file with another header, its length and digest made right."""
    length = len(header).to_bytes(8, "little")
    payload = data[8 + int.from_bytes(data[:8], "little") :]
    found = re.search(rb'"sha256":"([0-9a-f]{64})"', header)
    if found is None:
        return length + header + payload
    at = found.start(1)
    zeros = header[:at] + b"0" * 64 + header[at + 64 :]
    digest = hashlib.sha256(length + zeros + payload).hexdigest().encode()
    return length + header[:at] + digest + header[at + 64 :] + payload


def mutated(header, rng):
    """A header that something was done to."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(header))
        match rng.randrange(5):
            case 0:
                header = header[:at] + bytes([rng.randrange(256)]) + header[at + 1 :]
            case 1:
                header = header[:at] + header[at + rng.randrange(9) :]
            case 2:
                part = header[at : at + rng.randrange(40)]
                to = rng.randrange(len(header))
                header = header[:to] + part + header[to:]
            case 3:
                number = rng.choice(
                    [b"-1", b"9" * 30, b"1e400", b"0.5", b"null", b"[]"]
                )
                numbers = [*re.finditer(rb"\d+", header)]
                one = rng.choice(numbers)
                header = header[: one.start()] + number + header[one.end() :]
            case _:
                words = [*re.finditer(rb"[A-Za-z_]{2,}", header)]
                one, two = rng.choice(words), rng.choice(words)
                header = header[: one.start()] + two[0] + header[one.end() :]
    return header


def test_mutations_with_a_right_digest_are_refused_or_a_run(path):
    """The checksum is no guard here: only the checks behind it are."""
    save(small_run(), path)
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    rng = random.Random(0)
    path.write_bytes(with_header(data, header))
    assert path.read_bytes() == data
    taken = 0
    for _ in range(3500):
        path.write_bytes(with_header(data, mutated(header, rng)))
        try:
            run = load(path)
        except CheckpointCorrupt:
            continue
        taken += 1
        assert type(run) is Run
        assert all(isinstance(t, torch.Tensor) for t in run.params.values())
        assert isinstance(run.history, History)
        assert type(run.epoch) is type(run.batch) is int
    assert 10 < taken < 2000


def header_of(metadata=(), **entries):
    start = {"format": "lossloop", "version": "1", "sha256": "0" * 64}
    whole = {"__metadata__": {**start, "strides": "{}", **dict(metadata)}, **entries}
    return json.dumps(whole, separators=(",", ":")).encode()


def entry(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


WHOLE = {"run": '{"Run":{"params":{"dict":[["w",{"tensor":"w"}]]},"opt_state":[],'
                '"epoch":0,"batch":0,"mean":null,"history":{"History":[]},'
                '"best":null,"rest":{"dict":[]}}}'}  # fmt: skip


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (header_of(WHOLE, w=entry()), None),
        (header_of(WHOLE, w=entry("F33")), "F33"),
        (header_of(WHOLE, w=entry(shape=(2,))), "not where"),
        (header_of(WHOLE, w=entry(shape=(2,), end=8)), "4 bytes of tensors, not 8"),
        (header_of(WHOLE, w=entry(shape=(2**40,), end=2**42)), "bytes of tensors"),
        (header_of(WHOLE, w=entry(shape=(-1,), end=-4)), "has the shape"),
        (header_of(WHOLE, w=entry(shape=(True,))), "has the shape"),
        (header_of(WHOLE, w=entry(shape=(0, 2**62, 2**62), end=0)), "no whole"),
        (header_of(WHOLE, w=entry("U8", begin=1)), "not where"),
        (header_of(WHOLE, w=entry("U8"), v=entry()), "not where"),
        (header_of(WHOLE, w=entry("U8", (3,), 0, 3)), "not 3"),
        (header_of({**WHOLE, "version": "2"}, w=entry()), "version 2 of the format"),
        (header_of({**WHOLE, "strides": '{"w":[2]}'}, w=entry()), None),
        (header_of({**WHOLE, "strides": '{"w":[-1]}'}, w=entry()), "strides"),
        (header_of({**WHOLE, "strides": '{"w":[1,1]}'}, w=entry()), "no whole"),
        (
            header_of({**WHOLE, "strides": '{"w":[2]}'}, w=entry("U8", (4,))),
            "do not fit",
        ),
        (header_of({"run": "[" * 10**5}, w=entry()), "no run"),
        (header_of(WHOLE, w=entry()) + b"[" * 10**5, "no whole"),
        (header_of({"run": '{"os.system":"ls"}'}, w=entry()), "no run"),
        (header_of({"run": '{"tensor":"w"}'}, w=entry()), "must be a Run"),
        (header_of({"run": '{"tensor":"v"}'}, w=entry()), "no run"),
        (header_of({"run": "9" * 10**4}, w=entry()), "no run"),
        (header_of({}, w=entry()), "no run"),
        (b"[]", "not written by lossloop"),
        (b"\xff\xfe", "not written by lossloop"),
        (b"", "not written by lossloop"),
    ],
)
def test_each_thing_that_is_wrong_in_a_header_is_found(header, match, path):
    path.write_bytes(with_header(bytes(12), header))
    if match is None:
        assert torch.equal(load(path).params["w"], torch.zeros(1))
    else:
        with pytest.raises(CheckpointCorrupt, match=match):
            load(path)


def test_files_of_others_are_refused(path):
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointCorrupt, match="no checksum: not written by lossloop"):
        load(path)
    save(Run({"weight": torch.ones(2)}, ()), path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert list(metadata) >= ["format", "run", "sha256", "strides", "version"]
    # What another program writes again is no longer what was written.
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)
    with pytest.raises(CheckpointCorrupt):
        load(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointCorrupt):
        load(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 1000, 25])
def test_absurd_lengths_are_refused_before_memory_is_taken(length, path, monkeypatch):
    path.write_bytes(length.to_bytes(8, "little") + b"{" * 24)
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(CheckpointCorrupt, match=f"its header {length}"):
        load(path)


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load(tmp_path / "nothing.safetensors")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for name in ("loop", "pipe", "empty"):
        with pytest.raises(CheckpointCorrupt, match=name) as caught:
            load(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)
        assert caught.value.reason
    directory = tmp_path / "ckpt-000001-00000000.safetensors"
    directory.mkdir()
    with (
        pytest.warns(UserWarning, match="Skipped the checkpoint"),
        pytest.raises(CheckpointCorrupt, match="directory"),
    ):
        load(tmp_path)
    save(small_run(), tmp_path / "run.safetensors")

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(CheckpointCorrupt, match="Permission denied"):
        load(tmp_path / "run.safetensors")


def high_water(path, number):
    """The memory that a load takes at most, in bytes."""

    def read():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])

    before = read()
    load(path)
    number.value = read() - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_load_takes_no_more_than_twice_the_size_of_the_file(path):
    halves = [torch.ones(100, 125_000).t(), torch.ones(100, 125_000)]
    save(Run({"weight": torch.ones(2)}, halves), path)
    size = path.stat().st_size
    assert size > 10**8
    number = fork.Value("q", 0)
    child = fork.Process(target=high_water, args=(path, number))
    child.start()
    child.join()
    assert 0.9 * size < number.value < 2 * size


# The directory of a run.


def run_at(epoch, batch=0):
    return Run({"weight": torch.full((2,), float(epoch))}, (), epoch, batch)


def names(directory):
    return sorted(p.name for p in directory.iterdir() if p.name != ".lock")


def file_name(epoch, batch=0):
    return f"ckpt-{epoch:06}-{batch:08}.safetensors"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(keep, tmp_path):
    checkpoints = Checkpoints(tmp_path / "a" / "b", keep=keep)
    assert checkpoints.empty
    assert checkpoints.newest() is None
    for epoch in range(10):
        checkpoints.save(run_at(epoch, batch=epoch * 10**7))
        checkpoints.save(run_at(epoch, batch=epoch * 10**7 + 1))
        assert not checkpoints.empty
        assert checkpoints.newest()[0].epoch == load(tmp_path / "a" / "b").epoch
    kept = [
        file_name(9, 90_000_001),
        file_name(9, 90_000_000),
        file_name(8, 80_000_001),
    ]
    assert names(tmp_path / "a" / "b") == kept[:keep][::-1]
    found, path = Checkpoints(tmp_path / "a" / "b").newest()
    assert same(found.params, run_at(9).params)
    assert os.path.basename(path) == kept[0]


def test_damaged_ones_do_not_count_among_those_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for epoch in (1, 2):
        checkpoints.save(run_at(epoch))
    os.truncate(tmp_path / file_name(2), 50)
    later = Checkpoints(tmp_path)
    later.save(run_at(3))
    assert names(tmp_path) == [file_name(1), file_name(2), file_name(3)]
    later.save(run_at(4))
    assert names(tmp_path) == [file_name(3), file_name(4)]
    # The run went on from an older one than the newest, which was damaged.
    os.truncate(tmp_path / file_name(4), 50)
    with pytest.warns(UserWarning, match=file_name(4)):
        assert Checkpoints(tmp_path).newest()[0].epoch == 3
    later = Checkpoints(tmp_path, keep=1)
    later.save(run_at(3, 5))
    assert names(tmp_path) == [file_name(3, 5), file_name(4)]


def test_the_only_whole_one_is_never_deleted(tmp_path):
    Checkpoints(tmp_path).save(run_at(1))
    for epoch in (2, 3, 4):
        (tmp_path / file_name(epoch)).write_bytes(b"torn")
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.warns(UserWarning, match="Skipped") as caught:
        assert checkpoints.newest()[0].epoch == 1
    skipped = [str(w.message).split("/")[-1].split(":")[0] for w in caught]
    assert skipped == [file_name(4), file_name(3), file_name(2)]
    checkpoints.save(run_at(1, 1))
    assert file_name(1) in names(tmp_path)
    for epoch in (1, 2, 3, 4):
        (tmp_path / file_name(epoch)).write_bytes(b"torn")
    (tmp_path / file_name(1, 1)).unlink()
    with (
        pytest.warns(UserWarning, match="header"),
        pytest.raises(CheckpointCorrupt, match=file_name(4)),
    ):
        Checkpoints(tmp_path).newest()


def test_a_directory_without_checkpoints_is_named(tmp_path):
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load(tmp_path)
    assert Checkpoints(tmp_path).empty


def test_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(ValueError, match="got 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_second_run_is_refused(tmp_path):
    with Checkpoints(tmp_path).lock():
        with (
            pytest.raises(RuntimeError, match="Another run is writing") as caught,
            Checkpoints(tmp_path).lock(),
        ):
            pass
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path).lock():
        raise ZeroDivisionError
    with Checkpoints(tmp_path).lock():
        pass


def waits(connection):
    connection.send(os.getpid())
    time.sleep(60)


def holds(directory, connection):
    with Checkpoints(directory).lock():
        # Like a worker of a loader, which outlives it for a while.
        fork.Process(target=waits, args=(connection,)).start()
        time.sleep(60)


def test_a_killed_run_gives_its_directory_back(tmp_path):
    here, there = fork.Pipe()
    child = fork.Process(target=holds, args=(tmp_path, there))
    child.start()
    worker = here.recv()
    with pytest.raises(RuntimeError), Checkpoints(tmp_path).lock():
        pass
    child.kill()
    child.join()
    with Checkpoints(tmp_path).lock():
        os.kill(worker, signal.SIGKILL)  # it was alive till now


def test_what_dead_processes_left_is_removed(tmp_path):
    dead = fork.Process(target=os.getpid)
    dead.start()
    dead.join()
    left = f".tmp-{dead.pid}-01234567-89abcdef"
    alive = f".tmp-{os.getppid()}-01234567-89abcdef"
    for name in (left, alive, ".tmp-mine"):
        (tmp_path / name).touch()
    with Checkpoints(tmp_path).lock():
        assert names(tmp_path) == sorted([alive, ".tmp-mine"])


def test_what_a_killed_run_had_too_many_is_removed(tmp_path):
    """It was killed when it had written one, and had not yet deleted another."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    for epoch in (1, 2, 3):
        checkpoints.save(Run({"weight": torch.ones(2)}, (), epoch))
    with Checkpoints(tmp_path).lock():
        assert len(names(tmp_path)) == 2
    assert load(tmp_path).epoch == 3


class Slow(Files):
    """Writes once it may, or fails."""

    def __init__(self):
        self.may = threading.Event()
        self.error = None

    def write(self, fd, data):
        assert self.may.wait(30)
        if self.error is not None:
            raise self.error
        return super().write(fd, data)


def test_the_caller_goes_on_while_a_copy_is_written(tmp_path):
    files = Slow()
    checkpoints = Checkpoints(tmp_path, files)
    weight = torch.arange(6.0).reshape(2, 3).t()
    before = weight.clone()
    kept = {"numbers": [1, 2]}
    bias = torch.ones(2)
    run = Run({"weight": weight, "bias": bias}, [weight], 3, rest=kept)
    with checkpoints.lock():
        checkpoints.save_soon(run)
        weight.zero_()
        bias.zero_()
        kept["numbers"].append(3)
        assert checkpoints.empty
        files.may.set()
        checkpoints.wait()
        found = checkpoints.newest()[0]
        assert same(found.params["weight"], before)
        assert same(found.params["bias"], torch.ones(2))
        assert found.opt_state[0] is found.params["weight"]
        assert found.rest == {"numbers": [1, 2]}
        for epoch in range(4, 9):
            checkpoints.save_soon(run_at(epoch))
    # The end of the lock waits.
    assert names(tmp_path) == [file_name(7), file_name(8)]


def test_an_interrupted_wait_does_not_give_up_what_is_written(tmp_path, monkeypatch):
    files = Slow()
    checkpoints = Checkpoints(tmp_path, files)

    def interrupted(self):
        monkeypatch.undo()
        files.may.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(_checkpoint._Background, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt), checkpoints.lock():
        checkpoints.save_soon(run_at(1)) or checkpoints.wait()
    assert names(tmp_path) == [file_name(1)]


def test_nothing_is_left_to_free_when_the_background_is_over():
    """Tensors that a thread frees while the process ends abort it, from C++."""

    class Spy:
        def acquire(self):
            assert released.wait(60)

        def release(self):
            held.append(alive())
            released.set()

    held, released = [], threading.Event()
    tensor = torch.ones(2)
    alive = weakref.ref(tensor)
    background = _checkpoint._Background(partial(torch.numel, tensor))
    background._lock = Spy()
    del tensor
    background.start()
    background.wait()
    assert released.wait(60)
    assert held == [None]


def test_an_error_in_the_background_surfaces(tmp_path):
    files = Slow()
    files.may.set()
    checkpoints = Checkpoints(tmp_path, files)
    checkpoints.save(run_at(1))
    files.error = OSError(28, "No space left on device")
    for surface in (
        checkpoints.wait,
        lambda: checkpoints.save_soon(run_at(3)),
        lambda: checkpoints.save(run_at(3)),
    ):
        checkpoints.save_soon(run_at(2))
        with pytest.raises(CheckpointWriteError, match="No space left") as caught:
            surface()
        assert caught.value.errno == 28
        checkpoints.wait()  # and is told once
    with pytest.raises(CheckpointWriteError), checkpoints.lock():
        checkpoints.save_soon(run_at(2))
    with pytest.raises(ZeroDivisionError) as other, checkpoints.lock():
        raise checkpoints.save_soon(run_at(2)) or ZeroDivisionError
    assert "No space left" in other.value.__notes__[0]
    assert names(tmp_path) == [file_name(1)]
    files.error = None
    checkpoints.save(run_at(2))
    assert checkpoints.newest()[0].epoch == 2


def test_what_cannot_be_deleted_does_not_stop_a_run(tmp_path):
    class Stuck(Files):
        def unlink(self, path):
            raise PermissionError(13, "Permission denied")

    checkpoints = Checkpoints(tmp_path, Stuck(), keep=1)
    for epoch in (1, 2, 3):
        checkpoints.save(run_at(epoch))
    assert len(names(tmp_path)) == 3
    Checkpoints(tmp_path, keep=1).save(run_at(4))
    assert names(tmp_path) == [file_name(4)]
