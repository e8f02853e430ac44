"""The checks of tools/ find nothing in this tree, and find errors: each row adds one to a small valid project."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import run  # noqa: E402

SOUND = {
    "include/mfa.h": "#include <stdint.h>\n#define MFA_ONE 1\n#define MFA_API\nMFA_API int mfa_plan_run(int plan);\n",
    "src/mfa.c": '#include "mfa.h"\n#include "core/plan.h"\n\nint mfa_plan_run(int plan) {\n    return plan;\n}\n',
    "src/core/plan.h": "struct mfa_plan {\n    int plan;\n};\n",
    "src/core/args.h": "struct mfa_args {\n    int head_dim;\n};\n",
    "src/cpu/tiles.c": '#include "core/plan.h"\n\nint mfa_cpu_choose(void) {\n    return 1;\n}\n',
    "src/cpu/kernels/scalar.c": '#include "core/args.h"\n\nint mfa_cpu_scalar(void) {\n    return 1;\n}\n',
    "docs/abi.md": "# ABI\n\n## `mfa_plan_run`\n\n[Above](#abi), `src/mfa.c`, forward_f32_d64_q48_k192_band_avx512.\n",
    "python/mps_flash_attn/tensors.py": "def pointer(tensor):\n    return tensor.data_ptr()\n",
}

# Check, file, the text added at its end (a new file: all of it), and the expected message.
PLAN_H = "src/core/plan.h"
ERRORS = (
    ("check_includes.py", PLAN_H, '#include "cpu/tiles.h"\n', "src/core/plan.h:4: includes cpu/tiles.h"),
    ("check_includes.py", "src/cpu/kernels/scalar.c", '#include "core/plan.h"\n', "core/plan.h; it may include"),
    ("check_includes.py", "src/cpu/tiles.c", '#include "metal/tiles.h"\n', "includes metal/tiles.h"),
    ("check_includes.py", "src/cpu/tiles.c", '#include "cpu/gone.h"\n', "cpu/gone.h, which is not there"),
    ("check_includes.py", PLAN_H, "#include <immintrin.h>\n", "which is not for this module"),
    ("check_includes.py", "include/mfa.h", '#include "core/plan.h"\n', "it may include nothing of ours"),
    ("check_includes.py", "src/other.c", "int one;\n", "no rule says"),
    ("check_includes.py", "python/mps_flash_attn/run.py", "import ctypes\n", "that is the work of library.py"),
    ("check_names.py", "include/mfa.h", "MFA_API int mfa_run(void);\n", "mfa_run: a public function is"),
    ("check_names.py", "include/mfa.h", "#define ONE 1\n", "ONE: a constant is MFA_"),
    ("check_names.py", "include/mfa.h", "typedef struct plan {\n    int a;\n} plan;\n", "plan: a type is mfa_"),
    ("check_names.py", PLAN_H, "typedef int mfa_number_t;\n", "mfa_number_t: no type of ours ends in _t"),
    ("check_names.py", PLAN_H, "struct row_t {\n    int a;\n};\n", "row_t: no type of ours ends in _t"),
    ("check_names.py", "src/cpu/tiles.c", "int choose(void) {\n    return 1;\n}\n", "choose: a function across files"),
    ("check_names.py", "src/cpu/tiles.c", "int mfa_core_x(void) {\n    return 1;\n}\n", "begins with mfa_cpu_"),
    ("check_names.py", "src/util/list.h", "struct list;\n", "src/util: not in the list of folders"),
    ("check_names.py", "docs/abi.md", "forward_f32_d64_avx512\n", "not a kernel key"),
    ("check_names.py", "docs/abi.md", "decode_backward_f32_d64_avx512\n", "not a kernel key"),
    ("check_names.py", PLAN_H, "int few_rows;\n", "plan.h:4: few_rows is a private word; standard terms: decode"),
    ("check_names.py", PLAN_H, "/* The Metal room is\n * open. */\n", "plan.h:4: Metal room is a private word"),
    ("check_names.py", "src/cpu/tiles.c", "// Seats of lanes.\n", "tiles.c:6: Seats is a private word"),
    ("check_names.py", "docs/abi.md", "It is told.\n", "docs/abi.md:6: told is a private word"),
    ("check_names.py", "tests/test_hostile.c", "int one;\n", "tests/test_hostile.c:0: hostile is a private word"),
    ("check_docs.py", "include/mfa.h", "MFA_API int mfa_plan_tell(int plan);\n", "no heading for mfa_plan_tell"),
    ("check_docs.py", "docs/abi.md", "## `mfa_plan_gone`\n", "mfa_plan_gone is not in include/mfa.h"),
    ("check_docs.py", "docs/abi.md", "## `mfa_plan_run`\n", "more than one heading"),
    ("check_docs.py", "docs/abi.md", "`MFA_TWO`\n", "MFA_TWO is nowhere in the project"),
    ("check_docs.py", "docs/abi.md", "`src/gone.c`\n", "src/gone.c does not exist"),
    ("check_docs.py", "docs/abi.md", "[a](gone.md)\n", "the link gone.md leads nowhere"),
    ("check_docs.py", "docs/abi.md", "[a](#gone)\n", "the link #gone leads nowhere"),
    ("check_docs.py", "README.md", "```c\nint main(void) { return mfa(); }\n```\n", "does not compile"),
)


def check(name, root):
    """Runs a check on a project; returns whether it passed, and its output."""
    done = subprocess.run([sys.executable, ROOT / "tools" / name, root], capture_output=True, text=True)
    passed, failed = run.parse_counts(done.stdout)
    assert passed + failed, done.stdout + done.stderr
    assert (done.returncode == 0) == (failed == 0)
    return failed == 0, done.stdout


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


CHECKS = ("check_includes.py", "check_names.py", "check_docs.py")


@pytest.mark.parametrize("name", CHECKS)
def test_sound_project_passes(name, tmp_path):
    write(tmp_path, SOUND)
    content, said = check(name, tmp_path)
    assert content, said


@pytest.mark.parametrize("name, file, added, sentence", ERRORS)
def test_error_is_found(name, file, added, sentence, tmp_path):
    write(tmp_path, {**SOUND, file: SOUND.get(file, "") + added})
    content, said = check(name, tmp_path)
    assert not content
    assert sentence in said


def git(root, *arguments):
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


# The hooks of .pre-commit-config.yaml that are no programs of others: hook, the text added to PLAN_H, what it prints.
HOOKS = (
    ("tabs", "\tint tab;\n", "src/core/plan.h:4:"),
    ("columns", f"/* {'long ' * 30}*/\n", "src/core/plan.h:4:"),
    ("ascii", "/* \N{LATIN SMALL LETTER E WITH ACUTE} */\n", "src/core/plan.h:4:"),
    ("left-overs", "/* TO{} */\n".format("DO"), "src/core/plan.h:4:"),
    ("left-overs", "#if 0\n#endif\n", "src/core/plan.h:4:"),
    ("length", "int line;\n" * 600, "src/core/plan.h"),
)


def lint(root, *arguments):
    """Runs pre-commit in a project; returns whether it passed, and its output."""
    done = subprocess.run(["pre-commit", "run", *arguments], cwd=root, capture_output=True, text=True)
    assert "No hook with id" not in done.stdout, done.stdout
    return done.returncode == 0, done.stdout


def test_this_tree_passes(tmp_path):
    """make lint; in a copy where the tree is not a checkout that git reads, as one of another user."""
    root = ROOT
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True).returncode:
        root = tmp_path / "tree"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("build", ".git", "__pycache__", ".*_cache"))
        git(root, "init")
        git(root, "add", ".")
        git(root, "commit", "-m", "tests: a copy")
    content, said = lint(root, "--all-files", "--hook-stage", "manual")
    assert content, said


@pytest.mark.parametrize("hook, added, sentence", HOOKS)
def test_hook(hook, added, sentence, tmp_path):
    write(tmp_path, {**SOUND, ".pre-commit-config.yaml": (ROOT / ".pre-commit-config.yaml").read_text()})
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    assert lint(tmp_path, hook, "--all-files")[0]
    write(tmp_path, {PLAN_H: SOUND[PLAN_H] + added})
    content, said = lint(tmp_path, hook, "--all-files")
    assert not content
    assert sentence in said


@pytest.mark.parametrize(
    "message, fine", (("core: plan once\n\nMore.\n", True), ("Fixed some stuff\n\ncore: plan once\n", False))
)
def test_commit_subject(message, fine, tmp_path):
    write(tmp_path, {".pre-commit-config.yaml": (ROOT / ".pre-commit-config.yaml").read_text(), "message": message})
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", message)
    assert lint(tmp_path, "subject", "--hook-stage", "commit-msg", "--commit-msg-filename", "message")[0] == fine
    content, said = lint(tmp_path, "subjects", "--hook-stage", "manual", "--all-files")
    assert content == fine
    assert ("Fixed some stuff" in said) != fine


NUMBERS = "".join(f"#define MFA_VERSION_{part} {n}\n" for part, n in (("MAJOR", 1), ("MINOR", 2), ("PATCH", 3)))


@pytest.mark.parametrize(
    "tag, heading, sentence",
    (
        ("v1.2.3", "1.2.3, 2026-12-31", None),
        ("v1.2.4", "1.2.4, 2026-12-31", "the tag is v1.2.4, and include/mfa.h has version 1.2.3"),
        ("v1.2.3", "1.2.3, not yet released", 'begins with "1.2.3, not yet released"'),
        ("v1.2.3", "1.2.2, 2026-12-31", 'begins with "1.2.2, 2026-12-31"'),
    ),
)
def test_release(tag, heading, sentence, tmp_path):
    changes = f"# Changes\n\n## {heading}\n\n- One.\n- Two.\n\n## 1.0.0, 2026-01-01\n\n- Old.\n"
    write(tmp_path, {"include/mfa.h": NUMBERS, "CHANGELOG.md": changes})
    command = [sys.executable, ROOT / "tools/release.py", tag, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    if sentence is None:
        assert (done.returncode, done.stdout) == (0, "- One.\n- Two.\n")
    else:
        assert done.returncode and not done.stdout
        assert sentence in done.stderr


@pytest.mark.parametrize(
    "listed, sentence",
    (
        ("mfa_plan_run\n", None),
        ("", "mfa_plan_run: not in tests/symbols.txt"),
        ("mfa_plan_gone\nmfa_plan_run\n", "mfa_plan_gone: not exported"),
    ),
)
def test_exported_symbols(listed, sentence, tmp_path):
    write(tmp_path, {**SOUND, "tests/symbols.txt": listed})
    library = tmp_path / "libmfa.so"
    compile_it = ["cc", "-shared", "-fPIC", "-Iinclude", "-Isrc", "src/mfa.c", "-o", library]
    subprocess.run(compile_it, cwd=tmp_path, check=True)
    command = [sys.executable, ROOT / "tools/check_names.py", "--library", library, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (sentence is None)
    assert (sentence or "") in done.stdout
