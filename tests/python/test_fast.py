"""fast="int8": products of int8 over keys and values in int8. The C tests cross it with every option and check how far
results are off; here is what reaches libmfa, what is refused, and that results lie within the bound of
docs/pytorch.md."""

import pytest
import torch
from torch.library import opcheck

from mps_flash_attn import (
    Unsupported,
    explain,
    flash_attention_kvcache,
    flash_attention_varlen,
    quantize_kv,
)
from mps_flash_attn.flash_attn import flash_attn_with_kvcache
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from stand_in import DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")
B, HEADS, KV_HEADS, L, S, D = 2, 4, 2, 40, 300, 64


def operands(dtype=torch.float32, kind="int8", group=0):
    """(query, key, value, the scales' keywords)."""
    query = torch.randn(B, HEADS, L, D).to(dtype)
    (key, k_scale), (value, v_scale) = (quantize_kv(torch.randn(B, KV_HEADS, S, D), kind, group) for _ in "kv")
    return query, key, value, {"k_scale": k_scale, "v_scale": v_scale}


def exact(query, key, value, k_scale, v_scale):
    """(out, lse) of attention without a mask, and by how much each may be off: a block is taken to be all keys."""
    group = HEADS // KV_HEADS
    keys, values = (
        (one.double() * scale).repeat_interleave(group, 1) for one, scale in ((key, k_scale), (value, v_scale))
    )
    codes, scales = value.double().repeat_interleave(group, 1), v_scale.repeat_interleave(group, 1)
    query = query.double()
    scores = query @ keys.mT * D**-0.5
    weights = scores.softmax(-1)
    off = D**-0.5 * query.abs().amax(-1) / 254 * keys.abs().sum(-1).amax(-1, keepdim=True)
    largest = (weights * scales.mT).amax(-1, keepdim=True)
    of_weights = torch.exp(2 * off)[..., None] / 510 * largest * codes.abs().sum(-2, keepdim=True)
    of_out = torch.expm1(2 * off)[..., None] * (weights @ values.abs()) + of_weights
    return (weights @ values, of_out), (scores.logsumexp(-1), off)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_lie_within_the_bound(dtype):
    query, key, value, scales = operands(dtype)
    out, lse = flash_attention_kvcache(query, key, value, enable_gqa=True, return_lse=True, fast="int8", **scales)
    rounding = 4 * torch.finfo(dtype).eps
    for found, (right, bound) in zip((out, lse), exact(query, key, value, **scales), strict=True):
        assert ((found.double() - right).abs() <= bound + rounding * (1 + right.abs())).all()
        assert (found.double() - right).norm() < 0.03 * right.norm()


def test_which_kernel_runs():
    query, key, value, scales = operands(torch.bfloat16)
    kernels = [explain(query, key, value, enable_gqa=True, **scales, fast=fast) for fast in (None, "int8")]
    plain, fast = (found.kernel.split("_bf16_")[0] for found in kernels)
    assert plain == "forward"
    assert fast == ("forward_int8" if kernels[1].machine.endswith("bf16") else "forward")
    few = explain(query[:, :, :1], key, value, enable_gqa=True, **scales, fast="int8")
    assert few.kernel.startswith("decode_")


def test_the_same_by_every_function():
    query, key, value, scales = operands()
    expected = flash_attention_kvcache(query, key, value, "bottom_right", enable_gqa=True, fast="int8", **scales)
    rows = [one.transpose(1, 2) for one in (query, key, value)]
    of_rows = {name: scale.transpose(1, 2) for name, scale in scales.items()}
    found = flash_attn_with_kvcache(*rows, causal=True, fast="int8", **of_rows)
    assert torch.equal(found.transpose(1, 2), expected)
    ends = [torch.arange(B + 1, dtype=torch.int32) * length for length in (L, S)]
    packed = (one.flatten(0, 1) for one in rows)
    of_packed = {name: scale.flatten(0, 1) for name, scale in of_rows.items()}
    found = flash_attention_varlen(*packed, *ends, L, S, "bottom_right", enable_gqa=True, fast="int8", **of_packed)
    assert torch.equal(found.unflatten(0, (B, L)).transpose(1, 2), expected)


def test_the_operator():
    query, key, value, scales = operands()
    inputs = Inputs(query, key, value, **scales)
    options = Options(k_type="int8", v_type="int8", fast="int8")
    opcheck(torch.ops.mfa.attention_forward.default, (*inputs, *options))
    expected = flash_attention_kvcache(query, key, value, enable_gqa=True, fast="int8", **scales)
    assert torch.equal(torch.ops.mfa.attention_forward(*inputs, *options)[0], expected)


@pytest.mark.parametrize(
    ("kind", "group", "fast", "words"),
    [
        ("int8", 0, "fp8", "fast is 'fp8'; it must be None or 'int8'"),
        ("int8", 32, "int8", "fast is 'int8' and key int8 with 2 scales for a row; both must be int8 with one scale"),
        ("e4m3", 0, "int8", "fast is 'int8' and key e4m3 with 1 scales for a row"),
    ],
)
def test_refused(kind, group, fast, words):
    query, key, value, scales = operands(kind=kind, group=group)
    for function in (flash_attention_kvcache, explain):
        with pytest.raises(ValueError, match=words):
            function(query, key, value, enable_gqa=True, fast=fast, **scales)


def test_refused_with_numbers_and_gradients():
    query, key, value, scales = operands()
    with pytest.raises(ValueError, match="fast is 'int8' and key numbers; both must be int8"):
        flash_attention_kvcache(query, query, query, fast="int8")
    with pytest.raises(Unsupported, match="codes have no gradient"):
        flash_attention_kvcache(query.requires_grad_(), key, value, enable_gqa=True, fast="int8", **scales)
