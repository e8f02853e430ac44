"""ALiBi: a causal layer whose places are known by a bias of each head alone, and an encoder that sees both sides.

The score of query i and key j gets -slope * |i + S - L - j|, the last query being at the last key, with the slopes of
the paper (Press et al., 2021). The bias is never made: what a model with 4096 places saves is 512 MiB for 8 heads.
"""

import torch
import torch.nn.functional as F

from mps_flash_attn import flash_attention

HEADS, LENGTH, HEAD_DIM = 8, 300, 32
torch.manual_seed(1)
slopes = 2.0 ** -torch.arange(1, HEADS + 1)
q, k, v = (torch.randn(2, HEADS, LENGTH, HEAD_DIM, requires_grad=True) for _ in range(3))

distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
bias = -slopes[:, None, None] * distance
for name, is_causal in (("decoder", True), ("encoder", False)):
    out = flash_attention(q, k, v, is_causal, alibi_slopes=slopes)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) & is_causal
    expected = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(hidden, -torch.inf))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for found, right in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)
    print(f"{name}: as with a bias of {bias.numel() * 4 / 2**20:.1f} MiB, its gradients too")

# One token at a time: the last query is at the last key, however many keys there are.
last = flash_attention(q[:, :, -1:], k, v, alibi_slopes=slopes)
torch.testing.assert_close(last, flash_attention(q, k, v, True, alibi_slopes=slopes)[:, :, -1:], rtol=1e-4, atol=1e-5)
print("decoding: the last token as in the whole sequence")
