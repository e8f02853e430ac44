"""Checks the documents against the project: they may not promise what is not there, nor leave out what is.

    tools/check_docs.py [ROOT]

docs/abi.md has a heading for every public function and no other; names of functions, constants and files that
a document mentions exist; links lead somewhere; whole C programs in a document compile.
"""

import os
import pathlib
import re
import subprocess
import sys

import tree
from check_names import FOLDERS, public_functions

CODE = (".c", ".h", ".inc", ".py", ".sh", ".txt", ".toml")
ANYWHERE = re.compile(r"\b(?:mfa_[a-z0-9_]*[a-z0-9]|MFA_[A-Z0-9_]*[A-Z0-9])\b(?![_*<])")


def prose(text):
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """The anchors that a document's headings get."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_abi(root, report):
    headings = re.findall(r"^#+ .*`mfa_.*", (root / "docs/abi.md").read_text(), re.MULTILINE)
    described = re.findall(r"`(mfa_\w+)`", "\n".join(headings))
    declared = public_functions(root)
    for name in sorted({*described, *declared}):
        report.check(name in described, f"docs/abi.md: no heading for {name}")
        report.check(name in declared, f"docs/abi.md: {name} is not in include/mfa.h")
        report.check(described.count(name) < 2, f"docs/abi.md: {name} has more than one heading")


def check_names(root, path, text, known, report):
    for name in sorted(set(ANYWHERE.findall(text))):
        report.check(name in known, f"{path}: {name} is nowhere in the project")
    tops = "|".join(re.escape(folder) for folder in sorted(FOLDERS) if "/" not in folder)
    for name in sorted(set(re.findall(rf"`((?:{tops})/[\w./-]*)`", text))):
        report.check((root / name).exists(), f"{path}: {name} does not exist")


def check_links(root, path, text, report):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):  # another site: not ours to keep alive
            continue
        name, _, anchor = target.partition("#")
        file = (root / path).parent / name if name else root / path
        fine = file.exists() and (not anchor or anchor in anchors(file.read_text()))
        report.check(fine, f"{path}: the link {target} leads nowhere")


def check_programs(root, path, text, report):
    command = [os.environ.get("CC", "cc"), "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    command += [f"-I{root / 'include'}", "-x", "c", "-"]
    for program in re.findall(r"^```c\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if "int main(" in program:
            done = subprocess.run(command, input=program, capture_output=True, text=True)
            report.check(not done.returncode, f"{path}: a C program does not compile:\n{done.stderr}")


def main():
    root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else tree.default_root()
    report = tree.Report()
    check_abi(root, report)
    sources = [root / path for path in tree.files(root, *CODE)] + [root / "Makefile"]
    known = set(ANYWHERE.findall("\n".join(path.read_text() for path in sources if path.exists())))
    for path in tree.files(root, ".md"):
        text = (root / path).read_text()
        check_names(root, path, text, known, report)
        check_links(root, path, text, report)
        check_programs(root, path, text, report)
    report.finish()


if __name__ == "__main__":
    main()
