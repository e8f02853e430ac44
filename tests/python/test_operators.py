"""torch.ops.mfa: what the dispatcher, torch.compile, torch.export, vmap and autocast make of the operators."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mps_flash_attn import flash_attention
from mps_flash_attn.options import Options
from mps_flash_attn.problem import NO_MORE, Inputs
from stand_in import DTYPES, FLOAT64

forward = torch.ops.mfa.attention_forward.default
backward = torch.ops.mfa.attention_backward.default
pytestmark = pytest.mark.usefixtures("one_thread")
NO_BAND = Options()


def problem(q_len=9, kv_len=11, heads=4, kv_heads=2, head_dim=8, value_dim=6, dtype=torch.float32, grad=True):
    shapes = ((2, heads, q_len, head_dim), (2, kv_heads, kv_len, head_dim), (2, kv_heads, kv_len, value_dim))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def saved(tensors, mask=None, options=NO_BAND):
    """(d_out, d_lse, query, key, value, mask, out, lse) as backward takes them."""
    tensors = [t.detach() for t in tensors]
    mask = mask if mask is None else mask.detach()
    out, lse = forward(*tensors, mask, *NO_MORE, *options)
    return torch.randn_like(out), torch.randn_like(lse), *tensors, mask, *NO_MORE, out, lse


def gradients(out, tensors):
    return torch.autograd.grad(out.square().sum(), tensors)


# --- opcheck -------------------------------------------------------------------------------------


def layouts():
    query, key, value = problem()
    yield query, key, value
    yield query.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), key, value
    yield query, key.detach().mT.contiguous().mT.requires_grad_(), value.detach()[:, :, :1].expand_as(value)
    yield problem(value_dim=8)


MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.rand(2, 1, 9, 11) < 0.7,
    "float": lambda: torch.randn(4, 9, 1, requires_grad=True),
}


@pytest.mark.parametrize("mask", MASKS)
def test_opcheck_forward(mask):
    for tensors in layouts():
        opcheck(forward, (*tensors, MASKS[mask](), *NO_MORE, *Options(-3, None, 0.3, 2.0)))


@pytest.mark.parametrize("mask", MASKS)
def test_opcheck_backward(mask):
    for tensors in layouts():
        options = Options(upper=2)
        given = saved(tensors, MASKS[mask](), options)
        opcheck(backward, (*given, *options, [True, True, True, mask == "float", False]))
        opcheck(backward, (given[0], None, *given[2:], *options, [False, True, False, False, False]))


def test_schema_is_stable():
    """Graphs that were exported name these operators and arguments."""
    assert str(forward._schema) == (
        "mfa::attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, "
        "Tensor? alibi_slopes, Tensor? dropout_seed, Tensor? block_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "Tensor? seqused_k, Tensor? leftpad_k, Tensor? cache_batch_idx, Tensor? block_table, Tensor? k_scale, "
        "Tensor? v_scale, SymInt? lower, SymInt? upper, float? scale, float softcap, float dropout, int block_q, "
        "int block_kv, bool bottom_right, SymInt? max_q, SymInt? max_kv, str? k_type, str? v_type, str? out_type, "
        "str? fast) -> (Tensor out, Tensor lse)"
    )
    assert str(backward._schema) == (
        "mfa::attention_backward(Tensor d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, Tensor? mask, "
        "Tensor? sinks, Tensor? alibi_slopes, Tensor? dropout_seed, Tensor? block_mask, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? cache_batch_idx, Tensor? block_table, "
        "Tensor? k_scale, Tensor? v_scale, Tensor out, Tensor lse, SymInt? lower, SymInt? upper, float? scale, "
        "float softcap, float dropout, int block_q, int block_kv, bool bottom_right, SymInt? max_q, SymInt? max_kv, "
        "str? k_type, str? v_type, str? out_type, str? fast, bool[] wanted) "
        "-> (Tensor dQ, Tensor dK, Tensor dV, Tensor dbias, Tensor dsinks)"
    )
    quantize = str(torch.ops.mfa.quantize_kv.default._schema)
    assert quantize == "mfa::quantize_kv(Tensor numbers, str kv_type, int group) -> (Tensor codes, Tensor scale)"


# --- values --------------------------------------------------------------------------------------


def test_operator_is_flash_attention():
    tensors = problem()
    out, lse = forward(*tensors, None, *NO_MORE, *Options(upper=0))
    expected = flash_attention(*tensors, True, enable_gqa=True, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert all(
        map(
            torch.equal,
            gradients(out + lse[..., None], tensors),
            gradients(expected[0] + expected[1][..., None], tensors),
        )
    )


@FLOAT64
def test_backward_takes_results_merged_from_parts():
    """The keys cut in two, as over two devices: merged out and lse give each part its own gradients."""
    query, key, value = problem(dtype=torch.float64)
    parts = [(key[:, :, :4], value[:, :, :4]), (key[:, :, 4:], value[:, :, 4:])]
    results = [forward(query.detach(), k.detach(), v.detach(), None, *NO_MORE, *NO_BAND) for k, v in parts]
    lse = torch.logaddexp(results[0][1], results[1][1])
    out = sum(o * (part - lse).exp()[..., None] for o, part in results)
    whole = flash_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(out, whole)
    d_out = torch.randn_like(out)
    wanted = torch.autograd.grad(whole, (query, key, value), d_out)
    found = [
        backward(d_out, None, *inputs, out, lse, *NO_BAND, [True, True, True, False, False])
        for inputs in (Inputs(query.detach(), k.detach(), v.detach()) for k, v in parts)
    ]
    torch.testing.assert_close(found[0][0] + found[1][0], wanted[0])
    torch.testing.assert_close(torch.cat([found[0][1], found[1][1]], 2), wanted[1])
    torch.testing.assert_close(torch.cat([found[0][2], found[1][2]], 2), wanted[2])


def test_unwanted_gradients_are_empty():
    given = saved(problem())
    for place in range(3):
        wanted = [n == place for n in range(5)]
        found = backward(*given, *NO_BAND, wanted)
        assert [tensor.numel() > 0 for tensor in found] == wanted


@pytest.mark.parametrize("wanted", [[True] * 4, [False] * 6])
def test_wrong_number_of_wanted(wanted):
    with pytest.raises(ValueError, match=r"wanted is \[.*\]; it must be five bools"):
        backward(*saved(problem()), *NO_BAND, wanted)


WRONG = {
    "out shape": (
        -2,
        lambda t: t[:, :, :-1],
        ValueError,
        r"out has the shape \(2, 4, 8, 6\); it must be \(2, 4, 9, 6\)",
    ),
    "out dtype": (-2, torch.Tensor.double, TypeError, "out is float64; it must be float32"),
    "lse shape": (-1, lambda t: t[:, :1], ValueError, "lse has the shape"),
    "lse dtype": (-1, torch.Tensor.half, TypeError, "lse is float16; it must be float32"),
    "d_out shape": (0, lambda t: t[..., :-1], ValueError, "d_out has the shape"),
    "d_lse shape": (1, lambda t: t[:1], ValueError, "d_lse has the shape"),
    "key shape": (3, lambda t: t[:1], ValueError, "batch sizes"),
    "query rank": (2, lambda t: t[0], ValueError, "query has 3 dimensions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_of_backward(case):
    """Invalid arguments of the backward operator raise before memory is read."""
    place, change, exception, sentence = WRONG[case]
    given = list(saved(problem()))
    given[place] = change(given[place])
    with pytest.raises(exception, match=sentence):
        backward(*given, *NO_BAND, [True, True, True, False, False])


# --- differentiation -----------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["operator", "function"])
def test_second_derivative_raises(route):
    tensors = problem()
    if route == "operator":
        out = forward(*Inputs(*tensors), *NO_BAND)[0]
    else:
        out = flash_attention(*tensors, enable_gqa=True)
    for d_out in (torch.ones_like(out), torch.ones_like(out).requires_grad_()):
        gradient = torch.autograd.grad(out, tensors, d_out, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="no second derivative"):
            gradient.sum().backward()


def test_backward_operator_is_not_differentiable():
    given = [t if t is None else t.requires_grad_() for t in saved(problem())]
    found = backward(*given, *NO_BAND, [True, False, False, False, False])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        found[0].sum().backward()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_raises(requires_grad):
    """A tangent raises an error, and is not silently dropped."""
    query, key, value = problem(grad=requires_grad)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query.detach(), torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="jvp"):
            forward(dual, key, value, None, *NO_MORE, *NO_BAND)


def test_batched_gradients():
    """is_grads_batched, as torch.autograd.functional.jacobian(vectorize=True) uses it."""
    tensors = problem()
    out, lse = flash_attention(*tensors, enable_gqa=True, return_lse=True)
    d_out, d_lse = torch.randn(3, *out.shape), torch.randn(3, *lse.shape)
    found = torch.autograd.grad((out, lse), tensors, (d_out, d_lse), is_grads_batched=True, retain_graph=True)
    for place in range(3):
        wanted = torch.autograd.grad((out, lse), tensors, (d_out[place], d_lse[place]), retain_graph=True)
        torch.testing.assert_close([gradient[place] for gradient in found], list(wanted))


# --- vmap ----------------------------------------------------------------------------------------

VMAPS = {  # in_dims of query, key, value, mask
    "all": (0, 0, 0, 0),
    "other places": (1, 2, -1, 1),
    "query": (0, None, None, None),
    "key and value": (None, 0, 0, None),
    "mask": (None, None, None, 0),
}


def stacked(tensor, place):
    return tensor if place is None else torch.stack([tensor, tensor + 1, tensor - 1], place)


@pytest.mark.parametrize("mask_shape", [(4, 9, 11), (2, 1, 1, 11), (9, 1), (1, 4, 9, 11)], ids=str)
@pytest.mark.parametrize("case", VMAPS)
def test_vmap(case, mask_shape):
    places = VMAPS[case]
    mapped = [
        stacked(t, place) for t, place in zip((*problem(grad=False), torch.randn(mask_shape)), places, strict=True)
    ]

    def attend(query, key, value, mask):
        return flash_attention(query, key, value, attn_mask=mask, enable_gqa=True, return_lse=True)

    out, lse = torch.vmap(attend, places)(*mapped)
    for n in range(3):
        each = [t if place is None else t.select(place, n) for t, place in zip(mapped, places, strict=True)]
        expected = attend(*each)
        assert torch.equal(out[n], expected[0]) and torch.equal(lse[n], expected[1])


@pytest.mark.parametrize("mask_shape", [(4, 9, 11), (2, 1, 1, 11), (9, 1), (1, 4, 9, 11)], ids=str)
@pytest.mark.parametrize("case", VMAPS)
def test_vmap_of_backward(case, mask_shape):
    given = saved(problem(), torch.randn(mask_shape))
    places = (0, None, *VMAPS[case], *NO_MORE, 0, 0)
    mapped = [stacked(t, place) for t, place in zip(given, places, strict=True)]
    wanted = [True, False, True, True, False]
    found = torch.vmap(lambda *each: backward(*each, *NO_BAND, wanted)[:4:3], places)(*mapped)
    for n in range(3):
        each = [t if place is None else t.select(place, n) for t, place in zip(mapped, places, strict=True)]
        expected = backward(*each, *NO_BAND, wanted)[:4:3]
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got[n], want, rtol=1e-4, atol=1e-4)


# --- autocast, modes, tensors without memory -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    query, key, value = problem()
    mask = torch.randn(9, 11)
    expected = forward(query.to(dtype), key.to(dtype), value.to(dtype), mask.to(dtype), *NO_MORE, *NO_BAND)
    with torch.autocast("cpu", dtype=dtype):
        out, lse = forward(query, key.to(dtype), value, mask, *NO_MORE, *NO_BAND)
        if torch.float64 in DTYPES:
            assert forward(*problem(dtype=torch.float64), None, *NO_MORE, *NO_BAND)[0].dtype == torch.float64
    assert out.dtype == dtype and torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    out.sum().backward()
    assert query.grad.dtype == torch.float32


@pytest.mark.parametrize("layout", ["plain", "transposed", "other width"])
def test_tensors_without_memory(layout):
    """The fake rules return the shapes, strides and dtypes of results and gradients."""
    query, key, value = problem(value_dim=5 if layout == "other width" else 8)
    if layout == "transposed":
        query = query.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    real = flash_attention(query, key, value, enable_gqa=True, return_lse=True)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (query, key, value)]
        fake = flash_attention(*fakes, enable_gqa=True, return_lse=True)
        found = gradients(fake[0], fakes)
    for got, wanted in zip((*fake, *found), (*real, *gradients(real[0], (query, key, value))), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


def test_dispatch_modes_see_the_operators():
    tensors = problem(kv_heads=4, value_dim=8)
    with FlopCounterMode(display=False) as expected, sdpa_kernel(SDPBackend.MATH):
        torch.nn.functional.scaled_dot_product_attention(*tensors)
    with FlopCounterMode(display=False) as counted:
        out = flash_attention(*tensors)
    assert counted.get_total_flops() == expected.get_total_flops() > 0
    with FlopCounterMode(display=False) as counted:
        gradients(out, tensors)
    assert 2 * counted.get_total_flops() == 5 * expected.get_total_flops()  # five products instead of two


def test_negated_view():
    query, key, value = problem(grad=False)
    negated = torch._neg_view(query.neg())
    found, expected = (forward(*Inputs(q, key, value), *NO_BAND)[0] for q in (negated, query))
    assert torch.equal(found, expected)


# --- torch.compile and torch.export --------------------------------------------------------------

CALLS = {
    "plain": lambda q, k, v: flash_attention(q, k, v, enable_gqa=True),
    "causal": lambda q, k, v: flash_attention(q, k, v, True, enable_gqa=True),
    "bottom right": lambda q, k, v: flash_attention(q, k, v, "bottom_right", enable_gqa=True, softcap=3.0),
    "window": lambda q, k, v: flash_attention(q, k, v, window_size=(4, 1), enable_gqa=True, scale=0.3),
    "lse": lambda q, k, v: flash_attention(q, k, v, enable_gqa=True, return_lse=True)[1],
    "bool mask": lambda q, k, v: flash_attention(q, k, v, attn_mask=(q[:, :1, :, :1] > 0), enable_gqa=True),
    "float mask": lambda q, k, v: flash_attention(q, k, v, attn_mask=q[..., :1] * 2, enable_gqa=True),
    "self": lambda q, k, v: flash_attention(q, q, q),
    "sinks": lambda q, k, v: flash_attention(q, k, v, True, enable_gqa=True, sinks=q[:, :, 0, 0]),
    "layout": lambda q, k, v: flash_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("call", CALLS)
def test_compiled_without_breaks_and_once_for_all_lengths(call):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[call], backend=counter, fullgraph=True, dynamic=True)
    for lengths in ((9, 11), (10, 20), (33, 7), (50, 50), (64, 65)):
        tensors = problem(*lengths)
        out, expected = compiled(*tensors), CALLS[call](*tensors)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        used = tensors if call != "self" else tensors[:1]
        if call != "lse":
            assert all(map(torch.equal, gradients(out, used), gradients(expected, used)))
    assert counter.frame_count == 1


def test_compiled_decoding_does_not_compile_anew():
    """A cache of keys that grows by one: marked as dynamic by torch.compile itself after its first change."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS["bottom right"], backend=counter, fullgraph=True)
    with torch.no_grad():
        for length in range(8, 24):
            tensors = problem(2, length)
            assert torch.equal(compiled(*tensors), CALLS["bottom right"](*tensors))
    assert counter.frame_count <= 2


