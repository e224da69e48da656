"""Matrix products by the faster kernel: right, chosen once, and switched off."""

import json
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch
from cases import CASES, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.data import DataLoader, TensorDataset

import lossloop as ll
from lossloop import _products
from lossloop._plan import CompilePlan
from lossloop._products import KINDS, SWITCH, Products, kind_of, loaded
from lossloop._training import products

OURS = torch.ops.lossloop.mm.default
INFO = Path("/proc/cpuinfo")
TILES = INFO.exists() and "amx_bf16" in INFO.read_text()


@pytest.fixture(scope="module")
def kernel():
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("it cannot be compiled here")
    assert loaded()


needs_kernel = pytest.mark.usefixtures("kernel")


def layouts(*sizes):
    """A matrix or a batch: as it is, transposed, a part of a larger one, repeated."""
    *batch, m, n = sizes
    whole = torch.randn(*batch, m + 3, 2 * n + 5)
    return [
        torch.randn(sizes),
        torch.randn(*batch, n, m).mT,
        whole[..., 1 : m + 1, 2 : n + 2],
        whole[..., 2 : m + 2, 1 : 2 * n + 1 : 2],
        torch.randn(*batch, 1, n).expand(sizes),
        torch.randn(*batch, m, 1).expand(sizes),
    ]


def assert_right(a, b):
    found, exact = OURS(a, b), a.double() @ b.double()
    assert found.shape == exact.shape
    assert found.dtype is torch.float32
    assert found.is_contiguous()
    # The bound of any order of summation; on tiles a product is a sum of six.
    terms = (6 if TILES else 1) * a.shape[-1]
    bound = (terms + 1) * 2**-24 * (a.abs().double() @ b.abs().double())
    assert ((found - exact).abs() <= bound).all()


side = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 127, 129, 300]))


# --- the operator ---------------------------------------------------------------------


@pytest.mark.slow
@needs_kernel
@settings(deadline=None)
@given(
    batch=st.sampled_from([(), (), (0,), (1,), (3,), (5,)]),
    sizes=st.tuples(side, side, side),
    left=st.integers(0, 5),
    right=st.integers(0, 5),
    threads=st.sampled_from([1, 2, 3]),
)
def test_products_of_any_size_and_layout(batch, sizes, left, right, threads):
    m, depth, n = sizes
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_right(layouts(*batch, m, depth)[left], layouts(*batch, depth, n)[right])
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(
    "sizes", [(1100, 530, 20), (20, 1100, 300), (257, 513, 129), (2, 3, 1025)]
)
def test_products_of_more_than_one_block(sizes):
    m, depth, n = sizes
    for a in layouts(m, depth)[:3]:
        for b in layouts(depth, n)[:3]:
            assert_right(a, b)


@pytest.mark.slow
@needs_kernel
def test_a_product_repeats_itself_and_leaves_its_sides_alone():
    a, b = torch.randn(70, 33).mT, torch.randn(90, 70).mT
    copies = a.clone(), b.clone()
    first = OURS(a, b)
    assert all(OURS(a, b).equal(first) for _ in range(5))
    assert a.equal(copies[0])
    assert b.equal(copies[1])


def pages_at(address):
    """What the system says of the memory there: the flags of its pages."""
    inside, flags = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    return flags


