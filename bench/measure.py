"""How one attention problem is measured: ours, PyTorch's as it comes and PyTorch's unfused math path.

Each problem has a fresh process of its own. There each of the three runs once, for its peak memory; what ours
gave is compared with a reference in double; and only if it is right, the three are timed in turn, a probe of the
machine's peak before and after each run of ours. Used by versus_torch.py and demo.py.
"""

import ctypes
import dataclasses
import datetime
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
from mps_flash_attn import explain, flash_attention, reference
from mps_flash_attn.library import library
from torch.nn.attention import SDPBackend, sdpa_kernel

CONTENDERS = ("ours", "torch", "math")
PASSES = ("forward", "backward", "forward+backward")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
PROBE_MS = 4.0
MOST_ROUNDS = 25
SETTLE_SECONDS = 0.003  # the pool of the last contender still spins a little; let it go to sleep
CHECK_FLOP = 1e10  # as many heads are checked as this pays for, at least one
MATH_SCORES_BYTES = 1 << 30  # the math path holds all scores, several times over: beyond this it is left out


# --- Problems ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """One line of the project's problem grammar (docs/abi.md), as far as these benchmarks need it; the pass may
    also be forward+backward. mask_bool hides the last quarter of the keys, as padding does; mask_f32 and so on
    is a bias of its own for each head."""

    text: str
    passes: str
    dtype: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    lower: int | None  # None: open
    upper: int | None
    mask: str | None

    GRAMMAR = re.compile(
        r"(?P<passes>\S+) (?P<dtype>\w+) b(?P<batch>\d+) h(?P<q_heads>\d+)(/(?P<kv_heads>\d+))? q(?P<q_len>\d+) "
        r"kv(?P<kv_len>\d+) d(?P<head_dim>\d+)(v(?P<value_dim>\d+))?(?P<causal> causal)?( lower(?P<lower>-?\d+))?"
        r"( upper(?P<upper>-?\d+))?( mask_(?P<mask>\w+))?"
    )

    @classmethod
    def parse(cls, text):
        found = cls.GRAMMAR.fullmatch(text)
        if not found:
            raise ValueError(f'"{text}" is no problem; one is "forward f32 b1 h8/2 q2048 kv2048 d64 causal"')
        given = found.groupdict()
        number = {name: int(given[name]) for name in ("batch", "q_heads", "q_len", "kv_len", "head_dim")}
        problem = cls(
            text=text,
            passes=given["passes"],
            dtype=given["dtype"],
            kv_heads=int(given["kv_heads"] or number["q_heads"]),
            value_dim=int(given["value_dim"] or number["head_dim"]),
            lower=int(given["lower"]) if given["lower"] else None,
            upper=0 if given["causal"] else int(given["upper"]) if given["upper"] else None,
            mask=given["mask"],
            **number,
        )
        if problem.passes not in PASSES:
            raise ValueError(f'the pass is "{problem.passes}"; it is one of {", ".join(PASSES)}')
        if problem.dtype not in DTYPES or problem.mask not in (None, "bool", *DTYPES):
            raise ValueError(f'"{text}" names no dtype; one is {", ".join(DTYPES)}, and a mask may also be bool')
        if problem.window and problem.q_len != problem.kv_len:
            raise ValueError(f'"{text}" has a window and q_len differs from kv_len; windows need equal ones here')
        return problem

    @property
    def window(self):
        """(left, right) as flash_attention takes it, -1 for an open side; None if the band is open or causal."""
        if self.lower is None and self.upper in (None, 0):
            return None
        return (-1 if self.lower is None else -self.lower, -1 if self.upper is None else self.upper)

    @property
    def causal(self):
        return self.lower is None and self.upper == 0

    def band(self, rows):
        """True where key j is in the band of query i, for the queries in `rows`."""
        distance = torch.arange(self.kv_len) - torch.arange(rows.start, rows.stop)[:, None]
        inside = torch.ones_like(distance, dtype=torch.bool)
        if self.lower is not None:
            inside &= distance >= self.lower
        if self.upper is not None:
            inside &= distance <= self.upper
        return inside

    @property
    def keys(self):
        """How many keys a bool mask leaves: all but the padding."""
        return self.kv_len - self.kv_len // 4 if self.mask == "bool" else self.kv_len

    def pairs(self):
        """Visible (query, key) pairs of one head."""
        query = torch.arange(self.q_len)
        first = (query + self.lower).clamp(0, self.keys) if self.lower is not None else torch.zeros_like(query)
        last = torch.full_like(query, self.keys)
        if self.upper is not None:
            last = (query + self.upper + 1).clamp(0, self.keys)
        return int((last - first).clamp(min=0).sum())

    def flop(self):
        """Useful operations: what is hidden counts for nothing, what is computed again neither."""
        forward, backward = 2 * (self.head_dim + self.value_dim), 6 * self.head_dim + 4 * self.value_dim
        per_pair = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[self.passes]
        return self.batch * self.q_heads * self.pairs() * per_pair


@dataclasses.dataclass
class Operands:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_o: torch.Tensor | None
    mask: torch.Tensor | None
    torch_mask: torch.Tensor | None  # the mask that PyTorch needs: it has no windows, and no causal masks

    def to(self, device):
        tensors = (self.q, self.k, self.v, self.d_o, self.mask, self.torch_mask)
        return Operands(*(None if tensor is None else tensor.detach().to(device) for tensor in tensors))

    @classmethod
    def make(cls, problem, seed):
        generator = torch.Generator().manual_seed(seed)

        def tensor(dtype, *shape):
            return torch.randn(shape, generator=generator).to(DTYPES[dtype])

        queries = (problem.batch, problem.q_heads, problem.q_len)
        keys = (problem.batch, problem.kv_heads, problem.kv_len)
        q = tensor(problem.dtype, *queries, problem.head_dim)
        k = tensor(problem.dtype, *keys, problem.head_dim)
        v = tensor(problem.dtype, *keys, problem.value_dim)
        d_o = tensor(problem.dtype, *queries, problem.value_dim) if problem.passes != "forward" else None
        band = problem.band(range(problem.q_len)) if problem.window or (problem.causal and problem.mask) else None
        mask, torch_mask = None, band
        if problem.mask == "bool":
            mask = (torch.arange(problem.kv_len) < problem.keys).expand(problem.batch, 1, 1, -1)
            torch_mask = mask if band is None else mask & band
        elif problem.mask:
            mask = tensor(problem.mask, 1, problem.q_heads, problem.q_len, problem.kv_len)
            torch_mask = mask if band is None else mask.masked_fill(~band, -math.inf)
        return cls(q, k, v, d_o, mask, torch_mask)

    def part(self, problem, batch, kv_head):
        """The operands of one KV head and of the query heads that use it: a problem of its own."""
        group = problem.q_heads // problem.kv_heads
        one, keys = slice(batch, batch + 1), slice(kv_head, kv_head + 1)
        heads = slice(kv_head * group, (kv_head + 1) * group)

        def of_mask(mask):
            if mask is None or mask.dim() < 4:
                return mask
            return mask.expand(problem.batch, problem.q_heads, -1, -1)[one, heads]

        d_o = None if self.d_o is None else self.d_o[one, heads]
        q, k, v = (t.detach() for t in (self.q[one, heads], self.k[one, keys], self.v[one, keys]))
        return Operands(q, k, v, d_o, of_mask(self.mask), of_mask(self.torch_mask))


# --- The three contenders ------------------------------------------------------------------------


def band_options(problem):
    return {"window_size": problem.window} if problem.window else {"is_causal": problem.causal}


def kernel(problem, operands):
    """The key of our kernel: of the backward pass, where there is one."""
    return explain(
        operands.q,
        operands.k,
        operands.v,
        attn_mask=operands.mask,
        enable_gqa=problem.q_heads != problem.kv_heads,
        backward=problem.passes != "forward",
        **band_options(problem),
    ).kernel


def attend(contender, problem, operands):
    """O, by one of the contenders."""
    q, k, v = operands.q, operands.k, operands.v
    gqa = q.shape[1] != k.shape[1]
    if contender == "ours":
        return flash_attention(q, k, v, attn_mask=operands.mask, enable_gqa=gqa, **band_options(problem))
    causal = problem.causal and operands.torch_mask is None
    options = {"attn_mask": operands.torch_mask, "is_causal": causal, "enable_gqa": gqa}
    if contender == "torch":
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **options)


class Call:
    """One contender at one problem: prepare() what is not measured, run() what is."""

    def __init__(self, contender, problem, operands):
        self.contender, self.problem, self.operands = contender, problem, operands
        self.o = None

    def prepare(self):
        wanted = self.problem.passes != "forward"
        for tensor in (self.operands.q, self.operands.k, self.operands.v):
            tensor.requires_grad_(wanted)
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


# --- The reference -------------------------------------------------------------------------------


def truth_of(problem, operands, chunk=256):
    """The results of one part by the tests' reference, in double, a chunk of queries at a time."""
    q, k, v = (t.double() for t in (operands.q, operands.k, operands.v))
    backward = problem.passes != "forward"
    for tensor in (k, v):
        tensor.requires_grad_(backward)
    o, dq = [], []
    for begin in range(0, problem.q_len, chunk):
        rows = slice(begin, begin + chunk)
        mask = operands.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, rows]
        lower, upper = (None if side is None else side + begin for side in (problem.lower, problem.upper))
        q_rows = q[:, :, rows].clone().requires_grad_(backward)
        o_rows, _ = reference.attention(q_rows, k, v, mask, lower=lower, upper=upper)
        o.append(o_rows.detach())
        if backward:
            o_rows.backward(operands.d_o[:, :, rows].double())
            dq.append(q_rows.grad)
    gradients = (torch.cat(dq, 2), k.grad, v.grad) if backward else ()
    return gradients if problem.passes == "backward" else (torch.cat(o, 2), *gradients)


