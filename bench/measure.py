"""Measures one attention problem: ours, PyTorch's default, its unfused math path, and other libraries.

Each problem has a fresh process of its own. There each contender runs once, for its peak memory; the results of ours
and of other libraries are compared with a reference in double; and only contenders with right results are timed, in
turn, with a probe of the machine's peak before and after each run of ours. Used by versus_torch.py, versus_peers.py,
relative.py and demo.py.
"""

import ctypes
import dataclasses
import datetime
import functools
import math
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mps_flash_attn import explain, flash_attention, reference
from mps_flash_attn.torch_host import library, torch_parallel_for
from peers import PEERS, Unsupported, fastest, versions_of_peers
from problems import DTYPES, Operands, Problem

CONTENDERS = ("ours", "torch", "math")
PROBE_MS = 4.0
MAX_ROUNDS = 25
SETTLE_SECONDS = 0.003  # the threads of the last contender still spin for a moment before they sleep
CHECK_FLOP = 4e9  # the budget for checking heads; at least one is checked
CANCELLED_UNITS = 8
PEER_SLACK = 8  # a factor on the tolerance of other libraries, which still detects wrong results
MATH_SCORES_BYTES = 1 << 30  # the math path materialises all scores several times: it is skipped beyond this


# --- Ours and PyTorch's --------------------------------------------------------------------------


def our_options(problem):
    band = {"window_size": problem.window} if problem.window else {"is_causal": problem.causal}
    return band | {"softcap": problem.softcap, "enable_gqa": problem.q_heads != problem.kv_heads}


def kernel(problem, operands):
    """The key of our kernel: of the backward pass, if there is one."""
    return explain(
        operands.q,
        operands.k,
        operands.v,
        attn_mask=operands.mask,
        backward=problem.passes != "forward",
        **our_options(problem),
    ).kernel


def attend(contender, problem, operands):
    """Computes O by ours or one of PyTorch's."""
    q, k, v = operands.q, operands.k, operands.v
    if contender == "ours":
        return flash_attention(q, k, v, attn_mask=operands.mask, **our_options(problem))
    causal = problem.causal and operands.torch_mask is None
    gqa = problem.q_heads != problem.kv_heads
    options = {"attn_mask": operands.torch_mask, "is_causal": causal, "enable_gqa": gqa}
    if contender == "torch":
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **options)


class Call:
    """One contender at one problem: run() is measured, prepare() is not."""

    def __init__(self, contender, problem, operands):
        self.contender, self.problem, self.operands = contender, problem, operands
        self.o = None

    def prepare(self):
        needs_grad = self.problem.passes != "forward"
        for tensor in (self.operands.q, self.operands.k, self.operands.v):
            tensor.requires_grad_(needs_grad)
        if self.problem.passes == "backward" and self.o is None:
            self.o = attend(self.contender, self.problem, self.operands)

    def run(self):
        """The results: O, or dQ dK dV, or all four."""
        if self.problem.passes == "forward":
            return (attend(self.contender, self.problem, self.operands),)
        o = self.o if self.problem.passes == "backward" else attend(self.contender, self.problem, self.operands)
        inputs = (self.operands.q, self.operands.k, self.operands.v)
        again = self.problem.passes == "backward"
        gradients = torch.autograd.grad(o, inputs, self.operands.d_o, retain_graph=again)
        return gradients if again else (o.detach(), *gradients)

    def results(self, ran):
        return ran

    def drop_graph(self):
        """Frees the graph of backward; prepare() makes a new one."""
        self.o = None


# --- The reference -------------------------------------------------------------------------------


