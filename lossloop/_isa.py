"""The vector instructions of compiled code: tried once a machine, part of its name."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch


@functools.cache
def vector_options() -> dict[str, Any]:
    """Options of Inductor that spare it trying the instructions in every process.

    It compiles a program for each kind and runs it, which takes a second even if the
    programs are there. Once all have worked, with this compiler and this torch, that is
    noted beside its cache of kernels, and believed from then on.
    """
    try:
        from torch._inductor import config, cpu_vec_isa
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        flags = cpu_vec_isa.x86_isa_checker()
        fingerprint: Any = cpu_vec_isa._get_isa_dry_compile_fingerprint  # pyright: ignore
        build = fingerprint("")
    except Exception:  # there is no compiler, or torch has these no longer
        return {}
    supported = map(str, cpu_vec_isa.supported_vec_isa_list)
    names = [name for name in supported if set(name.split()) <= set(flags)]
    if not names or config.cpp.vec_isa_ok is not None:
        return {}
    digest = hashlib.sha256(repr((names, build)).encode()).hexdigest()
    note = Path(cache_dir()) / f"lossloop-vectors-{digest[:16]}"
    if not note.exists():
        if list(map(str, cpu_vec_isa.valid_vec_isa_list())) != names:
            return {}
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    return {"cpp.vec_isa_ok": True}


def kernels_for() -> str:
    """What Inductor generates kernels for: vector instructions, and threads.

    Its cache knows a graph by neither (by the threads since torch 2.13), only what is
    compiled of it: found by a machine with shorter vectors, the loops of the longer
    ones count twice as far as they get, and write beyond the end.
    """
    from torch._inductor import config, cpu_vec_isa

    with config.patch(vector_options()):
        return f"{cpu_vec_isa.pick_vec_isa()}, {torch.get_num_threads()} threads"
