"""What a feature costs: ours with it beside ours without it, and beside PyTorch, where that has it.

    python bench/features.py                  ratios of medians
    python bench/features.py --length 4096

The functions of a row alternate in one process. Each result is compared with attention written out before it is timed;
the exit status is 1 if one was wrong.
"""

import argparse
import contextlib
import sys

import torch
import torch.nn.functional as F

from mps_flash_attn import display, dropout_mask, flash_attention, replaced_sdpa, speed
from mps_flash_attn.block_mask import elements

BATCH, HEADS, HEAD_DIM = 1, 8, 64
RATE = 0.1
BLOCK = 64
DENSITY, SPARSE_BLOCK = 0.1, 128
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


def sparse_rows(length):
    """What is left of the time of one head where a tenth of the blocks are visible, drawn at random. Some queries are
    compared with attention written out."""
    count = -(-length // SPARSE_BLOCK)
    blocks = torch.rand(count, count) < DENSITY
    density = blocks.float().mean().item()
    some = torch.randint(length, (64,))
    visible = blocks[some // SPARSE_BLOCK].repeat_interleave(SPARSE_BLOCK, 1)[:, :length]
    bias = torch.where(visible, 0.0, -torch.inf)

    def hidden(*tensors):
        return flash_attention(*tensors, block_mask=blocks, block_size=SPARSE_BLOCK)

    for is_training in (False, True):
        query, *others = (torch.randn(1, 1, length, HEAD_DIM).requires_grad_(is_training) for _ in "qkv")
        found = hidden(query, *others)[:, :, some]
        expected = written_out(query[:, :, some], *others, bias).nan_to_num()  # of queries that see nothing
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
            raise SystemExit("WRONG: block masks of long sequences")
        attends = hidden, flash_attention
        functions = [lambda a=a, t=(query, *others), g=is_training: results(a, t, g) for a in attends]
        mine, plain = speed.medians(functions, lambda: None)
        name = f"{density:.1%} of the blocks of {SPARSE_BLOCK}, {length} keys, one head"
        yield name, "forward and backward" if is_training else "forward", f"{mine / plain:.3f}", ""


def layer_row(length):
    """A step of training of a layer of PyTorch's, with everything that is not attention."""
    width = HEADS * HEAD_DIM
    layers = [torch.nn.TransformerEncoderLayer(width, HEADS, dropout=p, batch_first=True) for p in (RATE, 0.0)]
    x = torch.randn(BATCH, length, width)

    def step(layer, replaces):
        with replaced_sdpa() if replaces else contextlib.nullcontext():
            layer(x).square().mean().backward()

    dropping, plain = layers
    functions = [lambda: step(dropping, True), lambda: step(plain, True), lambda: step(dropping, False)]
    mine, without, torch_s = speed.medians(functions, lambda: None)
    name = f"nn.TransformerEncoderLayer, dropout {RATE}"
    return name, "forward and backward", f"{mine / without:.2f}", f"{torch_s / mine:.2f}"


def results(attend, tensors, is_training):
    out = attend(*tensors)
    return (out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))) if is_training else (out,)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024, help="queries and keys; default %(default)s")
    parser.add_argument("--sparse-length", type=int, default=16384, help="of the sparse rows; default %(default)s")
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
    rows += [layer_row(options.length), *sparse_rows(options.sparse_length)]
    title = f"f32 b{BATCH} h{HEADS} q{options.length} kv{options.length} d{HEAD_DIM}, {torch.get_num_threads()} threads"
    display.table(title, rows, ("feature", "passes", "time / without it", "PyTorch / ours"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
