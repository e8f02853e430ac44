"""The mangled names by which PyTorch's functions are looked up, demangled: PyTorch's libraries must export them."""

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LINES = (ROOT / "metalsim/runtime/torch_names.txt").read_text().splitlines()
EXPORTED = {line.split(maxsplit=1)[1] for line in LINES if not line.startswith("#")}
# (file, the fewest names that it has)
USERS = (("src/metal/stream.c", 8), ("metalsim/runtime/torch.c", 8), ("python/mps_flash_attn/torch_host.py", 1))


@pytest.mark.parametrize("file, fewest", USERS)
def test_names_are_exported(file, fewest):
    names = re.findall(r'"(_Z\w+)"', (ROOT / file).read_text())
    assert len(names) >= fewest
    demangled = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [name for name, function in zip(names, demangled, strict=True) if function not in EXPORTED] == []
