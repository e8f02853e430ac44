"""Stand-in MPS tensors: with MFA_BACKEND=metal the tests' CPU tensors go to the Metal backend, on metalsim's runtime.

A storage is handed out as a simulated MTLBuffer over its memory, and commands go into a stand-in for PyTorch's stream,
which is waited for after each call, since PyTorch's own operators on the CPU know nothing of it. The package is as it
is but for three of its names: the table of devices, the MTLBuffer of a tensor, and torch.mps.synchronize. It needs
libmfa_metalsim, which a build with -DMFA_METALSIM=ON has.
"""

import contextlib
import ctypes
import os
import threading
from pathlib import Path

import pytest
import torch

from mps_flash_attn import library, tensors

ON_METAL = os.environ.get("MFA_BACKEND") == "metal"
BACKEND = "metal" if ON_METAL else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, *(() if ON_METAL else (torch.float64,)))
FULL = "MFA_TEST_FULL" in os.environ  # make test-full: every case, and more random problems
TIMEOUT = int(os.environ.get("MFA_TEST_TIMEOUT", "900"))  # seconds of a process that a test starts, as in tests/run.py
FLOAT64 = pytest.mark.cpu("the GPU has no float64")

_COUNTS = Path(__file__).parents[2] / "metalsim/runtime/counts.inc"


class _Held(threading.local):
    """The MTLBuffers of the call that this thread is in, each with its storage, which must live as long, by address."""

    def __init__(self):
        self.buffers = {}


_held = _Held()


class Runtime:
    """metalsim's runtime (metalsim/runtime/runtime.h), and its stand-in for PyTorch of this name, if any."""

    def __init__(self, folder, torch_name="2_14"):
        self.library = ctypes.CDLL(os.fspath(folder / "libmetalsim_runtime.so"))
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, result, *arguments in (
            ("metalsim_runtime_buffer", pointer, pointer, size, ctypes.c_int),
            ("metalsim_runtime_release", None, pointer),
            ("metalsim_runtime_count", None, pointer),
            ("metalsim_runtime_clear", None),
            ("metalsim_runtime_findings", size),
            ("metalsim_runtime_finding", ctypes.c_char_p, size),
            ("metalsim_runtime_leaks", size, pointer, size),
        ):
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("metalsim_runtime_"), function)
        self.names = [line[6:].partition(")")[0] for line in _COUNTS.read_text().splitlines() if line[:6] == "COUNT("]
        self.torch = None
        self.waits = True
        if torch_name:  # where dlsym finds it
            self.torch = ctypes.CDLL(os.fspath(folder / f"libmetalsim_torch_{torch_name}.so"), ctypes.RTLD_GLOBAL)

    def counts(self):
        """{name: number}, as in counts.inc."""
        numbers = (ctypes.c_uint64 * len(self.names))()
        self.count(ctypes.addressof(numbers))
        return dict(zip(self.names, numbers, strict=True))

    def found(self):
        """The findings of the runtime, for which a Mac would have ended the process."""
        return [self.finding(i).decode() for i in range(self.findings())]

    def synchronize(self):
        if self.torch:
            self.torch.metalsim_torch_synchronize()

    @contextlib.contextmanager
    def unwaited(self):
        """Calls in the block do not wait: their results are valid after it."""
        self.waits = False
        try:
            yield
        finally:
            self.waits = True
            self.settle()

    def settle(self):
        """Waits, and releases the buffers of this thread's last call."""
        self.synchronize()
        for buffer, _ in _held.buffers.values():
            self.release(buffer)
        _held.buffers.clear()


def _buffer(runtime, tensor):
    """The MTLBuffer of a tensor; one for each storage, as PyTorch has it."""
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    if not address:
        return 0
    if address not in _held.buffers:
        _held.buffers[address] = runtime.buffer(address, storage.nbytes(), 0), storage
    return _held.buffers[address][0]


def install(torch_name="2_14"):
    """Installs all of this permanently; returns the Runtime."""
    runtime = Runtime(library.library_path().resolve().parent / "metalsim", torch_name)
    attention = library.Library.attention

    def attention_and_wait(self, *arguments):
        try:
            attention(self, *arguments)
        finally:
            if runtime.waits:
                runtime.settle()

    library.DEVICES["cpu"] = library.DEVICE_METAL
    library.Library.attention = attention_and_wait
    tensors.metal_buffer = lambda tensor: _buffer(runtime, tensor)
    torch.mps.synchronize = runtime.synchronize
    return runtime
