"""Shared by the checks: the files of the project, and the report of a check.

A check is a script: tools/check_X.py [ROOT]. It prints a line per problem, and at last N passed, N failed.
"""

import pathlib
import sys

OUTSIDE = {"build", "dist", "__pycache__"}  # never part of the project


class Report:
    """Counts checks, and prints those that fail."""

    def __init__(self):
        self.passed = self.failed = 0

    def check(self, fine, problem):
        if fine:
            self.passed += 1
        else:
            self.failed += 1
            print(problem)

    def finish(self):
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(1 if self.failed else 0)


def default_root():
    return pathlib.Path(__file__).resolve().parent.parent


def files(root, *suffixes):
    """The project's files with these suffixes, as paths from the root, sorted."""
    found = []
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        if path.is_file() and path.suffix in suffixes and not hidden and not OUTSIDE.intersection(parts):
            found.append(path.relative_to(root))
    return sorted(found)
