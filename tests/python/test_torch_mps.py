"""Which calls of SDPA stay with PyTorch on mps: by its version, and by the thresholds measured on the machine.

No machine with a GPU is needed: tensors of the CPU stand in for those of mps."""

import json
import math
import os

import pytest
import torch
import torch.nn.functional as F

from mps_flash_attn import apple, flash_attention, replaced_sdpa, sdpa_stats, thresholds
from mps_flash_attn.sdpa import torch_mps
from mps_flash_attn.thresholds import FEW, Key

pytestmark = pytest.mark.usefixtures("everything")

OWN = "PyTorch's own kernel"
MACOS = (26, 2)


@pytest.fixture(autouse=True)
def mac(monkeypatch, tmp_path):
    """A Mac with PyTorch 2.13, whose tensors of mps are those of the CPU."""
    monkeypatch.setattr(torch_mps, "DEVICE", "cpu")
    monkeypatch.setattr(torch_mps, "_kernels", torch_mps.installed_kernels("2.13.0", MACOS))
    monkeypatch.setattr(torch_mps, "_reads_strides", True)
    monkeypatch.setattr(torch_mps, "_tuned", {})
    monkeypatch.setattr(apple, "gpu_name", lambda: "Apple M9 (Ultra)")
    monkeypatch.setattr(apple, "macos_version", lambda: "26.2")
    monkeypatch.setenv("MFA_CACHE", str(tmp_path))


# --- By version ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version, system, expected",
    [
        ("2.6.0", MACOS, []),
        ("2.7.1", MACOS, []),
        ("2.10.0", MACOS, []),
        ("2.11.0", MACOS, ["sdpa_vector"]),
        ("2.12.1", MACOS, ["sdpa_vector"]),
        ("2.13.0", (15, 0), ["prefill", "sdpa_vector", "sdpa_vector"]),
        ("2.14.1", (26, 1), ["prefill", "sdpa_vector", "sdpa_vector"]),
        ("2.14.1", MACOS, ["prefill by tensor operations", "prefill", "sdpa_vector", "sdpa_vector"]),
    ],
)
def test_installed_kernels(version, system, expected):
    assert [kernel.name for kernel in torch_mps.installed_kernels(version, system)] == expected


def test_disabled_prefill(monkeypatch):
    """PyTorch's own variable takes its prefill kernels away."""
    monkeypatch.setenv("PYTORCH_MPS_DISABLE_PREFILL_ATTENTION", "1")
    assert {kernel.name for kernel in torch_mps.installed_kernels("2.14.1", MACOS)} == {"sdpa_vector"}


def test_version_of_macos(monkeypatch):
    assert torch_mps.macos() == (26, 2)
    monkeypatch.setattr(apple, "macos_version", lambda: "")
    assert torch_mps.macos() == ()


def _call(q_len=33, kv_len=65, head_dim=64, dtype=torch.float16, heads=2, kv_heads=2, **options):
    shapes = ((1, heads, q_len, head_dim), (1, kv_heads, kv_len, head_dim))
    query, key = (torch.randn(shape).to(dtype) for shape in shapes)
    value = torch.randn(1, kv_heads, kv_len, options.pop("value_dim", head_dim)).to(dtype)
    mask = options.pop("mask", None)
    mask = None if mask is None else torch.zeros(q_len, kv_len, dtype=mask)
    return query, key, value, mask, options.pop("is_causal", False), options.pop("enable_gqa", False)


CALLS = {
    "prefill": ({}, "2.13.0", "prefill"),
    "prefill of 72 columns": ({"head_dim": 72, "dtype": torch.float32}, "2.13.0", "prefill"),
    "prefill, causal": ({"is_causal": True}, "2.13.0", "prefill"),
    "prefill, additive mask": ({"mask": torch.float16}, "2.13.0", "prefill"),
    "prefill, bool mask": ({"mask": torch.bool}, "2.13.0", "prefill"),
    "prefill, mask of another dtype": ({"mask": torch.float32}, "2.13.0", None),
    "prefill, grouped": ({"heads": 4, "enable_gqa": True}, "2.13.0", "prefill"),
    "prefill of 40 columns": ({"head_dim": 40}, "2.13.0", None),
    "value of other columns": ({"value_dim": 128}, "2.13.0", None),
    "prefill before 2.13": ({}, "2.12.1", None),
    "prefill by tensor operations": ({}, "2.14.0", "prefill by tensor operations"),
    "float32 has no tensor operations": ({"dtype": torch.float32}, "2.14.0", "prefill"),
    "80 columns have no tensor operations": ({"head_dim": 80}, "2.14.0", "prefill"),
    "decode": ({"q_len": 1}, "2.11.0", "sdpa_vector"),
    "decode of 8": ({"q_len": FEW}, "2.11.0", "sdpa_vector"),
    "decode of 9": ({"q_len": FEW + 1}, "2.11.0", None),
    "decode before 2.11": ({"q_len": 1}, "2.10.0", None),
    "decode, causal, before 2.13": ({"q_len": 4, "is_causal": True}, "2.12.1", None),
    "decode, masked, before 2.13": ({"q_len": 1, "mask": torch.bool}, "2.12.1", None),
    "decode, grouped, before 2.13": ({"q_len": 1, "heads": 4, "enable_gqa": True}, "2.12.1", None),
    "decode, all of it": (
        {"q_len": 4, "heads": 4, "enable_gqa": True, "mask": torch.bool, "head_dim": 256},
        "2.13.0",
        "sdpa_vector",
    ),
    "decode of 32 columns": ({"q_len": 1, "head_dim": 32}, "2.14.0", None),
    "fewer keys than queries": ({"q_len": 4, "kv_len": 3}, "2.13.0", None),
}


