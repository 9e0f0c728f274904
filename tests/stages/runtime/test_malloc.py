"""Freed memory stays with the process: the page faults of a repeated step are gone."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from stages.runtime.malloc import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_step()
plain = faults_of_a_step()
if keep_freed_memory():
    print(plain, min(faults_of_a_step() for _ in range(8)))  # the heap grows in the first of them
"""


HELD = """
import torch
from pathlib import Path
from stages.runtime.malloc import give_back_freed_memory, keep_freed_memory

def held():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) >> 10

def after_a_step(size):
    before = held()
    [torch.ones(size) for _ in range(4)]
    return held() - before

torch.ones(10).sum()
if keep_freed_memory():
    kept = after_a_step(12_000_000)
    give_back_freed_memory()
    print(kept, after_a_step(16_000_000))
"""


def numbers_printed_by(program: str) -> list[int]:
    """What a program measures of itself in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("this C library has no mallopt")
    return [int(number) for number in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is asked")
def test_returned_memory_is_no_longer_held() -> None:
    """MiB that four tensors of 48 MB, and of 64 MB that fit no freed block, leave behind."""
    kept, given_back = numbers_printed_by(HELD)
    assert kept > 150
    assert given_back < 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is asked")
def test_a_repeated_step_has_no_page_faults() -> None:
    plain, kept = numbers_printed_by(PROGRAM)
    # Four tensors of 48 MB: 46,875 pages of 4 KiB, or about a hundred of 2 MiB.
    assert plain > 50
    assert kept < plain / 10
