"""python -m mps_flash_attn: info and explain."""

import os
import subprocess
import sys
from pathlib import Path

import mps_flash_attn
from mps_flash_attn.library import library


def run(*arguments, **environment):
    path = os.pathsep.join([str(Path(mps_flash_attn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "mps_flash_attn", *arguments],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    for word in (library().version, library().path.name, "cpu", "instruction set", "threads"):
        assert word in done.stdout


def test_explain():
    done = run("explain", *"forward f16 b2 h8/2 q512 kv512 d64 causal".split())
    assert done.returncode == 0, done.stderr
    assert "forward_f16_d64" in done.stdout and "workspace" in done.stdout


def test_explain_a_wrong_line():
    done = run("explain", "sideways f16")
    assert done.returncode == 1 and done.stdout == ""
    assert "sideways" in done.stderr and "Traceback" not in done.stderr


def test_no_library():
    done = run("info", MFA_LIBRARY="/nowhere/libmfa.so")
    assert done.returncode == 1 and "libmfa is not at /nowhere/libmfa.so" in done.stderr
