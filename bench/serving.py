"""Decode steps and prefill chunks over a cache: dense, in pages, in 8 and 4 bits, of mixed lengths.

    python bench/serving.py                         batches of 1, 8 and 64
    python bench/serving.py --batch 8 --keys 8192 --dtype float16

Ours reads the cache as it lies. Beside it: ours on a dense cache of the same keys; PyTorch's attention on keys that
were gathered from their pages, or dequantised, before the clock starts, with a mask where lengths differ; and ggml's,
where it is installed (requirements/peers.txt), on K and V as f16, q8_0 and q4_0. They alternate in one process. Results
are compared with attention in float64 before they are timed; the exit status is 1 if one was wrong.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

import peers
from mps_flash_attn import dequantize_kv, display, flash_attention_kvcache, quantize_kv, speed
from problems import Operands, Problem

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SEED = 1
TOKENS = 1 << 16  # keys of a batch, unless --keys says how many each entry has
GGML = {"dense": None, "int8": "Q8_0", "int4": "Q4_0"}  # the types of ggml beside ours
CHUNK = 256  # queries of a prefill chunk


@dataclasses.dataclass
class Case:
    name: str
    run: Callable[[], torch.Tensor]
    keys: torch.Tensor  # what the keys and values mean, dense
    values: torch.Tensor
    query: torch.Tensor
    used: torch.Tensor | None = None  # (B,): the keys of each entry
    ggml: str | None = None  # the row of GGML


def paged(tensor, page):
    """(the pages in a random order, the table) of a dense (B, Hkv, N, E)."""
    batch, heads, length, width = tensor.shape
    pages = tensor.view(batch, heads, length // page, page, width).transpose(1, 2).flatten(0, 1)
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(SEED))
    scattered = torch.empty_like(pages)
    scattered[order] = pages
    return scattered, order.view(batch, -1).int()


def cases(batch, keys, dtype):
    """The cases of a batch with so many keys an entry; the first is the dense cache."""
    query = torch.randn(batch, HEADS, 1, HEAD_DIM).to(dtype)
    k, v = (torch.randn(batch, KV_HEADS, keys, HEAD_DIM).to(dtype) for _ in "kv")

    def attend(q, k, v, causal="bottom_right", **options):
        return lambda: flash_attention_kvcache(q, k, v, causal, enable_gqa=True, **options)

    yield Case("dense", attend(query, k, v), k, v, query, ggml="dense")
    for page in (16, 64, 256):
        (k_pages, table), (v_pages, _) = paged(k, page), paged(v, page)
        yield Case(f"pages of {page}", attend(query, k_pages, v_pages, block_table=table), k, v, query)
    for kv_type, group in (("int8", 0), ("e4m3", 0), ("int4", 32), ("nf4", 32)):
        (k_codes, k_scale), (v_codes, v_scale) = (quantize_kv(one, kv_type, group=group) for one in (k, v))
        types = {"k_type": kv_type, "v_type": kv_type}
        run = attend(query, k_codes, v_codes, k_scale=k_scale, v_scale=v_scale, **types)
        wide = [dequantize_kv(*one, kv_type) for one in ((k_codes, k_scale), (v_codes, v_scale))]
        name = f"{kv_type}, a scale {'a row' if not group else f'for {group} columns'}"
        yield Case(name, run, *(one.to(dtype) for one in wide), query, ggml=kv_type if kv_type in GGML else None)
    used = torch.randint(1, keys + 1, (batch,), dtype=torch.int32)
    yield Case("mixed lengths", attend(query, k, v, seqused_k=used), k, v, query, used)
    draft = torch.randn(batch, HEADS, 4, HEAD_DIM).to(dtype)
    yield Case("4 queries", attend(draft, k, v), k, v, draft)
    if batch == 1:
        chunk = torch.randn(batch, HEADS, CHUNK, HEAD_DIM).to(dtype)
        yield Case(f"a chunk of {CHUNK} queries", attend(chunk, k, v), k, v, chunk)
        (k_pages, table), (v_pages, _) = paged(k, 16), paged(v, 16)
        run = attend(chunk, k_pages, v_pages, block_table=table)
        yield Case(f"a chunk of {CHUNK} queries, pages of 16", run, k, v, chunk)


def visible(case):
    """The mask (B, 1, L, N) of what queries see; None for all."""
    queries, keys = case.query.shape[2], case.keys.shape[2]
    ends = torch.full((len(case.query),), keys) if case.used is None else case.used
    if queries == 1 and case.used is None:
        return None
    last = ends[:, None] - queries + torch.arange(queries)
    return (torch.arange(keys) <= last[:, :, None])[:, None]


def is_right(case, found):
    """Compared entry by entry with attention in float64."""
    mask = visible(case)
    for n in range(len(case.query)):
        q, k, v = (one[n].double() for one in (case.query, case.keys, case.values))
        k, v = (one.repeat_interleave(HEADS // KV_HEADS, 0) for one in (k, v))
        exact = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[n])
        if not torch.allclose(found[n].double(), exact, rtol=2e-2, atol=2e-3):
            return False
    return True


def of_ggml(case, dtype):
    """ggml's run; None where it is not installed, or has no such attention."""
    short = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    batch, queries, keys = len(case.query), case.query.shape[2], case.keys.shape[2]
    text = f"forward {short} b{batch} h{HEADS}/{KV_HEADS} q{queries} kv{keys} d{HEAD_DIM}"
    operands = Operands(case.query, case.keys, case.values, None, None, None)
    kind, rest = GGML[case.ggml], (Problem.parse(text), operands, torch.get_num_threads())
    try:
        return peers.GgmlCodes(kind, *rest) if kind else peers.Ggml(*rest)
    except peers.Unsupported:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, action="append", help="default 1, 8 and 64")
    parser.add_argument("--keys", type=int, help=f"of each entry, a multiple of 256; default {TOKENS} by the batch")
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"))
    options = parser.parse_args()
    dtype, wrong = getattr(torch, options.dtype), 0
    for batch in options.batch or (1, 8, 64):
        torch.manual_seed(SEED)
        keys, rows, dense = options.keys or TOKENS // batch, [], None
        for case in cases(batch, keys, dtype):
            dense = dense or case.run
            if not is_right(case, case.run()):
                print(f"WRONG: {case.name}")
                wrong += 1
                continue
            mask = visible(case)

            def of_torch(case=case, mask=mask):
                return F.scaled_dot_product_attention(case.query, case.keys, case.values, mask, enable_gqa=True)

            ggml = of_ggml(case, dtype) if case.ggml else None
            functions = [case.run, dense, of_torch, *([ggml.run] if ggml else [])]
            mine, of_dense, torchs, *others = speed.medians(functions, lambda: None)
            cells = f"{1e3 * mine:.3f}", f"{of_dense / mine:.2f}", f"{torchs / mine:.1f}"
            rows.append((case.name, *cells, f"{others[0] / mine:.1f}" if others else ""))
        title = f"{options.dtype} b{batch} h{HEADS}/{KV_HEADS} kv{keys} d{HEAD_DIM}, {torch.get_num_threads()} threads"
        display.table(title, rows, ("cache", "ours ms", "dense / it", "PyTorch / ours", "ggml / ours"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
