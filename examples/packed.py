"""Packed sequences: a step of training on documents of different lengths, without padding.

The documents lie one after another, and attention keeps each to itself: `cu_seqlens` says where they begin. The step
is compared with one on the padded batch, whose attention has a mask; results and gradients are the same, and the packed
one neither computes nor stores the padding.
"""

import torch
from torch import nn

from mps_flash_attn import flash_attention, flash_attention_varlen
from mps_flash_attn.flash_attn import pad_input, unpad_input

WORDS, WIDTH, HEADS = 100, 64, 4
LENGTHS = (90, 7, 33, 12, 1, 57)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.project_in = nn.Linear(WIDTH, 3 * WIDTH)
        self.project_out = nn.Linear(WIDTH, WORDS)

    def forward(self, words, attend):
        """words: of any shape; `attend` has (..., heads, head_dim) tensors."""
        q, k, v = self.project_in(self.embed(words)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        return self.project_out(attend(q, k, v).flatten(-2))


def padded_loss(model, words, target, mask):
    """The loss of a padded batch (documents, length)."""

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attention(q, k, v, is_causal=True, attn_mask=mask[:, None, None]).transpose(1, 2)

    scores = model(words, attend)
    return nn.functional.cross_entropy(scores[mask], target[mask])


def packed_loss(model, words, target, cu_seqlens, longest):
    """The same of the documents one after another."""

    def attend(q, k, v):
        return flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, is_causal=True)

    return nn.functional.cross_entropy(model(words, attend), target)


torch.manual_seed(1)
model = Model()
mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
words, target = torch.randint(WORDS, (2, *mask.shape))

loss = padded_loss(model, words, target, mask)
expected = torch.autograd.grad(loss, list(model.parameters()))

packed_words, indices, cu_seqlens, longest, _ = unpad_input(words, mask)
packed_target = target[mask]
packed = packed_loss(model, packed_words, packed_target, cu_seqlens, longest)
found = torch.autograd.grad(packed, list(model.parameters()))

print(f"{len(packed_words)} words in place of {words.numel()}, in documents that begin at {cu_seqlens[:-1].tolist()}")
torch.testing.assert_close(packed, loss)
print(f"loss {packed.item():.6f}, differs by {(packed - loss).abs().item():.1e}")
for (name, _), ours, theirs in zip(model.named_parameters(), found, expected, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    print(f"gradient of {name:20} differs by at most {(ours - theirs).abs().max().item():.1e}")

assert torch.equal(pad_input(packed_words[:, None], indices, *mask.shape)[..., 0], words * mask)
