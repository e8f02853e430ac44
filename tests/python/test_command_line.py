"""python -m mps_flash_attn: info, explain, check and precompile."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mps_flash_attn
from mps_flash_attn import __main__ as command_line
from mps_flash_attn import apple, check, display, precompiling, reference, speed
from mps_flash_attn.library import DEVICE_METAL, Library, Unsupported, library, scalars
from mps_flash_attn.sdpa import torch_mps
from mps_flash_attn.torch_host import unavailable_reason
from stand_in import FULL, TIMEOUT

pytestmark = pytest.mark.cpu("the command line is tested on the CPU, and in test_metal.py")


def run(*arguments, **environment):
    """In a process of its own, which first imports PyTorch: seconds."""
    path = os.pathsep.join([str(Path(mps_flash_attn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "mps_flash_attn", *arguments],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def run_here(*arguments):
    """The same in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["mps_flash_attn", *arguments])
        patch.setenv("COLUMNS", "200")
        try:
            status = command_line.main()
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(arguments, status or 0, out.getvalue(), err.getvalue())


@pytest.fixture
def isas(monkeypatch):
    """The instruction sets that are checked, each in a process of its own: the first and the last, or all."""
    found = library().instruction_sets()
    some = found if FULL else sorted({found[0], found[-1]}, key=found.index)
    monkeypatch.setattr(Library, "instruction_sets", lambda _: some)
    return some


def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    words = ("cpu", "instruction set", "threads", "not replaced in this process; each calls replace_sdpa()")
    for word in (library().version, library().path.name, *words):
        assert word in done.stdout


def test_explain():
    done = run_here("explain", *"forward f16 b2 h8/2 q512 kv512 d64 causal".split())
    assert done.returncode == 0, done.stderr
    assert "forward_f16_d64" in done.stdout and "workspace" in done.stdout


def test_explain_for_metal():
    """A line that names the device is explained for that one alone."""
    done = run_here("explain", "forward f16 b1 h1 q4 kv4 d64 metal")
    assert done.returncode == 0, done.stderr
    assert "metal" in done.stdout and "cpu" not in done.stdout
    assert "forward_f16_d64" in done.stdout or "not supported" in done.stdout


def test_explain_a_wrong_line():
    done = run_here("explain", "sideways f16")
    assert done.returncode == 1 and done.stdout == ""
    assert "sideways" in done.stderr and "Traceback" not in done.stderr


def test_no_library():
    done = run("info", MFA_LIBRARY="/nowhere/libmfa.so")
    assert done.returncode == 1 and "libmfa is not at /nowhere/libmfa.so" in done.stderr


def test_what_is_no_library(tmp_path):
    file = tmp_path / "libmfa.so"
    file.write_text("no library")
    done = run("check", MFA_LIBRARY=str(file))
    assert done.returncode == 1 and done.stdout == ""
    assert f"{file} cannot be loaded as libmfa: " in done.stderr and "Traceback" not in done.stderr


