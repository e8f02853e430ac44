"""The benchmarks: their problems, counts of work, checks of results, tables and pictures."""

import dataclasses
import json
import pathlib
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "bench"))

import compare
import features
import int8
import matmul
import measure
import peers
import relative
import report
import versus_peers
import versus_torch
from problems import Operands, Problem

pytestmark = pytest.mark.cpu("the benchmarks that these are about")
PICTURE_BYTES = 60_000  # the README shows it


def row(problem, n=1, **more):
    names = ("ours", "torch", "math", *peers.PEERS)
    parsed = Problem.parse(problem)
    made = {"group": "users", "problem": problem, "pass": parsed.passes, "dtype": parsed.dtype, "threads": 2}
    made |= {"machine": "a machine", "versions": "libmfa 1", "date": "2026-01-02", "absent": {}}
    made |= {"share_of_peak": 0.5, "ratio_ours": 1.0}
    made |= {f"{name}_ms": 1.25 * n + k for k, name in enumerate(names)}
    made |= {f"ratio_{name}": 2.0 * n for name in names[1:]}
    return made | {f"{name}_extra_bytes": 1 << 20 for name in names} | more


def test_features(capsys, monkeypatch):
    """It compares its results, and has a row for each feature and pass."""
    monkeypatch.setattr(sys, "argv", ["features.py", "--length", "64", "--sparse-length", "300"])
    monkeypatch.setattr(
        features.speed, "medians", lambda functions, wait: [float(i) for i, _ in enumerate(functions, 1)]
    )
    assert features.main() == 0
    printed = capsys.readouterr().out
    rows = 2 * len(features.features(64)) + 1  # and the layer; two of sparse blocks have no time of PyTorch's
    assert "WRONG" not in printed and printed.count("0.50") == rows + 2 and printed.count("3.00") == rows


def test_int8(capsys, monkeypatch):
    """It compares its results, and has a row for each problem and number of threads."""
    monkeypatch.setattr(sys, "argv", ["int8.py", "--length", "64"])
    monkeypatch.setattr(int8.speed, "medians", lambda functions, wait: [1.0, 2.0, 1.5])
    assert int8.main() == 0
    printed = capsys.readouterr().out
    assert "WRONG" not in printed and printed.count("2.00, 1.50") == 8 * len({1, torch.get_num_threads()})


def test_matmul(capsys, monkeypatch):
    """It compares ours with the reference, and has a line for each problem and number of threads."""
    monkeypatch.setattr(matmul, "PROBLEMS", ("forward f32 b1 h1 q16 kv16 d8",))
    monkeypatch.setattr(matmul, "SIZE", 16)
    monkeypatch.setattr(matmul, "seconds_of", lambda function: function() is None or 1.0)
    monkeypatch.setattr(matmul, "in_process", lambda function, text, threads: function(text))
    monkeypatch.setattr(matmul, "bounds_of", lambda *problem: [measure.Bound("peak", 1e-3, lambda: 1.0)])
    monkeypatch.setattr(matmul, "machine", lambda: "a machine")
    monkeypatch.setattr(sys, "argv", ["matmul.py", "--threads", "1,2", "--runs", "2"])
    assert matmul.main() == 0
    assert capsys.readouterr().out.count("0%, 0%") == 2 * 2
    monkeypatch.setattr(matmul, "check", lambda problem, operands, given: {"ours": "O is off"})
    assert matmul.main() == 1
    assert capsys.readouterr().out.count("WRONG: forward f32 b1 h1 q16 kv16 d8: O is off") == 2 * 2


# --- Problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", ["", " causal", " lower-3 upper0", " lower-2 upper2", " upper2", " mask_bool", " causal mask_bool"]
)
def test_work_counts_visible_pairs(options):
    problem = Problem.parse(f"backward f32 b2 h4/2 q9 kv9 d8v4{options}")
    visible = problem.band(range(problem.q_len)) & (torch.arange(problem.kv_len) < problem.keys)
    assert problem.pairs() == visible.sum()
    assert problem.flop() == 2 * 4 * problem.pairs() * (6 * 8 + 4 * 4)
    assert problem.bytes_read() == 2 * 2 * problem.keys * 12 * 4
    assert not problem.reads_memory


