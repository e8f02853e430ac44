"""Trains score_mods of flex_attention on the CPU, where PyTorch's flex_attention has no gradients.

A layer with a softcap and a learned bias for each distance, over documents in one sequence; ALiBi, for which no tensor
of scores is made; and code that calls PyTorch's function, unchanged, after replace_flex_attention().
"""

import torch
from torch.nn.attention import flex_attention as flex

from mps_flash_attn import Unsupported, flash_attention, flex_attention, replace_flex_attention

torch.manual_seed(1)
B, H, HKV, L, E = 2, 4, 2, 200, 32
query = torch.randn(B, H, L, E, requires_grad=True)
key, value = (torch.randn(B, HKV, L, E, requires_grad=True) for _ in range(2))

# A softcap, then a learned bias of distance and head, within documents.
document = torch.arange(L) // 80
distances = torch.nn.Parameter(torch.zeros(H, 2 * L))


def relative(score, b, h, q, kv):
    return 30 * torch.tanh(score / 30) + distances[h, q - kv + L]


def same_document(b, h, q, kv):
    return (document[q] == document[kv]) & (q >= kv)


blocks = flex.create_block_mask(same_document, None, None, L, L, device="cpu", BLOCK_SIZE=16)
optimiser = torch.optim.SGD([distances], lr=5.0)
losses = []
for _ in range(10):
    out = flex_attention(query.detach(), key.detach(), value.detach(), relative, blocks, enable_gqa=True)
    loss = (out - value.detach().repeat_interleave(H // HKV, 1).roll(1, 2)).square().mean()  # attend to the key before
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
nearest = distances.detach()[:, L : L + 3].mean(0)
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; the bias of the distances 0, 1 and 2 is {nearest.tolist()}")
assert losses[-1] < losses[0] and nearest.argmax() == 1

# ALiBi under a causal mask: both are recognised, so that neither biases nor a mask are made.
slopes = torch.tensor([2.0 ** -(8 * (h + 1) / H) for h in range(H)])


def alibi(score, b, h, q, kv):
    return score + slopes[h] * (kv - q)


def causal(b, h, q, kv):
    return q >= kv


blocks = flex.create_block_mask(causal, None, None, L, L, device="cpu")
out = flex_attention(query, key, value, alibi, blocks, enable_gqa=True)
expected = flash_attention(query, key, value, is_causal=True, alibi_slopes=slopes, enable_gqa=True)
torch.testing.assert_close(out, expected)

# Code that calls PyTorch's function gets gradients on the CPU.
try:
    flex.flex_attention(query, key, value, alibi, blocks, enable_gqa=True)
except NotImplementedError as error:
    print("PyTorch:", error)
with replace_flex_attention():
    out = flex.flex_attention(query, key, value, alibi, blocks, enable_gqa=True)
(gradient,) = torch.autograd.grad(out.square().sum(), query)
print(f"after replace_flex_attention(): a gradient of the norm {gradient.norm():.3f}")

# What is not of these forms is refused, and never approximated.
try:
    flex_attention(query, key, value, lambda score, b, h, q, kv: score * slopes[h], enable_gqa=True)
except Unsupported as error:
    print(error)
else:
    raise AssertionError
