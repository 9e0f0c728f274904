"""A full disk and a lack of memory as one line, whichever library reports them and in whichever words."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import AlignError, MachineError
from cache.files import disk_errors_named

# safetensors and tokenizers, which are written in Rust.
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
# The writer of `torch.save`, which does not pass on the reason: it wrote less than it was given.
TORCH_WRITER = ("unexpected pos", "PytorchStreamWriter failed", "file write failed")
# The allocators of torch for the CPU and for CUDA.
TORCH_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` or a file in it into a `MachineError` that names it and the reason."""
    with disk_errors_named(path):
        try:
            yield
        except (OSError, AlignError):
            raise
        except Exception as error:
            if (reason := _why_not_written(error)) is None:
                raise
            raise OSError(reason, os.strerror(reason)) from error


def _why_not_written(error: Exception) -> int | None:
    """The error number of a failed write, or None if the error is another one."""
    if found := RUST_ERROR.search(str(error)):
        return int(found[1])
    if isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_WRITER):
        return errno.ENOSPC
    return None


@contextmanager
def using_memory(advice: str) -> Iterator[None]:
    """Turn a lack of memory into a `MachineError` that ends with `advice`, sentences that say what to type."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:  # torch's own error for CUDA is a RuntimeError
        if not _is_lack_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MachineError(f"Out of memory ({reason}). {advice}") from error


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error) for words in TORCH_MEMORY)
