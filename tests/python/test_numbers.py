"""Numbers that are large, small, or near the end of their range: flash_attention is right where its scores and results
are numbers of the working precision, and refuses what its kernels are not made for."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mps_flash_attn import Unsupported, explain, flash_attention, replaced_sdpa, sdpa_stats
from stand_in import ON_METAL


def gradients(function, dtype, d_out, *operands):
    operands = [operand.to(dtype).detach().requires_grad_() for operand in operands]
    out = function(*operands)
    return (out.detach(), *torch.autograd.grad(out, operands, d_out.to(dtype)))


def by_math(*operands):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*operands)


def errors(got, truth):
    """Root mean square errors: the largest of a few errors varies too much from seed to seed."""
    return [(ours - exact).square().mean().sqrt().item() for ours, exact in zip(got, truth, strict=True)]


@pytest.mark.cpu("the kernels for Metal keep their scores in base two")
@pytest.mark.parametrize("size", [10, 30, 60, 1000])  # |s| of about 300 to 3 million
@pytest.mark.parametrize("length", [3, 100])
def test_large_scores(size, length):
    """At most twice as far from float64 as the farther of PyTorch's fused kernel and its math path.

    On AVX-512 both are as far. Our kernels add up a score one number of head_dim after another, which with AVX2 is 1.6
    times as far as PyTorch's sums of several parts, and with MFA_ISA=scalar may exceed the bound.

    The keys of a head are nearly the same, so the scores of a row are large and differ by about 1: every row shows how
    its scores were rounded.
    """
    query, key, value, d_out = (torch.randn(32, 2, length, 64) for _ in range(4))
    operands = (query * size, key[:, :, :1] * size + key / size, value)
    truth = gradients(by_math, torch.float64, d_out, *operands)
    ours = errors(gradients(flash_attention, torch.float32, d_out, *operands), truth)
    fused, math = (
        errors(gradients(function, torch.float32, d_out, *operands), truth)
        for function in (F.scaled_dot_product_attention, by_math)
    )
    # dP - D of a row with one key is the difference of two sums of the same numbers, which may be 0 by luck.
    floors = [1e-6, *[1e-6 * size * length**0.5] * 2, 1e-6]
    for name, own, other, floor in zip(("out", "dQ", "dK", "dV"), ours, map(max, fused, math), floors, strict=True):
        assert own <= 2 * other + floor, f"{name}: {own:.3g}, PyTorch {other:.3g}"


SCALES = [
    *[(1e25, 1e19, 1e-44), (1e25, 1e21, 1e-46), (1e-20, 1e-19, 1e39), (1.0, 1e-15, 1e15)],
    pytest.param((1e10, 1e-40, 1e30), marks=pytest.mark.cpu("Apple's GPUs may read subnormal numbers as 0")),
]


@pytest.mark.parametrize("sizes", SCALES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 100])
def test_scales_far_from_one(sizes, dtype, length):
    q_size, k_size, scale = sizes
    query, key, value, d_out = (torch.randn(1, 2, rows, 16) for rows in (length, 70, 70, length))
    query, key, value = (query * q_size).to(dtype), (key * k_size).to(dtype), value.to(dtype)
    if ON_METAL and not 2.0**-100 <= scale <= 2.0**100:
        with pytest.raises(Unsupported, match=r"scale is .* Metal kernels exist"):
            flash_attention(query, key, value, scale=scale)
        return

    def definition(query, key, value):
        return torch.softmax(scale * (query @ key.mT), -1) @ value

    truth = gradients(definition, torch.float64, d_out, query, key, value)
    found = gradients(lambda *operands: flash_attention(*operands, scale=scale), dtype, d_out, query, key, value)
    for name, got, exact in zip(("out", "dQ", "dK", "dV"), found, truth, strict=True):
        if 1e-35 < exact.abs().max() < 3e38:  # what that type can hold
            bound = (3e-5 if dtype is torch.float32 else 3e-2) * exact.abs().max()
            assert (got - exact).abs().max() <= bound, name


@pytest.mark.parametrize("scale", [1e-61, -1e70])
def test_scales_that_no_kernel_is_made_for(scale):
    query = torch.randn(1, 1, 5, 8)
    with pytest.raises(Unsupported, match=re.escape(f"scale is {scale:g}; ")):
        flash_attention(query, query, query, scale=scale)
    assert not explain(query, query, query, scale=scale)
    if scale > 0:
        sdpa_stats(reset=True)
        with replaced_sdpa():
            out = F.scaled_dot_product_attention(*[torch.randn(1, 8, 64, 64)] * 3, scale=scale)
        assert out.isfinite().all()
        assert any(reason.startswith("scale is 1e-61") for reason in sdpa_stats()), sdpa_stats()


@pytest.mark.parametrize("scale", [float("inf"), float("-inf"), float("nan")])
def test_scales_that_are_no_numbers(scale):
    query = torch.randn(1, 1, 5, 8)
    with pytest.raises(ValueError, match=r"scale is .*; it must be finite"):
        flash_attention(query, query, query, scale=scale)


@pytest.mark.cpu("the kernels for Metal sum up O before they divide it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 30, 100])
def test_values_near_the_largest_number(dtype, length):
    query, key = torch.ones(1, 1, length, 1), torch.zeros(1, 1, 1100, 1)
    key[0, 0, 8:, 0] = 5.5
    value = torch.full((1, 1, 1100, 3), 3e38)
    value[..., 1] = -3e38
    out = flash_attention(*(tensor.to(dtype) for tensor in (query, key, value)), scale=1.0)
    expected = torch.tensor([3e38, -3e38, 3e38]).to(dtype).float()
    assert ((out.float() - expected).abs() <= 1e-5 * 3e38).all() if dtype is torch.float32 else (out == expected).all()
