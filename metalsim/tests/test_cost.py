"""metalsim/cost: the counter counts what is in a kernel, and its check finds what has become worse."""

import pathlib
import re
import sys

import pytest

METALSIM = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(METALSIM / "cost"))

import compiler  # noqa: E402
import cost  # noqa: E402
import ir  # noqa: E402
from classes import Classifier  # noqa: E402

LANGUAGE = ["-x", "c++", "-std=c++14", "-nostdinc", "-isystem", str(METALSIM / "include"), "-w"]
TEXT = """#define METALSIM_COST probe
#include <metal_stdlib>
using namespace metal;
[[max_total_threads_per_threadgroup(64)]] kernel void
probe(device const float *in [[buffer(0)]], device float *out [[buffer(1)]], constant long &n [[buffer(2)]],
      threadgroup float *tile TG_ARG(0), uint index [[thread_index_in_threadgroup]],
      uint lane [[thread_index_in_simdgroup]])
{
    %s
}
"""


def code_of(folder, body):
    path = folder / "probe.metal"
    path.write_text(TEXT % body)
    return compiler.optimised(path, "probe", LANGUAGE)


def count(folder, body):
    """The instructions of a kernel's code, each once."""
    code = code_of(folder, body)
    function = ir.read_function(code, "probe")
    return sum(Classifier(function).classes.values(), cost.collections.Counter())


def test_a_product_and_its_sum_are_one_instruction(tmp_path):
    assert count(tmp_path, "out[index] = in[index] * in[index + 64] + 1.0f;")["f32"] == 1


def test_a_comparison_and_its_select_are_one_instruction(tmp_path):
    assert count(tmp_path, "float x = in[index]; out[index] = x > 2.0f ? x * 3.0f : 4.0f;")["select"] == 1


def test_neighbours_are_loaded_as_vectors(tmp_path):
    counts = count(tmp_path, "device const float *p = in + 8 * index; out[index] = p[0] + p[1] + p[2] + p[3] + p[4];")
    assert counts["device load bytes"] == 20
    assert counts["device load"] == 2


def test_a_declared_array_is_an_address(tmp_path):
    body = "%s[lane] = in[index]; threadgroup_barrier(mem_flags::mem_threadgroup); out[index] = %s[lane ^ 1];"
    declared = "THREADGROUP_ARRAY(float, shared, 32); " + body % ("shared", "shared")
    assert count(tmp_path, declared) == count(tmp_path, body % ("tile", "tile"))


def test_a_barrier_separates_neighbours(tmp_path):
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    body = "threadgroup float *p = tile + 2 * lane; float x = p[0]; %s out[index] = x + p[1];"
    assert count(tmp_path, body % "")["threadgroup load"] == 1
    counts = count(tmp_path, body % barrier)
    assert (counts["threadgroup load"], counts["barrier"]) == (2, 1)


def test_divisions_of_64_bits_are_found(tmp_path):
    body = "out[index] = float((n * 7 + index) %s n);"
    assert count(tmp_path, body % "/")["i64 division"] == 1
    assert count(tmp_path, body % "%")["i64 division"] == 1
    assert count(tmp_path, body % "+")["i64 division"] == 0


def test_the_positions_of_threads_are_known_to_be_small(tmp_path):
    """Otherwise the remainders would be instructions."""
    assert "range(i32 0, 64) %" in code_of(tmp_path, "out[0] = in[index + lane];")
    counts = count(tmp_path, "out[index % 64] = in[lane % 32];")
    assert counts["i32"] == 0


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("out[index] = simd_sum(in[index]);", "reduction"),
        ("out[index] = simd_shuffle_xor(in[index], ushort(8));", "shuffle"),
        ("out[index] = simd_any(in[index] > 0.0f);", "vote"),
        ("out[index] = exp2(in[index]);", "exp2"),
        (
            "simdgroup_float8x8 a(1.0f), c(0.0f); simdgroup_multiply_accumulate(c, a, a, c); simdgroup_store(c, out);",
            "mma",
        ),
    ],
)
def test_operations_of_a_simdgroup_are_counted(tmp_path, body, name):
    assert count(tmp_path, body)[name] == 1


def test_a_loop_counts_as_often_as_it_is_executed(tmp_path):
    code = code_of(tmp_path, "float x = in[index]; for (long i = 0; i < n; i++) x = exp2(x); out[index] = x;")
    function = ir.read_function(code, "probe")
    in_loop = [any("exp2" in i.operands for i in block.instructions) for block in function.blocks]
    result = cost.evaluate(code, "probe", 2, [20 if inside else 2 for inside in in_loop])
    assert result.counts["exp2"] == result.loop["exp2"] == 20
    assert result.counts["device load"] == 2
    assert result.loop["device load"] == 0


def test_registers_hold_what_is_needed_later(tmp_path):
    def registers(number):
        loads = "".join(f"float x{i} = in[index + {i} * n];" for i in range(number))
        barrier = "threadgroup_barrier(mem_flags::mem_device);"
        stores = "".join(f"out[index + {i} * n] = x{i};" for i in range(number))
        code = code_of(tmp_path, loads + barrier + stores)
        return cost.evaluate(code, "probe", 1, [1] * len(ir.read_function(code, "probe").blocks)).registers

    assert registers(24) - registers(8) >= 16 * 2


def table(share, divisions=0, name="attention_forward", cycles=""):
    cells = {"kernel": f"`{name}`", "M1 %": share, "M3 %": "", "i64 divisions": str(divisions), "cycles a key": cycles}
    return cost.line(cost.HEADER) + cost.line([cells.get(column, "-") for column in cost.HEADER])


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (table("79.1"), ""),
        (table("90.0"), ""),
        (table("78.9"), "M1 % is 78.9, and 80.0 in"),
        (table("80.0", divisions=1), "it has 1 divisions of 64 bits, and 0 in"),
        (table("80.0", name="attention_decode"), "has no such row"),
    ],
)
def test_the_check_finds_what_is_worse(tmp_path, capsys, made, complaint):
    path = tmp_path / "kernels.md"
    path.write_text(f"before\n{cost.MARKS[0]}\n{table('80.0')}\n{cost.MARKS[1]}after\n")
    assert cost.check(path, made, whole=False) == bool(complaint)
    output = capsys.readouterr().out
    assert complaint in output
    assert re.search(rf"^{int(not complaint)} passed, {int(bool(complaint))} failed$", output, re.M)


def test_the_check_finds_more_cycles_a_key(tmp_path, capsys):
    path = tmp_path / "kernels.md"
    path.write_text(f"{cost.MARKS[0]}{table('8.0', cycles='20.0')}{cost.MARKS[1]}")
    assert cost.check(path, table("8.0", cycles="20.5"), whole=True) == 0
    assert cost.check(path, table("8.0", cycles="21.0"), whole=True) == 1
    assert "it takes 21.0 cycles a key, and 20.0 in" in capsys.readouterr().out


def test_a_part_is_not_written_over_the_whole(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost.py", "metal_cost", "--quick", "--write", "kernels.md"])
    with pytest.raises(SystemExit):
        cost.main()
    assert "--write is for all cases" in capsys.readouterr().err


def test_the_whole_table_has_no_row_too_many(tmp_path, capsys):
    path = tmp_path / "kernels.md"
    path.write_text(f"{cost.MARKS[0]}{table('80.0')}{table('80.0', name='attention_decode')}{cost.MARKS[1]}")
    assert cost.check(path, table("80.0"), whole=True) == 1
    assert "has the row, and no case makes it" in capsys.readouterr().out
