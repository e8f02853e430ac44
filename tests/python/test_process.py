"""Inside a process: many Python threads at once, children after fork, and the memory that a call really takes."""

import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch

import mps_flash_attn
from mps_flash_attn import dispatch_cache, flash_attention
from stand_in import FULL, ON_METAL, TIMEOUT


def _training_step(tensors, **options):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = flash_attention(*tensors, **options)
    return out.detach(), *torch.autograd.grad(out.square().sum(), tensors)


def test_many_threads_at_once():
    """Each thread gets the bits that it would get alone."""
    cases = []
    for length, width in ((33, 16), (64, 64), (150, 32), (200, 24)):
        tensors = [torch.randn(2, 2, length, width) for _ in range(3)]
        options = {"is_causal": length % 2 == 0, "window_size": length // 2}
        cases.append((tensors, options, _training_step(tensors, **options)))
    wrong = []

    def run(tensors, options, expected):
        for _ in range(5 if ON_METAL and not FULL else 20):
            if not all(map(torch.equal, _training_step(tensors, **options), expected)):
                wrong.append(options)

    threads = [threading.Thread(target=run, args=case) for case in cases * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bits_do_not_depend_on_threads():
    tensors = [torch.randn(1, 2, 260, 40) for _ in range(3)]
    before, got = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            got += [_training_step(tensors, is_causal=True) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, one, got[0])) for one in got)


@pytest.mark.cpu("Metal does not outlive fork()")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_child_after_fork():
    """The child, which does not have the parent's thread pool, works and gets the same bits."""
    tensors = [torch.randn(1, 4, 130, 32) for _ in range(3)]  # small: PyTorch's own pool would hang in the child
    expected = _training_step(tensors)  # the pool is running by now
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def child():
        sender.send(all(map(torch.equal, _training_step(tensors), expected)))

    process = fork.Process(target=child)
    process.start()
    answered = receiver.poll(TIMEOUT / 3)
    if not answered:
        process.kill()
    process.join()
    assert answered, "the child hangs"
    assert receiver.recv()
    assert all(map(torch.equal, _training_step(tensors), expected))


def _package_locks():
    kinds = type(threading.Lock()), type(threading.RLock())
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == mps_flash_attn.__name__]
    return [value for module in modules for value in vars(module).values() if isinstance(value, kinds)]


@pytest.mark.cpu("Metal does not outlive fork()")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.usefixtures("everything", "one_thread")
def test_child_of_a_process_whose_locks_are_held():
    """A thread that is inside every lock of the package is not in the child, which takes them all."""
    query = torch.randn(1, 1, 4, 8)
    expected = flash_attention(query, query, query)
    inside, leave = threading.Event(), threading.Event()
    locks = _package_locks()
    assert len(locks) >= 3  # those of library, stats and sdpa

    def hold():
        with contextlib.ExitStack() as held:
            for lock in locks:
                held.enter_context(lock)
            inside.set()
            leave.wait()

    def child():
        with mps_flash_attn.replaced_sdpa():
            out = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        counted = mps_flash_attn.sdpa_stats()["replaced"]
        sender.send(torch.equal(out, expected) and counted == 1 and all(map(_is_free, _package_locks())))

    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    try:
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        answered = receiver.poll(TIMEOUT / 3)
        if not answered:
            process.kill()
        process.join()
    finally:
        leave.set()
        holder.join()
    assert answered, "the child hangs"
    assert receiver.recv()


def _is_free(lock):
    """Whether another thread can acquire the lock."""
    taken = []
    thread = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
    thread.start()
    thread.join()
    return taken == [True]


@pytest.mark.cpu("thousands of calls take the simulator too long")
@pytest.mark.parametrize("attention", [flash_attention, torch.nn.functional.scaled_dot_product_attention])
@pytest.mark.usefixtures("everything", "one_thread")
def test_calls_leave_nothing_behind(attention):
    """No allocation of Python's grows with the number of calls, nor with the lengths of a growing sequence."""
    calls = 200
    query, cache = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1200, 8)
    trained = [torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3)]
    sizes = []
    with mps_flash_attn.replaced_sdpa():
        for length in range(1, 1200):
            attention(query, cache[:, :, :length], cache[:, :, :length])
        assert len(dispatch_cache._entries) <= dispatch_cache._MAX_ENTRIES
        tracemalloc.start()
        try:
            for _ in range(8):
                for _ in range(calls):
                    attention(query, cache, cache)
                    torch.autograd.grad(attention(*trained).sum(), trained)
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    # Less than an object a call, the smallest being 16 bytes. Pools of Python and autograd fill up, but not for ever.
    assert min(after - before for before, after in itertools.pairwise(sizes)) < calls * 16, sizes


MEASURE = """
import json, sys, torch
from mps_flash_attn import explain, flash_attention

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

def step(length, dtype, backward):
    tensors = [torch.randn(1, 1, length, 64, dtype=dtype, requires_grad=backward) for _ in range(3)]
    d_out = torch.randn(1, 1, length, 64, dtype=dtype)
    torch.ones(64, 64) @ torch.ones(64, 64)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = status("VmRSS")
    out = flash_attention(*tensors, True)
    if backward:
        gradients = torch.autograd.grad(out, tensors, d_out)
    extra = status("VmHWM") - before
    said = max(explain(*tensors, True, backward=b).workspace_bytes for b in {False, backward})
    results = length * 64 * dtype.itemsize * (4 if backward else 1) + length * 4 * backward
    return {"extra": extra, "said": said, "results": results}

dtype, backward = getattr(torch, sys.argv[1]), sys.argv[2] == "backward"
step(64, dtype, backward)
print(json.dumps({n: step(n, dtype, backward) for n in (1024, 4096, 16384)}))
"""
MEASURED = [("float32", "backward"), ("bfloat16", "forward")]  # each a process of seconds
MEASURED += [("float32", "forward"), ("bfloat16", "backward")] if FULL else []


@pytest.mark.cpu("what a process takes says nothing of a GPU's memory")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("dtype, direction", MEASURED)
def test_memory_grows_linearly(dtype, direction):
    """The peak, measured, is the results plus the workspace that explain() states; a score matrix would be far more."""
    path = os.pathsep.join([str(Path(mps_flash_attn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, dtype, direction],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    slack = 4 << 20  # the allocator's and the interpreter's own
    measured = {int(n): sizes for n, sizes in json.loads(done.stdout).items()}
    for length, sizes in measured.items():
        assert sizes["extra"] <= sizes["said"] + sizes["results"] + slack, (length, sizes)
    said = [measured[n]["said"] for n in (1024, 4096, 16384)]
    assert said[2] <= 4.5 * said[1] and said[1] <= 4.5 * said[0], said
    assert measured[16384]["extra"] < 16384 * 16384 // 8  # an eighth of a byte per score
