"""Compiles the C programs of examples/ against the library under test."""

import pathlib
import subprocess

from mps_flash_attn.library import library_path

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def compiled(name, folder):
    """The program in `folder` of the example of this name, which compiles without a warning."""
    library, program = library_path(), folder / pathlib.Path(name).stem
    strict = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
    places = (f"-I{EXAMPLES.parent / 'include'}", library, f"-Wl,-rpath,{library.parent}", "-lm")
    subprocess.run(("cc", *strict, EXAMPLES / name, *places, "-o", program), check=True)
    return program