@pytest.mark.slow
@needs_kernel
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="of Linux"
)
def test_a_large_result_is_asked_for_in_large_pages():
    side = torch.ones(4096, 1)
    result = OURS(side, side.T)  # 67 MB
    assert result.equal(torch.ones_like(result))
    # Advised is what lies in large pages as a whole.
    for place in (2**21, result.nbytes // 2, result.nbytes - 2**21 - 1):
        assert "hg" in pages_at(result.data_ptr() + place)
    assert "hg" not in pages_at(OURS(side[:1024], side.T).data_ptr() + 2**21)


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("sizes", [(64, 128, 128), (33, 700, 65), (200, 16, 500)])
@pytest.mark.parametrize("spread", [0, 8])
def test_it_rounds_no_worse_than_torch(sizes, spread):
    """With numbers of one size, and of sizes that differ by powers of 2."""
    m, depth, n = sizes

    def numbers(*shape):
        return torch.randn(shape) * 2.0 ** torch.randint(-spread, spread + 1, shape)

    a, b = numbers(m, depth), numbers(depth, n)
    exact = a.double() @ b.double()
    scale = a.abs().double() @ b.abs().double()

    def error(found):
        return ((found - exact) / scale).square().mean().sqrt()

    assert error(OURS(a, b)) < 1.5 * error(a @ b)
    # Which two parts of each number would not pass.
    a0, b0 = a.bfloat16().float(), b.bfloat16().float()
    a1, b1 = (a - a0).bfloat16().float(), (b - b0).bfloat16().float()
    assert error(a0 @ b0 + a0 @ b1 + a1 @ b0 + a1 @ b1) > 1.5 * error(a @ b)


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3.4e38])
@pytest.mark.parametrize("side", [0, 1])
def test_infinite_and_undefined_numbers_spread_as_in_torch(value, side):
    sides = [torch.randn(40, 300), torch.randn(300, 50)]
    sides[side][17, 33] = value
    sides[1 - side][:, 20] = sides[1 - side][11] = 0.0  # by which nothing is infinite
    torch.testing.assert_close(
        OURS(*sides), torch.mm(*sides), rtol=1e-5, atol=1e-4, equal_nan=True
    )


@pytest.mark.slow
@needs_kernel
def test_tiny_numbers_keep_their_bits_or_vanish():
    a, b = torch.randn(20, 40), torch.randn(40, 30)
    assert_right(a * 2.0**-60, b * 2.0**-40)
    for scale in (2.0**-110, 2.0**-126, 2.0**-140):
        small = a * scale
        error = OURS(small, b) - small.double() @ b.double()
        assert error.abs().max() <= 6 * 40 * 2.0**-125 * b.abs().max()


