"""What is Metal's own under PyTorch: nothing waits, nothing is copied, and what goes wrong ends in a sentence.

Only with MFA_BACKEND=metal; all other tests run there, too."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mps_flash_attn
from c_programs import compiled
from mps_flash_attn import check as command
from mps_flash_attn import (
    explain,
    flash_attention,
    register_flash_attention_impl,
    replaced_sdpa,
    speed,
    tensors,
    thresholds,
)
from mps_flash_attn.library import library
from mps_flash_attn.reference import check
from stand_in import TIMEOUT

pytestmark = pytest.mark.usefixtures("everything")


@pytest.fixture
def metal(request):
    return request.config.metal


def test_explain():
    query = torch.randn(1, 2, 33, 64)
    for backward in (False, True):
        found = explain(query, query, query, backward=backward)
        assert found.backend == "metal" and found.machine == "apple7" and not found.waits


def _strided(*shape):
    """A slice of (batch, length, heads, head_dim) memory, as (batch, heads, length, head_dim)."""
    batch, heads, length, columns = shape
    return torch.randn(batch, length + 3, 3, heads, columns + 5)[:, 2:-1, 1, :, 3:-2].transpose(1, 2)


@pytest.mark.parametrize("dropout_p", [0, 0.3])
def test_steady_state_waits_and_copies_nothing(metal, dropout_p):
    """Forward and backward of a kind that was run before are commands in PyTorch's own encoder, and no more; so is
    dropout, whose seed stays in a tensor."""
    inputs = [_strided(2, 2, 40, 24).requires_grad_() for _ in range(3)]
    mask, d_out = torch.randn(40, 40, requires_grad=True), _strided(2, 2, 40, 24)
    leaves = (*inputs, mask)

    def step():
        torch.manual_seed(1)
        out = flash_attention(*inputs, True, attn_mask=mask, dropout_p=dropout_p)
        return out, *torch.autograd.grad(out, leaves, d_out)

    expected = step()
    metal.clear()
    with metal.unwaited():
        results = step()
        counts = metal.counts()
    assert counts["dispatches"] >= 4
    for name in ("waits", "commits", "buffers", "sources", "functions", "devices", "queues"):
        assert counts[name] == 0, name
    assert counts["encoders"] <= 1 and counts["command_buffers"] <= 1  # PyTorch's
    assert all(map(torch.equal, results, expected))


def test_commands_run_in_order(metal):
    """Each call reads the output of the previous one, which has not run yet."""
    query, key = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 50, 16)
    expected = [query]
    for _ in range(4):
        expected.append(flash_attention(expected[-1], key, key))
    with metal.unwaited():
        found = [query]
        for _ in range(4):
            found.append(flash_attention(found[-1], key, key))
    assert all(map(torch.equal, found, expected))


def test_growing_sequence_compiles_nothing(metal):
    query, cache = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 700, 64)

    def decode(lengths):
        for length in lengths:
            flash_attention(query, cache[:, :, :length], cache[:, :, :length], enable_gqa=True)

    decode((1, 700))
    metal.clear()
    decode(range(600, 640))
    counts = metal.counts()
    assert counts["sources"] == counts["functions"] == counts["buffers"] == 0


def test_another_stream_is_waited_for(metal):
    """If PyTorch's current stream is not its default one, libmfa uses a queue of its own; and says so."""
    inputs = [torch.randn(1, 2, 33, 16) for _ in range(3)]
    metal.torch.metalsim_torch_leave(1)
    try:
        check(lambda q, k, v, _: flash_attention(q, k, v, return_lse=True), (*inputs, None))
    finally:
        metal.torch.metalsim_torch_leave(0)
    (reason,) = mps_flash_attn.sdpa_stats()
    assert reason.startswith("waited for PyTorch's stream: ") and "default" in reason


def test_commands_of_another_stream_are_waited_for(metal):
    """What PyTorch has encoded on the current stream, which is not its default one, comes first."""
    query, key = torch.randn(1, 2, 33, 16), torch.randn(1, 2, 50, 16)
    expected = flash_attention(2 * query, key, key)
    metal.torch.metalsim_torch_leave(1)
    try:
        scale = metal.torch.metalsim_torch_scale
        scale(ctypes.c_void_p(tensors.metal_buffer(query)), ctypes.c_size_t(query.numel()), ctypes.c_float(2))
        assert torch.equal(flash_attention(query, key, key), expected)
    finally:
        metal.torch.metalsim_torch_leave(0)


