"""Masks and grouped queries: bool and additive masks, the gradient of a bias, a sliding window, fewer KV heads.

Each result is compared with scaled_dot_product_attention, given a mask of the same meaning.
"""

import torch
import torch.nn.functional as F

from mps_flash_attn import flash_attention

BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM = 2, 8, 2, 200, 32
torch.manual_seed(1)
q = torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM)
k, v = (torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM) for _ in range(2))


def compare(name, ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    print(f"{name:42} differs by at most {(ours - theirs).abs().max().item():.1e}")


# A bool mask: True takes part. Here it hides the padding of each batch entry.
lengths = torch.tensor([150, 200])
padding = (torch.arange(LENGTH) < lengths[:, None])[:, None, None, :]  # (batch, 1, 1, keys) broadcasts
masked = flash_attention(q, k, v, attn_mask=padding)
compare("a bool mask", masked, F.scaled_dot_product_attention(q, k, v, attn_mask=padding))

# It combines with is_causal, which PyTorch's function does not allow.
causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
both = F.scaled_dot_product_attention(q, k, v, attn_mask=padding & causal)
compare("a bool mask and is_causal", flash_attention(q, k, v, is_causal=True, attn_mask=padding), both)

# A float mask is added to the scores, and gets a gradient: here one bias for each head, shared by the batch.
bias = torch.randn(1, HEADS, LENGTH, LENGTH, requires_grad=True)
(ours,) = torch.autograd.grad(flash_attention(q, k, v, attn_mask=bias).square().sum(), bias)
(theirs,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).square().sum(), bias)
compare("the gradient of a bias", ours, theirs)

# A window: each query sees the last 64 keys, its own included. No mask is made.
window = causal & ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-64)
windowed = flash_attention(q, k, v, window_size=64)
compare("a sliding window", windowed, F.scaled_dot_product_attention(q, k, v, attn_mask=window))

# Grouped queries: K and V have fewer heads, which are read in place and not repeated.
k2, v2 = k[:, :KV_HEADS], v[:, :KV_HEADS]
grouped = flash_attention(q, k2, v2, enable_gqa=True)
repeated = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k2, v2))
compare("grouped queries", grouped, F.scaled_dot_product_attention(q, *repeated))

# A query that may see no key gets zeros, never NaN.
nothing = padding.clone()
nothing[0] = False
assert flash_attention(q, k, v, attn_mask=nothing)[0].eq(0).all()
print("a query without visible keys gets zeros")
