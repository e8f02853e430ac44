"""Attention and its gradients by flash_attention, compared with PyTorch's scaled_dot_product_attention."""

import torch
import torch.nn.functional as F

from mps_flash_attn import explain, flash_attention

torch.manual_seed(1)
q, k, v = (torch.randn(2, 8, 512, 64, requires_grad=True) for _ in range(3))  # batch, heads, length, head_dim
d_out = torch.randn(2, 8, 512, 64)

ours = flash_attention(q, k, v, is_causal=True)
our_gradients = torch.autograd.grad(ours, (q, k, v), d_out)

theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
their_gradients = torch.autograd.grad(theirs, (q, k, v), d_out)

print("kernel:", explain(q, k, v, is_causal=True))
for name, a, b in zip(("out", "dQ", "dK", "dV"), (ours, *our_gradients), (theirs, *their_gradients), strict=True):
    print(f"{name:4} differs by at most {(a - b).abs().max().item():.1e}")
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
