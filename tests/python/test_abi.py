"""The structs as Python packs them are those of mfa.h, and the library is found where it is said to be."""

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mps_flash_attn import explain, flash_attention
from mps_flash_attn import library as abi
from mps_flash_attn.lengths import Lengths
from mps_flash_attn.problem import DIFFERENTIABLE, LENGTHS, SCALES, Inputs, Operands
from stand_in import TIMEOUT

pytestmark = pytest.mark.cpu("the interface is the same for all backends")
ROOT = Path(__file__).parents[2]
STRUCTS = {
    "mfa_problem": (abi.PROBLEM_FIELDS, abi.PROBLEM),
    "mfa_buffers": (abi.BUFFERS_FIELDS, abi.BUFFERS),
    "mfa_context_options": (abi.OPTIONS_FIELDS, abi.OPTIONS),
}
CONSTANTS = {
    "MFA_FORWARD": abi.FORWARD,
    "MFA_BACKWARD": abi.BACKWARD,
    "MFA_DEVICE_CPU": abi.DEVICE_CPU,
    "MFA_F32": abi.F32,
    "MFA_F16": abi.F16,
    "MFA_BF16": abi.BF16,
    "MFA_F64": abi.F64,
    "MFA_MASK_NONE": abi.MASK_NONE,
    "MFA_MASK_BOOL": abi.MASK_BOOL,
    "MFA_MASK_ADDITIVE": abi.MASK_ADDITIVE,
    "MFA_OUT_F32": abi.OUT_TYPES["f32"],
    "MFA_BAND_OPEN_LOWER": abi.BAND_OPEN_LOWER,
    "MFA_BAND_OPEN_UPPER": abi.BAND_OPEN_UPPER,
}


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """Offsets, sizes and constants of mfa.h from the C compiler: {name: number}."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    lines = [f'printf("{name} %lld\\n", (long long){name});' for name in CONSTANTS]
    for name, (fields, _) in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        lines += [f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));' for field, _ in fields]
    folder = tmp_path_factory.mktemp("abi")
    text = '#include <stdio.h>\n#include "mfa.h"\nint main(void)\n{\n' + "\n".join(lines) + "\nreturn 0;\n}\n"
    (folder / "abi.c").write_text(text)
    subprocess.run([compiler, f"-I{ROOT}/include", "abi.c", "-o", "abi"], cwd=folder, check=True)
    printed = subprocess.run([folder / "abi"], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in map(str.split, printed.splitlines())}


@pytest.mark.parametrize("name", STRUCTS)
def test_struct(header, name):
    fields, packed = STRUCTS[name]
    assert packed.size == header[name]
    form = "@"
    for field, field_form in fields:
        # an empty item of the field's type pads up to its alignment
        element = field_form.lstrip("0123456789")[0]
        assert struct.calcsize(f"{form}0{element}") == header[f"{name}.{field}"], field
        form += field_form


def test_constants(header):
    assert {name: header[name] for name in CONSTANTS} == CONSTANTS


def test_every_field_of_the_header_is_declared():
    text = (ROOT / "include/mfa.h").read_text()
    for name, (fields, _) in STRUCTS.items():
        body = text.split(f"typedef struct {name} {{")[1].split(f"}} {name};")[0]
        for field, _ in fields:
            assert field in body


def test_scalars_are_the_fields_that_both_passes_have():
    assert abi.Scalars._fields == (
        *("device", "dtype", "mask", "mask_dtype", "alibi", "batch", "q_heads", "kv_heads", "q_len", "kv_len"),
        *("head_dim", "value_dim", "lower", "upper", "scale", "softcap", "sinks", "dropout"),
        *("block_map_q", "block_map_kv"),
        *("varlen_q", "varlen_kv", "seqused_k", "leftpad_k", "cache_batch_idx", "bottom_right"),
        *("total_q", "total_kv", "kv_batch", "page_size", "k_type", "v_type", "k_group", "v_group"),
        *("out_type", "fast"),
    )
    for line in ("forward f32 b1 h1 q2 kv3 d4 alibi dropout0.5", "backward f32 b1 h1 q2 kv3 d4 upper1 sinks"):
        packed = abi.library().parse(line)
        numbers = abi.scalars(packed)._asdict()
        assert numbers["sinks"] == ("sinks" in line) and numbers["alibi"] == ("alibi" in line)
        assert numbers["dropout"] == (0.5 if "dropout" in line else 0)
        assert abi.changed(packed, **numbers) == packed
        assert abi.changed(packed, sinks=1) == abi.library().parse(line.removesuffix(" sinks") + " sinks")


def test_buffers_without_offsets():
    fields = dict.fromkeys((name for name, _ in abi.BUFFERS_FIELDS), (0, 0))
    fields |= {"size": (abi.BUFFERS.size,), "workspace_size": (0,)}
    names = ("q", "k", "v", "mask", "o", "lse", "d_o", "dlse", "dq", "dk", "dv", "dbias", "o_low", "slopes")
    names += ("sinks", "dsinks", "seed", "block_map")
    more = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "cache_batch_idx", "block_table")
    more += ("k_scale", "v_scale")
    fields |= {name: (base, 0) for base, name in enumerate((*names, *more), 1)}
    whole = abi.BUFFERS.pack(*(number for numbers in fields.values() for number in numbers))
    bases, rest = abi.BASES.pack(abi.BUFFERS.size, *range(1, 19)), abi.MORE_BASES.pack(*range(19, 27))
    assert bases[: -len(rest)] + rest == whole and not any(bases[-len(rest) :])


def test_statuses_become_exceptions():
    found = abi.library()
    with pytest.raises(ValueError, match=r'"no" in the problem'):
        found.parse("no such problem")
    found.check(0)
    for status, exception in ((1, ValueError), (2, abi.Unsupported), (4, MemoryError), (6, RuntimeError)):
        with pytest.raises(exception):
            found.check(status)
    assert issubclass(abi.Unsupported, NotImplementedError)


def _python(code, **environment):
    path = os.pathsep.join([str(Path(abi.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_operands_have_the_order_of_the_header():
    """But that those with a gradient come before those without."""
    names = {"query": "q", "key": "k", "value": "v", "attn_mask": "mask", "alibi_slopes": "slopes"}
    names |= {"dropout_seed": "seed", "block_mask": "block_map"}
    names |= {"out": "o", "d_out": "d_o", "d_lse": "dlse", "out_low": "o_low"}
    for fields in (Inputs._fields[:DIFFERENTIABLE], Inputs._fields[DIFFERENTIABLE:], Operands._fields[1:]):
        operands = [names.get(name, name) for name in fields]
        assert operands == [name for name, _ in abi.BUFFERS_FIELDS if name in operands]


def test_lengths_and_scales_are_the_last_inputs():
    assert Inputs._fields[LENGTHS:SCALES] == Lengths._fields
    assert Inputs._fields[SCALES:] == ("k_scale", "v_scale")


def test_types_of_codes_are_those_of_the_header():
    text = (ROOT / "include/mfa.h").read_text()
    assert {
        name: f"MFA_KV_{name.upper()} = {number}" in text for name, number in abi.KV_TYPES.items()
    } == dict.fromkeys(abi.KV_TYPES, True)
    for name, number in abi.KV_TYPES.items():
        assert abi.scalars(abi.library().parse(f"forward f32 b1 h1 q1 kv1 d32 k_{name}")).k_type == number


def test_importing_loads_no_library_and_no_compiler():
    """PyTorch's compiler takes longer to import than all else."""
    code = (
        "import sys, torch; had = 'torch._dynamo' in sys.modules\n"
        "import mps_flash_attn; print(mps_flash_attn.is_available())\n"
        "import mps_flash_attn.distributed; assert had or 'torch._dynamo' not in sys.modules\n"
        "mps_flash_attn.flash_attention(*[torch.ones(1, 1, 1, 1)] * 3)"
    )
    status, printed, error = _python(code, MFA_LIBRARY="/nowhere/libmfa.so")
    assert status and printed == "False"
    assert error.endswith("ImportError: libmfa is not at /nowhere/libmfa.so; MFA_LIBRARY must name the file libmfa")


