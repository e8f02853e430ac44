"""Trains a small GPT whose sequence is divided over processes: each holds, and computes, some of its rows.

    torchrun --nproc-per-node 4 examples/context_parallel.py      one training, over 4 processes
    python examples/context_parallel.py                           over 1, 2 and 4 processes, with the same losses

The task: every sequence repeats a random pattern, so that the second half can be predicted from the first.
"""

import math
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mps_flash_attn.distributed import Layout, context_parallel_attention

WORDS, LENGTH, WIDTH, HEADS, STEPS = 8, 32, 64, 4, 40


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, layout):
        batch, rows, _ = x.shape  # the rows of this process: all but attention works on them alone
        q, k, v = self.qkv(self.norm1(x)).view(batch, rows, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        o = context_parallel_attention(q, k, v, layout, is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape(batch, rows, WIDTH))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens, layout):
        x = self.words(tokens) + self.places(layout.positions())  # places in the sequence, not in the shard
        for block in self.blocks:
            x = block(x, layout)
        return self.head(x)


def train():
    """The losses of the steps, the same on all ranks of the default group."""
    layout = Layout.zigzag(LENGTH)  # each rank has as much to do as every other, in spite of the causal mask
    torch.manual_seed(1)  # the same model and the same data on every rank
    model, losses = DistributedDataParallel(GPT()), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        sequence = torch.randint(WORDS, (16, LENGTH // 2)).repeat(1, 3)[:, : LENGTH + 1]
        # Targets are shifted before they are divided: the next word may be another rank's.
        tokens, targets = layout.shard(sequence[:, :-1], 1), layout.shard(sequence[:, 1:], 1)
        found = model(tokens, layout)
        loss = F.cross_entropy(found.flatten(0, 1), targets.flatten(), reduction="sum") / sequence[:, 1:].numel()
        optimiser.zero_grad()
        # The loss is the sum of the ranks' parts; DistributedDataParallel takes the mean of their gradients.
        (loss * dist.get_world_size()).backward()
        optimiser.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    dist.all_reduce(losses)
    return losses.tolist()


def start(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    losses = train()
    if rank == 0:
        torch.save(losses, f"{folder}/losses{size}")
    dist.destroy_process_group()


def show(size, losses):
    print(f"processes: {size}  losses:", *(f"{loss:.4f}" for loss in losses[:: STEPS // 5]), f"{losses[-1]:.4f}")


def main():
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        losses = train()
        if dist.get_rank() == 0:
            show(dist.get_world_size(), losses)
        dist.destroy_process_group()
        return
    method = "fork" if sys.platform == "linux" else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 2, 4):
            processes.start_processes(start, (size, folder), nprocs=size, start_method=method)
        curves = {size: torch.load(f"{folder}/losses{size}") for size in (1, 2, 4)}
    for size, losses in curves.items():
        show(size, losses)
    assert curves[1][-1] < 0.9 * math.log(WORDS)  # what guessing has
    for losses in curves.values():
        assert max(abs(one - other) for one, other in zip(losses, curves[1], strict=True)) < 1e-3


if __name__ == "__main__":
    main()