@pytest.mark.parametrize("name", CALLS)
def test_kernel_of_a_call(monkeypatch, name):
    call, version, expected = CALLS[name]
    monkeypatch.setattr(torch_mps, "_kernels", torch_mps.installed_kernels(version, MACOS))
    found = torch_mps.kernel_of(*_call(**call))
    assert (found.name if found else None) == expected


def test_calls_without_a_kernel(monkeypatch):
    """Gradients, broadcast operands, and strides before macOS 15 need the operator that holds the scores."""
    query, key, value, *options = _call()
    assert torch_mps.kernel_of(query, key, value, *options)
    assert not torch_mps.kernel_of(query, key, value.clone().requires_grad_(), *options)
    assert not torch_mps.kernel_of(query, key, value, torch.zeros(33, 65).half().requires_grad_(), False, False)
    with torch.no_grad():
        assert torch_mps.kernel_of(query, key, value.clone().requires_grad_(), *options)
    assert not torch_mps.kernel_of(query.expand(3, -1, -1, -1), key, value, *options)
    assert not torch_mps.kernel_of(query, key[:, :1], value[:, :1], *options)
    assert not torch_mps.kernel_of(query[0, 0], key[0, 0], value[0, 0], *options)
    assert torch_mps.kernel_of(query[0], key[0], value[0], *options)
    monkeypatch.setattr(torch_mps, "_reads_strides", False)
    assert torch_mps.kernel_of(query, key, value, *options)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not torch_mps.kernel_of(strided, key, value, *options)


# --- The replaced SDPA ---------------------------------------------------------------------------


def _attend(*call):
    query, key, value, mask, is_causal, enable_gqa = call
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=enable_gqa)


def test_replaced_sdpa():
    """PyTorch runs the calls that it has a kernel for, each time that they come."""
    call = _call()
    expected = _attend(*call)
    with replaced_sdpa():
        results = [_attend(*call) for _ in range(4)]  # the second makes an entry of the cache
    assert sdpa_stats() == {OWN: 4} and all(torch.equal(out, expected) for out in results)


@pytest.mark.parametrize("call", [{"head_dim": 40}, {"mask": torch.float32}, {"value_dim": 24}], ids=str)
def test_what_is_replaced(call):
    call = _call(**call)
    with replaced_sdpa():
        for _ in range(4):
            _attend(*call)
    assert sdpa_stats() == {"replaced": 4}


def test_training_is_replaced():
    query, *others = _call()
    query.requires_grad_()
    with replaced_sdpa():
        for _ in range(3):
            _attend(query, *others).sum().backward()
        with torch.no_grad():
            _attend(query, *others)
    assert sdpa_stats() == {"replaced": 3, OWN: 1} and query.grad.isfinite().all()


def test_mask_with_gradient_is_replaced():
    query, key, value, *_ = _call()
    mask = torch.zeros(33, 65).half().requires_grad_()
    with replaced_sdpa():
        _attend(query, key, value, mask, False, False).sum().backward()
    assert sdpa_stats() == {"replaced": 1} and mask.grad.isfinite().all()


def test_vmap():
    """The call below the vmap decides: it has all samples in its batch."""
    query, key, value, *_ = _call()
    batched = [torch.stack([tensor] * 3) for tensor in (query, key, value)]
    with replaced_sdpa():
        out = torch.vmap(F.scaled_dot_product_attention)(*batched)
    assert sdpa_stats() == {OWN: 1} and out.shape == (3, *query.shape)


def test_flash_attention_is_not_affected():
    query, key, value, *_ = _call()
    with replaced_sdpa():
        out = flash_attention(query, key, value)
    assert sdpa_stats() == {} and out.shape == query.shape


# --- Thresholds ----------------------------------------------------------------------------------

