"""Builds and runs the tests, step by step, and ends with one line: N passed, N failed, N skipped.

    tests/run.py [--full] [--list] [STEP ...]

Run it through `make test`, which installs what it needs. A step builds a preset of CMakePresets.json and runs CTest in
it, or runs pytest. Two steps run at a time, and what both build is built once: some tests wait for other processes, or
for time to pass. Each line of output begins with the name of its step, and build/test-STEP.log has those of one step.

Cases are counted, not programs: a test program prints its own count, as cmocka does. One that crashes, hangs or prints
no count has failed, whatever it had counted. MFA_TEST_TIMEOUT is how many seconds one test may run (900), for a machine
that is much slower than usual.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as xml
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
WHEELS = BUILD / "test-wheels"
RELEASE = BUILD / "test-release"
TIMEOUT = os.environ.get("MFA_TEST_TIMEOUT", "900")
JOBS = os.cpu_count()
WORKERS = min(JOBS, 8)  # of pytest
POLL = 0.2  # seconds between looks at what a command has printed
SAYING = threading.Lock()

# The environment of the Python tests: the library in the tree, and on Metal the one that opens metalsim.
CPU = {"PYTHONPATH": str(ROOT / "python"), "MFA_LIBRARY": str(RELEASE / "libmfa.so")}
METAL = CPU | {"MFA_LIBRARY": str(RELEASE / "libmfa_metalsim.so"), "MFA_BACKEND": "metal"}
METAL |= {"METALSIM_UNOPTIMISED": "1"}  # kernels run briefly here, and metal runs the same texts optimised
METAL |= {"METALSIM_CACHE": str(RELEASE / "cache"), "METALSIM_COVER": str(RELEASE / "metalsim/metalsim_cover")}

# Seconds are estimates of the CPU time, on fast cores. CTest is given the label of the tests to run, and that of those
# not to run. Steps begin in this order: one of pytest beside one of CTest, and the short ones last, so that both cores
# are busy to the end.
Step = collections.namedtuple("Step", "about seconds builds ctest pytest environment", defaults=(None, None, {}))
STEPS = {
    "checks": Step("includes, names, documents, style; and what checks them", 94, (), pytest=["tests/tools"]),
    "release": Step("the shipped library on every instruction set", 280, ("release",), ctest=("", "metal")),
    "python": Step("the Python package", 440, ("release",), pytest=["tests/python"], environment=CPU),
    "metal": Step("the Metal kernels and backend on metalsim, and it", 480, ("release",), ctest=("metal", "")),
    "metal-python": Step(
        "the Python package on Metal", 310, ("release",), pytest=["tests/python", "metalsim/tests"], environment=METAL
    ),
    "asan-ubsan": Step("address and undefined-behaviour sanitizers", 210, ("asan-ubsan",), ctest=("", "")),
    "wheels": Step(
        "the wheels of all platforms",
        94,
        ("wheels",),
        pytest=["tests/test_wheels.py", "tests/macos"],
        environment={"MFA_WHEELS": str(WHEELS), "MFA_DYLIB": str(WHEELS / "libmfa.dylib")},
    ),
    "arm64": Step("NEON and the macOS library, emulated", 218, ("wheels", "arm64"), ctest=("", "")),
    "clang": Step("another compiler", 94, ("clang",), ctest=("", "")),
    "tsan": Step("thread sanitizer", 107, ("tsan",), ctest=("", "")),
}


class Tally:
    """What has been counted, and what is to be said of it at the end."""

    def __init__(self):
        self.passed = self.failed = 0
        self.failures = []
        self.skipped = collections.Counter()

    def __iadd__(self, other):
        self.passed += other.passed
        self.failed += other.failed
        self.failures += other.failures
        self.skipped += other.skipped
        return self

    def add(self, name, passed, failed):
        self.passed += passed
        self.failed += failed
        if failed:
            self.failures.append(f"{name}: {failed} failed")


def parse_counts(text):
    """(passed, failed) as a program reported them, in its own last line or in cmocka's; (0, 0) if it did not."""
    own = re.findall(r"^(\d+) passed, (\d+) failed$", text, re.MULTILINE)
    if own:
        return int(own[-1][0]), int(own[-1][1])
    passed = re.findall(r"^\[  PASSED  \] (\d+) test", text, re.MULTILINE)
    failed = re.findall(r"^\[  FAILED  \] (\d+) test", text, re.MULTILINE)
    return sum(map(int, passed)), sum(map(int, failed))


