"""flex_attention against PyTorch's own, and against attention written out, whose gradients PyTorch computes."""

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dropped import problem
from mps_flash_attn import Unsupported, flash_attention, flex_attention, score_mod
from score_mods import (
    DTYPE,
    FORMS,
    MASKS,
    Captured,
    H,
    L,
    S,
    blocks_of,
    causal,
    close,
    ours,
    results,
    theirs,
    written_out,
)
from stand_in import FULL

# --- Forms of score_mods --------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients(form, mask):
    tensors = problem(L, S, dtype=DTYPE)
    function = FORMS[form](Captured())
    found = results(lambda *t: ours(*t, score_mod=function, block_mask=blocks_of(MASKS[mask])), tensors)
    close(found, results(lambda *t: written_out(*t, function, MASKS[mask]), tensors))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_captured_tensors(form):
    tensors, captured = problem(L, S, dtype=DTYPE), Captured(requires_grad=True)
    function = FORMS[form](captured)
    found = results(lambda *t: ours(*t, score_mod=function, block_mask=blocks_of(causal)), tensors, captured)
    close(found, results(lambda *t: written_out(*t, function, causal), tensors, captured))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("form", list(FORMS) if FULL else list(FORMS)[::5])
def test_as_in_pytorch(form):
    tensors = problem(L, S, dtype=DTYPE)
    options = {"score_mod": FORMS[form](Captured()), "block_mask": blocks_of(MASKS["documents"]), "scale": 0.3}
    close(ours(*tensors, **options), theirs(*tensors, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["bias", "alibi", "relative", "softcap, then biases"])
def test_low_precision(dtype, form):
    tensors = problem(L, S, dtype=dtype)
    function = FORMS[form](Captured(dtype))
    found = ours(*tensors, score_mod=function, block_mask=blocks_of(causal))
    assert found[0].dtype is dtype and found[1].dtype is torch.float32
    exact = FORMS[form](Captured(torch.float64))
    expected = written_out(*(tensor.double() for tensor in tensors), exact, causal)
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    close(found, expected, rtol=tolerance, atol=tolerance)


def test_what_is_read_where_it_lies(monkeypatch):
    """No L x S tensor is made of a bias, of ALiBi or of a mask that is a band."""
    tensors, captured = problem(L, S, dtype=DTYPE), Captured()
    monkeypatch.setattr(score_mod, "offset", None)
    blocks, of_squares = [blocks_of(MASKS[name]) for name in ("causal", "window")], blocks_of(causal, (L, L))
    monkeypatch.setattr(flex, "create_mask", None)
    for form in ("bias", "bias by steps", "bias of pairs", "bias transposed", "bias of keys", "softcap"):
        for block_mask in blocks:
            ours(*tensors, score_mod=FORMS[form](captured), block_mask=block_mask)
    for form in ("alibi aligned", "alibi of both", "alibi negative"):
        ours(*tensors, score_mod=FORMS[form](captured))
    square = problem(L, L, dtype=DTYPE)
    for form in ("alibi", "alibi subtracted", "alibi of numbers", "softcap, then alibi"):
        ours(*square, score_mod=FORMS[form](captured), block_mask=of_squares)


def test_alibi_without_a_causal_mask_is_not_that_of_the_kernel():
    """slope * (kv - q) grows with the keys that follow."""
    tensors, captured = problem(L, L, dtype=DTYPE), Captured()
    for mask_mod in (None, lambda b, h, q, k: q + 1 >= k, lambda b, h, q, k: (q >= k) | (k > 60)):
        function = FORMS["alibi"](captured)
        found = ours(*tensors, score_mod=function, block_mask=blocks_of(mask_mod, (L, L)))
        close(found, written_out(*tensors, function, mask_mod))


def test_full_blocks_outside_of_the_band():
    """mask_mod is not asked for full blocks: a causal one does not hide keys there, nor make ALiBi causal."""
    tensors, captured = problem(64, 64, dtype=DTYPE), Captured()
    partial, full = torch.eye(4, dtype=torch.bool), ~torch.eye(4, dtype=torch.bool)
    ordered = [
        (dense.sum(-1).int()[None, None], (~dense).int().argsort(dim=-1, stable=True).int()[None, None])
        for dense in (partial, full)
    ]
    blocks = flex.BlockMask.from_kv_blocks(*ordered[0], *ordered[1], BLOCK_SIZE=16, mask_mod=causal)

    def visible(b, h, q, k):
        return (q >= k) | (q // 16 != k // 16)

    function = FORMS["alibi"](captured)
    for _ in range(2):
        found = ours(*tensors, score_mod=function, block_mask=blocks)
        close(found, written_out(*tensors, function, visible))
        close(ours(*tensors, block_mask=blocks), written_out(*tensors, None, visible))
    blocks.full_kv_num_blocks.zero_()
    diagonal = flex.and_masks(causal, lambda b, h, q, k: q // 16 == k // 16)
    close(ours(*tensors, block_mask=blocks), written_out(*tensors, None, diagonal))


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(flex, "AuxRequest"), reason="PyTorch has no AuxRequest before 2.9")
def test_aux():
    tensors = problem(L, S)
    out, lse = ours(*tensors)
    for request, expected in ((flex.AuxRequest(lse=True), lse), (flex.AuxRequest(), None)):
        found, aux = flex_attention(*tensors, enable_gqa=True, return_aux=request)
        assert torch.equal(found, out) and isinstance(aux, flex.AuxOutput) and aux.max_scores is None
        assert aux.lse is None if expected is None else torch.equal(aux.lse, expected)
    with pytest.raises(Unsupported, match="max_scores"):
        flex_attention(*tensors, enable_gqa=True, return_aux=flex.AuxRequest(max_scores=True))
    with pytest.raises(ValueError, match="return_lse and return_aux are given"):
        flex_attention(*tensors, enable_gqa=True, return_lse=True, return_aux=flex.AuxRequest())


def test_sinks_by_lse():
    """As transformers adds them after flex_attention."""
    tensors, sinks = problem(L, S, dtype=DTYPE), torch.randn(H).requires_grad_()

    def renormalized(query, key, value, sinks):
        out, lse = ours(query, key, value, block_mask=blocks_of(causal))
        both = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
        return out * (lse - both).exp()[..., None].to(out.dtype), both

    found = results(lambda q, k, v: renormalized(q, k, v, sinks), tensors, [sinks])
    options = {"sinks": sinks, "enable_gqa": True, "return_lse": True, "is_causal": True}
    close(found, results(lambda q, k, v: flash_attention(q, k, v, **options), tensors, [sinks]))


def test_one_batch_of_keys():
    query, key, value = problem(L, S, dtype=DTYPE)
    tensors = query, key[:1], value[:1]
    function = FORMS["bias"](Captured())
    found = results(lambda *t: ours(*t, score_mod=function), tensors)
    close(found, results(lambda *t: written_out(*t, function), tensors))


def test_wrong_arguments():
    query, key, value = problem(L, S)
    with pytest.raises(ValueError, match="enable_gqa"):
        flex_attention(query, key, value)
    with pytest.raises(TypeError, match="block_mask is a Tensor; it must be a BlockMask"):
        flex_attention(query, key, value, block_mask=torch.ones(5, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match="kernel_options is a list; it must be a dict"):
        flex_attention(query, key, value, kernel_options=[])
    with pytest.raises(ValueError, match="BlockMask for 90 queries and 70 keys"):
        flex_attention(query, key, value, enable_gqa=True, block_mask=blocks_of(causal, (S, L)))
    with pytest.raises(ValueError, match="query has 3 dimensions"):
        flex_attention(query[0], key[0], value[0], score_mod=lambda s, *_: s)
    short = torch.randn(L, S - 1)
    with pytest.raises(IndexError, match="out of bounds"):
        ours(query, key, value, score_mod=lambda s, b, h, q, k: s + short[q, k])
    close(ours(query, key, value, kernel_options={"BLOCK_M": 64}), ours(query, key, value))


# --- Through PyTorch ------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["compile", "checkpoint", "autocast", "inference", "vmap", "func"])
def test_routes(route):
    tensors, captured = problem(L, S), Captured(torch.float32)
    blocks = blocks_of(causal)

    def attend(*tensors):
        function = FORMS["softcap, then biases"](captured)
        return flex_attention(*tensors, score_mod=function, block_mask=blocks, enable_gqa=True)

    expected = attend(*tensors)
    if route == "compile":
        torch._dynamo.reset()
        found = torch.compile(lambda *t: attend(*t) + 1, backend="aot_eager")(*tensors) - 1
    elif route == "checkpoint":
        leaves = [tensor.requires_grad_() for tensor in tensors]
        found = checkpoint(attend, *leaves, use_reentrant=False)
        gradients = [torch.autograd.grad(one.square().sum(), leaves) for one in (found, attend(*leaves))]
        close(*gradients)
    elif route == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = attend(*tensors)
        assert found.dtype is torch.bfloat16
        close([found], [expected], rtol=3e-2, atol=3e-2)
        return
    elif route == "inference":
        with torch.inference_mode():
            found = attend(*tensors)
    elif route == "vmap":
        found = torch.vmap(attend)(*(torch.stack([t, t + 1]) for t in tensors))[0]
    else:
        loss = lambda *t: attend(*t).square().sum()  # noqa: E731
        found = torch.func.grad(loss, (0, 1, 2))(*tensors)
        leaves = [tensor.requires_grad_() for tensor in tensors]
        close(found, torch.autograd.grad(loss(*leaves), leaves))
        return
    close([found], [expected], rtol=1e-5, atol=1e-5)


def test_captured_tensors_of_transforms():
    """grad of torch.func sees them; vmap of one is refused, as is a factor that has a gradient."""
    tensors, captured = problem(L, S), Captured(torch.float32)
    forms = {
        "bias": lambda bias: lambda s, b, h, q, k: s + bias[b, h, q, k],
        "slopes": lambda slopes: lambda s, b, h, q, k: s - slopes[h] * (q + (S - L) - k).abs(),
        "number": lambda number: lambda s, b, h, q, k: s + number * torch.sin(k * 1.0),
    }
    for name, form in forms.items():
        loss = lambda one, form=form: ours(*tensors, score_mod=form(one))[0].square().sum()  # noqa: E731
        leaf = getattr(captured, name).detach().requires_grad_()
        close([torch.func.grad(loss)(leaf.detach())], torch.autograd.grad(loss(leaf), leaf), rtol=1e-3, atol=1e-3)
        with pytest.raises(Unsupported, match="such as one that vmap maps"):
            torch.vmap(loss)(torch.stack([leaf.detach()] * 2))
    cap = lambda cap: ours(*tensors, score_mod=lambda s, *_: cap * torch.tanh(s / cap))[0].sum()  # noqa: E731
    for differentiate in (torch.func.grad(cap), lambda one: cap(one.requires_grad_())):
        with pytest.raises(Unsupported, match="divisor that is no constant number"):
            differentiate(torch.tensor(2.0))


def test_modes():
    tensors, captured = problem(L, S), Captured(torch.float32)
    with FlopCounterMode(display=False) as counter:
        flex_attention(*tensors, score_mod=FORMS["relative"](captured), block_mask=blocks_of(causal), enable_gqa=True)
    assert counter.get_total_flops() == 2 * 2 * H * L * S * (16 + 16)
