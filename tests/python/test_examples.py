"""Every program of examples/ runs, and what it checks is right."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch

import forked
from c_programs import EXAMPLES, compiled
from stand_in import TIMEOUT

LIBRARIES = {
    "diffusers_model.py": ["diffusers"],
    "transformers_model.py": ["transformers"],
    "transformers_packed.py": ["transformers"],
}
ARGUMENTS = {"video_matting.py": ["--steps=2", "--size=96", "--frames=2"]}  # the whole of it takes minutes
WITHOUT_JAX = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
SINCE_2_12 = pytest.mark.skipif(
    not hasattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace"), reason="PyTorch 2.12 or later"
)
MARKS = {"jax_attention.py": [WITHOUT_JAX], "varlen_attn.py": [SINCE_2_12]}

pytestmark = pytest.mark.cpu("the examples, which are processes of their own")


def programs():
    for path in sorted(EXAMPLES.glob("*.py")):
        marks = [pytest.mark.needs(name) for name in LIBRARIES.get(path.name, ())]
        marks += MARKS.get(path.name, ())
        yield pytest.param(path, id=path.name, marks=marks)


@pytest.mark.parametrize("path", list(programs()))
def test_python_example(path, tmp_path):
    settings = {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # of its own processes, too
    code, printed = forked.run(path, tmp_path, TIMEOUT, ARGUMENTS.get(path.name, ()), **settings)
    assert code == 0, printed
    assert printed


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.c")))
def test_c_example(name, tmp_path):
    done = subprocess.run(compiled(name, tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_every_example_is_listed():
    listed = (EXAMPLES.parent / "docs/examples.md").read_text()
    for path in EXAMPLES.iterdir():
        assert f"](../examples/{path.name})" in listed
