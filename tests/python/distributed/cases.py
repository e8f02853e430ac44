"""What the workers of the pool run: context_parallel_attention of a group beside flash_attention of the whole sequence,
which each of them computes by itself from the same seed."""

import torch

import pool
from mps_flash_attn import flash_attention
from mps_flash_attn.distributed import Layout, context_parallel_attention

LAYOUTS = {
    "contiguous": Layout.contiguous,
    "zigzag": Layout.zigzag,
    "uneven": lambda length, group: Layout.of_lengths(uneven(length, group.size()), group),
}


def uneven(length, size):
    """Lengths of which the first is 0, where there is more than one."""
    parts = [0, *(length * rank // (size + 1) for rank in range(1, size))]
    return [*parts[:size][:-1], length - sum(parts[:size][:-1])]


def tensors(length, heads, kv_heads, head_dim, value_dim, dtype):
    """query, key, value and d_out of the whole sequence."""
    shapes = (heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim), (heads, value_dim)
    return [torch.randn(2, count, length, columns, dtype=torch.float64).to(dtype) for count, columns in shapes]


def run_whole(operands, d_out, d_lse, options):
    """out, lse and the gradients of flash_attention of the whole sequence."""
    leaves = {name: one.clone().requires_grad_(one.is_floating_point()) for name, one in operands.items()}
    query, key, value = (leaves.pop(name) for name in ("query", "key", "value"))
    out, lse = flash_attention(query, key, value, **leaves, **options, enable_gqa=True, return_lse=True)
    incoming = (out * d_out).sum() + (0 if d_lse is None else (lse * d_lse).masked_fill(lse == -torch.inf, 0).sum())
    found = {"query": query, "key": key, "value": value} | leaves
    wanted = {name: one for name, one in found.items() if one.requires_grad}
    return out, lse, dict(zip(wanted, torch.autograd.grad(incoming, list(wanted.values())), strict=True))


def compare(
    size,
    layout="contiguous",
    length=37,
    heads=4,
    kv_heads=2,
    head_dim=16,
    value_dim=16,
    dtype=torch.float64,
    with_lse=True,
    **options,
):
    """The largest error, relative to the largest number or 1, of each result of this rank."""
    *qkv, d_out = tensors(length, heads, kv_heads, head_dim, value_dim, dtype)
    places = LAYOUTS[layout](length, pool.groups[size])
    d_lse = torch.randn(2, heads, length, dtype=torch.promote_types(dtype, torch.float32)) if with_lse else None
    operands = dict(zip(("query", "key", "value"), qkv, strict=True))
    whole = run_whole(operands, d_out, d_lse, options)
    own = [places.shard(one, 2).requires_grad_() for one in qkv]
    out, lse = context_parallel_attention(*own, places, **options, enable_gqa=True, return_lse=True)
    loss = (out * places.shard(d_out, 2)).sum()
    if with_lse:
        loss = loss + (lse * places.shard(d_lse, 2)).masked_fill(lse == -torch.inf, 0).sum()
    loss.backward()
    found = {"out": (out, whole[0]), "lse": (lse, whole[1])}
    found |= {name: (one.grad, whole[2][name]) for name, one in zip(operands, own, strict=True)}
    return {name: error(one, places.shard(of_all, 2)) for name, (one, of_all) in found.items()}


def error(found, expected):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    found, expected = (one.detach().double().masked_fill(expected == -torch.inf, 0) for one in (found, expected))
    if not found.numel():
        return 0.0
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