def test_path_in_no_encoding(tmp_path):
    file = tmp_path / os.fsdecode(b"lib\xff.so")
    shutil.copy(library().path, file)
    done = run("info", MFA_LIBRARY=str(file), PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 0, done.stderr
    assert "lib\\udcff.so" in done.stdout


def test_without_a_command():
    done = run_here()
    assert done.returncode == 2 and "info,explain,check,precompile" in done.stderr


@pytest.mark.needs("rich")
def test_with_rich():
    done = run_here("info")
    assert done.returncode == 0, done.stderr
    assert "libmfa" in done.stdout and not done.stdout.isascii()  # it has borders


def test_without_rich(tmp_path):
    """Without rich, tables become plain lines, and nothing else is printed where there is no terminal."""
    (tmp_path / "rich.py").write_text("raise ImportError\n")
    path = os.pathsep.join([str(tmp_path), str(Path(mps_flash_attn.__file__).parents[1])])
    one = ["check", "--filter", "h8/2 q1", "--report", str(tmp_path / "report")]
    for command in (["info"], one):
        done = run(*command, PYTHONPATH=path)
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout.isascii() and "cpu" in done.stdout


def test_progress_without_rich(monkeypatch):
    """On a terminal, each step overwrites the one before, and nothing stays."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(display, "Console", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "21")
    with display.progress(2) as begin:
        begin("one")
        begin("two, with more words than fit")
    lines = ["1/2 one             ", "2/2 two, with more w", " " * 20]
    assert sys.stderr.getvalue() == "".join(f"\r{line}\r" for line in lines)


# --- check ---------------------------------------------------------------------------------------


def test_quick_check(tmp_path):
    """Without --all, what libmfa chooses on this machine is checked on the quick set, and timed beside PyTorch."""
    report = tmp_path / "report.txt"
    done = run_here("check", "--filter", "h8/2 q1", "--report", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 0 failed" in done.stdout and "check --all tries every kernel" in done.stdout
    text = report.read_text()
    assert "checked: the quick set, what contains 'h8/2 q1'\n" in text
    right, timed = (line.split(" | ") for line in text.splitlines() if " | " in line)
    assert right[:3] == ["right", "cpu", "f16 b1 h8/2 q1 kv1100 d128"] and right[3].startswith("decode_f16_d128")
    assert timed[:3] == ["timed", "cpu", check.QUICK[right[2]]]
    ours, theirs, ratio = (float(re.sub(r"[^\d.]", "", words)) for words in timed[3:])
    assert ours > 0 and ratio == pytest.approx(theirs / ours, rel=0.02, abs=0.01)


def test_the_quick_set():
    """It has each pass, decode, both kinds of masks, grouped heads and the dtypes of the GPU."""
    lines = " ".join(check.QUICK)
    for words in ("f32 ", "f16 ", "bf16 ", " causal", "mask_bool", "mask_f32", "h8/2 q1 "):
        assert words in lines
    assert {line.split()[0] for line in check.QUICK.values()} == {"forward", "backward"}
    for line in check.QUICK:
        library().parse(f"backward {line}")


def test_not_timed(monkeypatch):
    """What PyTorch cannot run is checked all the same, and the report says why it has no times."""

    def fail(*_):
        raise RuntimeError("out of memory")

    line = "f32 b1 h1 q5 kv7 d8"
    monkeypatch.setitem(check.QUICK, line, f"forward {line}")
    monkeypatch.setattr(speed, "compare", fail)
    row = {"machine": "cpu", "problem": line} | check.examine(line, "cpu")
    text = check.report_text([row], "all")
    assert f"right | cpu | {line} | " in text
    assert f"timed | cpu | forward {line} | not timed | RuntimeError: out of memory\n" in text


@pytest.mark.parametrize("which, kernel", [("forward", "prefill"), ("backward", "holds the scores")])
def test_kernel_of_pytorch(monkeypatch, which, kernel):
    """On mps, the times name the kernel of PyTorch's that they are compared with."""
    monkeypatch.setattr(check, "_GPU", "cpu")
    monkeypatch.setattr(torch_mps, "_kernels", torch_mps.installed_kernels("2.13.0", (26, 2)))
    line = f"{which} f32 b1 h2 q9 kv9 d64"
    monkeypatch.setattr(speed, "compare", lambda *_: speed.Speed(0.002, 0.003))
    row = {"machine": "metal", "problem": line} | check._times(line, "cpu")
    assert row["torch_kernel"] == kernel
    (words,) = check._timed([row])
    assert words == ("metal", line, "ours 2 ms", "PyTorch 3 ms", "PyTorch / ours 1.50", kernel)


def test_times_have_no_exponents():
    row = {"machine": "cpu", "timed": "line", "ours_ms": 0.00385, "torch_ms": 1103.4}
    (words,) = check._timed([row])
    assert words[2:4] == ("ours 0.00385 ms", "PyTorch 1103 ms")


def test_report_of_a_mac(monkeypatch):
    """What the report says of a Mac with a GPU."""
    monkeypatch.setattr(check, "unavailable_reason", lambda _: "")
    for name, value in {
        "gpu_name": "Apple M9",
        "gpu_family": "apple9",
        "macos_version": "26.2",
        "macos_build": "25C56",
    }.items():
        monkeypatch.setattr(apple, name, lambda value=value: value)
    text = check.report_text([], "the quick set")
    for line in ("macOS: 26.2 (25C56)", "Metal: Apple M9", "GPU family: apple9", "thresholds of mps: none measured"):
        assert f"\n{line}\n" in text


def test_check(tmp_path, isas):
    """Each instruction set is checked in a process of its own; the report has a line for each problem."""
    report = tmp_path / "report.txt"
    done = run_here("check", "--all", "--filter", "b1 h2 q3 kv300", "--report", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scalar" in isas or "neon" in isas
    lines = [line for line in report.read_text().splitlines() if " | " in line]
    for isa in isas:
        mine = [line for line in lines if f"| cpu {isa} |" in line]
        assert len(mine) == 4 and all(line.startswith("right |") for line in mine)
        assert any(f"_{isa} " in line for line in mine)
    assert f"{len(lines)} passed, 0 failed" in done.stdout
    for words in (f"PyTorch: {torch.__version__}", f"libmfa: {library().version}", "system: ", "error ", "allowed "):
        assert words in report.read_text()


def test_check_refuses_a_report_that_cannot_be_written(tmp_path):
    """An unwritable report is an error before anything runs."""
    report = tmp_path / "missing/report.txt"
    done = run_here("check", "--report", str(report))
    assert done.returncode == 1 and done.stdout == ""
    assert f"--report is {report}; it must be a file that can be written" in done.stderr
    assert "Traceback" not in done.stderr and not report.parent.exists()
    with pytest.raises(ValueError, match="it must be a file that can be written: Is a directory"):
        check.run("", tmp_path)


def test_check_says_what_it_found_though_its_report_is_lost(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", fail)
    monkeypatch.setattr(check, "machines", lambda _: [])
    assert check.run("", tmp_path / "report") == 1
    assert "0 passed, 0 failed; the report could not be written: no space left" in capsys.readouterr().out


def test_check_covers_what_the_kernels_tell_apart():
    lines = check.problems("cpu")
    assert len(set(lines)) == len(lines)
    for line in lines:
        library().parse(f"forward {line}")
    assert {line.split()[0] for line in lines} == {"f32", "f16", "bf16", "f64"}
    assert {line.split()[0] for line in check.problems("mps")} == {"f32", "f16", "bf16"}


def test_check_finds_what_is_wrong(monkeypatch):
    line = "f32 b1 h1 q5 kv7 d8"
    assert check.examine(line, "cpu")["wrong"] == ""
    exact = reference.attention
    monkeypatch.setattr(reference, "attention", lambda *given, **options: [1.001 * t for t in exact(*given, **options)])
    row = check.examine(line, "cpu")
    assert row["error"] > row["allowed"] and "out: error" in row["wrong"]
    report = check.report_text([{"machine": "cpu", "problem": line} | row], "all")
    assert report.count("WRONG | cpu | f32") == 1 and f"cpu: {line}: out: error" in report


def test_check_survives_a_process_that_ends(tmp_path, monkeypatch):
    """A process that aborts gives a failed row, and the next problem has a process of its own. The library here
    aborts."""
    program = tmp_path / "sitecustomize.py"
    program.write_text(
        "import sys\n"
        "if '--rows' in sys.argv:\n"
        "    import os, mps_flash_attn.check as check\n"
        "    good = check.examine\n"
        "    check.examine = lambda line, device: os.abort() if 'bf16' in line else good(line, device)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # which its processes get
    report = tmp_path / "report.txt"
    command = ("check", "--all", "--filter", "b1 h1 q1 kv1 d64", "--report", str(report))
    monkeypatch.setattr(check, "machines", lambda _: [("cpu", "cpu", {})])
    done = run_here(*command)
    assert done.returncode == 1 and "3 passed, 1 failed" in done.stdout
    assert "bf16 b1 h1 q1 kv1 d64: the process ended with the status -6" in report.read_text()


def test_tune_is_for_metal():
    """On a machine with no Metal device, --tune explains which thresholds there are."""
    if not unavailable_reason("mps"):
        pytest.skip("Metal is here")
    done = run_here("check", "--tune")
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert "check --tune measures thresholds of mps" in done.stderr and "sdpa_thresholds" in done.stderr


def test_tune_and_all_exclude_each_other():
    done = run_here("check", "--tune", "--all")
    assert done.returncode == 2 and "not allowed with argument" in done.stderr


# --- precompile ----------------------------------------------------------------------------------


def test_precompile_is_for_metal():
    lines = list(precompiling.problems(["f16", "f32"], ["64", "192v128"], ["none", "band+softcap"], True))
    assert len(set(lines)) == 40  # two tiles of forward, two kernels of decode, and backward
    assert {scalars(library().parse(line)).device for line in lines} == {DEVICE_METAL}


def test_precompile_without_metal():
    """Without Metal, precompile explains that it has nothing to do."""
    found = library()
    try:
        found.check_supported(found.parse("forward f32 b1 h1 q1 kv1 d64 metal"))
        pytest.skip("Metal is here")
    except Unsupported:
        done = run_here("precompile")
    assert done.returncode == 1 and done.stdout == "" and "Metal" in done.stderr and "Traceback" not in done.stderr
