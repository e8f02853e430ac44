"""ALiBi: flash_attention(..., alibi_slopes=...) against attention written out, through all that PyTorch offers."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from mps_flash_attn import explain, flash_attention, reference
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from stand_in import DTYPES, FLOAT64

FORWARD = torch.ops.mfa.attention_forward.default


def problem(q_len=19, kv_len=37, heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype=torch.float32, slopes=(2, 4)):
    shapes = (2, heads, q_len, head_dim), (2, kv_heads, kv_len, head_dim), (2, kv_heads, kv_len, value_dim)
    return *(torch.randn(shape).to(dtype) for shape in shapes), torch.rand(slopes)


def written_out(query, key, value, slopes, mask=None, visible=None):
    """The same with the bias as a tensor, by PyTorch's operator."""
    q_len, kv_len = query.shape[2], key.shape[2]
    place = torch.arange(q_len)[:, None] + kv_len - q_len
    slopes = slopes if slopes.dim() == 2 else slopes.expand(query.shape[0], -1)
    bias = -slopes[..., None, None] * (place - torch.arange(kv_len)).abs()
    if mask is not None:
        bias = bias + mask
    if visible is not None:
        bias = bias.masked_fill(~visible, -torch.inf)
    keywords = {"attn_mask": bias.to(query.dtype), "enable_gqa": True}
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{}, {"q_len": 1, "kv_len": 300}, {"q_len": 130, "kv_len": 61, "value_dim": 24}])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_results_and_gradients(dtype, sizes, mask):
    query, key, value, slopes = problem(dtype=dtype, **sizes)
    scores = query.shape[2], key.shape[2]
    masks = {"none": lambda: None, "bool": lambda: torch.rand(scores) < 0.7, "float": lambda: torch.randn(4, *scores)}

    def ours(query, key, value, mask, _, slopes):
        options = {"attn_mask": mask, "enable_gqa": True, "return_lse": True, "window_size": (-1, 9), "softcap": 5}
        return flash_attention(query, key, value, alibi_slopes=slopes, **options)

    band = {"upper": key.shape[2] - query.shape[2] + 9, "softcap": 5.0}
    reference.check(ours, (query, key, value, masks[mask](), None, slopes), **band)


@FLOAT64
@pytest.mark.parametrize("shape", [(4,), (2, 4)])
@pytest.mark.parametrize("is_causal", [False, "bottom_right"])
def test_attention_written_out(shape, is_causal):
    query, key, value, slopes = problem(dtype=torch.float64, slopes=shape)
    visible = torch.arange(37) <= torch.arange(19)[:, None] + 18 if is_causal else None
    expected = written_out(query, key, value, slopes, visible=visible)
    found = flash_attention(query, key, value, is_causal, enable_gqa=True, alibi_slopes=slopes)
    torch.testing.assert_close(found, expected)


def test_slopes_may_have_any_strides():
    query, key, value, _ = problem()
    slopes = torch.rand(4, 6)[:, ::3].t()
    found = flash_attention(query, key, value, enable_gqa=True, alibi_slopes=slopes)
    assert torch.equal(found, flash_attention(query, key, value, enable_gqa=True, alibi_slopes=slopes.contiguous()))


def test_same_shapes_with_and_without():
    """Neither is served by what was cached for the other."""
    query, key, value, slopes = problem(kv_heads=4)
    plain = [flash_attention(query, key, value) for _ in range(3)]
    biased = [flash_attention(query, key, value, alibi_slopes=slopes) for _ in range(3)]
    assert torch.equal(plain[0], flash_attention(query, key, value))
    assert not torch.allclose(plain[0], biased[0])
    assert torch.equal(biased[0], biased[2])
    zeros = torch.zeros_like(slopes)
    torch.testing.assert_close(flash_attention(query, key, value, alibi_slopes=zeros), plain[0])


@pytest.mark.usefixtures("one_thread")
def test_opcheck():
    query, key, value, slopes = problem()
    opcheck(FORWARD, (*Inputs(query.requires_grad_(), key, value, alibi_slopes=slopes), *Options()))


