"""Trains an encoder of torch.nn with dropout, whose attention replace_sdpa() runs, and compares one call with attention
written out, by the mask of its seed.

The task: to say at each place of a sequence which word it begins with.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mps_flash_attn import dropout_mask, flash_attention, replace_sdpa, sdpa_stats

WORDS, LENGTH, WIDTH, HEADS, STEPS = 8, 32, 64, 4, 100

# One call: dropout_mask() is what a seed keeps.
torch.manual_seed(1)
q, k, v = (torch.randn(2, HEADS, LENGTH, 16) for _ in range(3))
out = flash_attention(q, k, v, dropout_p=0.2, dropout_seed=7)
kept = dropout_mask((2, HEADS, LENGTH, LENGTH), 0.2, 7)
weights = torch.softmax(q @ k.mT / 4, -1) * kept / 0.8
print(f"dropped {1 - kept.float().mean():.3f} of the weights; difference {(out - weights @ v).abs().max():.1e}")
torch.testing.assert_close(out, weights @ v, rtol=1e-4, atol=1e-5)

# A model: nothing of libmfa is in its code.
replace_sdpa()
words, head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
places = nn.Parameter(torch.randn(LENGTH, WIDTH))
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.1, batch_first=True), 2)
model = nn.ModuleList([words, head, encoder]).append(nn.ParameterList([places]))
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in range(STEPS):
    batch = torch.randint(WORDS, (16, LENGTH))
    found = head(encoder(words(batch) + places))
    loss = F.cross_entropy(found.flatten(0, 1), batch[:, :1].expand(-1, LENGTH).flatten())
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
    if step % 25 == 0 or step == STEPS - 1:
        print(f"step {step:3}  loss {losses[-1]:.3f}")

print("attention calls:", sdpa_stats())
assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
assert sdpa_stats() == {"replaced": 2 * STEPS}
