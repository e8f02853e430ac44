"""Every program of examples/ runs, and what it checks is right."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from c_programs import EXAMPLES, compiled

LIBRARIES = {"transformers_model.py": ["transformers"], "transformers_packed.py": ["transformers"]}
WITHOUT_JAX = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")

pytestmark = pytest.mark.cpu("the examples, which are processes of their own")


def programs():
    for path in sorted(EXAMPLES.glob("*.py")):
        marks = [pytest.mark.needs(name) for name in LIBRARIES.get(path.name, ())]
        marks += [WITHOUT_JAX] if path.name == "jax_attention.py" else []
        yield pytest.param(path, id=path.name, marks=marks)


def run(*command, cwd=None):
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=600, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
    return done.stdout


@pytest.mark.parametrize("path", list(programs()))
def test_python_example(path):
    run(sys.executable, path)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.c")))
def test_c_example(name, tmp_path):
    run(compiled(name, tmp_path), cwd=tmp_path)


def test_every_example_is_listed():
    listed = (EXAMPLES.parent / "docs/examples.md").read_text()
    for path in EXAMPLES.iterdir():
        assert f"](../examples/{path.name})" in listed
