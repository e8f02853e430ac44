"""Attention over a sequence that is divided over processes, beside one process and beside PyTorch's context_parallel.

    torchrun --nproc-per-node 2 bench/context_parallel.py                                on GPUs, by NCCL
    torchrun --nproc-per-node 2 bench/context_parallel.py --device cpu --lengths 2048    on the CPU, by gloo

Causal, as in training, with rows in zigzag. Contenders are timed in turn in one run; a time is that of the slowest
process, the median over rounds. "one" is the whole sequence in one process with the same kernel while the others wait.
Before, results and gradients are compared with a reference in double, over layouts, bands, documents, grouped heads and
sinks; the exit status is 1 if one was wrong, and then nothing is timed. With fewer GPUs than processes these share
them, their messages go through gloo and the host's memory, and nothing is timed either.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import os
import pathlib
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from mps_flash_attn import flash_attention
from mps_flash_attn.distributed import Layout, context_parallel_attention

METHODS = ("ring", "all_to_all")
PASSES = ("forward", "forward+backward")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative to the largest number
CHECKED = 777  # rows
BANDS = {  # arguments: (lower, upper, where documents begin) of the reference
    "causal": ({"is_causal": True}, None, 0, ()),
    "full": ({}, None, None, ()),
    "a causal window": ({"window_size": 100}, -99, 0, ()),
    "a window": ({"window_size": (64, 32)}, -64, 32, ()),
    "documents": ({"is_causal": True, "documents": (100, 357)}, None, 0, (100, 357)),
    "sinks": ({"is_causal": True}, None, 0, ()),
}
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Contender:
    """A way to compute attention; run() gives the outputs whose gradients are wanted, or None on a rank without any."""

    def __init__(self, name, inputs, attend):
        self.name, self.inputs, self.attend = name, inputs, attend

    def run(self, backward):
        if self.inputs is None:
            return None
        for one in self.inputs[:3]:
            one.grad = None
        with contextlib.nullcontext() if backward else torch.no_grad():
            out = self.attend(*self.inputs[:3])
            if backward:
                out.backward(self.inputs[3])
        return out


def make(length, options, device):
    """The whole of query, key, value and the gradient of out, the same on all ranks."""
    generator = torch.Generator(device).manual_seed(options.seed)
    heads = options.heads, options.kv_heads or options.heads
    shapes = [(1, count, length, options.head_dim) for count in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape, generator=generator, device=device, dtype=options.torch_dtype) for shape in shapes]


def leaves(tensors):
    return [one.detach().clone().requires_grad_() for one in tensors[:3]] + [tensors[3].clone()]


def sdpa(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])


def contenders(length, options, device):
    whole = make(length, options, device)
    gqa = options.heads != (options.kv_heads or options.heads)
    layout = Layout.zigzag(length)
    one = sdpa if device.type == "cuda" else functools.partial(flash_attention, is_causal=True, enable_gqa=gqa)
    made = [Contender("one", leaves(whole) if dist.get_rank() == 0 else None, one)]
    shard = leaves([layout.shard(one, 2) for one in whole])
    for method in METHODS:
        attend = functools.partial(
            context_parallel_attention,
            layout=layout,
            is_causal=True,
            enable_gqa=gqa,
            method=method,
            check=options.check,
        )
        made.append(Contender(method, shard, attend))
    if device.type == "cuda":
        made += [of_torch(rotation, whole, device) for rotation in ("allgather", "alltoall")]
    return made


def of_torch(rotation, whole, device):
    """PyTorch's own ring, which divides rows in zigzag too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shards = leaves(whole)
    buffers = [one.detach() for one in shards]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * len(buffers)):
        shards = leaves(buffers)
    contender = Contender(f"torch {rotation}", shards, sdpa)
    run, unused = contender.run, torch.zeros(2 * dist.get_world_size(), device=device)  # it needs a buffer

    def run_within(backward):
        set_rotate_method(rotation)
        with context_parallel(mesh, buffers=[unused], buffer_seq_dims=[0]):  # backward has to be within it, too
            return run(backward)

    contender.run = run_within
    return contender


# --- Results -------------------------------------------------------------------------------------


def reference(query, key, value, sinks, lower, upper, cuts):
    """In double, with the scores in memory."""
    length, device = query.shape[2], query.device
    place = torch.arange(length, device=device)
    offset, document = place - place[:, None], torch.bucketize(place, torch.tensor(cuts, device=device), right=True)
    seen = document[:, None] == document
    seen = seen if lower is None else seen & (offset >= lower)
    seen = seen if upper is None else seen & (offset <= upper)
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    scores = (query @ key.mT * query.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], 3).softmax(3)[..., :-1] @ value
    return scores.softmax(3) @ value