def gradients(function, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = function(*leaves, *tensors[3:])
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def attend(query, key, value, slopes):
    return flash_attention(query, key, value, "bottom_right", enable_gqa=True, alibi_slopes=slopes)


@pytest.mark.parametrize("route", ["compile", "checkpoint"])
def test_routes_of_training(route):
    tensors = problem(dtype=DTYPES[0])
    routes = {
        "compile": torch.compile(attend, fullgraph=True, backend="aot_eager"),
        "checkpoint": lambda *tensors: checkpoint(attend, *tensors, use_reentrant=False),
    }
    torch.testing.assert_close(gradients(routes[route], *tensors), gradients(attend, *tensors))


@pytest.mark.parametrize("places", [(0, 0, 0, 0), (0, None, 0, None), (None, None, None, 0)])
def test_vmap(places):
    tensors = problem(dtype=DTYPES[0])
    mapped = [t if place is None else torch.stack([t, 2 * t, t - 1]) for t, place in zip(tensors, places, strict=True)]
    found = torch.vmap(attend, places)(*mapped)
    for n in range(3):
        sample = [t if place is None else t[n] for t, place in zip(mapped, places, strict=True)]
        torch.testing.assert_close(found[n], attend(*sample))


@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_torch_func(transform):
    """The slopes are wrapped by the transform like every argument."""
    tensors = problem(dtype=DTYPES[0])

    def loss(query, key, value, slopes):
        return attend(query, key, value, slopes).square().sum()

    grad = torch.func.grad(loss, (0, 1, 2))
    expected = gradients(attend, *tensors)[1:]
    if transform == "grad":
        torch.testing.assert_close(grad(*tensors), expected)
    else:
        found = torch.vmap(grad)(*(torch.stack([t, t]) for t in tensors))
        torch.testing.assert_close(tuple(t[1] for t in found), expected)


def test_autocast_leaves_the_slopes_in_float32():
    query, key, value, slopes = problem()
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(query, key, value, slopes)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), slopes))


def test_slopes_changed_before_backward():
    query, key, value, slopes = problem()
    out = attend(query.requires_grad_(), key, value, slopes)
    slopes.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_explain():
    query, key, value, slopes = problem(kv_heads=4)
    assert "_alibi_" in explain(query, key, value, alibi_slopes=slopes).kernel
    assert "_alibi_" in explain(query, key, value, alibi_slopes=slopes[0], backward=True).kernel
    assert "_alibi_" not in explain(query, key, value).kernel


@FLOAT64
@pytest.mark.parametrize("is_causal", [False, "bottom_right"])
def test_gradcheck(is_causal):
    sizes = {"q_len": 3, "kv_len": 5, "head_dim": 4, "value_dim": 3}
    *tensors, slopes = problem(dtype=torch.float64, **sizes)

    def run(query, key, value):
        options = {"is_causal": is_causal, "enable_gqa": True, "return_lse": True}
        return flash_attention(query, key, value, alibi_slopes=slopes, **options)

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in tensors])


WRONG = {
    "list": (lambda s: [0.5] * 4, TypeError, "alibi_slopes is a list; it must be a torch.Tensor"),
    "dtype": (lambda s: s.double(), TypeError, "alibi_slopes is float64; it must be float32"),
    "heads": (lambda s: s[:, :2], ValueError, r"alibi_slopes has the shape \(2, 2\); it must be \(heads,\) or"),
    "scalar": (lambda s: s[0, 0], ValueError, r"alibi_slopes has the shape \(\); it must be"),
    "gradient": (lambda s: s.requires_grad_(), TypeError, "alibi_slopes requires a gradient; it gets none"),
    "device": (lambda s: s.to("meta"), ValueError, "alibi_slopes is on meta and query on"),
}


@pytest.mark.parametrize("function", [flash_attention, explain])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_slopes(case, function):
    spoil, error, words = WRONG[case]
    query, key, value, slopes = problem(kv_heads=4)
    with pytest.raises(error, match=words):
        function(query, key, value, alibi_slopes=spoil(slopes))


def test_short_storage():
    query, key, value, slopes = problem(kv_heads=4)
    slopes.untyped_storage().resize_(12)
    with pytest.raises(RuntimeError, match="alibi_slopes: sizes"):
        flash_attention(query, key, value, alibi_slopes=slopes)
