"""Outputs in float32 of operands in float16 and bfloat16: what is rounded without out_type, and as exact as float32."""

import pytest
import torch
from torch.library import opcheck

from mps_flash_attn import calls, reference, run
from mps_flash_attn.autograd import EAGER, Attention, Call
from mps_flash_attn.options import Options
from mps_flash_attn.problem import NO_MORE, Inputs, Operands
from sequences import cumulative, integers
from stand_in import FLOAT64

HALVES = [torch.float16, torch.bfloat16]
FORWARD, BACKWARD = torch.ops.mfa.attention_forward.default, torch.ops.mfa.attention_backward.default
WIDE = Options(out_type="f32")
NAMES = "dQ", "dK", "dV", "dbias", "dsinks"


def of(dtype, *shape):
    """In the memory order of models."""
    return torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)


def whole(dtype):
    return Inputs(of(dtype, 2, 6, 33, 24), of(dtype, 2, 2, 70, 24), of(dtype, 2, 2, 70, 40)), Options(upper=40)


def masked(dtype):
    inputs = Inputs(*(torch.randn(1, 2, n, 64).to(dtype) for n in (130, 200, 200)), torch.randn(130, 200).to(dtype))
    return inputs._replace(sinks=torch.randn(1, 2)), Options(softcap=5.0)


def packed(dtype):
    rows = cumulative([20, 0, 47], 3)
    inputs = Inputs(of(dtype, 1, 4, 75, 32), of(dtype, 1, 2, 75, 32), of(dtype, 1, 2, 75, 32))
    inputs = inputs._replace(cu_seqlens_q=rows, cu_seqlens_k=rows, seqused_k=integers([20, 0, 31]))
    return inputs, Options(upper=0, bottom_right=True, max_q=47, max_kv=47)


def decode(dtype):
    return Inputs(of(dtype, 2, 8, 1, 64), of(dtype, 2, 2, 300, 64), of(dtype, 2, 2, 300, 64)), Options()


CASES = [whole, masked, packed, decode]


def gradients_of(inputs, options, saved, d_out):
    wanted = (True, True, True, inputs.attn_mask is not None, inputs.sinks is not None)
    return run.backward(Operands(inputs, *saved, d_out, None), options, wanted)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", HALVES)
def test_is_what_is_rounded(dtype, case):
    """Given the same out and lse, both types of outputs come from the same sums."""
    inputs, options = case(dtype)
    wide = options._replace(out_type="f32")
    out, lse = run.forward(inputs, options)
    exact, same_lse = run.forward(inputs, wide)
    d_out = torch.randn(out.shape).to(dtype)
    assert exact.dtype is torch.float32 and exact.stride() == out.stride()
    assert torch.equal(exact.to(dtype), out) and torch.equal(same_lse, lse) and not torch.equal(exact, out.float())
    found = gradients_of(inputs, options, (out, lse), d_out)
    for name, got, rounded in zip(NAMES, gradients_of(inputs, wide, (out.float(), lse), d_out), found, strict=True):
        if rounded is None:
            assert got is None, name
            continue
        assert got.dtype is (torch.float32 if name in NAMES[:3] else rounded.dtype), name
        assert got.stride() == rounded.stride() and torch.equal(got.to(rounded.dtype), rounded), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", HALVES)
def test_errors(dtype, case):
    """Those of float32; of bfloat16 with the weights rounded where the kernels do that."""
    inputs, options = case(dtype)
    wide = options._replace(out_type="f32")
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    d_out = torch.randn(*inputs.query.shape[:3], inputs.value.shape[3]).to(dtype)
    d_lse = torch.zeros(inputs.query.shape[:3])
    truth = reference.results(lambda *t: reference.attention(*t, **options._asdict()), exact, d_out, d_lse)
    saved = run.forward(inputs, wide)
    found = zip(("out", "lse", *NAMES[:3]), (*saved, *gradients_of(inputs, wide, saved, d_out)[:3]), strict=True)
    for name, got in found:
        unit = torch.finfo(torch.bfloat16 if dtype is torch.bfloat16 else torch.float32).eps
        allowed = (2 if dtype is torch.bfloat16 else 64) * unit * truth[name][truth[name].isfinite()].abs().max()
        error = (got - truth[name]).nan_to_num(0).abs().max()
        assert error <= allowed, f"{name}: error {error}, allowed {allowed}"


