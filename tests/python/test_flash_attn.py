"""flash_attn's functions: flash-attention's own sizes and its rule of tolerance, and what code that uses it expects."""

import importlib
import inspect
import sys

import pytest
import torch

from mps_flash_attn import dropout_mask, flash_attention, flash_attn
from mps_flash_attn.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    index_first_axis,
    install_flash_attn,
    pad_input,
    uninstall_flash_attn,
    unpad_input,
)
from stand_in import FULL

# Of flash-attention's tests/test_flash_attn.py.
LENGTHS = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1023, 1024)]
HEAD_DIMS = [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
HEADS, DROPOUT, SOFTCAP = 6, 0.17, 50.0


def written_out(q, k, v, kept, dropout_p, causal, window, softcap, slopes, dtype):
    """Attention in `dtype`, rounded to q's at the end; `kept` from dropout_mask."""
    L, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    query, key, value = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT / q.shape[3] ** 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(S) - torch.arange(L)[:, None] - (S - L)
    if slopes is not None:
        scores = scores - slopes[..., None, None].to(dtype) * distance.abs().to(dtype)
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros(L, S, dtype=torch.bool)
    hidden |= (distance > right) & (right >= 0)
    hidden |= (distance < -left) & (left >= 0)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden.all(1)[:, None], 0)
    weights = torch.where(kept, weights / (1 - dropout_p), 0) if dropout_p else weights
    return (weights @ value).transpose(1, 2).to(q.dtype if dtype is q.dtype else dtype)


MODULES = {
    "flash_attn": [name for name in flash_attn.__all__ if name.startswith("flash_attn")],
    "flash_attn.flash_attn_interface": [name for name in flash_attn.__all__ if name.startswith("flash_attn")],
    "flash_attn.bert_padding": ["index_first_axis", "pad_input", "unpad_input"],
    "flash_attn.layers.rotary": ["apply_rotary_emb"],
}


def cases(remainder):
    """Of the long ones every third, unless all are run."""
    return [case for case in _cases() if FULL or case[1] < 1000 or case[0] % 3 == remainder]


def _cases():
    n = 0
    for q_len, kv_len in LENGTHS:
        for band in ("all", "causal", "local"):
            for dropout_p in (0.0, DROPOUT):
                yield n, q_len, kv_len, band, dropout_p
                n += 1


