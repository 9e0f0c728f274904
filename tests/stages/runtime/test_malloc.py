"""Freed memory stays with the process: the page faults of a repeated step are gone."""

import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is asked"),
]

# A new interpreter, because a training in this process has set the allocator already; a fork of it for each measure.
PROGRAM = """
import os, resource
from pathlib import Path
import torch
from stages.runtime.malloc import give_back_freed_memory, keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def faults():
    faults_of_a_step()
    plain = faults_of_a_step()
    if keep_freed_memory():
        return plain, min(faults_of_a_step() for _ in range(8))  # the heap grows in the first of them

def held():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) >> 10

def held_after_a_step(size):
    before = held()
    [torch.ones(size) for _ in range(4)]
    return held() - before

def kept_and_given_back():
    torch.ones(10).sum()
    if keep_freed_memory():
        kept = held_after_a_step(12_000_000)
        give_back_freed_memory()
        return kept, held_after_a_step(16_000_000)

for measure in (faults, kept_and_given_back):
    if os.fork() == 0:
        print(*(measure() or ()), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def measured() -> list[list[int]]:
    """What the program measures of its two children."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    if not all(lines):
        pytest.skip("this C library has no mallopt")
    return lines


def test_returned_memory_is_no_longer_held(measured) -> None:
    """MiB that four tensors of 48 MB, and of 64 MB that fit no freed block, leave behind."""
    kept, given_back = measured[1]
    assert kept > 150
    assert given_back < 20


def test_a_repeated_step_has_no_page_faults(measured) -> None:
    plain, kept = measured[0]
    # Four tensors of 48 MB: 46,875 pages of 4 KiB, or about a hundred of 2 MiB.
    assert plain > 50
    assert kept < plain / 10
