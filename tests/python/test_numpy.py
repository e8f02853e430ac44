"""mps_flash_attn.numpy, compared bit by bit with flash_attention; and the package without PyTorch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mps_flash_attn import Unsupported, flash_attention
from mps_flash_attn.numpy import attention, attention_backward
from stand_in import TIMEOUT

DTYPES = ("float32", "float64", "float16", "bfloat16")
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": "bottom_right", "scale": 0.3},
    "window": {"window_size": (9, 4), "softcap": 5.0},
    "bool mask": {"attn_mask": "bool"},
    "float mask": {"attn_mask": "float", "is_causal": True},
    "alibi": {"alibi_slopes": (4,)},
    "sinks": {"sinks": (4,), "window_size": 16},
    "sinks of each entry": {"sinks": (2, 4)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 7},
    "blocks": {"block_mask": (2, 1), "block_size": (16, 32)},
}


def random(*shape, dtype="float32", seed=1):
    array = np.random.default_rng([seed, *shape]).standard_normal(shape)
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    return array.astype(dtype)


def strided(array, how):
    """The same values in other memory."""
    if how == "dense":
        return array
    if how == "heads last":  # memory (B, N, H, D)
        return np.ascontiguousarray(array.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    if how == "reversed":
        return np.ascontiguousarray(array[:, :, ::-1, ::-1])[:, :, ::-1, ::-1]
    if how == "unaligned":
        memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
        copy = memory.view(array.dtype).reshape(array.shape)
        copy[...] = array
        assert not copy.flags.aligned
        return copy
    return np.repeat(array, 3, axis=-1)[..., ::3]  # columns apart


def tensor(array):
    """A tensor of the same values; NumPy's strides may be negative, which PyTorch's may not."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def bits(array):
    array = array.detach().view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else array
    return np.ascontiguousarray(array).view(np.uint8).ravel()