@pytest.mark.slow
@needs_kernel
def test_what_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match="do not fit"):
        OURS(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(RuntimeError, match="do not fit"):
        OURS(torch.ones(2, 3), torch.ones(3, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="do not fit"):
        OURS(torch.ones(2, 2, 3), torch.ones(3, 3, 5))


# --- where it is used -----------------------------------------------------------------


def test_the_bias_is_taken_out_of_a_product():
    """And stays where it is scaled, which is another product."""
    a, b, bias = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)

    def products(a, b, bias):
        return torch.addmm(bias, a, b).relu(), torch.addmm(bias, a, b, beta=0.5)

    graph = make_fx(products, tracing_mode="fake")(a, b, bias)
    expected = graph(a, b, bias)
    Products(())(graph.graph)
    graph.recompile()
    assert graph.code.count("addmm.default(") == 1
    torch.testing.assert_close(graph(a, b, bias), expected)


def rewritten(function, *args, ours=tuple(KINDS)):
    graph = make_fx(function, tracing_mode="fake")(*args)
    Products(ours)(graph.graph)
    graph.recompile()
    return graph.code.count("lossloop.mm")


def test_products_of_the_chosen_kinds_are_ours():
    a, b, narrow = torch.ones(64, 128), torch.ones(128, 128), torch.ones(128, 10)
    large, bias = torch.ones(128, 5000), torch.ones(10)
    batches = torch.ones(3, 4, 5), torch.ones(3, 5, 2)
    for args, kind in [
        ((torch.mm, a, b), "small"),
        ((torch.mm, b, b), "small"),
        ((torch.mm, a, narrow), "narrow"),
        ((torch.mm, a[:16], b), "thin"),
        ((torch.mm, narrow, a[:10]), "thin"),
        ((torch.mm, large.T, b), "large"),
        ((torch.bmm, *batches), "batches"),
    ]:
        assert rewritten(*args, ours=[kind]) == 1
        assert rewritten(*args, ours=set(KINDS) - {kind}) == 0
    assert rewritten(torch.addmm, bias, a, narrow) == 1
    assert rewritten(lambda a: a @ a, b) == 1  # one node for both sides


def test_other_products_are_left_alone():
    a = torch.ones(8, 8)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert rewritten(torch.mm, a.to(dtype), a.to(dtype)) == 0
    for device in ("meta", "cuda"):
        with torch._subclasses.FakeTensorMode():
            other = torch.empty(8, 8, device=device)
        assert kind_of(other, other) is None
    assert kind_of(a.to_sparse(), a) is None


# --- the choice -----------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without a note, whose kernel is as fast as one says."""
    ratios = dict.fromkeys(KINDS, 1.0) | {"narrow": 2.0}
    asked = []

    def measured(kind):
        asked.append(kind)
        return ratios[kind]

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(_products, "_known", {})
    monkeypatch.setattr(_products, "loaded", lambda: True)
    monkeypatch.setattr(_products, "measured", measured)
    return {"ratios": ratios, "asked": asked, "home": tmp_path}


def ours():
    """As in a process of its own."""
    _products._known.clear()
    return _products.ours()


def test_it_is_measured_once_and_remembered(machine):
    assert _products.in_use() is None
    assert ours() == _products.in_use() == ("narrow",)
    assert machine["asked"] == list(KINDS)
    machine["ratios"].update(small=3.0)
    assert [ours() for _ in range(2)] == [("narrow",)] * 2
    assert len(machine["asked"]) == len(KINDS)
    (note,) = machine["home"].iterdir()
    assert json.loads(note.read_text())["narrow"] == 2.0


def test_another_number_of_threads_or_processor_is_measured_anew(machine, monkeypatch):
    ours()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    ours()
    monkeypatch.setattr(_products, "processor", lambda: "another one")
    ours()
    assert len(machine["asked"]) == 3 * len(KINDS)


def test_a_little_faster_is_not_enough(machine):
    machine["ratios"].update(narrow=1.04, large=1.06)
    assert ours() == ("large",)


def test_the_note_of_the_process_that_was_first_holds(machine, monkeypatch):
    def overtaken(kind):
        if kind == "small":
            monkeypatch.setattr(_products, "measured", lambda kind: 1.0)
            assert ours() == ()
        return 2.0

    monkeypatch.setattr(_products, "measured", overtaken)
    assert ours() == ()


def test_without_links_or_room_for_a_note_it_is_measured_again(machine, monkeypatch):
    def refused(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(_products.os, "link", refused)
    assert [ours() for _ in range(2)] == [("narrow",)] * 2
    assert len(machine["asked"]) == 2 * len(KINDS)


def test_half_a_note_is_measured_anew(machine):
    ours()
    (note,) = machine["home"].iterdir()
    note.write_text("")
    assert [ours() for _ in range(2)] == [("narrow",)] * 2
    assert len(machine["asked"]) == 2 * len(KINDS)
    assert json.loads(note.read_text())["narrow"] == 2.0


@pytest.mark.usefixtures("machine")
def test_a_run_that_has_no_such_products_tells_of_none():
    ours()
    plan = CompilePlan(lambda: None, wish=True, epochs=1, batches=1)
    plan.choice = plan.choice._replace(compiled=True)
    weight = torch.ones(2, 2)
    assert products([plan], {"weight": weight}) == ["narrow"]
    assert products([plan], {"weight": weight.double()}) is None
    assert products([plan], {"weight": weight.to("meta")}) is None


def test_it_can_be_switched_off_and_on(machine, monkeypatch):
    monkeypatch.setenv(SWITCH, "off")
    assert ours() == _products.in_use() == ()
    monkeypatch.setenv(SWITCH, "on")
    assert ours() == tuple(KINDS)
    assert not machine["asked"]
    monkeypatch.setenv(SWITCH, "fast")
    with pytest.raises(ValueError, match="must be auto, on or off, is 'fast'"):
        ours()


@pytest.mark.usefixtures("machine")
def test_asked_for_less_than_float32_it_keeps_out(monkeypatch):
    assert ours() == ("narrow",)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert _products.in_use() is None
    assert _products.ours() == ()


@pytest.mark.usefixtures("machine")
def test_where_precision_is_set_by_library_it_keeps_out(monkeypatch):
    """Then torch does not tell it in one word any more."""

    def mixed():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert _products.in_use() is None
    assert _products.ours() == _products.in_use() == ()


@pytest.mark.parametrize("switch", ["auto", "on"])
def test_without_a_compiler_products_are_torchs(machine, monkeypatch, switch):
    def missing(source):
        raise FileNotFoundError("g++")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", missing)
    monkeypatch.setattr(_products, "loaded", loaded.__wrapped__)
    monkeypatch.setenv(SWITCH, switch)
    assert ours() == ()
    assert not machine["asked"]


def test_a_kernel_that_multiplies_wrongly_is_not_used(monkeypatch):
    load = "torch._inductor.codecache.CppCodeCache.load"
    monkeypatch.setattr(load, lambda source: None)
    for right, wrong in ((torch.mm, False), (lambda a, b: a @ b + 1, True)):
        monkeypatch.setattr(torch.ops.lossloop, "mm", right)
        assert loaded.__wrapped__() is not wrong


@pytest.mark.slow
@needs_kernel
def test_what_is_measured_is_a_ratio_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert all(0.01 < _products.measured(kind) < 100 for kind in KINDS)
    finally:
        torch.set_default_dtype(torch.float32)


# --- in a run -------------------------------------------------------------------------


def trained(monkeypatch, switch, **options):
    monkeypatch.setenv(SWITCH, switch)
    data = TensorDataset(*CASES["mlp"].batch(24))
    loader = DataLoader(data, 4, shuffle=True)
    torch.manual_seed(0)
    options = {"epochs": 2, "compile": True, "progress": False, **options}
    loss = nn.CrossEntropyLoss()
    return ll.fit(mlp(), loss, ll.optim.SGD(lr=0.1), loader, **options)


@pytest.mark.slow
@needs_kernel
def test_runs_with_it_repeat_themselves_and_agree_with_those_without(monkeypatch):
    """Folded and step by step, and the result says which they were."""
    one, other = (trained(monkeypatch, "on") for _ in range(2))
    assert one.compiled.folded
    assert one.compiled.products == tuple(KINDS)
    stepwise = trained(monkeypatch, "on", on_step=lambda record: None)
    assert not stepwise.compiled.folded
    without = trained(monkeypatch, "on", compile=False)
    assert without.compiled.products == ()
    for name, weight in one.params.items():
        assert weight.equal(other.params[name])
        assert weight.equal(stepwise.params[name])
        torch.testing.assert_close(weight, without.params[name])
    assert one.history["train_loss"] == other.history["train_loss"]


@pytest.mark.slow
@needs_kernel
def test_a_resumed_run_tells_if_its_products_are_others(monkeypatch, tmp_path):
    trained(monkeypatch, "on", epochs=1, checkpoint=tmp_path)
    same = trained(monkeypatch, "on", epochs=1, checkpoint=tmp_path, resume=True)
    assert same.resume_exact
    with pytest.warns(UserWarning, match="matrix products by lossloop was"):
        other = trained(monkeypatch, "off", epochs=3, checkpoint=tmp_path, resume=True)
    assert not other.resume_exact


@pytest.mark.slow
@needs_kernel
def test_a_loop_called_from_cpp_has_it_too(monkeypatch):
    monkeypatch.setattr("lossloop._plan.STEPS_FOR_FAST_CALLS", 1)
    in_cpp = trained(monkeypatch, "on")
    assert in_cpp.compiled.folded
    monkeypatch.undo()
    for name, weight in trained(monkeypatch, "on").params.items():
        torch.testing.assert_close(weight, in_cpp.params[name])
