"""lint.py and coverage.py find what they should, and nothing else.

METALSIM_COVER names the program that cover.c makes.
"""

import os
import pathlib
import subprocess
import sys

import pytest

METALSIM = pathlib.Path(__file__).resolve().parent.parent


def run(*words, **environment):
    words = [sys.executable, *(str(word) for word in words)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stdout + done.stderr


def test_lint_finds_all_injected_errors_and_nothing_else():
    bad = sorted((METALSIM / "lint").glob("bad*.metal"))
    code, output = run(METALSIM / "lint/lint.py", "--expect", *bad)
    expected = sum(path.read_text().count("// EXPECT-ERROR: ") for path in bad)
    assert output == f"{expected} passed, 0 failed\n"
    assert code == 0 and expected > 50


def test_lint_expects_neither_too_much_nor_too_little(tmp_path):
    file = tmp_path / "file.metal"
    file.write_text("double x; // EXPECT-ERROR: no double\nfloat y;\nint z; // EXPECT-ERROR: no such thing\n")
    code, output = run(METALSIM / "lint/lint.py", "--expect", file)
    assert code == 1
    assert f"{file}:2: not expected: a variable outside functions must be constant" in output
    assert f"{file}:3: not found: no such thing" in output


def test_lint_is_silent_about_good_files():
    options = ["-D", "FAULT=0", "-D", "LEFT=half", "-D", "RIGHT=half", "-D", "ADDED=float", "-D", "RESULT=float"]
    files = [METALSIM / "tests" / name for name in ("injected_faults.metal", "widths.metal", "covered.metal")]
    assert run(METALSIM / "lint/lint.py", *options, *files) == (0, "3 passed, 0 failed\n")


def test_lint_names_the_lines_of_spliced_files(tmp_path):
    file = tmp_path / "file.metal"
    file.write_text('#include <metal_stdlib>\n#line 41 "metal/kernels/tile.h"\nstruct s {\n    float *p;\n};\n')
    code, output = run(METALSIM / "lint/lint.py", file)
    assert code == 1
    assert output.startswith("metal/kernels/tile.h:42: p: its pointer or reference has no address space\n")


def test_lint_wants_one_file_to_know_the_layout(tmp_path):
    text = "#include <metal_stdlib>\nusing namespace metal;\n{}METAL_FUNC float f(simdgroup_float8x8 m)\n"
    text += "{{\n    return m.thread_elements()[0];\n}}\n"
    for name in ("a", "b"):
        (tmp_path / name).write_text(text.format(f'#line 1 "{name}.h"\n'))
    assert run(METALSIM / "lint/lint.py", tmp_path / "a")[0] == 0
    code, output = run(METALSIM / "lint/lint.py", tmp_path / "a", tmp_path / "b")
    assert code == 1 and "thread_elements stands in a.h, b.h" in output


VARIANT = """#define DTYPE_{dtype}
#define COLUMNS {columns}
{feature}
#include <metal_stdlib>
using namespace metal;
#line 1 "tile.h"
METAL_FUNC int columns() {{ return COLUMNS; }}
#ifdef FEATURE
struct wrong {{ float *p; }};
#endif
"""


def test_lint_of_distinct_files_leaves_out_what_it_has_read(tmp_path):
    for columns in range(12):
        (tmp_path / f"{columns}.metal").write_text(VARIANT.format(dtype="F16", columns=columns, feature=""))
    (tmp_path / "other.metal").write_text(VARIANT.format(dtype="F32", columns=8, feature=""))
    code, output = run(METALSIM / "lint/lint.py", "--distinct", tmp_path)
    read = int(output.split()[0])
    assert code == 0 and 2 <= read < 6
    (tmp_path / "wrong.metal").write_text(VARIANT.format(dtype="F32", columns=8, feature="#define FEATURE"))
    code, output = run(METALSIM / "lint/lint.py", "--distinct", tmp_path)
    assert code == 1 and "tile.h:3: p: its pointer or reference has no address space\n" in output


class Cover:
    def __init__(self, folder):
        self.cache, self.profiles = folder / "cache", folder / "profiles"
        self.profiles.mkdir()

    def run(self, *words):
        profile = {"LLVM_PROFILE_FILE": str(self.profiles / "%m.profraw")}
        subprocess.run([os.environ["METALSIM_COVER"], self.cache, *words], check=True, env={**os.environ, **profile})

    def report(self, *files, options=()):
        return run(METALSIM / "coverage.py", *options, "--cache", self.cache, self.profiles, *files)


@pytest.fixture
def cover(tmp_path):
    return Cover(tmp_path)


def test_coverage_names_what_never_ran(cover):
    cover.run("0")
    code, output = cover.report("tests/covered.metal")
    assert code == 1
    assert output.startswith("tests/covered.metal:8: never executed: return x + 1.0f;\n")
    assert output.endswith("passed, 1 failed\n")
    cover.run("3")  # the same library: its profiles add up
    assert cover.report("tests/covered.metal")[0] == 0


def test_coverage_puts_variants_together(cover):
    cover.run("0")
    cover.run("3", "TWICE")
    code, output = cover.report()
    assert code == 1  # 2 < 3 + 1 < 100
    assert output.startswith("tests/covered.metal:16: never executed: a[i] = more<2>(a[i]) > 100.0f")
    assert output.count("never executed") == 1


def test_coverage_takes_reasons_and_drops_stale_ones(cover, tmp_path):
    reasons = tmp_path / "reasons"
    reasons.write_text("# why not\ntests/covered.metal: return x + 1.0f: nobody gives such numbers\n")
    cover.run("0")
    assert cover.report(options=("--reasons", reasons))[0] == 0
    cover.run("3")
    code, output = cover.report(options=("--reasons", reasons))
    assert code == 1 and "executed, or gone, yet excused: return x + 1.0f" in output


def test_coverage_needs_profiles(cover):
    code, output = cover.report()
    assert code == 1 and output.startswith(f"{cover.profiles}: no profiles")


def test_coverage_misses_files_that_nobody_compiles(cover):
    cover.run("0")
    cover.run("3")
    code, output = cover.report("tests/covered.metal", "tests/other.metal")
    assert code == 1 and output.startswith("tests/other.metal: no test compiles it\n")
