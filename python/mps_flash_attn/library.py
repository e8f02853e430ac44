"""Finds libmfa, declares its ABI (include/mfa.h), and holds the one context of this process.

A call takes one packed problem, one packed set of buffers and one ctypes call. To fill a ctypes.Structure field by
field, or to pass the numbers as arguments, would take several times as long as a small problem.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .after_fork import call_in_child, new_lock

ABI = "0.1"  # the part of mfa_version() that must agree
PATH_VARIABLE = "MFA_LIBRARY"

FORWARD, BACKWARD = 0, 1
DEVICE_CPU, DEVICE_METAL = range(2)
DEVICES = {"cpu": DEVICE_CPU, "mps": DEVICE_METAL}  # PyTorch's name: the code of mfa.h
F32, F16, BF16, F64 = range(4)
MASK_NONE, MASK_BOOL, MASK_ADDITIVE = range(3)
BAND_OPEN_LOWER, BAND_OPEN_UPPER = -(2**63), 2**63 - 1
STREAM_TORCH = 1
KV_TYPES = {"int8": 1, "e4m3": 2, "e5m2": 3, "int4": 4, "nf4": 5}  # of mfa_kv_type
KV_NAMES = {number: name for name, number in KV_TYPES.items()}
OUT_TYPES = {"f32": 1}  # of mfa_out_type
OUT_NAMES = {number: name for name, number in OUT_TYPES.items()}
FAST = {"int8": 1}  # of mfa_fast
FAST_NAMES = {number: name for name, number in FAST.items()}

# The structs of mfa.h: (field, its format as in the module struct), in the order of the header.
_LAYOUT, _BUFFER = "4q", "PQ"
PROBLEM_FIELDS = (
    ("size", "Q"),
    *((name, "i") for name in ("pass", "device", "dtype", "mask", "mask_dtype", "alibi")),
    *((name, "q") for name in ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim")),
    *((name, "q") for name in ("lower", "upper")),
    *((name, "d") for name in ("scale", "softcap")),
    *((name + "_layout", _LAYOUT) for name in ("q", "k", "v", "o", "lse", "mask")),
    *((name + "_layout", _LAYOUT) for name in ("d_o", "dlse", "dq", "dk", "dv", "dbias")),
    ("slopes_layout", _LAYOUT),
    *((name, "i") for name in ("sinks", "reserved")),
    *((name + "_layout", _LAYOUT) for name in ("sinks", "dsinks")),
    ("dropout", "d"),
    ("seed_layout", _LAYOUT),
    *((name, "q") for name in ("block_map_q", "block_map_kv")),
    ("block_map_layout", _LAYOUT),
    *((name, "i") for name in ("varlen_q", "varlen_kv", "seqused_k", "leftpad_k", "cache_batch_idx", "bottom_right")),
    *((name, "q") for name in ("total_q", "total_kv", "kv_batch", "page_size")),
    *((name + "_layout", _LAYOUT) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k")),
    *((name + "_layout", _LAYOUT) for name in ("cache_batch_idx", "block_table")),
    *((name, "i") for name in ("k_type", "v_type")),
    *((name, "q") for name in ("k_group", "v_group")),
    *((name + "_layout", _LAYOUT) for name in ("k_scale", "v_scale")),
    *((name, "i") for name in ("out_type", "fast")),
)
BUFFERS_FIELDS = (
    ("size", "Q"),
    *((name, _BUFFER) for name in ("q", "k", "v", "mask", "o", "lse", "d_o", "dlse", "dq", "dk", "dv", "dbias")),
    ("workspace", _BUFFER),
    ("workspace_size", "Q"),
    *((name, _BUFFER) for name in ("o_low", "slopes", "sinks", "dsinks", "seed", "block_map")),
    *((name, _BUFFER) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k")),
    *((name, _BUFFER) for name in ("cache_batch_idx", "block_table", "k_scale", "v_scale")),
)
OPTIONS_FIELDS = (("size", "Q"), ("threads", "i"), ("reserved", "i"), ("isa", "P"), ("cache", "P"), ("host", "P"))


def _struct(fields: Iterable[tuple[str, str]]) -> struct.Struct:
    return struct.Struct("@" + "".join(form for _, form in fields))


PROBLEM, BUFFERS, OPTIONS = map(_struct, (PROBLEM_FIELDS, BUFFERS_FIELDS, OPTIONS_FIELDS))

# mfa_buffers on the CPU, where no offsets are needed: the size and the bases of q k v mask o lse d_o dlse dq dk dv
# dbias o_low slopes sinks dsinks seed block_map, with zeros between them and for the rest, which MORE_BASES packs: the
# bases of cu_seqlens_q cu_seqlens_k seqused_k leftpad_k cache_batch_idx block_table k_scale v_scale, of which most
# calls have none.
MORE_BASES = struct.Struct("@" + "P8x" * 8)
BASES = struct.Struct("@Q" + "P8x" * 12 + f"{struct.calcsize(_BUFFER + 'Q')}x" + "P8x" * 6 + f"{MORE_BASES.size}x")

_NO_BUFFERS = struct.pack(f"@Q{BUFFERS.size - 8}x", BUFFERS.size)

# mfa_compiler: (paths of the texts, how many, path of the library, argument) -> 0 on success.
COMPILER = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.POINTER(ctypes.c_char_p), ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p
)


class Scalars(NamedTuple):
    """The fields of a problem that are the same in forward and backward and no layouts."""

    device: int
    dtype: int
    mask: int
    mask_dtype: int
    alibi: int
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    lower: int
    upper: int
    scale: float
    softcap: float
    sinks: int
    dropout: float
    block_map_q: int
    block_map_kv: int
    varlen_q: int
    varlen_kv: int
    seqused_k: int
    leftpad_k: int
    cache_batch_idx: int
    bottom_right: int
    total_q: int
    total_kv: int
    kv_batch: int
    page_size: int
    k_type: int
    v_type: int
    k_group: int
    v_group: int
    out_type: int
    fast: int


# The name of each number of an unpacked problem; the four of a layout have one name.
_NAMES = [name for name, form in PROBLEM_FIELDS for _ in range(4 if form == _LAYOUT else 1)]
_PLACES = [_NAMES.index(name) for name in Scalars._fields]


def scalars(problem: bytes) -> Scalars:
    """The Scalars of a packed problem."""
    numbers = PROBLEM.unpack(problem)
    return Scalars._make(numbers[place] for place in _PLACES)


def changed(problem: bytes, **numbers: Any) -> bytes:
    """A packed problem with some scalars replaced."""
    changed = list(PROBLEM.unpack(problem))
    for name, number in numbers.items():
        changed[_NAMES.index(name)] = number
    return PROBLEM.pack(*changed)


def with_layouts(problem: bytes, **layouts: Iterable[int]) -> bytes:
    """A packed problem with some strides replaced: with_layouts(problem, q=(batch, head, row, column))."""
    numbers = list(PROBLEM.unpack(problem))
    for name, strides in layouts.items():
        first = _NAMES.index(name + "_layout")
        numbers[first : first + 4] = strides
    return PROBLEM.pack(*numbers)


def buffers_at(**addresses: int) -> bytes:
    """The packed buffers that begin at these addresses, on the CPU: buffers_at(q=..., k=...). It is for calls that are
    not made often; BASES takes less time."""
    numbers: list[int] = []
    for name, form in BUFFERS_FIELDS:
        numbers += [addresses.pop(name, 0), 0] if form == _BUFFER else [BUFFERS.size if name == "size" else 0]
    if addresses:
        raise KeyError(*addresses)
    return BUFFERS.pack(*numbers)


class Unsupported(NotImplementedError):
    """The problem is valid, but this library cannot run it, on this machine or at all. Another implementation may. It
    is a NotImplementedError, and its text says what is not supported, and what is."""


_INVALID, _UNSUPPORTED, _UNAVAILABLE, _OUT_OF_MEMORY, _COMPILE_FAILED = range(1, 6)  # mfa_status
_EXCEPTIONS = {
    _INVALID: ValueError,
    _UNSUPPORTED: Unsupported,
    _UNAVAILABLE: Unsupported,
    _OUT_OF_MEMORY: MemoryError,
    _COMPILE_FAILED: Unsupported,
}


def library_path() -> Path:
    """The path of libmfa: the file that MFA_LIBRARY names, else the one in this package."""
    from_environment = os.environ.get(PATH_VARIABLE)
    name = "libmfa.dylib" if sys.platform == "darwin" else "libmfa.so"
    path = Path(from_environment or Path(__file__).with_name(name))
    if not os.path.isfile(path):
        hint = f"install it there or set {PATH_VARIABLE}"
        if from_environment:
            hint = f"{PATH_VARIABLE} must name the file libmfa"
        raise ImportError(f"libmfa is not at {path}; {hint}")
    return path


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(os.fspath(path))
    except OSError as error:  # not a library, one for another machine, or an unreadable file
        raise ImportError(f"{path} cannot be loaded as libmfa: {error}") from None


def symbol(path: str | None, name: str) -> Any:
    """The function of this name in a library that is loaded, None: in any of them; None if there is none."""
    return getattr(ctypes.CDLL(path), name, None)


def address_of(function: Any) -> int | None:
    """The address of what symbol() returned."""
    return ctypes.cast(function, ctypes.c_void_p).value if function else None


class Host(NamedTuple):
    """What libmfa gets from the framework that it works for in this process. This one is none: the library has threads
    of its own, as many as the process may use."""

    number_of_threads: Callable[[], int] = int  # 0: as many as the process may use
    parallel_for: Callable[[], int | None] = lambda: None  # the address of its thread pool, an mfa_parallel_for
    # Waits for its streams, where commands cannot be put into one for the reason given.
    wait: Callable[[str], None] = lambda _: None


class Library:
    """The loaded libmfa, with its context."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the functions that __init__ declares

    def __init__(self, host: Host, parallel_for: int | None) -> None:
        self.path = library_path()
        self.host = parallel_for  # the thread pool of the host, None: the library's own
        self._number_of_threads, self._wait = host.number_of_threads, host.wait
        library = _load(self.path)
        pointer, text, status = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        whole, long = ctypes.c_int32, ctypes.c_int64
        for name, result, *arguments in (
            ("mfa_version", text),
            ("mfa_last_error", text),
            ("mfa_status_name", text, status),
            ("mfa_isa_name", text, ctypes.c_int32),
            ("mfa_isa_supported", status, text),
            ("mfa_context_create", status, pointer, pointer),
            ("mfa_context_destroy", None, pointer),
            ("mfa_context_set_threads", status, pointer, ctypes.c_int32),
            ("mfa_problem_parse_sized", status, text, pointer, ctypes.c_size_t),
            ("mfa_problem_dropout_mask", status, pointer, pointer, pointer),
            ("mfa_kv_quantize", status, whole, whole, long, long, long, pointer, long, pointer, long, pointer, long),
            ("mfa_problem_supported", status, pointer, pointer),
            ("mfa_plan_create", status, pointer, pointer, pointer),
            ("mfa_plan_destroy", None, pointer),
            ("mfa_plan_workspace", ctypes.c_size_t, pointer),
            ("mfa_plan_describe", status, pointer, pointer, ctypes.c_size_t),
            ("mfa_attention", status, pointer, pointer, pointer, pointer),
            ("mfa_precompile", status, pointer, pointer, text, COMPILER, pointer),
            ("mfa_xla_attention", pointer, pointer),
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
        self.threads = self._number_of_threads()
        self.context = ctypes.c_void_p()
        options = OPTIONS.pack(OPTIONS.size, self.threads, 0, 0, 0, parallel_for or 0)
        self.check(self.mfa_context_create(options, ctypes.addressof(self.context)))

    def check(self, status: int) -> None:
        """Raises the exception of a status other than MFA_OK."""
        if status:
            sentence = self.last_error() or self.mfa_status_name(status).decode()
            raise _EXCEPTIONS.get(status, RuntimeError)(sentence)

    def last_error(self) -> str:
        """The error sentence of the last call that failed. A path in it may not be UTF-8."""
        return self.mfa_last_error().decode(errors="replace")

    def set_threads(self, threads: int) -> None:
        """Sets the number of threads, to that of the host."""
        self.check(self.mfa_context_set_threads(self.context, threads))
        self.threads = threads

    def attention(self, problem: bytes, buffers: bytes, stream: int | None = None) -> None:
        """Runs a packed problem on packed buffers; on Metal `stream` is STREAM_TORCH."""
        threads = self._number_of_threads()
        if threads != self.threads:
            self.set_threads(threads)
        status = self.mfa_attention(self.context, problem, buffers, stream)
        if status:
            if status == _UNAVAILABLE and stream:
                status = self._attention_synchronized(problem, buffers)
            self.check(status)

    def _attention_synchronized(self, problem: bytes, buffers: bytes) -> int:
        """Runs where the host's stream cannot be used: waits for them and the results. Returns the status."""
        reason = self.last_error()
        status = self.mfa_problem_supported(self.context, problem)
        if status:
            return status  # the device itself is not available
        self._wait(reason)
        return self.mfa_attention(self.context, problem, buffers, None)

    def check_supported(self, problem: bytes) -> None:
        """Raises why a packed problem could not be planned."""
        self.check(self.mfa_problem_supported(self.context, problem))

    def waits(self, problem: bytes) -> str:
        """Why a packed problem for Metal has to wait for PyTorch's stream; "" if it does not."""
        nothing = dict.fromkeys(("batch", "mask", "varlen_q", "varlen_kv", "cache_batch_idx"), 0)
        nothing |= dict.fromkeys(("total_q", "total_kv", "kv_batch", "page_size"), 0)
        empty = changed(problem, **nothing)  # nothing runs, and no tensor has elements
        status = self.mfa_attention(self.context, empty, _NO_BUFFERS, STREAM_TORCH)
        return self.last_error() if status == _UNAVAILABLE else ""

    def precompile(self, problem: bytes, folder: str | os.PathLike[str] | None, compiler: Any) -> None:
        """Compiles the kernel of a packed problem into `folder` (None: the cache). `compiler`: a COMPILER, or None."""
        path = None if folder is None else os.fsencode(folder)
        self.check(self.mfa_precompile(self.context, problem, path, compiler or COMPILER(), None))

    def instruction_sets(self) -> list[str]:
        """The instruction sets of this CPU for which libmfa has kernels, the most basic first."""
        names = itertools.takewhile(bool, map(self.mfa_isa_name, itertools.count()))
        return [name.decode() for name in names if self.mfa_isa_supported(name) == 0]

    def parse(self, line: str) -> bytes:
        """The packed problem of a line such as "forward f32 b1 h8 q512 kv512 d64"."""
        problem = ctypes.create_string_buffer(PROBLEM.size)
        self.check(self.mfa_problem_parse_sized(line.encode(errors="replace"), problem, PROBLEM.size))
        return problem.raw

    def dropout_mask(self, problem: bytes, seed: int, kept: int) -> None:
        """Writes which weights of a packed problem dropout keeps, a byte each. `seed`, `kept`: addresses."""
        self.check(self.mfa_problem_dropout_mask(problem, seed, kept))

    def quantize(
        self,
        kv_type: int,
        dtype: int,
        rows: int,
        columns: int,
        group: int,
        numbers: tuple[int, int],
        codes: tuple[int, int],
        scales: tuple[int, int],
    ) -> None:
        """Writes the codes and scales of rows of numbers. The last three are (address, elements between rows)."""
        self.check(self.mfa_kv_quantize(kv_type, dtype, rows, columns, group, *numbers, *codes, *scales))

    def plan(self, problem: bytes) -> tuple[str, int]:
        """The plan of a packed problem: (one line of text, workspace bytes)."""
        self.set_threads(self._number_of_threads())
        plan, line = ctypes.c_void_p(), ctypes.create_string_buffer(512)
        self.check(self.mfa_plan_create(self.context, problem, ctypes.addressof(plan)))
        try:
            self.check(self.mfa_plan_describe(plan, line, len(line)))
            return line.value.decode(), self.mfa_plan_workspace(plan)
        finally:
            self.mfa_plan_destroy(plan)


_library: Library | None = None
_host = Host()
_lock = new_lock(globals(), "_lock")
_forked = False


def library() -> Library:
    """The Library of this process, which the first call opens."""
    return _library or _open()


def _open() -> Library:
    global _library
    with _lock:
        if _library is None:
            _library = Library(_host, None if _forked else _host.parallel_for())
        return _library


def use_host(host: Host) -> None:
    """Makes this the host of the process's Library. One that was opened before stays valid for calls that use it."""
    global _host, _library
    with _lock:
        _host, _library = host, None


def _after_fork() -> None:
    # The parent's threads do not exist in the child, and OpenMP, on which PyTorch's pool is built, waits for them
    # forever. So the child makes a context of its own, with the library's own pool. The parent's context may have been
    # in use, so it is not destroyed.
    global _library, _forked
    _library, _forked = None, True


call_in_child(_after_fork)
