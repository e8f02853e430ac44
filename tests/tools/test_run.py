"""tests/run.py counts what ran: no test is lost, and nothing that went wrong is a pass."""

import pathlib
import sys

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