BUILT = {}
BUILDING = {target: threading.Lock() for step in STEPS.values() for target in step.builds}


class Run:
    """A step that is run: its commands, what they printed and used, and what was counted."""

    def __init__(self, name, step):
        self.name, self.step = name, step
        self.tally = Tally()
        self.cpu = self.wall = 0.0
        self.log = BUILD / f"test-{name}.log"

    def say(self, lines):
        with SAYING:
            for line in lines:
                print(f"{self.name:13}| {line}", flush=True)

    def command(self, *words, **environment):
        """Runs a command in the root of the tree, and prints its lines as they come; its exit code."""
        words = [str(word) for word in words]
        self.say(["", f"--- {' '.join(words)}".replace(f"{ROOT}/", "")])
        # A file, not a pipe, which a process that the command leaves behind would keep open.
        with open(self.log, "ab") as output, open(self.log, "rb") as printed:
            printed.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                words, cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            ended, rest = 0, b""
            while not ended:
                ended, status, used = os.wait4(process.pid, os.WNOHANG)  # of this command, not of the other step's
                *lines, rest = (rest + printed.read()).split(b"\n")
                if ended and rest:
                    lines.append(rest)
                self.say(line.decode(errors="replace") for line in lines)
                time.sleep(0 if ended else POLL)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu += used.ru_utime + used.ru_stime
        return process.returncode

    def build(self, target):
        """Whether a preset, or the wheels, could be built, which is done once: another step that needs it waits."""
        with BUILDING[target]:
            if target not in BUILT:
                BUILT[target] = self.build_wheels() if target == "wheels" else self.build_preset(target)
            return BUILT[target]

    def build_preset(self, name):
        command = ("cmake", "--build", BUILD / f"test-{name}", "--", "-k", "0")
        return not (self.command("cmake", "--preset", name) or self.command(*command))

    def build_wheels(self):
        """Builds the wheels, with what the tests take out of them."""
        shutil.rmtree(WHEELS, ignore_errors=True)
        # By the name and with the options of the presets' compiler, so that ccache has what release and arm64 compile.
        settings = {"CC": os.environ.get("CC", "cc"), "SKBUILD_CMAKE_DEFINE": "CMAKE_COMPILE_WARNING_AS_ERROR=ON"}
        if ccache := shutil.which("ccache"):
            settings["CMAKE_C_COMPILER_LAUNCHER"] = ccache
        if self.command(sys.executable, "tools/wheels.py", "--to", WHEELS, **settings):
            return False
        (macos,) = WHEELS.glob("*macosx*.whl")
        (WHEELS / "libmfa.dylib").write_bytes(zipfile.ZipFile(macos).read("mps_flash_attn/libmfa.dylib"))
        (linux,) = WHEELS.glob(f"*linux*_{platform.machine()}.whl")
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps")
        return not self.command(*pip, "--target", WHEELS / "site", linux)

    def test(self, full):
        """Builds and tests; returns itself."""
        began = time.monotonic()
        self.log.unlink(missing_ok=True)
        self.say([f"=== {self.step.about}"])
        unbuilt = [target for target in self.step.builds if not self.build(target)]
        for target in unbuilt:
            self.tally.add(f"{self.name}: {target} does not build", 0, 1)
        if not unbuilt:
            report = BUILD / f"test-{self.name}.xml"
            report.unlink(missing_ok=True)
            run_tests = self.run_pytest if self.step.pytest else self.run_ctest
            count(self.tally, self.name, report, run_tests(report, full))
        self.wall = time.monotonic() - began
        self.say([f"=== {self}"])
        return self

    def run_pytest(self, report, full):
        options = ["-q", "-n", WORKERS, "--dist=worksteal", f"--timeout={TIMEOUT}", f"--junitxml={report}"]
        return self.command(sys.executable, "-m", "pytest", *options, *self.step.pytest, **self.step.environment)

    def run_ctest(self, report, full):
        output = [f"--test-output-size-{kind}={1 << 20}" for kind in ("passed", "failed")]
        options = ["-j", JOBS, "--timeout", TIMEOUT, "--no-tests=error", "--output-on-failure", *output]
        has, has_not = self.step.ctest
        labels = ["-L", has] if has else []
        if left_out := "|".join(filter(None, [has_not, "" if full else "full"])):
            labels += ["-LE", left_out]
        folder = BUILD / f"test-{self.step.builds[-1]}"
        return self.command(
            "ctest", "--test-dir", folder, *options, "--output-junit", report, *labels, **self.step.environment
        )

    def __str__(self):
        counts = f"{self.tally.passed:7} passed {self.tally.failed:5} failed"
        return f"{counts} {self.wall:7.1f} s, CPU {self.cpu:7.1f} s"


