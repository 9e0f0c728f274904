"""Makes glibc's allocator keep freed memory for reuse, as a caching allocator does, or return it at once.

torch has no caching allocator for the CPU. By default glibc returns every allocation of more than 32 MiB (a chunk of
logits, the gradient of a weight) to the system when it is freed, and the next step faults each of its pages in again:
half of the time of a bfloat16 step. Kept memory is split for smaller tensors, so the process holds more than its live
tensors; to measure live memory, freed memory has to be returned at once. Peak memory is the same either way.
"""

import ctypes
import sys

# Names of mallopt's parameters in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
TOP_PAD_BYTES = 64 << 20
MMAP_BYTES = 64 << 10


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for reuse; False if the C library is another one."""
    return _set_options((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))


def give_back_freed_memory() -> bool:
    """Make glibc return memory when it is freed, and all free memory now; False if the C library is another one.

    For measuring: from now on the process holds its live tensors only, and allocations are slower.
    """
    settings = ((M_MMAP_MAX, 1 << 20), (M_MMAP_THRESHOLD, MMAP_BYTES), (M_TRIM_THRESHOLD, 0), (M_TOP_PAD, 0))
    if not _set_options(*settings):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _set_options(*settings: tuple[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings)