def error(given, true):
    """Largest difference, relative to the largest element; infinite where a NaN is."""
    worst = (given.double() - true).abs().max().item() / (true.abs().max().item() or 1.0)
    return math.inf if math.isnan(worst) else worst


def check(problem, operands, results):
    """What is wrong with our results, or None. Allowed, relative to the largest element: twice the error of the naive
    computation in the same dtype, here PyTorch's math path; two units in the last place; and what the roundings of a
    sum of n terms in f32 come to, about sqrt(n) units. The tests are stricter; this finds what is plainly wrong."""
    group = problem.q_heads // problem.kv_heads
    heads = problem.batch * problem.kv_heads
    affordable = int(CHECK_FLOP // max(1, problem.flop() // heads))
    count = min(heads, max(1, affordable))
    chosen = [n * (heads - 1) // max(1, count - 1) for n in range(count)]  # the first and the last among them
    names = {1: ("O",), 3: ("dQ", "dK", "dV"), 4: ("O", "dQ", "dK", "dV")}[len(results)]
    for head in chosen:
        batch, kv_head = divmod(head, problem.kv_heads)
        part = operands.part(problem, batch, kv_head)
        truth = truth_of(problem, part)
        call = Call("math", problem, part)
        call.prepare()
        for name, ours, naive, true in zip(names, results, call.run(), truth):
            first = kv_head if name in ("dK", "dV") else kv_head * group
            ours = ours[batch : batch + 1, first : first + true.shape[1]]
            terms = group * problem.q_len if name in ("dK", "dV") else problem.kv_len
            sums = torch.promote_types(ours.dtype, torch.float32)
            rounding = 2 * torch.finfo(ours.dtype).eps + math.sqrt(terms) * torch.finfo(sums).eps
            allowed = 2 * error(naive, true) + rounding
            found = error(ours, true)
            if not found <= allowed:
                return f"{name} of batch {batch}, KV head {kv_head} is off by {found:.1e}; allowed is {allowed:.1e}"
    return None


# --- The machine ---------------------------------------------------------------------------------


def peak_library():
    """bench/peak.c, built: at MFA_PEAK_LIBRARY, or beside the libmfa that MFA_LIBRARY names."""
    place = os.environ.get("MFA_PEAK_LIBRARY")
    if not place:
        folder = pathlib.Path(os.environ.get("MFA_LIBRARY", "")).parent
        place = next((str(p) for p in folder.glob("libmfa_peak.*")), None)
    if not place:
        raise RuntimeError("the peak probe was not found; build mfa_peak and set MFA_PEAK_LIBRARY to its file")
    library = ctypes.CDLL(place)
    library.mfa_peak_gflops.restype = library.mfa_peak_read_gbytes.restype = ctypes.c_double
    library.mfa_peak_gflops.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_double)
    library.mfa_peak_bf16_gflops.restype = ctypes.c_double
    library.mfa_peak_bf16_gflops.argtypes = (ctypes.c_int, ctypes.c_double)
    library.mfa_peak_read_gbytes.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_double)
    return library


