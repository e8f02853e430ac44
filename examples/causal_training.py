"""Trains a tiny transformer, whose code has nothing of libmfa, after one call of replace_sdpa().

The task: every sequence repeats a random pattern, so that the second half can be predicted from the first.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mps_flash_attn import replace_sdpa, sdpa_stats

WORDS, LENGTH, WIDTH, HEADS, STEPS = 16, 64, 64, 2, 120


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        return self.head(self.blocks(self.words(tokens) + self.positions.weight[: tokens.shape[1]]))


replace_sdpa()
torch.manual_seed(1)
model = Transformer()
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in range(STEPS):
    tokens = torch.randint(WORDS, (16, LENGTH // 2)).repeat(1, 2)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
    if step % 30 == 0 or step == STEPS - 1:
        print(f"step {step:3}  loss {losses[-1]:.3f}")

print("attention calls:", sdpa_stats())
assert losses[-1] < 0.7 * losses[0]  # log(16) = 2.8 would be guessing
assert sdpa_stats() == {"replaced": 2 * STEPS}
