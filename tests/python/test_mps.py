"""Tensors of the mps device, as far as a machine without one has them: PyTorch's fake ones, which have no memory.

That their calls reach the Metal backend and are right is tested with stand-ins: MFA_BACKEND=metal."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mps_flash_attn import flash_attention, is_available, replaced_sdpa, sdpa_stats, tensors
from mps_flash_attn.sdpa import dispatch, torch_mps

SHAPE, STRIDES = (2, 4, 33, 24), (3168, 24, 96, 1)  # memory of (batch, length, heads, head_dim)


@pytest.fixture
def operands():
    with FakeTensorMode():
        yield [torch.empty_strided(SHAPE, STRIDES, device="mps") for _ in range(3)]


def test_flash_attention(operands):
    out, lse = flash_attention(*operands, is_causal=True, return_lse=True)
    assert out.device.type == lse.device.type == "mps"
    assert out.shape == SHAPE and out.stride() == STRIDES and lse.shape == SHAPE[:3] and lse.dtype == torch.float32


def test_autocast(operands):
    with torch.autocast("mps", dtype=torch.float16):
        assert flash_attention(*operands).dtype == torch.float16


def test_replaced_sdpa():
    """SDPA is replaced at the dispatch keys of MPS, for calls of any size."""
    sdpa_stats(reset=True)
    with FakeTensorMode(), replaced_sdpa():
        out = F.scaled_dot_product_attention(*[torch.empty(1, 1, 2, 8, device="mps") for _ in range(3)])
    assert sdpa_stats() == {"traced into a compiled graph": 1}
    assert out.device.type == "mps" and out.shape == (1, 1, 2, 8) and out.is_contiguous()


def test_what_stays_with_pytorch(monkeypatch):
    """A call for which PyTorch has a kernel stays with it. This PyTorch cannot run it, so a stand-in does."""
    monkeypatch.setattr(dispatch, "original_for", lambda _: lambda query, *_, **__: query)
    monkeypatch.setattr(torch_mps, "_kernels", torch_mps.installed_kernels("2.13.0", (15, 0)))
    sdpa_stats(reset=True)
    with FakeTensorMode(), replaced_sdpa():
        operands = [torch.empty(1, 2, 33, 64, device="mps") for _ in range(3)]
        assert F.scaled_dot_product_attention(*operands) is operands[0]
    assert sdpa_stats() == {"PyTorch's own kernel": 1}


def test_place_of_a_view(monkeypatch):
    """Views of one storage are places in one buffer."""
    monkeypatch.setattr(tensors, "metal_buffer", lambda tensor: tensor.untyped_storage().data_ptr())
    whole = torch.empty(4, 5, 6, dtype=torch.float16)
    base = whole.data_ptr()
    assert tensors.place_on_metal(whole) == (base, 0)
    assert tensors.place_on_metal(whole[2, 1:, 3:]) == (base, 2 * (2 * 30 + 6 + 3))
    assert tensors.place_on_metal(whole[:0]) == (base, 0)
    assert tensors.place_on_metal(None) == (0, 0)


def test_is_available():
    assert is_available() and is_available("cpu") and not is_available("cuda") and not is_available("meta")
    assert is_available("mps") == torch.backends.mps.is_available()