@pytest.mark.parametrize(
    "text, sentence",
    (
        ("forward f32 b1 q4", "expected h<q_heads>"),
        ("sideways f32 b1 h1 q4 kv4 d8", "expected forward or backward"),
        ("forward f32 b1 h1 q4 kv4 d8 alibi", "no benchmark"),
        ("forward f32 b1 h1 q4 kv4 d8 sinks", "no benchmark"),
        ("forward f32 b1 h1 q4 kv4 d8 dropout0.1", "no benchmark"),
        ("forward f32 b1 h1 q4 kv4 d8 block_map_q16 block_map_kv16", "no benchmark"),
    ),
)
def test_what_is_no_problem_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        Problem.parse(text)


def test_lists_are_problems_each_once():
    sides = [side for relation in relative.relations() for side in (relation.one, relation.other)]
    listed = [problem for group in versus_torch.GROUPS.values() for problem in group()]
    for text in (*listed, *(problem for problem, _ in versus_peers.rows()), *(side.text for side in sides)):
        Problem.parse(text)
    assert len(set(listed)) == len(listed)
    names = [relation.name for relation in relative.relations()]
    assert len(set(names)) == len(names)


# --- What may be timed ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", " causal", " lower-3 upper1 softcap20", " mask_bool", " causal mask_f32"])
@pytest.mark.parametrize("passes", ["forward", "backward", "forward+backward"])
def test_ours_is_timed_only_if_right(passes, options):
    problem = Problem.parse(f"{passes} f32 b2 h4/2 q40 kv40 d16{options}")
    operands = Operands.make(problem, seed=3)
    call = measure.Call("ours", problem, operands)
    call.prepare()
    right = call.results(call.run())
    assert measure.check(problem, operands, {"ours": right}) == {}
    for n in range(len(right)):
        wrong = [tensor.clone() for tensor in right]
        wrong[n][-1, -1, -1, -1] += 1e-3
        assert "allowed is" in measure.check(problem, operands, {"ours": wrong})["ours"]


@pytest.mark.parametrize("library", peers.PEERS)
@pytest.mark.parametrize(
    "problem",
    [
        "forward f32 b2 h4 q65 kv65 d32",
        "forward f32 b2 h4/2 q65 kv65 d32 causal",
        "forward f16 b2 h4/2 q1 kv65 d32",
        "forward bf16 b1 h2 q65 kv65 d32 causal",
        "forward+backward f32 b1 h2 q33 kv33 d32 causal",
    ],
)
def test_peers_are_right_or_say_why_not(library, problem):
    problem = Problem.parse(problem)
    operands = Operands.make(problem, seed=4)
    try:
        _, _, results = peers.fastest(library, problem, operands, threads=1)
    except peers.Unsupported as error:
        assert str(error)
        return
    assert measure.check(problem, operands, {library: results}) == {}


@pytest.mark.parametrize("options", [" mask_bool", " lower-3 upper0", " softcap30"])
@pytest.mark.parametrize("library", peers.PEERS)
def test_peers_refuse_options(library, options):
    problem = Problem.parse(f"forward f32 b1 h2 q8 kv8 d16{options}")
    with pytest.raises(peers.Unsupported, match="only plain and causal"):
        peers.fastest(library, problem, Operands.make(problem, seed=5), threads=1)


# --- Tables and pictures -------------------------------------------------------------------------


def relation(**more):
    side = dataclasses.asdict(relative.Side("forward f32 b1 h1 q8 kv8 d8"))
    made = {"group": "relations", "relation": "an option", "one": side, "other": side, "threads": 2}
    made |= {"machine": "a machine", "versions": "libmfa 1", "date": "2026-01-02"}
    return made | {"value": 1.25, "goal": 1.2} | more


def test_means_are_geometric_and_name_the_least():
    rows = [row("forward f32 b1 h1 q8 kv8 d8", n) for n in (1, 4)] + [row("forward f32 b1 h1 q8 kv8 d8 causal")]
    found = {(contender, which): numbers for contender, which, *numbers in report.means(rows)}
    assert found["torch", "forward f32"] == [pytest.approx(4.0), 2.0, 2]
    assert found["ggml", "forward f32 causal"] == [pytest.approx(2.0), 2.0, 1]