def test_another_library_is_refused():
    libm = next((p for p in Path("/usr/lib").rglob("libm.so.6")), None) or pytest.skip("no libm.so.6 to try")
    status, printed, _ = _python("import mps_flash_attn as m; print(m.is_available())", MFA_LIBRARY=str(libm))
    assert (status, printed) == (0, "False")


def test_one_library_for_all_threads():
    code = (
        "import threading, mps_flash_attn.library as l; made = []; start = threading.Barrier(8)\n"
        "def run(): start.wait(); made.append(l.library())\n"
        "threads = [threading.Thread(target=run) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; print(len(made), len(set(map(id, made))))"
    )
    assert _python(code) == (0, "8 1", "")


def test_pytorch_pool_is_used_where_there_is_one():
    has_pool = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
    assert bool(abi.library().host) == has_pool
    if has_pool:
        pool = ctypes.CFUNCTYPE(
            ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
        )(abi.library().host)
        ranges = []
        worker = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(
            lambda begin, end, _: ranges.append((begin, end))
        )
        assert pool(3, 100, 1, ctypes.cast(worker, ctypes.c_void_p), None) == 0
        assert sorted(i for begin, end in ranges for i in range(begin, end)) == list(range(3, 100))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_follow_pytorch(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        query = torch.randn(1, 2, 8, 16)
        flash_attention(query, query, query)
        assert abi.library().threads == threads
        assert explain(query, query, query).threads <= threads
    finally:
        torch.set_num_threads(before)
