"""Runs every suite of tests, shows what each prints, and ends with one line: N passed, N failed.

    tests/run.py [--build FOLDER] [--list] [SUITE ...]

Run it through `make test`, which installs what it needs. A suite is a function below: it builds something
and runs programs. A program's own count is taken from its output (cmocka's, pytest's, or a last line
"N passed, N failed"); a step without a count counts as one test. A program that crashes, hangs or prints
no count is a failure, whatever it had counted.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import itertools
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
EMULATOR = ("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu")  # where Debian has the libraries of arm64
EMULATED = {"max": ("scalar", "neon", "neonbf16"), "cortex-a76": ("scalar", "neon")}  # CPUs, and their sets
LIMIT = 1800  # seconds that one program may run


class Run:
    """Runs programs and keeps count."""

    def __init__(self, build):
        self.build = build
        self.counting = threading.Lock()
        self.passed = self.failed = 0
        self.failures = []
        self.suite = ""
        self.shipped = self.simulated = self.emulated = self.packed = None

    def count(self, what, passed, failed):
        with self.counting:
            self.passed += passed
            self.failed += failed
            if failed:
                self.failures.append(f"{self.suite}: {what}: {failed} failed")

    def step(self, *command, counts=False, **environment):
        """Runs one program; counts: it reports its tests itself. True if all went well."""
        words = [str(word) for word in command]
        settings = " ".join(f"{name}={value}" for name, value in environment.items())
        title = " ".join(filter(None, [settings, *words])).replace(str(ROOT) + os.sep, "")
        title = title if len(title) < 240 else title[:240] + " ..."
        print(f"\n--- {self.suite}: {title}", flush=True)
        began = time.monotonic()
        code, text = execute(words, environment)
        passed, failed = parse_counts(text) if counts else (0, 0)
        if code and not failed:
            print(f"--- killed by signal {-code}" if code < 0 else f"--- exit code {code}")
            failed += 1
        elif counts and not passed + failed:
            print("--- no count of tests in its output")
            failed += 1
        elif not counts:
            passed = 1
        print(f"--- {passed} passed, {failed} failed in {time.monotonic() - began:.1f} s", flush=True)
        self.count(title, passed, failed)
        return not failed

    def together(self, *commands):
        """Runs programs that count their tests on several CPUs at once."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: self.step(*command, counts=True), commands))

    def shards(self, *command):
        """The same for parts of the problems of one program."""
        cpus = min(os.cpu_count(), 16)
        self.together(*((*command, "--shard", f"{number}/{cpus}") for number in range(cpus)))

    def cmake(self, name, *options):
        """Configures and builds a folder of the test programs; None if that fails."""
        folder = self.build / name
        # A sanitizer or another compiler is no reason to accept a warning.
        options = ("-DMFA_TESTS=ON", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", *options)
        if self.step("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options) and self.step(
            "cmake", "--build", folder, "--", "-k", "0"
        ):
            return folder
        return None

    def release(self):
        """The build folder of the library as it is shipped, and its library; both None if that fails."""
        if not self.shipped:
            folder = self.cmake("test-release")
            self.shipped = (folder, next(folder.glob("libmfa.so.*.*.*"))) if folder else (None, None)
        return self.shipped

    def metal(self):
        """The build folder with metalsim and the Metal programs; None if that fails."""
        if not self.simulated:
            self.simulated = self.cmake("test-metal", "-DMFA_METALSIM=ON")
        return self.simulated

    def arm64(self):
        """The build folder for arm64 Linux, whose programs an emulator runs; None if that fails."""
        if not self.emulated:
            self.emulated = self.cmake(
                "test-arm64",
                "-DCMAKE_SYSTEM_NAME=Linux",
                "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
                "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
                "-DBUILD_SHARED_LIBS=OFF",
                "-DMFA_MACHO=ON",
            )
        return self.emulated

    def wheels(self):
        """The folder with the wheels for all platforms; None if that fails."""
        if not self.packed:
            folder = self.build / "test-wheels"
            shutil.rmtree(folder, ignore_errors=True)
            self.packed = folder if self.step(sys.executable, "tools/wheels.py", "--to", folder) else None
        return self.packed

    def isas(self, *program, has, **environment):
        """A machine's instruction sets are accepted, the best one by default, and all others are rejected."""
        self.step(*program, ", ".join(has), counts=True, **environment)

    def registers(self, folder, *options):
        """Checks the compiled inner loops of the CPU kernels: their sums stay in registers."""
        self.step(sys.executable, ROOT / "tools/check_registers.py", *options, folder, counts=True)

    def programs(self, folder, pattern="test_*", **environment):
        """Runs the cmocka programs of a build folder."""
        programs = [ROOT / path for path in sorted(ROOT.glob(f"tests/{pattern}.c"))]
        if not programs:
            self.count(f"no program tests/{pattern}.c", 0, 1)
        for program in programs:
            self.step(folder / program.stem, counts=True, **environment)


def execute(words, environment):
    """Runs a program, passing its output on as it comes. Returns its exit code and its output."""
    try:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that its children can be ended with it
        )
    except OSError as error:
        print(error)
        return 127, ""

    def end():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    clock = threading.Timer(LIMIT, end)
    clock.start()
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        return process.wait(), "".join(lines)
    finally:
        clock.cancel()
        end()


