"""What PyTorch does with calls: compilers, checkpoints, inference, autocast, meshes; and the same bits each time."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import cases
import pool
from mps_flash_attn import flash_attention
from mps_flash_attn.distributed import Layout, context_parallel_attention


def training_step(attend, operands):
    """out and the gradients."""
    leaves = [one.detach().clone().requires_grad_() for one in operands]
    out = attend(*leaves)
    out.square().sum().backward()
    return [out.detach(), *(one.grad for one in leaves)]


def problem(layout, dtype=torch.float32):
    """This rank's rows of query, key and value of a sequence, and what a training step gives of the whole."""
    operands, _ = cases.operands_of(layout.length, 4, 2, 16, 16, dtype)
    whole = training_step(lambda *all_: flash_attention(*all_, True, enable_gqa=True), operands.values())
    own = [layout.shard(one, 2) for one in operands.values()]
    return own, [layout.shard(one, 2) for one in whole]


def check(layout, attend, tolerance=1e-5, dtype=torch.float32):
    own, expected = problem(layout, dtype)
    torch.testing.assert_close(training_step(attend, own), expected, rtol=tolerance, atol=tolerance)


def attention(layout, method="ring"):
    return lambda *own: context_parallel_attention(*own, layout, True, enable_gqa=True, method=method)


# --- Wrappers of PyTorch -------------------------------------------------------------------------


def compiled(size):
    layout = cases.layout_of(size, "zigzag", 33)
    attend = attention(layout)
    check(layout, torch.compile(lambda q, k, v: attend(q * 2, k / 2, v * 3) / 3, backend="aot_eager"))
    with pytest.raises(Exception, match="context_parallel_attention exchanges messages with other ranks"):
        torch.compile(attend, backend="aot_eager", fullgraph=True)(*problem(layout)[0])


def checkpointed(size, reentrant):
    layout = cases.layout_of(size, "zigzag", 33)
    check(layout, lambda *own: checkpoint(attention(layout), *own, use_reentrant=reentrant))


def without_gradients(size):
    layout = cases.layout_of(size, "uneven", 33)
    own, (expected, *_) = problem(layout)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for method in ("ring", "all_to_all"):
                out = attention(layout, method)(*own)
                assert not out.requires_grad
                torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def some_gradients(size):
    """Of key alone, and of query alone: other gradients neither travel nor are made."""
    layout = cases.layout_of(size, "zigzag", 33)
    own, expected = problem(layout)
    for method in ("ring", "all_to_all"):
        for place in range(3):
            leaves = [one.clone().requires_grad_(number == place) for number, one in enumerate(own)]
            attention(layout, method)(*leaves).square().sum().backward()
            torch.testing.assert_close(leaves[place].grad, expected[1 + place], rtol=1e-5, atol=1e-5)


def lse_of_one_rank(size):
    """Only the loss of the first rank has lse."""
    layout = cases.layout_of(size, "contiguous", 33)
    operands, d_out = cases.operands_of(33, 4, 2, 16, 16, torch.float32)
    d_lse = torch.zeros(2, 4, 33)
    d_lse[:, :, : layout.spans[0][0][1]] = 1
    whole = cases.run_whole(operands, d_out, d_lse, None, {"is_causal": True})
    for method in ("ring", "all_to_all"):
        own = None if layout.peers.rank else d_lse
        found = cases.run_divided(layout, operands, d_out, own, None, {"is_causal": True, "method": method})
        for name, one in found.items():
            torch.testing.assert_close(one, layout.shard(whole[name], 2), rtol=1e-5, atol=1e-5)


def rows_without_keys(size):
    """What the gradient of lse is where lse is -inf does not matter."""
    layout = cases.layout_of(size, "zigzag", 33)
    operands, d_out = cases.operands_of(33, 4, 2, 16, 16, torch.float32)
    mask = torch.rand(33, 33) < 0.5
    mask[::3] = False
    own = [layout.shard(one, 2).requires_grad_() for one in operands.values()]
    options = {"attn_mask": layout.shard(mask, 0), "enable_gqa": True, "return_lse": True}
    out, lse = context_parallel_attention(*own, layout, **options)
    d_lse = torch.ones_like(lse).masked_fill(lse == -torch.inf, torch.nan)
    found = torch.autograd.grad((out, lse), own, (layout.shard(d_out, 2), d_lse))
    assert all(one.isfinite().all() for one in found)


def gradient_of_a_mask(size):
    """Of the mask alone: only keys and values travel."""
    layout = cases.layout_of(size, "zigzag", 33)
    operands, d_out = cases.operands_of(33, 4, 2, 16, 16, torch.float32)
    mask = torch.randn(4, 33, 33, requires_grad=True)
    flash_attention(*operands.values(), attn_mask=mask, enable_gqa=True).backward(d_out)
    own = layout.shard(mask.detach(), 1).requires_grad_()
    parts = [layout.shard(one, 2) for one in operands.values()]
    context_parallel_attention(*parts, layout, attn_mask=own, enable_gqa=True).backward(layout.shard(d_out, 2))
    torch.testing.assert_close(own.grad, layout.shard(mask.grad, 1), rtol=1e-5, atol=1e-5)