def layouts():
    shorter = [100] * (dist.get_world_size() - 1)
    return {
        "contiguous": Layout.contiguous(CHECKED),
        "zigzag": Layout.zigzag(CHECKED),
        "uneven": Layout.of_lengths([CHECKED - sum(shorter), *shorter]),
    }


def errors_of(band, kv_heads, options, device):
    """{(layout, method): the largest error of the result and its gradients, relative to their largest numbers}"""
    arguments, *of_reference = BANDS[band]
    generator = torch.Generator(device).manual_seed(options.seed)
    shapes = [(2, heads, CHECKED, 64) for heads in (4, kv_heads, kv_heads, 4)]
    drawn = [torch.randn(one, generator=generator, device=device).to(options.torch_dtype) for one in shapes]
    given = [*drawn[:3], torch.randn(4, generator=generator, device=device) if band == "sinks" else None]
    true = [one if one is None else one.double().requires_grad_() for one in given]
    right = reference(*true, *of_reference)
    right.backward(drawn[3].double())
    expected = [right.detach(), *(one.grad for one in true if one is not None)]
    found = {}
    for (name, layout), method in itertools.product(layouts().items(), METHODS):
        own = [layout.shard(one, 2).clone().requires_grad_() for one in given[:3]]
        sinks = None if given[3] is None else given[3].clone().requires_grad_()
        out = context_parallel_attention(
            *own, layout, enable_gqa=kv_heads != 4, method=method, sinks=sinks, **arguments
        )
        out.backward(layout.shard(drawn[3], 2))
        results = [layout.unshard(one, 2) for one in (out.detach(), *(one.grad for one in own))]
        if sinks is not None:
            total = sinks.grad.cpu()
            dist.all_reduce(total)
            results.append(total.to(device))
        differences = [(a - b).abs().max() / b.abs().max() for a, b in zip(results, expected, strict=True)]
        found[name, method] = max(map(float, differences))
    return found


def check(options, device):
    """(how many results were compared, sentences of those that were wrong)"""
    count, wrong = 0, []
    for band, kv_heads in itertools.product(BANDS, (4, 2)):
        for case, error in errors_of(band, kv_heads, options, device).items():
            count += 1
            if not error <= TOLERANCE[options.torch_dtype]:
                wrong.append(f"{band}, {kv_heads} KV heads, {', '.join(case)}: an error of {error:.1e}")
    return count, wrong


# --- Times ---------------------------------------------------------------------------------------


def settle(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def seconds(contender, backward, device, repeats):
    """The time of the slowest rank."""
    settle(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        contender.run(backward)
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = torch.tensor([(time.perf_counter() - begin) / repeats], dtype=torch.float64, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def measure(length, options, device):
    """{pass: {contender: seconds}}"""
    made = contenders(length, options, device)
    row = {}
    for which in PASSES:
        backward = which != "forward"
        first = {one.name: seconds(one, backward, device, 1) for one in made}
        repeats = {one.name: max(1, min(20, int(0.05 / first[one.name]))) for one in made}
        taken = {one.name: [] for one in made}
        for _ in range(options.rounds):
            for one in made:
                taken[one.name].append(seconds(one, backward, device, repeats[one.name]))
        row[which] = {name: statistics.median(times) for name, times in taken.items()}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="default: as many as --heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, on the CPU float32"
    )
    parser.add_argument("--kernel", choices=KERNELS, default="flash", help="of PyTorch's on a GPU; default %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="with the messages by which ranks agree on each call")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args()
    options.torch_dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    rank, shared = int(os.environ["LOCAL_RANK"]), False
    device = torch.device("cpu")
    if options.device == "cuda":
        shared = int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count()
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "gloo" if shared or device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=120))
    with sdpa_kernel(KERNELS[options.kernel]) if device.type == "cuda" else contextlib.nullcontext():
        count, wrong = check(options, device) if options.kernel == "flash" else (0, [])
        timed = [] if shared or wrong else options.lengths
        rows = [{"length": length} | measure(length, options, device) for length in timed]
    if dist.get_rank() == 0:
        show(rows, count, wrong, device)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    dist.destroy_process_group()
    return 1 if wrong else 0


def show(rows, count, wrong, device):
    console = Console(width=150)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console.print(f"{dist.get_world_size()} processes, {name}, torch {torch.__version__}, {datetime.date.today()}")
    console.print(f"{count} results and their gradients compared, {len(wrong)} wrong", *wrong, sep="\n")
    for which in PASSES if rows else ():
        table = Table(title=f"{which}, milliseconds, and one process's time over it")
        for column in ("rows", *rows[0][which]):
            table.add_column(column, justify="right")
        for row in rows:
            one = row[which]["one"]
            cells = (f"{1e3 * taken:.2f} ({one / taken:.2f})" for taken in row[which].values())
            table.add_row(str(row["length"]), *cells)
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
