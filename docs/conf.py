"""How Sphinx builds the documentation: `make docs`, into build/docs.

The pages are the Markdown files of this folder, which GitHub shows as well. Of the Python package the reference is made
from its docstrings, of the C library from include/mfa.h (c_header.py).
"""

import pathlib
import re
import sys

from sphinx.ext.autodoc.mock import mock
from sphinx.pycode import ModuleAnalyzer

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "python")]

version = ".".join(
    re.search(rf"MFA_VERSION_{part} (\d+)", (ROOT / "include/mfa.h").read_text())[1]
    for part in ("MAJOR", "MINOR", "PATCH")
)
release, project, author, copyright = version, "libmfa", "libmfa contributors", "libmfa contributors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "c_header"]
myst_heading_anchors = 4  # the anchors that GitHub gives to headings
# Names of other libraries.
nitpick_ignore_regex = [
    ("c:identifier", r"size_t|u?int\d+_t"),
    ("py:class", r"(torch|collections|jax|numpy)\..*|.*\.(BlockMask|AuxRequest)|NDArray.*|Array"),
]
html_theme = "furo"
html_title = f"libmfa {version}"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["jax"]  # which need not be installed
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
python_use_unqualified_type_names = True


def keep_lines(app, what, name, obj, options, lines):
    """Our docstrings are aligned by hand: what follows the first paragraph is shown as it is written."""
    first = lines.index("") if "" in lines else len(lines)
    if any(line.startswith(" ") for line in lines[first:]):
        lines[first:] = ["", "::", "", *(f"    {line}" for line in lines[first + 1 :])]


def unlink_outside(app, document, content):
    """Links to files outside this folder become their text, since the site does not have those files."""
    content[0] = re.sub(r"\[([^]]+)\]\(\.\./[^)\s]+\)", r"\1", content[0])


def hide_overloads(app):
    """A function is shown once, with the types of its definition."""
    with mock(app.config.autodoc_mock_imports):
        for module in ("attention", "jax", "numpy"):
            analyzer = ModuleAnalyzer.for_module(f"mps_flash_attn.{module}")
            analyzer.analyze()
            analyzer.overloads.clear()


def setup(app):
    app.connect("builder-inited", hide_overloads)
    app.connect("autodoc-process-docstring", keep_lines)
    app.connect("source-read", unlink_outside)
