"""Checks that a tag is a version that may be released, and prints its section of CHANGELOG.md.

    tools/release.py TAG [ROOT]

The tag is v and the version of include/mfa.h. CHANGELOG.md begins with a section of that version, whose heading has the
date of the release, as in "## 0.1.0, 2026-12-31".
"""

import pathlib
import re
import sys

import tree


def version(root):
    """The version of include/mfa.h."""
    header = (root / "include/mfa.h").read_text()
    return ".".join(re.search(rf"MFA_VERSION_{part} (\d+)", header)[1] for part in ("MAJOR", "MINOR", "PATCH"))


def first_section(root):
    """(heading, text) of the newest section of CHANGELOG.md."""
    found = re.search(r"^## (.*?)\n(.*?)(?=^## |\Z)", (root / "CHANGELOG.md").read_text(), re.DOTALL | re.MULTILINE)
    return (found[1], found[2].strip()) if found else ("", "")


def main():
    tag = sys.argv[1]
    root = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else tree.default_root()
    heading, text = first_section(root)
    if tag != f"v{version(root)}":
        sys.exit(f"the tag is {tag}, and include/mfa.h has version {version(root)}")
    if not re.fullmatch(rf"{re.escape(version(root))}, \d{{4}}-\d\d-\d\d", heading):
        sys.exit(f'CHANGELOG.md begins with "{heading}"; it must be "{version(root)}, " and the date of the release')
    print(text)


if __name__ == "__main__":
    main()