def resolved(options, q, k):
    """The options with arrays where they say what of."""
    found = dict(options)
    if "attn_mask" in found:
        mask = random(4, 1, k.shape[2])
        found["attn_mask"] = mask > 0 if found["attn_mask"] == "bool" else mask
    for name in ("sinks", "alibi_slopes"):
        if name in found:
            found[name] = np.abs(random(*found[name]))
    if "block_mask" in found:
        found["block_mask"] = random(*found["block_mask"], -(-q.shape[2] // 16), -(-k.shape[2] // 32)) > -0.5
    return found


@pytest.mark.parametrize(
    "dtype, how",
    [
        *((dtype, "dense") for dtype in DTYPES),
        *(("float32", how) for how in ("heads last", "reversed", "columns apart")),
        ("bfloat16", "unaligned"),
    ],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_bits_as_on_tensors(options, dtype, how, one_thread):
    q, k, v = random(2, 4, 40, 24, dtype=dtype), random(2, 2, 56, 24, dtype=dtype), random(2, 2, 56, 16, dtype=dtype)
    d_out = random(2, 4, 40, 16, dtype=dtype, seed=2)
    given = resolved(options, q, k)
    of_tensors = {name: tensor(one) if isinstance(one, np.ndarray) else one for name, one in given.items()}
    inputs = [tensor(one).requires_grad_() for one in (q, k, v)]
    mask, sinks = of_tensors.get("attn_mask"), of_tensors.get("sinks")
    has_mask_gradient = mask is not None and mask.dtype != torch.bool
    inputs += [one.requires_grad_() for one in (mask if has_mask_gradient else None, sinks) if one is not None]
    expected, expected_lse = flash_attention(*inputs[:3], **of_tensors, enable_gqa=True, return_lse=True)

    q, k, v = (strided(one, how) for one in (q, k, v))
    out, lse = attention(q, k, v, **given, enable_gqa=True, return_lse=True)
    assert (bits(out) == bits(expected)).all() and (bits(lse) == bits(expected_lse)).all()
    assert (bits(attention(q, k, v, **given, enable_gqa=True)) == bits(out)).all()
    if how == "heads last":
        assert out.transpose(0, 2, 1, 3).flags.c_contiguous

    expected = torch.autograd.grad(expected, inputs, tensor(d_out))
    found = attention_backward(d_out, q, k, v, out, lse, **given, enable_gqa=True, mask_gradient=has_mask_gradient)
    found = [one for one in found if one is not None]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype.name == str(b.dtype).removeprefix("torch.")
        if dtype in ("float16", "bfloat16"):  # autograd has out_low, with which out is not rounded
            np.testing.assert_allclose(a.astype(np.float64), b.double().numpy(), rtol=0.1, atol=0.1)
        elif b.shape == (4,):  # sinks, whose gradient PyTorch sums over the batch after it is rounded
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-5)
        else:
            assert (bits(a) == bits(b)).all()


def test_gradient_of_lse():
    q, k, v = (random(1, 2, 20, 8, dtype="float64", seed=seed) for seed in range(3))
    d_lse = random(1, 2, 20, dtype="float64")
    out, lse = attention(q, k, v, return_lse=True)
    found = attention_backward(np.zeros_like(out), q, k, v, out, lse, d_lse=d_lse)
    tensors = [tensor(one).requires_grad_() for one in (q, k, v)]
    _, expected = flash_attention(*tensors, return_lse=True)
    expected.backward(tensor(d_lse))
    for a, b in zip(found[:3], tensors, strict=True):
        np.testing.assert_allclose(a, b.grad.numpy(), rtol=1e-12, atol=1e-12)


def test_sizes_of_zero():
    q, none = random(1, 2, 3, 8), np.zeros((1, 2, 0, 8), np.float32)
    assert (attention(q, none, none) == 0).all()
    assert attention(none, q, q).shape == (1, 2, 0, 8)


Q = np.zeros((1, 2, 4, 8), np.float32)


@pytest.mark.parametrize(
    "error, said, changes",
    [
        (TypeError, r"query is a list; it must be a numpy\.ndarray", {"query": [1]}),
        (TypeError, "key is a MaskedArray", {"key": np.ma.masked_array(Q, Q > 0)}),
        (TypeError, "query is float32 of the other byte order", {"query": Q.astype(Q.dtype.newbyteorder())}),
        (TypeError, "query is int64; it must be float32, float16", {"query": Q.astype(np.int64)}),
        (TypeError, "query is float64, key float32 and value float32", {"query": Q.astype(np.float64)}),
        (ValueError, "value has 3 dimensions; it must have 4", {"value": Q[0]}),
        (ValueError, "key has the length 4 and value 3", {"value": Q[:, :, :3]}),
        (ValueError, "query has 2 heads and key has 1; enable_gqa=True", {"key": Q[:, :1], "value": Q[:, :1]}),
        (ValueError, r"attn_mask has the shape \(3, 4\)", {"attn_mask": np.zeros((3, 4), bool)}),
        (TypeError, "attn_mask is int32; it must be bool", {"attn_mask": np.zeros((4, 4), np.int32)}),
        (TypeError, "sinks is float64; it must be float32", {"sinks": np.zeros(2)}),
        (ValueError, r"alibi_slopes has the shape \(3,\)", {"alibi_slopes": np.zeros(3, np.float32)}),
        (ValueError, "dropout_p is 0.5 and dropout_seed None", {"dropout_p": 0.5}),
        (ValueError, "block_size belongs to a block_mask", {"block_size": 16}),
        (TypeError, "block_mask is float32; it must be bool", {"block_mask": Q}),
        (ValueError, r"is_causal is 'left'", {"is_causal": "left"}),
        (TypeError, "scale is 'x'; it must be a number", {"scale": "x"}),
        (ValueError, "softcap", {"softcap": -1.0}),
        (Unsupported, "head_dim", {name: np.zeros((1, 1, 2, 600), np.float32) for name in ("query", "key", "value")}),
    ],
)
def test_wrong_arguments(error, said, changes):
    with pytest.raises(error, match=said):
        attention(**({"query": Q, "key": Q, "value": Q} | changes))


@pytest.mark.parametrize(
    "error, said, changes",
    [
        (
            ValueError,
            r"lse has the shape \(1, 2, 3\); it must be \(1, 2, 4\)",
            {"lse": np.zeros((1, 2, 3), np.float32)},
        ),
        (TypeError, "d_out is float64; it must be float32", {"d_out": Q.astype(np.float64)}),
        (ValueError, "mask_gradient is True and attn_mask None", {"mask_gradient": True}),
    ],
)
def test_wrong_arguments_of_backward(error, said, changes):
    given = {"d_out": Q, "query": Q, "key": Q, "value": Q, "out": Q, "lse": np.zeros((1, 2, 4), np.float32)}
    with pytest.raises(error, match=said):
        attention_backward(**(given | changes))


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_package_without_torch():
    """As where it is not installed: NumPy's part works, and PyTorch's is an ImportError."""
    printed = run("""
import sys
sys.modules["torch"] = None
import numpy as np
import mps_flash_attn
from mps_flash_attn.numpy import attention
q = np.ones((1, 2, 5, 8), np.float32)
assert np.allclose(attention(q, q, q), 1)
assert mps_flash_attn.__version__.count(".") == 2
try:
    mps_flash_attn.flash_attention
except ImportError as error:
    print(error)
""")
    assert "torch" in printed


def test_torch_is_imported_when_it_is_needed():
    run("""
import sys
import numpy as np
import mps_flash_attn
import mps_flash_attn.numpy
from mps_flash_attn.library import library
assert not hasattr(mps_flash_attn, "flash_attentoin") and not hasattr(mps_flash_attn, "benchmark")
assert set(mps_flash_attn.__all__) <= set(dir(mps_flash_attn)) and "__version__" in dir(mps_flash_attn)
q = np.random.default_rng(1).standard_normal((1, 2, 50, 8))
out = mps_flash_attn.numpy.attention(q, q, q)
assert "torch" not in sys.modules and library().host is None
from mps_flash_attn import flash_attention
import torch
assert library().threads == torch.get_num_threads()
t = torch.from_numpy(q)
assert (flash_attention(t, t, t).numpy() == out).all() and (mps_flash_attn.numpy.attention(q, q, q) == out).all()
""")


def test_operators_are_registered_with_the_package():
    run("import torch, mps_flash_attn; torch.ops.mfa.attention_forward; mps_flash_attn.sdpa.run")
