"""Attention on NumPy arrays, with its gradients checked by finite differences. PyTorch is not imported."""

import numpy as np

from mps_flash_attn.numpy import attention, attention_backward

random = np.random.default_rng(1)
q, k, v, d_out = (random.standard_normal((2, 8, 256, 64)) for _ in range(4))  # batch, heads, length, head_dim

out, lse = attention(q, k, v, is_causal=True, return_lse=True)
gradients = attention_backward(d_out, q, k, v, out, lse, is_causal=True)

# A projection gives (batch, length, heads, head_dim); its transpose is read where it is, and the result lies likewise.
projected = random.standard_normal((2, 256, 8, 64)).transpose(0, 2, 1, 3)
print("strides in and out:", projected.strides, attention(projected, k, v).strides)

scores = q @ k.swapaxes(2, 3) / 8
scores[..., ~np.tri(256, dtype=bool)] = -np.inf
weights = np.exp(scores - scores.max(-1, keepdims=True))
error = np.abs(out - weights / weights.sum(-1, keepdims=True) @ v).max()
print(f"out differs from softmax(scores) @ v by at most {error:.1e}")
assert error < 1e-12

step = 1e-5
for name, array, gradient in zip(("dQ", "dK", "dV"), (q, k, v), gradients[:3], strict=True):
    direction = random.standard_normal(array.shape)
    losses = []
    for sign in (step, -step):
        moved = {"dQ": q, "dK": k, "dV": v} | {name: array + sign * direction}
        losses.append((attention(*moved.values(), is_causal=True) * d_out).sum())
    slope, expected = (losses[0] - losses[1]) / (2 * step), (gradient * direction).sum()
    print(f"{name} along a random direction: {expected:.6f}, by differences {slope:.6f}")
    assert abs(slope - expected) < 1e-5 * abs(expected) + 1e-6