def vector_bits(library):
    """Of the instruction set in use: MFA_ISA where set, else this machine's widest."""
    narrow = {"scalar": 128, "neon": 128, "neonbf16": 128, "avx2": 256}
    return narrow.get(os.environ.get("MFA_ISA"), library.mfa_peak_vector_bits())


def machine(device="cpu"):
    """One line: the processor, the vectors probed, the threads used; or that it is its GPU."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    if device == "mps":
        return f"{name}, its GPU"
    return f"{name}, {vector_bits(peak_library())}-bit vectors, {torch.get_num_threads()} threads"


def versions():
    return f"libmfa {library().version}, torch {torch.__version__}, Python {platform.python_version()}"


def settle(device):
    """Waits until all that was asked of a GPU is done."""
    if device == "mps":
        torch.mps.synchronize()


class DeviceMemory:
    """The most memory that a GPU had lent to this process since begin(), beyond what it had then: PyTorch keeps what
    was freed, so it is what there is at the end."""

    def begin(self):
        settle("mps")
        torch.mps.empty_cache()
        self.before = torch.mps.driver_allocated_memory()

    def extra(self, results):
        settle("mps")
        return max(0, torch.mps.driver_allocated_memory() - self.before - sum(t.nbytes for t in results))


class Memory:
    """The most memory that this process had resident since begin(), beyond what it had then. Linux counts it."""

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
                self.trim(0)  # freed but resident pages would hide as much of what comes
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            self.before = self.status("VmRSS")

    def extra(self, results):
        """Less the results themselves, which are operands too; None where the system does not count."""
        if not self.known:
            return None
        return max(0, self.status("VmHWM") - self.before - sum(t.nbytes for t in results))


# --- Measuring -----------------------------------------------------------------------------------


def timed(call, repeats):
    device = call.operands.q.device.type
    settle(device)
    time.sleep(SETTLE_SECONDS)
    begin = time.perf_counter()
    for _ in range(repeats):
        call.run()
    settle(device)
    return (time.perf_counter() - begin) / repeats


def first_runs(problem, operands, contenders):
    """Runs each contender once: {contender: seconds}, {contender: extra bytes}, our results. Ours is the first,
    so that what it keeps for later calls (workspace, threads) is counted."""
    warm = Problem.parse(f"{problem.passes} {problem.dtype} b1 h1 q16 kv16 d{problem.head_dim}v{problem.value_dim}")
    device = operands.q.device.type
    memory, seconds, extra, ours = DeviceMemory() if device == "mps" else Memory(), {}, {}, None
    for contender in contenders:
        small = Call(contender, warm, Operands.make(warm, 0).to(device))
        small.prepare()
        small.run()
        call = Call(contender, problem, operands)
        call.prepare()
        memory.begin()
        begin = time.perf_counter()
        results = call.run()
        settle(device)
        seconds[contender] = time.perf_counter() - begin
        extra[contender] = memory.extra(results)
        if contender == "ours":
            ours = results
        del results, call
    return seconds, extra, ours


class Probe:
    """What bounds the problem, measured now: 10^9 operations a second, or for a single query, which reads K and V
    but once, 10^9 bytes a second. A kernel that multiplies pairs of bf16 is set beside a probe that does so, too."""

    def __init__(self, problem, kernel):
        self.library, self.threads = peak_library(), torch.get_num_threads()
        self.bits, self.is_bf16 = vector_bits(self.library), kernel.endswith("bf16")
        self.memory = torch.ones(1 << 28, dtype=torch.uint8) if problem.q_len == 1 else None
        element = DTYPES[problem.dtype].itemsize
        columns = problem.head_dim + problem.value_dim
        read = problem.batch * problem.kv_heads * problem.keys * columns * element
        self.work = 1e-9 * (problem.flop() if self.memory is None else read)

    def __call__(self):
        time.sleep(SETTLE_SECONDS)
        if self.memory is None and self.is_bf16:
            return self.library.mfa_peak_bf16_gflops(self.threads, PROBE_MS)
        if self.memory is None:
            return self.library.mfa_peak_gflops(self.threads, self.bits, PROBE_MS)
        return self.library.mfa_peak_read_gbytes(
            self.memory.data_ptr(), self.memory.nbytes, self.threads, PROBE_MS
        )


def rounds(problem, kernel, operands, contenders, first, budget):
    """Times the contenders in turn: {contender: [seconds]}; beside those of ours [(probe before, probe after)]; the
    probe, None on a GPU. One that has used its share of the budget sits out; if it never had a turn, its first run
    counts."""
    probe, share = Probe(problem, kernel) if operands.q.device.type == "cpu" else None, budget / len(contenders)
    calls = {contender: Call(contender, problem, operands) for contender in contenders}
    for call in calls.values():
        call.prepare()
    # What a run costs: the first of something small was mostly starting up.
    cost = {c: timed(calls[c], 1) if first[c] <= share else first[c] for c in contenders}
    repeats = {contender: max(1, math.ceil(0.01 / cost[contender])) for contender in contenders}
    taken, peaks = {contender: [] for contender in contenders}, []
    used = dict.fromkeys(contenders, 0.0)

    def playing(contender):
        within = used[contender] + cost[contender] * repeats[contender] <= share
        return len(taken[contender]) < MOST_ROUNDS and (within or (contender == "ours" and not taken["ours"]))

    while players := [contender for contender in contenders if playing(contender)]:
        for contender in players:
            probed = probe and contender == "ours"
            before = probe() if probed else 0
            taken[contender].append(timed(calls[contender], repeats[contender]))
            if probed:
                peaks.append((before, probe()))
            used[contender] += taken[contender][-1] * repeats[contender]
    return {contender: taken[contender] or [cost[contender]] for contender in contenders}, peaks, probe


def measure_here(problem, budget, seed, device):
    """The row of one problem; see measure()."""
    scores = problem.batch * problem.q_heads * problem.q_len * problem.kv_len * DTYPES[problem.dtype].itemsize
    contenders = [c for c in CONTENDERS if c != "math" or scores <= MATH_SCORES_BYTES]
    operands = Operands.make(problem, seed).to(device)
    first, extra, results = first_runs(problem, operands, contenders)
    wrong = check(problem, operands.to("cpu"), [result.cpu() for result in results])
    del results
    row = {f"{contender}_extra_bytes": extra.get(contender) for contender in CONTENDERS}
    row["extra_bytes"] = extra["ours"]
    row["kernel"] = kernel(problem, operands)
    if wrong:
        return row | {"failed": wrong}
    taken, peaks, probe = rounds(problem, row["kernel"], operands, contenders, first, budget)
    median = {contender: statistics.median(seconds) for contender, seconds in taken.items()}
    for contender in CONTENDERS:
        row[f"{contender}_ms"] = 1e3 * median[contender] if contender in median else None
        row[f"{contender}_runs"] = len(taken.get(contender, ()))
    for other in ("torch", "math"):
        row[f"ratio_{other}"] = median[other] / median["ours"] if other in median else None
    row["gflops"] = 1e-9 * problem.flop() / median["ours"]
    if not probe:
        return row
    share = statistics.median(probe.work / seconds / max(peak) for seconds, peak in zip(taken["ours"], peaks))
    peak = statistics.median(max(peak) for peak in peaks)
    row |= {
        "share_of_peak": share if probe.memory is None else None,
        "peak_gflops": peak if probe.memory is None else None,
        "share_of_read": share if probe.memory is not None else None,
        "peak_spread": statistics.median(1 - min(peak) / max(peak) for peak in peaks),
        "read_gbytes": peak if probe.memory is not None else None,
    }
    return row


def serve(pipe, threads, *arguments):
    """The process of one problem."""
    torch.set_num_threads(threads)
    try:
        pipe.send(measure_here(*arguments))
    except Exception as exception:  # the parent goes on with the next problem
        pipe.send({"failed": f"{type(exception).__name__}: {exception}"})


def measure(text, budget=3.0, seed=1, device="cpu"):
    """The row of one problem, measured in a process of its own for about `budget` seconds beyond the first runs.
    A row with "failed" says what went wrong, and then has no times."""
    problem = Problem.parse(text)
    processes = multiprocessing.get_context("spawn" if device == "mps" else "forkserver")  # Metal does not outlive fork
    if device == "cpu":
        processes.set_forkserver_preload(["mps_flash_attn"])  # and torch: both take their time
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=serve, args=(theirs, torch.get_num_threads(), problem, budget, seed, device))
    process.start()
    theirs.close()
    try:
        row = ours.recv()
    except EOFError:
        process.join()
        row = {"failed": f"the process ended with code {process.exitcode}"}
    process.join()
    about = {
        "problem": text,
        "pass": problem.passes,
        "dtype": problem.dtype,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "versions": versions(),
    }
    return about | row