def reference_of(problem, operands, dtype, chunk=256):
    """The results of one part by the tests' reference, a chunk of queries at a time."""
    q, k, v = (t.detach().to(dtype) for t in (operands.q, operands.k, operands.v))
    backward = problem.passes != "forward"
    k, v = k.clone().requires_grad_(backward), v.clone().requires_grad_(backward)
    o, dq = [], []
    for begin in range(0, problem.q_len, chunk):
        rows = slice(begin, begin + chunk)
        mask = operands.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, rows]
        lower, upper = (None if side is None else side + begin for side in (problem.lower, problem.upper))
        q_rows = q[:, :, rows].clone().requires_grad_(backward)
        o_rows, _ = reference.attention(q_rows, k, v, mask, lower=lower, upper=upper, softcap=problem.softcap)
        o.append(o_rows.detach())
        if backward:
            o_rows.backward(operands.d_o[:, :, rows].to(dtype))
            dq.append(q_rows.grad)
    gradients = (torch.cat(dq, 2), k.grad, v.grad) if backward else ()
    return gradients if problem.passes == "backward" else (torch.cat(o, 2), *gradients)


def error(given, true):
    """Largest difference, relative to the largest element; infinite where a NaN is."""
    worst = (given.double() - true.double()).abs().max().item() / (true.abs().max().item() or 1.0)
    return math.inf if math.isnan(worst) else worst


