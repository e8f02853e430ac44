"""context_parallel_attention beside flash_attention on one process, over 1 to 4 processes."""

import pytest
import torch

import cases
import pool

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check(size, **case):
    for errors in pool.shared().run(pool.RANKS[size], cases.compare, size, **case):
        assert max(errors.values()) <= TOLERANCE[case.get("dtype", torch.float64)], errors


@pytest.mark.parametrize("size", pool.SIZES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layouts(size, layout, is_causal, dtype):
    check(size, layout=layout, is_causal=is_causal, dtype=dtype)
