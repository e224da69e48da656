"""Memory of the processor that each step frees and the next asks for again."""

import ctypes
import functools
import os

# Of mallopt(3), glibc; the first is as large as it can be.
_MMAP_THRESHOLD, _LARGEST_KEPT = -3, 2**25
_TRIM_THRESHOLD, _KEPT = -1, 2**28


@functools.cache
def keep_freed() -> None:
    """Lets malloc keep up to 256 MB of what is freed, instead of 128 KB.

    What is given back to the system has to be mapped and cleared again in the next
    step, page by page. That took a fifth of the time of a transformer's steps, on some
    runs and not on others: it goes by what happens to lie at the end of the heap.

    glibc maps pieces above a threshold by themselves, and above another gives back what
    is free at the end of its heap. It raises both as such pieces are freed, which is
    too late and, at 64 MB, too little. Thresholds that the user has set stay, and
    elsewhere than with glibc nothing is done.
    """
    own = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    if os.name != "posix" or any(name in os.environ for name in own):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _KEPT)