@pytest.mark.parametrize("dtype", HALVES)
def test_merged_parts(dtype):
    """Two halves of the keys, merged in float32, are as exact as all at once; merged from rounded halves they are
    not."""
    query, key, value = (torch.randn(1, 2, n, 64).to(dtype) for n in (100, 256, 256))
    exact, _ = reference.attention(query.double(), key.double(), value.double())
    errors = []
    for options in (Options(), WIDE):
        halves = zip(key.chunk(2, 2), value.chunk(2, 2), strict=True)
        parts = [run.forward(Inputs(query, *half), options) for half in halves]
        weights = torch.stack([lse for _, lse in parts]).softmax(0)
        merged = sum(weight.unsqueeze(-1) * out.float() for weight, (out, _) in zip(weights, parts, strict=True))
        errors.append((merged - exact).square().mean().sqrt().item())
    assert errors[1] < 0.7 * errors[0], errors


@pytest.mark.parametrize("dtype", HALVES)
def test_autograd(dtype):
    """Through the function of flash_attention and through the operators: nothing more is saved, and gradients have the
    dtype of their tensors."""
    inputs, _ = whole(dtype)
    tensors = [t.clone().requires_grad_() for t in inputs[:3]]
    rounded = torch.autograd.grad(calls.run((*tensors, None, *NO_MORE), Options(), False, False).sum(), tensors)
    for attend in (
        lambda *t: Attention.apply(*t, None, *NO_MORE, Call(EAGER, WIDE, True)),
        lambda *t: FORWARD(*t, None, *NO_MORE, *WIDE),
    ):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            out, _ = attend(*tensors)
        assert out.dtype is torch.float32 and len(saved) == 5
        for got, near in zip(torch.autograd.grad(out.sum(), tensors), rounded, strict=True):
            assert got.dtype is dtype
            torch.testing.assert_close(got, near, rtol=0.02, atol=0.02)
    reference.check(lambda *t: FORWARD(*t, *WIDE), whole(dtype)[0], out_type="f32")


@pytest.mark.parametrize("dtype", HALVES)
def test_operators(dtype):
    inputs, _ = whole(dtype)
    opcheck(FORWARD, (*inputs, *WIDE))
    out, lse = FORWARD(*inputs, *WIDE)
    opcheck(
        BACKWARD, (torch.randn_like(out).to(dtype), None, *inputs, out, lse, *WIDE, [True, True, False, False, False])
    )


def test_vmap():
    queries = torch.randn(3, 1, 2, 5, 16).half()
    key, value = torch.randn(2, 1, 2, 7, 16).half()
    found, _ = torch.vmap(lambda query: FORWARD(query, key, value, None, *NO_MORE, *WIDE))(queries)
    for query, got in zip(queries, found, strict=True):
        assert torch.equal(got, run.forward(Inputs(query, key, value), WIDE)[0])


def test_of_float32():
    inputs, options = whole(torch.float32)
    found, expected = run.forward(inputs, options._replace(out_type="f32")), run.forward(inputs, options)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", HALVES)
def test_no_low(dtype):
    inputs, _ = whole(dtype)
    assert len(run.forward_for_backward(inputs, WIDE)) == 2
    out, lse = run.forward(inputs, WIDE)
    d_out = torch.randn(out.shape).to(dtype)
    zeros = run.backward(Operands(inputs, out, lse, None, None), WIDE, (True, True, True, False, False))
    assert all(gradient.dtype is torch.float32 and not gradient.any() for gradient in zeros[:3])
    name = str(dtype).removeprefix("torch.")
    for saved, d, sentence in (
        ((out.to(dtype), lse), d_out, f"out is {name}; it must be float32"),
        ((out, lse), d_out.float(), f"d_out is float32; it must be {name}"),
    ):
        with pytest.raises(TypeError, match=sentence):
            gradients_of(inputs, WIDE, saved, d)
    with pytest.raises(TypeError, match=f"out is float32; it must be {name}"):
        gradients_of(inputs, Options(), (out, lse), d_out)


@pytest.mark.parametrize(
    ("out_type", "dtype", "sentence"),
    [
        ("f16", torch.float16, "out_type is 'f16'; it must be None"),
        pytest.param("f32", torch.float64, "out_type is 'f32' and query float64; with float64", marks=FLOAT64),
    ],
)
def test_refused(out_type, dtype, sentence):
    inputs, options = whole(dtype)
    with pytest.raises(ValueError, match=sentence):
        run.forward(inputs, options._replace(out_type=out_type))
