"""How the C library of a training process deals with memory that is freed."""

import ctypes
import sys

# mallopt(3) of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets the process keep what it frees, for the next buffer of that size.

    XLA on CPU allocates the buffers of a program whenever it runs. glibc maps large ones anew each
    time and returns them at the end, so that every step faults in all of its pages again (a
    quickstart step: 12,600 to 22,500 faults, a tenth of its processor time; benchmarks/LOG.md).
    All threads share one heap, as only the main one may grow without limit. Does nothing where the
    C library has no `mallopt`; another allocator that was preloaded ignores it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_ARENA_MAX, 1)):
        mallopt(option, value)
