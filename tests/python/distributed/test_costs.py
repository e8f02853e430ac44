"""What a call costs: bytes that travel, memory of a rank, and that messages are under way while kernels run."""

import ctypes
import re
import sys
from pathlib import Path

import pytest
import torch

import cases
import pool
from mps_flash_attn.distributed import context_parallel_attention, layout, local_step, transfer

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16


def operands(own, dtype=torch.float32, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, batch=BATCH):
    shapes = [(batch, count, own.rows, head_dim) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


# --- Traffic -------------------------------------------------------------------------------------


def sent(size, kind, length, dtype, options):
    """The bytes that this rank sends in forward and in backward, beside the agreement."""
    own = cases.layout_of(size, kind, length)
    count, isend, skipped = [0], transfer.dist.isend, transfer._TAGS["agreement"]

    def counted(tensor, *arguments, tag, **others):
        count[0] += tensor.nbytes if tag != skipped else 0
        return isend(tensor, *arguments, tag=tag, **others)

    transfer.dist.isend = counted
    try:
        out = context_parallel_attention(*operands(own, dtype), own, enable_gqa=True, **options)
        forward = count[0]
        out.sum().backward()
        return forward, count[0] - forward
    finally:
        transfer.dist.isend = isend


def rows_sent(found, rank, lower, upper, cuts=()):
    """(keys that a rank sends, keys whose gradients it sends), by the layout."""
    steps = layout.schedule(found, rank, lower, upper, cuts)[1:]
    return sum(layout.count(step.sends) for step in steps), sum(layout.count(step.receives) for step in steps)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options, band",
    [
        ({}, (None, None)),
        ({"is_causal": True}, (None, 0)),
        ({"window_size": 5}, (-4, 0)),
        ({"documents": [16, 32, 48]}, (None, None, (16, 32, 48))),
    ],
    ids=str,
)
def test_traffic(kind, dtype, options, band):
    parts = layout.split(64, 8)
    spans = {
        "contiguous": tuple((span,) for span in layout.split(64, 4)),
        "zigzag": tuple((parts[rank], parts[-1 - rank]) for rank in range(4)),
    }[kind]
    row = BATCH * KV_HEADS * 2 * HEAD_DIM
    for rank, found in enumerate(pool.shared().run(range(4), sent, 4, kind, 64, dtype, options)):
        keys, gradients = rows_sent(spans, rank, *band)
        assert found == (keys * row * dtype.itemsize, keys * row * dtype.itemsize + gradients * row * 4)
        if kind == "contiguous" and "documents" in options:
            assert found == (0, 0)
        if kind == "contiguous" and "window_size" in options:
            assert keys == (4 if rank < 3 else 0)


# --- Overlap -------------------------------------------------------------------------------------


def order(size):
    """Which step's keys begin to travel, and which step's kernels run, in their order."""
    own, events = cases.layout_of(size, "contiguous", 16), []
    started, waited, computed = transfer.Peers.exchange, transfer.Exchange.wait, local_step.run.forward

    def start(self, sends, receives, like, content):
        if content == "keys and values":
            events.append(f"start {(self.rank - next(iter(receives))) % size}")
        return started(self, sends, receives, like, content)

    def wait(self):
        if self._content == "keys and values":
            events.append("wait")
        return waited(self)

    def compute(*arguments):
        events.append("compute")
        return computed(*arguments)

    transfer.Peers.exchange, transfer.Exchange.wait, local_step.run.forward = start, wait, compute
    try:
        context_parallel_attention(*operands(own), own, enable_gqa=True)
    finally:
        transfer.Peers.exchange, transfer.Exchange.wait, local_step.run.forward = started, waited, computed
    return events


def test_messages_are_under_way_while_kernels_run():
    expected = "start 1, compute, start 2, wait, compute, start 3, wait, compute, wait, compute"
    assert pool.shared().run(range(4), order, 4) == [expected.split(", ")] * 4


# --- Memory --------------------------------------------------------------------------------------


def peak(size, kind, length, with_gradients, method):
    """By how many bytes the memory of this rank grows at most in a call, beyond its operands."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: tensors that are freed leave the process
    own = cases.layout_of(size, kind, length)
    leaves = operands(own, heads=32, kv_heads=32, head_dim=64, batch=1)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = high_water_mark()
    with torch.set_grad_enabled(with_gradients):
        out = context_parallel_attention(*leaves, own, True, method=method)
    if with_gradients:
        out.sum().backward()
    return high_water_mark() - before, leaves[0].nbytes


def high_water_mark():
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


# Tensors as large as this rank's query that a call needs beside its operands, in forward and in a training step. A
# rank that held all keys and values, or their gradients, would need 6 more of each.
TENSORS = {("ring", False): 11, ("ring", True): 19, ("all_to_all", False): 9, ("all_to_all", True): 21}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how much memory was used at most")
@pytest.mark.parametrize("method, with_gradients", TENSORS, ids=str)
def test_memory_is_that_of_local_tensors(method, with_gradients):
    """At N, 2N and 4N rows over 4 processes, of which each has a quarter."""
    pool.shared().run(range(4), peak, 4, "zigzag", 64, with_gradients, method)  # what a process needs once
    for length in (256, 512, 1024):
        for grown, local in pool.shared().run(range(4), peak, 4, "zigzag", length, with_gradients, method):
            assert grown <= TENSORS[method, with_gradients] * local + (1 << 20)
