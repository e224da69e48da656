"""What a step frees is there for the next one."""

import json
import platform
import subprocess
import sys

import pytest

CHILD = """
import json, os, resource
import torch
import lossloop as ll

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):  # 4 MB three times, what a step may have at once
        held = [torch.ones(2**20) for _ in range(3)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

found, at_rest = [faults(), faults()], resident()
ll.init(lambda params, batch: None, torch.optim.SGD, params={"w": torch.ones(1)})
grown = resident() - at_rest
found += [faults(), faults()]
print(json.dumps([found, grown]))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="what other libraries do is their own"
)
def test_memory_stays_mapped_from_step_to_step(monkeypatch):
    for name in ("GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (*before, _, after), grown = json.loads(done.stdout)
    pages = 10 * 3 * 2**22 / 4096
    if before[0] < pages / 2:
        pytest.skip("the system maps larger pages")
    assert before[1] > pages / 2
    assert after < pages / 20
    assert grown < 2**23  # the piece that malloc learns from is never touched
