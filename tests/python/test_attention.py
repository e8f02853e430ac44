"""flash_attention against the definition: every option, the result, log-sum-exp and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mps_flash_attn import explain, flash_attention, run
from mps_flash_attn.explanation import Explanation
from mps_flash_attn.reference import attention, check, compare
from stand_in import BACKEND, DTYPES, FLOAT64, FULL, ON_METAL

INF = float("inf")


def problem(dtype=torch.float32, batch=2, heads=4, kv_heads=4, q_len=33, kv_len=47, head_dim=24, value_dim=24):
    return (
        torch.randn(batch, heads, q_len, head_dim).to(dtype),
        torch.randn(batch, kv_heads, kv_len, head_dim).to(dtype),
        torch.randn(batch, kv_heads, kv_len, value_dim).to(dtype),
    )


def ours(**options):
    def run(query, key, value, mask):
        return flash_attention(query, key, value, attn_mask=mask, return_lse=True, **options)

    return run


# flash_attention's options: those of the definition
OPTIONS = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "scale_zero": ({"scale": 0.0}, {"scale": 0.0}),
    "scale_negative": ({"scale": -0.5}, {"scale": -0.5}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "causal": ({"is_causal": True}, {"upper": 0}),
    "causal_top_left": ({"is_causal": "top_left"}, {"upper": 0}),
    "causal_bottom_right": ({"is_causal": "bottom_right"}, {"upper": 14}),
    "window": ({"window_size": 5}, {"lower": -4, "upper": 0}),
    "window_one": ({"window_size": 1}, {"lower": 0, "upper": 0}),
    "window_causal": ({"window_size": 5, "is_causal": True}, {"lower": -4, "upper": 0}),
    "window_bottom_right": ({"window_size": 5, "is_causal": "bottom_right"}, {"lower": 10, "upper": 14}),
    "window_huge": ({"window_size": 2**70}, {"upper": 0}),
    "pair": ({"window_size": (3, 2)}, {"lower": 11, "upper": 16}),
    "pair_open": ({"window_size": (-1, -1)}, {}),
    "pair_left": ({"window_size": (3, -1)}, {"lower": 11}),
    "pair_right": ({"window_size": [-1, 2]}, {"upper": 16}),
    "pair_causal": ({"window_size": (3, 2), "is_causal": True}, {"lower": 11, "upper": 14}),
    "pair_top_left": ({"window_size": (3, 2), "is_causal": "top_left"}, {"lower": -3, "upper": 0}),
    "all": (
        {"scale": 0.4, "softcap": 3.0, "window_size": 9, "is_causal": "bottom_right"},
        {"scale": 0.4, "softcap": 3.0, "lower": 6, "upper": 14},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option, dtype):
    given_options, definition = OPTIONS[option]
    check(ours(**given_options), (*problem(dtype), None), **definition)


MASKS = {  # shapes, broadcast to (2, 4, 33, 47)
    "full": (2, 4, 33, 47),
    "batch": (2, 1, 33, 47),
    "head": (1, 4, 33, 47),
    "one": (1, 1, 33, 47),
    "keys": (2, 1, 1, 47),
    "queries": (2, 4, 33, 1),
    "constant": (1, 1, 1, 1),
    "three": (4, 33, 47),
    "two": (33, 47),
    "vector": (47,),
    "scalar": (),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_float_mask_and_its_gradient(shape, dtype):
    check(ours(), (*problem(dtype), torch.randn(shape).to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_bool_mask(shape, dtype):
    check(ours(), (*problem(dtype), torch.rand(shape) < 0.6))


@pytest.mark.parametrize("mask_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_of_another_dtype(dtype, mask_dtype):
    mask = torch.randn(4, 33, 1).to(mask_dtype)
    check(ours(is_causal=True, softcap=4.0), (*problem(dtype), mask), upper=0, softcap=4.0)


def test_masks_and_bands_together():
    bias = torch.randn(2, 1, 33, 47).masked_fill(torch.rand(2, 1, 33, 47) < 0.3, -INF)
    check(ours(window_size=7), (*problem(), bias), lower=-6, upper=0)
    check(ours(is_causal="bottom_right"), (*problem(), torch.rand(4, 1, 47) < 0.5), upper=14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing(dtype):
    """Rows without a visible key, by band or mask, give zeros, -inf and zero gradients, never NaN."""
    query, key, value = problem(dtype, q_len=20, kv_len=6)
    mask = torch.rand(20, 6) < 0.5
    mask[3] = False
    for options, definition, given_mask in (
        ({"is_causal": "bottom_right"}, {"upper": -14}, None),
        ({"window_size": 2}, {"lower": -1, "upper": 0}, None),
        ({}, {}, mask),
        ({}, {}, torch.zeros(20, 6).masked_fill(~mask, -INF)),
    ):
        check(ours(**options), (query, key, value, given_mask), **definition)
    out, lse = flash_attention(query, key, value, attn_mask=torch.zeros(20, 6, dtype=torch.bool), return_lse=True)
    assert (out == 0).all() and (lse == -INF).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_heads(dtype, kv_heads):
    tensors = problem(dtype, heads=8, kv_heads=kv_heads)
    check(ours(enable_gqa=True, is_causal=True), (*tensors, torch.randn(8, 33, 47)), upper=0)


SIZES = [
    dict(q_len=1, kv_len=1),
    dict(q_len=1, kv_len=300),
    dict(q_len=300, kv_len=1),
    dict(head_dim=1, value_dim=1),
    dict(head_dim=64, value_dim=64, q_len=64, kv_len=64),
    dict(head_dim=65, value_dim=63, q_len=65, kv_len=63),
    dict(head_dim=8, value_dim=40),
    dict(head_dim=40, value_dim=1),
    dict(head_dim=256, value_dim=256, heads=1, kv_heads=1),
    dict(head_dim=512, value_dim=512, heads=1, kv_heads=1),
    dict(head_dim=80, value_dim=80, batch=1, heads=1, kv_heads=1, q_len=517, kv_len=523),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "_".join(f"{n}{v}" for n, v in size.items()))
def test_size(size, dtype):
    tensors = problem(dtype, **size)
    check(ours(), (*tensors, None))
    check(ours(is_causal="bottom_right"), (*tensors, None), upper=tensors[1].shape[2] - tensors[0].shape[2])


@pytest.mark.parametrize("size", [dict(q_len=0), dict(kv_len=0), dict(q_len=0, kv_len=0), dict(batch=0)], ids=str)
def test_empty(size):
    check(ours(), (*problem(**size), None))
    tensors = problem(**size)
    mask = torch.randn(tensors[0].shape[2], tensors[1].shape[2])
    check(ours(is_causal=True), (*tensors, mask), upper=0)


def _strided(tensor, how):
    if how == "transposed":  # (B, N, H, D) memory
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":  # a part of something larger, with a storage offset
        large = torch.full([size + 3 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
        part = large[1:-2, 2:-1, 1:-2, 2:-1]
        return part.copy_(tensor)
    if how == "every second":  # last stride 2
        large = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
        return large[..., ::2].copy_(tensor)
    if how == "columns first":  # last stride not the smallest
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "batch expanded":
        return tensor[:1].expand_as(tensor)
    if how == "head expanded":
        return tensor[:, :1].expand_as(tensor)
    if how == "row expanded":
        return tensor[:, :, :1].expand_as(tensor)
    if how == "negated":  # PyTorch's own view with the negation still to be carried out
        return torch._neg_view(tensor.neg())
    raise AssertionError(how)


STRIDES = ["transposed", "sliced", "every second", "columns first", "batch expanded", "head expanded", "row expanded"]


@pytest.mark.parametrize("how", [*STRIDES, "negated"])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_strides(which, how):
    """Results and gradients have the same bits as from contiguous memory."""
    tensors = [*problem(), torch.randn(2, 4, 33, 47)]
    tensors[which] = _strided(tensors[which], how)
    contiguous = [t.resolve_neg().contiguous().requires_grad_() for t in tensors]
    strided = [t.detach().requires_grad_() for t in tensors]
    d_out = torch.randn(2, 4, 33, 24)
    expected, out = ours()(*contiguous)[0], ours()(*strided)[0]
    assert torch.equal(out, expected)
    for got, wanted in zip(
        torch.autograd.grad(out, strided, d_out), torch.autograd.grad(expected, contiguous, d_out), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("how", [*STRIDES, "negated"])
def test_strides_of_the_incoming_gradient(how):
    tensors = [t.requires_grad_() for t in problem()]
    d_out = _strided(torch.randn(2, 4, 33, 24), how)
    out = flash_attention(*tensors)
    strided = torch.autograd.grad(out, tensors, d_out, retain_graph=True)
    plain = torch.autograd.grad(out, tensors, d_out.resolve_neg().contiguous())
    assert all(map(torch.equal, strided, plain))


def test_out_is_laid_out_like_query():
    query, key, value = problem()
    for how in ("transposed", "sliced"):
        out = flash_attention(_strided(query, how), key, value)
        assert out.stride() == torch.empty_like(_strided(query, how)).stride()
    packed = torch.randn(2, 33, 3, 4, 24).permute(2, 0, 3, 1, 4)  # one matrix multiplication made all three
    assert flash_attention(*packed).transpose(1, 2).is_contiguous()
    wide = flash_attention(_strided(query, "transposed"), key, torch.randn(2, 4, 47, 10))
    assert wide.shape == (2, 4, 33, 10) and wide.transpose(1, 2).is_contiguous()
    assert flash_attention(_strided(query, "columns first"), key, value).is_contiguous()


def test_only_wanted_gradients():
    for wanted in range(1, 16):
        tensors = [*problem(), torch.randn(33, 47)]
        for place, tensor in enumerate(tensors):
            tensor.requires_grad_(bool(wanted >> place & 1))
        flash_attention(*tensors[:3], attn_mask=tensors[3]).sum().backward()
        assert [t.grad is not None for t in tensors] == [t.requires_grad for t in tensors]


@FLOAT64
def test_gradient_through_lse_alone():
    tensors = [t.requires_grad_() for t in problem(torch.float64)]
    _, lse = flash_attention(*tensors, return_lse=True)
    _, expected = attention(*tensors)
    torch.testing.assert_close(lse, expected)
    *got, dv = torch.autograd.grad(lse.sum(), tensors)
    torch.testing.assert_close(got, list(torch.autograd.grad(expected.sum(), tensors[:2])))
    assert not dv.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_is_float(dtype):
    _, lse = flash_attention(*problem(dtype), return_lse=True)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == (2, 4, 33)


def test_without_gradient_nothing_is_kept():
    tensors = [t.requires_grad_() for t in problem()]
    with torch.no_grad():
        assert flash_attention(*tensors).grad_fn is None
    with torch.inference_mode():
        assert flash_attention(*tensors).is_inference()
    assert flash_attention(*(t.detach() for t in tensors)).grad_fn is None


def test_changed_in_place_is_noticed():
    query, key, value = (t.requires_grad_() for t in problem())
    out = flash_attention(query, key, value)
    with torch.no_grad():
        key.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivative_raises():
    """A second derivative raises, and is not silently zero, whether or not the incoming gradient requires one."""
    tensors = [t.requires_grad_() for t in problem()]
    for d_out in (torch.ones(2, 4, 33, 24), torch.ones(2, 4, 33, 24, requires_grad=True)):
        gradient = torch.autograd.grad(flash_attention(*tensors), tensors, d_out, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="no second derivative"):
            gradient.sum().backward()


def test_forward_mode_raises():
    """A tangent raises an error, and is not silently dropped."""
    query, key, value = problem()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), pytest.raises(NotImplementedError, match="jvp"):
                flash_attention(dual, key, value)
        assert flash_attention(query, key, value).isfinite().all()


def test_compiled():
    """Compiled code has a graph break at the call."""
    tensors = [t.requires_grad_() for t in problem()]
    compiled = torch.compile(lambda q, k, v: flash_attention(q, k, v, True).square(), backend="aot_eager")
    out, expected = compiled(*tensors), flash_attention(*tensors, True).square()
    torch.testing.assert_close(out, expected)
    got, wanted = (torch.autograd.grad(o.sum(), tensors) for o in (out, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(autocast_dtype):
    query, key, value = problem()
    mask = torch.randn(33, 47)
    plain = flash_attention(*(t.to(autocast_dtype) for t in (query, key, value)), attn_mask=mask.to(autocast_dtype))
    with torch.autocast("cpu", dtype=autocast_dtype):
        mixed = flash_attention(query.requires_grad_(), key.to(autocast_dtype), value, attn_mask=mask)
    assert mixed.dtype == autocast_dtype and torch.equal(mixed, plain)
    mixed.sum().backward()
    assert query.grad.dtype == torch.float32


@FLOAT64
def test_autocast_keeps_float64():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention(*(t.double() for t in problem())).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    tensors = [t.requires_grad_() for t in problem()]
    checkpoint(flash_attention, *tensors, use_reentrant=reentrant).sum().backward()
    expected = torch.autograd.grad(flash_attention(*tensors).sum(), tensors)
    assert all(map(torch.equal, (t.grad for t in tensors), expected))


# --- gradcheck -----------------------------------------------------------------------------------


@FLOAT64
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "pair_open"])
def test_gradcheck(option, mask):
    """Numerical derivatives in float64, of the result and of log-sum-exp, for each option."""
    options, _ = OPTIONS[option]
    tensors = problem(torch.float64, batch=1, heads=2, kv_heads=1, q_len=3, kv_len=17, head_dim=4, value_dim=3)
    tensors = [t.requires_grad_() for t in tensors]
    allowed = torch.rand(2, 3, 17) < 0.8
    bias = torch.randn(2, 1, 17, dtype=torch.float64, requires_grad=True)

    def run(query, key, value, *bias):
        given_mask = bias[0] if bias else allowed if mask == "bool" else None
        out, lse = flash_attention(query, key, value, attn_mask=given_mask, enable_gqa=True, return_lse=True, **options)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(run, (*tensors, bias) if mask == "float" else tensors)


# --- random problems -----------------------------------------------------------------------------


@st.composite
def random_problems(draw):
    length = st.one_of(st.integers(1, 12), st.integers(1, 150), st.sampled_from([31, 32, 33, 64, 65, 127, 128, 129]))
    width = st.one_of(st.integers(1, 20), st.integers(1, 130), st.sampled_from([16, 32, 64, 80, 128]))
    kv_heads, q_len, kv_len = draw(st.integers(1, 3)), draw(length), draw(length)
    head_dim = draw(width)
    sizes = dict(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        value_dim=draw(st.one_of(st.just(head_dim), width)),
    )
    causal = draw(st.sampled_from([False, True, "bottom_right"]))
    window = draw(st.one_of(st.just(0), st.integers(1, 200), st.tuples(st.integers(-1, 99), st.integers(-1, 99))))
    options = dict(
        is_causal=causal,
        window_size=window,
        scale=draw(st.one_of(st.none(), st.floats(-1, 1, width=16))),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.0, 20.0])),
    )
    mask = draw(st.sampled_from(["none", "none", "bool", "float"]))
    full = (sizes["batch"], sizes["heads"], q_len, kv_len)
    broadcast = tuple(draw(st.booleans()) for _ in full)
    mask_shape = tuple(1 if one else size for one, size in zip(broadcast, full, strict=True))
    strides = [draw(st.sampled_from(["plain", *STRIDES])) for _ in range(4)]
    return draw(st.sampled_from(DTYPES)), sizes, options, mask, mask_shape, strides, draw(st.integers(0, 2**31))


def _band(is_causal, window, shift):
    """The band of a call, derived from the package's documentation alone."""
    if isinstance(window, tuple):
        left, right = window
        lower = None if left < 0 else shift - left
        upper = shift if is_causal else None if right < 0 else shift + right
        return lower, upper
    diagonal = shift if is_causal == "bottom_right" else 0
    lower = diagonal - window + 1 if window else None
    return lower, diagonal if is_causal or window else None