def test_memory_of_the_runtime(metal):
    query = torch.randn(1, 2, 33, 16)
    flash_attention(query, query, query)
    before = metal.counts()
    flash_attention(query, query, query)
    after = metal.counts()
    assert after["objects"] == before["objects"] and after["pools"] == 0


def test_check_times_metal():
    """Problems are timed on Metal beside PyTorch."""
    ours, theirs = speed.compare("forward f16 b1 h2/1 q9 kv11 d24 causal", "cpu")  # the stand-in's
    assert ours > 0 and theirs > 0


def test_check_examines_metal():
    for line in ("f16 b1 h2/1 q37 kv41 d24v40 lower-9 upper2 mask_f32 softcap5", "f32 b1 h2 q1 kv70 d64 mask_bool"):
        row = command.examine(line, "cpu")  # the stand-in's
        assert all(kernel.endswith("apple7") for kernel in row["kernels"])
        assert not row["wrong"] and 0 < row["error"] <= row["allowed"]
    assert "f64" in command.examine("f64 b1 h1 q1 kv1 d8", "cpu")["unsupported"]


# --- Processes of their own: other versions of PyTorch, and faults -------------------------------

STEP = """
import json, sys
import torch, stand_in
metal = stand_in.install(sys.argv[1])
import mps_flash_attn as mfa
from mps_flash_attn import reference

result = {"available": mfa.is_available("cpu")}
tensors = [torch.randn(1, 2, 33, 16) for _ in range(3)]
try:
    ours = lambda q, k, v, mask: mfa.flash_attention(q, k, v, True, attn_mask=mask, return_lse=True)
    reference.check(ours, (*tensors, None), upper=0)
except Exception as error:
    result["error"] = [type(error).__name__, str(error)]
result["explained"] = str(mfa.explain(*tensors))
for dtype in mfa.sdpa_thresholds:
    mfa.sdpa_thresholds[dtype] = 0

def train():
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    return out.detach(), *torch.autograd.grad(out.sum(), leaves)

theirs = train()
mfa.sdpa_stats(reset=True)
try:
    with mfa.replaced_sdpa():
        torch.testing.assert_close(train(), theirs)
except RuntimeError as error:
    result["raised"] = str(error)
print(json.dumps(result | {"stats": mfa.sdpa_stats(), "found": metal.found()}))
"""


