"""tests/run.py counts what ran: no test is lost, and nothing that went wrong is a pass. Two steps run at a time."""

import pathlib
import subprocess
import sys
import threading
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import run

SETUP = '<properties><property name="cmake_labels" value="metal;setup"/></properties>'
TESTS = (
    # what CTest writes
    ('<testcase name="a" status="run"><system-out>seed 1\n12 passed, 0 failed\n</system-out></testcase>', (12, 0, 0)),
    ('<testcase name="a" status="run"><system-out>[  PASSED  ] 4 test(s).</system-out></testcase>', (4, 0, 0)),
    ('<testcase name="a" status="run"><system-out>no count</system-out></testcase>', (0, 1, 0)),
    (f'<testcase name="a" status="run">{SETUP}</testcase>', (0, 0, 0)),
    (f'<testcase name="a" status="fail"><failure/>{SETUP}</testcase>', (0, 1, 0)),
    ('<testcase name="a" status="fail"><failure/><system-out>5 passed, 2 failed</system-out></testcase>', (5, 2, 0)),
    # it has counted, and then crashed or hung
    ('<testcase name="a" status="fail"><failure/><system-out>5 passed, 0 failed\n</system-out></testcase>', (5, 1, 0)),
    ('<testcase status="notrun"><skipped message="x"/><system-out>SKIPPED: why</system-out></testcase>', (0, 0, 1)),
    ('<testcase status="notrun"><skipped message="x"/><system-out/></testcase>', (0, 1, 0)),  # it could not begin
    # what pytest writes
    ('<testcase classname="m" name="a"/>', (1, 0, 0)),
    ('<testcase classname="m" name="a"><failure message="m">t</failure></testcase>', (0, 1, 0)),
    ('<testcase classname="m" name="a"><error message="m">t</error></testcase>', (0, 1, 0)),
    ('<testcase classname="m" name="a"><skipped type="pytest.skip" message="m">t</skipped></testcase>', (0, 0, 1)),
    ('<testcase classname="m" name="a"><skipped type="pytest.xfail" message="m"/></testcase>', (1, 0, 0)),
)


def counted(folder, text, code):
    tally, report = run.Tally(), folder / "report.xml"
    if text is not None:
        report.write_text(f"<testsuite>{text}</testsuite>")
    run.count(tally, "step", report, code)
    return tally.passed, tally.failed, sum(tally.skipped.values())


@pytest.mark.parametrize("text, expected", TESTS)
def test_each_case_is_counted(text, expected, tmp_path):
    good = TESTS[0][0]
    both = tuple(map(sum, zip((12, 0, 0), expected, strict=True)))
    assert counted(tmp_path, good + text, int(expected[1] > 0)) == both


@pytest.mark.parametrize("text, code", ((None, 0), ("", 0), (TESTS[0][0], 1), (TESTS[0][0], -9)))
def test_a_run_that_went_wrong_is_a_failure(text, code, tmp_path):
    """It wrote no report, ran no test, or failed without a test that did."""
    assert counted(tmp_path, text, code)[1] == 1


@pytest.mark.parametrize(
    "text, counts",
    (
        ("seed 1\n12 passed, 3 failed\n", (12, 3)),
        ("[  PASSED  ] 4 test(s).\n[  PASSED  ] 2 test(s).\n[  FAILED  ] 1 test(s), listed below:\n", (6, 1)),
        ("Segmentation fault\n", (0, 0)),
    ),
)
def test_counts_are_read(text, counts):
    assert run.parse_counts(text) == counts


def test_steps_are_presets():
    names = (run.ROOT / "CMakePresets.json").read_text()
    for step in run.STEPS.values():
        assert all(target == "wheels" or f'"name": "{target}"' in names for target in step.builds)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of builds, with none in it."""
    monkeypatch.setattr(run, "BUILD", tmp_path)
    monkeypatch.setattr(run, "POLL", 0.01)
    monkeypatch.setattr(run, "BUILT", {})
    return tmp_path


def a_step(builds=(), pytest=None):
    return run.Step("what it does", 1, builds, ("", ""), pytest)


def test_lines_have_the_name_of_their_step(folder, capsys):
    this = run.Run("release", a_step())
    text = r"import sys; print('one\n\ntwo'); print('three', end='', file=sys.stderr); sys.exit(3)"
    assert this.command(sys.executable, "-uc", text) == 3
    assert this.command(sys.executable, "-c", "import os; print(os.environ['FOUR'])", FOUR="4") == 0
    assert this.command(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)") == -9
    lines = [line for line in capsys.readouterr().out.splitlines() if "---" not in line]
    assert all(line.startswith("release      |") for line in lines)
    assert [line[15:] for line in lines] == ["", "one", "", "two", "three", "", "4", ""]
    assert (folder / "test-release.log").read_text() == "one\n\ntwo\nthree4\n"


def test_a_process_that_a_command_leaves_behind_is_not_waited_for(folder):
    this = run.Run("release", a_step())
    assert this.command("sh", "-c", "sleep 100 & echo $!") == 0
    subprocess.run(["kill", (folder / "test-release.log").read_text().strip()], check=True)


def test_the_time_of_a_command_is_its_own(folder):
    """That of each step, with the processes that the command has waited for."""
    busy = "import subprocess, sys, time\nwhile time.process_time() < 0.5: pass"
    both = [run.Run("release", a_step()), run.Run("python", a_step())]
    texts = (f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])", "pass")
    threads = [
        threading.Thread(target=this.command, args=(sys.executable, "-Sc", text))
        for this, text in zip(both, texts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert both[0].cpu > 0.5 > both[1].cpu > 0


def test_two_steps_run_at_a_time_and_build_once(folder, monkeypatch):
    """Each of the first two ends only once the other has begun."""
    meet, built, began = threading.Barrier(2, timeout=60), [], []

    def tests(this, report, full):
        began.append(this.name)
        if this.name in ("release", "checks"):
            meet.wait()
        report.write_text(f"<testsuite>{TESTS[0][0]}</testsuite>")
        return int(this.name == "metal")

    def build(this, name):
        built.append(name)
        return name != "tsan"

    monkeypatch.setattr(run.Run, "run_ctest", tests)
    monkeypatch.setattr(run.Run, "run_pytest", tests)
    monkeypatch.setattr(run.Run, "build_preset", build)
    chosen = {
        "checks": a_step(("release",), ["tests"]),
        "release": a_step(("release",)),
        "tsan": a_step(("tsan", "release")),
        "metal": a_step(("release",)),
        "python": a_step(("release",), ["tests"]),
    }
    runs = run.run_steps(chosen, full=False)
    assert [this.name for this in runs] == list(chosen)
    assert set(began[:2]) == {"checks", "release"} and set(began[2:]) == {"metal", "python"}
    assert sorted(built) == ["release", "tsan"]
    tally = run.Tally()
    for this in runs:
        tally += this.tally
    assert (tally.passed, tally.failed) == (12 * 4, 2)
    assert tally.failures == ["tsan: tsan does not build: 1 failed", "metal: exit code 1, 1 tests: 1 failed"]


def test_an_error_of_the_program_ends_all_steps(folder, monkeypatch):
    began = []

    def tests(this, report, full):
        began.append(this.name)
        if this.name == "release":
            raise KeyError(this.name)
        time.sleep(0.1)

    monkeypatch.setattr(run.Run, "run_ctest", tests)
    with pytest.raises(KeyError, match="release"):
        run.run_steps({"release": a_step(), **{str(n): a_step() for n in range(300)}}, full=False)
    assert len(began) < 300
