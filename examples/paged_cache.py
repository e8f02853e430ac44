"""A paged cache: sequences are generated together, and take pages of keys and values only as they grow.

Each layer has one pool of pages. `table` says which pages a sequence has, `lengths` how many keys it has written. Two
sequences begin with the same prompt, whose pages they share. Then all grow by a token a step: its key and value are
written in place, and attention reads the pages where they lie. Every result is compared with attention over the
sequence's own keys, one after another.
"""

import torch

from mps_flash_attn import flash_attention, flash_attention_kvcache

HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES = 8, 2, 32, 16, 24
PROMPTS, STEPS = (32, 32, 5), 40  # the first two are the same


class Cache:
    """The pages of one layer."""

    def __init__(self, sequences, most_pages):
        self.keys, self.values = torch.zeros(2, PAGES, KV_HEADS, PAGE, HEAD_DIM)
        self.free = list(range(PAGES))
        self.table = torch.zeros(sequences, most_pages, dtype=torch.int32)
        self.lengths = torch.zeros(sequences, dtype=torch.int32)

    def append(self, sequence, keys, values):
        """Writes (heads, n, head_dim) keys and values after those that the sequence has."""
        for n in range(keys.shape[1]):
            place = int(self.lengths[sequence])
            if place % PAGE == 0:
                self.table[sequence, place // PAGE] = self.free.pop(0)
            page, row = self.table[sequence, place // PAGE], place % PAGE
            self.keys[page, :, row], self.values[page, :, row] = keys[:, n], values[:, n]
            self.lengths[sequence] += 1

    def share(self, source, sequence):
        """Lets a new sequence begin with the full pages of another."""
        self.table[sequence], self.lengths[sequence] = self.table[source], self.lengths[source]

    def attend(self, queries):
        """Of (sequences, heads, n, head_dim) queries, those of the last n tokens."""
        lengths = {"seqused_k": self.lengths, "block_table": self.table}
        return flash_attention_kvcache(queries, self.keys, self.values, "bottom_right", enable_gqa=True, **lengths)


torch.manual_seed(1)
cache = Cache(len(PROMPTS), most_pages=6)
written = []  # the keys and values of each sequence, one after another, to compare with
for sequence, length in enumerate(PROMPTS):
    if sequence == 1:
        written.append([written[0][0].clone(), written[0][1].clone()])
        cache.share(0, 1)
        continue
    keys, values = torch.randn(2, KV_HEADS, length, HEAD_DIM)
    written.append([keys, values])
    cache.append(sequence, keys, values)

largest = 0.0
for _ in range(STEPS):
    queries = torch.randn(len(PROMPTS), HEADS, 1, HEAD_DIM)
    for sequence, own in enumerate(written):
        new = torch.randn(2, KV_HEADS, 1, HEAD_DIM)
        cache.append(sequence, *new)
        own[0], own[1] = torch.cat([own[0], new[0]], 1), torch.cat([own[1], new[1]], 1)
    out = cache.attend(queries)
    for sequence, (keys, values) in enumerate(written):
        expected = flash_attention(queries[sequence][None], keys[None], values[None], enable_gqa=True)
        torch.testing.assert_close(out[sequence][None], expected, rtol=1e-4, atol=1e-5)
        largest = max(largest, (out[sequence] - expected[0]).abs().max().item())

used = PAGES - len(cache.free)
print(f"{STEPS} steps of sequences that have {cache.lengths.tolist()} keys now")
print(
    f"{used} pages of {PAGE} keys in use, 2 of them shared; a cache of full sequences would take {cache.table.numel()}"
)
print(f"differs from attention over each sequence's own keys by at most {largest:.1e}")
assert torch.equal(cache.table[0, :2], cache.table[1, :2]) and cache.table[0, 2] != cache.table[1, 2]