def test_compiled_by_inductor():
    """With the default backend, in training, under autocast, on memory of the (B, N, H, D) order."""
    torch._dynamo.reset()

    def step(x, weight):
        q, k, v = (x @ weight).view(2, -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return flash_attention(q, k, v, True).transpose(1, 2).flatten(2).relu()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    weight = (torch.randn(32, 96) / 32**0.5).requires_grad_()
    for length in (12, 31):
        x = torch.randn(2, length, 32)
        for dtype in (None, torch.bfloat16):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                out, expected = compiled(x, weight), step(x, weight)
            torch.testing.assert_close(out, expected, rtol=2e-2 if dtype else 1e-5, atol=2e-2 if dtype else 1e-5)
            tolerance = {"rtol": 5e-2, "atol": 5e-1} if dtype else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(gradients(out, weight), gradients(expected, weight), **tolerance)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_exported(call, strict):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return CALLS[call](q, k, v)

    q_len, kv_len = torch.export.Dim("q_len", min=2), torch.export.Dim("kv_len", min=2)
    lengths = {"q": {2: q_len}, "k": {2: kv_len}, "v": {2: kv_len}}
    program = torch.export.export(Model(), tuple(problem(grad=False)), dynamic_shapes=lengths, strict=strict)
    assert sum(node.target == forward for node in program.graph.nodes) == 1
    for sizes in ((9, 11), (30, 41), (17, 5)):
        tensors = problem(*sizes, grad=False)
        assert torch.equal(program.module()(*tensors), CALLS[call](*tensors))
