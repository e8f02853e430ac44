"""A quantised cache: keys and values become codes of 8 or 4 bits in pages, as they are appended, and are decoded as
attention reads them.

Three sequences of different length grow by a token a step, once for each type of codes. The results are compared with
attention over the same keys and values, not quantised. One column of the keys is much larger than the others, as it is
in many models: with a scale for each 32 columns, and not for all 64, only those beside it lose precision.
"""

import torch

from mps_flash_attn import append_kv, flash_attention, flash_attention_kvcache

HEADS, KV_HEADS, HEAD_DIM, PAGE = 8, 2, 64, 16
PROMPTS, STEPS = (70, 33, 5), 30
PAGES = sum(-(-(length + STEPS) // PAGE) for length in PROMPTS)
# The type of codes, the columns that share a scale, and what the root mean square error must be below.
CASES = ("int8", 64, 0.03), ("int8", 32, 0.02), ("e4m3", 64, 0.05), ("int4", 32, 0.3), ("nf4", 32, 0.25)
DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}  # 4-bit codes are bytes, with two numbers in each


class Cache:
    """The pages of one layer, of codes of one type, with a scale for each group of columns of a row."""

    def __init__(self, kv_type, group):
        columns = HEAD_DIM if kv_type in DTYPES else HEAD_DIM // 2
        shape = (PAGES, KV_HEADS, PAGE)
        self.keys, self.values = (
            torch.zeros(*shape, columns, dtype=DTYPES.get(kv_type, torch.uint8)) for _ in range(2)
        )
        # What append_kv() and flash_attention_kvcache() need to know beside these. Each sequence gets all of its pages
        # at once here; paged_cache.py takes them as they are needed.
        self.layout = {
            "k_scale": torch.zeros(*shape, HEAD_DIM // group),
            "v_scale": torch.zeros(*shape, HEAD_DIM // group),
        }
        self.layout |= {"k_type": kv_type, "v_type": kv_type}
        self.layout["block_table"] = torch.zeros(len(PROMPTS), PAGES, dtype=torch.int32)
        self.lengths = torch.zeros(len(PROMPTS), dtype=torch.int32)
        first = 0
        for sequence, length in enumerate(PROMPTS):
            count = -(-(length + STEPS) // PAGE)
            self.layout["block_table"][sequence, :count] = torch.arange(first, first + count)
            first += count

    def append(self, keys, values, sequences=slice(None)):
        """Writes (sequences, heads, n, head_dim) keys and values after those that these sequences have."""
        own = self.layout | {"block_table": self.layout["block_table"][sequences]}
        self.lengths[sequences] = append_kv(self.keys, self.values, keys, values, self.lengths[sequences], **own)

    def attend(self, queries):
        """Of (sequences, heads, 1, head_dim) queries, those of the last token."""
        lengths = {"seqused_k": self.lengths, "enable_gqa": True}
        return flash_attention_kvcache(queries, self.keys, self.values, "bottom_right", **lengths, **self.layout)

    def bytes(self):
        tensors = self.keys, self.values, self.layout["k_scale"], self.layout["v_scale"]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def new_rows(batch, length):
    """Keys and values; a model would compute them."""
    keys, values = torch.randn(2, batch, KV_HEADS, length, HEAD_DIM)
    keys[..., 3] *= 10
    return keys, values


in_f16 = 2 * PAGES * KV_HEADS * PAGE * HEAD_DIM * 2
for kv_type, group, bound in CASES:
    torch.manual_seed(1)
    cache, written = Cache(kv_type, group), []
    for sequence, length in enumerate(PROMPTS):
        written.append(new_rows(1, length))
        cache.append(*written[-1], slice(sequence, sequence + 1))
    wrong = size = 0.0
    for _ in range(STEPS):
        keys, values = new_rows(len(PROMPTS), 1)
        cache.append(keys, values)
        queries = torch.randn(len(PROMPTS), HEADS, 1, HEAD_DIM)
        queries[..., 3] /= 10
        out = cache.attend(queries)
        for sequence, own in enumerate(written):
            rows = keys[sequence : sequence + 1], values[sequence : sequence + 1]
            written[sequence] = own = [torch.cat(pair, 2) for pair in zip(own, rows, strict=True)]
            expected = flash_attention(queries[sequence : sequence + 1], *own, enable_gqa=True)
            wrong += (out[sequence] - expected[0]).pow(2).sum().item()
            size += expected.pow(2).sum().item()
    error = (wrong / size) ** 0.5
    print(
        f"{kv_type}, a scale for {group} columns: {cache.bytes() / in_f16:.2f} of the bytes in float16, "
        f"root mean square error {error:.3f}"
    )
    assert error < bound and cache.lengths.tolist() == [length + STEPS for length in PROMPTS]
