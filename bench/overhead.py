"""The overhead of a call, and the size from which on replace_sdpa() pays.

    python bench/overhead.py                 the layers of a call, on a tiny problem
    python bench/overhead.py --thresholds    ours beside PyTorch's over sizes: where sdpa_thresholds come from

All functions take turns in one process, and the difference of two is the median over their turns: a slower machine
slows both. Times are CPU times of one thread, so that other programs on the machine do not count. The exit status of
the first form is 1 if a difference exceeds its limit.
"""

import argparse
import contextlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from measure import machine, versions
from mps_flash_attn import flash_attention, replaced_sdpa, sdpa_thresholds
from mps_flash_attn.library import BASES, BUFFERS, library
from mps_flash_attn.options import Options
from mps_flash_attn.problem import Inputs
from problems import DTYPES

FLASH_LIMIT, REPLACED_LIMIT = 4.5, 8.0  # microseconds over the library's call
PROBLEM = "forward f32 b1 h1 q16 kv16 d64"
CALL, SDPA, REPLACED = "the library's call", "PyTorch's SDPA", "SDPA replaced"
TURN_SECONDS = 0.002
LENGTHS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
HEADS = (1, 4)
HEAD_DIM = 64


# --- Taking turns --------------------------------------------------------------------------------


def turn(function, repeats):
    """Microseconds a call."""
    begin = time.process_time()
    for _ in range(repeats):
        function()
    return 1e6 * (time.process_time() - begin) / repeats


def alternate(functions, rounds):
    """{name: microseconds of each round}, for {name: (function, the context to call it in)}."""
    repeats, taken = {}, {name: [] for name in functions}
    for name, (function, context) in functions.items():
        with context():
            turn(function, 3)
            repeats[name] = max(1, round(1e6 * TURN_SECONDS / turn(function, 10)))
    for _ in range(rounds):
        for name, (function, context) in functions.items():
            with context():
                taken[name].append(turn(function, repeats[name]))
    return taken


def difference(taken, one, other):
    return statistics.median(a - b for a, b in zip(taken[one], taken[other], strict=True))


@contextlib.contextmanager
def replaced(threshold=0):
    """replace_sdpa() with the threshold, in multiply-adds, from which on it replaces calls."""
    before = dict(sdpa_thresholds)
    sdpa_thresholds.update(dict.fromkeys(before, threshold))
    with replaced_sdpa():
        yield
    sdpa_thresholds.update(before)


# --- The layers of a call ------------------------------------------------------------------------


def call_of_library(query, key, value):
    """The C function with everything packed beforehand."""
    found, out = library(), torch.empty_like(query)
    problem = found.parse(PROBLEM)
    q, k, v, o = (tensor.data_ptr() for tensor in (query, key, value, out))
    buffers = BASES.pack(BUFFERS.size, q, k, v, 0, o, *(0,) * 13)

    def call(_written=out):
        found.check(found.mfa_attention(found.context, problem, buffers, None))

    return call


def layers(query, key, value):
    trained = [tensor.clone().requires_grad_() for tensor in (query, key, value)]

    def sdpa():
        return F.scaled_dot_product_attention(query, key, value)

    def train(attention):
        out = attention(*trained)
        torch.autograd.grad(out, trained, out)

    plain = contextlib.nullcontext
    return {
        CALL: (call_of_library(query, key, value), plain),
        "flash_attention": (lambda: flash_attention(query, key, value), plain),
        SDPA: (sdpa, plain),
        REPLACED: (sdpa, replaced),
        "SDPA replaced, too small, handed on": (sdpa, lambda: replaced(float("inf"))),
        "its operator": (
            lambda: torch.ops.mfa.attention_forward(*Inputs(query, key, value), *Options()),
            plain,
        ),
        "forward and backward: flash_attention": (lambda: train(flash_attention), plain),
        "forward and backward: PyTorch's SDPA": (lambda: train(F.scaled_dot_product_attention), plain),
        "forward and backward: SDPA replaced": (lambda: train(F.scaled_dot_product_attention), replaced),
    }


def show_layers(console, rounds):
    taken = alternate(layers(*(torch.randn(1, 1, 16, 64) for _ in range(3))), rounds)
    table = Table("", "us", f"over {CALL}", f"over {SDPA}", title=f"{PROBLEM}, medians of {rounds} rounds")
    for name, times in taken.items():
        over = [f"{difference(taken, name, other):+.1f}" for other in (CALL, SDPA)]
        table.add_row(name, f"{statistics.median(times):.1f}", *("" if ":" in name else text for text in over))
    console.print(table)
    flash, ours = difference(taken, "flash_attention", CALL), difference(taken, REPLACED, CALL)
    console.print(f"flash_attention adds {flash:.1f} us (limit {FLASH_LIMIT})")
    console.print(f"the replaced SDPA adds {ours:.1f} us (limit {REPLACED_LIMIT}), PyTorch's dispatch in it")
    return 0 if flash <= FLASH_LIMIT and ours <= REPLACED_LIMIT else 1


# --- Thresholds ----------------------------------------------------------------------------------


def sizes():
    """Shapes in the order of their work, and that work."""
    shapes = [(1, heads, length, HEAD_DIM) for heads in HEADS for length in LENGTHS]
    shapes += [(1, 8, 1, HEAD_DIM)]
    return sorted(
        ((heads * rows * rows * 2 * columns, (1, heads, rows, columns)) for _, heads, rows, columns in shapes)
    )


def show_thresholds(console, rounds):
    for name, dtype in DTYPES.items():
        table = Table("shape", "work", "forward: ours", "torch", "ratio", "with backward: ours", "torch", "ratio")
        table.title = f"{name}, microseconds; ratio above 1: ours is faster"
        paying = None
        for work, shape in sizes():
            tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
            trained = [tensor.clone().requires_grad_() for tensor in tensors]

            def forward(tensors=tensors):
                return F.scaled_dot_product_attention(*tensors)

            def both(tensors=trained):
                out = F.scaled_dot_product_attention(*tensors)
                torch.autograd.grad(out, tensors, out)

            cells, ratios = [], []
            for function in (forward, both):
                functions = {REPLACED: (function, replaced), SDPA: (function, contextlib.nullcontext)}
                ours, theirs = (statistics.median(times) for times in alternate(functions, rounds).values())
                ratios.append(theirs / ours)
                cells += [f"{ours:.1f}", f"{theirs:.1f}", f"{ratios[-1]:.2f}"]
            paying = (paying or work) if min(ratios) >= 1 else None
            table.add_row("x".join(map(str, shape)), str(work), *cells)
        console.print(table)
        found = 1 << (paying - 1).bit_length() if paying else "no size"
        console.print(f"{name}: ours is faster from {found} on; sdpa_thresholds has {sdpa_thresholds[dtype]}\n")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thresholds", action="store_true", help="measure the sizes from which on replacing pays")
    parser.add_argument("--rounds", type=int, help="how often each has its turn; default 200, or 40 for thresholds")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    console.print(f"{machine()}; {versions()}")
    show = show_thresholds if options.thresholds else show_layers
    return show(console, options.rounds or (40 if options.thresholds else 200))


if __name__ == "__main__":
    sys.exit(main())
