"""Finds libmfa, declares its ABI (include/mfa.h), and keeps the one context of this process.

A call is one packed problem, one packed set of buffers and one ctypes call: filling a ctypes.Structure field by field,
or passing the numbers as arguments, costs several times what a small problem takes to compute.
"""

import ctypes
import os
import struct
import sys
import threading
from collections import namedtuple
from pathlib import Path

import torch

ABI = "0.1"  # the part of mfa_version() that must agree
PATH_VARIABLE = "MFA_LIBRARY"

FORWARD, BACKWARD = 0, 1
DEVICE_CPU = 0
F32, F16, BF16, F64 = range(4)
MASK_NONE, MASK_BOOL, MASK_ADDITIVE = range(3)
BAND_OPEN_LOWER, BAND_OPEN_UPPER = -(2**63), 2**63 - 1

# The structs of mfa.h: (field, its format as in the module struct), in the order of the header.
_LAYOUT, _BUFFER = "4q", "PQ"
PROBLEM_FIELDS = (
    ("size", "Q"),
    *((name, "i") for name in ("pass", "device", "dtype", "mask", "mask_dtype", "reserved")),
    *((name, "q") for name in ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim")),
    *((name, "q") for name in ("lower", "upper")),
    *((name, "d") for name in ("scale", "softcap")),
    *((name + "_layout", _LAYOUT) for name in ("q", "k", "v", "o", "lse", "mask")),
    *((name + "_layout", _LAYOUT) for name in ("d_o", "dlse", "dq", "dk", "dv", "dbias")),
)
BUFFERS_FIELDS = (
    ("size", "Q"),
    *((name, _BUFFER) for name in ("q", "k", "v", "mask", "o", "lse", "d_o", "dlse", "dq", "dk", "dv", "dbias")),
    ("workspace", _BUFFER),
    ("workspace_size", "Q"),
)
OPTIONS_FIELDS = (("size", "Q"), ("threads", "i"), ("reserved", "i"), ("isa", "P"), ("cache", "P"), ("host", "P"))


def _struct(fields):
    return struct.Struct("@" + "".join(form for _, form in fields))


PROBLEM, BUFFERS, OPTIONS = map(_struct, (PROBLEM_FIELDS, BUFFERS_FIELDS, OPTIONS_FIELDS))

# What of a problem is the same in forward and backward: all between `pass` and the layouts.
Scalars = namedtuple("Scalars", [name for name, form in PROBLEM_FIELDS[2:] if form != _LAYOUT])


class Unsupported(NotImplementedError):
    """A sound problem that this library is not able to run."""


_EXCEPTIONS = {1: ValueError, 2: Unsupported, 4: MemoryError}  # MFA_INVALID, MFA_UNSUPPORTED, MFA_OUT_OF_MEMORY


def library_path():
    """Where libmfa is: the file that MFA_LIBRARY names, else the one beside this package."""
    given = os.environ.get(PATH_VARIABLE)
    path = Path(given or Path(__file__).with_name("libmfa.dylib" if sys.platform == "darwin" else "libmfa.so"))
    if not path.is_file():
        hint = f"{PATH_VARIABLE} must name the file libmfa" if given else f"install it there or set {PATH_VARIABLE}"
        raise ImportError(f"libmfa is not at {path}; {hint}")
    return path


def torch_parallel_for():
    """The address of PyTorch's own thread pool, whose type is mfa_parallel_for; None before PyTorch 2.10."""
    function = getattr(ctypes.CDLL(torch._C.__file__), "torch_parallel_for", None)
    return ctypes.cast(function, ctypes.c_void_p).value if function else None


class Library:
    """libmfa, loaded, with its context."""

    def __init__(self, host):
        self.path = library_path()
        self.host = host
        library = ctypes.CDLL(os.fspath(self.path))
        pointer, text, status = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        for name, result, *arguments in (
            ("mfa_version", text),
            ("mfa_last_error", text),
            ("mfa_status_name", text, status),
            ("mfa_context_create", status, pointer, pointer),
            ("mfa_context_set_threads", status, pointer, ctypes.c_int32),
            ("mfa_problem_parse", status, text, pointer),
            ("mfa_plan_create", status, pointer, pointer, pointer),
            ("mfa_plan_destroy", None, pointer),
            ("mfa_plan_workspace", ctypes.c_size_t, pointer),
            ("mfa_plan_describe", status, pointer, pointer, ctypes.c_size_t),
            ("mfa_attention", status, pointer, pointer, pointer, pointer),
        ):
            try:
                function = getattr(library, name)
            except AttributeError:
                raise ImportError(f"{self.path} is not libmfa: it has no function {name}") from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.version = self.mfa_version().decode()
        if self.version.rpartition(".")[0] != ABI:
            raise ImportError(f"{self.path} is libmfa {self.version}; this package needs {ABI}.x")
        self.threads = torch.get_num_threads()
        context = pointer()
        self.check(
            self.mfa_context_create(
                OPTIONS.pack(OPTIONS.size, self.threads, 0, 0, 0, host or 0), ctypes.addressof(context)
            )
        )
        self.context = context

    def check(self, status):
        """Raises what a status other than MFA_OK means."""
        if status:
            sentence = self.mfa_last_error().decode()
            raise _EXCEPTIONS.get(status, RuntimeError)(sentence or self.mfa_status_name(status).decode())

    def follow(self, threads):
        """Uses as many threads as PyTorch does."""
        self.check(self.mfa_context_set_threads(self.context, threads))
        self.threads = threads

    def attention(self, problem, buffers):
        """Runs a packed problem on packed buffers."""
        threads = torch.get_num_threads()
        if threads != self.threads:
            self.follow(threads)
        status = self.mfa_attention(self.context, problem, buffers, None)
        if status:
            self.check(status)

    def parse(self, line):
        """The packed problem that a line such as "forward f32 b1 h8 q512 kv512 d64" says."""
        problem = ctypes.create_string_buffer(PROBLEM.size)
        self.check(self.mfa_problem_parse(line.encode(), problem))
        return problem.raw

    def plan(self, problem):
        """What a packed problem would run on: (one line of text, workspace bytes)."""
        self.follow(torch.get_num_threads())
        plan, line = ctypes.c_void_p(), ctypes.create_string_buffer(512)
        self.check(self.mfa_plan_create(self.context, problem, ctypes.addressof(plan)))
        try:
            self.check(self.mfa_plan_describe(plan, line, len(line)))
            return line.value.decode(), self.mfa_plan_workspace(plan)
        finally:
            self.mfa_plan_destroy(plan)


_library = None
_lock = threading.Lock()
_forked = False


def library():
    """The Library of this process; made by the first call."""
    return _library or _open()


def _open():
    global _library
    with _lock:
        if _library is None:
            _library = Library(None if _forked else torch_parallel_for())
        return _library


def _after_fork():
    # The parent's threads are not in the child, and OpenMP, on which PyTorch's pool stands, waits for them for ever.
    # So the child makes a context of its own, on the library's own pool. The parent's may be in use: it is let be.
    global _library, _lock, _forked
    _library, _lock, _forked = None, threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def is_available():
    """Whether libmfa is found and runs on this machine."""
    try:
        library()
    except (ImportError, OSError, RuntimeError):
        return False
    return True
