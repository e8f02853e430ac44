"""replace_sdpa: what it takes over is right, what it leaves is PyTorch's own to the bit, and it can be taken back."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_early

from mps_flash_attn import replace_sdpa, restore_sdpa, sdpa_stats, sdpa_thresholds
from mps_flash_attn import sdpa as module
from mps_flash_attn.library import Unsupported


@pytest.fixture(autouse=True)
def _take_everything(monkeypatch):
    for dtype in sdpa_thresholds:
        monkeypatch.setitem(sdpa_thresholds, dtype, 0)
    sdpa_stats(reset=True)


def problem(*shape, kv_heads=None, kv_len=None, value_dim=None, dtype=torch.float32):
    *batch, q_len, head_dim = shape or (2, 4, 33, 24)
    kv_len, value_dim = kv_len or q_len + 5, value_dim or head_dim
    kv_batch = [*batch[:-1], kv_heads or batch[-1]]
    return [
        torch.randn(size).to(dtype)
        for size in ((*batch, q_len, head_dim), (*kv_batch, kv_len, head_dim), (*kv_batch, kv_len, value_dim))
    ]


def calls(function, *arguments, **options):
    """(result, how the calls of SDPA in it went) after replace_sdpa."""
    sdpa_stats(reset=True)
    with replace_sdpa():
        result = function(*arguments, **options)
    return result, sdpa_stats()


# --- on and off ----------------------------------------------------------------------------------


def taken():
    sdpa_stats(reset=True)
    imported_early(*problem(1, 1, 4, 8))
    return sdpa_stats() == {"replaced": 1}


def test_handle():
    assert not taken()
    handle = replace_sdpa()
    assert taken()
    handle.remove()
    assert not taken()
    handle.remove()
    assert not taken()


def test_with_block():
    with pytest.raises(KeyError), replace_sdpa():
        assert taken()
        raise KeyError
    assert not taken()


def test_nested():
    with replace_sdpa():
        with replace_sdpa():
            assert taken()
        assert taken()
    assert not taken()
    outer, inner = replace_sdpa(), replace_sdpa()
    outer.remove()
    assert taken()
    inner.remove()
    assert not taken()


def test_restore_takes_all_back():
    handle = replace_sdpa()
    replace_sdpa()
    restore_sdpa()
    assert not taken()
    restore_sdpa()
    with replace_sdpa():
        handle.remove()
        assert taken()


def test_from_many_threads():
    """Calls are right whichever operator they meet, while it is exchanged under them."""
    tensors = problem(2, 2, 40, 16)
    expected, wrong = imported_early(*tensors), []

    def call():
        for _ in range(200):
            if not torch.allclose(imported_early(*tensors), expected, atol=1e-5):
                wrong.append(1)

    def exchange():
        for _ in range(50):
            with replace_sdpa():
                imported_early(*tensors)

    threads = [threading.Thread(target=run) for run in (call, call, exchange, exchange)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not taken()


# --- what is taken over --------------------------------------------------------------------------


SUMS = 64 * torch.finfo(torch.float32).eps
OPTIONS = [{}, {"is_causal": True}, {"scale": 0.3}, {"scale": -0.1, "is_causal": True}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_option(options, dtype):
    tensors = [t.requires_grad_() for t in problem(dtype=dtype)]
    out, stats = calls(F.scaled_dot_product_attention, *tensors, **options)
    assert stats == {"replaced": 1}
    _same(out, tensors, torch.randn(2, 4, 33, 24).to(dtype), options)


def _same(out, tensors, d_out, options):
    """Near PyTorch's math path in float64, in result and gradients; how near exactly, test_attention says."""
    copies = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*copies, **options)
    scores = out.shape[:-1].numel() * tensors[1].shape[-2]
    inputs = [(t, c) for t, c in zip(tensors, copies) if t.requires_grad]
    got = torch.autograd.grad(out, [t for t, _ in inputs], d_out)
    wanted = torch.autograd.grad(expected, [c for _, c in inputs], d_out.double())
    for have, want in zip((out, *got), (expected, *wanted)):
        assert have.shape == want.shape
        terms = max(1, scores // want.numel())  # of each sum; their roundings add up like a random walk
        tolerance = (8 * torch.finfo(out.dtype).eps + SUMS * (out.dtype != torch.float64)) * terms**0.5
        assert (have.double() - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("shape", [(33, 38), (1, 38), (33, 1), (4, 33, 38), (2, 1, 33, 38), (2, 4, 1, 38), (1,) * 4])
@pytest.mark.parametrize("kind", ["bool", "float", "trained"])
def test_mask(shape, kind):
    tensors = [t.requires_grad_() for t in problem()]
    mask = torch.rand(shape) < 0.7 if kind == "bool" else torch.randn(shape)
    out, stats = calls(F.scaled_dot_product_attention, *tensors, mask.requires_grad_(kind == "trained"))
    assert stats == {"replaced": 1}
    if kind == "bool":
        mask = torch.zeros(shape).masked_fill(~mask, float("-inf"))
    _same(out, [*tensors, mask], torch.randn(2, 4, 33, 24), {})


def test_float_mask_of_lower_precision_tensors():
    tensors = [t.requires_grad_() for t in problem(dtype=torch.bfloat16)]
    out, stats = calls(F.scaled_dot_product_attention, *tensors, torch.randn(33, 38))
    assert stats == {"replaced": 1} and out.dtype == torch.bfloat16


def test_three_dimensions():
    tensors = [t.requires_grad_() for t in problem(3, 20, 16)]
    for mask in (None, torch.randn(20, 25), torch.randn(3, 20, 25), torch.randn(1, 1, 25)[0]):
        out, stats = calls(F.scaled_dot_product_attention, *tensors, mask)
        assert stats == {"replaced": 1} and out.shape == (3, 20, 16)
        _same(out, [*tensors, mask] if mask is not None else tensors, torch.randn(3, 20, 16), {})


def test_grouped_heads():
    tensors = [t.requires_grad_() for t in problem(2, 6, 20, 16, kv_heads=2)]
    out, stats = calls(F.scaled_dot_product_attention, *tensors, enable_gqa=True)
    assert stats == {"replaced": 1}
    _same(out, tensors, torch.randn(2, 6, 20, 16), {"enable_gqa": True})


def test_values_of_another_width():
    tensors = [t.requires_grad_() for t in problem(2, 4, 20, 16, value_dim=10)]
    out, stats = calls(F.scaled_dot_product_attention, *tensors)
    assert stats == {"replaced": 1}
    _same(out, tensors, torch.randn(2, 4, 20, 10), {})


def test_grad_modes():
    tensors = [t.requires_grad_() for t in problem()]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            out, stats = calls(F.scaled_dot_product_attention, *tensors)
        assert stats == {"replaced": 1} and (out.grad_fn is not None) == (mode is torch.enable_grad)


def test_autocast():
    tensors = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, stats = calls(F.scaled_dot_product_attention, *tensors)
    assert stats == {"replaced": 1} and out.dtype == torch.bfloat16


def test_script_and_trace():
    def function(query, key, value):
        return F.scaled_dot_product_attention(query, key, value)

    tensors = problem()
    traced = torch.jit.trace(function, tensors)
    out, stats = calls(traced, *tensors)
    assert stats == {"replaced": 1} and torch.allclose(out, function(*tensors), atol=1e-5)


def test_multihead_attention_training_step():
    """Loss and every parameter's gradient are those of PyTorch's own attention."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    x, padding = torch.randn(2, 20, 32), torch.zeros(2, 20, dtype=torch.bool)
    padding[1, 15:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(20)

    def step(**options):
        layer.zero_grad()
        loss = layer(x, x, x, need_weights=False, **options)[0].square().sum()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in layer.parameters()]

    for options in ({}, {"key_padding_mask": padding}, {"attn_mask": causal, "is_causal": True}):
        loss, gradients = step(**options)
        (our_loss, our_gradients), stats = calls(step, **options)
        assert stats == {"replaced": 1}
        torch.testing.assert_close(our_loss, loss)
        torch.testing.assert_close(our_gradients, gradients)


# --- what is left to PyTorch ---------------------------------------------------------------------


class Wrapped(torch.Tensor):
    pass


DIMENSIONS = "not 3 or 4 dimensions"
LEFT = {
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3), "dropout"),
    "subclass": (lambda q, k, v: F.scaled_dot_product_attention(q.as_subclass(Wrapped), k, v), "a tensor subclass"),
    "broadcast": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]), "shapes"),
    "two dimensions": (lambda q, k, v: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]), DIMENSIONS),
    "five dimensions": (lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None]), DIMENSIONS),
    "no queries": (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :0], k, v), "empty tensors"),
    "no keys": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0]), "empty tensors"),
    "scale NaN": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=float("nan")), "scale is NaN"),
    "jvp": (lambda q, k, v: torch.func.jvp(lambda x: imported_math(x, k, v), (q,), (q,))[1], None),
    "vmap": (lambda q, k, v: torch.vmap(F.scaled_dot_product_attention)(q, k, v), None),
    "grad": (lambda q, k, v: torch.func.grad(lambda x: F.scaled_dot_product_attention(x, k, v).sum())(q), None),
}


def imported_math(*tensors):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tensors)


@pytest.mark.parametrize("case", LEFT)
def test_left_to_pytorch(case):
    """To the bit, and counted under its reason."""
    function, reason = LEFT[case]
    tensors = problem()
    torch.manual_seed(1)
    expected = function(*tensors)
    torch.manual_seed(1)
    out, stats = calls(function, *tensors)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert type(out) is type(expected)
    assert "replaced" not in stats
    if reason:
        assert stats == {reason: 1}


@pytest.mark.parametrize("backends", [[SDPBackend.MATH], [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]], ids=str)
def test_sdpa_kernel_is_respected(backends):
    tensors = problem()
    with sdpa_kernel(backends):
        expected = F.scaled_dot_product_attention(*tensors)
        out, stats = calls(F.scaled_dot_product_attention, *tensors)
    assert torch.equal(out, expected) and stats == {"flash attention is disabled": 1}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert calls(F.scaled_dot_product_attention, *tensors)[1] == {"replaced": 1}


def test_second_derivative_in_math():
    tensors = [t.double().requires_grad_() for t in problem(1, 1, 3, 4)]
    with replace_sdpa(), sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(F.scaled_dot_product_attention, tensors)
    with replace_sdpa(), pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.gradgradcheck(F.scaled_dot_product_attention, tensors)


WRONG = {
    "head_dim": lambda q, k, v: F.scaled_dot_product_attention(q, k[..., :-1], v),
    "heads": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :3], v[:, :3]),
    "groups": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :3], v[:, :3], enable_gqa=True),
    "dtypes": lambda q, k, v: F.scaled_dot_product_attention(q, k.double(), v),
    "mask shape": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.randn(33, 37)),
    "mask dtype": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(33, 38, dtype=torch.int32)),
    "mask dimensions": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.randn(38)),
    "dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=1.5),
    "one dimension": lambda q, k, v: F.scaled_dot_product_attention(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]),
    "no tensor": lambda q, k, v: F.scaled_dot_product_attention(q, k, "value"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_those_of_pytorch(case):
    tensors = problem()
    with pytest.raises(Exception) as original:
        WRONG[case](*tensors)
    with replace_sdpa(), pytest.raises(original.type) as replaced:
        WRONG[case](*tensors)
    assert str(replaced.value) == str(original.value)


def test_mask_with_is_causal_is_what_this_pytorch_makes_of_it():
    tensors, mask = problem(), torch.rand(33, 38) < 0.7
    try:
        expected = F.scaled_dot_product_attention(*tensors, mask, is_causal=True)
    except RuntimeError as error:
        with replace_sdpa(), pytest.raises(RuntimeError) as replaced:
            F.scaled_dot_product_attention(*tensors, mask, is_causal=True)
        assert str(replaced.value) == str(error)
    else:
        out, stats = calls(F.scaled_dot_product_attention, *tensors, mask, is_causal=True)
        assert torch.equal(out, expected) and stats == {"attn_mask together with is_causal": 1}


def test_only_unsupported_falls_back(monkeypatch):
    tensors = problem()
    expected = F.scaled_dot_product_attention(*tensors)

    def refuse(error):
        def run(*_):
            raise error

        monkeypatch.setattr(module, "_run", run)

    refuse(Unsupported("no backend has this"))
    out, stats = calls(F.scaled_dot_product_attention, *tensors)
    assert torch.equal(out, expected) and stats == {"no backend has this": 1}
    refuse(MemoryError("workspace"))
    with pytest.raises(MemoryError):
        calls(F.scaled_dot_product_attention, *tensors)


def test_threshold(monkeypatch):
    tensors = problem()  # 2 * 4 * 33 * 38 * (24 + 24) multiply-adds
    monkeypatch.setitem(sdpa_thresholds, "float32", 2 * 4 * 33 * 38 * 48 + 1)
    assert calls(F.scaled_dot_product_attention, *tensors)[1] == {"small": 1}
    monkeypatch.setitem(sdpa_thresholds, "float32", 2 * 4 * 33 * 38 * 48)
    assert calls(F.scaled_dot_product_attention, *tensors)[1] == {"replaced": 1}
    monkeypatch.setitem(sdpa_thresholds, "float64", float("inf"))
    assert calls(F.scaled_dot_product_attention, *(t.double() for t in tensors))[1] == {"small": 1}


def test_dispatch_modes_see_the_operators():
    from torch.utils.flop_counter import FlopCounterMode

    tensors = problem()
    with FlopCounterMode(display=False) as expected:
        F.scaled_dot_product_attention(*tensors)
    with replace_sdpa(), FlopCounterMode(display=False) as counted:
        F.scaled_dot_product_attention(*tensors)
    assert counted.get_total_flops() == expected.get_total_flops()


def test_compiled():
    """A compiled graph keeps PyTorch's own operator, and stays right."""
    tensors = [t.requires_grad_() for t in problem()]
    compiled = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).square(), backend="aot_eager")
    out, _ = calls(compiled, *tensors)
    expected = F.scaled_dot_product_attention(*tensors).square()
    torch.testing.assert_close(out, expected)
    got, wanted = (torch.autograd.grad(o.sum(), tensors) for o in (out, expected))
    torch.testing.assert_close(got, wanted)
