"""Prefill over keys and values in int8: with products of int8 (fast="int8") beside the same call without them.

    python bench/int8.py                     one thread and all
    python bench/int8.py --length 8192

The two calls of a row, and one on dense keys and values in bf16, alternate in one process. Before they are timed the
results are compared with each other; the exit status is 1 if they are farther apart than 3 % in relative L2.
"""

import argparse
import sys

import torch

from mps_flash_attn import display, explain, flash_attention_kvcache, quantize_kv, speed

BATCH, HEADS = 1, 2
SEED = 1
BOUND = 0.03


def row(dtype, columns, is_causal, length):
    """The cells of a row but for the threads; None if the results differ too much."""
    band = "bottom_right" if is_causal else False
    query, key, value = (torch.randn(BATCH, HEADS, length, columns) for _ in "qkv")
    dense = *(one.bfloat16() for one in (query, key, value)), band
    (key, k_scale), (value, v_scale) = (quantize_kv(one, "int8") for one in (key, value))
    arguments = query.to(dtype), key, value, band
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    functions = [lambda fast=fast: flash_attention_kvcache(*arguments, fast=fast, **scales) for fast in ("int8", None)]
    functions.append(lambda: flash_attention_kvcache(*dense))
    fast, plain, _ = (function().double() for function in functions)
    error = ((fast - plain).norm() / plain.norm()).item()
    if error > BOUND:
        return None
    mine, without, bf16 = speed.medians(functions, lambda: None)
    flop = 4 * BATCH * HEADS * columns * length * (length + 1 if is_causal else 2 * length) / 2
    name = f"{str(dtype).removeprefix('torch.')} q{length} kv{length} d{columns}{' causal' if is_causal else ''}"
    kernel = explain(*arguments, fast="int8", **scales).kernel.split("_d")[0]
    speeds = (f"{flop / seconds * 1e-9:.0f}" for seconds in (without, bf16, mine))
    return name, *speeds, f"{without / mine:.2f}, {bf16 / mine:.2f}", f"{error:.4f}", kernel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="queries and keys; default %(default)s")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    most, table, wrong = torch.get_num_threads(), [], 0
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        for dtype in (torch.bfloat16, torch.float16):
            for columns in (64, 128):
                for is_causal in (False, True):
                    cells = row(dtype, columns, is_causal, options.length)
                    if cells is None:
                        print(f"WRONG: {dtype} d{columns}")
                        wrong += 1
                        continue
                    table.append((str(threads), *cells))
    torch.set_num_threads(most)
    columns = ("threads", "problem", "GFLOP/s without", "bf16", "with", "times both", "relative L2 error", "kernel")
    display.table(f"b{BATCH} h{HEADS}, keys and values in int8", table, columns)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