def _step(folder, torch_name="2_14", **settings):
    """The output of STEP in a process with an empty cache."""
    path = [str(Path(mps_flash_attn.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", STEP, torch_name],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "MFA_CACHE": str(folder)} | settings,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("version", ["2_4", "2_14", "bare"])
def test_versions_of_pytorch(tmp_path, version):
    """Versions that share their encoder, that can end it, and that can only commit."""
    found = _step(tmp_path, version)
    assert found["available"] and "error" not in found and not found["found"]
    assert found["stats"] == {"replaced": 1} and "wait" not in found["explained"]


def test_pytorch_without_its_functions(tmp_path):
    """Each call then waits, and explain() and sdpa_stats() say so."""
    found = _step(tmp_path, "")
    assert found["available"] and "error" not in found and not found["found"]
    assert "waits for PyTorch's stream: stream is MFA_STREAM_TORCH; " in found["explained"]
    waited, replaced = sorted(found["stats"], reverse=True)
    assert waited.startswith("waited for PyTorch's stream: stream is MFA_STREAM_TORCH; ") and replaced == "replaced"


@pytest.mark.parametrize(
    "fault, words",
    [
        ("no_device", "finds none on this machine"),
        ("compile_error", "attention_forward"),
        ("no_pipeline", "attention_forward"),
        ("layout", "simdgroup matrices"),
        ("narrow", "32"),
    ],
)
def test_faults_fall_back(tmp_path, fault, words):
    """flash_attention raises Unsupported with the sentence; SDPA after replace_sdpa() is PyTorch's, and counted."""
    found = _step(tmp_path, "", METALSIM_FAULT=fault)
    kind, sentence = found["error"]
    assert kind == "Unsupported" and words in sentence
    assert found["explained"] == f"not supported: {sentence}" and found["stats"] == {sentence: 1}


def test_backward_alone_falls_back(tmp_path):
    """If only the backward pass fails, the gradients are PyTorch's, and are counted."""
    found = _step(tmp_path, "", METALSIM_FAULT="no_pipeline:3")  # those of the forward pass are good
    kind, sentence = found["error"]
    assert kind == "Unsupported" and "backward_preprocess" in sentence
    waited, *stats = sorted(found["stats"].items(), reverse=True)
    assert dict(stats) == {"replaced": 1, sentence: 1} and "waited" in waited[0] and "raised" not in found


def test_failing_commands_raise(tmp_path):
    """A failure of the GPU raises: it is known too late to fall back."""
    found = _step(tmp_path, "", METALSIM_FAULT="command_error:1")
    kind, sentence = found["error"]
    assert kind == "RuntimeError" and "the GPU did not complete the commands" in sentence
    assert found["raised"] == sentence


# --- python -m mps_flash_attn precompile ---------------------------------------------------------

# What stands for Apple's developer tools: xcode-select, and xcrun, which makes a library of the texts.
XCRUN = """#!{python}
import ctypes, os, sys
if sys.argv[1:] == ["--find", "metal"]:
    sys.exit(0)
if os.environ.get("XCRUN_HAS_NO_TOOLCHAIN"):
    sys.exit("error: cannot execute tool 'metal' due to missing Metal Toolchain")
if sys.argv[1:] == ["metal", "--version"]:
    sys.exit(0)
assert sys.argv[1:5] == ["metal", "-std=metal3.1", "-fno-fast-math", "-o"], sys.argv
if os.environ.get("XCRUN_FAILS"):
    sys.exit("error: no such header")
texts = [text.encode() for text in sys.argv[6:]]
array = (ctypes.c_char_p * len(texts))(*texts)
compile_texts = ctypes.CDLL({runtime!r}).metalsim_runtime_compile
sys.exit(compile_texts(array, len(texts), sys.argv[5].encode(), None))
"""


@pytest.mark.parametrize("entry", ["varlen_attn", "nested tensors"])
def test_packed_sequences_of_pytorch(entry):
    """By PyTorch's own function for them, and by its nested tensors; beside PyTorch's attention of each."""
    if entry == "varlen_attn" and not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        pytest.skip("PyTorch 2.11 or later")
    starts, leaves = torch.tensor([0, 9, 40]), [torch.randn(40, 2, 16, requires_grad=True) for _ in range(3)]

    def run(*rows):
        if entry == "nested tensors":
            query, key, value = (torch.nested.nested_tensor_from_jagged(t, starts).transpose(1, 2) for t in rows)
            return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).values()
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(*rows, starts.int(), starts.int(), 31, 31, window_size=(-1, 0))

    parts = zip(*(t.transpose(0, 1).split([9, 31], 1) for t in leaves), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], 1).transpose(0, 1)
    with register_flash_attention_impl() if entry == "varlen_attn" else replaced_sdpa():
        if entry == "varlen_attn":
            torch.nn.attention.activate_flash_attention_impl("mfa")
        out, d_out = run(*leaves), torch.randn(40, 2, 16)
        found = torch.autograd.grad(out, leaves, d_out)
    torch.testing.assert_close((out, *found), (expected, *torch.autograd.grad(expected, leaves, d_out)))


def _precompile(*arguments, **settings):
    return subprocess.run(
        [sys.executable, "-m", "mps_flash_attn", "precompile", "--dtype", "f16", "--head-dim", "64", *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(mps_flash_attn.__file__).parents[1])} | settings,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.fixture
def tools(tmp_path):
    """A PATH with the developer tools."""
    folder = tmp_path / "tools"
    folder.mkdir()
    runtime = library().path.resolve().parent / "metalsim/libmetalsim_runtime.so"
    (folder / "xcrun").write_text(XCRUN.format(python=sys.executable, runtime=str(runtime)))
    (folder / "xcode-select").write_text("#!/bin/sh\nexit 0\n")
    for tool in folder.iterdir():
        tool.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_precompile_into_a_folder(tmp_path):
    folder = tmp_path / "kernels"
    done = _precompile("--backward", "--features", "none", "band+softcap", "--folder", str(folder))
    assert done.returncode == 0, done.stderr
    assert f"10 of 10 kernels are in {folder}; without metallibs" in done.stdout
    names = {path.name.rpartition("-")[0] for path in folder.iterdir()}
    assert names == {
        f"{kernel}_f16_d64_{tiles}{features}_apple7"
        for kernel, tiles in (
            ("forward", "q64_k32"),
            ("forward", "q16_k32"),
            ("decode", "q8_k64"),
            ("decode_vector", "q2_k64"),
            ("backward", "q32_k32"),
        )
        for features in ("", "_band_softcap")
    }


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_ship_kernels_of_the_examples(tmp_path, tools):
    """The C program leaves an archive of each kernel, and with the developer tools a metallib, and finds them all."""
    program, kernels = compiled("ship_kernels.c", tmp_path), tmp_path / "kernels"
    for path, files in ((os.environ["PATH"], 4), (tools, 8)):
        settings = os.environ | {"PATH": path}
        done = subprocess.run([program, kernels], env=settings, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(list(kernels.glob("*.check"))) == files and (".metallib" in done.stdout) == (files == 8)
    done = subprocess.run(
        [program, kernels], env=os.environ | {"METALSIM_FAULT": "no_device"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "no kernels can be compiled here" in done.stdout


def test_precompiled_process_compiles_nothing(tmp_path, tools):
    """With metallibs and archives in the cache, the next process translates no text and compiles no function."""
    cache = {"MFA_CACHE": str(tmp_path / "cache")}
    done = _precompile("--features", "none", PATH=tools, **cache)
    assert done.returncode == 0 and "4 of 4 kernels are in the cache, with metallibs" in done.stdout, done.stderr
    code = (
        "import stand_in, torch; metal = stand_in.install(''); import mps_flash_attn\n"
        "mps_flash_attn.flash_attention(*[torch.ones(1, 1, 9, 64).half()] * 3); counts = metal.counts()\n"
        "print(counts['dispatches'] > 1, counts['sources'], counts['functions'], counts['metallibs'])"
    )
    path = os.pathsep.join([str(Path(mps_flash_attn.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path} | cache, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "0", "0", "1"], done.stderr


def test_thresholds_are_kept_beside_compiled_kernels(tmp_path, monkeypatch):
    """The package finds the folder by the library's own rule."""
    monkeypatch.setenv("MFA_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = _precompile("--features", "none")
    assert done.returncode == 0, done.stderr
    assert list(thresholds.cache_folder().glob("forward_f16_d64_*"))


def test_precompile_says_what_the_compiler_said(tmp_path, tools):
    done = _precompile("--features", "none", "--folder", str(tmp_path / "kernels"), PATH=tools, XCRUN_FAILS="1")
    assert done.returncode == 1 and "0 of 4 kernels" in done.stdout
    assert "error: no such header" in " ".join(done.stdout.split())


def test_precompile_without_the_toolchain(tmp_path, tools):
    """As with Xcode 26, which finds the compiler and does not have it: archives are made all the same."""
    folder = tmp_path / "kernels"
    done = _precompile("--features", "none", "--folder", str(folder), PATH=tools, XCRUN_HAS_NO_TOOLCHAIN="1")
    assert done.returncode == 0 and f"4 of 4 kernels are in {folder}; without metallibs" in done.stdout, done.stdout
    assert "missing Metal Toolchain" in done.stderr and done.stderr.startswith("warning: ")
    assert len(list(folder.glob("*.check"))) == 4 and not list(folder.glob("*.metallib"))


def test_precompile_refuses(tmp_path):
    done = _precompile("--features", "band+rotary")
    assert done.returncode == 1 and "rotary" in done.stderr and "Traceback" not in done.stderr
    done = _precompile("--features", "none", METALSIM_FAULT="no_device")
    assert done.returncode == 1 and "finds none on this machine" in done.stderr