@pytest.mark.parametrize("n, q_len, kv_len, band, dropout_p", cases(1))
def test_as_flash_attention_is_tested(n, q_len, kv_len, band, dropout_p):
    """out is at most twice, and gradients at most three times, as far from the truth as attention written out in the
    same dtype."""
    torch.manual_seed(n)
    dtype, head_dim = (torch.float16, torch.bfloat16)[n % 2], HEAD_DIMS[n % len(HEAD_DIMS)]
    batch, kv_heads = 1 if q_len > 500 else 2, (6, 2, 1)[n // 2 % 3]
    causal, window = band == "causal", (-1, -1)
    if band == "local":
        window = tuple(torch.randint(0, kv_len, (2,)).tolist())
    softcap = SOFTCAP if n % 5 == 4 else 0.0
    slopes = torch.rand(batch, HEADS) * 0.3 if n % 3 == 2 else None
    q = torch.randn(batch, q_len, HEADS, head_dim, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(batch, kv_len, kv_heads, head_dim, dtype=dtype, requires_grad=True) for _ in range(2))
    out, lse, S_dmask = flash_attn_func(
        q, k, v, dropout_p, None, causal, window, softcap, slopes, return_attn_probs=True
    )
    assert out.shape == q.shape and lse.shape == (batch, HEADS, q_len) and lse.dtype is torch.float32
    assert S_dmask.numel() == (batch * HEADS * q_len * kv_len if dropout_p else 0)
    kept = S_dmask.signbit().logical_not() if dropout_p else None
    settings = kept, dropout_p, causal, window, softcap, slopes
    truth, plain = (written_out(q, k, v, *settings, one) for one in (torch.float64, dtype))
    g = torch.randn_like(out)
    ours, exact, theirs = ((one, *torch.autograd.grad(one, (q, k, v), g.to(one.dtype))) for one in (out, truth, plain))
    for name, factor, a, b, c in zip(("out", "dq", "dk", "dv"), (2, 3, 3, 3), ours, exact, theirs, strict=True):
        error, allowed = (a - b).abs().max(), factor * (c - b).abs().max()
        assert error <= allowed + 1e-5, f"{name}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("n, q_len, kv_len, band, dropout_p", cases(0))
def test_packed_as_flash_attention_is_tested(n, q_len, kv_len, band, dropout_p):
    """The same of packed sequences, whose lengths are drawn as flash-attention's tests draw them."""
    torch.manual_seed(n)
    dtype, head_dim = (torch.float16, torch.bfloat16)[n % 2], HEAD_DIMS[n % len(HEAD_DIMS)]
    batch, kv_heads = 2 if q_len > 500 else 3, (6, 2, 1)[n // 2 % 3]
    causal, window = band == "causal", (-1, -1)
    if band == "local":
        window = tuple(torch.randint(0, kv_len, (2,)).tolist())
    softcap = SOFTCAP if n % 5 == 4 else 0.0
    slopes = torch.rand(*((batch,) if n % 2 else ()), HEADS) * 0.3 if n % 3 == 2 else None
    masks = [torch.arange(most) < torch.randint(max(1, most - 20), most + 1, (batch, 1)) for most in (q_len, kv_len)]
    q = torch.randn(batch, q_len, HEADS, head_dim, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(batch, kv_len, kv_heads, head_dim, dtype=dtype, requires_grad=True) for _ in range(2))
    rows, indices, starts_q, most_q, _ = unpad_input(q, masks[0])
    keys, _, starts_k, most_k, used = unpad_input(k, masks[1])
    values, *_ = unpad_input(v, masks[1])
    assert torch.equal(used, masks[1].sum(1).int())
    lengths = starts_q, starts_k, most_q, most_k
    found, lse, S_dmask = flash_attn_varlen_func(
        rows, keys, values, *lengths, dropout_p, None, causal, window, softcap, slopes, return_attn_probs=True
    )
    assert lse.shape == (HEADS, len(rows)) and lse.dtype is torch.float32
    assert S_dmask.numel() == (batch * HEADS * most_q * most_k if dropout_p else 0)
    out = pad_input(found, indices, batch, q_len)
    truth, plain = [], []
    for results, precision in ((truth, torch.float64), (plain, dtype)):
        for b in range(batch):
            L, S = masks[0][b].sum(), masks[1][b].sum()
            own = None if slopes is None else slopes if slopes.dim() == 1 else slopes[b]
            kept = S_dmask[b : b + 1, :, :L, :S].signbit().logical_not() if dropout_p else None
            one = q[b : b + 1, :L], k[b : b + 1, :S], v[b : b + 1, :S]
            result = written_out(*one, kept, dropout_p, causal, window, softcap, own, precision)
            results.append(torch.nn.functional.pad(result, (0, 0, 0, 0, 0, q_len - L)))
    g = torch.randn_like(out) * masks[0][..., None, None]
    ours, exact, theirs = (
        (one, *torch.autograd.grad(one, (q, k, v), g.to(one.dtype)))
        for one in (out, torch.cat(truth), torch.cat(plain))
    )
    for name, factor, a, b, c in zip(("out", "dq", "dk", "dv"), (2, 3, 3, 3), ours, exact, theirs, strict=True):
        error, allowed = (a - b).abs().max(), factor * (c - b).abs().max()
        assert error <= allowed + 1e-5, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_S_dmask():
    """The softmax's result, signed by the mask of the seed that was used."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    out, _, S_dmask = flash_attn_func(q, k, v, 0.4, return_attn_probs=True)
    weights = ((q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) / 4).softmax(-1)
    torch.testing.assert_close(S_dmask.abs(), weights)
    dropped = torch.where(S_dmask.signbit(), 0, weights / 0.6) @ v.transpose(1, 2)
    torch.testing.assert_close(out, dropped.transpose(1, 2))
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    assert torch.equal(flash_attn_func(q, k, v, 0.4), out)  # the same draw
    assert 0.3 < S_dmask.signbit().float().mean() < 0.5


@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": (3, 0)}, {"dropout_p": 0.3, "softcap": 5.0}])
def test_packed(options):
    qkv = torch.randn(2, 20, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 20, 4, 16, dtype=torch.float64)
    gradients = []
    for function, arguments in (
        (flash_attn_func, qkv.unbind(2)),
        (flash_attn_kvpacked_func, (qkv[:, :, 0], qkv[:, :, 1:])),
        (flash_attn_qkvpacked_func, (qkv,)),
    ):
        torch.manual_seed(1)
        out = function(*arguments, **options)
        gradients.append((out, *torch.autograd.grad(out, qkv, g)))
    for others in gradients[1:]:
        for one, other in zip(gradients[0], others, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": (3, 0)}, {"dropout_p": 0.3, "softcap": 5.0}])
def test_packed_sequences_in_one_tensor(options):
    qkv = torch.randn(20, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    g, starts = torch.randn(20, 4, 16, dtype=torch.float64), torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    results = []
    for function, arguments, lengths in (
        (flash_attn_varlen_func, qkv.unbind(1), (starts, starts, 13, 13)),
        (flash_attn_varlen_kvpacked_func, (qkv[:, 0], qkv[:, 1:]), (starts, starts, 13, 13)),
        (flash_attn_varlen_qkvpacked_func, (qkv,), (starts, 13)),
    ):
        torch.manual_seed(1)
        out = function(*arguments, *lengths, **options)
        results.append((out, *torch.autograd.grad(out, qkv, g)))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_pages_of_packed_sequences():
    q, cache = torch.randn(9, 4, 16), torch.randn(5, 8, 2, 16)
    starts, ends = (torch.tensor(n, dtype=torch.int32) for n in ([0, 2, 9], [0, 11, 20]))
    table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    keys = torch.cat([cache[table[0].long()].flatten(0, 1)[:11], cache[table[1].long()].flatten(0, 1)[:9]])
    found = flash_attn_varlen_func(q, cache, cache, starts, ends, 7, 11, causal=True, block_table=table)
    expected = flash_attn_varlen_func(q, keys, keys, starts, ends, 7, 11, causal=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="page_size is 8"):
        flash_attn_varlen_func(q.requires_grad_(), cache, cache, starts, ends, 7, 11, block_table=table)
    with pytest.raises(NotImplementedError, match="with a block_table and dropout"):
        flash_attn_varlen_func(q, cache, cache, starts, ends, 7, 11, 0.1, block_table=table, return_attn_probs=True)


def test_padding():
    """There and back, with rows that have a place and do not count, and with gradients."""
    x = torch.randn(3, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    used = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    unused = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    rows, indices, starts, most, counted = unpad_input(x, used, unused)
    assert starts.tolist() == [0, 3, 3, 8] and most == 5 and counted.tolist() == [2, 0, 4]
    assert starts.dtype is counted.dtype is torch.int32 and type(most) is int
    assert torch.equal(rows, index_first_axis(x.flatten(0, 1), indices))
    back = pad_input(rows, indices, 3, 5)
    assert torch.equal(back, x * (used + unused)[..., None, None])
    assert torch.autograd.gradcheck(lambda x: pad_input(unpad_input(x, used)[0] ** 2, unpad_input(x, used)[1], 3, 5), x)
    rows, _, starts, most, counted = unpad_input(x, used, used + unused)  # rows that both masks name are there once
    assert starts.tolist() == [0, 3, 3, 8] and rows.shape[0] == 8 and most == 5 and counted.tolist() == [2, 0, 4]
    none, _, starts, most, _ = unpad_input(x, torch.zeros(3, 5, dtype=torch.bool))
    assert none.shape == (0, 2, 4) and most == 0 and not starts.any()


def test_signatures():
    """Names and order of the arguments, by which code passes them."""
    tail = [
        "dropout_p",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "alibi_slopes",
        "deterministic",
        "return_attn_probs",
    ]
    lengths = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    for function, tensors, last in (
        (flash_attn_func, ["q", "k", "v"], []),
        (flash_attn_kvpacked_func, ["q", "kv"], []),
        (flash_attn_qkvpacked_func, ["qkv"], []),
        (flash_attn_varlen_func, ["q", "k", "v", *lengths], ["block_table"]),
        (flash_attn_varlen_kvpacked_func, ["q", "kv", *lengths], []),
        (flash_attn_varlen_qkvpacked_func, ["qkv", "cu_seqlens", "max_seqlen"], []),
    ):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == tensors + tail + last
        defaults = [parameters[name].default for name in tail]
        assert defaults == [0.0, None, False, (-1, -1), 0.0, None, False, False]
    parameters = inspect.signature(flash_attn.flash_attn_with_kvcache).parameters
    defaults = {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True}
    defaults |= {"num_splits": 0, "return_softmax_lse": False}
    assert {
        name: one.default for name, one in parameters.items() if one.default not in (None, inspect._empty)
    } == defaults
    ours = {name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert ours == {"k_scale", "v_scale", "k_type", "v_type", "fast"}
    assert [name for name in parameters if name not in ours] == (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table "
        "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
    ).split()


def test_rows_without_keys():
    q, k, v = torch.randn(1, 6, 1, 8), torch.randn(1, 4, 1, 8), torch.randn(1, 4, 1, 8)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :2] == 0).all() and (lse[..., :2] == -torch.inf).all() and lse[..., 2:].isfinite().all()


def test_installed():
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn")
    install_flash_attn()
    try:
        install_flash_attn()  # again: nothing
        theirs = importlib.import_module("flash_attn")
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        assert theirs.flash_attn_func is interface.flash_attn_func is flash_attn_func
        assert theirs.__version__ == interface.__version__ == flash_attn.__version__
        assert importlib.util.find_spec("flash_attn") is not None
        for module, names in MODULES.items():
            for name in names:
                assert getattr(importlib.import_module(module), name) is getattr(flash_attn, name)
        of_3 = importlib.import_module("flash_attn_interface")
        names = [name for name in vars(flash_attn.fa3) if name.startswith("flash_attn_")]
        assert len(names) == 4 and all(getattr(of_3, name) is getattr(flash_attn.fa3, name) for name in names)
        assert theirs.layers.rotary is importlib.import_module("flash_attn.layers.rotary")
        with pytest.raises(ImportError):
            importlib.import_module("flash_attn.ops")
    finally:
        uninstall_flash_attn()
    for name in ("flash_attn", "flash_attn_interface"):
        with pytest.raises(ImportError):
            importlib.import_module(name)
    uninstall_flash_attn()  # again: nothing


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_a_real_one_stays(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("theirs = True")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=rf"^{name} is installed already"):
        install_flash_attn()
    assert importlib.import_module(name).theirs
    with pytest.raises(ImportError, match=rf"^{name} is installed already"):
        install_flash_attn()
    uninstall_flash_attn()
    assert sys.modules.pop(name).theirs


def test_nothing_on_import():
    assert "flash_attn" not in sys.modules


def test_scale_and_dtypes():
    q, k, v = (torch.randn(1, 9, 2, 8, dtype=torch.float64) for _ in range(3))
    out = flash_attn_func(q, k, v, softmax_scale=0.5)
    expected = flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.5)
    assert torch.equal(out, expected.transpose(1, 2)) and out.is_contiguous()
    mask = dropout_mask((1, 2, 9, 9), 1.0, 5)
    assert not mask.any()
