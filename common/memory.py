"""
Memory that is kept for the next step: keep() is called when a program starts.

A training step frees what the step after it asks for again. The C library hands large tensors and long runs
of freed memory back to the system, which then finds and clears every page anew: 6,000 pages in a step of GIVT
on CIFAR-10, a tenth of its time on a quiet machine and more beside other programs. So let it keep up to a
gigabyte. Linux only, where torch uses GNU's C library. A user's own MALLOC_ variables count, and then nothing
is set. A GPU's memory is torch's own affair.
"""
import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3                     # names of mallopt(3), from malloc.h
KEPT = 2 ** 30                                              # bytes that are free and not handed back
LARGEST = 2 ** 25                                           # bytes of a tensor that is kept: glibc's limit


def keep():
    """Keep freed memory in this process, where the C library can be told so -> whether it was told."""
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if own or mallopt is None:
        return False
    return bool(mallopt(TRIM_THRESHOLD, KEPT) and mallopt(MMAP_THRESHOLD, LARGEST))
