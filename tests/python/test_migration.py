"""Code written for the other package of this import name: docs/migration.md."""

import re
from pathlib import Path

import pytest
import torch

import mps_flash_attn
from mps_flash_attn import convert_mask, flash_attention

NAMES = """flash_attention flash_attention_with_bias flash_attention_chunked flash_attention_fp8 flash_attention_int8
flash_attention_nf4 flash_attention_quantized quantize_kv_fp8 quantize_kv_int8 quantize_kv_nf4 replace_sdpa precompile
clear_cache register_custom_op is_available convert_mask QUANT_FP8_E4M3 QUANT_FP8_E5M2 QUANT_INT8 QUANT_NF4 __version__
flash_attn_func torch_ops benchmark""".split()


@pytest.mark.parametrize("name", NAMES)
def test_name(name):
    """Each name exists here, or an error says what to use."""
    if name in ("flash_attention", "replace_sdpa", "is_available", "convert_mask", "__version__"):
        assert getattr(mps_flash_attn, name)
        return
    with pytest.raises(AttributeError, match=f"no attribute '{name}': that is of another package, mps-flash-attn; ."):
        getattr(mps_flash_attn, name)
    with pytest.raises(ImportError, match=name):
        exec(f"from mps_flash_attn import {name}")


def test_name_of_neither():
    with pytest.raises(AttributeError, match=r"no attribute 'flash_attentoin'$"):
        _ = mps_flash_attn.flash_attentoin


def test_version_is_that_of_the_header():
    header = (Path(__file__).parents[2] / "include/mfa.h").read_text()
    numbers = [re.search(rf"MFA_VERSION_{part} (\d+)", header)[1] for part in ("MAJOR", "MINOR", "PATCH")]
    assert mps_flash_attn.__version__ == ".".join(numbers)


def test_version_without_a_library(monkeypatch):
    monkeypatch.setattr("mps_flash_attn.library._library", None)
    monkeypatch.setenv("MFA_LIBRARY", "/nowhere/libmfa.so")
    with pytest.raises(AttributeError, match="has no version without its library: libmfa is not at /nowhere"):
        _ = mps_flash_attn.__version__


def test_convert_mask():
    bias = torch.zeros(5, 7).masked_fill(torch.rand(5, 7) < 0.3, -1e4)
    assert convert_mask(None) is None and convert_mask(bias) is bias
    with pytest.raises(ValueError, match=r"attn_mask is bool, .* ~attn_mask .* True takes part"):
        convert_mask(bias < 0)
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    out = flash_attention(query, key, value, attn_mask=convert_mask(bias))
    torch.testing.assert_close(out, flash_attention(query, key, value, attn_mask=~(bias <= -1e3)))


@pytest.mark.parametrize("again", [False, True])
def test_bf16_backward(again):
    query = torch.randn(1, 2, 5, 8)
    for _ in range(3 if again else 0):
        flash_attention(query, query, query, bf16_backward=False)
    assert torch.equal(flash_attention(query, query, query, bf16_backward=False), flash_attention(query, query, query))
    with pytest.raises(ValueError, match="bf16_backward is True; leave it out"):
        flash_attention(query, query, query, bf16_backward=True)


def test_masks_and_windows():
    """The remedies in the page's third column give the results that its second column states."""
    query, key, value = (torch.randn(2, 2, 9, 8) for _ in range(3))
    row, column = torch.arange(9)[:, None], torch.arange(9)
    hidden = torch.rand(2, 9, 9) < 0.3
    out = flash_attention(query, key, value, attn_mask=~hidden[:, None])
    added = torch.zeros(2, 1, 9, 9).masked_fill(hidden[:, None], float("-inf"))
    torch.testing.assert_close(out, flash_attention(query, key, value, attn_mask=added))
    before = column >= row - 3
    out = flash_attention(query, key, value, True, window_size=3 + 1)
    torch.testing.assert_close(out, flash_attention(query, key, value, attn_mask=before & (column <= row)))
    out = flash_attention(query, key, value, window_size=(3, -1))
    torch.testing.assert_close(out, flash_attention(query, key, value, attn_mask=before))