def gradient_of_sinks(size):
    """Of the sinks alone; and what infinite ones do on one process."""
    layout = cases.layout_of(size, "zigzag", 33)
    operands, d_out = cases.operands_of(33, 4, 2, 16, 16, torch.float32)
    parts = [layout.shard(one, 2) for one in operands.values()]
    sinks = torch.tensor([0.5, 3, -torch.inf, 1])
    whole = sinks.clone().requires_grad_()
    flash_attention(*operands.values(), True, sinks=whole, enable_gqa=True).backward(d_out)
    for method in ("ring", "all_to_all"):
        options = {"is_causal": True, "enable_gqa": True, "method": method}
        own = sinks.clone().requires_grad_()
        context_parallel_attention(*parts, layout, sinks=own, **options).backward(layout.shard(d_out, 2))
        dist.all_reduce(own.grad, group=pool.groups[size])
        torch.testing.assert_close(own.grad, whole.grad, rtol=1e-5, atol=1e-5)
        infinite = torch.tensor([torch.inf, 0, 0, 0])
        results = context_parallel_attention(*parts, layout, sinks=infinite, return_lse=True, **options)
        assert all(one[:, 0].isnan().all() and one[:, 1:].isfinite().all() for one in results)


def selectively_checkpointed(size):
    """Policies that keep the results of operators: the messages are repeated on all ranks, or on none."""
    layout = cases.layout_of(size, "zigzag", 33)
    for policy in CheckpointPolicy.PREFER_SAVE, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE:
        contexts = functools.partial(create_selective_checkpoint_contexts, lambda *_, kept=policy, **__: kept)
        for method in ("ring", "all_to_all"):

            def attend(*own, method=method, contexts=contexts):
                def scaled(*one):
                    return attention(layout, method)(*one) * 1

                return checkpoint(scaled, *own, use_reentrant=False, context_fn=contexts)

            check(layout, attend)


def autocast(size):
    layout = cases.layout_of(size, "zigzag", 33)
    own, expected = problem(layout)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(layout)(*own)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected[0], rtol=2e-2, atol=2e-2)


def strided(size):
    """Tensors as models have them: (B, N, H, E) memory, K and V views of one tensor, gradients of stride 0."""
    layout = cases.layout_of(size, "zigzag", 33)
    own, expected = problem(layout)
    query = own[0].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    both = torch.cat(own[1:], 3).requires_grad_()
    for method in ("ring", "all_to_all"):
        out = attention(layout, method)(query, *both.split(16, 3))
        torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(out.sum(), (query, both))
        leaves = [one.clone().requires_grad_() for one in own]
        again = torch.autograd.grad(attention(layout, method)(*leaves).mul(1).sum(), leaves)
        torch.testing.assert_close(found, (again[0], torch.cat(again[1:], 3)))


def same_bits(size, method):
    layout = cases.layout_of(size, "zigzag", 65)
    own, _ = problem(layout)
    first = training_step(attention(layout, method), own)
    for _ in range(4):
        assert all(map(torch.equal, training_step(attention(layout, method), own), first))


FUNCTIONS = {
    "checkpoint": (checkpointed, False),
    "reentrant checkpoint": (checkpointed, True),
    "no gradients": (without_gradients,),
    "some gradients": (some_gradients,),
    "rows without keys": (rows_without_keys,),
    "lse of one rank": (lse_of_one_rank,),
    "gradient of a mask": (gradient_of_a_mask,),
    "gradient of sinks": (gradient_of_sinks,),
    "selective checkpoint": (selectively_checkpointed,),
    "autocast": (autocast,),
    "strided": (strided,),
    "the same bits by the ring": (same_bits, "ring"),
    "the same bits by all_to_all": (same_bits, "all_to_all"),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_call(size, name):
    function, *arguments = FUNCTIONS[name]
    pool.shared().run(pool.RANKS[size], function, size, *arguments)


def test_compiled():  # the compiler takes seconds
    pool.shared().run(pool.RANKS[2], compiled, 2)


# --- Meshes --------------------------------------------------------------------------------------


def on_mesh():
    """Two sequences, each over two ranks: groups that have other ranks than all."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    torch.manual_seed(mesh.get_local_rank("data"))  # another batch
    for group in (mesh["sequence"], mesh.get_group("sequence")):
        layout = Layout.zigzag(33, group)
        assert layout.peers.size == 2 and layout.peers.rank == mesh.get_local_rank("sequence")
        check(layout, attention(layout))
    with pytest.raises(ValueError, match=r"group is a DeviceMesh with 2 dimensions; it must have 1: mesh\[name\]"):
        Layout.zigzag(33, mesh)


def test_mesh():
    pool.shared().run(range(4), on_mesh)


def of_another_group():
    group = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        with pytest.raises(ValueError, match="this process is not in the group"):
            Layout.contiguous(8, group)


def test_process_that_is_not_in_the_group():
    pool.shared().run(range(4), of_another_group)