def parse_counts(text):
    """(passed, failed) as the program reported them; (0, 0) if it did not."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    own = re.findall(r"^(\d+) passed, (\d+) failed$", plain, re.MULTILINE)
    if own:
        return int(own[-1][0]), int(own[-1][1])
    summary = re.findall(r"^=+ (.*) in [\d.]+s\b.*=+$", plain, re.MULTILINE)
    if summary:
        words = {word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", summary[-1])}
        return words.get("passed", 0), words.get("failed", 0) + words.get("error", 0)
    passed = re.findall(r"^\[  PASSED  \] (\d+) test", plain, re.MULTILINE)
    failed = re.findall(r"^\[  FAILED  \] (\d+) test", plain, re.MULTILINE)
    return sum(map(int, passed)), sum(map(int, failed))


def machine_isas(library):
    """The instruction sets that this machine and the library both have."""
    mfa = ctypes.CDLL(str(library))
    mfa.mfa_isa_name.restype = ctypes.c_char_p
    names = itertools.takewhile(bool, map(mfa.mfa_isa_name, itertools.count()))
    found = [name.decode() for name in names if mfa.mfa_isa_supported(name) == 0]
    print(f"\n--- instruction sets of this machine: {' '.join(found) or 'none'}")
    return found


# --- The suites, in the order in which they run ---------------------------------------------------


def checks(run):
    """Includes, names, documents, style; and the tests of these checks."""
    for check in ("check_includes.py", "check_names.py", "check_docs.py"):
        run.step(sys.executable, ROOT / "tools" / check, counts=True)
    run.step("sh", ROOT / "tools/check_style.sh", counts=True)
    run.step(sys.executable, "-m", "pytest", "tests/tools", counts=True)


def docs(run):
    """The documentation builds without a warning, and without the library."""
    folder = run.build / "test-docs"
    options = ("-W", "--keep-going", "-n", "-q", "-E", "-d", folder / "doctrees")
    run.step(sys.executable, "-m", "sphinx", *options, "docs", folder)


def release(run):
    """The library as it is shipped: its exported symbols, and all tests on every instruction set of this machine."""
    folder, library = run.release()
    if not folder:
        return
    run.step(sys.executable, ROOT / "tools/check_names.py", "--library", library, counts=True)
    run.registers(folder)
    run.step(folder / "check_kernels", counts=True)
    found = machine_isas(library)
    run.isas(folder / "check_isa", has=found)
    for isa in found:
        own = ("--filter", " bf16 ") if isa.endswith("bf16") else ()  # the others' kernels are those of the set below
        run.programs(folder, MFA_ISA=isa)
        run.step(folder / "check_attention", "--isa", isa, *own, counts=True)
        run.step(folder / "check_attention", "--isa", isa, *own, "--random", "500", counts=True)


def header(run):
    """The public header by itself, as C11 and C++17, with two compilers; the program runs with the shipped library."""
    folder, library = run.release()
    if not folder:
        return
    strict = ("-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Iinclude")
    languages = (("gcc", "c", "c11"), ("clang-19", "c", "c11"), ("g++", "c++", "c++17"), ("clang-19", "c++", "c++17"))
    for compiler, language, standard in languages:
        program = run.build / f"test-header-{compiler}-{standard}"
        source = ("-x", language, f"-std={standard}", *strict, "tests/test_header.c")
        if run.step(compiler, *source, "-x", "none", library, f"-Wl,-rpath,{folder}", "-o", program):
            run.step(program, counts=True)


def plain(run):
    """One command of a plain C compiler, no options: a scalar library that is right."""
    program = run.build / "test-plain"
    patterns = ("src/*.c", "src/*/*.c", "src/cpu/kernels/*.c", "tests/support/*.c", "tests/reference/*.c")
    sources = [path.relative_to(ROOT) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    includes = ("-Iinclude", "-Isrc", "-Itests")
    if run.step("cc", *includes, "tests/check_attention.c", *sources, "-o", program, "-lm", "-lpthread"):
        # It is slow without optimisation; the other dtypes were tested on these kernels in the release suite.
        run.step(program, "--quick", "--isa", "scalar", "--filter", " f32 ", counts=True)


def clang(run):
    """Another compiler."""
    folder = run.cmake("test-clang", "-DCMAKE_C_COMPILER=clang-19")
    if folder:
        run.registers(folder)
        run.programs(folder)
        run.step(folder / "check_attention", "--quick", counts=True)


def memory(run):
    """Address and undefined-behaviour sanitizers."""
    folder = run.cmake("test-memory", "-DCMAKE_C_COMPILER=clang-19", "-DMFA_SANITIZE=address,undefined")
    _, library = run.release()
    if not (folder and library):
        return
    settings = {"ASAN_OPTIONS": "allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    run.programs(folder, **settings)
    run.step(folder / "check_kernels", "--quick", counts=True, **settings)
    for isa in machine_isas(library):
        run.step(folder / "check_attention", "--quick", "--isa", isa, counts=True, **settings)


def threads(run):
    """Thread sanitizer, over the tests with threads."""
    folder = run.cmake("test-threads", "-DCMAKE_C_COMPILER=clang-19", "-DMFA_SANITIZE=thread")
    if folder:
        # A child of fork() starts threads of its own: that is one of the tests.
        settings = {"TSAN_OPTIONS": "die_after_fork=0 allocator_may_return_null=1"}
        run.programs(folder, "test_threads", **settings)
        run.programs(folder, "test_concurrency", **settings)
        run.step(folder / "check_attention", "--quick", "--threads", "3", counts=True, **settings)


def amx(run):
    """The kernels for AMX on emulated tile registers; and their memory accesses under the sanitizers."""
    emulated = "-DMFA_EMULATE_AMX=ON"
    folder = run.cmake("test-amx", emulated)
    if not folder:
        return
    if "amxbf16" not in machine_isas(next(folder.glob("libmfa.so.*.*.*"))):
        print("\n--- not run: the emulation needs a CPU with AVX512_BF16, for all but the tile registers", flush=True)
        return
    kernels = ("--isa", "amxbf16", "--filter", " bf16 ")
    run.programs(folder, "test_edge_cases", MFA_ISA="amxbf16")
    run.step(folder / "check_attention", *kernels, counts=True)
    folder = run.cmake(
        "test-amx-memory", emulated, "-DCMAKE_C_COMPILER=clang-19", "-DMFA_SANITIZE=address,undefined"
    )
    if folder:
        run.step(folder / "check_attention", "--quick", *kernels, counts=True)


def arm64(run):
    """NEON, with and without dot products of bf16, and scalar code of another compiler, under emulation."""
    folder = run.arm64()
    if folder:
        run.registers(folder, "--objdump", "aarch64-linux-gnu-objdump")
        for cpu, has in EMULATED.items():
            run.isas(*EMULATOR, "-cpu", cpu, folder / "check_isa", has=has)
        command = (*EMULATOR, folder / "check_attention", "--quick")
        run.together(
            *((*command, "--isa", "neon", "--filter", f" {dtype} ") for dtype in ("f32", "f16", "bf16", "f64")),
            (*command, "--isa", "neonbf16", "--filter", " bf16 "),
            (*command, "--isa", "scalar", "--filter", " f32 "),
            (*EMULATOR, folder / "check_kernels", "--quick", "--isa", "neon"),
        )


def python(run):
    """The Python package, in the tree."""
    _, library = run.release()
    if library:
        paths = {"PYTHONPATH": str(ROOT / "python"), "MFA_LIBRARY": str(library)}
        run.step(sys.executable, "-m", "pytest", "tests/python", counts=True, **paths)


def wheels(run):
    """The wheels of all platforms; this machine's as pip installs it: its library is found beside the package."""
    folder = run.wheels()
    if not folder:
        return
    run.step(sys.executable, "-m", "pytest", "tests/test_wheels.py", counts=True, MFA_WHEELS=str(folder))
    (file,) = folder.glob(f"*linux*_{platform.machine()}.whl")
    site = folder / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    if run.step(*pip, "install", "--no-deps", "--target", site, file):
        program = "import mps_flash_attn, torch; q = torch.ones(1, 1, 4, 8); mps_flash_attn.flash_attention(q, q, q)"
        run.step(sys.executable, "-c", program, PYTHONPATH=str(site))


