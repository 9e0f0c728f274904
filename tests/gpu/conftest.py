"""The device of the tests that need a GPU. `benchmarks/gpu.sh --device cpu --tiny` runs the same tests on a CPU."""

import os

import pytest
import torch

DRY_RUN = "ALIGN_GPU_TESTS_ON"  # cpu: so that the tests are known to run before a GPU is at hand


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The CUDA device, or the CPU in a dry run; else the test is skipped."""
    if os.environ.get(DRY_RUN) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device; {DRY_RUN}=cpu runs this on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")
