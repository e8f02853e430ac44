"""Says which regions of the kernels no test has executed.

    metalsim/coverage.py [--reasons FILE] --cache FOLDER ... PROFILES [FILE ...]

Each --cache is a folder of libraries that were compiled with METALSIM_COVERAGE, PROFILES the one that LLVM_PROFILE_FILE
named (as FOLDER/%m.profraw). Regions of all libraries are put together by the line of the .metal file they come from,
so it is enough if one variant executes a region. FILEs are those that must have been compiled at all, as #line names
them. A line of --reasons, "FILE: part of the region's first line: why", excuses a region; one that excuses nothing is
out of date. It prints a line per region, and at last N passed, N failed.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

COV = os.environ.get("LLVM_COV", "llvm-cov-19")
PROFDATA = os.environ.get("LLVM_PROFDATA", "llvm-profdata-19")
CODE = 0  # a region's kind; others are expansions, skipped text and gaps


def places(unit):
    """For each line of a compiled text, the file and line that #line says, and the line itself."""
    found, file, number = [], "", 0
    for line in unit.read_text().split("\n"):
        number += 1
        found.append((file, number, line))
        directive = re.match(r'\s*#\s*line\s+(\d+)(?:\s+"([^"]*)")?', line)
        if directive:
            file, number = directive[2] or file, int(directive[1]) - 1
    return found


def regions_of(library, profile):
    """(file, line, column, end line, end column) -> (times executed, the first line's text)"""
    words = [COV, "export", str(library), f"-instr-profile={profile}", "--skip-expansions"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        return {}  # never loaded by the tests: it has no profile
    unit = library.with_suffix(".cpp")
    lines, regions = places(unit), {}
    for function in json.loads(done.stdout)["data"][0]["functions"]:
        for begin, column, end, end_column, count, file, _, kind in function["regions"]:
            if kind != CODE or file != 0 or function["filenames"][0] != str(unit):
                continue  # not the function's own text: within a macro, or of metalsim's headers
            name, number, text = lines[begin - 1]
            if name.startswith("/"):
                continue  # what metalsim adds to the text
            key = (name, number, column, lines[end - 1][1], end_column)
            regions[key] = (max(count, regions.get(key, (0,))[0]), text.strip())
    return regions


def read_reasons(path):
    lines = path.read_text().splitlines() if path else []
    return [tuple(part.strip() for part in line.split(": ", 2)) for line in lines if line and line[0] != "#"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reasons", type=pathlib.Path)
    parser.add_argument("--cache", dest="caches", action="append", required=True, type=pathlib.Path)
    parser.add_argument("profiles", type=pathlib.Path)
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    profile = options.profiles / "all.profdata"
    raw = [str(path) for path in sorted(options.profiles.glob("*.profraw"))]
    if not raw:
        print(f"{options.profiles}: no profiles: nothing ran with LLVM_PROFILE_FILE\n0 passed, 1 failed")
        return 1
    subprocess.run([PROFDATA, "merge", "-o", str(profile), *raw], check=True)

    executed = {}
    for library in sorted(path for cache in options.caches for path in cache.resolve().glob("*.so")):
        for key, (count, text) in regions_of(library, profile).items():
            executed[key] = (max(count, executed.get(key, (0,))[0]), text)
    reasons = read_reasons(options.reasons)
    used, problems, passed = set(), [], 0
    for (file, line, *_), (count, text) in sorted(executed.items()):
        excuses = [reason for reason in reasons if reason[0] == file and reason[1] in text]
        if count == 0 and excuses:
            used.update(excuses)
        elif count == 0:
            problems.append(f"{file}:{line}: never executed: {text}")
        passed += count > 0
    stale = [reason for reason in reasons if reason not in used]
    problems += [f"{file}: executed, or gone, yet excused: {words}" for file, words, *_ in stale]
    compiled = {key[0] for key in executed}
    problems += [f"{file}: no test compiles it" for file in options.files if file not in compiled]
    print("".join(problem + "\n" for problem in dict.fromkeys(problems)), end="")
    print(f"{passed} passed, {len(problems)} failed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
