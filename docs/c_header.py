"""A directive of Sphinx, mfa-header: the declarations of include/mfa.h, each under its name, with its comment.

A paragraph of the header is a comment and the declarations that it describes, up to a blank line. The comment is shown
as text, or as it is written if it has indented lines; structs, enums and other types are shown as they are written.
"""

import pathlib
import re
import textwrap

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

HEADER = pathlib.Path(__file__).resolve().parent.parent / "include/mfa.h"
COMMENT = re.compile(r"/\*(.*?)\*/\s*", re.DOTALL)
NAMES = (
    ("function", re.compile(r"^MFA_API (?P<signature>[^;]*?\b\w+\([^;]*)\);", re.MULTILINE)),
    ("enum", re.compile(r"^typedef enum (?P<signature>\w+) \{", re.MULTILINE)),
    ("struct", re.compile(r"^typedef struct (?P<signature>\w+) (?:\{|\w+;)", re.MULTILINE)),
    ("type", re.compile(r"^typedef \w+ \(\*(?P<signature>\w+)\)", re.MULTILINE)),
    ("macro", re.compile(r"^#define (?P<signature>MFA_(?!API)\w+)", re.MULTILINE)),
)


def paragraphs(text):
    """The header's paragraphs after its include lines: [(comment, code)]. A brace that is open holds one together."""
    body = text.partition('extern "C" {\n#endif\n')[2].rpartition("#ifdef __cplusplus")[0]
    whole = []
    for part in re.split(r"\n\s*\n", body.strip()):
        if whole and whole[-1].count("{") > whole[-1].count("}"):
            whole[-1] += "\n\n" + part
        else:
            whole.append(part)
    for part in whole:
        comment = COMMENT.match(part)
        text = textwrap.dedent(re.sub(r"^ ?\* ?", "", comment[1].strip(), flags=re.MULTILINE)) if comment else ""
        yield text, part[comment.end() :] if comment else part


def rst(text):
    """The reference as reStructuredText."""
    lines = []
    for comment, code in paragraphs(text):
        found = [(kind, match) for kind, pattern in NAMES for match in pattern.finditer(code)]
        for number, (kind, match) in enumerate(sorted(found, key=lambda one: one[1].start())):
            signature = " ".join(match["signature"].split()) + (")" if kind == "function" else "")
            lines += [f".. c:{kind}:: {signature}", ""]
            if number == len(found) - 1:  # the comment and the lines are of the whole paragraph
                verbatim = re.search("^ ", comment, re.MULTILINE)
                lines += ["   ::", ""] if verbatim else []
                text = comment if verbatim else re.sub(r"([*`|_\\])", r"\\\1", comment)
                lines += [f"   {'   ' if verbatim else ''}{line}" for line in text.splitlines()] + [""]
                if any(kind != "function" for kind, _ in found):
                    lines += ["   .. code-block:: c", "", *(f"      {line}" for line in code.splitlines()), ""]
    return lines


class Header(Directive):
    def run(self):
        self.state.document.settings.env.note_dependency(str(HEADER))
        node = nodes.section()
        node.document = self.state.document
        self.state.nested_parse(StringList(rst(HEADER.read_text()), source=str(HEADER)), 0, node)
        return node.children


def setup(app):
    app.add_directive("mfa-header", Header)
    return {"parallel_read_safe": True}
