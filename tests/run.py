"""Builds and runs the tests, step by step, and ends with one line: N passed, N failed, N skipped.

    tests/run.py [--full] [--list] [STEP ...]

Run it through `make test`, which installs what it needs. A step builds a preset of CMakePresets.json and runs CTest in
it, or runs pytest. Cases are counted, not programs: a test program prints its own count, as cmocka does. One that
crashes, hangs or prints no count has failed, whatever it had counted. MFA_TEST_TIMEOUT is how many seconds one test
may run (900), for a machine that is much slower than usual.
"""

import argparse
import collections
import functools
import os
import pathlib
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
WHEELS = BUILD / "test-wheels"
RELEASE = BUILD / "test-release"
TIMEOUT = os.environ.get("MFA_TEST_TIMEOUT", "900")
JOBS = os.cpu_count()
WORKERS = min(JOBS + 1, 8)  # of pytest: some tests wait for other processes, or for time to pass

# The environment of the Python tests: the library in the tree, and on Metal the one that opens metalsim.
CPU = {"PYTHONPATH": str(ROOT / "python"), "MFA_LIBRARY": str(RELEASE / "libmfa.so")}
METAL = CPU | {"MFA_LIBRARY": str(RELEASE / "libmfa_metalsim.so"), "MFA_BACKEND": "metal"}
METAL |= {"METALSIM_UNOPTIMISED": "1"}  # kernels run briefly here, and metal runs the same texts optimised
METAL |= {"METALSIM_CACHE": str(RELEASE / "cache"), "METALSIM_COVER": str(RELEASE / "metalsim/metalsim_cover")}

# Seconds are estimates for two fast cores. CTest is given the label of the tests to run, and that of those not to run.
Step = collections.namedtuple("Step", "about seconds builds ctest pytest environment", defaults=(None, None, {}))
STEPS = {
    "checks": Step("includes, names, documents, style; and what checks them", 66, (), pytest=["tests/tools"]),
    "release": Step("the shipped library on every instruction set", 190, ("release",), ctest=("", "metal")),
    "python": Step("the Python package", 340, ("release",), pytest=["tests/python"], environment=CPU),
    "wheels": Step(
        "the wheels of all platforms",
        70,
        ("wheels",),
        pytest=["tests/test_wheels.py", "tests/macos"],
        environment={"MFA_WHEELS": str(WHEELS), "MFA_DYLIB": str(WHEELS / "libmfa.dylib")},
    ),
    "arm64": Step("NEON and the macOS library, emulated", 155, ("wheels", "arm64"), ctest=("", "")),
    "clang": Step("another compiler", 60, ("clang",), ctest=("", "")),
    "asan-ubsan": Step("address and undefined-behaviour sanitizers", 115, ("asan-ubsan",), ctest=("", "")),
    "tsan": Step("thread sanitizer", 60, ("tsan",), ctest=("", "")),
    "metal": Step("the Metal kernels and backend on metalsim, and it", 330, ("release",), ctest=("metal", "")),
    "metal-python": Step(
        "the Python package on Metal", 290, ("release",), pytest=["tests/python", "metalsim/tests"], environment=METAL
    ),
}


class Tally:
    """What has been counted, and what is to be said of it at the end."""

    def __init__(self):
        self.passed = self.failed = 0
        self.failures = []
        self.skipped = collections.Counter()

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


def run(*words, **environment):
    """Runs a command in the root of the tree; its exit code."""
    words = [str(word) for word in words]
    print(f"\n--- {' '.join(words)}".replace(f"{ROOT}/", ""), flush=True)
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL).returncode


@functools.cache
def build(name):
    """Builds a preset, or the wheels with what the tests take out of them; whether that succeeded."""
    if name != "wheels":
        folder = BUILD / f"test-{name}"
        return not (run("cmake", "--preset", name) or run("cmake", "--build", folder, "--", "-k", "0"))
    shutil.rmtree(WHEELS, ignore_errors=True)
    # By the name and with the options of the presets' compiler, so that ccache has what release and arm64 compile.
    settings = {"CC": os.environ.get("CC", "cc"), "SKBUILD_CMAKE_DEFINE": "CMAKE_COMPILE_WARNING_AS_ERROR=ON"}
    if ccache := shutil.which("ccache"):
        settings["CMAKE_C_COMPILER_LAUNCHER"] = ccache
    if run(sys.executable, "tools/wheels.py", "--to", WHEELS, **settings):
        return False
    (macos,) = WHEELS.glob("*macosx*.whl")
    (WHEELS / "libmfa.dylib").write_bytes(zipfile.ZipFile(macos).read("mps_flash_attn/libmfa.dylib"))
    (linux,) = WHEELS.glob(f"*linux*_{platform.machine()}.whl")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps")
    return not run(*pip, "--target", WHEELS / "site", linux)


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


def cpu_seconds():
    """Of all processes so far that this one has waited for, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_step(tally, name, step, full):
    for target in step.builds:
        if not build(target):
            tally.add(f"{name}: {target} does not build", 0, 1)
            return
    report = BUILD / f"test-{name}.xml"
    report.unlink(missing_ok=True)
    if step.pytest:
        options = ["-q", "-n", WORKERS, "--dist=worksteal", f"--timeout={TIMEOUT}", f"--junitxml={report}"]
        code = run(sys.executable, "-m", "pytest", *options, *step.pytest, **step.environment)
    else:
        output = [f"--test-output-size-{kind}={1 << 20}" for kind in ("passed", "failed")]
        options = ["-j", JOBS, "--timeout", TIMEOUT, "--no-tests=error", "--output-on-failure", *output]
        has, has_not = step.ctest
        labels = ["-L", has] if has else []
        if left_out := "|".join(filter(None, [has_not, "" if full else "full"])):
            labels += ["-LE", left_out]
        folder = BUILD / f"test-{step.builds[-1]}"
        code = run("ctest", "--test-dir", folder, *options, "--output-junit", report, *labels, **step.environment)
    count(tally, name, report, code)


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
        print(f"{name:13} {step.seconds:4} s  {step.about}")
    seconds = sum(step.seconds for step in chosen.values()) * (4 if options.full else 1)
    print(f"in all about {seconds // 60 + 1} minutes on two cores with AVX-512; twice as long on slow ones", flush=True)
    if options.list:
        return 0
    BUILD.mkdir(exist_ok=True)
    if options.full:
        os.environ["MFA_TEST_FULL"] = "1"
    os.environ["MFA_CACHE"] = str(BUILD / "test-cache")  # not the user's own
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or the threads of two PyTorchs spin, each for a core
    tally, lines = Tally(), []
    for name, step in chosen.items():
        began, used, passed, failed = time.monotonic(), cpu_seconds(), tally.passed, tally.failed
        print(f"\n=== {name}: {step.about}", flush=True)
        run_step(tally, name, step, options.full)
        numbers = f"{tally.passed - passed:7} passed {tally.failed - failed:5} failed"
        lines.append(f"{name:13} {numbers} {time.monotonic() - began:7.1f} s, CPU {cpu_seconds() - used:7.1f} s")
    print("\n=== summary", *lines, sep="\n")
    for reason, number in tally.skipped.items():
        print(f"SKIPPED {number}: {reason}")
    for failure in tally.failures:
        print(f"FAILED {failure}")
    print(f"{tally.passed} passed, {tally.failed} failed, {sum(tally.skipped.values())} skipped")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