# One problem for each kind of CPU kernel.
MACOS_PROBLEMS = (
    "both any b2 h4/2 q70 kv130 d64 causal",
    "both any b1 h3 q37 kv53 d80v96 lower-20 upper3 softcap5 mask_bool",
    "both any b1 h2 q65 kv129 d128 mask_f32",
    "both any b2 h2 q1 kv300 d40",
)


def macos(run):
    """The library of the macOS wheel: its format, and its execution by a loader of Mach-O on an arm64 emulator."""
    folder, programs = run.wheels(), run.arm64()
    if not (folder and programs):
        return
    (file,) = folder.glob("*macosx*.whl")
    scratch = run.build / "test-macos"
    shutil.rmtree(scratch, ignore_errors=True)
    with zipfile.ZipFile(file) as archive:
        settings = {"MFA_DYLIB": archive.extract("mps_flash_attn/libmfa.dylib", scratch)}
    run.step(sys.executable, "-m", "pytest", "tests/macos", counts=True, **settings)
    run.step(*EMULATOR, programs / "check_dylib", counts=True, **settings)
    program = (*EMULATOR, programs / "check_attention_dylib", "--quick", *MACOS_PROBLEMS)
    run.step(*program, counts=True, **settings)
    run.isas(*EMULATOR, programs / "check_isa_dylib", has=EMULATED["max"], **settings)
    older = settings | {"MACHO_M1": "1"}  # a CPU without dot products of bf16
    run.isas(*EMULATOR, programs / "check_isa_dylib", has=("scalar", "neon"), **older)
    run.step(*program, "--filter", " bf16 ", counts=True, **older)
    settings["METALSIM_CACHE"] = str(scratch / "compiled")
    run.step(*EMULATOR, programs / "check_metal_dylib", scratch / "caches", counts=True, **settings)


