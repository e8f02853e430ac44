"""Activation checkpointing, with SDPA replaced in forward, in backward, or in a part of either: recomputation uses the
implementation that forward used."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from calls import problem
from mps_flash_attn import replace_sdpa, replaced_sdpa, restore_sdpa, sdpa_stats
from mps_flash_attn.sdpa import checkpointing, replace

SHOWS_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
pytestmark = [
    pytest.mark.usefixtures("everything", "one_thread"),
    pytest.mark.skipif(not SHOWS_HOOKS, reason="this PyTorch does not show its hooks for saved tensors"),
]
AS_IN_FORWARD = "computed again, as PyTorch's operator computed it in forward"


@pytest.fixture(autouse=True)
def _is_gone():
    """Asserts that PyTorch's operator has no registration of ours left."""
    yield
    restore_sdpa()
    assert not checkpointing.is_pending() and replace._overrides is None


def attention(*tensors, **options):
    return F.scaled_dot_product_attention(*(t * 1.5 for t in tensors), **options).sin()


KINDS = {  # of calls, which save different tensors in PyTorch
    "fused": ({}, {}),
    "unfused": ({"value_dim": 10}, {}),
    "causal": ({}, {"is_causal": True}),
    "masked": ({}, {"attn_mask": torch.randn(33, 38)}),
    "grouped": ({"kv_heads": 2}, {"enable_gqa": True}),
    "half": ({"dtype": torch.float16}, {}),
}


def replaced(now):
    return replaced_sdpa() if now else contextlib.nullcontext()


def gradients(function, tensors, forward, backward, reentrant=False):
    """The gradients with SDPA replaced in forward, in backward, or not; and how the calls in each went."""
    sdpa_stats(reset=True)
    with replaced(forward):
        out = checkpoint(function, *tensors, use_reentrant=reentrant)
    in_forward = sdpa_stats(reset=True)
    with replaced(backward):
        found = torch.autograd.grad(out.sum(), tensors) if not reentrant else _accumulated(out, tensors)
    return found, in_forward, sdpa_stats(reset=True)


def _accumulated(out, tensors):
    out.sum().backward()
    found = [t.grad for t in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forward, backward", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(kind, forward, backward, reentrant):
    shape, options = KINDS[kind]
    tensors = [t.requires_grad_() for t in problem(2, 4, 33, 24, **shape)]

    def function(*given):
        return attention(*given, **options)

    expected = torch.autograd.grad(function(*tensors).sum(), tensors)
    close = {"rtol": 2e-2, "atol": 2e-2} if tensors[0].dtype is torch.float16 else {"rtol": 1e-4, "atol": 1e-4}
    found, in_forward, in_backward = gradients(function, tensors, forward, backward, reentrant)
    torch.testing.assert_close(found, expected, **close)
    assert in_forward == ({"replaced": 1} if forward else {})
    if reentrant:  # backward has a graph of its own
        assert in_backward == ({"replaced": 1} if backward else {})
    else:
        assert in_backward == ({"replaced": 1} if forward else {AS_IN_FORWARD: 1})


@pytest.mark.parametrize("inner", [0, 1, 2])
@pytest.mark.parametrize("forward, backward", [(True, False), (False, True), (False, False)])
def test_replaced_in_a_part_of_it(inner, forward, backward):
    """The function itself replaces one of three calls, in forward and in recomputation alike."""
    tensors = [t.requires_grad_() for t in problem(1, 2, 9, 8, kv_len=9)]

    def function(query, key, value):
        for number in range(3):
            with replaced(number == inner):
                query = attention(query, key, value)
        return query

    expected = torch.autograd.grad(function(*tensors).sum(), tensors)
    found, in_forward, _ = gradients(function, tensors, forward, backward)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert in_forward == {"replaced": 3 if forward else 1}


@pytest.mark.parametrize("forward, backward", [(True, False), (False, True)])
def test_calls_without_gradients_among_them(forward, backward):
    tensors = [t.requires_grad_() for t in problem(1, 2, 9, 8, kv_len=9)]

    def function(query, key, value):
        with torch.no_grad():
            constant = attention(query, key, value)
        return attention(query, key, value) * constant

    expected = torch.autograd.grad(function(*tensors).sum(), tensors)
    found, _, _ = gradients(function, tensors, forward, backward)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forward, backward", [(True, False), (False, True)])
def test_nested(forward, backward):
    tensors = [t.requires_grad_() for t in problem(1, 2, 9, 8, kv_len=9)]

    def outer(query, key, value):
        query = attention(query, key, value)
        query = checkpoint(attention, query, key, value, use_reentrant=False)
        return attention(query, key, value)

    expected = torch.autograd.grad(outer(*tensors).sum(), tensors)
    found, _, _ = gradients(outer, tensors, forward, backward)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forward, backward", [(True, False), (False, True)])
def test_backward_twice_and_to_the_end(forward, backward):
    tensors = [t.requires_grad_() for t in problem(1, 2, 9, 8)]
    expected = torch.autograd.grad(attention(*tensors).sum(), tensors)
    with set_checkpoint_early_stop(False), replaced(forward):
        out = checkpoint(attention, *tensors, use_reentrant=False).sum()
    with replaced(backward):
        for again in (True, False):
            found = torch.autograd.grad(out, tensors, retain_graph=again)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_other_calls_meanwhile():
    """After the replacement ends, only recomputation still uses ours, and in the end nothing does."""
    tensors = [t.requires_grad_() for t in problem(1, 2, 9, 8)]
    expected = F.scaled_dot_product_attention(*tensors)
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    handle = replace_sdpa()
    out = checkpoint(attention, *tensors, use_reentrant=False)
    handle.remove()
    sdpa_stats(reset=True)
    assert torch.equal(F.scaled_dot_product_attention(*tensors), expected)
    with torch.no_grad():
        assert torch.equal(F.scaled_dot_product_attention(*tensors), expected)
        layer(tensors[0][0], tensors[0][0], tensors[0][0], need_weights=False)
    assert sdpa_stats() == {} and replace._overrides is not None
    with replaced_sdpa():
        F.scaled_dot_product_attention(*tensors)
    assert sdpa_stats(reset=True) == {"replaced": 1}
    torch.autograd.grad(out.sum(), tensors)
    assert sdpa_stats() == {"replaced": 1}
    del out
    assert replace._overrides is None


def test_graph_that_is_dropped():
    tensors = [t.requires_grad_() for t in problem(1, 2, 9, 8)]
    with replaced_sdpa():
        out = checkpoint(attention, *tensors, use_reentrant=False)
    assert replace._overrides is not None
    del out
    assert replace._overrides is None


def test_other_hooks():
    tensors = [t.requires_grad_() for t in problem(1, 2, 9, 8)]
    expected = torch.autograd.grad(attention(*tensors).sum(), tensors)
    with replaced_sdpa(), torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        out = attention(*tensors)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), tensors), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forward, backward", [(True, False), (False, True), (True, True)])
def test_vmap_within(forward, backward):
    tensors = [torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3)]

    def mapped(*operands):
        return torch.vmap(F.scaled_dot_product_attention)(*operands)

    wanted = torch.autograd.grad(mapped(*tensors).sum(), tensors)
    found, _, _ = gradients(mapped, tensors, forward, backward)
    for got, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, right)