KEY = Key(torch.float16, 64, False, False)
WORK = 2 * 33 * 65 * 2 * 64  # of _call()


@pytest.mark.parametrize(
    "least, call, expected",
    [
        (WORK, {}, "replaced"),
        (WORK + 1, {}, OWN),
        (math.inf, {}, OWN),
        (0, {"is_causal": True}, OWN),  # another kind
        (0, {"mask": torch.bool}, OWN),  # masks are not measured
        (0, {"dtype": torch.float32}, OWN),
        (0, {"q_len": 1}, OWN),
    ],
)
def test_measured_thresholds(least, call, expected):
    thresholds.save({KEY: least}, [])
    call = _call(**call)
    with replaced_sdpa():
        for _ in range(3):
            _attend(*call)
    assert sdpa_stats() == {expected: 3}


def test_small_calls_that_pytorch_has_no_kernel_for():
    """Where PyTorch holds the scores and was faster, the reason is the size."""
    thresholds.save({Key(torch.float16, 40, False, False): math.inf}, [])
    with replaced_sdpa():
        _attend(*_call(head_dim=40))
    assert sdpa_stats() == {"small": 1}


def test_thresholds_are_read_when_sdpa_is_replaced():
    """Those that were measured since hold from the next replacement on, for calls that came before, too."""
    call = _call()
    with replaced_sdpa():
        for _ in range(3):
            _attend(*call)
        thresholds.save({KEY: 0}, [])
        _attend(*call)
    assert sdpa_stats(reset=True) == {OWN: 4}
    with replaced_sdpa():
        _attend(*call)
    assert sdpa_stats() == {"replaced": 1}


BROKEN = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1]",
    "bytes": lambda text: "\udcff",
    "a dtype": lambda text: text.replace("float16", "float15"),
    "a head dimension": lambda text: text.replace('"head_dim": 64', '"head_dim": "64"'),
    "work": lambda text: text.replace('"work": 0', '"work": -1'),
    "nested": lambda text: "[" * 100_000,
    "work that is no number": lambda text: text.replace('"work": 0', '"work": true'),
    "work that is not a number": lambda text: text.replace('"work": 0', '"work": NaN'),
    "no causal": lambda text: text.replace('"causal"', '"casual"'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(name):
    file = thresholds.save({KEY: 0}, [])
    file.write_text(BROKEN[name](file.read_text()), errors="surrogateescape")
    words = r"are ignored: it cannot be read .*`.*check --tune` writes them anew"
    with pytest.warns(UserWarning, match=words), replaced_sdpa():
        _attend(*_call())
    assert sdpa_stats() == {OWN: 1}


def test_what_is_no_file():
    """A FIFO would be waited for."""
    os.mkfifo(thresholds.path())
    with pytest.warns(UserWarning, match="are ignored: it is not a file that can be read"):
        assert thresholds.load() == {}


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MFA_CACHE", str(tmp_path / "file/folder"))
    with pytest.raises(ValueError, match=r"the thresholds cannot be written to .*/file/folder: Not a directory"):
        thresholds.save({KEY: 0}, [])
    assert thresholds.load() == {}


@pytest.mark.parametrize("name", ["gpu", "macos", "torch", "libmfa"])
def test_foreign_file(name):
    """A file that was measured elsewhere and renamed is ignored."""
    file = thresholds.save({KEY: 0}, [])
    contents = json.loads(file.read_text())
    contents["for"][name] = "another"
    file.write_text(json.dumps(contents))
    with pytest.warns(UserWarning, match=r"are ignored: it holds for .*another"):
        assert thresholds.load() == {}


def test_no_file(monkeypatch, recwarn):
    assert thresholds.load() == {}
    thresholds.save({KEY: 0}, [])
    monkeypatch.setattr(apple, "gpu_name", lambda: "Apple M8")
    assert thresholds.load() == {}
    monkeypatch.setattr(apple, "gpu_name", lambda: "")
    assert thresholds.path() is None and thresholds.load() == {} and not recwarn


def test_cache_folder(monkeypatch, tmp_path):
    """It is that of compiled kernels."""
    assert thresholds.cache_folder() == tmp_path
    monkeypatch.delenv("MFA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(thresholds.cache_folder()) == "/caches/libmfa"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/of")
    for system, folder in (("linux", "/home/of/.cache/libmfa"), ("darwin", "/home/of/Library/Caches/libmfa")):
        monkeypatch.setattr(thresholds.sys, "platform", system)
        assert str(thresholds.cache_folder()) == folder
    monkeypatch.delenv("HOME")
    assert thresholds.cache_folder() is None
    with pytest.raises(ValueError, match="there is no folder for the thresholds; set MFA_CACHE"):
        thresholds.save({KEY: 0}, [])
