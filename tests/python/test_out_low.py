"""In float16 and bfloat16, D is computed from out and what rounding took off it, so that gradients of short problems
keep to the rule of flash-attention: at most twice the error of attention written out in the same dtype."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mps_flash_attn import flash_attention, replaced_sdpa, run
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs, Operands
from stand_in import FLOAT64

HALVES = [torch.float16, torch.bfloat16]
QUERIES, KEYS, DIM, WINDOW = 799, 3, 64, 2


def operands(dtype, seed=0, queries=QUERIES, keys=KEYS):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, DIM), (keys, DIM), (keys, DIM), (queries, DIM))
    q, k, v, d_out = (torch.randn(1, 1, *shape, generator=generator).to(dtype) for shape in shapes)
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), d_out


def gradients(function, inputs, d_out, **more):
    return torch.autograd.grad(function(*inputs), inputs, d_out, **more)


def ours(q, k, v):
    return flash_attention(q, k, v, is_causal=True, window_size=(WINDOW, 0))


def written_out(q, k, v):
    distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    visible = (distance >= 0) & (distance <= WINDOW)
    scores = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0) @ v


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_keep_to_the_rule(dtype):
    """Each of 40 seeds, as a batch."""
    each = [operands(dtype, seed) for seed in range(40)]
    d_out = torch.cat([d_out for _, d_out in each])
    inputs = [
        torch.cat(tensors).detach().requires_grad_() for tensors in zip(*(tensors for tensors, _ in each), strict=True)
    ]
    single = [t.detach().float().requires_grad_() for t in inputs]
    expected = [t.to(dtype) for t in gradients(written_out, single, d_out.float())]
    naive = gradients(written_out, inputs, d_out)
    for name, got, right, other in zip(
        ("dQ", "dK", "dV"), gradients(ours, inputs, d_out), expected, naive, strict=True
    ):
        error, allowed = (got - right).abs().amax((1, 2, 3)), 2 * (other - right).abs().amax((1, 2, 3))
        assert (error <= allowed).all(), f"{name} is off by up to {(error / allowed).max()} of what is allowed"


def saved_by(function, *inputs):
    """The shapes and dtypes of all that is saved for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.shape, t.dtype)) or t, lambda t: t):
        function(*inputs)
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=FLOAT64), *HALVES])
def test_saved(dtype):
    """The saved tensors are the same for first and cached calls, and for every route."""
    inputs, _ = operands(dtype)
    first = saved_by(ours, *inputs)
    assert len(first) == (6 if dtype in HALVES else 5)
    assert [saved_by(ours, *inputs) for _ in range(3)] == [first] * 3
    with FlopCounterMode(display=False):
        assert saved_by(ours, *inputs) == first
    with replaced_sdpa():
        assert dtype not in HALVES or [saved_by(scaled_dot_product_attention, *inputs) for _ in range(3)] == [first] * 3
    assert not saved_by(ours, *(t.detach() for t in inputs))


@pytest.mark.parametrize("dtype", HALVES)
def test_checkpoint(dtype):
    inputs, d_out = operands(dtype)
    expected = gradients(ours, inputs, d_out)
    again = gradients(lambda *t: checkpoint(ours, *t, use_reentrant=False), inputs, d_out)
    assert all(map(torch.equal, again, expected))
    with FlopCounterMode(display=False):  # goes by the dispatcher, what is computed anew does not
        out = checkpoint(ours, *inputs, use_reentrant=False)
    for got, right in zip(torch.autograd.grad(out, inputs, d_out), expected, strict=True):
        torch.testing.assert_close(got, right, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("times", [1, 4])
def test_hooks_that_change_strides(dtype, times):
    """Hooks may change the strides of out_low and out, or of one of them."""
    inputs, d_out = operands(dtype)
    expected = gradients(ours, inputs, d_out)

    def turned(tensor):
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.shape[2] == QUERIES else tensor

    for every in (1, 2):
        for _ in range(times):
            count = itertools.count(1)

            def unpack(tensor, count=count, every=every):
                return tensor if next(count) % every else turned(tensor)

            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
                out = ours(*inputs)
            for got, right in zip(torch.autograd.grad(out, inputs, d_out), expected, strict=True):
                torch.testing.assert_close(got, right)


@pytest.mark.parametrize("dtype", HALVES)
def test_out_is_not_changed_in_place(dtype):
    inputs, d_out = operands(dtype)
    for _ in range(3):
        out = ours(*inputs)
        with torch.no_grad():
            out.add_(1)
        with pytest.raises(RuntimeError, match="inplace"):
            out.backward(d_out)


@pytest.mark.parametrize("dtype", HALVES)
def test_refused(dtype):
    inputs, d_out = operands(dtype, queries=8)
    q, k, v = (t.detach() for t in inputs)
    options, wanted = Options(), (True, True, True, False)
    out, lse, out_low = run.forward_for_backward(Inputs(q, k, v), options)
    assert out_low.stride() == out.stride() and (out_low.abs() <= out.abs() * torch.finfo(dtype).eps).all()
    for wrong, error in ((out_low.float(), TypeError), (out_low[:, :, :4], ValueError)):
        with pytest.raises(error, match="out_low"):
            run.backward(Operands(Inputs(q, k, v), out, lse, d_out, None, wrong), options, wanted)
