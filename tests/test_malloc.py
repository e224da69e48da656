"""What a step frees is there for the next one."""

import json
import platform
import subprocess
import sys

import pytest

CHILD = """
import json, resource
import torch
import lossloop as ll

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):  # what a step may have at once
        held = [torch.ones(2**20) for _ in range(30)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [faults(), faults()]
ll.init(lambda params, batch: None, torch.optim.SGD, params={"w": torch.ones(1)})
found += [faults(), faults()]
print(json.dumps(found))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="what other libraries do is their own"
)
@pytest.mark.parametrize("own", [None, "131072"])
def test_memory_stays_mapped_from_step_to_step(own, monkeypatch):
    for name in (
        *("GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE"),
        *("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"),
    ):
        monkeypatch.delenv(name, raising=False)
    if own:  # a threshold of the user's stays
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", own)
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # The second, without `init`, goes by what lies at the end of the heap.
    first, _, _, after = json.loads(done.stdout)
    pages = 4 * 30 * 2**22 / 4096
    if first < pages / 2:
        pytest.skip("the system maps larger pages")
    assert after > pages / 2 if own else after < pages / 20