def test_tables_say_machine_reasons_and_goals():
    absent = row("forward bf16 b1 h1 q1 kv8 d8", group="peers", absent={"jax": "not installed"}, share_of_read=0.75)
    absent["jax_ms"] = absent["ratio_jax"] = None
    text = report.markdown([row("forward f32 b1 h1 q8 kv8 d8"), absent, relation(), relation(value=1.1)])
    assert "Measured on a machine, 2 threads; libmfa 1; 2026-01-02." in text
    assert "- JAX: not installed" in text
    assert "75% of read" in text
    assert [line[-6:] for line in text.splitlines() if "an option" in line] == ["| no |", " yes |"]


def test_readme_has_its_rows_alone():
    rows = [row(problem) for problem in (*report.README_ROWS, "forward f32 b1 h1 q8 kv8 d8")] + [relation()]
    text = report.markdown_readme(rows)
    assert "Measured on a machine, 2 threads; libmfa 1; 2026-01-02." in text
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == report.README_ROWS
    assert set(report.README_ROWS) < set(versus_torch.users_table())


@pytest.mark.parametrize("factor, mean, status", [(1.0, "1.000", 0), (0.5, "0.500", 1), (0.95, "0.950", 0)])
def test_runs_are_compared_by_their_ratios(factor, mean, status, tmp_path, monkeypatch, capsys):
    names = ("forward f32 b1 h1 q8 kv8 d8", "forward f32 b1 h1 q9 kv9 d8")
    for file, scale, problems in (("base", 1, names), ("changed", factor, (*names, "forward f32 b1 h1 q7 kv7 d8"))):
        rows = [row(problem, ratio_torch=scale * (n + 2)) for n, problem in enumerate(problems)]
        failed = {"problem": "forward f32 b1 h1 q6 kv6 d8", "failed": "it was wrong"}
        (tmp_path / file).write_text(json.dumps([*rows, failed]))
    monkeypatch.setattr(sys, "argv", ["compare.py", *(str(tmp_path / name) for name in ("changed", "base", "base"))])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == status
    said = capsys.readouterr().out
    assert f"Geometric mean {mean}" in said
    assert "q7" not in said


def test_tables_go_between_markers(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.rewrite(file, "new")
    assert file.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    file.write_text("nothing")
    with pytest.raises(SystemExit, match="has no lines"):
        report.rewrite(file, "new")


def test_picture_of_peers_is_small_text_and_reproducible(tmp_path):
    rows = [row(problem, group="peers", threads=threads or 2) for problem, threads in versus_peers.rows()]
    pictures = []
    for name in ("one.svg", "two.svg"):
        report.draw_peers(rows, tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) < PICTURE_BYTES
    for words in ("forward bf16 b1 h32/8 q1 kv16384 d128", "OpenVINO", "a machine, 2 threads", "2026-01-02"):
        assert words in pictures[0]


def test_scaling(tmp_path, monkeypatch, capsys):
    """Medians of the runs, a column for each number of threads, and a picture."""
    problems = "forward f32 b1 h8 q64 kv64 d64", "forward f32 b1 h8 q1 kv64 d64"
    rows = [
        row(problem, threads=threads, share_of_peak=share, share_of_read=0.9 if " q1 " in problem else None)
        for problem in problems
        for threads in (1, 4)
        for share in (0.2 / threads, 0.8 / threads, 0.4 / threads)
    ]
    text = report.markdown_scaling(rows)
    assert "a machine, 4 and 1 threads; libmfa 1; 2026-01-02; medians of 3 runs." in text
    assert "| problem | 1 thread | 4 threads |" in text
    assert f"| `{problems[0]}` | 40% (2.00) | 10% (2.00) |" in text
    assert f"| `{problems[1]}` | 90% of read (2.00) | 90% of read (2.00) |" in text
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    picture = tmp_path / "scaling.svg"
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "rows.json"), "--scaling", str(picture)])
    report.main()
    assert (
        all(problem in picture.read_text() for problem in problems) and "medians of 3 runs" in capsys.readouterr().out
    )
    assert versus_torch.numbers("1,4,16") == [1, 4, 16]
    with pytest.raises(ValueError):
        versus_torch.numbers("1,0")


def test_picture_of_rows(tmp_path):
    without = row("backward f32 b1 h1 q8 kv8 d8", math_ms=None, math_extra_bytes=None)
    report.draw_rows([row("forward f32 b1 h1 q8 kv8 d8"), without], tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_measured_on_the_threads_that_users_have():
    """A fork of a process that has imported mps_flash_attn has threads of its own beside PyTorch's."""
    assert measure.in_process(dict) == {}