@settings(max_examples=150 if FULL else 20 if ON_METAL else 50)
@given(random_problems())
def test_random_problem(drawn):
    dtype, sizes, options, mask_kind, mask_shape, strides, seed = drawn
    torch.manual_seed(seed)
    mask = {
        "none": None,
        "bool": torch.rand(mask_shape) < 0.7,
        "float": torch.randn(mask_shape).to(dtype),
    }[mask_kind]
    tensors = [*problem(dtype, **sizes), mask]
    for place, how in enumerate(strides):
        if how != "plain" and tensors[place] is not None and tensors[place].dtype != torch.bool:
            tensors[place] = _strided(tensors[place], how)
    lower, upper = _band(options["is_causal"], options["window_size"], sizes["kv_len"] - sizes["q_len"])
    check(
        ours(enable_gqa=True, **options),
        tensors,
        lower=lower,
        upper=upper,
        scale=options["scale"],
        softcap=options["softcap"],
    )


def test_long():
    """Many tiles, one head, against the truth at some rows."""
    query, key, value = problem(batch=1, heads=1, kv_heads=1, q_len=4099, kv_len=4099, head_dim=64, value_dim=64)
    rows = torch.tensor([0, 1, 63, 64, 2047, 4098])
    out = flash_attention(query, key, value, window_size=1000)
    scores = query[:, :, rows].double() @ key.double().transpose(-1, -2) / 8
    offset = torch.arange(4099) - rows[:, None]
    weights = scores.masked_fill((offset > 0) | (offset <= -1000), -INF).softmax(-1)
    truth = weights @ value.double()
    yardstick = weights.float() @ value
    sizes = weights @ value.double().abs()
    compare("out", out[:, :, rows], yardstick, truth, sizes, scores.abs().max().item(), out.dtype)


