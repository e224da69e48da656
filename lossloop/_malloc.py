"""Memory of the processor that each step frees and the next asks for again."""

import functools

import torch

# That malloc still learns from, less a page for what it notes itself.
LARGEST = 2**25 - 2**12


@functools.cache
def keep_freed() -> None:
    """Lets malloc keep up to 64 MB of what is freed, instead of 128 KB.

    What is given back to the system has to be mapped and cleared again in the next
    step, page by page. That took a sixth of the time of a transformer's steps, on some
    runs and not on others: it goes by what happens to lie at the end of the heap.

    glibc maps what is larger than a threshold by itself, and raises the threshold to
    the size of whatever of that kind is freed, up to 32 MB; at twice that it gives back
    the end of its heap (mallopt(3), M_MMAP_THRESHOLD). So a piece of that size is asked
    for here, not touched, and freed. A threshold that the user has set stays, and
    elsewhere than with glibc nothing comes of it.
    """
    torch.UntypedStorage(LARGEST, device="cpu")
