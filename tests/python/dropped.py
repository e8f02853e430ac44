"""Calls with dropout, shared by the test files of it. With the identity as V the result is P after dropout, so that it
shows the mask of a seed that was drawn."""

import torch

from mps_flash_attn import flash_attention


def problem(q_len=19, kv_len=37, heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype=torch.float32):
    shapes = (2, heads, q_len, head_dim), (2, kv_heads, kv_len, head_dim), (2, kv_heads, kv_len, value_dim)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def weights_of(attend, batch=2, heads=2, q_len=33, kv_len=37, **options):
    """P after dropout, times the number of keys, of a call without differences between keys: 0 or 1 / (1 - p)."""
    zeros = torch.zeros(batch, heads, q_len, 8), torch.zeros(batch, heads, kv_len, 8)
    return kv_len * attend(*zeros, torch.eye(kv_len).expand(batch, heads, -1, -1), **options)


def gradients(function, *tensors):
    """out and the gradients of all tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def attend(query, key, value, dropout_seed=5, dropout_p=0.3):
    return flash_attention(
        query, key, value, "bottom_right", enable_gqa=True, dropout_p=dropout_p, dropout_seed=dropout_seed
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
