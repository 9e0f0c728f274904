"""Memory that tensors give back stays with the process: on a CPU, half of a bfloat16 step went into page faults.

glibc hands every allocation of more than 32 MiB (a chunk of logits, a weight's gradient) back to the
system when it is freed, and the next step faults each of its pages in again, zeroed. torch has no
caching allocator for the CPU, so glibc is asked to be one. Peak memory is unchanged; what shrinks is
how much is returned between peaks.
"""

import ctypes
import sys

# Names of mallopt's parameters in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for reuse; False where the C library is another one."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
