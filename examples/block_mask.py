"""Block masks: an image whose tiles attend to their neighbours, and documents packed into one sequence."""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from mps_flash_attn import flash_attention

HEADS, HEAD_DIM = 4, 32
torch.manual_seed(1)


def operands(length):
    return [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]


# An image of 64 x 64 places, in tiles of 8 x 8. The places of a tile follow each other, so that a tile is a block, and
# it sees the 3 x 3 tiles around it. The blocks are a bool tensor, and no mask of 4096 x 4096 is made.
TILES, TILE = 8, 64
row, column = torch.arange(TILES * TILES) // TILES, torch.arange(TILES * TILES) % TILES
blocks = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
q, k, v = operands(TILES * TILES * TILE)
out = flash_attention(q, k, v, block_mask=blocks, block_size=TILE)
gradients = torch.autograd.grad(out.square().sum(), (q, k, v))

mask = blocks.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
expected = F.scaled_dot_product_attention(q, k, v, mask)
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
for found, right in zip(gradients, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)
print(f"image: {blocks.float().mean():.0%} of the blocks are computed, {blocks.numel()} bytes say which")

# Documents in one sequence, causal within each: the BlockMask of flex_attention, by which blocks between documents are
# hidden, those within one are full, and mask_mod decides in the others.
lengths = torch.tensor([300, 700, 24, 1024])
document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def causal_in_document(b, h, q, kv):
    return (document[q] == document[kv]) & (q >= kv)


length = int(lengths.sum())
block_mask = create_block_mask(causal_in_document, None, None, length, length, device="cpu", BLOCK_SIZE=64)
q, k, v = operands(length)
out = flash_attention(q, k, v, block_mask=block_mask)
begin = 0
for end in lengths.cumsum(0).tolist():
    alone = flash_attention(*(t[:, :, begin:end] for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out[:, :, begin:end], alone, rtol=1e-4, atol=1e-5)
    begin = end
print(f"documents: {1 - block_mask.sparsity() / 100:.0%} of the blocks are computed; each is as if it were alone")
