"""Four gloo processes that run functions for the tests, started once, from a server that has imported PyTorch and what
they need of it once.

Groups of 1 to 4 of them stand for machines. Those of 2 and 3 do not begin with rank 0, so that ranks of the group and
of all processes differ.
"""

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import stand_in

SIZES = (1, 2, 3, 4)
RANKS = {1: (2,), 2: (1, 3), 3: (1, 2, 3), 4: (0, 1, 2, 3)}  # of the group of each size
WORLD = 4

groups = {}  # in a worker: the group of each size that it is in


def _context():
    context = multiprocessing.get_context("forkserver")
    # One server serves all of a process: for bench/measure.py it must not have imported mps_flash_attn.
    context.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.tensor", "pytest"])
    return context


def _work(rank, size, store, pipe, timeout, subgroups):
    if os.environ.get("MFA_BACKEND") == "metal":
        stand_in.install()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    for count, ranks in RANKS.items() if subgroups else ():
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout))
        if rank in ranks:
            groups[count] = group
    while True:
        try:
            function, arguments, options = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(1)
        try:
            pipe.send((function(*arguments, **options), None))
        except BaseException as error:
            pipe.send((None, (type(error).__name__, str(error), traceback.format_exc())))


class Failed(AssertionError):
    """A function raised an error in a worker."""


class Pool:
    """Processes in one gloo group of all. As a context it ends them."""

    def __init__(self, size=WORLD, timeout=60, subgroups=True):
        self.folder = tempfile.TemporaryDirectory()
        context = _context()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = rank, size, Path(self.folder.name) / "store", theirs, timeout, subgroups
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()

    def start(self, rank, function, *arguments, **options):
        self.pipes[rank].send((function, arguments, options))

    def outcome(self, rank, timeout=120):
        """(result, None), or (None, (class, sentence, traceback)) of the error."""
        if not self.pipes[rank].poll(timeout):
            raise Failed(f"rank {rank} has no result after {timeout} s")
        try:
            return self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join(5)
            raise Failed(f"rank {rank} ended with the exit code {self.processes[rank].exitcode}") from None

    def run(self, ranks, function, *arguments, **options):
        """The results of function(...) on these ranks; raises if one of them raised an error."""
        for rank in ranks:
            self.start(rank, function, *arguments, **options)
        outcomes = [self.outcome(rank) for rank in ranks]
        for rank, (_, error) in zip(ranks, outcomes, strict=True):
            if error is not None:
                raise Failed(f"on rank {rank}:\n{error[2]}")
        return [result for result, _ in outcomes]

    def outcomes(self, ranks, function, *arguments, **options):
        """The outcomes on these ranks."""
        for rank in ranks:
            self.start(rank, function, *arguments, **options)
        return [self.outcome(rank) for rank in ranks]


_shared = None


def shared():
    """The pool that all tests of this process use; a new one after a test that ended one of its processes."""
    global _shared
    if _shared is None or not all(process.is_alive() for process in _shared.processes):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        _shared = Pool()
    return _shared