# Problems that, between them, compile every Metal kernel with every option.
METAL_PROBLEMS = (
    "both any b1 h4/2 q33 kv70 d64 causal mask_f32 softcap5",
    "both any b1 h2 q33 kv40 d200 mask_bool",
    "both f32 b1 h1 q17 kv20 d264 mask_f16",
    "both bf16 b1 h1 q17 kv20 d264 mask_bf16",
    "forward any b1 h4/2 q1 kv1100 d64",
)


def metal_simulator(run):
    """metalsim itself: it executes Metal right, rejects what Metal rejects, and finds injected faults."""
    folder = run.metal()
    if not folder:
        return
    for program in sorted(ROOT.glob("metalsim/tests/test_*.c")):
        run.step(folder / f"metalsim/metalsim_{program.stem}", counts=True)
    cover = str(folder / "metalsim/metalsim_cover")
    run.step(sys.executable, "-m", "pytest", "metalsim/tests", counts=True, METALSIM_COVER=cover)


def metal_kernels(run):
    """The Metal kernels on metalsim: right for every case, by every schedule, without a race, and with fast math."""
    folder = run.metal()
    if not folder:
        return
    run.step(folder / "test_metal", counts=True)
    run.step(folder / "test_large_strides", counts=True)
    run.step(folder / "metal_table", "docs/metal-kernels.md", counts=True)
    for options in ((), ("--tiles", "--checked")):
        run.shards(folder / "check_metal", *options)
    for options in (METAL_PROBLEMS, ("--random", "100")):
        run.step(folder / "check_metal", "--fast-math", *options, counts=True)


def metal_mutants(run):
    """Every barrier of the Metal kernels is needed, and without it the checker finds a fault."""
    folder = run.metal()
    if folder:
        run.step(folder / "check_mutants", counts=True)


def metal_lint(run):
    """The texts of the Metal kernels contain nothing that Apple's compiler is known to reject."""
    folder = run.metal()
    cache = run.build / "test-metal-lint"
    shutil.rmtree(cache, ignore_errors=True)
    if folder and run.step(folder / "check_metal", "--quick", *METAL_PROBLEMS, counts=True, MFA_CACHE=str(cache)):
        run.step(sys.executable, "metalsim/lint/lint.py", *sorted(cache.glob("*.metal")), counts=True)


