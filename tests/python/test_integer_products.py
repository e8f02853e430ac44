"""Decode steps over int8 caches by products of integers: where they would lose digits, others are taken. They are not
taken where L is asked for, which the tests use."""

import pytest
import torch

from mps_flash_attn import flash_attention_kvcache, quantize_kv

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = torch.float16, torch.bfloat16


def operands(queries=1, keys=160, columns=128, dtype=torch.float16, batch=2):
    """q, and K and V as codes and scales."""
    query = torch.randn(batch, 8, queries, columns).to(dtype)
    key, value = (quantize_kv(torch.randn(batch, 2, keys, columns), "int8") for _ in "kv")
    return query, *key, *value


def attend(query, k, k_scale, v, v_scale, **options):
    return flash_attention_kvcache(query, k, v, enable_gqa=True, k_scale=k_scale, v_scale=v_scale, **options)


def exact(query, k, k_scale, v, v_scale):
    """Attention in float64."""
    key, value = (
        (codes.double() * scale.double()).repeat_interleave(4, 1) for codes, scale in ((k, k_scale), (v, v_scale))
    )
    return torch.nn.functional.scaled_dot_product_attention(query.double(), key, value)


def is_close(found, expected, dtype):
    """Within two roundings of the largest number."""
    return (found.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("columns", (32, 64, 96, 128, 256))
@pytest.mark.parametrize("queries", (1, 2, 3, 4))
def test_error(queries, columns, dtype):
    tensors = operands(queries, columns=columns, dtype=dtype)
    assert is_close(attend(*tensors), exact(*tensors), dtype)


@pytest.mark.parametrize("size", (10.0, 1e3, 3e4))
def test_queries_with_an_outlier(size):
    """Beside the outlier, which meets codes of 0, the other columns would be rounded to few bits or to 0."""
    query, k, k_scale, v, v_scale = operands()
    query[..., 5], k[..., 5] = size, 0
    tensors = query, k, k_scale, v, v_scale
    assert is_close(attend(*tensors), exact(*tensors), torch.float16)
    if size > 100:
        assert torch.equal(attend(*tensors), attend(*tensors, return_lse=True)[0])


def test_large_scores():
    query, k, k_scale, v, v_scale = operands()
    tensors = 30 * query, k, k_scale, v, v_scale
    assert torch.equal(attend(*tensors), attend(*tensors, return_lse=True)[0])
    assert is_close(attend(*tensors), exact(*tensors), torch.float16)


@pytest.mark.parametrize("where", ("query", "k_scale", "v_scale"))
@pytest.mark.parametrize("number", (float("nan"), float("inf"), -float("inf")))
def test_numbers_that_are_not_finite(number, where):
    query, k, k_scale, v, v_scale = operands()
    {"query": query[0, 3, 0], "k_scale": k_scale[0, 1], "v_scale": v_scale[0, 1]}[where][7] = number
    tensors = query, k, k_scale, v, v_scale
    found, by_reals = attend(*tensors), attend(*tensors, return_lse=True)[0]
    assert torch.equal(found.isfinite(), by_reals.isfinite())
    assert torch.equal(found.isnan(), by_reals.isnan())
    assert found[1].isfinite().all()


@pytest.mark.parametrize("size", (1e-12, 1e-25, 1e-35, 1e25))
def test_scales_of_values_far_from_one(size):
    query, k, k_scale, v, v_scale = operands(dtype=torch.bfloat16)
    tensors = query, k, k_scale, v, v_scale * size
    assert is_close(attend(*tensors), exact(*tensors), torch.bfloat16)


def test_codes_of_zero_with_a_large_scale():
    """The unit of the queries times such a scale is infinite in f32, and its product with a sum of 0 is NaN."""
    query, k, k_scale, v, v_scale = operands(dtype=torch.bfloat16)
    query[:] = 2.0**100
    k[:] = 0
    tensors = query, k, k_scale * 0 + 2.0**60, v, v_scale
    assert is_close(attend(*tensors), exact(*tensors), torch.bfloat16)


def test_scales_of_values_with_signs():
    query, k, k_scale, v, v_scale = operands()
    tensors = query, k, k_scale, v, v_scale * torch.randn_like(v_scale).sign()
    assert is_close(attend(*tensors), exact(*tensors), torch.float16)


def test_one_key_outweighs_the_others():
    """Each block of keys has units of its own, so those of the others keep their digits."""
    query, k, k_scale, v, v_scale = operands(keys=256)
    query[:] = 1
    k[:, :, 100] = 127
    k_scale[:, :, 100] = 0.5 / 127
    v_scale[:, :, 100] = 0
    tensors = query, k, k_scale, v, v_scale
    assert is_close(attend(*tensors), exact(*tensors), torch.float16)
