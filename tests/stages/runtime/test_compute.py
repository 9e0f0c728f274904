"""How models run: what a processor is told about its dtypes."""

import pytest
import torch

from stages.runtime.compute import Compute, multiplies_bfloat16, set_up_process


@pytest.mark.parametrize(
    ("capabilities", "multiplies"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bw": False}, False),
        ({"architecture": "x86_64", "avx2": True, "avx512_bw": True, "avx512_bf16": False}, True),
        ({"architecture": "x86_64", "avx2": True, "avx512_bw": False, "avx_ne_convert": True}, True),
        ({"architecture": "aarch64"}, True),
    ],
)
def test_which_processors_multiply_bfloat16(capabilities, multiplies):
    assert multiplies_bfloat16(capabilities) == multiplies


def test_a_slow_dtype_is_named_on_this_processor_as_its_capabilities_say():
    said: list[str] = []
    set_up_process(Compute(torch.device("cpu"), torch.float32, 2048), said.append)
    assert said == []
    set_up_process(Compute(torch.device("cpu"), torch.bfloat16, 2048), said.append)
    is_slow = not multiplies_bfloat16(torch.cpu.get_capabilities())
    assert [("--set compute.dtype=float32" in line) for line in said] == [True] * is_slow