def metal_coverage(run):
    """Random problems for the Metal kernels; after these, every region of the kernels has been executed."""
    folder = run.metal()
    cache, profiles = run.build / "test-metal-cover", run.build / "test-metal-profiles"
    for old in (cache, profiles):
        shutil.rmtree(old, ignore_errors=True)
    if not folder:
        return
    cases = run.build / "test-metal-cases.txt"
    cases.write_text("".join(problem + "\n" for problem in METAL_PROBLEMS))
    settings = {"MFA_CACHE": str(cache), "LLVM_PROFILE_FILE": str(profiles / "%m.profraw")}
    run.step(folder / "check_metal", "--quick", "--cases", cases, counts=True, **settings)
    run.step(folder / "check_metal", "--random", "300", counts=True, **settings)
    kernels = [path.relative_to(ROOT / "src") for path in sorted((ROOT / "src/metal/kernels").glob("*.metal"))]
    run.step(sys.executable, "metalsim/coverage.py", cache, profiles, *kernels, counts=True)


def metal_host(run):
    """The Metal backend on metalsim's runtime: messages, memory, files, failures, PyTorch's stream; and its results."""
    folder = run.metal()
    if not folder:
        return
    settings = {"METALSIM_CACHE": str(run.build / "test-metal-host")}
    programs = ("runtime", "table", "host", "host_faults", "host_files", "torch_bare", "torch_2_4", "torch_2_14")
    for program in programs:
        run.step(folder / f"test_{program}", counts=True, **settings)
    run.step(folder / "test_torch_2_14", counts=True, METALSIM_CHECKED="1", **settings)
    for options in ((), ("--quick", "--every", "16"), ("--quick", "--checked")):
        run.step(folder / "check_host", *options, counts=True, **settings)


def metal_python(run):
    """The Python tests on the Metal backend, their tensors standing in for those of the mps device."""
    folder = run.metal()
    if folder:
        settings = {"MFA_BACKEND": "metal", "METALSIM_CACHE": str(run.build / "test-metal-host")}
        settings |= {"PYTHONPATH": str(ROOT / "python"), "MFA_LIBRARY": str(folder / "libmfa.so")}
        for part in ("[a-l]", "[m-o]", "[p-z]"):  # none of which takes too long
            files = sorted(ROOT.glob(f"tests/python/test_{part}*.py"))
            run.step(sys.executable, "-m", "pytest", *files, counts=True, **settings)


def metal_cuda(run):
    """The texts of the Metal kernels compile with nvcc, where there is one, for an NVIDIA GPU."""
    toolkit = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    if not (shutil.which("nvcc") or (toolkit / "bin/nvcc").exists()):
        print("\n--- no nvcc here, nor in CUDA_HOME: NOT compiled for NVIDIA GPUs")
        return
    folder = run.build / "test-metal-cuda"
    shutil.rmtree(folder, ignore_errors=True)  # or it would find the kernels compiled
    run.step("sh", "metalsim/cuda/run.sh", folder, counts=True, METALSIM_CUDA_ARCH="sm_90")


CPU = (checks, docs, release, header, plain, clang, memory, threads, amx, arm64, python, wheels, macos)
# make test-metal
METAL = (
    *(metal_simulator, metal_kernels, metal_mutants, metal_lint, metal_coverage),
    *(metal_host, metal_python, metal_cuda),
)
SUITES = CPU + METAL


def name_of(suite):
    return suite.__name__.replace("_", "-")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build", help="where to build (default: build)")
    parser.add_argument("--list", action="store_true", help="name the suites and stop")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="run only these")
    options = parser.parse_args()
    if options.list:
        for suite in SUITES:
            print(f"{name_of(suite):15} {suite.__doc__}")
        return 0
    names = [name_of(suite) for suite in SUITES]
    for name in options.suites:
        if name not in names:
            parser.error(f"no suite {name}; there are: {' '.join(names)}")

    run = Run(options.build.resolve())
    run.build.mkdir(parents=True, exist_ok=True)
    os.environ["MFA_CACHE"] = str(run.build / "test-cache")  # not the user's own
    times = []
    for suite in SUITES:
        if options.suites and name_of(suite) not in options.suites:
            continue
        run.suite = name_of(suite)
        began, passed, failed = time.monotonic(), run.passed, run.failed
        print(f"\n=== {run.suite}: {suite.__doc__}", flush=True)
        try:
            suite(run)
        except Exception as error:  # the other suites still run
            run.count(f"{type(error).__name__}: {error}", 0, 1)
        times.append((run.suite, run.passed - passed, run.failed - failed, time.monotonic() - began))

    print("\n=== summary")
    for name, passed, failed, seconds in times:
        print(f"{name:15} {passed:7} passed {failed:5} failed {seconds:7.1f} s")
    for failure in run.failures:
        print(f"FAILED {failure}")
    print(f"{run.passed} passed, {run.failed} failed")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
