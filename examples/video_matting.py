"""Trains a small network for video matting, once with PyTorch's attention and once after replace_sdpa(), and compares.

The network predicts the opacity (alpha) of moving shapes over a background, in frames that this program draws, of 512 x
512 pixels. It has an encoder and a decoder of convolutions; between them each frame attends to itself, over 64 x 64 and
32 x 32 places, and each of the 32 x 32 places attends to itself in all frames. Weights begin random, and the same.

Each training is a process of its own, so that its peak memory is its own. The losses of both must be equal up to the
rounding of float32, which training amplifies from step to step (TOLERANCE).

    python examples/video_matting.py [--steps 50] [--size 512] [--frames 3]
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from mps_flash_attn import replace_sdpa, sdpa_stats

TOLERANCE = 1e-3  # how far apart the losses of a step may be, as a part of them
SEED, CLIPS = 1, 4


class Attention(nn.Module):
    """Attention among tokens (batch, tokens, width), and a small network for each."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def within_frames(attention, x):
    """Of x (frames, width, height, columns), each frame by itself."""
    return attention(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


def across_frames(attention, x):
    """The same, each place by itself."""
    return attention(x.flatten(2).permute(2, 0, 1)).permute(1, 2, 0).unflatten(2, x.shape[2:])


def down(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.SiLU())


class Up(nn.Module):
    """Doubles the size of x, and takes in what the encoder had of that size."""

    def __init__(self, inputs, others, outputs):
        super().__init__()
        self.mix = nn.Sequential(nn.Conv2d(inputs + others, outputs, 3, 1, 1), nn.GroupNorm(4, outputs), nn.SiLU())

    def forward(self, x, other):
        return self.mix(torch.cat([F.interpolate(x, scale_factor=2.0), other], 1))


class Matting(nn.Module):
    """Logits of alpha (frames, 1, N, N) of a clip (frames, 3, N, N)."""

    def __init__(self):
        super().__init__()
        self.down2, self.down4, self.down8, self.down16 = down(3, 12), down(12, 24), down(24, 64), down(64, 96)
        self.at8, self.at16, self.over_time = Attention(64, 2), Attention(96, 3), Attention(96, 3)
        self.up8, self.up4, self.up2 = Up(96, 64, 64), Up(64, 24, 24), Up(24, 12, 12)
        self.alpha = nn.Conv2d(12, 1, 3, 1, 1)

    def forward(self, clip):
        at2 = self.down2(clip)
        at4 = self.down4(at2)
        at8 = within_frames(self.at8, self.down8(at4))
        at16 = within_frames(self.at16, self.down16(at8))
        at16 = across_frames(self.over_time, at16)
        return F.interpolate(self.alpha(self.up2(self.up4(self.up8(at16, at8), at4), at2)), scale_factor=2.0)


def draw(size, frames, generator):
    """(clip (frames, 3, size, size), alpha (frames, 1, size, size)): two soft shapes that move over a background of
    waves."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    t = torch.arange(frames)[:, None, None]

    def numbers(*shape, low=-1.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    waves = [torch.sin(a * x + b * y + c) for a, b, c in numbers(3, 3, low=-9, high=9)]
    clip = torch.stack(waves).mul(0.15).add(numbers(3, 1, 1, low=0.3, high=0.7)).repeat(frames, 1, 1, 1)
    alpha = torch.zeros(frames, 1, size, size)
    for is_round in (True, False):
        (cx, cy), (vx, vy), radius = numbers(2, low=-0.5, high=0.5), numbers(2) * 0.08, numbers(1, low=0.25, high=0.45)
        dx, dy = (x - cx - vx * t).abs(), (y - cy - vy * t).abs()
        distance = (dx * dx + dy * dy).sqrt() if is_round else torch.maximum(dx, dy)
        shape = torch.sigmoid((radius - distance) * 40)[:, None]
        clip = clip * (1 - shape) + shape * numbers(3, 1, 1, low=0.0, high=1.0)
        alpha = torch.maximum(alpha, shape)
    return clip - 0.5, alpha


def loss_of(logits, alpha):
    """How far alpha is off, and how far its change from frame to frame."""
    change = torch.sigmoid(logits).diff(dim=0) - alpha.diff(dim=0)
    return F.binary_cross_entropy_with_logits(logits, alpha) + change.abs().mean()


def train(steps, size, frames):
    """The loss of each step, which trains on one of CLIPS clips."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    clips = [draw(size, frames, generator) for _ in range(CLIPS)]
    model, losses = Matting(), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-3)
    for step in range(steps):
        clip, alpha = clips[step % CLIPS]
        loss = loss_of(model(clip), alpha)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # larger steps make rounding grow
        optimiser.step()
        losses.append(loss.item())
    return losses


def peak_memory():
    """In MiB, of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run_one(options):
    """One of the trainings: prints a line of JSON."""
    if options.run == "libmfa":
        replace_sdpa()
    before, clocks = peak_memory(), (time.perf_counter, time.process_time)
    start = [clock() for clock in clocks]
    losses = train(options.steps, options.size, options.frames)
    seconds, of_cpu = (clock() - begun for clock, begun in zip(clocks, start, strict=True))
    found = {"losses": losses, "seconds": seconds, "of_cpu": of_cpu, "before": before, "peak": peak_memory()}
    found["calls"] = sdpa_stats()
    print(json.dumps(found))


def run_both(options):
    results = {}
    for run in ("PyTorch", "libmfa"):
        arguments = [f"--{name}={getattr(options, name)}" for name in ("steps", "size", "frames")]
        command = [sys.executable, __file__, f"--run={run}", *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[run] = json.loads(done.stdout)
    losses = [results[run]["losses"] for run in results]
    apart = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    show(options, results, apart)
    assert apart <= TOLERANCE
    calls = results["libmfa"]["calls"]
    assert calls["replaced"] + calls.get("small", 0) == 3 * options.steps
    if options.steps >= 50:
        assert all(sum(one[-CLIPS:]) < 0.6 * sum(one[:CLIPS]) for one in losses)


def show(options, results, apart):
    """A table, by rich where that is installed."""
    shown = sorted({0, *range(0, options.steps, max(1, options.steps // 5)), options.steps - 1})
    rows = [(f"loss of step {n}", *(f"{one['losses'][n]:.6f}" for one in results.values())) for n in shown]
    rows.append(("seconds", *(f"{one['seconds']:.1f}" for one in results.values())))
    rows.append(("seconds of the CPU", *(f"{one['of_cpu']:.1f}" for one in results.values())))
    rows.append(("peak memory, MiB", *(f"{one['peak']:.0f}" for one in results.values())))
    rows.append(("of that before training", *(f"{one['before']:.0f}" for one in results.values())))
    title = f"{options.frames} frames of {options.size} x {options.size}, {options.steps} steps"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for row in [("", *results), *rows]:
            print(f"{row[0]:25}" + "".join(f"{cell:>12}" for cell in row[1:]))
    else:
        table = Table("", title=title)
        for run in results:
            table.add_column(run, justify="right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    print(f"losses are at most {apart:.1e} of them apart; {TOLERANCE} is accepted")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=512, help="of the frames, a multiple of 16")
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--run", choices=("PyTorch", "libmfa"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    run_one(given) if given.run else run_both(given)
