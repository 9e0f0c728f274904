"""Memory that tensors give back stays with the process: on a CPU, half of a bfloat16 step went into page faults.

glibc hands every allocation of more than 32 MiB (a chunk of logits, a weight's gradient) back to the
system when it is freed, and the next step faults each of its pages in again, zeroed. torch has no
caching allocator for the CPU, so glibc is asked to be one. Peak memory is unchanged; what shrinks is
how much is returned between peaks. What is kept is split for smaller tensors, so a process holds more than lives
in it; where that is to be measured, the other way round: freed memory goes back at once.
"""

import ctypes
import sys

# Names of mallopt's parameters in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
TOP_PAD_BYTES = 64 << 20
MMAP_BYTES = 64 << 10


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for reuse; False where the C library is another one."""
    return _tell((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))


def give_back_freed_memory() -> bool:
    """Tell glibc to return every tensor's memory when it is freed, and what is free now; False as above.

    For measuring: from now on the process holds what lives in it, and faults every page in anew.
    """
    settings = ((M_MMAP_MAX, 1 << 20), (M_MMAP_THRESHOLD, MMAP_BYTES), (M_TRIM_THRESHOLD, 0), (M_TOP_PAD, 0))
    if not _tell(*settings):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _tell(*settings: tuple[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings)
