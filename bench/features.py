"""What a feature costs: ours with it beside ours without it, and beside PyTorch, where that has it.

    python bench/features.py                  ratios of medians
    python bench/features.py --length 4096

The functions of a row alternate in one process. Each result is compared with attention written out before it is timed;
the exit status is 1 if one was wrong.
"""

import argparse
import sys

import torch
import torch.nn.functional as F

from mps_flash_attn import display, dropout_mask, flash_attention, speed
from mps_flash_attn.block_mask import elements

BATCH, HEADS, HEAD_DIM = 1, 8, 64
RATE = 0.1
BLOCK = 64
SEED = 1


def written_out(query, key, value, bias=0.0, sinks=None, kept=1.0):
    """Attention with all scores, as models have it where PyTorch's operator lacks a feature."""
    scores = query @ key.mT * HEAD_DIM**-0.5 + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[2]] * kept @ value


def features(length):
    """(name, ours, PyTorch's, the exact one), functions of query, key and value."""
    place = torch.arange(length)
    slopes, sinks = 2.0 ** -torch.arange(1, HEADS + 1), torch.randn(HEADS)
    bias = -slopes[:, None, None] * (place[:, None] - place).abs()
    kept = dropout_mask((BATCH, HEADS, length, length), RATE, SEED) / (1 - RATE)

    distance = torch.arange(-(-length // BLOCK))[:, None] - torch.arange(-(-length // BLOCK))
    blocks = (distance % 2 == 0) | (distance == 1)
    mask = elements(blocks, (BLOCK, BLOCK), (length, length))

    def dropped(*tensors):
        return flash_attention(*tensors, dropout_p=RATE, dropout_seed=SEED)

    return [
        (
            f"dropout {RATE}",
            dropped,
            lambda *t: F.scaled_dot_product_attention(*t, dropout_p=RATE),
            lambda *t: written_out(*t, kept=kept),
        ),
        (
            "ALiBi, beside a bias made before",
            lambda *t: flash_attention(*t, alibi_slopes=slopes),
            lambda *t: F.scaled_dot_product_attention(*t, bias),
            lambda *t: written_out(*t, bias),
        ),
        (
            "half of the blocks, beside a bool mask",
            lambda *t: flash_attention(*t, block_mask=blocks, block_size=BLOCK),
            lambda *t: F.scaled_dot_product_attention(*t, mask),
            lambda *t: written_out(*t, torch.where(mask, 0.0, -torch.inf)),
        ),
        (
            "sinks, beside attention written out",
            lambda *t: flash_attention(*t, sinks=sinks),
            lambda *t: written_out(*t, sinks=sinks),
            lambda *t: written_out(*t, sinks=sinks),
        ),
    ]


def results(attend, tensors, is_training):
    out = attend(*tensors)
    return (out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))) if is_training else (out,)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024, help="queries and keys; default %(default)s")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    rows, wrong = [], 0
    for name, ours, theirs, exact in features(options.length):
        for is_training in (False, True):
            tensors = [torch.randn(BATCH, HEADS, options.length, HEAD_DIM).requires_grad_(is_training) for _ in "qkv"]
            pairs = zip(results(ours, tensors, is_training), results(exact, tensors, is_training), strict=True)
            if not all(torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in pairs):
                print(f"WRONG: {name}")
                wrong += 1
                continue
            attends = ours, flash_attention, theirs
            functions = [lambda a=a, t=tensors, g=is_training: results(a, t, g) for a in attends]
            mine, plain, torch_s = speed.medians(functions, lambda: None)
            passes = "forward and backward" if is_training else "forward"
            rows.append((name, passes, f"{mine / plain:.2f}", f"{torch_s / mine:.2f}"))
    title = f"f32 b{BATCH} h{HEADS} q{options.length} kv{options.length} d{HEAD_DIM}, {torch.get_num_threads()} threads"
    display.table(title, rows, ("feature", "passes", "time / without it", "PyTorch / ours"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
