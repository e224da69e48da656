"""The vector instructions are tried once, and believed only if all have worked."""

import pytest
import torch
from torch._inductor import config, cpu_vec_isa

from lossloop._compile import inductor
from lossloop._isa import vector_options

KINDS = ["avx512", "avx2"]
BELIEVED = {"cpp.vec_isa_ok": True}


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """How often the instructions were tried; those that work can be changed."""
    calls = []
    tried = {"calls": calls, "work": KINDS}

    def try_all():
        calls.append(1)
        return tried["work"]

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: KINDS)
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", ["amx avx512", *KINDS])
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", try_all)
    return tried


def options():
    """As in a process of its own."""
    return vector_options.__wrapped__()


def test_what_has_worked_is_not_tried_again(tried):
    assert [options() for _ in range(3)] == [BELIEVED] * 3
    assert len(tried["calls"]) == 1


def test_another_compiler_or_torch_tries_again(tried, monkeypatch):
    name = "_get_isa_dry_compile_fingerprint"
    assert options() == BELIEVED
    monkeypatch.setattr(cpu_vec_isa, name, lambda flags: "another compiler")
    assert options() == BELIEVED
    assert len(tried["calls"]) == 2


def test_nothing_is_believed_if_one_kind_does_not_work(tried):
    tried["work"] = KINDS[1:]
    assert [options() for _ in range(2)] == [{}] * 2
    tried["work"] = KINDS
    assert options() == BELIEVED


@pytest.mark.usefixtures("tried")
def test_a_wish_of_the_callers_own_is_left_alone():
    with config.patch({"cpp.vec_isa_ok": False}):
        assert options() == {}


def test_without_a_compiler_there_is_nothing_to_say(tried, monkeypatch):
    def missing(flags):
        raise FileNotFoundError

    monkeypatch.setattr(cpu_vec_isa, "_get_isa_dry_compile_fingerprint", missing)
    assert options() == {}
    monkeypatch.undo()
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", list)
    assert options() == {}
    assert not tried["calls"]


def test_the_cache_tells_vectors_and_threads_apart(monkeypatch):
    tags = []

    def compile_fx(*args, **options):
        tags.append(torch.compiler.config.cache_key_tag)

    def tag():
        inductor(None, [torch.ones(2)])
        return tags[-1]

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    as_it_is = tag()
    with monkeypatch.context() as context:
        context.setenv("ATEN_CPU_CAPABILITY", "default")  # no vectors at all
        assert tag() != as_it_is
    with monkeypatch.context() as context:
        context.setattr(torch, "get_num_threads", lambda: 17)
        assert tag() != as_it_is
    with torch.compiler.config.patch(cache_key_tag="of the caller's own"):
        assert tag() == "of the caller's own" + as_it_is
    assert tag() == as_it_is
