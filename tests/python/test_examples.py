"""Every program of examples/ runs, and what it checks is right."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from mps_flash_attn.library import library_path

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARIES = {"transformers_model.py": ["transformers"]}

pytestmark = pytest.mark.cpu("the examples, which are processes of their own")


def programs():
    for path in sorted((ROOT / "examples").glob("*.py")):
        marks = [pytest.mark.needs(name) for name in LIBRARIES.get(path.name, ())]
        yield pytest.param(path, id=path.name, marks=marks)


def run(*command):
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
    return done.stdout


@pytest.mark.parametrize("path", list(programs()))
def test_python_example(path):
    run(sys.executable, path)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.c")), ids=lambda path: path.name)
def test_c_example(path, tmp_path):
    library, program = library_path(), tmp_path / path.stem
    strict = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
    places = (f"-I{ROOT / 'include'}", library, f"-Wl,-rpath,{library.parent}", "-lm")
    subprocess.run(("cc", *strict, path, *places, "-o", program), check=True)
    run(program)


def test_every_example_is_listed():
    listed = (ROOT / "docs/examples.md").read_text()
    for path in (ROOT / "examples").iterdir():
        assert f"](../examples/{path.name})" in listed