def check(problem, operands, given):
    """{contender: an error message} for {contender: its results}. The tolerance, relative to the largest element, is
    twice the error of the naive computation in the same dtype, plus two units in the last place, plus the rounding
    error of a sum of n terms in f32, about sqrt(n) units, and some more for cancellation in gradients. It is coarser
    than that of the tests, and detects plainly wrong results."""
    group = problem.q_heads // problem.kv_heads
    heads = problem.batch * problem.kv_heads
    affordable = int(CHECK_FLOP // max(1, problem.flop() // heads))
    count = min(heads, max(1, affordable))
    chosen = [n * (heads - 1) // max(1, count - 1) for n in range(count)]  # the first and the last among them
    names = {"forward": ("O",), "backward": ("dQ", "dK", "dV")}.get(problem.passes, ("O", "dQ", "dK", "dV"))
    dtype, wrong = DTYPES[problem.dtype], {}
    for head in chosen:
        batch, kv_head = divmod(head, problem.kv_heads)
        part = operands.part(problem, batch, kv_head)
        truth, naive = reference_of(problem, part, torch.float64), None
        for n, (name, true) in enumerate(zip(names, truth, strict=True)):
            first = kv_head if name in ("dK", "dV") else kv_head * group
            terms = group * problem.q_len if name in ("dK", "dV") else problem.kv_len
            sums = torch.promote_types(dtype, torch.float32)
            rounding = 2 * torch.finfo(dtype).eps + (CANCELLED_UNITS + math.sqrt(terms)) * torch.finfo(sums).eps
            for contender, results in given.items():
                found = error(results[n][batch : batch + 1, first : first + true.shape[1]], true)
                if found <= rounding:
                    continue
                naive = naive or reference_of(problem, part, dtype)
                allowed = (2 * error(naive[n], true) + rounding) * (PEER_SLACK if contender in PEERS else 1)
                if not found <= allowed:
                    place = f"batch {batch}, KV head {kv_head}"
                    wrong[contender] = f"{name} of {place} is off by {found:.1e}; allowed is {allowed:.1e}"
    return wrong


# --- The machine ---------------------------------------------------------------------------------


def peak_library():
    """The library of bench/peak.c: at MFA_PEAK_LIBRARY, or beside the libmfa that MFA_LIBRARY names."""
    place = os.environ.get("MFA_PEAK_LIBRARY")
    if not place:
        folder = pathlib.Path(os.environ.get("MFA_LIBRARY", "")).parent
        place = next((str(p) for p in folder.glob("libmfa_peak.*")), None)
    if not place:
        raise RuntimeError("the peak probe was not found; build mfa_peak and set MFA_PEAK_LIBRARY to its file")
    library = ctypes.CDLL(place)
    library.mfa_peak_gflops.restype = library.mfa_peak_read_gbytes.restype = ctypes.c_double
    library.mfa_peak_gflops.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_double)
    library.mfa_peak_tiles_gflops.restype = ctypes.c_double
    library.mfa_peak_tiles_gflops.argtypes = (ctypes.c_int, ctypes.c_double)
    library.mfa_peak_bf16_gflops.restype = ctypes.c_double
    library.mfa_peak_bf16_gflops.argtypes = (ctypes.c_int, ctypes.c_double)
    library.mfa_peak_read_gbytes.argtypes = (*(ctypes.c_void_p, ctypes.c_size_t) * 2, ctypes.c_int)
    return library


def vector_bits(library):
    """Of the instruction set in use: MFA_ISA where set, else this machine's widest."""
    narrow = {"scalar": 128, "neon": 128, "neonbf16": 128, "avx2": 256}
    return narrow.get(os.environ.get("MFA_ISA"), library.mfa_peak_vector_bits())


def processor(device="cpu"):
    """One line: the processor and the vectors probed; or that it is its GPU."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    return f"{name}, its GPU" if device == "mps" else f"{name}, {vector_bits(peak_library())}-bit vectors"


def machine(device="cpu"):
    """The processor, and the threads used."""
    return processor(device) if device == "mps" else f"{processor()}, {torch.get_num_threads()} threads"


def versions():
    return f"libmfa {library().version}, torch {torch.__version__}, Python {platform.python_version()}"


def settle(device):
    """Waits until a GPU has finished all commands."""
    if device == "mps":
        torch.mps.synchronize()


class DeviceMemory:
    """Peak GPU memory of this process since begin(), beyond what it had then. PyTorch caches what was freed, so the
    amount at the end is the peak."""

    def begin(self):
        settle("mps")
        torch.mps.empty_cache()
        self.before = torch.mps.driver_allocated_memory()

    def extra(self, results):
        settle("mps")
        return max(0, torch.mps.driver_allocated_memory() - self.before - sum(t.nbytes for t in results))


class Memory:
    """Peak resident memory of this process since begin(), beyond what it had then; counted by Linux only."""

    def __init__(self):
        self.known = os.access("/proc/self/clear_refs", os.W_OK)
        libc = ctypes.CDLL(None)
        self.trim = getattr(libc, "malloc_trim", None)

    @staticmethod
    def status(field):
        return 1024 * int(re.search(field + r":\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])

    def begin(self):
        if self.known:
            if self.trim:
                self.trim(0)  # pages that are free but resident would be reused without being counted
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            self.before = self.status("VmRSS")

    def extra(self, results):
        """Without the results themselves, which count as operands; None where the system does not count."""
        if not self.known:
            return None
        return max(0, self.status("VmHWM") - self.before - sum(t.nbytes for t in results))


# --- Measuring -----------------------------------------------------------------------------------


def timed(call, repeats, device):
    settle(device)
    time.sleep(SETTLE_SECONDS)
    begin = time.perf_counter()
    for _ in range(repeats):
        call.run()
    settle(device)
    return (time.perf_counter() - begin) / repeats


@dataclasses.dataclass
class Entry:
    """A contender after its first run."""

    call: object
    seconds: float
    extra_bytes: int | None = None
    results: tuple = ()


def first_run(contender, problem, operands, memory):
    """The entry of ours or one of PyTorch's. Ours has to be the first contender, so that what it keeps for later calls
    (workspace, threads) is counted."""
    warm = Problem.parse(f"{problem.passes} {problem.dtype} b1 h1 q16 kv16 d{problem.head_dim}v{problem.value_dim}")
    device = operands.q.device.type
    small = Call(contender, warm, Operands.make(warm, 0).to(device))
    small.prepare()
    small.run()
    call = Call(contender, problem, operands)
    call.prepare()
    memory.begin()
    begin = time.perf_counter()
    results = call.run()
    settle(device)
    seconds = time.perf_counter() - begin
    entry = Entry(call, seconds, memory.extra(results), results if contender == "ours" else ())
    call.drop_graph()
    return entry


def enter(problem, operands, contenders):
    """({contender: its entry}, {contender: why it has none})"""
    memory = DeviceMemory() if operands.q.device.type == "mps" else Memory()
    entries, absent = {}, {}
    for contender in contenders:
        try:
            if contender in PEERS:
                call, seconds, results = fastest(contender, problem, operands, torch.get_num_threads())
                entries[contender] = Entry(call, seconds, results=results)
            else:
                entries[contender] = first_run(contender, problem, operands, memory)
        except Unsupported as error:
            absent[contender] = str(error)
    return entries, absent


@dataclasses.dataclass
class Bound:
    """A possible bound of a problem: its work in 10^9 operations or bytes, and a probe of how much of that the machine
    does in a second."""

    field: str
    work: float
    probe: object


def bounds_of(problem, kernel, operands):
    """The arithmetic that the kernel uses; and for decode steps, which read K and V only once, a read of the same bytes
    by as many threads: from the caches as far as these hold them."""
    library, threads = peak_library(), torch.get_num_threads()
    if kernel.endswith("amxbf16"):
        arithmetic = functools.partial(library.mfa_peak_tiles_gflops, threads, PROBE_MS)
    elif kernel.endswith("bf16"):
        arithmetic = functools.partial(library.mfa_peak_bf16_gflops, threads, PROBE_MS)
    else:
        arithmetic = functools.partial(library.mfa_peak_gflops, threads, vector_bits(library), PROBE_MS)
    bounds = [Bound("peak", 1e-9 * problem.flop(), arithmetic)]
    if problem.reads_memory:
        k, v = operands.k, operands.v

        def read():
            return library.mfa_peak_read_gbytes(k.data_ptr(), k.nbytes, v.data_ptr(), v.nbytes, threads)

        bounds.append(Bound("read", 1e-9 * problem.bytes_read(), read))
    return bounds


def probe(bounds):
    """{field: rate}, now."""
    time.sleep(SETTLE_SECONDS)
    return {bound.field: bound.probe() for bound in bounds}


def rounds(entries, bounds, budget, device):
    """Times the contenders in turn: {contender: [seconds]}; and for runs of ours [(probe before, probe after)]. A
    contender that has used its share of the budget is skipped; if it never had a turn, its first run counts."""
    share = budget / len(entries)
    for entry in entries.values():
        entry.call.prepare()
    # The cost of a run. The first run of a small problem was mostly start-up, so it is repeated.
    cost = {c: timed(e.call, 1, device) if e.seconds <= share else e.seconds for c, e in entries.items()}
    repeats = {contender: max(1, math.ceil(0.01 / cost[contender])) for contender in entries}
    taken, peaks = {contender: [] for contender in entries}, []
    used = dict.fromkeys(entries, 0.0)

    def playing(contender):
        within = used[contender] + cost[contender] * repeats[contender] <= share
        return len(taken[contender]) < MAX_ROUNDS and (within or (contender == "ours" and not taken["ours"]))

    while players := [contender for contender in entries if playing(contender)]:
        for contender in players:
            probed = bounds and contender == "ours"
            before = probe(bounds) if probed else {}
            taken[contender].append(timed(entries[contender].call, repeats[contender], device))
            if probed:
                peaks.append((before, probe(bounds)))
            used[contender] += taken[contender][-1] * repeats[contender]
    return {contender: taken[contender] or [cost[contender]] for contender in entries}, peaks


def shares(bounds, seconds, peaks):
    """For each bound: the share that ours reached, the rate of the probe, and the difference of its two readings."""
    row = {}
    for bound in bounds:
        rates = [(before[bound.field], after[bound.field]) for before, after in peaks]
        share = statistics.median(bound.work / taken / max(rate) for taken, rate in zip(seconds, rates, strict=True))
        row[f"share_of_{bound.field}"] = share
        row[f"{bound.field}_rate"] = statistics.median(max(rate) for rate in rates)
        row[f"{bound.field}_spread"] = statistics.median(1 - min(rate) / max(rate) for rate in rates)
    return row


def measure_here(problem, budget, seed, device, contenders):
    """The row of one problem; see measure()."""
    scores = problem.batch * problem.q_heads * problem.q_len * problem.kv_len * DTYPES[problem.dtype].itemsize
    contenders = [c for c in contenders if c != "math" or scores <= MATH_SCORES_BYTES]
    operands = Operands.make(problem, seed).to(device)
    entries, absent = enter(problem, operands, contenders)
    given = {contender: [one.cpu() for one in entry.results] for contender, entry in entries.items() if entry.results}
    absent |= check(problem, operands.to("cpu"), given)
    del given
    row = {f"{contender}_extra_bytes": entry.extra_bytes for contender, entry in entries.items()}
    row["kernel"] = kernel(problem, operands)
    if "ours" in absent:
        return row | {"failed": absent["ours"]}
    entries = {contender: entry for contender, entry in entries.items() if contender not in absent}
    for entry in entries.values():
        entry.results = ()
    bounds = bounds_of(problem, row["kernel"], operands) if device == "cpu" else []
    taken, peaks = rounds(entries, bounds, budget, device)
    median = {contender: statistics.median(seconds) for contender, seconds in taken.items()}
    for contender, seconds in median.items():
        row[f"{contender}_ms"] = 1e3 * seconds
        row[f"{contender}_runs"] = len(taken[contender])
        row[f"ratio_{contender}"] = seconds / median["ours"]
    row["absent"] = absent
    peers = [contender for contender in entries if contender in PEERS]
    row["implementations"] = {peer: type(entries[peer].call).__name__ for peer in peers}
    row["gflops"] = 1e-9 * problem.flop() / median["ours"]
    return row | shares(bounds, taken["ours"], peaks)


# --- A process for each problem ------------------------------------------------------------------


def serve(pipe, threads, function, arguments):
    torch.set_num_threads(threads)
    try:
        if torch_parallel_for() and not library().host:
            raise RuntimeError("libmfa does not use PyTorch's threads in this process, as it does in usual ones")
        pipe.send(function(*arguments))
    except Exception as exception:  # the parent goes on with the next problem
        pipe.send({"failed": f"{type(exception).__name__}: {exception}"})


def in_process(function, *arguments, threads=None, device="cpu"):
    """The dictionary that the function returns in a fresh process; one with "failed" says what went wrong."""
    processes = multiprocessing.get_context("spawn" if device == "mps" else "forkserver")  # Metal does not outlive fork
    if device == "cpu":
        processes.set_forkserver_preload(["torch"])  # slow to import; ours would not use PyTorch's threads after a fork
    ours, theirs = processes.Pipe(duplex=False)
    threads = threads or torch.get_num_threads()
    process = processes.Process(target=serve, args=(theirs, threads, function, arguments))
    process.start()
    theirs.close()
    try:
        row = ours.recv()
    except EOFError:
        process.join()
        row = {"failed": f"the process ended with code {process.exitcode}"}
    process.join()
    return row


def circumstances(seed, device="cpu", threads=None):
    """The circumstances of a run that its rows name."""
    return {
        "threads": threads or torch.get_num_threads(),
        "seed": seed,
        "date": datetime.date.today().isoformat(),
        "machine": processor(device),
        "versions": versions(),
    }


def measure(text, budget=3.0, seed=1, device="cpu", contenders=CONTENDERS, threads=None):
    """The row of one problem, measured in a process of its own for about `budget` seconds beyond the first runs.
    A row with "failed" says what went wrong, and then has no times."""
    problem = Problem.parse(text)
    arguments = problem, budget, seed, device, contenders
    row = in_process(measure_here, *arguments, threads=threads, device=device)
    about = {"problem": text, "pass": problem.passes, "dtype": problem.dtype}
    about |= circumstances(seed, device, threads)
    if any(contender in PEERS for contender in contenders):
        about["versions"] += f", {versions_of_peers()}"
    return about | row
