"""What the workers of the pool run: context_parallel_attention of a group beside flash_attention of the whole sequence,
which each of them computes by itself from the same seed."""

import torch
import torch.distributed as dist

import pool
from mps_flash_attn import flash_attention
from mps_flash_attn.distributed import Layout, context_parallel_attention
from stand_in import ON_METAL

HALVES = (torch.float16, torch.bfloat16)
EXACT = torch.float32 if ON_METAL else torch.float64  # what halves are compared with


def uneven(length, size):
    """Lengths of which the first is 0, where there is more than one."""
    parts = [0, *(length * rank // (size + 1) for rank in range(1, size))][: size - 1]
    return [*parts, length - sum(parts)]


LAYOUTS = {
    "contiguous": Layout.contiguous,
    "zigzag": Layout.zigzag,
    "uneven": lambda length, group: Layout.of_lengths(uneven(length, group.size()), group),
}


def layout_of(size, name, length):
    return LAYOUTS[name](length, pool.groups[size])


def operands_of(length, heads, kv_heads, head_dim, value_dim, dtype):
    """query, key, value and d_out of the whole sequence, of which the first three are operands by name."""
    shapes = (heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim), (heads, value_dim)
    drawn = [torch.randn(2, count, length, columns, dtype=torch.float64).to(dtype) for count, columns in shapes]
    return dict(zip(("query", "key", "value"), drawn)), drawn[3]  # noqa: B905


def mask_of(kind, heads, length, dtype):
    """A mask of the whole sequence. Some query sees nothing where it has rows."""
    shapes = {"bool": (length, length), "float": (2, heads, length, length), "bfloat16": (1, heads, length, length)}
    shapes |= {"of rows": (2, 1, length, 1), "of columns": (heads, 1, length), "one column of bool": (length, 1)}
    shape = shapes[kind]
    if "bool" in kind:
        mask = torch.rand(shape) < 0.6
        mask[length // 2] = False
        return mask
    mask = torch.randn(shape, dtype=torch.float64)
    if kind == "float":
        mask[:, 1, length // 2] = -torch.inf
    narrow = torch.bfloat16 if kind == "bfloat16" else torch.promote_types(dtype, torch.float32)
    return mask.to(narrow)


def shard_mask(layout, mask):
    return mask if mask.shape[-2] == 1 else layout.shard(mask, -2)


def with_documents(mask, documents, length, dtype):
    """The mask that also hides the keys of other documents."""
    if documents is None:
        return mask
    number = torch.bucketize(torch.arange(length), torch.tensor(documents), right=True)
    same = number[:, None] == number
    if mask is None or mask.dtype == torch.bool:
        return same if mask is None else same & mask
    return mask.masked_fill(~same, -torch.inf)


def loss_of(out, lse, d_out, d_lse):
    of_lse = 0 if d_lse is None else (lse * d_lse).masked_fill(lse == -torch.inf, 0).sum()
    return (out * d_out).sum() + of_lse


def run_whole(operands, d_out, d_lse, documents, options):
    """{out, lse and the gradients by name} of flash_attention of the whole sequence."""
    leaves = {name: one.clone().requires_grad_(one.is_floating_point()) for name, one in operands.items()}
    query, key, value, *others = leaves.values()
    others = dict(zip(list(leaves)[3:], others, strict=True))
    mask = with_documents(others.pop("attn_mask", None), documents, query.shape[2], query.dtype)
    out, lse = flash_attention(query, key, value, attn_mask=mask, **others, **options, enable_gqa=True, return_lse=True)
    wanted = {name: one for name, one in leaves.items() if one.requires_grad}
    found = torch.autograd.grad(loss_of(out, lse, d_out, d_lse), list(wanted.values()))
    return {"out": out, "lse": lse} | dict(zip(wanted, found, strict=True))


def run_divided(layout, operands, d_out, d_lse, documents, options):
    """The same of context_parallel_attention, of this rank's rows."""
    leaves = {}
    for name, one in operands.items():
        one = layout.shard(one, 2) if name in ("query", "key", "value") else one
        one = shard_mask(layout, one) if name == "attn_mask" else one
        leaves[name] = one.clone().requires_grad_(one.is_floating_point())
    query, key, value, *others = leaves.values()
    others = dict(zip(list(leaves)[3:], others, strict=True))
    out, lse = context_parallel_attention(
        *(query, key, value, layout), **others, **options, documents=documents, enable_gqa=True, return_lse=True
    )
    d_out, d_lse = layout.shard(d_out, 2), None if d_lse is None else layout.shard(d_lse, 2)
    loss_of(out, lse, d_out, d_lse).backward()
    return {"out": out, "lse": lse} | {name: one.grad for name, one in leaves.items() if one.requires_grad}


def compare(
    size,
    layout="contiguous",
    length=37,
    heads=4,
    kv_heads=2,
    head_dim=16,
    value_dim=16,
    dtype=torch.float64,
    mask=None,
    sinks=None,
    documents=None,
    with_lse=True,
    method="ring",
    **options,
):
    """{name: (error, error of flash_attention on one process)} of the results of this rank. Errors are relative to the
    largest number, or 1; in f16 and bf16 they are those against EXACT, else those against one process."""
    operands, d_out = operands_of(length, heads, kv_heads, head_dim, value_dim, dtype)
    layout = layout_of(size, layout, length)
    if mask:
        operands["attn_mask"] = mask_of(mask, heads, length, dtype)
    if sinks:
        operands["sinks"] = torch.randn(sinks)
    d_lse = torch.randn(2, heads, length, dtype=torch.promote_types(dtype, torch.float32)) if with_lse else None
    whole = run_whole(operands, d_out, d_lse, documents, options)
    exact = whole
    if dtype in HALVES:
        wide = {name: one.to(EXACT) if name in ("query", "key", "value") else one for name, one in operands.items()}
        exact = run_whole(wide, d_out.to(EXACT), d_lse, documents, options)
    found = run_divided(layout, operands, d_out, d_lse, documents, options | {"method": method})
    errors = {}
    for name, one in found.items():
        expected, of_one = exact[name], whole[name]
        assert one.dtype == of_one.dtype, (name, one.dtype)
        if name == "sinks" or (name == "attn_mask" and expected.shape[-2] == 1):  # each rank has its part of the sum
            dist.all_reduce(one, group=layout.peers.group)
        elif name == "attn_mask":
            expected, of_one = shard_mask(layout, expected), shard_mask(layout, of_one)
        else:
            expected, of_one = layout.shard(expected, 2), layout.shard(of_one, 2)
        errors[name] = error(one, expected), error(of_one, expected)
    return errors


def error(found, expected):
    """The largest difference, in f16 and bf16 the root of the mean square; relative to the largest number or 1."""
    assert found.shape == expected.shape
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    is_rounded = found.dtype in HALVES
    found, expected = (one.detach().double().masked_fill(expected == -torch.inf, 0) for one in (found, expected))
    if not found.numel():
        return 0.0
    difference = (found - expected).abs()
    size = difference.square().mean().sqrt() if is_rounded else difference.max()
    return (size / expected.abs().max().clamp(min=1)).item()


def check(per_rank, dtype):
    """Fails unless what compare() returned on each rank is as exact as one process. In f16 and bf16 the errors of both
    are of one size, and those of the gradient of the few sinks less so."""
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6}
    for errors in per_rank:
        for name, (found, of_one) in errors.items():
            limit = (2 if name == "sinks" else 1.25) * of_one + 1e-4 if dtype in HALVES else tolerance[dtype]
            assert found <= limit, (name, errors)