def count_case(tally, case, name):
    """Counts one test of a JUnit file."""
    text = case.findtext("system-out") or ""
    labels = ";".join(item.get("value", "") for item in case.iter("property") if item.get("name") == "cmake_labels")
    skipped, bad = case.find("skipped"), case.find("failure") is not None or case.find("error") is not None
    if case.get("status") is None:  # pytest's
        if skipped is not None and skipped.get("type") != "pytest.xfail":
            tally.skipped[skipped.get("message", "")] += 1
        else:
            tally.add(name, int(not bad), int(bad))
    elif skipped is not None and (said := re.findall(r"^SKIPPED: (.*)", text, re.MULTILINE)):
        tally.skipped[said[-1]] += 1
    elif bad or skipped is not None or "setup" not in labels:
        passed, failed = parse_counts(text)
        tally.add(name, passed, max(failed, bad or not passed))


def count(tally, step, report, code):
    """Counts the tests of a JUnit file; a run that failed in a way that the file does not show is a failure, too."""
    before = tally.failed
    cases = list(xml.parse(report).getroot().iter("testcase")) if report.exists() else []
    for case in cases:
        names = dict.fromkeys(filter(None, [case.get("classname"), case.get("name")]))  # of CTest's tests both are one
        count_case(tally, case, f"{step}: {'.'.join(names)}")
    if not cases or (code and tally.failed == before):
        tally.add(f"{step}: exit code {code}, {len(cases)} tests", 0, 1)


def run_steps(chosen, full):
    """The Runs of the steps, in their order; two run at a time."""
    pool = concurrent.futures.ThreadPoolExecutor(2)
    futures = [pool.submit(Run(name, step).test, full) for name, step in chosen.items()]
    try:
        done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
    finally:
        pool.shutdown(cancel_futures=True)
    for future in done:
        future.result()  # raises what the step raised
    return [future.result() for future in futures]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every case on every set, and more random problems")
    parser.add_argument("--list", action="store_true", help="name the steps and stop")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="only these")
    options = parser.parse_args()
    for name in set(options.steps) - set(STEPS):
        parser.error(f"no step {name}; there are: {' '.join(STEPS)}")
    chosen = {name: step for name, step in STEPS.items() if not options.steps or name in options.steps}
    for name, step in chosen.items():
        print(f"{name:13} {step.seconds:4} s of CPU  {step.about}")
    seconds = sum(step.seconds for step in chosen.values()) * (4 if options.full else 1)
    minutes = seconds // 120 + 1
    print(f"in all about {minutes} minutes on two cores with AVX-512; twice as long on slow ones", flush=True)
    if options.list:
        return 0
    BUILD.mkdir(exist_ok=True)
    if options.full:
        os.environ["MFA_TEST_FULL"] = "1"
    os.environ["MFA_CACHE"] = str(BUILD / "test-cache")  # not the user's own
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or the threads of two PyTorchs spin, each for a core
    began = time.monotonic()
    runs = run_steps(chosen, options.full)
    tally = Tally()
    for run in runs:
        tally += run.tally
    print("\n=== summary", *(f"{run.name:13} {run}" for run in runs), sep="\n")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes, CPU {sum(run.cpu for run in runs) / 60:.1f} minutes")
    for reason, number in tally.skipped.items():
        print(f"SKIPPED {number}: {reason}")
    for failure in tally.failures:
        print(f"FAILED {failure}")
    print(f"{tally.passed} passed, {tally.failed} failed, {sum(tally.skipped.values())} skipped")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
