"""Packed sequences, caches and pages with their lengths, and attention of each sequence by itself, shared by the test
files of them. Rows that no sequence has are NaN."""

import torch

from mps_flash_attn import flash_attention

CLAMPED = "on Metal lengths stay on the device, and wrong ones are clamped"
NAMES = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"


def integers(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def cumulative(lengths, first=0):
    return integers([first + sum(lengths[:n]) for n in range(len(lengths) + 1)])


def packed(lengths, heads, columns, dtype=torch.float32, first=0, after=0):
    """((total, heads, columns) rows, cu_seqlens), with rows before and after those of the sequences."""
    rows = torch.randn(first + sum(lengths) + after, heads, columns).to(dtype)
    rows[:first], rows[first + sum(lengths) :] = torch.nan, torch.nan
    return rows, cumulative(lengths, first)


def problem(q_lens, kv_lens, heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype=torch.float32, first=0, after=0):
    """The arguments of flash_attention_varlen up to max_seqlen_k."""
    query, cu_q = packed(q_lens, heads, head_dim, dtype, first, after)
    key, cu_k = packed(kv_lens, kv_heads, head_dim, dtype, first, after)
    value, _ = packed(kv_lens, kv_heads, value_dim, dtype, first, after)
    return [query, key, value, cu_q, cu_k, max(q_lens, default=0), max(kv_lens, default=0)]


def of_entry(options, b, q_len, kv_len):
    """The options of flash_attention for sequence b alone."""
    own = dict(options)
    for name in ("sinks", "alibi_slopes"):
        if own.get(name) is not None and own[name].dim() == 2:
            own[name] = own[name][b : b + 1]
    if own.get("attn_mask") is not None:
        mask = own["attn_mask"]
        own["attn_mask"] = (mask[b] if mask.dim() == 4 and len(mask) > 1 else mask)[..., :q_len, :kv_len]
    return own


def one_by_one(query, key, value, cu_q, cu_k, *_, seqused_k=None, leftpad_k=None, **options):
    """(out, lse) of packed sequences by a call of flash_attention for each."""
    options["return_lse"] = True
    out, lse = query.new_zeros(*query.shape[:2], value.shape[2]), None
    for b in range(len(cu_q) - 1):
        rows, first = slice(int(cu_q[b]), int(cu_q[b + 1])), int(cu_k[b])
        end = int(cu_k[b + 1]) if seqused_k is None else first + int(seqused_k[b])
        keys = slice(first if leftpad_k is None else first + int(leftpad_k[b]), end)
        one = [t[part].transpose(0, 1)[None] for t, part in ((query, rows), (key, keys), (value, keys))]
        found, sums = flash_attention(*one, **of_entry(options, b, one[0].shape[2], one[1].shape[2]))
        lse = sums.new_full((query.shape[1], query.shape[0]), -torch.inf) if lse is None else lse
        out[rows], lse[:, rows] = found[0].transpose(0, 1), sums[0]
    return out, lse


def paged(key, value, page, spare=3):
    """(pages of key, pages of value, block_table) of (B, H, S, D) tensors, in any order, with pages that nobody has."""
    batch, _, kv_len, _ = key.shape
    count = -(-kv_len // page)
    table = torch.randperm(batch * count + spare)[: batch * count].view(batch, count).int()
    found = []
    for tensor in (key, value):
        full = torch.nn.functional.pad(tensor, (0, 0, 0, count * page - kv_len), value=torch.nan)
        pages = torch.full((batch * count + spare, tensor.shape[1], page, tensor.shape[3]), torch.nan).to(tensor.dtype)
        pages[table.long()] = full.unflatten(2, (count, page)).transpose(1, 2)
        found.append(pages)
    return *found, table


def gradients(function, tensors, d_out, d_lse=None):
    """(out, lse, gradients of the tensors) of function(*tensors) -> (out, lse)."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = function(*leaves)
    loss = (out * d_out).sum()
    if d_lse is not None:
        loss = loss + (lse.masked_fill(lse.isinf(), 0) * d_lse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)
