"""Nested tensors: a batch of documents of different lengths without padding, trained after replace_sdpa().

PyTorch's jagged layout keeps the documents one after another. Its own attention for them on a CPU holds all scores and
refuses a causal mask; after replace_sdpa() scaled_dot_product_attention reads the rows where they lie.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mps_flash_attn import replaced_sdpa, sdpa_stats

WORDS, WIDTH, HEADS = 50, 64, 4
LENGTHS = (40, 7, 23, 1, 31)


class Model(nn.Module):
    """The next word of each, by one layer of causal attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.project_in = nn.Linear(WIDTH, 3 * WIDTH)
        self.project_out = nn.Linear(WIDTH, WORDS)

    def forward(self, words):
        """words: a tensor (1, length), or a nested one."""
        x = self.embed(words)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.project_in(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project_out(x + out.transpose(1, 2).flatten(-2))


torch.manual_seed(1)
model = Model()
documents = [torch.randint(WORDS, (length,)) for length in LENGTHS]
batch = torch.nested.nested_tensor(documents, layout=torch.jagged)

with replaced_sdpa():
    found = model(batch)
    print(f"{batch.values().numel()} words in {batch.shape[0]} documents; attention calls: {sdpa_stats()}")
    assert set(sdpa_stats()) == {"replaced"}
    for document, logits in zip(documents, found.unbind(), strict=True):
        torch.testing.assert_close(logits, model(document[None])[0], rtol=1e-4, atol=1e-5)

    optimiser, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    following = torch.cat([F.pad(document[1:], (0, 1), value=-100) for document in documents])
    for _ in range(15):
        losses.append(F.cross_entropy(model(batch).values(), following))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()

print(f"loss {losses[0].item():.3f} -> {losses[-1].item():.3f}")
assert losses[-1] < 0.5 * losses[0]
