"""The mangled names by which PyTorch's functions are looked up, demangled: PyTorch's libraries must export them."""

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LINES = (ROOT / "metalsim/runtime/torch_names.txt").read_text().splitlines()
EXPORTED = {line.split(maxsplit=1)[1] for line in LINES if not line.startswith("#")}
USERS = ("src/metal/stream.c", "metalsim/runtime/torch.c")


@pytest.mark.parametrize("file", USERS)
def test_names_are_exported(file):
    names = re.findall(r'"(_Z\w+)"', (ROOT / file).read_text())
    assert len(names) >= 8
    demangled = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [name for name, function in zip(names, demangled, strict=True) if function not in EXPORTED] == []