# --- explain -------------------------------------------------------------------------------------


def test_explain():
    query, key, value = problem(heads=8, kv_heads=2)
    for backward in (False, True):
        found = explain(query, key, value, True, enable_gqa=True, backward=backward)
        assert found and found.backend == BACKEND and found.reason == "" and found.threads >= 1
        assert found.kernel.startswith("backward_f32_d24" if backward else "forward_f32_d24")
        assert str(found).startswith(f"{BACKEND} {found.kernel} threads")
    assert "band" in explain(query, key, value, True, enable_gqa=True).kernel


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_explain_is_what_runs(monkeypatch, which, how):
    """Gradients of expanded operands are not expanded themselves."""
    problems, passes = [], [run.run_forward, run.run_backward]
    for function in passes:

        def noted(prepared, *arguments, function=function):
            problems.append(prepared.problem)
            return function(prepared, *arguments)

        monkeypatch.setattr(run, function.__name__, noted)
    tensors = [*problem(), torch.randn(2, 4, 33, 47)]
    tensors[which] = _strided(tensors[which], how)
    query, key, value, mask = (t.detach().requires_grad_() for t in tensors)
    out = flash_attention(query, key, value, attn_mask=mask)
    torch.autograd.grad(out, (query, key, value, mask), torch.empty_like(out))
    assert len(problems) == 2
    for backward, ran in zip((False, True), problems, strict=True):
        assert explain(query, key, value, attn_mask=mask, backward=backward) == Explanation.of(ran)


@pytest.mark.parametrize("shape", [(), (47,), (33, 1), (2, 1, 1, 47)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_explain_with_a_mask(kind, shape):
    mask = torch.rand(shape) < 0.5 if kind == "bool" else torch.randn(shape)
    found = explain(*problem(), attn_mask=mask, backward=True)
    assert found and f"mask_{'bool' if kind == 'bool' else 'f32'}" in found.kernel


def test_explain_says_why_not():
    query = torch.empty(1, 1, 4, 16, device="meta")
    found = explain(query, query, query)
    assert not found and "meta" in found.reason and str(found) == f"not supported: {found.reason}"
    with pytest.raises(ValueError, match="softcap"):
        explain(*problem(), softcap=-1.0)
