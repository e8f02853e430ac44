"""Training on sequences of mixed lengths: packed, beside padding, and beside equal lengths.

    python bench/packed.py                    causal, forward, and forward and backward
    python bench/packed.py --length 4096 --rows 16384

Each row is a set of lengths. Ours runs on packed rows (flash_attention_varlen), and dense on a batch of equal lengths
with as many rows and as many operations; PyTorch's on the batch that is padded to the longest. They alternate in one
process. The speed beside equal lengths counts visible pairs of a query and a key; its geometric mean is below the
table. Some sequences are compared with PyTorch's before they are timed; the exit status is 1 if one was wrong.
"""

import argparse
import statistics
import sys

import torch
import torch.nn.functional as F

from mps_flash_attn import display, flash_attention, flash_attention_varlen, speed

HEADS, HEAD_DIM = 8, 64
SEED = 1
CHECKED = 8  # sequences of a set that are compared, beside the first, the last and the longest
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def sets(rows, longest):
    """(name, lengths) whose sum is about `rows`."""

    def until_full(draw):
        lengths = []
        while sum(lengths) < rows:
            lengths.append(min(draw(), rows - sum(lengths)))
        return lengths

    def number(low, high):
        return int(torch.randint(low, high + 1, ()))

    def skewed():
        return max(8, int(longest * torch.rand(()) ** 4))

    return [
        ("equal, 512", until_full(lambda: 512)),
        (f"evenly drawn, 1 to {longest}", until_full(lambda: number(1, longest))),
        (f"most of them short, up to {longest}", until_full(skewed)),
        ("half of the rows one sequence, the others 64 each", [rows // 2, *[64] * (rows // 128)]),
        ("short, 16 to 128", until_full(lambda: number(16, 128))),
    ]


def pairs_of(lengths):
    return sum(length * (length + 1) // 2 for length in lengths)


def equal_lengths(lengths):
    """As many rows and pairs in sequences of one length: that of the sequence of a row, in the mean over rows."""
    rows = sum(lengths)
    length = max(1, round(sum(length * length for length in lengths) / rows))
    return [length] * max(1, round(rows / length))


def padded(tensors, lengths):
    """(B, H, longest, E) of packed (total, H, E)."""
    return [torch.nn.utils.rnn.pad_sequence(t.split(lengths), batch_first=True).transpose(1, 2) for t in tensors]


def runs(attend, tensors, is_training):
    out = attend(*tensors)
    return (out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))) if is_training else (out,)


def row(name, lengths, is_training):
    """The cells of a set of lengths, and ours beside equal lengths; None for these if it is wrong."""
    total, longest = sum(lengths), max(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = [torch.randn(total, HEADS, HEAD_DIM).requires_grad_(is_training) for _ in "qkv"]
    of_torch = [t.detach().requires_grad_(is_training) for t in padded(packed, lengths)]
    same = equal_lengths(lengths)
    equal = [torch.randn(len(same), HEADS, same[0], HEAD_DIM).requires_grad_(is_training) for _ in "qkv"]

    def ours(q, k, v):
        return flash_attention_varlen(q, k, v, starts, starts, longest, longest, is_causal=True)

    def dense(q, k, v):
        return flash_attention(q, k, v, is_causal=True)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    found = runs(ours, packed, is_training)
    for n in {0, len(lengths) - 1, lengths.index(longest), *torch.randint(len(lengths), (CHECKED,)).tolist()}:
        here = slice(int(starts[n]), int(starts[n + 1]))
        own = [t[here].detach().transpose(0, 1)[None].requires_grad_(is_training) for t in packed]
        expected = runs(torchs, own, is_training)
        for one, other in zip(found, expected, strict=True):
            if not torch.allclose(one[here].transpose(0, 1)[None], other, **TOLERANCE):
                return None, None

    functions = [lambda: runs(ours, packed, is_training), lambda: runs(dense, equal, is_training)]
    functions.append(lambda: runs(torchs, of_torch, is_training))
    mine, of_equal, theirs = speed.medians(functions, lambda: None)
    share = (pairs_of(lengths) / mine) / (pairs_of(same) / of_equal)
    passes = "forward and backward" if is_training else "forward"
    cells = name, len(lengths), passes, f"{1e3 * mine:.2f}", f"{share:.2f}", f"{theirs / mine:.1f}"
    return cells, share


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="of all sequences together; default %(default)s")
    parser.add_argument("--length", type=int, default=2048, help="the longest that is drawn; default %(default)s")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    table, shares, wrong = [], {False: [], True: []}, 0
    for name, lengths in sets(options.rows, options.length):
        for is_training in (False, True):
            cells, share = row(name, lengths, is_training)
            if cells is None:
                print(f"WRONG: {name}")
                wrong += 1
                continue
            table.append(tuple(map(str, cells)))
            shares[is_training].append(share)
    title = f"causal f32 h{HEADS} d{HEAD_DIM}, {options.rows} rows, {torch.get_num_threads()} threads"
    columns = ("lengths", "sequences", "passes", "ours ms", "speed / equal lengths", "PyTorch padded / ours")
    display.table(title, table, columns)
    for is_training, found in shares.items():
        if found:
            passes = "forward and backward" if is_training else "forward"
            print(f"{passes}: geometric mean {statistics.geometric_mean(found):.2f} of the speed of equal lengths")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
