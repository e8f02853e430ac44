"""The documentation builds without a warning, and without the library."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_documentation_builds(tmp_path):
    options = ("-W", "--keep-going", "-n", "-q", "-E", "-d", tmp_path / "doctrees")
    subprocess.run([sys.executable, "-m", "sphinx", *options, "docs", tmp_path / "pages"], cwd=ROOT, check=True)
