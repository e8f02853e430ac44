"""replace_sdpa under torch.compile and torch.export: one graph without breaks, for all lengths, with our kernels."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from calls import calls, problem
from mps_flash_attn import replaced_sdpa, sdpa_stats, sdpa_thresholds
from mps_flash_attn import sdpa as module
from stand_in import TIMEOUT

pytestmark = pytest.mark.usefixtures("everything", "one_thread")

COMPILED = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[..., :1] * 2).flatten(2),
    "other width": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :7]).flatten(1),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    "one head of keys": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1]),
    "one head of queries": lambda q, k, v: F.scaled_dot_product_attention(q[:, :1], k, v),
    "three dimensions": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
    "broadcast": lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("call", COMPILED)
def test_compiled(call, mode):
    """Our kernels are in the graph, which has no breaks and serves all lengths; the results are those of the call."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(COMPILED[call], backend=counter, fullgraph=True, dynamic=True)
    with replaced_sdpa(), mode():
        for length in (9, 20, 33, 38, 64):
            query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in problem(2, 4, length, 16))
            tensors = [t.requires_grad_(torch.is_grad_enabled()) for t in (query, key, value)]
            sdpa_stats(reset=True)
            out = compiled(*tensors)
            assert set(sdpa_stats(reset=True)) == ({"traced into a compiled graph"} if length == 9 else set())
            expected = COMPILED[call](*tensors)
            assert torch.equal(out, expected) and out.stride() == expected.stride()
            if out.requires_grad:
                d_out = torch.randn_like(out)
                found, wanted = (torch.autograd.grad(o, tensors, d_out) for o in (out, expected))
                torch.testing.assert_close(found, wanted)
    assert counter.frame_count == 1


def test_compiled_small_calls_stay_pytorchs(monkeypatch):
    monkeypatch.setitem(sdpa_thresholds, torch.float32, 1 << 40)
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED["plain"], backend="aot_eager", fullgraph=True, dynamic=False)
    tensors = problem()
    out, stats = calls(compiled, *tensors)
    assert set(stats) == {"small"} and torch.equal(out, COMPILED["plain"](*tensors))


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict):
    """The exported program keeps PyTorch's operator, and so runs anywhere; here it runs on our kernels."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return COMPILED["causal"](q, k, v)

    length = torch.export.Dim("length", min=2)
    lengths = {name: {2: length} for name in "qkv"}
    with replaced_sdpa():
        program = torch.export.export(
            Model(), tuple(problem(2, 4, 9, 16, kv_len=9)), dynamic_shapes=lengths, strict=strict
        )
        lowered = program.run_decompositions()
    for each in (program, lowered):
        targets = [str(node.target) for node in each.graph.nodes]
        assert "aten.scaled_dot_product_attention.default" in targets
        assert not any(target.startswith("mfa") for target in targets)
    tensors = problem(2, 4, 30, 16, kv_len=30)
    out, stats = calls(program.module(), *tensors)
    assert stats == {"replaced": 1}
    torch.testing.assert_close(out, COMPILED["causal"](*tensors))


CACHED = """
import sys, threading, torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

def function(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

if sys.argv[1] != "theirs":
    from mps_flash_attn import replace_sdpa, sdpa_thresholds
    sdpa_thresholds[torch.float32] = 0
    replace_sdpa()

def run():
    q = torch.randn(2, 4, 64, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function)(q, q, q), function(q, q, q))

if sys.argv[1] == "thread":
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
else:
    run()
print(counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.cpu("its processes have no stand-in")
def test_compiled_code_on_disk_is_kept_apart(tmp_path):
    """The cache of compiled code separates processes with SDPA replaced from those without."""
    path = os.pathsep.join([str(Path(module.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    hits = []
    for who in ("thread", "theirs", "ours"):
        done = subprocess.run(
            [sys.executable, "-c", CACHED, who],
            env=os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        hits.append(int(done.stdout))
    assert hits == [0, 0, 1]


def test_compiled_anew_after_a_change():
    """Whether SDPA was replaced when other code was compiled does not matter."""
    for replaced in (False, True, False, True, False):
        torch._dynamo.reset()
        sdpa_stats(reset=True)
        with replaced_sdpa() if replaced else contextlib.nullcontext():
            torch.compile(F.scaled_dot_product_attention, backend="aot_eager")(*problem())
        assert bool(sdpa_stats().get("traced into a compiled graph")) == replaced
