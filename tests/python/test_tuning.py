"""python -m mps_flash_attn check --tune, with invented times; and how it and check take times."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from mps_flash_attn import apple, replaced_sdpa, sdpa_stats, speed, thresholds, tuning
from mps_flash_attn.library import Unsupported
from mps_flash_attn.sdpa import torch_mps
from mps_flash_attn.thresholds import Key

pytestmark = pytest.mark.usefixtures("everything")

# --- check --tune --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "points, expected",
    [
        ([(1, True), (2, True), (4, True)], 1),
        ([(4, True), (2, False), (1, True)], 4),
        ([(1, True), (2, True), (4, False)], math.inf),
        ([(2, True), (2, False), (4, True)], 4),
    ],
)
def test_threshold(points, expected):
    assert tuning.threshold(points) == expected


def test_tune(monkeypatch, tmp_path, capsys):
    """Each kind of calls gets its threshold from the times, and replace_sdpa() uses it."""

    def measure(line, device):
        assert device == "cpu"
        words = line.split()
        if "d256" in words:
            raise RuntimeError("out of memory")
        longer = int(words[4][1:]) >= (1024 if words[5] != "kv4096" else 4096)
        return speed.Speed(1.0, 2.0 if longer and words[1] == "f16" else 0.5)

    monkeypatch.setattr(tuning, "unavailable_reason", lambda _: "")
    monkeypatch.setattr(torch_mps, "DEVICE", "cpu")
    monkeypatch.setattr(torch_mps, "_tuned", {})
    monkeypatch.setattr(torch_mps, "_kernels", torch_mps.installed_kernels("2.13.0", (26, 2)))
    monkeypatch.setattr(apple, "gpu_name", lambda: "Apple M9 (Ultra)")
    monkeypatch.setenv("MFA_CACHE", str(tmp_path))
    assert tuning.run(measure, "cpu") == 0
    out = capsys.readouterr().out
    assert "Apple M9 (Ultra)" in out and "RuntimeError: out of memory" in out and str(thresholds.path()) in out
    found = thresholds.load()
    assert {key.head_dim for key in found} == {32, 64, 72, 80, 96, 128}
    for key, work in found.items():
        expected = tuning.HEADS * 1024 * 1024 * 2 * key.head_dim
        assert work == (expected if key.dtype is torch.float16 and not key.few else math.inf), key
    assert json.loads(thresholds.path().read_text())["measured"][0]["ours_ms"] == 1000
    call = [torch.randn(1, tuning.HEADS, length, 64).half() for length in (1024, 1024, 1024)]
    with replaced_sdpa():
        F.scaled_dot_product_attention(*call, is_causal=True)
        F.scaled_dot_product_attention(*(tensor[:, :-1] for tensor in call), is_causal=True)
    assert sdpa_stats() == {"replaced": 1, "PyTorch's own kernel": 1}


def test_what_is_measured():
    """All that the kernels of PyTorch run: their dtypes, head dimensions, and few queries and many."""
    kinds = {kind for kind, _, _ in tuning.problems()}
    for kernel in torch_mps.KERNELS:
        for dtype in kernel.dtypes:
            for head_dim in kernel.head_dims:
                assert Key(dtype, head_dim, kernel.few, False) in kinds
    for _, work, line in tuning.problems():
        call = speed.Comparable.of(line, "cpu") if " q64 " in line else None
        if call:
            batch, heads, q_len, head_dim = call.query.shape
            assert work == batch * heads * q_len * call.key.shape[2] * 2 * head_dim


def test_tune_without_a_folder(monkeypatch):
    monkeypatch.setattr(tuning, "unavailable_reason", lambda _: "")
    monkeypatch.setattr(apple, "gpu_name", lambda: "Apple M9")
    for name in ("MFA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="set MFA_CACHE to one, or HOME"):
        tuning.run(None, "cpu")


def test_tune_without_metal():
    with pytest.raises(Unsupported, match="those of the CPU are sdpa_thresholds"):
        tuning.run(None, "meta")


# --- Times ---------------------------------------------------------------------------------------


def test_medians():
    """The functions take turns, and each gets its median; waiting counts."""
    now, calls, waits = [0.0], [], [0]

    def function(name, *seconds):
        left = list(seconds)

        def call():
            calls.append(name)
            now[0] += left.pop(0) if len(left) > 1 else left[0]

        return call

    def wait():
        waits[0] += 1
        now[0] += 0.25

    functions = [function("ours", 9, 1, 1, 5, 1), function("torch", 9, 2)]
    assert speed.medians(functions, wait, lambda: now[0]) == [1.25, 2.25]
    assert calls == ["ours", "ours", "torch", "torch", *["ours", "torch"] * 3] and waits[0] == len(calls)


def test_repeats():
    """A fast call is repeated within a turn."""
    now, count = [0.0], [0]

    def call():
        count[0] += 1
        now[0] += 1 / 4096

    assert speed.medians([call], lambda: None, lambda: now[0]) == [1 / 4096]
    assert count[0] == 2 + speed.ROUNDS * math.ceil(speed.TURN_SECONDS * 4096)


@pytest.mark.parametrize(
    "line", ["forward f16 b1 h4/2 q9 kv11 d24 causal", "backward f32 b2 h2 q5 kv7 d16 mask_bool scale0.3"]
)
def test_compare(line):
    """Both compute the same."""
    call = speed.Comparable.of(line, "cpu")
    ours, theirs = call.run(call.ours), call.run(call.torch)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert all(seconds > 0 for seconds in speed.compare(line, "cpu"))


def test_compare_refuses():
    with pytest.raises(ValueError, match="PyTorch has causal, bool masks and additive ones only"):
        speed.compare("forward f32 b1 h1 q4 kv4 d8 softcap3", "cpu")
